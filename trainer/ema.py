"""Averages of a module's weights, exponential and equal. Knows tensors and their names, nothing of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Ema:
    """The average of everything in `module` that trains: average <- decay * average + (1 - decay) * weights.

    Averages the parameters that require a gradient and the floating-point buffers that are saved (batch statistics must
    fit the averaged weights). Everything else, frozen parameters and counters, is the module's own at any time.

    It holds the module's tensors themselves, so it may be wrapped in DDP or compiled before or after; moving it to a
    device has to happen before.
    """

    def __init__(self, module: nn.Module, decay: float, every: int = 1) -> None:
        self.decay, self.every = decay, every  # every: optimizer steps from one update to the next
        live = averaged_tensors(module)
        self.names = list(live)
        self.live = list(live.values())
        self.averages = [tensor.detach().clone() for tensor in self.live]
        self.buffers = [average for tensor, average in zip(self.live, self.averages) if not isinstance(tensor, nn.Parameter)]

    def update(self, step: int | None = None) -> None:
        """Once per optimizer step, when the weights have moved.

        With `step`, how many were finished before, the average forgets its start sooner: a decay of 0.9999 would be made of
        little else than the initial weights for 10,000 steps.
        """
        if step is not None and (step + 1) % self.every:
            return
        # TensorFlow's rule (tf.train.ExponentialMovingAverage, num_updates): an average over about a tenth of the run so far.
        updates = 0 if step is None else step // self.every
        self._move(1.0 - (self.decay if step is None else min(self.decay, (1 + updates) / (10 + updates))))

    def _move(self, share: float) -> None:
        """The averages go this share of the way to the weights; all the way with 1, exactly."""
        if self.live:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.live, share)

    def restart(self) -> None:
        """Begin anew with the weights as they are."""
        self._move(1.0)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """`module` has the averaged weights inside this context. Pointers change places; nothing is copied.

        `module` may be the one averaged, wrapped or not, or another of the same shape.
        """
        tensors = averaged_tensors(module, trained_only=False)
        pairs = [(tensors[name], average) for name, average in zip(self.names, self.averages, strict=True)]
        own = [tensor.data for tensor, _ in pairs]
        try:
            for tensor, average in pairs:
                tensor.data = average
            yield
        finally:
            for (tensor, _), data in zip(pairs, own, strict=True):
                tensor.data = data

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names their tensors have in the bare module."""
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing, unknown = sorted(set(self.names) - set(state)), sorted(set(state) - set(self.names))
        if missing or unknown:
            raise KeyError(f"averages of another module: missing {missing[:5]}, unknown {unknown[:5]}")
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])


class Swa(Ema):
    """Stochastic weight averaging (arXiv:1803.05407): the equal average of the weights at regular steps of the run's last part.

    Until then it is the weights themselves. How many there are in it follows from the step, so there is nothing to save but the
    average. Batch statistics are averaged alike, as torch's AveragedModel does with `use_buffers`; no extra pass over the data.
    """

    def __init__(self, module: nn.Module, start: int, every: int) -> None:
        super().__init__(module, 0.0)
        self.start, self.every = start, every

    def update(self, step: int | None = None) -> None:
        assert step is not None, "an equal average needs to know how many there were before"
        count, rest = divmod(step + 1 - self.start, self.every)
        if count <= 0:
            self._move(1.0)
        elif not rest:
            self._move(1.0 / count)


def averaged_tensors(module: nn.Module, *, trained_only: bool = True) -> dict[str, Tensor]:
    """Parameters and saved floating-point buffers, by the names they have in the bare module."""
    module = unwrapped(module)
    tensors: dict[str, Tensor] = {_inner(n): p for n, p in module.named_parameters() if p.requires_grad or not trained_only}
    saved = {_inner(name) for name in module.state_dict(keep_vars=True)}
    tensors |= {_inner(n): b for n, b in module.named_buffers() if b.is_floating_point() and _inner(n) in saved}
    return tensors


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile."""
    while True:
        if isinstance(module, DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _inner(name: str) -> str:
    """Without what torch.compile puts into the names of a part that it compiled."""
    return name.replace("_orig_mod.", "")


def clean(name: str) -> str:
    """A name out of a file, without what DDP and torch.compile may have put before it."""
    return _inner(name).removeprefix("module.")
