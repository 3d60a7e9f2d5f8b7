"""The last line of a batch script: `python -m trainer.sweep.after RUN_DIR EXIT_CODE MAX_REQUEUES LOGS`, when the ranks have ended.

A run that was stopped early with a checkpoint is queued again, this array task and no other. What could not speak for itself,
because it was killed, is recorded here. The exit code is the run's, so SLURM says FAILED of what has failed.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

from trainer.errors import Interrupted, Stopped
from trainer.lock import job_id
from trainer.rundir import RunDirectory
from trainer.sweep import cluster
from trainer.sweep.outcome import explain_end

_PATIENCE = 120.0  # seconds to wait for a controller that is being restarted


def main(argv: list[str]) -> int:
    directory, code, max_requeues = RunDirectory(argv[0]), int(argv[1]), int(argv[2])
    status, holder = directory.read_status(), directory.live_writer()
    if holder is not None and holder.job_id != job_id():  # another job runs it: this one was refused, and has nothing to say of it
        return code or 1
    if directory.is_finished() or status.get("state") == "pruned":
        return 0
    if status.get("state") == "failed":  # with a reason of its own
        return code or 1
    if _word() in ("CANCELLED", "COMPLETING", "COMPLETED"):
        directory.status("cancelled", reason="cancelled with scancel")
        return code or Interrupted.exit_code
    if not _was_stopped(code, status.get("state")):
        explain_end(directory, code if code < 128 else 128 - code, Path(argv[3]) / f"{job_id()}_0_log.err")
        return code or 1
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if restarts < max_requeues and _requeue():
        time.sleep(_PATIENCE)  # SLURM ends this script
        return Stopped.exit_code
    told = status.get("reason") or "stopped"
    most = f"queued again {restarts} times, which is the most (hydra.launcher.max_requeues={max_requeues})"
    directory.status("failed", reason=f"{told}; {most}")
    return Stopped.exit_code


def _was_stopped(code: int, state: str | None) -> bool:
    """Whether somebody told the ranks to stop, rather than one of them failing. srun gives the highest exit code.

    The first rank to leave has SLURM send SIGTERM to the others, which are on their way out; and before Python listens, the
    signal itself ends a rank.
    """
    signals = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    if code == Stopped.exit_code or (state == "preempted" and code in signals):
        return True
    return code in signals - {128 + signal.SIGTERM} or (code == 128 + signal.SIGTERM and _is_preempted())


def _is_preempted() -> bool:
    said = cluster.run("scontrol", "show", "job", str(job_id())) or ""
    found = re.search(r"PreemptTime=(\S+)", said)
    return found is not None and found.group(1) not in ("None", "N/A")


def _requeue() -> bool:
    """Queue this array task again; without its number SLURM would queue all the others too."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if cluster.run("scontrol", "requeue", str(job_id())) is not None:
            return True
        time.sleep(2)
    return False


def _word() -> str:
    """SLURM's word for this job."""
    return (cluster.run("squeue", "-h", "-o", "%T", "-j", str(job_id())) or "").strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
