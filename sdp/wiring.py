"""Builds a `LureSystem` step by step: linear maps, sums, scalar nonlinearities, comparators; every rounding bounded, on a region or everywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sdp.activation import RELU, Activation
from sdp.lure import LureSystem
from sdp.proof import UNIT, gamma

Array = NDArray[np.float64]
Index = NDArray[np.int64]
_UP = 1 + 2.0**-40  # covers the roundings in the error terms themselves
_TINY = 2.0**-1000  # more than what underflow can take from a sum of products


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
    number: int = -1  # the step that made it

    def __len__(self) -> int:
        return len(self.rows)

    def wide(self, columns: int) -> Signal:
        """With columns of zeros for nonlinearities that came later."""
        missing = ((0, 0), (0, columns - self.rows.shape[1]))
        if self.rows.shape[1] == columns:
            return self
        return dataclasses.replace(self, rows=np.pad(self.rows, missing), error=np.pad(self.error, missing))


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What a wiring did: step number k made signal k. `numbers` are the arrays that it used."""

    what: str  # "input", "linear", "shift", "scale", "add", "pick", "join" or "nonlinear"
    of: tuple[int, ...]  # numbers of signals
    numbers: Mapping[str, Array | Index]
    name: str = ""  # of the activation, with its parameters: "leaky_relu(0.01)"


class Wiring:
    """A network under construction. On a `region` the slopes are those between inputs in it, and nonlinearities that are affine there leave no trace.

    `steps` is the record of what was done, from which the system can be built again.
    """

    def __init__(self, inputs: int, region: Region | None = None) -> None:
        if region is not None and region.center.shape != (inputs,):
            raise ValueError(f"the region has {region.center.shape} entries, the network takes {inputs}")
        self.inputs, self.region, self.count = inputs, region, 0
        self.fixed = 0  # nonlinearities that were eliminated
        self.steps: list[Step] = []
        self._rows: list[Signal] = []
        self._slopes: list[tuple[Array, Array]] = []
        self._image: list[tuple[Array, Array]] = []

    @property
    def width(self) -> int:
        """The signals so far."""
        return self.inputs + self.count

    def _made(self, signal: Signal, what: str, of: Sequence[Signal], name: str = "", **numbers: Array | Index) -> Signal:
        self.steps.append(Step(what, tuple(part.number for part in of), numbers, name))
        return dataclasses.replace(signal, number=len(self.steps) - 1)

    def input(self) -> Signal:
        """x."""
        eye, zero = np.eye(self.inputs), np.zeros(self.inputs)
        return self._made(Signal(eye, np.zeros_like(eye), zero, zero), "input", ())

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
            rows_error[(rows_error > 0) | _may_vanish(matrix, signal.rows, signal.error)] += _TINY
        offset = matrix @ signal.offset
        offset_error = (gamma(terms) * (size @ np.abs(signal.offset)) + size @ signal.offset_error * (1 + gamma(terms))) * _UP + _TINY
        if error is not None and error.any():
            rows_error = rows_error + error @ (np.abs(signal.rows) + signal.error) * (1 + gamma(terms)) * _UP
            offset_error = offset_error + error @ (np.abs(signal.offset) + signal.offset_error) * (1 + gamma(terms)) * _UP
            return self._made(Signal(rows, rows_error, offset, offset_error), "linear", [signal], matrix=matrix, error=error)
        return self._made(Signal(rows, rows_error, offset, offset_error), "linear", [signal], matrix=matrix)

    def shift(self, signal: Signal, offset: Array) -> Signal:
        """`signal + offset`."""
        total = signal.offset + offset
        moved = dataclasses.replace(signal, offset=total, offset_error=(signal.offset_error + UNIT * np.abs(total)) * _UP)
        return self._made(moved, "shift", [signal], offset=offset)

    def scale(self, signal: Signal, factor: Array | float, error: Array | float = 0.0) -> Signal:
        """`factor * signal`, entry by entry, the factor known to within an error."""
        factors, errors = (np.broadcast_to(np.asarray(part, dtype=np.float64), (len(signal),)) for part in (factor, error))
        return self._made(_scaled(signal, factors, errors), "scale", [signal], factor=factors, error=errors)

    def add(self, first: Signal, second: Signal) -> Signal:
        """`first + second`."""
        a, b = first.wide(self.width), second.wide(self.width)
        rows, offset = a.rows + b.rows, a.offset + b.offset
        rounding = np.where((a.rows != 0) & (b.rows != 0), UNIT, 0.0) * np.abs(rows)
        error, offset_error = (a.error + b.error + rounding) * _UP, (a.offset_error + b.offset_error + UNIT * np.abs(offset)) * _UP
        return self._made(Signal(rows, error, offset, offset_error), "add", [first, second])

    def subtract(self, first: Signal, second: Signal) -> Signal:
        """`first - second`."""
        return self.add(first, self.scale(second, -1.0))

    def pick(self, signal: Signal, which: Index) -> Signal:
        """Some entries, in this order, perhaps several times."""
        which = np.asarray(which, dtype=np.int64)
        parts = Signal(signal.rows[which], signal.error[which], signal.offset[which], signal.offset_error[which])
        return self._made(parts, "pick", [signal], which=which)

    def join(self, signals: Sequence[Signal]) -> Signal:
        """One above the other."""
        wide = [signal.wide(self.width) for signal in signals]
        rows, error, offset, offset_error = (np.concatenate([getattr(part, name) for part in wide]) for name in ("rows", "error", "offset", "offset_error"))
        return self._made(Signal(rows, error, offset, offset_error), "join", signals)

    def nonlinear(self, signal: Signal, activation: Activation) -> Signal:
        """`activation(signal)`, a new nonlinearity for each entry; those whose slope is one number are affine, and stay in the maps."""
        low, high = self.interval(signal) if self.region is not None else (np.full(len(signal), -np.inf), np.full(len(signal), np.inf))
        lower, upper = activation.slopes(low, high)
        intercept = np.where(lower == upper, activation.intercept(low, high), 0.0)
        affine = lower == upper
        self.fixed += int(affine.sum())
        kept = _scaled(signal, np.where(affine, lower, 0.0), np.zeros(len(signal))).wide(self.width + int((~affine).sum()))
        total = kept.offset + intercept
        kept = dataclasses.replace(kept, rows=kept.rows.copy(), offset=total, offset_error=(kept.offset_error + UNIT * np.abs(total)) * _UP)
        bends = np.flatnonzero(~affine)
        if len(bends):
            self._rows.append(Signal(signal.rows[bends], signal.error[bends], signal.offset[bends], signal.offset_error[bends]))
            self._slopes.append((lower[bends], upper[bends]))
            self._image.append(activation.image(low[bends], high[bends]))
            kept.rows[bends, self.width + np.arange(len(bends))] = 1.0
            self.count += len(bends)
        return self._made(kept, "nonlinear", [signal], activation.text, lower=lower, upper=upper, intercept=intercept)

    def sort(self, signal: Signal, first: Index, second: Index) -> Signal:
        """The larger of each pair (first, second) of entries at its first place, the smaller at its second: one ReLU of the difference each.

        `max = z_j + relu(z_i - z_j)`, `min = z_i - relu(z_i - z_j)`: the sum of a pair passes linearly, so the certificate knows that sorting keeps it.
        """
        z_i, z_j = self.pick(signal, first), self.pick(signal, second)
        bent = self.nonlinear(self.subtract(z_i, z_j), RELU)
        rest = np.setdiff1d(np.arange(len(signal)), np.concatenate([first, second]))
        joined = self.join([self.add(z_j, bent), self.subtract(z_i, bent), self.pick(signal, rest)])
        return self.pick(joined, np.argsort(np.concatenate([first, second, rest]), kind="stable"))

    def largest(self, signal: Signal, groups: Index) -> Signal:  # (outputs, members) indices; entries of a group may repeat
        """The largest entry of each group: a tournament of comparators."""
        best = self.pick(signal, groups[:, 0])
        for k in range(1, groups.shape[1]):
            other = self.pick(signal, groups[:, k])
            best = self.add(other, self.nonlinear(self.subtract(best, other), RELU))
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

    def reads(self, output: Signal) -> int:
        """How many nonlinearities and outputs read the input itself: in l2 a program of more inputs than that is one of so many (`sdp.lipsdp`)."""
        return sum(int((part.rows[:, : self.inputs] != 0).any(axis=1).sum()) for part in (*self._rows, output))

    def system(self, output: Signal) -> LureSystem:
        """The network whose output that signal is."""
        rows = [part.wide(self.width) for part in self._rows]
        whole, whole_error = (np.concatenate([np.zeros((0, self.width)), *(getattr(part, name) for part in rows)]) for name in ("rows", "error"))
        out = output.wide(self.width)
        lower, upper = (np.concatenate([np.zeros(0), *(slopes[end] for slopes in self._slopes)]) for end in (0, 1))
        return LureSystem(
            self.inputs,
            whole,
            lower,
            upper,
            out.rows,
            whole_error if whole_error.any() else None,
            out.error if out.error.any() else None,
        )


def _scaled(signal: Signal, factors: Array, errors: Array) -> Signal:
    """Each entry times its factor."""
    rounding = np.where(np.abs(np.frexp(factors)[0]) == 0.5, 0.0, UNIT) * (factors != 0)  # a power of two is exact

    def scaled(value: Array, known: Array) -> tuple[Array, Array]:
        f, e, u = (part.reshape(-1, *([1] * (value.ndim - 1))) for part in (factors, errors, rounding))
        made = f * value
        vanishes = (np.abs(made) < _TINY) & ((f != 0) | (e != 0)) & ((value != 0) | (known != 0))
        return made, (np.abs(f) * known + e * (np.abs(value) + known) + u * np.abs(made)) * _UP + np.where(vanishes, _TINY, 0.0)

    return Signal(*scaled(signal.rows, signal.error), *scaled(signal.offset, signal.offset_error))


def _may_vanish(*factors: Array) -> bool:
    """Whether products of the first with the others may be too small for float64."""
    least = [float(np.abs(part).min(where=part != 0, initial=1.0)) for part in factors]
    return least[0] * min(least[1:]) < _TINY


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
