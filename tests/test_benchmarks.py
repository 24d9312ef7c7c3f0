"""The benchmark of training: it runs, and its proofs of the papers' layers hold for what those layers do.

The papers' code is not part of the project: with LIPNET_PAPERS, a folder with checkouts named LBDN, SLL, BRONet and LiResNet, their layers are tested too.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from benchmarks import peers, training

ROOT = pathlib.Path(__file__).parent.parent
NAMES = training.PAPERS


def papers():
    folder = pathlib.Path(os.environ.get("LIPNET_PAPERS", ""))
    if "LIPNET_PAPERS" not in os.environ or not all((folder / name).is_dir() for name in NAMES):
        pytest.skip("LIPNET_PAPERS names no folder with the papers' code in it")
    return {name: peers.Papers(name, folder / name) for name in NAMES}


def slope(net):
    """The largest spectral norm of the Jacobian of the network as it runs, at random images of several scales."""
    slopes = []
    for i in range(4):
        x = 10.0 ** (i - 2) * torch.randn(1, 1, 28, 28)
        jacobian = torch.autograd.functional.jacobian(net, x).reshape(-1, x.numel())
        slopes.append(torch.linalg.matrix_norm(jacobian.double(), 2).item())
    return max(slopes)


def shaken(net, scale):
    """The network after a step that no training would take."""
    with torch.no_grad():
        net(torch.rand(2, 1, 28, 28))  # LBDN makes a parameter in its first forward
        for parameter in net.parameters():
            parameter.add_(scale * parameter.abs().mean() * torch.randn_like(parameter))
    return peers.settle(net)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["LBDN", "SLL", "BRONet", "LiResNet", "LiResNet (Cholesky)"])
def test_no_slope_of_the_papers_networks_exceeds_their_bound(kind, name):
    made = (peers.dense if kind == "dense" else peers.convolutional)(papers())
    if name not in made:
        pytest.skip("there is no such network")
    torch.manual_seed(0)
    net = shaken(made[name]((1, 28, 28), 8), 0.3)
    bound = peers.prove(net, (1, 28, 28))
    features = bound.evidence["features"]
    assert slope(net) <= bound.value * (1 + 1e-5)
    seen = slope(nn.Sequential(*list(net)[:-1]))
    assert 0.1 * features < seen <= features * (1 + 1e-5)
    with torch.no_grad():
        claimed = float(peers.claim(net))
    assert claimed <= features * (1 + 1e-3)


def test_every_network_of_ours_trains_and_is_proved():
    for make in (*training.dense().values(), *training.convolutional().values()):
        torch.manual_seed(0)
        net = peers.settle(make((1, 28, 28), 8))
        bound = peers.prove(net, (1, 28, 28))
        assert bound.evidence["features"] <= float(torch.as_tensor(peers.claim(net)).detach()) * (1 + 1e-5)
        whole = certify.lipschitz(net, input_shape=(1, 28, 28))
        assert np.allclose(bound.pairs, whole.pairs, rtol=1e-9)


def test_the_width_is_the_largest_within_the_budget():
    def make(shape, width):
        return nn.Sequential(nn.Linear(3, width))

    width = training.width_within(make, (3,), 1000)
    assert training.parameters(make((3,), width)) <= 1000 < training.parameters(make((3,), width + 2))


def test_a_claim_counts_images_with_margins_beyond_it():
    z = np.array([[2.0, 0, 0], [0, 3, 1], [1, 0, 0]])
    labels = torch.tensor([0, 1, 1])
    pairs = 2 * (1 - np.eye(3))
    assert training.claimed_accuracies(z, labels, pairs, (0.0, 0.9, 1.0)) == [2 / 3, 2 / 3, 0.0]


def test_the_loss_divides_by_the_constant():
    logits, labels = torch.randn(5, 10), torch.arange(5)
    loss = training.DividedOffset(1.0, 0.25)
    assert torch.equal(loss(2 * logits, labels, torch.full((10, 10), 2.0)), lipnet.OffsetCrossEntropy(1.0, 0.25)(logits, labels))


def reached(name, accuracy, seconds, proved=1.0):
    return training.Found(name, 10, 0.1, 1, seconds, [accuracy] * 4, proved, proved, [accuracy] * 4, [accuracy] * 4)


def test_the_rows_compare_the_best_of_ours_with_each_peer_and_time_with_the_best_peer():
    ours = [reached("ours, a", 0.8, 2.0), reached("ours, b", 0.7, 1.0)]
    others = [reached("x", 0.6, 1.0), reached("y", 0.75, 4.0), reached("diverged", 0.0, np.nan, np.inf)]
    rows = training.rows_of([*ours, *others], (0.5, 1.0, 1.5))
    assert [row.what.split(": ")[1] for row in rows] == 5 * ["ours, a / x"] + 5 * ["ours, a / y"]
    assert [row.met for row in rows] == [*4 * ["yes"], "-", *5 * ["yes"]]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_loss_takes_the_constants_of_our_networks(channels):
    shape = (channels, 8, 8)
    x, y = torch.rand(20, *shape), torch.arange(20) % 10
    data = training.Data((x, y), (x, y), (x, y), (0.1, 0.2))
    one = training.measure("ours", lambda: training.convolutional()["ours, LiResNet"](shape, 4), data, 1, 1e-2)
    assert 0 < one.proved <= one.claimed * (1 + 1e-5)
    assert one.seconds > 0


def test_the_script_runs(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(400) % 10
    x = (0.1 * rng.random((400, 1, 8, 8)) + 0.9 * np.eye(64)[6 * y].reshape(400, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "set.npz", x=x, y=y)
    spec, out = str(tmp_path / "set.npz"), tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.training", "--data", spec, spec, "--nets", "dense", "--epochs", "40", "--budget", "3000"]
    command += ["--only", "ours, Cayley", "ours, sandwich", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["networks"]["dense"]
    assert [one["name"] for one in found] == ["ours, Cayley", "ours, sandwich"]
    for one in found:
        assert one["parameters"] <= 3000
        assert one["accuracies"] == sorted(one["accuracies"], reverse=True)
        assert one["accuracies"][1] > 0.3
        assert np.allclose(one["accuracies"], one["by_claim"], atol=0.03)
