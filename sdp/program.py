"""LipSDP as one kind of program: `min rho` such that `rho diag(gain) + sum_j t_j (l_j r_j' + r_j l_j') + constant >= 0` and `t >= 0`.

Every multiplier stands before a matrix of rank 2, which is what makes Newton's method cheap (`sdp.newton`). Solvers see programs, not networks; what they
return are multipliers, which `sdp.proof` turns into a bound from the system itself.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sdp.lure import LureSystem

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The data of one program; a bound on the Lipschitz constant is `root(rho)`."""

    left: Array  # (multipliers, size)
    right: Array  # (multipliers, size)
    gain: Array  # (size,), not negative
    constant: Array  # (size, size), symmetric
    norm: float  # of the inputs: 2 or inf

    @property
    def size(self) -> int:
        """Of the matrix."""
        return len(self.gain)

    @property
    def count(self) -> int:
        """Of the multipliers."""
        return len(self.left)

    @property
    def guarded(self) -> NDArray[np.bool_]:
        """The multipliers that no entry of the diagonal keeps positive: one to which no other adds anything, as for every ReLU of a feed-forward network."""
        diagonal = self.left * self.right
        alone = (np.count_nonzero(diagonal, axis=0) == 1) & (self.gain == 0) & (np.diagonal(self.constant) <= 0)
        return ~((diagonal > 0) & alone).any(axis=1)

    def matrix(self, rho: float, multipliers: Array) -> Array:
        """What has to be positive semidefinite."""
        half = self.left.T @ (multipliers[:, None] * self.right)
        made = half + half.T + self.constant
        index = np.arange(self.size)
        made[index, index] += rho * self.gain
        return np.asarray(made)

    def factor(self, rho: float, multipliers: Array) -> Array | None:
        """The lower Cholesky factor of the matrix, or None where it is not positive definite."""
        try:
            found = scipy.linalg.cholesky(self.matrix(rho, multipliers), lower=True, check_finite=False)
        except scipy.linalg.LinAlgError:
            return None
        return found if np.isfinite(np.diagonal(found)).all() else None

    def log_det(self, factor: Array) -> float:
        """`log det` of the matrix with this factor."""
        return 2 * float(np.log(np.diagonal(factor)).sum())

    def derivatives(self, factor: Array) -> tuple[Array, Array]:
        """Of `log det` in (rho, t): with `Z = P^-1`, `2 l_j' Z r_j`, and minus the Hessian, `2 [(l_j' Z r_k)(r_j' Z l_k) + (l_j' Z l_k)(r_j' Z r_k)]`.

        Three products and three triangular solves.
        """
        left, right = (scipy.linalg.solve_triangular(factor, part.T, lower=True, check_finite=False) for part in (self.left, self.right))
        cross = left.T @ right
        inside = np.flatnonzero(self.gain)
        columns = np.zeros((self.size, len(inside)))
        columns[inside, np.arange(len(inside))] = np.sqrt(self.gain[inside])
        gains = scipy.linalg.solve_triangular(factor, columns, lower=True, check_finite=False)
        hessian = np.empty((self.count + 1, self.count + 1))
        hessian[1:, 1:] = 2 * (cross * cross.T + (left.T @ left) * (right.T @ right))
        hessian[0, 0] = ((gains.T @ gains) ** 2).sum()
        hessian[0, 1:] = hessian[1:, 0] = 2 * ((gains.T @ left) * (gains.T @ right)).sum(axis=0)
        return np.concatenate([[(gains * gains).sum()], 2 * np.diagonal(cross)]), hessian

    def lipschitz(self, rho: float) -> float:
        """The constant that a feasible rho stands for."""
        return math.sqrt(max(rho, 0.0)) if self.norm == 2 else rho

    def smallest_gain(self, multipliers: Array) -> float:
        """The smallest rho that is feasible with these multipliers, by a Schur complement; inf if none is. A proposal, not a proof."""
        inside = self.gain > 0
        matrix = self.matrix(0.0, multipliers)
        root = np.sqrt(self.gain[inside])
        rest, cross, first = matrix[np.ix_(~inside, ~inside)], matrix[np.ix_(~inside, inside)], matrix[np.ix_(inside, inside)]
        try:
            half = np.linalg.solve(np.linalg.cholesky(rest), cross)
        except np.linalg.LinAlgError:
            return math.inf
        needed = (half.T @ half - first) / root / root[:, None]
        return max(float(np.linalg.eigvalsh(needed)[-1]), 0.0) if np.isfinite(needed).all() else math.inf


def factors(system: LureSystem) -> tuple[Array, Array]:  # (nonlinearities, signals) each
    """`p_j = e_j - lower_j v_j` and `q_j = e_j - upper_j v_j`: `(p_j's)(q_j's) <= 0` on differences s of signals."""
    selector = np.zeros_like(system.rows)
    selector[:, system.inputs :] = np.eye(system.count)
    return selector - system.lower[:, None] * system.rows, selector - system.upper[:, None] * system.rows


def program(system: LureSystem, norm: float = 2) -> Program:
    """LipSDP of a system from l2 (to l2), or from l-infinity where its output is a single number.

    l2 (Fazlyab et al. 2019): `rho E_x + sum_j t_j (p_j q_j' + q_j p_j') - output'output >= 0`, `L = sqrt(rho)`. l-infinity (Wang, Prakriya & Ye 2022): with one
    more coordinate, of the constant 1, and multipliers mu_i of `x_i^2 <= 1`: `[[2 rho - sum mu, -c], [-c', diag(mu) + sum_j t_j (...)]] >= 0`, `L = rho`; the
    multipliers are (t, mu).
    """
    left, right = factors(system)
    if norm == 2:
        gain = np.zeros(system.size)
        gain[: system.inputs] = 1.0
        return Program(left, right, gain, -(system.output.T @ system.output), 2)
    if norm != math.inf:
        raise ValueError(f"programs are for inputs in l2 or in l-infinity, got p={norm:g}; for l1 take the largest constant along one coordinate")
    if len(system.output) != 1:
        raise ValueError(f"from l-infinity a system has one output, got {len(system.output)}; take them, or their differences, one by one")
    inputs, size = system.inputs, system.size + 1
    more = np.zeros((2, inputs, size))  # mu_i (x_i^2 - 1) = mu_i (x_i - 1)(x_i + 1)
    more[:, np.arange(inputs), 1 + np.arange(inputs)] = 1.0
    more[0, :, 0], more[1, :, 0] = -1.0, 1.0
    wide = [np.pad(part, ((0, 0), (1, 0))) for part in (left, right)]
    gain, constant = np.zeros(size), np.zeros((size, size))
    gain[0] = 2.0
    constant[0, 1:] = constant[1:, 0] = -system.output[0]
    return Program(np.vstack([wide[0], more[0] / 2]), np.vstack([wide[1], more[1]]), gain, constant, math.inf)
