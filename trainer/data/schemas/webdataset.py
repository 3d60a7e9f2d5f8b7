"""Schema of datasets in shards: tar files in the layout of webdataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.dataset import DatasetConfig, Facts
from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.data.schemas.paths import directory_problem, listed, parse_classes
from trainer.data.source import LayoutError, Source
from trainer.errors import DataError, Problem

if TYPE_CHECKING:
    from trainer.data.shards.names import Shards
    from trainer.data.table import Table


@schema("dataset", "webdataset")
@dataclass
class WebDatasetConfig(DatasetConfig):
    """Tar files in webdataset's layout, read by number through an index, so that order and resuming are exact.

    dataset.path is a directory, a pattern (/data/train-{000000..000099}.tar; then dataset.val_path is one too), or nothing
    where dataset.info says it all.
    """

    info: list[str] = setting(
        [],
        "_info.json files as birder and timm write them, paths or addresses; several are joined; found in dataset.path without being named",
    )
    train_split: str | None = setting(None, "name of the training split in the info files; null = train or training")
    val_split: str | None = setting(None, "name of the validation split in the info files; null = val, valid or validation")
    train_size: int | None = setting(
        None, "use this many training samples, the first ones; wins over what the info files say; needed for streams without info", ge=1
    )
    val_size: int | None = setting(
        None, "use this many validation samples, the first ones; wins over what the info files say; needed for streams without info", ge=1
    )
    class_file: str | None = setting(
        None, "text file of class names, one a line, index = line; null = classes.txt beside the shards. One is always needed"
    )
    bad_boxes: str = setting(
        "clip",
        "boxes that cannot be right: clip to the image and drop what cannot be mended, drop, or raise (exit 3)",
        choices=["clip", "drop", "raise"],
    )
    streaming: bool = setting(
        False, "read shards from front to back with webdataset's own pipeline, for places without random access: NOT exactly resumable"
    )
    shuffle_buffer: int = setting(4000, "streaming: samples that each reader shuffles among", ge=1)
    stream_seed: int = setting(0, "streaming: the order of shards and the shuffling follow from it", ge=0)

    @property
    def offers(self) -> frozenset[str]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the shards hold, from their index."""
        if self.streaming:
            return frozenset({"image", "label"})
        try:
            return frozenset({"image", *self.table(self.splits[0]).meta["fields"]})
        except (OSError, DataError):
            return frozenset({"image", "label"})  # problems() says what is the matter

    def shards(self, split: str) -> Shards:
        """The shards of a split, in order. Raises LayoutError or OSError."""
        from trainer.data.shards import names

        path = self.val_path if split == "val" and self.val_path else self.path
        info = self.info_files()
        if info and not (split == "val" and self.val_path):
            named = self.train_split if split == "train" else self.val_split
            return names.of_info(info, [named] if named else names.SPLITS[split])
        if not path:
            raise LayoutError("is not set, and no info file is named")
        if names.is_pattern(path):
            if split == "val" and not self.val_path and "train" in self.splits:
                raise LayoutError(f"{path} names training shards; dataset.val_path must name those of validation")
            return names.of_pattern(path)
        return names.of_directory(str(Path(path).expanduser().absolute()), split, alone=bool(self.val_path) or len(self.splits) == 1)

    def info_files(self) -> list[str]:
        from trainer.data.shards import names, store

        if self.info:
            return [str(Path(p).expanduser().absolute()) if not store.is_remote(p) else p for p in self.info]
        if not self.path or names.is_pattern(self.path):
            return []
        beside = store.join(self.path if store.is_remote(self.path) else str(Path(self.path).expanduser().absolute()), names.INFO)
        return [beside] if store.exists(beside) else []

    def classes(self, places: Sequence[str]) -> list[str]:
        from trainer.data.shards import names, store

        path = str(Path(self.class_file).expanduser()) if self.class_file and not store.is_remote(self.class_file) else self.class_file
        path = path or names.find_beside(places, names.CLASSES)
        if path is None:
            raise LayoutError(f"no class file: there is no {names.CLASSES} beside {places[0]}")
        return parse_classes(store.read_all(path))

    def table(self, split: str) -> Table:
        from trainer.data.shards.index import index_shards

        return index_shards(self.shards(split).places, self.bad_boxes)

    def build(self, split: str) -> Source:
        from trainer.data.shards.source import ShardSource

        source = self.source(split)
        whole = getattr(source, "source", source)  # that of which it is a part, where it is one
        if isinstance(whole, ShardSource):
            whole.announce()
        return source

    def source(self, split: str) -> Source:
        """As `build`, and says nothing. Raises LayoutError, OSError or DataError."""
        shards = self.shards(split)
        classes = self.classes(shards.places)
        size = self.train_size if split == "train" else self.val_size
        if self.streaming:
            return self._stream(split, shards, classes, size or shards.size)
        import numpy as np

        from trainer.data.shards.index import index_shards
        from trainer.data.shards.source import ShardSource
        from trainer.data.source import Subset

        source = ShardSource(shards.places, index_shards(shards.places, self.bad_boxes), classes, split)
        return source if size is None or size >= len(source) else Subset(source, np.arange(size))

    def _stream(self, split: str, shards: Shards, classes: Sequence[str], length: int | None) -> Source:
        from trainer.data.shards.stream import StreamSource

        if length is None:
            raise LayoutError(f"the size of the {split} split is not known")
        return StreamSource(
            shards.places, classes, split, length=length, lengths=shards.lengths, buffer=self.shuffle_buffer, seed=self.stream_seed
        )

    def reader_problems(self, ranks: int) -> Iterator[Problem]:
        """In streaming, every reader needs a training shard of its own."""
        each = max(int(self.num_workers), 1) if self.num_workers != "auto" else 1  # auto takes no more than there are shards for
        count = len(self.shards("train").places) if self.streaming else None
        if count is not None and count < ranks * each:
            key, value = ("dataset.num_workers", self.num_workers) if ranks <= count else ("dataset.streaming", True)
            fix = f"dataset.num_workers={count // ranks}" if ranks <= count else "dataset.streaming=false"
            yield Problem(
                key,
                value,
                f"{ranks} ranks x {each} readers are more than the {count} training shards, and in streaming no two may read one",
                f"{fix}, or smaller shards",
            )

    def facts(self) -> Facts:
        return self.facts_of(self.source)

    def problems(self) -> Iterator[Problem]:
        if self.info and not self.path:
            yield from (p for p in super().problems() if p.key != "dataset.path")
        else:
            yield from super().problems()
        found = [*self._path_problems()]
        yield from found
        if not found and (self.path or self.info):
            for split in self.splits:
                try:
                    shards = self.shards(split)
                except OSError as error:
                    key = (
                        "dataset.info" if self.info_files() else "dataset.val_path" if split == "val" and self.val_path else "dataset.path"
                    )
                    yield Problem(
                        key,
                        self.info if key == "dataset.info" and self.info else getattr(self, key.removeprefix("dataset.")),
                        f"{split} split: {error}",
                    )
                    return
                yield from self._class_problems(shards) if split == self.splits[0] else ()
                yield from self._size_problems(split, shards)

    def _path_problems(self) -> Iterator[Problem]:
        from trainer.data.shards import names, store

        for key, path in (("dataset.path", self.path), ("dataset.val_path", self.val_path)):
            if path and not names.is_pattern(path) and not store.is_remote(path):
                wrong = directory_problem(key, path)
                if wrong:
                    yield wrong
            elif path and not names.is_pattern(path) and not self.info_files():
                yield Problem(
                    key,
                    path,
                    "is a remote folder without _info.json, and remote folders are not listed",
                    f"{key}={path.rstrip('/')}/train-{{000000..000099}}.tar, or dataset.info=[<address of _info.json>]",
                )
        if self.streaming and self.class_balanced:
            yield Problem(
                "dataset.class_balanced",
                True,
                "labels of a stream are not known before they are read",
                "dataset.class_balanced=false or dataset.streaming=false",
            )

    def _class_problems(self, shards: Shards) -> Iterator[Problem]:
        try:
            self.classes(shards.places)
        except OSError as error:
            reason = str(error) if isinstance(error, LayoutError) else f"cannot be read: {error.strerror or error}"
            yield Problem(
                "dataset.class_file",
                self.class_file,
                reason,
                "dataset.class_file=/path/to/classes.txt, one class name a line, index = line",
            )

    def _size_problems(self, split: str, shards: Shards) -> Iterator[Problem]:
        key, size = f"dataset.{split}_size", self.train_size if split == "train" else self.val_size
        if self.streaming:
            if size is None and shards.size is None:
                yield Problem(
                    key,
                    None,
                    f"the size of a stream that no info file tells must be given ({len(shards.places)} shards)",
                    f"{key}=<samples>, or dataset.streaming=false",
                )
            return
        import numpy as np

        table = self.table(split)
        count = len(table)
        if size is not None and size > count:
            yield Problem(key, size, f"the {len(shards.places)} shards of the {split} split hold {count} samples only", f"{key}={count}")
        if size is None and shards.size is not None and shards.size != count:
            short = [i for i, (said, there) in enumerate(zip(shards.lengths or (), table.meta["counts"], strict=False)) if said != there]
            which = f"; they differ in {listed([shards.places[i] for i in short])}" if short else ""
            yield Problem(
                key,
                None,
                f"{shards.said_by} promises {shards.size} samples, but the shards hold {count}{which}",
                f"{key}={count} if that is right; else fetch or pack the shards again",
            )
        try:
            classes = self.classes(shards.places)
        except OSError:
            return  # said already
        highest = [int(np.asarray(table["label"]).max(initial=-1))]
        if "labels" in table:
            highest.append(int(np.asarray(table["labels"].values).max(initial=-1)))
        if max(highest) >= len(classes):
            yield Problem(
                "dataset.class_file",
                self.class_file,
                f"names {len(classes)} classes, but the {split} shards hold the class {max(highest)}",
                f"a class file of at least {max(highest) + 1} lines",
            )
