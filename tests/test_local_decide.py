"""Margins on a region by branch and bound: never above what enumeration proves, and positive wherever that is."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import certify
from certify.local import decide
from certify.local.condense import Condensed, condense
from certify.local.crown import upper_bounds
from certify.local.program import Program
from certify.local.radius import LocalMargin
from certify.local.region import Region
from sdp.activation import RELU

SIZES = (2, 3, 4, 3)


def network(seed: int, sizes: tuple[int, ...] = SIZES, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = itertools.chain.from_iterable((nn.Linear(a, b), activation()) for a, b in itertools.pairwise(sizes))
    net = nn.Sequential(*list(layers)[:-1]).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.8)  # as torch draws them, one class is the largest everywhere
    return net


def margins_of(net: nn.Sequential, x: Tensor, radius: float, p: float = math.inf) -> Condensed:
    label = int(net(x[None]).argmax())
    unit = torch.eye(net[-1].out_features, dtype=torch.float64)
    rows = unit[label] - unit[[j for j in range(len(unit)) if j != label]]
    return condense(Program.of(net, (len(x),)), Region.of(certify.Ball(x.numpy(), radius, p), len(x)), rows)


def exact(net: nn.Sequential, condensed: Condensed, row: Tensor) -> float:
    """The smallest `row @ net` over a box: a linear program for every pattern of open and shut gates."""
    center, reach = condensed.region.center.numpy(), condensed.region.reach.numpy()
    weights = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in net if isinstance(layer, nn.Linear)]
    best, gates = math.inf, sum(len(bias) for _, bias in weights[:-1])
    for pattern in itertools.product((0.0, 1.0), repeat=gates):
        a, b, rows, limits, start = np.eye(len(center)), center, [], [], 0
        for w, bias in weights[:-1]:
            a, b = w @ a, w @ b + bias
            side = np.array(pattern[start : start + len(b)])
            rows.append(-(2 * side - 1)[:, None] * a)
            limits.append((2 * side - 1) * b)
            a, b, start = side[:, None] * a, side * b, start + len(b)
        w, bias = weights[-1]
        goal = row.numpy() @ w @ a
        found = linprog(goal, A_ub=np.vstack(rows), b_ub=np.concatenate(limits), bounds=list(zip(-reach, reach, strict=True)), method="highs")
        if found.status == 0:
            best = min(best, found.fun + row.numpy() @ (w @ b + bias))
    return best


def rows_of(net: nn.Sequential, x: Tensor) -> Tensor:
    label = int(net(x[None]).argmax())
    unit = torch.eye(net[-1].out_features, dtype=torch.float64)
    return unit[label] - unit[[j for j in range(len(unit)) if j != label]]


def test_what_is_proved_is_true_and_what_is_true_is_proved() -> None:
    """Each row is moved so that its smallest value, by enumeration, is a little above 0, and just below: the first is proved, and the second is not."""
    harder = 0
    for seed in (1, 2):
        net, x = network(seed), torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        condensed = margins_of(net, x, 1.5)
        for number, row in enumerate(rows_of(net, x)):
            least = exact(net, condensed, row)
            for wanted in (0.05, -1e-7):
                moved = dataclasses.replace(condensed, center=condensed.center - least + wanted)
                found = decide._Search(moved, number).run(2000, math.inf)
                assert found <= wanted + 1e-9
                assert (found > 0) == (wanted > 0)
                plain = -upper_bounds(moved.layers, moved.region, -moved.center, -moved.inputs, -moved.gates)
                harder += bool(found > 0 and plain[number] <= 0)
    assert harder  # than CROWN can prove


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_no_point_of_the_ball_is_below_the_bounds(p: float) -> None:
    for seed in range(2):
        net, x = network(seed, (5, 12, 12, 4)), torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        condensed = margins_of(net, x, 0.7, p)
        d = torch.randn(4000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        d = 0.7 * d / torch.linalg.vector_norm(d, ord=p, dim=1, keepdim=True) * torch.rand(4000, 1, dtype=torch.float64) ** 0.2
        values = (net(x + d) @ rows_of(net, x).T).detach().amin(0)
        for nodes in (0, 1, 40):
            below, seen = decide.lowest(condensed, nodes=nodes)
            assert (below <= values + 1e-12).all()
            assert not seen or bool((below <= 0).any())
        for row in range(3):
            assert decide._Search(condensed, row).run(60, math.inf) <= values[row]


def test_any_slopes_and_multipliers_prove_true_bounds() -> None:
    """In a node: at points that lie in it, for random slopes, also outside of [0, 1], and random multipliers, also negative ones."""
    net, x = network(3, (4, 10, 10, 3)), torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    condensed = margins_of(net, x, 0.8)
    search = decide._Search(condensed, 0)
    generator = torch.Generator().manual_seed(0)
    d = condensed.region.reach * (2 * torch.rand(3000, 4, dtype=torch.float64, generator=generator) - 1)
    z, p = [], torch.zeros(3000, 0, dtype=torch.float64)
    for layer in condensed.layers:
        z.append(layer.center + d @ layer.inputs.T + p @ layer.earlier.T)
        p = torch.cat([p, z[-1].relu()], dim=1)
    signs, value = torch.cat(z, dim=1).sign(), (net(x + d) @ rows_of(net, x)[0]).detach()
    for point in range(30):
        decided = (signs[point] * (torch.rand(signs.shape[1], generator=generator) < 0.3)).to(torch.int8)[None]
        inside = ((signs == decided) | (decided == 0)).all(dim=1)
        alpha, beta = (scale * torch.randn(decided.shape, dtype=torch.float64, generator=generator) for scale in (2.0, 1.0))
        nodes = decide._Nodes(decided, alpha, beta)
        assert -search.bounds(search.layers(nodes), nodes, alpha, beta) <= value[inside].min()
        assert -search.bounded(nodes, 10)[0] <= value[inside].min()


def test_deciding_without_knowing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that forgot the shut half of every split would prove what is false, and these tests would see it."""
    whole = decide._Nodes.split
    monkeypatch.setattr(decide._Nodes, "split", lambda self, of, gates: decide._Nodes.joined([whole(self, of, gates).part(slice(0, len(of)))] * 2))
    with pytest.raises(AssertionError):
        test_what_is_proved_is_true_and_what_is_true_is_proved()


def test_smooth_gates_keep_the_bounds_of_crown() -> None:
    net, x = network(1, (4, 8, 3), nn.Tanh), torch.zeros(4, dtype=torch.float64)
    condensed = margins_of(net, x, 0.3)
    assert condensed.layers[0].gate.activation != RELU
    plain = -upper_bounds(condensed.layers, condensed.region, -condensed.center, -condensed.inputs, -condensed.gates) - condensed.slack
    assert torch.equal(decide.lowest(condensed, nodes=100)[0], plain)


def test_a_radius_that_is_asked_for_is_proved_where_the_search_ends_earlier() -> None:
    """Branch and bound proves radii beyond those of growing balls, up to what an attack leaves; what it proves, it proves again."""
    net = network(0, (6, 16, 16, 4))
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    searched = certify.robustness(net, x, LocalMargin(norm=math.inf)).radius
    further = 0
    for number, point in enumerate(x):
        radius = 1.05 * float(searched[number])
        method = LocalMargin(radius=radius, norm=math.inf)
        found = certify.robustness(net, point[None], method)
        if found.radius[0]:
            further += 1
            graph = certify.Graph.of(net, (6,))
            z = net(point[None])[0].detach().numpy()
            assert method.proved(method.see(graph), point.numpy(), z, radius)
            d = radius * (2 * torch.rand(3000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 1)
            d[::2] = d[::2].sign() * radius
            assert (net(point + d).argmax(1) == int(found.prediction[0])).all()
    assert further
    with pytest.raises(certify.CertifyError, match="nodes is the most that branch and bound looks at"):
        LocalMargin(nodes=-1)
