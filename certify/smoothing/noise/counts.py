"""From the logits of noisy copies to whole numbers: votes, and soft scores in fixed point. Sums of whole numbers do not depend on their order.

A copy is invalid where one of its logits is not finite, or where its two largest are not more than the vote margin apart; it counts against every class.
Logits are rounded to float32 first, and soft scores are a softmax or a sparsemax in fixed point with operations that round the same way everywhere: from equal
logits every back end makes equal counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from certify.errors import CertifyError

Counts = NDArray[np.int64]
Shape = tuple[int, ...]
UNIT = 1 << 20  # of soft scores: `q = floor(score * UNIT)`; sums of fewer than 2^23 squares fit in 63 bits
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def check(classes: int, counts: Shape, soft: tuple[Shape | None, Shape | None], margin: float, temperature: float) -> None:
    """Raises CertifyError where shapes do not fit, or a margin is negative, or a temperature not positive."""
    slots = counts[0]
    if counts != (slots, classes + 1) or set(soft) not in ({None}, {(slots, classes)}):
        raise CertifyError(
            f"logits of {classes} classes are counted in int64 tables of shape (slots, {classes + 1}), and (slots, {classes}) for both sums of soft scores; "
            f"got {counts}, {soft[0]} and {soft[1]}"
        )
    if not (0 <= margin < 1e38 and 1e-30 < temperature < 1e30):
        raise CertifyError(f"a vote margin is at least 0, a temperature above 0, and both are of a size that float32 can hold; got {margin} and {temperature}")


def count_rows(
    logits: NDArray[np.floating],  # (rows, classes)
    slot: NDArray[np.int64],  # (rows,); rows of slot -1 are not counted
    counts: Counts,  # (slots, classes + 1), the last column for invalid copies; added to in place
    margin: float = 0.0,
    sums: Counts | None = None,  # (slots, classes): of soft scores, in 1/UNIT; added to in place
    squares: Counts | None = None,  # (slots, classes): of their squares, in 1/UNIT^2
    temperature: float = 1.0,
    sparse: bool = False,  # sparsemax scores instead of those of a softmax
) -> None:
    """Votes go to the largest logit, the first of several. With a margin, a vote counts where the float32 difference of the two largest is above the float32
    margin: rounding keeps order, so the difference itself is then at least the margin itself.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(logits).astype(np.float32, copy=False)
    if slot.min(initial=0) < 0:
        kept = np.flatnonzero(slot >= 0)
        values, slot = values[kept], slot[kept]
    finite = np.isfinite(values)
    valid = np.ones(len(values), dtype=np.bool_) if finite.all() else np.asarray(finite.all(axis=1))  # row by row takes ten times as long
    top = values.argmax(axis=1)
    if margin > 0 and values.shape[1] > 1:
        two = np.partition(np.where(valid[:, None], values, np.float32(0)), -2, axis=1)[:, -2:]
        with np.errstate(over="ignore"):
            valid &= two[:, 1] - two[:, 0] > np.float32(margin)
    votes = np.where(valid, top, values.shape[1])
    counts += np.bincount(slot * counts.shape[1] + votes, minlength=counts.size).reshape(counts.shape)
    if sums is not None and squares is not None:
        scores = (sparse_scores if sparse else soft_scores)(values[valid], temperature)
        np.add.at(sums, slot[valid], scores)
        np.add.at(squares, slot[valid], scores * scores)


def soft_scores(logits: NDArray[np.float32], temperature: float = 1.0) -> Counts:
    """softmax(logits / temperature) in fixed point, for finite logits: `floor(UNIT e_k / sum e)`, with e_k the exponential in units of 2^-40.

    The exponential is Cephes' expf: float32 operations rounded to nearest, none fused, to a relative error of 1e-7 (measured); from there on whole numbers.
    The scores of a row add up to at most 1, and each is within 2 / UNIT of the softmax of the logits (up to 10^5 classes), above or below: one for rounding
    down, the rest for the whole numbers and for x = difference / temperature, whose float32 error of 2e-7 |x| meets a weight of exp(x).
    """
    f = np.float32
    with np.errstate(over="ignore"):
        x = np.maximum((logits - logits.max(axis=1, keepdims=True)) / f(temperature), f(-60))
    nearest = (x * f(1.44269504088896341) - f(0.5)).astype(np.int32)  # towards 0
    n = nearest.astype(f)
    x = x - n * f(0.693359375) - n * f(-2.12194440e-4)
    y = np.full_like(x, _EXP[0])
    for c in _EXP[1:]:
        y = y * x + f(c)
    y = y * (x * x) + x + f(1)
    e = (y * ((nearest + np.int32(127 + 40)) << 23).view(f)).astype(np.int64)
    return e * UNIT // e.sum(axis=1, keepdims=True)


def sparse_scores(logits: NDArray[np.float32], temperature: float = 1.0) -> Counts:
    """sparsemax(logits / temperature) in fixed point, for finite logits: `floor(UNIT max(z_k - t, 0))`, t such that the exact scores add up to 1.

    z_k = (logit - largest) / temperature, which no score depends on below -1: for t >= -1, as the largest z is 0 and its score at most 1. In units of 2^-40,
    z and sums of it are whole numbers; with the m largest in the support, m t is their sum less 1, and what is rounded is a quotient of whole numbers.
    The scores of a row add up to at most 1, and each is within 2 / UNIT of the sparsemax of the logits, above or below: one for rounding down; the float32
    error of z, 3e-7 at most where it is above -1, moves a score by no more than twice as much.
    """
    f = np.float32
    with np.errstate(over="ignore"):
        x = np.maximum((logits - logits.max(axis=1, keepdims=True)) / f(temperature), f(-1))
    z = np.floor(x.astype(np.float64) * 2.0**40).astype(np.int64)
    falling = -np.sort(-z, axis=1)
    excess = falling.cumsum(axis=1) - (1 << 40)
    support = np.sum(falling * np.arange(1, z.shape[1] + 1) > excess, axis=1, keepdims=True)
    above = support * z - np.take_along_axis(excess, support - 1, 1)  # m (z - t)
    return np.asarray(np.maximum(above, 0) // (support * ((1 << 40) // UNIT)))
