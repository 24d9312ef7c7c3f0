"""How modules are lowered: linear maps, elementwise activations, sortings, and layers that are several of these."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

import lipnet
import sdp
from certify import slopes
from certify.bound import Array
from certify.functions import BatchNorm
from certify.lure.lowering import Lowering, Wire, lowers, refuse
from certify.registry import Shape
from certify.rules.torch_conv import each, padding_of, sources
from certify.spectral import as_float64
from lipnet.functional import comparators
from lipnet.layers.residual import ResidualBlock
from lipnet.layers.sll import PotentialLayer
from sdp.activation import RELU
from sdp.proof import UNIT, gamma

# Linear maps


@lowers(nn.Linear, lipnet.ContractionLinear, lipnet.BROLinear, lipnet.UnitRowLinear)
def _(self: Lowering, layer: Any, x: Wire) -> Wire:
    weight = layer.weight if isinstance(layer.weight, Tensor) else layer.weight()
    matrix, bias = as_float64(weight), None if layer.bias is None else as_float64(layer.bias)
    if len(x.shape) != 1:
        repeats = math.prod(x.shape[:-1])
        self.check_memory(repeats**2 * matrix.size)
        matrix, bias = _kron(np.eye(repeats), matrix), None if bias is None else np.tile(bias, repeats)
    elif type(layer) is nn.Linear and layer is self.leaf:
        self.names[len(self.wiring.steps)] = f"{self.path}.weight"
    return self.linear(matrix, x, (*x.shape[:-1], len(weight)), bias)


@lowers(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
def _(self: Lowering, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d, x: Wire) -> Wire:
    """The matrix, from the answers to unit vectors: each is an entry of the kernel, or 0; a sum of such where a border shows a pixel to several taps."""
    with torch.no_grad():
        unbiased = _without_bias(layer)
        made = unbiased(torch.zeros(1, *x.shape, dtype=torch.float64)).shape[1:]
        self.check_memory(math.prod(x.shape) * math.prod(made))
        matrix, error = answers(unbiased, x.shape), None
        if _sums_taps(layer, x.shape[1:]):
            unbiased.weight = nn.Parameter(unbiased.weight.abs())  # type: ignore[operator]
            error = gamma(math.prod(layer.weight.shape[2:]) + 4) * answers(unbiased, x.shape)
    bias = None if layer.bias is None else np.repeat(as_float64(layer.bias), math.prod(made[1:]))
    return self.linear(matrix, x, tuple(made), bias, error)


def _sums_taps(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d, size: Sequence[int]) -> bool:
    """Whether a border that shows pixels may show one to several taps of an output: along some axis, as pixels and taps are products of those."""
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d) or layer.padding_mode == "zeros":
        return False
    pads, taps = padding_of(layer), layer.weight.shape[2:]
    for n, before, after, count, stride, step in zip(size, pads[::2], pads[1::2], taps, layer.stride, layer.dilation, strict=True):
        windows = sources(n, before, after, layer.padding_mode).unfold(0, step * (count - 1) + 1, stride)[:, ::step]
        if any(len(window.unique()) < count for window in windows):
            return True
    return False


def _without_bias(layer: nn.Module) -> nn.Module:
    plain = lipnet.freeze(layer).double()
    plain.bias = None  # type: ignore[assignment]
    return plain


def answers(function: Callable[[Tensor], Tensor], shape: Shape) -> Array:  # (outputs, inputs)
    """The matrix of a linear function on inputs of this shape."""
    entries = math.prod(shape)
    rows = torch.eye(entries, dtype=torch.float64).split(256)
    parts = [function(part.reshape(-1, *shape)).reshape(len(part), -1) for part in rows]
    return np.ascontiguousarray(torch.cat(parts).T.numpy())


@lowers(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)
def _(self: Lowering, layer: nn.BatchNorm1d, x: Wire) -> Wire:
    """`(v - mean) weight / sqrt(var + eps) + bias`, with the running statistics."""
    variance = as_float64(layer.running_var) + layer.eps  # type: ignore[arg-type]
    weight = np.ones(len(variance)) if layer.weight is None else as_float64(layer.weight)
    factor = weight / np.sqrt(variance)
    shift = -as_float64(layer.running_mean) * factor + (0.0 if layer.bias is None else as_float64(layer.bias))  # type: ignore[arg-type]
    per, count = math.prod(x.shape[1:]), len(variance)
    made = self.wiring.scale(x.signal, np.repeat(factor, per), np.repeat(8 * UNIT * np.abs(factor), per))
    size = np.abs(as_float64(layer.running_mean) * factor) + (np.zeros(count) if layer.bias is None else np.abs(as_float64(layer.bias)))  # type: ignore[arg-type]
    made = self.wiring.shift(made, np.repeat(shift, per))
    return Wire(dataclasses.replace(made, offset_error=made.offset_error + np.repeat(16 * UNIT * size, per)), x.shape)


@lowers(lipnet.Normalize)
def _(self: Lowering, layer: lipnet.Normalize, x: Wire) -> Wire:
    per = math.prod(x.shape[1:])
    mean, std = (np.repeat(np.broadcast_to(as_float64(part), (x.shape[0],)), per) for part in (layer.shift, layer.divisor))
    moved = self.wiring.shift(x.signal, -mean)
    exact = np.abs(np.frexp(std)[0]) == 0.5
    return Wire(self.wiring.scale(moved, 1 / std, np.where(exact, 0.0, 2 * UNIT / std)), x.shape)


@lowers(lipnet.Scale)
def _(self: Lowering, layer: lipnet.Scale, x: Wire) -> Wire:
    return Wire(self.wiring.scale(x.signal, layer.factor), x.shape)


@lowers(lipnet.BatchCentering)
def _(self: Lowering, layer: lipnet.BatchCentering, x: Wire) -> Wire:
    return Wire(self.wiring.shift(x.signal, np.repeat(as_float64(layer.shift()), math.prod(x.shape[1:]))), x.shape)


@lowers(lipnet.LayerCentering2d)
def _(self: Lowering, layer: lipnet.LayerCentering2d, x: Wire) -> Wire:
    pixels = math.prod(x.shape[1:])
    block = np.eye(pixels) - 1 / pixels
    self.check_memory(math.prod(x.shape) ** 2)
    bias = None if layer.bias is None else np.repeat(as_float64(layer.bias), pixels)
    ones = np.eye(x.shape[0])
    return self.linear(_kron(ones, block), x, x.shape, bias, _kron(ones, np.full((pixels, pixels), 4 * UNIT)))


@lowers(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, lipnet.ScaledAvgPool2d)
def _(self: Lowering, module: nn.Module, x: Wire) -> Wire:
    """The matrix from the answers to unit vectors, each entry one over a count."""
    made = tuple(module(torch.zeros(1, *x.shape)).shape[1:])
    self.check_memory(math.prod(x.shape) * math.prod(made))
    matrix = answers(module, x.shape)
    return self.linear(matrix, x, made, error=4 * UNIT * np.abs(matrix))


@lowers(nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
@lowers(nn.PixelUnshuffle, nn.PixelShuffle, nn.ChannelShuffle, nn.Upsample, nn.UpsamplingNearest2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
@lowers(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
@lowers(lipnet.ReverseChannels, lipnet.ChannelsLast)
def _(self: Lowering, module: nn.Module, x: Wire) -> Wire:
    """A rearrangement, entries perhaps repeated."""
    numbered = module(torch.arange(math.prod(x.shape), dtype=torch.float64).reshape(1, *x.shape))
    which = numbered.flatten().long().numpy()
    made = tuple(numbered.shape[1:])
    return Wire(x.signal, made) if np.array_equal(which, np.arange(len(which))) else self.pick(x, which, made)


@lowers(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.Unfold, lipnet.PadChannels)
def _(self: Lowering, module: nn.Module, x: Wire) -> Wire:
    """A border of constants: rows of zeros, and the constants."""
    zeros = torch.zeros(1, *x.shape, dtype=torch.float64)
    constant = module(zeros)[0]
    if not torch.isfinite(constant).all():
        raise refuse(module, "pads with NaN or infinity; take a finite number")
    matrix = answers(lambda part: module(part) - constant, x.shape)
    return self.linear(matrix, x, tuple(constant.shape), constant.flatten().numpy())


# Nonlinearities


@lowers(lipnet.NActivation)
def _(self: Lowering, layer: lipnet.NActivation, x: Wire) -> Wire:
    """`-v + 2 relu(v - high) - 2 relu(low - v)`: slopes of +-1 at every entry."""
    return Wire(self.bend(x.signal, sdp.activation.Sloped(-1.0, 1.0), 0.5), x.shape)


@lowers(lipnet.MaxMin)
def _(self: Lowering, layer: lipnet.MaxMin, x: Wire) -> Wire:
    channels, per = x.shape[0], math.prod(x.shape[1:])
    places = np.arange(channels * per).reshape(channels, per)
    half = channels // 2
    pairs = (places[0::2], places[1::2]) if layer.pairing == "neighbours" else (places[:half], places[half:])
    return Wire(self.sort(x.signal, pairs[0].ravel(), pairs[1].ravel()), x.shape)


@lowers(lipnet.GroupSort)
def _(self: Lowering, layer: lipnet.GroupSort, x: Wire) -> Wire:
    """The network of comparators that the layer itself is."""
    places = np.arange(math.prod(x.shape)).reshape(-1, layer.size, math.prod(x.shape[1:]))
    signal = x.signal
    for i, j in comparators(layer.size):
        signal = self.sort(signal, places[:, i].ravel(), places[:, j].ravel())
    return Wire(signal, x.shape)


@lowers(lipnet.Householder)
def _(self: Lowering, layer: lipnet.Householder, x: Wire) -> Wire:
    """`z - 2 relu(v'z) v`: `|z|^2 - 4 r (v'z - r)` for a unit v, so 2 is its multiplier."""
    direction, per = as_float64(layer.direction()), math.prod(x.shape[1:])
    places = np.arange(math.prod(x.shape)).reshape(-1, 2, per)
    first, second = places[:, 0].ravel(), places[:, 1].ravel()
    v = [np.repeat(direction[:, k], per) for k in (0, 1)]
    wiring = self.wiring
    parts = [wiring.pick(x.signal, which) for which in (first, second)]
    beyond = self.bend(wiring.add(wiring.scale(parts[0], v[0]), wiring.scale(parts[1], v[1])), RELU, 2.0)
    made = wiring.join([wiring.add(part, wiring.scale(beyond, -2 * v_k)) for part, v_k in zip(parts, v, strict=True)])
    return Wire(wiring.pick(made, np.argsort(np.concatenate([first, second]), kind="stable")), x.shape)


@lowers(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _(self: Lowering, module: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, x: Wire) -> Wire:
    """A tournament in each window; what is padded never wins, so a pixel that is there stands in for it."""
    sizes, made = x.shape[1:], tuple(module(torch.zeros(1, *x.shape)).shape[1:])
    options = zip(*(each(size, len(sizes)) for size in (module.kernel_size, module.stride, module.padding, module.dilation)), strict=True)
    along, most = [], 1  # the places of each window that are inside, axis by axis; the taps of a window
    for n, count, (taps, stride, padding, step) in zip(sizes, made[1:], options, strict=True):
        along.append([[place for place in range(stride * i - padding, stride * i - padding + step * taps, step) if 0 <= place < n] for i in range(count)])
        most *= taps
    windows = []
    for window in itertools.product(*along):
        inside = [int(np.ravel_multi_index(places, sizes)) for places in itertools.product(*window)]
        windows.append((inside + inside[:1] * most)[:most])
    if not all(windows):
        raise refuse(module, "has windows with nothing but padding in them, which give -infinity; take less padding or dilation")
    one = np.array(windows, dtype=np.int64)
    groups = (np.arange(x.shape[0])[:, None, None] * math.prod(sizes) + one).reshape(-1, one.shape[1])
    before = self.wiring.count
    signal = self.wiring.largest(x.signal, groups)
    if self.everywhere:
        self.hints += np.split(np.ones(self.wiring.count - before), groups.shape[1] - 1) if groups.shape[1] > 1 else []
    return Wire(signal, made)


def _kron(a: Array, b: Array) -> Array:
    """The Kronecker product; exact where the entries of one are 0 and 1."""
    return np.asarray(np.kron(a, b), dtype=np.float64)


# Layers that know their own multipliers


def _with_hints(self: Lowering, module: nn.Module, x: Wire, multipliers: Array) -> Wire:
    """The frozen layer, its nonlinearities with these multipliers."""
    before = len(self.hints)
    made = self.plain(module, x)
    if self.everywhere:
        count = sum(map(len, self.hints[before:]))
        self.hints[before:] = [multipliers] if count == len(multipliers) else []
    return made


@lowers(lipnet.SandwichLinear, lipnet.SandwichConv2d)
def _(self: Lowering, layer: lipnet.SandwichLinear | lipnet.SandwichConv2d, x: Wire) -> Wire:
    """`T = Psi^2`: `2 T - W_2'W_2 = 2 Psi (B B') Psi` and `T W_1 = sqrt2 Psi B`, so the Schur complement is `B' (B B')^-1 B <= I`."""
    psi = as_float64(layer.psi()) ** 2
    pixels = 1 if isinstance(layer, lipnet.SandwichLinear) else math.prod(x.shape[1:]) // layer.stride**2
    return _with_hints(self, layer.frozen(), x, np.repeat(psi, pixels))


@lowers(lipnet.SLLLinear, lipnet.CPLLinear, lipnet.SLLConv2d, lipnet.CPLConv2d)
def _(self: Lowering, layer: PotentialLayer, x: Wire) -> Wire:
    """`2 T`, which makes the mixed block `-U'(2 T) + 2 U'T` zero."""
    pixels = math.prod(x.shape[1:]) if layer.free.dim() == 4 else 1
    return _with_hints(self, layer.frozen(), x, np.repeat(2 * as_float64(layer.steps()), pixels))


@lowers(lipnet.LDLTBlock, lipnet.GershgorinBlock)
def _(self: Lowering, layer: ResidualBlock, x: Wire) -> Wire:
    return _with_hints(self, layer.frozen(), x, np.concatenate([as_float64(part) for part in layer.weights().multipliers]))


@lowers(lipnet.LDLTConv2d)
def _(self: Lowering, layer: lipnet.LDLTConv2d, x: Wire) -> Wire:
    """The block at each pixel of the unshuffled image."""
    s = layer.stride
    image = self.module(nn.PixelUnshuffle(s).eval(), x) if s > 1 else x
    pixels = math.prod(image.shape[1:])
    weights, block = layer.block.weights(), layer.block

    def at_pixels(matrix: Tensor, bias: Tensor | None, signal: Wire) -> Wire:
        whole = _kron(as_float64(matrix), np.eye(pixels))
        self.check_memory(whole.size)
        return self.linear(whole, signal, (len(matrix), *image.shape[1:]), None if bias is None else np.repeat(as_float64(bias), pixels))

    activation = slopes.activation(block.activation)
    if activation is None:
        raise refuse(layer, f"its activation {type(block.activation).__name__} has no known slopes")
    hidden = image
    for matrix, bias, multipliers in zip(weights.inner, block.inner_bias, weights.multipliers, strict=True):
        inner = at_pixels(matrix, bias, hidden)
        hidden = Wire(self.bend(inner.signal, activation, np.repeat(as_float64(multipliers), pixels)), inner.shape)
    return self.add(at_pixels(weights.skip, None, image), at_pixels(weights.branch, block.bias, hidden))
