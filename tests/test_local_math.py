"""The mathematics of local bounds: exact in rational numbers and by enumeration, equal to the same bounds over all layers, and false when a step is left out.

The exact values of `REFERENCE`, and those of auto_LiRPA's CROWN beside them, are of networks that anybody can make again: with `rng = default_rng(seed)`, layer
k has `W = sqrt(2 / dims[k]) rng.standard_normal((dims[k + 1], dims[k]))` and then `b = 0.1 rng.standard_normal(dims[k + 1])`, and the center comes last,
`rng.standard_normal(dims[0])`. They were found by enumeration of the linear regions that meet the box or the ball, with a linear or a second-order cone program
for each.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import certify
import lipnet
from certify.local import clarke, condense, crown, layer, norms, operators, program, region, relax
from certify.local.program import Affine, Program, Ref
from certify.local.region import Region
from sdp.activation import GELU, RELU, SIGMOID, SILU, TANH, Activation

F = nn.functional
Weights = list[tuple[np.ndarray, np.ndarray]]
ACTIVATIONS: dict[str, Callable[[program._Builder, Ref], Ref]] = {
    "relu": operators._relu,
    "leaky": lambda builder, x: operators._leaky_relu(builder, x, 0.2),
    "maxmin": lambda builder, x: _max_min(builder, x),
    "tanh": lambda builder, x: builder.gate(x, TANH),
}

# activation, seed, sizes, radius; exact on the box: l1 and l2 norms of rows; exact on the ball: l2; auto_LiRPA: box l1, ball l2
REFERENCE = [
    (
        "relu",
        0,
        (3, 8, 8, 3),
        0.1,
        [1.9298847742607974, 3.3900729691984033, 0.8009504524869072],
        [1.1871788733216182, 2.0507490967216766, 0.601910738038334],
        [1.1412288914195956, 2.0507490967216766, 0.601910738038334],
        [1.9298847742607976, 3.390072969198403, 0.8009504524869071],
        [1.1412288914195952, 2.0507490967216766, 0.6019107380383338],
    ),
    (
        "relu",
        1,
        (3, 8, 8, 3),
        0.1,
        [0.8947333872638852, 0.2008586979456793, 0.6308265293566466],
        [0.5698784937587231, 0.14245127513055528, 0.3830527056017622],
        [0.5516613481683292, 0.14245127513055528, 0.32354285975155006],
        [0.8947333872638851, 0.20176899416696575, 0.8011870505188341],
        [0.5698784937587231, 0.14245127513055528, 0.3830527056017622],
    ),
    (
        "relu",
        2,
        (3, 8, 8, 3),
        0.1,
        [0.8793291501405697, 1.5126629960784883, 0.7581319254449832],
        [0.6105979078954076, 0.9313594942455744, 0.5183796803584643],
        [0.6105979078954076, 0.9313594942455744, 0.5183796803584643],
        [0.9725761970437049, 1.5135193630341344, 0.7851113025610742],
        [0.6205524752963515, 0.931684992483386, 0.5212903590551246],
    ),
    (
        "maxmin",
        1,
        (4, 8, 8, 3),
        0.1,
        [3.2061095930470573, 7.458661661972003, 4.642593669896703],
        [1.751480185760309, 3.8973403690165234, 2.400436792521269],
        [1.751480185760309, 3.8973403690165234, 2.400436792521269],
        [3.297696697687307, 7.458661661972, 4.642593669896703],
        [1.7667601992123263, 3.919086503415139, 2.401848083858117],
    ),
    (
        "leaky",
        0,
        (4, 8, 8, 3),
        0.3,
        [1.921229876840765, 1.9978378934219059, 3.141108741264521],
        [1.0348893654877818, 1.1038964845308923, 1.7253155414748147],
        [1.0348893654877818, 1.1038964845308923, 1.608264912510674],
        None,
        None,
    ),
    (
        "relu",
        3,
        (8, 12, 12, 3),
        0.2,
        [1.7560309001816174, 5.720818875779218, 3.2966873088004993],
        [0.7541204219945981, 2.6174116017403914, 1.4093449666085989],
        [0.6200134524618368, 2.059662564620347, 0.995109271456756],
        [3.910969529113181, 10.781360700977347, 8.776915270579634],
        [0.6851946320140664, 2.1052592702372634, 1.0145461815658738],
    ),
]


def _max_min(builder: program._Builder, x: Ref) -> Ref:
    a, b = (builder.affine([x], lambda value, start=start: value[:, start::2]) for start in (0, 1))
    high, low = builder.maximum(a, b), builder.minimum(a, b)
    return builder.affine([high, low], lambda v, w: torch.stack([v, w], dim=2).flatten(1))


def random_weights(rng: np.random.Generator, sizes: Sequence[int]) -> Weights:
    return [(math.sqrt(2 / n) * rng.standard_normal((m, n)), 0.1 * rng.standard_normal(m)) for n, m in itertools.pairwise(sizes)]


def chain(weights: Weights, activation: str) -> Program:
    """Affine maps with an activation between them, without the export that takes most of the time."""
    builder = program._Builder((weights[0][0].shape[1],))
    x = builder.input
    for k, (W, b) in enumerate(weights):
        x = operators._linear(builder, x if k == 0 else ACTIVATIONS[activation](builder, x), torch.from_numpy(W), torch.from_numpy(b))
    return Program((weights[0][0].shape[1],), tuple(builder.steps), tuple(tuple(example.shape) for example in builder.examples), x.value)


def bounds(made: Program, domain: certify.Domain, rows: Tensor | None = None) -> clarke.Jacobian:
    rows = torch.eye(made.outputs, dtype=torch.float64) if rows is None else rows
    return clarke.bound_jacobian(condense.condense(made, Region.of(domain, math.prod(made.input_shape)), rows))


# --- exact answers --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"{case[0]}-{case[1]}-{case[2][0]}")
def test_between_the_exact_values_and_the_bounds_of_another_tool(case: tuple) -> None:  # type: ignore[type-arg]
    activation, seed, sizes, radius, box_l1, box_l2, ball_l2, crown_box_l1, crown_ball_l2 = case
    rng = np.random.default_rng(seed)
    made, center = chain(random_weights(rng, sizes), activation), rng.standard_normal(sizes[0])
    box, ball = (bounds(made, certify.Ball(center, radius, p)) for p in (math.inf, 2))
    assert (box.row_norms(1).numpy() >= np.array(box_l1) * (1 - 1e-12)).all()
    assert (box.row_norms(2).numpy() >= np.array(box_l2) * (1 - 1e-12)).all()
    assert (ball.row_norms(2).numpy() >= np.array(ball_l2) * (1 - 1e-12)).all()
    if crown_box_l1 is not None:
        assert (box.row_norms(1).numpy() <= np.array(crown_box_l1) * (1 + 1e-6)).all()
        assert (ball.row_norms(2).numpy() <= np.array(crown_ball_l2) * (1 + 1e-6)).all()


def all_jacobians(weights: Weights, center: np.ndarray, radius: float) -> np.ndarray:
    """Of a ReLU network, on every linear region whose interior meets the box."""
    found: list[np.ndarray] = []

    def go(k: int, A: np.ndarray, c: np.ndarray, walls: list[np.ndarray]) -> None:
        A, c = weights[k][0] @ A, weights[k][0] @ c + weights[k][1]
        if k == len(weights) - 1:
            found.append(A)
            return

        def open_or_shut(i: int, pattern: list[float], walls: list[np.ndarray]) -> None:
            if i == len(c):
                go(k + 1, A * np.array(pattern)[:, None], c * np.array(pattern), walls)
                return
            for sign, slope in ((1.0, 1.0), (-1.0, 0.0)):
                more = [*walls, sign * np.append(A[i], c[i]) / np.linalg.norm(A[i]) if A[i].any() else sign * np.append(A[i], c[i])]
                G = np.array(more)
                room = np.linalg.norm(G[:, :-1], axis=1, keepdims=True) > 0
                solved = linprog(
                    np.append(np.zeros(len(center)), -1),
                    A_ub=np.hstack([-G[:, :-1], room.astype(float)]),
                    b_ub=G[:, -1],
                    bounds=[(x - radius, x + radius) for x in center] + [(None, radius)],
                )
                if solved.status == 0 and -solved.fun > 1e-9:
                    open_or_shut(i + 1, [*pattern, slope], more)

        open_or_shut(0, [], walls)

    go(0, np.eye(len(center)), np.zeros(len(center)), [])
    return np.array(found)


@pytest.mark.parametrize("seed", range(4))
def test_all_linear_regions_are_within_the_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, center = random_weights(rng, (2, 5, 4, 2)), rng.standard_normal(2)
    for radius in (0.1, 0.6):
        exact = all_jacobians(weights, center, radius)
        found = bounds(chain(weights, "relu"), certify.Ball(center, radius, math.inf))
        low, high = (end.numpy() for end in found.range)
        assert (exact.min(0) >= low - 1e-12).all()
        assert (exact.max(0) <= high + 1e-12).all()
        assert (np.abs(exact).sum(2).max(0) <= found.row_norms(1).numpy()).all()
        if found.condensed.undecided <= 1:  # then nothing is relaxed
            assert found.row_norms(1).numpy() == pytest.approx(np.abs(exact).sum(2).max(0), rel=1e-9)


def test_the_enumeration_finds_the_reference() -> None:
    _, seed, sizes, radius, box_l1, *_ = REFERENCE[0]
    rng = np.random.default_rng(seed)
    weights = random_weights(rng, sizes)
    exact = all_jacobians(weights, rng.standard_normal(sizes[0]), radius)
    assert np.abs(exact).sum(2).max(0) == pytest.approx(np.array(box_l1), rel=1e-9)


# --- rational numbers -----------------------------------------------------------------------------------------------------------------------------


def rational(weights: Weights, activation: str, x: Sequence[float]) -> tuple[list[Fraction], list[list[Fraction]]]:
    """Value and Jacobian at a point, exactly."""
    z, J = [Fraction(v) for v in x], [[Fraction(int(i == j)) for j in range(len(x))] for i in range(len(x))]
    for k, (W, b) in enumerate(weights):
        if k and activation == "maxmin":
            order = [i ^ int(z[i | 1] > z[i & ~1]) for i in range(len(z))]
            z, J = [z[i] for i in order], [J[i] for i in order]
        elif k:
            slopes = [Fraction(1) if v > 0 else Fraction(0.2 if activation == "leaky" else 0) for v in z]
            z, J = [s * v for s, v in zip(slopes, z, strict=True)], [[s * v for v in row] for s, row in zip(slopes, J, strict=True)]
        A = [[Fraction(v) for v in row] for row in W.tolist()]
        z = [Fraction(c) + sum((a * v for a, v in zip(row, z, strict=True)), Fraction(0)) for row, c in zip(A, b.tolist(), strict=True)]
        J = [[sum((a * before[j] for a, before in zip(row, J, strict=True)), Fraction(0)) for j in range(len(x))] for row in A]
    return z, J


def cancelling(rng: np.random.Generator, scale: float) -> Weights:
    """Pairs of large numbers that are almost equal, and whose difference is what counts."""
    weights = random_weights(rng, (3, 8, 8, 8, 2))
    for k, (W, b) in enumerate(weights):
        if k:
            W[:, 0::2] *= scale
            W[:, 1::2] = -W[:, 0::2]
        if k < len(weights) - 1:
            W[1::2] = W[0::2] + rng.standard_normal(W[1::2].shape) / scale
            b[1::2] = b[0::2] + rng.standard_normal(b[1::2].shape) / scale
        if rng.random() < 0.5:
            rows = 10.0 ** rng.uniform(-9, 9, len(b))
            W *= rows[:, None]
            b *= rows
    return weights


def misses(weights: Weights, activation: str, center: np.ndarray, radius: float, p: float, x: np.ndarray) -> int:
    """How many entries of the exact Jacobian at a point, and norms of its rows, are not within the bounds."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    found = bounds(chain(weights, activation), certify.Ball(center, radius, p), rows)
    (low, high), condensed = found.range, found.condensed
    values, J = rational(weights, activation, x.tolist())
    values, J = [*values, values[0] - values[1]], [*J, [a - b for a, b in zip(*J, strict=True)]]
    top, bottom = (
        sign
        * (crown.upper_bounds(condensed.layers, condensed.region, sign * condensed.center, sign * condensed.inputs, sign * condensed.gates) + condensed.slack)
        for sign in (1, -1)
    )
    wrong = sum(not Fraction(float(a)) <= v <= Fraction(float(b)) for a, v, b in zip(bottom, values, top, strict=True))
    for k, row in enumerate(J):
        wrong += sum(not Fraction(float(low[k, j])) <= v <= Fraction(float(high[k, j])) for j, v in enumerate(row))
        wrong += sum(map(abs, row)) > Fraction(float(found.row_norms(1)[k]))
        wrong += sum(v * v for v in row) > Fraction(float(found.row_norms(2)[k])) ** 2
        wrong += max(map(abs, row)) > Fraction(float(found.row_norms(math.inf)[k]))
    return wrong


def rational_trials(count: int) -> int:
    wrong = 0
    for trial in range(count):
        rng = np.random.default_rng(trial)
        weights = cancelling(rng, 10.0 ** (trial % 9))
        if trial % 2:
            weights = [(W.astype(np.float32).astype(float), b.astype(np.float32).astype(float)) for W, b in weights]
        center = rng.standard_normal(3) * 10.0 ** rng.uniform(-3, 3)
        radius, p = (0.0, 1e-12, 1e-3)[trial // 3 % 3] * float(np.abs(center).max()), (1, 2, math.inf)[trial % 3]
        step = rng.standard_normal(3)
        x = center + 0.999 * radius * step / np.linalg.norm(step, ord=1)
        wrong += misses(weights, ("relu", "maxmin", "leaky")[trial // 9 % 3], center, radius, p, x)
    return wrong


def test_exact_jacobians_are_within_the_bounds_where_large_numbers_cancel() -> None:
    assert rational_trials(54) == 0


def test_without_room_for_rounding_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (condense, crown, clarke, norms, region):
        monkeypatch.setattr(module, "gamma", lambda operations: 0.0)
    assert rational_trials(27) > 10


def test_a_gate_is_not_decided_by_rounding() -> None:
    """Its input is computed with the wrong sign; the exact slope must be allowed all the same."""
    turned = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        w, x = rng.standard_normal((1, 16)), rng.standard_normal(16)
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(w[0].tolist(), x.tolist(), strict=True))
        bias = np.array([-float(exact)])
        exact += Fraction(bias[0])
        computed = float(F.linear(torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(bias)))
        turned += (computed > 0) != (exact > 0) and computed != 0
        low, high = bounds(chain([(w, bias), (np.eye(1), np.zeros(1))], "relu"), certify.Ball(x, 0.0, 2)).range
        assert all(float(a) <= (v if exact > 0 else 0) <= float(b) for a, v, b in zip(low[0], w[0], high[0], strict=True))
    assert turned > 5


def test_a_point_has_its_exact_jacobian() -> None:
    """At radius 0 nothing is undecided, and what is left is rounding."""
    for seed, activation in itertools.product(range(3), ("relu", "maxmin", "leaky")):
        rng = np.random.default_rng(seed)
        weights, center = random_weights(rng, (3, 8, 8, 2)), rng.standard_normal(3)
        assert misses(weights, activation, center, 0.0, 2, center) == 0
        found = bounds(chain(weights, activation), certify.Ball(center, 0.0, 2))
        low, high = found.range
        assert float((high - low).max()) < 1e-11
        assert found.condensed.undecided == 0


@pytest.mark.parametrize("weights", [(1e300, 1e-200, 1e-200), (1e-200, 1e-200, 1e300), (1e38,) * 8 + (1e-38,) * 8], ids=str)
def test_products_below_the_smallest_float_are_refused(weights: tuple[float, ...]) -> None:
    """The slope of the first two is 1e-100; a gradient that is formed from either side is 0, or has no digits."""
    made = chain([(np.array([[w]]), np.zeros(1)) for w in weights], "relu")
    for radius in (0.0, 0.5, 2.0):
        with pytest.raises(certify.CertifyError, match="rescale the weights"):
            bounds(made, certify.Ball(np.ones(1), radius, math.inf))


@pytest.mark.parametrize("weights", [(1e-40, 1e-30, 1e-30, 1e50), (1e30, 1e-30, 1e-30, 1e30), (1e-150, 1e-150, 1.0)], ids=str)
def test_small_and_large_numbers_that_float64_can_follow_are_bounded(weights: tuple[float, ...]) -> None:
    exact = math.prod(map(Fraction, weights))
    for radius in (0.0, 0.5, 2.0):
        high = bounds(chain([(np.array([[w]]), np.zeros(1)) for w in weights], "relu"), certify.Ball(np.ones(1), radius, math.inf)).range[1]
        assert exact <= Fraction(float(high)) <= exact * (1 + Fraction(1e-6)) + Fraction(2.0**-490)


def test_numbers_that_overflow_are_refused_and_no_gate_is_decided_by_nan() -> None:
    """The range of the gate is infinity minus infinity; to call it shut would give a slope of 0 for one of 1e100."""
    made = chain([(np.array([[w]]), np.zeros(1)) for w in (1e200, 1e200, 1e-300)], "relu")
    with pytest.raises(certify.CertifyError, match="rescale the weights"):
        bounds(made, certify.Ball(np.array([-0.5]), 1.5, math.inf))
    made = chain([(np.array([[1.0]]), np.array([1e300])), (np.array([[1e10]]), np.zeros(1))], "relu")
    with pytest.raises(certify.CertifyError, match="rescale the weights"):
        bounds(made, certify.Ball(np.zeros(1), 1.0, math.inf))
    with pytest.raises(certify.CertifyError, match="rescale the weights"):
        bounds(chain([(np.eye(2), np.zeros(2))], "relu"), certify.Ball(np.zeros(2), 1e40, math.inf))


# --- lines ----------------------------------------------------------------------------------------------------------------------------------------


def intervals(count: int, around_zero: bool) -> tuple[Tensor, Tensor]:
    """Of all sizes, and of ends of very different sizes."""
    rng = np.random.default_rng(0)
    ends = 10.0 ** rng.uniform(-18, 18, (2, count)) * 10.0 ** rng.uniform(-20, 1, (2, count))
    ends[1, ::2] = ends[0, ::2] * 10.0 ** rng.uniform(-17, 17, len(ends[0, ::2]))
    low, high = (-ends[0], ends[1]) if around_zero else np.sort(ends * rng.choice([-1, 1], ends.shape), axis=0)
    return torch.from_numpy(low), torch.from_numpy(high)


def beyond(lines: relax.Lines, z: Tensor, value: Callable[[Fraction, int], Fraction]) -> int:
    """At how many z the exact value is not between the lines as they are stored."""
    wrong = 0
    for k, point in enumerate(map(Fraction, z.tolist())):
        low, high = (Fraction(float(slope[k])) * point + Fraction(float(shift[k])) for slope, shift in (
            (lines.low_slope, lines.low_shift), (lines.high_slope, lines.high_shift)))  # fmt: skip
        wrong += not low <= value(point, k) <= high
    return wrong


def test_lines_around_relu_hold_exactly() -> None:
    low, high = intervals(3000, around_zero=True)
    lines = relax.of_gate(RELU, low, high)
    assert sum(beyond(lines, z, lambda point, _: max(point, Fraction(0))) for z in (low, torch.zeros_like(low), high)) == 0


def test_lines_around_a_slope_times_a_gradient_hold_exactly() -> None:
    low, high = intervals(2000, around_zero=False)
    rng = np.random.default_rng(1)
    pairs = np.sort(np.where(rng.random((2, 2000)) < 0.4, rng.integers(0, 2, (2, 2000)), rng.uniform(-0.2, 1.2, (2, 2000))), axis=0)
    least, most = torch.from_numpy(pairs)
    lines = relax.of_product(least, most, low, high)
    assert sum(beyond(lines, z, lambda point, k, s=s: point * Fraction(float(s[k]))) for z in (low, high) for s in (least, most)) == 0


def test_the_line_above_an_absolute_value_holds_exactly() -> None:
    low, high = intervals(2000, around_zero=False)
    slope, shift = norms._absolute(low, high)
    lines = relax.Lines(torch.zeros_like(low), torch.zeros_like(low), slope, shift)
    assert sum(beyond(lines, z, lambda point, _: abs(point)) for z in (low, high)) == 0


DERIVATIVES: dict[Activation, tuple[Callable[[Tensor], Tensor], tuple[float, ...]]] = {
    TANH: (torch.tanh, (0.0,)),
    SIGMOID: (torch.sigmoid, (0.0,)),
    SILU: (F.silu, (0.0, 2.3993572805, -2.3993572805, -1.2784645428)),
    GELU: (F.gelu, (0.0, 2**0.5, -(2**0.5), -0.7517915867)),
}


@pytest.mark.parametrize("activation", DERIVATIVES, ids=str)
def test_lines_ranges_and_slopes_of_smooth_gates_hold(activation: Activation) -> None:
    """On points, tiny, wide and lopsided intervals, out to 1e4, and across every turn."""
    function, turns = DERIVATIVES[activation]
    rng = np.random.default_rng(0)
    middle = np.concatenate([rng.uniform(-3, 3, 300), rng.choice([-1, 1], 300) * 10.0 ** rng.uniform(-6, 4, 300), np.repeat(turns, 50)])
    width = 10.0 ** rng.uniform(-13, 4, len(middle))
    width[:50] = 0.0
    low, high = (torch.from_numpy(middle + sign * width * rng.random(len(middle))) for sign in (-1, 1))
    lines = relax.of_gate(activation, low, high)
    (least, most), (bottom, top) = ([torch.from_numpy(end) for end in f(low.numpy(), high.numpy())] for f in (activation.slopes, activation.image))
    for share in (*np.linspace(0, 1, 23), *turns):
        z = (low + share * (high - low) if 0 <= share <= 1 else torch.full_like(low, share)).clamp(low, high).requires_grad_(True)
        value = function(z)
        (derivative,) = torch.autograd.grad(value.sum(), z)
        assert (lines.low_slope * z + lines.low_shift <= value).all()
        assert (value <= lines.high_slope * z + lines.high_shift).all()
        assert ((bottom <= value) & (value <= top)).all()
        assert ((least <= derivative) & (derivative <= most)).all()
    narrow = (high - low < 1e-3) & (low.abs() < 10)
    gap = (lines.high_slope - lines.low_slope) * low + lines.high_shift - lines.low_shift
    assert float(gap[narrow].max()) < 1e-4  # and they are near each other


# --- every step -----------------------------------------------------------------------------------------------------------------------------------


class Of(nn.Module):
    """A function of a batch as a network, with its output in one row."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).flatten(1)


STEPS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "replicated corner": (Of(lambda x: F.pad(x, (5, 5, 4, 4), "replicate")), (1, 3, 3)),
    "around a point": (nn.Conv2d(1, 1, 1, padding=1, padding_mode="circular"), (1, 1, 1)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", groups=1), (2, 4, 4)),
    "same": (nn.Conv2d(2, 3, 4, padding="same", dilation=2), (2, 6, 6)),
    "groups": (nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2), (4, 7, 7)),
    "along a line": (nn.Conv1d(2, 3, 3, 2, 1, 2), (2, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), (4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 4, 2), (2, 5)),
    "average": (nn.AvgPool2d(3, 1, 1, ceil_mode=True, count_include_pad=False), (2, 5, 5)),
    "average by": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=2), (2, 5, 5)),
    "uneven bins": (nn.AdaptiveAvgPool2d((3, 2)), (1, 5, 3)),
    "spread bins": (nn.AdaptiveAvgPool2d(20), (1, 5, 3)),
    "max": (nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), (2, 7, 8)),
    "max 1d": (nn.MaxPool1d(3, 1, 1, 2), (2, 7)),
    "broadcast": (Of(lambda x: x[:, :, None] - x[:, None, :].relu()), (5,)),
    "broadcast numbers": (Of(lambda x: (x[:, :, None] * torch.tensor([1.0, 2.0, -3.0])) / torch.tensor([0.3, 0.7, -2.0])), (4,)),
    "expanded": (Of(lambda x: x[:, :, None].expand(-1, -1, 9).reshape(len(x), -1)), (4,)),
    "stacked": (Of(lambda x: torch.stack([x, x, x, x, x, x, x, x], 1)), (3,)),
    "pieces": (Of(lambda x: torch.cat([x.flip(1).chunk(2, 1)[1], torch.full((len(x), 2), 0.5, dtype=x.dtype), -x], 1)), (5,)),
    "view": (Of(lambda x: x.permute(0, 2, 3, 1).contiguous().view(len(x), -1)), (2, 3, 3)),
    "weighted sums": (Of(lambda x: torch.rsub(torch.sub(x.relu(), x, alpha=-2.5), 3, alpha=2)), (4,)),
    "sums": (Of(lambda x: x.sum((1, 2), keepdim=True) - x.mean(-1, keepdim=True)), (4, 3)),
    "batch norm": (nn.BatchNorm1d(4, affine=False), (4,)),
    "slopes": (nn.Sequential(nn.LeakyReLU(-2.0), nn.PReLU(4), nn.LeakyReLU(3.0)), (4,)),
    "clamps": (Of(lambda x: x.clamp(-math.inf, 0.4).clamp(0.3, 0.3) + F.hardtanh(x, -0.1, math.inf) + F.hardsigmoid(x)), (4,)),
    "asserted": (Of(lambda x: x.double().relu()), (4,)),
}


@pytest.mark.parametrize("name", STEPS)
def test_gradients_through_a_step_are_those_of_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of one row where there are several."""
    monkeypatch.setattr(operators, "_COLUMNS", 1)
    torch.manual_seed(0)
    net, shape = STEPS[name]
    made = Program.of(nn.Sequential(net, nn.Flatten()).eval(), shape)
    generator = torch.Generator().manual_seed(0)
    for number, step in enumerate(made.steps):
        if isinstance(step, Affine):
            rows = torch.randn(3, math.prod(made.shapes[number + 1]), generator=generator, dtype=torch.float64)
            shapes = [made.shapes[k] for k in step.inputs]
            for absolute in (False, True):
                own, found = (way.back(rows, shapes, absolute) for way in (step, dataclasses.replace(step, transposed=None)))
                for mine, theirs in zip(own, found, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_a_program_is_its_network_and_no_sum_of_a_step_is_longer_than_it_says(name: str) -> None:
    """Rounding is counted by `terms`: no entry, forward or in a gradient, has more terms; and `size` has the absolute values of the coefficients."""
    torch.manual_seed(0)
    net, shape = STEPS[name]
    net = nn.Sequential(net, nn.Flatten()).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean, module.running_var = torch.randn(4).double(), torch.rand(4).double() + 0.5
        if isinstance(module, nn.PReLU):
            module.weight.data = torch.tensor([0.3, -1.0, 2.0, 1.5], dtype=torch.float64)
    made = Program.of(net, shape)
    x = torch.randn(4, *shape, dtype=torch.float64)
    assert torch.allclose(torch.stack([made.run(row) for row in x]), net(x), rtol=1e-12, atol=1e-12)
    for step in made.steps:
        if not isinstance(step, Affine):
            continue
        zeros = tuple(torch.zeros(made.shapes[i], dtype=torch.float64) for i in step.inputs)
        matrices, sizes = (torch.cat(
            [M.reshape(math.prod(M.shape) // zero.numel(), -1) for M, zero in zip(torch.autograd.functional.jacobian(f, zeros), zeros, strict=True)], dim=1)
            for f in (step.apply, step.size))  # fmt: skip
        shift, most = step.apply(*zeros).flatten().abs(), torch.zeros(1) if step.constant is None else step.constant.flatten()
        assert torch.allclose(sizes, matrices.abs(), rtol=1e-13, atol=0)
        assert (shift <= most * (1 + 1e-13)).all()
        forward = int(((sizes != 0).sum(1) + (most != 0)).max())
        backward = int((sizes != 0).sum(0).max())
        assert max(forward, backward) <= step.terms + len(step.inputs) + 2


# --- the same over all layers ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Block:
    """`h -> S h + T relu(D h)`, after `h = W x + b`."""

    W: np.ndarray
    b: np.ndarray
    S: np.ndarray
    T: np.ndarray
    D: np.ndarray


def blocks_of(weights: Weights, activation: str) -> list[Block]:
    blocks = []
    for W, b in weights[:-1]:
        eye = np.eye(len(b))
        a, c = eye[0::2], eye[1::2]
        S = np.zeros_like(eye) if activation == "relu" else np.stack([c, a], 1).reshape(eye.shape)  # (max, min) = (b + r, a - r)
        T = eye if activation == "relu" else a.T - c.T
        blocks.append(Block(W, b, S, T, eye if activation == "relu" else a - c))
    return blocks


def plain(weights: Weights, activation: str, center: np.ndarray, radius: float, p: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper Jacobian, and l1 and l2 norms of its rows, by CROWN and by lines around slope times gradient, over all gates; without any rounding."""
    blocks, ranges = blocks_of(weights, activation), []
    low, high = center - radius, center + radius

    def interval(A: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return A.clip(0) @ low + A.clip(None, 0) @ high, A.clip(0) @ high + A.clip(None, 0) @ low

    def largest(rows: np.ndarray, last: int) -> np.ndarray:
        """Of rows of what comes out of the affine map of a block."""
        total = np.zeros(len(rows))
        for k in reversed(range(last + 1)):
            total, rows = total + rows @ blocks[k].b, rows @ blocks[k].W
            if k:
                z_low, z_high = ranges[k - 1]
                c = rows @ blocks[k - 1].T
                cut = (z_low < 0) & (z_high > 0)
                chord = np.where(cut, z_high / np.where(cut, z_high - z_low, 1), z_low >= 0)
                below = np.where(cut, z_high > -z_low, z_low >= 0)
                total = total + c.clip(0) @ np.where(cut, -chord * z_low, 0)
                rows = rows @ blocks[k - 1].S + (c.clip(0) * chord + c.clip(None, 0) * below) @ blocks[k - 1].D
        reach = np.abs(rows).sum(1) if p == math.inf else np.minimum(np.abs(rows).sum(1), np.linalg.norm(rows, axis=1))
        return np.asarray(total + rows @ center + radius * reach)

    for k, block in enumerate(blocks):
        low, high = (end + block.b for end in interval(block.W, low, high))
        z_low, z_high = interval(block.D, low, high)
        cut = (z_low < 0) & (z_high > 0)
        if cut.any():
            z_low[cut], z_high[cut] = np.maximum(z_low[cut], -largest(-block.D[cut], k)), np.minimum(z_high[cut], largest(block.D[cut], k))
        ranges.append((z_low, z_high))
        kept, bent = interval(block.S, low, high), interval(block.T, z_low.clip(0), z_high.clip(0))
        low, high = kept[0] + bent[0], kept[1] + bent[1]

    slopes: list[dict[str, np.ndarray]] = [{} for _ in blocks]

    def steepest(forms: np.ndarray, start: int, row: np.ndarray) -> np.ndarray:
        """Of forms in the gradient to what comes out of a block."""
        total = np.zeros(len(forms))
        for k in range(start + 1, len(blocks)):
            forms = forms @ blocks[k].W.T
            c, line = forms @ blocks[k].D.T, slopes[k]
            total = total + c.clip(0) @ line["above"] + c.clip(None, 0) @ line["below"]
            forms = forms @ blocks[k].S.T + (c.clip(0) * line["high"] + c.clip(None, 0) * line["low"]) @ blocks[k].T.T
        return np.asarray(total + forms @ weights[-1][0].T @ row)

    lows, highs, sums, squares = [], [], [], []
    for row in np.eye(len(weights[-1][1])):
        for k in reversed(range(len(blocks))):
            z_low, z_high = ranges[k]
            cut = (z_low < 0) & (z_high > 0)
            e_high, e_low = steepest(blocks[k].T.T, k, row), -steepest(-blocks[k].T.T, k, row)
            width = np.where(e_high > e_low, e_high - e_low, 1)
            rise, fall = (e_high.clip(0) - e_low.clip(0)) / width, (e_high.clip(None, 0) - e_low.clip(None, 0)) / width
            slopes[k] = {
                "high": np.where(cut, rise, z_low >= 0), "above": np.where(cut, e_low.clip(0) - rise * e_low, 0),
                "low": np.where(cut, fall, z_low >= 0), "below": np.where(cut, e_low.clip(None, 0) - fall * e_low, 0),
            }  # fmt: skip
        inputs = np.eye(len(center))
        start_at = -1
        high, low = steepest(inputs, start_at, row), -steepest(-inputs, start_at, row)
        width = np.where(high > low, high - low, 1)
        slope = np.where(low >= 0, 1, np.where(high <= 0, -1, (np.abs(high) - np.abs(low)) / width))
        most = np.maximum(np.abs(low), np.abs(high))
        sums.append(min(most.sum(), steepest(slope[None], start_at, row)[0] + (np.abs(low) - slope * low).sum()))
        squares.append(math.sqrt(min((most**2).sum(), steepest((low + high)[None], start_at, row)[0] - (low * high).sum())))
        lows.append(low)
        highs.append(high)
    return np.array(lows), np.array(highs), np.array(sums), np.array(squares)


@pytest.mark.parametrize("activation", ["relu", "maxmin"])
@pytest.mark.parametrize("seed", range(3))
def test_the_undecided_gates_give_the_same_bounds_as_all_of_them(activation: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, center = random_weights(rng, (4, 10, 12, 8, 3)), rng.standard_normal(4)
    if seed == 2:  # a circular convolution of 3 channels on 4 places, as a matrix
        kernel = rng.standard_normal((3, 3, 3))
        W = sum(np.kron(kernel[:, :, t], np.roll(np.eye(4), t, axis=1)) for t in range(3))
        weights[1:3] = [(rng.standard_normal((12, 10)) / 3, np.zeros(12)), (W / 3, 0.1 * rng.standard_normal(12)), (weights[2][0], weights[2][1])]
    for radius, p in ((0.01, math.inf), (0.1, math.inf), (0.3, 2.0)):
        found = bounds(chain(weights, activation), certify.Ball(center, radius, p))
        low, high, sums, squares = plain(weights, activation, center, radius, p)
        assert found.range[0].numpy() == pytest.approx(low, abs=1e-9)
        assert found.range[1].numpy() == pytest.approx(high, abs=1e-9)
        assert found.row_norms(1).numpy() == pytest.approx(sums, abs=1e-9)
        assert found.row_norms(2).numpy() == pytest.approx(squares, abs=1e-7)  # a root
        assert found.condensed.undecided < found.condensed.total


# --- steps that are left out ----------------------------------------------------------------------------------------------------------------------


def wrong_regions(enumerated: list[np.ndarray]) -> int:
    """Of a few networks, how many have a Jacobian beyond their bounds."""
    wrong = 0
    for seed, exact in enumerate(enumerated):
        rng = np.random.default_rng(seed)
        found = bounds(chain(random_weights(rng, (2, 5, 4, 2)), "relu"), certify.Ball(rng.standard_normal(2), 0.6, math.inf))
        low, high = (end.numpy() for end in found.range)
        inside = (exact >= low - 1e-9).all() and (exact <= high + 1e-9).all() and (np.abs(exact).sum(2).max(0) <= found.row_norms(1).numpy() + 1e-9).all()
        wrong += not inside
    return wrong


@pytest.fixture(scope="module")
def enumerated() -> list[np.ndarray]:
    """The Jacobians of the networks of `wrong_regions`."""
    return [all_jacobians(random_weights(rng, (2, 5, 4, 2)), rng.standard_normal(2), 0.6) for rng in map(np.random.default_rng, range(6))]


def _no_shift(lines: relax.Lines) -> relax.Lines:
    return dataclasses.replace(lines, low_shift=torch.zeros_like(lines.low_shift), high_shift=torch.zeros_like(lines.high_shift))


def _decide(patch: pytest.MonkeyPatch, slopes: Callable[[program.Gate, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    for module in (layer, condense):
        patch.setattr(module, "slopes", slopes)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no shifts of the product": lambda patch: patch.setattr(clarke, "of_product", lambda *args: _no_shift(relax.of_product(*args))),
    "a slope too small": lambda patch: patch.setattr(clarke, "of_product", lambda a, b, low, high: relax.of_product(a, 0.5 * b, low, high)),
    "a sign turned": lambda patch: patch.setattr(clarke, "of_product", lambda a, b, low, high: relax.of_product(a, b, -high, -low)),
    "gates decided by their center": lambda patch: _decide(patch, lambda gate, low, high: (((low + high) > 0).double(), ((low + high) > 0).double())),
    "half the region": lambda patch: patch.setattr(Region, "of", classmethod(lambda cls, d, n, of=Region.of: of(certify.Ball(d.center, d.radius / 2, d.p), n))),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_step_left_out_gives_a_false_bound(name: str, monkeypatch: pytest.MonkeyPatch, enumerated: list[np.ndarray]) -> None:
    assert wrong_regions(enumerated) == 0
    MUTATIONS[name](monkeypatch)
    assert wrong_regions(enumerated) > 0


def test_strict_decisions_only_loosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate whose range ends at 0 is one line; to leave it undecided is true as well, and worse."""
    weights = [(np.eye(2), np.array([1.0, -1.0])), (np.array([[1.0, 2.0]]), np.zeros(1))]
    ball = certify.Ball(np.zeros(2), 1.0, math.inf)

    def strict(gate: program.Gate, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return (low > 1e-9).double(), (high > -1e-9).double()

    _decide(monkeypatch, strict)
    loose = bounds(chain(weights, "relu"), ball)
    monkeypatch.undo()
    # IBP rounds outward, so the ends are moved by more than that; the decision itself is closed
    assert bounds(chain([(np.eye(2), np.array([1 + 1e-12, -1 - 1e-12])), weights[1]], "relu"), ball).row_norms(1)[0] == pytest.approx(1.0)
    assert float(loose.row_norms(1)[0]) == pytest.approx(3.0)
    gate = program.Gate("", 0, RELU)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert not layer.undecided(gate, zero, one).any()
    assert not layer.undecided(gate, -one, zero).any()
    assert layer.undecided(gate, -one, one).all()


# --- what a forward may do ------------------------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Changes a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(x.detach().sum()[None])
        return 2 * x


def _overridden() -> nn.Module:
    net = nn.Linear(4, 4)
    net.forward = lambda x: F.linear(x, 3 * torch.eye(4, dtype=x.dtype))  # type: ignore[method-assign]
    return net


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a conversion to float32": (lambda: Of(lambda x: x.float().relu().double()), "_to_copy"),
    "integers": (lambda: Of(lambda x: x.long().double()), "_to_copy"),
    "a comparison": (lambda: Of(lambda x: x * (x > 0)), "gt"),
    "complex numbers": (lambda: Of(lambda x: torch.view_as_real(x * (1 + 1j))), "mul"),
    "dropout that is left on": (lambda: Of(lambda x: F.dropout(x, 0.5, training=True)), "dropout"),
    "random numbers": (lambda: Of(lambda x: x + torch.randn_like(x)), "randn_like"),
    "rows that mix": (lambda: Of(lambda x: x - x.mean(0, keepdim=True)), "mix inputs"),
    "a shape of the batch": (lambda: Of(lambda x: x.relu() if len(x) == 1 else x), "branches"),
    "a batch made of one input": (lambda: Of(lambda x: x.reshape(-1, 2)), "mix inputs"),
    "a change of its input": (lambda: Of(lambda x: x.add_(1).relu()), "one tensor"),
    "a change of a buffer": (Counting, "one tensor"),
    "NaN": (lambda: Of(lambda x: (x + math.nan).relu()), "NaN"),
    "infinity": (lambda: Of(lambda x: (x * math.inf).relu()), "NaN or infinite"),
    "an average of the other sign": (lambda: Of(lambda x: F.avg_pool2d(x.reshape(-1, 1, 2, 2), 2, divisor_override=-4).relu()), "a negative number"),
    "a clamp that crosses": (lambda: Of(lambda x: x.clamp(1.0, 0.0)), "clamps between"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forwards_that_are_no_affine_steps_and_gates_are_refused(name: str) -> None:
    make, why = REFUSED[name]
    with pytest.raises(certify.Unsupported, match=why):
        Program.of(make(), (4,))


@pytest.mark.parametrize("many", [lambda y: (y,), lambda y: (y, y), lambda y: {"y": y}, lambda y: [y, 2 * y]])
def test_a_forward_returns_one_tensor(many: Callable[[Tensor], object]) -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> object:
            return many(x.relu())

    with pytest.raises(certify.Unsupported, match="one tensor"):
        Program.of(Many(), (4,))


def test_hooks_and_a_forward_of_its_own_are_seen() -> None:
    """What runs is what is exported."""
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(4, dtype=torch.float64)
    assert torch.allclose(Program.of(net, (4,)).run(x), net.double()(x[None])[0])
    with pytest.raises(certify.Unsupported, match="eye"):  # a matrix that is made in the forward is no stored number
        Program.of(_overridden(), (4,))


# --- the method -----------------------------------------------------------------------------------------------------------------------------------


def orthogonal() -> nn.Module:
    layers = [part for _ in range(4) for part in (nn.Linear(4, 4), nn.ReLU())]
    torch.manual_seed(0)
    for linear in layers[::2]:
        nn.init.orthogonal_(linear.weight)
    return nn.Sequential(*layers, nn.Linear(4, 2)).eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), lipnet.MaxMin(), nn.Linear(10, 3)).eval()


def test_norms_of_a_bound(net: nn.Module) -> None:
    """Value, and pairs, of each pair of norms are at least those of Jacobians seen, and at most what follows from one of the others."""
    center, radius = np.linspace(-1, 1, 4), 0.2
    ball = certify.Ball(center, radius, math.inf)
    found = {norm: certify.lipschitz(net, certify.Local(norm=norm), input_shape=(4,), domain=ball) for norm in (1, 2, math.inf)}
    assert {norm: bound.norm for norm, bound in found.items()} == {1: (1, 2), 2: (2, 2), math.inf: (math.inf, math.inf)}
    double = copy.deepcopy(net).double()
    x = torch.from_numpy(center) + radius * (2 * torch.rand(200, 4, dtype=torch.float64) - 1)
    J = torch.stack([torch.autograd.functional.jacobian(lambda z: double(z[None])[0], row) for row in x])
    assert float(torch.linalg.vector_norm(J, dim=1).max()) <= found[1].value <= found[2].value
    assert float(torch.linalg.matrix_norm(J, 2).max()) <= found[2].value
    assert float(J.abs().sum(2).max()) <= found[math.inf].value
    for norm, dual in ((1, math.inf), (2, 2), (math.inf, 1)):
        pairs = found[norm].pairs
        assert pairs is not None
        assert (pairs == pairs.T).all()
        assert (np.diag(pairs) == 0).all()
        for i, j in itertools.combinations(range(3), 2):
            assert float(torch.linalg.vector_norm(J[:, i] - J[:, j], ord=dual, dim=1).max()) <= pairs[i, j] <= found[norm].value * 2


def test_boxes_and_balls(net: nn.Module) -> None:
    center = np.linspace(-1, 1, 4)

    def value(domain: certify.Domain) -> float:
        return certify.lipschitz(net, certify.Local(norm=2), input_shape=(4,), domain=domain).value

    box, ball = certify.Box(center - 0.2, center + 0.2), certify.Ball(center, 0.2, math.inf)
    assert value(box) == pytest.approx(value(ball), rel=1e-9)
    assert value(certify.Ball(center, 0.2, 1)) <= value(certify.Ball(center, 0.2, 2)) * (1 + 1e-9) <= value(ball) * (1 + 2e-9)
    assert value(certify.Box(center, center + 0.2)) <= value(box) * (1 + 1e-9)


def test_the_product_of_layers_where_it_is_smaller() -> None:
    net = orthogonal()
    everywhere = certify.lipschitz(net, certify.Layerwise(), input_shape=(4,))
    far = certify.lipschitz(net, certify.Local(how="crown"), input_shape=(4,), domain=certify.Ball(np.zeros(4), 1e3, 2))
    assert far.value == everywhere.value == far.evidence["layerwise"]
    assert far.evidence["network"] == everywhere.evidence["network"]  # the digest of the same network
    assert far.parts
    near = certify.lipschitz(net, certify.Local(), input_shape=(4,), domain=certify.Ball(np.ones(4), 0.0, 2))
    assert near.value < everywhere.value
    assert not near.parts


def test_many_rows_are_refused_before_they_fill_the_memory() -> None:
    made = chain(random_weights(np.random.default_rng(0), (4, 5, 3)), "relu")
    with pytest.raises(certify.CertifyError, match="pairs=False"):
        condense.condense(made, Region.of(certify.Ball(np.zeros(4), 1.0), 4), torch.eye(3, dtype=torch.float64), limit=11)


def test_the_support_of_a_box_that_leans_to_one_side_is_exact_up_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.rand(40, generator=generator, dtype=torch.float64) * sign for sign in (-3, 1))
    g = torch.randn(20, 40, generator=generator, dtype=torch.float64)
    found = Region(torch.zeros(40, dtype=torch.float64), low, high).support(g)
    for row, most in zip(g.tolist(), found.tolist(), strict=True):
        exact = sum(max(Fraction(a) * Fraction(b), Fraction(a) * Fraction(c)) for a, b, c in zip(row, low.tolist(), high.tolist(), strict=True))
        assert exact <= Fraction(most) <= exact * (1 + Fraction(1, 10**12))


@pytest.mark.parametrize("steps", [0, 3])
def test_one_row_at_a_time_gives_the_same_bounds(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), lipnet.MaxMin(), nn.Linear(20, 3))
    made, where = Program.of(net.eval(), (1, 8, 8)), Region.of(certify.Ball(np.full((1, 8, 8), 0.5), 0.2, math.inf), 64)
    rows = torch.eye(3, dtype=torch.float64)
    whole = condense.condense(made, where, rows, steps=steps)
    norms = clarke.bound_jacobian(whole).row_norms(1)
    monkeypatch.setattr(condense, "_ROWS", 1)
    monkeypatch.setattr(condense, "_CHUNK", 1)
    monkeypatch.setattr(clarke, "_CHUNK", 1)
    single = condense.condense(made, where, rows, steps=steps)
    assert [layer.index.tolist() for layer in single.layers] == [layer.index.tolist() for layer in whole.layers]
    assert whole.undecided > 20
    torch.testing.assert_close(clarke.bound_jacobian(single).row_norms(1), norms, rtol=1e-10, atol=0)
