# SPDX-License-Identifier: Apache-2.0
"""The one file that a launch reads: where to run, what to run, and how long to insist.

TOML, because the standard library reads it. Every field is checked here, before anything is rented,
and every complaint names its field.
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from slowfast_jax.errors import UsageError, UserError
from slowfast_jax.launch import chips

ROUTES = ("queued", "vm", "gke")
CAPACITIES = ("spot", "reserved", "on-demand")
VERBS = ("train",)  # What writes to gs:// and can be started again on new machines.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,37}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Cloud:
  """The machines.

  Attributes:
    route: queued resources, a plain TPU VM, or GKE through xpk.
    accelerator: the type of one slice, as Google Cloud names it.
    runtime: image of the TPU VM; empty: the one of the type.
    valid_for: how long a request may wait in the queue, such as 6h; empty: without end.
    reservation: its name; GKE only, the other routes find it by project and zone.
    cluster, image: GKE only.
  """

  project: str
  zone: str
  route: str
  accelerator: str
  capacity: str
  slices: int = 1
  runtime: str = ""
  network: str = ""
  subnetwork: str = ""
  service_account: str = ""
  internal_ips: bool = False
  valid_for: str = ""
  reservation: str = ""
  cluster: str = ""
  image: str = ""

  @property
  def region(self) -> str:
    return self.zone.rpartition("-")[0]


@dataclasses.dataclass(frozen=True)
class Job:
  """What runs on every host: `slowfast COMMAND... --workdir=WORKDIR`."""

  name: str
  command: tuple[str, ...]
  workdir: str
  env: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Records:
  """A bucket that every host mounts read-only; an empty one mounts nothing."""

  bucket: str = ""
  mount: str = "/mnt/records"


@dataclasses.dataclass(frozen=True)
class Retry:
  """How long `retry` insists.

  Attributes:
    max_restarts: times that the job is started again before it counts as failed.
    poll_seconds: pause between two looks.
    backoff_seconds: pause before the first restart; doubles with each, up to max_backoff_seconds.
    patience: looks that may fail one after the other, because a cloud command did.
    delete_at_end: give the machines back when the job has ended, well or not.
  """

  max_restarts: int = 50
  poll_seconds: float = 60.0
  backoff_seconds: float = 30.0
  max_backoff_seconds: float = 1800.0
  patience: int = 20
  delete_at_end: bool = True


@dataclasses.dataclass(frozen=True)
class Settings:
  """A launch file. `secrets` maps a variable of the job to a name in Secret Manager."""

  cloud: Cloud
  job: Job
  secrets: dict[str, str]
  records: Records
  retry: Retry


_SECTIONS = {"cloud": Cloud, "job": Job, "records": Records, "retry": Retry}


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
  """Reads a launch file and checks it as a whole.

  Args:
    path: a TOML file.
    overrides: `SECTION.FIELD=VALUE`, applied in order.

  Raises:
    UserError: names the file and the field, what was expected and what was found.
    UsageError: an override is not of that form.
  """
  path = Path(path)
  try:
    tree = tomllib.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"{path}: there is no such launch file; launch/examples/ has some.") from error
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}.") from error
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: not valid TOML: {error}.") from error
  for override in overrides:
    _override(tree, override)
  try:
    return _settings(tree)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error


def _override(tree: dict[str, Any], text: str) -> None:
  match = re.fullmatch(r"(\w+)\.(\w+)(?:\.(\w+))?=(.*)", text, re.DOTALL)
  if not match:
    raise UsageError(f"--set: expected SECTION.FIELD=VALUE, got {text!r}.")
  *parents, name = [part for part in match.groups()[:3] if part]
  for parent in parents:
    tree = tree.setdefault(parent, {})
    if not isinstance(tree, dict):
      raise UsageError(f"--set {text}: {parent} is no section.")
  try:
    tree[name] = tomllib.loads(f"value = {match[4]}")["value"]
  except tomllib.TOMLDecodeError:  # A plain word: a shell has already eaten its quotes.
    tree[name] = match[4]


def _settings(tree: dict[str, Any]) -> Settings:
  _known(tree, {*_SECTIONS, "secrets"}, "section")
  parts = {name: _section(name, cls, tree.get(name, {})) for name, cls in _SECTIONS.items()}
  secrets = _typed("secrets", dict[str, str], tree.get("secrets", {}))
  settings = Settings(secrets=secrets, **parts)
  _check_cloud(settings.cloud)
  _check_job(settings.job)
  _check_secrets(settings)
  _check_records(settings.records)
  for name, value in dataclasses.asdict(settings.retry).items():
    if value < 0:
      raise UserError(f"retry.{name}: expected 0 or more, got {value}.")
  return settings


def _section(name: str, cls: Any, values: Any) -> Any:
  if not isinstance(values, dict):
    raise UserError(f"{name}: expected a section [{name}], got {values!r}.")
  hints = get_type_hints(cls)
  _known(values, set(hints), f"field of [{name}]")
  for field in dataclasses.fields(cls):
    absent = field.default is field.default_factory is dataclasses.MISSING
    if absent and field.name not in values:
      raise UserError(f"{name}.{field.name}: expected a value, found none.")
  return cls(**{key: _typed(f"{name}.{key}", hints[key], value) for key, value in values.items()})


def _known(values: dict[str, Any], names: set[str], what: str) -> None:
  for name in values:
    if name not in names:
      near = difflib.get_close_matches(name, names, n=1)
      hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(sorted(names))}."
      raise UserError(f"{name}: no such {what}. {hint}")


def _typed(name: str, hint: Any, value: Any) -> Any:
  """The value as its field's type; text that a shell or a YAML block would break is refused."""
  kind = get_origin(hint) or hint
  if kind is tuple:
    if not isinstance(value, list):
      raise UserError(f"{name}: expected a list of words, got {value!r}.")
    return tuple(_typed(f"{name}[{i}]", str, word) for i, word in enumerate(value))
  if kind is dict:
    if not isinstance(value, dict):
      raise UserError(f"{name}: expected NAME = TEXT pairs, got {value!r}.")
    return {key: _typed(f"{name}.{key}", str, text) for key, text in value.items()}
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    raise UserError(f"{name}: expected {words[kind]}, got {value!r}.")
  if kind is str and re.search(r"[\x00-\x1f\x7f]", value):
    raise UserError(f"{name}: expected one line of text, got {value!r}.")
  return value


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise UserError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")


def _check_cloud(cloud: Cloud) -> None:
  _one_of("cloud.route", cloud.route, ROUTES)
  _one_of("cloud.capacity", cloud.capacity, CAPACITIES)
  if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", cloud.zone):
    raise UserError(f"cloud.zone: expected a zone such as us-west4-a, got {cloud.zone!r}.")
  if not re.fullmatch(r"[a-z0-9][-a-z0-9.:]*[a-z0-9]", cloud.project):
    raise UserError(f"cloud.project: expected a project id, got {cloud.project!r}.")
  if cloud.slices < 1:
    raise UserError(f"cloud.slices: expected 1 or more, got {cloud.slices}.")
  family = chips.family(cloud.accelerator)
  if cloud.route != "gke" and not family.runtime:
    raise UserError(f'cloud.route: {cloud.accelerator} exists in GKE only; use route = "gke".')
  if cloud.route == "vm" and cloud.slices > 1:
    raise UserError(
      f"cloud.slices: a plain TPU VM is one slice, got {cloud.slices}; several need "
      'route = "queued" or "gke".'
    )
  _check_route_fields(cloud)


def _check_route_fields(cloud: Cloud) -> None:
  """A field that the route ignores would be a wish that nobody hears."""
  gke = {"cluster": cloud.cluster, "image": cloud.image}
  machine = {
    "runtime": cloud.runtime,
    "network": cloud.network,
    "subnetwork": cloud.subnetwork,
    "service_account": cloud.service_account,
    "internal_ips": cloud.internal_ips,
  }
  unused = {**machine} if cloud.route == "gke" else {**gke, "reservation": cloud.reservation}
  if cloud.route != "queued":
    unused["valid_for"] = cloud.valid_for
  for name, value in unused.items():
    if value:
      raise UserError(f"cloud.{name}: route {cloud.route!r} has no such thing; leave it out.")
  if cloud.route == "gke":
    for name, value in gke.items():
      if not value:
        raise UserError(f'cloud.{name}: route "gke" needs it.')
    if (cloud.capacity == "reserved") != bool(cloud.reservation):
      raise UserError('cloud.reservation: in GKE it goes with capacity = "reserved", and only it.')


def _check_job(job: Job) -> None:
  if not _NAME.fullmatch(job.name):
    raise UserError(
      "job.name: expected lower-case letters, digits and hyphens, at most 39 of them, first a "
      f"letter, got {job.name!r}."
    )
  _one_of("job.command[0]", job.command[0] if job.command else "", VERBS)
  for i, word in enumerate(job.command):
    if word.split("=")[0] == "--workdir":
      raise UserError(f"job.command[{i}]: the folder of the run is job.workdir.")
  if not job.workdir.startswith("gs://"):
    raise UserError(
      f"job.workdir: expected gs://BUCKET/..., for a host's disk ends with it, got {job.workdir!r}."
    )


def _check_secrets(settings: Settings) -> None:
  for name, value in {**settings.job.env, **settings.secrets}.items():
    section = "job.env" if name in settings.job.env else "secrets"
    if not _VARIABLE.fullmatch(name):
      raise UserError(f"{section}.{name}: expected the name of an environment variable.")
    if section == "job.env" and _SECRET.search(name):
      raise UserError(
        f"job.env.{name}: this looks like a secret, and would stand on command lines. Store it in "
        f"Secret Manager and give its name there: [secrets] {name} = ..."
      )
    if section == "secrets" and not re.fullmatch(r"[-\w]{1,255}", value):
      raise UserError(
        f"secrets.{name}: expected the name of a secret in Secret Manager, not its value."
      )


def _check_records(records: Records) -> None:
  if records.bucket.startswith("gs://"):
    raise UserError(f"records.bucket: expected its name alone, without gs://: {records.bucket!r}.")
  if not re.fullmatch(r"(/[-\w.]+)+", records.mount):
    raise UserError(f"records.mount: expected an absolute folder, got {records.mount!r}.")
