"""The noise that a classifier is smoothed with, as a value, and the radius that it certifies.

Most are one theorem. Let the noise of one parameter have a log-concave density, F its distribution function and Q its quantile function. Of all scores in
[0, 1] with mean p, a shift by t > 0 lowers none below F(Q(p) - t): the likelihood ratio is monotone, so a half-line is the worst (Neyman & Pearson). Shifts
compose, one parameter after the other, so for independent parameters t is the l1 norm of the shift (for normal ones, by rotation, the l2 norm). The top class
with p_A and a rival with p_B keep their order while F(Q(p_A) - t) + F(Q(1 - p_B) - t) > 1; for a symmetric density, while t < (Q(p_A) - Q(p_B)) / 2. Radii are
of open balls unless said otherwise, rounded down, and 0 where nothing is certified; `p_upper` left out is 1 - p_lower.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from certify.bound import Array, Estimate
from certify.errors import CertifyError
from certify.smoothing import radius
from certify.smoothing.contrast import Boxes, largest_box
from certify.smoothing.radius import SLACK, check_sigma, largest, normal_quantile, probabilities


class Noise(abc.ABC):
    """A law of random perturbations; `radius` is what it certifies and `measure` in what."""

    measure: ClassVar[str]  # what the radius is a bound on, in words
    norm: ClassVar[float | None] = None  # p, where that is the l_p norm of what is added to the input; None for pixels and transforms

    @property
    def unit(self) -> str:
        """What results store as the norm of a radius: 1, 2 or inf for that l_p norm of what is added to the input, else the measure in words."""
        return self.measure if self.norm is None else f"{self.norm:g}"

    @abc.abstractmethod
    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        """The certified radius, from bounds on the smoothed scores of the top class and of the others. Raises CertifyError outside [0, 1]."""


def _symmetric(quantile: Callable[[Array], Array], scale: float, p_lower: ArrayLike, p_upper: ArrayLike | None) -> Array:
    """`(Q(p_lower) - Q(p_upper)) / 2`, for an odd quantile function known to SLACK relative to max(scale, |Q|)."""
    low, high = probabilities(p_lower, p_upper)
    top, rival = quantile(low), quantile(high)
    if p_upper is None:
        return np.maximum(top - SLACK * np.maximum(scale, np.abs(top)), 0.0)
    return np.maximum((top - rival) / 2 - SLACK * np.maximum(scale, np.maximum(np.abs(top), np.abs(rival))), 0.0)


@dataclasses.dataclass(frozen=True)
class Gaussian(Noise):
    """N(0, sigma^2 I): `sigma/2 (Phi^-1(p_A) - Phi^-1(p_B))` in l2 (Cohen, Rosenfeld & Kolter 2019). `sigma` in the units of the input."""

    sigma: float
    measure: ClassVar[str] = "l2 norm"
    norm: ClassVar[float | None] = 2.0

    def __post_init__(self) -> None:
        check_sigma(self.sigma)

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        return radius.gaussian(p_lower, self.sigma, p_upper)


@dataclasses.dataclass(frozen=True)
class GaussianLinf(Noise):
    """N(0, sigma^2 I) against the maximum norm, through `|d|_2 <= sqrt(dimension) |d|_inf`: the l2 radius / sqrt(dimension)."""

    sigma: float
    dimension: int
    measure: ClassVar[str] = "linf norm"
    norm: ClassVar[float | None] = math.inf

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        _check_count(self.dimension, "dimension")

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        return np.asarray(radius.gaussian(p_lower, self.sigma, p_upper) / math.sqrt(self.dimension) * (1 - 1e-15))


@dataclasses.dataclass(frozen=True)
class Laplace(Noise):
    """Independent Laplace noise of density `exp(-|z| / scale) / (2 scale)` against l1: (Q(p_A) - Q(p_B)) / 2.

    That is `-scale ln(2 (1 - p_A))` without p_B, and at least the radius of Teng, Lee & Yuan 2019, max(scale/2 ln(p_A / p_B), -scale ln(1 - p_A + p_B)).
    """

    scale: float
    measure: ClassVar[str] = "l1 norm"
    norm: ClassVar[float | None] = 1.0

    def __post_init__(self) -> None:
        check_sigma(self.scale, "scale")

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        return _symmetric(lambda p: self.scale * np.where(p > 0.5, -np.log(2 * (1 - p)), np.log(2 * p)), self.scale, p_lower, p_upper)


@dataclasses.dataclass(frozen=True)
class Uniform(Noise):
    """Independent uniform noise on [-half_width, half_width] against l1: `half_width (p_A - p_B)` (Yang et al. 2020; sigma = half_width / sqrt(3))."""

    half_width: float
    measure: ClassVar[str] = "l1 norm"
    norm: ClassVar[float | None] = 1.0

    def __post_init__(self) -> None:
        check_sigma(self.half_width, "half_width")

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        return _symmetric(lambda p: self.half_width * (2 * p - 1), self.half_width, p_lower, p_upper)


@dataclasses.dataclass(frozen=True)
class UniformLinf(Noise):
    """Uniform noise on [-half_width, half_width]^dimension against linf: `2 half_width (1 - (1 - (p_A - p_B) / 2)^(1 / dimension))` (Yang et al. 2020).

    The two laws overlap in at least (1 - r / 2 half_width)^dimension, p_A falls and p_B rises by what is left at most.
    """

    half_width: float
    dimension: int
    measure: ClassVar[str] = "linf norm"
    norm: ClassVar[float | None] = math.inf

    def __post_init__(self) -> None:
        check_sigma(self.half_width, "half_width")
        _check_count(self.dimension, "dimension")

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        low, high = probabilities(p_lower, p_upper)
        apart = np.maximum((low - high) / 2 - SLACK, 0.0)
        return np.asarray(-2 * self.half_width * np.expm1(np.log1p(-apart) / self.dimension) * (1 - 1e-14))


@dataclasses.dataclass(frozen=True)
class Ablation(Noise):
    """All but `keep` of `dimension` pixels, with all their channels, are hidden at random: the number of pixels that may change (Levine & Feizi 2020).

    The largest rho with `p_A - D > p_B + D`, D = 1 - C(dimension - rho, keep) / C(dimension, keep) the chance that a changed pixel is kept. The ball is
    closed: rho changed pixels are allowed.
    """

    keep: int
    dimension: int
    measure: ClassVar[str] = "number of changed pixels, inclusive"

    def __post_init__(self) -> None:
        _check_count(self.dimension, "dimension")
        _check_count(self.keep, "keep")
        if self.keep > self.dimension:
            raise CertifyError(f"ablation cannot keep {self.keep} of {self.dimension} pixels")

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        low, high = probabilities(p_lower, p_upper)
        changed = np.arange(self.dimension - self.keep)  # C(d - rho, k) / C(d, k): the product of 1 - k / (d - i) over i < rho
        seen = -np.expm1(np.cumsum(np.log1p(-self.keep / (self.dimension - changed)))) + 1e-9  # more than the sum's rounding
        return np.searchsorted(seen, (low - high) / 2).astype(np.float64)  # how many of the increasing `seen` are below


class Law(abc.ABC):
    """A law of one non-negative parameter by its quantile and distribution functions, with a log-concave density, also of the logarithm of the parameter."""

    scale: float

    def __post_init__(self) -> None:
        check_sigma(self.scale, "scale")

    @abc.abstractmethod
    def quantile(self, p: Array) -> Array:
        """Q(p), to a relative error below SLACK."""

    @abc.abstractmethod
    def from_above(self, q: Array) -> Array:
        """Q(1 - q), to a relative error below SLACK, for small q as well."""

    @abc.abstractmethod
    def below(self, x: Array) -> Array:
        """F(x), to a relative error below SLACK."""

    @abc.abstractmethod
    def beyond(self, x: Array) -> Array:
        """1 - F(x), to a relative error below SLACK."""


@dataclasses.dataclass(frozen=True)
class Exponential(Law):
    """The exponential law with this mean."""

    scale: float = 1.0

    def quantile(self, p: Array) -> Array:
        return -self.scale * np.log1p(-p)

    def from_above(self, q: Array) -> Array:
        return -self.scale * np.log(q)

    def below(self, x: Array) -> Array:
        return -np.expm1(-np.maximum(x, 0.0) / self.scale)

    def beyond(self, x: Array) -> Array:
        return np.exp(-np.maximum(x, 0.0) / self.scale)


@dataclasses.dataclass(frozen=True)
class UniformTo(Law):
    """The uniform law on [0, scale]."""

    scale: float = 1.0

    def quantile(self, p: Array) -> Array:
        return self.scale * p

    def from_above(self, q: Array) -> Array:
        return self.scale * (1 - q)

    def below(self, x: Array) -> Array:
        return np.clip(x / self.scale, 0.0, 1.0)

    def beyond(self, x: Array) -> Array:
        return np.clip(1 - x / self.scale, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class FoldedNormal(Law):
    """The law of |z|, z normal with mean 0 and standard deviation `scale`."""

    scale: float = 1.0

    def quantile(self, p: Array) -> Array:
        return np.asarray(math.sqrt(2) * self.scale * special.erfinv(p))

    def from_above(self, q: Array) -> Array:
        return np.asarray(math.sqrt(2) * self.scale * special.erfcinv(q))

    def below(self, x: Array) -> Array:
        return np.asarray(special.erf(np.maximum(x, 0.0) / (math.sqrt(2) * self.scale)))

    def beyond(self, x: Array) -> Array:
        return np.asarray(special.erfc(np.maximum(x, 0.0) / (math.sqrt(2) * self.scale)))


@dataclasses.dataclass(frozen=True)
class Rayleigh(Law):
    """The law of the length of two independent normal numbers with mean 0 and standard deviation `scale`."""

    scale: float = 1.0

    def quantile(self, p: Array) -> Array:
        return self.scale * np.sqrt(-2 * np.log1p(-p))

    def from_above(self, q: Array) -> Array:
        return self.scale * np.sqrt(-2 * np.log(q))

    def below(self, x: Array) -> Array:
        return -np.expm1(-((np.maximum(x, 0.0) / self.scale) ** 2) / 2)

    def beyond(self, x: Array) -> Array:
        return np.exp(-((np.maximum(x, 0.0) / self.scale) ** 2) / 2)


@dataclasses.dataclass(frozen=True)
class FourierBlur(Noise):
    """Blur by the multiplier exp(-w^2 b / 2) with circular padding, b >= 0 of this law: the variance b that may be added (TSS, Li et al. 2021).

    Blurs of variances b and c compose to one of b + c exactly, which holds for this multiplier and not for sampled, truncated kernels. The radius is
    Q(p) - Q(1/2) without p_upper: `-scale ln(2 - 2 p)` for Exponential, `scale (p - 1/2)` for UniformTo, `scale (Phi^-1((1 + p) / 2) - Phi^-1(3/4))` for
    FoldedNormal, `scale (sqrt(-2 ln(1 - p)) - sqrt(2 ln 2))` for Rayleigh.
    """

    law: Law
    measure: ClassVar[str] = "variance of the blur"

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        low, high = probabilities(p_lower, p_upper)
        top, rival = self.law.quantile(low), self.law.from_above(high)
        below = self.law.below
        return largest(lambda t: below(top - t) + below(rival - t) >= 1 + 8 * SLACK * (1 + (top + rival) / self.law.scale), np.minimum(top, rival))


@dataclasses.dataclass(frozen=True)
class _NormalParameter(Noise):
    """A transform whose parameter is normal with standard deviation `sigma`, and which composes by adding parameters."""

    sigma: float

    def __post_init__(self) -> None:
        check_sigma(self.sigma)

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        return radius.gaussian(p_lower, self.sigma, p_upper)


@dataclasses.dataclass(frozen=True)
class Brightness(_NormalParameter):
    """x + b, b normal: |b| < sigma/2 (Phi^-1(p_A) - Phi^-1(p_B)). No clipping between attack and noise."""

    measure: ClassVar[str] = "|brightness added|"


@dataclasses.dataclass(frozen=True)
class Contrast(_NormalParameter):
    """e^k x, k normal: |k| < sigma/2 (Phi^-1(p_A) - Phi^-1(p_B)). No clipping between attack and noise."""

    measure: ClassVar[str] = "|ln contrast factor|"


@dataclasses.dataclass(frozen=True)
class LogNormalGamma(_NormalParameter):
    """x^g on [0, 1], ln g normal: |ln g| < sigma/2 (Phi^-1(p_A) - Phi^-1(p_B))."""

    measure: ClassVar[str] = "|ln gamma|"


@dataclasses.dataclass(frozen=True)
class CyclicTranslation(_NormalParameter):
    """A cyclic shift by two independent normal numbers, rounded to whole pixels: whole-pixel shifts of l2 norm < sigma/2 (Phi^-1(p_A) - Phi^-1(p_B))."""

    measure: ClassVar[str] = "l2 norm of the shift, in pixels"


@dataclasses.dataclass(frozen=True)
class Gamma(Noise):
    """x^g on [0, 1], g = the attack's exponent times one of this law (Exponential or Rayleigh); the scale of the law does not matter to the certificate.

    `interval` gives the exponents that are allowed; `radius` the largest symmetric |ln g| within.
    """

    law: Law
    measure: ClassVar[str] = "|ln gamma|"

    def __post_init__(self) -> None:
        if not isinstance(self.law, Exponential | Rayleigh):
            raise CertifyError(f"gamma noise has an Exponential() or a Rayleigh() law, got {self.law!r}; LogNormalGamma is the one with a normal logarithm")

    def interval(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> tuple[Array, Array]:
        """`(least, greatest)`: every exponent strictly between them is allowed; (1, 1) where nothing is certified.

        Without p_upper, `(log2(1/p))^a` and `(log2(1/(1 - p)))^a`, a = 1 for Exponential and 1/2 for Rayleigh.
        """
        low, high = probabilities(p_lower, p_upper)
        below, beyond, quantile, from_above = self.law.below, self.law.beyond, self.law.quantile, self.law.from_above
        need, limit = 1 + 64 * SLACK, np.full(np.shape(low + high), 8.0)
        top, rival = quantile(low), from_above(high)
        up = largest(lambda t: below(top * np.exp(-t)) + below(rival * np.exp(-t)) >= need, limit)
        top, rival = from_above(low), quantile(high)
        down = largest(lambda t: beyond(top * np.exp(t)) + beyond(rival * np.exp(t)) >= need, limit)
        return np.exp(-down) * (1 + 1e-15), np.exp(up) * (1 - 1e-15)

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        least, greatest = self.interval(p_lower, p_upper)
        return np.maximum(np.minimum(np.log(greatest), -np.log(least)) - 1e-15, 0.0)


@dataclasses.dataclass(frozen=True)
class ContrastBrightness(Noise):
    """e^k (x + b), k and b normal with standard deviations `sigma` and `tau`: exactly what Neyman & Pearson's lemma allows (`certify.smoothing.contrast`).

    `brightness` is the |b| for a box of contrasts; `radius` the largest r such that |k| <= r and |b| <= r are allowed together. Neither is below that of
    `TwoSteps`; both are less than exact for sigma far above 1, whose integrals would take too long. No clipping between attack and noise.
    """

    sigma: float
    tau: float
    measure: ClassVar[str] = "max(|ln contrast factor|, |brightness added|)"

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_sigma(self.tau, "tau")

    def brightness(self, contrast: ArrayLike, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        """The |b| that is allowed with every |k| <= contrast, rounded down; 0 where none is."""
        k = np.asarray(contrast, dtype=np.float64)
        known = TwoSteps(self).brightness(k, p_lower)
        found = np.vectorize(lambda c, *q: largest_box(_distinct(q), Boxes(self.sigma, self.tau, c)), otypes=[np.float64])(k, *_against(p_lower, p_upper))
        return np.maximum(np.where(k > 0, found, radius.gaussian(p_lower, self.tau, p_upper)), known)

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        two, boxes = TwoSteps(self), Boxes(self.sigma, self.tau)
        found = np.asarray(np.vectorize(lambda *q: largest_box(_distinct(q), boxes), otypes=[np.float64])(*_against(p_lower, p_upper)))
        return found if not (two.brightness(found, p_lower) > found).any() else np.maximum(found, two.radius(p_lower))


def _against(p_lower: ArrayLike, p_upper: ArrayLike | None) -> tuple[Array, Array]:
    """Bounds on the smoothed scores of all but the top class together, and of each of them."""
    low, high = probabilities(p_lower, p_upper)
    rest = np.minimum(np.nextafter(1 - low, 2), 1.0)
    return rest, rest if p_upper is None else high


def _distinct(chances: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(float, dict.fromkeys(chances)))


@dataclasses.dataclass(frozen=True, repr=False)
class TwoSteps(Noise):
    """ContrastBrightness by the two steps of TSS (Li et al. 2021, corollary 2): less than what is allowed, and what folders of before have.

    An attack by contrast e^k turns the noise into N(k, sigma^2) and N(b, (e^-k tau)^2). First the change of variance, then the shift:
    p' = 2 Phi(e^k Phi^-1((1 + p) / 2)) - 1 for k <= 0, 2 - 2 Phi(e^k Phi^-1(1 - p / 2)) for k > 0, and then |b| < tau e^-k sqrt(Phi^-1(p')^2 - (k / sigma)^2)
    while p' > 1/2; p_upper is not used, as p_B <= 1 - p_A.
    """

    noise: ContrastBrightness
    measure: ClassVar[str] = ContrastBrightness.measure

    def __repr__(self) -> str:
        return repr(self.noise)  # the same classifier

    def brightness(self, contrast: ArrayLike, p_lower: ArrayLike) -> Array:
        """The |b| that is allowed with every |k| <= contrast: the lesser of both ends, with e^-k >= 1 left out at the lower one. 0 where none is."""
        k, (p, _) = np.asarray(contrast, dtype=np.float64), probabilities(p_lower, None)
        if not (k >= 0).all():
            raise CertifyError(f"a box of contrasts |k| <= contrast has contrast >= 0, got {k}")
        wider = special.erf(np.exp(-k) * special.erfinv(p)) - 4 * SLACK  # p' at -k
        narrower = special.erfc(np.exp(k) * special.erfcinv(p)) - 4 * SLACK  # p' at k
        ends = [self._shift(wider, k), np.exp(-k) * (1 - 1e-14) * self._shift(narrower, k)]
        return np.minimum(*ends)

    def _shift(self, p: Array, k: Array) -> Array:
        """`tau sqrt(Phi^-1(p)^2 - (k / sigma)^2)`, rounded down."""
        z = np.maximum(normal_quantile(np.clip(p, 0.25, np.nextafter(1, 0))), 0.0)
        return self.noise.tau * np.sqrt(np.maximum(z**2 - (k / self.noise.sigma) ** 2 - SLACK, 0.0)) * (1 - 1e-14)

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        p = np.asarray(p_lower, dtype=np.float64)
        probabilities(p_lower, p_upper)
        limit = min(9 * self.noise.sigma, 50.0)  # |k| / sigma < Phi^-1(p') < 9
        return largest(lambda r: self.brightness(r, p) > r, np.full(p.shape, limit))


def general_lipschitz(
    score: Callable[[float, int, np.random.Generator], Array],  # (b, samples) -> d/db of the log-density of the composed parameter, at draws of it
    parameters: Array,  # (G,) an increasing grid from 0, the identity
    p: float,
    samples: int = 20_000,
    levels: int = 500,
    seed: int = 0,
) -> Estimate:
    """The parameter up to which the smoothed score stays above 1/2, by Monte Carlo (General Lipschitz, Korzh et al. 2024): an Estimate, never a certificate.

    A smoothed score of h at b falls with b at a speed of at most B(b, h) = minus the integral of d/db log-density over its lowest h-quantile. With
    worst(h) = max_b B(b, h) and g(b) = max_h B(b, h) / worst(h), it stays above 1/2 while the integral of g up to b is at most that of 1 / worst over [1/2, p].
    The draws, the levels h and the grid have no error bound.
    """
    if not 0.5 < p < 1 or samples < levels:
        raise CertifyError(f"a score p between 1/2 and 1 and at least as many samples as levels are needed, got p={p}, {samples} samples, {levels} levels")
    rng = np.random.default_rng(seed)
    h = np.linspace(0.5, p, levels)
    speed = np.empty((len(parameters), levels))  # B(b, h): how fast the score can fall
    for row, b in zip(speed, parameters, strict=True):
        eta = np.sort(score(float(b), samples, rng))
        row[:] = np.interp(h, np.arange(1, samples + 1) / samples, np.cumsum(eta.mean() - eta) / samples)
    worst = speed.max(axis=0)
    room = _integral(1 / worst, h)[-1]
    spent = _integral((speed / worst).max(axis=1), parameters)
    return Estimate(float(parameters[np.searchsorted(spent, room, side="right") - 1]), "general Lipschitz")


def _integral(y: Array, x: Array) -> Array:
    """From the first x to each, by the trapezoidal rule."""
    return np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])


def _check_count(value: int, name: str) -> None:
    if value < 1 or value != int(value):
        raise CertifyError(f"{name} is a whole number, at least 1, got {value}")
