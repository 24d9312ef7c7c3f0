"""Activations that keep the norm of the gradient: pairs of channels are sorted or reflected, never squashed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipnet import functional
from lipnet.layers.base import Layer, check_sizes


class MaxMin(Layer):
    """Sorts each pair of channels (dim 1) into (max, min); Anil et al. 2019. 1-Lipschitz in every l_p.

    `pairing` says which channels are a pair: "neighbours" (2 i and 2 i + 1) or "halves" (i and i + channels / 2, as in the code of BRONet, SOC and Cayley).
    Not deel-torchlip's MaxMin, which is (relu(x), relu(-x)) and doubles the channels. Shapes: (batch, channels, ...) -> the same; channels even.
    """

    def __init__(self, pairing: str = "neighbours") -> None:
        super().__init__()
        if pairing not in ("neighbours", "halves"):
            raise ValueError(f"pairing must be 'neighbours' or 'halves', got {pairing!r}")
        self.pairing = pairing

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_min(x, pairing=self.pairing)

    def extra_repr(self) -> str:
        return f"pairing={self.pairing}"


class GroupSort(Layer):
    """Sorts each group of `size` neighbouring channels (dim 1), largest first; Anil et al. 2019. 1-Lipschitz in every l_p.

    Shapes: (batch, channels, ...) -> the same; channels divisible by `size`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        check_sizes(size=size)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_sort(x, self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class Householder(Layer):
    """Reflects each pair of neighbouring channels that lies beyond a learned line; Singla, Singla & Feizi 2021. 1-Lipschitz in l2.

    One angle per pair, pi/2 at the start, where each pair becomes (min, max). Shapes: (batch, channels, ...) -> the same; channels even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_sizes(channels=channels)
        if channels % 2:
            raise ValueError(f"Householder pairs neighbouring channels, so channels must be even, got {channels}")
        self.channels = channels
        self.angle = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def direction(self) -> Tensor:  # (channels // 2, 2)
        """The unit normal of each pair's mirror."""
        return torch.stack([torch.sin(self.angle / 2), -torch.cos(self.angle / 2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.householder(x, self.direction())

    def frozen(self) -> nn.Module:
        return torch.fx.symbolic_trace(_Reflect(self.direction().detach().clone()))

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class _Reflect(nn.Module):
    """The reflection with its directions stored; only ever traced."""

    direction: Tensor

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.register_buffer("direction", direction)

    def forward(self, x: Tensor) -> Tensor:
        return functional.householder(x, self.direction)


class Abs(Layer):
    """The absolute value of each entry. 1-Lipschitz in every l_p; keeps norms."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.abs(x)


class NActivation(Layer):
    """`x - 2 low | -x | x - 2 high` on either side of two learned thresholds per channel (dim 1); Prach & Lampert 2023. Slopes +-1, 1-Lipschitz in every l_p.

    Starts as the absolute value with a second fold at 1. Shapes: (batch, channels, ...) -> the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_sizes(channels=channels)
        self.channels = channels
        self.low = nn.Parameter(torch.zeros(channels))
        self.gap = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return functional.n_activation(x, self.low, self.low + self.gap.abs())

    def frozen(self) -> nn.Module:
        return torch.fx.symbolic_trace(_Folds(self.low.detach().clone(), (self.low + self.gap.abs()).detach().clone()))

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class _Folds(nn.Module):
    """The N-activation with its thresholds stored; only ever traced."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: Tensor) -> Tensor:
        return functional.n_activation(x, self.low, self.high)
