"""The dual-barrier Newton method for LipSDP: every iterate is strictly feasible, so every iterate proves a bound."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
_REACH = 5.0  # decrement that a larger tau may bring: longer strides stray from the path, and cost more steps than they save
_CENTRED = 0.9  # Newton decrement; the gap that is read off is valid below 1


class Barrier(Protocol):
    """What Newton's method needs of a program `min rho` such that a matrix P, affine in rho and the multipliers, is positive semidefinite."""

    @property
    def size(self) -> int:
        """Of the matrix."""

    @property
    def count(self) -> int:
        """Of the multipliers."""

    @property
    def norm(self) -> float:
        """Of the inputs, 2 or inf."""

    @property
    def guarded(self) -> NDArray[np.bool_]:
        """The multipliers whose sign the matrix does not keep by itself: only these get a barrier of their own, as each one makes the path longer."""

    def factor(self, rho: float, multipliers: Array) -> Any:
        """A Cholesky factor of P, or None where P is not positive definite."""

    def log_det(self, factor: Any) -> float:
        """`log det P`."""

    def derivatives(self, factor: Any) -> tuple[Array, Array]:
        """Of `log det P` in (rho, t): the gradient, (1 + multipliers,), and minus the Hessian."""

    def lipschitz(self, rho: float) -> float:
        """The constant that a feasible rho stands for."""


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
    program: Barrier,
    start: tuple[float, Array],  # rho, multipliers: strictly feasible
    groups: Labels | None = None,  # (multipliers,) labels: equal ones share a multiplier
    tolerance: float = 1e-8,  # relative gap of rho
    iterations: int = 500,
    seconds: float = math.inf,
    report: Report | None = None,
) -> Proposal:
    """Minimise `tau rho - log det P(rho, t) - sum log t` for growing tau, the last sum over multipliers that P does not keep positive by itself.

    Near the path rho is within `(size + multipliers + decrement sqrt) / tau` of the optimum. Ctrl-C ends with what was reached.
    Raises ValueError for a start that is not strictly feasible.
    """
    began = time.perf_counter()
    labels: Labels = np.arange(program.count) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1).astype(np.int64)
    first = np.unique(labels, return_index=True)[1].astype(np.int64)
    state = _State.at(program, start[0], start[1])
    if state is None:
        raise ValueError("the start of Newton's method must be strictly feasible")
    best, guarded = state, program.guarded[first]
    total = program.size + int(guarded.sum())
    tau, gap, status, done = total / max(state.rho, 1e-300), math.inf, "iteration limit", 0
    tries_left, of_rho = 3, 0.5 if program.norm == 2 else 1.0  # the constant is the root of rho, or rho
    try:
        for done in range(iterations):
            steps = _steps(program, state, labels, first, guarded)
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
                report(Progress(done, program.lipschitz(best.rho), gap * of_rho, time.perf_counter() - began))
            if time.perf_counter() - began > seconds:
                status = "time limit"
                break
            step = centring - tau * along_rho
            moved = _search(program, state, step, first[guarded], tau, decrement_of(tau))
            if moved is None:
                tries_left -= 1
                if not tries_left:
                    status = "stalled"
                    break
                tau /= 4  # back towards the centre, once or twice
                continue
            state = moved
            best = state if state.rho < best.rho else best
    except KeyboardInterrupt:
        status = "interrupted"
    return Proposal(best.multipliers, program.lipschitz(best.rho), status, done, gap * of_rho, time.perf_counter() - began)


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """A strictly feasible point, with the Cholesky factor there."""

    rho: float
    multipliers: Array
    factor: Any

    @classmethod
    def at(cls, program: Barrier, rho: float, multipliers: Array) -> _State | None:
        if not (multipliers > 0).all() or not math.isfinite(rho):
            return None
        factor = program.factor(rho, multipliers)
        return None if factor is None else cls(rho, multipliers, factor)

    def barrier(self, program: Barrier, tau: float, first: Labels) -> float:
        """`tau rho - log det P - sum log t`, one t for each label."""
        return float(tau * self.rho - program.log_det(self.factor) - np.log(self.multipliers[first]).sum())


def _steps(program: Barrier, state: _State, labels: Labels, first: Labels, guarded: NDArray[np.bool_]) -> tuple[Array, Array, Callable[[float], float]] | None:
    """The Newton step is `b - tau a` in (rho, t): a, b and the decrement as a function of tau."""
    with np.errstate(over="ignore", invalid="ignore"):  # at a constant of 0 rho falls for ever; what is not finite is refused below
        gradient, hessian = program.derivatives(state.factor)
        spread = np.concatenate([[0], 1 + labels])
        gradient, hessian = _grouped(gradient, spread), _grouped(_grouped(hessian, spread).T, spread)
    multipliers, diagonal = state.multipliers[first[guarded]], 1 + np.flatnonzero(guarded)
    gradient[diagonal] += 1 / multipliers
    hessian[diagonal, diagonal] += 1 / multipliers**2
    scale = np.sqrt(np.diagonal(hessian))
    if not (np.isfinite(hessian).all() and (scale > 0).all()):
        return None
    try:
        factor = scipy.linalg.cho_factor(hessian / scale / scale[:, None] + 1e-14 * np.eye(len(scale)), lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    unit = np.zeros(len(scale))
    unit[0] = 1.0
    a, b = (scipy.linalg.cho_solve(factor, vector / scale, check_finite=False) / scale for vector in (unit, gradient))

    def decrement(tau: float) -> float:
        step = b - tau * a
        return math.sqrt(max(float(step @ (hessian @ step)), 0.0))

    return a[spread], b[spread], decrement


def _next(tau: float, decrement: Callable[[float], float]) -> float:
    """A larger tau: 8 times, or as much as keeps the next step within reach."""
    factor = 8.0
    while factor > 1.02 and decrement(tau * factor) > _REACH:
        factor = 1 + (factor - 1) / 1.5
    return tau * factor


def _search(program: Barrier, state: _State, step: Array, first: Labels, tau: float, decrement: float) -> _State | None:
    """A point along the step with a lower barrier: from the length that is sure to be feasible, 1 / (1 + decrement), on by doubling."""
    before = state.barrier(program, tau, first)

    def at(length: float) -> tuple[float, _State | None]:
        found = _State.at(program, state.rho + length * step[0], state.multipliers + length * step[1:])
        return (math.inf, None) if found is None else (found.barrier(program, tau, first), found)

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
    count = int(labels.max(initial=-1)) + 1
    if len(labels) == count:
        return values.copy()
    sums = np.zeros((count, *values.shape[1:]))
    np.add.at(sums, labels, values)
    return sums
