"""Random networks of every shape: residual sums, concatenations, pools, convolutions. No slope exceeds a bound, and both ways to a graph give one bound."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import certify
import lipnet
from certify.exported import raised
from certify.graph import Graph, _trials

INPUT = (2, 6, 6)
STEPS = ("conv", "strided", "transposed", "pool", "average", "norm", "bend", "add", "cat", "pad", "slice", "scale", "function")


class Random(nn.Module):
    """A random sequence of steps, each on one or two of the signals so far; the signals keep their heights and widths equal by cropping."""

    def __init__(self, seed, steps=7):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.plan, self.parts = [], nn.ModuleList()
        channels = [2]

        def pick(count):
            return int(torch.randint(count, (1,), generator=generator))

        torch.manual_seed(seed)
        for _ in range(steps):
            kind, source, other = STEPS[pick(len(STEPS))], pick(len(channels)), pick(len(channels))
            c, made, part = channels[source], 1 + pick(4), None
            match kind:
                case "conv":
                    mode = ("zeros", "circular", "reflect", "replicate")[pick(4)]
                    part = nn.Conv2d(c, made, 3, padding=1 + pick(1), dilation=1, padding_mode=mode)
                case "strided":
                    made, part = c * (1 + pick(2)), None
                    part = nn.Conv2d(c, made, (2, 3), stride=(1, 2), groups=c, bias=False)
                case "transposed":
                    part = nn.ConvTranspose2d(c, made, 2 + pick(2), stride=1 + pick(2))
                case "pool":
                    part = nn.MaxPool2d(2 + pick(2), 1 + pick(2), ceil_mode=bool(pick(2)))
                case "average":
                    part = (nn.AvgPool2d(2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d((4, 3)))[pick(2)]
                case "norm":
                    part = nn.BatchNorm2d(c)
                    part.running_var.uniform_(0.3, 2.0)
                    nn.init.normal_(part.weight)
                case "bend":
                    part = (nn.PReLU(c, init=-0.7), nn.Hardswish(), nn.Tanh(), nn.ELU(1.5), lipnet.Abs(), nn.Mish(), nn.Softmax(1))[pick(7)]
                case "pad":
                    part = (nn.ReflectionPad2d(1), nn.ZeroPad2d((1, 0, 2, -1)), nn.CircularPad2d((1, 1, 0, 1)))[pick(3)]
            made = (
                made if kind in ("conv", "strided", "transposed") else c + channels[other] if kind == "cat" else min(c, channels[other]) if kind == "add" else c
            )
            channels.append(max(c - 1, 1) if kind == "slice" else made)
            self.plan.append((kind, source, other, channels[-1], len(self.parts) if part is not None else None))
            if part is not None:
                self.parts.append(part)
        self.last = nn.Linear(channels[-1], 3)

    def forward(self, x):
        signals = [x]
        for kind, source, other, channels, part in self.plan:
            h, o = signals[source], signals[other]
            if part is not None:
                h = self.parts[part](functional.pad(h, (0, 3, 0, 3)))  # so that no signal becomes too small
            elif kind in ("add", "cat"):
                h, o = self.fit(h), self.fit(o)
                h = torch.cat([h, o], 1) if kind == "cat" else h[:, :channels] - 0.5 * o[:, :channels]
            elif kind == "slice":
                h = h[:, -channels:, ::2]
            elif kind == "scale":
                h = (h / 3 + 1).transpose(2, 3) + h.mean((2, 3), keepdim=True)[:, :, :1].transpose(2, 3)
            else:
                h = functional.leaky_relu(functional.max_pool2d(h, 2, 1, padding=1), -0.3)
            signals.append(h)
        return self.last(signals[-1].mean((2, 3)) + signals[-1][..., 0, 0])

    @staticmethod
    def fit(h):
        return functional.pad(h, (0, 5 - h.shape[3], 0, 5 - h.shape[2]))


def steepest(net, seed):
    """The largest slope at random points, between random pairs of points at several scales, and uphill from one point to the next."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, *INPUT, generator=generator, dtype=torch.float64) * 3
    step = torch.randn(64, *INPUT, generator=generator, dtype=torch.float64) * 10.0 ** (torch.arange(64) % 5 - 3.0)[:, None, None, None]
    with torch.no_grad():
        found = [((net(x + step) - net(x)).flatten(1).norm(dim=1) / step.flatten(1).norm(dim=1)).max().item()]
    point = x[:1]
    for _ in range(2):
        jacobian = torch.autograd.functional.jacobian(net, point).reshape(-1, point.numel())
        _, values, directions = torch.linalg.svd(jacobian, full_matrices=False)
        found.append(values[0].item())
        point = point + 0.3 * directions[0].reshape(point.shape)
    return max(found)


@pytest.mark.parametrize("seed", range(20))
def test_no_slope_of_a_random_network_exceeds_its_bound(seed):
    net = Random(seed).eval()
    graph = Graph.of(net, INPUT)
    bound = certify.lipschitz(net, input_shape=INPUT).value
    assert steepest(graph.double, seed) <= bound * (1 + 1e-7) < math.inf


@pytest.mark.parametrize("seed", range(0, 20, 10))
def test_export_and_trace_of_a_random_network_give_one_bound(seed):
    net = Random(seed).eval()
    parent, trace, problems = raised(net, INPUT, "")
    assert not problems
    shapes, constants = _trials(parent, trace, INPUT)
    with torch.no_grad():
        value = certify.Layerwise().bound(Graph(parent, trace, shapes, INPUT, constants), certify.bound.Everywhere()).value
    assert value == pytest.approx(certify.lipschitz(net, input_shape=INPUT).value, rel=1e-12)
