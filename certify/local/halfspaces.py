"""Half-spaces `constant + normal d >= 0` in a region: a proof that they have no point there in common, and points that they do have in common.

Linear programs and least distances only propose; what is proved is one number in float64, the largest value of a sum that would have to be at least 0.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from scipy.optimize import linprog, nnls
from torch import Tensor

from certify.bound import Array
from certify.local.region import Region
from sdp.proof import gamma

_MARGINS = (1e-2, 1e-4, 1e-7)  # of the radius: how far inside all half-spaces a point of a ball is looked for
_INSIDE = 1 - 2.0**-40


@dataclasses.dataclass(frozen=True, eq=False)
class HalfSpaces:
    """`constant + normal d >= 0`, row by row."""

    constant: Tensor  # (m,)
    normal: Tensor  # (m, inputs)


def excludes(region: Region, of: HalfSpaces, y: Tensor) -> bool:
    """Whether y proves that no d of the region is in all half-spaces: `y >= 0`, and the largest `y (constant + normal d)` over the region is below 0.

    For d in all of them that sum would be at least 0. The rounding of `y constant`, of `y normal` and of their sum is at most `room` times their terms.
    """
    y = y.clamp(min=0)
    room = 2 * gamma(len(y) + 8)
    largest = y @ of.constant + region.support(y @ of.normal)
    terms = y @ of.constant.abs() + (y @ of.normal.abs()) @ region.reach
    return bool(largest + room * terms < 0)  # not for NaN


def propose(region: Region, of: HalfSpaces) -> tuple[Tensor | None, Tensor | None]:
    """Weights y that may exclude all d, and a d of the region that may be inside all half-spaces; either may be missing, and neither is proved."""
    reach = region.reach
    normal = of.normal * reach  # of u with d = reach u, so that all sizes are near 1
    lengths = torch.maximum(normal.norm(dim=1), of.constant.abs())
    lengths = torch.where(lengths > 0, lengths, 1.0)
    problem = (of.constant / lengths).numpy(), (normal / lengths[:, None]).numpy()
    try:
        y, u = _nearest(*problem) if region.p == 2 and math.isfinite(region.radius) else _deepest(region, *problem)
    except (RuntimeError, ValueError):  # a solver that gives up proposes nothing
        return None, None
    weights = None if y is None else torch.from_numpy(np.maximum(y, 0.0)) / lengths
    return weights, None if u is None else into(region, reach * torch.from_numpy(u))


def into(region: Region, d: Tensor) -> Tensor:  # (..., inputs), the same
    """The points d, moved into the region."""
    d = torch.minimum(torch.maximum(d, region.low), region.high)
    if not math.isfinite(region.radius):
        return d
    size = torch.linalg.vector_norm(d, ord=region.p, dim=-1, keepdim=True)
    return torch.where(size > region.radius * _INSIDE, d * (region.radius * _INSIDE / size.clamp(min=2.0**-1000)), d)


def _deepest(region: Region, constant: Array, normal: Array) -> tuple[Array | None, Array | None]:
    """The u of a box, or of an l1 ball, that is furthest inside the nearest half-space, by a linear program; its multipliers where that is outside."""
    reach = region.reach.clamp(min=2.0**-1000)
    in_ball, inputs = math.isfinite(region.radius), normal.shape[1]
    rows = np.hstack([-normal, np.ones((len(normal), 1))])
    bounds = [*zip((region.low / reach).tolist(), (region.high / reach).tolist(), strict=True), (None, 2.0)]
    limits = constant
    if in_ball:  # u = v - w with v, w >= 0 and a sum of at most 1
        rows = np.hstack([-normal, normal, np.ones((len(normal), 1))])
        rows = np.vstack([rows, np.append(np.ones(2 * inputs), 0.0)])
        bounds = [(0, None)] * (2 * inputs) + bounds[-1:]
        limits = np.append(constant, 1.0)
    goal = np.zeros(rows.shape[1])
    goal[-1] = -1
    found = linprog(goal, A_ub=rows, b_ub=limits, bounds=bounds, method="highs")
    if found.status != 0:
        return None, None
    u = found.x[:inputs] - (found.x[inputs : 2 * inputs] if in_ball else 0.0)
    return -found.ineqlin.marginals[: len(normal)], u if -found.fun > 0 else None


def _nearest(constant: Array, normal: Array) -> tuple[Array | None, Array | None]:
    """The u of least l2 norm in all half-spaces (a problem of least squares with y >= 0: Lawson and Hanson 1974, chapter 23), and its multipliers.

    Where it is outside the unit ball they exclude all of it. Where it is inside, a point further inside the half-spaces is looked for.
    """
    y, u = _least(constant, normal)
    if u is None or np.linalg.norm(u) > 1:
        return y, None
    for margin in _MARGINS:
        _, inner = _least(constant - margin, normal)
        if inner is not None and np.linalg.norm(inner) <= 1:
            return y, inner
    return y, u


def _least(constant: Array, normal: Array) -> tuple[Array, Array | None]:
    matrix = np.vstack([normal.T, -constant])
    goal = np.zeros(len(matrix))
    goal[-1] = 1.0
    y, _ = nnls(matrix, goal)
    rest = matrix @ y - goal
    return y, -rest[:-1] / rest[-1] if abs(rest[-1]) > 1e-12 else None
