"""Convolutions, pools and batch normalisation: every bound against the full matrix of the operator, which torch gives pixel by pixel."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import certify
from certify import convolution
from certify.convolution import any_size_norm, convolution_bound, convolution_norm
from certify.registry import rule_for
from lipnet.testing import largest_slope

ROUNDING = 1 + 1e-12  # of the reference: a singular value of a few hundred rows in float64


def matrix_norm(operator, shape):
    """The norm of a linear operator on inputs of this shape, from its answers to single pixels."""
    with torch.no_grad():
        zero = operator(torch.zeros(1, *shape, dtype=torch.float64))
        columns = operator(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)) - zero
    return torch.linalg.matrix_norm(columns.flatten(1), 2).item()


def exact_norm(kernel, size, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, mode="zeros"):
    top, bottom, left, right = padding

    def operator(x):
        padded = functional.pad(x, (left, right, top, bottom), **({} if mode == "zeros" else {"mode": "circular"}))
        return functional.conv2d(padded, torch.from_numpy(kernel), None, stride, 0, dilation, groups)

    return matrix_norm(operator, (kernel.shape[1] * groups, *size))


def random_kernel(rng, *shape):
    """Gaussian; or of one sign, which puts the peak at frequency 0; or sparse; or of low rank; or a wave, which puts it between the points of a grid."""
    kernel = rng.standard_normal(shape)
    match rng.integers(5):
        case 0:
            kernel = np.abs(kernel)
        case 1:
            kernel *= rng.random(shape) < 0.3
        case 2:
            kernel = np.broadcast_to(kernel[:1], shape).copy()
        case 3:
            angle = rng.uniform(0, 2 * math.pi, 2)
            kernel = kernel[:, :, :1, :1] * np.cos(angle[0] * np.arange(shape[2])[:, None] + angle[1] * np.arange(shape[3]))
    return kernel


def random_cases(seed, count, smallest=4):
    """Kernels 1..5 on each axis, strides 1..3, dilation 1..3, padding up to the reach of the kernel, two kinds of border, one or two groups."""
    rng = np.random.default_rng(seed)
    while count:
        taps, stride, dilation = (tuple(int(v) for v in rng.integers(1, top, 2)) for top in (6, 4, 4))
        size = tuple(int(v) for v in rng.integers(smallest, 10, 2))
        groups = int(rng.integers(1, 3))
        inner, outer = (int(v) for v in rng.integers(1, 1 + 4 // groups, 2))
        mode = ("zeros", "circular")[rng.integers(2)]
        reach = [dilation[i // 2] * (taps[i // 2] - 1) + 1 for i in range(4)]
        padding = tuple(min(int(rng.integers(0, reach[i] + 1)), size[i // 2]) for i in range(4))
        if all(size[i] + padding[2 * i] + padding[2 * i + 1] >= reach[2 * i] for i in range(2)):
            count -= 1
            yield random_kernel(rng, outer * groups, inner, *taps), size, {
                "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "mode": mode
            }  # fmt: skip


@pytest.fixture
def torus_alone(monkeypatch):
    """Small images too are bounded by the torus."""
    monkeypatch.setattr(convolution, "_MATRIX", 0)


@pytest.mark.parametrize("smallest", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_operator_exceeds_its_bound_and_no_size_the_bound_for_all(seed, smallest, torus_alone):
    ratios = []
    for kernel, size, geometry in random_cases(seed, 250, smallest):
        exact, bound = exact_norm(kernel, size, **geometry), convolution_norm(kernel, size, **geometry)
        assert exact <= bound * ROUNDING, (kernel.shape, size, geometry)
        if geometry["mode"] == "zeros":
            assert bound <= any_size_norm(kernel, stride=geometry["stride"], dilation=geometry["dilation"], groups=geometry["groups"]) * ROUNDING
        if exact > 1e-9:
            ratios.append(bound / exact)
    assert np.median(ratios) <= 1.2  # strides, dilation and padding at random on images of a few pixels: 1.08 to 1.14 measured


@pytest.mark.parametrize("seed", range(3))
def test_small_images_are_met_exactly(seed):
    for kernel, size, geometry in random_cases(seed, 120, 1):
        exact, (bound, how) = exact_norm(kernel, size, **geometry), convolution_bound(kernel, size, **geometry)
        overlaps = geometry["mode"] == "circular" and any((k - 1) * d >= n for k, d, n in zip(kernel.shape[2:], geometry["dilation"], size, strict=True))
        assert exact <= bound * ROUNDING
        assert overlaps or bound <= exact * (1 + 1e-9) + 1e-12, (how, kernel.shape, size, geometry)


@pytest.mark.parametrize(("out", "into", "groups", "size"), [(3, 2, 1, 8), (12, 12, 12, 6), (2, 40, 1, 14), (40, 2, 1, 14)])
def test_what_is_written_out_is_the_convolution_entry_by_entry(out, into, groups, size, monkeypatch):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((out, into // groups, 3, 3))
    seen = []
    monkeypatch.setattr(convolution, "largest_singular_value", lambda matrix: seen.append(matrix) or 0.0)
    convolution_bound(kernel, (size, size - 1), padding=1, stride=2, groups=groups)
    eye = torch.eye(into * size * (size - 1), dtype=torch.float64).reshape(-1, into, size, size - 1)
    whole = functional.conv2d(eye, torch.from_numpy(kernel), None, 2, 1, 1, groups).flatten(1).T.numpy()
    assert len(seen) == groups
    assert np.array_equal(np.asarray(torch.block_diag(*map(torch.from_numpy, seen))), whole)


def test_large_images_are_not_written_out(monkeypatch):
    monkeypatch.setattr(convolution, "largest_singular_value", None)
    monkeypatch.setattr(convolution.Reach, "marks", None)  # which of themselves are too much for the memory, along a long axis
    assert "torus" in convolution_bound(np.ones((4, 2, 1, 9)), (1, 16_000), padding=(0, 0, 4, 4))[1]
    assert "torus" in convolution_bound(np.ones((1, 1, 1, 9_999)), (1, 10_000))[1]
    for shape, size, groups in (((8, 8, 3, 3), (12, 12), 1), ((600, 1, 3, 3), (14, 14), 600), ((1, 300, 3, 3), (30, 30), 1)):
        assert "torus" in convolution_bound(np.ones(shape), size, padding=1, groups=groups)[1]


def test_circular_convolutions_of_the_same_geometry_are_met_exactly(torus_alone):
    rng = np.random.default_rng(0)
    for _ in range(150):
        taps, stride, dilation, counts = (tuple(int(v) for v in rng.integers(1, top, 2)) for top in (6, 4, 3, 5))
        size = stride[0] * (3 + counts[0]), stride[1] * (3 + counts[1])
        total = [max(d * (k - 1) + 1 - s, 0) for d, k, s in zip(dilation, taps, stride, strict=True)]
        padding = total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
        kernel = random_kernel(rng, int(rng.integers(1, 4)), int(rng.integers(1, 4)), *taps)
        if max(padding[:2]) > size[0] or max(padding[2:]) > size[1] or any(s > d * (k - 1) + 1 for s, d, k in zip(stride, dilation, taps, strict=True)):
            continue
        exact = exact_norm(kernel, size, stride, padding, dilation, 1, "circular")
        assert (
            exact <= convolution_norm(kernel, size, stride=stride, padding=padding, dilation=dilation, mode="circular") * ROUNDING <= exact * (1 + 1e-9) + 1e-12
        )


@pytest.mark.parametrize(("size", "factor"), [((4, 4), 1.4), ((8, 8), 1.1), ((9, 8), 1.1), ((12, 12), 1.05)])
@pytest.mark.parametrize("taps", [2, 3])
def test_zero_padding_is_close(size, factor, taps, torus_alone):
    """Measured over 20 Gaussian kernels of 3 taps: at most 1.33 at 4 x 4, 1.09 at 8 x 8, 1.035 at 12 x 12, 1.02 at 16 x 16; less with more channels."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        kernel = rng.standard_normal((2, 2, taps, taps))
        exact = exact_norm(kernel, size, padding=(1, 1, 1, 1) if taps == 3 else (0, 1, 0, 1))
        bound = convolution_norm(kernel, size, padding=(1, 1, 1, 1) if taps == 3 else (0, 1, 0, 1))
        assert exact <= bound * ROUNDING <= factor * exact


def test_the_norm_on_the_grid_of_the_image_is_no_bound_for_zero_padding_and_ours_is(torus_alone):
    rng = np.random.default_rng(0)
    worst = 0.0
    for size in (5, 6, 7, 8) * 25:
        kernel = random_kernel(rng, 1, 1, 3, 3)
        on_the_image = np.abs(np.fft.fft2(kernel[0, 0], s=(size, size))).max()
        exact = exact_norm(kernel, (size, size), padding=(1, 1, 1, 1))
        assert exact <= convolution_norm(kernel, (size, size), padding=1) * ROUNDING
        worst = max(worst, exact / max(on_the_image, 1e-9))
    assert worst > 1.02  # what the trap would have printed is false by this much


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_shifts_and_orthogonal_kernels_have_norm_one(mode, torus_alone):
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    for place in [(0, 0), (1, 1), (2, 0)]:
        kernel = np.zeros((6, 6, 3, 3))
        kernel[:, :, place[0], place[1]] = orthogonal
        assert 1 <= convolution_norm(kernel, (8, 9), padding=1, mode=mode) <= 1 + 1e-9
    unshuffle = np.eye(4).reshape(4, 1, 2, 2)
    assert 1 <= convolution_norm(unshuffle, (8, 6), stride=2, mode=mode) <= 1 + 1e-9
    assert 1 <= convolution_norm(np.ones((5, 1, 1, 1)), (7, 7), groups=5, mode=mode) <= 1 + 1e-9
    assert 3 <= convolution_norm(np.full((1, 9, 1, 1), 1.0), (300, 300), mode=mode) <= 3 + 1e-9  # no frequencies at all to look at
    two_wide = np.concatenate([unshuffle, unshuffle])
    assert convolution_norm(two_wide, (4, 4), stride=2, mode=mode) == pytest.approx(math.sqrt(2), rel=1e-9)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_one_output_is_the_kernel_as_a_matrix(size):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((5, 3, size, size))
    assert convolution_norm(kernel, (size, size)) == pytest.approx(np.linalg.norm(kernel.reshape(5, -1), 2), rel=1e-10)
    odd = rng.standard_normal((5, 3, 3, 3))
    assert convolution_norm(odd, (1, 1), padding=1) == pytest.approx(np.linalg.norm(odd[:, :, 1, 1], 2), rel=1e-10)
    assert convolution_norm(odd, (1, 1), padding=(3, 0, 3, 0), stride=2) == 0  # its one output sees the border only


def test_the_bound_scales_with_the_kernel_however_small_or_large():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 4, 3, 3))
    value = convolution_norm(kernel, (6, 6), padding=1)
    assert convolution_norm(1.5 * kernel, (6, 6), padding=1) == pytest.approx(1.5 * value, rel=1e-12)
    for power in (-1060, -600, 600, 1000):
        assert convolution_norm(np.ldexp(kernel, power), (6, 6), padding=1) == pytest.approx(math.ldexp(value, power), rel=1e-4 if power < -1000 else 1e-12)
    assert convolution_norm(np.full((1, 1, 1, 1), 5e-324), (4, 4)) >= 5e-324
    assert convolution_norm(np.zeros((2, 2, 3, 3)), (4, 4), padding=1) == 0 == any_size_norm(np.zeros((2, 2, 3, 3)))
    with pytest.raises(certify.CertifyError, match="so large that its norm is not a float64"):
        convolution_norm(np.full((2, 2, 3, 3), 1.5e308), (6, 6), padding=1)


def test_kernels_whose_response_cancels_or_loses_rank():
    assert 0 <= convolution_norm(np.array([1.0, 0.0, -1.0]).reshape(1, 1, 1, 3), (2, 2), padding=(0, 0, 1, 1), mode="circular") <= 1e-11
    rng = np.random.default_rng(0)
    column, row = rng.standard_normal((6, 1, 3, 3)), rng.standard_normal((1, 5, 1, 1))
    low = column * row
    exact = exact_norm(low, (5, 5), padding=(1, 1, 1, 1), mode="circular")
    assert exact <= convolution_norm(low, (5, 5), padding=1, mode="circular") * ROUNDING <= exact * (1 + 1e-9)
    wide = 10.0 ** rng.uniform(-200, 0, (4, 4, 3, 3))
    exact = exact_norm(wide, (5, 5), padding=(1, 1, 1, 1), mode="circular")
    assert exact <= convolution_norm(wide, (5, 5), padding=1, mode="circular") * ROUNDING <= exact * (1 + 1e-9)


def test_the_bound_for_all_sizes_covers_the_frequencies_between_its_points():
    rng = np.random.default_rng(0)
    for _ in range(30):
        taps = int(rng.integers(2, 6))
        kernel = random_kernel(rng, 2, 2, taps, taps)
        fine = np.fft.fft2(kernel, s=(90, 90)).transpose(2, 3, 0, 1)
        supremum = np.linalg.svd(fine, compute_uv=False).max()
        for points in (taps, 2 * taps, 4 * taps):
            bound = any_size_norm(kernel, points=(points, points))
            assert supremum <= bound * ROUNDING
        assert any_size_norm(kernel) <= supremum * 1.01
    fringe = np.array([1.0, -1.0]).reshape(1, 1, 1, 2)  # |1 - exp(iw)| is largest at pi, which a grid of odd size lacks by pi / points: the factor is exact
    for points in (3, 5, 9):
        assert any_size_norm(fringe, points=(1, points)) == pytest.approx(2, rel=1e-10)


def test_large_images_use_a_coarser_grid_and_stay_bounds(monkeypatch):
    rng = np.random.default_rng(0)
    kernel = random_kernel(rng, 3, 2, 3, 3)
    exact, how = convolution_bound(kernel, (90, 70), padding=1)
    assert how == "norm on the 91x71 torus"
    monkeypatch.setattr(convolution, "_WORK", 0.0)
    coarse, how = convolution_bound(kernel, (90, 70), padding=1)
    assert how == "norm on the 91x71 torus, from a grid of 48x48 frequencies"
    assert exact <= coarse * ROUNDING <= 1.005 * exact
    assert convolution_bound(kernel, (20, 70), padding=1)[1].endswith("grid of 21x48 frequencies")


def test_chunks_do_not_change_the_bound(monkeypatch):
    kernel = np.random.default_rng(0).standard_normal((4, 3, 3, 3))
    whole = convolution_norm(kernel, (9, 8), padding=1)
    monkeypatch.setattr(convolution, "_CHUNK", 1)
    assert convolution_norm(kernel, (9, 8), padding=1) == pytest.approx(whole, rel=1e-12)


def test_the_proof_does_not_trust_its_proposal(monkeypatch):
    kernel = np.random.default_rng(0).standard_normal((4, 3, 3, 3))
    exact = exact_norm(kernel, (6, 6), padding=(1, 1, 1, 1), mode="circular")
    honest = convolution._eigenvalue
    monkeypatch.setattr(convolution, "_eigenvalue", lambda gram: 0.999 * honest(gram))
    assert exact <= convolution_norm(kernel, (6, 6), padding=1, mode="circular") * ROUNDING <= 1.01 * exact  # raised until a proof goes through
    monkeypatch.setattr(convolution, "_eigenvalue", lambda gram: (1 - 2**-41) * honest(gram))
    assert exact <= convolution_norm(kernel, (6, 6), padding=1, mode="circular") * ROUNDING <= exact * (1 + 1e-9)
    monkeypatch.setattr(convolution, "_eigenvalue", lambda gram: 0.0)
    with pytest.raises(AssertionError, match="please report this"):
        convolution_norm(kernel, (6, 6), padding=1, mode="circular")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: convolution_norm(np.full((1, 1, 3, 3), np.nan), (4, 4)), "NaN or infinite"),
        (lambda: convolution_norm(np.full((1, 1, 3, 3), np.inf), (4, 4)), "NaN or infinite"),
        (lambda: convolution_norm(np.ones((1, 1, 3, 3)), (2, 4)), "kernel of 3 taps with dilation 1 is larger than the image of 2 with padding 0"),
        (lambda: convolution_norm(np.ones((1, 1, 3, 3)), (4, 4), padding=-1), "padding not negative"),
        (lambda: convolution_norm(np.ones((1, 1, 3, 3)), (4, 4), stride=0), "must be positive"),
        (lambda: convolution_norm(np.ones((1, 1, 3, 3)), (4, 4), mode="reflect"), "mode must be 'zeros' or 'circular', got 'reflect'"),
        (lambda: convolution_norm(np.ones((3, 1, 3, 3)), (4, 4), groups=2), "groups dividing out"),
        (lambda: convolution_norm(np.ones((3, 3, 3)), (4, 4)), "a kernel is"),
        (lambda: any_size_norm(np.ones((1, 1, 3, 3)), points=(2, 9)), "needs more than 2 points, got 2"),
    ],
    ids=range(9),
)
def test_what_has_no_norm_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# The rules


def double(module):
    torch.manual_seed(0)
    module = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def bound_of(module, shape):
    return certify.lipschitz(module, input_shape=shape).parts[0]


CONVOLUTIONS = [
    (nn.Conv2d(3, 2, 3, padding=1), (3, 8, 8), 1.1),
    (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 9, 8), 1.2),
    (nn.Conv2d(2, 4, 4, stride=2, padding=1), (2, 8, 8), 1.2),
    (nn.Conv2d(2, 2, 3, padding="same", dilation=2), (2, 9, 7), 1.4),
    (nn.Conv2d(2, 2, (2, 4), padding="same"), (2, 8, 8), 1.2),
    (nn.Conv2d(2, 2, 3, padding="valid"), (2, 8, 8), 1.2),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 8, 8), 1.1),
    (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (4, 8, 8), 1.1),
    (nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), (3, 8, 6), 1 + 1e-9),
    (nn.Conv2d(2, 2, (2, 4), padding="same", padding_mode="circular"), (2, 5, 6), 1 + 1e-9),
    (nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="circular"), (2, 8, 6), 1 + 1e-9),
    (nn.Conv2d(1, 1, 3, padding=(3, 0), padding_mode="circular"), (1, 4, 6), 2.0),
    (nn.Conv2d(3, 2, 2, stride=2), (3, 8, 6), 1 + 1e-9),
    (nn.Conv1d(3, 2, 5, stride=2, padding=2), (3, 11), 1.2),
    (nn.Conv1d(2, 2, 3, padding="same", dilation=2, padding_mode="circular"), (2, 9), 1 + 1e-9),
    (nn.Conv1d(2, 4, 2, groups=2), (2, 9), 1.1),
    (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 5, 4), 1.2),
    (nn.ConvTranspose2d(2, 3, (2, 4), stride=(2, 3), padding=(0, 1)), (2, 4, 5), 1.2),
    (nn.ConvTranspose2d(4, 2, 3, groups=2), (4, 6, 7), 1.2),
    (nn.ConvTranspose2d(2, 2, 3, dilation=3, stride=2, output_padding=2), (2, 4, 4), 1.4),
    (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 7), 1.2),
    (nn.ConvTranspose1d(4, 2, 4, stride=3, groups=2, dilation=2), (4, 5), 1.2),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 7), 2.0),
    (nn.Conv2d(2, 2, (3, 2), stride=2, padding=(2, 0), padding_mode="replicate"), (2, 5, 6), 2.5),
    (nn.Conv1d(2, 2, 3, padding=1, padding_mode="replicate"), (2, 6), 1.5),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("layer", "shape", "factor"), CONVOLUTIONS, ids=lambda value: str(value)[:60])
def test_convolutions_of_torch(layer, shape, factor, torus_alone):
    layer = double(layer)
    exact, bound = matrix_norm(layer, shape), bound_of(layer, shape)
    assert exact <= bound.value * ROUNDING <= factor * exact
    assert "torus" in bound.method
    with torch.no_grad():
        layer.weight.mul_(1.5)
    assert bound_of(layer, shape).value == pytest.approx(1.5 * bound.value, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("layer", "shape"), [(layer, shape) for layer, shape, _ in CONVOLUTIONS], ids=lambda value: str(value)[:60])
def test_small_convolutions_of_torch_are_met(layer, shape):
    layer = double(layer)
    exact, bound = matrix_norm(layer, shape), bound_of(layer, shape).value
    assert exact <= bound * ROUNDING
    assert layer.padding_mode in ("reflect", "replicate") or bound <= exact * (1 + 1e-9)


def test_a_bound_says_how_it_was_found():
    assert bound_of(nn.Conv2d(3, 4, 3, padding=1).eval(), (3, 32, 32)).method == "conv2d 3x3, zeros: norm on the 33x33 torus"
    bound = bound_of(nn.ConvTranspose2d(3, 4, 2, stride=2).eval(), (3, 8, 8))
    assert bound.method == "transposed conv2d 2x2: norm on the 16x16 torus of the convolution from 16x16"
    assert {assumption.name for assumption in bound.assumptions} == {"FLOAT64_LINALG"}


def test_bfloat16_and_float32_kernels_are_taken_as_they_are():
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Conv2d(3, 2, 3, padding=1).to(dtype).eval()
        assert bound_of(layer, (3, 6, 6)).value == convolution_norm(layer.weight.detach().double().numpy(), (6, 6), padding=1)


POOLS = [
    (nn.AvgPool2d(2), (2, 8, 8)),
    (nn.AvgPool2d(3, 2, 1), (1, 8, 9)),
    (nn.AvgPool2d((3, 2), (1, 3), (1, 0)), (1, 7, 8)),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 6, 7)),
    (nn.AvgPool2d(3, 2, ceil_mode=True), (1, 6, 8)),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 7, 6)),
    (nn.AvgPool2d(4, divisor_override=4), (2, 8, 8)),
    (nn.AvgPool2d(3, 1, 1, divisor_override=-5), (1, 5, 5)),
    (nn.AvgPool2d(4, 4, 2, ceil_mode=True), (1, 3, 9)),
    (nn.AdaptiveAvgPool2d(1), (3, 5, 7)),
    (nn.AdaptiveAvgPool2d((2, None)), (1, 6, 5)),
    (nn.AdaptiveAvgPool2d((3, 4)), (1, 7, 9)),
    (nn.AdaptiveAvgPool2d((7, 2)), (1, 4, 5)),
    (nn.PixelShuffle(2), (4, 3, 2)),
    (nn.PixelUnshuffle(3), (1, 6, 3)),
    (nn.ZeroPad2d((1, 2, 0, 3)), (2, 4, 4)),
    (nn.ConstantPad2d(1, 5.0), (2, 4, 4)),
    (nn.Dropout2d(0.5), (2, 4, 4)),
    (nn.ReflectionPad2d(1), (1, 4, 5)),
    (nn.ReflectionPad2d((2, 1, 0, 3)), (1, 5, 3)),
    (nn.ReplicationPad2d(2), (1, 4, 5)),
    (nn.ReplicationPad2d((0, 3, 1, 1)), (1, 1, 2)),
    (nn.CircularPad2d((2, 1, 0, 3)), (1, 4, 4)),
    (nn.CircularPad2d(3), (1, 3, 4)),
    (nn.BatchNorm2d(3), (3, 2, 2)),
    (nn.BatchNorm3d(3), (3, 2, 1, 2)),
    (nn.AvgPool1d(3, 2, 1), (2, 7)),
    (nn.AvgPool1d(3, 2, ceil_mode=True), (1, 6)),
    (nn.AvgPool3d((2, 3, 2), 2, 1), (1, 3, 4, 5)),
    (nn.AvgPool3d(2, 1, divisor_override=3), (1, 3, 3, 2)),
    (nn.AdaptiveAvgPool1d(3), (2, 7)),
    (nn.AdaptiveAvgPool3d((2, 1, None)), (1, 3, 3, 2)),
    (nn.ReflectionPad1d((2, 1)), (2, 4)),
    (nn.ReplicationPad3d((0, 1, 2, 0, 1, 1)), (1, 2, 3, 2)),
    (nn.CircularPad1d((1, 3)), (2, 4)),
    (nn.CircularPad3d(1), (1, 2, 2, 2)),
    (nn.ZeroPad1d(2), (2, 4)),
    (nn.ConstantPad3d(1, 2.0), (1, 2, 2, 2)),
    (nn.ConstantPad1d((1, -2), 0.5), (5,)),
    (nn.ChannelShuffle(2), (4, 3, 2)),
    (nn.Upsample(scale_factor=2), (2, 3, 2)),
    (nn.Upsample(size=(5, 3)), (1, 3, 2)),
    (nn.Upsample(scale_factor=3.0), (2, 4)),
    (nn.Unfold(2), (2, 4, 3)),
    (nn.Unfold((3, 2), dilation=(1, 2), padding=1, stride=(2, 1)), (1, 5, 4)),
]


@pytest.mark.parametrize(("module", "shape"), POOLS, ids=lambda value: str(value)[:70])
def test_pools_and_padding_are_met_exactly(module, shape):
    module = double(module)
    exact = matrix_norm(module, shape)
    assert exact <= bound_of(module, shape).value * ROUNDING <= exact * (1 + 1e-9)


@pytest.mark.parametrize(
    ("module", "shape", "constant"),
    [
        (nn.AvgPool2d(2), (1, 4, 4), 1 / 2),
        (nn.AvgPool2d(4, divisor_override=4), (1, 4, 4), 1.0),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 9), 1 / 6),
        (nn.MaxPool2d(2), (1, 8, 8), 1.0),
        (nn.MaxPool2d(3, 2), (1, 9, 9), 2.0),
        (nn.MaxPool2d(3, 1), (1, 9, 9), 3.0),
        (nn.MaxPool2d(3, 2, 1), (1, 8, 8), 2.0),
        (nn.MaxPool2d(3, 1), (1, 4, 9), math.sqrt(2 * 3)),
        (nn.MaxPool2d(3, 2), (1, 3, 3), 1.0),
        (nn.MaxPool2d(3, 2, ceil_mode=True), (1, 4, 9), 2.0),
        (nn.MaxPool2d(2, 1, dilation=2), (1, 6, 6), 2.0),
        (nn.MaxPool2d(2, 2, dilation=3), (1, 9, 9), 1.0),
        (nn.MaxPool2d((3, 1), (1, 1), (1, 0)), (1, 6, 6), math.sqrt(3)),
        (nn.ReflectionPad2d(1), (1, 3, 3), 3.0),
        (nn.ReplicationPad2d((2, 0, 0, 0)), (1, 3, 3), math.sqrt(3)),
        (nn.MaxPool1d(3, 2), (2, 7), math.sqrt(2)),
        (nn.MaxPool3d(3, 2, ceil_mode=True), (1, 6, 4, 5), math.sqrt(2 * 2 * 2)),
        (nn.AdaptiveMaxPool2d(2), (1, 4, 5), math.sqrt(2)),
        (nn.AdaptiveMaxPool1d(4), (1, 3), math.sqrt(2)),
        (nn.AdaptiveMaxPool3d(1), (1, 3, 3, 2), 1.0),
    ],
    ids=lambda value: str(value)[:60],
)
def test_known_constants(module, shape, constant):
    assert constant <= bound_of(module.eval(), shape).value <= constant * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_max_pools_of_every_geometry_are_met_exactly(seed):
    """The largest number of outputs that a single bright pixel reaches is the square of the constant."""
    rng = np.random.default_rng(seed)
    taps, step, stride = int(rng.integers(1, 5)), int(rng.integers(1, 3)), int(rng.integers(1, 4))
    pool = nn.MaxPool2d(taps, stride, int(rng.integers(0, taps // 2 + 1)), step, ceil_mode=bool(rng.integers(2))).eval()
    shape = (1, *(int(v) for v in rng.integers(step * (taps - 1) + 1, 12, 2)))
    pixels = torch.eye(math.prod(shape)).reshape(-1, *shape)
    reached = pool(pixels).flatten(1).sum(1).max().item()
    assert bound_of(pool, shape).value == pytest.approx(math.sqrt(reached), rel=1e-12)
    assert largest_slope(pool, shape, points=4) <= bound_of(pool, shape).value * ROUNDING


@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm1d(4), (4,)), (nn.BatchNorm1d(4), (4, 3)), (nn.BatchNorm2d(4), (4, 2, 2))], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation(layer, shape, affine):
    torch.manual_seed(0)
    layer = type(layer)(4, affine=affine)
    for _ in range(5):
        layer(3 * torch.randn(8, *shape) + 1)
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([1.0, -3.0, 0.5, 0.0]))
    layer.eval()
    weight = torch.ones(4) if layer.weight is None else layer.weight.detach()
    exact = (weight.double().abs() / (layer.running_var.double() + layer.eps).sqrt()).max().item()
    assert exact * (1 - 1e-15) <= bound_of(layer, shape).value <= exact * (1 + 1e-14)
    assert largest_slope(layer, shape, points=4) <= bound_of(layer, shape).value * ROUNDING
    layer.running_var.div_(4.0)
    assert bound_of(layer, shape).value == pytest.approx(2 * exact, rel=1e-4)


def test_a_whole_cnn_is_sound():
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), nn.Tanh(), nn.ReflectionPad2d(1), nn.Conv2d(6, 4, 2), nn.AvgPool2d(3, 1, 1),
            nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Dropout2d(), nn.PixelUnshuffle(2), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip
        for _ in range(3):
            net(torch.randn(8, 2, 8, 8))
        net.eval()
        bound = certify.lipschitz(net, input_shape=(2, 8, 8))
        slope = largest_slope(net, (2, 8, 8), points=8, seed=seed)
        assert slope <= bound.value
        assert len(bound.parts) == 15
        assert bound.pairs.shape == (3, 3)
    shallow = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten()).eval()
    slope = largest_slope(shallow, (2, 8, 8), points=1)
    assert slope <= certify.lipschitz(shallow, input_shape=(2, 8, 8)).value <= 1.1 * slope


@pytest.mark.parametrize(
    ("module", "shape", "match"),
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 6, 6), "mode='bilinear'.*use 'nearest'"),
        (nn.InstanceNorm2d(2, track_running_stats=True), (2, 4, 4), "running statistics"),
        (nn.LayerNorm(4, eps=0.0), (4,), "no Lipschitz constant near a constant input"),
        (nn.RMSNorm(4, elementwise_affine=False), (4,), "set eps"),
        (nn.Conv3d(1, 1, 3, padding=1, padding_mode="circular"), (1, 4, 4, 4), "three dimensions"),
        (nn.Softmax(0), (4,), "may mix the inputs"),
        (nn.LogSoftmax(), (4,), "may mix the inputs"),
        (nn.Conv2d(3, 3, 3, padding=1), (6, 6), r"takes one input of shape \('channels', 'height', 'width'\), got \(6, 6\)"),
        (nn.Conv1d(3, 3, 3, padding=1), (6,), "got"),
        (nn.AvgPool2d(2), (6, 6), "takes one input"),
        (nn.MaxPool2d(2), (6, 6), "takes one input"),
        (nn.ZeroPad2d((0, 0, 1, -1)), (6,), "takes one input"),
        (nn.BatchNorm2d(2, track_running_stats=False), (2, 4, 4), "no running statistics"),
        (nn.BatchNorm1d(2, track_running_stats=False), (2,), "no running statistics"),
        (nn.MaxPool2d(2, return_indices=True), (2, 4, 4), "return_indices"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_known_is_refused(module, shape, match):
    with pytest.raises(certify.Unsupported, match=match):
        rule_for(module)(module.eval(), shape)


def test_batch_normalisation_with_a_variance_that_is_not_positive_is_refused():
    layer = nn.BatchNorm1d(3, eps=0.0).eval()
    layer.running_var[1] = 0.0
    with pytest.raises(certify.Unsupported, match=r"running variance of .* which must be positive"):
        rule_for(layer)(layer, (3,))
    with pytest.raises(certify.Unsupported):
        certify.lipschitz(layer, input_shape=(3,))


def test_nan_kernels_and_subclasses_are_refused():
    layer = nn.Conv2d(2, 2, 3).eval()
    sneaky = type("Sneaky", (nn.Conv2d,), {"_conv_forward": lambda self, x, weight, bias: 2 * x})(2, 2, 3).eval()
    with pytest.raises(certify.Unsupported, match=r"overrides Conv2d\._conv_forward"):
        certify.lipschitz(sneaky, input_shape=(2, 5, 5))
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(certify.Unsupported, match="NaN or infinite"):
        certify.lipschitz(layer, input_shape=(2, 5, 5))
    with pytest.raises(certify.Unsupported, match=r"no rule is known|ConvTranspose3d"):
        certify.lipschitz(nn.ConvTranspose3d(1, 1, 3).eval(), input_shape=(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv3d(2, 2, 2, stride=(2, 1, 1)), (2, 4, 3, 3)), (nn.Conv3d(2, 4, (3, 1, 2), padding=1, groups=2), (2, 3, 3, 3))], ids=str
)
def test_convolutions_in_three_dimensions_are_bounded(layer, shape):
    layer = double(layer)
    exact = matrix_norm(layer, shape)
    assert exact <= bound_of(layer, shape).value <= 2 * exact
    with torch.no_grad():  # all taps in depth but one are 0: then it is the convolution in two dimensions
        layer.weight[:, :, 1:] = 0.0
    exact = matrix_norm(layer, shape)
    assert exact <= bound_of(layer, shape).value * ROUNDING <= 1.4 * exact


NORMALISATIONS = [
    (nn.LayerNorm(5, eps=1e-2), (5,)),
    (nn.LayerNorm((2, 3), eps=0.1, elementwise_affine=False), (4, 2, 3)),
    (nn.GroupNorm(2, 4, eps=0.3), (4, 2, 2)),
    (nn.InstanceNorm1d(3, eps=0.2, affine=True), (3, 4)),
    (nn.InstanceNorm2d(2, eps=1e-5), (2, 3, 3)),
    (nn.RMSNorm(6, eps=0.5), (6,)),
]


@pytest.mark.parametrize(("layer", "shape"), NORMALISATIONS, ids=str)
def test_normalisations_of_each_input_are_steepest_where_its_entries_are_equal(layer, shape):
    layer = double(layer)
    bound = bound_of(layer, shape).value
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    attained = torch.autograd.functional.jacobian(layer, zero).reshape(zero.numel(), -1)
    slopes = [torch.linalg.matrix_norm(attained, 2).item(), largest_slope(layer, shape)]
    assert 0.7 * bound <= max(slopes) <= bound * ROUNDING  # a projection that takes off the mean comes before the weights
    if isinstance(layer, nn.RMSNorm) or layer.weight is None:
        assert bound <= slopes[0] * ROUNDING


def test_softmax_is_half_and_log_softmax_the_root_of_its_entries():
    for module, shape, point in (
        (nn.Softmax(1), (4,), [0.0, 0.0, -60, -60]),
        (nn.Softmin(-1), (2, 3), [[0, 0, 60.0]] * 2),
        (nn.Softmax2d(), (2, 1, 1), [[[0.0]]] * 2),
    ):
        at = torch.tensor(point, dtype=torch.float64)[None]
        attained = torch.linalg.matrix_norm(torch.autograd.functional.jacobian(module, at).reshape(at.numel(), -1), 2).item()
        assert bound_of(module.eval(), shape).value == 0.5 == pytest.approx(attained, rel=1e-12)
        assert largest_slope(module, shape) <= 0.5 * ROUNDING
    module, at = nn.LogSoftmax(1).eval(), torch.tensor([[80.0, 0, 0, 0, 0]], dtype=torch.float64)
    attained = torch.linalg.matrix_norm(torch.autograd.functional.jacobian(module, at).reshape(5, 5), 2).item()
    assert attained <= bound_of(module, (5,)).value * ROUNDING <= attained * (1 + 1e-9)
