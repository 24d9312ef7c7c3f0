"""The one form in which every semidefinite program here sees a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class LureSystem:
    """A network as linear maps around scalar nonlinearities: with the signals `s = [x; a]`, `v = rows s`, `a_j = phi_j(v_j)`, `f(x) = output s`.

    Each phi_j has all slopes in `[lower_j, upper_j]`. Biases do not matter to a Lipschitz bound and are left out. Feed-forward and residual networks have
    strictly lower triangular rows over a; others are implicit. The matrices of the network may differ from `rows` and `output` by as much as the errors,
    entry by entry: what is proved holds for every network within. Raises ValueError for shapes that do not fit, NaN, infinities, and lower > upper.
    """

    inputs: int  # entries of x
    rows: Array  # (nonlinearities, inputs + nonlinearities)
    lower: Array  # (nonlinearities,)
    upper: Array  # (nonlinearities,)
    output: Array  # (outputs, inputs + nonlinearities)
    rows_error: Array | None = None  # like rows; None: they are exact
    output_error: Array | None = None

    def __post_init__(self) -> None:
        count = len(self.lower)
        shapes = {
            "rows": (self.rows.shape, (count, self.inputs + count)),
            "upper": (self.upper.shape, (count,)),
            "output": (self.output.shape, (len(self.output), self.inputs + count)),
            "rows_error": (self.rows.shape if self.rows_error is None else self.rows_error.shape, self.rows.shape),
            "output_error": (self.output.shape if self.output_error is None else self.output_error.shape, self.output.shape),
        }
        for name, (found, wanted) in shapes.items():
            if found != wanted:
                raise ValueError(f"{name} of a LureSystem with {self.inputs} inputs and {count} nonlinearities must be {wanted}, got {found}")
        errors = [error for error in (self.rows_error, self.output_error) if error is not None]
        if not all(np.isfinite(array).all() for array in (self.rows, self.lower, self.upper, self.output, *errors)):
            raise ValueError("a LureSystem needs finite numbers, found NaN or infinity in its matrices or slopes")
        if (self.lower > self.upper).any():
            raise ValueError(f"slope ranges of a LureSystem need lower <= upper, found {int((self.lower > self.upper).sum())} that do not")
        if any((error < 0).any() for error in errors):
            raise ValueError("the errors of a LureSystem are not negative")

    @property
    def count(self) -> int:
        """Of the nonlinearities."""
        return len(self.lower)

    @property
    def size(self) -> int:
        """Of its linear matrix inequality: the signals."""
        return self.inputs + len(self.lower)

    @property
    def is_explicit(self) -> bool:
        """Whether every nonlinearity takes earlier signals only."""
        errors = 0.0 if self.rows_error is None else self.rows_error[:, self.inputs :]
        return not np.triu(np.abs(self.rows[:, self.inputs :]) + errors).any()

    def with_output(self, output: Array, error: Array | None = None) -> LureSystem:
        """The same signals, another output."""
        return dataclasses.replace(self, output=output, output_error=error)

    def difference(self, i: int, j: int) -> LureSystem:
        """With output i minus output j as its only one."""
        row = (self.output[i] - self.output[j])[None]
        errors = 0.0 if self.output_error is None else self.output_error[i] + self.output_error[j]
        exact = np.abs(row) * 2.0**-52
        exact[:, (self.output[i] == 0) | (self.output[j] == 0)] = 0.0
        error = exact + errors
        return self.with_output(row, error * (1 + 2.0**-50) if error.any() else None)

    def along(self, *coordinates: int) -> LureSystem:
        """With some entries of x as its inputs, the others held."""
        keep = np.r_[np.array(coordinates, dtype=np.int64), self.inputs : self.size]
        errors = (None if array is None else array[:, keep] for array in (self.rows_error, self.output_error))
        return LureSystem(len(coordinates), self.rows[:, keep], self.lower, self.upper, self.output[:, keep], *errors)


def feed_forward(
    weights: Sequence[Array],  # W_0 .. W_L
    slopes: tuple[float, float] = (0.0, 1.0),
) -> LureSystem:
    """`f(x) = W_L s(W_{L-1} ... s(W_0 x))`, every s with slopes in the given range."""
    inner, last = weights[:-1], weights[-1]
    return residual_block(np.zeros((len(last), weights[0].shape[1])), last, inner, slopes)


def residual_block(
    skip: Array,  # (out, in)
    branch: Array,  # (out, hidden[-1])
    inner: Sequence[Array],  # C_1 .. C_n
    slopes: tuple[float, float],
) -> LureSystem:
    """`y = A x + B w_n`, `w_i = s(C_i w_{i-1})`, `w_0 = x` as a `LureSystem`, every s with slopes in the given range."""
    widths = [skip.shape[1], *(len(matrix) for matrix in inner)]
    offsets = np.cumsum([0, *widths])
    rows = np.zeros((offsets[-1] - widths[0], offsets[-1]))
    for i, matrix in enumerate(inner):
        rows[offsets[i + 1] - widths[0] : offsets[i + 2] - widths[0], offsets[i] : offsets[i + 1]] = matrix
    output = np.zeros((len(skip), offsets[-1]))
    output[:, : widths[0]] = skip
    output[:, offsets[-2] :] += branch
    count = len(rows)
    return LureSystem(widths[0], rows, np.full(count, slopes[0]), np.full(count, slopes[1]), output)
