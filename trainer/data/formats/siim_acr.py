"""SIIM-ACR pneumothorax: chest X-rays in folders 0 and 1, and masks of where the lung has collapsed."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data.files import FileSource
from trainer.data.formats.dicom import read_dicom
from trainer.data.formats.image_folder import scan_folder
from trainer.data.images import decode, open_image, read_file
from trainer.data.source import BadSample, LayoutError, Sample, Source, Subset, split_rows
from trainer.data.table import Table

CLASSES = ("no pneumothorax", "pneumothorax")  # of the folders 0 and 1


class XraySource(FileSource):
    """Grey X-rays as RGB. The mask of `<id>.png` or `<id>.dcm` is `<masks>/<id>.png`; without one, samples have none."""

    def __init__(self, root: Path, table: Table, masks: Path | None) -> None:
        super().__init__(root, table, CLASSES)
        if table.meta["classes"] != ["0", "1"]:
            raise LayoutError(
                f"{root} must hold the folders 0 (healthy) and 1 (pneumothorax); it holds {', '.join(table.meta['classes']) or 'none'}"
            )
        self.masks = None if masks is None else os.path.abspath(masks)

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        data = read_file(name)
        if name.lower().endswith((".dcm", ".dicom")):
            image = read_dicom(data, name)
        else:
            opened = open_image(data, name)
            image = opened if self.lazy and self.masks is None else decode(opened, name, least=None if self.masks else self.least)
        return {"image": image, **self.fields(index, name, image.size)}

    def fields(self, index: int, name: str, size: tuple[int, int]) -> Sample:
        label = int(self.table["label"][index])
        if self.masks is None:
            return {"label": label}
        path = os.path.join(self.masks, os.path.splitext(os.path.basename(name))[0] + ".png")
        if not os.path.exists(path):
            if label:
                raise BadSample(name, f"shows a pneumothorax, but its mask {path} is missing")
            return {"label": label, "mask": np.zeros((size[1], size[0]), dtype=np.uint8)}
        mask = decode(open_image(read_file(path), path), path).convert("L")
        if mask.size != size:  # masks are 1024 x 1024, however small the X-rays were made
            (w, h), (mask_w, mask_h) = size, mask.size
            if abs(mask_w * h - mask_h * w) > max(mask.size):  # by more than a pixel of the X-ray, which rounding may take
                raise BadSample(path, f"is {mask_w} x {mask_h} pixels, its X-ray {w} x {h}: another shape, so one of them was cut")
            mask = mask.resize(size, Image.Resampling.NEAREST)
        return {"label": label, "mask": (np.asarray(mask) > 0).astype(np.uint8)}

    def encoded(self, index: int) -> tuple[bytes, str]:
        data, extension = super().encoded(index)
        if extension in (".dcm", ".dicom"):  # what reads the copy is not expected to know DICOM
            buffer = io.BytesIO()
            read_dicom(data, self.name(index)).convert("L").save(buffer, "PNG")
            return buffer.getvalue(), ".png"
        return data, extension


def xray_source(root: Path, masks: Path | None, extensions: Sequence[str], part: tuple[str, float, int] | None = None) -> Source:
    """The X-rays below `root`; with `part` (split, fraction, seed), one side of them, divided class by class by the hash of each path."""
    source = XraySource(root, scan_folder(root, extensions), masks)
    if part is None:
        return source
    train, val = split_rows(np.asarray(source.table["label"]), part[1], part[2], source.table["path"].all())
    return Subset(source, val if part[0] == "val" else train)
