"""Spectral norms of stored weights, proved: float64, every rounding included."""

from __future__ import annotations

import math

import numpy as np
import torch

import sdp
from certify.bound import Array
from certify.errors import CertifyError
from sdp.proof import gamma


def as_float64(tensor: torch.Tensor) -> Array:
    """The numbers of a tensor as a float64 array; exact for every floating dtype of torch. Raises CertifyError for other numbers."""
    if not tensor.is_floating_point():
        raise CertifyError(f"a weight holds {tensor.dtype} numbers, of which no norm is known here; use float32 or float64")
    return np.ascontiguousarray(tensor.detach().cpu().double().numpy())


def largest_singular_value(
    matrix: Array,  # (rows, columns)
    relative_error: float = 0.0,
) -> float:
    """A proved upper bound on the spectral norm of every matrix whose entries differ from these by at most `relative_error` of their size.

    The largest eigenvalue of the smaller Gram matrix is proposed by LAPACK and proved by a shifted Cholesky factorisation (sdp.proof); the rounding of
    the Gram matrix is at most `gamma_{k+1} |W|'|W|`, entry by entry. Excess over the true norm: about 1e-11 at 200 columns.
    Raises CertifyError for NaN or infinite entries, and for a norm beyond float64.
    """
    if not np.isfinite(matrix).all():
        raise CertifyError("a weight holds NaN or infinite numbers; load weights that are finite")
    if 0 in matrix.shape:
        return 0.0
    if not matrix.any():
        return 0.0
    scale = _power_of_two(matrix)
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T) * scale
    size = np.abs(wide)
    error = (gamma(wide.shape[1] + 4) + 3 * relative_error) * (size @ size.T) * (1 + 1e-6) + 2.0**-900
    gram = wide @ wide.T
    value = sdp.largest_eigenvalue((gram + gram.T) / 2, error)
    if not math.isfinite(value):
        raise CertifyError("the spectral norm of a weight could not be proved; please report this")
    found = math.nextafter(math.nextafter(math.sqrt(value), math.inf) / scale, math.inf)
    if not math.isfinite(found):
        raise CertifyError("a weight holds numbers so large that its norm is not a float64; load weights that are smaller")
    return found


def pair_distances(
    rows: Array,  # (classes, features)
) -> Array:  # (classes, classes)
    """`|w_i - w_j|`, rounded up; 0 for equal rows."""
    if not np.isfinite(rows).all():
        raise CertifyError("the last layer holds NaN or infinite numbers; load weights that are finite")
    classes, features = rows.shape
    scale = _power_of_two(rows)
    rows = rows * scale
    slack = 1 + gamma(features + 6)
    distances = np.empty((classes, classes))
    same = np.empty((classes, classes), dtype=bool)
    for i in range(classes):
        difference = rows - rows[i]
        distances[i] = np.sqrt((difference * difference).sum(axis=1)) * slack
        same[i] = ~difference.any(axis=1)
    underflow = math.sqrt(features + 1) * 2.0**-536  # squares below 2^-1022 lose at most 2^-1075 each
    distances = np.nextafter((np.nextafter(np.maximum(distances, distances.T), np.inf) + underflow) / scale, np.inf)
    distances[same] = 0.0
    return distances


def _power_of_two(matrix: Array) -> float:
    """A factor that brings the largest entry near 1: exact, and it keeps squares away from overflow and underflow."""
    exponent = math.frexp(float(np.abs(matrix).max(initial=0.0)))[1]
    return 2.0 ** min(max(-exponent, -1000), 1000)
