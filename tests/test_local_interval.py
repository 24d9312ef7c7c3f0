"""Jacobians by intervals, and what `Local` takes for how many undecided gates."""

from __future__ import annotations

import itertools
import math
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify.cli import main
from certify.graph import Graph
from certify.local import condense, entries
from certify.local.entries import by_intervals
from certify.local.method import program_of
from certify.local.program import Program
from certify.local.region import Region


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([x + self.second(torch.tanh(self.first(x))), torch.abs(x)], 1))


def convolutional() -> nn.Sequential:
    front = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, stride=2), nn.GELU()]
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(4, 3))


def bounds(net: nn.Module, shape: tuple[int, ...], radius: float, p: float = math.inf) -> tuple[entries.Entries, torch.Tensor, nn.Module, int]:
    graph = Graph.of(net, shape)
    program = program_of(graph)
    torch.manual_seed(1)
    x = torch.rand(shape, dtype=torch.float64)
    found, _, undecided = by_intervals(program, Region.of(certify.Ball(x.numpy(), radius, p), x.numel()), torch.eye(program.outputs, dtype=torch.float64))
    return found, x, graph.double, undecided


def jacobian(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x).reshape(-1, x.numel())


NETS = [(mlp(6, 20, 20, 3), (6,)), (convolutional().eval(), (2, 8, 8)), (Joined().eval(), (5,))]


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize(("net", "shape"), NETS)
def test_no_jacobian_is_outside_and_a_point_is_met(net: nn.Module, shape: tuple[int, ...], p: float) -> None:
    generator = np.random.default_rng(0)
    for radius in (0.0, 1e-3, 0.1, 3.0):
        found, x, double, _ = bounds(net, shape, radius, p)
        for k in range(40):
            step = generator.normal(size=x.numel())
            there = x + torch.from_numpy(step * (radius * min(1.0, k / 20) / np.linalg.norm(step, ord=p))).reshape(shape)
            gradients = jacobian(double, there)
            assert bool(((found.low <= gradients) & (gradients <= found.high)).all())
            for q in (1, 2, math.inf):
                assert bool((torch.linalg.vector_norm(gradients, ord=q, dim=1) <= found.row_norms(q)).all())
        if radius == 0:
            assert float((found.high - found.low).max()) < 1e-6  # smooth gates have slopes to 1e-9 at a point
    assert bool((bounds(net, shape, 0.1, p)[0].row_norms(2) < bounds(net, shape, 3.0, p)[0].row_norms(2)).all())


def test_one_hidden_layer_that_is_all_undecided_is_exact() -> None:
    """Each gate adds nothing or the product of its two weights."""
    net = mlp(4, 7, 3)
    found, _, double, undecided = bounds(net, (4,), 1e4)
    assert undecided == 7
    products = double[2].weight[:, :, None] * double[0].weight[None]  # (outputs, gates, inputs)
    assert torch.allclose(found.low, products.clamp(max=0).sum(1), rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.high, products.clamp(min=0).sum(1), rtol=1e-12, atol=1e-12)


def test_rounding_is_in_the_bounds() -> None:
    """Two paths of weight 1e8 that cancel but for a third: the stored numbers give 1, and sums in float64 nearly nothing."""
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double().eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1e8], [1e8], [1.0]]))
        net[2].weight.copy_(torch.tensor([[1e8, -1e8, 1.0]]))
    found, _, _, _ = bounds(net, (1,), 1e-3)
    assert float(found.low) <= 1.0 <= float(found.high)
    assert float(found.high - found.low) < 1e3  # of 1e16


def test_a_slope_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = entries._bent
    monkeypatch.setattr(entries, "_bent", lambda gradient, least, most: right(gradient, least, least))
    found, x, double, undecided = bounds(mlp(6, 20, 20, 3), (6,), 3.0)
    assert undecided > 0
    assert not all(bool((jacobian(double, x + 3 * torch.randn(6).double().sign()) <= found.high).all()) for _ in range(20))


def test_what_is_taken_follows_the_count_of_undecided_gates() -> None:
    net, taken = mlp(6, 40, 40, 3), {}
    x = np.full(6, 0.3)
    for radius in (1e-3, 0.05, 0.4, 4.0):
        for p in (2, math.inf):
            domain = certify.Ball(x, radius, p)
            found = {how: certify.lipschitz(net, certify.Local(how=how), input_shape=(6,), domain=domain) for how in ("auto", "crown", "interval")}
            undecided, how = found["auto"].evidence["undecided"], found["auto"].evidence["how"]
            assert how == ("complete" if undecided <= 25 else "sdp" if p == 2 else "crown")
            taken[how] = undecided
            assert found["auto"].value <= found["crown"].value * (1 + 1e-9)
            assert found["crown"].value <= found["interval"].value * (1 + 1e-9)
            assert found["interval"].value <= found["interval"].evidence["layerwise"]
    assert set(taken) == {"complete", "sdp", "crown"}


def test_too_many_gates_are_bounded_by_intervals_where_that_is_left_open() -> None:
    net, domain = mlp(6, 40, 40, 3), certify.Ball(np.full(6, 0.3), 4.0, math.inf)
    bound = certify.lipschitz(net, certify.Local(memory=1e-5), input_shape=(6,), domain=domain)
    assert bound.evidence["how"] == "interval"
    assert bound.value >= certify.lipschitz(net, certify.Local(), input_shape=(6,), domain=domain).value
    with pytest.raises(certify.CertifyError, match="undecided gates on this region need more memory than allowed"):
        certify.lipschitz(net, certify.Local(memory=1e-5, how="crown"), input_shape=(6,), domain=domain)


@pytest.mark.parametrize("limits", [{"most": 30}, {"limit": 30 * 36}])
def test_gates_are_refused_as_soon_as_too_many_are_seen(limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after gradients of a whole layer, which may not fit into memory."""
    monkeypatch.setattr(condense, "_ROWS", 8)
    monkeypatch.setattr(condense, "_CHUNK", 1)
    program, region = program_of(Graph.of(mlp(6, 400, 3), (6,))), Region.of(certify.Ball(np.full(6, 0.3), 4.0, math.inf), 6)
    right, seen = Program.back, []
    monkeypatch.setattr(Program, "back", lambda self, value, rows, *rest: seen.append(len(rows)) or right(self, value, rows, *rest))
    with pytest.raises(condense.TooManyGates, match=r"at least 3[1-8]"):
        condense.condense(program, region, torch.eye(3, dtype=torch.float64), **limits)
    assert sum(seen) <= 56


def test_auto_on_the_command_line_says_what_it_takes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, other = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), f"{tmp_path / 'theirs.py'}:make"
    lipnet.save(mlp(64, 12, 10), small, input_shape=(64,))
    lipnet.save(mlp(64, 400, 1200, 10), large, input_shape=(64,))
    (tmp_path / "theirs.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Linear(64, 12), nn.Softmax(1), nn.Linear(12, 10)).eval()\n")
    for model, options, taken, why in (
        (small, [], "lipsdp", "has 77 signals, and it takes"),
        (large, [], "layerwise", "has 1,665 signals, and with --method lipsdp it would take about"),
        (small, ["--around", "digits", "--radius", "0.05"], "local", "undecided there says how"),
        (other, ["--input-shape", "64"], "layerwise", "lipsdp does not apply"),
    ):
        assert main(["lipschitz", model, "--method", "auto", *options]) == 0
        shown = capsys.readouterr()
        assert f"auto takes {taken}: " in shown.err
        assert why in shown.err
    assert main(["lipschitz", large, "--method", "auto", "--norm", "inf"]) == 2
    assert "layerwise bounds are from l2 only; say --method lipsdp" in capsys.readouterr().err
    assert main(["lipschitz", small, "--method", "local", "--how", "interval", "--around", "digits", "--radius", "0.05"]) == 0
    assert "all Jacobians there, by intervals" in capsys.readouterr().out
