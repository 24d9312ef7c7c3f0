"""Bounds of Jacobians entry by entry: as another library gives them, or by intervals from the outputs back to the input.

Intervals ask for no gradient of a gate, so their cost does not depend on how many are undecided: they are what is left where these are too many, and loose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from certify.local.condense import gate_ranges
from certify.local.layer import slopes
from certify.local.program import Affine, Gate, Program
from certify.local.region import Region
from certify.registry import Shape
from sdp.proof import gamma

_CHUNK = 2**22  # numbers of one batch of rows at the widest value
_TINY = 2.0**-500


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """`low <= J <= high` for every Jacobian on a region, row by row, and at least the l1 norm of each row."""

    low: Tensor  # (rows, inputs)
    high: Tensor
    sums: Tensor  # (rows,)

    def along(self, free: Tensor) -> Entries:  # (inputs,) of 0 and 1
        """Of changes of some entries, where no other entry of an input of the region changes."""
        return Entries(self.low * free, self.high * free, self.sums)

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest entries."""
        return self.low, self.high

    def row_norms(self, q: float) -> Tensor:  # (rows,)
        """At least the l_q norm of each row."""
        largest = torch.maximum(self.low.abs(), self.high.abs())
        if q == math.inf:
            return largest.amax(1)
        whole = torch.linalg.vector_norm(largest, ord=q, dim=1) * (1 + 2 * gamma(largest.shape[1] + 8)) + 2.0**-500
        return torch.minimum(whole, self.sums)  # no norm of a row is above its l1 norm


def by_intervals(
    program: Program,
    region: Region,
    rows: Tensor,  # (rows, outputs)
) -> tuple[Entries, int, int]:
    """Bounds of `rows @ J`, how many gates there are, and how many of them intervals leave undecided."""
    steep = {gate: slopes(gate, low, high) for gate, low, high in gate_ranges(program, region, rows)}
    parts = [_back(program, steep, part) for part in rows.split(max(1, _CHUNK // program.widest))]
    low, high = (torch.cat(ends) for ends in zip(*parts, strict=True))
    undecided = sum(int((least < most).sum()) for least, most in steep.values())
    return Entries(low, high, torch.full((len(rows),), math.inf, dtype=torch.float64)), sum(len(least) for least, _ in steep.values()), undecided


@dataclasses.dataclass(frozen=True, eq=False)
class _Gradient:
    """Of some rows to one value: within `reach` of `middle`."""

    middle: Tensor  # (rows, entries of the value)
    reach: Tensor

    def __add__(self, other: _Gradient) -> _Gradient:
        middle = self.middle + other.middle
        return _Gradient(middle, (self.reach + other.reach) * (1 + 2.0**-50) + 2.0**-52 * middle.abs() + _TINY)


def _back(program: Program, steep: dict[Gate, tuple[Tensor, Tensor]], rows: Tensor) -> tuple[Tensor, Tensor]:
    """From the outputs to the input, step by step."""
    start, none = _Gradient(rows, torch.zeros_like(rows)), torch.zeros(len(rows), program.inputs, dtype=torch.float64)
    to_input = program.follow_back(program.output, start, _transposed, lambda gate, gradient: _bent(gradient, *steep[gate])) or _Gradient(none, none)
    middle, reach = to_input.middle, to_input.reach * (1 + 2.0**-50)
    room = 2.0**-52 * (middle.abs() + reach) + _TINY
    return middle - reach - room, middle + reach + room


def _bent(gradient: _Gradient, least: Tensor, most: Tensor) -> _Gradient:
    """The products of all slopes between two numbers and all gradients in the range."""
    low, high = gradient.middle - gradient.reach, gradient.middle + gradient.reach
    corners = [least * low, least * high, most * low, most * high]
    bottom, top = torch.stack(corners).amin(0), torch.stack(corners).amax(0)
    middle, size = bottom / 2 + top / 2, torch.maximum(bottom.abs(), top.abs())
    steepest = torch.maximum(least.abs(), most.abs())
    lost = steepest * (gradient.middle.abs() + gradient.reach)  # `low` and `high` are rounded too
    reach = torch.maximum(top - middle, middle - bottom) * (1 + 2.0**-50) + 2.0**-49 * (size + lost) + _TINY * (steepest > 0)
    return _Gradient(middle, reach)


def _transposed(step: Affine, shapes: Sequence[Shape], gradient: _Gradient) -> list[_Gradient]:
    """Through an affine step: the middle by its transpose, the rest by that of its absolute values."""
    room = 2 * gamma(step.terms + 12)
    reach = gradient.reach * (1 + room) + room * gradient.middle.abs()
    middles, reaches = step.back(gradient.middle, shapes, False), step.back(reach, shapes, True)
    return [_Gradient(middle, around * (1 + room) + _TINY) for middle, around in zip(middles, reaches, strict=True)]
