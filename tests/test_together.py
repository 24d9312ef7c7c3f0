"""Signals beside each other that are bounded together: exact on sorting, sound on whatever looks like it."""

import itertools
import math

import pytest
import torch
from torch import nn

import certify
import lipnet


class Of(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def halves(x):
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def sorted_halves(x):
    a, b = halves(x)
    return torch.cat([torch.maximum(a, b), torch.minimum(b, a)], 1)


def sorted_pairs(x):
    a, b = x.unflatten(1, (-1, 2)).unbind(2)
    return torch.stack([a.minimum(b), a.maximum(b)], 2).flatten(1)


def sorted_of_two_maps(x):
    a, b = 2 * x, torch.relu(x)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


EXACT = {
    "halves": (sorted_halves, (6,), 1.0),
    "pairs": (sorted_pairs, (6,), 1.0),
    "frozen MaxMin": (lipnet.freeze(lipnet.MaxMin()), (6,), 1.0),
    "frozen MaxMin of images": (lipnet.freeze(lipnet.MaxMin()), (4, 3, 3), 1.0),
    "chunks": (lambda x: torch.cat([torch.maximum(*x.chunk(2, 1)), torch.minimum(*x.chunk(2, 1))], 1), (6,), 1.0),  # four pieces: not seen as two
    "all entries again": (lambda x: torch.cat([x[:, 4:], x[:, :4]], 1), (6,), 1.0),
    "one entry twice": (lambda x: torch.cat([x[:, 3:], x[:, :4]], 1), (6,), math.sqrt(2)),
    "the same signal": (lambda x: torch.cat([torch.maximum(x, x), torch.minimum(x, x)], 1), (4,), math.sqrt(2)),
    "two maps": (sorted_of_two_maps, (4,), math.sqrt(5)),
    "after a layer": (lambda x: 3 * sorted_halves(3 * x), (6,), 9.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_sorting_is_bounded_as_what_it_sorts(name):
    function, shape, constant = EXACT[name]
    bound = certify.lipschitz(Of(function).eval() if not isinstance(function, nn.Module) else function, input_shape=shape).value
    assert constant <= bound <= (2 if name == "chunks" else constant) * (1 + 1e-9)


NOT_SORTED = {
    "both larger": lambda x: torch.cat([torch.maximum(*halves(x)), torch.maximum(*halves(x))], 1),
    "three parts": lambda x: torch.cat([torch.maximum(*halves(x)), torch.minimum(*halves(x)), x[:, :3]], 1),
    "other signals": lambda x: torch.cat([torch.maximum(x, 2 * x), torch.minimum(x, 3 * x)], 1),
    "one is larger": lambda x: torch.cat([torch.maximum(*halves(x)), torch.minimum(*halves(4 * x))], 1),
    "repeated to fit": lambda x: torch.cat([torch.maximum(x, x[:, :1]), torch.minimum(x, x[:, :1])], 1),
    "with numbers": lambda x: torch.cat([torch.maximum(x, torch.ones(6)), torch.minimum(x, torch.ones(6))], 1),
    "overlapping": lambda x: torch.cat([torch.maximum(x[:, :4], x[:, 2:]), torch.minimum(x[:, :4], x[:, 2:])], 1),
    "flipped": lambda x: torch.stack([torch.maximum(x, x.flip(1)), torch.minimum(x, x.flip(1))], 1),
    "after something": lambda x: torch.cat([torch.maximum(*halves(x)).relu(), 5 * torch.minimum(*halves(x))], 1),
}


@pytest.mark.parametrize("name", NOT_SORTED)
def test_what_only_looks_like_sorting_is_bounded_all_the_same(name):
    net = Of(NOT_SORTED[name]).eval()
    bound = certify.lipschitz(net, input_shape=(6,)).value
    seen = 0.0
    for seed, scale in itertools.product(range(60), (0.1, 1.0)):
        torch.manual_seed(seed)
        x = torch.randn(6, dtype=torch.float64) * scale
        seen = max(seen, float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(lambda z: net(z[None]).flatten(), x), 2)))
    assert seen <= bound * (1 + 1e-9)


def test_frozen_networks_keep_their_bounds():
    torch.manual_seed(0)
    net = nn.Sequential(lipnet.BROLinear(8, 16), lipnet.MaxMin(), lipnet.BROLinear(16, 16), lipnet.MaxMin(), lipnet.UnitRowLinear(16, 3)).eval()
    assert certify.lipschitz(lipnet.freeze(net), input_shape=(8,)).value == pytest.approx(certify.lipschitz(net, input_shape=(8,)).value, rel=1e-6)
