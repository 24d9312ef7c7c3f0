"""LipSDP proved in whole numbers: nothing here is rounded, and no property of floating point is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdp.lure import LureSystem
from sdp.proof import check_multipliers

Array = NDArray[np.float64]
Integers = NDArray[np.object_]  # Python's, of any size
_LIMB = 24  # bits; sums of 2^13 products of two stay below 2^63
_ROOT = 58  # bits after the point of the approximate factor
_SHIFTS = (-43, -46, -49)  # powers of two that are taken off the diagonal before it is factored


@dataclasses.dataclass(frozen=True, eq=False)
class Dyadic:
    """`numbers * 2^power`, exactly."""

    numbers: Integers
    power: int = 0

    @classmethod
    def of(cls, array: Any) -> Dyadic:
        """Of floating-point numbers, all of which are dyadic."""
        mantissas, exponents = np.frexp(np.asarray(array, dtype=np.float64))
        whole = np.ldexp(mantissas, 53).astype(np.int64).astype(object)
        power = int(exponents[mantissas != 0].min(initial=0)) - 53
        return cls(whole << np.where(mantissas == 0, 0, exponents - 53 - power).astype(object), power)

    def at(self, power: int) -> Integers:
        """The numbers in a smaller unit."""
        return self.numbers << (self.power - power)

    def __add__(self, other: Dyadic) -> Dyadic:
        power = min(self.power, other.power)
        return Dyadic(self.at(power) + other.at(power), power)

    def __mul__(self, other: Dyadic) -> Dyadic:
        return Dyadic(self.numbers * other.numbers, self.power + other.power)

    def __matmul__(self, other: Dyadic) -> Dyadic:
        return Dyadic(product(self.numbers, other.numbers), self.power + other.power)

    def __neg__(self) -> Dyadic:
        return Dyadic(-self.numbers, self.power)

    def __abs__(self) -> Dyadic:
        return Dyadic(abs(self.numbers), self.power)

    def each(self, change: Callable[[Integers], Integers]) -> Dyadic:
        """Rearranged, or summed."""
        return Dyadic(change(self.numbers), self.power)


def product(a: Integers, b: Integers) -> Integers:
    """`a @ b`, in limbs that int64 multiplies and adds without overflow."""
    parts = [_limbs(a), _limbs(b)]
    if a.shape[1] * min(map(len, parts)) >= 2**13 or len(parts[0]) * len(parts[1]) > 200:
        return np.asarray(a.dot(b), dtype=object)
    total = np.zeros((len(a), b.shape[1]), dtype=object)
    for k in range(len(parts[0]) + len(parts[1]) - 1):
        both = [parts[0][i] @ parts[1][k - i] for i in range(len(parts[0])) if 0 <= k - i < len(parts[1])]
        total += np.sum(both, axis=0).astype(object) << (_LIMB * k)
    return total


def _limbs(numbers: Integers) -> list[NDArray[np.int64]]:
    """The digits to the base `2^_LIMB`; the last one has the sign."""
    made = []
    while True:
        small = numbers.size == 0 or (max(abs(numbers.min()), numbers.max()) >> _LIMB) == 0
        made.append((numbers if small else numbers & (2**_LIMB - 1)).astype(np.int64))
        if small:
            return made
        numbers = numbers >> _LIMB


def prove_exactly(
    system: LureSystem,
    multipliers: Array,  # (nonlinearities,), from l-infinity (nonlinearities + inputs,); not negative
    rho: float,  # the square of the Lipschitz constant, from l-infinity the constant
    norm: float = 2,
) -> bool:
    """True only if the multipliers prove rho, for every network within the errors of the system. False: not proved.

    The matrices are those of `sdp.prove`, with `t (2 e e' - (l + u)(e v' + v e') + 2 l u v v')` for each nonlinearity. With R any matrix of numbers
    `integer * 2^-58` (a rounded Cholesky factor), `A - R R'` is had exactly, and if it is diagonally dominant by more than the errors, A >= 0.
    """
    check_multipliers(system, multipliers, norm)
    if not (math.isfinite(rho) and rho > 0):
        return False
    matrix, error = _scaled(*_matrix(system, multipliers, rho, norm))
    errors = error.each(lambda numbers: numbers.sum(axis=1))
    if not (matrix.numbers.diagonal() > 0).all() or any(abs(part.numbers).max() >> (8 - part.power) for part in (matrix, errors)):
        return False  # a semidefinite matrix with a diagonal of about 1 has small entries
    approximate, allowed = (np.asarray(part.numbers / (1 << -part.power), dtype=np.float64) for part in (matrix, errors))
    for shift in _SHIFTS:
        try:
            root = np.linalg.cholesky(approximate - np.diag(2.0**shift + allowed))
        except np.linalg.LinAlgError:
            continue
        if not np.abs(root).max() < 16:  # NaN, from some LAPACKs
            continue
        factor = Dyadic(np.rint(np.ldexp(root, _ROOT)).astype(np.int64).astype(object), -_ROOT)
        rest = matrix + -(factor @ factor.each(np.transpose))
        others = abs(rest).each(lambda numbers: numbers.sum(axis=1) - numbers.diagonal())
        margin = rest.each(np.diagonal) + -others + -errors
        if (margin.numbers >= 0).all():
            return True
    return False


def _matrix(system: LureSystem, multipliers: Array, rho: float, norm: float) -> tuple[Dyadic, Dyadic]:
    """`[[rho E_x + M, C'], [C, I]]`, from l-infinity `[[diag(mu) + M, C'], [C, 2 rho - sum mu]]`, and what may be wrong with it, entry by entry."""
    count, inputs, size, outputs = system.count, system.inputs, system.size, len(system.output)
    wide = size + outputs
    t, lower, upper = (Dyadic.of(part[:, None]) for part in (multipliers[:count], system.lower, system.upper))
    v, c, e = (Dyadic.of(part) for part in (system.rows, system.output, np.eye(count, size, inputs)))
    outer, inner = t * lower * upper, -(t * (lower + upper))
    half = v.each(np.transpose) @ (outer * v) + (inner * v + t * e).each(lambda numbers: _placed(numbers, inputs, size))
    if norm == 2:
        diagonal = Dyadic.of(np.repeat([rho, 0.0, 1.0], [inputs, count, outputs]))
    else:
        diagonal = Dyadic.of(np.concatenate([multipliers[count:], np.zeros(count), [0.0]]))
        corner = Dyadic.of([2.0]) * Dyadic.of([rho]) + -diagonal.each(lambda numbers: numbers.sum(keepdims=True))
        diagonal = diagonal + corner.each(lambda numbers: np.concatenate([np.zeros(size, dtype=object), numbers]))
    errors = [np.zeros_like(part) if error is None else error for part, error in ((system.rows, system.rows_error), (system.output, system.output_error))]
    r, c_error = map(Dyadic.of, errors)
    reach = abs(outer) * r
    half_error = abs(v).each(np.transpose) @ reach + reach.each(np.transpose) @ (abs(v) + r) + (abs(inner) * r).each(lambda part: _placed(part, inputs, size))
    return _bordered(half, c, wide) + diagonal.each(np.diag), _bordered(half_error, c_error, wide)


def _bordered(half: Dyadic, border: Dyadic, wide: int) -> Dyadic:
    """`[[half + half', border'], [border, 0]]`."""
    below = half.each(lambda numbers: _placed(numbers, 0, wide)) + border.each(lambda numbers: _placed(numbers, wide - len(numbers), wide))
    return below + below.each(np.transpose)


def _placed(numbers: Integers, row: int, size: int) -> Integers:
    """In the rows from this one on, at the left, of a square of zeros."""
    made = np.zeros((size, size), dtype=object)
    made[row : row + len(numbers), : numbers.shape[1]] = numbers
    return made


def _scaled(matrix: Dyadic, error: Dyadic) -> tuple[Dyadic, Dyadic]:
    """Rows and columns times powers of two that make the diagonal about 1; in units that are small."""
    bits = np.array([int(number).bit_length() + matrix.power for number in matrix.numbers.diagonal()])
    shifts = -(bits[:, None] // 2) - bits // 2
    least = int(shifts.min())
    scaled = [Dyadic(part.numbers << (shifts - least).astype(object), part.power + least) for part in (matrix, error)]
    first, second = (Dyadic(part.at(unit), unit) for part in scaled for unit in [min(part.power, -1)])
    return first, second
