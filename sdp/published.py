"""The constraints that were published for MaxMin, GroupSort and Householder (Pauli et al., ICLR 2024), as a cross-check.

`sdp.wiring` sees sorting as comparators, each one ReLU beside a linear map; restricted to the subspace where sums are kept, the published constraints are a
special case of that. So what is proved here is never below what `sdp.lipsdp` proves, which the tests hold both to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdp.lure import feed_forward
from sdp.proof import UNIT, gamma, is_positive_semidefinite

Array = NDArray[np.float64]


def groupsort(
    weights: Sequence[Array],  # W_0 .. W_L
    size: int,  # of the groups that are sorted between them
    solver: str = "CLARABEL",
) -> float:
    """A proved Lipschitz constant (l2 to l2) of `W_L sort(W_{L-1} ... sort(W_0 x))` by the published constraints, solved by cvxpy; inf if not provable.

    `dv' T dv - da' T da >= 0` with `T = diag(lam) (x) I + diag(gam) (x) 11'`, lam >= 0, gam free (their S and P vanish between layers). Householder groups
    have the same form with `I - v v'` for `11'`.
    """
    import cvxpy as cp

    layers = [len(weight) // size for weight in weights[:-1]]
    rho = cp.Variable(nonneg=True)
    lam, gam = [cp.Variable(count, nonneg=True) for count in layers], [cp.Variable(count) for count in layers]
    blocks = [np.einsum("gi,gj->gij", unit, unit) for unit in (np.eye(count) for count in layers)]
    ones, eye = np.ones((size, size)), np.eye(size)
    forms = [sum(lam[k][g] * np.kron(blocks[k][g], eye) + gam[k][g] * np.kron(blocks[k][g], ones) for g in range(count)) for k, count in enumerate(layers)]
    left = [rho * np.eye(weights[0].shape[1]), *forms]
    constraints = [left[k] - weight.T @ forms[k] @ weight >> 0 for k, weight in enumerate(weights[:-1])]
    constraints.append(left[-1] - weights[-1].T @ weights[-1] >> 0)
    cp.Problem(cp.Minimize(rho), constraints).solve(solver=solver)
    if rho.value is None:
        return math.inf
    found: list[Array] = []
    for a, b in zip(lam, gam, strict=True):
        of_each, of_sums = (np.asarray(value, dtype=np.float64) for value in (a.value, b.value))
        found.append(_kron(np.diag(np.maximum(of_each, 0.0)), eye) + _kron(np.diag(of_sums), ones))
    claimed, last = float(rho.value), len(found)
    return min(
        _proved(weights, [form * (1 + room) ** (last - k) for k, form in enumerate(found)], claimed * (1 + room) ** (last + 1)) for room in (1e-8, 1e-6, 1e-4)
    )


def _kron(a: Array, b: Array) -> Array:
    return np.asarray(np.kron(a, b), dtype=np.float64)


def _proved(weights: Sequence[Array], forms: Sequence[Array], claimed: float) -> float:
    """The smallest rho near the claimed one for which the whole matrix is proved to be positive semidefinite."""
    system = feed_forward(weights)
    inputs, size = system.inputs, system.size
    total, error = np.zeros((size, size)), np.zeros((size, size))
    ends = np.cumsum([inputs, *(len(form) for form in forms)])
    starts = [0, *ends[:-1]]
    for k, form in enumerate(forms):
        here, before = slice(ends[k], ends[k + 1]), slice(starts[k], ends[k])
        product = weights[k].T @ form @ weights[k]
        total[here, here] += form
        total[before, before] -= (product + product.T) / 2
        error[before, before] += gamma(2 * len(form) + 8) * (np.abs(weights[k]).T @ np.abs(form) @ np.abs(weights[k])) * 2
    last = slice(ends[-2], ends[-1])
    total[last, last] -= weights[-1].T @ weights[-1]
    error[last, last] += gamma(len(weights[-1]) + 4) * (np.abs(weights[-1]).T @ np.abs(weights[-1]))
    error += 4 * UNIT * np.abs(total)
    first = np.arange(inputs)
    for inflation in [1e-9 * 4.0**k for k in range(14)]:
        rho = claimed * (1 + inflation)
        matrix, allowed = (total + total.T) / 2, error + 4 * UNIT * np.abs(total)
        matrix[first, first] += rho
        allowed[first, first] += 2 * UNIT * (rho + np.abs(matrix[first, first]))
        if is_positive_semidefinite(matrix, allowed):
            return math.nextafter(math.sqrt(rho), math.inf)
    return math.inf
