"""Proved signs of slopes: no pair of inputs contradicts them, known cases are met, and pieces prove what one box cannot."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify.local import monotone as module

ACTIVATIONS = {"relu": nn.ReLU, "maxmin": lipnet.MaxMin, "tanh": nn.Tanh, "gelu": nn.GELU}


def network(activation: str, seed: int = 0, outputs: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    make = ACTIVATIONS[activation]
    return nn.Sequential(nn.Linear(5, 12), make(), nn.Linear(12, 8), make(), nn.Linear(8, outputs)).double().eval()


def contradictions(net: nn.Module, found: certify.Monotone, low: np.ndarray, high: np.ndarray) -> int:
    """How often an output falls where it is said not to, or rises, between random inputs of a box that differ in one entry."""
    generator = np.random.default_rng(0)
    count = 0
    for entry in range(low.size):
        first = generator.uniform(low, high, size=(400, low.size))
        second = first.copy()
        second[:, entry] = generator.uniform(first[:, entry], high[entry])
        with torch.no_grad():
            rise = (net(torch.from_numpy(second)) - net(torch.from_numpy(first))).numpy()
        count += int((rise * found.signs[:, entry] < -1e-12).sum())
    return count


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_two_inputs_contradict_a_sign(activation: str) -> None:
    net, known = network(activation), 0
    graph = certify.Graph.of(net, (5,))
    for radius in (0.05, 0.4):
        center = np.random.default_rng(3).normal(size=5)
        low, high = center - radius, center + radius
        found = certify.monotone(graph, certify.Box(low, high))
        assert found.signs.shape == found.low.shape == (2, 5)
        assert contradictions(net, found, low, high) == 0
        known += int(np.count_nonzero(found.signs))
        ball = certify.monotone(graph, certify.Ball(center, radius, 2))
        assert (ball.signs[found.signs != 0] == found.signs[found.signs != 0]).all()  # the ball is inside of the box
    assert known > 4


def test_a_flipped_sign_would_be_noticed() -> None:
    net, low, high = network("relu"), -0.1 * np.ones(5), 0.1 * np.ones(5)
    found = certify.monotone(net, certify.Box(low, high), input_shape=(5,))
    wrong = certify.Monotone(-found.signs, found.low, found.high, found.domain, found.assumptions)
    assert contradictions(net, wrong, low, high) > 100


def test_a_linear_map_has_the_signs_of_its_weights() -> None:
    net = nn.Linear(4, 3).double().eval()
    net.weight.data = torch.tensor([[1.0, -2.0, 0.0, 1e-6], [3.0, 1.0, -1.0, -1.0], [0.5, 1.0, 2.0, -3.0]], dtype=torch.float64)
    graph = certify.Graph.of(net, (4,))
    found = certify.monotone(graph, certify.Ball(np.zeros(4), 10.0, math.inf))
    assert (found.signs == [[1, -1, 0, 1], [1, 1, -1, -1], [1, 1, 1, -1]]).all()
    assert found.low == pytest.approx(net.weight.detach().numpy())
    difference = certify.monotone(graph, certify.Ball(np.zeros(4), 10.0), rows=[[1, -1, 0], [0, 1, 1]])
    assert (difference.signs == [[-1, -1, 1, 1], [1, 1, 1, -1]]).all()


def test_what_two_gates_decide_together_needs_pieces() -> None:
    """`3 relu(x) - 2 relu(x - 1) + x / 10` rises everywhere; seen as one box, both ReLUs are undecided, and the slope could be -1.9."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double().eval()
    net[0].weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    net[0].bias.data = torch.tensor([0.0, -1.0, 10.0], dtype=torch.float64)
    net[2].weight.data = torch.tensor([[3.0, -2.0, 0.1]], dtype=torch.float64)
    box = certify.Box(np.array([-2.0, 0.0]), np.array([2.0, 0.0]))
    graph = certify.Graph.of(net, (2,))
    whole = certify.monotone(graph, box)
    assert whole.signs[0, 0] == 0
    assert whole.low[0, 0] == pytest.approx(-1.9)
    cut = certify.monotone(graph, box, pieces=5)
    assert cut.signs[0, 0] == 1
    assert cut.low[0, 0] == pytest.approx(0.1)
    assert cut.high[0, 0] == pytest.approx(3.1)
    assert certify.monotone(graph, box, pieces=5, along=1).signs[0, 0] == 0  # that entry has nothing to cut


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pieces_only_sharpen_and_hold(activation: str) -> None:
    net = network(activation, seed=4)
    low, high = np.zeros(5), np.array([0.0, 3.0, 0.0, 0.1, 0.0])
    graph = certify.Graph.of(net, (5,))
    whole, cut = (certify.monotone(graph, certify.Box(low, high), pieces=pieces) for pieces in (1, 8))
    assert (cut.low >= whole.low - 1e-9).all()
    assert (cut.high <= whole.high + 1e-9).all()
    assert contradictions(net, cut, low, high) == 0
    inputs = torch.from_numpy(np.random.default_rng(5).uniform(low, high, size=(60, 5)))
    for x in inputs:
        seen = torch.autograd.functional.jacobian(lambda x: net(x[None])[0], x).numpy()
        assert (seen >= cut.low - 1e-9).all()
        assert (seen <= cut.high + 1e-9).all()


def test_the_pieces_leave_nothing_out() -> None:
    generator = np.random.default_rng(6)
    for pieces in (2, 3, 7, 100):
        low = generator.normal(size=3) * 10.0 ** generator.integers(-300, 300, size=3)
        high = np.maximum(low, low + generator.uniform(size=3) * np.abs(low))
        boxes = list(module._pieces(certify.Box(low, high), pieces, None, 3))
        cut = int(np.argmax(high / 2 - low / 2))
        assert len(boxes) == pieces
        assert (boxes[0].low == low).all()
        assert (boxes[-1].high == high).all()
        assert all(a.high[cut] == b.low[cut] for a, b in itertools.pairwise(boxes))


def test_what_rounding_hides_has_no_sign() -> None:
    """`1e8 (x + 1) - 1e8 x - 1e8` is 0 for every x: its slope is found near 0, and never claimed to have a sign."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    net[0].weight.data, net[0].bias.data = torch.full((2, 1), 0.1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    net[2].weight.data = torch.tensor([[1e8 / 3, -1e8 / 3]], dtype=torch.float64)
    found = certify.monotone(net, certify.Ball(np.zeros(1), 1.0), input_shape=(1,))
    assert found.signs[0, 0] == 0
    assert found.low[0, 0] < 0 < found.high[0, 0] < 1e-6


def test_it_prints_itself() -> None:
    net = nn.Linear(130, 1).double().eval()
    net.weight.data = torch.tensor([[1.0, -1.0, 0.0] * 43 + [1.0]], dtype=torch.float64)
    text = str(certify.monotone(net, certify.Ball(np.zeros(130), 0.5), input_shape=(130,)))
    assert "87 of 130 slopes have one sign on the Ball of radius 0.5 in l2" in text
    assert "output 0: +-.+-." in text
    assert "assumes REAL_ARITHMETIC" in text
    assert max(map(len, text.splitlines())) <= 120


def test_refusals() -> None:
    net, ball = network("relu"), certify.Ball(np.zeros(5), 0.1)
    graph = certify.Graph.of(net, (5,))
    box = certify.Box(np.zeros(5), np.ones(5))
    for options, message in (
        ({"rows": [[1.0, -1.0, 0.0]]}, r"rows are \(rows, 2\)"),
        ({"rows": [[math.nan, 1.0]]}, "finite numbers"),
        ({"rows": [[1.0], [2.0, 3.0]]}, "rows are"),
        ({"pieces": 0}, "at least one, got pieces=0"),
        ({"pieces": 2.5, "domain": box}, "whole number of pieces"),
        ({"pieces": 2, "domain": certify.Box(np.full(5, -1e308), np.full(5, 1e308))}, "too long to be cut"),
        ({"pieces": 2}, "only a Box is cut"),
        ({"memory": 0.0}, "memory is a positive"),
        ({"memory": 1e-9, "domain": box}, "more memory"),
        ({"pieces": 2, "along": 5, "domain": box}, "along is an entry"),
        ({"pieces": 2, "domain": certify.Box(np.zeros(5), np.full(5, math.inf))}, "finite Box"),
        ({"pieces": 2, "domain": certify.Box(np.zeros(4), np.ones(4))}, "of 5 inputs"),
        ({"domain": certify.Everywhere()}, "finite Box"),
    ):
        with pytest.raises(certify.CertifyError, match=message):
            certify.monotone(graph, **{"domain": ball, **options})
    with pytest.raises(certify.CertifyError, match="pass input_shape"):
        certify.monotone(net, ball)
    with pytest.raises(certify.Unsupported, match="softmax"):
        certify.monotone(nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)).eval(), certify.Ball(np.zeros(3), 0.1), input_shape=(3,))
