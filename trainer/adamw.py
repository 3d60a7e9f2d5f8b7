"""AdamW whose step is little more than its kernel. It knows torch's optimizer and nothing of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Together:
    """Parameters of one group that are stepped in one call, and what the kernel takes along with them."""

    group: dict[str, Any]
    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    step: Tensor  # [] one count for all of them
    steps: list[Tensor]  # the same count, once for each parameter, as the kernel wants it


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, bit for bit; checkpoints of one are checkpoints of the other.

    torch collects its lists anew at every step and counts each parameter's steps apart: 32 of the 44 us that a step takes
    with 4 parameters on a CPU, 560 of 905 us with 152. Here the lists are made once, for the parameters that have a gradient, and
    those that have taken as many steps share their count. A step in which others have one is torch's, and lists are made anew
    after it: at once the first time, then after 1, 3, 7 … further steps, so that parameters that come and go cost little.
    """

    _together: list[Together] | None = None
    _idle: tuple[Tensor, ...] = ()  # parameters without a gradient
    _wait, _patience = 0, 0  # steps that are left to torch before lists are made again, and how many after the next change

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)

    def step(self, closure: Any = None) -> Any:
        if self._together is not None and (closure is not None or not self._gradients_are_as_ever()):
            self._part()
            self._wait, self._patience = self._patience, 2 * self._patience + 1
        elif self._together is None and closure is None:
            self._together = self._gathered() if self._wait == 0 else None
            self._wait = max(0, self._wait - 1)
        if self._together is None:
            return super().step(closure)
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)  # as GradScaler leaves them
        with torch.no_grad():
            for part in self._together:
                group = part.group
                beta1, beta2 = group["betas"]
                part.step.add_(1)
                gradients: list[Any] = [p.grad for p in part.parameters]  # none is None, that has been checked
                torch._fused_adamw_(
                    part.parameters, gradients, part.means, part.squares, [], part.steps,
                    lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                    amsgrad=False, maximize=False, grad_scale=grad_scale, found_inf=found_inf,
                )  # fmt: skip
                if found_inf is not None:
                    part.step.sub_(found_inf)  # the kernel has left a bad step out
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch would wrap it for its profiler, which sees the kernel anyway

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._part()
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._together, self._wait = None, 0

    def state_dict(self) -> dict[str, Any]:
        """As torch has it, with a count for each parameter: its own optimizers add to each of them."""
        state = super().state_dict()
        for part in self._together or ():
            counts = iter(part.step.repeat(len(part.parameters)).unbind())
            places = {id(p): i for i, p in enumerate(self._all_parameters())}
            for p in part.parameters:
                place = places[id(p)]
                state["state"][place] = {**state["state"][place], "step": next(counts)}
        return state

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gathered(self) -> list[Together] | None:
        """What has a gradient now, ready for its kernels; None before its first step, which makes the state, or where torch has to."""
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        plain = not any(group[name] for group in self.param_groups for name in ("amsgrad", "maximize", "capturable", "differentiable"))
        if not plain or not any(active) or any(p not in self.state for parameters in active for p in parameters):
            return None
        self._idle = tuple(p for p in self._all_parameters() if p.grad is None)
        steps = [self.state[p]["step"] for parameters in active for p in parameters]
        counts = iter(torch.stack([s.to(steps[0].device) for s in steps]).tolist())  # waits for a device, once
        together = []
        for group, parameters in zip(self.param_groups, active, strict=True):
            alike: dict[Any, list[Tensor]] = {}
            for p in parameters:
                alike.setdefault((p.device, p.dtype, next(counts)), []).append(p)
            together += [self._share(group, part) for part in alike.values()]
        return together

    def _share(self, group: dict[str, Any], parameters: list[Tensor]) -> Together:
        states: list[Mapping[str, Tensor]] = [self.state[p] for p in parameters]
        step = states[0]["step"].clone()
        for p in parameters:
            self.state[p]["step"] = step
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        return Together(group, parameters, means, squares, step, steps=[step] * len(parameters))

    def _gradients_are_as_ever(self) -> bool:
        """Whether exactly the parameters that had a gradient when the lists were made have one now."""
        missing = any(any(map(is_, (p.grad for p in part.parameters), repeat(None))) for part in self._together or ())
        return not missing and all(p.grad is None for p in self._idle)

    def _part(self) -> None:
        """Give every parameter its own count again, for torch to step it."""
        for part in self._together or ():
            for p in part.parameters:
                self.state[p]["step"] = part.step.clone()
        self._together = None
