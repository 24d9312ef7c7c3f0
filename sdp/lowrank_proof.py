"""Proved lower bounds on a linear function of a ReLU network over a ball, from any multipliers. numpy only, no solver in it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from sdp.proof import UNIT, is_positive_semidefinite
from sdp.ranged import Ranged, concatenate
from sdp.relaxation import Relaxation, all_rows

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Multipliers:
    """One number for each constraint of the relaxation (Raghunathan et al. 2018, with the chord); all but `product` are not negative.

    For an unstable neuron `a = relu(v)`, `lower <= v <= upper`: positive `-a <= 0`, above `v - a <= 0`, chord `a - slope (v - lower) <= 0`,
    product `a (a - v) = 0`, square `a (a - upper) <= 0`. For the input `x = center + e`: ball `|e|^2 - radius^2 <= 0`, sides `(e - low) (e - high) <= 0`.
    """

    positive: Array  # (U,)
    above: Array  # (U,)
    chord: Array  # (U,)
    product: Array  # (U,)
    square: Array  # (U,)
    ball: float  # 0 in the maximum norm
    sides: Array  # (inputs,)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what overflows proves nothing
def prove_margin(
    relaxation: Relaxation,
    row: Ranged,  # (signals,)
    offset: Ranged,  # ()
    multipliers: Multipliers,
) -> float:
    """A proved lower bound on `row s + offset` over the region, whatever the multipliers are; -inf if they prove none.

    The Lagrangian is `[1; s]' M [1; s]`, so `M - bound e_0 e_0' >= 0` is all there is to show, for it is not above the function anywhere on the region. The
    part of the input e in M is a positive diagonal D and is taken out by its Schur complement. Where the rest is not positive semidefinite the multipliers
    `square` are raised, which keeps their signs.
    Raises ValueError for multipliers of the wrong shape, negative or not finite.
    """
    _check(relaxation, multipliers)
    upper = _bounds(relaxation)[1]
    matrix = _lagrangian(relaxation, row, offset, multipliers)
    if not (np.isfinite(matrix.value).all() and np.isfinite(matrix.error).all()):
        return -math.inf
    best = -math.inf
    for lift in _lifts(matrix.value[1:, 1:] * upper[:, None] * upper):
        raised = dataclasses.replace(multipliers, square=multipliers.square + lift / upper**2)
        best = max(best, _corner(matrix if lift == 0 else _lagrangian(relaxation, row, offset, raised)))
        if best > -math.inf:
            break
    return best


def _check(relaxation: Relaxation, multipliers: Multipliers) -> None:
    wanted = dict.fromkeys(("positive", "above", "chord", "product", "square"), (relaxation.unstable,)) | {"sides": relaxation.region.center.shape, "ball": ()}
    for name, shape in wanted.items():
        found = np.asarray(getattr(multipliers, name))
        if found.shape != shape or found.dtype != np.float64:
            raise ValueError(f"the multipliers {name!r} must be float64 of shape {shape}, got {found.dtype} of shape {found.shape}")
        if not np.isfinite(found).all() or (name != "product" and (found < 0).any()):
            raise ValueError(f"the multipliers {name!r} must be finite{'' if name == 'product' else ' and not negative'}, found others among them")
    if relaxation.region.norm != 2 and multipliers.ball != 0:
        raise ValueError(f"the multiplier 'ball' is for the l2 ball and must be 0 in the maximum norm, got {multipliers.ball}")


def _bounds(relaxation: Relaxation) -> tuple[Array, Array]:
    empty = np.zeros(0)
    return np.concatenate([empty, *(part.lower for part in relaxation.layers)]), np.concatenate([empty, *(part.upper for part in relaxation.layers)])


def _lagrangian(relaxation: Relaxation, row: Ranged, offset: Ranged, multipliers: Multipliers) -> Ranged:  # (1 + U, 1 + U)
    """The smallest value over e of the function plus the multipliers times the constraints, as a quadratic form in [1; a].

    v_j has the coefficient `k_j = above_j - chord_j slope_j - product_j a_j`, and `v = V e + F a + offset`.
    """
    region = relaxation.region
    inputs, count = len(region.center), relaxation.unstable
    rows, offsets = all_rows(relaxation.layers, inputs)
    V, F = rows[:, :inputs], rows[:, inputs:]
    lower, upper = map(Ranged.exact, _bounds(relaxation))
    slope = Ranged.exact(np.concatenate([np.zeros(0), *(part.slope for part in relaxation.layers)]))
    low, high = map(Ranged.exact, region.sides)
    positive, above, chord, product, square = (
        Ranged.exact(values) for values in (multipliers.positive, multipliers.above, multipliers.chord, multipliers.product, multipliers.square)
    )
    sides, ball = Ranged.exact(multipliers.sides), Ranged.exact(np.asarray(multipliers.ball))
    radius = Ranged.exact(np.asarray(region.radius))

    fixed = above - chord * slope  # k without a
    constant = offset + fixed @ offsets + (chord * slope) @ lower - ball * radius * radius + sides @ (low * high)
    linear = row[inputs:] - positive - above + chord - square * upper + fixed @ F - product * offsets
    coupled = Ranged(product.value[:, None], product.error[:, None]) * F
    diagonal = product + square
    quadratic = Ranged(np.diag(diagonal.value), np.diag(diagonal.error)) - _half(coupled + coupled.T)

    # e'De + e'(n + N a) is not below -1/4 |D^(-1/2) (n + N a)|^2
    n = row[:inputs] - sides * (low + high) + fixed @ V
    N = -(Ranged(product.value[:, None], product.error[:, None]) * V).T
    both = concatenate([Ranged(n.value[:, None], n.error[:, None]), N], axis=1)  # (inputs, 1 + U)
    inverse = (sides + Ranged(np.broadcast_to(ball.value, inputs), np.broadcast_to(ball.error, inputs))).reciprocal()
    scaled = Ranged(inverse.value[:, None], inverse.error[:, None]) * both
    taken = both.T @ scaled

    matrix = np.zeros((1 + count, 1 + count)), np.zeros((1 + count, 1 + count))
    for part, source in ((0, "value"), (1, "error")):
        matrix[part][0, 0] = getattr(constant, source)
        matrix[part][0, 1:] = matrix[part][1:, 0] = getattr(linear, source) / 2
        matrix[part][1:, 1:] = getattr(quadratic, source)
    whole = Ranged(*matrix) - _half(_half(taken))
    # the exact matrix is symmetric: the mean of the two halves is as far from it as the worse of them
    symmetric = Ranged.exact((whole.value + whole.value.T) / 2)
    return Ranged(symmetric.value, np.maximum(whole.error, whole.error.T) * (1 + 2.0**-40) + 2 * UNIT * np.abs(symmetric.value) + 2.0**-900)


def _half(x: Ranged) -> Ranged:
    return Ranged(x.value / 2, x.error / 2)


def _lifts(
    matrix: Array,  # (U, U), in units in which a lies in [0, 1]
) -> list[float]:
    """0, and by how much the diagonal may have to be raised."""
    if len(matrix) == 0:
        return [0.0]
    try:
        least = float(np.linalg.eigvalsh(matrix)[0])
    except np.linalg.LinAlgError:  # numbers that overflowed
        return []
    scale = float(np.abs(np.diagonal(matrix)).max()) + 1e-280
    return [*([0.0] if least > 0 else []), *(max(-least, 0.0) * (1 + 1e-6) + scale * 1e-13 * 8.0**k for k in range(12))]


def _corner(matrix: Ranged) -> float:
    """The largest number that can be taken from the corner of the matrix, with a proof that what is left is positive semidefinite; -inf if none was found."""
    value = matrix.value.copy()
    try:
        taken = float(value[0, 1:] @ np.linalg.solve(value[1:, 1:], value[1:, 0])) if len(value) > 1 else 0.0
    except np.linalg.LinAlgError:
        return -math.inf
    if not (math.isfinite(taken) and taken >= 0):
        return -math.inf
    corner, scale = float(matrix.value[0, 0]), taken + float(matrix.error[0, 0]) + 1e-280
    for k in range(20):
        left = taken + (scale + 2 * UNIT * abs(corner)) * 1e-13 * 8.0**k
        bound = math.nextafter(corner - left, -math.inf)
        value[0, 0] = corner - bound
        error = matrix.error.copy()
        error[0, 0] += 2 * UNIT * (abs(corner) + abs(bound)) + 2.0**-1000
        if is_positive_semidefinite(value, error):
            return bound
    return -math.inf
