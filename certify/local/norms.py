"""Norms of the rows of all Jacobians on a region, from bounds of their entries and of linear forms in these."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from certify.local.condense import Condensed
from sdp.proof import gamma


@dataclasses.dataclass(frozen=True, eq=False)
class Bounded(abc.ABC):
    """Bounds of every Clarke Jacobian J of some rows of the output, on the region of a condensed program."""

    condensed: Condensed

    @property
    @abc.abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:  # (rows, inputs) each
        """The smallest and the largest entries."""

    @abc.abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:  # (rows, inputs) -> (rows,)
        """At least `sum_j weights_j J_j` for each row."""

    def row_norms(self, q: float) -> Tensor:  # (rows,)
        """At least the l_q norm of each row: the Lipschitz constant of that output from the l_p norm with 1/p + 1/q = 1."""
        low, high = self.range
        largest = torch.maximum(low.abs(), high.abs())
        inputs = low.shape[1]
        room = 1 + 2 * gamma(inputs + 8)
        if q == torch.inf:
            return largest.amax(1) if inputs else largest.sum(1)
        if q == 1:
            slope, shift = _absolute(low, high)
            total = self.weighted(slope) + shift.sum(1) * room
            return torch.minimum(total, largest.sum(1) * room)
        total = self.weighted(low + high) + _constant_of_squares(low, high)
        entries = (largest * largest).sum(1)
        return torch.sqrt(torch.minimum(total, entries).clamp(min=0)) * room + 2.0**-500


def _absolute(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and shift of the line above `|t|` on `[low, high]`."""
    width = (high - low).clamp(min=2.0**-1000)
    slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, -1.0, ((high.abs() - low.abs()) / width).clamp(-1.0, 1.0)))
    shift = torch.maximum(low.abs() - slope * low, high.abs() - slope * high)
    return slope, torch.where((low >= 0) | (high <= 0), 0.0, shift + 2.0**-48 * torch.maximum(low.abs(), high.abs()))


def _constant_of_squares(low: Tensor, high: Tensor) -> Tensor:
    """`sum_j t_j^2 <= sum_j (low + high) t_j - low high`: at least the sum of the last terms, with the rounding of the first factors."""
    largest = torch.maximum(low.abs(), high.abs())
    return (-low * high).sum(1) + 2 * gamma(low.shape[1] + 16) * (largest * largest).sum(1)
