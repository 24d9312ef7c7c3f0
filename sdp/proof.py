"""Proofs in float64. Short, numpy only, no solver in it: what is returned here is true whoever proposed it.

A matrix is shown to be positive semidefinite by a Cholesky factorisation of the matrix minus a multiple of the identity that is larger than anything
that rounding can do (Rump, "Verification of positive definiteness", BIT 46, 2006; Higham, "Accuracy and Stability of Numerical Algorithms", theorem 10.3).
Valid for IEEE float64 with rounding to nearest and sums in any order, with or without fused multiply-add; not for Strassen-like products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sdp.lure import LureSystem

Array = NDArray[np.float64]
UNIT = 2.0**-53
_SLACK = 1 + 2.0**-40  # covers the few roundings in the error terms themselves


def gamma(operations: int) -> float:
    """`k u / (1 - k u)`, rounded up: the relative error of a sum of k products."""
    return operations * UNIT / (1 - operations * UNIT) * _SLACK


def is_positive_semidefinite(
    matrix: Array,  # (n, n), symmetric
    error: Array | None = None,  # (n, n), entrywise, not negative
) -> bool:
    """True only if every symmetric matrix within `error` of `matrix`, entry by entry, is positive semidefinite.

    False means: not proved. NaN, infinities and asymmetric input give False.
    """
    diagonal = np.diagonal(matrix)
    if not (np.isfinite(matrix).all() and (diagonal > 0).all() and np.array_equal(matrix, matrix.T)):
        return False
    scale = np.exp2(-np.round(0.5 * np.log2(diagonal)))  # powers of two: exact, and the diagonal is about 1
    scaled = matrix * scale[:, None] * scale
    size = len(matrix)
    rounding = gamma(4 * (size + 4))  # 4: blocked LAPACK, reciprocals in place of divisions
    shift = np.full(size, rounding / (1 - 2 * rounding) * float(np.trace(scaled)) + size**2 * 2.0**-900)
    if error is not None:
        if not (error >= 0).all():
            return False
        shift += (error * scale[:, None] * scale).sum(axis=1) * (1 + gamma(size + 2))  # E + diag(sum_j |E_ij|) >= 0, by Gershgorin
    shift *= _SLACK
    if not np.isfinite(shift).all():
        return False
    index = np.arange(size)
    scaled[index, index] = np.nextafter(scaled[index, index] - shift, -np.inf)
    try:
        factor = np.linalg.cholesky(scaled)
    except np.linalg.LinAlgError:
        return False
    return bool(np.isfinite(factor).all() and (np.diagonal(factor) > 0).all())  # some LAPACKs let NaN through


def largest_eigenvalue(
    matrix: Array,  # (n, n), symmetric
    error: Array | None = None,  # (n, n), entrywise
) -> float:
    """A proved upper bound on the largest eigenvalue of every symmetric matrix within `error` of a positive semidefinite `matrix`; inf if not provable.

    The eigenvalue routine proposes, `is_positive_semidefinite` proves, with the smallest inflation that passes.
    """
    if not np.isfinite(matrix).all():
        return math.inf
    if len(matrix) == 0:
        return 0.0
    proposal = max(float(np.linalg.eigvalsh(matrix)[-1]), 0.0) + (0.0 if error is None else float(error.sum(axis=1).max()))
    floor = float(np.abs(matrix).max(initial=0.0)) * 1e-30 + 1e-280
    eye = np.eye(len(matrix))
    rounding = 2 * UNIT * np.abs(np.diag(np.diagonal(matrix)))  # of the subtraction below; the diagonal of the result is checked to be positive
    for inflation in _inflations(len(matrix)):
        value = proposal * (1 + inflation) + floor
        allowed = rounding + 2 * UNIT * value * eye
        if is_positive_semidefinite(value * eye - matrix, allowed if error is None else allowed + error):
            return value
    return math.inf


def prove(
    system: LureSystem,
    multipliers: Array,  # (nonlinearities,), or (nonlinearities + inputs,) from l-infinity; not negative
    norm: float = 2,
) -> float:
    """A proved Lipschitz constant (from l2 or l-infinity, everywhere) of the system, from proposed LipSDP multipliers; inf if they prove none.

    With `p_j = e_j - lower_j v_j`, `q_j = e_j - upper_j v_j` every slope-restricted nonlinearity has `(p_j's)(q_j's) <= 0` on differences s of signals, so
    `P = rho E_0 + sum_j t_j (p_j q_j' + q_j p_j') - output'output >= 0` gives `|df|^2 <= rho |dx|^2` (Fazlyab et al. 2019, with diagonal multipliers: the only
    ones that are valid for increments). Proved in the augmented form `[[P + output'output, output'], [output, I]]`, which needs no product of outputs.
    From l-infinity, for one output c, `[[2 rho - sum mu, -c], [-c', diag(mu) + sum_j t_j (...)]] >= 0` gives `|df| <= rho |dx|_inf` (multipliers t, then mu).
    For an implicit system: of its solutions; see `is_well_posed` for their existence.
    Raises ValueError for multipliers of the wrong shape, negative or not finite, and from l-infinity for more outputs than one.
    """
    check_multipliers(system, multipliers, norm)
    matrix, error, gains, weight = (_augmented if norm == 2 else _bordered)(system, multipliers)
    proposal = _smallest_gain(matrix, len(gains)) / weight
    if not math.isfinite(proposal):
        return math.inf
    base = matrix[gains, gains].copy()
    for inflation in _inflations(len(matrix)):
        rho = proposal * (1 + inflation) + 1e-280
        matrix[gains, gains] = base + weight * rho
        allowed = error.copy()
        allowed[gains, gains] += 2 * UNIT * (np.abs(base) + weight * rho)
        if is_positive_semidefinite(matrix, allowed):
            return math.nextafter(math.sqrt(rho), math.inf) if norm == 2 else rho
    return math.inf


def prove_every(
    systems: Sequence[Callable[[], LureSystem]],  # each made when it is its turn: together they may be large
    multipliers: Array,  # (nonlinearities,), shared by all; not negative
) -> float:
    """`prove` of every one of the systems, from l2, with the same multipliers: the largest; inf if they do not prove one for each.

    A rho that is proved for one system is proved for it when rho grows, so one pass is enough.
    Raises ValueError as `prove` does.
    """
    size, proposal = 0, 0.0
    for make in systems:
        system = make()
        check_multipliers(system, multipliers, 2)
        matrix = _augmented(system, multipliers)[0]
        size, proposal = max(size, len(matrix)), max(proposal, _smallest_gain(matrix, system.inputs))
    if not math.isfinite(proposal):
        return math.inf
    tries = iter(_inflations(size))
    rho = proposal * (1 + next(tries)) + 1e-280
    for make in systems:
        matrix, error, gains, _ = _augmented(make(), multipliers)
        base, base_error = matrix[gains, gains].copy(), error[gains, gains].copy()
        while True:
            matrix[gains, gains] = base + rho
            error[gains, gains] = base_error + 2 * UNIT * (np.abs(base) + rho)
            if is_positive_semidefinite(matrix, error):
                break
            inflation = next(tries, math.inf)
            if not math.isfinite(inflation):
                return math.inf
            rho = proposal * (1 + inflation) + 1e-280
    return math.nextafter(math.sqrt(rho), math.inf)


def check_multipliers(system: LureSystem, multipliers: Array, norm: float) -> None:
    """Raises ValueError as `prove` does."""
    if norm not in (2, math.inf):
        raise ValueError(f"bounds are proved from l2 or l-infinity, got p={norm:g}; from l1 take the largest constant along one coordinate (LureSystem.along)")
    if norm == math.inf and len(system.output) != 1:
        raise ValueError(f"from l-infinity a system has one output, got {len(system.output)}; take them, or their differences, one by one")
    count = system.count + (system.inputs if norm == math.inf else 0)
    if multipliers.shape != (count,):
        raise ValueError(f"multipliers must have the shape ({count},), one per nonlinearity{' and input' if norm == math.inf else ''}, got {multipliers.shape}")
    if not np.isfinite(multipliers).all() or (multipliers < 0).any():
        raise ValueError(f"multipliers must be finite and not negative, got {multipliers[~(multipliers >= 0) | ~np.isfinite(multipliers)][:1]}")


def is_well_posed(
    system: LureSystem,
    multipliers: Array,  # (nonlinearities,)
) -> bool:
    """True only if an implicit system is proved to have exactly one solution for each input: `sum_j t_j (p_j q_j' + q_j p_j')` is positive definite over a.

    (Revay, Wang & Manchester 2020.) Explicit systems always have.
    """
    if system.is_explicit:
        return True
    check_multipliers(system, multipliers, 2)
    form, error = _quadratic(system, multipliers)
    inner, inner_error = form[system.inputs :, system.inputs :], error[system.inputs :, system.inputs :]
    index = np.arange(len(inner))
    inner_error[index, index] += 2.0**-40 * np.abs(inner[index, index])  # strictly
    return is_positive_semidefinite(inner, inner_error)


def estimate(
    system: LureSystem,
    multipliers: Array,  # (nonlinearities,)
) -> float:
    """What `prove` would come close to, at the cost of one factorisation: for choosing between multipliers, never a bound."""
    return math.sqrt(_smallest_gain(_augmented(system, multipliers)[0], system.inputs))


def _inflations(size: int) -> list[float]:
    """The smallest, and then those that a matrix of this size may need: it is shifted by about `4 size^2` roundings, unless its diagonal is all there is."""
    return [1e-14, *(found for k in range(1, 27) if (found := 1e-14 * 4.0**k) >= size**2 * UNIT)]


_Form = tuple[Array, Array, NDArray[np.int64], float]  # a matrix, its entrywise error, where rho stands on the diagonal, and how many times


def _augmented(system: LureSystem, multipliers: Array) -> _Form:
    """`[[sum_j t_j (p_j q_j' + q_j p_j'), output'], [output, I]]`, and what may be wrong with it."""
    signals, outputs = system.size, len(system.output)
    matrix = np.zeros((signals + outputs, signals + outputs))
    error = np.zeros_like(matrix)
    matrix[:signals, :signals], error[:signals, :signals] = _quadratic(system, multipliers)
    matrix[:signals, signals:], matrix[signals:, :signals] = system.output.T, system.output
    if system.output_error is not None:
        error[:signals, signals:], error[signals:, :signals] = system.output_error.T, system.output_error
    matrix[signals:, signals:] = np.eye(outputs)
    return matrix, error, np.arange(system.inputs), 1.0


def _bordered(system: LureSystem, multipliers: Array) -> _Form:
    """`[[-sum mu, -c], [-c', diag(mu) + sum_j t_j (p_j q_j' + q_j p_j')]]`, and what may be wrong with it."""
    inputs, size = system.inputs, system.size + 1
    t, mu = multipliers[: system.count], multipliers[system.count :]
    matrix, error = np.zeros((size, size)), np.zeros((size, size))
    matrix[1:, 1:], error[1:, 1:] = _quadratic(system, t)
    index = np.arange(1, inputs + 1)
    matrix[index, index] += mu
    error[index, index] += 2 * UNIT * np.abs(matrix[index, index])
    matrix[0, 0] = -mu.sum()
    error[0, 0] = gamma(inputs + 2) * mu.sum()
    matrix[0, 1:] = matrix[1:, 0] = -system.output[0]
    if system.output_error is not None:
        error[0, 1:] = error[1:, 0] = system.output_error[0]
    return matrix, error, np.arange(1), 2.0


def _quadratic(system: LureSystem, multipliers: Array) -> tuple[Array, Array]:
    """`sum_j t_j (p_j q_j' + q_j p_j')` and an entrywise bound on what rounding did to it, and on what the errors of the rows may do."""
    selector = np.zeros_like(system.rows)
    count = system.count
    selector[:, system.inputs :] = np.eye(count)
    low, high = np.abs(system.lower)[:, None], np.abs(system.upper)[:, None]
    p, q = (selector - slope[:, None] * system.rows for slope in (system.lower, system.upper))
    p_size, q_size = (selector + slope * np.abs(system.rows) for slope in (low, high))
    half = p.T @ (multipliers[:, None] * q)
    slack = 1 + gamma(count + 10)
    half_error = gamma(count + 10) * (p_size.T @ (multipliers[:, None] * q_size)) * slack + 2.0**-1000
    if system.rows_error is not None:
        p_error, q_error = (slope * system.rows_error for slope in (low, high))
        half_error += (p_error.T @ (multipliers[:, None] * (q_size + q_error)) + p_size.T @ (multipliers[:, None] * q_error)) * slack * _SLACK
    form = half + half.T
    return form, half_error + half_error.T + 2 * UNIT * np.abs(form)


def _smallest_gain(matrix: Array, inputs: int) -> float:
    """The smallest rho for which the matrix with rho on its first entries is positive semidefinite, by a Schur complement; a proposal only."""
    rest, cross = matrix[inputs:, inputs:], matrix[inputs:, :inputs]
    try:
        half = np.linalg.solve(np.linalg.cholesky(rest), cross)
        rho = float(np.linalg.eigvalsh(half.T @ half - matrix[:inputs, :inputs])[-1])
    except np.linalg.LinAlgError:
        return math.inf
    return max(rho, 0.0)
