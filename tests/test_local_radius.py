"""Certified radii by local bounds: no attack is nearer, they are at least what a single constant gives, and folders of them are proved again."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import time

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

import certify
import lipnet
from certify.cli import Exit, main
from certify.local.radius import LocalMargin

ACTIVATIONS = {"relu": nn.ReLU, "maxmin": lipnet.MaxMin, "tanh": nn.Tanh}


def classifier(activation: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    make = ACTIVATIONS[activation]
    return nn.Sequential(nn.Linear(6, 16), make(), nn.Linear(16, 16), make(), nn.Linear(16, 4)).double().eval()


def inputs(count: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def nearest(net: nn.Module, x: torch.Tensor, norm: float, reach: float) -> float:
    """The distance of the nearest point of another class that many random directions and gradient steps find; infinite for none within reach."""
    label, best = int(net(x[None]).argmax()), math.inf
    generator = torch.Generator().manual_seed(2)
    for other in set(range(4)) - {label}:
        for start in range(3):
            d = torch.zeros_like(x) if start == 0 else 0.2 * reach * torch.randn(6, generator=generator, dtype=torch.float64)
            for _ in range(25):
                d.requires_grad_(True)
                logits = net((x + d)[None])[0]
                gap = logits[label] - logits[other]
                (slope,) = torch.autograd.grad(gap, d)
                dual = float(torch.linalg.vector_norm(slope.detach(), ord={1: math.inf, 2: 2, math.inf: 1}[norm]))
                with torch.no_grad():
                    gap = gap.detach()
                    if float(gap) <= 0:
                        best = min(best, float(torch.linalg.vector_norm(d, ord=norm)))
                        d = 0.95 * d
                    else:
                        way = slope if norm == 2 else slope.sign() * dual if norm == math.inf else slope * (slope.abs() == slope.abs().max())
                        d = d - 1.02 * float(gap) / max(dual * dual, 1e-12) * way
    return best


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
def test_no_attack_is_nearer_and_the_global_bound_is_exceeded(activation: str, norm: float) -> None:
    net, x = classifier(activation), inputs(6)
    found = certify.robustness(net, x, LocalMargin(norm=norm))
    assert (found.prediction == net(x).argmax(1).numpy()).all()
    assert found.norm == norm
    for point, radius in zip(x, found.radius, strict=True):
        assert 0 < radius < nearest(net, point, norm, 2.0)
    if norm == 2:
        layers = certify.robustness(net, x, certify.Margin(certify.lipschitz(net, input_shape=(6,))))
        assert (found.radius > layers.radius).all()


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_following_the_margin_is_at_least_one_constant_for_the_ball(norm: float) -> None:
    """The largest radius of a grid whose own constant proves it: `margin > L(r) r`."""
    net, x = classifier("relu"), inputs(3)
    graph = certify.Graph.of(net, (6,))
    fine = certify.robustness(net, x, LocalMargin(norm=norm, steps=32)).radius
    for point, radius in zip(x, fine, strict=True):
        z = net(point[None])[0].detach()
        label, constant = int(z.argmax()), 0.0
        for r in np.linspace(0.1, 1.2, 12) * radius:
            bound = certify.Local(norm).bound(graph, certify.Ball(point.numpy(), float(r), norm))
            assert bound.pairs is not None
            if all(float(z[label] - z[j]) > bound.pairs[label, j] * r for j in range(4) if j != label):
                constant = float(r)
        assert radius >= constant


def test_a_linear_classifier_is_met_exactly() -> None:
    net = nn.Linear(5, 3).double().eval()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for norm, dual in ((1.0, math.inf), (2.0, 2), (math.inf, 1)):
        found = certify.robustness(net, x, LocalMargin(norm=norm))
        for point, radius in zip(x, found.radius, strict=True):
            z = net(point[None])[0].detach()
            label = int(z.argmax())
            exact = min(
                float((z[label] - z[j]) / torch.linalg.vector_norm(net.weight[label] - net.weight[j], ord=dual).detach()) for j in range(3) if j != label
            )
            assert radius == pytest.approx(exact, rel=1e-9)
            assert radius <= exact


def test_one_radius_is_asked_for_and_given_or_refused() -> None:
    net, x = classifier("relu"), inputs(5)
    largest = certify.robustness(net, x, LocalMargin()).radius
    small, great = float(largest.min()) * 0.9, max(nearest(net, point, 2.0, 2.0) for point in x) * 1.01
    assert (certify.robustness(net, x, LocalMargin(radius=small)).radius > small).all()
    assert (certify.robustness(net, x, LocalMargin(radius=great)).radius == 0).all()


def distance(net: nn.Sequential, x: np.ndarray) -> float:
    """In the maximum norm, of the nearest point with another class: by a linear program for each linear piece of a network of two hidden layers."""
    (A, a), (B, b), (C, c) = ((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in net if isinstance(layer, nn.Linear))
    label, best = int(net(torch.from_numpy(x)[None]).argmax()), math.inf
    bounds = [(None, None)] * len(x) + [(0, None)]
    ends = np.hstack([np.vstack([np.eye(len(x)), -np.eye(len(x))]), -np.ones((2 * len(x), 1))])  # -t <= d <= t
    for first in itertools.product((0.0, 1.0), repeat=len(a)):
        for second in itertools.product((0.0, 1.0), repeat=len(b)):
            z = A, A @ x + a
            h = np.diag(first) @ z[0], np.array(first) * z[1]
            y = B @ h[0], B @ h[1] + b
            p = np.diag(second) @ y[0], np.array(second) * y[1]
            signs = np.concatenate([1 - 2 * np.array(first), 1 - 2 * np.array(second)])[:, None]
            pattern, offset = np.vstack([z[0], y[0]]) * signs, np.concatenate([z[1], y[1]]) * -signs[:, 0]
            for other in set(range(len(c))) - {label}:
                gap = (C[label] - C[other]) @ p[0], (C[label] - C[other]) @ p[1] + c[label] - c[other]
                rows = np.vstack([np.hstack([np.vstack([pattern, gap[0]]), np.zeros((len(offset) + 1, 1))]), ends])
                found = optimize.linprog([0.0] * len(x) + [1.0], rows, [*offset, -gap[1], *[0.0] * 2 * len(x)], bounds=bounds)
                best = min(best, found.fun) if found.status == 0 else best
    return best


def test_branch_and_bound_takes_a_search_to_the_nearest_point_of_another_class() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4)).double().eval()
    further = LocalMargin(norm=math.inf, nodes=500)
    seen = further.see(certify.Graph.of(net, (6,)))
    for point in inputs(2):
        z, exact = net(point[None])[0].detach().numpy(), distance(net, point.numpy())
        *_, found = further.around(seen, point.numpy(), z)
        assert found < exact * (1 + 1e-9)
        assert exact < found * (1 + 1 / 16) * 1.001
        assert further.proved(seen, point.numpy(), z, found)
        assert not further.proved(seen, point.numpy(), z, exact * 1.001)


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_branch_and_bound_makes_radii_larger_and_below_every_attack(norm: float) -> None:
    net, x = classifier("relu"), inputs(2)
    before, after = (certify.robustness(net, x, LocalMargin(norm=norm, nodes=nodes)).radius for nodes in (None, 60))
    assert (before <= after).all()
    assert (after > 1.1 * before).any()
    assert all(radius < nearest(net, point, norm, 2.0) for point, radius in zip(x, after, strict=True))


def test_a_search_by_branch_and_bound_ends_in_time() -> None:
    net, x = classifier("relu"), inputs(1)
    start = time.monotonic()
    found = certify.robustness(net, x, LocalMargin(nodes=10**6, steps=5000, seconds=0.5))
    assert time.monotonic() - start < 10
    assert 0 <= found.radius[0] < nearest(net, x[0], 2.0, 2.0)


def test_a_range_of_inputs_cuts_the_ball() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).double().eval()
    net[0].weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    assert certify.robustness(net, x, LocalMargin(norm=math.inf)).radius[0] == pytest.approx(0.5)
    cut = certify.robustness(net, x, LocalMargin(norm=math.inf, within=(0.0, 1.0)))  # the first entry stops at 0, so the margin falls with the second alone
    assert 0.9 * 15 / 16 < cut.radius[0] <= 0.9
    assert certify.Assumption.INPUT_RANGE in cut.assumptions
    with pytest.raises(certify.CertifyError, match="outside of"):
        certify.robustness(net, x, LocalMargin(within=(0.2, 1.0)))


def test_ties_and_constant_classifiers() -> None:
    tied = nn.Linear(3, 2).double().eval()
    tied.weight.data[1], tied.bias.data[1] = tied.weight.data[0], tied.bias.data[0]
    assert certify.robustness(tied, torch.zeros(1, 3, dtype=torch.float64), LocalMargin()).radius[0] == 0
    sure = nn.Linear(3, 2).double().eval()
    sure.weight.data.zero_()
    sure.bias.data = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert certify.robustness(sure, torch.zeros(1, 3, dtype=torch.float64), LocalMargin()).radius[0] > 1e6


def test_a_folder_of_local_radii_is_proved_again(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    lipnet.save(net.eval(), tmp_path / "net.safetensors", input_shape=(1, 8, 8), input_range=(0.0, 1.0))
    folder = tmp_path / "run"
    command = ["run", str(tmp_path / "net.safetensors"), "digits", "-o", str(folder), "--method", "local", "--limit", "4", "--norm", "inf", "--within", "0,1"]
    assert main(command) == Exit.DONE
    assert main(["check", str(folder)]) == Exit.DONE
    part = next(folder.glob("part-*.jsonl"))
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    assert all(row["method"] == "local" and row["norm"] == "inf" for row in rows)
    part.write_text("\n".join(json.dumps({**row, "radius": row["radius"] * 2 + 0.1}) for row in rows) + "\n")
    capsys.readouterr()
    assert main(["check", str(folder)]) == Exit.CONTRADICTION
    assert "the proof does not reach it" in capsys.readouterr().out
    for option in ("--steps", "--nodes"):
        assert main(["run", str(tmp_path / "net.safetensors"), "digits", "-o", str(tmp_path / "x"), option, "3"]) == Exit.ERROR
        assert f"{option} is for --method local" in capsys.readouterr().err


def test_the_command_line_bounds_a_ball(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    lipnet.save(net, tmp_path / "net.safetensors", input_shape=(1, 8, 8), input_range=(0.0, 1.0))
    command = ["lipschitz", str(tmp_path / "net.safetensors"), "--method", "local"]
    ball = ["--around", "digits", "--index", "2", "--radius", "0.2"]
    values = {}
    for how in ("crown", "sdp", "complete"):
        assert main([*command, *ball, "--how", how, "--json"]) == Exit.DONE
        values[how] = json.loads(capsys.readouterr().out)["bound"]["value"]
    assert values["sdp"] <= values["crown"]
    for how, words in (("crown", "row by row, "), ("auto", "by branch and bound, ")):  # few gates are undecided
        assert main([*command, *ball, "--norm", "inf", "--how", how]) == Exit.DONE
        assert f"(linf to linf, within 0.2 of input 2 of digits in linf; proof, all Jacobians there, {words}" in capsys.readouterr().out
    assert main([*command]) == Exit.ERROR
    assert "name a ball with --around" in capsys.readouterr().err
    assert main([*command, *ball, "--norm", "inf", "--how", "sdp"]) == Exit.ERROR
    assert "take --how crown" in capsys.readouterr().err


@pytest.mark.parametrize(("norm", "exact"), [(1.0, 1.25), (2.0, 1.25 / math.sqrt(2)), (math.inf, 0.625)])
def test_where_all_gates_are_shut_the_gradient_does_not_say_how_far_to_look(norm: float, exact: float) -> None:
    """`5 (relu(a) + relu(b))` against `relu(a) + 1` with `a = x_1 + x_2 - 1` and `b = x_1 - x_2 - 1`: they meet where a or b is 1/4 or 1/5."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), torch.tensor([-1.0, -1.0], dtype=torch.float64)
    net[2].weight.data, net[2].bias.data = torch.tensor([[4.0, 4.0], [0.0, 0.0]], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    radius = certify.robustness(net, torch.zeros(1, 2, dtype=torch.float64), LocalMargin(norm=norm)).radius[0]
    assert 0.85 * exact < radius <= exact


def test_options_that_could_never_end_are_refused() -> None:
    for steps in (math.inf, math.nan, 1.5, 0, 10**9):
        with pytest.raises(certify.CertifyError, match="a whole number of steps"):
            LocalMargin(steps=steps)
    for within in ("01", (0, 1, 2), (1.0, 0.0), (0.0, math.inf), (0.0, math.nan)):
        with pytest.raises(certify.CertifyError, match="within is"):
            LocalMargin(within=within)
    net, x = classifier("relu"), inputs(1)
    assert certify.robustness(net, x, LocalMargin(memory=math.inf)).radius == certify.robustness(net, x, LocalMargin()).radius
    assert certify.lipschitz(net, certify.Local(memory=math.inf), input_shape=(6,), domain=certify.Ball(x[0].numpy(), 0.1, 2)).value < math.inf


def test_changed_folders_are_refused_or_contradicted_in_a_sentence(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    lipnet.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), tmp_path / "net.safetensors", input_shape=(1, 8, 8), input_range=(0.0, 1.0))
    folder = tmp_path / "run"
    command = ["run", str(tmp_path / "net.safetensors"), "digits", "-o", str(folder), "--method", "local", "--limit", "1", "--quiet"]
    assert main(command) == Exit.DONE
    (folder / "results.jsonl").unlink(missing_ok=True)
    manifest, part = json.loads((folder / "manifest.json").read_text()), next(folder.glob("part-*.jsonl"))
    (row,) = (json.loads(line) for line in part.read_text().splitlines())
    for method in ("LocalMargin(steps=inf)", "LocalMargin(within='01')", "LocalMargin(radius=1" + "0" * 400 + ")", "LocalMargin(memory=-1)", "LocalMargin(2)"):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "method": method}))
        assert main(["check", str(folder)]) == Exit.ERROR
        assert "is not the printed form" in capsys.readouterr().err
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in ("radius", "margin"):
        part.write_text(json.dumps({**row, name: 10**400}) + "\n")
        assert main(["check", str(folder)]) == Exit.CONTRADICTION
