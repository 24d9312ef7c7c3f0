"""Lines above and below a scalar gate on an interval, and above and below a gradient times a slope that is only known to lie between two numbers, or lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from certify.bound import Array
from sdp.activation import RELU, Activation

_ROOM = 2.0**-48  # relative, for the few roundings of an intercept
_TINY = 2.0**-1000
_PIECES = 16  # of an interval, on each of which the slopes of a smooth activation are bounded
_Range = Callable[[Array, Array], tuple[Array, Array]]  # on intervals


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """`low_slope z + low_shift <= value <= high_slope z + high_shift`, entry by entry; valid for the slopes as they are stored."""

    low_slope: Tensor
    low_shift: Tensor
    high_slope: Tensor
    high_shift: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Planes:
    """`low_slope e + low_input z + low_shift <= value <= high_slope e + high_input z + high_shift`, entry by entry; valid as they are stored."""

    low_slope: Tensor
    low_input: Tensor
    low_shift: Tensor
    high_slope: Tensor
    high_input: Tensor
    high_shift: Tensor


def of_gate(activation: Activation, low: Tensor, high: Tensor, slope: Tensor | None = None) -> Lines:
    """Around `activation(z)` for z in `[low, high]`. `slope` is that of the line below an undecided ReLU; without it, the one that leaves the smaller area."""
    if activation == RELU:
        return _of_relu(low, high, slope)
    return _of_any(activation.image, activation.slopes, low, high)


def of_slope(activation: Activation, low: Tensor, high: Tensor) -> Lines:
    """Around the slope of a smooth activation at z in `[low, high]`."""
    return _of_any(activation.slopes, activation.curvatures, low, high)


def _of_relu(low: Tensor, high: Tensor, slope: Tensor | None) -> Lines:
    on, off = low >= 0, high <= 0
    width = (high - low).clamp(min=_TINY)
    chord = torch.where(on, 1.0, torch.where(off, 0.0, high / width)).clamp(0.0, 1.0)
    ends = torch.maximum(low.clamp(min=0) - chord * low, high.clamp(min=0) - chord * high)
    shift = torch.where(on | off, 0.0, ends * (1 + _ROOM) + 2.0**-52 * chord * torch.maximum(-low, high) + _TINY)
    below = (high > -low).double() if slope is None else slope.clamp(0.0, 1.0)
    below = torch.where(on, 1.0, torch.where(off, 0.0, below))
    return Lines(below, torch.zeros_like(low), chord, shift)


def _of_any(image: _Range, slopes_on: _Range, low: Tensor, high: Tensor) -> Lines:
    """By the values and the slopes of a function: parallel lines at the slope of the chord, or at that in the middle, whichever is nearer there."""
    least, most = (end.numpy() for end in (low, high))
    edges = np.linspace(least, most, _PIECES + 1)
    edges[0], edges[-1] = least, most
    start, stop = np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])
    under, over = image(edges, edges)
    slopes = slopes_on(start, stop)
    middle = edges[_PIECES // 2]
    chord = (over[-1] - over[0]) / np.maximum(most - least, 1e-300)
    chord = np.clip(chord, slopes[0].min(axis=0), slopes[1].max(axis=0))
    tangent = np.add(*slopes_on(middle, middle)) / 2
    above, below = [], []
    for slope in (chord, tangent):
        above.append(_largest(over, slopes, edges, slope))
        below.append(-_largest(-under, (-slopes[1], -slopes[0]), edges, -slope))
    first_above = chord * middle + above[0] <= tangent * middle + above[1]
    first_below = chord * middle + below[0] >= tangent * middle + below[1]
    picked = (
        np.where(first_below, chord, tangent),
        np.where(first_below, *below),
        np.where(first_above, chord, tangent),
        np.where(first_above, *above),
    )
    return Lines(*(torch.from_numpy(np.ascontiguousarray(part)) for part in picked))


def _largest(
    value: Array,  # (pieces + 1, n): at least the value at each edge
    slopes: tuple[Array, Array],  # (pieces, n) each: of the pieces
    edges: Array,  # (pieces + 1, n)
    slope: Array,  # (n,)
) -> Array:
    """At least the largest `value(z) - slope z`: on each piece below the lines of the smallest and the largest slope through its ends."""
    shifted = value - slope * edges
    first, last, width = shifted[:-1], shifted[1:], np.abs(edges[1:] - edges[:-1]) * (1 + _ROOM)
    rise, fall = np.maximum(slopes[1] - slope, 0.0), np.maximum(slope - slopes[0], 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        meet = np.where(rise + fall > 0, (last - first + fall * width) / (rise + fall), 0.0)
    peak = first + rise * np.clip(np.nan_to_num(meet), 0.0, width)
    peak = np.maximum(np.maximum(peak, first), last)
    room = 1e-12 * (np.abs(value).max(axis=0) + np.abs(slope * edges).max(axis=0) + np.abs(peak).max(axis=0))
    return np.asarray(peak.max(axis=0) + room)


def of_product(
    least: Tensor,
    most: Tensor,  # the slope s is in [least, most]
    low: Tensor,
    high: Tensor,  # the gradient e is in [low, high]
) -> Lines:
    """Around `s e`. `max(least e, most e)` is convex, so its chord is the smallest concave function above it, and so for the minimum."""
    width = (high - low).clamp(min=_TINY)
    top = torch.maximum(least * low, most * low), torch.maximum(least * high, most * high)
    bottom = torch.minimum(least * low, most * low), torch.minimum(least * high, most * high)
    high_slope, low_slope = (top[1] - top[0]) / width, (bottom[1] - bottom[0]) / width
    smallest, largest = torch.minimum(least, torch.zeros_like(least)), most
    high_slope, low_slope = high_slope.clamp(smallest, largest), low_slope.clamp(smallest, largest)
    size = torch.maximum(least.abs(), most.abs()) * torch.maximum(low.abs(), high.abs())
    room = _ROOM * size + _TINY
    high_shift = torch.maximum(top[0] - high_slope * low, top[1] - high_slope * high) + room
    low_shift = torch.minimum(bottom[0] - low_slope * low, bottom[1] - low_slope * high) - room
    exact = least == most
    zero = torch.zeros_like(low)
    return Lines(
        torch.where(exact, least, low_slope),
        torch.where(exact, zero, low_shift),
        torch.where(exact, least, high_slope),
        torch.where(exact, zero, high_shift),
    )


def flat(lines: Lines) -> Planes:
    """The same, whatever z is."""
    zero = torch.zeros_like(lines.low_slope)
    return Planes(lines.low_slope, zero, lines.low_shift, lines.high_slope, zero, lines.high_shift)


def of_coupled_product(
    slope: Lines,  # around the slope s, in the input z of the gate
    reach: Tensor,  # at least |z|
    least: Tensor,
    most: Tensor,  # s is in [least, most]
    low: Tensor,
    high: Tensor,  # the gradient e is in [low, high]
    shares: tuple[float, float],  # above and below
) -> Planes:
    """Around `s e`, with s between its lines (McCormick 1976): a share of the plane that meets it on two edges of the rectangle, the rest of its opposite."""
    above = _above(slope, reach, least, most, low, high, shares[0])
    below = _above(slope, reach, least, most, -high, -low, shares[1])  # - s e = s (-e)
    return Planes(below[0], -below[1], -below[2], *above)


def _above(slope: Lines, reach: Tensor, least: Tensor, most: Tensor, low: Tensor, high: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """`s e - of_e e - of_s s` is largest at a corner, whatever these two are; s is then replaced by its line above or below, by the sign of `of_s`."""
    of_e, of_s = share * most + (1 - share) * least, share * low + (1 - share) * high
    corners = torch.stack([s * e - of_e * e - of_s * s for s in (least, most) for e in (low, high)]).amax(0)
    steepness, shift = (torch.where(of_s >= 0, up, down) for up, down in ((slope.high_slope, slope.low_slope), (slope.high_shift, slope.low_shift)))
    of_z, shift = of_s * steepness, of_s * shift
    steepest, largest = torch.maximum(least.abs(), most.abs()), torch.maximum(low.abs(), high.abs())
    size = steepest * largest + of_e.abs() * largest + of_s.abs() * steepest + of_z.abs() * reach + shift.abs()
    return of_e, of_z, corners + shift + _ROOM * size + _TINY
