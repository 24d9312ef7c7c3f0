"""LipSDP: exact constants, orderings, invariances; solvers that fail cost tightness, never truth."""

from __future__ import annotations

import itertools
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize

import sdp
from benchmarks.lipsdp import sorted_network, weights
from sdp import published
from sdp.activation import ABS, GELU, RELU, SIGMOID, SILU, SOFTPLUS, TANH, Sloped, clamp, leaky_relu
from sdp.chain import Chain, composed
from sdp.lure import feed_forward
from sdp.newton import newton
from sdp.program import program
from sdp.start import closed_form, feasible, levels


def norm(matrix):
    return float(np.linalg.norm(matrix, 2))


def product(matrices):
    return math.prod(map(norm, matrices))


def patterns(matrices, slopes=(0.0, 1.0)):
    """The Jacobians of all activation patterns."""
    widths = [len(matrix) for matrix in matrices[:-1]]
    for pattern in itertools.product(slopes, repeat=sum(widths)):
        jacobian, at = matrices[0], 0
        for matrix, width in zip(matrices[1:], widths, strict=True):
            jacobian = matrix @ (np.array(pattern[at : at + width])[:, None] * jacobian)
            at += width
        yield jacobian


def some_patterns(matrices, slopes=(0.0, 1.0), tries=300):
    """The Jacobians of some activation patterns."""
    rng = np.random.default_rng(0)
    for _ in range(tries):
        jacobian = matrices[0]
        for matrix in matrices[1:]:
            jacobian = matrix @ (rng.choice(slopes, len(jacobian))[:, None] * jacobian)
        yield jacobian


def exact(matrices, p=2):
    """The largest gain of any pattern: the constant itself for one hidden layer whose first matrix has full row rank."""
    gains = (norm(jacobian) if p == 2 else np.abs(jacobian).sum(axis=1).max() for jacobian in patterns(matrices))
    return max(gains)


# Exact and known answers


@pytest.mark.parametrize(("sizes", "seed", "loss"), [((6, 6, 1), 1, 1e-6), ((10, 10, 1), 5, 1e-6), ((4, 5, 5, 2), 3, 1e-3), ((3, 4, 4, 4, 2), 7, 0.1)])
def test_it_is_at_least_the_largest_pattern_and_hardly_more(sizes, seed, loss):
    matrices = weights(sizes, seed)
    solution = sdp.lipsdp(feed_forward(matrices))
    assert solution.status == "optimal"
    assert exact(matrices) <= solution.bound <= exact(matrices) * (1 + loss)


@pytest.mark.parametrize(("sizes", "seed"), [((16, 16, 16, 4), 16002), ((16, 16, 16, 16, 16, 4), 16004), ((5, 9, 7), 3)])
def test_newton_is_at_the_optimum_that_clarabel_finds(sizes, seed):
    system = feed_forward(weights(sizes, seed))
    ours, theirs = sdp.lipsdp(system), sdp.lipsdp(system, "clarabel")
    assert ours.bound == pytest.approx(theirs.claimed, rel=1e-6)
    assert theirs.bound == pytest.approx(theirs.claimed, rel=1e-5)
    assert ours.claimed <= ours.bound * (1 + 1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_sorting_alone_is_proved_to_keep_the_norm(size):
    assert 1 <= sdp.lipsdp(sorted_network([np.eye(8), np.eye(8)], size)).bound <= 1 + 1e-6


def test_one_relu_of_the_difference_is_exact_where_two_lose_sqrt_2():
    """max = b + relu(a - b), min = a - relu(a - b), against the encoding with a ReLU for each (H = [[0, 1], [0, 1]], G = [[-1, 0], [0, 1]])."""
    inner = np.array([[-1.0, 1.0], [1.0, -1.0]])
    skip, branch = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[-1.0, 0.0], [0.0, 1.0]])
    two = sdp.residual_block(skip, branch, [inner], (0.0, 1.0))
    one = sorted_network([np.eye(2), np.eye(2)], 2)
    assert sdp.lipsdp(one).bound <= 1 + 1e-6
    assert sdp.lipsdp(two).bound == pytest.approx(math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize(("size", "sizes", "seed"), [(2, (6, 8, 3), 0), (2, (5, 4, 4, 4, 2), 4), (4, (6, 8, 3), 10)])
def test_comparators_are_never_looser_than_the_published_constraints(size, sizes, seed):
    matrices = weights(sizes, seed)
    ours, theirs = sdp.lipsdp(sorted_network(matrices, size)).bound, published.groupsort(matrices, size)
    assert math.isfinite(theirs)
    assert slope_of_sorting(matrices, size) <= ours <= theirs <= product(matrices) * (1 + 1e-3)
    assert ours < 0.95 * theirs or size == 4


def slope_of_sorting(matrices, size, tries=300):
    rng = np.random.default_rng(0)

    def run(x):
        for matrix in matrices[:-1]:
            x = np.sort((matrix @ x).reshape(-1, size), axis=1)[:, ::-1].ravel()
        return matrices[-1] @ x

    best = 0.0
    for _ in range(tries):
        x = rng.standard_normal(matrices[0].shape[1])
        d = 1e-5 * rng.standard_normal(len(x))
        for _ in range(3):  # the direction that grows most, by a few differences
            columns = np.array([run(x + 1e-6 * e) - run(x) for e in np.eye(len(x))]).T / 1e-6
            d = np.linalg.svd(columns)[2][0] * 1e-5
        best = max(best, float(np.linalg.norm(run(x + d) - run(x)) / np.linalg.norm(d)))
    return best


def test_coupled_multipliers_are_not_to_be_had():
    """The counterexample to LipSDP-Network: its constraint gives 0.144 where a slope of 0.379 exists (every pattern is reachable, W_0 being invertible)."""
    matrices = [np.array([[-0.3, -0.9], [0.0, -0.7]]), np.array([[-0.4, 0.4]])]
    assert exact(matrices) == pytest.approx(0.37947, abs=1e-5)
    for solver in ("newton", "closed-form", "rescaled", "first-order", "split", "scs", "clarabel"):
        assert sdp.lipsdp(feed_forward(matrices), solver).bound >= exact(matrices)
    with pytest.raises(ValueError, match="not sound"):
        sdp.lipsdp(feed_forward(matrices), multipliers="network")


def test_layers_that_are_1_lipschitz_by_their_own_proof_are_found_to_be():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((7, 5))
    convex_potential = sdp.residual_block(np.eye(5), -2 / norm(w) ** 2 * w.T, [w], (0.0, 1.0))
    steps = 1 / np.abs(w @ w.T).sum(axis=1)
    sll = sdp.residual_block(np.eye(5), -2 * w.T * steps, [w], (0.0, 1.0))
    assert sdp.lipsdp(convex_potential).bound <= 1 + 1e-6
    assert sdp.lipsdp(sll).bound <= 1 + 1e-6
    beyond = sdp.residual_block(np.eye(5), -2.2 * w.T * steps, [w], (0.0, 1.0))
    assert sdp.lipsdp(beyond).bound >= max(norm(np.eye(5) - 2.2 * (w.T * steps * pattern) @ w) for pattern in ([1] * 7, [1, 0] * 3 + [1]))


# Invariances and orderings


@pytest.mark.parametrize("change", ["rescaled", "permuted", "transposed", "rotated", "narrowed", "biased"])
def test_what_does_not_change_the_constant_does_not_change_the_bound(change):
    matrices = weights((9, 8, 6, 5), 4)
    rng = np.random.default_rng(1)
    before = sdp.lipsdp(feed_forward(matrices)).bound
    w0, w1, w2 = matrices
    if change == "rescaled":
        d, e = np.exp(rng.standard_normal(8)), np.exp(rng.standard_normal(6))
        changed = [d[:, None] * w0, e[:, None] * w1 / d, w2 / e]
    elif change == "permuted":
        p = rng.permutation(8)
        changed = [w0[p], w1[:, p], w2]
    elif change == "transposed":
        changed = [w2.T, w1.T, w0.T]
    elif change == "rotated":
        q, r = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (9, 5))
        changed = [w0 @ q, w1, r @ w2]
    elif change == "narrowed":
        changed = [np.linalg.cholesky(w0 @ w0.T), w1, w2]
    else:
        wiring = sdp.Wiring(9)
        signal = wiring.input()
        for w in (w0, w1):
            signal = wiring.nonlinear(wiring.shift(wiring.linear(w, signal), rng.standard_normal(len(w))), RELU)
        assert sdp.lipsdp(wiring.system(wiring.linear(w2, signal))).bound == pytest.approx(before, rel=1e-7)
        return
    assert sdp.lipsdp(feed_forward(changed)).bound == pytest.approx(before, rel=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_bounds(seed):
    matrices = weights((6, 10, 9, 8, 4), seed)
    system = feed_forward(matrices)
    bounds = {name: sdp.lipsdp(system, name).bound for name in ("newton", "first-order", "closed-form", "rescaled")}
    layer = sdp.lipsdp(system, multipliers="layer").bound
    sampled = max(map(norm, some_patterns(matrices)))
    assert sampled <= bounds["newton"] * (1 + 1e-9)
    assert bounds["newton"] <= bounds["first-order"] <= 1.02 * bounds["newton"]
    assert bounds["newton"] <= layer * (1 + 1e-9)
    assert layer <= bounds["closed-form"] * (1 + 1e-9)
    assert max(bounds.values()) <= product(matrices) * (1 + 1e-6)


def test_slopes_that_are_narrower_give_less_and_shifted_ones_what_they_must():
    matrices = weights((5, 8, 8, 3), 2)
    relu, leaky = (sdp.lipsdp(feed_forward(matrices, slopes)).bound for slopes in ((0.0, 1.0), (0.3, 1.0)))
    linear = norm(matrices[2] @ matrices[1] @ matrices[0])
    assert leaky >= linear * (1 - 1e-9)
    assert linear <= sdp.lipsdp(feed_forward(matrices, (1.0, 1.0))).bound <= 1.01 * linear  # the optimum is at infinite multipliers
    assert sdp.lipsdp(feed_forward(matrices, (-1.0, 1.0))).bound >= relu
    assert sdp.lipsdp(feed_forward(matrices, (0.0, 2.0))).bound == pytest.approx(4 * relu, rel=1e-6)


@pytest.mark.parametrize("slopes", [(-0.3, 1.1), (0.2, 0.9), (-1.0, 0.0)])
def test_every_range_of_slopes_has_a_strictly_feasible_start(slopes):
    system = feed_forward(weights((5, 7, 6, 5, 3), 1), slopes)
    goal = program(system)
    rho, multipliers = feasible(system, goal)
    assert np.linalg.eigvalsh(goal.matrix(rho, multipliers))[0] > 0
    worst = max(map(norm, some_patterns(weights((5, 7, 6, 5, 3), 1), slopes)))
    assert worst <= sdp.lipsdp(system).bound


# l-infinity and l1


@pytest.mark.parametrize("seed", range(3))
def test_from_l_infinity_and_l1(seed):
    matrices = weights((5, 6, 5, 1), seed)
    system = feed_forward(matrices)
    bound = sdp.lipsdp(system, norm=math.inf).bound
    assert exact(matrices, math.inf) <= bound <= 1.3 * exact(matrices, math.inf)
    assert bound <= math.sqrt(5) * sdp.lipsdp(system).bound * (1 + 1e-6)
    assert bound == pytest.approx(sdp.lipsdp(system, "clarabel", norm=math.inf).claimed, rel=1e-5)
    along = [sdp.lipsdp(system.along(i)).bound for i in range(5)]
    truth = [max(norm(jacobian[:, i : i + 1]) for jacobian in patterns(matrices)) for i in range(5)]
    assert all(t <= b <= 1.2 * t for t, b in zip(truth, along, strict=True))


def test_several_outputs_are_refused_from_l_infinity_and_other_norms_throughout():
    system = feed_forward(weights((3, 4, 2)))
    with pytest.raises(ValueError, match="one output"):
        sdp.lipsdp(system, norm=math.inf)
    with pytest.raises(ValueError, match="p=1"):
        sdp.lipsdp(system, norm=1)


def test_differences_of_outputs_are_better_than_sqrt_2():
    matrices = weights((6, 12, 4), 3)
    system = feed_forward(matrices)
    whole = sdp.lipsdp(system).bound
    for i, j in itertools.combinations(range(4), 2):
        bound = sdp.lipsdp(system.difference(i, j)).bound
        assert exact([matrices[0], matrices[1][[i]] - matrices[1][[j]]]) <= bound <= math.sqrt(2) * whole * (1 + 1e-9)


# Implicit systems


def test_implicit_systems():
    """z = relu(W z + U x), y = O z; against all slope vertices. One whose W is too large is refused with infinity."""
    rng = np.random.default_rng(3)
    w, u, o = rng.standard_normal((6, 6)), rng.standard_normal((6, 4)), rng.standard_normal((2, 6))
    small, large = 0.6 * w / norm(w), 3.0 * w / norm(w) + 2 * np.eye(6)

    def system(matrix):
        return sdp.LureSystem(4, np.hstack([u, matrix]), np.zeros(6), np.ones(6), np.hstack([np.zeros((2, 4)), o]))

    solution = sdp.lipsdp(system(small))
    vertices = (np.array(pattern, dtype=float) for pattern in itertools.product((0, 1), repeat=6))
    truth = max(norm(o @ np.linalg.solve(np.eye(6) - s[:, None] * small, s[:, None] * u)) for s in vertices)
    assert truth <= solution.bound <= 1.02 * truth
    assert sdp.is_well_posed(system(small), solution.multipliers)
    refused = sdp.lipsdp(system(large))
    assert math.isinf(refused.bound)
    assert not sdp.is_well_posed(system(large), np.ones(6))


# Solvers that fail


def test_a_solver_that_is_stopped_still_gives_a_true_bound():
    system = feed_forward(weights((8, 20, 20, 4), 1))
    best = sdp.lipsdp(system).bound
    for stopped in (sdp.lipsdp(system, seconds=1e-9), sdp.lipsdp(system, "scs", tolerance=0.3), sdp.lipsdp(system, "clarabel", seconds=1e-6)):
        assert best * (1 - 1e-9) <= stopped.bound < math.inf
    assert sdp.lipsdp(system, seconds=1e-9).status == "time limit"


def test_ctrl_c_proves_what_there_is():
    system = feed_forward(weights((8, 20, 20, 4), 1))

    def interrupt(progress):
        if progress.iteration == 8:
            raise KeyboardInterrupt

    stopped = sdp.lipsdp(system, report=interrupt)
    assert stopped.status == "interrupted"
    assert sdp.lipsdp(system).bound * 1.0001 < stopped.bound <= sdp.lipsdp(system, "closed-form").bound * 1.2


@pytest.mark.parametrize("solver", ["first-order", "split", "scs"])
def test_ctrl_c_in_a_solver_that_keeps_nothing_proves_the_closed_form(solver, monkeypatch):
    system = feed_forward(weights((8, 20, 20, 4), 1))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["sdp.lipsdp"], "_propose", interrupt)
    stopped = sdp.lipsdp(system, solver)
    monkeypatch.undo()
    assert stopped.status == "interrupted"
    assert sdp.lipsdp(system).bound < stopped.bound <= sdp.lipsdp(system, "closed-form").bound * (1 + 1e-9)


def test_multipliers_that_are_wrong_in_any_way_never_give_less():
    system = feed_forward(weights((6, 8, 8, 3), 5))
    best, rng = sdp.lipsdp(system), np.random.default_rng(0)
    for _ in range(300):
        changed = best.multipliers * np.exp(rng.normal(0, rng.choice([1e-8, 1e-4, 0.1]), 16))
        assert sdp.prove(system, changed) >= best.bound * (1 - 1e-8)
    for value in (np.nan, np.inf, -1.0):
        wrong = best.multipliers.copy()
        wrong[3] = value
        with pytest.raises(ValueError, match="finite and not negative"):
            sdp.prove(system, wrong)


def test_a_system_that_is_broken_raises_the_bound():
    matrices = weights((6, 8, 8, 3), 5)
    solution = sdp.lipsdp(feed_forward(matrices))
    broken = [1.5 * matrices[0], *matrices[1:]]
    assert sdp.prove(feed_forward(broken), solution.multipliers) >= 1.5 * solution.bound * (1 - 1e-6)
    assert sdp.prove(feed_forward(matrices, (-1.0, 1.0)), solution.multipliers) > solution.bound


def test_unknown_solvers_are_refused_with_the_names():
    with pytest.raises(ValueError, match=r"no solver 'nonsense' is installed; there are newton, .*CLARABEL"):
        sdp.lipsdp(feed_forward(weights((3, 4, 2))), "nonsense")


def test_newton_says_how_far_it_is():
    system = feed_forward(weights((8, 16, 16, 4), 2))
    seen = []
    goal = program(system)
    proposal = newton(goal, feasible(system, goal), report=seen.append)
    best = proposal.claimed
    assert [entry.iteration for entry in seen] == sorted(entry.iteration for entry in seen)
    assert all(entry.lipschitz * (1 - entry.gap) <= best * (1 + 1e-9) for entry in seen if entry.gap < 1)
    assert proposal.gap < 1e-8


# Chains


def test_parts_of_a_chain_compose():
    matrices = weights((6, 8, 7, 9, 8, 3), 6)
    system = feed_forward(matrices)
    chain = Chain.of(system)
    parts = chain.parts(18)
    assert len(parts) > 1
    solutions = [sdp.lipsdp(part.system()) for part in parts]
    whole = composed([(s.multipliers * (1 + 1e-9), s.bound**2 * (1 + 1e-8)) for s in solutions])
    together = sdp.prove(system, whole)
    assert sdp.lipsdp(system).bound <= together <= math.prod(s.bound for s in solutions) * (1 + 1e-6) <= product(matrices)
    assert sdp.lipsdp(system, "split").bound <= product(matrices)


def test_a_skip_is_no_chain():
    system = sdp.residual_block(np.eye(3), np.ones((3, 4)), [np.ones((4, 3))], (0.0, 1.0))
    assert Chain.of(system) is None
    with pytest.raises(ValueError, match="take newton"):
        sdp.lipsdp(system, "first-order")
    assert levels(feed_forward(weights((3, 4, 5, 2)))).tolist() == [0] * 4 + [1] * 5


def test_the_closed_form_of_one_layer_is_the_product():
    inner, outer = weights((6, 5, 5), 8)
    q, r = np.linalg.qr(inner.T)[0].T, np.linalg.qr(outer)[0]
    assert sdp.prove(feed_forward([q, r]), closed_form(feed_forward([q, r]))) <= 2 * product([q, r])


# Wiring


def test_the_errors_of_a_wiring_cover_exact_arithmetic():
    """The same steps in exact fractions: every entry of rows and output is within its error."""
    rng = np.random.default_rng(0)
    first, second, factor = rng.standard_normal((4, 3)), rng.standard_normal((4, 4)), rng.standard_normal(4)
    wiring = sdp.Wiring(3)
    z = wiring.linear(first, wiring.input())
    z = wiring.sort(z, np.array([0, 2]), np.array([1, 3]))
    z = wiring.scale(wiring.linear(second, z), factor)
    z = wiring.add(z, wiring.linear(first, wiring.input()))
    z = wiring.nonlinear(z, RELU)
    system = wiring.system(wiring.linear(second, z))

    def fractions(array):
        return np.array([[Fraction(float(v)) for v in row] for row in array], dtype=object)

    a, b, f = fractions(first), fractions(second), np.array([Fraction(float(v)) for v in factor], dtype=object)
    zero = Fraction(0)
    rows = np.hstack([a, np.full((4, 2), zero)])
    difference = rows[[0, 2]] - rows[[1, 3]]
    bent = np.hstack([np.full((2, 3), zero), fractions(np.eye(2))])
    larger, smaller = rows[[1, 3]] + bent, rows[[0, 2]] - bent
    inter = np.array([larger[0], smaller[0], larger[1], smaller[1]])
    last = f[:, None] * (b @ inter) + rows
    truth = np.vstack([np.hstack([difference, np.full((2, 4), zero)]), np.hstack([last, np.full((4, 4), zero)])])
    error = np.zeros_like(system.rows) if system.rows_error is None else system.rows_error
    off = np.abs(truth - fractions(system.rows))
    assert all(off[i, j] <= Fraction(float(error[i, j])) for i in range(6) for j in range(9))
    assert error.max() < 1e-13
    assert error[2:].max() > 0


def test_intervals_hold_the_values_and_what_does_not_bend_is_gone():
    matrices, rng = weights((4, 10, 10, 2), 3), np.random.default_rng(5)
    biases = [0.5 * rng.standard_normal(len(matrix)) for matrix in matrices[:-1]]
    center = rng.standard_normal(4)
    for p, radius in itertools.product((1, 2, math.inf), (0.01, 0.3, 3.0)):
        wiring = sdp.Wiring(4, sdp.Region(center, radius, p))
        signal, seen = wiring.input(), []
        for matrix, bias in zip(matrices[:-1], biases, strict=True):
            before = wiring.shift(wiring.linear(matrix, signal), bias)
            seen.append(wiring.interval(before))
            signal = wiring.nonlinear(before, RELU)
        system = wiring.system(wiring.linear(matrices[-1], signal))
        bound = sdp.lipsdp(system).bound
        for _ in range(100):
            d = rng.standard_normal(4)
            x = center + radius * rng.uniform() * d / np.linalg.norm(d, p)
            jacobian = np.eye(4)
            for matrix, bias, (low, high) in zip(matrices[:-1], biases, seen, strict=True):
                v = matrix @ x + bias
                assert (low <= v).all()
                assert (v <= high).all()
                x, jacobian = np.maximum(v, 0), (v > 0)[:, None] * (matrix @ jacobian)
            assert norm(matrices[-1] @ jacobian) <= bound * (1 + 1e-12)
        assert wiring.fixed + system.count == 20
        assert (radius > 0.01) or system.count < 5


ACTIVATIONS = {"relu": RELU, "abs": ABS, "leaky": leaky_relu(0.1), "clamp": clamp(-0.5, 1.5), "tanh": TANH, "sigmoid": SIGMOID, "softplus": SOFTPLUS}
ACTIVATIONS |= {"silu": SILU, "gelu": GELU}


def value(name, v):
    from scipy import special

    return {
        "relu": np.maximum(v, 0), "abs": np.abs(v), "leaky": np.where(v > 0, v, 0.1 * v), "clamp": np.clip(v, -0.5, 1.5), "tanh": np.tanh(v),
        "sigmoid": special.expit(v), "softplus": np.logaddexp(0, v), "silu": v * special.expit(v), "gelu": v * special.ndtr(v),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_and_values_stay_in_their_ranges_which_are_not_wider_than_they_must_be(name):
    activation, rng = ACTIVATIONS[name], np.random.default_rng(0)
    low = rng.normal(0, 3, 300)
    high = low + np.abs(rng.normal(0, 2, 300)) + 1e-3
    lower, upper = activation.slopes(low, high)
    least, most = activation.image(low, high)
    points = np.sort(low + (high - low) * rng.uniform(size=(400, 300)), axis=0)
    values = value(name, points)
    assert (least <= values.min(axis=0)).all()
    assert (values.max(axis=0) <= most).all()
    gaps = np.diff(points, axis=0)
    quotients = np.where(gaps > 1e-7, np.diff(values, axis=0) / np.maximum(gaps, 1e-300), (lower + upper) / 2)
    assert (lower - 1e-7 <= quotients.min(axis=0)).all()
    assert (quotients.max(axis=0) <= upper + 1e-7).all()
    assert np.mean(upper - quotients.max(axis=0) < 0.02) > 0.95  # a knot close to an end may be missed by the points
    everywhere = activation.range
    assert everywhere[0] <= lower.min()
    assert upper.max() <= everywhere[1]


def test_the_slopes_everywhere_are_met():
    for name, (least, most) in {"silu": (-0.0998394, 1.0998394), "gelu": (-0.1289045, 1.1289045)}.items():
        found = [
            scipy.optimize.minimize_scalar(lambda v, s=sign, n=name: s * (value(n, v + 1e-5) - value(n, v - 1e-5)) / 2e-5, bounds=(-4, 4), method="bounded").fun
            for sign in (1, -1)
        ]
        assert ACTIVATIONS[name].range == pytest.approx((least, most), abs=1e-6)
        assert found == pytest.approx([least, -most], abs=1e-5)


def test_regions_and_slopes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="l1, l2 or l-infinity"):
        sdp.Region(np.zeros(2), 1.0, 3)
    with pytest.raises(ValueError, match="not negative"):
        sdp.Region(np.zeros(2), -1.0)
    with pytest.raises(ValueError, match="takes 3"):
        sdp.Wiring(3, sdp.Region(np.zeros(2), 1.0))
    wiring = sdp.Wiring(2)
    wiring.nonlinear(wiring.input(), Sloped(-1.0, 1.0))
    with pytest.raises(ValueError, match="on a region only"):
        wiring.interval(wiring.input())


def test_nonlinearities_that_cannot_change_do_not_matter():
    """Rows of zeros, and what hangs on them alone, leave the program unbounded: they are taken out to solve, and put back to prove."""
    matrices = weights((6, 8, 7, 3), 2)
    whole = sdp.lipsdp(feed_forward(matrices)).bound
    first, second, last = (matrix.copy() for matrix in matrices)
    wide = [np.vstack([first, np.zeros((2, 6))]), np.zeros((9, 10)), np.hstack([last, np.ones((3, 2))])]
    wide[1][:7, :8], wide[1][7:, 8:] = second, 1.0
    found = sdp.lipsdp(feed_forward(wide))
    assert found.status == "optimal"
    assert whole * (1 - 1e-9) <= found.bound <= whole * (1 + 1e-6)
    assert sdp.lipsdp(feed_forward([np.zeros((4, 3)), np.ones((2, 4))])).bound < 1e-6
    assert sdp.lipsdp(feed_forward([wide[0], wide[1], wide[2][:1]]), norm=math.inf).bound <= math.sqrt(6) * whole
