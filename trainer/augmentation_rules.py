"""Rules on what becomes of images on their way to the task: in which batches they come, and how they are augmented.

See `trainer.validation` for what a rule is. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainer.config import Facts, RunConfig
from trainer.errors import Problem

SPATIAL = {"boxes", "box", "parts", "mask"}  # of a sample: what has to move along with its pixels


def order(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """Batches of one shape are cut out of whole passes over the data, in which each sample comes once."""
    dataset, value = run.dataset, run.dataset.shape_groups
    if value is None:
        return
    for key, other, off in (
        ("loop.samples_per_epoch", run.loop.samples_per_epoch, None), ("dataset.repeats", dataset.repeats, 1),
        ("dataset.class_balanced", dataset.class_balanced, False),
    ):  # fmt: skip
        if other != off:
            reason = f"groups the images of whole passes over the data, and {key}={other} makes epochs of another kind"
            yield Problem(
                "dataset.shape_groups",
                value,
                reason,
                f"dataset.shape_groups=null, or {key}={str(off).lower() if off is not None else 'null'}",
            )


def mixing(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """Mixup and cutmix mix labels too, and mosaics objects."""
    for name in ("mixup", "cutmix"):
        value = getattr(run.augmentation, name)
        if value and "label" not in run.task.needs:
            yield Problem(f"augmentation.{name}", value, "this task learns from no labels that could be mixed", f"augmentation.{name}=0")
    mosaic = getattr(run.augmentation, "mosaic", 0)
    if mosaic and "boxes" not in run.task.needs:
        yield Problem(
            "augmentation.mosaic",
            mosaic,
            "puts the objects of four images into one, and this task learns from no boxes",
            "augmentation.mosaic=0",
        )
    elif mosaic and (lost := run.dataset.offers & (SPATIAL - {"boxes"})):
        yield Problem(
            "augmentation.mosaic", mosaic, f"puts four images into one, where {listed_words(lost)} cannot follow", "augmentation.mosaic=0"
        )


def task_and_augmentation(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """The task gets as many views of an image as it wants, and nothing it learns from is left behind when pixels move."""
    augmentation, chosen = run.augmentation, type(run.augmentation).__name__
    if augmentation.views != run.task.views:
        reason = (
            "gives several views of an image, and this task takes one"
            if augmentation.views
            else "gives one view of an image, and this task compares several"
        )
        yield Problem("augmentation", chosen, reason, f"augmentation={'basic' if augmentation.views else 'dino'}")
    elif (augmentation.moves_pixels or augmentation.shift) and (lost := run.task.needs & SPATIAL):
        yield Problem("augmentation", chosen, f"moves pixels in ways that {listed_words(lost)} cannot follow", "augmentation=basic")
    if augmentation.changes_colour and facts.channels != 3:
        yield Problem("augmentation", chosen, f"changes colours, and the images have {facts.channels} channels", "augmentation=basic")


def listed_words(words: Iterable[str]) -> str:
    *most, last = sorted(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last
