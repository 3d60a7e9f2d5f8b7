"""Sweeps made by hand: the directories that a launcher and its runs leave behind, for timing and testing what reads them."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tasks  # noqa: F401  (registers the schemas that the config composes)
from trainer.rundir import RunDirectory
from trainer.sweep.manifest import FILE

SEEDS = (42, 195, 335)
SWEPT = {"optimizer.lr": (1e-4, 3e-4, 1e-3, 3e-3), "model.drop_rate": (0.0, 0.1, 0.2), "loop.batch_size": (32, 64, 128)}


def settings(count: int) -> list[dict[str, Any]]:
    """`count` different arms."""
    found: list[dict[str, Any]] = [{}]
    for key, values in SWEPT.items():
        found = [{**arm, key: value} for arm in found for value in values]
    while len(found) < count:
        found += [{**arm, "optimizer.weight_decay": round(0.01 * (len(found) + i), 4)} for i, arm in enumerate(found[:36])]
    return found[:count]


def make_sweep(
    root: Path, arms: Sequence[Mapping[str, Any]], *, seeds: Sequence[int] = SEEDS, epochs: int = 30, states: Mapping[int, str] | None = None,
    name: str = "digits", sweep: str = "2026-11-26_09-00-00",
) -> Path:  # fmt: skip
    """A sweep of every arm with every seed below `root`/runs; `states` of single jobs by their number, completed otherwise."""
    home = root / "runs" / name / "sweeps" / sweep
    home.mkdir(parents=True)
    jobs = []
    for index, (arm, seed) in enumerate((arm, seed) for arm in arms for seed in seeds):
        state = (states or {}).get(index, "completed")
        directory = root / "runs" / name / f"s{seed}-{index:08x}"
        overrides = [f"seed={seed}", *(f"{key}={value}" for key, value in arm.items())]
        jobs.append({"index": index, "overrides": overrides, "group": dict(arm), "seed": seed, "directory": f"runs/{name}/{directory.name}",
                     "job_id": None, "state": "queued" if state == "missing" else state, "reason": None, "attempts": int(state != "queued")})  # fmt: skip
        if state != "missing":
            make_run(directory, arm, seed, state=state, epochs=epochs)
    (home / FILE).write_text(json.dumps({"version": 1, "sweep": sweep, "name": name, "created": "2026-11-26T09:00:00+0000", "argv": ["launch.py", "-m"],
                                         "launcher": "local", "settings": {}, "base": [], "jobs": jobs}))  # fmt: skip
    return home


def make_run(directory: Path, arm: Mapping[str, Any], seed: int, *, state: str = "completed", epochs: int = 30) -> RunDirectory:
    """A run directory as a run leaves it, but for the weights."""
    run = RunDirectory(directory)
    run.create()
    (directory / "config.yaml").write_text(_config(arm, seed))
    rows = _rows(arm, seed, epochs if state == "completed" else epochs // 2)
    with open(run.metrics_path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    names = list(rows[0])
    lines = [",".join(str(row[name]) for name in names) for row in rows]
    (directory / "epochs.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    reason = {"failed": "Diverged: the loss was not finite for 10 steps in a row", "cancelled": "cancelled by hand"}.get(state)
    fields = {
        "step": rows[-1]["step"],
        "total_steps": epochs * 22,
        "heartbeat": time.time(),
        "host": "node1",
        "pid": 1,
        "job_id": None,
        "reason": reason,
    }
    run.status_path.write_text(json.dumps({"state": state, **fields}))
    run.environment_path.write_text(
        json.dumps({"argv": ["launch.py"], "git": {"commit": "3f49b54597b908a8", "dirty": False, "code": "b9c546e376e3cfac", "diff": ""}})
    )
    if state == "completed":
        history = [{key: value for key, value in row.items() if key in ("step", "epoch") or key.startswith("val/")} for row in rows]
        best = max(history, key=lambda row: row["val/top1"])
        run.write_result({"metric": "val/top1", "mode": "max", "best": best, "last": history[-1], "history": history, "steps": rows[-1]["step"],
                          "samples": rows[-1]["samples"], "seconds": rows[-1]["seconds"], "images_per_second": 640.0, "parameters": 4_927_618})  # fmt: skip
    return run


def _rows(arm: Mapping[str, Any], seed: int, epochs: int) -> list[dict[str, Any]]:
    """Learning curves as networks have them: a good rate and a little dropout are better, and every seed has its own luck."""
    luck = random.Random(f"{sorted(arm.items())} {seed}")
    lr, drop = float(arm.get("optimizer.lr", 1e-3)), float(arm.get("model.drop_rate", 0.0))
    top = (
        0.975 - 0.02 * math.log10(lr / 1e-3) ** 2 + 0.05 * drop * (0.3 - drop) + random.Random(seed).gauss(0, 0.004) + luck.gauss(0, 0.003)
    )
    speed = 4 + 2 * math.log10(lr / 1e-4)
    rows = []
    for epoch in range(1, epochs + 1):
        done = 1 - math.exp(-speed * epoch / epochs)
        top1 = round((top - 0.1) * done + 0.1 + luck.gauss(0, 0.004), 6)
        loss = round(2.3 * (1 - done) + 0.09 + 2 * (1 - top) + luck.gauss(0, 0.01), 6)
        rows.append({"step": 22 * epoch, "epoch": float(epoch), "samples": 1408 * epoch, "seconds": 2.2 * epoch, "train/loss": round(loss * 0.9, 6),
                     "train/lr": lr * (1 - epoch / epochs), "val/loss": loss, "val/top1": top1, "val/top5": round(1 - (1 - top1) / 6, 6), "val/seconds": 0.2})  # fmt: skip
    return rows


def _config(arm: Mapping[str, Any], seed: int) -> str:
    """What `to_plain` makes of a run, with the settings of the arm in it."""
    import yaml

    from trainer.config.plain import to_plain
    from trainer.launch.compose import compose_run

    if not _composed:
        _composed.update(to_plain(compose_run("logger.plots=false")))
    content = json.loads(json.dumps(_composed)) | {"seed": seed, "version": f"s{seed}"}
    for key, value in arm.items():
        node = content
        *groups, last = (key if "." in key or not isinstance(content.get(key), dict) else f"{key}.name").split(".")
        for group in groups:
            node = node[group]
        node[last] = value
    return yaml.dump(content, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, allow_unicode=True)


_composed: dict[str, Any] = {}


if __name__ == "__main__":
    import sys

    print(make_sweep(Path(sys.argv[1]), settings(int(sys.argv[2]))))
