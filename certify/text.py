"""Numbers as people read and write them. A decimal is rounded so that the sentence around it stays true: radii down, Lipschitz bounds up.

What is rounded is the shortest decimal that gives the same float64, so that 0.57 of the inputs is 57.0 % and not 56.9 %.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def up_text(value: float, digits: int = 8) -> str:
    """So many significant digits, not below the value: 1.00000001 is 1.0000001."""
    return _short(value, digits, ROUND_CEILING)


def down_text(value: float, digits: int = 4) -> str:
    """So many significant digits, not above the value."""
    return _short(value, digits, ROUND_FLOOR)


def decimal(value: float) -> Decimal:
    """The shortest decimal that gives the same float64."""
    return Decimal(repr(float(value)))


def parse_radius(text: str) -> float:
    """The radius that "36/255" or "0.25" stands for. Raises `ValueError` unless it is finite and at least 0."""
    try:
        over, _, under = text.partition("/")
        radius = float(over) / float(under if "/" in text else 1)
    except (ValueError, ZeroDivisionError):
        radius = math.nan
    if not (math.isfinite(radius) and radius >= 0):
        raise ValueError(f"{text!r} is not a radius; write a number that is at least 0 or a fraction, such as 0.25 or 36/255")
    return abs(radius)


def _short(value: float, digits: int, rounding: str) -> str:
    """With an exponent only far from 1, and without trailing zeros after the point."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exact = decimal(value)
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding)
    if -4 <= rounded.adjusted() < max(digits, 5):
        text = f"{rounded:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{rounded:.{digits - 1}e}"
