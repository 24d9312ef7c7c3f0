"""Bounds of Jacobians entry by entry: as another library gives them, or by intervals from the outputs back to the input.

Intervals ask for no gradient of a gate, so their cost does not depend on how many are undecided: they are what is left where these are too many, and loose.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from certify.local.condense import gate_ranges, slopes
from certify.local.program import Affine, Gate, Program
from certify.local.region import Region
from sdp.proof import gamma

_CHUNK = 2**22  # numbers of one batch of rows at the widest value
_TINY = 2.0**-500


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """`low <= J <= high` for every Jacobian on a region, row by row, and at least the l1 norm of each row."""

    low: Tensor  # (rows, inputs)
    high: Tensor
    sums: Tensor  # (rows,)

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
    ranges = gate_ranges(program, region, rows)
    steep = [slopes(gate, low, high) for gate, low, high in ranges]
    widest = max(math.prod(shape) for shape in program.shapes)
    parts = [_back(program, steep, part) for part in rows.split(max(1, _CHUNK // widest))]
    low, high = (torch.cat(ends) for ends in zip(*parts, strict=True))
    undecided = sum(int((least < most).sum()) for least, most in steep)
    return Entries(low, high, torch.full((len(rows),), math.inf, dtype=torch.float64)), sum(len(low) for _, low, _ in ranges), undecided


@dataclasses.dataclass(frozen=True, eq=False)
class _Gradient:
    """Of some rows to one value: within `reach` of `middle`."""

    middle: Tensor  # (rows, *shape of the value)
    reach: Tensor

    def __add__(self, other: _Gradient) -> _Gradient:
        middle = self.middle + other.middle
        return _Gradient(middle, (self.reach + other.reach) * (1 + 2.0**-50) + 2.0**-52 * middle.abs() + _TINY)


def _back(program: Program, steep: list[tuple[Tensor, Tensor]], rows: Tensor) -> tuple[Tensor, Tensor]:
    """From the outputs to the input, step by step."""
    start = rows.reshape(len(rows), *program.shapes[program.output])
    found = {program.output: _Gradient(start, torch.zeros_like(start))}
    left = list(steep)
    for k in reversed(range(len(program.steps))):
        step, gradient = program.steps[k], found.pop(k + 1, None)
        if isinstance(step, Gate):
            made = [] if gradient is None else [_bent(gradient, *left[-1])]
            left.pop()
        else:
            made = [] if gradient is None else _transposed(step, [program.shapes[i] for i in step.inputs], gradient)
        for value, part in zip(step.inputs, made, strict=False):
            found[value] = found[value] + part if value in found else part
    none = torch.zeros(len(rows), math.prod(program.input_shape), dtype=torch.float64)
    to_input = found.get(0, _Gradient(none, none))
    middle, reach = to_input.middle.flatten(1), to_input.reach.flatten(1) * (1 + 2.0**-50)
    room = 2.0**-52 * (middle.abs() + reach) + _TINY
    return middle - reach - room, middle + reach + room


def _bent(gradient: _Gradient, least: Tensor, most: Tensor) -> _Gradient:
    """The products of all slopes between two numbers and all gradients in the range."""
    shape = gradient.middle.shape
    low, high = (gradient.middle - gradient.reach).flatten(1), (gradient.middle + gradient.reach).flatten(1)
    corners = [least * low, least * high, most * low, most * high]
    bottom, top = torch.stack(corners).amin(0), torch.stack(corners).amax(0)
    middle, size = bottom / 2 + top / 2, torch.maximum(bottom.abs(), top.abs())
    steepest = torch.maximum(least.abs(), most.abs())
    lost = steepest * (gradient.middle.abs() + gradient.reach).flatten(1)  # `low` and `high` are rounded too
    reach = torch.maximum(top - middle, middle - bottom) * (1 + 2.0**-50) + 2.0**-49 * (size + lost) + _TINY * (steepest > 0)
    return _Gradient(middle.reshape(shape), reach.reshape(shape))


@torch.enable_grad()
def _transposed(step: Affine, shapes: list[tuple[int, ...]], gradient: _Gradient) -> list[_Gradient]:
    """Through an affine step: the middle by its transpose, the rest by that of its absolute values."""
    leaves = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    room = 2 * gamma(step.terms + 12)
    reach = gradient.reach * (1 + room) + room * gradient.middle.abs()
    value, size = step.apply(*leaves), step.size(*leaves)
    middles, reaches = (torch.autograd.grad(of, leaves, by, is_grads_batched=True, allow_unused=True) for of, by in ((value, gradient.middle), (size, reach)))
    made = []
    for leaf, middle, around in zip(leaves, middles, reaches, strict=True):
        none = torch.zeros(len(reach), *leaf.shape, dtype=torch.float64)
        made.append(_Gradient(none if middle is None else middle, (none if around is None else around) * (1 + room) + _TINY))
    return made
