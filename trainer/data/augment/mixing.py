"""Augmentations of a whole batch on its device: flips, erasing, mixup, cutmix, normalisation.

Each is a function of the samples' keys, one decision per image, without a loop over images and without a word from the
device to the host. Images are [N, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from trainer.random import SampleRandom, uniform

# What each draw of a sample's numbers is for. The worker's transforms use streams below 100.
FLIP, ERASE, MIX, SHIFT = 100, 101, 102, 103


def flip(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Mirror each image left to right with `probability`."""
    if probability == 0:
        return images
    chosen = (uniform(keys, FLIP, 1) < probability).view(-1, 1, 1, 1)  # [N, 1, 1, 1]
    return torch.where(chosen, images.flip(-1), images)


def shift(images: Tensor, keys: Tensor, fraction: float) -> Tensor:
    """Move each image by up to `fraction` of its side in each direction; what comes into view is its mirror image.

    The same as padding by reflection and cutting out a random window of the old size.
    """
    height, width = images.shape[-2:]
    reach = torch.tensor([round(height * fraction), round(width * fraction)], device=images.device)
    if not reach.any():
        return images
    moved = (uniform(keys, SHIFT, 2) * (2 * reach + 1)).floor().long() - reach  # [N, 2] in [-reach, reach]
    rows, columns = (_reflected(length, moved[:, i]) for i, length in enumerate((height, width)))  # [N, H], [N, W]
    index = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return images[index, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _reflected(length: int, moved: Tensor) -> Tensor:
    """int64 [N, length]: places 0 … length - 1 moved by `moved` [N], those beyond an edge mirrored at its last pixel."""
    place = (torch.arange(length, device=moved.device) + moved.unsqueeze(1)).abs()
    return torch.where(place < length, place, 2 * (length - 1) - place)


def flips(random: SampleRandom, probability: float) -> bool:
    """Whether `flip` mirrors this sample."""
    return random.stream(FLIP).uniform() < probability


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32, minus mean, over standard deviation of each channel (or of all, where there is one), for values in [0, 1]."""
    scale = 255 if images.dtype == torch.uint8 else 1
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for channel in range(images.shape[1]):
        m, s = mean[channel % len(mean)], std[channel % len(std)]
        # By a number and not by a tensor of three: on a CPU that is four times as fast.
        torch.mul(images[:, channel], 1 / (s * scale), out=result[:, channel])
        result[:, channel].sub_(m / s)
    return result


def erase(
    images: Tensor, keys: Tensor, probability: float, area: tuple[float, float] = (0.02, 0.33), ratio: tuple[float, float] = (0.3, 3.3)
) -> Tensor:
    """Set a random box of each image to 0 with `probability` (random erasing, arXiv:1708.04896; box drawn like torchvision's)."""
    if probability == 0:
        return images
    height, width = images.shape[-2:]
    tries = 10
    u = uniform(keys, ERASE, 1 + 4 * tries)
    chosen, u = u[:, 0] < probability, u[:, 1:].view(-1, 4, tries)  # [N], [N, 4, tries]
    size = height * width * (area[0] + (area[1] - area[0]) * u[:, 0])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[:, 1])
    h, w = (size * aspect).sqrt().round(), (size / aspect).sqrt().round()  # [N, tries]
    fits = (h < height) & (w < width)
    first = fits.int().argmax(1, keepdim=True)  # the first box that fits
    h, w, y, x = (t.gather(1, first) for t in (h, w, u[:, 2], u[:, 3]))  # [N, 1]
    top, left = (y * (height - h + 1)).floor(), (x * (width - w + 1)).floor()
    chosen = chosen & fits.any(1)
    inside = _between(height, top, h).unsqueeze(2) & _between(width, left, w).unsqueeze(1)  # [N, H, W]
    return images.masked_fill((inside & chosen.view(-1, 1, 1)).unsqueeze(1), 0.0)


def mix(
    images: Tensor, labels: Tensor, keys: Tensor, num_classes: int, *, mixup: float, cutmix: float, probability: float, switch: float
) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) of each image with the next one in the batch.

    Args:
        mixup, cutmix: parameter of the beta distribution of the image's own share; 0 = off.
        probability: with which an image is mixed at all.
        switch: probability of cutmix where both are on.

    Returns:
        Images, and soft targets float32 [N, num_classes].
    """
    height, width = images.shape[-2:]
    u = uniform(keys, MIX, 5)
    use_cutmix = u[:, 0] < (switch if mixup and cutmix else float(cutmix > 0))  # [N]
    quantile = u[:, 1]
    share = torch.where(use_cutmix, beta_quantile(quantile, cutmix or 1.0), beta_quantile(quantile, mixup or 1.0))  # [N]
    # Cutmix: a box of area 1 - share around a random point, cut at the edges, which enlarges the share.
    side = (1 - share).sqrt()
    inside_y = _clipped(height, u[:, 2], side)  # [N, H]
    inside_x = _clipped(width, u[:, 3], side)
    cut_share = 1 - inside_y.sum(1) * inside_x.sum(1) / (height * width)
    box = (inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).float()  # [N, H, W], 1 where the other image goes
    mixed = (u[:, 4] < probability).float()
    other = torch.where(use_cutmix.view(-1, 1, 1), box, (1 - share).view(-1, 1, 1)) * mixed.view(-1, 1, 1)
    share = 1 - torch.where(use_cutmix, 1 - cut_share, 1 - share) * mixed
    one_hot = (labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)).float()  # [N, K]
    target = torch.lerp(one_hot.roll(-1, 0), one_hot, share.unsqueeze(1))
    return torch.lerp(images, images.roll(-1, 0), other.unsqueeze(1)), target


def beta_quantile(u: Tensor, alpha: float) -> Tensor:
    """The number below which a Beta(alpha, alpha) variable lies with probability `u`."""
    table = _beta_table(alpha, u.device)
    last = len(table) - 1
    place = u * last
    below = place.floor().clamp_(max=last - 1)
    i = below.long()
    return torch.lerp(table[i], table[i + 1], place - below)


@lru_cache(maxsize=16)
def _beta_table(alpha: float, device: torch.device, entries: int = 4097) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at equal steps of probability, float32 [entries], by integrating the density.

    With x = t ** (1 / alpha) the density's pole at 0 is gone; the upper half follows from symmetry.
    """
    t = torch.linspace(0, 1, 1 << 16, dtype=torch.float64) * 0.5**alpha
    x = t ** (1 / alpha)
    density = (1 - x) ** (alpha - 1)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, t)])
    mass = mass / mass[-1] / 2  # [0, 1/2]
    wanted = torch.linspace(0, 0.5, entries // 2 + 1, dtype=torch.float64)
    i = torch.searchsorted(mass, wanted).clamp_(1, len(mass) - 1)
    lower = torch.lerp(x[i - 1], x[i], (wanted - mass[i - 1]) / (mass[i] - mass[i - 1]))
    return torch.cat([lower, 1 - lower[:-1].flip(0)]).float().to(device)


def _between(length: int, start: Tensor, extent: Tensor) -> Tensor:
    """bool [N, length]: start <= place < start + extent; both are [N, 1]."""
    place = torch.arange(length, device=start.device)
    return (place >= start) & (place < start + extent)


def _clipped(length: int, centre: Tensor, fraction: Tensor) -> Tensor:
    """bool [N, length]: within `fraction` of the length around a centre in [0, 1)."""
    middle, half = (centre * length).floor(), (fraction * length).floor().div(2, rounding_mode="floor")
    return _between(length, (middle - half).unsqueeze(1), (2 * half).unsqueeze(1))
