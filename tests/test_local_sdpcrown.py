"""ReLUs in one ellipsoid: what a layer of them adds to a row is never above the bound, meets it where that is known, and each term of the bound is needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import certify
import lipnet
from certify.local import sdpcrown
from certify.local.alpha import tightened
from certify.local.condense import Condensed, condense
from certify.local.crown import upper_bounds
from certify.local.layer import Layer
from certify.local.program import Gate, Program
from certify.local.region import Region
from certify.local.sdpcrown import Ellipsoid
from sdp.activation import RELU
from tests.test_local_tight import stacked

DOUBLE = torch.float64


def condensed_of(net: nn.Module, inputs: int, radius: float, p: float = 2, within: tuple[float, float] | None = None) -> Condensed:
    program, region = (
        Program.of(lipnet.freeze(net), (inputs,)),
        Region.of(certify.Ball(torch.linspace(-0.9, 0.9, inputs, dtype=DOUBLE).numpy(), radius, p), inputs),
    )
    return condense(program, region if within is None else region.clipped(*within), torch.eye(program.outputs, dtype=DOUBLE))


def one_layer(inputs: Tensor, center: Tensor, radius: float) -> tuple[Layer, Ellipsoid]:
    """ReLUs of `center + inputs d`, with the ranges that they have in the ball."""
    reach = torch.linalg.vector_norm(inputs, dim=1) * radius * (1 + 2.0**-40) + 2.0**-400
    nothing = torch.zeros_like(center)
    earlier = torch.zeros(len(center), 0, dtype=DOUBLE)
    layer = Layer(Gate("relu", 0, RELU), torch.arange(len(center)), center, nothing, inputs, earlier, center.abs() + reach, center - reach, center + reach)
    ellipsoid = Ellipsoid.of([], layer, Region.of(certify.Ball(torch.zeros(inputs.shape[1], dtype=DOUBLE).numpy(), radius, 2), inputs.shape[1]))
    assert ellipsoid is not None
    return layer, ellipsoid


def bound(layer: Layer, ellipsoid: Ellipsoid, c: Tensor, slope: Tensor) -> Tensor:
    return ellipsoid.intercepts(layer.low, layer.high, c, slope)


def forward(condensed: Condensed, d: Tensor) -> list[Tensor]:
    """The inputs of each layer of gates."""
    p, found = torch.zeros(len(d), 0, dtype=DOUBLE), []
    for layer in condensed.layers:
        z = layer.center + d @ layer.inputs.T + p @ layer.earlier.T
        found.append(z)
        p = torch.cat([p, z.relu()], dim=1)
    return found


def in_ball(d: Tensor, region: Region) -> Tensor:
    d = torch.minimum(torch.maximum(d, region.low), region.high)
    return d * (region.radius / torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)


def highest(value: Callable[[Tensor], Tensor], region: Region, starts: int = 30, steps: int = 60) -> Tensor:
    """The largest of `value`, of each point and row, that steps along its gradient find in the region."""
    with torch.no_grad():
        rows = value(torch.zeros(1, len(region.center), dtype=DOUBLE)).shape[1]
        d = in_ball(torch.randn(starts * rows, len(region.center), dtype=DOUBLE) * region.radius, region)
    own = torch.arange(rows).repeat(starts)
    best = torch.full((rows,), -math.inf, dtype=DOUBLE)
    for step in range(steps):
        d = d.detach().requires_grad_(True)
        values = value(d).gather(1, own[:, None])[:, 0]
        (g,) = torch.autograd.grad(values.sum(), d)
        best = torch.maximum(best, values.detach().reshape(starts, rows).amax(0))
        pace = region.radius * (0.5 if step < steps // 2 else 0.05)
        d = in_ball(d.detach() + pace * g / torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp(min=1e-300), region)
    return best


NETS: list[tuple[str, tuple[int, ...], float]] = [
    ("relu", (4, 9, 9, 3), 0.7),
    ("relu", (12, 8, 8, 8, 3), 1.5),
    ("maxmin", (5, 10, 10, 3), 0.8),
    ("groupsort", (5, 8, 8, 3), 0.6),
    ("householder", (5, 8, 8, 3), 0.9),
    ("abs", (5, 8, 8, 3), 0.5),
]


@pytest.mark.parametrize(("activation", "dims", "radius"), NETS)
@pytest.mark.parametrize("within", [None, (-1.0, 1.0)])
def test_no_point_of_the_ball_is_above(activation: str, dims: tuple[int, ...], radius: float, within: tuple[float, float] | None) -> None:
    """Of any rows and slopes, in every layer, at points that are looked for; and the ranges that come of it."""
    torch.manual_seed(len(dims))
    condensed = condensed_of(stacked(activation, dims, 3), dims[0], radius, within=within)
    for k, layer in enumerate(condensed.layers):
        assert layer.ellipsoid is not None
        c = torch.randn(12, layer.count, dtype=DOUBLE) * (torch.rand(12, layer.count) < 0.7)
        slope = torch.cat([c[:6] * torch.rand(6, layer.count, dtype=DOUBLE), torch.randn(6, layer.count, dtype=DOUBLE)])

        def value(d: Tensor, k: int = k, c: Tensor = c, slope: Tensor = slope) -> Tensor:
            z = forward(condensed, d)[k]
            return z.relu() @ c.T - z @ slope.T

        found = highest(value, condensed.region)
        assert (found <= bound(layer, layer.ellipsoid, c, slope) * (1 + 1e-12) + 1e-12).all()
        ends = highest(lambda d, k=k: torch.cat([forward(condensed, d)[k], -forward(condensed, d)[k]], dim=1), condensed.region, 5)  # type: ignore[misc]
        assert (ends[: layer.count] <= layer.high + 1e-12).all()
        assert (-ends[layer.count :] >= layer.low - 1e-12).all()


def test_points_lie_in_the_ellipsoid_of_every_layer() -> None:
    """`sum v u^2 <= r^2` for any q, for points on the sphere."""
    condensed = condensed_of(stacked("relu", (4, 9, 9, 9, 3), 1), 4, 1.0)
    assert len(condensed.layers) == 3
    d = nn.functional.normalize(torch.randn(20_000, 4, dtype=DOUBLE))
    worst = []
    for layer, z in zip(condensed.layers, forward(condensed, d), strict=True):
        assert layer.ellipsoid is not None
        q = torch.rand(10, layer.count, dtype=DOUBLE) ** 3
        found = ((z - layer.ellipsoid.center) ** 2) @ (q / (q @ layer.ellipsoid.overlap)).T
        worst.append(float(found.max()))
        assert (found <= 1 + 1e-12).all()
    assert worst[0] > 0.3


def test_orthogonal_rows_are_met() -> None:
    """`relu(z) - z / 2 = |z| / 2`, whose sum is at most half the length of d, with rows of any length; gate by gate it is far larger."""
    torch.manual_seed(0)
    n, radius = 30, 0.7
    lengths = torch.rand(n, dtype=DOUBLE) * 5
    layer, ellipsoid = one_layer(torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE))[0] * lengths[:, None], torch.zeros(n, dtype=DOUBLE), radius)
    c = torch.rand(4, n, dtype=DOUBLE)
    exact = radius * torch.linalg.vector_norm(c * lengths, dim=1) / 2
    found = bound(layer, ellipsoid, c, c / 2)
    assert (found >= exact).all()
    assert (found <= exact * (1 + 1e-6)).all()
    assert ((c * lengths).sum(1) * radius / 2 > 3 * found).all()
    concave = bound(layer, ellipsoid, -c, -c / 2)  # -|z| / 2, largest at 0
    assert (concave.abs() < 1e-9).all()


def test_one_gate_and_copies_of_it_are_met() -> None:
    """Where all rows are one there is nothing to gain: what is convex is largest at an end of the range."""
    torch.manual_seed(1)
    for copies in (1, 7):
        row = torch.randn(3, dtype=DOUBLE)
        for center in (-0.3, 0.0, 0.2):
            layer, ellipsoid = one_layer(row.expand(copies, 3).contiguous(), torch.full((copies,), center, dtype=DOUBLE), 0.5)
            c = torch.rand(20, 1, dtype=DOUBLE)
            slope = c * torch.rand(20, 1, dtype=DOUBLE)
            z = center + torch.tensor([-0.5, 0.5], dtype=DOUBLE) * torch.linalg.vector_norm(row)
            exact = copies * (c * z.relu() - slope * z).amax(1)
            found = bound(layer, ellipsoid, c.expand(20, copies), slope.expand(20, copies))
            assert (found >= exact * (1 - 1e-15)).all()
            assert (found <= exact * (1 + 1e-6) + 1e-9).all()


def test_against_a_fine_grid_in_the_plane() -> None:
    """Rows in two inputs: the bound is within a third of the largest value among 100,000 points, and never below it."""
    torch.manual_seed(2)
    angle, length = torch.rand(2, 100_000, dtype=DOUBLE)
    d = 0.8 * length.sqrt()[:, None] * torch.stack([(2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()], dim=1)
    ratios = []
    for _ in range(10):
        layer, ellipsoid = one_layer(torch.randn(3, 2, dtype=DOUBLE), 0.2 * torch.randn(3, dtype=DOUBLE), 0.8)
        c = torch.rand(5, 3, dtype=DOUBLE)
        slope = c * torch.rand(3, dtype=DOUBLE)
        z = layer.center + d @ layer.inputs.T
        exact = (z.relu() @ c.T - z @ slope.T).amax(0)
        found = bound(layer, ellipsoid, c, slope)
        assert (found >= exact).all()
        ratios.append(found / exact)
    assert float(torch.cat(ratios).mean()) < 4 / 3


def test_in_fractions_the_largest_value_is_not_above() -> None:
    """Where the bound is met, at `d = r (3, 4) / 5`, with numbers that float64 rounds."""
    for exponent in (-99, -3, 0, 7, 90):
        scale, radius = math.ldexp(1 / 3, exponent), math.ldexp(0.7, -exponent)
        c = torch.tensor([[0.3, 0.4]], dtype=DOUBLE)
        layer, ellipsoid = one_layer(torch.eye(2, dtype=DOUBLE) * scale, torch.zeros(2, dtype=DOUBLE), radius)
        steps = [Fraction(number) * Fraction(radius) / 5 * Fraction(scale) for number in (3, 4)]
        exact = sum((Fraction(number) * step / 2 for number, step in zip(c[0].tolist(), steps, strict=True)), Fraction(0))
        found = bound(layer, ellipsoid, c, c / 2)
        assert Fraction(float(found)) >= exact
        assert float(found) <= float(exact) * (1 + 1e-6)


def test_in_fractions_large_terms_leave_no_gap() -> None:
    """Sums whose terms are a billion times the radius are wrong by more than what the gates can add, at `d = 0` already; and centers behind a layer are too."""
    torch.manual_seed(8)
    n = 40
    a = (torch.rand(n, dtype=DOUBLE) + 1) * 1e9
    layer, ellipsoid = one_layer(torch.randn(n, 3, dtype=DOUBLE), a, 1e-12)
    ellipsoid = dataclasses.replace(ellipsoid, slack=torch.zeros(n, dtype=DOUBLE))  # nothing was computed yet
    c, share = torch.randn(60, n, dtype=DOUBLE), torch.rand(60, n, dtype=DOUBLE)
    found = ellipsoid.intercepts(layer.low, layer.high, c, c * share).tolist()
    rows = zip(c.tolist(), (c * share).tolist(), strict=True)
    exact = [sum((Fraction(up) - Fraction(line)) * Fraction(z) for up, line, z in zip(*row, a.tolist(), strict=True)) for row in rows]
    assert all(Fraction(most) >= value for most, value in zip(found, exact, strict=True))
    size = c.abs() @ a
    behind = Layer(layer.gate, torch.arange(60), size * 0, size * 0, torch.zeros(60, 3, dtype=DOUBLE), c, size, -size, size)
    region = Region.of(certify.Ball(torch.zeros(3, dtype=DOUBLE).numpy(), 1e-12, 2), 3)
    second = Ellipsoid.of([dataclasses.replace(layer, ellipsoid=ellipsoid)], behind, region)
    assert second is not None
    for row, center, slack in zip(c.tolist(), second.center.tolist(), second.slack.tolist(), strict=True):
        value = sum(Fraction(weight) * Fraction(z) for weight, z in zip(row, a.tolist(), strict=True))
        assert abs(value - Fraction(center)) <= Fraction(slack)


def mutants(ellipsoid: Ellipsoid) -> Iterable[tuple[str, Ellipsoid]]:
    """With one part of it gone."""
    yield "overlap between gates", dataclasses.replace(ellipsoid, overlap=torch.diag(ellipsoid.overlap.diagonal()))
    yield "a tenth of the radius", dataclasses.replace(ellipsoid, radius=0.9 * ellipsoid.radius)
    yield "the center", dataclasses.replace(ellipsoid, center=ellipsoid.center + 0.2)


def test_every_part_of_the_ellipsoid_is_needed() -> None:
    """Without it, some point is above; with it, none is."""
    torch.manual_seed(3)
    beaten = set()
    for seed in range(4):
        layer, ellipsoid = one_layer(torch.randn(6, 3, dtype=DOUBLE), 0.1 * torch.randn(6, dtype=DOUBLE), 1.0)
        c = torch.rand(10, 6, dtype=DOUBLE) * (torch.rand(10, 6) < 0.5)
        c[:6] = torch.eye(6, dtype=DOUBLE)
        slope = c / 2
        d = nn.functional.normalize(torch.randn(50_000, 3, dtype=DOUBLE))
        z = layer.center + d @ layer.inputs.T
        most = (z.relu() @ c.T - z @ slope.T).amax(0)
        assert (most <= bound(layer, ellipsoid, c, slope) + 1e-12).all(), seed
        beaten |= {name for name, broken in mutants(ellipsoid) if bool((most > bound(layer, broken, c, slope) + 1e-6).any())}
    assert beaten == {"overlap between gates", "a tenth of the radius", "the center"}


def test_what_earlier_gates_add_is_needed() -> None:
    """Behind another layer, the parts that stand for its gates are: without them, points are outside of the ellipsoid."""
    torch.manual_seed(0)
    first, second = one_layer(torch.eye(4, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE), 1.0)[0], torch.randn(5, 4, dtype=DOUBLE)
    region = Region.of(certify.Ball(torch.zeros(4, dtype=DOUBLE).numpy(), 1.0, 2), 4)
    first = dataclasses.replace(first, ellipsoid=Ellipsoid.of([], first, region))
    size = 3 * second.abs().sum(1)
    none = torch.zeros(5, dtype=DOUBLE)
    later = Layer(first.gate, torch.arange(5), none, none, -second / 2, second, size, -size, size)  # z = M (relu(d) - d / 2) = M |d| / 2
    whole = Ellipsoid.of([first], later, region)
    assert whole is not None
    d = nn.functional.normalize(torch.randn(20_000, 4, dtype=DOUBLE))
    z = d.relu() @ second.T - d @ second.T / 2
    for ellipsoid, inside in ((whole, True), (dataclasses.replace(whole, parts=whole.parts[:1], overlap=sdpcrown._overlap(whole.parts[:1])), False)):
        q = torch.ones(5, dtype=DOUBLE)
        assert bool(((z - ellipsoid.center) ** 2 @ (q / (ellipsoid.overlap @ q)) <= 1 + 1e-12).all()) == inside


def test_slopes_between_the_center_and_the_range() -> None:
    """`middle +- half` holds every secant of a ReLU from its center, and no more than from the steepest to the flattest."""
    torch.manual_seed(6)
    center = torch.cat([torch.randn(200, dtype=DOUBLE), torch.zeros(20, dtype=DOUBLE)])
    layer, ellipsoid = one_layer(torch.randn(220, 2, dtype=DOUBLE), center, 1.0)
    middle, half = ellipsoid.secants(layer.low, layer.high)
    z = layer.low + torch.linspace(0, 1, 98, dtype=DOUBLE)[:, None] * (layer.high - layer.low)
    secant = (z.relu() - center.relu()) / (z - center)
    assert ((secant - middle).abs() <= half + 1e-12).all()
    curved = center != 0
    assert torch.allclose(secant.amin(0)[curved], (middle - half)[curved], atol=1e-9)
    assert torch.allclose(secant.amax(0)[curved], (middle + half)[curved], atol=1e-9)


def test_the_slack_of_rows_counts() -> None:
    """Where z may be off by much, at every point that a node holds, and behind another layer; the center of a gate may be outside of the node."""
    torch.manual_seed(7)
    beyond = 0
    for _ in range(20):
        layer, _ = one_layer(torch.randn(3, 2, dtype=DOUBLE), 1.5 * torch.randn(3, dtype=DOUBLE), 1.0)
        slack = torch.rand(3, dtype=DOUBLE)
        layer = dataclasses.replace(layer, slack=slack, size=layer.size + slack, low=layer.low - slack, high=layer.high + slack)
        region = Region.of(certify.Ball(torch.zeros(2, dtype=DOUBLE).numpy(), 1.0, 2), 2)
        ellipsoid = Ellipsoid.of([], layer, region)
        assert ellipsoid is not None
        d = nn.functional.normalize(torch.randn(20_000, 2, dtype=DOUBLE))
        z = layer.center + d @ layer.inputs.T + slack * (2 * torch.rand(20_000, 3, dtype=DOUBLE) - 1).mul(4).clamp(-1, 1)
        side = z[0].sign() * (torch.rand(3) < 0.7)
        low, high = torch.where(side > 0, layer.low.clamp(min=0), layer.low), torch.where(side < 0, layer.high.clamp(max=0), layer.high)
        inside = z[((z >= low) & (z <= high)).all(dim=1)]
        beyond += int(((layer.center < low) | (layer.center > high)).any())
        c = torch.randn(10, 3, dtype=DOUBLE) * (torch.rand(10, 3) < 0.6)
        slope = c * torch.rand(10, 3, dtype=DOUBLE) + torch.randn(10, 3, dtype=DOUBLE) * (torch.rand(10, 3) < 0.3)
        assert ((inside.relu() @ c.T - inside @ slope.T).amax(0) <= ellipsoid.intercepts(low, high, c, slope)).all()
        g = torch.randn(10, 2, dtype=DOUBLE) * (torch.rand(10, 1) < 0.5)
        most = (d @ g.T + z.relu() @ c.T).amax(0)
        for part in (None, ellipsoid):
            assert (most <= upper_bounds([dataclasses.replace(layer, ellipsoid=part)], region, torch.zeros(10, dtype=DOUBLE), g, c)).all()
        M, none = torch.randn(4, 3, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE)
        size = M.abs() @ torch.maximum(-layer.low, layer.high)
        behind = Layer(layer.gate, torch.arange(4), none, none, torch.zeros(4, 2, dtype=DOUBLE), M, size, -size, size)
        second = Ellipsoid.of([dataclasses.replace(layer, ellipsoid=ellipsoid)], behind, region)
        assert second is not None
        off = ((z.relu() @ M.T - second.center).abs() - second.slack).clamp(min=0)
        q = torch.rand(4, dtype=DOUBLE) ** 3
        assert (off**2 @ (q / (second.overlap @ q)) <= 1 + 1e-12).all()
    assert beyond > 3
    one = torch.ones(1, dtype=DOUBLE)  # z = -1.5 + d + s with s up to 1, in the node z >= 0: -z is largest at d = 1 / 2, s = 1
    layer, _ = one_layer(one[:, None], -1.5 * one, 1.0)
    layer = dataclasses.replace(layer, slack=one, low=layer.low - 1, high=layer.high + 1)
    ellipsoid = Ellipsoid.of([], layer, Region.of(certify.Ball(torch.zeros(1, dtype=DOUBLE).numpy(), 1.0, 2), 1))
    assert ellipsoid is not None
    assert float(ellipsoid.intercepts(0 * one, layer.high, 0 * one[None], one[None])) >= 0


@pytest.mark.parametrize("proposed", [0.0, 1e-300, 1e-9, 1.0, 1e9, 1e300, math.inf, math.nan])
def test_any_lambda_proves(monkeypatch: pytest.MonkeyPatch, proposed: float) -> None:
    """The search only proposes; nonsense costs tightness, or leaves no number, and then the lines gate by gate count."""
    monkeypatch.setattr(sdpcrown, "_proposed", lambda branches, a, v, squared, row, summed: torch.full_like(summed(a), proposed))
    torch.manual_seed(4)
    layer, ellipsoid = one_layer(torch.randn(6, 3, dtype=DOUBLE), 0.1 * torch.randn(6, dtype=DOUBLE), 1.0)
    c, slope = torch.randn(10, 6, dtype=DOUBLE), torch.randn(10, 6, dtype=DOUBLE)
    z = layer.center + nn.functional.normalize(torch.randn(20_000, 3, dtype=DOUBLE)) @ layer.inputs.T
    found = bound(layer, ellipsoid, c, slope)
    assert bool((found >= (z.relu() @ c.T - z @ slope.T).amax(0)).all()) or bool(found.isnan().all())
    forms = Region.of(certify.Ball(torch.zeros(3, dtype=DOUBLE).numpy(), 1.0, 2), 3), torch.zeros(10, dtype=DOUBLE), torch.randn(10, 3, dtype=DOUBLE), c
    plain, together = (upper_bounds([dataclasses.replace(layer, ellipsoid=part)], *forms) for part in (None, ellipsoid))
    assert (together <= plain + 1e-12 * plain.abs()).all()


@pytest.mark.parametrize("scale", [1e-100, 1e-20, 1.0, 1e20, 1e50])
@pytest.mark.parametrize("radius", [1e-25, 1e-3, 1.0, 1e20])
def test_extreme_scales(scale: float, radius: float) -> None:
    """Rows of 0, copies, rows whose scales differ by 1e30, and rows c of all scales and signs."""
    torch.manual_seed(5)
    inputs = torch.randn(8, 4, dtype=DOUBLE) * scale
    inputs[1], inputs[2], inputs[3] = 0.0, inputs[0], inputs[4] * 1e-30
    layer, ellipsoid = one_layer(inputs, 0.3 * radius * torch.linalg.vector_norm(inputs, dim=1) * torch.randn(8, dtype=DOUBLE), radius)
    c = torch.randn(12, 8, dtype=DOUBLE) * 10.0 ** torch.randint(-60, 60, (12, 1)).double()
    c[0], c[1], c[2, :4] = c[0].abs(), -c[1].abs(), 0.0
    c[3, 0] = c[3, 0] * 1e-200
    slope = c * torch.rand(12, 8, dtype=DOUBLE)
    z = layer.center + radius * nn.functional.normalize(torch.randn(5000, 4, dtype=DOUBLE)) @ layer.inputs.T
    found = bound(layer, ellipsoid, c, slope)
    most = (z.relu() @ c.T - z @ slope.T).amax(0)
    assert ((found >= most * (1 - 1e-12)) | found.isnan()).all()
    if scale * radius > 1e-50:
        assert (found < 10 * (c.abs() @ layer.high.abs())).all()


def test_never_looser_and_larger_in_larger_balls() -> None:
    """What the lines gate by gate prove is kept where it is less; and the bound of a network grows with the ball."""
    net = stacked("relu", (6, 16, 16, 3), 2)
    before = torch.full((3,), -math.inf, dtype=DOUBLE)
    gained = False
    for radius in (0.1, 0.3, 0.6, 1.0, 1.5):
        condensed = condensed_of(net, 6, radius)
        forms = condensed.region, condensed.center, condensed.inputs, condensed.gates
        apart = [dataclasses.replace(layer, ellipsoid=None) for layer in condensed.layers]
        found, plain = upper_bounds(condensed.layers, *forms), upper_bounds(apart, *forms)
        assert (found <= plain + 1e-12 * plain.abs()).all()
        assert (tightened(condensed.layers, *forms, 5) <= found).all()
        assert (found >= before - 1e-2 * found.abs()).all()
        gained, before = gained or bool((found < plain * 0.95).any()), found
    assert gained


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [0, 5])
def test_ranges_behind_one_layer_are_never_looser_than_without_ellipsoids(seed: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With them the best slopes are elsewhere, and few steps may find less of them: both are searched."""
    program = Program.of(stacked("relu", (8, 20, 20, 3), seed), (8,))
    rows, region = torch.eye(3, dtype=DOUBLE), Region.of(certify.Ball(torch.linspace(-0.9, 0.9, 8, dtype=DOUBLE).numpy(), 1.0, 2), 8)
    together = condense(program, region, rows, steps=steps).layers[1]
    monkeypatch.setattr(Ellipsoid, "of", lambda *_: None)
    alone = condense(program, region, rows, steps=steps).layers[1]
    same = torch.isin(alone.index, together.index)
    assert together.index.tolist() == alone.index[same].tolist()
    assert (together.low >= alone.low[same]).all()
    assert (together.high <= alone.high[same]).all()
    assert (together.high - together.low < alone.high[same] - alone.low[same]).any()


def test_only_relus_in_balls_of_l2() -> None:
    """Everything else is as it was."""
    for net, p in ((stacked("gelu", (4, 6, 3), 0), 2), (stacked("relu", (4, 6, 3), 0), 1), (stacked("relu", (4, 6, 3), 0), math.inf)):
        condensed = condensed_of(net, 4, 0.5, p)
        assert condensed.layers
        assert all(layer.ellipsoid is None for layer in condensed.layers)
    assert all(layer.ellipsoid is None for layer in condensed_of(stacked("relu", (4, 6, 3), 0), 4, 0.0).layers)
    mixed = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    torch.manual_seed(0)
    for linear in mixed[::2]:
        nn.init.normal_(linear.weight)
    assert [layer.ellipsoid is not None for layer in condensed_of(mixed, 4, 2.0).layers] == [True, False, False]
