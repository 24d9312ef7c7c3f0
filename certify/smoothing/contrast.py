"""Contrast and brightness at once: how likely the worst set of parameters becomes under an attack, exactly, and under every attack of a box.

The copy e^k' (x + b') of an attacked input e^k (x + b) is e^(k' + k) (x + b + e^-k b'). So an attack moves U = k' / sigma and V = b' / tau, two independent
standard normal numbers, to U ~ N(k / sigma, 1) and V ~ N(b / tau, e^-2k). Of all sets that have chance q without the attack, the one that has most with it is
where the ratio of both densities is above some lambda (Neyman & Pearson 1933). With far = |k| / sigma (U mirrored for k < 0), m = e^k, shift = |b| / tau, it is

    U > g(V),  g(v) = c + rise v^2 - slope v,  rise = (m^2 - 1) / (2 far),  slope = m^2 shift / far,

and its chances are the integrals of phi(z) Phi(-g(z)) without the attack and of phi(z) Phi(far - g(shift + z / m)) with it. Whatever c is, a set of chance q
has at most `P(set of c) + lambda (q - P_0(set of c))` under the attack, so c only needs to be nearly right. The worst attack of a box has

- the largest |b|: for each U, the set that is best against a shift is an interval of V around m^2 shift / (m^2 - 1) for m > 1, and all but one around
  -m^2 shift / (1 - m^2) for m < 1. A larger shift, up to that centre, makes this very set more likely.
- the largest far, for given m: U -> rho U + sqrt(1 - rho^2) N(0, 1) brings a larger one to a smaller one, leaves all else as it is, and lets no set gain
  (Blackwell 1953). So a far that is too large is safe.
- any k. The chance of a set is smooth in k: its second derivative is an integral over the set, of the density times a function h of mean 0,
  `(Z^2 - 1) / sigma^2 + 2 Z (1 - W^2) / sigma + W^4 - 4 W^2 + 1` for Z, W normal, so at least -sqrt(E h^2) / 2 = -sqrt(1 / (2 sigma^4) + 2 / sigma^2 + 8).
  The largest chance of all sets bends no more than that above its chord between two contrasts, so its values at some contrasts bound all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from scipy import special

from certify.bound import Array

LEAST = 1e-10  # chances below count as this
LARGEST = 3.0  # contrast of a box; more than noise allows, for e^-3 leaves sets of chance LEAST more than half
_ROUNDING = 1e-10  # more than the relative error of a sum of chances below: of ndtr (SLACK), of its arguments (up to 1e4 in size), and of the sum
_ENDS = np.array([-1.0, 1.0])
_ALL = -np.cos(np.linspace(0, math.pi, 19))  # closer towards the ends, where the worst contrasts mostly are


@dataclasses.dataclass(frozen=True)
class Box:
    """All attacks |k| <= contrast, |b| <= shift tau, under noise in k of this sigma."""

    contrast: float
    sigma: float
    shift: float


@dataclasses.dataclass(frozen=True)
class Boxes:
    """A box for each t: |b| <= t, and |k| <= contrast or, where there is none, |k| <= t."""

    sigma: float
    tau: float
    contrast: float | None = None

    def __call__(self, t: float) -> Box:
        return Box(t if self.contrast is None else self.contrast, self.sigma, t / self.tau)

    def limit(self, z: float) -> float:
        """No t above it is certified where z is the distance that a shift alone may have, in standard deviations."""
        largest = self.tau * z if self.contrast is not None else min(self.sigma * z, self.tau * z, LARGEST)
        return largest * (1 + 1e-9)


def gained(
    chances: Array,  # (Q,)
    contrasts: Array,  # (K,)
    far: Array,  # (K,), at least |k| / sigma
    shift: float,
) -> Array:  # (Q, K)
    """The most chance that sets of these chances can have after an attack by this shift and each contrast, rounded up."""
    q, m = np.maximum(chances, LEAST)[:, None], np.exp(contrasts)[None]
    widest = np.maximum(m**2, 1 / m**2)
    far = np.maximum.reduce([far[None], (widest - 1) / 32, widest * shift / 64, np.full_like(m, 1e-9)])  # rise and slope: larger ones take too many points
    z, weight, error = _points(float(((widest - 1) / (2 * far)).max()), float((widest * shift / far).max()), float(q.min()))
    rise, slope = (m**2 - 1) / (2 * far), m**2 * shift / far
    c, before = _level(q, rise, slope, z, weight)
    v = shift + z / m[..., None]
    after = special.ndtr(far[..., None] - c[..., None] - rise[..., None] * v**2 + slope[..., None] * v) @ weight
    ratio = np.exp(far * c - far**2 / 2 - (m * shift) ** 2 / 2) * m  # lambda
    found = after * (1 + _ROUNDING) + error + ratio * (q - before * (1 - _ROUNDING) + error)
    return np.where(found >= q, found, np.inf)  # less, or nan, is out of the range of the numbers


def _points(rise: float, slope: float, least: float) -> tuple[Array, Array, float]:
    """Points and weights for the integral of phi(z) Phi(A z^2 + B z + C) over z, |A| <= rise and |B| <= slope, and more than the error that they leave.

    Where 4 a^2 A^2 < 1 it is analytic for |Im z| < a, and |Phi(x + iy)| <= e^(y^2 / 2), so on every line there its modulus integrates to at most
    N = e^(a^2/2 + a^2 B^2 / 2(1 - 4 a^2 A^2)) / sqrt(1 - 4 a^2 A^2), and the trapezoidal rule in steps of h is wrong by at most 2 N / (e^(2 pi a / h) - 1)
    (Trefethen & Weideman 2014, theorem 5.1). Here a |A| <= 0.35, and h makes that less than e^-digits. So is what lies outside of the points.
    """
    digits, square = 27 - math.log(least), 1 + 2 * slope**2  # e^-27, beside the least chance
    a = min(0.35 / max(rise, 1e-9), 7 / math.sqrt(square))
    step = 2 * math.pi * a / (digits + 2 + a**2 * square / 2)
    n = math.ceil(math.sqrt(2 * digits) / step)
    z = np.linspace(-n * step, n * step, 2 * n + 1)
    return z, step / math.sqrt(2 * math.pi) * np.exp(-(z**2) / 2), 2 * math.exp(-digits)


def _level(q: Array, rise: Array, slope: Array, z: Array, weight: Array) -> tuple[Array, Array]:
    """c such that the set has nearly the chance q, by Newton's method for Phi^-1 of it, and the chance that it has, by the sum."""
    curve, wanted = rise[..., None] * z**2 - slope[..., None] * z, special.ndtri(q)
    reach = 10 + 10 * slope  # where |U| and |V| are less than 10, all is in the set at `low`, and nothing at `high`
    low, high = -reach - 100 * np.maximum(rise, 0.0), reach + 100 * np.maximum(-rise, 0.0)
    c = -rise - np.sqrt(1 + slope**2 + 2 * rise**2) * wanted
    for _ in range(30):
        g = c[..., None] + curve
        chance = special.ndtr(-g) @ weight
        found = special.ndtri(np.clip(chance, 1e-300, 1 - 1e-16))
        rough = np.abs(found - wanted) * (1 + np.abs(wanted)) >= 1e-8  # its square is what the bound loses
        if not rough.any():
            break
        low, high = np.where(found > wanted, c, low), np.where(found > wanted, high, c)
        with np.errstate(all="ignore"):
            newton = c + (found - wanted) * np.exp(-(found**2) / 2) / (np.exp(-(g**2) / 2) @ weight)
        c = np.where(rough, np.where((low < newton) & (newton < high), newton, (low + high) / 2), c)
    return c, special.ndtr(-c[..., None] - curve) @ weight


def _sums(chances: Array, box: Box, parts: Array) -> Array:
    """What all but the top class and what a rival can have at most, together, at these parts of the contrast of the box."""
    far = box.contrast * np.maximum(np.abs(parts), 0.5) / box.sigma  # small ones take many points
    return np.asarray(gained(chances, box.contrast * parts, far, box.shift).sum(axis=0) * (2 / len(chances)))


def worst(chances: Array, box: Box) -> float:
    """More than the sum of both at every contrast of the box: by the chords between some, and how far it bends above them."""
    found, steps = _sums(chances, box, _ALL), np.diff(box.contrast * _ALL)
    left, right, bend = found[:-1], found[1:], (1 + 1e-9) * np.sqrt((steps / box.sigma) ** 4 / 2 + 2 * (steps**2 / box.sigma) ** 2 + 8 * steps**4) + 1e-300
    within = (left + right) / 2 + bend / 4 + (right - left) ** 2 / (4 * bend)
    return float(np.where(np.abs(right - left) < bend, within, np.maximum(left, right)).max())


@functools.lru_cache(maxsize=1 << 14)
def largest_box(
    chances: tuple[float, ...],  # of all but the top class, and of a rival; one number where that is the same
    boxes: Boxes,
) -> float:
    """The largest t whose box is certified, both at the ends of its contrasts and then throughout; 0 where none is found."""
    q = np.array(chances)
    z = -float(special.ndtri(np.maximum(q, LEAST)).mean())
    if not z > 0 or (boxes.contrast or 0.0) > LARGEST:
        return 0.0
    found = _edge(lambda t: float(_sums(q, boxes(t), _ENDS).max()), boxes.limit(z)) * (1 - 1e-10)
    return found if worst(q, boxes(found)) < 1 else _edge(lambda t: worst(q, boxes(t)), found)


def _edge(total: Callable[[float], float], high: float) -> float:
    """The largest t found in [0, high] where a sum that grows is below 1, or 0; by false position in Phi^-1 of its half (the Illinois method)."""

    def excess(t: float) -> float:
        return float(special.ndtri(min(total(t) / 2, 1 - 1e-16)))

    low, below, above, side = 0.0, excess(0.0), excess(high), 0
    if not below < 0:
        return 0.0
    if above < 0:
        return high
    for step in range(100):
        if high - low <= 1e-11 * high:
            break
        guess = (low * above - high * below) / (above - below) if step % 4 < 3 else (low + high) / 2  # rounding may have made both ends useless
        t = min(max(guess, low + 2e-12 * high), high - 2e-12 * high)
        if (value := excess(t)) < 0:
            low, below, above, side = t, value, above / (2 if side < 0 else 1), -1
        else:
            high, above, below, side = t, value, below / (2 if side > 0 else 1), 1
    return low
