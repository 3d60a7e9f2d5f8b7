"""Colour operations on a batch, each image with a strength of its own. Images are float [N, 3, H, W] in [0, 1].

Each is, image by image, what torchvision's functional of that name computes; there is no loop and nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.random import uniform

JITTER, GREY, ILLUMINATION, BLUR, SOLARISE, ONE_OF_THREE, DISTORTION = range(110, 117)  # streams of a sample's numbers

DISTORTIONS = ((0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05))  # brightness, contrast, saturation, hue: torchvision's ranges
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision have it


def to_grey(images: Tensor) -> Tensor:
    """[N, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`factor` [N], 1 = unchanged; likewise below."""
    return (images * _per_image(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = to_grey(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, _per_image(factor)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(to_grey(images), images, _per_image(factor)).clamp_(0, 1)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the circle of hues by `turn` [N], in whole turns: 0 = unchanged, 0.5 = the complement."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)  # [N, H, W]
    divisor = chroma.where(chroma > 0, torch.ones_like(chroma))
    # In sixths of a turn, from the channel that is largest (Smith: "Color gamut transform pairs", SIGGRAPH 1978).
    sixths = torch.where(
        value == red, (green - blue) / divisor, torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    )
    sixths = sixths + 6 * turn.view(-1, 1, 1)
    channels = [value - chroma * _triangle((sixths + n) % 6) for n in (5, 3, 1)]
    return torch.stack(channels, 1)


def _triangle(k: Tensor) -> Tensor:
    return torch.minimum(k, 4 - k).clamp(0, 1)


def solarise(images: Tensor, threshold: float = 0.5) -> Tensor:
    return torch.where(images >= threshold, 1 - images, images)


def blur(images: Tensor, sigma: Tensor, largest: float = 2.0) -> Tensor:
    """Gaussian blur with `sigma` [N] in pixels, none of them above `largest`; the kernel reaches three times that far."""
    count, channels, height, width = images.shape
    reach = min(math.ceil(3 * largest), height - 1, width - 1)  # reflection needs that much of an image
    place = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-0.5 * (place / sigma.view(-1, 1)) ** 2)  # [N, K]
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # [N * C, K]
    rows = F.pad(images.reshape(1, count * channels, height, width), [reach] * 4, mode="reflect")
    rows = F.conv2d(rows, kernel.view(-1, 1, 1, 2 * reach + 1), groups=count * channels)
    return F.conv2d(rows, kernel.view(-1, 1, 2 * reach + 1, 1), groups=count * channels).view_as(images)


def jitter(images: Tensor, keys: Tensor, strength: list[float], probability: float = 1.0) -> Tensor:
    """Random brightness, contrast, saturation (factors in 1 ± strength) and hue (turn within ± strength), in this order."""
    u = uniform(keys, JITTER, 5)  # [N, 5]
    applies = (u[:, 4] < probability).float()
    change = (2 * u[:, :4] - 1) * applies.unsqueeze(1)
    for column, operation in enumerate((brightness, contrast, saturation)):
        if strength[column]:
            images = operation(images, (1 + strength[column] * change[:, column]).clamp(min=0))
    return hue(images, strength[3] * change[:, 3]) if strength[3] else images


def distort(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """SSD's photometric distortion (arXiv:1512.02325, sec. 2.2), as torchvision's RandomPhotometricDistort: brightness, contrast
    (before saturation and hue, or behind them), saturation, hue and the order of the channels, each with `probability`."""
    u = uniform(keys, DISTORTION, 11)  # [N, 11]
    low, high = images.new_tensor(DISTORTIONS).unbind(1)
    values = torch.where(u[:, :4] < probability, low + (high - low) * u[:, 4:8], images.new_tensor([1.0, 1.0, 1.0, 0.0]))  # [N, 4]
    first, neutral = u[:, 8] < 0.5, torch.ones_like(values[:, 1])
    images = contrast(brightness(images, values[:, 0]), torch.where(first, values[:, 1], neutral))
    images = hue(saturation(images, values[:, 2]), values[:, 3])
    images = contrast(images, torch.where(first, neutral, values[:, 1]))
    drawn = torch.where(u[:, 9] < probability, (u[:, 10] * len(ORDERS)).long(), 0)
    order = torch.tensor(ORDERS, device=images.device)[drawn]  # [N, 3]
    return images[torch.arange(len(images), device=images.device)[:, None], order]


def grey(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Take the colour from each image with `probability`."""
    chosen = uniform(keys, GREY, 1) < probability
    return torch.where(_per_image(chosen), to_grey(images), images)


def illuminate(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Planckian jitter (arXiv:2202.07993): light each image by a black body of 3000, 3500 ... 15000 K.

    Red and blue are scaled against green. The gains are polynomials in the inverse temperature, fitted to the paper's
    table of 25: within 0.001 of it for red, 0.012 for blue.
    """
    u = uniform(keys, ILLUMINATION, 2)
    inverse = 1 / (3 + 0.5 * (u[:, 1] * 25).floor())  # [N] 1 / 1000 K
    red = ((16.76686 * inverse - 8.78504) * inverse + 4.65636) * inverse + 0.47667
    blue = (((-25.83806 * inverse + 40.86579) * inverse - 21.12441) * inverse + 3.45801).clamp(min=0).sqrt()
    gains = torch.stack([red, torch.ones_like(red), blue], 1)
    gains = torch.where(u[:, :1] < probability, gains, torch.ones_like(gains))  # [N, 3]
    return (images * gains.view(-1, 3, 1, 1)).clamp_(max=1)


def random_blur(images: Tensor, keys: Tensor, probability: float | Tensor, sigma: tuple[float, float] = (0.1, 2.0)) -> Tensor:
    """Blur each image with `probability`, by a Gaussian of random width. `probability` may be one a view, [N]."""
    u = uniform(keys, BLUR, 2)
    blurred = blur(images, sigma[0] + (sigma[1] - sigma[0]) * u[:, 1], sigma[1])
    return torch.where(_per_image(u[:, 0] < probability), blurred, images)


def random_solarise(images: Tensor, keys: Tensor, probability: float | Tensor) -> Tensor:
    chosen = uniform(keys, SOLARISE, 1)[:, 0] < probability
    return torch.where(_per_image(chosen), solarise(images), images)


def one_of_three(images: Tensor, keys: Tensor) -> Tensor:
    """Grey, solarised or blurred, each image one of them (3-Augment, arXiv:2204.07118, sec. 3)."""
    u = uniform(keys, ONE_OF_THREE, 2)
    choice = _per_image((u[:, 0] * 3).floor())
    other = torch.where(choice == 1, solarise(images), blur(images, 0.1 + 1.9 * u[:, 1]))
    return torch.where(choice == 0, to_grey(images), other)
