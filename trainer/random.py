"""Randomness as a function of what it belongs to: a seed, an epoch, a sample. It knows no order of events and keeps no state.

Everything comes from one mixing function, the finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", OOPSLA 2014), applied to a counter. The same numbers come out on every platform, in Python, numpy and
torch, on any device, and whichever other samples share the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Item = TypeVar("Item")

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: a counter times this never repeats and spreads evenly
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB


def mix(x: int) -> int:
    """A bijection of 64-bit numbers in which every input bit changes about half of the output bits."""
    x &= MASK
    x = ((x ^ (x >> 30)) * FIRST) & MASK
    x = ((x ^ (x >> 27)) * SECOND) & MASK
    return x ^ (x >> 31)


def fold(*numbers: int) -> int:
    """One 63-bit seed out of several numbers; their order matters."""
    state = 0
    for number in numbers:
        state = mix((state + GOLDEN) ^ mix(number))
    return state >> 1


def mix_array(x: np.ndarray) -> np.ndarray:
    """`mix` of each number of a uint64 array, in place."""
    import numpy as np

    x ^= x >> np.uint64(30)
    x *= np.uint64(FIRST)
    x ^= x >> np.uint64(27)
    x *= np.uint64(SECOND)
    x ^= x >> np.uint64(31)
    return x


def sample_keys(seed: int, epoch: int | np.ndarray, index: np.ndarray, occurrence: np.ndarray) -> np.ndarray:
    """The random key of each sample, int64 [N] >= 0: `fold(seed, epoch, index, occurrence)`."""
    import numpy as np

    state = np.full(len(index), mix(GOLDEN ^ mix(seed)), dtype=np.uint64)
    for part in (np.broadcast_to(epoch, len(index)), index, occurrence):
        state = mix_array((state + np.uint64(GOLDEN)) ^ mix_array(part.astype(np.uint64)))
    return (state >> np.uint64(1)).astype(np.int64)


def permutation(seed: int, size: int) -> np.ndarray:
    """A random order of range(size), int64. The same in every version of numpy, which promises that of no generator."""
    import numpy as np

    counter = np.arange(1, size + 1, dtype=np.uint64)
    counter *= np.uint64(GOLDEN)
    counter += np.uint64(mix(seed))
    # `mix` is a bijection, so there are no ties for a sorting algorithm to break in its own way.
    return np.argsort(mix_array(counter))


def uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each key, float32 [N, count], on the keys' device.

    Args:
        keys: int64 [N].
        stream: a constant of the place of use; numbers of different streams are independent.
    """
    bits = _bits(keys, stream, count)
    return (bits >> 40 & 0xFFFFFF).float() * 2.0**-24  # 24 bits: all that float32 holds


def child_keys(keys: Tensor, stream: int, count: int) -> Tensor:
    """`count` keys out of each, int64 [N, count] >= 0: for parts of a sample that draw on their own."""
    return _bits(keys, stream, count) & ((1 << 63) - 1)


def normal(keys: Tensor, stream: int, count: int) -> Tensor:
    """`count` standard normal numbers for each key, float32 [N, count] (Box and Muller, 1958).

    Logarithm and cosine are taken in float64, so that devices, whose last bits differ, agree after rounding to float32.
    """
    u = _bits(keys, stream, 2 * count) >> 11 & ((1 << 53) - 1)  # [N, 2 * count]
    radius = (u[:, :count].double() + 1) * 2.0**-53  # (0, 1]
    angle = u[:, count:].double() * (2.0 * math.pi * 2.0**-53)
    return ((-2 * radius.log()).sqrt() * angle.cos()).float()


def _bits(keys: Tensor, stream: int, count: int) -> Tensor:
    """int64 [N, count]: mix(mix(key ^ stream's constant) + j * GOLDEN), j = 1 ... count."""
    import torch

    base = _mix_tensor(keys ^ _signed(mix(stream + GOLDEN)))
    counter = torch.arange(1, count + 1, device=keys.device) * _signed(GOLDEN)
    return _mix_tensor(base.unsqueeze(1) + counter)


def _mix_tensor(x: Tensor) -> Tensor:
    # torch has no 64-bit unsigned arithmetic; products wrap around alike, shifts need their sign bits cleared.
    x = (x ^ (x >> 30 & ((1 << 34) - 1))) * _signed(FIRST)
    x = (x ^ (x >> 27 & ((1 << 37) - 1))) * _signed(SECOND)
    return x ^ (x >> 31 & ((1 << 33) - 1))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


class SampleRandom:
    """A sample's own numbers, one after the other: for transforms that run on one sample at a time.

    Its i-th `uniform()` is bit-equal to `uniform(keys, stream, count)[:, i]`. `drawn` says whether anybody has asked for any:
    what is made without is the same whatever the key.
    """

    __slots__ = ("_base", "_counter", "drawn", "key", "restores")

    def __init__(self, key: int, stream: int = 0, *, restores: bool = True) -> None:
        self.key = key
        self.restores = restores
        self._base = mix(key ^ mix(stream + GOLDEN))
        self._counter = 0
        self.drawn = False

    def stream(self, stream: int) -> SampleRandom:
        """The same sample's numbers for another use."""
        self.drawn = True
        return SampleRandom(self.key, stream, restores=self.restores)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        self.drawn = True
        self._counter += GOLDEN
        return low + (high - low) * ((mix(self._base + self._counter) >> 40) * 2.0**-24)

    def integer(self, count: int) -> int:
        """One of range(count)."""
        self.drawn = True
        self._counter += GOLDEN
        return (mix(self._base + self._counter) * count) >> 64

    def choice(self, items: Sequence[Item]) -> Item:
        return items[self.integer(len(items))]

    @contextmanager
    def global_generators(self) -> Iterator[None]:
        """Inside, the generators of `random`, numpy and torch (CPU) are this sample's: for transforms of others that draw
        from them. In the main process they are put back afterwards; a loader's worker has no other use for them."""
        import random

        import numpy as np
        import torch

        self.drawn = True
        saved = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if self.restores else None  # noqa: NPY002
        seed = fold(self.key, 0x6C0BA1)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            if saved is not None:
                random.setstate(saved[0])
                np.random.set_state(saved[1])  # noqa: NPY002
                torch.set_rng_state(saved[2])
