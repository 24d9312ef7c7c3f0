"""The bound to train with: above every Jacobian in the ball, below the product of the layers, exact where nothing is undecided, and of use."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import certify
import certify.data
import lipnet

NETS = {
    "relu": lambda: nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 10), nn.ReLU(), nn.Linear(10, 3)),
    "leaky": lambda: nn.Sequential(nn.Linear(6, 14), nn.LeakyReLU(0.3), nn.Linear(14, 10), nn.LeakyReLU(-1.5), nn.Linear(10, 3)),
    "steep": lambda: nn.Sequential(nn.Linear(6, 14), nn.LeakyReLU(2.5), nn.Sequential(nn.Linear(14, 10), lipnet.Abs()), nn.Linear(10, 3)),
    "maxmin": lambda: nn.Sequential(nn.Linear(6, 14), lipnet.MaxMin(), nn.Linear(14, 10), lipnet.MaxMin("halves"), nn.Linear(10, 3)),
    "bare ends": lambda: nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(6, 8), nn.Linear(8, 8), lipnet.MaxMin()),
    "linear": lambda: nn.Sequential(nn.Linear(6, 3)),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        lipnet.MaxMin(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode="circular", groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A random one, in float64, and some inputs."""
    torch.manual_seed(seed)
    return NETS[name]().double(), torch.randn(4, *((2, 4, 4) if name == "conv" else (6,)), dtype=torch.float64)


def norms(net: nn.Module, inputs: Tensor) -> Tensor:
    """The spectral norm of the Jacobian at each input."""
    return torch.stack([torch.linalg.matrix_norm(torch.autograd.functional.jacobian(lambda x: net(x[None])[0], x).flatten(1), 2) for x in inputs])


def ball(center: Tensor, radius: float, p: float, count: int) -> Tensor:
    d = torch.randn(count, *center.shape, dtype=torch.float64)
    if p == math.inf:
        return center + radius * torch.where(torch.rand(count, *[1] * center.dim()) < 0.5, d.sign(), d.clamp(-1, 1))
    size = torch.linalg.vector_norm(d.flatten(1), dim=1).reshape(-1, *[1] * center.dim())
    return center + radius * d / size * torch.rand_like(size) ** 0.2


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_no_jacobian_in_the_ball_is_larger(name: str, p: float) -> None:
    net, x = network(name)
    for radius in (0.0, 0.03, 0.2, 1.0):
        bound = lipnet.local_bound(net, x, radius, p)
        assert bound.shape == (len(x),)
        for center, value in zip(x, bound.detach(), strict=True):
            assert (norms(net, ball(center, radius, p, 40)) <= value * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", NETS)
def test_where_nothing_is_undecided_it_is_the_norm_of_the_jacobian(name: str) -> None:
    net, x = network(name)
    bound = lipnet.local_bound(net, x, 0.0, steps=12)
    assert bound.detach().numpy() == pytest.approx(norms(net, x).numpy(), rel=1e-3)


@pytest.mark.parametrize("name", ["relu", "maxmin"])
def test_it_is_never_above_the_product_of_the_layers(name: str) -> None:
    net, x = network(name)
    product = math.prod(float(lipnet.spectral.gram_iteration(module.weight.detach())) for module in net if isinstance(module, nn.Linear))
    for radius in (0.0, 0.2, 1e6):
        assert (lipnet.local_bound(net, x, radius) <= product * (1 + 1e-9)).all()
    assert float(lipnet.local_bound(net, x, 0.05).detach().mean()) < 0.8 * product


@pytest.mark.parametrize("name", ["relu", "maxmin", "conv"])
def test_certify_proves_no_more(name: str) -> None:
    """With sharper ranges of the gates, `Local` is not far above; where nothing is undecided, the two are one number."""
    net, x = network(name)
    graph = certify.Graph.of(net.eval(), tuple(x.shape[1:]))
    for radius in (1e-6, 0.02):
        bounds = lipnet.local_bound(net, x, radius, steps=12).tolist()
        for center, value in zip(x, bounds, strict=True):
            proved = certify.Local().bound(graph, certify.Ball(center.numpy(), radius, 2))
            assert proved.value <= 1.3 * value
            if radius == 1e-6:
                assert proved.value == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_finite_and_those_of_the_number(name: str) -> None:
    net, x = network(name)
    weights = [weight for weight in net.parameters() if weight.dim() > 1]
    for radius in (0.0, 0.1):
        gradients = torch.autograd.grad(lipnet.local_bound(net, x, radius).sum(), weights)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        ways = [torch.randn_like(weight) for weight in weights]
        slope = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, ways, strict=True))
        values = []
        for move in (1e-7, -1e-7):
            with torch.no_grad():
                for weight, way in zip(weights, ways, strict=True):
                    weight += move * way
                values.append(float(lipnet.local_bound(net, x, radius).sum()))
                for weight, way in zip(weights, ways, strict=True):
                    weight -= move * way
        assert slope == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-4)


def test_a_dead_network_has_the_constant_0_and_a_gradient() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].bias.data.fill_(-100.0)
    bound = lipnet.local_bound(net, torch.zeros(2, 3), 0.1)
    assert bound.tolist() == pytest.approx([0, 0], abs=1e-30)
    bound.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters() if parameter.grad is not None)


def test_parametrised_layers_are_seen_through() -> None:
    net = nn.Sequential(nn.Linear(6, 6), lipnet.MaxMin(), nn.Linear(6, 6)).double()
    for layer in (net[0], net[2]):
        nn.utils.parametrizations.orthogonal(layer)
    bound = lipnet.local_bound(net, torch.randn(3, 6, dtype=torch.float64), 0.5, steps=12)
    assert bound.detach().numpy() == pytest.approx(1, rel=1e-3)  # nothing is gained, and nothing lost


def test_refusals() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.zeros(2, 4)
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, inputs, output: 5 * output)
    for net, message in (
        (nn.Sequential(nn.ReLU(), hooked), r"Linear \(at 1\) has hooks"),
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh())), r"knows no Tanh \(at 1.0\); known, in a Sequential, are Linear"),
        (nn.Sequential(Odd(4, 4)), "knows no Odd"),
        (nn.Sequential(nn.Flatten(0)), "joins them"),
        (nn.Sequential(nn.Linear(4, 20_000), nn.ReLU(), nn.Linear(20_000, 2)), "take fewer inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            lipnet.local_bound(net, x, 0.1)
    for shape in ((4,), (0, 4)):
        with pytest.raises(ValueError, match=r"give \(batch, \.\.\.\)"):
            lipnet.local_bound(nn.Sequential(nn.Linear(4, 4)), torch.zeros(shape), 0.1)
    for radius, p in ((-1.0, 2.0), (math.nan, 2.0), (0.1, 1.0)):
        with pytest.raises(ValueError, match="finite radius"):
            lipnet.local_bound(nn.Sequential(nn.Linear(4, 4)), x, radius, p)


def test_training_with_it_lowers_what_is_proved() -> None:
    """Digits, twice from the same start: as many right, and a smaller proved constant around held-out images."""
    train, test = (certify.data.digits(split) for split in ("train", "test"))
    images, labels = torch.from_numpy(train.inputs), torch.from_numpy(train.labels)
    found = {}
    for weight in (0.0, 0.02):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(8):
            for rows in torch.randperm(len(images)).split(96):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
                if weight:
                    loss = loss + weight * lipnet.local_bound(net, images[rows][:32], 0.1, steps=4).mean()
                loss.backward()
                optimizer.step()
        net.eval()
        right = (net(torch.from_numpy(test.inputs)).argmax(1).numpy() == test.labels).mean()
        graph = certify.Graph.of(net, (64,))
        proved = [certify.Local(pairs=False).bound(graph, certify.Ball(x.astype("float64"), 0.1, 2)).value for x in test.inputs[:5]]
        found[weight] = float(right), sum(proved) / len(proved)
    (plain, loose), (trained, tight) = found[0.0], found[0.02]
    assert plain > 0.9
    assert trained > plain - 0.01
    assert tight < 0.7 * loose
