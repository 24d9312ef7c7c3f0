"""Rules for torch's convolutions, pools, padding and batch normalisation, at the size of the input that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from certify.bound import Array, Assumption, Bound
from certify.convolution import convolution_bound, root_up, two
from certify.errors import Problem, Unsupported
from certify.registry import Shape, register
from certify.rounding import multiply_up, up
from certify.spectral import as_float64, largest_singular_value

_PROVED = frozenset({Assumption.FLOAT64_LINALG})


def _refuse(module: nn.Module, why: str) -> NoReturn:
    raise Unsupported([Problem("", type(module).__name__, why)])


def _sizes(module: nn.Module, shape: Shape, dimensions: int = 2) -> tuple[int, ...]:
    """Height and width, or the length. An input without channels is refused: torch would take the batch for them."""
    if len(shape) != dimensions + 1:
        _refuse(module, f"takes one input of shape {('channels', 'height', 'width')[: dimensions + 1]}, got {tuple(shape)}")
    return shape[1:]


# Convolutions


def padding_of(layer: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """Before and after, for each axis; 'same' with an odd total puts the larger half after."""
    if layer.padding_mode != "zeros":  # what F.pad is given: the last axis first
        pads = layer._reversed_padding_repeated_twice
        return tuple(pads[i + j] for i in range(len(pads) - 2, -1, -2) for j in (0, 1))
    if layer.padding == "valid":
        return (0, 0) * len(layer.dilation)
    if layer.padding == "same":
        totals = [step * (taps - 1) for step, taps in zip(layer.dilation, layer.weight.shape[2:], strict=True)]
        return tuple(half for total in totals for half in (total // 2, total - total // 2))
    return tuple(int(half) for half in layer.padding for _ in (0, 1))


def _convolution(layer: nn.Conv1d | nn.Conv2d, shape: Shape) -> Bound:
    dimensions = len(layer.dilation)
    size = _sizes(layer, shape, dimensions)
    if layer.padding_mode not in ("zeros", "circular"):
        _refuse(
            layer,
            f"padding_mode={layer.padding_mode!r} shows pixels of the border more than once, so the norm of the kernel is no bound (a shift has norm 2); "
            "use 'zeros' or 'circular', or a padding layer before a convolution without padding, whose constants multiply",
        )
    kernel, stride, padding, dilation = as_float64(layer.weight), layer.stride, padding_of(layer), layer.dilation
    if dimensions == 1:
        kernel, size, stride, padding, dilation = kernel[:, :, None], (1, *size), (1, *stride), (0, 0, *padding), (1, *dilation)
    value, how = convolution_bound(kernel, (size[0], size[1]), stride=stride, padding=padding, dilation=dilation, groups=layer.groups, mode=layer.padding_mode)
    taps = "x".join(str(count) for count in layer.weight.shape[2:])
    return Bound(value, f"conv{dimensions}d {taps}, {layer.padding_mode}: {how}", assumptions=_PROVED)


@register(nn.Conv2d)
def _(layer: nn.Conv2d, shape: Shape) -> Bound:
    return _convolution(layer, shape)


@register(nn.Conv1d)
def _(layer: nn.Conv1d, shape: Shape) -> Bound:
    """A convolution of images of height 1."""
    return _convolution(layer, shape)


@register(nn.ConvTranspose2d)
def _(layer: nn.ConvTranspose2d, shape: Shape) -> Bound:
    """The norm of the convolution that it transposes: from images of the size of its output, with the same kernel, stride and padding.

    With an output padding of at least the stride that convolution has more outputs than this layer has inputs; the layer transposes a part of it.
    """
    size = _sizes(layer, shape)
    geometry = zip(size, layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation, layer.output_padding, strict=True)
    down, across = ((n - 1) * stride - 2 * int(padding) + step * (taps - 1) + extra + 1 for n, taps, stride, padding, step, extra in geometry)
    padding = int(layer.padding[0]), int(layer.padding[1])
    value, how = convolution_bound(as_float64(layer.weight), (down, across), stride=layer.stride, padding=padding, dilation=layer.dilation, groups=layer.groups)
    taps = "x".join(str(count) for count in layer.weight.shape[2:])
    return Bound(value, f"transposed conv2d {taps}: {how} of the convolution from {down}x{across}", assumptions=_PROVED)


# Normalisation and dropout


@register(nn.BatchNorm1d, nn.BatchNorm2d)
def _(layer: nn.BatchNorm1d | nn.BatchNorm2d, shape: Shape) -> Bound:
    """`max |weight| / sqrt(var + eps)` with the running variance that is stored."""
    if layer.running_mean is None or layer.running_var is None:
        _refuse(layer, "has no running statistics, so each output depends on the whole batch in eval mode too; use track_running_stats=True")
    variance = np.nextafter(as_float64(layer.running_var) + layer.eps, -np.inf)
    if not (variance > 0).all():
        _refuse(layer, f"has a running variance of {variance.min():g} with eps added, which must be positive; train it first, or set eps > 0")
    weight = np.ones(1) if layer.weight is None else np.abs(as_float64(layer.weight))
    scale = np.nextafter(weight / np.nextafter(np.sqrt(variance), 0), np.inf) * (weight > 0)
    return Bound(float(scale.max()), "batch norm: largest |weight| / sqrt(running variance + eps)")


@register(nn.Dropout2d)
def _(module: nn.Dropout2d, shape: Shape) -> Bound:
    return Bound(1.0, "dropout: the identity in eval mode")


# Pools


def _average(pieces: Sequence[Array], divisor: int = 1) -> float:
    """The norm of a pool that averages along one axis and then along the other: a Kronecker product."""
    value = 1.0
    for piece in pieces:
        value = multiply_up(value, largest_singular_value(piece, relative_error=2.0**-51))  # each entry is one over a count
    return value if divisor == 1 else up(value / divisor)


def _impulses(size: int) -> torch.Tensor:
    """One image of a column for each of its pixels."""
    return torch.eye(size, dtype=torch.float64)[:, None, :, None]


@register(nn.AvgPool2d)
def _(module: nn.AvgPool2d, shape: Shape) -> Bound:
    """The exact norm: the divisor is a product of one for the rows and one for the columns, so the pool is a product of pools of columns.

    These are torch's own, seen through their answers to single pixels; so padding, ceil_mode and count_include_pad are as torch has them.
    """
    divisor = module.divisor_override
    pieces = []
    for n, taps, stride, padding in zip(_sizes(module, shape), two(module.kernel_size), two(module.stride), two(module.padding), strict=True):
        seen = functional.avg_pool2d(
            _impulses(n), (taps, 1), (stride, 1), (padding, 0), module.ceil_mode, module.count_include_pad, None if divisor is None else 1
        )
        pieces.append(as_float64(seen[:, 0, :, 0]))
    return Bound(_average(pieces, 1 if divisor is None else abs(divisor)), "average pool: norms of its rows and its columns", assumptions=_PROVED)


@register(nn.AdaptiveAvgPool2d)
def _(module: nn.AdaptiveAvgPool2d, shape: Shape) -> Bound:
    """The exact norm, as for AvgPool2d; `1 / sqrt(height width)` for one output."""
    asked = module.output_size if isinstance(module.output_size, tuple | list) else (module.output_size, module.output_size)
    pieces = [
        as_float64(functional.adaptive_avg_pool2d(_impulses(n), (n if wanted is None else wanted, 1))[:, 0, :, 0])
        for n, wanted in zip(_sizes(module, shape), asked, strict=True)
    ]
    return Bound(_average(pieces), "adaptive average pool: norms of its rows and its columns", assumptions=_PROVED)


@register(nn.MaxPool2d)
def _(module: nn.MaxPool2d, shape: Shape) -> Bound:
    """The square root of the largest number of windows that a pixel is in.

    `|max x - max y|` over a window is at most the difference at some pixel of it, so each squared difference is counted at most that often; a pixel that is
    larger than all others attains it.
    """
    if module.return_indices:
        _refuse(module, "return_indices=True makes it return positions too, which are not Lipschitz; use return_indices=False")
    overlap = 1
    sizes = _sizes(module, shape)
    for n, taps, stride, padding, step in zip(sizes, two(module.kernel_size), two(module.stride), two(module.padding), two(module.dilation), strict=True):
        outputs = functional.max_pool1d(torch.zeros(1, 1, n), taps, stride, padding, step, module.ceil_mode).shape[-1]
        positions = (stride * np.arange(outputs)[:, None] + step * np.arange(taps) - padding).ravel()
        overlap *= int(np.bincount(positions[(positions >= 0) & (positions < n)], minlength=n).max())
    return Bound(root_up(overlap), f"max pool: a pixel is in up to {overlap} windows")


# Padding and rearrangements


@register(nn.ZeroPad2d, nn.ConstantPad2d)
def _(module: nn.ConstantPad2d, shape: Shape) -> Bound:
    _sizes(module, shape)
    return Bound(1.0, "a constant border")


@register(nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
def _(module: nn.ReflectionPad2d | nn.ReplicationPad2d | nn.CircularPad2d, shape: Shape) -> Bound:
    """The square root of the largest number of times that a pixel is shown."""
    mode = "reflect" if isinstance(module, nn.ReflectionPad2d) else "replicate" if isinstance(module, nn.ReplicationPad2d) else "circular"
    height, width = _sizes(module, shape)
    left, right, top, bottom = module.padding
    shown = 1
    for n, before, after in ((height, top, bottom), (width, left, right)):
        sources = functional.pad(torch.arange(n, dtype=torch.float64)[None, None], (before, after), mode=mode).long().ravel()
        shown *= int(torch.bincount(sources).max())
    return Bound(root_up(shown), f"{mode} border: a pixel is shown up to {shown} times")


@register(nn.PixelShuffle, nn.PixelUnshuffle)
def _(module: nn.PixelShuffle | nn.PixelUnshuffle, shape: Shape) -> Bound:
    return Bound(1.0, "pixel shuffle: a rearrangement")
