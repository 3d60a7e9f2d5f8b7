"""`python -m trainer show-batch <overrides>`: a contact sheet of what the network will see, after every augmentation.

Composes and checks the run as launch.py does and reads its first training batch as the run would; builds no optimizer.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.launch.door import checked_run, override_arguments

if TYPE_CHECKING:
    from PIL import Image

    from trainer.config import RunConfig

CELL = 144  # least side in pixels of a picture on the sheet: smaller images are magnified, by a whole number
COLUMNS = 8
CAPTION = 14  # pixels under a picture
GAP = 2  # pixels between the views of one image
TINTS = ((255, 64, 64), (64, 160, 255), (64, 220, 64), (255, 200, 0), (220, 80, 255), (0, 220, 220))  # of a mask's values 1, 2, …


def arguments() -> ArgumentParser:
    parser = override_arguments("show-batch", "A contact sheet of the first batch.")
    parser.add_argument("--out", type=Path, default=Path("outputs/batch.png"), help="the picture (default: outputs/batch.png)")
    parser.add_argument("--count", type=int, default=32, help="images on the sheet (default: 32)")
    parser.add_argument("--val", action="store_true", help="the first validation batch")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the sheet and print its path. `--val` shows validation instead of training."""
    options = arguments().parse_intermixed_args(argv)
    run = checked_run(options.overrides, options.config_dir)
    batch, classes = first_batch(run, train=not options.val)
    picture = sheet(run, batch, classes, options.count)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.out)
    print(options.out)
    return 0


def first_batch(run: RunConfig, *, train: bool) -> tuple[dict[str, Any], Sequence[str]]:
    """The batch as the network gets it, and the classes' names."""
    import torch

    from trainer.build import build_data
    from trainer.data.loader import train_loader, validation_loader
    from trainer.distributed import World

    data = build_data(run)
    world = World(device=torch.device("cpu"))
    augmentation = run.augmentation.build(run.dataset, train=train)
    classes = data.train.classes
    if train or data.val is None:
        loader = train_loader(data.train, augmentation, data.order, world, num_classes=len(classes) or None)
    else:
        loader = validation_loader(data.val, augmentation, world, batch_size=run.loop.batch_size, num_classes=len(classes) or None)
    return next(iter(loader)), classes


def sheet(run: RunConfig, batch: dict[str, Any], classes: Sequence[str], count: int) -> Image.Image:
    """The first `count` images, un-normalised, each over its label, with boxes, parts and masks drawn in; of several views of
    an image, all side by side, the small ones last."""
    mean, std = run.dataset.mean, run.dataset.std
    if batch["image"].ndim == 5:  # [N, V, C, S, S]
        images = side_by_side(
            [to_pixels(view[:count], mean, std) for name in ("image", "local") if name in batch for view in batch[name].unbind(1)]
        )
    else:
        images = to_pixels(batch["image"][:count], mean, std)  # [N, H, W, 3] uint8
        if "mask" in batch:
            images = tinted(images, batch["mask"][:count].cpu().numpy())
    captions = [caption(batch, i, classes) for i in range(len(images))]
    return page(images, captions, lambda draw, i, corner, scale: annotate(draw, batch, i, corner, scale, classes))


def side_by_side(views: Sequence[Any]) -> Any:
    """uint8 [N, S, W, 3] of views [N, s, s, 3], each beside the one before it, the smaller ones over white."""
    import numpy as np

    height = max(view.shape[1] for view in views)
    spaces = [((0, 0), (0, height - view.shape[1]), (0, GAP * (view is not views[-1])), (0, 0)) for view in views]
    return np.concatenate([np.pad(view, space, constant_values=255) for view, space in zip(views, spaces, strict=True)], axis=2)


def tinted(images: Any, masks: Any) -> Any:
    """Images uint8 [N, H, W, 3], half their light taken from the colour of their mask's value, [N, H, W]; 0 stays as it is."""
    import numpy as np

    masks = masks.astype(np.int64)
    colours = np.array(TINTS, np.uint8)[(masks - 1) % len(TINTS)]  # [N, H, W, 3]
    return np.where(masks[..., None] > 0, images // 2 + colours // 2, images)


def page(images: Any, captions: Sequence[str], annotate: Callable[[Any, int, tuple[int, int], int], None]) -> Image.Image:
    """Images uint8 [N, H, W, 3] in rows, each over its caption. `annotate(draw, i, corner, scale)` draws into the i-th."""
    from PIL import Image, ImageDraw

    scale = max(1, CELL // images.shape[1])
    height, width = images.shape[1] * scale, images.shape[2] * scale
    columns = min(max(1, COLUMNS * height // width), len(images))  # views side by side are as wide as several images
    page = Image.new("RGB", (columns * (width + 4), -(-len(images) // columns) * (height + CAPTION + 4)), "white")
    draw = ImageDraw.Draw(page)
    for i, pixels in enumerate(images):
        x, y = i % columns * (width + 4), i // columns * (height + CAPTION + 4)
        page.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y))
        annotate(draw, i, (x, y), scale)
        draw.text((x + 1, y + height), captions[i][: width // 6].encode("latin-1", "replace").decode("latin-1"), fill="black")
    return page


def to_pixels(images: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """uint8 [N, H, W, 3] of normalised float images [N, C, H, W]; of more than three channels, the first three."""
    import torch

    m, s = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    images = (images.cpu() * s + m).clamp(0, 1)[:, :3] * 255
    if images.shape[1] < 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    return images.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def annotate(draw: Any, batch: dict[str, Any], i: int, corner: tuple[int, int], scale: int, classes: Sequence[str]) -> None:
    """Boxes, with their classes, the box around the one object, and visible parts of one image."""
    x, y = corner
    if "box" in batch:  # it may reach beyond what was cut out, and must not into the neighbours
        left, top, right, bottom = (v * scale for v in batch["box"][i].clamp(0, batch["image"].shape[-1]).tolist())
        draw.rectangle((x + left, y + top, x + right, y + bottom), outline="yellow")
    if "boxes" in batch:
        for box, label in zip(batch["boxes"][i].tolist(), batch["labels"][i].tolist(), strict=True):
            left, top, right, bottom = (v * scale for v in box)
            draw.rectangle((x + left, y + top, x + right, y + bottom), outline="red")
            draw.text((x + left + 1, y + top), classes[label] if label < len(classes) else str(label), fill="red")
    if "parts" in batch:
        for px, py, visible in batch["parts"][i].tolist():
            if visible:
                draw.ellipse((x + px * scale - 2, y + py * scale - 2, x + px * scale + 2, y + py * scale + 2), fill="red")


def caption(batch: dict[str, Any], i: int, classes: Sequence[str]) -> str:
    """The label; of a mixed image, both with their shares."""
    if "target" in batch:
        shares, labels = batch["target"][i].topk(min(2, len(classes)))
        shown = [f"{classes[c]} {share:.0%}" for share, c in zip(shares.tolist(), labels.tolist(), strict=True) if share > 0.005]
        return " + ".join(shown) if len(shown) > 1 else shown[0].rsplit(" ", 1)[0]
    if "label" in batch:
        return classes[int(batch["label"][i])]
    return f"{len(batch['boxes'][i])} boxes" if "boxes" in batch else ""
