"""Slopes of the lines below undecided ReLUs, for each bound its own (alpha-CROWN, Xu et al. 2021), so that more gates become decided.

Any slope between 0 and 1 is valid. Steps of Adam along the gradient of the bounds propose slopes; every bound on the way is computed with all its rounding, and
the smallest is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from certify.local.crown import first_slopes, upper_bounds
from certify.local.layer import Layer
from certify.local.region import Region

_CHUNK = 2**22  # numbers in the slopes and coefficients of one batch of rows
_RATE = 0.3  # of the first step; the last is a tenth of it
_RATE_TOGETHER = 0.02
_MEAN, _SQUARE = 0.8, 0.95  # how much of the past Adam keeps


def tightened(
    layers: Sequence[Layer],
    region: Region,
    center: Tensor,  # (rows,)
    inputs: Tensor,  # (rows, inputs)
    gates: Tensor,  # (rows, gates of the layers)
    steps: int,
) -> Tensor:  # (rows,)
    """`upper_bounds`, or less."""
    if not steps or not any(layer.through_zero for layer in layers):
        return upper_bounds(layers, region, center, inputs, gates)
    rows = max(1, _CHUNK // (inputs.shape[1] + 4 * gates.shape[1]))
    parts = zip(center.split(rows), inputs.split(rows), gates.split(rows), strict=True)
    return torch.cat([_descent(layers, region, *part, steps) for part in parts])


def _descent(layers: Sequence[Layer], region: Region, center: Tensor, inputs: Tensor, gates: Tensor, steps: int) -> Tensor:
    """Adam on the slopes of all rows at once: they do not depend on each other, and its steps do not depend on their scales."""
    first = first_slopes(layers, gates)
    free = torch.cat([torch.full_like(layer.center, float(layer.through_zero)) for layer in layers])
    slopes, adam = first.clone(), Adam(rate_of(layers, _RATE), steps)
    best = torch.full_like(center, torch.inf)
    for _ in range(steps + 1):
        with torch.enable_grad():
            tried = slopes.requires_grad_(True)
            bounds = upper_bounds(layers, region, center, inputs, gates, tried)
            (gradient,) = torch.autograd.grad(bounds.sum(), tried)
        best, gradient = torch.fmin(best, bounds.detach()), gradient.nan_to_num(0.0)
        slopes = (tried.detach() - free * adam.step(gradient)).clamp(0.0, 1.0)
        slopes = torch.where(free > 0, slopes, first)
    return best


def rate_of(layers: Sequence[Layer], rate: float) -> float:
    """Of the first step for slopes: small where gates share an ellipsoid, as the best slopes are then inside of [0, 1] rather than at its ends."""
    return min(rate, _RATE_TOGETHER) if any(layer.ellipsoid is not None for layer in layers) else rate


class Adam:
    """The steps of Adam (Kingma & Ba 2015), whose size does not depend on that of the gradients; they become ten times smaller on the way."""

    def __init__(self, rate: float, steps: int) -> None:
        self.rate, self.steps = rate, steps
        self.done, self.mean, self.square = 0, torch.zeros(()), torch.zeros(())

    def step(self, gradient: Tensor) -> Tensor:
        """What is to be taken away next."""
        self.mean = _MEAN * self.mean + (1 - _MEAN) * gradient
        self.square = _SQUARE * self.square + (1 - _SQUARE) * gradient**2
        shrunk = self.rate * 0.1 ** (self.done / max(1, self.steps))
        self.done += 1
        pace = shrunk / (1 - _MEAN**self.done) * (1 - _SQUARE**self.done) ** 0.5
        return pace * self.mean / (self.square.sqrt() + 1e-300)
