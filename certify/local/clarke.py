"""Bounds of every Clarke Jacobian on a region (Shi et al. 2022), among the undecided gates only.

A row of the Jacobian is `J0 + sum_k p_k G_k` with `p_k = s_k E_k`, s_k the slope of a gate, and `E_k = V_k + sum_{k' > k} M_k'k p_k'` the gradient to its
output. Bounds of E come from the last layer to the first; each is a linear form in later p, bounded by lines around `s E` in place of p, from the first of
them to the last.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from certify.local.condense import Condensed
from certify.local.norms import Bounded
from certify.local.relax import Lines, of_product
from sdp.proof import gamma

_CHUNK = 2**18  # numbers in one batch of forms: they stay in the cache of the processor
_MUCH = 2.0**-33  # of slack, beside the largest gradient to a gate


@dataclasses.dataclass(frozen=True, eq=False)
class _Gates:
    """One layer, for every row of the output: `E = center + later p +- slack`."""

    center: Tensor  # (rows, n)
    slack: Tensor  # (rows, n)
    later: Tensor  # (n, gates of later layers)
    inputs: Tensor  # (n, inputs)
    size: Tensor  # (rows, n), at least |center| + |later| |p|
    peak: Tensor  # (rows, n), at least |p|
    lines: Lines  # (rows, n) each, around p = s E


@dataclasses.dataclass(frozen=True, eq=False)
class Jacobian(Bounded):
    """`low <= J <= high` for every Clarke Jacobian J on the region, row by row of `rows @ network`; and more by linear forms."""

    gates: tuple[_Gates, ...]  # from the first layer to the last

    @functools.cached_property
    def range(self) -> tuple[Tensor, Tensor]:  # (rows, inputs) each
        """The smallest and the largest entries."""
        start = [layer.inputs.T for layer in self.gates]
        high = upper_bounds(self.gates, start, self.condensed.inputs) + self.condensed.slack_inputs
        low = -upper_bounds(self.gates, [-part for part in start], -self.condensed.inputs) - self.condensed.slack_inputs
        return low, torch.maximum(low, high)

    def weighted(self, weights: Tensor) -> Tensor:  # (rows, inputs) -> (rows,)
        """At least `sum_j weights_j J_j` for each row."""
        condensed = self.condensed
        start = [(weights @ layer.inputs.T)[:, None] for layer in self.gates]
        total = upper_bounds(self.gates, start, (weights * condensed.inputs).sum(1)[:, None])[:, 0]
        return total + self.rounding(weights)

    def rounding(self, weights: Tensor) -> Tensor:  # (rows, inputs) -> (rows,)
        """What the rounding of the gradients to the inputs, and of their sum, can add to a bound of `sum_j weights_j J_j`."""
        reach = self.condensed.inputs.abs()
        for layer in self.gates:
            reach = reach + layer.peak @ layer.inputs.abs()
        terms = 2 * gamma(weights.shape[1] + sum(layer.peak.shape[1] for layer in self.gates) + 8)
        return (weights.abs() * (self.condensed.slack_inputs + terms * reach)).sum(1) * (1 + terms) + 2.0**-500


def bound_jacobian(condensed: Condensed) -> Jacobian:
    """Bounds of the gradient to each gate, and what is needed for those to the inputs; once more with the slack that follows from them, where it matters."""
    jacobian = with_slack(condensed)
    if jacobian.gates and float(condensed.slack_gates.max()) > _MUCH * float(condensed.gates.abs().max()):
        return with_slack(condensed.with_gradients(torch.cat([layer.peak for layer in jacobian.gates], dim=1)))
    return jacobian


def with_slack(condensed: Condensed) -> Jacobian:
    """The same with the slack as it stands."""
    done: list[_Gates] = []
    stop = condensed.gates.shape[1]
    later = [layer.earlier for layer in condensed.layers]  # rows of M: by gate, to all earlier ones
    for number in reversed(range(len(condensed.layers))):
        layer = condensed.layers[number]
        start = stop - layer.count
        to_later = torch.cat([torch.zeros(layer.count, 0, dtype=torch.float64), *(part[:, start:stop].T for part in later[number + 1 :])], dim=1)
        center, slack = condensed.gates[:, start:stop], condensed.slack_gates[:, start:stop]
        forms = list(to_later.split([part.peak.shape[1] for part in done], dim=1)) if done else []
        high = upper_bounds(done, forms, center) + slack
        low = torch.minimum(-upper_bounds(done, [-form for form in forms], -center) - slack, high)
        least, most = layer.slopes
        peak = torch.maximum(least.abs(), most.abs()) * torch.maximum(low.abs(), high.abs()) * (1 + 2.0**-50)
        size = center.abs() + slack
        if done:
            size = size + torch.cat([part.peak for part in done], dim=1) @ to_later.abs().T
        lines = of_product(least.expand_as(low), most.expand_as(low), low, high)
        done.insert(0, _Gates(center, slack, to_later, layer.inputs, size, peak, lines))
        stop = start
    return Jacobian(condensed, tuple(done))


def upper_bounds(
    layers: Sequence[_Gates],
    start: Sequence[Tensor],  # by layer: (forms, n), the same for all rows, or (rows, forms, n)
    constant: Tensor,  # (rows, forms)
) -> Tensor:  # (rows, forms)
    """At least `constant + sum start p` for each row of the output, in batches of forms."""
    rows, forms = constant.shape
    if not layers:
        return constant
    width = sum(part.shape[-1] for part in start)
    chunk = max(1, _CHUNK // max(1, rows * width))
    pieces = []
    for first in range(0, forms, chunk):
        part = slice(first, first + chunk)
        pieces.append(_upper_bounds(layers, [form[..., part, :] for form in start], constant[:, part]))
    return torch.cat(pieces, dim=1)


def _upper_bounds(layers: Sequence[_Gates], start: Sequence[Tensor], constant: Tensor) -> Tensor:
    """Each p is replaced by its line above or below, by the sign of its coefficient; the rounding of all sums is at most `gamma` times their terms."""
    forms = torch.cat(list(start), dim=-1)
    peak = torch.cat([layer.peak for layer in layers], dim=1)  # (rows, gates)
    at_start = peak @ forms.abs().T if forms.dim() == 2 else torch.einsum("rfg,rg->rf", forms.abs(), peak)
    total, size = constant, constant.abs() + at_start
    forms = forms.expand(len(peak), *forms.shape[-2:])
    for layer in layers:
        coefficients, forms = forms.split([layer.peak.shape[1], forms.shape[-1] - layer.peak.shape[1]], dim=-1)
        above, below, lines = coefficients.clamp(min=0), coefficients.clamp(max=0), layer.lines
        weight = above * lines.high_slope[:, None] + below * lines.low_slope[:, None]
        total = total + _dot(above, lines.high_shift) + _dot(below, lines.low_shift) + _dot(weight, layer.center) + _dot(weight.abs(), layer.slack)
        size = size + _dot(weight.abs(), layer.size) + _dot(above, lines.high_shift.abs()) - _dot(below, lines.low_shift.abs())
        forms = forms + weight @ layer.later
    return total + 2 * gamma(2 * peak.shape[1] + 8 * len(layers) + 16) * size


def _dot(forms: Tensor, of: Tensor) -> Tensor:  # (rows, forms, n), (rows, n) -> (rows, forms)
    return (forms @ of[..., None])[..., 0]
