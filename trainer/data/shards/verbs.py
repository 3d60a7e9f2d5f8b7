"""`python -m trainer shards index|pack …` and `python -m trainer split …`: what can be done with folders and shards by hand."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.config.dataset import DatasetConfig
from trainer.config.names import nearest
from trainer.config.schemas import schema_names, schema_of
from trainer.data.source import Source
from trainer.errors import ConfigError, Problem

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def arguments(verb: str) -> argparse.ArgumentParser:
    """The command line of `shards` or `split`."""
    return {"shards": _shards_arguments, "split": _split_arguments}[verb]()


def _shards_arguments() -> argparse.ArgumentParser:
    parser = _parser("shards", "Make shards, and look through them.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="index|pack")
    index = verbs.add_parser("index", help="find every sample of every shard, and everything that is wrong with them, before a run does")
    index.add_argument("dir", metavar="DIR", help="folder of shards, or a pattern with braces")
    packing = verbs.add_parser(
        "pack",
        help="write any dataset into shards of webdataset's layout, with classes.txt and _info.json beside them; goes on where it broke off",
    )
    packing.add_argument("source", metavar="SRC", help="the dataset's folder")
    packing.add_argument("folder", metavar="DST", help="folder of the shards; a second split is added to those that are there")
    packing.add_argument(
        "fields", metavar="KEY=VALUE", nargs="*", help="settings of the dataset, without the leading `dataset.`: val_fraction=0.1"
    )
    packing.add_argument(
        "--dataset", default="image_folder", help="the dataset's format, one of the choices of dataset= (default: image_folder)"
    )
    packing.add_argument("--split", default="all", choices=["train", "val", "all"], help="which split (default: both)")
    packing.add_argument("--size", default="400MB", help="size of a shard at most (default: 400MB)")
    packing.add_argument("--shuffle", type=int, metavar="SEED", help="a random order instead of the dataset's own")
    packing.add_argument(
        "--verify", action="store_true", help="decode every image and leave out those that fail (otherwise: look at the headers)"
    )
    packing.add_argument("--overwrite", action="store_true", help="replace a split that is there")
    return parser


def shards(argv: Sequence[str]) -> int:
    """`shards index DIR` and `shards pack SRC DST`."""
    parser = arguments("shards")
    options, rest = parser.parse_known_args(argv)
    if options.verb == "pack":  # settings may stand before, between and behind the options
        options.fields += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in options.fields]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _index(options) if options.verb == "index" else _pack(options)


def _split_arguments() -> argparse.ArgumentParser:
    from trainer.data.shards.split import HOW

    parser = _parser("split", "Divide a folder of classes into train/ and val/, class by class.")
    parser.add_argument("dir", metavar="DIR", help="folder that holds one folder for each class")
    parser.add_argument("--val", type=float, default=0.1, help="fraction of each class that validates (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="which images validate follows from it (default: 0)")
    parser.add_argument("--out", help="where train/ and val/ are made (default: DIR-split)")
    parser.add_argument("--how", default="link", choices=sorted(HOW), help="link: hard links where possible; symlink; copy (default: link)")
    return parser


def split(argv: Sequence[str]) -> int:
    """`split DIR --val 0.1 --seed 0`."""
    from trainer.data.shards.split import split_folder

    options = arguments("split").parse_intermixed_args(argv)
    if not 0 < options.val < 1:
        raise ConfigError(Problem("--val", options.val, "must lie between 0 and 1", "--val 0.1"))
    folder = Path(options.dir).expanduser()
    out = Path(options.out).expanduser() if options.out else folder.absolute().with_name(f"{folder.absolute().name}-split")
    train, val = split_folder(folder, out, options.val, options.seed, options.how, IMAGE_ENDINGS, _progress("images"))
    print(f"{train} images to train on and {val} to validate on: dataset=image_folder dataset.path={out}")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from trainer.data.shards.index import index_shards
    from trainer.data.shards.names import INFO, SPLITS, Shards, is_pattern, of_directory, of_info, of_pattern
    from trainer.data.source import LayoutError

    found: dict[str, Shards] = {}
    try:
        if is_pattern(arguments.dir):
            found["all"] = of_pattern(arguments.dir)
        else:
            folder = str(Path(arguments.dir).expanduser().absolute())
            info = os.path.join(folder, INFO)
            for name in SPLITS:
                try:
                    found[name] = of_info([info], SPLITS[name]) if os.path.exists(info) else of_directory(folder, name, alone=False)
                except LayoutError:
                    continue
            if not found:
                found["all"] = of_directory(folder, "train", alone=True)
    except OSError as error:
        raise ConfigError(Problem("DIR", arguments.dir, str(error))) from None
    for name, these in found.items():
        table = index_shards(these.places, "clip", progress=_progress("shards"))
        counts = table.meta["counts"]
        print(
            f"{name}: {len(table)} samples in {len(counts)} shards ({min(counts)} to {max(counts)} each); they hold {', '.join(['image', *table.meta['fields']])}"
        )
        if these.lengths is not None and list(these.lengths) != counts:
            wrong = next(i for i, (said, there) in enumerate(zip(these.lengths, counts, strict=True)) if said != there)
            raise ConfigError(
                Problem(
                    "DIR",
                    arguments.dir,
                    f"{these.said_by} promises {these.lengths[wrong]} samples in {these.places[wrong]}, which holds {counts[wrong]}",
                    "fetch or pack that shard again",
                )
            )
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from trainer.data.shards.pack import pack, parse_size

    size, folder = parse_size(arguments.size), Path(arguments.folder).expanduser()
    config = dataset_config(arguments.dataset, {"path": arguments.source}, arguments.fields)
    if arguments.split != "all":
        config = config.alone(arguments.split)
    problems = list(config.problems())
    if problems:
        raise ConfigError(*problems)
    for name in config.splits:
        source: Source = config.build(name)
        packed = pack(
            source,
            folder,
            name,
            size=size,
            shuffle=arguments.shuffle,
            verify=arguments.verify,
            overwrite=arguments.overwrite,
            progress=_progress(f"{name} samples"),
        )
        print(f"{name}: {packed.samples} samples in {len(packed.shards)} shards")
        for bad in packed.left_out:
            print(f"  left out: {bad}", file=sys.stderr)
    print(f"dataset=webdataset dataset.path={folder}")
    return 0


def dataset_config(name: str, given: dict[str, Any], fields: Sequence[str]) -> DatasetConfig:
    """A dataset's config by the name of its choice, with `key=value` settings, checked against its schema.

    Raises:
        ConfigError: there is no such dataset or no such setting.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    import trainer.data.config as schemas  # noqa: F401  (importing registers them)

    known = schema_names("dataset")
    if name not in known:
        close = nearest(name, known)
        raise ConfigError(Problem("--dataset", name, f"there are {', '.join(sorted(known))}", f"--dataset {close}" if close else ""))
    config = OmegaConf.structured(schema_of("dataset", name))
    wrong = next((f for f in fields if "=" not in f), None)
    if wrong is not None:
        raise ConfigError(Problem("KEY=VALUE", wrong, "is not of the form key=value"))
    try:
        merged = OmegaConf.merge(config, {"image_size": 224, **given}, OmegaConf.from_dotlist([f.removeprefix("dataset.") for f in fields]))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(Problem(missing[0], "???", f"{name} needs it", f"{missing[0]}=…"))
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(Problem("KEY=VALUE", " ".join(fields), str(error).splitlines()[0])) from None
    assert isinstance(found, DatasetConfig)
    return found


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m trainer {verb}", description=description)


def _progress(what: str) -> Callable[[int, int], None]:
    """A line that counts on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda done, total: None
    shown = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            print(f"\r{done} of {total} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
