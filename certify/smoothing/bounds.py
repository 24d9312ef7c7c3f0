"""Confidence bounds on the mean of independent scores in [0, 1], from their sums alone.

Every bound is one-sided: `P(lower > mean) <= alpha`, whatever the law of the scores, and `upper(x) = 1 - lower(1 - x)`. Lower bounds are rounded down and
upper bounds up; float64 throughout, and all of it broadcasts over leading axes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from certify.bound import Array
from certify.errors import CertifyError

Counts = NDArray[np.int64]

# What is relied on, tested against exact rational numbers and 40-digit mpmath in tests/test_smoothing_bounds.py:
_TAIL = 1e-9  # scipy.special.betainc has a smaller relative error than this at the tails that are inverted here (measured: 3e-12 for n <= 1e7)
_SMALLEST = 1e-200  # smaller tails are not asked of betainc: it underflows within (measured: 0 in place of 1e-253)
_FLAT = 1e-14  # closed forms whose terms are at most 1: their rounding error, absolute (some ten operations of 2^-53 each)


def _log_slack(n: int) -> float:
    """More than the absolute error of the logarithm of the e-process (measured: 3e-15 n)."""
    return 1e-10 + 2e-14 * n


def check_alpha(alpha: float) -> None:
    """Raises CertifyError unless 0 < alpha < 1."""
    if not 0 < alpha < 1:
        raise CertifyError(f"alpha is a probability of failure strictly between 0 and 1, got {alpha}")


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """`n` independent scores in [0, 1], known by their sum and their sum of squares (or more than that: an upper bound on it keeps every bound valid)."""

    n: int
    total: Array
    squares: Array

    @property
    def flipped(self) -> Moments:
        """Of the scores 1 - x."""
        return Moments(self.n, self.n - self.total, self.n - 2 * self.total + self.squares)


def votes(count: ArrayLike, n: int) -> Moments:
    """The moments of `n` votes, of which `count` are 1. Raises CertifyError unless 0 <= count <= n, whole numbers and n >= 1."""
    array = np.asarray(count)
    if n < 1 or n != int(n) or not ((array >= 0) & (array <= n) & (array == np.floor(array))).all():
        raise CertifyError(f"votes are whole numbers from 0 to n, and n is at least 1, got {_some(array)} of {n}")
    return Moments(int(n), array.astype(np.float64), array.astype(np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class Tally:
    """What was counted over `n` noisy copies of an input, class by class; the leading axes, if any, are separate runs.

    Votes have `unit=1`: `sums` are counts. Soft scores are in fixed point, `unit` to 1 (2^24, say): each score is rounded down to a multiple of 1/unit, its
    square rounded up. `undecided` copies (NaN in the output, two logits closer than the vote margin) count for no class below and for every class above.
    Raises CertifyError where the numbers do not add up.
    """

    n: int
    sums: Counts  # (..., classes)
    squares: Counts | None = None  # (..., classes); None for votes
    undecided: Counts = dataclasses.field(default_factory=lambda: np.int64(0))  # type: ignore[arg-type, return-value]  # (...)
    unit: int = 1

    def __post_init__(self) -> None:
        for name in ("sums", "undecided", *(() if self.squares is None else ("squares",))):
            array = np.asarray(getattr(self, name))
            if array.dtype.kind not in "iu":
                raise CertifyError(f"a tally holds whole numbers, its {name} are {array.dtype}")
            if (array < 0).any() or (array > np.iinfo(np.int64).max).any():  # what is not negative may be stored without a sign, and would get one
                raise CertifyError(f"a tally holds no negative numbers, and none from 2^63 on, its {name} hold {array.min()} to {array.max()}")
            object.__setattr__(self, name, array.astype(np.int64))
        if not (isinstance(self.n, int) and isinstance(self.unit, int)) or self.n < 1 or self.sums.ndim < 1 or self.sums.shape[-1] < 2:
            raise CertifyError(f"a tally is of at least one copy and two classes, got n={self.n} and sums of shape {self.sums.shape}")
        if (self.unit == 1) != (self.squares is None) or not 1 <= self.unit * self.n < 2**53:
            raise CertifyError(f"votes have unit=1 and no squares, soft scores both, and n * unit < 2^53, got unit={self.unit} and n={self.n}")
        total, room = self.sums.sum(axis=-1), (self.n - self.undecided) * self.unit
        wrong = total != room if self.squares is None else (total > room) | (room < 0)
        if wrong.any() or (self.sums > self.n * self.unit).any():
            raise CertifyError(
                f"the counts do not add up: {_some(total)} in all classes and {_some(self.undecided)} undecided, of n={self.n} (unit {self.unit})"
            )
        if self.squares is not None and not self._plausible(self.squares.astype(np.float64)):
            raise CertifyError("the squares of a tally do not fit its sums: they lie between sums^2 / (decided unit) and sums")

    def _plausible(self, squares: Array) -> bool:
        sums, decided = self.sums.astype(np.float64), (self.n - self.undecided[..., None]).astype(np.float64)
        return bool(((squares <= sums) & (squares * decided * self.unit * (1 + 1e-9) >= sums**2)).all())

    @property
    def classes(self) -> int:
        """How many."""
        return int(self.sums.shape[-1])

    def below(self) -> Moments:
        """Of scores that are not above the true ones, class by class."""
        return self._moments(np.zeros_like(self.sums[..., :1]))

    def above(self) -> Moments:
        """Of scores that are below the true ones by less than 1/unit, or not at all when they are votes."""
        return self._moments(self.undecided[..., None] * self.unit)

    def _moments(self, extra: Counts) -> Moments:
        squares = self.sums if self.squares is None else self.squares
        return Moments(self.n, (self.sums + extra) / self.unit, (squares + extra) / self.unit)

    @property
    def favourite(self) -> Counts:
        """The class of the largest sum, the first of several."""
        return np.asarray(np.argmax(self.sums, axis=-1), dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, from which `from_json` makes the same tally."""
        soft = {} if self.squares is None else {"squares": self.squares.tolist(), "unit": self.unit}
        return {"n": self.n, "sums": self.sums.tolist(), "undecided": self.undecided.tolist(), **soft}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Tally:
        """What `to_json` wrote. Raises CertifyError for anything else."""
        try:
            n, sums, undecided = data["n"], np.asarray(data["sums"]), np.asarray(data["undecided"])
            squares, unit = (np.asarray(data["squares"]), data["unit"]) if "squares" in data else (None, 1)
        except (KeyError, TypeError, ValueError) as error:
            raise CertifyError(f"this is not a tally of counts: {error!r}") from error
        return Tally(n, sums, squares, undecided, unit)


class ConfidenceBound(abc.ABC):
    """A one-sided confidence bound on a mean; a value with its own options."""

    time_uniform: ClassVar[bool] = False  # holds at all sample sizes at once with the one alpha

    def lower(self, scores: Moments, alpha: float, before: Moments | None = None) -> Array:
        """A number that exceeds the mean with probability at most alpha; 0 where nothing better is known.

        `before` are the moments of other, earlier samples; they may tune the bound and are no evidence. Raises CertifyError for alpha outside (0, 1).
        """
        check_alpha(alpha)
        if before is not None:
            return np.clip(self._lower(scores, alpha, before), 0.0, 1.0)
        return np.clip(self._lower(scores, alpha, _NOTHING), 0.0, 1.0)

    def upper(self, scores: Moments, alpha: float, before: Moments | None = None) -> Array:
        """A number that the mean exceeds with probability at most alpha."""
        low = self.lower(scores.flipped, alpha, None if before is None else before.flipped)
        return np.where(low > 0, np.minimum(np.nextafter(1 - low, 2), 1.0), 1.0)

    @abc.abstractmethod
    def _lower(self, scores: Moments, alpha: float, before: Moments) -> Array: ...


_NOTHING = Moments(0, np.zeros(()), np.zeros(()))


@dataclasses.dataclass(frozen=True)
class ClopperPearson(ConfidenceBound):
    """The exact bound for votes: the largest p with `P(Bin(n, p) >= k) <= alpha` (Clopper & Pearson 1934).

    scipy.special.betaincinv proposes p (its tail exceeds alpha by up to 8e-7 relative, measured at n = 1e7). p is accepted where the tail, evaluated at p
    itself, is at most `alpha (1 - 1e-9)`, and moved down until it is. 0 for alpha below 1e-200. Raises CertifyError for scores that are not votes.
    """

    def _lower(self, scores: Moments, alpha: float, before: Moments) -> Array:
        return _by_count(scores, lambda k: _clopper_pearson(k, scores.n, alpha))


def _clopper_pearson(k: Array, n: int, alpha: float) -> Array:
    if alpha < _SMALLEST:
        return np.zeros(k.shape)
    a, b = np.maximum(k, 1), np.minimum(n - k + 1, n)
    p = np.where(k > 0, np.nan_to_num(special.betaincinv(a, b, alpha * (1 - 2 * _TAIL))), 0.0)
    step = np.spacing(p)
    while (high := ~(special.betainc(a, b, p) <= alpha * (1 - _TAIL))).any():
        p, step = np.where(high, np.maximum(p - step, 0.0), p), 2 * step
    return p


@dataclasses.dataclass(frozen=True)
class Hoeffding(ConfidenceBound):
    """`mean - sqrt(ln(1/alpha) / 2n)` (Hoeffding 1963, theorem 1)."""

    def _lower(self, scores: Moments, alpha: float, before: Moments) -> Array:
        return scores.total / scores.n - np.sqrt(-np.log(alpha) / (2 * scores.n)) - _FLAT


@dataclasses.dataclass(frozen=True)
class MaurerPontil(ConfidenceBound):
    """`mean - sqrt(2 V ln(2/alpha) / n) - 7 ln(2/alpha) / (3 (n - 1))`, V the unbiased sample variance (Maurer & Pontil 2009, theorem 4)."""

    def _lower(self, scores: Moments, alpha: float, before: Moments) -> Array:
        n, log = scores.n, np.log(2 / alpha)
        if n < 2:
            return np.zeros(np.shape(scores.total))
        # the rounding of squares and sums is a relative 2^-53 each: 1e-15 of V is more than both, before the root
        variance = np.maximum(scores.squares - scores.total**2 / n, 0.0) / (n - 1) + 1e-15
        return scores.total / n - np.sqrt(2 * variance * log / n) - 7 * log / (3 * (n - 1)) - _FLAT


@dataclasses.dataclass(frozen=True)
class EmpiricalBernstein(ConfidenceBound):
    """`mean - (ln(1/alpha) + psi(lam) sum_i (x_i - mu)^2) / (n lam)`, psi(lam) = -ln(1 - lam) - lam, mu in [0, 1] and lam in (0, 1) fixed beforehand.

    The predictable plug-in empirical Bernstein bound (Waudby-Smith & Ramdas 2024, theorem 2) with both plug-ins from the samples `before`. It holds as
    `exp(lam xi - psi(lam) xi^2) <= 1 + lam xi` for xi >= -1 (Fan, Grama & Liu 2015): with xi = x - mu, the expectation of the left side is at most
    `exp(lam (mean - mu))`; multiply over the samples, and Markov's inequality. `lam` is the best one for the variance seen before, at most `cap`.
    """

    cap: float = 0.97

    def __post_init__(self) -> None:
        if not 0 < self.cap < 1:
            raise CertifyError(f"the cap on lambda lies strictly between 0 and 1, got {self.cap}")

    def _lower(self, scores: Moments, alpha: float, before: Moments) -> Array:
        n, log = scores.n, -np.log(alpha)
        mu = (before.total + 0.5) / (before.n + 1)  # both plug-ins as if one more score had been seen, 1/2 away from what was expected
        variance = (np.maximum(before.squares - 2 * mu * before.total + before.n * mu**2, 0.0) + 0.25) / (before.n + 1)
        lam = self._best(log / (n * variance))
        spread = np.maximum(scores.squares - 2 * mu * scores.total + n * mu**2, 0.0)
        return scores.total / n - (log + _psi(lam) * spread) / (n * lam) - _FLAT

    def _best(self, c: Array) -> Array:
        """The minimiser of (c + psi(lam)) / lam: `u - 1 - ln u = c` for u = 1 / (1 - lam)."""
        u = -np.real(special.lambertw(-np.exp(-1 - np.minimum(c, 700.0)), k=-1))
        return np.clip(1 - 1 / u, 1e-6, self.cap)


def _psi(lam: Array) -> Array:
    return -np.log1p(-lam) - lam


@dataclasses.dataclass(frozen=True)
class EProcess(ConfidenceBound):
    """The smallest p0 that the e-process of `p <= p0` has not rejected; for votes, and valid at every sample size at once.

    The likelihood ratio of k votes in n against p0, averaged over the Jeffreys law on (p0, 1), is a non-negative supermartingale under every p <= p0, and
    Ville's inequality bounds the chance that it ever reaches 1/alpha. Where it is at least 1 it falls as p0 grows, up to the mean, for p0 >= 0.16: there
    `d/dp0 ln M <= n (mean - p0) / (p0 (1 - p0)) * (h (mean - p0) - 1)`, h = the hazard rate of the law, and `h (1 - p0) <= 1` (tan t <= 2 t for t <= 1.16,
    sin^2 t = 1 - p0). So the numbers below a rejected one are rejected with it. Below 0.16 the bound is 0. Raises CertifyError for scores that are not votes.
    """

    time_uniform: ClassVar[bool] = True
    _least: ClassVar[float] = 0.16

    def _lower(self, scores: Moments, alpha: float, before: Moments) -> Array:
        return _by_count(scores, lambda k: self._rejected(k, scores.n, alpha))

    def _rejected(self, k: Array, n: int, alpha: float) -> Array:
        low, high = np.full(k.shape, self._least), np.maximum(k / n, self._least)
        for _ in range(52):
            middle = (low + high) / 2
            rejected = log_e_process(k, n, middle) >= -np.log(alpha) + _log_slack(n)
            low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
        return np.where(low > self._least, low, 0.0)


def log_e_process(k: ArrayLike, n: int, p0: ArrayLike) -> Array:
    """The logarithm of the e-process of `p <= p0` after k votes of n: Beta(1/2, 1/2) on (p0, 1) against p0."""
    votes, p = np.asarray(k, dtype=np.float64), np.asarray(p0, dtype=np.float64)
    a, b = votes + 0.5, n - votes + 0.5
    with np.errstate(divide="ignore"):
        mixture = special.betaln(a, b) + np.log(special.betaincc(a, b, p))
    prior = special.betaln(0.5, 0.5) + np.log(special.betaincc(0.5, 0.5, p))
    return np.asarray(mixture - prior - votes * np.log(p) - (n - votes) * np.log1p(-p))


@dataclasses.dataclass(frozen=True)
class Share:
    """How alpha is divided between the top class and its rivals: `rivals` of it, in equal parts over all the other classes, so none has to be picked.

    With two classes, or `rivals=0`, all of it goes to the top class, and the rivals have what is left: p_B <= 1 - p_A. That holds in every case.
    """

    rivals: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.rivals < 1:
            raise CertifyError(f"the rivals' share of alpha lies in [0, 1), got {self.rivals}")

    def interval(self, bound: ConfidenceBound, tally: Tally, label: Counts, alpha: float, before: Tally | None = None) -> tuple[Array, Array]:
        """`(p_lower, p_upper)`: with probability at least 1 - alpha, p_label >= p_lower and p_c <= p_upper for every other class c.

        `label` was chosen without a look at `tally`.
        """
        rivals = self.rivals if tally.classes > 2 else 0.0
        at = np.asarray(label)[..., None]
        past = None if before is None else before.below()
        p_lower = bound.lower(_take(tally.below(), at), _scaled_down(alpha, 1 - rivals), None if past is None else _take(past, at))[..., 0]
        p_upper = np.minimum(np.nextafter(1 - p_lower, 2), 1.0)
        if rivals:
            every = bound.upper(tally.above(), _scaled_down(alpha, rivals / (tally.classes - 1)), past)
            if tally.unit > 1:  # the scores were rounded down
                every = np.nextafter(every + 1 / tally.unit, 2)
            np.put_along_axis(every, at, 0.0, axis=-1)
            p_upper = np.minimum(p_upper, every.max(axis=-1))
        return p_lower, p_upper


def _scaled_down(alpha: float, factor: float) -> float:
    """A part of alpha, short of it by less than 1e-15 relative, so that the parts are never more than the whole."""
    return alpha * factor * (1 - 2**-50)


def _take(moments: Moments, at: Counts) -> Moments:
    return Moments(moments.n, np.take_along_axis(moments.total, at, -1), np.take_along_axis(moments.squares, at, -1))


def _by_count(scores: Moments, bound: Callable[[Array], Array]) -> Array:
    """A bound that depends on the count alone, computed once for each count. Raises CertifyError for scores that are not votes."""
    k = np.asarray(scores.total, dtype=np.float64)
    if (k != np.floor(k)).any() or (k != scores.squares).any():
        raise CertifyError("Clopper-Pearson and the e-process are for votes (0 or 1); bound soft scores with EmpiricalBernstein() or MaurerPontil()")
    distinct, place = np.unique(k, return_inverse=True)
    return np.asarray(bound(distinct)[place].reshape(k.shape))


def surely_certified(certified: int, inputs: int, alpha: float, failure: float) -> int:
    """How many of `certified` inputs (of `inputs` in all) hold at once, with probability at least 1 - failure, when each is false with at most alpha.

    The false ones are no more than Bin(inputs, alpha), whatever is certified: its upper quantile comes off. That is for inputs with noise of their own. Where
    they share it (`Smoothing(shared=True)`) failures may come together: their mean is still at most `inputs alpha`, so there are more than
    `inputs alpha / failure` with probability at most `failure` (Markov).
    """
    check_alpha(alpha)
    check_alpha(failure)
    if not 0 <= certified <= inputs:
        raise CertifyError(f"of {inputs} inputs from 0 to {inputs} are certified, got {certified}")
    beyond = special.betainc(np.arange(1, inputs + 1), np.arange(inputs, 0, -1), alpha)  # P(more than 0, 1, ... are false)
    false = int(np.count_nonzero(beyond > failure * (1 - _TAIL))) if failure >= _SMALLEST else inputs
    return max(certified - false, 0)


def _some(array: ArrayLike) -> str:
    """At most three of the numbers."""
    flat = np.ravel(np.asarray(array)).tolist()
    return ", ".join(map(str, flat[:3])) + (", ..." if len(flat) > 3 else "")
