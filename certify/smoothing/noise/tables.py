"""What whole-number noise is drawn by: 64-bit thresholds, a table that finds the right one with one look-up, and how far the law is from the ideal one."""

from __future__ import annotations

import dataclasses
import decimal
import functools
import itertools
import math
from collections.abc import Callable
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from certify.errors import CertifyError
from certify.rounding import multiply_up, up

MOST_STEPS = 4096  # sigma, in steps of the grid
_MANY = -2  # the step of a bucket with several thresholds in it
_CONTEXT = decimal.Context(prec=60, rounding=decimal.ROUND_HALF_EVEN, Emin=-9999, Emax=9999)
_SQRT_2PI = Decimal("2.50662827463100050241576528481104525300698674060993831662992357")


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """Thresholds Q_j, and the table of magnitudes by buckets of the upper 31 bits v of V: the exponent and the first 23 - shift bits of float32(v | 1)."""

    thresholds: tuple[int, ...]  # Q_1 > ... > Q_K > 0
    total_variation: float  # of the law of one k from the ideal one, rounded up
    shift: int  # the bucket of v: (bits of float32(v | 1) >> shift) - offset
    offset: int
    lookup: NDArray[np.int64]  # base << 32 | step: |k| = base + (v < step), unless v == step or step is -2: then base is a lower bound
    high: NDArray[np.int32]  # Q_j >> 32, then -1
    low: NDArray[np.uint32]  # the lower words, then 0

    def magnitude(
        self,
        word: NDArray[np.uint32],  # upper words
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """|k| by one look-up, and where it is only a lower bound: where the upper word does not decide (once in a million)."""
        v = _without_top_bit(word)
        entry = self.lookup[((v | 1).astype(np.float32).view(np.int32) >> self.shift) - self.offset]
        step = entry.astype(np.int32)
        return (entry >> 32).astype(np.int32) + (v < step), (v == step) | (step == _MANY)

    def climb(self, magnitude: NDArray[np.int32], word: NDArray[np.uint32], low: NDArray[np.uint32]) -> NDArray[np.int32]:
        """|k| from a lower bound and both words: upwards while V is below the next threshold."""
        v, low = _without_top_bit(word), np.where(word >> np.uint32(31) == 1, ~low, low)
        while (more := (v < self.high[magnitude]) | ((v == self.high[magnitude]) & (low < self.low[magnitude]))).any():
            magnitude = magnitude + more
        return magnitude


def _without_top_bit(word: NDArray[np.uint32]) -> NDArray[np.int32]:
    return np.where(word >> np.uint32(31) == 1, ~word, word).view(np.int32)


def total_variation(sigma: float, elements: int, levels: int = 255, law: str = "gaussian") -> float:
    """How far apart, in total variation, the law of the whole-number noise on `elements` elements and the ideal one are at most; rounded up.

    A probability under the one differs from that under the other by no more: with P_A >= p proved for the noise that is drawn, `p - total_variation` is a
    lower bound, and p_upper + total_variation an upper one, for the noise that the radius is about.

    One element. The magnitude exceeds j - 1/2 with one sign with probability Q_j / 2^64, ideally T_j (Phi(-(j - 1/2) / s) for the Gaussian). With
    d_j = Q_j / 2^64 - T_j (and Q_j = 0 for j > K), half the sum over k of the differences of both laws is
    `|d_1| + sum_(j <= K) |d_j - d_(j+1)| + T_(K+1)`: the first from k = 0, the last from all |k| > K, and each other magnitude twice, halved. Elements are
    independent, and the total variations of independent parts add up at most.
    """
    return multiply_up(float(elements), tables(sigma, levels, law).total_variation)


@functools.lru_cache(maxsize=32)
def tables(sigma: float, levels: int, law: str = "gaussian") -> Tables:
    """The tables of `Grid(sigma, levels=levels, law=law)`: s = sigma levels. Raises CertifyError for s above 4096, and for a law that is not known."""
    if law not in TAILS:
        raise CertifyError(f"the law of whole-number noise is one of {', '.join(TAILS)}, got {law!r}")
    if sigma * levels > MOST_STEPS:
        raise CertifyError(f"whole-number noise has a sigma of at most {MOST_STEPS} steps of its grid, got {sigma} times {levels}; take fewer levels")
    with decimal.localcontext(_CONTEXT):
        s = Decimal(float(sigma)) * levels
        found: list[int] = []
        apart: list[Decimal] = []  # d_j
        while True:
            exact = TAILS[law]((Decimal(len(found)) + Decimal("0.5")) / s)
            nearest = int((exact * 2**64).to_integral_value())
            apart.append(Decimal(nearest) / 2**64 - exact)
            if nearest == 0:
                break
            found.append(nearest)
        distance = abs(apart[0]) + sum((abs(a - b) for a, b in itertools.pairwise(apart)), Decimal()) + exact
        total = float(distance + Decimal("1e-40") * (3 * len(apart)))  # each T_j is known to 1e-45
    return arrange(tuple(found), up(total))


def arrange(thresholds: tuple[int, ...], total_variation: float) -> Tables:
    """The tables of any decreasing thresholds between 0 and 2^63; as small as leaves few draws to 64-bit comparisons."""
    for bits in range(5, 12):
        shift, offset, lookup, undecided = _lookup(thresholds, bits)
        if undecided <= 2**-22:  # of all draws
            break
    high = np.array([q >> 32 for q in thresholds] + [-1], dtype=np.int32)
    low = np.array([q & 0xFFFFFFFF for q in thresholds] + [0], dtype=np.uint32)
    for array in (lookup, high, low):
        array.flags.writeable = False
    return Tables(thresholds, total_variation, shift, offset, lookup, high, low)


def tail(t: Decimal) -> Decimal:
    """Phi(-t), t > 0, to an absolute error of 1e-45: `1/2 - exp(-t^2 / 2) (t + t^3/3 + t^5/(3 5) + ...) / sqrt(2 pi)`.

    All terms are positive and their sum is at most 1.26 exp(t^2 / 2), so the rounding of some 400 operations to 60 digits stays far below that. Where the
    terms have begun to fall by half each time, the last one bounds all that are left out. `decimal` is specified to the last digit (its exp is correctly
    rounded), so these numbers are the same on every machine. For t >= 15 it is 0, which is true to 4e-51.
    """
    if t >= 15:
        return Decimal(0)
    square, weight = t * t, (-t * t / 2).exp() / _SQRT_2PI
    term = total = t
    odd = 1
    while term * weight > Decimal("1e-48") or 2 * square > odd:
        odd += 2
        term = term * square / odd
        total += term
    return Decimal("0.5") - weight * total


def _laplace_tail(t: Decimal) -> Decimal:
    """exp(-t) / 2, t > 0: correctly rounded, but for the rounding of t."""
    return (-t).exp() / 2


def _uniform_tail(t: Decimal) -> Decimal:
    """(1 - t) / 2 for 0 < t < 1, 0 beyond."""
    return max((1 - t) / 2, Decimal(0))


TAILS: dict[str, Callable[[Decimal], Decimal]] = {  # P(z > t) for t > 0, to 1e-45, where z is symmetric and its scale is 1
    "gaussian": tail,
    "laplace": _laplace_tail,  # of density exp(-|z|) / 2
    "uniform": _uniform_tail,  # on [-1, 1]
}


def _lookup(thresholds: tuple[int, ...], bits: int) -> tuple[int, int, NDArray[np.int64], float]:
    """Shift, offset, table and the share of all v that it leaves undecided, with 2^bits buckets for each power of two."""
    high = np.array([q >> 32 for q in thresholds[::-1]], dtype=np.int64)  # increasing
    shift = 23 - bits
    offset = 127 << bits

    def bucket(v: NDArray[np.int64]) -> NDArray[np.int64]:
        return ((v | 1).astype(np.float32).view(np.int32).astype(np.int64) >> shift) - offset

    most = 2**31 - 1
    number = np.arange(int(bucket(np.array([most]))[0]) + 1)
    last, above = np.full(len(number), -1), np.full(len(number), most)  # the last v of each bucket, by bisection: `bucket` never falls
    while (last < above).any():
        middle = (last + above + 1) // 2
        inside = bucket(np.maximum(middle, 0)) <= number
        inside &= middle >= 0
        last, above = np.where(inside, middle, last), np.where(inside, above, middle - 1)
    first = np.concatenate([[0], last[:-1] + 1])  # above the last where a bucket is empty
    base = len(high) - np.searchsorted(high, last, side="right")  # thresholds above all of the bucket
    within = np.where(first <= last, len(high) - np.searchsorted(high, first, side="left") - base, 0)
    step = np.where(within == 0, -1, _MANY)
    step[within == 1] = high[::-1][base[within == 1]]
    undecided = math.fsum((last - first + 1)[within > 1]) / 2**31
    return shift, offset, base.astype(np.int64) << 32 | step & 0xFFFFFFFF, undecided
