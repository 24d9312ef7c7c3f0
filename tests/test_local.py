"""Local bounds: no Jacobian, and no slope, in the region beats them; they meet known exact values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certify
import lipnet
from certify.local.clarke import bound_jacobian
from certify.local.condense import condense
from certify.local.program import Program
from certify.local.region import Region

F = nn.functional
CLOSE = 1e-8  # torch's own gradient of hardsigmoid has one sixth in float32


class Residual(nn.Module):
    """A skip connection taken from the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + torch.relu(self.inside(x)))


class Concat(nn.Module):
    """Branches beside each other, and a signal used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.last = nn.Linear(7 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x)), x], 1)
        return self.last(h.flatten(1)) - 0.5 * x.mean(dim=(1, 2, 3))[:, None]


def conv(*middle: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *middle, nn.Flatten(), nn.Linear(features, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)), (6,)),
    "leaky": (lambda: nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(0.2), nn.Linear(12, 12), nn.PReLU(12), nn.Linear(12, 3)), (6,)),
    "maxmin": (lambda: nn.Sequential(nn.Linear(6, 12), lipnet.MaxMin(), nn.Linear(12, 12), lipnet.MaxMin("halves"), nn.Linear(12, 3)), (6,)),
    "groupsort": (lambda: nn.Sequential(nn.Linear(6, 12), lipnet.GroupSort(4), nn.Linear(12, 12), lipnet.Householder(12), nn.Linear(12, 3)), (6,)),
    "folds": (lambda: nn.Sequential(nn.Linear(6, 12), lipnet.NActivation(12), nn.Linear(12, 12), lipnet.Abs(), nn.Linear(12, 3)), (6,)),
    "smooth": (lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 3)), (6,)),
    "clamps": (lambda: nn.Sequential(nn.Linear(6, 12), nn.Hardtanh(-0.3, 0.4), nn.Linear(12, 12), nn.ReLU6(), nn.Hardsigmoid(), nn.Linear(12, 3)), (6,)),
    "sandwich": (lambda: nn.Sequential(lipnet.SandwichLinear(6, 12), lipnet.BROLinear(12, 12), lipnet.MaxMin(), nn.Linear(12, 3)), (6,)),
    "max pools": (lambda: conv(nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), features=16), (2, 6, 6)),
    "batch norm": (lambda: conv(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), features=36), (2, 6, 6)),
    "padding": (lambda: conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), features=16), (2, 6, 6)),
    "residual": (Residual, (6,)),
    "concat": (Concat, (2, 6, 6)),
    "normalised": (lambda: nn.Sequential(lipnet.Normalize([0.4, 0.5], [0.2, 0.3]), conv(nn.ReLU(), features=144)), (2, 6, 6)),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """One of the above, random, in float64 and eval mode; batch norms have statistics."""
    torch.manual_seed(seed)
    make, shape = NETS[name]
    net = make().double()
    net.train()(torch.randn(16, *shape, dtype=torch.float64))
    return net.eval(), shape


def points(center: Tensor, radius: float, p: float, count: int) -> Tensor:
    """Random points of a ball, many of them on its boundary."""
    d = torch.randn(count, center.numel(), dtype=torch.float64).reshape(count, *center.shape)
    if p == math.inf:
        return center + radius * torch.where(torch.rand(count, *[1] * center.dim()) < 0.5, d.sign(), d.clamp(-1, 1))
    size = torch.linalg.vector_norm(d.flatten(1), ord=p, dim=1).reshape(-1, *[1] * center.dim())
    return center + radius * d / size * torch.rand_like(size) ** 0.2


def jacobians(net: nn.Module, inputs: Tensor) -> Tensor:  # (points, outputs, inputs)
    return torch.stack([torch.autograd.functional.jacobian(lambda x: net(x[None])[0], x).flatten(1) for x in inputs])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_no_jacobian_in_the_region_beats_the_bounds(name: str, p: float) -> None:
    net, shape = network(name)
    center = torch.randn(shape, dtype=torch.float64)
    program = Program.of(lipnet.freeze(net), shape)
    for radius in (0.0, 0.02, 0.3):
        region = Region.of(certify.Ball(center.numpy(), radius, p), center.numel())
        jacobian = bound_jacobian(condense(program, region, torch.eye(3, dtype=torch.float64)))
        low, high = jacobian.range
        seen = jacobians(net, points(center, radius, p, 40))
        assert (seen >= low - CLOSE).all()
        assert (seen <= high + CLOSE).all()
        for q, norm in ((1, 1), (2, 2), (math.inf, math.inf)):
            assert (torch.linalg.vector_norm(seen, ord=norm, dim=2).amax(0) <= jacobian.row_norms(q) + CLOSE).all()


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("smooth", "concat", "leaky", "clamps")])
def test_a_small_region_has_the_jacobian_of_its_center(name: str) -> None:
    net, shape = network(name)
    center = torch.randn(shape, dtype=torch.float64)
    exact = jacobians(net, center[None])[0]
    bound = certify.lipschitz(net, certify.Local(), input_shape=shape, domain=certify.Ball(center.numpy(), 1e-9, 2))
    assert bound.value == pytest.approx(float(torch.linalg.matrix_norm(exact, 2)), rel=1e-6)
    assert bound.evidence["undecided"] <= (2 if name == "max pools" else 0)  # two windows with one largest entry are a tie everywhere
    bound = certify.lipschitz(net, certify.Local(), input_shape=shape, domain=certify.Ball(center.numpy(), 1e-9, math.inf))
    assert bound.norm == (math.inf, math.inf)
    assert bound.value == pytest.approx(float(exact.abs().sum(1).max()), rel=1e-6)
    assert bound.pairs is not None
    assert bound.pairs[0, 2] == pytest.approx(float((exact[0] - exact[2]).abs().sum()), rel=1e-6)


def test_one_hidden_layer_with_disjoint_supports_is_met() -> None:
    """`sum_k v_k relu(w_k x_k + b_k)`: each gate has inputs of its own, so the largest l1 norm of the gradient is that of all gates that can open."""
    w, b, v = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([0.5, -5.0, 0.0, 0.2]), torch.tensor([1.0, 4.0, -2.0, 3.0])
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).double().eval()
    net[0].weight.data, net[0].bias.data, net[2].weight.data, net[2].bias.data = torch.diag(w).double(), b.double(), v[None].double(), torch.zeros(1).double()
    bound = certify.lipschitz(net, certify.Local(), input_shape=(4,), domain=certify.Ball(np.zeros(4), 1.0, math.inf))
    assert bound.value == pytest.approx(1 + 6 + 1.5, rel=1e-12)  # the second gate stays shut
    assert bound.value >= 8.5


def test_bounds_grow_with_the_region() -> None:
    net, shape = network("maxmin")
    x = np.linspace(-1, 1, 6)
    values = [certify.lipschitz(net, certify.Local(), input_shape=shape, domain=certify.Ball(x, r, math.inf)).value for r in (0, 0.01, 0.1, 0.5, 2)]
    assert values == sorted(values)
    assert values[-1] > values[0]


@pytest.mark.parametrize("name", ["relu", "smooth"])
@pytest.mark.parametrize("how", ["auto", "crown", "interval"])
def test_entries_that_are_held_do_not_count(name: str, how: str) -> None:
    """Along one entry the constant is the steepest slope in it, within what the method loses; the other slopes are ten times that here."""
    net, shape = network(name)
    net = nn.Sequential(nn.Linear(6, 6), net).double().eval()
    net[0].weight.data = torch.diag(torch.tensor([10.0, 10.0, 1.0, 10.0, 10.0, 10.0]).double())
    low = torch.randn(6, dtype=torch.float64)
    high = low + 0.1 * torch.eye(6, dtype=torch.float64)[2]
    seen = jacobians(net, low + torch.linspace(0, 1, 50, dtype=torch.float64)[:, None] * (high - low))[:, :, 2]
    for norm, exact in ((1, seen.norm(dim=1)), (2, seen.norm(dim=1)), (math.inf, seen.abs().amax(1))):
        bound = certify.lipschitz(net, certify.Local(norm=norm, how=how), input_shape=shape, domain=certify.Box(low, high))
        assert bound.value >= float(exact.max())
        assert bound.value <= 1.5 * float(exact.max())
        assert bound.pairs is not None
        assert (bound.pairs >= (seen[:, :, None] - seen[:, None]).abs().amax(0).numpy()).all()
        other = certify.lipschitz(net, certify.LipSDP(norm=norm, pairs=False), input_shape=shape, domain=certify.Box(low, high))
        assert float(exact.max()) <= other.value
        assert norm == math.inf or other.value <= 2 * float(exact.max())


def test_a_box_of_one_input_has_its_whole_jacobian() -> None:
    net, shape = network("relu")
    x = torch.randn(6, dtype=torch.float64)
    for method in (certify.Local(norm=2), certify.LipSDP()):
        bound = certify.lipschitz(net, method, input_shape=shape, domain=certify.Box(x, x))
        assert bound.value == pytest.approx(float(torch.linalg.matrix_norm(jacobians(net, x[None])[0], 2)), rel=1e-6)


def test_refusals() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x * torch.sigmoid(x), 1) * x

    with pytest.raises(certify.Unsupported, match="multiplies two signals") as caught:
        Program.of(Product(), (4,))
    assert "softmax" in str(caught.value)
    net, shape = network("relu")
    with pytest.raises(certify.CertifyError, match=r"pass domain=certify\.Ball"):
        certify.lipschitz(net, certify.Local(), input_shape=shape)
    with pytest.raises(certify.CertifyError, match="of 6 inputs"):
        certify.lipschitz(net, certify.Local(), input_shape=shape, domain=certify.Ball(np.zeros(5), 1.0))
    with pytest.raises(certify.CertifyError, match="more memory"):
        certify.lipschitz(net, certify.Local(memory=1e-9), input_shape=shape, domain=certify.Ball(np.zeros(6), 1.0))


def test_a_network_that_mixes_inputs_is_refused() -> None:
    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    with pytest.raises(certify.Unsupported, match="mix inputs"):
        Program.of(Mixes(), (4,))
