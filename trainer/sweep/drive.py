"""Starting jobs of a manifest, whichever launcher it names. The only place that knows the launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import Interrupted, Stopped
from trainer.sweep.manifest import Job, Manifest, counts, driving, states
from trainer.sweep.pool import Pool
from trainer.sweep.slots import Slot, slots_for

ROOT = Path(__file__).resolve().parents[2]
CODE = "code"  # in a sweep's directory: the working tree as it was


def drive(manifest: Manifest, jobs: Sequence[Job], *, wait: bool | None = None) -> int:
    """Run these jobs, or hand them to SLURM; the exit code. The manifest must be saved and its jobs' config.yaml written.

    Raises:
        ConfigError: another launcher drives this sweep.
    """
    wait = manifest.settings.get("wait", True) if wait is None else wait
    if manifest.search:
        return _search(manifest, jobs) if wait else _detach(manifest)
    if manifest.launcher == "slurm":
        from trainer.sweep.slurm import submit
        from trainer.sweep.watch import watch

        with driving(manifest.path):
            submit(manifest, jobs)
        return watch(manifest) if wait else 0
    if not wait:
        return _detach(manifest)
    with driving(manifest.path):
        settings = manifest.settings
        slots = slots_for(settings, len(jobs))
        print(f"{len(jobs)} jobs, {len(slots)} at a time{_share(slots[0])}", flush=True)
        canary_steps = settings.get("canary_steps", 20) if settings.get("canary") else 0
        code = Pool(manifest, slots, code=code_of(manifest), canary_steps=canary_steps, say=_say).run(jobs)
    print(summary(manifest))
    return code


def _search(manifest: Manifest, jobs: Sequence[Job]) -> int:
    """Run these jobs, and go on with those that the search chooses."""
    from trainer.launch.search import searching  # composes runs, which nothing else here has to

    with driving(manifest.path):
        each, wanted = len(manifest.search["repeats"]), manifest.search["n_jobs"]
        slots = slots_for(manifest.settings, each * (wanted or manifest.search["n_trials"]))
        with searching(manifest, None if manifest.launcher == "slurm" else -(-len(slots) // each)) as search:
            if manifest.launcher == "slurm":
                from trainer.sweep.watch import follow

                code = follow(manifest, jobs, search)
            else:
                print(f"{manifest.search['n_trials']} trials, {len(slots)} jobs at a time{_share(slots[0])}", flush=True)
                code = Pool(manifest, slots, code=code_of(manifest), say=_say, source=search).run(jobs)
            if code not in (Stopped.exit_code, Interrupted.exit_code):
                code, told = search.verdict()
                print(told)
    print(summary(manifest))
    return code


def _say(text: str) -> None:
    print(text, flush=True)


def _share(slot: Slot) -> str:
    if slot.gpus:
        return f", each on {len(slot.gpus)} GPU{'s' if len(slot.gpus) > 1 else ''}"
    return f", each on {len(slot.cores)} core{'s' if len(slot.cores) > 1 else ''}" if slot.cores else ""


def _detach(manifest: Manifest) -> int:
    """Go on without a terminal, in a process of its own."""
    log = manifest.path / "launcher.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainer", "resume", str(manifest.path.absolute()), "--wait"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=os.environ | python_path(ROOT),
        )  # fmt: skip
    process.returncode = 0  # nobody here waits for it
    print(f"process {process.pid} runs the jobs; {log} has what it says")
    return 0


def python_path(code: Path) -> dict[str, str]:
    """The environment in which `python -P -m trainer` is the one in `code`."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))}


def code_of(manifest: Manifest) -> Path:
    """The folder whose code the jobs run."""
    return manifest.path.absolute() / CODE if manifest.settings.get("code") == "snapshot" else ROOT


def summary(manifest: Manifest) -> str:
    """How a sweep stands, in a line, and what to do next."""
    found = states(manifest)
    told = ", ".join(f"{n} {state}" for state, n in counts(found).items())
    left = [s for s in found if s.state not in ("completed", "pruned", "failed", "held", "cancelled")]
    failed = [s for s in found if s.state == "failed"]
    ways = [f"python -m trainer resume {manifest.path}"] * bool(left or manifest.trials_left) + [
        f"python -m trainer retry {manifest.path}"
    ] * bool(failed)
    return f"{told}; {' or '.join(ways) if ways else manifest.path}"
