"""Batch normalisation in front of a classifier, for linear probes. Knows networks by their heads, and no task."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.errors import ConfigError, Problem
from trainer.parts import heads


class NormalizedLinear(nn.Linear):
    """A linear layer whose input is normalised over the batch first, without scale or shift (arXiv:2111.06377, app. A.1).

    Its weights keep the names they had, so that they fit wherever those of the plain layer do.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, C] of features [N, D]."""
        return super().forward(self.norm(input))


def normalize_input(network: nn.Module, name: str) -> None:
    """Make `network`'s classifier normalise what it is given. Raises ConfigError where it is not one linear layer."""
    found = [prefix.removesuffix(".") for prefix in heads(network)]
    linear = [place for place in found if isinstance(network.get_submodule(place), nn.Linear)]
    if not linear or linear != found:
        reason = f"the classifier of model.name={name} is no linear layer whose input could be normalised"
        raise ConfigError(Problem("task.head_batch_norm", True, reason, "task.head_batch_norm=false"))
    for place in linear:
        layer = network.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        network.set_submodule(place, NormalizedLinear(layer))
