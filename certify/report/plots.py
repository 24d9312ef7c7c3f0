"""The plots of the page, each with its numbers as a table. Radii and accuracies in a table are rounded down, those of attacks and Lipschitz bounds up.

A plot has radii in one norm. Where there are too many points to be seen, some are drawn, and the caption says how many; tables are shortened in the same way.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from certify.report.sandwich import Between
from certify.report.summary import MISSING, Run, Summary, bound_text, certified_radii, curve, lookup, measures_text, number, percent, plain, radius_label, radius_text
from certify.rounding import multiply_up
from certify.report.svg import Axis, Drawing, linear, logarithmic, round_step

COLOURS = 6  # classes c0 to c5 of the page; further runs begin again, and are told apart by their letters
STYLES = {"proof": "", "probabilistic": "chance"}  # dashes; what certifies nothing is dotted
_MANY = 120  # inputs of a sandwich that are drawn
_PARTS = 40  # parts of a bound that are drawn
_BINS = 20
_LARGEST = 1e300  # beyond it a product is not followed


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
        """The classes of its marks."""
        return f"{self.colour} {self.dashes}".strip()


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
    end = _end(radius for item in items for radius in certified_radii(item.run))
    shortest = min((_end(certified_radii(item.run), least=end) for item in items if not item.summary.attacked), default=end)
    squeezed = shortest < end / 20
    norm = measures_text(item.summary.norm for item in items)
    x = logarithmic(max(shortest / 30, end / 1e6), end, f"radius ({norm})") if squeezed else linear(0, end, f"radius ({norm})")
    attacked = any(item.summary.attacked for item in items)
    drawing = Drawing("Accuracy against radius, " + ", ".join(f"{item.letter}: {item.summary.name}" for item in items), x, _shares(attacked))
    for radius in radii:
        if x.low < radius <= end:
            drawing.segment((radius, 0, radius, 1), "asked")
    for place, item in enumerate(items):
        starts, shares = curve(item.run)
        told = f"{item.letter} {item.summary.name}: clean {percent(item.summary.clean)}, median radius {radius_text(item.summary.median_radius, item.summary.attacked)}"
        drawing.steps(starts, shares, item.style, plain(told), later=item.summary.attacked)
    for place, item in enumerate(items):
        drawing.write(*_beside(*curve(item.run), x, (place + 1) / (len(items) + 1)), item.letter, f"{item.colour} letter")
    caption = "Solid: proof. Dashed: with a probability. Dotted: no certificate." + " Upright lines: the radii of the table above." * bool(radii)
    caption += " The curve of an attack is an upper bound: what is proved of the same network and inputs lies below it." * attacked
    caption += " For inputs without labels the curve is the share that is certified, right or wrong." * any(item.summary.clean is None for item in items)
    caption += " The scale of radii is logarithmic." * squeezed
    grid = [mark for mark, _ in x.ticks] if squeezed else [float(f"{place * round_step(end / 8):.12g}") for place in range(math.ceil(end / round_step(end / 8)) + 1)]
    rows = [
        (radius_label(radius), *(percent(_at(*curve(item.run), radius), item.summary.attacked) for item in items))
        for radius in sorted({0.0, *grid, *(radius for radius in radii if radius <= end)})
    ]
    return Plot(str(drawing), caption, ("r", *(item.letter for item in items)), rows)


def sandwich(found: Sequence[Between], items: Mapping[str, Shown]) -> Plot:
    """Each input between the largest radius that is proved and the smallest distance at which an attack changes it."""
    chosen = _some(found)
    ends = [entry.distance for entry in found if math.isfinite(entry.distance)]
    high = _end([*ends, *(entry.radius for entry in found)])
    least = min((entry.radius for entry in found if entry.radius > 0), default=high)
    squeezed = statistics.median(entry.radius for entry in found) < high / 20
    low = max(least / 2, high / 1e6)
    y = logarithmic(low, high * 1.2, "distance") if squeezed else linear(0, high * 1.05, "distance")
    drawing = Drawing("The certified radius and the distance of the nearest attack for each input", linear(0, len(chosen) + 1, "inputs, by the distance of the attack"), y)
    for place, entry in enumerate(chosen, 1):
        told = f"input {entry.index}: certified {radius_text(entry.radius)} ({entry.by}), attacked at {_distance_text(entry)}"
        drawing.segment((place, max(entry.radius, y.low), place, min(entry.distance, y.high)), "wrong gap" if entry.contradicted else "gap" if math.isfinite(entry.distance) else "gap none", told)
        drawing.dot(place, entry.radius, f"{items[entry.by].colour} dot", told, 2.6)
        if math.isfinite(entry.distance):
            drawing.dot(place, entry.distance, f"{items[entry.found_by].colour} ring", told, 2.6)
        if entry.contradicted:
            drawing.cross(place, entry.distance, "wrong mark", f"contradiction: {told}")
    rows = [
        (f"{entry.index}" + " (contradiction)" * entry.contradicted, str(MISSING if entry.label is None else entry.label), radius_text(entry.radius), items[entry.by].letter, _distance_text(entry), items[entry.found_by].letter, percent(entry.share) if not entry.contradicted else MISSING)
        for entry in sorted(chosen, key=lambda entry: not entry.contradicted)
    ]  # fmt: skip
    attacked = [entry for entry in found if math.isfinite(entry.distance)]
    caption = f"{len(found)} inputs that are classified right; a line from the certified radius (filled) to the attack (ring) is what neither settles."
    caption += f" In the median {percent(statistics.median_low(entry.share for entry in attacked))} of the distance is certified." * bool(attacked)
    caption += f" For {len(found) - len(attacked)} no attack found a point: their lines go to the upper edge." * (len(attacked) < len(found))
    caption += f" {len(chosen)} of them are drawn and listed, evenly chosen, with all contradictions; --json has all." * (len(chosen) < len(found))
    caption += " The scale is logarithmic; a radius of 0 is at its lower end." * squeezed
    return Plot(str(drawing), caption, ("input", "label", "certified", "by", "attacked at", "by", "share"), rows)


def waterfall(parts: Sequence[Mapping[str, Any]], totals: Sequence[tuple[Shown, float]]) -> Plot | None:
    """How the bound grows from layer to layer, on a log scale: each bar begins where the one before it ends. None for a network without parts."""
    if not parts:
        return None
    steps = _products(parts)
    drawn = _largest([step for step in steps if abs(math.log10(max(step[2], 1e-300)) - math.log10(max(step[1], 1e-300))) > 5e-4])
    values = [1.0, *(bound for _, bound in totals), *(end for _, *ends in drawn for end in ends)]
    low, high = min(max(min(values), max(values) / 1e12) / 1.3, 0.8), max(values) * 1.3
    high = max(high, 10 * low)
    height = 20.0 * (len(drawn) + 1) + 58
    y = Axis(len(drawn) + 1, 0, "", tuple((place, _label(part)) for place, (part, _, _) in enumerate(drawn, 1)))
    drawing = Drawing("The Lipschitz bound from layer to layer, on a log scale", logarithmic(low, high, "product of the bounds so far (log scale)"), y, height, left=128)
    drawing.segment((1.0, len(drawn) + 1, 1.0, 0), "asked")
    for place, (part, before, after) in enumerate(drawn, 1):
        style = ("grows" if after > before else "shrinks") + " inner" * bool(part.get("depth"))
        thick = 0.2 if part.get("depth") else 0.38
        drawing.bar((before, place - thick), (after, place + thick), style, f"{_label(part)}: {bound_text(number(part.get('value')), digits=6)}")
    taken = -math.inf
    for item, bound in sorted(totals, key=lambda total: total[1]):
        drawing.segment((bound, len(drawn) + 1, bound, 0), f"{item.style} line", f"{item.letter} {item.summary.name}: {bound_text(bound)}")
        taken = max(taken + 16, drawing.across(bound))
        drawing.write(bound, 0, item.letter, f"{item.colour} letter", (taken - drawing.across(bound), 6))
    rows = [
        (
            "\N{NO-BREAK SPACE}" * 3 * int(part.get("depth") or 0) + str(part.get("name") or MISSING),
            str(part.get("type") or MISSING),
            bound_text(number(part.get("value")), digits=9),
            MISSING if part.get("depth") else bound_text(after),
            str(part.get("how", MISSING)),
        )
        for part, _, after in steps
    ]
    left_out = len(steps) - len(drawn)
    caption = "Each bar goes from the product before a part to that after it; thin bars are the parts of a sum, which are added and not multiplied."
    caption += f" {left_out} of {len(steps)} parts are not drawn: those that change the product by less than 0.1 %, and beyond {_PARTS} the smallest." * bool(left_out)
    caption += " Upright lines: the bounds that the runs use. One below the product is of a method that looks at the whole network."
    return Plot(str(drawing), caption, ("part", "type", "bound", "product", "how"), rows)


def radii_histogram(item: Shown, end: float) -> Plot:
    """How many inputs have a radius in each interval, and beside them those that have none, by why."""
    run, attacked = item.run, item.summary.attacked
    radii = [radius for radius in certified_radii(run) if radius > 0 and not (attacked and math.isinf(radius))]
    edges = _edges(end)
    counts = [sum(low < radius <= high for radius in radii) for low, high in edges]
    beyond = sum(radius > edges[-1][1] for radius in radii)
    none = _without(run, attacked)
    width = edges[0][1] - edges[0][0]
    x = linear(0, edges[-1][1], f"radius ({measures_text([item.summary.norm])})")
    x = Axis(-3.5 * width, x.high, x.label, ((-2 * width, "none"), *x.ticks))
    drawing = Drawing(f"{'Distances of attacks' if attacked else 'Certified radii'} of {item.summary.name}", x, _counted([*counts, sum(none.values())]), 240)
    for (low, high), count in zip(edges, counts, strict=True):
        if count:
            drawing.bar((low + width / 12, 0), (high - width / 12, count), f"{item.colour} fill", f"{count} in ({_edge(low)}, {_edge(high)}]")
    start = 0
    for why, count in none.items():
        if count:
            drawing.bar((-2.9 * width, start), (-1.1 * width, start + count), f"why {_WHY[why]}", f"{count} {why}")
            start += count
    rows = [(why, str(count)) for why, count in none.items() if count]
    rows += [(f"{_edge(low)} to {_edge(high)}", str(count)) for (low, high), count in zip(edges, counts, strict=True) if count]
    rows += [(f"above {_edge(edges[-1][1])}", str(beyond))] * bool(beyond)
    what = "an attack changes at which distance" if attacked else "are certified up to which radius"
    told = ", ".join(f"{count} {why}" for why, count in none.items() if count)
    caption = f"How many inputs {what}." + f" Under none: {told}." * bool(told) + f" {beyond} are beyond the right edge." * bool(beyond)
    return Plot(str(drawing), caption, ("radius", "inputs"), rows)


def margins(item: Shown) -> Plot | None:
    """How far the largest logit is ahead of the next, of inputs that are classified right and of others. None where rows do not say."""
    rows = [(margin, row) for row in item.run.rows if (margin := number(row.get("margin"))) is not None]
    if not rows:
        return None
    edges = _edges(_end(margin for margin, _ in rows))
    sides = {"right": [], "wrong": [], "without label": []}
    for margin, row in rows:
        sides["without label" if row.get("label") is None else "right" if row.get("prediction") == row["label"] else "wrong"].append(margin)
    sides = {side: found for side, found in sides.items() if found or side != "without label"}
    counts = {side: [sum(low < margin <= high or margin == low == 0 for margin in found) for low, high in edges] for side, found in sides.items()}
    counts = {side: [*found[:-1], found[-1] + sum(margin > edges[-1][1] for margin in sides[side])] for side, found in counts.items()}
    drawing = Drawing(f"Margins of {item.summary.name}, right and wrong", linear(0, edges[-1][1], "margin (units of the logits)"), _counted(sum(counts.values(), [])), 240)
    width = edges[0][1] - edges[0][0]
    for place, side in enumerate(counts):
        for (low, _), count in zip(edges, counts[side], strict=True):
            if count:
                at = low + width * (0.06 + 0.88 * place / len(counts))
                drawing.bar((at, 0), (at + 0.88 * width / len(counts), count), side.split()[0], f"{count} {side}, from {_edge(low)}")
    last = edges[-1][0]
    table = [(f"{_edge(low)} to {_edge(high)}" if low < last else f"from {_edge(low)}", *(str(found[place]) for found in counts.values())) for place, (low, high) in enumerate(edges)]
    medians = ", ".join(f"{side} {len(found)} (median margin {radius_text(statistics.median_low(found))})" for side, found in sides.items() if found)
    return Plot(str(drawing), f"How far the largest logit is ahead of the next: {medians}. The last bar has all that are larger.", ("margin", *counts), table)


def costs(items: Sequence[Shown]) -> Plot | None:
    """Time against tightness: for each run that certifies, the seconds of an input and the median radius. None for a single one."""
    timed = [(item, statistics.median(seconds), sum(seconds)) for item in items if (seconds := _seconds(item.run)) and not item.summary.attacked and item.summary.median_radius is not None]
    if len(timed) < 2:
        return None
    finite = [min(item.summary.median_radius or 0.0, 1e30) for item, _, _ in timed]
    times = [max(median, 1e-6) for _, median, _ in timed]
    reference = min((item.summary.median_radius or 0.0 for item in items if item.summary.attacked and item.summary.median_radius), default=math.inf)
    high = max([*finite, reference if math.isfinite(reference) else 0.0]) or 1.0
    x, y = logarithmic(min(times) / 2, max(times) * 2, "median seconds per input (log scale)"), linear(0, high * 1.1, "median radius")
    drawing = Drawing("Median radius against the time that an input takes", x, y)
    if math.isfinite(reference):
        drawing.segment((x.low, reference, x.high, reference), "asked", f"median distance of an attack: {radius_text(reference, up=True)}")
    for (item, _, _), seconds, radius in zip(timed, times, finite, strict=True):
        drawing.dot(seconds, radius, f"{item.colour} dot", f"{item.letter} {item.summary.name}", 5)
        drawing.write(seconds, radius, item.letter, f"{item.colour} letter", (8, -6))
    rows = [(f"{item.letter} {item.summary.name}", item.summary.guarantee, time_text(median), time_text(total), radius_text(item.summary.median_radius)) for item, median, total in timed]
    caption = "Up and to the left is better. Times are those of the rows, on the machine of each run: what is done once before them, such as the bound of the network, is not in them."
    caption += " Dotted: the median distance of an attack, which no proof of the same network passes on the same inputs." * math.isfinite(reference)
    return Plot(str(drawing), caption, ("run", "guarantee", "per input", "all rows", "median radius"), rows)


def time_text(seconds: float) -> str:
    """A time for people."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def reach(items: Sequence[Shown]) -> float:
    """The range that histograms of radii in one norm share."""
    return _end(radius for item in items for radius in certified_radii(item.run))


def _end(values: Iterable[float], least: float = 1.0) -> float:
    """The right end of a scale: the largest finite number, unless a few are far beyond all others; `least` where there is none above 0."""
    positive = sorted(value for value in values if 0 < value < math.inf)
    if not positive:
        return least
    usual = positive[math.floor(0.95 * (len(positive) - 1))]
    return positive[-1] if positive[-1] <= 10 * usual else 2 * usual


def _edges(end: float) -> list[tuple[float, float]]:
    """Intervals of one round width from 0 to beyond the end."""
    step = round_step(end / _BINS)
    return [(place * step, (place + 1) * step) for place in range(math.ceil(end / step - 1e-9))]


def _edge(number: float) -> str:
    return f"{number:.6g}"


def _shares(attacked: bool) -> Axis:
    return Axis(0, 1, "accuracy (%)" if attacked else "certified accuracy (%)", tuple((share / 5, str(20 * share)) for share in range(6)))


def _counted(counts: Iterable[int]) -> Axis:
    """An axis of whole numbers."""
    high = max([1, *counts])
    step = max(1, math.ceil(round_step(high / 4)))
    return Axis(0, high * 1.02, "inputs", tuple((mark, str(mark)) for mark in range(0, high + 1, step)))


def _at(starts: Sequence[float], shares: Sequence[float], radius: float) -> float:
    """The step curve at a radius."""
    return [share for start, share in zip(starts, shares, strict=True) if start <= radius][-1]


def _beside(starts: Sequence[float], shares: Sequence[float], x: Axis, level: float) -> tuple[float, float]:
    """Where the letter of a curve stands: on it, where it first falls below this part of its height."""
    below = next((place for place, share in enumerate(shares) if share <= shares[0] * (1 - level)), len(shares) - 1)
    return min(max(starts[below], x.low), x.high), (shares[max(below - 1, 0)] + shares[below]) / 2


def _some(found: Sequence[Between]) -> list[Between]:
    """All of a few, or evenly chosen ones of many, and every contradiction."""
    every = max(1, math.ceil(len(found) / _MANY))
    contradicted = [entry for entry in found if entry.contradicted][:_MANY]
    kept = {entry.index for entry in [*found[::every], *contradicted]}
    return [entry for entry in found if entry.index in kept]


def _products(parts: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float, float]]:
    """Each part with the product of those before it, and with that times its own; the parts of a sum each begin where the sum does. Rounded up."""
    steps, before, after = [], 1.0, 1.0
    for part in parts:
        value, outer = number(part.get("value")), not part.get("depth")
        before = after if outer else before
        reached = before if value is None else min(multiply_up(before, value), _LARGEST)
        steps.append((part, before, reached))
        after = reached if outer else after
    return steps


def _largest(steps: list[tuple[Mapping[str, Any], float, float]]) -> list[tuple[Mapping[str, Any], float, float]]:
    """Those that change the product most, in their order."""
    change: Callable[[int], float] = lambda place: -abs(math.log(max(steps[place][2], 1e-300)) - math.log(max(steps[place][1], 1e-300)))  # noqa: E731
    return [steps[place] for place in sorted(sorted(range(len(steps)), key=change)[:_PARTS])]


def _label(part: Mapping[str, Any]) -> str:
    """The name and type of a part, short enough for the margin."""
    text = plain(" ".join(str(word) for word in (part.get("name"), part.get("type")) if word))
    return text if len(text) <= 17 else text[:16] + "\N{HORIZONTAL ELLIPSIS}"


def _distance_text(entry: Between) -> str:
    return radius_text(entry.distance, up=True) if math.isfinite(entry.distance) else "none found"


_WHY = {"misclassified": "wrong", "abstained": "abstained", "ended in an error": "error", "have no point found": "other", "right, with radius 0": "other"}


def _without(run: Run, attacked: bool) -> dict[str, int]:
    """How many inputs have no radius above 0, by why; of an attack, how many have no distance."""
    counts = dict.fromkeys(_WHY, 0)
    for row in run.rows:
        status, radius = row.get("status"), number(row.get("radius"))
        if status == "error":
            counts["ended in an error"] += 1
        elif status == "abstained":
            counts["abstained"] += 1
        elif row.get("label") is not None and row.get("prediction") != row["label"]:
            counts["misclassified"] += 1
        elif attacked and status == "survived":
            counts["have no point found"] += 1
        elif not (radius is not None and radius > 0 and status in ("certified", "attacked")):
            counts["right, with radius 0"] += 1
    return counts


def _seconds(run: Run) -> list[float]:
    return [seconds for row in run.rows if (seconds := number(row.get("seconds"))) is not None]
