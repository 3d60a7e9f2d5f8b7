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
    """The parameters of one group that are stepped in one call, and what the kernel takes along with them."""

    group: dict[str, Any]
    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    step: Tensor  # [] one count for all of them
    steps: list[Tensor]  # the same count, once for each parameter, as the kernel wants it


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, bit for bit; checkpoints of one are checkpoints of the other.

    torch collects its lists anew at every step and counts each parameter's steps apart: 32 of the 44 us that a step takes
    with 4 parameters on a CPU, 560 of 905 us with 152. Here the lists are made once and the count is shared. Where a
    parameter goes without a gradient its own count matters, and everything is left to torch from then on.
    """

    _together: list[Together] | None = None
    _idle: tuple[Tensor, ...] = ()  # parameters that have never had a gradient
    _apart = False  # for good: the counts differ

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)

    def step(self, closure: Any = None) -> Any:
        if self._together is None and not self._apart:
            self._together = self._gathered()
        if closure is not None or self._together is None or not self._gradients_are_as_ever():
            self._apart = self._apart or self._together is not None
            self._part()
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
        self._apart = False
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._together, self._apart = None, False

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
        """The groups, ready for their kernels; None before the first step, which makes the state, or where torch has to."""
        plain = not any(group[name] for group in self.param_groups for name in ("amsgrad", "maximize", "capturable", "differentiable"))
        if not self.state or not plain:
            return None
        groups = [(group, [p for p in group["params"] if p in self.state]) for group in self.param_groups]
        groups = [(group, parameters) for group, parameters in groups if parameters]
        for _, parameters in groups:
            steps = torch.stack([self.state[p]["step"] for p in parameters])
            if len({(p.device, p.dtype) for p in parameters}) > 1 or bool((steps != steps[0]).any()):
                self._apart = True
                return None
        self._idle = tuple(p for p in self._all_parameters() if p not in self.state)
        return [self._share(group, parameters) for group, parameters in groups]

    def _share(self, group: dict[str, Any], parameters: list[Tensor]) -> Together:
        states: list[Mapping[str, Tensor]] = [self.state[p] for p in parameters]
        step = states[0]["step"].clone()
        for p in parameters:
            self.state[p]["step"] = step
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        return Together(group, parameters, means, squares, step, steps=[step] * len(parameters))

    def _gradients_are_as_ever(self) -> bool:
        """Whether exactly the parameters that always had a gradient have one now."""
        missing = any(any(map(is_, (p.grad for p in part.parameters), repeat(None))) for part in self._together or ())
        return not missing and all(p.grad is None for p in self._idle)

    def _part(self) -> None:
        """Give every parameter its own count again, for torch to step it."""
        for part in self._together or ():
            for p in part.parameters:
                self.state[p]["step"] = part.step.clone()
        self._together = None
