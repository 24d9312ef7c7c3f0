"""Layers on images against their full operator matrices: every family, padding, stride, kernel, parity of the size, and dtype."""

import itertools

import pytest
import torch
from torch import nn

import certify
import lipnet

LINEAR = {
    "bro": lambda **o: lipnet.BROConv2d(2, 4, **o),
    "bro-narrowing": lambda **o: lipnet.BROConv2d(6, 2, rank=2, **o),
    "bcop": lambda **o: lipnet.ContractionConv2d(3, 4, **o),
    "aol": lambda **o: lipnet.ContractionConv2d(3, 4, contraction=lipnet.AOL(), **o),
    "aol-2": lambda **o: lipnet.ContractionConv2d(2, 3, contraction=lipnet.AOL(2), **o),
    "liresnet": lambda stride, **o: lipnet.LiResConv2d(3, **o),
}
OTHER = {
    "sandwich-aol": lambda **o: lipnet.SandwichConv2d(2, 3, **o),
    "sandwich-bcop": lambda **o: lipnet.SandwichConv2d(2, 4, orthonormalizer=lipnet.BCOP(), **o),
    "sll": lambda stride, **o: lipnet.SLLConv2d(2, 3, **o),
    "cpl": lambda stride, **o: lipnet.CPLConv2d(2, 3, **o),
}
GEOMETRIES = [
    (kernel, stride, mode, size)
    for kernel, stride, mode, size in itertools.product((1, 3, 5), (1, 2, 3), ("zeros", "circular"), ((6, 6), (5, 7), (4, 5), (9, 6)))
    if size[0] % stride == 0 and size[1] % stride == 0 and (mode == "zeros" or min(size) // stride >= kernel // 2)
]
WITHOUT_STRIDE = ("liresnet", "sll", "cpl")


def cases(families):
    """Every family in every geometry that it has."""
    return [pytest.param(name, g, id=f"{name}-{g}") for name in families for g in GEOMETRIES if g[1] == 1 or name not in WITHOUT_STRIDE]


def made(families, name, geometry, seed=0):
    """A layer away from its start, and the shape of its input."""
    kernel, stride, mode, size = geometry
    torch.manual_seed(seed)
    layer = families[name](kernel_size=kernel, stride=stride, padding_mode=mode).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer, (layer.in_channels if hasattr(layer, "in_channels") else layer.channels, *size)


def jacobian(layer, shape, x=None):
    x = torch.randn(1, *shape, dtype=torch.float64) if x is None else x
    return torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "geometry"), cases(LINEAR))
def test_no_operator_matrix_exceeds_the_bound(name, geometry, dtype):
    layer, shape = made(LINEAR, name, geometry)
    layer = layer.to(dtype)
    bound = certify.lipschitz(layer, input_shape=shape).value
    matrix = jacobian(lipnet.freeze(layer).double(), shape)
    exact = torch.linalg.matrix_norm(matrix, 2).item()
    assert exact <= bound * (1 + 1e-13)
    if geometry[2] == "circular" or geometry[0] == 1:
        assert bound <= exact * (1 + 1e-9)
    if name != "liresnet":
        assert bound <= 1 + (1e-5 if dtype == torch.float32 else 1e-10)
    orthonormal = name.startswith("b") and (geometry[2] == "circular" or geometry[0] == 1)
    if orthonormal:
        assert torch.linalg.svdvals(matrix).min() >= 1 - 1e-5


@pytest.mark.parametrize(("name", "geometry"), cases(OTHER))
def test_no_slope_of_a_nonlinear_layer_exceeds_the_bound(name, geometry):
    layer, shape = made(OTHER, name, geometry)
    bound = certify.lipschitz(layer, input_shape=shape).value
    assert bound <= 1 + 1e-5
    plain = lipnet.freeze(layer).double()
    for scale in (0.1, 1.0, 10.0):
        slope = torch.linalg.matrix_norm(jacobian(plain, shape, scale * torch.randn(1, *shape, dtype=torch.float64)), 2).item()
        assert slope <= bound * (1 + 1e-13)


@pytest.mark.parametrize("name", [*LINEAR, *OTHER])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "same", 0])
def test_other_paddings_are_refused_with_the_reason(name, mode):
    with pytest.raises(ValueError, match="more than once"):
        {**LINEAR, **OTHER}[name](kernel_size=3, stride=1, padding_mode=mode)


def test_a_kernel_swapped_for_another_raises_the_bound():
    """The rule reads the weights that run: a shift by one pixel doubled in one channel shows, whatever the construction promises."""
    layer = lipnet.BROConv2d(4, 4).eval()
    weight = type(layer).weight
    try:
        type(layer).weight = lambda self: weight(self) * torch.tensor([1.0, 1.0, 1.7, 1.0])[:, None, None, None]
        value = certify.lipschitz(layer, input_shape=(4, 5, 5)).value
        exact = torch.linalg.matrix_norm(jacobian(lipnet.freeze(layer).double(), (4, 5, 5)), 2).item()
    finally:
        type(layer).weight = weight
    assert 1.5 < exact <= value


@pytest.mark.parametrize(("kernel", "stride", "padding", "constant"), [(2, 2, 0, 1), (3, 2, 1, 2), (3, 1, 1, 3), (3, 3, 0, 1), (5, 2, 2, 3)])
def test_overlapping_max_pools_have_the_root_of_the_overlap(kernel, stride, padding, constant):
    pool = nn.MaxPool2d(kernel, stride, padding).eval()
    assert certify.lipschitz(pool, input_shape=(1, 9, 9)).value == constant
    rises = pool(torch.eye(81).reshape(81, 1, 9, 9)).flatten(1).norm(dim=1)  # one pixel at a time, seen by every window over it
    assert rises.max() == constant


def test_sizes_that_do_not_fit_a_stride_are_refused():
    layer = lipnet.ContractionConv2d(2, 4, stride=2).eval()
    with pytest.raises(ValueError, match="does not take inputs of shape"):
        certify.lipschitz(layer, input_shape=(2, 5, 6))


@pytest.mark.parametrize("name", ["bro", "bcop", "aol", "sandwich-bcop", "sll"])
def test_a_bound_for_one_size_is_not_served_for_another(name):
    """A zero-padded convolution has a larger norm on a larger image: both are proved, each for its size."""
    layer, shape = made({**LINEAR, **OTHER}, name, (3, 1, "zeros", (4, 4)))
    small = certify.lipschitz(layer, input_shape=shape)
    large = certify.lipschitz(layer, input_shape=(shape[0], 24, 24))
    plain = lipnet.freeze(layer).double()
    slope = torch.linalg.matrix_norm(jacobian(plain, (shape[0], 10, 10)), 2).item()
    assert slope <= large.value * (1 + 1e-12)
    assert torch.linalg.matrix_norm(jacobian(plain, shape), 2).item() <= small.value * (1 + 1e-12)
