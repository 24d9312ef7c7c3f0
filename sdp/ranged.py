"""Arrays of float64 numbers that are known to within an error: every operation returns a value and a bound on all that rounding did to it.

Valid for IEEE float64 with rounding to nearest and sums in any order, with or without fused multiply-add.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdp.proof import UNIT, gamma

Array = NDArray[np.float64]
_TINY = 2.0**-1000  # more than what underflow can take from an operation here
_UP = 1 + 2.0**-48  # covers the few roundings of an error term itself


@dataclasses.dataclass(frozen=True, eq=False)
class Ranged:
    """Every array within `error` of `value`, entry by entry. NaN and infinities stay in it, and prove nothing."""

    value: Array
    error: Array

    @classmethod
    def exact(cls, value: Array) -> Ranged:
        """These very numbers."""
        value = np.asarray(value, dtype=np.float64)
        return cls(value, np.zeros_like(value))

    @property
    def size(self) -> Array:
        """A bound on the absolute values."""
        return (np.abs(self.value) + self.error) * _UP

    @property
    def low(self) -> Array:
        """Not above any of the numbers."""
        return np.nextafter(self.value - self.error, -np.inf)

    @property
    def high(self) -> Array:
        """Not below any of the numbers."""
        return np.nextafter(self.value + self.error, np.inf)

    @property
    def T(self) -> Ranged:
        return Ranged(self.value.T, self.error.T)

    def __getitem__(self, where: Any) -> Ranged:
        return Ranged(self.value[where], self.error[where])

    def __neg__(self) -> Ranged:
        return Ranged(-self.value, self.error)

    def __add__(self, other: Ranged) -> Ranged:
        value = self.value + other.value
        return Ranged(value, (self.error + other.error + UNIT * np.abs(value)) * _UP + _TINY)

    def __sub__(self, other: Ranged) -> Ranged:
        return self + -other

    def __mul__(self, other: Ranged) -> Ranged:
        """Entry by entry."""
        value = self.value * other.value
        error = np.abs(self.value) * other.error + self.error * np.abs(other.value) + self.error * other.error + UNIT * np.abs(value)
        return Ranged(value, error * _UP + _TINY)

    def __matmul__(self, other: Ranged) -> Ranged:
        inner = self.value.shape[-1]
        a, b = np.abs(self.value), np.abs(other.value)
        error = gamma(inner + 2) * (a @ b)
        if other.error.any():
            error = error + a @ other.error
        if self.error.any():
            error = error + self.error @ (b + other.error)
        return Ranged(self.value @ other.value, error * (1 + gamma(4 * (inner + 8))) + (inner + 1) * _TINY)

    def reciprocal(self) -> Ranged:
        """1 / x. Numbers that may be zero or negative have no bound: their error is infinite."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            least = self.value - self.error * _UP
            value = 1 / self.value
            error = np.where(least > 0, (self.error / self.value / least + UNIT * np.abs(value)) * (1 + 2.0**-40) + _TINY, np.inf)
        return Ranged(value, error)


def concatenate(parts: list[Ranged], axis: int = 0) -> Ranged:
    """The parts one after the other."""
    return Ranged(np.concatenate([part.value for part in parts], axis), np.concatenate([part.error for part in parts], axis))
