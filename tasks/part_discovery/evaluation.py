"""One validation pass of part discovery: what each image says, gathered over ranks in the order of the dataset, then scored.

Without noise and with every image counted once, so a second pass gives the same bits and other numbers of ranks the same
figures. What is scored follows from what the samples hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tasks.part_discovery import scores
from tasks.part_discovery.pictures import sheet
from trainer.evaluation import all_cat
from trainer.labels import DETAILS, among, label_report
from trainer.task import Batch, Report

if TYPE_CHECKING:
    from tasks.part_discovery.network import Found
    from tasks.part_discovery.task import PartDiscovery

PARTED = ("top1", "top1_stage1", "loss", "seen_fraction")  # columns that the table of what each part is worth has too
MOST_CLASSES = 200  # up to which probabilities are kept for the area under the ROC curve


class Rows:
    """Numbers of each sample, [N, ...] by name, gathered over ranks and put in the order of the dataset. No mean is taken."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts: list[Tensor] = []  # [N, columns] float64

    def add(self, **columns: Tensor) -> None:
        self.shapes = {name: tuple(column.shape[1:]) for name, column in columns.items()}
        self.parts.append(
            torch.cat([column.double().flatten(1) if column.ndim > 1 else column.double()[:, None] for column in columns.values()], 1)
        )

    def gather(self, order: str | None = "index") -> dict[str, np.ndarray]:
        """Collective. Empty where no rank has anything."""
        if dist.is_initialized():  # a rank whose share was empty has to take part all the same
            everyone: list[dict[str, tuple[int, ...]] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self.shapes)
            self.shapes = next((shapes for shapes in everyone if shapes), {})
        if not self.shapes:
            return {}
        widths = [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values()]
        device = self.parts[0].device if self.parts else _device()
        mine = torch.cat(self.parts) if self.parts else torch.zeros(0, sum(widths), dtype=torch.float64, device=device)
        table = all_cat(mine).cpu().split(widths, dim=1)
        columns = {name: part.reshape(-1, *shape).numpy() for (name, shape), part in zip(self.shapes.items(), table, strict=True)}
        if order is None:
            return columns
        by_place = np.argsort(columns[order], kind="stable")
        return {name: column[by_place] for name, column in columns.items()}


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class PartScores:
    """The evaluator. `pictures` shows some images, spread over the validation set, with their parts."""

    def __init__(self, task: PartDiscovery) -> None:
        self.task = task
        self.rows = Rows()
        self.gathered: dict[str, np.ndarray] = {}  # of all ranks, by `compute`
        self.keeps = True  # whether there will be a picture
        self.shown: list[tuple[Tensor, Tensor]] = []  # image, maps
        given = task.cfg.part_thresholds
        self.thresholds = None if given is None else torch.tensor(given)

    def update(self, batch: Batch) -> None:
        found, logits = self.task.model.classify(batch["image"], batch["key"], self._thresholds(batch["image"].device))
        self.rows.add(**self._classes(batch, found, logits), **_places(batch, found.maps), **self._without_each(batch))
        if self.keeps:
            self.keep(batch, found.maps)

    def keep(self, batch: Batch, maps: Tensor) -> None:
        """Some of the images [N, C, S, S] and their maps [N, P, h, w], for the picture."""
        wanted = self.task.cfg.preview_images
        every = max(1, self.task.num_val // wanted)
        for i in (batch["index"] % every == 0).nonzero().flatten().tolist()[: wanted - len(self.shown)]:
            self.shown.append((batch["image"][i].cpu(), maps[i].float().cpu()))

    def _thresholds(self, device: torch.device) -> Tensor | None:
        return None if self.thresholds is None else self.thresholds.to(device)

    def _classes(self, batch: Batch, found: Found, logits: Tensor) -> dict[str, Tensor]:
        """Columns on what each stage says of an image's class; those that end in _stage1 where there are two."""
        labels = batch["label"]
        columns = {"index": batch["index"], "label": labels}
        if "group" in batch:
            columns["group"] = batch["group"]
        stages = {"": logits, "_stage1": found.logits} if self.task.model.stage_2 is not None else {"": logits}
        for stage, of in stages.items():
            of = among(of.float(), self.task.competing)
            probabilities = of.softmax(1)
            columns[f"loss{stage}"] = F.cross_entropy(of, labels, reduction="none")
            columns[f"top1{stage}"] = of.argmax(1) == labels
            if of.shape[1] <= MOST_CLASSES:
                columns[f"probability{stage}"] = probabilities
            if not stage:
                columns["confidence"], columns["predicted"] = probabilities.max(1)
        if found.mask is not None:
            columns["seen_fraction"] = found.mask.hard.mean((1, 2))
        return columns

    def _without_each(self, batch: Batch) -> dict[str, Tensor]:
        """Columns [N, K] of what becomes of an image without each part in turn."""
        if not self.task.cfg.leave_one_out:
            return {}
        columns: dict[str, list[Tensor]] = {}
        for found, logits in self.task.model.without_each(batch["image"], batch["key"], self._thresholds(batch["image"].device)):
            for name, column in self._classes(batch, found, logits).items():
                if name in PARTED:
                    columns.setdefault(f"{name}_without", []).append(column)
        return {name: torch.stack(column, dim=1) for name, column in columns.items()}

    def compute(self) -> dict[str, float]:
        rows = self.gathered = self.rows.gather()
        if not rows:
            return {}
        found = {name: float(rows[name].mean()) for name in ("loss", "loss_stage1", "top1", "top1_stage1", "seen_fraction") if name in rows}
        for stage in ("", "_stage1"):
            if f"top1{stage}" in rows and "group" in rows:
                found[f"worst_group_top1{stage}"] = scores.worst_group(rows[f"top1{stage}"], rows["group"])
            if f"probability{stage}" in rows:
                area = scores.auroc(rows["label"], rows[f"probability{stage}"])
                found |= {} if area is None else {f"auroc{stage}": area}
        if "union" in rows and rows["union"].sum():
            found["fg_miou"] = float(rows["intersection"].sum() / rows["union"].sum())
        if "points" in rows:
            visible = rows["points"][..., 2] > 0
            known = np.broadcast_to(np.arange(visible.shape[1]), visible.shape)[visible]
            found |= scores.agreement(rows["owner"][visible], known)
        return found | self._from_training(rows)

    def _from_training(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {}

    def report(self) -> Report:
        """What the last stage made of each image and class."""
        if not self.gathered:
            return Report()
        report = label_report({name: torch.from_numpy(self.gathered[name]) for name in ("index", *DETAILS)}, self.task.classes)
        parts = self._parts_table()
        return dataclasses.replace(report, tables={**({"leave_one_out": parts} if parts else {}), **report.tables})

    def _parts_table(self) -> list[dict[str, Any]]:
        """A row of scores with all parts, and one without each; those that are removed anyway have none."""
        rows, parts = self.gathered, [part for part in range(self.task.cfg.num_parts) if part not in self.task.cfg.remove_parts]
        if "top1_without" not in rows:
            return []
        table = []
        for without, of in [
            ("none", {name: rows[name] for name in PARTED if name in rows}),
            *((part, self._without(part)) for part in parts),
        ]:
            scored = {name: float(values.mean()) for name, values in of.items()}
            if "group" in rows:
                scored["worst_group_top1"] = scores.worst_group(of["top1"], rows["group"])
            table.append({"without": without, **scored})
        return table

    def _without(self, part: int) -> dict[str, np.ndarray]:
        return {name: self.gathered[f"{name}_without"][:, part] for name in PARTED if f"{name}_without" in self.gathered}

    def pictures(self) -> dict[str, Tensor]:
        if not self.shown:
            return {}
        images, maps = (torch.stack(column) for column in zip(*self.shown, strict=True))
        return {"parts": sheet(images, maps, *self.task.colours)}


class ComparingScores(PartScores):
    """With what only the training images can tell: where named points are relative to parts, how alike a part's places are."""

    def __init__(self, task: PartDiscovery) -> None:
        super().__init__(task)
        self.known = Rows()
        self.alike = Rows()
        self.fitted = task.cfg.threshold_quantile is None

    def reference(self, batch: Batch) -> None:
        points = self.task.cfg.keypoint_regression and {"parts", "box"} <= batch.keys()
        if not points and self.fitted:
            return
        found = self.task.model.stage_1(batch["image"], batch["key"])
        if points:
            self.known.add(index=batch["index"], **_centres(batch, found.maps))
        if not self.fitted:
            assert found.similarity is not None
            owner = found.maps.argmax(1, keepdim=True)  # [N, 1, h, w]
            own = found.similarity.gather(1, owner)
            is_part = owner < self.task.cfg.num_parts
            self.alike.add(part=owner[is_part], value=own[is_part])

    def update(self, batch: Batch) -> None:
        self._fit()
        super().update(batch)

    def compute(self) -> dict[str, float]:
        self._fit()  # collective, so a rank that had nothing to validate comes here too
        return super().compute()

    def _fit(self) -> None:
        if not self.fitted:
            cfg, rows = self.task.cfg, self.alike.gather(order=None)
            assert cfg.threshold_quantile is not None
            parts, values = rows.get("part", np.zeros(0)), rows.get("value", np.zeros(0))
            self.thresholds = torch.from_numpy(scores.quantiles(parts, values, cfg.num_parts, cfg.threshold_quantile)).float()
            self.fitted = True

    def _from_training(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        known = self.known.gather()
        if not known or "centres" not in rows:
            return {}
        train, test = ((of["centres"], of["points"], of["box"]) for of in (known, rows))
        error = scores.keypoint_error(train, test)
        return {} if error is None else {"keypoint_nmse": error}


def _places(batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    """Columns that compare maps [N, P, h, w] with outlines and named points, where there are some."""
    columns = _centres(batch, maps) if {"parts", "box"} <= batch.keys() else {}
    if "mask" in batch:
        mask = batch["mask"] > 0  # [N, S, S]
        owner = F.interpolate(maps.float(), size=mask.shape[-2:], mode="bilinear", align_corners=True).argmax(1)
        seen = owner < maps.shape[1] - 1
        columns |= {"intersection": (seen & mask).sum((1, 2)), "union": (seen | mask).sum((1, 2))}
    if "parts" in batch:
        columns |= {"points": batch["parts"], "owner": owner_at(maps, batch["parts"][..., :2], batch["image"].shape[-1])}
    return columns


def owner_at(maps: Tensor, points: Tensor, size: int) -> Tensor:
    """Which part owns the pixel that each point [N, P, 2] (x, y) lies in, [N, P]; maps are enlarged to `size` pixels, bilinear."""
    grid = (points.float().floor() + 0.5) * 2 / size - 1  # the middle of that pixel
    values = F.grid_sample(maps.float(), grid.unsqueeze(1), mode="bilinear", padding_mode="border", align_corners=False)
    return values.squeeze(2).argmax(1)  # [N, parts, P] -> [N, P]


def _centres(batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    """The centre of each part's mass in pixels and whether it is active, [N, K, 3], with named points and boxes."""
    parts, size = maps[:, :-1].float(), batch["image"].shape[-1]
    h, w = parts.shape[-2:]
    y, x = ((torch.arange(n, device=parts.device) + 0.5) * size / n for n in (h, w))
    mass = parts.sum((2, 3)).clamp_min(1e-6)
    middle = [(parts.sum(2) * x).sum(2) / mass, (parts.sum(3) * y).sum(2) / mass]
    return {"centres": torch.stack([*middle, parts.amax((2, 3)) > 0.5], dim=2), "points": batch["parts"], "box": batch["box"]}
