"""Bounds of the Jacobians of smooth networks, where the slope of a gate goes with its input (Shi et al. 2022, with the planes of McCormick 1976).

`certify.local.clarke` lets the slope in `p = s E` be any number of its range, wherever the input of the network is. Here `s = phi'(z)` lies between two lines
in the input z of the gate, and p between planes in E and z. What becomes of a linear form in p is a sum over all z, and these are affine in the input of the
network and the values of the gates, around which there are lines in z (certify.local.crown). On a region of radius r the range alone is off by a multiple of r,
the planes by a multiple of r^2; on large regions either may be the smaller, so every bound is the least of some choices of planes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from certify.local import clarke, crown
from certify.local.clarke import Jacobian
from certify.local.condense import Condensed
from certify.local.layer import Layer
from certify.local.norms import Bounded
from certify.local.relax import Planes, flat, of_coupled_product, of_product, of_slope
from sdp.activation import Smooth
from sdp.proof import gamma

_CHUNK = 2**18  # numbers in one batch of forms
_SHARES = ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))  # of the planes of McCormick above and below, by choice
_EFFORT = 2e9  # products, about half a second


@dataclasses.dataclass(frozen=True, eq=False)
class _Gates:
    """One layer, for every row of the output: `E = center + later p +- slack` as in `certify.local.clarke`, and the planes around p, by choice."""

    values: Layer
    center: Tensor  # (rows, n)
    slack: Tensor  # (rows, n)
    later: Tensor  # (n, gates of later layers)
    size: Tensor  # (rows, n), at least |center| + |later| |p|
    peak: Tensor  # (rows, n), at least |p|
    planes: tuple[Planes, ...]  # of (rows, n) each


@dataclasses.dataclass(frozen=True, eq=False)
class Coupled(Bounded):
    """`low <= J <= high` for every Jacobian J on the region, and more by linear forms; none of it is looser than with `plain`."""

    plain: Jacobian
    gates: tuple[_Gates, ...]  # from the first layer to the last
    choices: int  # of planes, for the bounds of entries

    @functools.cached_property
    def range(self) -> tuple[Tensor, Tensor]:  # (rows, inputs) each
        """The smallest and the largest entries."""
        start = [layer.values.inputs.T for layer in self.gates]
        high = upper_bounds(self.condensed, self.gates, start, self.condensed.inputs, self.choices) + self.condensed.slack_inputs
        low = -upper_bounds(self.condensed, self.gates, [-part for part in start], -self.condensed.inputs, self.choices) - self.condensed.slack_inputs
        least, most = self.plain.range
        low, high = torch.fmax(low, least), torch.fmin(high, most)
        return low, torch.maximum(low, high)

    def row_norms(self, q: float) -> Tensor:  # (rows,)
        """At least the l_q norm of each row: the Lipschitz constant of that output from the l_p norm with 1/p + 1/q = 1."""
        return torch.fmin(self.plain.row_norms(q), super().row_norms(q))

    def weighted(self, weights: Tensor) -> Tensor:  # (rows, inputs) -> (rows,)
        """At least `sum_j weights_j J_j` for each row."""
        condensed = self.condensed
        start = [(weights @ layer.values.inputs.T)[:, None] for layer in self.gates]
        constant = (weights * condensed.inputs).sum(1)[:, None]
        total = upper_bounds(condensed, self.gates, start, constant, len(_SHARES))[:, 0]
        return total + self.plain.rounding(weights)


def bound_jacobian(condensed: Condensed, effort: float = _EFFORT) -> Bounded:
    """The sharpest bounds of all Jacobians: those of `certify.local.clarke`, and where there are smooth gates, those of both.

    With one choice of planes at least, and with more of them as long as they take no more than `effort` products.
    """
    plain = clarke.bound_jacobian(condensed)
    if not _is_smooth(condensed):
        return plain
    condensed = plain.condensed
    choices = max(1, min(len(_SHARES), int(effort / max(1.0, _products(condensed)))))
    done: list[_Gates] = []
    for of, values in zip(reversed(plain.gates), reversed(condensed.layers), strict=True):
        forms = list(of.later.split([part.peak.shape[1] for part in done], dim=1)) if done else []
        high = upper_bounds(condensed, done, forms, of.center, choices) + of.slack
        low = torch.minimum(-upper_bounds(condensed, done, [-form for form in forms], -of.center, choices) - of.slack, high)
        done.insert(0, _Gates(values, of.center, of.slack, of.later, of.size, of.peak, _planes(values, low, high)))
    return Coupled(condensed, plain, tuple(done), choices)


def products(condensed: Condensed) -> tuple[float, float]:
    """About how many products the bounds of all Jacobians take here at least, and those of `certify.local.clarke`."""
    (rows, inputs), gates = condensed.inputs.shape, condensed.undecided
    plain = rows * gates**2 * (gates / 3 + 2 * inputs)
    return plain + _products(condensed) * _is_smooth(condensed), plain


def _products(condensed: Condensed) -> float:
    """For one choice of planes."""
    (rows, inputs), gates = condensed.inputs.shape, condensed.undecided
    return rows * (gates + 2 * inputs) * gates * 1.5 * (gates + inputs)


def _is_smooth(condensed: Condensed) -> bool:
    return any(isinstance(layer.gate.activation, Smooth) for layer in condensed.layers)


def _planes(layer: Layer, low: Tensor, high: Tensor) -> tuple[Planes, ...]:
    """Around the product of each slope and a gradient in `[low, high]`: without a coupling, and by shares."""
    least, most = (end.expand_as(low) for end in layer.slopes)
    alone = flat(of_product(least, most, low, high))
    if not isinstance(layer.gate.activation, Smooth):
        return (alone,) * (len(_SHARES) + 1)
    lines, reach = of_slope(layer.gate.activation, layer.low, layer.high), torch.maximum(layer.low.abs(), layer.high.abs())
    return alone, *(of_coupled_product(lines, reach, least, most, low, high, share) for share in _SHARES)


def upper_bounds(
    condensed: Condensed,
    layers: Sequence[_Gates],
    start: Sequence[Tensor],  # by layer: (forms, n), the same for all rows, or (rows, forms, n)
    constant: Tensor,  # (rows, forms)
    choices: int,
) -> Tensor:  # (rows, forms)
    """At least `constant + sum start p` for each row of the output, the least without a coupling and of some choices of planes, in batches of forms."""
    rows, forms = constant.shape
    if not layers:
        return constant
    chunk = max(1, _CHUNK // max(1, rows * (3 * condensed.undecided + condensed.inputs.shape[1])))
    pieces = []
    for first in range(0, forms, chunk):
        part = slice(first, first + chunk)
        of_part = [form[..., part, :].expand(rows, -1, -1) for form in start]
        found = [_upper_bounds(condensed, layers, of_part, constant[:, part], choice) for choice in range(choices + 1)]
        pieces.append(functools.reduce(torch.fmin, found))
    return torch.cat(pieces, dim=1)


def _upper_bounds(condensed: Condensed, layers: Sequence[_Gates], start: Sequence[Tensor], constant: Tensor, choice: int) -> Tensor:
    """Each p is replaced by its plane above or below, by the sign of its coefficient; the rounding of all sums is at most `gamma` times their terms."""
    forms = torch.cat(list(start), dim=-1)
    gates = forms.shape[-1]
    total = constant
    size = constant.abs() + _dot(forms.abs(), torch.cat([layer.peak for layer in layers], dim=1))
    weights = []  # of each z
    for layer in layers:
        coefficients, forms = forms.split([layer.peak.shape[1], forms.shape[-1] - layer.peak.shape[1]], dim=-1)
        above, below, planes = coefficients.clamp(min=0), coefficients.clamp(max=0), layer.planes[choice]
        weight = above * planes.high_slope[:, None] + below * planes.low_slope[:, None]
        weights.append(above * planes.high_input[:, None] + below * planes.low_input[:, None])
        total = total + _dot(above, planes.high_shift) + _dot(below, planes.low_shift) + _dot(weight, layer.center) + _dot(weight.abs(), layer.slack)
        size = size + _dot(weight.abs(), layer.size) + _dot(above, planes.high_shift.abs()) - _dot(below, planes.low_shift.abs())
        forms = forms + weight @ layer.later
    total = total + 2 * gamma(2 * gates + 8 * len(layers) + 16) * size
    return total if choice == 0 else total + _of_inputs(condensed, [layer.values for layer in layers], torch.cat(weights, dim=-1))


def _of_inputs(condensed: Condensed, layers: Sequence[Layer], weights: Tensor) -> Tensor:  # (rows, forms, gates of these layers) -> (rows, forms)
    """At least the largest sum of `weights z` over the region, with the rounding of the weights."""
    gates = condensed.undecided
    center, slack, size, inputs = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("center", "slack", "size", "inputs"))
    earlier = torch.cat([torch.nn.functional.pad(layer.earlier, (0, gates - layer.earlier.shape[1])) for layer in layers])
    flat = weights.flatten(0, 1)
    total = crown.upper_bounds(condensed.layers, condensed.region, flat @ center, flat @ inputs, flat @ earlier)
    return (total + flat.abs() @ (slack + 2 * gamma(gates + 16) * (size + slack))).view(weights.shape[:-1])


def _dot(forms: Tensor, of: Tensor) -> Tensor:  # (rows, forms, n), (rows, n) -> (rows, forms)
    return (forms @ of[..., None])[..., 0]
