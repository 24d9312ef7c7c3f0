"""Complete branch and bound: it meets exact enumerations, and no proof of emptiness ever leaves out a point that is there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from test_local import jacobians, network, points
from torch import Tensor, nn

import certify
import lipnet
from certify.local import bab
from certify.local.bab import Progress, complete
from certify.local.clarke import bound_jacobian
from certify.local.condense import condense
from certify.local.halfspaces import HalfSpaces, excludes, into, propose
from certify.local.program import Program
from certify.local.region import Region

# Largest l1 and l2 norms of the gradients of three outputs on a box of radius eps, and l2 norms on an l2 ball: from every activation pattern that has interior
# points there (linear programs on the box, second-order cone programs on the ball), for the networks of `random_net`.
EXACT = [
    ("relu", 1, (3, 8, 8, 3), 0.1, [0.894733387264, 0.200858697946, 0.630826529357],
     [0.569878493759, 0.142451275131, 0.383052705602], [0.551661348168, 0.142451275131, 0.323542859752]),
    ("relu", 2, (3, 8, 8, 3), 0.1, [0.879329150141, 1.51266299608, 0.758131925445],
     [0.610597907895, 0.931359494246, 0.518379680358], [0.610597907895, 0.931359494246, 0.518379680358]),
    ("maxmin", 1, (4, 8, 8, 3), 0.1, [3.20610959305, 7.45866166197, 4.6425936699],
     [1.75148018576, 3.89734036902, 2.40043679252], [1.75148018576, 3.89734036902, 2.40043679252]),
    ("leaky", 0, (4, 8, 8, 3), 0.3, [1.92122987684, 1.99783789342, 3.14110874126],
     [1.03488936549, 1.10389648453, 1.72531554147], [1.03488936549, 1.10389648453, 1.60826491251]),
    ("relu", 3, (8, 12, 12, 3), 0.2, [1.75603090018, 5.72081887578, 3.2966873088],
     [0.754120421995, 2.61741160174, 1.40934496661], [0.620013452462, 2.05966256462, 0.995109271457]),
    ("relu", 0, (10, 20, 15, 10, 3), 0.1, [3.02937788485, 3.32398596955, 3.10979366196],
     [1.23496606721, 1.21094084205, 1.14581532756], [1.08215467229, 1.19533813009, 0.803118635373]),
]  # fmt: skip
ACTIVATIONS = {"relu": nn.ReLU, "maxmin": lipnet.MaxMin, "leaky": lambda: nn.LeakyReLU(0.2)}


def random_net(activation: str, seed: int, sizes: Sequence[int]) -> tuple[nn.Sequential, np.ndarray]:
    """Weights of variance 2 / fan-in and biases of variance 0.01, and then a center, in this order from one generator."""
    rng = np.random.default_rng(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [linear(np.sqrt(2 / fan_in) * rng.standard_normal((fan_out, fan_in)), 0.1 * rng.standard_normal(fan_out)), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).eval(), rng.standard_normal(sizes[0])


def linear(weight: object, bias: object) -> nn.Linear:
    weight, bias = torch.tensor(weight, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.weight.data, layer.bias.data = weight, bias
    return layer


def ball(center: np.ndarray, radius: float, p: float) -> Region:
    return Region.of(certify.Ball(center, radius, p), center.size)


def solve(net: nn.Module, region: Region, q: float, rows: int, **options: object) -> bab.Complete:
    shape = (len(region.center),)
    return complete(Program.of(net, shape), region, torch.eye(rows, dtype=torch.float64), q, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("activation", "seed", "sizes", "eps", "box_l1", "box_l2", "ball_l2"), EXACT)
def test_meets_the_enumeration_of_all_activation_patterns(
    activation: str, seed: int, sizes: tuple[int, ...], eps: float, box_l1: list[float], box_l2: list[float], ball_l2: list[float]
) -> None:
    net, center = random_net(activation, seed, sizes)
    for p, q, exact in ((math.inf, 1, box_l1), (math.inf, 2, box_l2), (2, 2, ball_l2)):
        found = solve(net, ball(center, eps, p), q, 3)
        assert found.done
        assert found.upper.numpy() == pytest.approx(exact, rel=1e-6)
        assert (found.upper.numpy() >= np.array(exact) * (1 - 1e-11)).all()
        assert (found.lower.numpy() <= np.array(exact) * (1 + 1e-11)).all()


def enumerated(net: nn.Sequential, center: np.ndarray, radius: float, p: float, q: float) -> np.ndarray:
    """The largest norms of the rows of the Jacobians of all patterns of a network of two layers of ReLUs that have interior points in a ball."""
    (w1, b1), (w2, b2), (w3, _) = ((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in net[::2])
    best = np.zeros(len(w3))
    for first in itertools.product((0.0, 1.0), repeat=len(w1)):
        to_first, at_first = np.array(first)[:, None] * w1, np.array(first) * b1
        rows, shifts = w1 * (2 * np.array(first) - 1)[:, None], b1 * (2 * np.array(first) - 1)
        if not interior(rows, shifts, center, radius, p):
            continue
        for second in itertools.product((0.0, 1.0), repeat=len(w2)):
            sign = 2 * np.array(second) - 1
            all_rows, all_shifts = np.vstack([rows, sign[:, None] * (w2 @ to_first)]), np.append(shifts, sign * (w2 @ at_first + b2))
            if interior(all_rows, all_shifts, center, radius, p):
                jacobian = w3 @ (np.array(second)[:, None] * (w2 @ to_first))
                best = np.maximum(best, np.linalg.norm(jacobian, ord=q, axis=1))
    return best


def interior(rows: np.ndarray, shifts: np.ndarray, center: np.ndarray, radius: float, p: float) -> bool:
    """Whether `rows x + shifts > 0` somewhere in the ball, by a margin; rows of zeros say nothing."""
    lengths = np.linalg.norm(rows, axis=1)
    if (shifts[lengths == 0] < 0).any():
        return False
    rows, shifts = (rows / np.maximum(lengths, 1e-300)[:, None])[lengths > 0], (shifts / np.maximum(lengths, 1e-300))[lengths > 0]
    bounds = [*((c - radius, c + radius) for c in center), (None, radius)]
    goal = np.append(np.zeros(len(center)), -1.0)
    found = linprog(goal, A_ub=np.hstack([-rows, np.ones((len(rows), 1))]), b_ub=shifts, bounds=bounds)
    if p == math.inf or found.status != 0 or -found.fun <= 1e-9:
        return bool(found.status == 0 and -found.fun > 1e-9)
    x, margin = cp.Variable(len(center)), cp.Variable()
    problem = cp.Problem(cp.Maximize(margin), [rows @ x + shifts >= margin, cp.norm(x - center, p) <= radius - margin])
    problem.solve(solver=cp.CLARABEL)
    return bool(margin.value is not None and margin.value > 1e-8)


@pytest.mark.parametrize(("p", "q"), [(math.inf, 1), (2, 2), (1, math.inf)])
def test_meets_an_enumeration_in_every_norm(p: float, q: float) -> None:
    net, center = random_net("relu", 5, (2, 4, 4, 2))
    exact = enumerated(net, center, 0.9, p, q)
    found = solve(net, ball(center, 0.9, p), q, 2)
    assert found.done
    assert found.nodes > 0
    assert found.upper.numpy() == pytest.approx(exact, rel=1e-6)


def rows_of_whole_numbers(region: Region, inside: Tensor, rng: torch.Generator) -> HalfSpaces:
    """Half-spaces that all have one point of the region on their boundaries, or a little inside; without any rounding."""
    normal = torch.randint(-5, 6, (int(torch.randint(1, 7, (), generator=rng)), len(region.center)), generator=rng).double()
    return HalfSpaces(torch.randint(0, 2, (len(normal),), generator=rng) / 8 - normal @ inside, normal)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_what_holds_a_point_is_never_excluded(p: float) -> None:
    rng = torch.Generator().manual_seed(0)
    for trial in range(1000):
        inputs = 1 + trial % 5
        region = ball(np.zeros(inputs), 2.0, p)
        corner = torch.zeros(inputs, dtype=torch.float64)
        corner[trial % inputs] = 2.0
        inside = corner if trial % 3 == 0 else (into(region, 2 * torch.randn(inputs, generator=rng, dtype=torch.float64)) * 8).trunc() / 8
        of = rows_of_whole_numbers(region, inside, rng)
        y, _ = propose(region, of)
        assert y is None or not excludes(region, of, y)
        for scale in (1e-300, 1.0, 1e12, math.inf, math.nan):
            assert not excludes(region, of, scale * torch.rand(len(of.constant), generator=rng, dtype=torch.float64))
            assert not excludes(region, of, -scale * torch.ones(len(of.constant), dtype=torch.float64))


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_what_is_empty_by_a_margin_is_excluded_and_what_is_not_has_a_point(p: float) -> None:
    rng = torch.Generator().manual_seed(1)
    excluded = 0
    for _ in range(60):
        region = ball(np.zeros(4), 1.0, p)
        normal = torch.randn(6, 4, generator=rng, dtype=torch.float64)
        of = HalfSpaces(0.5 * torch.randn(6, generator=rng, dtype=torch.float64), normal)
        x, margin = cp.Variable(4), cp.Variable()
        of_size = cp.norm(x, "inf" if p == math.inf else p)
        cp.Problem(cp.Maximize(margin), [normal.numpy() @ x + of.constant.numpy() >= margin, of_size <= 1]).solve(solver=cp.CLARABEL)
        y, d = propose(region, of)
        if margin.value < -1e-6:
            excluded += 1
            assert y is not None
            assert excludes(region, of, y)
        elif margin.value > 1e-6:
            assert d is not None
            assert (of.constant + normal @ d > 0).all()
            assert torch.linalg.vector_norm(d, ord=p) <= 1
    assert 10 <= excluded <= 50


@pytest.mark.parametrize("q", [1, 2])
def test_wrong_proposals_cost_tightness_and_nothing_else(monkeypatch: pytest.MonkeyPatch, q: int) -> None:
    activation, seed, sizes, eps, box_l1, box_l2, _ = EXACT[3]
    net, center = random_net(activation, seed, sizes)
    rng = torch.Generator().manual_seed(2)
    exact = np.array(box_l1 if q == 1 else box_l2)

    def wrong(region: Region, of: HalfSpaces) -> tuple[Tensor, Tensor]:
        y, _ = propose(region, of)
        noise = torch.rand(len(of.constant), generator=rng, dtype=torch.float64)
        return noise if y is None else y.flip(0) + 1e-3 * noise, into(region, 9 * torch.randn(len(region.center), generator=rng, dtype=torch.float64))

    monkeypatch.setattr(bab, "propose", wrong)
    found = solve(net, ball(center, eps, math.inf), q, 3, seconds=5)
    assert (found.upper.numpy() >= exact * (1 - 1e-11)).all()
    assert (found.lower.numpy() <= exact * (1 + 1e-11)).all()


def test_trusting_a_solver_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: nodes pruned on the word of the wrong proposals give a number below the truth."""
    activation, seed, sizes, eps, box_l1, _, _ = EXACT[3]
    net, center = random_net(activation, seed, sizes)
    monkeypatch.setattr(bab, "excludes", lambda region, of, y: True)
    monkeypatch.setattr(bab._Examples, "lie_in", lambda self, nodes: torch.zeros(len(nodes), dtype=torch.bool))
    monkeypatch.setattr(bab._Examples, "largest", lambda self, row, q: 0.0)
    assert (solve(net, ball(center, eps, math.inf), 1, 3).upper.numpy() < np.array(box_l1) * 0.999).any()


@pytest.mark.parametrize("name", ["relu", "maxmin", "groupsort", "folds", "clamps", "sandwich", "residual", "max pools", "batch norm"])
def test_every_kind_of_layer_between_what_was_seen_and_what_was_bounded(name: str) -> None:
    net, shape = network(name)
    center = torch.randn(shape, dtype=torch.float64)
    program = Program.of(lipnet.freeze(net), shape)
    for p, q in ((math.inf, 1), (2, 2)):
        region = Region.of(certify.Ball(center.numpy(), 0.05 if name in ("max pools", "batch norm") else 0.15, p), center.numel())
        rows = torch.eye(3, dtype=torch.float64)[:1]
        root = bound_jacobian(condense(program, region, rows)).row_norms(q)
        found = complete(program, region, rows, q, seconds=30.0 if len(shape) == 1 else 0.5)
        seen = jacobians(net, points(center, 0.05 if len(shape) > 1 else 0.15, p, 60))[:, :1]
        assert float(torch.linalg.vector_norm(seen, ord=q, dim=2).max()) <= float(found.upper) + 1e-8
        assert (found.lower <= found.upper).all()
        assert (found.upper <= root).all()
        if len(shape) == 1:
            assert found.done


def test_ties_zeros_and_points() -> None:
    """Gates that are equal everywhere, or never anything but 0, on regions with empty interior: what is found is not below the slopes.

    Gates that only exact arithmetic knows to be equal are decided apart; the bound then stays above the constant, and says so.
    """
    rng = np.random.default_rng(4)
    doubled = np.repeat(rng.standard_normal((3, 2)), 2, axis=0)
    pairs = nn.Sequential(
        linear(doubled, np.zeros(6)), lipnet.MaxMin(), linear(rng.standard_normal((4, 6)), np.zeros(4)), nn.ReLU(), linear(rng.standard_normal((1, 4)), [0.0])
    )
    twins = nn.Sequential(
        linear([[1.0, 2.0]] * 3, [0.0] * 3), nn.ReLU(), linear([[1.0, -1.0, 3.0], [0.0, 0.0, 0.0]], [0.0, 0.0]), nn.ReLU(), linear([[1.0, 1.0]], [0.0])
    )
    ends = nn.Sequential(linear([[1.0], [-2.0]], [0.0, 0.5]), nn.ReLU(), linear([[1.0, 1.0]], [0.0]))
    for net, inputs, exact in ((pairs, 2, None), (twins, 2, None), (ends, 1, 2.0)):
        for low, high in ((-1, 1), (0, 0), (0, 1), ([-1] + [0] * (inputs - 1), [1] + [0] * (inputs - 1))):
            region = Region.of(certify.Box(np.broadcast_to(np.array(low, float), inputs).copy(), np.broadcast_to(np.array(high, float), inputs).copy()), inputs)
            found = solve(net.eval(), region, 1, 1, seconds=2)
            x = region.center + region.low + torch.rand(200, inputs, dtype=torch.float64) * (region.high - region.low)
            if low == -1:
                assert float(jacobians(net, x).abs().sum(2).max()) <= float(found.upper) * (1 + 1e-12)
            slopes = (net(x[:100]) - net(x[100:])).abs()[:, 0] / (x[:100] - x[100:]).abs().amax(1).clamp(min=1e-30)
            assert float(slopes.detach().max()) <= float(found.upper) * (1 + 1e-9)
            if net is twins and low == -1:
                assert 9 <= float(found.upper) <= 12 * (1 + 1e-9)
                assert float(found.lower) == pytest.approx(9, rel=1e-9)
                assert found.done == (float(found.upper) < 9.001)
            if exact is not None and low == -1:
                assert found.done
                assert float(found.upper) == pytest.approx(exact, rel=1e-9)


def test_numbers_beyond_float64_are_refused() -> None:
    net, center = random_net("relu", 0, (3, 6, 6, 2))
    net[0].weight.data *= 1e100
    net[2].weight.data *= 1e100
    with pytest.raises(certify.CertifyError, match="float64 cannot follow"):  # the squares of its gradients overflow
        solve(net, ball(center, 0.5, 2), 2, 2, seconds=1)


def test_what_time_and_interrupts_leave_is_proved() -> None:
    activation, seed, sizes, eps, box_l1, _, _ = EXACT[4]
    net, center = random_net(activation, seed, sizes)
    region = ball(center, eps, math.inf)
    root = bound_jacobian(condense(Program.of(net, (8,)), region, torch.eye(3, dtype=torch.float64))).row_norms(1)
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 3:
            raise KeyboardInterrupt

    for found in (solve(net, region, 1, 3, seconds=0), solve(net, region, 1, 3, report=stop)):
        assert not found.done
        assert (found.upper <= root).all()
        assert (found.upper.numpy() >= np.array(box_l1)).all()
    assert [progress.upper for progress in seen] == sorted((progress.upper for progress in seen), reverse=True)
    assert seen[-1].nodes > seen[0].nodes > 0


def test_the_method_says_what_it_found_and_refuses_smooth_gates() -> None:
    activation, seed, sizes, eps, box_l1, _, _ = EXACT[0]
    net, center = random_net(activation, seed, sizes)
    domain = certify.Ball(center, eps, math.inf)
    bound = certify.lipschitz(net, certify.Local(how="complete"), input_shape=(3,), domain=domain)
    assert bound.value == pytest.approx(max(box_l1), rel=1e-6)
    assert bound.value < certify.lipschitz(net, certify.Local(how="crown"), input_shape=(3,), domain=domain).value
    assert bound.evidence["done"]
    assert bound.evidence["nodes"] > 0
    assert bound.evidence["lower"] <= bound.value
    smooth, shape = network("smooth")
    with pytest.raises(certify.CertifyError, match="take how='crown'"):
        certify.lipschitz(smooth, certify.Local(how="complete"), input_shape=shape, domain=certify.Ball(np.zeros(6), 1.0))
    with pytest.raises(certify.CertifyError, match="how is one of"):
        certify.Local(how="exact")
    with pytest.raises(certify.CertifyError, match="seconds is a positive number"):
        certify.Local(how="complete", seconds=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_slack_that_is_made_smaller_is_that_of_each_row_and_holds_in_every_node(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """What is made anew belongs to the rows of the region, of which there are not as many as nodes."""
    monkeypatch.setattr("certify.local.clarke._MUCH", 0.0)
    activation, seed, sizes, eps, box_l1, _, _ = EXACT[2]
    net, center = random_net(activation, seed, sizes)
    region = ball(center, eps, math.inf)
    condensed = condense(Program.of(net, (len(center),)), region, torch.eye(3, dtype=torch.float64)[:rows])
    assert (bound_jacobian(condensed).condensed.slack_gates <= condensed.slack_gates).all()
    found = bab.search(condensed, 1)
    assert found.done
    assert found.upper.numpy() == pytest.approx(box_l1[:rows], rel=1e-6)


def test_deep_sorting_networks_are_searched() -> None:
    """Ten orthogonal layers, whose slack has to be made smaller: the constants are 1."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(10):
        Q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
        layers += [linear(Q.numpy(), 0.1 * torch.randn(8, dtype=torch.float64).numpy()), lipnet.MaxMin()]
    Q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    net = nn.Sequential(*layers, linear(Q[:2].numpy(), np.zeros(2))).eval()
    region = ball(np.random.default_rng(1).standard_normal(8), 0.2, 2)
    root = bound_jacobian(condense(Program.of(net, (8,)), region, torch.eye(2, dtype=torch.float64))).row_norms(2)
    found = solve(net, region, 2, 2, seconds=0.5)
    assert (found.lower >= 1 - 1e-6).all()
    assert (found.upper >= 1 - 1e-12).all()
    assert (found.upper <= root).all()  # by how much depends on the machine
