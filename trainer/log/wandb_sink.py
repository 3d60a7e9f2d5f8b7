"""Weights & Biases, fed from the journal. It may be slow, unreachable or without a key: then it logs offline, and says so.

Opened, fed and closed on a thread of its own (trainer/log/relay.py). Imports wandb when it is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.logger import WandbConfig, WandbMode
from trainer.config.plain import to_plain
from trainer.config.run import RunConfig
from trainer.errors import StorageError
from trainer.files import write_atomically
from trainer.log.record import rows_after

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

# The axis of every chart. W&B's own step only rises, by one a row; a resumed run goes back to its checkpoint. `wandb sync`
# joins the files of an offline run's starts in the same way.
STEP = "global_step"
EXIT_CODES = {
    "completed": 0,
    "pruned": 0,
    "preempted": 75,
    "interrupted": 130,
}  # as the process ends with; W&B shows others than 0 as failed
LONGEST_ALERT = 1000  # characters
UNSENT = Path("wandb", "unsent")  # is there where a server did not take all of an online start
SENT = Path("wandb", "sent.txt")  # the starts whose rows a later start has brought to the server
KEPT_ID = Path("wandb", "run_id.txt")  # in the run directory
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


class WandbSink:
    """One W&B run, the same one over all starts of a run directory."""

    def __init__(self, directory: Path, run: RunConfig, run_id: str, start_step: int) -> None:
        goes_on = kept_id(directory) == run_id  # and not in a W&B run of something else (`logger.wandb.resume_id`)
        keep_id(directory, run_id)
        self.run = start(directory, run, run_id)
        self.name, self.alerts = f"{run.name} {run.version}", run.logger.wandb.alert
        self.run.define_metric(STEP, hidden=True)
        self.run.define_metric("*", step_metric=STEP)
        # What the server has of earlier starts. Those beyond the checkpoint come again, to the last bit, and are not sent twice.
        self.known = int(self.run.summary.get(STEP) or 0) if goes_on and self.run.resumed and not self.run.offline else 0
        if not self.run.offline:
            self._catch_up(directory / "metrics.jsonl", start_step)
            mark_sent(directory, Path(self.run.dir).parent)

    def write(self, row: Mapping[str, Any]) -> None:
        if row["step"] > self.known:
            self._log(row["step"], {key: value for key, value in row.items() if key != "step"})

    def images(self, step: int, paths: Sequence[Path]) -> None:
        import wandb

        if step >= self.known:  # pictures follow the row of their step
            self._log(step, {f"previews/{path.stem}": wandb.Image(str(path)) for path in paths})

    def best(self, row: Mapping[str, Any]) -> None:
        self.run.summary.update(
            {f"best/{key.removeprefix('val/')}": value for key, value in row.items() if key == "step" or key.startswith("val/")}
        )

    def watch(self, module: nn.Module, log_every: int) -> None:
        self.run.watch(module, log="all", log_freq=log_every)

    def failed(self, why: str) -> None:
        """An alert: by mail or Slack, as the user has told W&B."""
        if self.alerts:
            self.run.alert(title=f"{self.name} failed", text=why[:LONGEST_ALERT], level="ERROR")

    def close(self, state: str) -> None:
        if state == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=EXIT_CODES.get(state, 1))

    def _catch_up(self, record: Path, start_step: int) -> None:
        """Send what earlier starts could not: the client uploads every quarter of a minute, and a kill ends it, too."""
        if start_step > self.known:
            for row in rows_after(record, self.known):
                if row["step"] <= start_step:
                    self.write(row)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log({STEP: step, **values})


def start(directory: Path, run: RunConfig, run_id: str) -> Any:
    """Start or resume the W&B run `run_id`: online if that works within the time the config allows, else offline."""
    # Its reports of its own errors go to the same server and, where that hangs, hold the process's end up for 20 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # it prints past the progress bar; what matters is said below
    mode = mode_of(run.logger.wandb)
    if mode == "online" and not has_key():
        logger.warning("there is no W&B key (`wandb login`, or WANDB_API_KEY): logging offline. %s", how_to_sync(directory))
        mode = "offline"
    if mode == "online":
        try:
            started = initialise(directory, run, run_id, mode)
        except Exception as error:
            logger.warning("W&B cannot be reached (%s): logging offline. %s", _first_line(error), how_to_sync(directory))
            with contextlib.suppress(SystemExit):  # what it raises where its service did not end well
                wandb.teardown()  # or the run's id would still be taken
            mode = "offline"
        else:
            logger.info("W&B: %s", started.url)
            return started
    return initialise(directory, run, run_id, mode)


def initialise(directory: Path, run: RunConfig, run_id: str, mode: Any) -> Any:
    import wandb

    cfg = run.logger.wandb
    settings = wandb.Settings(
        mode=mode,
        console="off",  # train.log has what is printed; wrapping stdout would fight the progress bar
        silent=True,
        init_timeout=cfg.timeout,
        finish_timeout=cfg.timeout,
        finish_timeout_raises=True,
    )
    return wandb.init(
        project=cfg.project, entity=cfg.entity, group=cfg.group or run.name, job_type=cfg.job_type or task_name(run),
        name=run.version, tags=list(cfg.tags) or None, id=run_id, resume="allow",
        dir=str(directory), config=to_plain(run), settings=settings,
    )  # fmt: skip


def mode_of(cfg: WandbConfig) -> str:
    """The mode to use. WANDB_MODE, by which a cluster without a way out says so, can only take away from `online`."""
    asked = os.environ.get("WANDB_MODE", "")
    if cfg.mode is WandbMode.online and asked in {mode.value for mode in WandbMode}:
        return asked
    return cfg.mode.value


def has_key() -> bool:
    """Whether there are credentials for the server, asked without ever prompting for them."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="trainyard", prompt=False, update_session=False) is not None


def choose_id(directory: Path, cfg: WandbConfig, ids: Mapping[str, str]) -> str:
    """The W&B run to log to: the config's, else the run directory's, else the checkpoint's, else a new one."""
    return cfg.resume_id or kept_id(directory) or ids.get("wandb") or "".join(secrets.choice(ALPHABET) for _ in range(8))


def kept_id(directory: Path) -> str:
    """The W&B run that this directory has logged to so far; empty where it has not."""
    path = directory / KEPT_ID
    return path.read_text().strip() if path.is_file() else ""


def keep_id(directory: Path, run_id: str) -> None:
    """Write it down before W&B hears of it, so that a kill during the start does not lose it."""
    path = directory / KEPT_ID
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, run_id + "\n")


def task_name(run: RunConfig) -> str:
    """The package of the task's config: `classification` for tasks.classification.config."""
    return type(run.task).__module__.split(".")[-2:][0]


def end_service() -> None:
    """Kill wandb's service process, for which it and the end of this process would otherwise wait without limit."""
    wandb = sys.modules.get("wandb")
    if wandb is None:
        return
    forget = getattr(getattr(wandb.setup(), "_connection", None), "_cleanup", None)
    for pid in children("wandb-core"):
        os.kill(pid, signal.SIGKILL)
    if forget is not None:
        forget()  # takes back the hook that would say goodbye to it


def children(name: str) -> list[int]:
    """The processes called `name` that this one has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            called, _, rest = entry.read_text().partition("(")[2].rpartition(")")
            if called == name and rest.split()[1] == str(os.getpid()):
                found.append(int(entry.parent.name))
    return found


def mark_unsent(directory: Path) -> None:
    """Remember that the server lacks some of this run, for `python -m trainer sync`."""
    with contextlib.suppress(OSError):
        (directory / UNSENT).touch()


def mark_sent(directory: Path, current: Path) -> None:
    """Remember that the server has the rows of every start before the `current` one: sent again, they would be there twice."""
    names = sorted(path.name for path in (directory / "wandb").glob("*run-*") if path.is_dir() and path.name != current.name)
    with contextlib.suppress(OSError, StorageError):
        write_atomically(directory / SENT, "".join(f"{name}\n" for name in names), durable=False)
        (directory / UNSENT).unlink(missing_ok=True)


def how_to_sync(directory: Path) -> str:
    return f"Later: python -m trainer sync {directory}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
