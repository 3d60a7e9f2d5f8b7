"""How the jobs of a sweep are run: `hydra/launcher=local` or `slurm`, and `hydra.launcher.*`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from trainer.config.fields import field_problems, setting
from trainer.errors import Problem


class Code(Enum):
    """Which code the jobs run."""

    live = "live"
    snapshot = "snapshot"


@dataclass
class LauncherConfig:
    """What every launcher of ours takes."""

    wait: bool = setting(True, "stay until every job has ended; false: return at once, `python -m trainer status` tells the rest")
    canary: bool = setting(
        False, "run the first job alone, for canary_steps; the others start if it gets that far, and are held if it fails"
    )
    canary_steps: int = setting(20, "optimizer steps the first job must pass", ge=1)
    budget: float | None = setting(
        None,
        "GPU hours; a sweep that will take more, by finished runs like it, asks before it starts, or does not where nobody can answer",
        gt=0,
    )
    code: Code = setting(Code.live, "live: jobs run the working tree as it is when they start; snapshot: as it is now")

    def problems(self) -> Iterator[Problem]:
        yield from field_problems(self, "hydra.launcher")


@dataclass
class LocalLauncherConfig(LauncherConfig):
    """A pool of processes on this host, one job each; the next starts when one has ended."""

    _target_: str = "hydra_plugins.trainyard.LocalLauncher"
    slots: int | None = setting(None, "jobs at a time; null = as many as there are sets of GPUs, or of two cores", ge=1)
    gpus_per_job: int | None = setting(None, "GPUs of one job; null = one where there are any", ge=0)
    cores_per_job: int | None = setting(None, "cores of one job; null = an equal share of this host's", ge=1)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        from trainer.surroundings import usable_cores, visible_gpus

        slots, cores = self.slots or 1, self.cores_per_job or 1
        gpus = (1 if visible_gpus() else 0) if self.gpus_per_job is None else self.gpus_per_job
        if slots * gpus > visible_gpus():
            yield Problem(
                "hydra.launcher.gpus_per_job", gpus, f"{slots} x {gpus} GPUs are asked for, and there are {visible_gpus()} here",
                f"hydra.launcher.gpus_per_job={visible_gpus() // slots}",
            )  # fmt: skip
        if slots * cores > usable_cores() and self.cores_per_job is not None:
            yield Problem(
                "hydra.launcher.cores_per_job", cores, f"{slots} x {cores} cores are asked for, and there are {usable_cores()} here",
                f"hydra.launcher.cores_per_job={max(1, usable_cores() // slots)}",
            )  # fmt: skip


@dataclass
class SlurmLauncherConfig(LauncherConfig):
    """SLURM job arrays, one for all jobs that need the same; one task for each rank. The options are submitit's."""

    _target_: str = "hydra_plugins.trainyard.SlurmLauncher"
    wait: bool = setting(False, "stay until every job has ended; false: return at once, `python -m trainer status` tells the rest")
    name: str | None = setting(None, "the jobs' name in the queue; null = the run's name")
    partition: str | None = setting(None, "partition, or several with commas; null = the cluster's default")
    account: str | None = setting(None, "account that is charged")
    qos: str | None = setting(None, "quality of service")
    constraint: str | None = setting(None, "features that nodes must have")
    exclude: str | None = setting(None, "nodes not to be used")
    comment: str | None = setting(None, "comment of the jobs")
    nodes: int = setting(1, "nodes of one job", ge=1)
    tasks_per_node: int | None = setting(None, "ranks on each node; null = one for each GPU, or one", ge=1)
    gpus_per_node: int | None = setting(None, "GPUs on each node", ge=0)
    gpus_per_task: int | None = setting(None, "GPUs of each rank, where they are bound to it", ge=0)
    gres: str | None = setting(None, "generic resources of each node, as gpu:a100:4")
    cpus_per_task: int | None = setting(None, "cores of each rank", ge=1)
    mem_gb: float | None = setting(None, "memory of each node in GB", gt=0)
    mem_per_cpu: str | None = setting(None, "memory of each core, as 4GB")
    mem_per_gpu: str | None = setting(None, "memory of each GPU, as 40GB")
    timeout_min: int = setting(
        60, "time limit in minutes; a run that needs longer is stopped with a checkpoint, queued again, and goes on", ge=1
    )
    signal_delay_s: int = setting(120, "seconds before the time limit at which SLURM sends SIGUSR2", ge=0)
    max_requeues: int = setting(10, "times a job that was preempted or ran out of time is queued again", ge=0)
    array_parallelism: int = setting(256, "jobs of one array that run at the same time", ge=1)
    setup: list[str] = setting([], "shell commands before the job, as `module load cuda`")
    srun_args: list[str] = setting([], "further arguments of srun")
    additional_parameters: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further options of sbatch, as {mail-user: me@example.org, mail-type: FAIL}"}
    )
    resources: list[Any] = field(
        default_factory=list,
        metadata={
            "help": "rules by which resources follow the config, the last that fits winning: [{when: {model: vit_l, loop.batch_size: '>=512'}, then: {gpus_per_node: 8, timeout_min: 600}}]"
        },
    )

    @property
    def ranks(self) -> int:
        """Processes of one job."""
        return self.nodes * (self.tasks_per_node or self.gpus_per_node or 1)


LAUNCHERS: dict[str, type[LauncherConfig]] = {"local": LocalLauncherConfig, "slurm": SlurmLauncherConfig}
RESOURCES = ("partition", "qos", "account", "constraint", "exclude", "nodes", "tasks_per_node", "gpus_per_node", "gpus_per_task", "gres",
             "cpus_per_task", "mem_gb", "mem_per_cpu", "mem_per_gpu", "timeout_min")  # fmt: skip
"""Options of SLURM's that may differ from job to job."""
