"""Builds a `LureSystem` step by step: linear maps, sums, scalar nonlinearities, comparators; every rounding bounded, on a region or everywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdp.activation import RELU, Activation
from sdp.lure import LureSystem
from sdp.proof import UNIT, gamma

Array = NDArray[np.float64]
_UP = 1 + 2.0**-40  # covers the roundings in the error terms themselves


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A convex set of inputs: within `radius` of `center` in l_p, p 1, 2 or inf, entry by entry for an array of radii (a box)."""

    center: Array  # (inputs,)
    radius: float | Array
    p: float = math.inf

    def __post_init__(self) -> None:
        radius = np.asarray(self.radius, dtype=np.float64)
        if self.p not in (1, 2, math.inf) or (radius.ndim and self.p != math.inf):
            raise ValueError(
                f"a region is a ball in l1, l2 or l-infinity, or a box (p = inf and a radius for each entry), got p={self.p:g}, radius {radius.shape}"
            )
        if not (np.isfinite(self.center).all() and np.isfinite(radius).all() and (radius >= 0).all()):
            raise ValueError("a region has a finite center and finite radii that are not negative")

    def spread(self, rows: Array) -> Array:
        """The largest `|rows (x - center)|` over the region, rounded up."""
        if self.p == math.inf:
            reach = np.abs(rows) @ np.broadcast_to(np.asarray(self.radius, dtype=np.float64), self.center.shape)
        elif self.p == 2:
            reach = np.sqrt((rows * rows).sum(axis=1)) * float(self.radius)
        else:
            reach = np.abs(rows).max(axis=1, initial=0.0) * float(self.radius)
        return reach * (1 + gamma(rows.shape[1] + 8)) * _UP + 2.0**-500


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """`rows [x; a] + offset`, over the input and the first nonlinearities; each entry of both is known to within its error."""

    rows: Array  # (entries, inputs + nonlinearities so far)
    error: Array
    offset: Array  # (entries,)
    offset_error: Array

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: NDArray[np.int64] | slice) -> Signal:
        return Signal(self.rows[which], self.error[which], self.offset[which], self.offset_error[which])

    def wide(self, columns: int) -> Signal:
        """With columns of zeros for nonlinearities that came later."""
        missing = ((0, 0), (0, columns - self.rows.shape[1]))
        return self if self.rows.shape[1] == columns else Signal(np.pad(self.rows, missing), np.pad(self.error, missing), self.offset, self.offset_error)


def stacked(signals: Sequence[Signal]) -> Signal:
    """One above the other; all of the same width."""
    return Signal(*(np.concatenate([getattr(signal, field.name) for signal in signals]) for field in dataclasses.fields(Signal)))


class Wiring:
    """A network under construction. On a `region` the slopes are those between inputs in it, and nonlinearities that are affine there leave no trace."""

    def __init__(self, inputs: int, region: Region | None = None) -> None:
        if region is not None and region.center.shape != (inputs,):
            raise ValueError(f"the region has {region.center.shape} entries, the network takes {inputs}")
        self.inputs, self.region, self.count = inputs, region, 0
        self._rows: list[Signal] = []
        self._slopes: list[tuple[Array, Array]] = []
        self._image: list[tuple[Array, Array]] = []
        self.fixed = 0  # nonlinearities that were eliminated

    @property
    def width(self) -> int:
        """The signals so far."""
        return self.inputs + self.count

    def input(self) -> Signal:
        """x."""
        eye = np.eye(self.inputs)
        return Signal(eye, np.zeros_like(eye), np.zeros(self.inputs), np.zeros(self.inputs))

    def linear(
        self,
        matrix: Array,  # (entries, len(signal))
        signal: Signal,
        error: Array | None = None,  # of the matrix, entrywise
    ) -> Signal:
        """`matrix @ signal`."""
        terms = matrix.shape[1] + 4
        size = np.abs(matrix)
        if _selects(signal.rows) and not signal.error.any():
            rows, rows_error = matrix @ signal.rows, np.zeros((len(matrix), signal.rows.shape[1]))  # products with 0 and 1 only
        else:
            rows = matrix @ signal.rows
            rows_error = (gamma(terms) * (size @ np.abs(signal.rows)) + size @ signal.error * (1 + gamma(terms))) * _UP
            rows_error[rows_error > 0] += 2.0**-1000
        offset = matrix @ signal.offset
        offset_error = (gamma(terms) * (size @ np.abs(signal.offset)) + size @ signal.offset_error * (1 + gamma(terms))) * _UP
        if error is not None and error.any():
            rows_error = rows_error + error @ (np.abs(signal.rows) + signal.error) * (1 + gamma(terms)) * _UP
            offset_error = offset_error + error @ (np.abs(signal.offset) + signal.offset_error) * (1 + gamma(terms)) * _UP
        return Signal(rows, rows_error, offset, offset_error)

    def shift(self, signal: Signal, offset: Array) -> Signal:
        """`signal + offset`."""
        total = signal.offset + offset
        return dataclasses.replace(signal, offset=total, offset_error=(signal.offset_error + UNIT * np.abs(total)) * _UP)

    def scale(self, signal: Signal, factor: Array | float, error: Array | float = 0.0) -> Signal:
        """`factor * signal`, entry by entry, the factor known to within an error."""
        factors = np.broadcast_to(np.asarray(factor, dtype=np.float64), (len(signal),))
        errors = np.broadcast_to(np.asarray(error, dtype=np.float64), (len(signal),))
        rounding = np.where(np.abs(np.frexp(factors)[0]) == 0.5, 0.0, UNIT) * (factors != 0)  # a power of two is exact

        def scaled(value: Array, known: Array) -> tuple[Array, Array]:
            f, e, u = (part.reshape(-1, *([1] * (value.ndim - 1))) for part in (factors, errors, rounding))
            made = f * value
            return made, (np.abs(f) * known + e * (np.abs(value) + known) + u * np.abs(made)) * _UP

        return Signal(*scaled(signal.rows, signal.error), *scaled(signal.offset, signal.offset_error))

    def add(self, first: Signal, second: Signal) -> Signal:
        """`first + second`."""
        a, b = first.wide(self.width), second.wide(self.width)
        rows, offset = a.rows + b.rows, a.offset + b.offset
        rounding = np.where((a.rows != 0) & (b.rows != 0), UNIT, 0.0) * np.abs(rows)
        error = a.error + b.error + rounding
        return Signal(rows, error * _UP, offset, (a.offset_error + b.offset_error + UNIT * np.abs(offset)) * _UP)

    def nonlinear(self, signal: Signal, activation: Activation) -> Signal:
        """`activation(signal)`, a new nonlinearity for each entry; those whose slope is one number are affine, and stay in the maps."""
        low, high = self.interval(signal) if self.region is not None else (np.full(len(signal), -np.inf), np.full(len(signal), np.inf))
        lower, upper = activation.slopes(low, high)
        affine = lower == upper
        self.fixed += int(affine.sum())
        kept = self.scale(signal, np.where(affine, lower, 0.0)).wide(self.width + int((~affine).sum()))
        kept = self.shift(kept, np.where(affine, activation.intercept(low, high), 0.0))
        bends = np.flatnonzero(~affine)
        if len(bends):
            self._rows.append(signal[bends])
            self._slopes.append((lower[bends], upper[bends]))
            image = activation.image(low[bends], high[bends])
            self._image.append((image[0], image[1]))
            kept.rows[bends, self.width + np.arange(len(bends))] = 1.0
            self.count += len(bends)
        return kept

    def sort(self, signal: Signal, first: NDArray[np.int64], second: NDArray[np.int64]) -> Signal:
        """The larger of each pair (first, second) of entries at its first place, the smaller at its second: one ReLU of the difference each.

        `max = z_j + relu(z_i - z_j)`, `min = z_i - relu(z_i - z_j)`: the sum of a pair passes linearly, so the certificate knows that sorting keeps it.
        """
        z_i, z_j = signal[first], signal[second]
        bent = self.nonlinear(self.add(z_i, self.scale(z_j, -1.0)), RELU)
        whole = signal.wide(self.width)
        made = Signal(whole.rows.copy(), whole.error.copy(), whole.offset.copy(), whole.offset_error.copy())
        for where, value in ((first, self.add(z_j, bent)), (second, self.add(z_i, self.scale(bent, -1.0)))):
            made.rows[where], made.error[where] = value.rows, value.error
            made.offset[where], made.offset_error[where] = value.offset, value.offset_error
        return made

    def largest(self, signal: Signal, groups: NDArray[np.int64]) -> Signal:  # (outputs, members) indices; entries of a group may repeat
        """The largest entry of each group: a tournament of comparators."""
        best = signal[groups[:, 0]]
        for k in range(1, groups.shape[1]):
            other = signal[groups[:, k]]
            bent = self.nonlinear(self.add(best, self.scale(other, -1.0)), RELU)
            best = self.add(other, bent)
        return best

    def interval(self, signal: Signal) -> tuple[Array, Array]:
        """A range of each entry over the region, rounded outward."""
        if self.region is None:
            raise ValueError("intervals are known on a region only")
        n = self.inputs
        x, a = signal.rows[:, :n], signal.rows[:, n:]
        columns = a.shape[1]
        low, high = (np.concatenate([np.zeros(0), *(image[end] for image in self._image)])[:columns] for end in (0, 1))
        center, terms = self.region.center, n + columns + 8
        reach = np.abs(center) + np.broadcast_to(np.asarray(self.region.radius, dtype=np.float64), center.shape)
        middle = x @ center + signal.offset
        slack = gamma(terms) * (np.abs(x) @ np.abs(center) + np.abs(signal.offset)) + signal.offset_error + signal.error[:, :n] @ reach
        spread = self.region.spread(x) + slack
        with np.errstate(invalid="ignore"):
            positive, negative = np.maximum(a, 0.0), np.minimum(a, 0.0)
            parts = [_times(positive, low) + _times(negative, high), _times(positive, high) + _times(negative, low)]
            largest = np.maximum(np.abs(low), np.abs(high))
            rounding = gamma(terms) * _times(np.abs(a), largest) + _times(signal.error[:, n:], largest)
        around = (np.abs(middle) + spread) * gamma(8)
        lower = middle - spread + parts[0] - (rounding + around + np.abs(parts[0]) * gamma(8)) * _UP
        upper = middle + spread + parts[1] + (rounding + around + np.abs(parts[1]) * gamma(8)) * _UP
        bad = np.isnan(lower) | np.isnan(upper)
        return np.where(bad, -np.inf, lower), np.where(bad, np.inf, upper)

    def system(self, output: Signal) -> LureSystem:
        """The network whose output that signal is."""
        rows = [part.wide(self.width) for part in self._rows]
        whole = stacked(rows) if rows else self.input()[:0].wide(self.width)
        out = output.wide(self.width)
        lower, upper = (np.concatenate([np.zeros(0), *(slopes[end] for slopes in self._slopes)]) for end in (0, 1))
        return LureSystem(
            self.inputs,
            whole.rows,
            lower,
            upper,
            out.rows,
            whole.error if whole.error.any() else None,
            out.error if out.error.any() else None,
        )


def _selects(rows: Array) -> bool:
    """Whether products with these rows are exact: entries 0 and 1, at most one in each column."""
    return bool(((rows == 0) | (rows == 1)).all() and (np.count_nonzero(rows, axis=0) <= 1).all())


def _times(matrix: Array, vector: Array) -> Array:
    """`matrix @ vector` for vectors with infinite entries, 0 times infinity being 0."""
    infinite = np.isinf(vector)
    if not infinite.any():
        return np.asarray(matrix @ vector)
    finite = matrix @ np.where(infinite, 0.0, vector)
    for column in np.flatnonzero(infinite):
        finite = finite + np.where(matrix[:, column] == 0, 0.0, matrix[:, column] * vector[column])
    return np.asarray(finite)
