"""A few named networks, built from the layers: each is an `nn.Sequential` that ends in a `UnitRowLinear` head.

The sizes ("small", "medium", "large") are ours, for images of 28 to 32 pixels; the structure is that of the papers. Images are (channels, height, width)
in [0, 1], moved by `mean` and never scaled, so that radii stay in their units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from lipnet.contractions import AOL, BCOP, Contraction
from lipnet.layers import (
    BROConv2d,
    BROLinear,
    ContractionConv2d,
    ContractionLinear,
    LDLTBlock,
    LiResConv2d,
    MaxMin,
    Normalize,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    UnitRowLinear,
)

Size = str | tuple[int, int, int, int]  # a name, or channels, blocks, width and dense layers
_SIZES = {"small": (32, 2, 256, 1), "medium": (64, 4, 512, 2), "large": (128, 6, 1024, 4)}  # channels, blocks, width, dense layers


def lbdn(input_shape: Sequence[int], classes: int, size: Size = "small", mean: float = 0.5, orthonormalizer: Contraction | None = None) -> nn.Sequential:
    """Sandwich layers throughout (Wang & Manchester 2023): convolutions with stride 2 for images, then dense ones."""
    channels, _, width, dense = _size(size)
    kernel = BCOP() if orthonormalizer is None else orthonormalizer
    layers: list[nn.Module] = [Normalize([mean], [1.0])]
    features = _entries(input_shape)
    if len(input_shape) == 3:
        _check_image(input_shape)
        steps = ((input_shape[0], channels, 1), (channels, channels, 2), (channels, 2 * channels, 2))
        layers += [SandwichConv2d(into, out, stride=stride, orthonormalizer=kernel) for into, out, stride in steps]
        layers.append(nn.Flatten())
        features = 2 * channels * _pixels(input_shape, 4)
    layers += [SandwichLinear(features if i == 0 else width, width) for i in range(dense + 1)]
    return nn.Sequential(*layers, UnitRowLinear(width, classes))


def bronet(input_shape: Sequence[int], classes: int, size: Size = "small", mean: float = 0.5) -> nn.Sequential:
    """BRONet (Lai et al. 2025) with explicit kernels: an orthogonal stem of stride 2, BRO convolutions with MaxMin, 4 x 4 patches, BRO dense layers."""
    return _convolutional(input_shape, classes, size, mean, lambda channels, _: [BROConv2d(channels, channels), MaxMin()])


def liresnet(input_shape: Sequence[int], classes: int, size: Size = "small", mean: float = 0.5) -> nn.Sequential:
    """LiResNet (Hu et al. 2023): linear residual convolutions with MaxMin. Not 1-Lipschitz: train with the product of its `constant()`s in the loss."""
    return _convolutional(input_shape, classes, size, mean, lambda channels, depth: [LiResConv2d(channels, depth=depth), MaxMin()])


def sll(input_shape: Sequence[int], classes: int, size: Size = "small", mean: float = 0.5) -> nn.Sequential:
    """SDP-based Lipschitz layers (Araujo et al. 2023): SLL convolutions on patches, then dense ones."""
    channels, depth, width, dense = _size(size)
    _check_image(input_shape)
    return nn.Sequential(
        Normalize([mean], [1.0]),
        ContractionConv2d(input_shape[0], channels, kernel_size=1, stride=2, contraction=AOL()),
        *(SLLConv2d(channels, 2 * channels) for _ in range(depth)),
        ContractionConv2d(channels, 2 * channels, kernel_size=1, stride=2),
        nn.Flatten(),
        ContractionLinear(2 * channels * _pixels(input_shape, 4), width),
        *(SLLLinear(width) for _ in range(dense)),
        UnitRowLinear(width, classes),
    )


def ldlt_mlp(input_shape: Sequence[int], classes: int, size: Size = "small", mean: float = 0.5) -> nn.Sequential:
    """Dense residual blocks by LDL^T, for vectors and small images."""
    _, depth, width, dense = _size(size)
    entries = _entries(input_shape)
    blocks = [LDLTBlock(entries if i == 0 else width, width, hidden=(width,) * dense) for i in range(depth)]
    return nn.Sequential(Normalize([mean], [1.0]), nn.Flatten(), *blocks, UnitRowLinear(width, classes))


def _convolutional(input_shape: Sequence[int], classes: int, size: Size, mean: float, block: Callable[[int, int], list[nn.Module]]) -> nn.Sequential:
    """Stem, blocks, patches and dense layers around one kind of block."""
    channels, depth, width, dense = _size(size)
    _check_image(input_shape)
    layers: list[nn.Module] = [Normalize([mean], [1.0]), ContractionConv2d(input_shape[0], channels, stride=2), MaxMin()]
    for _ in range(depth):
        layers += block(channels, depth)
    layers += [ContractionConv2d(channels, 2 * channels, kernel_size=1, stride=2), MaxMin(), nn.Flatten()]
    features = 2 * channels * _pixels(input_shape, 4)
    layers += [ContractionLinear(features, width), MaxMin()]
    for _ in range(dense - 1):
        layers += [BROLinear(width, width), MaxMin()]
    return nn.Sequential(*layers, UnitRowLinear(width, classes))


def _size(given: Size) -> tuple[int, int, int, int]:
    if isinstance(given, tuple):
        return given
    if given not in _SIZES:
        raise ValueError(f"size must be one of {', '.join(_SIZES)}, got {given!r}")
    return _SIZES[given]


def _entries(input_shape: Sequence[int]) -> int:
    return math.prod(input_shape)


def _pixels(input_shape: Sequence[int], stride: int) -> int:
    """Pixels that are left after a stride."""
    return (input_shape[1] // stride) * (input_shape[2] // stride)


def _check_image(input_shape: Sequence[int]) -> None:
    if len(input_shape) != 3 or input_shape[1] % 4 or input_shape[2] % 4:
        raise ValueError(f"this network takes images (channels, height, width) with height and width divisible by 4, got {tuple(input_shape)}")
