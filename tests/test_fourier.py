"""Layers with a matrix for each frequency, and the powers of AOL that are taken there: against full operator matrices and direct sums."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify.convolution import any_size_norm, convolution_norm, spectrum_norm
from lipnet import functional

SIZES = [(5, 5), (6, 6), (4, 7), (7, 4), (3, 3), (8, 5)]


def operator(layer, shape):
    """The Jacobian at a random point, in float64."""
    x = torch.randn(1, *shape, dtype=torch.float64)
    return torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())


def norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2).item()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_reflectors_are_orthogonal_on_the_torus_and_contractions_with_zeros(size, padding_mode, kernel_size):
    torch.manual_seed(0)
    layer = lipnet.FourierBROConv2d(3, 3, size, kernel_size, rank=2, padding_mode=padding_mode).double()
    with torch.no_grad():
        layer.free.normal_()
    values = torch.linalg.svdvals(operator(layer, (3, *size)))
    bound = certify.lipschitz(layer.eval(), input_shape=(3, *size)).value
    assert values.max() <= bound <= 1 + 1e-6
    if padding_mode == "circular" or kernel_size == 1:
        assert values.min() >= 1 - 1e-6  # CholeskyQR2 leaves a ridge of 1e-7
    else:
        assert values.min() < 0.99  # what crosses the border is lost


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("orthonormalizer", [lipnet.Cayley(), lipnet.Cholesky(), lipnet.AOL(), lipnet.AOL(1)], ids=str)
def test_sandwiches_stay_below_their_bound(size, padding_mode, orthonormalizer):
    torch.manual_seed(0)
    layer = lipnet.FourierSandwichConv2d(2, 4, size, orthonormalizer=orthonormalizer, padding_mode=padding_mode).double().eval()
    with torch.no_grad():
        layer.log_psi.normal_()
        layer.free.mul_(3)
    bound = certify.lipschitz(layer, input_shape=(2, *size)).value
    assert bound <= 1 + 1e-9
    assert max(norm(operator(layer, (2, *size))) for _ in range(3)) <= bound
    if isinstance(orthonormalizer, lipnet.Cayley):
        assert bound >= 1 - 1e-9


def test_with_the_identity_as_activation_a_sandwich_is_the_product_of_its_factors():
    torch.manual_seed(0)
    layer = lipnet.FourierSandwichConv2d(2, 3, (4, 5), activation=nn.Identity(), padding_mode="circular", bias=False).double()
    a, b = functional.cayley(functional.spectrum(layer.free, (4, 5))).split([3, 2], dim=2)
    product = torch.linalg.svdvals(2 * a.mH @ b).detach()
    assert norm(operator(layer, (2, 4, 5))) == pytest.approx(product.max().item(), rel=1e-12)


def test_the_reflector_is_that_of_a_direct_sum_over_the_pixels():
    """The layer on the torus, with `V (V^T V)^-1 V^T` of the circulant matrix V written out."""
    torch.manual_seed(0)
    layer = lipnet.FourierBROConv2d(2, 2, (4, 3), rank=1, padding_mode="circular", bias=False).double()
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(layer.free)
    v = operator(conv, (1, 4, 3))
    expected = torch.eye(24, dtype=torch.float64) - 2 * v @ torch.linalg.pinv(v)
    torch.testing.assert_close(operator(layer, (2, 4, 3)), expected, atol=1e-5, rtol=0)


def test_ill_conditioned_frequencies_keep_their_bound_in_float32():
    torch.manual_seed(0)
    layer = lipnet.FourierBROConv2d(16, 16, 6, rank=8, padding_mode="circular").eval()
    u, _, v = torch.linalg.svd(torch.randn(16, 8), full_matrices=False)
    with torch.no_grad():
        layer.free.zero_()
        layer.free[:, :, 1, 1] = (u * torch.logspace(0, -4, 8)) @ v
    spectrum = functional.spectrum(layer.free.detach(), (6, 6))
    plain = torch.eye(16) - 2 * spectrum @ torch.linalg.solve(spectrum.mH @ spectrum, spectrum.mH)
    assert torch.linalg.matrix_norm(plain.to(torch.complex128), 2).max() > 1.003  # the published form
    assert certify.lipschitz(layer, input_shape=(16, 6, 6)).value <= 1 + 3e-6


def test_another_size_of_image_is_refused():
    layer = lipnet.FourierBROConv2d(2, 2, (6, 8)).eval()
    with pytest.raises(ValueError, match="made for images of 6 x 8, got 8 x 8"):
        layer(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="made for images of 6 x 8"):
        certify.lipschitz(layer, input_shape=(2, 8, 8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 5, "stride": 2}, "divisible by the stride"),
        ({"image_size": 4, "kernel_size": 5}, "hold 5 taps"),
        ({"image_size": 8, "padding_mode": "reflect"}, "more than once"),
        ({"image_size": 8, "kernel_size": 2}, "odd"),
        ({"image_size": 0}, "height"),
    ],
)
@pytest.mark.parametrize("layer", [lipnet.FourierBROConv2d, lipnet.FourierSandwichConv2d])
def test_geometries_without_a_theorem_are_refused(layer, options, match):
    with pytest.raises(ValueError, match=match):
        layer(2, 2, **options)


def test_real_kernels_have_no_place_at_a_frequency():
    with pytest.raises(ValueError, match="SandwichConv2d"):
        lipnet.FourierSandwichConv2d(2, 2, 6, orthonormalizer=lipnet.BCOP())


def test_half_precision_asked_for_by_autocast_does_not_reach_the_weights():
    torch.manual_seed(0)
    layer = lipnet.FourierBROConv2d(4, 4, 6)
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), layer(x.float()))


@pytest.mark.parametrize("scale", [1e-300, 1e-5, 1.0, 1e150])
def test_norms_of_spectra_are_met_from_above(scale):
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (3, 5), (5, 3), (8, 8)):
        stack = scale * (rng.standard_normal((7, rows, columns)) + 1j * rng.standard_normal((7, rows, columns)))
        exact = np.linalg.norm(stack / scale, 2, axis=(1, 2)).max()
        found = spectrum_norm(stack) / scale
        assert exact * (1 - 1e-13) <= found <= exact * (1 + 1e-9)
    assert spectrum_norm(np.zeros((3, 2, 2), complex)) == 0
    with pytest.raises(certify.CertifyError, match="NaN"):
        spectrum_norm(np.full((1, 1, 1), np.nan, complex))


@pytest.mark.parametrize("grid", [(5, 5), (6, 8), (7, 4)], ids=str)
def test_the_spectrum_is_the_transform_of_the_centred_kernel(grid):
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    placed = torch.zeros(3, 2, *grid, dtype=torch.float64)
    placed[:, :, :3, :3] = kernel
    expected = torch.fft.rfft2(torch.roll(placed, (-1, -1), (2, 3))).conj()  # torch convolves by correlation
    torch.testing.assert_close(functional.spectrum(kernel, grid), expected.flatten(2).permute(2, 0, 1))


@pytest.mark.parametrize("squarings", range(4))
@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (6, 4, 3, 3), (3, 3, 1, 1), (2, 5, 3, 1), (3, 2, 5, 5)], ids=str)
def test_powers_of_aol_are_contractions_at_every_size(squarings, shape):
    torch.manual_seed(0)
    for scale in (1e-6, 1.0, 1e6):
        kernel = functional.aol_kernel(scale * torch.randn(shape, dtype=torch.float64), squarings).numpy()
        assert any_size_norm(kernel) <= 1.01  # its own slack is 0.5 %
        for mode in ("zeros", "circular"):
            assert convolution_norm(kernel, (6, 7), padding=(shape[2] // 2, shape[3] // 2), mode=mode) <= 1 + 1e-9


def test_each_squaring_brings_aol_closer_to_one():
    torch.manual_seed(0)
    free = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    norms = [any_size_norm(functional.aol_kernel(free, squarings).numpy()) for squarings in range(4)]
    assert norms == sorted(norms)
    assert norms[0] < 0.6
    assert norms[3] > 0.9
    matrices = [norm(functional.aol_contraction(free[:, :, 1, 1], squarings)) for squarings in range(5)]
    assert matrices == sorted(matrices)
    assert 0.95 < matrices[-1] <= 1 + 1e-12


def test_the_power_is_that_of_the_operator_written_out():
    """`t_i^2` against the absolute row sums of `(W W^T)^2`, W a convolution of an image so large that a row in the middle sees no border."""
    torch.manual_seed(0)
    kernel = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    conv = nn.Conv2d(3, 2, 3, padding=1, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(kernel)
    matrix = operator(conv, (3, 13, 13))
    gram = matrix @ matrix.mT
    sums = (gram @ gram).abs().sum(1).reshape(2, 13, 13)[:, 6, 6]
    found = functional.aol_kernel(kernel, 1)
    ratio = (kernel / found)[:, 0, 0, 0]  # sqrt(t_i)
    torch.testing.assert_close(ratio**4, sums)


def test_a_one_by_one_kernel_has_the_powers_of_its_matrix():
    torch.manual_seed(0)
    free = torch.randn(5, 4, dtype=torch.float64)
    for squarings in range(3):
        expected = functional.aol_contraction(free, squarings)
        torch.testing.assert_close(functional.aol_kernel(free[:, :, None, None], squarings)[:, :, 0, 0], expected)


def test_high_powers_do_not_overflow_in_float32():
    torch.manual_seed(0)
    free = torch.randn(256, 256)
    assert 0.98 < norm(functional.aol_contraction(free, 6).double()) <= 1 + 1e-6
    assert 0.98 < any_size_norm(functional.aol_kernel(free[:32, :32, None, None].repeat(1, 1, 3, 3) + torch.randn(32, 32, 3, 3), 4).double().numpy()) <= 1.01


@pytest.mark.parametrize("squarings", [-1, 7, 1.5, "2"])
def test_aol_takes_few_squarings(squarings):
    with pytest.raises(ValueError, match="from 0 to 6"):
        lipnet.AOL(squarings)


def test_patches_of_an_ldlt_block_are_separate():
    """The constant of the whole image is that of one pixel: the Jacobian is block diagonal."""
    torch.manual_seed(0)
    layer = lipnet.LDLTConv2d(2, 3, (5,), lipschitz=2.0).double().eval()
    image = operator(layer, (2, 3, 3)).reshape(3, 9, 2, 9)
    for i in range(9):
        for j in range(9):
            assert i == j or not image[:, i, :, j].any()
    bound = certify.lipschitz(layer, input_shape=(2, 3, 3)).value
    assert norm(image.reshape(27, 18)) <= bound <= 2 * (1 + 1e-6)
    assert math.isclose(bound, certify.lipschitz(layer, input_shape=(2, 8, 8)).value)
