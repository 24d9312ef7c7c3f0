"""Losses that ask for a margin, not only for the right class.

`constants` is the (classes, classes) matrix of pair constants: `|(f_i - f_j)(x) - (f_i - f_j)(y)| <= constants[i, j] |x - y|`; see `pair_constants`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def pair_constants(
    weight: Tensor,  # (classes, features): the rows of the last layer as it runs
    features: float | Tensor = 1.0,
) -> Tensor:  # (classes, classes)
    """`K_ij = features |w_i - w_j|`, features being the Lipschitz constant of everything before the last layer. Differentiable; 0 on the diagonal."""
    squared = (weight[:, None] - weight[None, :]).square().sum(-1)
    off_diagonal = squared > 0  # the root has no gradient at 0
    return features * torch.where(off_diagonal, squared, torch.ones_like(squared)).sqrt() * off_diagonal


def emma_shift(
    logits: Tensor,  # (batch, classes)
    labels: Tensor,  # (batch,)
    constants: Tensor,  # (classes, classes)
    epsilon: float,
) -> Tensor:  # (batch, classes)
    """The worst logits within `epsilon`, only as far as each sample's own margin allows (EMMA; Hu et al. 2023).

    `y_j - y_t + e_j epsilon K_tj` with `e_j = clip((y_t - y_j) / (epsilon K_tj), 0.01, 1)` held constant in the gradient.
    """
    _check(logits, labels)
    margins = logits - logits.gather(1, labels[:, None])
    reach = epsilon * constants[labels]
    ratio = torch.where(reach > 0, -margins / reach.clamp_min(torch.finfo(reach.dtype).tiny), torch.zeros_like(margins))
    return margins + ratio.clamp(0.01, 1).detach() * reach


def emma_epsilon(progress: float, epsilon: float = 36 / 255, low: float = 0.1, high: float = 3.0) -> float:
    """The radius that EMMA asks for at a fraction `progress` of the training: `low` to `high` times `epsilon`, reached half-way."""
    return epsilon * (low + (high - low) * min(2 * progress, 1.0))


class EMMA(nn.Module):
    """Cross-entropy of the logits after `emma_shift`. `epsilon` is an attribute, to be scheduled with `emma_epsilon`."""

    def __init__(self, epsilon: float = 36 / 255) -> None:
        super().__init__()
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.epsilon = epsilon

    def forward(self, logits: Tensor, labels: Tensor, constants: Tensor) -> Tensor:
        return nn.functional.cross_entropy(emma_shift(logits, labels, constants, self.epsilon), labels)


class LogitAnnealing(nn.Module):
    """`T (1 - p)^power CE(u)`, `u = (z - offset onehot(t)) / T`, p the probability of the label under u (LA; Lai et al. 2025).

    Samples that already have a large margin are left alone. z are the logits, or what EMMA makes of them when `emma` is given (BRONet's recipe:
    offset 2, temperature 0.75, power 5).
    """

    def __init__(self, offset: float = 2.0, temperature: float = 0.75, power: float = 5.0, emma: EMMA | None = None) -> None:
        super().__init__()
        if not temperature > 0 or not power >= 0:
            raise ValueError(f"temperature must be positive and power not negative, got temperature={temperature}, power={power}")
        self.offset, self.temperature, self.power, self.emma = offset, temperature, power, emma

    def forward(self, logits: Tensor, labels: Tensor, constants: Tensor | None = None) -> Tensor:
        if self.emma is not None:
            if constants is None:
                raise ValueError("LogitAnnealing with EMMA needs the pair constants, got none; pass lipnet.pair_constants(head.weight(), features)")
            logits = emma_shift(logits, labels, constants, self.emma.epsilon)
        entropy = nn.functional.cross_entropy(_lower_label(logits, labels, self.offset) / self.temperature, labels, reduction="none")
        doubt = (-torch.expm1(-entropy)).clamp_min(torch.finfo(entropy.dtype).tiny)  # 1 - p; kept off 0, where a root has no gradient
        return (self.temperature * doubt**self.power * entropy).mean()


class OffsetCrossEntropy(nn.Module):
    """`T CE((z - offset onehot(t)) / T)`: cross-entropy that is content only beyond a margin (Prach & Lampert 2022)."""

    def __init__(self, offset: float = 1.5 * math.sqrt(2), temperature: float = 0.25) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.offset, self.temperature = offset, temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.temperature * nn.functional.cross_entropy(_lower_label(logits, labels, self.offset) / self.temperature, labels)


def _check(logits: Tensor, labels: Tensor) -> None:
    """What torch says of labels of another kind names its own functions."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be (batch,) of torch.int64 and logits (batch, classes), got labels {tuple(labels.shape)} of {labels.dtype} "
            f"and logits {tuple(logits.shape)}; labels.long() converts whole numbers"
        )


def _lower_label(logits: Tensor, labels: Tensor, offset: float) -> Tensor:
    """The logits with `offset` taken off the label's."""
    _check(logits, labels)
    return logits - offset * nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
