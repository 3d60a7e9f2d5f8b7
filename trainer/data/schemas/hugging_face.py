"""Schema of the adapter to Hugging Face's datasets library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config.dataset import DatasetConfig, Facts
from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.data.source import Source
from trainer.errors import Problem


@schema("dataset", "hugging_face")
@dataclass
class HuggingFaceConfig(DatasetConfig):
    """Hugging Face datasets: a folder written by save_to_disk(), or a name or folder that datasets.load_dataset() takes."""

    subset: str | None = setting(None, "name of the configuration, where the dataset has several")
    train_split: str = setting("train", "name of the training split")
    val_split: str | None = setting(None, "name of the validation split; null = validation, val, valid or test, the first that is there")
    val_fraction: float | None = setting(
        None, "validate on this fraction of the training split, class by class, instead of a split of its own", gt=0, lt=1
    )
    split_seed: int = setting(0, "which rows dataset.val_fraction takes follows from it", ge=0)
    image_column: str = setting("image", "column of the images")
    label_column: str | None = setting("label", "column of the labels; null = there are none")

    def build(self, split: str) -> Source:
        from trainer.data.formats.hugging_face import arrow_source

        names = [self.val_split] if self.val_split else ["validation", "val", "valid", "test"]
        part = None if self.val_fraction is None else (split, self.val_fraction, self.split_seed)
        return arrow_source(
            str(self.path), self.subset, split, [self.train_split] if split == "train" or part else names,
            self.image_column, self.label_column, part,
        )  # fmt: skip

    def facts(self) -> Facts:
        if not self.path:  # the hub would be asked for a dataset called "None"
            return Facts()
        return self.facts_of(self.build)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.val_path:
            yield Problem("dataset.val_path", self.val_path, "a split of dataset.path validates", "dataset.val_split=<its name>")
        if importlib.util.find_spec("datasets") is None:
            yield Problem("dataset", "hugging_face", "needs the package `datasets`, which is not installed", 'pip install "trainyard[hf]"')
        elif self.path:
            try:
                train, val = (self.build(split) for split in (self.splits[0], self.splits[-1]))
                if tuple(train.classes) != tuple(val.classes):
                    yield Problem("dataset.val_split", self.val_split, "its classes differ from the training split's")
            except OSError as error:
                yield Problem("dataset.path", self.path, str(error))
