"""Other solvers on the same programs: SCS and Clarabel from their own data, and any that cvxpy knows, by name. They only propose."""

from __future__ import annotations

import importlib
import math
import time
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from sdp.newton import Proposal
from sdp.program import Program

Array = NDArray[np.float64]
DIRECT = ("scs", "clarabel")


def scs(program: Program, tolerance: float = 1e-6, seconds: float = math.inf) -> Proposal:
    """By SCS (O'Donoghue et al. 2016), a first-order method: fast to low accuracy, and it may say `solved` below the optimum."""
    module = _module("scs")
    a, b, c = _data(program, upper=False)
    started = time.perf_counter()
    limits = {} if math.isinf(seconds) else {"time_limit_secs": float(seconds)}
    cone = {"l": program.count, "s": [int(program.size)]}
    solver = module.SCS({"A": a, "b": b, "c": c}, cone, verbose=False, eps_abs=tolerance, eps_rel=tolerance, max_iters=200_000, **limits)
    found = solver.solve()
    return _proposal(program, found["x"], str(found["info"]["status"]), int(found["info"]["iter"]), time.perf_counter() - started)


def clarabel(program: Program, tolerance: float = 1e-8, seconds: float = math.inf) -> Proposal:
    """By Clarabel (Goulart & Chen 2024), an interior-point method: accurate, with memory that grows as size^4."""
    module = _module("clarabel")
    a, b, c = _data(program, upper=True)
    settings = module.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_rel = settings.tol_gap_abs = settings.tol_feas = tolerance
    if math.isfinite(seconds):
        settings.time_limit = float(seconds)
    cones = [module.NonnegativeConeT(program.count), module.PSDTriangleConeT(program.size)]
    started = time.perf_counter()
    found = module.DefaultSolver(scipy.sparse.csc_matrix((len(c), len(c))), c, a, b, cones, settings).solve()
    return _proposal(program, np.array(found.x), str(found.status), int(found.iterations), time.perf_counter() - started)


def cvxpy(program: Program, solver: str, tolerance: float = 1e-8, seconds: float = math.inf) -> Proposal:
    """By a solver that cvxpy knows under this name (SDPA, MOSEK, CVXOPT, ...). Raises ValueError, with the names, for one that is not installed."""
    check_cvxpy(solver)
    cp, name = _module("cvxpy"), solver.upper()
    rho, t = cp.Variable(nonneg=True), cp.Variable(program.count, nonneg=True)
    half = program.left.T @ cp.diag(t) @ program.right
    matrix = rho * np.diag(program.gain) + half + half.T + program.constant
    problem = cp.Problem(cp.Minimize(rho), [(matrix + matrix.T) / 2 >> 0])
    started = time.perf_counter()
    try:
        problem.solve(solver=name)
        status = str(problem.status)
    except cp.error.SolverError as error:
        status = (str(error).splitlines() or ["failed"])[0]
    values = np.full(program.count + 1, np.nan) if t.value is None else np.concatenate([[float(rho.value)], np.asarray(t.value)])
    return _proposal(program, values, status, 0, time.perf_counter() - started)


def check_cvxpy(solver: str) -> None:
    """Raises ValueError, with the names that there are, for a solver that cvxpy does not find."""
    known = _module("cvxpy").installed_solvers()
    if solver.upper() not in known:
        others = ", ".join(sorted(known))
        raise ValueError(
            f"no solver {solver!r} is installed; there are newton, first-order, split, closed-form, rescaled, scs, clarabel and, by cvxpy, {others}"
        )


def _module(name: str) -> Any:
    """scs, clarabel or cvxpy. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"the solver needs the package {name}, which is not installed: {error}; install it, or take the solver newton") from error


def _data(program: Program, upper: bool) -> tuple[scipy.sparse.csc_matrix, Array, Array]:
    """`A x + s = b` with x = (rho, t): t >= 0, and the matrix as the triangle that the solver wants, off-diagonals times sqrt(2)."""
    size, count = program.size, program.count
    index = _triangle(size, upper)
    gain = np.flatnonzero(program.gain)
    rows, columns, values = [index[gain, gain]], [np.zeros(len(gain), dtype=np.int64)], [program.gain[gain]]
    for j in range(count):
        left, right = np.flatnonzero(program.left[j]), np.flatnonzero(program.right[j])
        i, k = (part.reshape(-1) for part in np.meshgrid(left, right, indexing="ij"))
        weight = program.left[j][i] * program.right[j][k]
        rows.append(index[np.minimum(i, k), np.maximum(i, k)])
        columns.append(np.full(len(i), j + 1))
        values.append(np.where(i == k, 2.0, math.sqrt(2)) * weight)
    half = size * (size + 1) // 2
    matrix = scipy.sparse.coo_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(half, count + 1)).tocsc()
    positive = scipy.sparse.hstack([scipy.sparse.csc_matrix((count, 1)), scipy.sparse.eye(count)])
    i, k = np.triu_indices(size)
    constant = np.zeros(half)
    constant[index[i, k]] = np.where(i == k, 1.0, math.sqrt(2)) * program.constant[i, k]
    cost = np.zeros(count + 1)
    cost[0] = 1.0
    return scipy.sparse.vstack([-positive, -matrix]).tocsc(), np.concatenate([np.zeros(count), constant]), cost


def _triangle(size: int, upper: bool) -> NDArray[np.int64]:
    """The place of entry (i, k), i <= k, in the triangle by columns: the upper one, or the lower one (of the transposed entry)."""
    i, k = np.triu_indices(size)
    found = np.zeros((size, size), dtype=np.int64)
    found[i, k] = k * (k + 1) // 2 + i if upper else i * size - i * (i - 1) // 2 + (k - i)
    return found


def _proposal(program: Program, values: Array, status: str, iterations: int, seconds: float) -> Proposal:
    """What a solver returned; multipliers that are negative by its tolerance are set to 0, NaN to 0."""
    if not np.isfinite(values).all():
        return Proposal(np.zeros(program.count), math.nan, status, iterations, math.inf, seconds)
    return Proposal(np.maximum(values[1:], 0.0), program.lipschitz(float(values[0])), status, iterations, math.inf, seconds)
