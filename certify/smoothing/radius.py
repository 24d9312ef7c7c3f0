"""From bounds on the smoothed scores to a certified radius: Cohen's, the two-class form, the Lipschitz-aware one, and that of a mixed classifier.

`p_lower` bounds the smoothed score of the top class from below, `p_upper` every other one from above; where it is left out it is `1 - p_lower`. Within
the open ball of the radius the top class stays the top class. Radii are in the units of sigma, rounded down, and 0 where nothing is certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from certify.bound import Array, Bound, Everywhere
from certify.errors import CertifyError

# What is relied on, tested against mpmath in tests/test_smoothing_radius.py: the error of scipy.special.ndtri is smaller than this, relative to
# max(1, |z|) (measured: 4e-16), and so is the relative error of ndtr and of the mean of Phi below (measured: 9e-15, 3e-14).
SLACK = 1e-12
_LEAST = 1e-9  # below this p_lower is not worth a ramp
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)


def check_sigma(sigma: float, name: str = "sigma") -> None:
    """Raises CertifyError unless it is a positive number with which no radius overflows, and none loses digits next to 0."""
    if not 1e-200 <= sigma <= 1e200:
        raise CertifyError(f"{name} is a positive, finite number, from 1e-200 to 1e200, got {sigma}")


def probabilities(p_lower: ArrayLike, p_upper: ArrayLike | None) -> tuple[Array, Array]:
    """Both as arrays strictly between 0 and 1; what is moved there (0 and 1) can only lower a radius. Raises CertifyError for what is not in [0, 1]."""
    low = np.asarray(p_lower, dtype=np.float64)
    high = np.nextafter(1 - low, 2) if p_upper is None else np.asarray(p_upper, dtype=np.float64)
    if not ((low >= 0) & (low <= 1) & (high >= 0)).all() or (p_upper is not None and not (high <= 1).all()):
        raise CertifyError(f"bounds on probabilities lie in [0, 1], got {low} and {high}")
    least = np.finfo(np.float64).tiny
    return np.clip(low, least, np.nextafter(1, 0)), np.clip(high, least, np.nextafter(1, 0))


def normal_quantile(p: Array) -> Array:
    """Phi^-1(p), rounded down."""
    z = np.where(p > 0.5, -special.ndtri(np.where(p > 0.5, 1 - p, 0.5)), special.ndtri(np.minimum(p, 0.5)))  # 1 - p is exact for p >= 1/2
    return np.asarray(z - SLACK * np.maximum(1.0, np.abs(z)))


def gaussian(p_lower: ArrayLike, sigma: float, p_upper: ArrayLike | None = None) -> Array:
    """`sigma/2 (Phi^-1(p_lower) - Phi^-1(p_upper))` in l2, for N(0, sigma^2 I) (Cohen, Rosenfeld & Kolter 2019, theorem 1).

    Without p_upper, `sigma Phi^-1(p_lower)`. Tight: some classifier with these scores changes its prediction just outside.
    """
    check_sigma(sigma)
    low, high = probabilities(p_lower, p_upper)
    if p_upper is None:
        return _positive(sigma * normal_quantile(low))
    return _positive(sigma / 2 * (normal_quantile(low) + _minus_quantile(high)))


def _minus_quantile(p: Array) -> Array:
    """-Phi^-1(p), rounded down."""
    z = normal_quantile(p)
    return np.asarray(-z - 3 * SLACK * np.maximum(1.0, np.abs(z)))


def lipschitz_aware(p_lower: ArrayLike, sigma: float, lipschitz: Bound, p_upper: ArrayLike | None = None) -> Array:
    """`(c(p_lower) - c(p_upper)) / 2` in l2, for N(0, sigma^2 I) and base scores in [0, 1] that are each L-Lipschitz in l2, L = `lipschitz.value`.

    Of all such scores with mean p, the one that falls fastest along a direction is the ramp that is 1 up to c and 0 from c + 1/L on: m(c) = mean of
    Phi(t / sigma) over t in [c, c + 1/L], and c(p) is the root of m(c) = p. After a shift by r its mean is m(c - r), and all others have at least that.
    c(1 - p) = -c(p) - 1/L. L to infinity gives Cohen's radius, sigma to 0 gives (p_lower - p_upper) / 2L. The radius is the larger of this and Cohen's.
    Raises TypeError for what is not a proved Bound, CertifyError for one that is not of an l2 input, or does not hold everywhere (the noise goes everywhere).
    """
    cohen = gaussian(p_lower, sigma, p_upper)
    low, high = probabilities(p_lower, p_upper)
    inverse = 1 / slope(lipschitz)
    if not inverse / sigma > 1e-9:  # a ramp this steep is a step
        return cohen
    top = _ramp(1 - np.maximum(low, _LEAST), sigma, inverse)
    aware = top + inverse / 2 if p_upper is None else (top + _ramp(high, sigma, inverse) + inverse) / 2
    return np.where(low > _LEAST, np.maximum(cohen, _positive(aware - 4e-16 * (np.abs(aware) + 2 * inverse))), cohen)


def slope(lipschitz: Bound) -> float:
    """The Lipschitz constant of each score, from a Bound from l2 to any norm; positive."""
    if not isinstance(lipschitz, Bound):
        raise TypeError(f"a Lipschitz-aware radius needs a proved Bound, got {type(lipschitz).__name__}; an estimate cannot certify anything")
    if lipschitz.norm[0] != 2 or not isinstance(lipschitz.domain, Everywhere):
        raise CertifyError(f"a Lipschitz-aware radius needs a bound from l2 that holds everywhere, got {lipschitz.norm} on {lipschitz.domain}")
    return max(lipschitz.value, 1e-9)


def _ramp(tail: Array, sigma: float, inverse: float) -> Array:
    """c(1 - tail), rounded down: the mean of Phi(-t / sigma) over [c, c + 1/L] is at least `tail`. It lies between those of the two ends, hence the bracket."""
    z = _minus_quantile(tail)
    low, high = z - inverse / sigma - 1e-9, z + 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        valid = _mean_tail(middle, inverse / sigma) >= tail * (1 + 2 * SLACK)
        low, high = np.where(valid, middle, low), np.where(valid, high, middle)
    return np.asarray(sigma * low - 4e-16 * sigma * np.abs(low))


def _mean_tail(c: Array, width: float) -> Array:
    """The mean of Phi(-t) over [c, c + width]: by Gauss-Legendre quadrature on the first 4, in closed form beyond."""
    near = min(width, 4.0)
    t = c[..., None] + near * (1 + _NODES) / 2
    inner = near / 2 * (special.ndtr(-t) @ _WEIGHTS)
    outer = _tail_integral(c + near) - _tail_integral(c + width) if width > near else 0.0
    return np.asarray((inner + outer) / width)


def _tail_integral(t: Array) -> Array:
    """The integral of Phi(-s) from t to infinity, `phi(t) - t Phi(-t)`."""
    return np.asarray(np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi) - t * special.ndtr(-t))


def mixed(p_lower: ArrayLike, sigma: float, weight: float, p_upper: ArrayLike | None = None) -> Array:
    """The l2 radius of `(1 - weight) g + weight h`: g any scores in [0, 1], h Gaussian-smoothed ones with these bounds (adaptive smoothing, Bai et al. 2024).

    g can be against the top class by 1 - weight, no more, so the mixture keeps it while `h_y - h_i > (1 - weight) / weight`: for r below the root of
    `Phi(Phi^-1(p_lower) - r/sigma) - Phi(Phi^-1(p_upper) + r/sigma) = (1 - weight) / weight`, which is
    `sigma (Phi^-1(p_lower) - Phi^-1(1 / (2 weight)))` for p_upper = 1 - p_lower. The paper's form, sigma/2 (Phi^-1(weight p_lower) -
    Phi^-1(weight p_upper + 1 - weight)), is never larger: it bounds weight f, a score in [0, weight], as if it could reach 1. Where the weight depends on the
    input, give the least it can be.
    Raises CertifyError for a weight outside (1/2, 1]: at 1/2 and below nothing can be certified.
    """
    check_sigma(sigma)
    if not 0.5 < weight <= 1:
        raise CertifyError(f"a mixture is certified through h alone, whose weight must lie in (1/2, 1], got {weight}")
    low, high = probabilities(p_lower, p_upper)
    top, rival = normal_quantile(low), _minus_quantile(high)
    need = (1 - weight) / weight * (1 + 4e-16) + 4 * SLACK
    keeps = largest(lambda t: special.ndtr(top - t) - special.ndtr(t - rival) >= need, np.maximum((top + rival) / 2, 0.0))
    return _positive(sigma * keeps)


def largest(holds: Callable[[Array], NDArray[np.bool_]], limit: Array) -> Array:
    """The largest t in [0, limit] for which a condition holds that fails from some point on; 0 where it never does."""
    inside, outside = np.zeros(np.shape(limit)), limit
    for _ in range(60):
        middle = (inside + outside) / 2
        valid = holds(middle)
        inside, outside = np.where(valid, middle, inside), np.where(valid, outside, middle)
    return inside


def _positive(radius: Array) -> Array:
    """0 in place of negative numbers; one step down for the last product."""
    return np.maximum(np.nextafter(radius, -np.inf), 0.0)
