"""Rules for `lipnet.layers.shape`."""

from __future__ import annotations

import math

import lipnet
from certify.bound import Bound
from certify.errors import Problem, Unsupported
from certify.registry import Shape, register
from certify.rounding import up
from certify.spectral import as_float64


def same_channels(channels: int, shape: Shape, name: str) -> None:
    """Refuse an input with other channels: one channel would be repeated to fit, and each repetition counts in the norm."""
    if not shape or shape[0] != channels:
        raise Unsupported([Problem("", name, f"has {channels} channels, its input has the shape {shape}; give both the same number of channels")])


@register(lipnet.Scale)
def _(layer: lipnet.Scale, shape: Shape) -> Bound:
    if not math.isfinite(layer.factor):
        raise Unsupported([Problem("", "Scale", f"has the factor {layer.factor}; a finite number is needed")])
    return Bound(abs(layer.factor), "scale")


@register(lipnet.Normalize)
def _(layer: lipnet.Normalize, shape: Shape) -> Bound:
    """1 / min(std), with the numbers that are stored."""
    if len(layer.mean) > 1:
        same_channels(len(layer.mean), shape, "Normalize")
    divisor = float(abs(as_float64(layer.divisor)).min())
    return Bound(1.0 if divisor == 1 else up(1 / divisor), "normalize: 1 / smallest std")


@register(lipnet.BatchCentering, lipnet.LayerCentering2d)
def _(layer: lipnet.BatchCentering | lipnet.LayerCentering2d, shape: Shape) -> Bound:
    """A shift, after a projection for the second, which adds its bias to images: signals with more axes would be repeated to fit it."""
    same_channels(layer.channels, shape, type(layer).__name__)
    if isinstance(layer, lipnet.LayerCentering2d) and len(shape) != 3:
        raise Unsupported([Problem("", "LayerCentering2d", f"takes one input of shape (channels, height, width), got {shape}")])
    return Bound(1.0, "centring")


@register(lipnet.PadChannels)
def _(layer: lipnet.PadChannels, shape: Shape) -> Bound:
    """Zeros add nothing to a norm, and a part has no larger one."""
    same_channels(layer.in_channels, shape, "PadChannels")
    return Bound(1.0, "channels of zeros" if layer.out_channels >= layer.in_channels else "some of the channels")


@register(lipnet.ReverseChannels, lipnet.ChannelsLast)
def _(layer: lipnet.ReverseChannels | lipnet.ChannelsLast, shape: Shape) -> Bound:
    """A rearrangement of each input."""
    return Bound(1.0, "channels in another order or place: a rearrangement")
