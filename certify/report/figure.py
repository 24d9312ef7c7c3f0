"""What every plot of the page begins and ends with: axes of matplotlib, and the element of the page that they become. The only file that imports matplotlib.

Colours are names of the page's variables, so light, dark and paper are the page's business.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Literal, cast

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from certify.report.summary import plain

INKS = ("c0", "c1", "c2", "c3", "c4", "c5", "text", "muted", "ground", "rule", "proof", "chance", "weak", "grows", "shrinks")
WIDTH = 460


def ink(name: str) -> str:
    """A variable of the page as a colour for matplotlib: a number, for which `element` writes the name."""
    return f"#0000{INKS.index(name) + 1:02x}"


STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "certify",
    "path.simplify": False,  # a curve is where the rows are
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 15,  # as on a telephone; elsewhere the page makes letters smaller
    "text.color": ink("muted"),
    "axes.edgecolor": ink("muted"),
    "axes.labelcolor": ink("muted"),
    "xtick.color": ink("muted"),
    "ytick.color": ink("muted"),
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 12,
    "ytick.major.pad": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": ink("rule"),
}


@dataclass(frozen=True)
class Scale:
    """What an axis shows, from one end to the other."""

    low: float
    high: float
    log: bool = False

    def marks(self, count: int = 5) -> list[float]:
        """About so many round numbers; on a log scale powers of ten, and 2 and 5 times those where there are few."""
        factors = (1, 2, 5) if self.log and self.high <= 100 * self.low else (1,)
        locator = LogLocator(subs=factors, numticks=count) if self.log else MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])
        rounded = (float(f"{mark:.12g}") for mark in locator.tick_values(self.low, self.high))
        return [mark for mark in rounded if self.low * (1 - 1e-9) <= mark <= self.high * (1 + 1e-9)]

    def edges(self, count: int) -> Sequence[float]:
        """The ends of so many intervals of one width, as it is drawn."""
        return (np.geomspace if self.log else np.linspace)(self.low, self.high, count + 1).tolist()

    def within(self, value: float) -> float:
        """The value, or the end that it is beyond."""
        return min(max(value, self.low), self.high)


def scaled(axes: Axes, which: Literal["x", "y"], scale: Scale, label: str) -> None:
    """Gives an axis its ends, its marks and its label."""
    axes.set(**{f"{which}scale": "log" if scale.log else "linear", f"{which}lim": (scale.low, scale.high), f"{which}label": plain(label)})
    axes.minorticks_off()
    marks = scale.marks()
    (axes.set_xticks if which == "x" else axes.set_yticks)(marks, [f"{mark:.6g}" for mark in marks])


def counted(axes: Axes, high: int) -> None:
    """Makes the y axis one of numbers of inputs."""
    scaled(axes, "y", y := Scale(0, 1.02 * high), "inputs")
    axes.set_yticks(marks := [int(mark) for mark in y.marks() if mark == int(mark)], list(map(str, marks)))
    axes.grid(visible=False, axis="x")


def letter(axes: Axes, text: str, colour: str, place: tuple[float, float], shift: tuple[float, float] = (0, 0)) -> None:
    """The letter of a run at or beside a point; the page gives it an edge."""
    axes.annotate(text, place, shift, textcoords="offset points", color=colour, weight="bold", ha="center", va="center")


@contextmanager
def sheet(height: float = 290) -> Iterator[Axes]:
    """Empty axes; the same ones whatever settings of matplotlib the reader has."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts may have letters that matplotlib's has not
        yield Figure(figsize=(WIDTH / 72, height / 72), layout="constrained").add_subplot()


def element(axes: Axes, name: str, label: str) -> str:
    """The figure as an element of the page: it scales, has no metadata, no style that would hold for the whole page, and its ids begin with its name."""
    buffer = io.StringIO()
    cast(Figure, axes.figure).savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = re.sub(r"<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    drawing = re.sub(r"<[^>]+>", lambda tag: _of_the_page(tag[0], name), drawing[drawing.index("<svg") :])
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(plain(label))}" ', 1)


def _of_the_page(tag: str, name: str) -> str:
    """A tag with colours and ids of the page; the text between tags stays as it is."""
    tag = re.sub(r' (xmlns(:xlink)?="[^"]*"|(width|height)="[\d.]+pt")', "", tag)
    tag = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", tag)
    return re.sub("#0000([0-9a-f]{2})", lambda colour: f"var(--{INKS[int(colour[1], 16) - 1]})", tag)
