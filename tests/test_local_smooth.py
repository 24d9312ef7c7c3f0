"""Local bounds of tanh, sigmoid, SiLU and GELU: lines around slopes, planes around slopes times gradients, and what it gives that a slope goes with its input.

Networks are those of `tests/test_local_math.py`: weights and then the center from `default_rng(seed)`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certify
from certify.local import _lirpa, clarke, condense, coupled, operators, program, relax
from certify.local.norms import Bounded
from certify.local.program import Program
from certify.local.region import Region
from sdp.activation import GELU, RELU, SIGMOID, SILU, SOFTPLUS, TANH, Activation

F = nn.functional
Weights = list[tuple[np.ndarray, np.ndarray]]
FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    TANH: torch.tanh,
    SIGMOID: torch.sigmoid,
    SILU: F.silu,
    GELU: F.gelu,
    SOFTPLUS: F.softplus,
    RELU: torch.relu,
}
SMOOTH = (TANH, SIGMOID, SILU, GELU)
TURNS = (0.0, 0.6584789, 1.3169579, 2**0.5, 2.0, 2.3993573, 3.4358410)


def random_weights(seed: int, sizes: Sequence[int]) -> tuple[Weights, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = [(math.sqrt(2 / n) * rng.standard_normal((m, n)), 0.1 * rng.standard_normal(m)) for n, m in itertools.pairwise(sizes)]
    return weights, rng.standard_normal(sizes[0])


def chain(weights: Weights, *activations: Activation) -> Program:
    """Affine maps with the activations between them in turn."""
    builder = program._Builder((weights[0][0].shape[1],))
    x = builder.input
    for k, (W, b) in enumerate(weights):
        x = operators._linear(builder, x if k == 0 else builder.gate(x, activations[k % len(activations)]), torch.from_numpy(W), torch.from_numpy(b))
    return Program((weights[0][0].shape[1],), tuple(builder.steps), tuple(tuple(example.shape) for example in builder.examples), x.value)


def jacobians(weights: Weights, activations: Sequence[Activation], points: Tensor) -> Tensor:  # (points, outputs, inputs)
    """By the chain rule."""
    parts = [tuple(map(torch.from_numpy, layer)) for layer in weights]
    z, J = points @ parts[0][0].T + parts[0][1], parts[0][0].expand(len(points), -1, -1)
    for k, (W, b) in enumerate(parts[1:], 1):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            value = FUNCTIONS[activations[k % len(activations)]](leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        z, J = value.detach() @ W.T + b, W @ (slope[..., None] * J)
    return J


@torch.no_grad()
def condensed_of(made: Program, domain: certify.Domain, rows: Tensor | None = None) -> condense.Condensed:
    rows = torch.eye(made.outputs, dtype=torch.float64) if rows is None else rows
    return condense.condense(made, Region.of(domain, math.prod(made.input_shape)), rows)


@torch.no_grad()
def bounds(made: Program, domain: certify.Domain, rows: Tensor | None = None) -> Bounded:
    return coupled.bound_jacobian(condensed_of(made, domain, rows))


def points_of(center: np.ndarray, reach: float, p: float, count: int = 600, seed: int = 0) -> Tensor:
    """Random points of a ball, and of its surface; corners and the center too."""
    rng = np.random.default_rng(seed)
    d = rng.standard_normal((count, len(center)))
    d = np.sign(d) * rng.random((count, 1)) ** 0.1 if p == math.inf else d / np.linalg.norm(d, ord=p, axis=1, keepdims=True) * rng.random((count, 1)) ** 0.3
    if p == math.inf:
        d[::3] *= rng.random(d[::3].shape)
    return torch.from_numpy(center + reach * np.concatenate([d, np.zeros((1, len(center)))]))


# --- lines around slopes --------------------------------------------------------------------------------------------------------------------------


def intervals() -> tuple[Tensor, Tensor]:
    """Points; tiny, wide and lopsided intervals, out to 1e6; across every turn."""
    rng = np.random.default_rng(0)
    turns = np.repeat(np.concatenate([np.array(TURNS), -np.array(TURNS)]), 20)
    middle = np.concatenate([rng.uniform(-4, 4, 400), rng.choice([-1, 1], 300) * 10.0 ** rng.uniform(-6, 6, 300), turns])
    width = 10.0 ** rng.uniform(-13, 2, len(middle))
    width[:20] = 0.0
    low, high = (middle + sign * width * rng.random(len(middle)) for sign in (-1, 1))
    ends = np.array([(-1e-12, 1e-12), (-50, 50), (-1e6, 1e6), (-1e6, -49), (0, 1e6), (-1e-300, 1e-300), (1e6, 1e6), (-1e15, 3), (0, 0), (-5e-324, 0)])
    return torch.from_numpy(np.concatenate([low, ends[:, 0]])), torch.from_numpy(np.concatenate([high, ends[:, 1]]))


def derivatives(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second, by autograd; the second is 0 where autograd has no number for it."""
    with torch.enable_grad():
        leaf = z.clone().requires_grad_(True)
        (first,) = torch.autograd.grad(FUNCTIONS[activation](leaf).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
    return first.detach(), second


@pytest.mark.parametrize("activation", [*SMOOTH, SOFTPLUS], ids=str)
def test_lines_around_slopes_and_ranges_of_second_derivatives_hold(activation: Activation) -> None:
    low, high = intervals()
    lines = relax.of_slope(activation, low, high)
    least, most = (torch.from_numpy(end) for end in activation.curvatures(low.numpy(), high.numpy()))
    for share in (*np.linspace(0, 1, 41), *TURNS, *(-turn for turn in TURNS)):
        z = (low + share * (high - low) if 0 <= share <= 1 and share not in TURNS[1:] else torch.full_like(low, share)).clamp(low, high)
        slope, curvature = derivatives(activation, z)
        assert (lines.low_slope * z + lines.low_shift <= slope).all()
        assert (slope <= lines.high_slope * z + lines.high_shift).all()
        assert ((least <= curvature.nan_to_num()) & (curvature.nan_to_num() <= most)).all()
    narrow = (high - low < 1e-3) & (low.abs() < 10)
    gap = (lines.high_slope - lines.low_slope) * low + lines.high_shift - lines.low_shift
    assert float((gap - (high - low) ** 2)[narrow].max()) < 1e-8  # a multiple of the square of the width apart, but for what is rounded outward


def test_second_derivatives_of_infinite_intervals_and_of_other_activations() -> None:
    everything = np.array([-np.inf]), np.array([np.inf])
    for activation, least, most in ((TANH, -0.7698004, 0.7698004), (SIGMOID, -0.0962251, 0.0962251), (SILU, -0.0369144, 0.5), (GELU, -0.1079820, 0.7978846)):
        low, high = activation.curvatures(*everything)
        assert (float(low[0]), float(high[0])) == pytest.approx((least, most), abs=1e-6)
    assert RELU.curvatures(*everything) == everything


EXACT: dict[Activation, tuple[Callable[[mpmath.mpf], mpmath.mpf], Callable[[mpmath.mpf], mpmath.mpf]]] = {  # first and second derivative, of intervals too
    TANH: (lambda z: 1 - _tanh(z) ** 2, lambda z: -2 * _tanh(z) * (1 - _tanh(z) ** 2)),
    SIGMOID: (lambda z: _expit(z) * _expit(-z), lambda z: _expit(z) * _expit(-z) * (1 - 2 * _expit(z))),
    SILU: (lambda z: _expit(z) * (1 + z * _expit(-z)), lambda z: _expit(z) * _expit(-z) * (2 + z * (1 - 2 * _expit(z)))),
    GELU: (lambda z: mpmath.ncdf(z) + z * mpmath.npdf(z), lambda z: (2 - z**2) * _exp(-(z**2) / 2) / math.sqrt(2 * math.pi)),
}


def _exp(z: mpmath.mpf) -> mpmath.mpf:
    return mpmath.iv.exp(z) if isinstance(z, mpmath.ctx_iv.ivmpf) else mpmath.exp(z)


def _expit(z: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + _exp(-z))


def _tanh(z: mpmath.mpf) -> mpmath.mpf:
    return 1 - 2 / (1 + _exp(2 * z))


def proved(activation: Activation, slope: float, shift: float, low: float, high: float, sign: int) -> bool:
    """`sign (slope z + shift - derivative) >= 0` on all of an interval: by the value in the middle of each part, and intervals around its rate of change."""
    first, second = EXACT[activation]
    parts = [(mpmath.mpf(low), mpmath.mpf(high))]
    for _ in range(4000):
        if not parts:
            return True
        a, b = parts.pop()
        c = (a + b) / 2
        rate = abs(mpmath.iv.mpf(slope) - second(mpmath.iv.mpf([a, b])))
        most = mpmath.mpf(rate.b)
        value = sign * (mpmath.mpf(slope) * c + mpmath.mpf(shift) - first(c))
        if value < 0:
            return False
        if value < most * (b - a) / 2 + mpmath.mpf(10) ** -25:
            parts += [(a, c), (c, b)]
    return False


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_lines_around_slopes_are_proved_by_intervals(activation: Activation) -> None:
    ends = [(-0.1, 0.1), (-1.0, 1.0), (-2.0, 0.5), (0.4, 3.0), (-7.0, 1.0), (2.0, 2.1), (-50.0, 50.0)]
    low, high = torch.tensor(ends, dtype=torch.float64).unbind(1)
    lines = relax.of_slope(activation, low, high)
    for k, (a, b) in enumerate(ends):
        assert proved(activation, float(lines.high_slope[k]), float(lines.high_shift[k]), a, b, 1)
        assert proved(activation, float(lines.low_slope[k]), float(lines.low_shift[k]), a, b, -1)
    assert not proved(activation, float(lines.high_slope[0]), float(lines.high_shift[0]) - 1e-4, *ends[0], 1)


# --- planes around products -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", coupled._SHARES)
def test_planes_around_a_slope_times_a_gradient_hold_exactly(shares: tuple[float, float]) -> None:
    """In rational numbers, at the corners of what slopes, gradients and inputs can be: of all sizes, degenerate, and of one or two signs."""
    rng, count = np.random.default_rng(0), 400
    ends = np.sort(rng.choice([-1, 0, 1], (2, count), p=[0.45, 0.1, 0.45]) * 10.0 ** rng.uniform(-20, 20, (2, count)), axis=0)
    ends[1, ::5] = ends[0, ::5]
    z = np.sort(rng.standard_normal((2, count)) * 10.0 ** rng.uniform(-12, 3, count), axis=0)
    s = np.sort(rng.uniform(-0.2, 1.2, (2, count)), axis=0)
    slopes, widths = rng.standard_normal((2, count)), rng.random((2, count)) * 0.1
    lines = relax.Lines(*map(torch.from_numpy, (slopes[0], s[0] - slopes[0] * z[0] - widths[0], slopes[1], s[1] - slopes[1] * z[1] + widths[1])))
    low, high, least, most, first, last = map(torch.from_numpy, (*ends, *s, *z))
    planes = relax.of_coupled_product(lines, torch.maximum(first.abs(), last.abs()), least, most, low, high, shares)
    tried = 0
    for k in range(count):
        of = {field.name: Fraction(float(getattr(planes, field.name)[k])) for field in dataclasses.fields(planes)}
        for input_ in (Fraction(float(first[k])), Fraction(float(last[k]))):
            ends = (lines.low_slope, lines.low_shift), (lines.high_slope, lines.high_shift)
            line = [Fraction(float(a[k])) * input_ + Fraction(float(b[k])) for a, b in ends]
            bottom, top = max(line[0], Fraction(float(least[k]))), min(line[1], Fraction(float(most[k])))
            if bottom > top:
                continue
            for slope, e in itertools.product((bottom, top), (Fraction(float(low[k])), Fraction(float(high[k])))):
                tried += 1
                assert of["low_slope"] * e + of["low_input"] * input_ + of["low_shift"] <= slope * e
                assert slope * e <= of["high_slope"] * e + of["high_input"] * input_ + of["high_shift"]
    assert tried > count


# --- exact answers --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
@pytest.mark.parametrize(("center", "reach"), [(0.2, 0.5), (1.5, 0.3), (-2.0, 0.7), (0.0, 1e-6), (0.0, 20.0)])
def test_one_unit_is_bounded_by_its_steepest_slope(activation: Activation, center: float, reach: float) -> None:
    """On intervals with and without the point where the slope turns."""
    weights = [(np.array([[1.7]]), np.array([0.1])), (np.array([[-2.3]]), np.zeros(1))]
    z = torch.cat([torch.linspace(-1, 1, 20001, dtype=torch.float64) * reach + center, (torch.tensor([*TURNS, *(-turn for turn in TURNS)]) - 0.1) / 1.7])
    z = z.clamp(center - reach, center + reach)[:, None]
    exact = float(jacobians(weights, (activation,), z).abs().max())
    for q in (1, 2, math.inf):
        found = float(bounds(chain(weights, activation), certify.Ball(np.array([center]), reach, math.inf)).row_norms(q)[0])
        assert exact <= found <= exact * (1 + 1e-6) + 1e-7


IDENTITIES: dict[str, tuple[Activation, Weights, float]] = {  # functions that are lines, with their slope
    "tanh(x) + tanh(-x) = 0": (TANH, [(np.array([[1.0], [-1.0]]), np.zeros(2)), (np.array([[1.0, 1.0]]), np.zeros(1))], 0.0),
    "sigmoid(x) + sigmoid(-x) = 1": (SIGMOID, [(np.array([[1.0], [-1.0]]), np.zeros(2)), (np.array([[1.0, 1.0]]), np.zeros(1))], 0.0),
    "silu(x) - silu(-x) = x": (SILU, [(np.array([[1.0], [-1.0]]), np.zeros(2)), (np.array([[1.0, -1.0]]), np.zeros(1))], 1.0),
    "gelu(x) - gelu(-x) = x": (GELU, [(np.array([[1.0], [-1.0]]), np.zeros(2)), (np.array([[1.0, -1.0]]), np.zeros(1))], 1.0),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_cancels_is_found_by_the_coupling_up_to_the_square_of_the_radius(name: str) -> None:
    """Without it the excess is a multiple of the radius."""
    activation, weights, slope = IDENTITIES[name]
    over, plain = [], []
    for reach in (0.1, 0.01, 0.001):
        condensed = condensed_of(chain(weights, activation), certify.Ball(np.array([0.8]), reach, math.inf))
        with torch.no_grad():
            over.append(float(coupled.bound_jacobian(condensed).row_norms(1)[0]) - slope)
            plain.append(float(clarke.bound_jacobian(condensed).row_norms(1)[0]) - slope)
    assert all(value >= 0 for value in over)
    assert over[1] < 0.02 * over[0] + 1e-8
    assert over[2] < 1e-4 * over[0] * 2 + 1e-8
    assert plain[2] > 0.005 * plain[0] > 0


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_the_excess_over_the_largest_slopes_falls_with_the_square_of_the_radius(activation: Activation) -> None:
    """Up to the square of the radius the entries of a Jacobian are affine, and largest at a corner; without the coupling the excess falls by one power only."""
    over: list[list[float]] = []
    weights, center = random_weights(0, (3, 8, 8, 2))
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    for reach in (0.02, 0.005):
        exact = jacobians(weights, (activation,), torch.from_numpy(center) + reach * corners).amax(0)
        condensed = condensed_of(chain(weights, activation), certify.Ball(center, reach, math.inf))
        with torch.no_grad():
            over.append([float((made(condensed).range[1] - exact).max()) for made in (coupled.bound_jacobian, clarke.bound_jacobian)])
    orders = np.log2(np.array(over[0]) / np.array(over[1])) / 2
    assert orders[0] > 1.8
    assert 0.8 < orders[1] < 1.2


# --- soundness ------------------------------------------------------------------------------------------------------------------------------------

NETWORKS = [
    ((3, 8, 8, 3), (TANH,)),
    ((4, 9, 3), (SIGMOID,)),
    ((3, 7, 7, 7, 2), (SILU,)),
    ((4, 8, 8, 3), (GELU,)),
    ((3, 8, 8, 8, 2), (TANH, RELU)),
    ((3, 8, 8, 8, 2), (RELU, SILU, SIGMOID)),
]


def climbed(weights: Weights, activations: Sequence[Activation], center: np.ndarray, reach: float, entry: tuple[int, int] | int) -> Tensor:
    """Points of the box where an entry of the Jacobian, or the l1 norm of a row, is large: by signed steps along finite differences of it."""

    def value(points: Tensor) -> Tensor:
        J = jacobians(weights, activations, points)
        return J[:, entry[0], entry[1]] if isinstance(entry, tuple) else J[:, entry].abs().sum(1)

    middle = torch.from_numpy(center)
    x = points_of(center, reach, math.inf, 8, seed=1)
    steps = 1e-4 * max(reach, 1e-6) * torch.eye(len(center), dtype=torch.float64)
    for k in range(20):
        ahead = torch.stack([value(x + step) - value(x - step) for step in steps], dim=1)
        x = torch.minimum(torch.maximum(x + ahead.sign() * reach * 0.6 * 0.8**k, middle - reach), middle + reach)
    return x


@pytest.mark.parametrize("number", range(len(NETWORKS)))
@pytest.mark.parametrize("reach", [0.0, 1e-9, 0.03, 0.3, 2.0, 40.0])
def test_no_gradient_beats_the_bounds(number: int, reach: float) -> None:
    sizes, activations = NETWORKS[number]
    weights, center = random_weights(number, sizes)
    made = chain(weights, *activations)
    for p in (1, 2, math.inf):
        points = [points_of(center, reach, p)]
        if p == math.inf and reach in (0.03, 0.3, 2.0):
            points += [climbed(weights, activations, center, reach, entry) for entry in ((0, 0), (1, 2), 0)]
        seen = jacobians(weights, activations, torch.cat(points))
        seen = torch.cat([seen, seen[:, :1] - seen[:, 1:2]], dim=1)
        rows = torch.cat([torch.eye(sizes[-1], dtype=torch.float64), torch.tensor([[1.0, -1.0] + [0.0] * (sizes[-1] - 2)], dtype=torch.float64)])
        found = bounds(made, certify.Ball(center, reach, p), rows)
        low, high = found.range
        assert ((seen >= low - 1e-11) & (seen <= high + 1e-11)).all()
        for q in (1, 2, math.inf):
            assert (torch.linalg.vector_norm(seen, ord=q, dim=2).amax(0) <= found.row_norms(q) + 1e-11).all()
        weighting = torch.from_numpy(np.random.default_rng(number).standard_normal((len(rows), sizes[0])))
        assert ((seen * weighting).sum(2).amax(0) <= found.weighted(weighting) + 1e-11).all()


@pytest.mark.parametrize("number", range(len(NETWORKS)))
def test_never_looser_than_without_the_coupling(number: int) -> None:
    sizes, activations = NETWORKS[number]
    ratios = []
    for seed, reach in enumerate((1e-3, 0.05, 0.3, 2.0, 30.0)):
        weights, center = random_weights(seed, sizes)
        condensed = condensed_of(chain(weights, *activations), certify.Ball(center, reach, math.inf))
        with torch.no_grad():
            found, plain = coupled.bound_jacobian(condensed), clarke.bound_jacobian(condensed)
            ratios.append(torch.cat([found.row_norms(q) / plain.row_norms(q) for q in (1, 2, math.inf)]))
            assert ((found.range[0] >= plain.range[0]) & (found.range[1] <= plain.range[1])).all()
    assert float(torch.cat(ratios).max()) <= 1.0
    assert float(ratios[1].min()) < 0.99


def test_less_effort_is_looser_and_sound() -> None:
    weights, center = random_weights(3, (3, 8, 8, 3))
    made, domain = chain(weights, TANH), certify.Ball(center, 0.3, math.inf)
    all_choices = bounds(made, domain)
    with torch.no_grad():
        one = coupled.bound_jacobian(condensed_of(made, domain), effort=0.0)
    assert isinstance(all_choices, coupled.Coupled)
    assert isinstance(one, coupled.Coupled)
    assert (all_choices.choices, one.choices) == (len(coupled._SHARES), 1)
    seen = jacobians(weights, (TANH,), points_of(center, 0.3, math.inf)).abs().sum(2).amax(0)
    assert (seen <= all_choices.row_norms(1)).all()
    assert (all_choices.row_norms(1) < one.row_norms(1)).any()


def test_networks_without_smooth_gates_are_bounded_as_before() -> None:
    weights, center = random_weights(0, (3, 8, 8, 3))
    condensed = condensed_of(chain(weights, RELU), certify.Ball(center, 0.3, math.inf))
    with torch.no_grad():
        assert isinstance(coupled.bound_jacobian(condensed), clarke.Jacobian)
    assert coupled.products(condensed)[0] == coupled.products(condensed)[1]


# --- numbers of any size --------------------------------------------------------------------------------------------------------------------------


def exact_jacobian(weights: Weights, x: np.ndarray) -> np.ndarray:
    """Of a tanh network at a point, to 60 digits and then rounded."""
    with mpmath.workdps(60):
        z, J = mpmath.matrix(x.tolist()), mpmath.eye(len(x))
        for k, (W, b) in enumerate(weights):
            if k:
                z = z.apply(mpmath.tanh)
                J = mpmath.diag([1 - value**2 for value in z]) * J
            z, J = mpmath.matrix(W.tolist()) * z + mpmath.matrix(b.tolist()), mpmath.matrix(W.tolist()) * J
        return np.array(J.tolist(), dtype=np.float64)


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1.0, 1e8, 1e15, 1e25])
def test_scales_of_all_sizes_where_numbers_cancel(scale: float) -> None:
    """Two large outputs that nearly cancel, in front of gates and behind them; a row of zeros, and a gate that nothing reads."""
    weights, center = random_weights(5, (3, 6, 6, 3))
    weights[1][0][1] = weights[1][0][0] * (1 + 1e-9)
    weights[1][1][1] = weights[1][1][0]
    weights[2][0][0, :2], weights[2][0][1], weights[2][0][:, 5] = (scale, -scale), 0.0, 0.0
    made = chain(weights, TANH)
    for reach in (0.0, 1e-12, 0.1):
        found = bounds(made, certify.Ball(center, reach, math.inf))
        low, high = found.range
        J = torch.from_numpy(exact_jacobian(weights, center))
        assert (low <= J).all()
        assert (high >= J).all()
        assert (J.abs().sum(1) <= found.row_norms(1)).all()
        assert torch.isfinite(found.row_norms(1)).all()
        assert float(found.row_norms(1)[1]) < 1e-100
    steep = [(weights[0][0] * scale, weights[0][1]), *weights[1:]]
    found = bounds(chain(steep, TANH), certify.Ball(center, 0.1, math.inf))
    J = torch.from_numpy(exact_jacobian(steep, center))
    assert (found.range[0] <= J).all()
    assert (found.range[1] >= J).all()


# --- steps that are left out ----------------------------------------------------------------------------------------------------------------------


def wrong_networks() -> int:
    """Of a few networks, how many have a Jacobian beyond its bounds at a corner or inside of a box."""
    wrong = 0
    for number, (sizes, activations) in enumerate(NETWORKS):
        for reach in (0.02, 0.4):
            weights, center = random_weights(number, sizes)
            seen = jacobians(weights, activations, points_of(center, reach, math.inf, 300))
            found = bounds(chain(weights, *activations), certify.Ball(center, reach, math.inf))
            inside = (seen >= found.range[0] - 1e-9).all() and (seen <= found.range[1] + 1e-9).all()
            wrong += not (inside and (seen.abs().sum(2).amax(0) <= found.row_norms(1) + 1e-9).all())
    return wrong


def _with(**changes: Callable[[relax.Planes], Tensor]) -> Callable[..., relax.Planes]:
    """Planes with some fields changed."""

    def changed(*given: object, make: Callable[..., relax.Planes] = coupled.of_coupled_product) -> relax.Planes:
        planes = make(*given)
        return dataclasses.replace(planes, **{name: change(planes) for name, change in changes.items()})

    return changed


def _half(layers: object, region: Region, *form: Tensor, of: Callable[..., Tensor] = coupled.crown.upper_bounds) -> Tensor:
    return of(layers, dataclasses.replace(region, low=region.low / 2, high=region.high / 2), *form)


MUTATIONS: dict[str, tuple[str, object]] = {
    "no shift above": ("of_coupled_product", _with(high_shift=lambda planes: torch.zeros_like(planes.high_shift))),
    "no shift below": ("of_coupled_product", _with(low_shift=lambda planes: torch.zeros_like(planes.low_shift))),
    "an input left out": ("of_coupled_product", _with(high_input=lambda planes: torch.zeros_like(planes.high_input))),
    "an input turned": ("of_coupled_product", _with(low_input=lambda planes: -planes.low_input)),
    "a gradient's slope too small": ("of_coupled_product", _with(high_slope=lambda planes: 0.9 * planes.high_slope)),
    "lines for half the range": ("of_slope", lambda activation, low, high: relax.of_slope(activation, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high)),
    "all inputs left out": ("_of_inputs", lambda condensed, layers, weights: torch.zeros(weights.shape[:-1], dtype=torch.float64)),
    "half the region": ("crown", type("Half", (), {"upper_bounds": staticmethod(_half)})),
}


def test_with_all_steps_there_is_none() -> None:
    assert wrong_networks() == 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_step_left_out_gives_a_false_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupled, *MUTATIONS[name])
    assert wrong_networks() > 0


# --- beside auto_LiRPA ----------------------------------------------------------------------------------------------------------------------------

# seed, sizes, radius; the largest that 20,000 points of the box have, then auto_LiRPA's CROWN: box l1, box l2, ball l2
REFERENCE = [
    (
        0,
        (3, 8, 8, 3),
        0.1,
        [2.980845620865269, 2.1476700224050043, 0.7426711159094239],
        [3.327821775401154, 2.2627339975964498, 0.9378432544844542],
        [2.371107351547479, 1.8639937140451546, 0.6258105608279843],
        [2.2049083011453696, 1.7245198094602672, 0.5083251158710184],
    ),
    (
        1,
        (8, 12, 12, 3),
        0.2,
        [2.7275161681041813, 1.7742686334432825, 1.5736212029038028],
        [6.688008948660594, 3.510239224293715, 3.5401693947298103],
        [2.5034812524100123, 1.4436467450084218, 1.3636323761652036],
        [1.205538666434713, 0.9431786127478747, 0.7616876880287449],
    ),
]


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: str(case[1]))
def test_between_gradients_that_are_seen_and_the_bounds_of_another_tool(case: tuple) -> None:  # type: ignore[type-arg]
    seed, sizes, reach, seen, box_l1, box_l2, ball_l2 = case
    weights, center = random_weights(seed, sizes)
    box, ball = (bounds(chain(weights, TANH), certify.Ball(center, reach, p)) for p in (math.inf, 2))
    for found, theirs in ((box.row_norms(1), box_l1), (box.row_norms(2), box_l2), (ball.row_norms(2), ball_l2)):
        assert (found.numpy() <= np.array(theirs) * (1 + 1e-6)).all()
    assert (box.row_norms(1).numpy() >= np.array(seen)).all()


@pytest.mark.parametrize("case", [(TANH, 0, (3, 8, 8, 3), 0.4), (SIGMOID, 1, (8, 12, 12, 3), 0.2), (TANH, 2, (3, 8, 8, 8, 3), 0.1)], ids=str)
def test_not_above_auto_lirpa(case: tuple[Activation, int, tuple[int, ...], float]) -> None:
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    activation, seed, sizes, reach = case
    weights, center = random_weights(seed, sizes)
    found = bounds(chain(weights, activation), certify.Ball(center, reach, math.inf)).row_norms(1)
    for row in range(sizes[-1]):
        modules: list[nn.Module] = []
        for k, (W, b) in enumerate(weights):
            kept = slice(row, row + 1) if k == len(weights) - 1 else slice(None)
            linear = nn.Linear(W.shape[1], len(W[kept])).double()
            linear.weight.data, linear.bias.data = torch.from_numpy(W[kept].copy()), torch.from_numpy(b[kept].copy())
            modules += [linear] if k == len(weights) - 1 else [linear, nn.Tanh() if activation == TANH else nn.Sigmoid()]
        x = torch.from_numpy(center)
        theirs = float(_lirpa.l1_norm(nn.Sequential(*modules), x[None])(x - reach, x + reach))
        assert float(found[row]) <= theirs * (1 + 1e-6)


# --- what is printed ------------------------------------------------------------------------------------------------------------------------------


def test_constants_signs_and_radii_have_the_coupling(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 3)).double().eval()
    center = np.linspace(-1, 1, 4)
    domain = certify.Ball(center, 0.2, math.inf)

    def asked() -> tuple[float, int, float]:
        constant = certify.lipschitz(net, certify.Local(how="crown"), input_shape=(4,), domain=domain)
        signs = certify.monotone(net, domain, input_shape=(4,)).signs
        reached = certify.robustness(net, torch.from_numpy(center)[None], certify.LocalMargin(norm=math.inf))
        return constant.value, int(np.count_nonzero(signs)), float(reached.radius[0])

    coupling = asked()
    for module in ("method", "monotone", "coupled"):
        monkeypatch.setattr(f"certify.local.{module}.bound_jacobian", lambda condensed, plain=clarke.bound_jacobian, **_: plain(condensed))
    alone = asked()
    assert coupling[0] < 0.95 * alone[0]
    assert coupling[1] >= alone[1]
    assert coupling[2] >= alone[2]


def test_where_time_is_short_radii_go_without_the_coupling(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    x = torch.linspace(-1, 1, 3, dtype=torch.float64)[None]
    asked: list[str] = []
    for name, module in (("coupled", coupled), ("plain", clarke)):

        def noted(condensed: condense.Condensed, name: str = name, make: Callable[..., Bounded] = module.bound_jacobian, **options: float) -> Bounded:
            asked.append(name)
            return make(condensed, **options)

        monkeypatch.setattr(module, "bound_jacobian", noted)
    found = []
    for products in ((0.0, 0.0), (math.inf, 0.0), (math.inf, math.inf)):
        asked.clear()
        monkeypatch.setattr(coupled, "products", lambda condensed, products=products: products)
        reached = float(certify.robustness(net, x, certify.LocalMargin(norm=math.inf)).radius[0])
        found.append((asked[0] if asked else None, reached))
    assert [name for name, _ in found] == ["coupled", "plain", None]
    assert found[0][1] >= found[1][1] * (1 - 0.1)
    assert all(reached > 0 for _, reached in found)


@pytest.mark.parametrize("activations", [(RELU,), (TANH,), (SILU, RELU)])
@pytest.mark.parametrize("radius", [1e-3, 0.4])
def test_the_slack_of_gradients_counts(activations: tuple[Activation, ...], radius: float) -> None:
    """Where gradients to gates and inputs may be off by much: at any point the largest `w J` over all such errors is `w J0 + V a + |slack| |a|`, a along w."""
    weights, center = random_weights(3, (3, 8, 8, 2))
    net = chain(weights, *activations)
    made = condense.condense(net, Region.of(certify.Ball(center, radius, 2), 3), torch.eye(2, dtype=torch.float64))
    torch.manual_seed(0)
    off = torch.rand(2, made.undecided, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64) * 0.1
    made = dataclasses.replace(made, slack_gates=off[0], slack_inputs=off[1], rounding=lambda largest: off)
    bounded = clarke.bound_jacobian(made), coupled.bound_jacobian(made)
    d = F.normalize(torch.randn(2000, 3, dtype=torch.float64)) * radius
    d[:1000] *= torch.rand(1000, 1, dtype=torch.float64)
    unit = torch.eye(3, dtype=torch.float64)
    for w in (*unit, *-unit, *torch.randn(10, 3, dtype=torch.float64)):
        p = along = torch.zeros(2000, 0, dtype=torch.float64)
        for layer in made.layers:
            z = layer.center + d @ layer.inputs.T + p @ layer.earlier.T
            slope = torch.autograd.functional.jvp(FUNCTIONS[layer.gate.activation], z, torch.ones_like(z))[1]
            along = torch.cat([along, slope * (layer.inputs @ w + along @ layer.earlier.T)], dim=1)
            p = torch.cat([p, FUNCTIONS[layer.gate.activation](z)], dim=1)
        most = (made.inputs @ w + along @ made.gates.T + along.abs() @ off[0].T + off[1] @ w.abs()).amax(0)
        for jacobian in bounded:
            low, high = jacobian.range
            assert (most <= jacobian.weighted(w.expand(2, 3)) + 1e-9).all()
            assert (most <= high @ w.clamp(min=0) + low @ w.clamp(max=0) + 1e-9).all()
    assert made.undecided or radius < 0.4


def test_the_slack_of_inputs_of_gates_counts_in_their_sum() -> None:
    """At every point, `weights z` with each z off by all of its slack, whichever gates are summed."""
    weights, center = random_weights(4, (3, 6, 6, 2))
    made = condense.condense(chain(weights, TANH), Region.of(certify.Ball(center, 1e-2, 2), 3), torch.eye(2, dtype=torch.float64))
    torch.manual_seed(0)
    layers = tuple(dataclasses.replace(layer, slack=torch.rand(layer.count, dtype=torch.float64)) for layer in made.layers)
    d = F.normalize(torch.randn(2000, 3, dtype=torch.float64)) * 1e-2
    first = layers[0].center + d @ layers[0].inputs.T
    z = first, layers[1].center + d @ layers[1].inputs.T + first.tanh() @ layers[1].earlier.T
    for number in (0, 1):
        sums = torch.randn(1, 20, 6, dtype=torch.float64)
        most = (z[number] @ sums[0].T).amax(0) + sums[0].abs() @ layers[number].slack
        shown = [layers[k] if k == number else layer for k, layer in enumerate(made.layers)]
        assert (most <= coupled._of_inputs(made, shown, F.pad(sums, (6 * number, 6 - 6 * number)))[0]).all()


@pytest.mark.parametrize("sizes", [(3, 8, 2), (3, 8, 8, 2), (5, 9, 9, 9, 3)])
def test_in_fractions_rounding_leaves_no_gap(sizes: tuple[int, ...]) -> None:
    """Where all slopes are known there is one Jacobian, and nothing but rounding between its bounds, which hold it exactly: entries, sums and norms."""
    weights, center = random_weights(5, sizes)
    made = condense.condense(chain(weights, RELU), Region.of(certify.Ball(center, 3.0, 2), sizes[0]), torch.eye(sizes[-1], dtype=torch.float64))
    layers = tuple(dataclasses.replace(layer, low=torch.ones_like(layer.low), high=torch.full_like(layer.high, 2.0)) for layer in made.layers)
    none = torch.zeros_like(made.gates), torch.zeros_like(made.inputs)
    made = dataclasses.replace(made, layers=layers, slack_gates=none[0], slack_inputs=none[1], rounding=lambda largest: none)
    jacobian = clarke.bound_jacobian(made)
    low, high = (end.tolist() for end in jacobian.range)
    torch.manual_seed(0)
    w = torch.randn(20, sizes[0], dtype=torch.float64)
    sums, norms = [jacobian.weighted(row.expand_as(none[1])).tolist() for row in w], [jacobian.row_norms(q).tolist() for q in (1.0, math.inf, 2.0)]
    M = [row for layer in layers for row in layer.earlier.tolist()]
    G = [row for layer in layers for row in layer.inputs.tolist()]
    for row, (inputs, gates) in enumerate(zip(made.inputs.tolist(), made.gates.tolist(), strict=True)):
        J, p = list(map(Fraction, inputs)), list(map(Fraction, gates))
        for k in reversed(range(len(p))):
            p[: len(M[k])] = [old + p[k] * Fraction(entry) for old, entry in zip(p, M[k], strict=False)]
            J = [old + p[k] * Fraction(entry) for old, entry in zip(J, G[k], strict=True)]
        assert all(Fraction(low[row][j]) <= entry <= Fraction(high[row][j]) for j, entry in enumerate(J))
        assert all(high[row][j] - low[row][j] < 1e-10 * (1 + abs(entry)) for j, entry in enumerate(J))
        for found, weight in zip(sums, w.tolist(), strict=True):
            assert sum(Fraction(a) * b for a, b in zip(weight, J, strict=True)) <= Fraction(found[row])
        assert sum(map(abs, J)) <= Fraction(norms[0][row])
        assert max(map(abs, J)) <= Fraction(norms[1][row])
        assert sum(entry**2 for entry in J) <= Fraction(norms[2][row]) ** 2
