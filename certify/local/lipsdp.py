"""LipSDP (Fazlyab et al. 2019) among the undecided gates: one bound for the spectral norms of all Jacobians of some rows of the output together.

The Jacobian is `J = J0 + P G`, with a row of P for each row of the output, `P = E S`, S the slopes of the gates and `E = V + P M` (certify.local.clarke). Its
transpose is a `LureSystem` of few inputs: w, weights of the rows, goes to the signals `e = V'w + M'p`, `p = S e`, and to `J'w = J0'w + G'p`. Transposing
changes neither the spectral norm nor the optimum, and the errors of condensing are those of V and J0 alone, which is where `LureSystem` takes them.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

import sdp
from certify.bound import Array
from certify.local.condense import Condensed
from certify.spectral import largest_singular_value
from sdp import LureSystem
from sdp.proof import gamma
from sdp.start import levels

_UP = 1 + 2.0**-40  # covers the few roundings of an error term itself
_TINY = 2.0**-500
_CLOSE = 1 + 2.0**-22
_ROUGH = 1e-4  # tolerance of the programs of single rows
_EFFORT = 45 * 100**3  # programs, times the third power of their gates: what single rows may cost
_ROOMS = (0.0, *(10.0 ** (half / 2) for half in range(-20, -3)))  # for the errors: by how much the multipliers grow from each gate to those that lead to it


@dataclasses.dataclass(frozen=True, eq=False)
class Spectral:
    """`bound` is at least the spectral norm of every Jacobian; `multipliers`, one for each gate from the last to the first, prove it."""

    bound: float
    multipliers: Array


def refined(
    condensed: Condensed,
    value: float,
    of_rows: Tensor,  # (rows,)
    outputs: int,
) -> tuple[float, Tensor]:
    """Smaller bounds of the first rows together, and of each row behind them: with the multipliers of the former, and by its own program if those are cheap."""
    together = spectral_bound(condensed, slice(outputs))
    found = of_rows.clone()
    cheap = (len(found) - outputs) * condensed.undecided**3 <= _EFFORT
    for k in range(outputs, len(found)):
        row = slice(k, k + 1)
        proved = spectral_bound(condensed, row, tolerance=_ROUGH).bound if cheap else _shared(condensed, row, together.multipliers)
        found[k] = min(float(found[k]), proved)
    return min(value, together.bound), found


def spectral_bound(
    condensed: Condensed,
    rows: slice = slice(None),  # of the output; a single one gives the l2 norm of its gradient
    *,
    tolerance: float = 1e-7,
    seconds: float = math.inf,
) -> Spectral:
    """At least the spectral norm of every Jacobian of these rows on the region; inf where nothing could be proved.

    The solver proposes multipliers for the system without errors. Those leave them no room: near the optimum the matrix is singular, and where every gate keeps
    norms (MaxMin between orthogonal layers) in most directions. Multipliers that grow by some room from each gate to those that it depends on leave more.
    """
    system = transposed(condensed, rows)
    if system is None:
        return Spectral(math.inf, np.zeros(condensed.undecided))
    exact = dataclasses.replace(system, rows_error=None, output_error=None)
    found = sdp.lipsdp(exact, tolerance=tolerance, seconds=seconds)
    best = Spectral(math.inf, found.multipliers)
    left = 1 + levels(system).max(initial=0) - levels(system)
    for room in _ROOMS:
        proposed = found.multipliers * (1 + room) ** left
        best = min(best, Spectral(sdp.prove(system, proposed), proposed), key=lambda made: made.bound)
        if best.bound <= found.bound * _CLOSE:
            break
    return best


def _shared(condensed: Condensed, rows: slice, multipliers: Array) -> float:
    """What multipliers that were found for other rows prove for these."""
    system = transposed(condensed, rows)
    return math.inf if system is None else sdp.prove(system, multipliers)


def transposed(condensed: Condensed, rows: slice) -> LureSystem | None:
    """The transpose of the Jacobians of some rows, gates from the last to the first; None where numbers are too large for it."""
    layers = condensed.layers
    inputs, slack = condensed.inputs[rows].numpy(), condensed.slack_inputs[rows].numpy()
    outputs, gates = len(inputs), condensed.undecided
    last_first = np.arange(gates)[::-1]
    G, M = np.zeros((gates, inputs.shape[1])), np.zeros((gates, gates))
    for layer, stop in zip(layers, np.cumsum([layer.count for layer in layers]), strict=True):
        G[stop - layer.count : stop] = layer.inputs.numpy()
        M[stop - layer.count : stop, : layer.earlier.shape[1]] = layer.earlier.numpy()
    slopes = [torch.cat([torch.zeros(0, dtype=torch.float64), *(layer.slopes[end] for layer in layers)]).numpy()[last_first] for end in (0, 1)]
    to_rows = condensed.gates[rows].numpy().T[last_first]
    error = condensed.slack_gates[rows].numpy().T[last_first]
    output, output_error = _triangle(np.vstack([inputs, G[last_first]]))
    output_error[:outputs] += _norms(slack.T)
    numbers = (output, output_error, to_rows, error, M, *slopes)
    if not all(np.isfinite(part).all() for part in numbers):
        return None
    return LureSystem(
        inputs=outputs,
        rows=np.hstack([to_rows, M.T[np.ix_(last_first, last_first)]]),
        lower=slopes[0],
        upper=slopes[1],
        output=output,
        rows_error=np.hstack([error, np.zeros((gates, gates))]),
        output_error=np.broadcast_to(output_error * _UP + _TINY, output.shape),
    )


def _triangle(signals: Array) -> tuple[Array, Array]:  # (signals, inputs) -> (rank, signals), (signals,)
    """R and e such that for every s some matrix R~, within e of R column by column, has `|signals' s| <= |R~ s|`.

    With `signals' = Q R + F`, `|signals' s| <= |Q| |R s| + sum_j |F_j| |s_j|`. That is at most `|R s + u sum_j e_j |s_j||`, where u is the direction of R s and
    `e_j = (|Q| - 1) |R_j| + |F_j|`; and `R~ = R + u (e_j sign s_j)_j` differs from R by no more than e_j in any entry of column j.
    """
    Q, R = np.linalg.qr(signals.T)
    if not (np.isfinite(Q).all() and np.isfinite(R).all()):
        return R, np.full(len(signals), np.inf)
    size = np.abs(Q) @ np.abs(R) + np.abs(signals.T)
    rest = np.abs(signals.T - Q @ R) + gamma(Q.shape[1] + 8) * size
    return R, max(largest_singular_value(Q) - 1.0, 0.0) * _norms(R) + _norms(rest)


def _norms(columns: Array) -> Array:
    """At least the l2 norm of each column."""
    return np.asarray(np.linalg.norm(columns, axis=0) * (1 + gamma(len(columns) + 8)) + _TINY)
