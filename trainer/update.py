"""One optimizer update: gradients in, weights out. Clipping, the non-finite guard, the learning rate, the scaler.

Nothing here waits for the device. A bad step (a gradient that is not finite) is skipped by the optimizer's own kernel,
and the flag that says so stays on the device until the next log point reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer


class Rates(Protocol):
    """The learning rate's factor and the momentum of a step; `trainer.schedule.Schedule` is one."""

    def factor(self, step: int) -> float: ...
    def momentum(self, step: int) -> float | None: ...


Clip = Callable[[list[nn.Parameter]], None]
"""Bounds the gradients of these parameters, in place, without waiting for the device."""

_check_and_scale: Callable[[list[Tensor], Tensor, Tensor], None] = torch._amp_foreach_non_finite_check_and_unscale_
"""Multiplies gradients in place by a scalar and raises a flag where one is not finite, in one pass over memory. It is
what GradScaler runs on; private, so `tests/trainer/test_update.py` holds its behaviour fast."""


class Update:
    """Clip, guard, step. Lists of parameters and learning rates are made once, not at every step.

    Make it when the optimizers have been restored: their groups hold the peak rates then, and are not replaced any more.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], schedule: Rates, scaler: GradScaler | None, max_grad_norm: float | None, *,
        clip: Clip | None = None, decay: Callable[[int], float] | None = None,
    ) -> None:  # fmt: skip
        self.optimizers = list(optimizers)
        self.schedule = schedule
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm  # of all gradients together; None where `clip` does it in another way, or nothing
        self.clip = clip
        self.decay = decay  # the weight decay's factor of a step; None = it stays
        self.groups: list[dict[str, Any]] = [g for o in self.optimizers for g in o.param_groups]
        self.parameters: list[nn.Parameter] = [p for g in self.groups for p in g["params"]]
        self.base_lrs: list[float] = [g["lr"] for g in self.groups]
        self.base_decays: list[float] = [g.get("weight_decay", 0.0) for g in self.groups]
        # A fused optimizer takes the flag along and leaves weights and moments alone where it is raised.
        self.takes_flag = [bool(getattr(o, "_step_supports_amp_scaling", False)) and bool(o.defaults.get("fused")) for o in self.optimizers]
        self.cycles_momentum = schedule.momentum(0) is not None
        device = self.parameters[0].device
        self.one = torch.ones((), device=device)

    def set_rates(self, step: int) -> None:
        """Write this step's learning rates into the groups, and momentum and weight decay where they move."""
        factor = self.schedule.factor(step)
        for group, base in zip(self.groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        if self.decay is not None:
            factor = self.decay(step)
            for group, base in zip(self.groups, self.base_decays, strict=True):
                group["weight_decay"] = base * factor
        if self.cycles_momentum:
            momentum = self.schedule.momentum(step)
            for group in self.groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                elif "momentum" in group:
                    group["momentum"] = momentum

    def finish_gradients(self, total: Tensor | None) -> tuple[Tensor, Tensor]:
        """Unscale, divide by `total` (the weight the losses were summed over; None = they were means), clip.

        Returns ([] the gradients' global L2 norm before clipping, [] float flag: 1 where one was not finite).
        """
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads:
            return self.one * 0, self.one * 0
        norms = torch._foreach_norm(grads)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if total is not None:
            norm = norm / total
        bad = torch.zeros_like(self.one)
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)
            _check_and_scale(grads, bad, scale if total is None else scale / total)
        elif total is not None:
            _check_and_scale(grads, bad, 1.0 / total)
        else:
            # inf - inf and nan - nan are nan, and nan is not 0: two small kernels instead of a pass over the gradients.
            bad = (norm - norm).ne_(0)
        if self.clip is not None:
            self.clip([p for p in self.parameters if p.grad is not None])
        return norm, bad

    def step(self, bad: Tensor) -> None:
        """Move the weights, or leave everything as it was where `bad` is raised; then drop the gradients."""
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        else:
            for optimizer, takes_flag in zip(self.optimizers, self.takes_flag, strict=True):
                if takes_flag:
                    optimizer.found_inf = bad  # type: ignore[attr-defined]  # read by the fused kernels
                    optimizer.step()
                elif not bad.item():  # a device without fused kernels has to be asked
                    optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None


def clip_each(threshold: float) -> Clip:
    """Each parameter's gradient by its own L2 norm, as DINO does (arXiv:2104.14294, app. E)."""

    def clip(parameters: list[nn.Parameter]) -> None:
        grads = _gradients(parameters)
        scales = [(threshold / (norm + 1e-6)).clamp_(max=1.0) for norm in torch._foreach_norm(grads)]
        torch._foreach_mul_(grads, scales)

    return clip


def clip_values(threshold: float) -> Clip:
    """Every entry of every gradient to [-threshold, threshold]."""

    def clip(parameters: list[nn.Parameter]) -> None:
        grads = _gradients(parameters)
        torch._foreach_clamp_min_(grads, -threshold)
        torch._foreach_clamp_max_(grads, threshold)

    return clip


def clip_adaptively(threshold: float, spared: Sequence[nn.Parameter] = ()) -> Clip:
    """Each unit's gradient to `threshold` times the norm of its weights (arXiv:2102.06171, sec. 4.1), but for `spared`."""
    from timm.utils.agc import adaptive_clip_grad

    left_alone = {id(p) for p in spared}

    def clip(parameters: list[nn.Parameter]) -> None:
        adaptive_clip_grad([p for p in parameters if id(p) not in left_alone], clip_factor=threshold)

    return clip


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


class BufferGuard:
    """Keeps running statistics out of a bad step: one copy before the forward pass, one select after the update.

    Batch normalisation moves its running mean in the forward pass, before anyone can know that the batch holds a NaN;
    without this a skipped step still poisons every later validation. All floating buffers are laid into one block of
    memory, so that the price is two kernels and not two per layer. Buffers get their place through `.data`, so each stays
    the tensor it was, with a version counter of its own: as plain views of the block they would share one, and autograd
    would believe that one layer's update spoils what another has saved.
    """

    def __init__(self, module: nn.Module) -> None:
        unique = {id(b): b for b in module.buffers() if b.is_floating_point()}
        self.blocks: list[tuple[Tensor, Tensor]] = []  # (live, saved) per (dtype, device)
        for kind in {(b.dtype, b.device): None for b in unique.values()}:
            same = [b for b in unique.values() if (b.dtype, b.device) == kind]
            live = torch.cat([b.detach().reshape(-1) for b in same])
            for b, part in zip(same, live.split([b.numel() for b in same]), strict=True):
                b.data = part.view(b.shape)
            self.blocks.append((live, live.clone()))

    def save(self) -> None:
        for live, saved in self.blocks:
            saved.copy_(live)

    def restore(self, bad: Tensor) -> None:
        """Put the saved values back where `bad` ([] flag) is raised."""
        for live, saved in self.blocks:
            torch.where(bad.bool(), saved, live, out=live)


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether the result depends on which samples share a batch."""
    held = {id(m) for part in getattr(module, "held", ()) for m in part.modules()}  # in evaluation mode throughout
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and id(m) not in held for m in module.modules())
