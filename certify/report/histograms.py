"""How many inputs have which radius, and which margin: histograms with their numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from certify.report.plots import Plot, Shown, end_of
from certify.report.summary import Run, certified_radii, certified_radius, measures_text, number, radius_text
from certify.report.svg import Axis, Drawing, linear, round_step

_BINS = 20
_HEIGHT = 240.0
_WHY = {"misclassified": "wrong", "abstained": "abstained", "ended in an error": "error", "without a point found": "other", "with radius 0": "other"}

Edges = Sequence[tuple[float, float]]


def radii(item: Shown, end: float) -> Plot:
    """How many inputs have a radius in each interval, and beside them those that have none, by why."""
    attacked = item.summary.attacked
    found = [radius for radius in certified_radii(item.run) if radius > 0 and not (attacked and math.isinf(radius))]
    edges, none = _edges(end), _without(item.run, attacked)
    width, last = edges[0][1] - edges[0][0], edges[-1][1]
    counts = [sum(low < radius <= high for radius in found) for low, high in edges]
    beyond = sum(radius > last for radius in found)
    x = linear(0, last, f"radius ({measures_text([item.summary.norm])})")
    x = Axis(-3.5 * width, last, x.label, ((-2 * width, "none"), *x.ticks))
    drawing = Drawing(
        f"{'Distances of attacks' if attacked else 'Certified radii'} of {item.summary.name}", x, _counted([*counts, sum(none.values())]), _HEIGHT
    )
    for (low, high), count in zip(edges, counts, strict=True):
        if count:
            drawing.bar((low + width / 12, 0), (high - width / 12, count), f"{item.colour} fill", f"{count} in ({_edge(low)}, {_edge(high)}]")
    start = 0
    for why, count in none.items():
        drawing.bar((-2.9 * width, start), (-1.1 * width, start + count), f"why {_WHY[why]}", f"{count} {why}")
        start += count
    rows = [(why, str(count)) for why, count in none.items()]
    rows += [(f"{_edge(low)} to {_edge(high)}", str(count)) for (low, high), count in zip(edges, counts, strict=True) if count]
    rows += [(f"above {_edge(last)}", str(beyond))] * bool(beyond)
    what = "an attack changes at which distance" if attacked else "are certified up to which radius"
    told = ", ".join(f"{count} {why}" for why, count in none.items())
    caption = f"How many inputs {what}." + f" Under none: {told}." * bool(told) + f" {beyond} are beyond the right edge." * bool(beyond)
    return Plot(str(drawing), caption, ("radius", "inputs"), rows)


def margins(item: Shown) -> Plot | None:
    """How far the largest logit is ahead of the next, of inputs that are classified right and of others. None where rows do not say."""
    sides = _sides(item.run)
    if not sides:
        return None
    edges = _edges(end_of(margin for found in sides.values() for margin in found))
    width, last = edges[0][1] - edges[0][0], edges[-1][0]
    # what is beyond the right edge is in the last interval, a margin of 0 in the first
    places = {side: [max(math.ceil(min(margin / width, len(edges))) - 1, 0) for margin in found] for side, found in sides.items()}
    counts = {side: [found.count(place) for place in range(len(edges))] for side, found in places.items()}
    x, y = linear(0, edges[-1][1], "margin (units of the logits)"), _counted(count for found in counts.values() for count in found)
    drawing = Drawing(f"Margins of {item.summary.name}, right and wrong", x, y, _HEIGHT)
    for place, side in enumerate(counts):
        for (low, _), count in zip(edges, counts[side], strict=True):
            at = low + width * (0.06 + 0.88 * place / len(counts))
            if count:
                drawing.bar((at, 0), (at + 0.88 * width / len(counts), count), side.split()[0], f"{count} {side}, from {_edge(low)}")
    table = [
        (f"{_edge(low)} to {_edge(high)}" if low < last else f"from {_edge(low)}", *(str(found[place]) for found in counts.values()))
        for place, (low, high) in enumerate(edges)
    ]
    medians = ", ".join(f"{side} {len(found)} (median {radius_text(statistics.median_low(found))})" for side, found in sides.items() if found)
    return Plot(str(drawing), f"How far the largest logit is ahead of the next: {medians}. The last bar has all that are larger.", ("margin", *counts), table)


def _sides(run: Run) -> dict[str, list[float]]:
    """The margins of inputs that are classified right, and wrong; of those without labels by themselves."""
    sides: dict[str, list[float]] = {"right": [], "wrong": [], "without label": []}
    for row in run.rows:
        if (margin := number(row.get("margin"))) is not None:
            sides["without label" if row.get("label") is None else "right" if row.get("prediction") == row["label"] else "wrong"].append(margin)
    return {side: found for side, found in sides.items() if found or (side != "without label" and (sides["right"] or sides["wrong"]))}


def _edges(end: float) -> list[tuple[float, float]]:
    """Intervals of one round width from 0 to beyond the end."""
    step = round_step(end / _BINS)
    return [(place * step, (place + 1) * step) for place in range(math.ceil(end / step - 1e-9))]


def _edge(number: float) -> str:
    return f"{number:.6g}"


def _counted(counts: Iterable[int]) -> Axis:
    """An axis of whole numbers."""
    high = max([1, *counts])
    step = max(1, math.ceil(round_step(high / 4)))
    return Axis(0, high * 1.02, "inputs", tuple((mark, str(mark)) for mark in range(0, high + 1, step)))


def _without(run: Run, attacked: bool) -> dict[str, int]:
    """How many inputs have no radius above 0, by why; of an attack, how many have no distance."""
    counts = dict.fromkeys(_WHY, 0)
    for row in run.rows:
        radius, status = certified_radius(row), row.get("status")
        if attacked and math.isinf(radius):
            counts["without a point found"] += 1
        elif radius > 0:
            continue
        elif status in ("error", "abstained"):
            counts["ended in an error" if status == "error" else "abstained"] += 1
        elif row.get("label") is not None and row.get("prediction") != row["label"]:
            counts["misclassified"] += 1
        else:
            counts["with radius 0"] += 1
    return {why: count for why, count in counts.items() if count}
