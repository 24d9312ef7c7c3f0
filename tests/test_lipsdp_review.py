"""LipSDP against the networks themselves: what a wiring computes, in-place modules, sizes, windows of padding, dead neurons."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import special
from tables import ACTIVATIONS, LAYERS
from torch import nn

import certify
import lipnet
import sdp
from certify.bound import Ball, Everywhere
from certify.cli import main
from certify.graph import Graph
from certify.lipsdp import LipSDP
from certify.lure import wire
from sdp.chain import Chain

BY_NAME = {
    "relu": lambda v: np.maximum(v, 0),
    "abs": np.abs,
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "leaky_relu": lambda v, slope: np.where(v > 0, v, slope * v),
    "clamp": np.clip,
    "silu": lambda v: v * special.expit(v),
    "gelu": lambda v: v * special.ndtr(v),
}
KINDS = {
    "input": lambda of, numbers, x: x,
    "linear": lambda of, numbers, x: numbers["matrix"] @ of[0],
    "shift": lambda of, numbers, x: of[0] + numbers["offset"],
    "scale": lambda of, numbers, x: numbers["factor"] * of[0],
    "add": lambda of, numbers, x: of[0] + of[1],
    "pick": lambda of, numbers, x: of[0][numbers["which"]],
    "join": lambda of, numbers, x: np.concatenate(of),
}
REFUSED = ("fourier", "l2-pool")


def run_again(wired, x, unnamed=None):  # (signals, samples)
    """The steps of a wiring, with the functions themselves in place of their slopes; where a function is affine, it is its slope and intercept."""
    made = []
    for step in wired.wiring.steps:
        of, numbers = [made[k] for k in step.of], {name: part if part.ndim > 1 or name == "which" else part[:, None] for name, part in step.numbers.items()}
        if step.what == "nonlinear":
            word, *ends = step.name.rstrip(")").replace("(", ",").split(",")
            value = BY_NAME[word](of[0], *map(float, ends)) if word in BY_NAME else unnamed(of[0])
            affine, line = (numbers["lower"] == numbers["upper"])[:, 0], numbers["lower"] * of[0] + numbers["intercept"]
            np.testing.assert_allclose(line[affine], value[affine], rtol=1e-9, atol=1e-9)
        else:
            value = KINDS[step.what](of, numbers, x)
        made.append(value)
    return made[wired.output.number]


@torch.no_grad()
def assert_same(net, shape, unnamed=None, radius=None):
    """A wiring, everywhere or on a ball, computes what the frozen network computes in float64."""
    graph, generator = Graph.of(net.eval(), shape), torch.Generator().manual_seed(0)
    inputs = 3 * torch.randn(8, *shape, generator=generator, dtype=torch.float64)
    if radius is not None:
        inputs = inputs[:1] + radius * (2 * torch.rand(8, *shape, generator=generator, dtype=torch.float64) - 1)
    wired = wire(graph, Everywhere() if radius is None else Ball((inputs.amin(0) / 2 + inputs.amax(0) / 2).numpy(), radius, math.inf))
    theirs = graph.double(inputs.clone()).flatten(1).numpy().T
    ours = run_again(wired, inputs.flatten(1).numpy().T, unnamed)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * (1 + np.abs(theirs).max()))


@pytest.mark.parametrize("radius", [None, 0.1])
@pytest.mark.parametrize("row", [row for row in LAYERS if not row.name.startswith(REFUSED)], ids=str)
def test_a_wiring_computes_what_the_layer_computes(row, radius):
    torch.manual_seed(0)
    net = row.make()

    def itself(v):  # the only layer whose nonlinearity has no name
        return net.double()(torch.from_numpy(v.T.reshape(-1, *row.shape))).flatten(1).numpy().T

    assert_same(net, row.shape, itself, radius)


@pytest.mark.parametrize("radius", [None, 0.1])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_wiring_computes_what_the_activation_computes(activation, radius):
    torch.manual_seed(0)
    net, exact = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3)), copy.deepcopy(activation).double()
    assert_same(net, (4,), lambda v: exact(torch.from_numpy(v)).detach().numpy(), radius)


class Mixed(nn.Module):
    """Shared modules, numbers and tensors on both sides, a size in a reshape."""

    def __init__(self):
        super().__init__()
        self.inner, self.again, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.act, self.shift = nn.ReLU(), nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = self.act(self.again(self.act(self.again(self.inner(x.view(x.shape[0], -1))))))
        return self.head(self.shift - 0.3 * h.abs() + (1.5 - torch.tanh(self.inner(x))).neg() - self.act(self.shift + h))


NETS = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), nn.ReLU(), nn.BatchNorm1d(6)), (4, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2), nn.LeakyReLU(-0.3)), (4, 6, 7)),
    "same": (lambda: nn.Sequential(nn.Conv2d(2, 3, (1, 3), padding="same", dilation=2), nn.BatchNorm2d(3), nn.SiLU()), (2, 5, 6)),
    "circular": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), nn.GELU()), (2, 5, 6)),
    "wraps": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), nn.GELU()), (2, 2, 4)),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, (1, 2), padding=1, groups=2, padding_mode="reflect"), nn.ReLU()), (2, 3, 5)),
    "replicate": (lambda: nn.Sequential(nn.Conv1d(2, 3, 4, padding=2, padding_mode="replicate"), nn.ReLU()), (2, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, 2, dilation=2), lipnet.MaxMin("halves")), (4, 3, 4)),
    "average": (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.AdaptiveAvgPool2d((5, 2))), (2, 6, 7)),
    "divisor": (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1, divisor_override=2), nn.Hardtanh(-0.2, 0.7)), (2, 6, 7)),
    "largest": (lambda: nn.Sequential(nn.MaxPool2d(2, 3, 1, dilation=2, ceil_mode=True), nn.ReLU6(inplace=True)), (2, 6, 7)),
    "largest1": (lambda: nn.Sequential(nn.MaxPool1d(3, 2, 1, ceil_mode=True), nn.Tanh()), (2, 6)),
    "largest3": (lambda: nn.Sequential(nn.MaxPool3d((2, 1, 2), (1, 2, 2), (1, 0, 0)), nn.ReLU()), (2, 2, 3, 4)),
    "pads": (lambda: nn.Sequential(nn.ConstantPad2d((1, -1, 0, 2), 3.5), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1)), (1, 4, 4)),
    "shuffle": (lambda: nn.Sequential(nn.PixelShuffle(2), nn.Flatten(), nn.Unflatten(1, (6, 8)), nn.Linear(8, 3), nn.Tanh()), (4, 3, 4)),
    "sorts": (lambda: nn.Sequential(nn.Conv2d(1, 10, 2), lipnet.GroupSort(5), lipnet.Householder(10)), (1, 4, 3)),
    "inside": (lambda: nn.Sequential(lipnet.LDLTConv2d(2, 3, (5,), stride=2, activation=nn.ReLU(inplace=True)), nn.Flatten()), (2, 4, 4)),
    "half-line": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Hardtanh(0.0, math.inf), nn.Linear(4, 2)), (3,)),
    "mixed": (Mixed, (3,)),
}


@pytest.mark.parametrize("radius", [None, 0.1])
@pytest.mark.parametrize("name", NETS)
def test_a_wiring_computes_what_the_network_computes(name, radius):
    torch.manual_seed(0)
    net, shape = NETS[name][0](), NETS[name][1]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.01, 3)
    assert_same(net, shape, lambda v: np.maximum(v, 0), radius)  # the half line


@pytest.mark.parametrize("mode", ["circular", "replicate"])
@pytest.mark.parametrize("taps", list(itertools.permutations((1e20, 1.0, -1e20))), ids=str)
def test_taps_that_meet_one_pixel_are_summed_with_their_rounding(mode, taps):
    """On an image of one pixel the network is relu(x), and float64 makes 0 of the three taps in most orders: 1e-140 was proved."""
    net = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, padding_mode=mode, bias=False), nn.Flatten(), nn.ReLU()).double().eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(taps).double().reshape(1, 1, 3))
    assert certify.lipschitz(net, LipSDP(), input_shape=(1, 1)).value >= 1


@torch.no_grad()
def test_a_border_that_shows_pixels_again_keeps_the_bound_tight():
    """The dense twin of a convolution with a reflected border: the same matrix, so the same constant but for the rounding of the sums."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), nn.ReLU(), nn.Flatten(), nn.Linear(21, 2)).double().eval()
    whole = nn.Linear(10, 21, bias=False).double()
    whole.weight.copy_((net[0](torch.eye(10).double().reshape(10, 2, 5)) - net[0].bias[:, None]).flatten(1).T)
    twin = nn.Sequential(whole, nn.ReLU(), net[3]).eval()
    found, expected = (certify.lipschitz(n, LipSDP(), input_shape=shape).value for n, shape in ((net, (2, 5)), (twin, (10,))))
    assert found == pytest.approx(expected, rel=1e-6)


class InPlace(nn.Module):
    """`x -> head(relu(h))` where the relu works in place on h, whose other reader sees its work."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inner, self.act, self.head = how, nn.Linear(1, 2, bias=False), nn.ReLU(inplace=True), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.inner.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            self.head.weight.fill_(1.0)

    def forward(self, x):
        h = self.inner(x)
        if self.how == "chain":
            return self.head(self.act(h))
        if self.how == "unused":
            self.act(h)
            return self.head(h)
        if self.how == "view":
            self.act(h.view(-1, 2))
            return self.head(h)
        return self.head(0.01 * self.act(h) + h)  # "skip"


def test_a_module_in_place_on_a_chain_is_what_it_seems():
    net = InPlace("chain").eval()
    assert certify.lipschitz(net, LipSDP(), input_shape=(1,)).value >= 1


@pytest.mark.parametrize("how", ["unused", "view", "skip"])
def test_a_signal_that_is_read_after_it_was_overwritten_is_refused(how):
    """The trace says `head(h)`, of constant 0 or 0.01, and torch computes `head(relu(h))`, of constant 1: what was proved was below the truth."""
    net = InPlace(how).eval()
    assert (net(torch.ones(1, 1)) - net(torch.zeros(1, 1))).item() >= 1
    with pytest.raises(certify.Unsupported, match="overwritten; pass inplace=False"):
        certify.lipschitz(net, LipSDP(), input_shape=(1,))
    net.act.inplace = False
    certify.lipschitz(net, LipSDP(), input_shape=(1,))


class Sized(nn.Module):
    def forward(self, x):
        return torch.relu(x) - x.shape[0]


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (Sized(), (3,), "sub.*counts with the number of inputs in a batch"),
        (nn.Sequential(nn.MaxPool2d(2, stride=1, padding=1, dilation=5)), (1, 4, 4), "MaxPool2d at 0: has windows with nothing but padding"),
        (nn.Sequential(nn.ReLU(), nn.ConstantPad2d(1, -math.inf)), (1, 4, 4), "ConstantPad2d at 1: pads with NaN or infinity"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), (3,), "has no running statistics"),
    ],
)
def test_what_cannot_be_wired_is_refused_by_its_place(net, shape, message):
    with pytest.raises(certify.Unsupported, match=message):
        wire(Graph.of(net.eval(), shape), Everywhere())


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_neurons_without_weights_cost_nothing(norm):
    """Their multipliers are best at infinity, which kept Newton's method from the others (bounds twice, from l-infinity five times as large)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1)).eval()
    net[0].weight.data[[3, 7]], net[2].weight.data[5], net[2].weight.data[:, 2] = 0.0, 0.0, 0.0
    rest = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1)).eval()
    rest.load_state_dict(net.state_dict())
    with torch.no_grad():
        rest[0].weight[3], rest[0].weight[7], rest[2].weight[5] = 1e-12, 1e-12, 1e-12
    method = LipSDP(norm=norm, tolerance=1e-6)
    bound, nearly = (certify.lipschitz(part, method, input_shape=(8,)).value for part in (net, rest))
    assert bound == pytest.approx(nearly, rel=1e-5)
    assert certify.lipschitz(net, LipSDP(norm=norm, multipliers="layer"), input_shape=(8,)).value >= bound * (1 - 1e-5)


def test_layers_that_are_nothing_but_zeros_have_the_constant_0():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    net[0].weight.data.zero_()
    for norm in (1, 2, math.inf):
        for multipliers in ("neuron", "layer"):
            assert certify.lipschitz(net, LipSDP(norm=norm, multipliers=multipliers), input_shape=(3,)).value < 1e-6


def chain_of(numbers):
    net = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in numbers]).double().eval()
    for layer, number in zip(net, numbers, strict=True):
        layer.weight.data.fill_(number)
    return net


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_products_that_vanish_in_float64_are_not_taken_for_zero(norm):
    """The constant is 1; what was proved of the product that had become 0 was 1e-140."""
    net = chain_of([1e-150] * 3 + [1e150] * 3)
    assert certify.lipschitz(net, LipSDP(norm=norm), input_shape=(1,)).value >= 1


def test_constants_whose_square_is_beyond_float64_are_no_crash():
    assert certify.lipschitz(chain_of([1e200, 1e-200]), LipSDP(), input_shape=(1,)).value >= 1 - 1e-9


@pytest.mark.parametrize("solver", ["newton", "first-order", "split", "rescaled", "closed-form"])
@pytest.mark.parametrize("weights", [(1e300, 1.0), (1e200, 1e100), (1e-150, 1e300)], ids=str)
def test_weights_beyond_the_squares_of_float64_have_the_product_of_the_layers(solver, weights):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(0.25), nn.Linear(4, 3)).double().eval()
    for layer, factor in zip((net[0], net[2]), weights, strict=True):
        layer.weight.data *= factor
    found, product = (certify.lipschitz(net, method, input_shape=(2,)).value for method in (LipSDP(solver=solver), certify.Layerwise()))
    sampled = float(torch.linalg.matrix_norm(net[2].weight / weights[1] @ (net[0].weight / weights[0]), 2).detach()) / 4
    assert sampled * weights[0] * weights[1] <= found <= product


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_equal_signals_that_are_sorted_on_a_region_keep_the_bound_tight(norm):
    """Of their difference nothing but rounding is left, which has no best multiplier: from l2 the product of the layers was the answer, 90 times as much."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), lipnet.MaxMin(), nn.Linear(2, 2)).eval()
    net[2].weight.data[1], net[2].bias.data = net[2].weight.data[0], torch.zeros(2)
    ball = certify.Ball([3.0, 1.0], 1e-3)
    found, local = (certify.lipschitz(net, method, input_shape=(2,), domain=ball).value for method in (LipSDP(norm=norm), certify.Local(norm=norm)))
    assert found == pytest.approx(local, rel=1e-6)


def test_the_first_order_method_ends_where_a_matrix_of_a_layer_is_singular():
    """Two neurons are the same: its Cholesky factorisation runs to its end, and what is solved with it is singular."""
    first = np.array([[-0.8502311469014786], [-0.06800599041379808]])
    second = np.array([0.6439652491159118, -0.1562877762880922, -0.9143003793202409, -0.5752165944879307, 0.18803998910257833, -0.5233153384594824])
    second = np.append(second, [-0.006428406716187617, 0.6045437494474459]).reshape(4, 2)
    third = np.array([0.8018165990809025, 0.9790050747908036, 1.4995160584156597, 0.06536914175314666, -0.040524709633525974, 0.41318628431843113])
    third = np.append(third, [1.0284255967527818, 0.6786592863211385, 0.8348237394920854, 0.08745150941050202, 0.3635443358682566, -1.4363031218710758])
    third = third.reshape(3, 4)[[0, 0, 1, 2]]
    last = np.array([[-0.7297972075487844, 0.794348146061851, 1.6014057211041541, -0.3837150654316554]])
    lower, places = (np.full(2, 0.25), np.zeros(4), np.zeros(4)), (np.arange(2), 2 + np.arange(4), 6 + np.arange(4))
    chain = Chain((first, second, third, last), lower, (np.ones(2), np.ones(4), np.ones(4)), places)
    found = sdp.lipsdp(chain.system(), "first-order")
    assert sdp.lipsdp(chain.system()).bound <= found.bound * (1 + 1e-6)


@pytest.mark.parametrize("change", ["hex", "largest_pair", "failure", "guarantee", "assumptions"])
def test_check_contradicts_what_a_manifest_says_of_its_bound(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    lipnet.save(net, "net.safetensors", input_shape=(1, 2, 2))
    np.savez("data.npz", x=np.ones((2, 1, 2, 2), dtype=np.float32), y=np.zeros(2, dtype=np.int64))
    assert main(["run", "net.safetensors", "data.npz", "-o", "out", "--bound", "lipsdp", "--quiet"]) == 0
    assert main(["check", "out"]) == 0
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    changes = {"hex": "0x1p-9", "largest_pair": 1e-9, "failure": 0.5, "guarantee": "estimate", "assumptions": []}
    (manifest["bound"] if change in manifest["bound"] and change != "assumptions" else manifest)[change] = changes[change]
    path.write_text(json.dumps(manifest))
    assert main(["check", "out"]) == 4


def test_inputs_beyond_the_memory_are_refused_before_a_matrix_is_made():
    with pytest.raises(certify.CertifyError, match="for the 6000000 signals that it has met so far"):
        wire(Graph.of(nn.Sequential(nn.ReLU()).eval(), (3_000_000,)), Everywhere())
