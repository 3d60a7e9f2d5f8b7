"""What SLURM knows: the states of jobs, partitions, limits. Asked where it answers, never waited for where it does not. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence

GONE = "GONE"
_TIMEOUT = 5.0  # seconds
_FRESH = 15.0  # seconds an answer is good for
_STATES = {
    "PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "REQUEUE_HOLD": "held", "REQUEUE_FED": "queued", "SPECIAL_EXIT": "held",
    "RUNNING": "running", "COMPLETING": "running", "SUSPENDED": "running", "STOPPED": "running", "STAGE_OUT": "running", "SIGNALING": "running",
    "RESIZING": "running",
    "COMPLETED": "completed", "FAILED": "failed", "BOOT_FAIL": "failed", "NODE_FAIL": "failed", "OUT_OF_MEMORY": "failed", "DEADLINE": "failed",
    "TIMEOUT": "failed", "PREEMPTED": "preempted", "CANCELLED": "cancelled", "REVOKED": "cancelled", "GONE": "interrupted",
}  # fmt: skip
"""SLURM's states in our words (squeue(1), sacct(1))."""


def ask(job_ids: Sequence[str | None]) -> dict[str, str]:
    """Our word for the state of each job that SLURM knows: squeue first, sacct for what has left the queue."""
    return {job: in_our_words(word) for job, word in words(job_ids).items()}


_asked: tuple[float, tuple[str, ...], dict[str, str]] = (float("-inf"), (), {})


def recently(job_ids: Sequence[str | None]) -> dict[str, str]:
    """`words`, at most every few seconds: for those who look again and again."""
    global _asked
    wanted = tuple(sorted(filter(None, job_ids)))
    when, whom, answer = _asked
    if wanted and (whom != wanted or time.monotonic() - when > _FRESH):
        answer = words(wanted)
        _asked = (time.monotonic(), wanted, answer)
    return answer if wanted else {}


def in_our_words(word: str) -> str:
    return _STATES.get(word, "failed")


def words(job_ids: Sequence[str | None]) -> dict[str, str]:
    """SLURM's own word for the state of each job that it knows: RUNNING, NODE_FAIL … GONE is ours, for a job that has left the
    queue without accounting to say how; where SLURM does not answer, there is no word at all."""
    wanted = {job for job in job_ids if job}
    rows = queue() if wanted else None
    found = {job: word for job, word, _ in rows or () if job in wanted}
    left = wanted - found.keys()
    if left:
        found |= {job: word for job, word in _sacct(left).items() if job in left}
    return found if rows is None else dict.fromkeys(wanted, GONE) | found


def is_here() -> bool:
    """Whether this host has SLURM's commands at all."""
    return shutil.which("squeue") is not None


def queue() -> list[tuple[str, str, str]] | None:
    """(id, state, comment) of every job of ours in the queue, array tasks one by one; None where SLURM does not answer."""
    text = run("squeue", "--me", "-h", "-r", "-o", "%i|%T|%k")
    if text is None:
        return None
    rows = [line.split("|", 2) for line in text.splitlines()]
    return [(row[0].strip(), row[1].strip(), row[2].strip()) for row in rows if len(row) == 3]


def _sacct(job_ids: Iterable[str]) -> dict[str, str]:
    """Empty where accounting is off, or does not answer."""
    masters = sorted({job.split("_")[0] for job in job_ids})
    text = run("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(masters)) or ""
    found = {}
    for line in text.splitlines():
        job, _, state = line.partition("|")
        found |= dict.fromkeys(array_tasks(job), state.split()[0] if state.split() else "")  # "CANCELLED by 0"
    return found


def array_tasks(job: str) -> list[str]:
    """Tasks that never started stand in one line: "12_[0-2,7%4]" -> 12_0 12_1 12_2 12_7."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(%\d+)?\]", job)
    if found is None:
        return [job]
    tasks = []
    for part in found.group(2).split(","):
        first, _, last = part.partition("-")
        tasks += [f"{found.group(1)}_{n}" for n in range(int(first), int(last or first) + 1)]
    return tasks


def failed_node(job_id: str) -> str | None:
    """The node whose failure ended a job, where SLURM knows."""
    found = re.search(r"FailedNode=(\S+)", run("scontrol", "show", "job", job_id) or "")
    name = found.group(1) if found else (run("sacct", "-X", "-n", "-P", "-o", "FailedNode", "-j", job_id) or "").strip()
    return name if re.fullmatch(r"[\w.-]+", name) and name not in ("None", "null") else None


def partitions() -> dict[str, int]:
    """How many nodes each partition has; empty where SLURM does not say."""
    text = run("sinfo", "-h", "-o", "%R|%D") or ""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, nodes = line.partition("|")
        found[name.strip()] = found.get(name.strip(), 0) + int(nodes)
    return found


def default_partition() -> str | None:
    text = run("sinfo", "-h", "-o", "%P") or ""
    return next((line.strip().rstrip("*") for line in text.splitlines() if line.strip().endswith("*")), None)


def largest_array() -> int:
    """Jobs of an array: the cluster's MaxArraySize, SLURM's default of 1001 where it does not say."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run("scontrol", "show", "config") or "", re.MULTILINE)
    return max(1, int(found.group(1)) - 1 if found else 1000)  # indices lie below it; 0 turns arrays off


def cancel(job_ids: Sequence[str]) -> None:
    """Let SLURM end these jobs; those that are gone already do not matter."""
    for start in range(0, len(job_ids), 500):  # a command line has a length
        run("scancel", *job_ids[start : start + 500], timeout=60.0)


def run(*command: str, timeout: float = _TIMEOUT) -> str | None:
    """What a command of SLURM's prints; None where it fails, is missing or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=clean_environment())
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


_OF_A_JOB = re.compile(
    r"(SLURM|SBATCH|SRUN|PMI|PMIX|TORCHELASTIC|SUBMITIT)_|(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$"
)
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS")


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without the variables of the job that this process may be part of: a job submitted from inside another
    would take over its tasks, its memory and its port."""
    environment = os.environ if environment is None else environment
    return {name: value for name, value in environment.items() if name in _OF_THE_CLUSTER or not _OF_A_JOB.match(name)}
