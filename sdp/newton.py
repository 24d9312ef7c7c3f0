"""The dual-barrier Newton method for LipSDP: every iterate is strictly feasible, so every iterate proves a bound."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sdp.program import Program

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
_CENTRED = 0.9  # Newton decrement; the gap that is read off is valid below 1


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a solver is: what it would claim now, and how far that is at most from the optimum, relative (inf: not known)."""

    iteration: int
    lipschitz: float
    gap: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Proposal:
    """Multipliers, and what the solver says of them. Nothing here is a bound: see `sdp.prove`."""

    multipliers: Array
    claimed: float  # Lipschitz constant
    status: str  # "optimal", "stalled", "iteration limit", "time limit", "interrupted", or a solver's own word
    iterations: int
    gap: float  # relative, of the claimed constant; inf: not known
    seconds: float


Report = Callable[[Progress], None]


def newton(
    program: Program,
    start: tuple[float, Array],  # rho, multipliers: strictly feasible
    groups: Labels | None = None,  # (multipliers,) labels: equal ones share a multiplier
    tolerance: float = 1e-8,  # relative gap of rho
    iterations: int = 500,
    seconds: float = math.inf,
    report: Report | None = None,
) -> Proposal:
    """Minimise `tau rho - log det P(rho, t) - sum log t` for growing tau.

    With `Z = P^-1` the gradient is `2 l_j' Z r_j`, the Hessian `2 [(l_j' Z r_k)(r_j' Z l_k) + (l_j' Z l_k)(r_j' Z r_k)]`: three products and two Cholesky
    factorisations a step. Near the path rho is within `(size + multipliers + decrement sqrt) / tau` of the optimum. Ctrl-C ends with what was reached.
    Raises ValueError for a start that is not strictly feasible.
    """
    began = time.perf_counter()
    labels = np.arange(program.count) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1).astype(np.int64)
    state = _State.at(program, start[0], start[1])
    if state is None:
        raise ValueError("the start of Newton's method must be strictly feasible")
    total = program.size + int(labels.max(initial=-1)) + 1
    tau, gap, status, done = total / max(state.rho, 1e-300), math.inf, "iteration limit", 0
    tries_left = 3
    try:
        for done in range(iterations):
            steps = _steps(program, state, labels)
            if steps is None:
                status = "stalled"
                break
            along_rho, centring, decrement_of = steps
            decrement = decrement_of(tau)
            if decrement < _CENTRED:
                gap = min(gap, (total + decrement * math.sqrt(total)) / tau / max(state.rho, 1e-300))
                if gap < tolerance:
                    status = "optimal"
                    break
                tau = _next(tau, decrement_of)
            if report is not None:
                report(Progress(done, program.lipschitz(state.rho), gap if program.norm != 2 else gap / 2, time.perf_counter() - began))
            if time.perf_counter() - began > seconds:
                status = "time limit"
                break
            step = centring - tau * along_rho
            moved = _search(program, state, step, labels, tau, decrement_of(tau))
            if moved is None:
                tries_left -= 1
                if not tries_left:
                    status = "stalled"
                    break
                tau /= 4  # back towards the centre, once or twice
                continue
            state = moved
    except KeyboardInterrupt:
        status = "interrupted"
    claimed = program.lipschitz(state.rho)
    return Proposal(state.multipliers, claimed, status, done, gap if program.norm != 2 else gap / 2, time.perf_counter() - began)


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """A strictly feasible point, with the Cholesky factor there."""

    rho: float
    multipliers: Array
    factor: Array  # lower

    @classmethod
    def at(cls, program: Program, rho: float, multipliers: Array) -> _State | None:
        if not (multipliers > 0).all() or not math.isfinite(rho):
            return None
        try:
            factor = scipy.linalg.cholesky(program.matrix(rho, multipliers), lower=True, check_finite=False)
        except scipy.linalg.LinAlgError:
            return None
        return cls(rho, multipliers, factor) if np.isfinite(np.diagonal(factor)).all() else None

    def barrier(self, tau: float, labels: Labels) -> float:
        """`tau rho - log det P - sum log t`."""
        first = np.unique(labels, return_index=True)[1]
        return float(tau * self.rho - 2 * np.log(np.diagonal(self.factor)).sum() - np.log(self.multipliers[first]).sum())


def _steps(program: Program, state: _State, labels: Labels) -> tuple[Array, Array, Callable[[float], float]] | None:
    """The Newton step is `b - tau a` in (rho, t): a, b and the decrement as a function of tau."""
    solved = [scipy.linalg.solve_triangular(state.factor, part.T, lower=True, check_finite=False) for part in (program.left, program.right)]
    cross = solved[0].T @ solved[1]
    hessian = 2 * (cross * cross.T + (solved[0].T @ solved[0]) * (solved[1].T @ solved[1]))
    inside = np.flatnonzero(program.gain)
    columns = np.zeros((program.size, len(inside)))
    columns[inside, np.arange(len(inside))] = np.sqrt(program.gain[inside])
    gains = scipy.linalg.solve_triangular(state.factor, columns, lower=True, check_finite=False)
    count = int(labels.max(initial=-1)) + 1
    whole = np.empty((count + 1, count + 1))
    whole[1:, 1:] = _grouped(_grouped(hessian, labels).T, labels)
    whole[0, 0] = ((gains.T @ gains) ** 2).sum()
    whole[0, 1:] = whole[1:, 0] = _grouped(2 * ((gains.T @ solved[0]) * (gains.T @ solved[1])).sum(axis=0), labels)
    multipliers = np.empty(count)
    multipliers[labels] = state.multipliers
    gradient = np.concatenate([[(gains * gains).sum()], _grouped(2 * np.diagonal(cross), labels) + 1 / multipliers])
    whole[np.arange(1, count + 1), np.arange(1, count + 1)] += 1 / multipliers**2
    scale = np.sqrt(np.diagonal(whole))
    if not (np.isfinite(whole).all() and (scale > 0).all()):
        return None
    try:
        factor = scipy.linalg.cho_factor(whole / scale / scale[:, None] + 1e-14 * np.eye(count + 1), lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    first = np.zeros(count + 1)
    first[0] = 1.0
    a, b = (scipy.linalg.cho_solve(factor, vector / scale, check_finite=False) / scale for vector in (first, gradient))

    def decrement(tau: float) -> float:
        step = b - tau * a
        return math.sqrt(max(float(step @ (whole @ step)), 0.0))

    spread = np.concatenate([[0], 1 + labels])
    return a[spread], b[spread], decrement


def _next(tau: float, decrement: Callable[[float], float]) -> float:
    """A larger tau: 8 times, or as much as keeps the next step within reach."""
    factor = 8.0
    while factor > 1.5 and decrement(tau * factor) > 30.0:
        factor /= 1.5
    return tau * factor


def _search(program: Program, state: _State, step: Array, labels: Labels, tau: float, decrement: float) -> _State | None:
    """A point along the step with a lower barrier: from the length that is sure to be feasible, 1 / (1 + decrement), on by doubling."""
    before = state.barrier(tau, labels)

    def at(length: float) -> tuple[float, _State | None]:
        found = _State.at(program, state.rho + length * step[0], state.multipliers + length * step[1:])
        return (math.inf, None) if found is None else (found.barrier(tau, labels), found)

    if decrement < 0.25:
        value, found = at(1.0)
        return found if value <= before + 1e-9 * abs(before) else None
    length = 1 / (1 + decrement)
    best, found = at(length)
    while best > before and length > 1e-6:
        length /= 4
        best, found = at(length)
    while length < 1:
        value, further = at(min(2 * length, 1.0))
        if not value < best:
            break
        length, best, found = min(2 * length, 1.0), value, further
    return found if best < before else None


def _grouped(values: Array, labels: Labels) -> Array:
    """Sums over the first axis of what shares a label."""
    if len(labels) == int(labels.max(initial=-1)) + 1:
        return values
    sums = np.zeros((int(labels.max(initial=-1)) + 1, *values.shape[1:]))
    np.add.at(sums, labels, values)
    return sums
