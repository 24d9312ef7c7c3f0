"""How many inputs have which radius, and which margin: histograms with their numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate

from certify.report.figure import Scale, counted, element, ink, scaled, sheet
from certify.report.plots import Plot, Shown, end_of
from certify.report.summary import Run, certified_radii, certified_radius, measures_text, number, radius_text

_BINS = 20
_HEIGHT = 240
_WHY = {"misclassified": "weak", "abstained": "chance", "ended in an error": "text", "without a point found": "muted", "with radius 0": "muted"}
_SIDES = {"right": "proof", "wrong": "weak", "without label": "muted"}

Edges = Sequence[tuple[float, float]]


def radii(item: Shown, end: float) -> Plot:
    """How many inputs have a radius in each interval, and beside them those that have none, by why."""
    attacked = item.summary.attacked
    found = [radius for radius in certified_radii(item.run) if radius > 0 and not (attacked and math.isinf(radius))]
    edges, none = _edges(end), _without(item.run, attacked)
    width, last = edges[0][1] - edges[0][0], edges[-1][1]
    counts = [sum(low < radius <= high for radius in found) for low, high in edges]
    beyond = sum(radius > last for radius in found)
    with sheet(_HEIGHT) as axes:
        scaled(axes, "x", x := Scale(0, last), f"radius ({measures_text([item.summary.norm])})")
        axes.set(xlim=(-3.5 * width, last))
        axes.set_xticks([-2 * width, *x.marks()], ["none", *map(_edge, x.marks())])
        counted(axes, max([1, *counts, sum(none.values())]))
        axes.bar([(low + high) / 2 for low, high in edges], counts, width * 5 / 6, color=item.ink)
        axes.bar(-2 * width, list(none.values()), 1.8 * width, list(accumulate(none.values(), initial=0))[:-1], color=[ink(_WHY[why]) for why in none])
        told = f"{'Distances of attacks' if attacked else 'Certified radii'} of {item.summary.name}"
        drawing = element(axes, f"radii-{item.letter}", told)
    rows = [(why, str(count)) for why, count in none.items()]
    rows += [(f"{_edge(low)} to {_edge(high)}", str(count)) for (low, high), count in zip(edges, counts, strict=True) if count]
    rows += [(f"above {_edge(last)}", str(beyond))] * bool(beyond)
    what = "an attack changes at which distance" if attacked else "are certified up to which radius"
    told = ", ".join(f"{count} {why}" for why, count in none.items())
    caption = f"How many inputs {what}." + f" Under none: {told}." * bool(told) + f" {beyond} are beyond the right edge." * bool(beyond)
    return Plot(drawing, caption, ("radius", "inputs"), rows)


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
    with sheet(_HEIGHT) as axes:
        scaled(axes, "x", Scale(0, edges[-1][1]), "margin (units of the logits)")
        counted(axes, max([1, *(count for found in counts.values() for count in found)]))
        for place, side in enumerate(counts):
            part = 0.88 * width / len(counts)
            axes.bar([low + 0.06 * width + place * part for low, _ in edges], counts[side], part, align="edge", color=ink(_SIDES[side]))
        drawing = element(axes, f"margins-{item.letter}", f"Margins of {item.summary.name}, right and wrong")
    table = [
        (f"{_edge(low)} to {_edge(high)}" if low < last else f"from {_edge(low)}", *(str(found[place]) for found in counts.values()))
        for place, (low, high) in enumerate(edges)
    ]
    medians = ", ".join(f"{side} {len(found)} (median {radius_text(statistics.median_low(found))})" for side, found in sides.items() if found)
    return Plot(drawing, f"How far the largest logit is ahead of the next: {medians}. The last bar has all that are larger.", ("margin", *counts), table)


def _sides(run: Run) -> dict[str, list[float]]:
    """The margins of inputs that are classified right, and wrong; of those without labels by themselves."""
    sides: dict[str, list[float]] = {"right": [], "wrong": [], "without label": []}
    for row in run.rows:
        if (margin := number(row.get("margin"))) is not None:
            sides["without label" if row.get("label") is None else "right" if row.get("prediction") == row["label"] else "wrong"].append(margin)
    return {side: found for side, found in sides.items() if found or (side != "without label" and (sides["right"] or sides["wrong"]))}


def _edges(end: float) -> list[tuple[float, float]]:
    """Intervals of one round width from 0 to beyond the end."""
    step = Scale(0, end).marks(_BINS)[1]
    return [(place * step, (place + 1) * step) for place in range(math.ceil(end / step - 1e-9))]


def _edge(number: float) -> str:
    return f"{number:.6g}"


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
