"""Rules for torch's convolutions, pools, padding and normalisation, at the size of the input that they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from certify.bound import Array, Assumption, Bound
from certify.convolution import convolution_bound, root_up
from certify.errors import Problem, Unsupported
from certify.functions import BatchNorm
from certify.registry import Shape, register
from certify.rounding import add_up, multiply_up, up
from certify.spectral import as_float64, largest_singular_value

_PROVED = frozenset({Assumption.FLOAT64_LINALG})


def _refuse(module: nn.Module, why: str) -> NoReturn:
    raise Unsupported([Problem("", type(module).__name__, why)])


def _sizes(module: nn.Module, shape: Shape, dimensions: int = 2) -> tuple[int, ...]:
    """Height and width, or the length. An input without channels is refused: torch would take the batch for them."""
    if len(shape) != dimensions + 1:
        axes = ("channels", *("depth", "height", "width")[-dimensions:]) if dimensions > 1 else ("channels", "length")
        _refuse(module, f"takes one input of shape {axes}, got {tuple(shape)}")
    return shape[1:]


# Convolutions


def padding_of(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
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


def sources(size: int, before: int, after: int, mode: str) -> torch.Tensor:
    """Which pixel is shown at each place of an axis with a border of this kind."""
    return functional.pad(torch.arange(size, dtype=torch.float64)[None, None], (before, after), mode=mode).long().ravel()


def _shown(size: int, before: int, after: int, mode: str) -> int:
    """How often such a border shows one pixel, at most."""
    return int(torch.bincount(sources(size, before, after, mode)).max())


def _convolution(layer: nn.Conv1d | nn.Conv2d, shape: Shape) -> Bound:
    """The norm of the kernel at this size; a reflected or replicated border is a map of its own before it, and their norms multiply."""
    dimensions = len(layer.dilation)
    size = _sizes(layer, shape, dimensions)
    kernel, stride, padding, dilation, mode = as_float64(layer.weight), layer.stride, padding_of(layer), layer.dilation, layer.padding_mode
    shown = 1
    if mode not in ("zeros", "circular"):
        sides = list(zip(padding[::2], padding[1::2], strict=True))
        shown = math.prod(_shown(n, before, after, mode) for n, (before, after) in zip(size, sides, strict=True))
        size, padding = tuple(n + before + after for n, (before, after) in zip(size, sides, strict=True)), (0,) * len(padding)
    if dimensions == 1:
        kernel, size, stride, padding, dilation = kernel[:, :, None], (1, *size), (1, *stride), (0, 0, *padding), (1, *dilation)
    value, how = convolution_bound(
        kernel, (size[0], size[1]), stride=stride, padding=padding, dilation=dilation, groups=layer.groups, mode="circular" if mode == "circular" else "zeros"
    )
    taps = "x".join(str(count) for count in layer.weight.shape[2:])
    border = f", whose border shows a pixel up to {shown} times" if shown > 1 else ""
    return Bound(multiply_up(value, root_up(shown)), f"conv{dimensions}d {taps}, {mode}: {how}{border}", assumptions=_PROVED)


@register(nn.Conv2d)
def _(layer: nn.Conv2d, shape: Shape) -> Bound:
    return _convolution(layer, shape)


@register(nn.Conv1d)
def _(layer: nn.Conv1d, shape: Shape) -> Bound:
    """A convolution of images of height 1."""
    return _convolution(layer, shape)


@register(nn.Conv3d)
def _(layer: nn.Conv3d, shape: Shape) -> Bound:
    """The sum over the taps in depth of the norms of their convolutions in height and width: the images at each depth go to images at other depths.

    For K taps at most sqrt(K) times what their norms beside each other give, where all of them add up.
    """
    _, height, width = _sizes(layer, shape, 3)
    if layer.padding_mode != "zeros":
        _refuse(layer, f"padding_mode={layer.padding_mode!r} is not known in three dimensions; use 'zeros', or a padding layer before it")
    value, padding = 0.0, padding_of(layer)
    for kernel in as_float64(layer.weight).swapaxes(0, 2).swapaxes(1, 2):  # (depth, out, in, height, width)
        found, _ = convolution_bound(kernel, (height, width), stride=layer.stride[1:], padding=padding[2:], dilation=layer.dilation[1:], groups=layer.groups)
        value = add_up(value, found)
    taps = "x".join(str(count) for count in layer.weight.shape[2:])
    return Bound(value, f"conv3d {taps}: sum over the taps in depth", assumptions=_PROVED)


@register(nn.ConvTranspose1d, nn.ConvTranspose2d)
def _(layer: nn.ConvTranspose1d | nn.ConvTranspose2d, shape: Shape) -> Bound:
    """The norm of the convolution that it transposes: from images of the size of its output, with the same kernel, stride and padding.

    With an output padding of at least the stride that convolution has more outputs than this layer has inputs; the layer transposes a part of it.
    """
    dimensions = len(layer.dilation)
    size, kernel = _sizes(layer, shape, dimensions), as_float64(layer.weight)
    padding = tuple(int(half) for half in layer.padding)
    geometry = zip(size, kernel.shape[2:], layer.stride, padding, layer.dilation, layer.output_padding, strict=True)
    out = tuple((n - 1) * stride - 2 * half + step * (taps - 1) + extra + 1 for n, taps, stride, half, step, extra in geometry)
    stride, dilation = tuple(layer.stride), tuple(layer.dilation)
    if dimensions == 1:
        kernel, out, stride, padding, dilation = kernel[:, :, None], (1, *out), (1, *stride), (0, *padding), (1, *dilation)
    value, how = convolution_bound(kernel, (out[0], out[1]), stride=stride, padding=padding, dilation=dilation, groups=layer.groups)
    taps, across = "x".join(str(count) for count in layer.weight.shape[2:]), "x".join(str(n) for n in out[-dimensions:])
    return Bound(value, f"transposed conv{dimensions}d {taps}: {how} of the convolution from {across}", assumptions=_PROVED)


# Normalisation and dropout


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)
def _(layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, shape: Shape) -> Bound:
    """`max |weight| / sqrt(var + eps)` with the running variance that is stored."""
    if layer.running_mean is None or layer.running_var is None:
        _refuse(layer, "has no running statistics, so each output depends on the whole batch in eval mode too; use track_running_stats=True")
    variance = np.nextafter(as_float64(layer.running_var) + layer.eps, -np.inf)
    if not (variance > 0).all():
        _refuse(layer, f"has a running variance of {variance.min():g} with eps added, which must be positive; train it first, or set eps > 0")
    weight = np.ones(1) if layer.weight is None else np.abs(as_float64(layer.weight))
    scale = np.nextafter(weight / np.nextafter(np.sqrt(variance), 0), np.inf) * (weight > 0)
    return Bound(float(scale.max()), "batch norm: largest |weight| / sqrt(running variance + eps)")


@register(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _(module: nn.Module, shape: Shape) -> Bound:
    return Bound(1.0, "dropout: the identity in eval mode")


@register(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm)
def _(layer: Any, shape: Shape) -> Bound:
    """`max |weight| / sqrt(eps)`, attained where all entries of a group are equal, or all 0 for RMSNorm.

    With y the n entries of a group less their mean (as they are, for RMSNorm) and `s^2 = |y|^2 / n + eps` the Jacobian of `y / s` is `(I - yy' / (n s^2)) / s`,
    symmetric with eigenvalues in [0, 1 / s], and `s^2 >= eps`; taking off the mean is a projection.
    """
    if getattr(layer, "running_var", None) is not None:
        _refuse(layer, "has running statistics, for which no rule is known; use BatchNorm, or track_running_stats=False")
    held = getattr(layer, "weight", None)
    eps = layer.eps if layer.eps is not None else float(torch.finfo(torch.float32 if held is None else held.dtype).eps)
    if not eps > 0:
        _refuse(layer, f"has eps={eps}, so it has no Lipschitz constant near a constant input; set eps > 0")
    if isinstance(layer, nn.RMSNorm) and layer.eps is None and held is None:
        _refuse(layer, "takes the eps of the type of its input; set eps")
    weight = 1.0 if held is None else float(np.abs(as_float64(held)).max(initial=0.0))
    value = multiply_up(weight, up(1 / math.nextafter(math.sqrt(eps), 0.0)))
    return Bound(value, f"{type(layer).__name__}: largest |weight| / sqrt(eps), where all entries are equal")


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


@register(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _(module: nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d, shape: Shape) -> Bound:
    """The exact norm: the divisor is a product of one for each axis, so the pool is a product of pools along each.

    These are torch's own, seen through their answers to single pixels; so padding, ceil_mode and count_include_pad are as torch has them.
    """
    divisor = getattr(module, "divisor_override", None)
    dimensions = 1 if isinstance(module, nn.AvgPool1d) else 2 if isinstance(module, nn.AvgPool2d) else 3
    pieces = []
    for n, taps, stride, padding in zip(
        _sizes(module, shape, dimensions), *(each(size, dimensions) for size in (module.kernel_size, module.stride, module.padding)), strict=True
    ):
        seen = functional.avg_pool2d(
            _impulses(n), (taps, 1), (stride, 1), (padding, 0), module.ceil_mode, module.count_include_pad, None if divisor is None else 1
        )
        pieces.append(as_float64(seen[:, 0, :, 0]))
    return Bound(_average(pieces, 1 if divisor is None else abs(divisor)), "average pool: norms along each axis", assumptions=_PROVED)


@register(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _(module: nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d, shape: Shape) -> Bound:
    """The exact norm, as for AvgPool2d; `1 / sqrt(height width)` for one output."""
    dimensions = 1 if isinstance(module, nn.AdaptiveAvgPool1d) else 2 if isinstance(module, nn.AdaptiveAvgPool2d) else 3
    pieces = [
        as_float64(functional.adaptive_avg_pool2d(_impulses(n), (n if wanted is None else wanted, 1))[:, 0, :, 0])
        for n, wanted in zip(_sizes(module, shape, dimensions), each(module.output_size, dimensions), strict=True)
    ]
    return Bound(_average(pieces), "adaptive average pool: norms along each axis", assumptions=_PROVED)


def each(sizes: Any, dimensions: int) -> tuple[Any, ...]:
    """One size for all axes, or one for each; AvgPool1d holds a tuple of one."""
    return tuple(sizes) if isinstance(sizes, list | tuple) else (sizes,) * dimensions


def _most_windows(places: Array, size: int) -> int:
    """In how many windows a pixel of an axis is, at most."""
    return int(np.bincount(places[(places >= 0) & (places < size)], minlength=size).max())


@register(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _(module: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, shape: Shape) -> Bound:
    """The square root of the largest number of windows that a pixel is in.

    `|max x - max y|` over a window is at most the difference at some pixel of it, so each squared difference is counted at most that often; a pixel that is
    larger than all others attains it.
    """
    if module.return_indices:
        _refuse(module, "return_indices=True makes it return positions too, which are not Lipschitz; use return_indices=False")
    overlap = 1
    dimensions = 1 if isinstance(module, nn.MaxPool1d) else 2 if isinstance(module, nn.MaxPool2d) else 3
    sizes = _sizes(module, shape, dimensions)
    for n, taps, stride, padding, step in zip(
        sizes, *(each(size, dimensions) for size in (module.kernel_size, module.stride, module.padding, module.dilation)), strict=True
    ):
        outputs = functional.max_pool1d(torch.zeros(1, 1, n), taps, stride, padding, step, module.ceil_mode).shape[-1]
        overlap *= _most_windows((stride * np.arange(outputs)[:, None] + step * np.arange(taps) - padding).ravel(), n)
    return Bound(root_up(overlap), f"max pool: a pixel is in up to {overlap} windows")


@register(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _(module: nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d | nn.AdaptiveMaxPool3d, shape: Shape) -> Bound:
    """As MaxPool2d; the windows are those of the adaptive average pool."""
    if module.return_indices:
        _refuse(module, "return_indices=True makes it return positions too, which are not Lipschitz; use return_indices=False")
    dimensions = 1 if isinstance(module, nn.AdaptiveMaxPool1d) else 2 if isinstance(module, nn.AdaptiveMaxPool2d) else 3
    overlap = 1
    for n, wanted in zip(_sizes(module, shape, dimensions), each(module.output_size, dimensions), strict=True):
        answers = functional.adaptive_avg_pool2d(_impulses(n), (n if wanted is None else wanted, 1))[:, 0, :, 0]
        overlap *= int((answers != 0).sum(dim=1).max())
    return Bound(root_up(overlap), f"adaptive max pool: a pixel is in up to {overlap} windows")


# Padding and rearrangements


@register(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _(module: nn.ConstantPad1d | nn.ConstantPad2d | nn.ConstantPad3d, shape: Shape) -> Bound:
    if len(module.padding) // 2 > len(shape):
        _refuse(module, f"takes one input of at least {len(module.padding) // 2} axes, got {tuple(shape)}; it would pad the batch")
    return Bound(1.0, "a constant border")


_BORDERS: dict[type[nn.Module], str] = {
    nn.ReflectionPad1d: "reflect", nn.ReflectionPad2d: "reflect", nn.ReflectionPad3d: "reflect",
    nn.ReplicationPad1d: "replicate", nn.ReplicationPad2d: "replicate", nn.ReplicationPad3d: "replicate",
    nn.CircularPad1d: "circular", nn.CircularPad2d: "circular", nn.CircularPad3d: "circular",
}  # fmt: skip


@register(*_BORDERS)
def _(module: Any, shape: Shape) -> Bound:
    """The square root of the largest number of times that a pixel is shown."""
    mode = next(_BORDERS[cls] for cls in type(module).__mro__ if cls in _BORDERS)
    pads = module.padding[::-1]  # torch takes the last axis first, before and after
    sizes = _sizes(module, shape, len(pads) // 2)
    if mode == "circular" and min(pads) < 0:  # of which torch makes overlapping memory, or leaves some unwritten
        _refuse(module, f"has the circular border {tuple(module.padding)}, and negative ones are not known; cut the image by a slice before it")
    shown = math.prod(_shown(n, before, after, mode) for n, before, after in zip(sizes, pads[1::2], pads[::2], strict=True))
    return Bound(root_up(shown), f"{mode} border: a pixel is shown up to {shown} times")


@register(nn.ChannelShuffle)
def _(module: nn.ChannelShuffle, shape: Shape) -> Bound:
    return Bound(1.0, "channel shuffle: a rearrangement")


@register(nn.Upsample, nn.UpsamplingNearest2d)
def _(module: nn.Upsample, shape: Shape) -> Bound:
    """The square root of the largest number of times that a pixel is shown, by what torch makes of the numbers of the pixels."""
    if module.mode not in ("nearest", "nearest-exact"):
        _refuse(module, f"mode={module.mode!r} is not known; use 'nearest'")
    pixels = math.prod(_sizes(module, shape, len(shape) - 1))
    places = module(torch.arange(pixels, dtype=torch.float64).reshape(1, 1, *shape[1:])).long().ravel()
    shown = int(torch.bincount(places).max())
    return Bound(root_up(shown), f"upsampling: a pixel is shown up to {shown} times")


@register(nn.Unfold)
def _(module: nn.Unfold, shape: Shape) -> Bound:
    """The square root of the largest number of patches that a pixel is in; those of the border are filled with zeros."""
    height, width = _sizes(module, shape)
    numbers = torch.arange(1, height * width + 1, dtype=torch.float64).reshape(1, 1, height, width)
    shown = int(torch.bincount(module(numbers).long().ravel(), minlength=2)[1:].max())
    return Bound(root_up(shown), f"unfold: a pixel is in up to {shown} patches")


@register(nn.PixelShuffle, nn.PixelUnshuffle)
def _(module: nn.PixelShuffle | nn.PixelUnshuffle, shape: Shape) -> Bound:
    return Bound(1.0, "pixel shuffle: a rearrangement")
