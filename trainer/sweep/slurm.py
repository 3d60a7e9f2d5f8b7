"""Handing jobs to SLURM: one array for all jobs that need the same. submitit writes the batch script; what it starts is
`python -m trainer start RUN_DIR`, one task for each rank, and `trainer.sweep.after` has the last word. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.launcher import SlurmLauncherConfig
from trainer.config.names import nearest
from trainer.errors import ConfigError, Problem, StorageError
from trainer.files import write_atomically
from trainer.sweep import cluster
from trainer.sweep.drive import code_of
from trainer.sweep.manifest import OPEN, Job, Manifest

FOLDER, JOBS, SCRIPT = "slurm", "jobs.json", "job.sbatch"
WAITS = "waits for the first job (canary)"  # why a job is held in the queue
_MARK = "trainyard:"  # begins the comment by which a job is known again after its launcher has died
_RENAMED = {"timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks_per_node"}
_END_TIME = [  # SLURM says it by itself since 23.02; a run stops in time for a last checkpoint
    'end=$(squeue -h -j "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" -o %e 2>/dev/null)',
    'case "$SLURM_JOB_END_TIME$end" in 20??-*) export SLURM_JOB_END_TIME=$(date -d "$end" +%s) ;; esac',
]
_ON_LINE = {"partition": "partition", "nodes": "nodes", "account": "account", "qos": "qos", "constraint": "constraint", "gres": "gres"}


def check(settings: SlurmLauncherConfig, resources: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError where SLURM is not here, or has not got what jobs ask for; before anything is written."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError(
            Problem("hydra/launcher", "slurm", "there is no sbatch on this host", "log in to the cluster, or hydra/launcher=local")
        )
    known, default = cluster.partitions(), cluster.default_partition()
    problems: dict[str, Problem] = {}
    for own in [{}, *resources]:
        wanted = {"partition": settings.partition, "nodes": settings.nodes} | dict(own)
        names = (wanted["partition"] or default or "").split(",")
        for name in names if known else ():
            if name and name not in known:
                close = nearest(name, known)
                problems[name] = Problem(
                    "hydra.launcher.partition", name, f"there is no such partition; there are {', '.join(known)}", f"hydra.launcher.partition={close or next(iter(known))}"
                )  # fmt: skip
        largest = max((known[name] for name in names if name in known), default=None)
        if largest is not None and wanted["nodes"] > largest:
            problems["nodes"] = Problem(
                "hydra.launcher.nodes", wanted["nodes"], f"partition {','.join(names)} has {largest}", f"hydra.launcher.nodes={largest}"
            )
    if problems:
        raise ConfigError(*problems.values())


def submit(manifest: Manifest, jobs: Sequence[Job]) -> None:
    """Queue these jobs. The manifest is saved after every array, so that a launcher killed between two loses none (`adopt`)."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            Problem("sweep", manifest.path, "there is no sbatch on this host, and SLURM is to run it", "log in to the cluster")
        )
    open_jobs = [job for job in jobs if not manifest.directory(job).is_finished()]
    canary = manifest.settings.get("canary") and len(open_jobs) > 1
    for batch in _batches(open_jobs, cluster.largest_array(), alone=1 if canary else 0):
        held = bool(canary and batch[0] is not open_jobs[0])
        _submit(manifest, batch, held=held, canary=bool(canary and not held))
    queued = sum(job.job_id is not None for job in open_jobs)
    ids = sorted({str(job.job_id).split("_")[0] for job in open_jobs if job.job_id})
    print(f"{queued} jobs queued as {', '.join(ids)}; python -m trainer status {manifest.path}")


def _batches(jobs: Sequence[Job], largest: int, alone: int) -> list[list[Job]]:
    """Jobs that need the same, in their order, at most `largest` together; the first `alone` by themselves."""
    groups: dict[str, list[Job]] = {}
    for place, job in enumerate(jobs):
        key = f"alone {place}" if place < alone else json.dumps(job.resources, sort_keys=True)
        groups.setdefault(key, []).append(job)
    return [group[start : start + largest] for group in groups.values() for start in range(0, len(group), largest)]


def _submit(manifest: Manifest, batch: Sequence[Job], *, held: bool, canary: bool) -> None:
    folder = _new_folder(manifest.path.absolute() / FOLDER)
    directories = [str(manifest.directory(job).path.absolute()) for job in batch]
    write_atomically(folder / JOBS, json.dumps({"indices": [job.index for job in batch], "directories": directories}, indent=1))
    write_atomically(folder / "directories", "\n".join(directories) + "\n")
    write_atomically(folder / SCRIPT, script(manifest, batch, folder, canary=canary))
    for job in batch:
        job.attempts += 1
    manifest.save()
    command = ["sbatch", "--parsable", *(["--hold"] if held else []), str(folder / SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=cluster.clean_environment(), cwd=_cwd(manifest))
    if done.returncode:
        raise _refused(done.stderr, manifest, batch)
    array = done.stdout.strip().split(";")[0]
    for place, job in enumerate(batch):
        job.job_id, job.state, job.reason = f"{array}_{place}", "queued", WAITS if held else None
    manifest.save()


def script(manifest: Manifest, batch: Sequence[Job], folder: Path, *, canary: bool = False) -> str:
    """The batch script, as submitit lays it out."""
    from submitit import SlurmExecutor

    settings = manifest.settings | batch[0].resources
    python, code = shlex.quote(sys.executable), code_of(manifest)
    executor = SlurmExecutor(folder)
    executor.update_parameters(**_parameters(manifest, settings, folder))
    executor.parameters["map_count"] = len(batch)
    before = [
        *settings["setup"],
        "export SLURM_KILL_BAD_EXIT=1  # one rank's failure ends the step",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f'run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(folder / "directories"))})',
    ]
    before += _END_TIME
    if settings.get("cpus_per_task"):
        before.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # since 22.05 srun does not inherit it")
    after = ["code=$?", f'exec {python} -P -m trainer.sweep.after "$run" $code {settings["max_requeues"]} {shlex.quote(str(folder))}']
    if canary:
        watcher = f"{python} -P -m trainer.sweep.canary {shlex.quote(str(manifest.path.absolute()))} {batch[0].index}"
        before.append(f"{watcher} & canary=$!")
        after.insert(1, f"kill $canary; {watcher} end")
    executor.parameters |= {"setup": before, "teardown": after}
    return executor._make_submission_file_text(f'{python} -P -u -m trainer start "$run"', "")


def _parameters(manifest: Manifest, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Our settings in submitit's words."""
    taken = ("partition", "account", "qos", "constraint", "exclude", "nodes", "tasks_per_node", "gpus_per_node", "gpus_per_task", "gres",
             "cpus_per_task", "mem_per_cpu", "mem_per_gpu", "timeout_min", "signal_delay_s", "array_parallelism", "srun_args")  # fmt: skip
    values = {_RENAMED.get(key, key): settings[key] for key in taken if settings.get(key) not in (None, [])}
    if settings.get("mem_gb"):
        values["mem"] = f"{round(settings['mem_gb'] * 1024)}MB"
    values["ntasks_per_node"] = settings.get("tasks_per_node") or settings.get("gpus_per_node") or 1
    values["job_name"] = settings.get("name") or manifest.name.replace("/", ".")
    values["comment"] = " ".join(filter(None, [settings.get("comment"), f"{_MARK}{folder}"]))
    requeue = {"requeue": True} if settings["max_requeues"] else {"no-requeue": True}
    values["additional_parameters"] = requeue | {"chdir": _cwd(manifest)} | dict(settings["additional_parameters"])
    return values


def _cwd(manifest: Manifest) -> str:
    return manifest.cwd if os.path.isdir(manifest.cwd) else os.getcwd()


def _new_folder(parent: Path) -> Path:
    number = 0
    while True:
        path = parent / f"{number:03d}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _refused(said: str, manifest: Manifest, batch: Sequence[Job]) -> ConfigError:
    """sbatch's own words, at the setting that they are about where one can tell."""
    words = " ".join(line.removeprefix("sbatch: error: ") for line in said.strip().splitlines()) or "sbatch said nothing"
    settings = manifest.settings | batch[0].resources
    key = next((key for word, key in _ON_LINE.items() if word in words.lower()), None)
    place = f"hydra.launcher.{key}" if key else "hydra/launcher"
    queued = sum(job.job_id is not None for job in manifest.jobs)
    more = f"; {queued} jobs are queued already: python -m trainer cancel {manifest.path}" if queued else ""
    return ConfigError(Problem(place, settings.get(key or "", "slurm"), f"sbatch refuses: {words}{more}"))


def adopt(manifest: Manifest) -> None:
    """Write down the ids of jobs that were queued by a launcher which died before it could.

    Raises:
        ConfigError: SLURM is here and does not say what it has queued. Whoever starts jobs then would queue some of them twice.
    """
    rows = cluster.queue()
    if rows is None and cluster.is_here():
        reason = "SLURM does not say what it has in its queue (squeue), and no job must be there twice"
        raise ConfigError(Problem("sweep", manifest.path, reason, "the same command, when `squeue --me` answers again"))
    for job_id, _, comment in rows or ():
        _, mark, folder = comment.partition(_MARK)
        if not mark or Path(folder).parent.parent != manifest.path.absolute():
            continue
        try:
            indices = json.loads((Path(folder) / JOBS).read_text())["indices"]
        except (OSError, ValueError, KeyError):
            continue
        job = manifest.jobs[indices[int(job_id.split("_")[1])]]
        job.job_id, job.state = job_id, "queued"
    manifest.save()


def let_go(manifest: Manifest) -> None:
    """Release what waits for a first job that has ended without a word of its own: cancelled, or lost with its node."""
    waiting = [job for job in manifest.jobs if job.reason == WAITS and job.job_id]
    first = [job.job_id for job in manifest.jobs if job.job_id and job.reason != WAITS]
    if not waiting or any(word in OPEN for word in cluster.ask(first).values()):
        return
    release(manifest, waiting)


def release(manifest: Manifest, jobs: Sequence[Job]) -> None:
    """Jobs that were queued on hold may start."""
    for job in jobs:
        job.reason = None
    manifest.save()
    for array in sorted({str(job.job_id).split("_")[0] for job in jobs}):
        cluster.run("scontrol", "release", array)
