# SPDX-License-Identifier: Apache-2.0
"""The commands for Google Kubernetes Engine: clusters and jobs by xpk, their state by kubectl.

GKE itself starts a job again that was preempted: xpk makes it a JobSet, which restarts on the exit
codes 42 and 127 to 255 and on no other.
"""

import shlex

from slowfast_jax.launch.commands import Command, command, flags
from slowfast_jax.launch.machines import job_words
from slowfast_jax.launch.settings import Settings

# A large model saves in minutes; xpk's own 30 s would cut the file off.
GRACE_SECONDS = 600
CONTAINER = "jax-tpu"  # As xpk names it.

# Kubernetes wants a size of every volume; that of a bucket bounds nothing.
NOMINAL_GB = 100

# Sizes -1: no bound. The listing of the bucket is read once, while the pod starts.
MOUNT_OPTIONS = (
  "implicit-dirs,metadata-cache:type-cache-max-size-mb:-1,metadata-cache:stat-cache-max-size-mb:-1,"
  "metadata-cache:ttl-secs:-1,file-system:kernel-list-cache-ttl-secs:-1"
)


class Gke:
  """Verbs of the route `gke`, each as the commands that do it."""

  def __init__(self, settings: Settings):
    self._settings = settings
    cloud = settings.cloud
    self._name = settings.job.name
    self._xpk = flags(cluster=cloud.cluster, project=cloud.project, zone=cloud.zone)
    # xpk makes regional clusters; a name in full, so that no other context is asked by mistake.
    context = f"gke_{cloud.project}_{cloud.region}_{cloud.cluster}"
    self._kubectl = ["kubectl", f"--context={context}"]

  def up(self) -> list[Command]:
    cloud, records = self._settings.cloud, self._settings.records
    kind = {
      "spot": ["--spot"],
      "on-demand": ["--on-demand"],
      "reserved": flags(reservation=cloud.reservation),
    }[cloud.capacity]
    shape = flags(tpu_type=cloud.accelerator, num_slices=cloud.slices)
    more = flags(enable_workload_identity=True, enable_gcsfuse_csi_driver=bool(records.bucket))
    commands = [
      command("make the cluster", "xpk", "cluster", "create", self._xpk, shape, kind, more)
    ]
    if records.bucket:
      attach = flags(type="gcsfuse", bucket=records.bucket, mount_point=records.mount)
      how = ["--readonly=true", "--auto-mount=false", "--prefetch-metadata", f"--size={NOMINAL_GB}"]
      options = [f"--mount-options={MOUNT_OPTIONS}"]
      words = [self._storage, *self._xpk, *attach, *how, *options]
      commands.append(command("let jobs mount the records", "xpk", "storage", "attach", words))
    return [*commands, self._credentials()]

  @property
  def _storage(self) -> str:
    return f"{self._name}-records"

  def run(self) -> list[Command]:
    cloud, retry = self._settings.cloud, self._settings.retry
    # exec: the pod's wrapper sends SIGTERM to what it started, which must not be a shell.
    job = ["exec", "python", "-m", "slowfast_jax.launch.host", *job_words(self._settings)]
    words = [
      f"--workload={self._name}",
      *self._xpk,
      *flags(tpu_type=cloud.accelerator, num_slices=cloud.slices, docker_image=cloud.image),
      *flags(max_restarts=retry.max_restarts, termination_grace_period_seconds=GRACE_SECONDS),
      *flags(storage=self._storage if self._settings.records.bucket else ""),
      f"--command={shlex.join(job)}",
    ]
    return [command("submit the job", "xpk", "workload", "create", words)]

  def build(self) -> list[Command]:
    """Nothing to build, for the image has the code; kubectl has to know the cluster."""
    return [self._credentials()]

  def ship(self) -> list[Command]:
    return self.run()

  def job_state(self) -> Command:
    return command(
      "see what the job does", self._kubectl, "get", "jobset", self._name, "--output=json"
    )

  def status(self) -> list[Command]:
    words = [*self._xpk, f"--filter-by-job={self._name}"]
    return [command("see the job", "xpk", "workload", "list", words)]

  def logs(self, worker: str, follow: bool) -> list[Command]:
    chosen = f"jobset.sigs.k8s.io/jobset-name={self._name}"
    if worker != "all":
      index = f"batch.kubernetes.io/job-completion-index={worker}"
      chosen += f",jobset.sigs.k8s.io/job-index=0,{index}"
    how = ["--tail=100", "--prefix", "--max-log-requests=1024", *(["--follow"] if follow else [])]
    words = ["logs", f"--selector={chosen}", f"--container={CONTAINER}", *how]
    return [self._credentials(), command("show the log", self._kubectl, words)]

  def stop(self) -> list[Command]:
    words = [f"--workload={self._name}", *self._xpk, "--force"]
    return [command("let the job save and end", "xpk", "workload", "delete", words)]

  def down(self) -> list[Command]:
    return [command("delete the whole cluster", "xpk", "cluster", "delete", self._xpk)]

  def _credentials(self) -> Command:
    cloud = self._settings.cloud
    # As xpk itself reaches the clusters that it made.
    place = flags(location=cloud.region, dns_endpoint=True, project=cloud.project)
    words = ["container", "clusters", "get-credentials", cloud.cluster, *place]
    return command("let kubectl in", "gcloud", words)
