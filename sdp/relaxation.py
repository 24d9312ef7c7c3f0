"""A ReLU network on a ball, with every stable neuron folded away: what a semidefinite relaxation of it is made of, each number with its rounding.

A neuron whose input is nowhere positive on the ball is 0 there, one whose input is nowhere negative is linear. What remains are the unstable ones, as signals
`s = [e; a]` with the input `x = center + e`, and affine maps of these signals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdp.proof import UNIT, gamma
from sdp.ranged import Ranged, concatenate

Array = NDArray[np.float64]
_UP = 1 + 2.0**-48


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """`x -> weight x + bias`, followed by relu or not."""

    weight: Array  # (outputs, inputs)
    bias: Array  # (outputs,)
    relu: bool


@dataclasses.dataclass(frozen=True, eq=False)
class ReLUNetwork:
    """The steps one after the other, on `(x - shift) / divisor`."""

    steps: tuple[Affine, ...]
    shift: Array  # (inputs,)
    divisor: Array  # (inputs,), positive

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a ReLUNetwork needs at least one step")
        width = len(self.shift)
        for place, step in enumerate(self.steps):
            shapes = step.weight.shape, step.bias.shape
            if 0 in step.weight.shape or shapes != ((len(step.bias), width), (len(step.bias),)):
                raise ValueError(f"step {place} of a ReLUNetwork must have weights for {width} numbers and one bias for each output, got {shapes}")
            width = len(step.bias)
        arrays = [self.shift, self.divisor, *(array for step in self.steps for array in (step.weight, step.bias))]
        if any(array.dtype != np.float64 or not np.isfinite(array).all() for array in arrays):
            raise ValueError("a ReLUNetwork is made of finite float64 numbers, found others")
        if self.divisor.shape != self.shift.shape or not (self.divisor > 0).all():
            raise ValueError(f"a ReLUNetwork divides its inputs by one positive number each, got {len(self.divisor)} for {len(self.shift)}, or others")

    @classmethod
    def of(cls, weights: Sequence[Array], biases: Sequence[Array]) -> ReLUNetwork:
        """The usual kind: relu after every step but the last, on the inputs themselves."""
        last = len(weights) - 1
        steps = tuple(Affine(weight, bias, relu=place < last) for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)))
        inputs = weights[0].shape[1]
        return cls(steps, np.zeros(inputs), np.ones(inputs))

    def __call__(self, x: Array) -> Array:
        """The outputs at (N, inputs), in float64; rounded, so an estimate."""
        x = (x - self.shift) / self.divisor
        for step in self.steps:
            x = x @ step.weight.T + step.bias
            x = np.maximum(x, 0.0) if step.relu else x
        return x


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """The inputs within `radius` of `center` in the l2 or the maximum norm, and, where they are given, between `low` and `high`."""

    center: Array  # (inputs,)
    radius: float
    norm: float = 2.0  # 2 or inf
    low: Array | None = None  # (inputs,)
    high: Array | None = None  # (inputs,)

    def __post_init__(self) -> None:
        if self.center.ndim != 1 or self.center.dtype != np.float64 or not np.isfinite(self.center).all():
            raise ValueError("the center of a Region must be a vector of finite float64 numbers")
        if not (math.isfinite(self.radius) and self.radius >= 0) or self.norm not in (2, math.inf):
            raise ValueError(f"a Region has a finite radius that is not negative and norm 2 or inf, got radius={self.radius}, norm={self.norm}")
        if (self.low is None) != (self.high is None):
            raise ValueError("a Region has both low and high, or neither")
        for side in (self.low, self.high):
            if side is not None and (side.shape != self.center.shape or not np.isfinite(side).all()):
                raise ValueError(f"low and high of a Region must be finite vectors like its center, of shape {self.center.shape}")
        if self.low is not None and self.high is not None and not (self.low <= self.center).all() & (self.center <= self.high).all():
            raise ValueError("the center of a Region must lie between low and high")

    @property
    def sides(self) -> tuple[Array, Array]:
        """Bounds on the entries of e, rounded outward."""
        low, high = np.full_like(self.center, -self.radius), np.full_like(self.center, self.radius)
        if self.low is not None and self.high is not None:
            low = np.maximum(low, np.minimum(np.nextafter(self.low - self.center, -np.inf), 0.0))
            high = np.minimum(high, np.maximum(np.nextafter(self.high - self.center, np.inf), 0.0))
        return low, high

    @property
    def boxed(self) -> bool:
        """Whether bounds on single entries say more than the ball alone."""
        return self.norm != 2 or self.low is not None

    def largest(self, rows: Ranged) -> Array:  # (m, inputs) -> (m,)
        """`max rows e` over the region, rounded up."""
        low, high = self.sides
        inner = rows.value.shape[1]
        parts = np.maximum(rows.value * low, rows.value * high)  # each at least 0, as low <= 0 <= high
        extra = rows.error @ np.maximum(-low, high)
        most = (parts.sum(axis=1) + extra) * (1 + gamma(2 * inner + 8)) + (inner + 1) * 2.0**-1000
        if self.norm == 2:
            length = np.sqrt((rows.size**2).sum(axis=1) * (1 + gamma(inner + 8)) + (inner + 1) * 2.0**-1000) * (1 + 4 * UNIT)
            most = np.minimum(most, length * self.radius * (1 + 4 * UNIT) + 2.0**-1000)
        return np.asarray(most)


@dataclasses.dataclass(frozen=True, eq=False)
class Unstable:
    """Unstable neurons of one layer: `v = rows s + offset` over the signals before them, `lower <= v <= upper` on the region, `a = relu(v)`."""

    rows: Ranged  # (U, signals before)
    offset: Ranged  # (U,)
    lower: Array  # (U,), negative
    upper: Array  # (U,), positive
    slope: Array  # (U,) of the chord: relu(v) <= slope (v - lower)


@dataclasses.dataclass(frozen=True, eq=False)
class Relaxation:
    """A network on a region. `rows s + offset` are its outputs."""

    region: Region
    layers: tuple[Unstable, ...]
    rows: Ranged  # (outputs, signals)
    offset: Ranged  # (outputs,)

    @property
    def unstable(self) -> int:
        """The number of neurons that are neither dead nor linear on the region."""
        return sum(len(layer.lower) for layer in self.layers)

    def margin(self, label: int, other: int) -> tuple[Ranged, Ranged]:
        """The row over the signals, and the offset, of the difference of two outputs."""
        return self.rows[label] - self.rows[other], self.offset[label] - self.offset[other]

    @np.errstate(over="ignore", invalid="ignore")
    def smallest(self, rows: Ranged, offset: Ranged) -> Array:  # (m, signals), (m,) -> (m,)
        """A lower bound on `rows s + offset` over the region, by one line below and one above each neuron (Zhang et al. 2018)."""
        return _smallest(self.region, self.layers, rows, offset)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what overflows is refused, or proves nothing
def relax(network: ReLUNetwork, region: Region) -> Relaxation:
    """Fold the stable neurons of a network away, layer by layer, with bounds on the input of each neuron that hold on the region.

    Raises ValueError where the region is not one of the network's inputs, and where the bounds are not finite.
    """
    inputs = len(region.center)
    if len(network.shift) != inputs:
        raise ValueError(f"the network takes {len(network.shift)} inputs, the region has {inputs}")
    factor = Ranged.exact(network.divisor).reciprocal() if (network.divisor != 1).any() else Ranged.exact(np.ones(inputs))
    offset = (Ranged.exact(region.center) - Ranged.exact(network.shift)) * factor
    rows: Ranged | None = None
    layers: list[Unstable] = []
    for place, step in enumerate(network.steps):
        weight = Ranged.exact(step.weight)
        offset = weight @ offset + Ranged.exact(step.bias)
        rows = weight * factor if rows is None else weight @ rows
        if step.relu:
            rows, offset = _activated(region, layers, rows, offset, place)
    if rows is None:
        raise AssertionError("a network without steps passed its check; please report this")
    return Relaxation(region, tuple(layers), rows, offset)


def _activated(region: Region, layers: list[Unstable], rows: Ranged, offset: Ranged, place: int) -> tuple[Ranged, Ranged]:
    """relu of these neurons as rows and offsets over the signals; the unstable ones among them are new signals, added to the layers."""
    lower, upper = _smallest(region, layers, rows, offset), -_smallest(region, layers, -rows, -offset)
    if not (np.isfinite(lower) & np.isfinite(upper) & (lower <= upper)).all():
        raise ValueError(f"the inputs of the neurons of step {place} have no finite bounds on this region; its numbers are too large")
    keep, linear = np.flatnonzero((lower < 0) & (upper > 0)), lower >= 0
    layers.append(_unstable(rows[keep], offset[keep], lower[keep], upper[keep]))
    signals = rows.value.shape[1]
    value, error = np.zeros((2, len(linear), signals + len(keep)))
    value[linear, :signals], error[linear, :signals] = rows.value[linear], rows.error[linear]
    value[keep, signals + np.arange(len(keep))] = 1.0
    return Ranged(value, error), Ranged(np.where(linear, offset.value, 0.0), np.where(linear, offset.error, 0.0))


def _unstable(rows: Ranged, offset: Ranged, lower: Array, upper: Array) -> Unstable:
    """The chord is drawn through (lower, 0) with a slope that is not below `upper / (upper - lower)`, so it is above relu at both ends and between them."""
    slope = np.minimum(np.nextafter(np.nextafter(upper / np.nextafter(upper - lower, 0.0), np.inf), np.inf), 1.0)
    return Unstable(rows, offset, lower, upper, slope)


def _smallest(region: Region, layers: Sequence[Unstable], rows: Ranged, offset: Ranged) -> Array:
    """Backwards through the layers: `a >= relu's line`, of slope 0 or 1, where the coefficient is positive, and `a <= slope (v - lower)` where it is not."""
    for layer in reversed(layers):
        before = layer.rows.value.shape[1]
        mine, rows = rows[:, before:], rows[:, :before]
        above, below = np.maximum(mine.value, 0.0), np.minimum(mine.value, 0.0)
        unsure = mine.error @ layer.upper * (1 + gamma(len(layer.upper) + 8))  # a lies in [0, upper]
        chord = Ranged.exact(below) * Ranged.exact(layer.slope)
        lines = Ranged.exact(above * (layer.upper > -layer.lower)) + chord
        offset = offset + lines @ layer.offset - chord @ Ranged.exact(layer.lower) - Ranged(np.zeros_like(unsure), unsure * _UP + 2.0**-1000)
        rows = rows + lines @ layer.rows
    return np.nextafter(offset.low - region.largest(-rows), -np.inf)


def all_rows(layers: Sequence[Unstable], inputs: int) -> tuple[Ranged, Ranged]:
    """The rows of all layers over all signals, (U, inputs + U), and their offsets."""
    signals = inputs + sum(len(layer.lower) for layer in layers)
    wide = []
    for layer in layers:
        missing = np.zeros((len(layer.lower), signals - layer.rows.value.shape[1]))
        wide.append(concatenate([layer.rows, Ranged.exact(missing)], axis=1))
    empty = Ranged.exact(np.zeros((0, signals)))
    return concatenate([empty, *wide]), concatenate([Ranged.exact(np.zeros(0)), *(layer.offset for layer in layers)])
