"""Strictly feasible multipliers, from which solvers start; a bound of their own, cheap and loose (the closed form of ECLipsE-Fast, Xu & Sivaranjani 2024)."""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sdp.lure import LureSystem
from sdp.newton import newton
from sdp.program import Program, factors

Array = NDArray[np.float64]


def levels(system: LureSystem) -> NDArray[np.int64]:  # (nonlinearities,) integers
    """How many nonlinearities in a row lead up to each, of an explicit system: those of one level do not depend on each other."""
    depends = system.rows[:, system.inputs :] != 0
    found = np.zeros(system.count, dtype=np.int64)
    for j in range(system.count):
        before = found[depends[j]]
        found[j] = before.max() + 1 if len(before) else 0
    return found


def closed_form(system: LureSystem) -> Array | None:  # (nonlinearities,)
    """One multiplier for each level of an explicit system, level by level, feasible with `rho = 1` on the input and no output.

    With X the matrix of the signals so far and `lambda = |V X^-1 V'|`, V the rows of a level with slopes in [a, b], the Schur complement of the level's block
    is at least `2 t - (a + b)^2 t^2 lambda / (1 + 2 a b t lambda)`, and t makes that largest: `t = 1 / lambda` for a ReLU. None where float64 has no room for
    it.
    """
    try:
        return _closed_form(system)
    except (np.linalg.LinAlgError, OverflowError, ValueError):  # the last of scipy, for numbers that are not finite
        return None


def _closed_form(system: LureSystem) -> Array:
    inputs, level = system.inputs, levels(system)
    multipliers = np.zeros(system.count)
    left, right = factors(system)
    matrix = np.zeros((system.size, system.size))
    matrix[np.arange(inputs), np.arange(inputs)] = 1.0
    known = np.arange(inputs)
    for k in range(int(level.max(initial=-1)) + 1):
        here = np.flatnonzero(level == k)
        rows = system.rows[here][:, known]
        factor = scipy.linalg.cholesky(matrix[np.ix_(known, known)], lower=True)
        gains = scipy.linalg.solve_triangular(factor, rows.T, lower=True)
        size = max(float(np.linalg.norm(gains, 2)) ** 2, 1e-100)
        multipliers[here] = best_multiplier(size, system.lower[here], system.upper[here])
        half = left[here].T @ (multipliers[here, None] * right[here])
        matrix += half + half.T
        known = np.sort(np.concatenate([known, inputs + here]))
    return multipliers


def best_multiplier(size: float, lower: Array, upper: Array) -> float:
    """The t with the largest Schur complement, for the worst slopes of a level."""
    product, total = float((lower * upper).min()), float(np.abs(lower + upper).max())
    limit = math.inf if product >= 0 else 1 / (-2 * product * size)
    candidates = np.geomspace(1e-3, 1e3, 601) / size / max(float(np.maximum(np.abs(lower), np.abs(upper)).max()), 1e-100) ** 2
    candidates = candidates[candidates < 0.9 * limit]
    left = 2 * candidates - total**2 * candidates**2 * size / (1 + 2 * product * candidates * size)
    return float(candidates[int(np.argmax(left))])


def feasible(system: LureSystem, goal: Program) -> tuple[float, Array] | None:
    """rho and multipliers, strictly feasible for the program of this system; None where none are found (an implicit system that is not well-posed, say)."""
    multipliers = closed_form(system) if system.is_explicit else _well_posed(system)
    if multipliers is None:
        return None
    if goal.norm == 2:
        return _lifted(goal, multipliers)
    return _lifted(goal, np.concatenate([multipliers, np.ones(system.inputs)]))


def _lifted(goal: Program, multipliers: Array) -> tuple[float, Array] | None:
    """Scaled until some rho is feasible: with rho = 1 the outputs are at most `output (P)^-1 output'` times as large."""
    for scaled in (multipliers * 4.0**power for power in range(60)):
        rho = goal.smallest_gain(scaled)
        if math.isfinite(rho):
            rho, factor = min((rho, 1.0), *((goal.smallest_gain(scaled * factor), factor) for factor in (1.5, 2.0, 3.0, 5.0, 8.0)))
            return 1.2 * rho + 1e-12, scaled * factor
    return None


def _well_posed(system: LureSystem) -> Array | None:
    """Multipliers whose matrix is positive definite over the nonlinearities, of an implicit system."""
    inputs = system.inputs
    left, right = (part[:, inputs:] for part in factors(system))
    shifted = Program(left, right, np.ones(system.count), np.zeros((system.count, system.count)), 2)
    multipliers = np.ones(system.count)
    lowest = float(np.linalg.eigvalsh(shifted.matrix(0.0, multipliers))[0])
    if lowest > 0:
        return multipliers
    found = newton(shifted, (2 * abs(lowest) + 1.0, multipliers), iterations=200, tolerance=1e-6).multipliers
    return found if np.linalg.eigvalsh(shifted.matrix(0.0, found))[0] > 0 else None
