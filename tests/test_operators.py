"""What a forward does between modules: each function against the full matrix of it, and what mixes the inputs of a batch refused."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import certify
from lipnet.testing import largest_slope

SHAPE = (4, 3, 2)


class Forward(nn.Module):
    """A forward of its own, with numbers of its own."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.run = forward
        self.matrix, self.column = nn.Parameter(torch.randn(2, 5).double()), nn.Parameter(torch.randn(4, 1, 1).double())
        self.kernel, self.slopes = nn.Parameter(torch.randn(3, 4, 2, 2).double()), nn.Parameter(torch.tensor([0.5, -3.0, 0.0, 1.0]).double())
        self.register_buffer("order", torch.tensor([3, 1, 1]))
        self.register_buffer("variance", torch.tensor([0.5, 2.0, 4.0, 0.25]).double())

    def forward(self, x):
        return self.run(self, x)


def matrix_of(net, shape=SHAPE):
    """Of an affine network."""
    with torch.no_grad():
        zero = net(torch.zeros(1, *shape, dtype=torch.float64))
        return (net(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)) - zero).flatten(1)


AFFINE = {
    "slice": lambda self, x: x[:, 1:, ::2],
    "ellipsis": lambda self, x: x[..., 1],
    "new axis": lambda self, x: x[:, None],
    "constant places": lambda self, x: x[:, self.order],
    "expand": lambda self, x: x[:, :1].expand(-1, 5, -1, -1),
    "repeat": lambda self, x: x.repeat(1, 2, 1, 3),
    "interleave": lambda self, x: torch.repeat_interleave(x, 3, dim=2),
    "permute": lambda self, x: torch.permute(x, (0, 3, 1, 2)),
    "transpose": lambda self, x: x.transpose(1, -1).contiguous(),
    "squeeze": lambda self, x: x.unsqueeze(2).squeeze(2).unflatten(1, (2, 2)),
    "flip and roll": lambda self, x: torch.roll(x.flip(1), 1, dims=2),
    "narrow": lambda self, x: x.narrow(1, 1, 2).select(3, 0),
    "chunk": lambda self, x: torch.cat(tuple(reversed([x.chunk(2, dim=1)[k] for k in (0, 1)])), dim=1),
    "split": lambda self, x: torch.split(x, [1, 3], dim=1)[1],
    "unbind": lambda self, x: x.unbind(2)[0],
    "cat": lambda self, x: torch.cat([x, 2 * x, -x], 1),
    "cat of a constant": lambda self, x: torch.cat([x.flatten(1), x.flatten(1)[:, :3]], dim=-1),
    "stack": lambda self, x: torch.stack([x, x, 0.5 * x], dim=-1),
    "twice": lambda self, x: torch.cat([x[..., 0], x[..., 0]], 1),
    "mean": lambda self, x: x.mean((2, 3)),
    "means of all": lambda self, x: torch.mean(x, dim=(1, 2, 3), keepdim=True),
    "sum": lambda self, x: x.sum(-1, keepdim=True),
    "sum of one": lambda self, x: torch.sum(x, 1),
    "numbers": lambda self, x: 3 * x / 7 - 0.5,
    "half": lambda self, x: x / 2,
    "stored factors": lambda self, x: x * self.column + self.column,
    "stored divisors": lambda self, x: (x - self.column) / self.column,
    "computed factors": lambda self, x: x * (self.column / self.column.norm()),
    "sizes": lambda self, x: x * x.size(1) / x.shape[2],
    "view by sizes": lambda self, x: x.view(x.size(0), -1, x.shape[3] * 1),
    "linear": lambda self, x: functional.linear(x, self.matrix.T),
    "matmul": lambda self, x: x @ self.matrix,
    "batch norm": lambda self, x: functional.batch_norm(x, self.slopes, self.variance, None, self.slopes),
    "average pool": lambda self, x: functional.avg_pool2d(x, (2, 1), stride=1),
    "average pool by sizes": lambda self, x: functional.avg_pool2d(x, x.shape[2:]),
    "adaptive pool": lambda self, x: functional.adaptive_avg_pool2d(x, 1),
    "zeros": lambda self, x: functional.pad(x, (1, 0, 2, 1)),
    "reflection": lambda self, x: functional.pad(x, (1, 0, 2, 1), mode="reflect"),
    "replication": lambda self, x: functional.pad(x, (0, 2, 1, 1), "replicate"),
    "nearest": lambda self, x: functional.interpolate(x, scale_factor=2),
    "shuffle": lambda self, x: functional.pixel_shuffle(x, 2),
    "dropout": lambda self, x: functional.dropout(x, 0.5, self.training),
}
NOT_TIGHT = {
    "chunk",
    "stored divisors",
    "stored factors",
    "computed factors",
    "cat of a constant",
}  # not where two steps have their largest answers at different entries


@pytest.mark.parametrize("name", AFFINE)
def test_affine_functions_are_met(name):
    net = Forward(AFFINE[name]).eval()
    exact = torch.linalg.matrix_norm(matrix_of(net), 2).item()
    bound = certify.lipschitz(net, input_shape=SHAPE).value
    assert exact <= bound * (1 + 1e-12)
    assert bound <= exact * (1.6 if name in NOT_TIGHT else 1 + 1e-9)


@pytest.mark.parametrize(
    ("forward", "slack"),
    [
        (lambda self, x: functional.conv2d(x, self.kernel, padding=1), 1.5),
        (lambda self, x: functional.conv2d(x, weight=self.kernel, stride=2, padding="valid"), 1.5),
        (lambda self, x: functional.conv_transpose2d(x[:, :3], self.kernel, None, 2), 1.5),
        (lambda self, x: functional.conv2d(x, self.kernel / self.kernel.norm()), 1.5),
    ],
    ids=range(4),
)
def test_convolutions_as_functions_are_close(forward, slack):
    net = Forward(forward).eval()
    exact = torch.linalg.matrix_norm(matrix_of(net), 2).item()
    assert exact <= certify.lipschitz(net, input_shape=SHAPE).value <= slack * exact


NONLINEAR = {
    "relu6": (lambda self, x: functional.relu6(x, inplace=False), 1.0),
    "hardtanh": (lambda self, x: functional.hardtanh(x, -2.0, 3.0), 1.0),
    "clamp": (lambda self, x: x.clamp(min=-0.1) + torch.clamp(x, -1, 2), 2.0),
    "clamp at one end": (lambda self, x: x.clamp_min(-0.1) + torch.clamp_max(x, 2), 2.0),
    "absolute values": (lambda self, x: abs(x) - x.abs() / 2, 1.5),
    "leaky": (lambda self, x: functional.leaky_relu(x, -1.5), 1.5),
    "prelu": (lambda self, x: functional.prelu(x, self.slopes), 3.0),
    "gelu": (lambda self, x: functional.gelu(x, approximate="tanh"), 1.129),
    "silu": (lambda self, x: functional.silu(x), 1.0998394),
    "elu": (lambda self, x: functional.elu(x, alpha=2.0), 2.0),
    "hardswish": (lambda self, x: functional.hardswish(x), 1.5),
    "hard sigmoid": (lambda self, x: 8 * functional.hardsigmoid(x), 8 / 6),
    "softmax": (lambda self, x: functional.softmax(x, dim=1), 0.5),
    "max pool": (lambda self, x: functional.max_pool2d(x, (2, 1), 1), math.sqrt(2)),
    "layer norm": (lambda self, x: functional.layer_norm(x, (3, 2), eps=0.04), 5.0),
    "maximum": (lambda self, x: torch.maximum(x, -2 * x), math.sqrt(5)),
    "minimum of what is spread": (lambda self, x: torch.minimum(x[..., :1], 3 * x), math.sqrt(2 + 9)),
    "maximum with stored numbers": (lambda self, x: 2 * torch.maximum(self.column, x).minimum(self.column + 1), 2.0),
    "in place": (lambda self, x: functional.relu(x + 0, inplace=True), 1.0),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_functions_that_are_modules(name):
    forward, value = NONLINEAR[name]
    net = Forward(forward).eval()
    bound = certify.lipschitz(net, input_shape=SHAPE).value
    assert value <= bound * (1 + 1e-12)
    assert bound <= value * (1 + 1e-6)
    assert largest_slope(net, SHAPE) <= bound * (1 + 1e-12)


@pytest.mark.parametrize(
    "name",
    ["narrow", "split", "unbind", "mean", "sum", "sum of one", "constant places", "ellipsis", "average pool", "stored divisors", "chunk", "twice"],
)
def test_lipsdp_sees_affine_functions_exactly(name):
    net = Forward(AFFINE[name]).eval()
    exact = torch.linalg.matrix_norm(matrix_of(net), 2).item()
    bound = certify.lipschitz(net, certify.LipSDP(), input_shape=SHAPE).value
    assert exact <= bound * (1 + 1e-12)
    assert bound <= exact * (1 + 1e-6)


def test_lipsdp_sees_functions_between_nonlinearities():
    def forward(self, x):
        a, b = functional.prelu(x[:, :, :2], self.slopes).chunk(2, dim=1)
        h = torch.cat([a, functional.hardtanh(b) / self.column[:2]], dim=1).flatten(2)
        return h.mean(2) + torch.relu(h[..., 0]) + h.sum(1, keepdim=True)[..., 1]

    net = Forward(forward).eval()
    layers, together = (certify.lipschitz(net, method, input_shape=SHAPE).value for method in (certify.Layerwise(), certify.LipSDP()))
    assert largest_slope(net, SHAPE, points=24) <= together <= 0.9 * layers


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, x: torch.cat([x, x]), "mixes the inputs|puts inputs"),
        (lambda self, x: torch.cat([x, x], dim=-4)[:3], "mixes the inputs|puts inputs"),
        (lambda self, x: torch.stack([x, x]), "mixes the inputs|puts inputs"),
        (lambda self, x: x.mean(0, keepdim=True).expand(x.size(0), -1, -1, -1), "mixes the inputs"),
        (lambda self, x: x - x.mean(), "mixes the inputs"),
        (lambda self, x: x.sum((0, 1, 2, 3)), "mixes the inputs"),
        (lambda self, x: x[0:1].expand(x.size(0), -1, -1, -1), "mixes the inputs"),
        (lambda self, x: x.flip(0), "mixes the inputs"),
        (lambda self, x: torch.roll(x, 1), "mixes the inputs"),
        (lambda self, x: torch.roll(x, 1, dims=0), "mixes the inputs"),
        (lambda self, x: x[self.order - 1], "mixes the inputs"),
        (lambda self, x: x * x.size(0), "number"),
        (lambda self, x: x + x.size(0), "how many inputs"),
        (lambda self, x: torch.softmax(x, 0), "may mix the inputs"),
        (lambda self, x: functional.softmax(x), "dim"),
        (lambda self, x: functional.layer_norm(x, (3, 2), eps=0.0), "no Lipschitz constant"),
        (lambda self, x: functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), "pad"),
        (lambda self, x: functional.dropout(x), "training mode"),
        (lambda self, x: functional.batch_norm(x, None, None, training=True), "statistics of the batch"),
        (lambda self, x: x * torch.sigmoid(x), "gate"),
        (lambda self, x: 1 / x, "divides by a signal"),
        (lambda self, x: x / 0.0, "larger numbers"),
        (lambda self, x: x / torch.relu(self.column), "larger numbers"),
        (lambda self, x: x * float("nan"), "NaN"),
        (lambda self, x: torch.maximum(x, self.column / 0), "finite numbers"),
        (lambda self, x: functional.scaled_dot_product_attention(x, x, x), "attention multiplies"),
        (lambda self, x: torch.matmul(x, x.transpose(2, 3)), "product of two signals"),
        (lambda self, x: functional.glu(x, 1), "gate"),
        (lambda self, x: functional.softplus(x), "jump"),
        (lambda self, x: x.mean(1, dtype=torch.float32), "turns torch.float64"),
        (lambda self, x: functional.max_pool2d(x, 2, return_indices=True)[0], "max_pool2d"),
        (lambda self, x: functional.adaptive_avg_pool2d(x, x.size(0)), "adaptive|mixes"),
        (lambda self, x: torch.div(x, 2.0, rounding_mode="floor"), "rounding_mode"),
    ],
    ids=itertools.count(),
)
def test_what_mixes_inputs_or_has_no_constant_is_refused(forward, match):
    with pytest.raises((certify.Unsupported, ValueError), match=match):
        certify.lipschitz(Forward(forward).eval(), input_shape=SHAPE)


def test_all_that_is_unknown_is_named_at_once_with_its_reason():
    def forward(self, x):
        h = torch.cumsum(x, 1) + functional.glu(torch.cat([x, x], 1), 1)
        return torch.einsum("bchw,bchw->bchw", h, x) + torch.fft.fft(x).real

    with pytest.raises(certify.Unsupported) as refusal:
        certify.lipschitz(Forward(forward).eval(), input_shape=SHAPE)
    assert {problem.what for problem in refusal.value.problems} >= {"cumsum", "glu", "einsum"}


def test_the_network_of_a_caller_is_left_as_it_is():
    net = nn.Sequential(Forward(lambda self, x: functional.max_pool2d(functional.relu6(x), 2)), nn.Flatten(), nn.Linear(4, 2).double()).eval()
    before = [name for name, _ in net.named_modules()], list(net.state_dict())
    bound = certify.lipschitz(net, input_shape=SHAPE)
    assert ([name for name, _ in net.named_modules()], list(net.state_dict())) == before
    assert bound.pairs is not None
    assert certify.lipschitz(net, input_shape=SHAPE).evidence["network"] == bound.evidence["network"]
    with torch.no_grad():
        net[0].matrix.add_(1.0)  # not used by its forward
        net[2].weight.mul_(2.0)
    doubled = certify.lipschitz(net, input_shape=SHAPE)
    assert doubled.value == pytest.approx(2 * bound.value, rel=1e-9)
    assert doubled.evidence["network"] != bound.evidence["network"]


def test_a_product_beyond_float64_is_refused_and_one_that_is_huge_is_rounded_up():
    def chain(depth):
        net = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(depth))).eval()
        for layer in net:
            nn.init.constant_(layer.weight, 1.5 * 2.0**100)
        return net

    exact = int(1.5 * 2**100) ** 10
    assert exact <= certify.lipschitz(chain(10), input_shape=(1,)).value <= exact * (1 + 1e-9)
    assert "e+" in str(certify.lipschitz(chain(10), input_shape=(1,)))
    with pytest.raises(certify.Unsupported, match=r"beyond 1.8e308"):
        certify.lipschitz(chain(11), input_shape=(1,))


def test_shared_parts_of_residual_networks_are_listed_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return x + self.inner(torch.relu(x))

    net = nn.Sequential(*(Block() for _ in range(30))).eval()
    assert len(certify.lipschitz(net, input_shape=(3,)).table()) < 3000
