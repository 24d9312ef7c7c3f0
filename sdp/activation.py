"""Scalar activations: the range of their slopes, everywhere and between two inputs, and the range of their values.

Ranges of slopes hold every difference quotient of two inputs in the interval (by the mean value theorem, the derivatives there). What is computed is rounded
outward by more than the rounding of the functions of numpy and scipy; intervals may be infinite.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
Function = Callable[[Array], Array]
_OUT = 1e-9  # outward, relative to 1 and to the value; far above the errors of tanh, exp, erf


class Activation(abc.ABC):
    """One function of one number; a value."""

    @abc.abstractmethod
    def slopes(self, low: Array, high: Array) -> tuple[Array, Array]:
        """The smallest and the largest difference quotient between inputs in `[low, high]`. Equal only where the function is affine there."""

    @abc.abstractmethod
    def image(self, low: Array, high: Array) -> tuple[Array, Array]:
        """A range that holds the values."""

    def curvatures(self, low: Array, high: Array) -> tuple[Array, Array]:
        """A range that holds the difference quotients of the derivative; everything, where there may be none."""
        return np.full_like(low, -np.inf), np.full_like(low, np.inf)

    def intercept(self, low: Array, high: Array) -> Array:
        """`phi(v) - slope v` where the function is affine on `[low, high]`; exact."""
        return np.zeros_like(low)

    @property
    def range(self) -> tuple[float, float]:
        """The slopes everywhere."""
        lower, upper = self.slopes(np.array([-np.inf]), np.array([np.inf]))
        return float(lower[0]), float(upper[0])

    @property
    def text(self) -> str:
        """What a proof calls it, so that `sdp.check` knows its slopes by itself; without a name of its own, any function with these slopes."""
        return "slopes({!r},{!r})".format(*self.range)


@dataclasses.dataclass(frozen=True)
class PiecewiseLinear(Activation):
    """Continuous, with slope `slopes_of[k]` between `knots[k - 1]` and `knots[k]`, and value `at` at the first knot. Intercepts must be exact in float64."""

    knots: tuple[float, ...]
    slopes_of: tuple[float, ...]
    intercepts: tuple[float, ...]
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if not len(self.slopes_of) == len(self.intercepts) == len(self.knots) + 1 or not all(map(math.isfinite, (*self.slopes_of, *self.intercepts))):
            raise ValueError(f"{len(self.knots)} knots need {len(self.knots) + 1} finite slopes and intercepts, got {self.slopes_of} and {self.intercepts}")

    @property
    def text(self) -> str:
        return self.name or super().text

    def _pieces(self, low: Array, high: Array) -> list[Array]:
        """Whether an interval meets each piece in more than a point, or lies in it."""
        edges = (-math.inf, *self.knots, math.inf)
        inside = [(low < b) & (high > a) for a, b in itertools.pairwise(edges)]
        point = low == high
        home = np.searchsorted(np.array(self.knots), low)
        return [np.where(point, home == k, part) for k, part in enumerate(inside)]

    def slopes(self, low: Array, high: Array) -> tuple[Array, Array]:
        pieces = list(zip(self._pieces(low, high), self.slopes_of, strict=True))
        lower = np.min([np.where(part, slope, np.inf) for part, slope in pieces], axis=0)
        upper = np.max([np.where(part, slope, -np.inf) for part, slope in pieces], axis=0)
        return np.asarray(lower), np.asarray(upper)

    def intercept(self, low: Array, high: Array) -> Array:
        found = np.zeros_like(low)
        for part, value in zip(self._pieces(low, high), self.intercepts, strict=True):
            found[part] = value
        return found

    def image(self, low: Array, high: Array) -> tuple[Array, Array]:
        ends = [_outward(*(2 * [self._value(point)])) for point in (low, high)]
        within = [
            (np.where((low < knot) & (knot < high), value, np.inf), np.where((low < knot) & (knot < high), value, -np.inf))
            for knot, value in ((knot, float(self._value(np.array([knot]))[0])) for knot in self.knots)
        ]
        lower = np.min([ends[0][0], ends[1][0], *(a for a, _ in within)], axis=0)
        upper = np.max([ends[0][1], ends[1][1], *(b for _, b in within)], axis=0)
        return _outward(lower, upper)

    def _value(self, v: Array) -> Array:
        k = np.searchsorted(np.array(self.knots), v)
        slope, intercept = np.array(self.slopes_of)[k], np.array(self.intercepts)[k]
        with np.errstate(invalid="ignore"):
            return np.where(slope == 0, intercept, slope * v + intercept)


RELU = PiecewiseLinear((0.0,), (0.0, 1.0), (0.0, 0.0), "relu")
ABS = PiecewiseLinear((0.0,), (-1.0, 1.0), (0.0, 0.0), "abs")


def leaky_relu(slope: float) -> PiecewiseLinear:
    """`max(v, 0) + slope min(v, 0)`."""
    return PiecewiseLinear((0.0,), (slope, 1.0), (0.0, 0.0), f"leaky_relu({float(slope)!r})")


def clamp(low: float, high: float) -> PiecewiseLinear:
    """`min(max(v, low), high)`: ReLU6, hardtanh."""
    return PiecewiseLinear((low, high), (0.0, 1.0, 0.0), (low, 0.0, high), f"clamp({float(low)!r},{float(high)!r})")


@dataclasses.dataclass(frozen=True)
class Smooth(Activation):
    """A function by name, with the points where its derivative, and its value, turn."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in _SMOOTH:
            raise ValueError(f"known smooth activations are {sorted(_SMOOTH)}, got {self.name!r}")

    @property
    def text(self) -> str:
        return self.name

    def slopes(self, low: Array, high: Array) -> tuple[Array, Array]:
        lower, upper = _extremes(*_SMOOTH[self.name].slope, low, high)
        least, most = _SMOOTH[self.name].range
        return np.maximum(lower, least), np.minimum(upper, most)

    def curvatures(self, low: Array, high: Array) -> tuple[Array, Array]:
        return _extremes(*_SMOOTH[self.name].curvature, low, high)

    def image(self, low: Array, high: Array) -> tuple[Array, Array]:
        return _extremes(*_SMOOTH[self.name].value, low, high)


def _extremes(function: Function, turns: tuple[float, ...], low: Array, high: Array) -> tuple[Array, Array]:
    """Over `[low, high]` of a function that is monotone between its turns, outward."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = [function(low), function(high)]
    lower, upper = np.minimum(*values), np.maximum(*values)
    for turn in turns:
        value, met = function(np.array([turn]))[0], (low <= turn + 1e-6) & (turn - 1e-6 <= high)
        lower, upper = np.where(met, np.minimum(lower, value), lower), np.where(met, np.maximum(upper, value), upper)
    return _outward(lower, upper)


def _outward(lower: Array, upper: Array) -> tuple[Array, Array]:
    room = [np.where(np.isfinite(end), _OUT * (1 + np.abs(end)), 0.0) for end in (lower, upper)]
    return lower - room[0], upper + room[1]


def _at_infinity(function: Function, left: float, right: float) -> Function:
    """The function with its limits (its growth, where it has none) at the infinities."""

    def extended(v: Array) -> Array:
        finite = np.where(np.isfinite(v), v, 0.0)
        return np.where(v == -np.inf, left, np.where(v == np.inf, right, function(finite)))

    return extended


def _silu_slope(v: Array) -> Array:
    s = special.expit(v)
    return np.asarray(s * (1 + v * (1 - s)))


def _gelu_slope(v: Array) -> Array:
    return np.asarray(special.ndtr(v) + v * np.exp(-v * v / 2) / math.sqrt(2 * math.pi))


def _logistic_slope(v: Array) -> Array:
    return np.asarray(special.expit(v) * special.expit(-v))


def _silu_curvature(v: Array) -> Array:
    return np.asarray(_logistic_slope(v) * (2 + v * (special.expit(-v) - special.expit(v))))


def _gelu_curvature(v: Array) -> Array:
    v = np.clip(v, -50, 50)
    return np.asarray((2 - v * v) * np.exp(-v * v / 2) / math.sqrt(2 * math.pi))


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A function, its derivative and its second derivative, each with the points where it turns; and the slopes everywhere, rounded outward."""

    value: tuple[Function, tuple[float, ...]]
    slope: tuple[Function, tuple[float, ...]]
    curvature: tuple[Function, tuple[float, ...]]
    range: tuple[float, float]


_SMOOTH = {
    "tanh": _Curve(
        (_at_infinity(np.tanh, -1.0, 1.0), ()),
        (_at_infinity(lambda v: 1 / np.cosh(np.clip(v, -350, 350)) ** 2, 0.0, 0.0), (0.0,)),
        (_at_infinity(lambda v: -2 * np.tanh(v) / np.cosh(np.clip(v, -350, 350)) ** 2, 0.0, 0.0), (-0.6584789484624084, 0.6584789484624084)),
        (0.0, 1.0),
    ),
    "sigmoid": _Curve(
        (_at_infinity(special.expit, 0.0, 1.0), ()),
        (_at_infinity(_logistic_slope, 0.0, 0.0), (0.0,)),
        (_at_infinity(lambda v: _logistic_slope(v) * (special.expit(-v) - special.expit(v)), 0.0, 0.0), (-1.3169578969248168, 1.3169578969248168)),
        (0.0, 0.25),
    ),
    "softplus": _Curve(
        (_at_infinity(lambda v: np.logaddexp(0.0, v), 0.0, math.inf), ()),
        (_at_infinity(special.expit, 0.0, 1.0), ()),
        (_at_infinity(_logistic_slope, 0.0, 0.0), (0.0,)),
        (0.0, 1.0),
    ),
    "silu": _Curve(
        (_at_infinity(lambda v: v * special.expit(v), 0.0, math.inf), (-1.2784645427610738,)),
        (_at_infinity(_silu_slope, 0.0, 1.0), (-2.3993572805154, 2.3993572805154)),
        (_at_infinity(_silu_curvature, 0.0, 0.0), (-3.4358409935351107, 0.0, 3.4358409935351107)),
        (-0.0998394, 1.0998394),  # s(x) (1 + x (1 - s(x))) at the turns
    ),
    "gelu": _Curve(
        (_at_infinity(lambda v: v * special.ndtr(v), 0.0, math.inf), (-0.7517915867,)),
        (_at_infinity(_gelu_slope, 0.0, 1.0), (-math.sqrt(2), math.sqrt(2))),
        (_at_infinity(_gelu_curvature, 0.0, 0.0), (-2.0, 0.0, 2.0)),
        (-0.1289045, 1.1289045),  # 1/2 +- (erf(1)/2 + e^-1/sqrt(pi)), at the turns
    ),
}
TANH, SIGMOID, SOFTPLUS, SILU, GELU = (Smooth(name) for name in ("tanh", "sigmoid", "softplus", "silu", "gelu"))


@dataclasses.dataclass(frozen=True)
class Sloped(Activation):
    """Any function of which only the slopes are known, the same on every interval; its values are not."""

    low: float
    high: float

    def slopes(self, low: Array, high: Array) -> tuple[Array, Array]:
        return np.full_like(low, self.low), np.full_like(low, self.high)

    def image(self, low: Array, high: Array) -> tuple[Array, Array]:
        return np.full_like(low, -np.inf), np.full_like(low, np.inf)
