"""The last line of a batch script: `python -m trainer.sweep.after RUN_DIR EXIT_CODE MAX_REQUEUES`, when the ranks have ended.

A run that was stopped early with a checkpoint is queued again, this array task and no other. What could not speak for itself,
because it was killed, is recorded here. The exit code is the run's, so SLURM says FAILED of what has failed.
"""

from __future__ import annotations

import os
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
    if directory.is_finished():
        return 0
    status = directory.read_status()
    cancelled = _word() in ("CANCELLED", "COMPLETING", "COMPLETED")
    stopped = code == Stopped.exit_code or status.get("state") == "preempted"
    if cancelled:
        directory.status("cancelled", reason="cancelled with scancel")
        return code or Interrupted.exit_code
    if stopped:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restarts < max_requeues and _requeue():
            time.sleep(60)  # SLURM ends this script
            return Stopped.exit_code
        reason = f"{status.get('reason')}; queued again {restarts} times, which is the most (hydra.launcher.max_requeues={max_requeues})"
        directory.status("failed", reason=reason)
        return Stopped.exit_code
    explain_end(directory, code if code < 128 else 128 - code, _log())
    return code or 1


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


def _log() -> Path:
    """What rank 0 printed to stderr."""
    folder = os.environ.get("TRAINYARD_JOB_LOGS", ".")
    return Path(folder) / f"{job_id()}_0_log.err"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
