"""Noise that inputs share: what is smoothed is a function of the copy to the last bit, rows do not depend on each other, every certificate keeps its alpha."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import certify
import lipnet
from certify.smoothing import FixedN, Gaussian, GroupSequential, Softmax, shared
from certify.smoothing.engine import Engine
from certify.smoothing.method import Smoothing
from certify.smoothing.noise import SELECTION, native, row_table, to_grid

SHORT = GroupSequential(looks=(60, 120, 240, 480, 1000, 3000), n0=50, alpha=0.01)


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def linear(inputs=6, classes=3):
    """Behind its first layer there is nothing whose last bits would depend on a batch."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes), nn.ReLU()).eval()


def rows(net, x, method, numbers=None):
    """What is counted for each input, and what it certifies."""
    shape = tuple(x.shape[1:])
    forward, classes, _ = method.prepared(net, shape)
    placed, apart = method.place(x.numpy())
    inputs = ((i, placed[i], float(apart[i])) for i in (numbers if numbers is not None else range(len(x))))
    found = method.run(forward, classes, shape, inputs)
    return {done.index: (done.selection.to_json(), [tally.to_json() for tally in done.looks], done.outcome) for done in found}


@pytest.mark.parametrize("size", [1e-60, 1e-20, 1.0, 1e20])
def test_the_first_layer_is_linear_to_the_last_bit(size):
    weight, bias = size * torch.randn(200, 17, dtype=torch.float64) * torch.logspace(0, -9, 200)[:, None], size * torch.randn(17, dtype=torch.float64)
    layer = shared.First.nearest(weight, bias)
    copies = torch.randint(-shared.LARGEST, shared.LARGEST + 1, (64, 200))
    copies[0] = shared.LARGEST * torch.sign(weight[:, 0])  # the largest sum that there is
    noise = torch.randint(-5000, 5000, (64, 200))
    noise[0] = 0
    whole = layer(copies)
    for part in (noise, copies // 3, torch.zeros_like(copies)):
        assert torch.equal(layer(copies - part) + part.double() @ layer.weight, whole)
        assert torch.equal(torch.from_numpy(layer(copies - part).numpy() + part.double().flip(1).numpy() @ layer.weight.flip(0).numpy()), whole)
    rounded = shared.First(weight, bias)  # as the weights are, it is not
    assert not torch.equal(rounded(copies - noise) + noise.double() @ rounded.weight, rounded(copies))
    torch.testing.assert_close(whole, copies.double() @ weight + bias, rtol=0, atol=size * shared.LARGEST * 1e-7)


def test_what_is_counted_is_a_function_of_the_copy():
    """Of X + k for each row, wherever input and noise part."""
    net, batch = linear(20, 4), 1024
    method = Smoothing(Gaussian(0.4), shared=True, batch=batch, seed=5)
    forward, _, done = method.prepared(net, (20,))
    assert done[-1] == "first layer exact, its products with the noise shared"
    source = shared.SharedCopies(method.copies, forward, 3, batch)
    images = to_grid(torch.rand(3, 20).numpy(), 255)[0]
    for slot in range(3):
        source.hold(slot, torch.from_numpy(images[slot]))
    table = row_table(np.arange(batch) // 200 % 3, 0, np.where(np.arange(batch) < 500, SELECTION + 1000, 7) + np.arange(batch))
    table[1000:, 0] = -1
    found = source.forward(source.draw(table))
    copies = images[table[:, 0]] + method.copies.draw(table, 20)
    assert torch.equal(found[:1000], forward(torch.from_numpy(copies[:1000])))
    assert found[1000:].isnan().all()
    torch.testing.assert_close(found[:1000], net(torch.from_numpy(copies[:1000] / np.float32(255)).float()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("goal", [{}, {"target": 0.1}, {"tolerance": 0.05}], ids=str)
def test_rows_depend_neither_on_each_other_nor_on_the_batch(goal, monkeypatch):
    net, x = linear(), torch.rand(9, 6)
    method = Smoothing(Gaussian(0.4), schedule=SHORT, shared=True, **goal)
    whole = rows(net, x, method)
    assert set(whole) == set(range(9))
    for batch, numbers in ((1024, [8, 3, 0]), (2048, range(8, -1, -1)), (700, [4])):
        part = rows(net, x, dataclasses.replace(method, batch=batch), numbers)
        assert all(part[i] == whole[i] for i in numbers)
    monkeypatch.setattr(shared, "_KEPT", 0)  # nothing is kept
    assert rows(net, x, method) == whole


def test_all_inputs_have_one_noise_and_only_if_it_is_asked_for():
    x = torch.rand(1, 3, 4, 4).repeat(2, 1, 1, 1)
    conv = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)).eval()
    for net in (conv, linear(48)):
        for scores in (None, Softmax(0.5)):
            method = Smoothing(Gaussian(0.4), schedule=FixedN(50, 1000, 0.01), batch=1050, **({} if scores is None else {"scores": scores}))
            apart, alike = (rows(net, x, dataclasses.replace(method, shared=flag)) for flag in (False, True))
            assert alike[0] == alike[1]
            assert apart[0] != apart[1]
    assert "shared" not in method.prepared(conv, (3, 4, 4))[2][-1]


def test_each_certificate_keeps_its_alpha():
    """One point near a plane, under many seeds: the radius is above the distance no more often than alpha."""
    alpha, count = 0.1, 400
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.6, 0.8], [-0.6, -0.8]]))
    x = torch.tensor([[0.2, 0.2], [0.4, 0.2]])
    truth = (x @ net[0].weight[0]).abs().detach().numpy()
    found = np.array(
        [certify.robustness(net, x, Smoothing(Gaussian(0.3), schedule=FixedN(20, 200, alpha), shared=True, batch=256, seed=s)).radius for s in range(count)]
    )
    step = 2**0.5 / 255
    assert ((found > truth + step).sum(axis=0) <= stats.binom.isf(1e-6, count, alpha)).all()
    assert (found > 0.5 * truth).mean() > 0.5


def test_shapes_and_scales_in_front_of_the_first_layer_are_part_of_it():
    net = nn.Sequential(lipnet.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.5]), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    method = Smoothing(Gaussian(0.4), schedule=SHORT, shared=True)
    forward, _, _ = method.prepared(net, (3, 4, 4))
    assert isinstance(forward, shared.FirstOnce)
    images = torch.randint(0, 256, (10, 4, 4, 3))
    torch.testing.assert_close(forward(images), net(images.permute(0, 3, 1, 2) / 255), atol=1e-4, rtol=1e-4)
    before = certify.robustness(net, torch.rand(4, 3, 4, 4), method)
    assert "products with the noise shared" in before.method
    assert "shared=True" in before.method


class Twice(nn.Module):
    """Its first layer is not all that reads the input, or reads it through something that is not affine."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)

    def forward(self, x):
        if self.kind == "skip":
            return self.layer(x) + x
        if self.kind == "again":
            return self.layer(torch.relu(self.layer(x)))
        if self.kind == "square":
            return self.layer(x * x)
        return nn.functional.linear(x, self.layer.weight * x.mean())


def test_what_does_not_begin_with_a_linear_layer_shares_bits_alone():
    x, method = torch.rand(3, 4), Smoothing(Gaussian(0.4), schedule=SHORT, shared=True)
    for kind in ("skip", "again", "square", "weight"):
        net = Twice(kind).eval()
        if kind == "weight":
            with pytest.raises(certify.CertifyError, match="other inputs"):
                method.prepared(net, (4,))
            continue
        forward, _, _ = method.prepared(net, (4,))
        assert isinstance(forward, shared.FirstOnce) == (kind == "again")
        assert set(rows(net, x, method)) == {0, 1, 2}
        if kind == "again":
            copies = torch.randint(0, 256, (10, 4))
            torch.testing.assert_close(forward(copies), net(copies / 255), atol=1e-5, rtol=1e-5)
    floats = dataclasses.replace(method, levels=None)
    assert not isinstance(floats.prepared(linear(), (6,))[0], shared.FirstOnce)
    assert set(rows(linear(), torch.rand(2, 6), floats)) == {0, 1}


def test_inputs_too_large_for_exact_sums_are_refused():
    with pytest.raises(certify.CertifyError, match="steps of the grid"):
        certify.robustness(linear(), torch.full((1, 6), 1e6), Smoothing(Gaussian(0.4), schedule=SHORT, shared=True))


def test_sums_are_rounded_once_with_and_without_the_compiled_kernel(monkeypatch):
    noise, image = np.random.default_rng(0).standard_normal((30, 17)), np.random.default_rng(1).standard_normal(17)
    with_kernel, without = np.empty((30, 17), np.float32), np.empty((30, 17), np.float32)
    native.add_rows(noise, image, with_kernel)
    monkeypatch.setattr(native, "library", lambda: None)
    native.add_rows(noise, image, without)
    assert np.array_equal(with_kernel, (noise + image).astype(np.float32))
    assert np.array_equal(with_kernel, without)


def test_turns_hand_out_every_copy_once():
    """The noise outside, the inputs inside: in a batch no input gets ahead of another by more than a turn."""
    seen = []

    class Watched(Engine):
        def _count(self, table, places):
            seen.append(table)
            super()._count(table, places)

    method = Smoothing(Gaussian(0.4), schedule=FixedN(64, 4032, 0.01), shared=True, batch=2048)
    forward, classes, _ = method.prepared(linear(), (6,))
    source = shared.SharedCopies(method.copies, forward, 9, 2048)
    placed, apart = method.place(torch.rand(5, 6).numpy())
    engine = Watched(source.forward, classes, method.procedure((6,)), source, 2048, 9, shared=True, turn=512)
    done = list(engine.run((i, placed[i], float(apart[i])) for i in range(5)))
    assert len(done) == 5
    table = np.concatenate(seen)
    kept = table[table[:, 0] >= 0]
    assert len(kept) == 5 * 4096
    assert len(np.unique(kept[:, 2])) == 4096
    assert set(seen[0][:, 0]) == set(seen[1][:, 0])
    assert len(set(seen[0][:, 0])) == 4
