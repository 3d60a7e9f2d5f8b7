"""How good are features? Two answers that need no tuning: nearest neighbours, and a linear classifier on top.

Both are functions of features and labels that are already gathered (`trainer.evaluation.all_cat`), so they give the same
figure on any number of ranks. They know no task: whoever has features and labels may ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def knn_scores(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, num_classes: int, *, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """Votes of the `k` most similar features of the bank, weighed by exp(cosine / temperature) (arXiv:1805.01978, sec. 3.4).

    Args:
        bank: [M, D] features of known label. bank_labels: [M] int64. queries: [N, D].
        k: neighbours; fewer where the bank is smaller. chunk: queries at a time, to bound memory at chunk x M floats.

    Returns:
        [N, num_classes] float32; the prediction is the argmax.
    """
    if bank.shape[0] == 0:
        raise ValueError("k-NN needs at least one feature of known label")
    bank = F.normalize(bank.float(), dim=1)
    k = min(k, bank.shape[0])
    votes = []
    for part in F.normalize(queries.float(), dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)  # [n, k]
        weights = ((similarity - 1) / temperature).exp()  # - 1: a common factor, and exp(1 / 0.07) is 1.6e6
        votes.append(weights.new_zeros(part.shape[0], num_classes).scatter_add_(1, bank_labels[nearest], weights))
    return torch.cat(votes)


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, *, l2: float = 1e-4, max_iterations: int = 200) -> LinearProbe:
    """A multinomial logistic regression on standardised features, by full-batch L-BFGS: convex, so no learning rate to find.

    Minimises mean cross-entropy + l2 / 2 * ||W||^2 over W [C, D] and b [C]; features [N, D], labels [N] int64.
    """
    with torch.no_grad():
        features = features.double()
        mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
        x = (features - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, tolerance_grad=1e-7, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # pyright: ignore[reportArgumentType]  # typed as returning float; it returns a tensor
    return LinearProbe(weight.detach() / std, (bias - (weight * (mean / std)).sum(1)).detach())


class LinearProbe:
    """Weights [C, D] and biases [C] on raw features."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [N, C] of features [N, D]."""
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


def pooled_features(network: nn.Module, images: Tensor) -> Tensor:
    """What the network's classifier is given, [N, D]; the output of a network that has none."""
    return features_and_output(network, images)[0]


def features_and_output(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the network's classifier is given, [N, D], and what the network makes of the images, in one pass."""
    timm: Any = network
    if callable(getattr(network, "forward_features", None)) and callable(getattr(network, "forward_head", None)):
        maps = timm.forward_features(images)
        return timm.forward_head(maps, pre_logits=True), timm.forward_head(maps)
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    seen: list[Tensor] = []
    handles = [part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for part in linear[-1:]]
    try:
        output = network(images)
    finally:
        for handle in handles:
            handle.remove()
    # The last linear layer is the classifier where its output is the network's; in attention, say, it is not.
    is_classifier = bool(seen) and seen[-1].ndim == 2 and output.shape == (len(images), linear[-1].out_features)
    return (seen[-1] if is_classifier else output), output


class Asked(nn.Module):
    """A network that is asked for features and output at once, as one call that can be compiled. It is not the network's parent:
    whoever owns that trains, moves and saves it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.asked = (network,)  # in a tuple, so that it is no submodule

    def children(self) -> Iterator[nn.Module]:
        return iter(self.asked)  # whoever compiles block by block finds the network's

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return features_and_output(self.asked[0], images)
