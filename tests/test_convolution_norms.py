"""Convolution norms once more: modules of every geometry against their matrices, proofs in exact arithmetic, and the benchmark of norms."""

import json
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_convolution import ROUNDING, matrix_norm
from test_proof import exact, exact_gram, exact_shift, exactly_semidefinite
from torch import nn

import certify
from benchmarks import norms
from certify import convolution
from certify.convolution import spectrum_norm
from certify.registry import rule_for
from certify.rules.same_conv import tapwise


def random_module(rng):
    """A convolution of images, of signals, or a transposed one, of any geometry that torch takes, and the shape of its input."""
    kind = (nn.Conv2d, nn.Conv2d, nn.Conv1d, nn.ConvTranspose2d)[rng.integers(4)]
    axes = 1 if kind is nn.Conv1d else 2
    taps, stride, dilation = (tuple(int(v) for v in rng.integers(1, top, axes)) for top in (6, 4, 4))
    size = tuple(int(v) for v in rng.integers(1, 9, axes))
    groups = int(rng.integers(1, 4))
    channels, out = (groups * int(v) for v in rng.integers(1, 3, 2))
    reach = [step * (k - 1) for step, k in zip(dilation, taps, strict=True)]
    padding = tuple(int(rng.integers(0, most + 1)) for most in reach)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bool(rng.integers(2))}
    if kind is nn.ConvTranspose2d:
        extra = tuple(int(rng.integers(0, max(pair))) for pair in zip(stride, dilation, strict=True))
        outputs = [(n - 1) * s - 2 * p + r + e + 1 for n, s, p, r, e in zip(size, stride, padding, reach, extra, strict=True)]
        return None if min(outputs) < 1 else (kind(channels, out, taps, padding=padding, output_padding=extra, **options), (channels, *size))
    mode = ("zeros", "circular")[rng.integers(2)]
    match rng.integers(6):
        case 0:
            padding, options["stride"] = "same", 1
        case 1:
            padding = "valid"
    pads = [most - most // 2 for most in reach] if padding == "same" else [0] * axes if padding == "valid" else padding
    totals = reach if padding == "same" else [2 * p for p in pads]
    if any(n + total < r + 1 for n, total, r in zip(size, totals, reach, strict=True)) or (
        mode == "circular" and any(p > n for p, n in zip(pads, size, strict=True))
    ):
        return None
    return kind(channels, out, taps, padding=padding, padding_mode=mode, **options), (channels, *size)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_module_of_any_geometry_exceeds_its_bound(dtype):
    """Sums of positive numbers, waves and Gaussian kernels; the matrix is that of the stored numbers, in float64."""
    rng, ratios, kinds = np.random.default_rng(int(str(dtype)[-2:])), [], set()
    while len(ratios) < 150:
        if (found := random_module(rng)) is None:
            continue
        module, shape = found
        with torch.no_grad():
            kernel = torch.from_numpy(rng.standard_normal(module.weight.shape))
            module.to(dtype).weight.copy_(kernel.abs() if rng.integers(3) == 0 else kernel)
        bound = rule_for(module)(module.eval(), shape).value
        exact_norm = matrix_norm(module.double(), shape)
        assert exact_norm <= bound * ROUNDING, (module, shape)
        if exact_norm > 1e-9:
            ratios.append(bound / exact_norm)
            kinds.add((type(module), module.padding_mode, module.groups > 1, module.stride != (1,) * len(module.stride)))
    assert np.median(ratios) <= 1.25
    assert len(kinds) >= 16  # three kinds, two borders for two of them, groups and strides or none


@pytest.mark.parametrize("scale", [-40, 0, 30])
def test_norms_of_complex_matrices_are_proved_in_exact_arithmetic(scale):
    """Unitary matrices, whose singular values all meet the bound, and Gaussian ones: `[[R, -S], [S, R]]` is what is proved exactly."""
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (2, 3), (3, 2), (4, 4)):
        stack = rng.standard_normal((3, rows, columns)) + 1j * rng.standard_normal((3, rows, columns))
        if rows == columns:
            stack = np.linalg.qr(stack)[0]
        stack = np.ldexp(stack.real, scale) + 1j * np.ldexp(stack.imag, scale)
        found = Fraction(spectrum_norm(stack))
        for matrix in stack:
            real_form = exact(np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]]))
            assert exactly_semidefinite(exact_shift(found**2, exact_gram(real_form)))
        assert found <= Fraction(float(np.linalg.norm(stack, 2, axis=(1, 2)).max())) * (1 + Fraction(1, 10**11))


@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e-310, 1e160], ids=str)
def test_sums_of_frobenius_norms_count_what_no_square_can_hold(scale):
    kernel = scale * np.random.default_rng(0).standard_normal((2, 3, 3, 2))
    squares = [sum(Fraction(float(entry)) ** 2 for entry in kernel[:, :, i, j].ravel()) for i in range(3) for j in range(2)]
    norms_of_taps = [Fraction(math.isqrt(int(square * 4**1200)), 2**1200) for square in squares]  # rounded down by 2^-1200
    found = Fraction(tapwise(kernel))
    assert sum(norms_of_taps) <= found <= sum(norms_of_taps) * (1 + Fraction(1, 10**12)) + Fraction(1, 10**322)
    assert tapwise(0 * kernel) == 0


def test_which_matrices_have_a_factor_is_said_one_by_one():
    gram = np.array([np.diag([1.0, 2.0]), np.diag([1.0, 5.0]), [[2.0, 3j], [-3j, 2.0]], [[2.0, 1j], [-1j, 2.0]], [[np.nan, 0], [0, 1.0]]], complex)
    assert convolution._has_factor(gram, 4.0).tolist() == [True, False, False, True, False]


# The benchmark


CASES = [
    *norms.cases(quick=True),
    norms.Case("stride", nn.Conv2d(2, 3, (4, 3), stride=(3, 2), padding=(2, 0), bias=False).double().eval(), (2, 12, 13)),
    norms.Case("circular", nn.Conv2d(2, 4, 4, 2, 1, bias=False, groups=2, padding_mode="circular").double().eval(), (2, 8, 10)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_baselines_of_the_benchmark_are_what_they_say(case, monkeypatch):
    proved, reached, each = norms.proved(case), norms.reached(case, 60), norms.each_frequency(case)
    assert reached <= proved * ROUNDING
    assert norms.power_iteration(case) <= proved * ROUNDING
    assert proved <= each * (1 + 1e-9)
    monkeypatch.setattr(convolution, "_MATRIX", 0)
    assert each == pytest.approx(norms.proved(case), rel=1e-9)
    if math.prod(case.shape) < 1000:
        assert norms.reached(case) == pytest.approx(matrix_norm(case.layer, case.shape), rel=1e-6)


def test_the_cases_of_a_network_are_its_convolutions_with_the_sizes_that_they_see(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 8 * 8, 10))
    torch.save(net.state_dict(), tmp_path / "small.pth")
    first, second = norms.of_network(str(tmp_path / "small.pth"), "cnn_a")
    assert (first.name, first.shape, second.shape) == ("small 0", (3, 32, 32), (4, 16, 16))
    assert torch.equal(second.layer.weight, net[2].weight.double())
    assert norms.reached(second, 40) <= norms.proved(second) * ROUNDING


def test_rows_compare_times_with_what_says_as_much_and_with_an_svd():
    def found(method, value, seconds):
        return norms.Found("a", method, "bound", value, 1.0, seconds)

    rows = norms.rows_of(
        [found("ours", 1.001, 1.0), found(norms.TORUS, 1.5, 2.0), found("loose", 1.5, 4.0), found("below", 0.9, 4.0), found("near", 1.01, 0.5)], False
    )
    assert [(row.what, row.met) for row in rows] == [
        ("a: proved / reached", "yes"), (f"a: seconds, ours / {norms.TORUS}", "yes"), ("a: seconds, ours / near", "no"),
    ]  # fmt: skip


def test_the_script_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["norms", "--quick", "--json", str(tmp_path / "out.json")])
    monkeypatch.setattr(norms, "POWER_STEPS", 10)
    norms.main()
    written = json.loads((tmp_path / "out.json").read_text())
    assert "| 3x3, 16 -> 16 at 32, zeros |" in capsys.readouterr().out
    assert len({one["case"] for one in written["methods"]}) == 4
    assert all(one["over"] >= -1e-9 for one in written["methods"] if one["claims"] == "proof")
    with pytest.raises(SystemExit, match="give a checkout"):
        norms.checkout(tmp_path)


@pytest.mark.parametrize("layer", [torch.nn.CircularPad1d((-1, 4)), torch.nn.CircularPad2d((1, 1, -1, 1))])
def test_negative_circular_borders_are_refused(layer):
    """torch fails on some of them, and gives numbers that change from run to run on others."""
    with pytest.raises(certify.CertifyError):
        certify.lipschitz(torch.nn.Sequential(layer).eval(), input_shape=(2, *(4,) * (len(layer.padding) // 2)))
