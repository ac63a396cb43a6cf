# SPDX-License-Identifier: Apache-2.0
"""The commands for TPU VMs: a plain one, or queued resources of one or several slices.

Pure functions of the settings. Code reaches the hosts as a wheel, in a folder of the home directory
that also has the shell scripts of launch/host.
"""

import dataclasses
import os
import shlex
from pathlib import Path

from slowfast_jax.launch import chips
from slowfast_jax.launch.commands import Command, command, flags
from slowfast_jax.launch.settings import Settings

ROOT = Path(__file__).parents[2]
TPUS = ("gcloud", "compute", "tpus")

# What gcloud says of a machine, and what that means to whoever waits for it.
STATES = {
  "WAITING": {
    "ACCEPTED", "WAITING_FOR_RESOURCES", "CREATING", "PROVISIONING", "STARTING", "RESTARTING",
    "REPAIRING", "DELETING",
  },
  "ACTIVE": {"ACTIVE", "READY"},
  "LOST": {
    "FAILED", "SUSPENDING", "SUSPENDED", "PREEMPTED", "TERMINATED", "STOPPING",
    "STOPPED", "HIDING", "HIDDEN",
  },
}  # fmt: skip


def job_words(settings: Settings) -> list[str]:
  """Arguments of the module `host`: what runs, with the names of secrets and never their values."""
  job = settings.job
  words = [f"--env={name}={value}" for name, value in job.env.items()]
  for name, secret in settings.secrets.items():
    words.append(f"--secret={name}=projects/{settings.cloud.project}/secrets/{secret}")
  return [*words, f"--workdir={job.workdir}", "--", *job.command]


class Machines:
  """Verbs of the routes `vm` and `queued`, each as the commands that do it."""

  def __init__(self, settings: Settings):
    self._settings = settings
    cloud = settings.cloud
    self._name = settings.job.name
    self._place = flags(zone=cloud.zone, project=cloud.project)
    self._queued = cloud.route == "queued"
    self._slices = cloud.slices
    self._folder = f"slowfast-{self._name}"  # In the home directory of every host.

  @property
  def bundle(self) -> Path:
    """What is copied to the hosts; relative, as the user's runs/ are."""
    return Path("runs/launch") / self._name / "ship"

  def up(self) -> list[Command]:
    create = command("rent the machines", TPUS, self._kind, "create", self._name, self._create())
    ready = dataclasses.replace(self.describe(), until="ACTIVE" if self._queued else "READY")
    return [create, ready]

  @property
  def _kind(self) -> str:
    return "queued-resources" if self._queued else "tpu-vm"

  def _create(self) -> list[str]:
    cloud, nodes = self._settings.cloud, []
    runtime = cloud.runtime or chips.family(cloud.accelerator).runtime
    if self._queued:
      one = cloud.slices == 1
      nodes = (
        flags(node_id=self._name) if one else flags(node_count=cloud.slices, node_prefix=self._name)
      )
    version = "runtime_version" if self._queued else "version"
    return [
      *nodes,
      *self._place,
      *flags(accelerator_type=cloud.accelerator, **{version: runtime}),
      *flags(spot=cloud.capacity == "spot", reserved=cloud.capacity == "reserved"),
      *flags(valid_until_duration=cloud.valid_for, network=cloud.network),
      *flags(subnetwork=cloud.subnetwork, internal_ips=cloud.internal_ips),
      # Secret Manager and buckets are reached as the machine's service account.
      *flags(service_account=cloud.service_account, scopes="cloud-platform"),
    ]

  def describe(self) -> Command:
    field = "value(state.state)" if self._queued else "value(state)"
    words = [*self._place, f"--format={field}"]
    return command("see what the machines do", TPUS, self._kind, "describe", self._name, words)

  def describe_nodes(self) -> list[Command]:
    """A queued resource can be ACTIVE while one of its nodes has been preempted."""
    many = self._queued and self._slices > 1
    names = [f"{self._name}-{i}" for i in range(self._slices)] if many else [self._name]
    words = [*self._place, "--format=value(state)"]
    return [command("see the node", TPUS, "tpu-vm", "describe", name, words) for name in names]

  def build(self) -> list[Command]:
    """The bundle: a wheel of this checkout, what pins its dependencies, and the hosts' scripts."""
    root, bundle = os.path.relpath(ROOT), str(self.bundle)
    if not root.startswith("."):  # pip would take a bare word for the name of a package.
      root = f"./{root}"
    scripts = [f"{root}/launch/host/{name}.sh" for name in ("setup", "start", "state", "stop")]
    revision = command(
      "note the revision", "git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40"
    )
    pip = ["python3", "-m", "pip", "wheel", "--quiet"]
    return [
      command("empty the bundle", "rm", "-rf", bundle),
      command("make the bundle", "mkdir", "-p", bundle),
      Command(revision.argv, revision.why, save_to=self.bundle / "revision.txt"),
      command("build the wheel", pip, "--no-deps", "--wheel-dir", bundle, root),
      command("add scripts and pins", "cp", *scripts, f"{root}/launch/constraints.txt", bundle),
    ]

  def ship(self) -> list[Command]:
    """Everything between machines that are there and a job that runs."""
    records = self._settings.records
    folder = self._folder
    fresh = (
      shlex.join(["rm", "-rf", f"{folder}/ship"]) + " && " + shlex.join(["mkdir", "-p", folder])
    )
    mount = [records.bucket, records.mount] if records.bucket else []
    setup = shlex.join(["bash", f"{folder}/ship/setup.sh", folder, *mount])
    return [
      self._ssh("make room on every host", fresh),
      command("copy the bundle to every host", self._scp()),
      self._ssh("install it on every host", setup),
      self.start(),
    ]

  def start(self) -> Command:
    words = ["bash", f"{self._folder}/ship/start.sh", self._folder, *job_words(self._settings)]
    return self._ssh("start the job on every host", shlex.join(words))

  def run(self) -> list[Command]:
    return [*self.build(), *self.ship()]

  def job_state(self) -> Command:
    folder = self._folder
    script = f"{folder}/ship/state.sh"
    asked = f"if [ -e {script} ]; then bash {script} {folder}; else echo slowfast-host: absent; fi"
    return self._ssh("see what the job does on every host", asked)

  def status(self) -> list[Command]:
    return [self.describe(), self.job_state()]

  def logs(self, worker: str, follow: bool) -> list[Command]:
    tail = shlex.join(["tail", "-n", "100", *(["-F"] if follow else []), f"{self._folder}/log"])
    return [self._ssh("show the log", tail, worker)]

  def stop(self) -> list[Command]:
    words = ["bash", f"{self._folder}/ship/stop.sh", self._folder]
    return [self._ssh("let the job save and end", shlex.join(words))]

  def kill(self) -> Command:
    """For hosts that wait for ever for one that has ended; the job may be started again."""
    words = ["bash", f"{self._folder}/ship/stop.sh", self._folder, "kill"]
    return self._ssh("end the job on the other hosts", shlex.join(words))

  def down(self) -> list[Command]:
    how = ["--force", "--quiet"] if self._queued else ["--quiet"]
    why = "give the machines back"
    return [command(why, TPUS, self._kind, "delete", self._name, self._place, how)]

  def _to_hosts(self, verb: str, *words: str) -> list[str]:
    """ssh or scp. Queued resources of several slices have one of their own that knows all nodes."""
    many = self._slices > 1
    kind = "queued-resources" if many else "tpu-vm"
    inside = flags(internal_ip=self._settings.cloud.internal_ips)
    return [*TPUS, kind, verb, *words, *self._place, *inside]

  def _ssh(self, why: str, text: str, worker: str = "all") -> Command:
    where = flags(node="all" if worker == "all" else "0") if self._slices > 1 else []
    words = self._to_hosts("ssh", self._name)
    return command(why, words, where, f"--worker={worker}", f"--command={text}")

  def _scp(self) -> list[str]:
    where = flags(node="all") if self._slices > 1 else []
    target = f"{self._name}:{self._folder}/ship"
    return [*self._to_hosts("scp", str(self.bundle), target), *where, "--worker=all", "--recurse"]
