# SPDX-License-Identifier: Apache-2.0
"""`slowfast doctor`: tries each thing that a run needs on this machine and says what to do.

Nothing is guessed from names: packages are imported, a frame of each video codec is decoded, a
file is written and read back, and a matrix product is computed on the mesh that a run would get.
"""

import argparse
import base64
import dataclasses
import glob
import importlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HELP = "check what works on this machine and what does not"
EXAMPLES = """examples:
  slowfast doctor
  slowfast doctor --workdir=gs://my-bucket/runs     # can this machine write checkpoints there?
  slowfast doctor --json > doctor.json
"""

# Runtime dependency -> the module whose import proves that it works.
PACKAGES = {
  "absl-py": "absl",
  "array-record": "array_record.python.array_record_module",
  "av": "av",
  "einops": "einops",
  "etils": "etils.epath",
  "flax": "flax.nnx",
  "grain": "grain",
  "jax": "jax.numpy",
  "jaxtyping": "jaxtyping",
  "jinja2": "jinja2",
  "ml-collections": "ml_collections",
  "numpy": "numpy",
  "optax": "optax",
  "orbax-checkpoint": "orbax.checkpoint",
  "pillow": "PIL.Image",
  "protobuf": "google.protobuf",
  "pyarrow": "pyarrow.parquet",
  "rich": "rich",
  "simplejpeg": "simplejpeg",
  "tensorflow-datasets": "tensorflow_datasets",
  "tokenizers": "tokenizers",
}

# One grey 64 x 64 frame per codec and the container it stands in. A decoder's name proves little:
# FFmpeg lists an AV1 decoder that only works with certain GPUs.
FRAMES = {
  "h264": ("h264", "0004JLcj{y1SW(400RI7000932s}ucAOHXXXv>4kAOHXXWr&0Ye3+mBAX_IVCtY>dU3J%8b=QC"),
  "hevc": (
    "hevc",
    "00001KmiN^|NjAC00093kN^M!000939+j9000001LID8*U;qFE0FVFx0{{R603M(qfd!UUX(Y<#fPer10|0;k00RJo0"
    "0001L;=Bav?4$N00AfguM>dgXygAJ{C{ll",
  ),
  "vp9": (
    "ivf",
    "L`z9V001BWR!})GKmb4h0RR910RR910RR91000008vp<R0000000000f=Poy00Zy?_5e5}92iOf05D(x028<v0000",
  ),
  "av1": (
    "ivf",
    "L`z9V001BWK~^v^Kmb4h0RR910RR910RR91000009RL6T00000000005&#Mc00002um6o-FbFaY5CFOY2p~ZL000O8g8",
  ),
}
DEVICE_SECONDS = 180.0


@dataclasses.dataclass(frozen=True)
class Check:
  """One line of the report.

  Attributes:
    found: what is there, or what went wrong.
    remedy: what to do if it does not work.
    needed: without it no run works; otherwise only some videos or uses are lost.
  """

  name: str
  ok: bool
  found: str
  remedy: str = ""
  needed: bool = True

  @property
  def status(self) -> str:
    return "ok" if self.ok else "missing" if self.needed else "optional"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--workdir", default=".", help="folder or gs:// address that runs will write to (default: .)"
  )
  parser.add_argument(
    "--timeout", type=float, default=30.0, help="seconds that remote storage may take (default: 30)"
  )
  parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
  checks = []
  for check in examine(args.workdir, args.timeout):
    checks.append(check)
    if not args.json:
      print(render(check), flush=True)  # At once: what comes next may take long.
  missing = [check.name for check in checks if check.needed and not check.ok]
  if args.json:
    rows = [{**dataclasses.asdict(check), "status": check.status} for check in checks]
    print(json.dumps({"ok": not missing, "checks": rows}, indent=2))
  else:
    print(f"\nDoes not work: {', '.join(missing)}." if missing else "\nEverything needed works.")
  return 1 if missing else 0


def render(check: Check) -> str:
  line = f"{check.status:<9}{check.name:<21}{check.found}"
  return line if check.ok or not check.remedy else f"{line}\n{'':<30}-> {check.remedy}"


def examine(workdir: str, timeout: float) -> Iterator[Check]:
  """All checks, in the order in which a broken one explains the later ones."""
  yield _python()
  packages = [_package(name, module) for name, module in PACKAGES.items()]
  yield from packages
  yield _cores()
  if _works(packages, "jax"):
    yield from _in_time(_devices, DEVICE_SECONDS)
  if _works(packages, "av"):
    yield from (_codec(name) for name in FRAMES)
  yield _storage(workdir, timeout)


def _works(packages: list[Check], name: str) -> bool:
  return any(check.ok for check in packages if check.name == name)


def _python() -> Check:
  return Check(
    "python",
    sys.version_info >= (3, 11),
    f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    "install Python 3.11 or newer",
  )


def _package(name: str, module: str) -> Check:
  try:
    importlib.import_module(module)
    return Check(name, True, importlib.metadata.version(name))
  except Exception as error:  # A broken native library raises anything, not only ImportError.
    return Check(name, False, _short(error), f"pip install --upgrade {name}")


def _cores() -> Check:
  # A container or scheduler may allow fewer cores than the machine has.
  allowed = getattr(os, "sched_getaffinity", None)
  cores = len(allowed(0)) if allowed else os.cpu_count() or 1
  return Check("cpu cores", True, f"{cores}, {_host_bytes() / 2**30:.1f} GiB of memory")


def _host_bytes() -> int:
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _in_time(work: Callable[[], list[Check]], seconds: float) -> list[Check]:
  """The checks of `work`, or one that says that the devices did not answer or failed."""
  remedy = (
    "another process may hold the devices, or the other hosts of the slice did not start this "
    "command too"
  )
  try:
    return _wait_for(work, seconds)
  except TimeoutError:
    return [Check("devices", False, f"no answer in {seconds:.0f} s", remedy)]
  except Exception as error:
    return [Check("devices", False, _short(error), remedy)]


def _wait_for(work: Callable[[], Any], seconds: float) -> Any:
  """Runs `work` in a thread of its own, because what hangs in native code takes no signal."""
  outcome: dict[str, Any] = {}

  def target() -> None:
    try:
      outcome["value"] = work()
    except BaseException as error:
      outcome["error"] = error

  thread = threading.Thread(target=target, daemon=True)
  thread.start()
  thread.join(seconds)
  if thread.is_alive():
    raise TimeoutError(f"no answer in {seconds:g} s")
  if "error" in outcome:
    raise outcome["error"]
  return outcome["value"]


def _devices() -> list[Check]:
  import jax

  devices = jax.devices()
  first = devices[0]
  memory = (first.memory_stats() or {}).get("bytes_limit") or _host_bytes()
  shared = "shared" if first.platform == "cpu" else "each"
  found = (
    f"{len(devices)} x {first.device_kind} ({first.platform}), {memory / 2**30:.1f} GiB {shared}"
  )
  if jax.process_count() > 1:
    found += f", {jax.process_count()} hosts"
  return [Check("devices", True, found), _accelerator(first.platform), *_mesh(devices)]


def _accelerator(backend: str) -> Check:
  """Hardware that is plugged in but that JAX does not use."""
  if backend != "cpu":
    return Check("accelerator", True, f"JAX uses the {backend}")
  extra = _plugged_in()
  if not extra:
    return Check("accelerator", True, "none on this machine; runs use the CPU")
  if os.environ.get("JAX_PLATFORMS"):
    platforms = os.environ["JAX_PLATFORMS"]
    return Check("accelerator", True, f"a {extra} that JAX_PLATFORMS={platforms} leaves unused")
  remedy = f'pip install ".[{extra}]" in the checkout'
  return Check("accelerator", False, f"a {extra} is there, JAX does not see it", remedy)


def _plugged_in() -> str:
  """The extra of the package that drives this machine's accelerator, or nothing."""
  vendors = {Path(file).read_text().strip() for file in glob.glob("/sys/bus/pci/devices/*/vendor")}
  # Google's network cards carry the vendor id too: only a device node makes it a TPU.
  nodes = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  if "0x1ae0" in vendors and nodes:
    return "tpu"
  return "gpu" if os.path.exists("/dev/nvidia0") or os.path.exists("/dev/dxg") else ""


def propose_mesh(devices: list[Any]) -> dict[str, int]:
  """Parameters are split over the chips of a slice, and copied once per slice.

  Gathering parameters needs the fast links inside a slice; gradients alone cross between slices.
  """
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  return {"data": slices, "fsdp": len(devices) // slices, "context": 1, "tensor": 1}


def _mesh(devices: list[Any]) -> list[Check]:
  sizes = propose_mesh(devices)
  text = " ".join(f"{axis}={size}" for axis, size in sizes.items())
  try:
    error = _matmul_error(sizes)
  except Exception as problem:
    return [Check("mesh", False, f"{text}: {_short(problem)}", "update jax and the device driver")]
  ok = error < 1e-2  # TPUs multiply in bfloat16.
  found = f"a matrix product on the mesh, relative error {error:.1e}"
  remedy = "the devices compute wrong numbers: update jax and the driver, or change the machine"
  return [Check("mesh", True, text), Check("matmul", ok, found, remedy)]


def _matmul_error(sizes: dict[str, int]) -> float:
  """Relative error of a product whose rows and weights are split over the mesh."""
  import jax
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  from slowfast_jax.sharding import make_mesh

  mesh = make_mesh(sizes)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((8 * mesh.size, 128), np.float32)
  w = rng.standard_normal((128, 8 * mesh.size), np.float32)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  columns = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
  whole = NamedSharding(mesh, PartitionSpec())
  product = jax.jit(lambda x, w: x @ w, in_shardings=(rows, columns), out_shardings=whole)
  expected = x @ w
  return float(np.abs(np.asarray(product(x, w)) - expected).max() / np.abs(expected).max())


def _codec(name: str) -> Check:
  import av

  container, text = FRAMES[name]
  remedy = "pip install --upgrade --force-reinstall --only-binary=av av"
  try:
    with av.open(io.BytesIO(base64.b85decode(text)), format=container, mode="r") as file:
      frames = list(file.decode(video=0))
  except Exception as error:
    return Check(f"{name} video", False, _short(error), remedy, needed=name == "h264")
  return Check(f"{name} video", len(frames) == 1, "decoded", remedy, needed=name == "h264")


def _storage(workdir: str, timeout: float) -> Check:
  """Writes, reads and removes a small file where runs will write."""
  remote = "://" in workdir
  work = _probe_remote if remote else _probe_local
  remedy = "choose another --workdir, or make this one writable"
  if remote:
    remedy = (
      "check the address, then `gcloud auth application-default login` (on a cloud machine: give "
      'its service account the storage role); gs:// needs `pip install ".[tpu]"` in the checkout'
    )
  try:
    _wait_for(lambda: work(workdir, timeout), timeout + 5)
  except Exception as error:
    return Check("storage", False, f"{workdir}: {_short(error)}", remedy)
  return Check("storage", True, f"{workdir}: written, read back and removed")


def _probe_local(workdir: str, timeout: float) -> None:
  del timeout
  folder = Path(workdir)
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  probe = folder / f".slowfast-doctor-{os.getpid()}"
  try:
    probe.write_bytes(b"slowfast")
    if probe.read_bytes() != b"slowfast":
      raise OSError("what was written does not come back")
  finally:
    probe.unlink(missing_ok=True)
    for path in made:  # Innermost first: the doctor leaves nothing behind.
      path.rmdir()


def _probe_remote(workdir: str, timeout: float) -> None:
  """Arrays travel through tensorstore, folders and small files through epath; runs need both."""
  import tensorstore
  from etils import epath

  epath.Path(workdir).exists()  # First: what is not installed shows at once.
  name = f".slowfast-doctor-{os.getpid()}"
  store = tensorstore.KvStore.open(workdir.rstrip("/") + "/").result(timeout=timeout)
  store.write(name, b"slowfast").result(timeout=timeout)
  value = store.read(name).result(timeout=timeout).value
  store.write(name, None).result(timeout=timeout)
  if value != b"slowfast":
    raise OSError("what was written does not come back")


def _short(error: BaseException) -> str:
  """The first line of an error, with its kind where the message alone would not say."""
  lines = str(error).strip().splitlines()
  text = lines[0][:200] if lines else "no answer in time"
  return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
