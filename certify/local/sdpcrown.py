"""ReLUs whose inputs lie in one ellipsoid: not all of them can be where their lines are worst (SDP-CROWN, Chiu et al. 2025, here in scales of its own).

Over `|d|_2 <= r` a layer of gates has `z = a + u + s`, with a its input at `d = 0`, `|s| <= slack`, and `u = sum_l K_l e_l` with all `|e_l|_2 <= r`. Let theta
be positive with sum 1, and `A >= sum_l |K_l K_l'| / theta_l` entry by entry. For any `q >= 0`
    sum_i v_i u_i^2 <= r^2,    v_i = q_i / sum_j A_ij q_j,
as `2 |x_i x_j| <= x_i^2 q_j / q_i + x_j^2 q_i / q_j` makes `diag(1 / v)` at least any matrix below A. So for any rows c and l, and any lambda >= 0
    c relu(z) - l z <= lambda r^2 + sum_i max(c_i relu(y) - l_i y - lambda v_i (y - a_i)^2 over the range of y) + (|c| + |l|) slack,    y = a + u,
where lambda = 0 is what lines gate by gate give. The sum of `b_i u_i` is at most `r (sum_i b_i^2 / v_i)^(1/2)`, least for `q = |b|`: `r (|b|' A |b|)^(1/2)`.

In later layers `u` has a part for each layer before: between its input at `d = 0` and any other a ReLU has a secant of slope `m +- h`, so that what it adds is
`m u + h e`, and `|e_i| <= |u_i|` puts e into the same ellipsoid as u.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from certify.local.layer import Layer
from certify.local.region import Region
from sdp.proof import gamma

_TINY = 2.0**-500  # far above what products lose by underflow
_LEAST = 2.0**-100  # of the largest q, of the radius, and to the fourth of lambda: what is less is taken as 0, and no product of them loses digits
_CHUNK = 2**20  # numbers in one batch of rows
_TRIES = 3  # of lambda
_ROOM = 2.0**-48  # relative, for the few roundings of one number


@dataclasses.dataclass(frozen=True, eq=False)
class Ellipsoid:
    """Where the inputs of a layer of ReLUs are together: `z = center + sum_l K_l e_l +- slack`, all `|e_l|_2 <= radius`."""

    center: Tensor  # (n,)
    slack: Tensor  # (n,)
    parts: tuple[Tensor, ...]  # K_l: (n, inputs), and (n, gates) for each layer before
    overlap: Tensor  # (n, n): A
    radius: float

    @classmethod
    def of(cls, layers: Sequence[Layer], layer: Layer, region: Region) -> Ellipsoid | None:
        """Of a layer behind others. None where the region is in no ball of l2, or one of the layers has gates that are no ReLUs."""
        if region.p != 2 or not _LEAST < region.radius < math.inf or not layer.through_zero:
            return None
        center, parts = layer.center, [layer.inputs]
        lost = layer.inputs.abs().pow(2).sum(1).sqrt()  # what all rounding of the parts is a multiple of
        wrong, size, stop = layer.slack, layer.center.abs(), 0
        room = 2 * gamma(layer.earlier.shape[1] + 24)
        for before in layers:
            if before.ellipsoid is None:
                return None
            start, stop = stop, stop + len(before.center)
            M, its = layer.earlier[:, start:stop], before.ellipsoid
            middle, half = its.secants(before.low, before.high)
            half = half * its.scale
            center, size = center + M @ its.center.clamp(min=0), size + M.abs() @ its.center.abs()
            wrong = wrong + M.abs() @ its.slack
            through = M * middle
            parts = [part + through @ its_part for part, its_part in zip(parts, its.parts, strict=True)] + [M * half]
            lost = lost + M.abs() @ (sum(_lengths(part) for part in its.parts) + half)
        wrong = wrong * (1 + room) + room * (size + region.radius * lost) + _TINY * max(1.0, region.radius)
        return cls(center, wrong, tuple(parts), _overlap(parts), region.radius)

    @property
    def scale(self) -> Tensor:
        """`v^(-1/2)` for equal q, rounded up: u divided by it is in the ball."""
        return self.overlap.sum(1).sqrt() * (1 + gamma(len(self.center) + 8))

    def secants(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes `middle +- half` that ReLU has between the center and any point of the range."""
        a, low, high = self.center, (low - self.slack) * (1 + _ROOM), (high + self.slack) * (1 + _ROOM)
        least = torch.where(a > 0, a / (a - low.clamp(max=0)) * (1 - _ROOM), 0.0)
        most = torch.where(a < 0, high.clamp(min=0) / (high.clamp(min=0) - a) * (1 + _ROOM), 1.0)
        middle = (least + most) / 2
        return middle, (most - least) / 2 + _ROOM

    def intercepts(self, low: Tensor, high: Tensor, c: Tensor, slope: Tensor) -> Tensor:  # (..., n) -> (...)
        """At least the largest `c relu(z) - slope z` of the layer, for any slopes; not a number where overflow leaves none."""
        *shape, n = torch.broadcast_shapes(low.shape, c.shape)
        rows = max(1, _CHUNK // n)
        parts = zip(*(of.expand(*shape, n).reshape(-1, n).split(rows) for of in (low - self.slack, high + self.slack, c, slope)), strict=True)
        return torch.cat([self._intercepts(*part) for part in parts]).reshape(shape)

    def _intercepts(self, low: Tensor, high: Tensor, c: Tensor, slope: Tensor) -> Tensor:  # (rows, n) -> (rows,)
        """Over the entries that are not 0, of which a convolution leaves few; at any lambda and point, the slope there bounds what is concave."""
        squared, count = self.radius**2, len(c)
        with torch.no_grad():
            q = c.abs()
            q = q / q.amax(1, keepdim=True).clamp(min=_TINY)
            q = torch.where(q < _LEAST, 0.0, q)
            v = q / (q @ self.overlap + _TINY)
        row, column = torch.nonzero((c != 0) | (slope != 0), as_tuple=True)

        def summed(values: Tensor) -> Tensor:
            return torch.zeros(count, dtype=torch.float64).index_add(0, row, values)

        low, high, c, slope, v = (of[row, column] for of in (low, high, c, slope, v))
        a, slack = self.center[column], self.slack[column]
        branches = [(c - slope, low.clamp(min=0) - a, high.clamp(min=0) - a), (-slope, low.clamp(max=0) - a, high.clamp(max=0) - a)]  # of `b (a + off)`
        with torch.no_grad():
            multiplier = _proposed(branches, a, v, squared, row, summed)
            curve = multiplier[row] * v
        found, size = [], torch.zeros_like(multiplier)
        for b, first, last in branches:
            with torch.no_grad():
                off = _top(b, curve, first, last)
                rest = b - 2 * curve * off
                left = torch.maximum(rest * (first - off), rest * (last - off))
                size = size + summed((b.abs() + 2 * curve * off.abs()) * (a.abs() + first.abs() + last.abs()) + curve * off**2)
            found.append(b * a + b * off + (left - curve * off**2))
        value = summed(torch.maximum(*found) + (c.abs() + slope.abs()) * slack) + multiplier * squared
        size = size + summed((c.abs() + slope.abs()).detach() * slack) + multiplier * squared
        return value + 2 * gamma(len(self.center) + 24) * size + _TINY


def _proposed(
    branches: Sequence[tuple[Tensor, Tensor, Tensor]], a: Tensor, v: Tensor, squared: float, row: Tensor, summed: Callable[[Tensor], Tensor]
) -> Tensor:  # (rows,)
    """About the lambda that leaves the least: where `sum v (y - a)^2 = r^2` at the points that are best for it, towards which steps are taken."""
    steepest = torch.maximum(*(b.abs() for b, _, _ in branches))
    multiplier = (summed(torch.where(v > 0, steepest**2 / v, 0.0)) / (4 * squared)).sqrt()
    best, least = multiplier, torch.full_like(multiplier, math.inf)
    for _ in range(_TRIES):
        curve = multiplier[row] * v
        tops = [_top(b, curve, first, last) for b, first, last in branches]
        values = [b * (a + top) - curve * top**2 for (b, _, _), top in zip(branches, tops, strict=True)]
        off = torch.where(values[0] > values[1], tops[0], tops[1])
        value = multiplier * squared + summed(torch.maximum(*values))
        best, least = torch.where(value < least, multiplier, best), torch.fmin(value, least)
        multiplier = multiplier * (summed(v * off**2) / squared).sqrt()
    return torch.where(best < _LEAST**4, 0.0, best)


def _top(b: Tensor, curve: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """About where `b off - curve off^2` is largest between two ends."""
    return torch.minimum(torch.maximum(b / (2 * curve).clamp(min=_TINY), first), last)


def _lengths(part: Tensor) -> Tensor:
    """Of the rows, rounded up."""
    return torch.linalg.vector_norm(part, dim=1) * (1 + 2 * gamma(part.shape[1] + 8)) + _TINY


def _overlap(parts: Sequence[Tensor]) -> Tensor:
    """At least `sum_l |K_l K_l'| / theta_l` entry by entry, with theta by the size of the parts; their products are wrong by that of two lengths at most."""
    sizes = torch.stack([torch.linalg.vector_norm(part) for part in parts]) + _TINY
    total = torch.zeros(())
    for part, theta in zip(parts, sizes / sizes.sum() * (1 - _ROOM), strict=True):
        length = _lengths(part)
        room = gamma(part.shape[1] + 8)
        total = total + ((part @ part.T).abs() + room * torch.outer(length, length)) / theta
    return total * (1 + gamma(len(parts) + 8)) + _TINY
