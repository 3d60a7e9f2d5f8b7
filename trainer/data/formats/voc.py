"""Pascal VOC's layout: one XML file an image, and lists of image names for each split."""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from trainer.data.formats.boxes import NAMED, Annotations, settle
from trainer.data.images import EXTENSIONS, header_size
from trainer.data.index import Watch, cached
from trainer.data.source import LayoutError
from trainer.data.table import Table


def scan_voc(
    annotations: Path, images: Path, names: Path, classes: Sequence[str] | None, first_pixel: int, policy: str, keep_empty: bool
) -> Table:
    """The index of one split.

    Args:
        annotations: folder of the XML files.
        names: text file, one image name without its ending a line (a second column, as in VOC's own lists, is passed over).
        classes: index = label; None = every name that occurs in the folder, in alphabetical order, so that all splits agree.
        first_pixel: the number of the leftmost pixel: 1 in the VOC challenges, 0 for most tools since.

    Raises:
        LayoutError: a file is not what it should be.
        DataError: boxes are bad and the policy is "raise".
    """

    def scan(watch: Watch):
        for path in (annotations, images, names):
            watch.add(path)
        watch.add_files(annotations)
        read = Annotations(classes=classes if classes is not None else all_names(annotations))
        label_of = {name: i for i, name in enumerate(read.classes)}
        files = {os.path.splitext(name)[0]: name for name in sorted(os.listdir(images)) if name.lower().endswith(EXTENSIONS)}
        listed = image_names(names)
        _check_annotations(annotations, listed)
        for number, name in enumerate(listed):
            _read_image(read, annotations / f"{name}.xml", images, files.get(name), label_of, number, first_pixel)
        return settle(read, policy, keep_empty, str(annotations))

    options = {
        "annotations": os.path.relpath(annotations, names.parent), "images": os.path.relpath(images, names.parent),
        "classes": classes, "first_pixel": first_pixel, "policy": policy, "keep_empty": keep_empty,
    }  # fmt: skip
    return cached(names, "voc", options, scan)


def _check_annotations(annotations: Path, names: Sequence[str]) -> None:
    missing = [f"{name}.xml" for name in names if not (annotations / f"{name}.xml").is_file()]
    if missing:
        which = ", ".join(missing[:NAMED]) + (f" … ({len(missing)} in all)" if len(missing) > NAMED else "")
        raise LayoutError(f"there is no {which} in {annotations}, but the list of images names {'it' if len(missing) == 1 else 'them'}")


def image_names(path: Path) -> list[str]:
    names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise LayoutError(f"{path} names no image")
    return names


def all_names(annotations: Path) -> list[str]:
    """Every class that occurs in a folder of XML files."""
    found = {o.findtext("name", "").strip() for path in sorted(annotations.glob("*.xml")) for o in _parse(path).iter("object")}
    return sorted(found - {""})


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise LayoutError(f"{path} is not XML: {error}") from None


def _read_image(
    read: Annotations, path: Path, images: Path, file: str | None, label_of: dict[str, int], number: int, first_pixel: int
) -> None:
    if file is None:
        read.defect("missing_image", path.stem)
        return
    root = _parse(path)
    width, height = (_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    size = (int(width), int(height)) if width > 0 and height > 0 else header_size(str(images / file))
    if size is None:
        read.defect("unreadable_image", file)
        return
    read.image(file, size, number)
    for found in root.iter("object"):
        x1, y1, x2, y2 = (_number(found.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        # Corners are pixels' numbers, the last one included, where counting begins at 1; plain coordinates where at 0.
        read.box((x1 - first_pixel, y1 - first_pixel, x2, y2), label_of.get(found.findtext("name", "").strip(), -1))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
