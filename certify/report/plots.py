"""The plots of the page, each with its numbers as a table. Radii and accuracies in a table are rounded down, those of attacks and Lipschitz bounds up.

A plot has radii in one norm. Where there are too many points to be seen, some are drawn, and the caption says how many; tables are shortened in the same way.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from certify.report.figure import Scale, element, ink, letter, scaled, sheet
from certify.report.sandwich import Between
from certify.report.summary import (
    MISSING,
    Run,
    Summary,
    bound_text,
    certified_radii,
    curve,
    measures_text,
    number,
    percent,
    plain,
    radius_label,
    radius_text,
)
from certify.rounding import multiply_up

COLOURS = 6  # classes c0 to c5 of the page; further runs begin again, and are told apart by their letters
STYLES = {"proof": "", "probabilistic": "chance"}  # dashes; what certifies nothing is dotted
LINES = {"": "-", "chance": "--", "weak": ":"}
_COLUMNS = 500  # of a step curve
_MANY = 120  # inputs of a sandwich that are drawn
_PARTS = 40  # parts of a bound that are drawn
_ENDLESS = 1e30  # radii beyond it are of margins that cannot change; they are beyond the edge of every drawing
_LARGEST = 1e200  # beyond it a product is not followed


@dataclass(frozen=True)
class Shown:
    """One run as the page shows it everywhere: by its letter, colour and dashes."""

    run: Run
    summary: Summary
    letter: str
    colour: str
    dashes: str

    @property
    def style(self) -> str:
        """The classes of its marks in the page."""
        return f"{self.colour} {self.dashes}".strip()

    @property
    def ink(self) -> str:
        """Its colour in a drawing."""
        return ink(self.colour)

    @property
    def line(self) -> str:
        """Its dashes in a drawing."""
        return LINES[self.dashes]


@dataclass(frozen=True)
class Plot:
    """A drawing, what it shows, and its numbers."""

    drawing: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def shown(place: int, run: Run, summary: Summary) -> Shown:
    """The run at this place of the page."""
    letter = chr(ord("A") + place % 26) + (str(place // 26) if place >= 26 else "")
    return Shown(run, summary, letter, f"c{place % COLOURS}", STYLES.get(summary.guarantee, "weak"))


def curves(items: Sequence[Shown], radii: Sequence[float]) -> Plot:
    """Accuracy against radius: a step curve for each run, certified ones and, above those of the same network, attacks."""
    x = _radius_scale(items)
    attacked = any(item.summary.attacked for item in items)
    with sheet() as axes:
        scaled(axes, "x", x, f"radius ({measures_text(item.summary.norm for item in items)})")
        scaled(axes, "y", Scale(0, 100), "accuracy (%)" if attacked else "certified accuracy (%)")
        axes.vlines([radius for radius in radii if x.low < radius <= x.high], 0, 100, colors=ink("muted"), linestyles=":", linewidth=1)
        for place, item in enumerate(items, 1):
            heights = _heights(item, x)
            axes.stairs(heights, x.edges(_COLUMNS), baseline=None, color=item.ink, linestyle=item.line, linewidth=2, clip_on=False)
            letter(axes, item.letter, item.ink, _beside(heights, x, place / (len(items) + 1)))
        names = ", ".join(f"{item.letter}: {item.summary.name}" for item in items)
        drawing = element(axes, f"curves-{items[0].letter}", f"Accuracy against radius, {names}")
    caption = "Solid: proof. Dashed: with a probability. Dotted: no certificate." + " Upright lines: the radii of the table above." * bool(radii)
    caption += " The curve of an attack is an upper bound: what is proved of the same network and inputs lies below it." * attacked
    caption += " For inputs without labels the curve is the share that is certified, right or wrong." * any(item.summary.clean is None for item in items)
    caption += " The scale of radii is logarithmic." * x.log
    marks = x.marks() if x.log else x.marks(8)
    sampled = sorted({0.0, *marks, *(radius for radius in radii if radius <= x.high)})
    rows = [(radius_label(radius), *(percent(_at(*curve(item.run), radius), item.summary.attacked) for item in items)) for radius in sampled]
    return Plot(drawing, caption, ("r", *(item.letter for item in items)), rows)


def _radius_scale(items: Sequence[Shown]) -> Scale:
    """Up to the largest radius of all; on a log scale where one run would be squeezed to the left edge."""
    end = reach(items)
    shortest = min((end_of(certified_radii(item.run), least=end) for item in items if not item.summary.attacked), default=end)
    return Scale(max(shortest / 30, end / 1e6), end, log=True) if shortest < end / 20 else Scale(0, end)


def _heights(item: Shown, x: Scale) -> list[float]:
    """The step curve in columns, in per cent: its least value in each, or of an attack its largest, so that what is drawn claims no more than the rows."""
    steps, ends = curve(item.run), x.edges(_COLUMNS)
    return [100 * _at(*steps, radius) for radius in (ends[:-1] if item.summary.attacked else ends[1:])]


def sandwich(found: Sequence[Between], items: Mapping[str, Shown]) -> Plot:
    """Each input between the largest radius that is proved and the smallest distance at which an attack changes it."""
    chosen = _some(found)
    y = _distance_scale(found)
    low, high = [[y.within(end) for end in ends] for ends in zip(*((entry.radius, entry.distance) for entry in chosen), strict=True)]
    reached = [place for place, entry in enumerate(chosen) if math.isfinite(entry.distance)]
    survived = [place for place, entry in enumerate(chosen) if math.isinf(entry.distance)]
    wrong = [place for place, entry in enumerate(chosen) if entry.contradicted]
    with sheet() as axes:
        scaled(axes, "x", Scale(-1, len(chosen)), "inputs, by the distance of the attack")
        scaled(axes, "y", y, "distance")
        for places, colour, line, width in ((reached, "muted", "-", 1.0), (survived, "muted", ":", 1.0), (wrong, "weak", "-", 2.5)):
            axes.vlines(places, [low[place] for place in places], [high[place] for place in places]).set(color=ink(colour), linestyle=line, linewidth=width)
        axes.scatter(range(len(chosen)), low, s=22, c=[items[entry.by].ink for entry in chosen], linewidths=0, clip_on=False, zorder=3)
        rings = [items[chosen[place].found_by].ink for place in reached]
        axes.scatter(reached, [high[place] for place in reached], s=22, c=ink("ground"), edgecolors=rings, clip_on=False, zorder=3)
        if wrong:
            ends = [high[place] for place in wrong]
            axes.scatter(wrong, ends, s=90, c=ink("weak"), marker="x", linewidths=2.5, clip_on=False, zorder=4, gid="contradictions")
        name = f"sandwich-{items[chosen[0].by].letter}-{items[chosen[0].found_by].letter}"
        drawing = element(axes, name, "The certified radius and the distance of the nearest attack for each input")
    rows = [
        (
            str(entry.index),
            MISSING if entry.label is None else str(entry.label),
            radius_text(entry.radius),
            items[entry.by].letter,
            _distance_text(entry),
            items[entry.found_by].letter,
            "contradiction" if entry.contradicted else percent(entry.share),
        )
        for entry in sorted(chosen, key=lambda entry: not entry.contradicted)
    ]
    return Plot(drawing, _sandwich_caption(found, chosen, y), ("input", "label", "certified", "by", "attacked at", "by", "share"), rows)


def _distance_scale(found: Sequence[Between]) -> Scale:
    """For radii and distances; on a log scale where most radii are far below the distances."""
    high = end_of([*(entry.radius for entry in found), *(entry.distance for entry in found)])
    least = min((entry.radius for entry in found if entry.radius > 0), default=high)
    if statistics.median(entry.radius for entry in found) < high / 20:
        return Scale(max(min(least, high) / 2, high / 1e6), high * 1.2, log=True)
    return Scale(0, high * 1.05)


def _sandwich_caption(found: Sequence[Between], chosen: Sequence[Between], y: Scale) -> str:
    survived = sum(math.isinf(entry.distance) for entry in found)
    settled = [entry.share for entry in found if math.isfinite(entry.distance) and not entry.contradicted]
    caption = f"{len(found)} inputs that are classified right; a line from the certified radius (filled) to the attack (ring) is what neither settles."
    caption += f" In the median {percent(statistics.median_low(settled))} of the distance is certified." if settled else ""
    caption += f" For {survived} no attack found a point: their lines go to the upper edge." * bool(survived)
    beyond = sum(y.high < max(entry.radius, entry.distance if math.isfinite(entry.distance) else 0) for entry in chosen)
    caption += f" {beyond} with a point beyond the upper edge are drawn at it." * bool(beyond)
    caption += f" {len(chosen)} of them are drawn and listed, evenly chosen, with up to {_MANY} contradictions; --json has all." * (len(chosen) < len(found))
    caption += " Red and crossed: an attack within a certified radius, a contradiction." * any(entry.contradicted for entry in found)
    return caption + " The scale is logarithmic; a radius of 0 is at its lower end." * y.log


def waterfall(parts: Sequence[Mapping[str, Any]], totals: Sequence[tuple[Shown, float]]) -> Plot | None:
    """How the bound grows from layer to layer, on a log scale: each bar begins where the one before it ends. None for a network without parts."""
    if not parts:
        return None
    steps = _steps(parts)
    drawn = _largest(steps)
    values = [1.0, *(bound for _, bound in totals), *(end for step in drawn for end in (step.before, step.after))]
    most = min(max(values), _LARGEST)
    low, high = min(max(min(values), most / 1e12) / 1.3, 0.8), most * 1.3
    x = Scale(low, max(high, 10 * low), log=True)
    bars = [(step.before, step.after, "grows" if step.after > step.before else "shrinks", step.depth > 0) for step in drawn]
    bars += [(1.0, bound, item.colour, False) for item, bound in totals]
    with sheet(20.0 * len(bars) + 82) as axes:
        scaled(axes, "x", x, "product of the bounds so far (log scale)")
        axes.set(ylim=(len(bars), -1))
        axes.set_yticks(range(len(bars)), [step.label for step in drawn] + [item.letter for item, _ in totals])
        axes.grid(visible=False, axis="y")
        for place, (before, after, colour, thin) in enumerate(bars):
            left, right = x.within(before), x.within(after)
            axes.barh(place, right - left, 0.4 if thin else 0.76, left, color=ink(colour))
        for item, bound in totals:
            axes.axvline(x.within(bound), color=item.ink, linestyle=item.line)
        name = f"layers-{totals[0][0].letter}" if totals else "layers"
        drawing = element(axes, name, "The Lipschitz bound from layer to layer, on a log scale")
    left_out = len(steps) - len(drawn)
    caption = (
        "Each bar goes from the product before a part to that after it. Thin bars are inside of a sum; its branches are added, and each begins where it does."
    )
    why = f"compositions, those that change the product by less than 0.1 %, and beyond {_PARTS} the smallest"
    caption += f" {left_out} of {len(steps)} parts are not drawn: {why}." * bool(left_out)
    caption += " Letters and upright lines: the bounds that the runs use. One below the product is of a method that looks at the whole network."
    return Plot(drawing, caption, ("part", "type", "bound", "product", "how"), [step.cells for step in steps])


@dataclass(frozen=True)
class _Step:
    """One part of a bound, with the product of those before it in its chain, and with that times its own."""

    name: str
    kind: str
    how: str
    depth: int
    value: float | None
    before: float
    after: float  # rounded up

    @property
    def label(self) -> str:
        """The name and type, short enough for the margin."""
        both = f"{self.name} {self.kind}".strip()
        short = both if 0 < len(both) <= 14 else self.name or self.kind or self.how
        return short if len(short) <= 14 else "\N{HORIZONTAL ELLIPSIS}" + short[-13:]

    @property
    def change(self) -> float:
        """How much it changes the product, by its logarithm."""
        return abs(math.log(max(self.after, 1e-300)) - math.log(max(self.before, 1e-300)))

    @property
    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        product = MISSING if self.after >= _LARGEST else bound_text(self.after)
        return "\N{MIDDLE DOT} " * self.depth + (self.name or MISSING), self.kind or MISSING, bound_text(self.value, digits=9), product, self.how


def _steps(parts: Sequence[Mapping[str, Any]]) -> list[_Step]:
    """The parts as they are listed: what one is made of follows it, one deeper. Parts of a chain begin where the one before ends, those of a sum with it."""
    steps: list[_Step] = []
    chain: list[tuple[bool, float]] = [(True, 1.0)]  # for each depth: whether its parts are a chain, and where the next one begins
    for part in parts:
        value, depth = number(part.get("value")), min(max(int(part.get("depth") or 0), 0), len(chain) - 1)
        del chain[depth + 1 :]
        in_chain, before = chain[depth]
        after = before if value is None else min(multiply_up(before, value), _LARGEST)
        name, kind, how = (plain(part.get(key) or "") for key in ("name", "type", "how"))
        steps.append(_Step(name, kind, how, depth, value, before, after))
        chain[depth] = (in_chain, after if in_chain else before)
        chain.append((how == "composition", before))
    return steps


def _largest(steps: Sequence[_Step]) -> list[_Step]:
    """Those that change the product most, and at all, in their order; not the compositions, whose parts are there."""
    places = [place for place, step in enumerate(steps) if step.change > 1e-3 and step.how != "composition"]
    return [steps[place] for place in sorted(sorted(places, key=lambda place: -steps[place].change)[:_PARTS])]


def costs(items: Sequence[Shown]) -> Plot | None:
    """Time against tightness: for each run that certifies, the seconds of an input and the median radius. None for a single one."""
    timed = [(item, seconds, item.summary.median_radius or 0.0) for item in items if not item.summary.attacked and (seconds := _seconds(item.run))]
    if len(timed) < 2:
        return None
    medians = [min(max(statistics.median(seconds), 1e-6), _ENDLESS) for _, seconds, _ in timed]
    attack = min((item.summary.median_radius or 0.0 for item in items if item.summary.attacked and item.summary.count), default=math.inf)
    high = end_of([attack, *(radius for _, _, radius in timed)])
    with sheet() as axes:
        scaled(axes, "x", Scale(min(medians) / 2, max(medians) * 2, log=True), "median seconds per input (log scale)")
        scaled(axes, "y", y := Scale(0, high * 1.1), "median radius")
        if math.isfinite(attack):
            axes.axhline(attack, color=ink("muted"), linestyle=":")
        for (item, _, radius), median in zip(timed, medians, strict=True):
            axes.plot(median, y.within(radius), "o", color=item.ink, markersize=10, clip_on=False)
            letter(axes, item.letter, item.ink, (median, y.within(radius)), (12, -10))
        drawing = element(axes, f"costs-{items[0].letter}", "Median radius against the time that an input takes")
    rows = [
        (
            f"{item.letter} {item.summary.name}",
            time_text(statistics.median(seconds)),
            time_text(sum(seconds)),
            radius_text(item.summary.median_radius),
        )
        for item, seconds, _ in timed
    ]
    caption = "Up and to the left is better. Times are those of the rows, on the machine of each run; what is done once before them is not in them, "
    caption += "such as the bound of the network."
    beyond = [item.letter for item, _, radius in timed if radius > y.high]
    caption += f" Beyond the upper edge: {', '.join(beyond)}." * bool(beyond)
    caption += " Dotted: the median distance of an attack, which no proof of the same network passes on the same inputs." * math.isfinite(attack)
    return Plot(drawing, caption, ("run", "per input", "all rows", "median radius"), rows)


def time_text(seconds: float) -> str:
    """A time for people."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def reach(items: Sequence[Shown]) -> float:
    """The range that histograms of radii in one norm share."""
    return end_of(radius for item in items for radius in certified_radii(item.run))


def end_of(values: Iterable[float], least: float = 1.0) -> float:
    """The right end of a scale: the largest finite number, unless a few are far beyond all others; `least` where there is none above 0."""
    positive = sorted(value for value in values if 1 / _ENDLESS < value <= _ENDLESS)
    if not positive:
        return least
    usual = positive[math.floor(0.95 * (len(positive) - 1))]
    return positive[-1] if positive[-1] <= 10 * usual else 2 * usual


def _at(starts: Sequence[float], shares: Sequence[float], radius: float) -> float:
    """The step curve at a radius."""
    return shares[bisect_right(starts, radius) - 1]


def _beside(heights: Sequence[float], x: Scale, level: float) -> tuple[float, float]:
    """Where the letter of a curve stands: on it, where it first falls below this part of its height."""
    below = next((place for place, height in enumerate(heights) if height <= heights[0] * (1 - level)), len(heights) - 1)
    return x.edges(_COLUMNS)[below], (heights[max(below - 1, 0)] + heights[below]) / 2


def _some(found: Sequence[Between]) -> list[Between]:
    """All of a few, or evenly chosen ones of many, and contradictions."""
    every = max(1, math.ceil(len(found) / _MANY))
    contradicted = [entry for entry in found if entry.contradicted][:_MANY]
    kept = {entry.index for entry in [*found[::every], *contradicted]}
    return [entry for entry in found if entry.index in kept]


def _distance_text(entry: Between) -> str:
    return radius_text(entry.distance, up=True) if math.isfinite(entry.distance) else "none found"


def _seconds(run: Run) -> list[float]:
    return [seconds for row in run.rows if (seconds := number(row.get("seconds"))) is not None]
