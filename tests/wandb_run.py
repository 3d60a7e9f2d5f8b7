"""A short run that logs to W&B, for tests: `python -m tests.wandb_run DIRECTORY {options as JSON}`.

It logs twenty steps; after the tenth it prints "half" and waits for a line. With "watch", it trains a small network.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tasks.classification.config import ClassificationConfig
from trainer.config import LoggerConfig, RunConfig
from trainer.config.logger import WandbConfig, WandbMode
from trainer.errors import Diverged, Stopped
from trainer.log import Journal, open_journal
from trainer.log.wandb_sink import children

STEPS = 20


def main(directory: Path, options: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    wandb = WandbConfig(enabled=True, mode=WandbMode[options.pop("mode", "online")], timeout=options.pop("timeout", 2.0))
    start, ending = options.pop("start", 0), options.pop("ending", "completed")
    wait = options.pop("wait", False)  # at half, until W&B is there
    freeze, images, ids = options.pop("freeze", False), options.pop("images", []), options.pop("ids", {})
    for key, value in options.items():
        setattr(wandb, key, value)
    with open_journal(directory, run_config(wandb), True, ids) as journal:
        journal.relays[0].patience = 60.0  # seconds: a busy machine takes many to start W&B again
        journal.rewind(start)
        step_network = network(journal) if wandb.watch else lambda: None
        for step in range(start + 1, start + STEPS + 1):
            step_network()
            journal.write(step, step / 10, step * 64, {"train/loss": 1 / step, "train/lr": 0.1})
            if step == start + STEPS // 2:
                if wait:
                    journal.relays[0].opened.wait(60)
                journal.epoch({"epoch": 1, "step": step, "val/top1": 0.5, "is_best": True})
                journal.images(step, [Path(image) for image in images])
                print("half", flush=True)
                sys.stdin.readline()
        if freeze:
            journal.relays[0].patience = 3.0  # seconds, for the sake of the test's time
            freeze_service()
        if ending == "stopped":
            raise Stopped("told to")
        if ending == "failed":
            raise Diverged("the loss was not finite")
        print(f"closing at {time.monotonic()}", flush=True)
    print(f"closed at {time.monotonic()}", flush=True)


def run_config(wandb: WandbConfig) -> RunConfig:
    """A run of which nothing but its logging counts."""
    return RunConfig(name="demo", version="s7", task=ClassificationConfig(), logger=LoggerConfig(plots=False, wandb=wandb))


def network(journal: Journal) -> Any:
    """A step of a small network that W&B watches."""
    import torch

    module = torch.nn.Linear(3, 2)
    journal.watch(module, log_every=5)

    def step() -> None:
        module(torch.ones(4, 3)).sum().backward()

    return step


def freeze_service() -> None:
    """Stop wandb's service process, as a hung disk would."""
    (service,) = children("wandb-core")
    os.kill(service, signal.SIGSTOP)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
