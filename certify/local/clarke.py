"""Bounds of every Clarke Jacobian on a region (Shi et al. 2022), among the undecided gates only.

A row of the Jacobian is `J0 + sum_k p_k G_k` with `p_k = s_k E_k`, s_k the slope of a gate, and `E_k = V_k + sum_{k' > k} M_k'k p_k'` the gradient to its
output. Bounds of E come from the last layer to the first; each is a linear form in later p, bounded by lines around `s E` in place of p, from the first of
them to the last.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from certify.local.condense import Condensed
from certify.local.norms import Bounded
from certify.local.relax import Lines, of_product
from sdp.proof import gamma

_CHUNK = 2**18  # numbers in one batch of forms: they stay in the cache of the processor
_MUCH = 2.0**-33  # of slack, beside the largest gradient to a gate
_SAME = 2.0**-40  # above what the rounding of two slopes makes of their sum


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
    room: float  # relative, for the rounding of all sums

    @functools.cached_property
    def bends(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (rows or 1, n), and (rows, n) each
        """mean, half, a, b with `c p <= (mean c + half |c|) (later p) + a c + b |c|` for every c; in b is room for rounding, relative to |c p| and |c E|.

        The two lines around a product have slopes with the same mean in every row, but for rounding; then it stands there once, and b has what it is off by.
        """
        lines = self.lines
        own, half = (lines.high_slope + lines.low_slope) / 2, (lines.high_slope - lines.low_slope) / 2
        mean = own[:1] if bool((own - own[:1]).abs().max() <= _SAME) else own
        steepest, largest = torch.maximum(lines.high_slope.abs(), lines.low_slope.abs()), torch.maximum(lines.high_shift.abs(), lines.low_shift.abs())
        a = mean * self.center + (lines.high_shift + lines.low_shift) / 2
        b = half * self.center + (lines.high_shift - lines.low_shift) / 2 + steepest * self.slack
        b = b + self.room * (steepest * self.size + largest) + 2 * (own - mean).abs() * self.size
        return mean, half, a, b


@dataclasses.dataclass(frozen=True, eq=False)
class Jacobian(Bounded):
    """`low <= J <= high` for every Clarke Jacobian J on the region, row by row of `rows @ network`; and more by linear forms."""

    gates: tuple[_Gates, ...]  # from the first layer to the last

    @functools.cached_property
    def range(self) -> tuple[Tensor, Tensor]:  # (rows, inputs) each
        """The smallest and the largest entries."""
        low, high = bounds(self.gates, [layer.inputs.T for layer in self.gates], self.condensed.inputs, self.reach)
        low, high = low - self.condensed.slack_inputs, high + self.condensed.slack_inputs
        return low, torch.maximum(low, high)

    @functools.cached_property
    def reach(self) -> Tensor:  # (rows, inputs)
        """At least `|J0| + |p| |G|`, but for rounding."""
        reach = self.condensed.inputs.abs()
        for layer in self.gates:
            reach = reach + layer.peak @ layer.inputs.abs()
        return reach

    def weighted(self, weights: Tensor) -> Tensor:  # (rows, inputs) -> (rows,)
        """At least `sum_j weights_j J_j` for each row."""
        condensed = self.condensed
        forms = [weights @ layer.inputs.T for layer in self.gates]
        total = (weights * condensed.inputs).sum(1)
        if forms:
            joined = torch.cat(forms, dim=1)[:, None]
            total = _upper_bounds(self.gates, joined, total[:, None], joined.new_empty(2, joined.numel()))[:, 0]
        return total + self.rounding(weights)

    def rounding(self, weights: Tensor) -> Tensor:  # (rows, inputs) -> (rows,)
        """What the rounding of the gradients to the inputs, and of their sum, can add to a bound of `sum_j weights_j J_j`."""
        terms = 2 * gamma(weights.shape[1] + self.condensed.undecided + 8) + sum(layer.room for layer in self.gates[:1])
        return (weights.abs() * (self.condensed.slack_inputs + terms * self.reach)).sum(1) * (1 + terms) + 2.0**-500


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
    room = 2 * gamma(2 * stop + 16 * len(condensed.layers) + 32)
    later = [layer.earlier for layer in condensed.layers]  # rows of M: by gate, to all earlier ones
    for number in reversed(range(len(condensed.layers))):
        layer = condensed.layers[number]
        start = stop - layer.count
        to_later = torch.cat([torch.zeros(layer.count, 0, dtype=torch.float64), *(part[:, start:stop].T for part in later[number + 1 :])], dim=1)
        center, slack = condensed.gates[:, start:stop], condensed.slack_gates[:, start:stop]
        forms = list(to_later.split([part.peak.shape[1] for part in done], dim=1)) if done else []
        size = center.abs()
        if done:
            size = size + torch.cat([part.peak for part in done], dim=1) @ to_later.abs().T
        low, high = bounds(done, forms, center, size)
        low, high = torch.minimum(low - slack, high + slack), high + slack
        least, most = layer.slopes
        peak = torch.maximum(least.abs(), most.abs()) * torch.maximum(low.abs(), high.abs()) * (1 + 2.0**-50)
        lines = of_product(least.expand_as(low), most.expand_as(low), low, high)
        done.insert(0, _Gates(center, slack, to_later, layer.inputs, size + slack, peak, lines, room))
        stop = start
    return Jacobian(condensed, tuple(done))


def bounds(
    layers: Sequence[_Gates],
    start: Sequence[Tensor],  # by layer: (forms, n)
    constant: Tensor,  # (rows, forms)
    size: Tensor,  # (rows, forms), at least `|constant| + |start| |p|`, but for rounding
) -> tuple[Tensor, Tensor]:  # (rows, forms) each
    """At most and at least `constant + sum start p` for each row of the output, in batches of forms.

    The first p have the same coefficients in all rows, and with the other sign in what is bounded from below; so the lines around them are summed once.
    """
    rows, forms = constant.shape
    if not layers:
        return constant, constant
    first, *others = layers
    mean, half, a, b = first.bends
    ends = constant.new_empty(rows, 2, forms)
    width = 2 * rows * sum(part.shape[-1] for part in start)  # of a form
    chunk = max(1, min(_CHUNK // max(1, width), forms))
    space = constant.new_empty(3, chunk * width)
    for number in range(0, forms, chunk):
        part = slice(number, number + chunk)
        c, rest = torch.cat([form[part] for form in start], dim=1).tensor_split([len(first.later)], dim=1)
        size_of_c = c.abs()
        total = _signs(torch.addmm(constant[:, part], a, c.T), torch.addmm(size[:, part], b, size_of_c.T, beta=first.room))
        if others:
            weight = torch.mul(size_of_c, half[:, None], out=_in(space[0], (rows, *c.shape)))
            bent = torch.mm(weight.flatten(0, 1), first.later, out=_in(space[1], (rows * len(c), first.later.shape[1]))).view(rows, len(c), -1)
            both = _signs(rest + (c * mean[:, None]) @ first.later, bent, space[2])
            total = _upper_bounds(others, both, total, space[:2])
        ends[..., part] = total.view(rows, 2, -1)
    return -ends[:, 1], ends[:, 0]


def _in(space: Tensor, shape: Sequence[int]) -> Tensor:
    """A part of memory that is used again: new memory is mapped page by page, which takes longer than what is computed in it."""
    return space[: math.prod(shape)].view(shape)


def _signs(straight: Tensor, bent: Tensor, space: Tensor | None = None) -> Tensor:  # (rows or 1, forms, ...), (rows, forms, ...) -> (rows, 2 forms, ...)
    """`bent + straight`, and then `bent - straight`."""
    shape = (len(bent), 2, *bent.shape[1:])
    both = bent.new_empty(shape) if space is None else _in(space, shape)
    torch.add(bent, straight, out=both[:, 0])
    torch.sub(bent, straight, out=both[:, 1])
    return both.flatten(1, 2)


def _upper_bounds(
    layers: Sequence[_Gates],
    forms: Tensor,  # (rows, forms, gates)
    total: Tensor,  # (rows, forms)
    space: Tensor,  # (2, as many numbers as forms has)
) -> Tensor:  # (rows, forms)
    """At least `total + forms p`, but for rounding: each p is replaced by its line above or below, by the sign of its coefficient. `forms` is used up.

    The rounding of all sums is at most `gamma` times their terms. Those with the lines are in `b` of each layer; those at the start are left out.
    """
    for layer in layers:
        c, forms = forms.split([layer.peak.shape[1], forms.shape[-1] - layer.peak.shape[1]], dim=-1)
        size_of_c = torch.abs(c, out=_in(space[0], c.shape))
        mean, half, a, b = layer.bends
        total = total + (c @ a[..., None])[..., 0] + (size_of_c @ b[..., None])[..., 0]
        if forms.shape[-1]:
            weight = torch.mul(c, mean[:, None], out=_in(space[1], c.shape)).addcmul_(size_of_c, half[:, None])
            forms.view(-1, forms.shape[-1]).addmm_(weight.flatten(0, 1), layer.later)
    return total
