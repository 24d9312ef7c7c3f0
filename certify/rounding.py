"""Directed rounding of single operations: each returns the smallest float64 that is not on the wrong side of the exact result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction


def up(x: float) -> float:
    """The next float64 above."""
    return math.nextafter(x, math.inf)


def add_up(a: float, b: float) -> float:
    """The sum, rounded up. Finite arguments."""
    return _not_below(a + b, Fraction(a) + Fraction(b))


def multiply_up(a: float, b: float) -> float:
    """The product, rounded up. Finite arguments."""
    return _not_below(a * b, Fraction(a) * Fraction(b))


def root_of_squares(numbers: Iterable[float]) -> float:
    """The root of the sum of their squares, rounded up; inf where that is no float64. Finite arguments."""
    return _root_up(sum((Fraction(number) ** 2 for number in numbers), Fraction(0)))


def one_over_root(count: int) -> float:
    """`1 / sqrt(count)`, rounded up."""
    return _root_up(Fraction(1, count))


def _root_up(exact: Fraction) -> float:
    """The square root of a fraction that is not negative, rounded up."""
    power = (exact.numerator.bit_length() - exact.denominator.bit_length()) // 2 * 2 - 120  # so that the floor has about 60 bits
    shifted = exact / Fraction(2) ** power
    root = Fraction(math.isqrt(shifted.numerator // shifted.denominator) + 1) * Fraction(2) ** (power // 2)
    try:
        value = float(root)
    except OverflowError:
        return math.inf
    while value > 0 and Fraction(math.nextafter(value, 0.0)) ** 2 >= exact:
        value = math.nextafter(value, 0.0)
    return value if Fraction(value) ** 2 >= exact else up(value)


def _not_below(rounded: float, exact: Fraction) -> float:
    return rounded if not math.isfinite(rounded) or Fraction(rounded) >= exact else up(rounded)
