"""Tighter local bounds: LipSDP among the undecided gates, and lines below them that decide more of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certify
import lipnet
from certify.local.alpha import tightened
from certify.local.clarke import bound_jacobian
from certify.local.condense import Condensed, condense
from certify.local.crown import upper_bounds
from certify.local.lipsdp import _triangle, spectral_bound, transposed
from certify.local.program import Program
from certify.local.region import Region

F = nn.functional
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "leaky": lambda _: nn.LeakyReLU(0.2),
    "maxmin": lambda _: lipnet.MaxMin(),
    "groupsort": lambda _: lipnet.GroupSort(4),
    "householder": lipnet.Householder,
    "abs": lambda _: lipnet.Abs(),
    "tanh": lambda _: nn.Tanh(),
    "gelu": lambda _: nn.GELU(),
}


def stacked(activation: str, dims: tuple[int, ...], seed: int, orthogonal: bool = False) -> nn.Sequential:
    """Random layers with an activation between any two of them."""
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(dims)):
        linear = nn.Linear(inputs, outputs)
        linear.weight.data = nn.init.orthogonal_(linear.weight) if orthogonal else torch.randn(outputs, inputs) * math.sqrt(2 / inputs)
        linear.bias.data = torch.randn(outputs) * 0.1
        modules += [linear] if number == len(dims) - 2 else [linear, ACTIVATIONS[activation](outputs)]
    net = nn.Sequential(*modules).double().eval()
    for linear in net[::2] if orthogonal else ():
        linear.weight.data = torch.linalg.qr(linear.weight.data)[0]
    return net


def condensed_of(net: nn.Module, center: Tensor, radius: float, p: float = 2, rows: Tensor | None = None) -> Condensed:
    program = Program.of(lipnet.freeze(net), tuple(center.shape))
    rows = torch.eye(program.outputs, dtype=torch.float64) if rows is None else rows
    return condense(program, Region.of(certify.Ball(center.numpy(), radius, p), center.numel()), rows)


def seen(net: nn.Module, center: Tensor, radius: float, count: int = 1000) -> Tensor:  # (points, outputs, inputs)
    """Jacobians at random points of an l2 ball."""
    d = torch.randn(count, len(center), dtype=torch.float64)
    d = d / torch.linalg.vector_norm(d, dim=1, keepdim=True) * torch.rand(count, 1, dtype=torch.float64) ** (1 / len(center))
    return torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(center + radius * d).detach()


CASES = [(name, dims, seed) for name in ("relu", "leaky", "maxmin") for dims, seed in (((3, 8, 8, 3), 0), ((8, 12, 12, 3), 1))]


def test_the_spectral_bound_is_near_the_largest_jacobian_that_is_seen() -> None:
    ratios = []
    for name, dims, seed in CASES:
        net, center = stacked(name, dims, seed), torch.linspace(-1, 1, dims[0], dtype=torch.float64)
        largest = float(torch.linalg.matrix_norm(seen(net, center, 0.1), 2).max())
        condensed = condensed_of(net, center, 0.1)
        bound = spectral_bound(condensed).bound
        assert bound >= largest
        assert bound <= float(torch.linalg.vector_norm(bound_jacobian(condensed).row_norms(2))) * (1 + 1e-6)
        ratios.append(bound / largest)
    assert np.mean(ratios) < 1.15


@pytest.mark.parametrize("name", ["tanh", "gelu", "groupsort", "householder", "abs", "relu"])
@pytest.mark.parametrize("radius", [0.0, 0.05, 0.6])
def test_no_jacobian_beats_the_spectral_bounds_of_outputs_and_of_their_differences(name: str, radius: float) -> None:
    net, center = stacked(name, (6, 12, 12, 3), 1), torch.linspace(-1, 1, 6, dtype=torch.float64)
    jacobians = seen(net, center, radius, 300)
    bound = certify.lipschitz(net, certify.Local(), input_shape=(6,), domain=certify.Ball(center.numpy(), radius, 2))
    assert bound.value >= torch.linalg.matrix_norm(jacobians, 2).max() * (1 - 1e-12)
    assert bound.pairs is not None
    crown = certify.lipschitz(net, certify.Local(how="crown"), input_shape=(6,), domain=certify.Ball(center.numpy(), radius, 2))
    assert crown.pairs is not None
    assert bound.value <= crown.value
    assert (bound.pairs <= crown.pairs).all()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert bound.pairs[i, j] >= torch.linalg.vector_norm(jacobians[:, i] - jacobians[:, j], dim=1).max() * (1 - 1e-12)


@pytest.mark.parametrize("name", ["maxmin", "groupsort", "householder", "abs"])
@pytest.mark.parametrize("radius", [0.01, 1.0, 1e3])
def test_orthogonal_networks_have_norm_one_on_every_ball(name: str, radius: float) -> None:
    for depth in (1, 3):
        net = stacked(name, (8,) * (depth + 2), depth, orthogonal=True)
        condensed = condensed_of(net, torch.zeros(8, dtype=torch.float64), radius)
        assert 1 - 1e-12 <= spectral_bound(condensed).bound <= 1 + 1e-6


def test_deep_sorting_networks_keep_their_bound() -> None:
    """Absolute values of a comparator triple what it keeps: the slack starts from gradients that are bounded instead."""
    net = stacked("groupsort", (8,) * 8, 0, orthogonal=True)
    condensed = condensed_of(net, torch.zeros(8, dtype=torch.float64), 10.0)
    sharper = bound_jacobian(condensed).condensed
    assert float(condensed.slack_gates.max()) > 1e4 * float(sharper.slack_gates.max())
    assert spectral_bound(sharper).bound <= 1 + 1e-5
    twice = condensed.with_gradients(2 * torch.ones_like(condensed.gates)), condensed.with_gradients(torch.ones_like(condensed.gates))
    assert (twice[0].slack_gates >= twice[1].slack_gates).all()
    assert (twice[0].slack_inputs >= twice[1].slack_inputs).all()


@pytest.mark.parametrize("name", ["groupsort", "gelu"])
def test_the_slack_of_the_second_time_is_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certify.local.clarke._MUCH", -1.0)
    net, center = stacked(name, (6, 12, 12, 12, 3), 5), torch.linspace(-1, 1, 6, dtype=torch.float64)
    condensed = condensed_of(net, center, 0.3)
    jacobian = bound_jacobian(condensed)
    assert (jacobian.condensed.slack_gates < condensed.slack_gates).any()
    jacobians = seen(net, center, 0.3, 300)
    low, high = jacobian.range
    assert ((jacobians >= low - 1e-12) & (jacobians <= high + 1e-12)).all()
    assert spectral_bound(jacobian.condensed).bound >= torch.linalg.matrix_norm(jacobians, 2).max() * (1 - 1e-12)


def test_the_bound_of_many_rows_without_programs_of_their_own_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    net, center = stacked("relu", (6, 16, 16, 4), 2), torch.linspace(-1, 1, 6, dtype=torch.float64)
    domain, shape = certify.Ball(center.numpy(), 0.3, 2), (6,)
    own = certify.lipschitz(net, certify.Local(how="sdp"), input_shape=shape, domain=domain)
    monkeypatch.setattr("certify.local.lipsdp._EFFORT", 0)
    shared = certify.lipschitz(net, certify.Local(how="sdp"), input_shape=shape, domain=domain)
    jacobians = seen(net, center, 0.3)
    assert own.pairs is not None
    assert shared.pairs is not None
    assert shared.value == own.value
    assert (own.pairs <= shared.pairs * (1 + 1e-3)).all()
    assert (shared.pairs < math.sqrt(2) * shared.value).any()
    assert shared.pairs[0, 3] >= torch.linalg.vector_norm(jacobians[:, 0] - jacobians[:, 3], dim=1).max()


def test_the_transpose_is_the_jacobian_at_every_choice_of_slopes_and_errors_count() -> None:
    net, center = stacked("maxmin", (5, 8, 8, 3), 3), torch.linspace(-1, 1, 5, dtype=torch.float64)
    condensed = condensed_of(net, center, 10.0)
    system = transposed(condensed, slice(None))
    assert system is not None
    assert system.is_explicit
    gates = system.count
    M, G = np.zeros((gates, gates)), torch.cat([layer.inputs for layer in condensed.layers]).numpy()
    for layer, stop in zip(condensed.layers, np.cumsum([layer.count for layer in condensed.layers]), strict=True):
        M[stop - layer.count : stop, : layer.earlier.shape[1]] = layer.earlier
    for seed in range(5):
        s = np.random.default_rng(seed).uniform(0, 1, gates)
        J = condensed.inputs.numpy() + condensed.gates.numpy() * s @ np.linalg.solve(np.eye(gates) - M * s, G)
        backwards = s[::-1, None] * system.rows
        p = np.linalg.solve(np.eye(gates) - backwards[:, 3:], backwards[:, :3])
        whole = system.output @ np.vstack([np.eye(3), p])  # the triangle stands for the inputs: only lengths agree
        assert np.allclose(whole.T @ whole, J @ J.T, atol=1e-10)
    plain = spectral_bound(condensed).bound
    worse = dataclasses.replace(condensed, slack_gates=condensed.slack_gates + 1e-3, slack_inputs=condensed.slack_inputs + 1e-3)
    assert spectral_bound(worse).bound > plain + 1e-3
    assert not math.isfinite(spectral_bound(dataclasses.replace(condensed, slack_gates=condensed.slack_gates + math.inf)).bound)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (7, 7), (1, 1), (3, 1)])
def test_the_triangle_keeps_every_length(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(4)
    signals = generator.standard_normal(shape) * 10.0 ** generator.uniform(-12, 3, (shape[0], 1))
    triangle, error = _triangle(signals)
    assert (error <= 1e-9 * np.linalg.norm(signals, axis=1) + 2.0**-400).all()
    for _ in range(50):
        s = generator.standard_normal(shape[0]) * 10.0 ** generator.uniform(-6, 6, shape[0])
        exact = np.linalg.norm((signals.T.astype(np.longdouble) @ s.astype(np.longdouble)).astype(float))
        assert exact <= (np.linalg.norm(triangle @ s) + error @ np.abs(s)) * (1 + 1e-13)


def test_alpha_decides_more_gates_and_never_loosens() -> None:
    fewer = 0
    for seed in range(4):
        net, center = stacked("relu", (8, 12, 12, 12, 3), seed), torch.linspace(-1, 1, 8, dtype=torch.float64)
        plain, sharp = (
            condense(Program.of(net, (8,)), Region.of(certify.Ball(center.numpy(), 0.2, math.inf), 8), torch.eye(3, dtype=torch.float64), steps=steps)
            for steps in (0, 10)
        )
        assert sharp.undecided <= plain.undecided
        fewer += sharp.undecided < plain.undecided
        ratio = bound_jacobian(sharp).row_norms(1) / bound_jacobian(plain).row_norms(1)
        assert (ratio <= 1 + 1e-12).all()
        jacobians = seen(net, center, 0.2, 500)  # the l2 ball is in the box
        assert (jacobians.abs().sum(2).amax(0) <= bound_jacobian(sharp).row_norms(1) * (1 + 1e-12)).all()
    assert fewer


@pytest.mark.parametrize("name", ["relu", "maxmin", "gelu"])
def test_forms_stay_below_their_tightened_bounds(name: str) -> None:
    """Of gates, and of lines and gates in random sums, at points of the ball."""
    net, center = stacked(name, (5, 10, 10, 3), 1), torch.linspace(-1, 1, 5, dtype=torch.float64)
    condensed = condensed_of(net, center, 0.5)
    layers, region = condensed.layers, condensed.region
    forms = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, condensed.undecided, dtype=torch.float64)
    plain = upper_bounds(layers, region, torch.zeros(20, dtype=torch.float64), *forms)
    sharp = tightened(layers, region, torch.zeros(20, dtype=torch.float64), *forms, 10)
    assert (sharp <= plain).all()
    assert bool((sharp < plain - 1e-6).any()) == (name != "gelu")
    d = torch.randn(2000, 5, dtype=torch.float64)
    d = 0.5 * d / torch.linalg.vector_norm(d, dim=1, keepdim=True) * torch.rand(2000, 1, dtype=torch.float64) ** 0.2
    p = torch.zeros(2000, 0, dtype=torch.float64)
    for layer in layers:
        z = layer.center + d @ layer.inputs.T + p @ layer.earlier.T
        assert (z >= layer.low - 1e-9).all()
        assert (z <= layer.high + 1e-9).all()
        p = torch.cat([p, F.gelu(z) if name == "gelu" else z.relu()], dim=1)
    assert (d @ forms[0].T + p @ forms[1].T <= sharp + 1e-9).all()


def test_slopes_of_any_numbers_prove_true_bounds() -> None:
    """The bound takes what it is given as slopes: it is above the plain one's truth even for nonsense."""
    net, center = stacked("relu", (5, 10, 10, 3), 2), torch.linspace(-1, 1, 5, dtype=torch.float64)
    condensed = condensed_of(net, center, 0.5)
    outputs = net(center + 0.5 * F.normalize(torch.randn(2000, 5, dtype=torch.float64), dim=1)).detach().amax(0)
    for seed in range(5):
        slopes = torch.randn(3, condensed.undecided, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
        bounds = upper_bounds(condensed.layers, condensed.region, condensed.center, condensed.inputs, condensed.gates, slopes)
        assert (bounds + condensed.slack >= outputs).all()


def test_refusals() -> None:
    with pytest.raises(certify.CertifyError, match="alpha_steps is 0 or more, got -1"):
        certify.Local(alpha_steps=-1)
    with pytest.raises(certify.CertifyError, match="got 'exact'"):
        certify.Local(how="exact")
    net = stacked("relu", (3, 4, 2), 0)
    with pytest.raises(certify.CertifyError, match="take how='crown'"):
        certify.lipschitz(net, certify.Local(how="sdp"), input_shape=(3,), domain=certify.Ball(np.zeros(3), 0.1, math.inf))
