"""What works, but perhaps not as hoped: said before a run starts. What cannot work is in `trainer.validation`. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from trainer.config import LrScaling, RunConfig, stage_runs
from trainer.config.dataset import is_test
from trainer.surroundings import emulates_bf16, num_ranks, usable_cores, visible_gpus


def warnings_of(run: RunConfig, *, here: bool = True) -> Iterator[str]:
    """What a user should know before the run, one line each. `here`: it runs on this host, or one like it."""
    if here:
        yield from _warnings_of_host(run)
    if run.task.whole_batch() and (run.loop.batch_finder or any(part.loop.accumulate > 1 for part in stage_runs(run))):
        most = max(part.loop.accumulate for part in stage_runs(run))
        asked = f"loop.accumulate={most}" if most > 1 else "loop.batch_finder=true"
        yield (
            f"{asked}: {run.task.whole_batch()} looks at all images of a batch at once, but not past a micro-batch, so cutting the batch up changes "
            "what is learned; loop.accumulate=1 does not, with more ranks or loop.activation_checkpointing=true where memory is short"
        )
    yield from run.task.warnings(run)
    if is_test(split := run.dataset.validates_on()):
        yield (
            f"dataset.path={run.dataset.path}: images of a test set validate ({split}), so best.pt is chosen on them, and what it scores there is "
            f"no test score; {run.dataset.spares_test}, and last.pt is chosen by nothing"
        )
    default = next(f.default for f in dataclasses.fields(run.optimizer) if f.name == "base_batch_size")
    if run.optimizer.lr_scaling is LrScaling.none and run.optimizer.base_batch_size != default:
        yield f"optimizer.base_batch_size={run.optimizer.base_batch_size}: has no effect without optimizer.lr_scaling=linear or sqrt"
    wandb = run.logger.wandb
    if not wandb.enabled and (wandb.resume_id or wandb.watch):
        yield "logger.wandb: settings without effect, as W&B is off; logger=wandb turns it on"
    if run.loop.freeze_to is not None and run.init_from is None and not run.model.pretrained:
        yield f"loop.freeze_to={run.loop.freeze_to}: what it freezes is untrained, as neither init_from nor model.pretrained is set"
    if run.init_from is not None and run.model.pretrained:
        yield f"init_from={run.init_from}: replaces the weights that model.pretrained=true fetches"


def _warnings_of_host(run: RunConfig) -> Iterator[str]:
    if run.precision.autocast is not None and not visible_gpus():
        if run.precision.autocast == "float16":
            yield "precision.autocast=float16: there is no GPU, and a CPU gains nothing from it; precision=bf16 keeps the range of fp32"
        elif emulates_bf16():
            yield "precision.autocast=bfloat16: this CPU has to emulate it (it lacks AVX-512), several times slower than precision=fp32"
    workers, cores = run.dataset.num_workers, usable_cores()
    if isinstance(workers, int) and workers * num_ranks(run.distributed) > cores:
        yield f"dataset.num_workers={workers}: more processes than the {cores} cores there are; dataset.num_workers=auto fits them"
