"""The semidefinite relaxation of ReLU networks: what it proves is below the exact minimum, whatever the multipliers, and near it when they are good."""

import copy
import dataclasses
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import certify
import certify.lowrank
import lipnet
from certify.cli import main
from certify.errors import CertifyError, Unsupported
from certify.graph import Graph
from certify.lowrank import LowRank, relu_network
from sdp.lowrank import memory, propose
from sdp.lowrank_proof import Multipliers, prove_margin
from sdp.ranged import Ranged
from sdp.relaxation import Affine, Region, ReLUNetwork, relax

NORMS = (2.0, math.inf)


def network(sizes, seed, gain=1.3, bias=0.3):
    rng = np.random.default_rng(seed)
    weights = [gain * rng.standard_normal((b, a)) / math.sqrt(a) for a, b in itertools.pairwise(sizes)]
    return ReLUNetwork.of(weights, [bias * rng.standard_normal(b) for b in sizes[1:]])


def region_of(seed, inputs, norm, boxed=False):
    rng = np.random.default_rng(seed)
    center = rng.uniform(size=inputs)
    sides = (center - rng.uniform(size=inputs), center + rng.uniform(size=inputs)) if boxed else (None, None)
    return Region(center, float(rng.uniform(0.05, 0.8)), norm, *sides)


def points(region, count, seed):
    """Inputs in the region, most of them on its boundary."""
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((count, len(region.center)))
    if region.norm == 2:
        e *= region.radius / np.linalg.norm(e, axis=1, keepdims=True)
        e[::4] *= rng.uniform(size=(len(e[::4]), 1))
    else:
        e = region.radius * np.where(rng.uniform(size=e.shape) < 0.8, np.sign(e), rng.uniform(-1, 1, size=e.shape))
    e *= 1 - 1e-12
    return region.center + np.clip(e, *region.sides)


def descent(net, row, region, seed, steps=40):
    """The smallest value that projected gradient steps find."""
    x = points(region, 30, seed)
    best = math.inf
    for step in range(steps):
        z, rows, active = (x - net.shift) / net.divisor, [], []
        for affine in net.steps:
            z = z @ affine.weight.T + affine.bias
            active.append((z > 0) | (not affine.relu))
            z = np.where(active[-1], z, 0.0)
        best = min(best, float((z @ row).min()))
        rows = np.broadcast_to(row, z.shape)
        for affine, on in zip(reversed(net.steps), reversed(active), strict=True):
            rows = (rows * on) @ affine.weight
        rows = rows / net.divisor
        size = region.radius * (0.5 if step < 25 else 0.05)
        e = x - region.center
        if region.norm == 2:
            e = e - size * rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-300)
            e *= np.minimum(1, region.radius * (1 - 1e-12) / (np.linalg.norm(e, axis=1, keepdims=True) + 1e-300))
        else:
            e = np.clip(e - size * np.sign(rows), -region.radius, region.radius)
        x = region.center + np.clip(e, *region.sides)
    return best


def by_patterns(net, row, region):
    """The exact minimum in the maximum norm: a linear program for each pattern of a network with one hidden layer."""
    (first, last), best = net.steps, math.inf
    low, high = region.sides
    for pattern in itertools.product([0.0, 1.0], repeat=len(first.bias)):
        on = np.array(pattern)
        cost = (row @ last.weight * on) @ first.weight
        side = (1 - 2 * on)[:, None]
        limits = (-(side[:, 0]) * first.bias) + 1e-9
        found = scipy.optimize.linprog(cost, side * first.weight, limits, bounds=list(zip(region.center + low, region.center + high, strict=True)))
        if found.status == 0:
            best = min(best, found.fun + float((row @ last.weight * on) @ first.bias + row @ last.bias))
    return best


def random_multipliers(relaxation, rng):
    """Of any size, with zeros among them."""

    def some(count):
        return np.abs(rng.standard_normal(count)) * 10.0 ** rng.uniform(-3, 2) * (rng.uniform(size=count) < 0.8)

    count, inputs = relaxation.unstable, len(relaxation.region.center)
    positive, above, chord, product, square = (some(count) for _ in range(5))
    ball = float(rng.uniform(0.1, 10)) if relaxation.region.norm == 2 else 0.0
    return Multipliers(positive, above, chord, product * rng.choice([-1, 1], size=count), square, ball, some(inputs) + (0.0 if ball else 0.1))


def solved(net, region, row, **options):
    relaxation = relax(net, region)
    combined = Ranged.exact(row) @ relaxation.rows, Ranged.exact(row) @ relaxation.offset
    proposal = propose(relaxation, *combined, **options)
    return relaxation, combined, proposal


def random_case(seed):
    rng = np.random.default_rng(seed)
    sizes = (int(rng.integers(1, 5)), *(int(k) for k in rng.integers(1, 7, size=rng.integers(1, 4))), 2)
    net = network(sizes, seed, gain=float(rng.uniform(0.5, 2.5)), bias=float(rng.uniform(0, 1)))
    return net, region_of(seed, sizes[0], NORMS[seed % 2], boxed=seed % 3 == 0), rng.standard_normal(2), rng


@pytest.mark.parametrize("block", range(6))
def test_no_bound_is_above_a_value_whatever_the_multipliers(block):
    for seed in range(50 * block, 50 * block + 50):
        net, region, row, rng = random_case(seed)
        relaxation = relax(net, region)
        combined = Ranged.exact(row) @ relaxation.rows, Ranged.exact(row) @ relaxation.offset
        least = min(descent(net, row, region, seed), float((net(points(region, 500, seed)) @ row).min()))
        bounds = [float(relaxation.smallest(combined[0][None], combined[1][None])[0])]
        bounds += [prove_margin(relaxation, *combined, random_multipliers(relaxation, rng)) for _ in range(2)]
        good = propose(relaxation, *combined).multipliers
        bounds.append(prove_margin(relaxation, *combined, good))
        changed = dataclasses.replace(good, product=good.product * rng.uniform(0.9, 1.1, size=len(good.product)))
        bounds.append(prove_margin(relaxation, *combined, changed))
        assert max(bounds) <= least + 1e-9 * (1 + abs(least)), (seed, bounds, least)
        assert bounds[3] >= bounds[0] - 1e-4 * (1 + abs(bounds[0])), (seed, bounds)  # lines are among the multipliers


@pytest.mark.parametrize("seed", range(6))
def test_bounds_are_near_the_exact_minimum_of_small_networks(seed):
    net, row = network((3, 5, 2), seed), np.array([1.0, -1.0])
    region = region_of(seed, 3, math.inf, boxed=seed % 2 == 0)
    relaxation, combined, proposal = solved(net, region, row)
    exact = by_patterns(net, row, region)
    bound = prove_margin(relaxation, *combined, proposal.multipliers)
    assert bound <= exact + 1e-9
    assert bound >= exact - 0.1 * (1 + abs(exact))


def test_the_known_minimum_of_the_relaxation_is_met():
    rng = np.random.default_rng(4)
    first, second = (rng.standard_normal((10, inputs)) / math.sqrt(inputs) * 1.3 for inputs in (6, 10))
    biases = [0.3 * rng.standard_normal(10) for _ in range(2)]
    row, center = rng.standard_normal(10), rng.uniform(size=6)
    net = ReLUNetwork.of([first, second, row[None]], [*biases, np.zeros(1)])
    relaxation, combined, proposal = solved(net, Region(center, 0.5), np.ones(1), accuracy=1e-7)
    bound = prove_margin(relaxation, *combined, proposal.multipliers)
    assert -2.722505 - 1e-5 < bound < -2.722504  # 2.722505: the relaxation by another solver, and the best attack
    assert proposal.lower - 1e-6 <= bound <= proposal.upper + 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_another_solver_finds_the_same_minimum(norm):
    cp = pytest.importorskip("cvxpy")
    net, row = network((3, 5, 4, 2), 3), np.array([1.0, -1.0])
    region = region_of(5, 3, norm)
    relaxation, combined, proposal = solved(net, region, row, accuracy=1e-8)
    signals, inputs = combined[0].value.shape[0], 3
    whole = cp.Variable((1 + signals, 1 + signals), PSD=True)
    s, squares = whole[0, 1:], cp.diag(whole[1:, 1:])
    low, high = region.sides
    constraints = [whole[0, 0] == 1]
    if norm == 2:
        constraints.append(cp.sum(squares[:inputs]) <= region.radius**2)
    else:
        constraints.append(squares[:inputs] <= cp.multiply(low + high, s[:inputs]) - low * high)
    at = inputs
    for layer in relaxation.layers:
        place, before = slice(at, at + len(layer.lower)), layer.rows.value.shape[1]
        a, v = s[place], layer.rows.value @ s[:before] + layer.offset.value
        products = cp.sum(cp.multiply(layer.rows.value.T, whole[1 : 1 + before, 1 + at : 1 + place.stop]), axis=0) + cp.multiply(layer.offset.value, a)
        constraints += [
            a >= 0,
            a >= v,
            a <= cp.multiply(layer.slope, v - layer.lower),
            squares[place] == products,
            squares[place] <= cp.multiply(layer.upper, a),
        ]
        at = place.stop
    value = cp.Problem(cp.Minimize(combined[0].value @ s), constraints).solve(solver="CLARABEL") + float(combined[1].value)
    assert prove_margin(relaxation, *combined, proposal.multipliers) == pytest.approx(value, abs=1e-5)


def exact_value(net, row, x):
    """In rational numbers."""
    z = [(Fraction(float(v)) - Fraction(float(m))) / Fraction(float(d)) for v, m, d in zip(x, net.shift, net.divisor, strict=True)]
    for step in net.steps:
        z = [
            sum((Fraction(float(w)) * v for w, v in zip(weights, z, strict=True)), Fraction(float(b)))
            for weights, b in zip(step.weight, step.bias, strict=True)
        ]
        z = [max(v, Fraction(0)) for v in z] if step.relu else z
    return sum(Fraction(float(r)) * v for r, v in zip(row, z, strict=True))


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("norm", NORMS)
def test_cancellation_does_not_lift_a_bound_above_an_exact_value(norm, scale):
    rng = np.random.default_rng(int(math.log10(scale)))
    for _ in range(5):
        twice = rng.standard_normal((3, 2))
        hidden = np.vstack([twice, twice])  # two copies, whose difference is rounding alone
        last = np.concatenate([scale * np.ones(3), -scale * np.ones(3)])[None] + rng.standard_normal((1, 6))
        biases = np.tile(rng.standard_normal(3) + scale / 3, 2)
        net = ReLUNetwork((Affine(hidden, biases, True), Affine(last, np.array([1 / 3]), False)), np.full(2, 0.1), np.full(2, 0.3))
        region, row = Region(rng.uniform(size=2), 0.1, norm), np.array([1.0])
        relaxation = relax(net, region)
        combined = relaxation.rows[0], relaxation.offset[0]
        least = min(exact_value(net, row, x) for x in points(region, 40, 0))
        for multipliers in (random_multipliers(relaxation, rng), propose(relaxation, *combined).multipliers):
            bound = prove_margin(relaxation, *combined, multipliers)
            assert bound == -math.inf or Fraction(bound) <= least
        assert Fraction(float(relaxation.smallest(combined[0][None], combined[1][None])[0])) <= least


@pytest.mark.parametrize("seed", range(40))
def test_numbers_of_any_size_are_refused_or_bounded(seed):
    rng = np.random.default_rng(seed + 10_000)
    sizes = (int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(1, 5)), 1)
    far = seed % 4 * 50 + 1
    weights = [rng.standard_normal((b, a)) * 10.0 ** rng.integers(-far, far + 1) for a, b in itertools.pairwise(sizes)]
    plain = ReLUNetwork.of(weights, [rng.standard_normal(b) * 10.0 ** rng.integers(-far, far + 1) for b in sizes[1:]])
    net = dataclasses.replace(plain, shift=rng.standard_normal(sizes[0]), divisor=10.0 ** rng.uniform(-20, 20, size=sizes[0]))
    region = Region(rng.standard_normal(sizes[0]), float(10.0 ** rng.uniform(-12, 6)), NORMS[seed % 2])
    try:
        relaxation = relax(net, region)
    except ValueError:  # refused: the numbers are too large
        return
    combined = relaxation.rows[0], relaxation.offset[0]
    moves = (1 - 1e-9) * region.radius * rng.uniform(-1, 1, size=(20, sizes[0])) / math.sqrt(sizes[0])
    moved = (region.center + moves)[np.abs((region.center + moves) - region.center).max(axis=1) <= region.radius / math.sqrt(sizes[0]) * (1 - 1e-10)]
    least = min(exact_value(net, np.ones(1), x) for x in (region.center, *moved))
    bounds = [float(relaxation.smallest(combined[0][None], combined[1][None])[0])]
    for multipliers in (random_multipliers(relaxation, rng), propose(relaxation, *combined, steps=40).multipliers):
        bounds.append(prove_margin(relaxation, *combined, multipliers))
    assert all(bound == -math.inf or Fraction(bound) <= least for bound in bounds), (bounds, float(least))


def test_linear_networks_are_bounded_to_the_last_digits():
    for norm, dual in ((2.0, 2), (math.inf, 1)):
        net = network((4, 3, 2), 1, bias=50.0)  # every neuron is stable
        region, row = Region(np.zeros(4), 0.5, norm), np.array([1.0, -1.0])
        relaxation, combined, _ = solved(net, region, row)
        assert relaxation.unstable == 0
        first, last = net.steps
        on = (first.bias > 0).astype(float)
        slope = (row @ last.weight * on) @ first.weight
        exact = (row @ last.weight * on) @ first.bias + row @ last.bias - 0.5 * np.linalg.norm(slope, dual)
        bound = float(relaxation.smallest(combined[0][None], combined[1][None])[0])
        assert exact - 1e-10 < bound <= exact + 1e-12


def fractions(array):
    return np.vectorize(lambda value: Fraction(float(value)), otypes=[object])(array)


OPERATIONS = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "subtract": (lambda a, b: a - b, lambda a, b: a - b),
    "multiply": (lambda a, b: a * b, lambda a, b: a * b),
    "matmul": (lambda a, b: a @ b, lambda a, b: a @ b),
    "divide": (lambda a, b: a * (b * b).reciprocal(), lambda a, b: a / (b * b)),
    "chain": (lambda a, b: (a @ b - b) * a @ b, lambda a, b: (a @ b - b) * a @ b),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_their_rounding(name):
    ranged, exact = OPERATIONS[name]
    rng = np.random.default_rng(0)
    for _ in range(20):
        arrays = [rng.standard_normal((3, 3)) * 10.0 ** rng.integers(-3, 3, size=(3, 3)) for _ in range(2)]
        found, true = ranged(*map(Ranged.exact, arrays)), exact(*map(fractions, arrays))
        assert (abs(fractions(found.value) - true) <= fractions(found.error)).all()
        assert (fractions(found.low) <= true).all()
        assert (true <= fractions(found.high)).all()
        assert (found.error <= 1e-12 * (1e6 + np.abs(found.value))).all()
        wide = [Ranged(array * (1 + 1e-3 * rng.uniform(-1, 1, size=array.shape)), 2e-3 * np.abs(array)) for array in arrays]  # they hold the arrays
        found = ranged(*wide)
        assert (abs(fractions(found.value) - true) <= fractions(found.error)).all()


def test_what_may_be_zero_has_no_reciprocal():
    found = Ranged(np.array([1.0, 1e-3, 0.0, -1.0]), np.array([0.0, 1e-3, 0.0, 0.0])).reciprocal()
    assert found.error[0] < 1e-15
    assert (found.error[1:] == math.inf).all()


def test_multipliers_that_are_none_are_refused():
    net, region, row = network((3, 6, 2), 0), Region(np.full(3, 0.5), 0.5), np.array([1.0, -1.0])
    relaxation, combined, proposal = solved(net, region, row)
    good = proposal.multipliers
    assert relaxation.unstable > 1
    changes = [
        {"positive": good.positive[:-1]}, {"above": -good.above - 1}, {"chord": good.chord * math.nan}, {"product": good.product + math.inf},
        {"square": good.square.astype(np.float32)}, {"ball": -1.0}, {"ball": math.nan}, {"sides": np.full(3, -1e-300)}, {"sides": np.zeros(4)},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(ValueError, match="multiplier"):
            prove_margin(relaxation, *combined, dataclasses.replace(good, **change))
    box = solved(net, Region(region.center, 0.5, math.inf), row)
    with pytest.raises(ValueError, match="must be 0 in the maximum norm"):
        prove_margin(box[0], *box[1], dataclasses.replace(box[2].multipliers, ball=1.0))
    assert prove_margin(relaxation, *combined, dataclasses.replace(good, ball=0.0)) == -math.inf  # nothing holds e


def test_a_proof_is_of_the_network_it_is_given():
    net, region, row = network((3, 6, 2), 0), Region(np.full(3, 0.5), 0.5), np.array([1.0, -1.0])
    relaxation, combined, proposal = solved(net, region, row)
    bound = prove_margin(relaxation, *combined, proposal.multipliers)
    weight = net.steps[0].weight.copy()
    rng = np.random.default_rng(0)
    for _ in range(20):
        changed = weight + 0.2 * rng.standard_normal(weight.shape)
        other = dataclasses.replace(net, steps=(dataclasses.replace(net.steps[0], weight=changed), net.steps[1]))
        relaxation = relax(other, region)
        if relaxation.unstable != len(proposal.multipliers.above):
            continue
        combined = Ranged.exact(row) @ relaxation.rows, Ranged.exact(row) @ relaxation.offset
        found = prove_margin(relaxation, *combined, proposal.multipliers)
        assert found != bound
        assert found <= descent(other, row, region, 0) + 1e-9


def test_what_is_no_network_or_region_is_refused():
    one = np.ones((1, 1)), np.ones(1)
    for weights, biases, match in (
        ([np.ones((2, 3)), np.ones((1, 3))], [np.ones(2), np.ones(1)], "step 1"),
        ([np.ones((2, 3))], [np.ones(3)], "step 0"),
        ([np.full((1, 1), math.nan)], [np.ones(1)], "finite"),
        ([np.ones((1, 1), dtype=np.float32)], [np.ones(1)], "float64"),
    ):
        with pytest.raises(ValueError, match=match):
            ReLUNetwork.of(weights, biases)
    with pytest.raises(ValueError, match="positive"):
        ReLUNetwork((Affine(*one, False),), np.zeros(1), np.zeros(1))
    for arguments in ((np.zeros(2), -1.0), (np.zeros(2), math.nan), (np.array([math.inf]), 1.0), (np.zeros(2), 1.0, 1.0)):
        with pytest.raises(ValueError, match="Region"):
            Region(*arguments)
    with pytest.raises(ValueError, match="between low and high"):
        Region(np.zeros(2), 1.0, 2.0, np.ones(2), np.full(2, 2.0))
    with pytest.raises(ValueError, match="no finite bounds"):
        relax(ReLUNetwork.of([np.full((2, 2), 1e308)] * 2, [np.zeros(2)] * 2), Region(np.ones(2), 1.0))


def digits_net(hidden=(16, 16), normalize=True):
    torch.manual_seed(0)
    layers = [lipnet.Normalize([0.3], [0.4])] if normalize else []
    layers.append(nn.Flatten())
    sizes = (64, *hidden, 10)
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    data = certify.data.digits("train")
    x, y = torch.from_numpy(data.inputs).reshape(-1, 1, 8, 8), torch.from_numpy(data.labels)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def trained():
    data = certify.data.digits("test")
    return digits_net(), torch.from_numpy(data.inputs).reshape(-1, 1, 8, 8)


def attack_distance(net, x, norm, radius):
    """The distance of the nearest input of another class that gradient steps find, in float64."""
    net, x = net.double(), x.double()
    label, best = int(net(x[None]).argmax()), math.inf
    for factor in (1.05, 1.2, 1.5, 2.0, 3.0):
        e = torch.zeros(10, *x.shape, dtype=torch.float64)
        for step in range(40):
            e.requires_grad_(True)
            z = net(x + e)
            other = torch.tensor([j if j != label else (label + 1) % 10 for j in range(10)])
            (g,) = torch.autograd.grad((z[:, label] - z[torch.arange(10), other]).sum(), e)
            with torch.no_grad():
                for k in np.flatnonzero((z.argmax(1) != label).numpy()):
                    best = min(best, float(e[k].norm() if norm == 2 else e[k].abs().max()))
                size = factor * radius * (0.3 if step < 20 else 0.05)
                if norm == 2:
                    e = e - size * g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 1e-30)
                    e = e * (factor * radius / (e.flatten(1).norm(dim=1)[:, None, None, None] + 1e-30)).clamp(max=1)
                else:
                    e = (e - size * g.sign()).clamp(-factor * radius, factor * radius)
    return best


@pytest.mark.parametrize("norm", NORMS)
def test_radii_are_below_the_distance_of_every_attack_and_near_it(trained, norm):
    net, images = trained
    certificate = certify.robustness(net, images[:3], LowRank(norm=norm, tolerance=0.05))
    assert certificate.norm == norm
    assert not certificate.abstained.any()
    for image, radius, prediction in zip(images, certificate.radius, certificate.prediction, strict=False):
        found = attack_distance(copy.deepcopy(net), image, norm, radius)
        assert 0 < radius <= found
        assert found < 1.6 * radius
        assert prediction == net(image[None]).argmax()
    margin = certify.robustness(net, images[:3], certify.Margin(certify.lipschitz(net, input_shape=(1, 8, 8))))
    assert norm != 2 or (certificate.radius > 1.2 * margin.radius).all()


def test_a_given_radius_is_proved_or_not(trained):
    net, images = trained
    searched = certify.robustness(net, images[:2], LowRank(tolerance=0.05)).radius
    for factor in (0.9, 1.3):
        asked = float(searched.min() * factor)
        found = certify.robustness(net, images[:2], LowRank(radius=asked))
        assert found.radius[int(searched.argmin())] == (math.nextafter(asked, math.inf) if factor < 1 else 0.0)
        assert found.certified(found.prediction, asked).any() or factor > 1
    assert len(certify.robustness(net, images[:0], LowRank(radius=0.1))) == 0


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x.flatten(1))))


class Skip(Chain):
    def forward(self, x):
        return self.second(torch.relu(self.first(x)) + self.first(x))


class Early(Chain):
    def forward(self, x):
        h = torch.relu(self.first(x))
        self.second(h)
        return h


def test_networks_are_seen_as_they_run():
    torch.manual_seed(0)
    nets = [
        Chain(),
        nn.Sequential(lipnet.Normalize([0.1, 0.2], [0.5, 2.0]), nn.Flatten(), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        nn.Sequential(lipnet.SandwichLinear(4, 6), nn.Identity(), nn.Dropout(0.5), nn.Linear(6, 3, bias=False), nn.ReLU()),
    ]
    for net, shape in zip(nets, ((4,), (2, 2, 2), (4,)), strict=True):
        net.eval()
        x = torch.randn(20, *shape, dtype=torch.float64)
        frozen = lipnet.freeze(net).double()
        seen = relu_network(Graph.of(net, shape))
        np.testing.assert_allclose(seen(x.flatten(1).numpy()), frozen(x).detach().numpy(), rtol=1e-9, atol=1e-12)


def test_other_networks_are_refused_by_name():
    for net, shape, match in (
        (nn.Sequential(nn.Linear(4, 4), lipnet.MaxMin(), nn.Linear(4, 2)), (4,), "MaxMin at 1"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), (1, 4, 4), "Conv2d at 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), (4,), "Tanh at 1"),
        (nn.Sequential(nn.Linear(4, 4), lipnet.Normalize([0.0], [1.0])), (4,), "first layer only"),
        (Skip(), (4,), "not part of one chain"),
        (Early(), (4,), "not the end of the chain"),
        (nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.Linear(4, 2)), (2, 2), "acts on more than vectors"),
        (nn.Sequential(nn.Flatten()), (4,), "no linear layer"),
    ):
        with pytest.raises(CertifyError, match=match):
            certify.robustness(net.eval(), torch.rand(1, *shape), LowRank(radius=0.1))
    with pytest.raises(Unsupported, match="training mode"):
        certify.robustness(nn.Sequential(nn.Linear(4, 2)), torch.rand(1, 4), LowRank(radius=0.1))


def test_bad_options_and_sizes_are_refused(trained):
    net, images = trained
    for options in ({"norm": 1}, {"radius": -1.0}, {"radius": math.inf}, {"tolerance": 0.0}, {"accuracy": 2.0}, {"memory": 0.0}):
        with pytest.raises(CertifyError):
            LowRank(**options)
    with pytest.raises(CertifyError, match="the solver needs about"):
        certify.robustness(net, images[:1], LowRank(radius=2.0, memory=1e-6))
    small = certify.robustness(net, images[:1], LowRank(memory=1e-6)).radius  # what lines alone prove
    assert 0 < small[0] < certify.robustness(net, images[:1], LowRank(tolerance=0.05)).radius[0]
    assert memory(relax(relu_network(Graph.of(net, (1, 8, 8))), Region(np.zeros(64), 1.0))) > 0


@pytest.mark.parametrize("reach", [[math.inf, 1.0, 2.0], [math.inf, 2.0, 1.0], [math.inf] * 3, [math.inf, 3e3, 1e3]])
@pytest.mark.parametrize("norm", NORMS)
def test_every_class_counts_wherever_the_search_begins(monkeypatch, reach, norm):
    net = nn.Sequential(nn.Linear(2, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
        net[0].bias.copy_(torch.tensor([7.0, 0.0, 0.0]))
    monkeypatch.setattr(certify.lowrank, "_reach", lambda *_: np.array(reach))
    exact = 0.7 if norm == 2 else 0.5  # 7 / |(6, 8)|, of the second rival
    found = certify.robustness(net, torch.zeros(1, 2), LowRank(norm=norm))
    assert exact / 1.01 * (1 - 1e-12) <= found.radius[0] < exact
    for radius in (0.99 * exact, 1.01 * exact):
        found = certify.robustness(net, torch.zeros(1, 2), LowRank(radius=radius, norm=norm))
        assert found.radius[0] == (math.nextafter(radius, math.inf) if radius < exact else 0.0)


def test_logits_that_are_not_finite_and_ties_have_no_radius():
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.ones(2, 2))
        net[0].bias.zero_()
    found = certify.robustness(net, torch.ones(1, 2), LowRank())
    assert found.radius[0] == 0
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([1.0, 0.0]))
    assert certify.robustness(net, torch.ones(1, 2), LowRank(radius=5.0)).radius[0] > 5  # no input changes this margin


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("lowrank") / "small.safetensors"
    net = nn.Sequential(lipnet.Normalize([0.3], [0.4]), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    net.load_state_dict(dict(zip(net.state_dict(), digits_net((12,)).state_dict().values(), strict=True)))
    lipnet.save(net, path, input_shape=(1, 8, 8), input_range=(0.0, 1.0))
    return str(path)


def stored(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_run_can_be_stopped_reported_and_checked(model, tmp_path, capsys):
    run = ["run", model, "digits", "--method", "lowrank", "--limit", "5"]
    assert main([*run, "-o", str(tmp_path / "a")]) == 0
    assert main([*run, "-o", str(tmp_path / "b"), "--shard", "0/2"]) == 0
    assert main([*run, "-o", str(tmp_path / "b")]) == 0
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    assert all(row["guarantee"] == "proof" and row["norm"] == "2" for row in stored(tmp_path / "a"))
    assert max(row["radius"] for row in stored(tmp_path / "a")) > 0.1
    assert main([*run, "-o", str(tmp_path / "b"), "--radius", "0.1"]) == 2
    assert "started with method" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "a"), "--html", str(tmp_path / "r.html")]) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path / "a")]) == 0
    assert "5 rows proved again" in capsys.readouterr().out


def test_a_run_at_a_radius_counts_at_that_radius(model, tmp_path, capsys):
    assert (
        main(
            [
                "run",
                model,
                "digits",
                "--method",
                "lowrank",
                "--norm",
                "inf",
                "--radius",
                "0.01",
                "--limit",
                "5",
                "--eps",
                "0.01",
                "--json",
                "-o",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    (summary,) = json.loads(capsys.readouterr().out)["runs"]
    rows = stored(tmp_path / "a")
    assert summary["certified"][0] == sum(row["radius"] > 0.01 and row["status"] == "certified" for row in rows) / 5 > 0
    assert {row["radius"] for row in rows} <= {0.0, math.nextafter(0.01, 1)}
    assert main(["check", str(tmp_path / "a")]) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"radius": 10.0}, "the proof does not reach it"),
        ({"radius": math.inf}, "no proof gives"),
        ({"radius": None}, "no proof gives"),
        ({"radius": -1.0}, "no proof gives"),
        ({"prediction": 11}, "prediction is stored as 11"),
        ({"label": 11}, "label is stored as 11"),
        ({"status": "maybe"}, "status is stored as"),
        ({"norm": "inf"}, "norm is stored as"),
        ({"guarantee": "probabilistic"}, "guarantee is stored as"),
        ({"margin": 1e3}, "the margin is stored as 1000.0"),
        ({"index": 300}, "not among those"),
    ],
)
def test_check_finds_changed_rows(model, tmp_path, capsys, change, match):
    assert main(["run", model, "digits", "--method", "lowrank", "--limit", "2", "--radius", "0.1", "-o", str(tmp_path / "a")]) == 0
    (part,) = (tmp_path / "a").glob("part-*")
    first, second = (json.loads(line) for line in part.read_text().splitlines())
    part.write_text(json.dumps({**first, **change}) + "\n" + json.dumps(second) + "\n")
    capsys.readouterr()
    assert main(["check", str(tmp_path / "a")]) == 4
    assert match in capsys.readouterr().out


def test_check_finds_a_changed_manifest(model, tmp_path, capsys):
    folder = tmp_path / "a"
    assert main(["run", model, "digits", "--method", "lowrank", "--limit", "1", "--radius", "0.1", "-o", str(folder)]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, code, match in (
        ({"norm": "inf"}, 4, "the manifest has norm"),
        ({"assumptions": []}, 4, "the manifest has assumptions"),
        ({"failure": 0.1}, 4, "the manifest has failure"),
        ({"method": "LowRank(radius=open('x'))"}, 2, "is not the printed form"),
        ({"method": "LowRank(radius=-1.0)"}, 2, "is not the printed form"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        capsys.readouterr()
        assert main(["check", str(folder)]) == code
        found = capsys.readouterr()
        assert match in found.out + found.err


def test_flags_of_other_methods_are_refused(model, tmp_path, capsys):
    assert main(["run", model, "digits", "-o", str(tmp_path / "a"), "--radius", "0.1"]) == 2
    assert "--radius is for --method local or lowrank" in capsys.readouterr().err
    assert main(["run", model, "digits", "-o", str(tmp_path / "a"), "--method", "lowrank", "--sigma", "0.1"]) == 2
    assert "--sigma is for --method smoothing" in capsys.readouterr().err
