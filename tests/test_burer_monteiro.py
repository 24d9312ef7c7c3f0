"""Multipliers from factors of low rank: what is proved with them is below the exact minimum, and near what the interior-point method proves."""

import dataclasses
import itertools
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
import torch
from test_lowrank import NORMS, descent, digits_net, exact_value, network, points, random_case, region_of

import certify
from certify.cli import main
from certify.errors import CertifyError
from certify.lowrank import LowRank
from sdp import burer_monteiro, lowrank
from sdp.burer_monteiro import propose
from sdp.lowrank_proof import prove_margin
from sdp.ranged import Ranged
from sdp.relaxation import Region, ReLUNetwork, relax


def margin(net, region, row):
    relaxation = relax(net, region)
    return relaxation, (Ranged.exact(row) @ relaxation.rows, Ranged.exact(row) @ relaxation.offset)


def size_of(relaxation, combined):
    return lowrank.Scaled.of(relaxation, *combined).unit


def known():
    """6-10-10: by another solver, and by the best attack, the minimum is -2.722505."""
    rng = np.random.default_rng(4)
    first, second = (rng.standard_normal((10, inputs)) / math.sqrt(inputs) * 1.3 for inputs in (6, 10))
    biases = [0.3 * rng.standard_normal(10) for _ in range(2)]
    row, center = rng.standard_normal(10), rng.uniform(size=6)
    return ReLUNetwork.of([first, second, row[None]], [*biases, np.zeros(1)]), Region(center, 0.5), np.ones(1)


def test_the_known_minimum_of_the_relaxation_is_met():
    relaxation, combined = margin(*known())
    proposal = propose(relaxation, *combined)
    bound = prove_margin(relaxation, *combined, proposal.multipliers)
    assert -2.722505 - 1e-3 < bound < -2.722504
    assert proposal.lower == pytest.approx(bound, abs=1e-6)
    assert proposal.upper == pytest.approx(-2.722505, abs=1e-4)


@pytest.mark.parametrize("block", range(3))
def test_bounds_are_below_every_value_and_near_those_of_the_interior_point_method(block):
    gaps = []
    for seed in range(25 * block, 25 * block + 25):
        net, region, row, rng = random_case(seed)
        relaxation, combined = margin(net, region, row)
        multipliers = propose(relaxation, *combined).multipliers
        bound = prove_margin(relaxation, *combined, multipliers)
        changed = dataclasses.replace(multipliers, product=multipliers.product * rng.uniform(0.9, 1.1, size=len(multipliers.product)))
        least = min(descent(net, row, region, seed), float((net(points(region, 500, seed)) @ row).min()))
        assert max(bound, prove_margin(relaxation, *combined, changed)) <= least + 1e-9 * (1 + abs(least)), seed
        near = prove_margin(relaxation, *combined, lowrank.propose(relaxation, *combined).multipliers)
        gaps.append((near - bound) / size_of(relaxation, combined))
    assert max(gaps) < 1e-4, gaps  # of the size of the last layer


@pytest.mark.parametrize("norm", NORMS)
def test_networks_with_three_layers_are_near_the_interior_point_method(norm):
    for seed in (0, 1):
        relaxation, combined = margin(network((12, 16, 14, 12, 2), seed), Region(np.full(12, 0.5), 0.4 if norm == 2 else 0.1, norm), np.array([1.0, -1.0]))
        assert relaxation.unstable >= 14
        bounds = [prove_margin(relaxation, *combined, solver.propose(relaxation, *combined).multipliers) for solver in (burer_monteiro, lowrank)]
        assert abs(bounds[0] - bounds[1]) < 1e-4 * size_of(relaxation, combined)
        assert bounds[0] > float(relaxation.smallest(combined[0][None], combined[1][None])[0])


def test_a_column_more_is_what_gets_out():
    """Factors of rank one stay at the attack, and prove little."""
    relaxation, combined = margin(network((12, 16, 14, 12, 2), 0), Region(np.full(12, 0.5), 0.4), np.array([1.0, -1.0]))
    solver = burer_monteiro._Factors(lowrank.Scaled.of(relaxation, *combined))
    least, columns = solver.start()
    solver.start = lambda: (least, columns[:, :1])
    grown = solver.run(1e-5, None, 60)
    proved = prove_margin(relaxation, *combined, grown.multipliers)
    assert proved == pytest.approx(prove_margin(relaxation, *combined, propose(relaxation, *combined).multipliers), abs=1e-4 * size_of(relaxation, combined))


def test_a_goal_stops_the_rounds():
    relaxation, combined = margin(*known())
    whole = propose(relaxation, *combined)
    for goal in (whole.lower - 0.5, whole.lower + 0.5):
        found = propose(relaxation, *combined, goal=goal)
        assert found.steps < whole.steps
        assert (prove_margin(relaxation, *combined, found.multipliers) > goal) == (goal < whole.lower)
        assert (found.upper < goal) == (goal > whole.lower)


@pytest.mark.parametrize("fault", ["nan", "noise", "nothing"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_solve_that_fails_proves_nothing_false(monkeypatch, fault, norm):
    net, region, row = network((4, 8, 6, 2), 2), region_of(3, 4, norm), np.array([1.0, -1.0])
    relaxation, combined = margin(net, region, row)
    good = prove_margin(relaxation, *combined, propose(relaxation, *combined).multipliers)
    rng = np.random.default_rng(0)
    broken = {"nan": lambda x: x * math.nan, "noise": lambda x: 10 * rng.standard_normal(x.shape), "nothing": lambda x: x}[fault]
    monkeypatch.setattr(scipy.optimize, "minimize", lambda function, x, **_: scipy.optimize.OptimizeResult(x=broken(x)))
    proposal = propose(relaxation, *combined)
    for values in dataclasses.astuple(proposal.multipliers):
        assert np.isfinite(values).all()
    assert prove_margin(relaxation, *combined, proposal.multipliers) < min(good, descent(net, row, region, 0))


@pytest.mark.parametrize("seed", range(24))
def test_numbers_of_any_size_are_refused_or_bounded(seed):
    rng = np.random.default_rng(seed + 20_000)
    sizes = (int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(1, 5)), 1)
    far = seed % 4 * 50 + 1
    weights = [rng.standard_normal((b, a)) * 10.0 ** rng.integers(-far, far + 1) for a, b in itertools.pairwise(sizes)]
    net = ReLUNetwork.of(weights, [rng.standard_normal(b) * 10.0 ** rng.integers(-far, far + 1) for b in sizes[1:]])
    region = Region(rng.standard_normal(sizes[0]), float(10.0 ** rng.uniform(-12, 6)), NORMS[seed % 2])
    try:
        relaxation = relax(net, region)
    except ValueError:  # refused: the numbers are too large
        return
    combined = relaxation.rows[0], relaxation.offset[0]
    moved = region.center + (1 - 1e-9) * region.radius * rng.uniform(-1, 1, size=(20, sizes[0])) / math.sqrt(sizes[0])
    moved = moved[np.abs(moved - region.center).max(axis=1) <= region.radius / math.sqrt(sizes[0]) * (1 - 1e-10)]
    least = min(exact_value(net, np.ones(1), x) for x in (region.center, *moved))
    bound = prove_margin(relaxation, *combined, propose(relaxation, *combined, steps=10).multipliers)
    assert bound == -math.inf or Fraction(bound) <= least


@pytest.mark.parametrize("norm", NORMS)
def test_radii_are_those_of_the_interior_point_method(norm):
    net, images = digits_net(), torch.from_numpy(certify.data.digits("test").inputs).reshape(-1, 1, 8, 8)[:3]
    inner, outer = (certify.robustness(net, images, LowRank(norm=norm, tolerance=0.05, solver=solver)) for solver in ("interior-point", "burer-monteiro"))
    np.testing.assert_allclose(outer.radius, inner.radius, rtol=0.06)
    assert (outer.prediction == inner.prediction).all()
    assert "solver='burer-monteiro'" in outer.method


def test_unknown_solvers_are_refused_and_memory_is_less():
    for solver in ("scs", "", None, ["interior-point"]):
        with pytest.raises(CertifyError, match=rf"'interior-point' or 'burer-monteiro', got solver={re.escape(repr(solver))}"):
            LowRank(solver=solver)
    relaxation = relax(network((12, 40, 40, 2), 0), Region(np.full(12, 0.5), 0.4))
    assert 0 < burer_monteiro.memory(relaxation) < lowrank.memory(relaxation) / 4


def test_a_run_is_proved_again(tmp_path, capsys):
    import lipnet

    path, folder = str(tmp_path / "small.safetensors"), tmp_path / "a"
    lipnet.save(digits_net((12,), normalize=False), path, input_shape=(1, 8, 8))
    run = ["run", path, "digits", "--method", "lowrank", "--limit", "3", "--radius", "0.1", "-o", str(folder)]
    assert main([*run, "--proposer", "burer-monteiro"]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "solver='burer-monteiro'" in manifest["method"]
    assert main(["check", str(folder)]) == 0
    assert "3 rows proved again" in capsys.readouterr().out
    (folder / "manifest.json").write_text(json.dumps({**manifest, "method": manifest["method"].replace("burer-monteiro", "another")}))
    assert main(["check", str(folder)]) == 2
    assert main(["run", path, "digits", "--proposer", "burer-monteiro", "-o", str(tmp_path / "b")]) == 2
    assert "--proposer is for --method lowrank" in capsys.readouterr().err
