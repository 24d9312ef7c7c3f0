"""Drawings as SVG elements of a page: axes, step curves, bars, points. Colours are classes of the page, so light and dark are the page's business.

A drawing is 460 wide and is scaled by the page. Letters are of 13 units, of 15 on a telephone, and the margins leave room for both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from certify.report.summary import plain

WIDTH = 460.0
RIGHT, TOP, BOTTOM = 22.0, 12.0, 50.0
LETTER = 9.0  # the width of most letters, at the size of a telephone

Ticks = tuple[tuple[float, str], ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """What is shown between two ends, and the marks at it."""

    low: float
    high: float
    label: str
    ticks: Ticks
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one; beyond an end, at that end."""
        low, high, at = (self._map(number) for number in (self.low, self.high, value))
        return min(max((at - low) / (high - low), 0.0), 1.0) if high != low else 0.0

    def _map(self, value: float) -> float:
        return value if not self.log else math.log10(max(value, self.low))


def linear(low: float, high: float, label: str, count: int = 5) -> Axis:
    """An axis with about so many marks at round numbers."""
    step = round_step((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, label, tuple((place * step, f"{place * step:.6g}") for place in range(first, last + 1)))


def logarithmic(low: float, high: float, label: str) -> Axis:
    """An axis with marks at powers of ten, at no more than six of them; at 1, 2 and 5 times those where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every, factors = max(1, math.ceil((last - first) / 5)), (1, 2, 5) if last - first <= 2 else (1,)
    marks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return Axis(low, high, label, tuple((mark, f"{mark:.6g}") for mark in marks if low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)), log=True)


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return min(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


class Drawing:
    """Two axes and what is added between them; `str` is the element."""

    def __init__(self, title: str, x: Axis, y: Axis, height: float = 290.0) -> None:
        self.title, self.x, self.y, self.height = title, x, y, height
        self.left = 8 + LETTER * max((len(text) for _, text in y.ticks), default=0) + 25 * bool(y.label)
        self._parts: list[str] = []

    def across(self, value: float) -> float:
        """The place of a value of the x axis."""
        return self.left + self.x.share(value) * (WIDTH - RIGHT - self.left)

    def up(self, value: float) -> float:
        """The place of a value of the y axis."""
        bottom = self.height - BOTTOM
        return bottom - self.y.share(value) * (bottom - TOP)

    def steps(self, starts: Sequence[float], values: Sequence[float], style: str, title: str, later: bool = False) -> None:
        """A step curve that holds its last value to the end. Steps are drawn at half units: not after their place, or with `later` not before it."""
        snap = math.ceil if later else math.floor
        path, here = f"M{_text(self.across(starts[0]))} {_text(self.up(values[0]))}", (self.across(starts[0]), self.up(values[0]))
        columns: dict[float, float] = {}
        for start, value in zip(starts[1:], values[1:], strict=True):
            if start <= self.x.high:
                columns[max(snap(2 * self.across(start)) / 2, here[0])] = self.up(value)
        for across, up in columns.items():
            path += f"H{_text(across)}V{_text(up)}"
        self._parts.append(f'<path class="line {style}" d="{path}H{_text(WIDTH - RIGHT)}"><title>{_safe(title)}</title></path>')

    def segment(self, ends: tuple[float, float, float, float], style: str, title: str = "") -> None:
        """A straight line between two points of the axes."""
        x0, y0, x1, y1 = self.across(ends[0]), self.up(ends[1]), self.across(ends[2]), self.up(ends[3])
        self._parts.append(f'<path class="{style}" d="M{_text(x0)} {_text(y0)}L{_text(x1)} {_text(y1)}">{_title(title)}</path>')

    def bar(self, low: tuple[float, float], high: tuple[float, float], style: str, title: str) -> None:
        """A filled rectangle between two corners, at least a third of a unit wide."""
        (x0, x1), (y1, y0) = (sorted((self.across(low[0]), self.across(high[0]))), sorted((self.up(low[1]), self.up(high[1]))))
        size = f'width="{_text(max(x1 - x0, 0.3))}" height="{_text(max(y0 - y1, 0.3))}"'
        self._parts.append(f'<rect class="{style}" x="{_text(x0)}" y="{_text(y1)}" {size}>{_title(title)}</rect>')

    def dot(self, x: float, y: float, style: str, title: str = "", size: float = 3) -> None:
        """A point."""
        self._parts.append(f'<circle class="{style}" cx="{_text(self.across(x))}" cy="{_text(self.up(y))}" r="{_text(size)}">{_title(title)}</circle>')

    def cross(self, x: float, y: float, style: str, title: str) -> None:
        """A point that has to be seen."""
        a, b = self.across(x), self.up(y)
        corners = (f"M{_text(a + dx)} {_text(b + dy)}L{_text(a - dx)} {_text(b - dy)}" for dx, dy in ((-5, -5), (-5, 5)))
        self._parts.append(f'<path class="{style}" d="{"".join(corners)}">{_title(title)}</path>')

    def write(self, x: float, y: float, text: str, style: str = "", shift: tuple[float, float] = (0, 0)) -> None:
        """Letters at a point of the axes."""
        self._parts.append(f'<text class="{style}" x="{_text(self.across(x) + shift[0])}" y="{_text(self.up(y) + shift[1])}">{_safe(text)}</text>')

    def __str__(self) -> str:
        head = f'<svg viewBox="0 0 {_text(WIDTH)} {_text(self.height)}" role="img"><title>{_safe(self.title)}</title>'
        return head + self._axes() + "".join(self._parts) + "</svg>"

    def _axes(self) -> str:
        """Lines across at the marks of the y axis, marks below the x axis, and both labels."""
        bottom, right = self.height - BOTTOM, WIDTH - RIGHT
        parts = []
        for value, text in self.y.ticks:
            parts.append(f'<path class="grid" d="M{_text(self.left)} {_text(self.up(value))}H{_text(right)}"/>')
            parts.append(f'<text class="end" x="{_text(self.left - 6)}" y="{_text(self.up(value) + 4.5)}">{_safe(text)}</text>')
        for value, text in self.x.ticks:
            parts.append(f'<path class="axis" d="M{_text(self.across(value))} {_text(bottom)}v4"/>')
            parts.append(f'<text class="middle" x="{_text(self.across(value))}" y="{_text(bottom + 21)}">{_safe(text)}</text>')
        parts.append(f'<path class="axis" d="M{_text(self.left)} {_text(bottom)}H{_text(right)}"/>')
        middle = (self.left + right) / 2
        parts.append(f'<text class="middle" x="{_text(middle)}" y="{_text(self.height - 6)}">{_safe(self.x.label)}</text>')
        if self.y.label:
            turn = f"translate(16 {_text((TOP + bottom) / 2)}) rotate(-90)"
            parts.append(f'<text class="middle" transform="{turn}">{_safe(self.y.label)}</text>')
        return "".join(parts)


def _safe(text: str) -> str:
    """Text of the runs is data: no character of it is markup, and each can be printed."""
    return escape(plain(text))


def _title(text: str) -> str:
    return f"<title>{_safe(text)}</title>" if text else ""


def _text(number: float) -> str:
    """A coordinate to a tenth of a unit."""
    return f"{number:.1f}".removesuffix(".0")
