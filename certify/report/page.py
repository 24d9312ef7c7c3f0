"""The runs as one HTML page: tables, curves as inline SVG, assumptions, provenance. No script, nothing loaded from elsewhere, the same bytes every time.

The only file that imports matplotlib and jinja2; `certify.report.html` imports it when it is called.
"""

from __future__ import annotations

import io
import math
import pathlib
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from certify.report.sandwich import all_contradictions
from certify.report.summary import (
    MISSING,
    Run,
    Summary,
    bound_text,
    certified_radii,
    curve,
    is_norm,
    lookup,
    measures_text,
    norm_text,
    notes,
    percent,
    plain,
    radius_label,
    radius_text,
    summarize,
)

# Contrast of at least 3 : 1 against the light and against the dark ground of the page (tested).
COLOURS = ("#2f7fd0", "#d0671b", "#1f9470", "#b35fc8", "#cc4a68", "#1b94a8", "#8f7f14", "#7d76d8", "#64903a", "#a8714f")
GREY = "#808080"
GROUNDS = {"light": "#ffffff", "dark": "#14171c"}
DASHES = {"proof": (), "probabilistic": (6.0, 2.5)}  # attacks, estimates and unknown guarantees are dotted
DOTS = (1.2, 2.2)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "certify",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.7,
}


@dataclass(frozen=True)
class Layer:
    """One row of the table of a network's parts, as text; `start` and `width` place its bar, in per cent of the scale."""

    name: str
    kind: str
    bound: str
    how: str
    start: float
    width: float


@dataclass(frozen=True)
class Item:
    """One run as the template shows it."""

    run: Run
    summary: Summary
    colour: str
    dashes: str
    outcomes: Sequence[tuple[str, str]]
    layers: Sequence[Layer]
    bars: bool  # whether some part is far enough from 1 for a bar to show
    histogram: Markup | None
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Statement:
    """What the radii of some runs mean."""

    names: Sequence[str]
    guarantee: str
    text: str


def html(runs: Sequence[Run], radii: Sequence[float], title: str) -> str:
    """The page. Text of the runs is data: every character of it is escaped."""
    summaries = [summarize(run, radii) for run in runs]
    reach = max((radius for run in runs for radius in certified_radii(run) if math.isfinite(radius)), default=0.0) or 1.0
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, radius=radius_text, bound=bound_text, label=radius_label, norm=norm_text, plain=plain)
    place = next((place for place, radius in enumerate(radii) if radius > 0), None)
    leader = _leader(summaries, place)
    return environment.get_template("report.html.j2").render(
        title=title,
        grounds=GROUNDS,
        radii=radii,
        summaries=summaries,
        leader=leader,
        headline=_headline(leader, radii, place) if leader else "",
        statements=_statements(runs, summaries),
        inputs=_inputs(runs),
        measures=measures_text(summary.norm for summary in summaries),
        notes=[*notes(summaries), *(f"Contradiction: {message}" for message in all_contradictions(runs))],
        labelled=all(summary.clean is not None for summary in summaries),
        plot=_curves(runs, summaries, radii, reach),
        samples=_samples(runs, reach),
        items=[_item(place, run, summary, reach) for place, (run, summary) in enumerate(zip(runs, summaries, strict=True))],
        assumptions=_assumptions(runs),
    )


def _leader(summaries: Sequence[Summary], place: int | None) -> Summary | None:
    """The run the page begins with: of those computed here, with the strongest guarantee, the one with the largest accuracy at the radius of that place."""
    known = [summary for summary in summaries if summary.proved and summary.log is None and summary.clean is not None]
    strongest = [summary for summary in known if summary.guarantee == "proof"] or known
    return max(strongest, key=lambda summary: (summary.clean if place is None else summary.certified[place], summary.clean), default=None)


def _headline(leader: Summary, radii: Sequence[float], place: int | None) -> str:
    """One sentence that is true of the leading run."""
    of = f"{leader.count} inputs" if leader.count >= leader.expected else f"the {leader.count} inputs done so far"
    if place is None:
        return f"{leader.name} is right on {percent(leader.clean)} of {of}; its median certified radius is {radius_text(leader.median_radius)}."
    chance = "" if leader.guarantee == "proof" else ", each with the probability stated below,"
    return (
        f"On {percent(leader.certified[place])} of {of}, {leader.name} gives the right answer and certifies{chance} that no "
        f"{_change(leader.norm)} up to {radius_label(radii[place])} changes it."
    )


def _change(norm: str) -> str:
    """What the radius is a bound on, in a sentence."""
    return f"perturbation of {norm_text(norm)} norm" if is_norm(norm) else f'change of "{norm}"'


def _statements(runs: Sequence[Run], summaries: Sequence[Summary]) -> list[Statement]:
    """The sentence that each run's radii stand for; runs with the same sentence share it."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for run, summary in zip(runs, summaries, strict=True):
        grouped.setdefault((summary.guarantee, _statement(run, summary)), []).append(summary.name)
    return [Statement(names, guarantee, text) for (guarantee, text), names in grouped.items()]


def _statement(run: Run, summary: Summary) -> str:
    change, assumed = _change(summary.norm), lookup(run.manifest, "assumptions")
    proviso = " (real arithmetic, see assumptions)" if assumed is None or "REAL_ARITHMETIC" in assumed else " (see assumptions)" if assumed else ""
    claim = f"for every {change} below the radius the prediction of the"
    if summary.guarantee == "proof":
        return f"{claim} network does not change{proviso}."
    if summary.guarantee == "probabilistic":
        chance = "the probability that its manifest states" if summary.failure is None else f"probability at least 1 - {summary.failure:g}"
        smoothed = summary.method.startswith("Smoothing")
        subject = "smoothed classifier" if smoothed else "network"
        claimed = "as a published log claims, " * (summary.log is not None)
        apart = " It says nothing about the network without the noise." * smoothed
        return f"{claimed}for each input, with {chance}, {claim} {subject} does not change{proviso}.{apart}"
    if summary.guarantee == "attack":
        return f"an attack found a {change} that changes the prediction. The radius is an upper bound and certifies nothing."
    return f"the radius ({measures_text([summary.norm])}) is {'an estimate' if summary.guarantee == 'estimate' else 'of unknown origin'} and certifies nothing."


def _inputs(runs: Sequence[Run]) -> list[str]:
    """Which inputs, in which units; one sentence for each different answer."""
    return list(dict.fromkeys(_input(run.manifest) for run in runs))


def _input(manifest: Mapping[str, Any]) -> str:
    data, count, selection = lookup(manifest, "data", "spec"), lookup(manifest, "data", "count"), lookup(manifest, "selection")
    extent, units = lookup(manifest, "input", "range"), lookup(manifest, "input", "units")
    chosen = f"{len(selection)} of " if selection is not None and count is not None and len(selection) != count else ""
    size = f", {chosen}{count} inputs" if count is not None else ""
    norm = str(lookup(manifest, "norm") or MISSING)
    units = units if is_norm(norm) else f"those of {norm}"
    ranged = f", values in [{extent[0]:g}, {extent[1]:g}]" if extent else ""
    return f"{data or 'unnamed data'}{size}{ranged}. Units of the radii: {units or 'those of the input as it is handed to the network'}."


def _samples(runs: Sequence[Run], reach: float) -> list[tuple[float, list[float]]]:
    """The curves at about ten round radii from 0 to their end."""
    curves = [curve(run) for run in runs]
    step = _round_step(reach / 10)
    grid = [place * step for place in range(math.ceil(reach / step) + 1)]
    return [(float(f"{radius:.12g}"), [_value(*steps, float(f"{radius:.12g}")) for steps in curves]) for radius in grid]


def _value(radii: Sequence[float], shares: Sequence[float], radius: float) -> float:
    """The step curve at a radius."""
    return [share for start, share in zip(radii, shares, strict=True) if start <= radius][-1]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return min(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _item(place: int, run: Run, summary: Summary, reach: float) -> Item:
    layers = _layers(run.manifest)
    return Item(
        run=run,
        summary=summary,
        colour=_colour(place),
        dashes=" ".join(f"{length:g}" for length in _dashes(summary)),
        outcomes=_outcomes(run, summary),
        layers=layers,
        bars=any(layer.width > 0.5 for layer in layers),
        histogram=_histogram(place, run, summary, reach),
        facts=_provenance(run.manifest),
    )


def _outcomes(run: Run, summary: Summary) -> list[tuple[str, str]]:
    """The run in a few labelled numbers."""
    statuses = [str(row.get("status", "unknown")) for row in run.rows]
    seconds = [float(row["seconds"]) for row in run.rows if row.get("seconds") is not None]
    bound = lookup(run.manifest, "bound")
    facts = {
        "Method": summary.method,
        "Guarantee": summary.guarantee + (f", failure {summary.failure:g} per input" if summary.failure else ""),
        "Inputs": f"{summary.count} of {summary.expected}",
        **{status.capitalize(): str(statuses.count(status)) for status in sorted(set(statuses))},
        "Largest radius": radius_text(max(certified_radii(run), default=None), summary.attacked),
        "Median radius": radius_text(summary.median_radius, summary.attacked),
        "Median time per input": _time(statistics.median(seconds)) if seconds else MISSING,
    }
    if bound:
        facts["Lipschitz bound"] = bound_text(summary.bound, digits=9)
        facts["Bound by"] = f"{lookup(bound, 'method') or MISSING}, norms {_arrow(lookup(bound, 'norm'))}, domain {lookup(bound, 'domain') or MISSING}"
    return list(facts.items())


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _arrow(norms: Any) -> str:
    return " to ".join(norm_text(f"{norm:g}" if isinstance(norm, float) else str(norm)) for norm in norms) if norms else MISSING


def _layers(manifest: Mapping[str, Any]) -> list[Layer]:
    """The parts of the bound. A bar goes from 1 in the middle to the part's value, on a log scale of at least one decade to either side."""
    parts = lookup(manifest, "bound", "parts") or []
    values = [part.get("value") for part in parts]
    logs = [math.log10(value) if isinstance(value, int | float) and 0 < value < math.inf else 0.0 for value in values]
    scale = max(1.0, *map(abs, logs)) if logs else 1.0
    return [
        Layer(
            name=str(part.get("name", MISSING)),
            kind=str(part.get("type", MISSING)),
            bound=bound_text(value, digits=9),
            how=str(part.get("how", MISSING)),
            start=round(50 + min(0.0, 50 * log / scale), 2),
            width=round(abs(50 * log / scale), 2),
        )
        for part, value, log in zip(parts, values, logs, strict=True)
    ]


def _assumptions(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    """(name, sentence, the runs that make it) for every assumption of a certificate or its bound."""
    found: dict[str, tuple[str, list[str]]] = {}
    for run in runs:
        sentences = lookup(run.manifest, "assumption_sentences") or {}
        for name in dict.fromkeys([*(lookup(run.manifest, "assumptions") or ()), *(lookup(run.manifest, "bound", "assumptions") or ())]):
            sentence, makers = found.setdefault(str(name), (str(sentences.get(name, "")), []))
            found[str(name)] = (sentence or str(sentences.get(name, "")), [*makers, run.name])
    return [(name, sentence, makers) for name, (sentence, makers) in found.items()]


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers come from; what the manifest does not say is left out."""
    argv, shape, versions = lookup(manifest, "argv"), lookup(manifest, "model", "input_shape"), lookup(manifest, "versions")
    parameters, classes = lookup(manifest, "model", "parameters"), lookup(manifest, "model", "classes")
    facts = {
        "Model": lookup(manifest, "model", "spec"),
        "Model sha256": lookup(manifest, "model", "sha256"),
        "Parameters": f"{parameters:,}" if isinstance(parameters, int) else parameters,
        "Input shape": " × ".join(map(str, shape)) if shape else None,
        "Classes": ", ".join(map(str, classes)) if isinstance(classes, list | tuple) else classes,
        "Data": lookup(manifest, "data", "spec"),
        "Data sha256": lookup(manifest, "data", "sha256"),
        "Log sha256": lookup(manifest, "log", "sha256"),
        "Command": shlex.join(map(str, argv)) if argv else None,
        "Seed": lookup(manifest, "seed"),
        "Device": lookup(manifest, "device"),
        "Numbers": lookup(manifest, "dtype"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else None,
        "Created": lookup(manifest, "created"),
    }
    return [(name, str(fact)) for name, fact in facts.items() if fact is not None]


def _curves(runs: Sequence[Run], summaries: Sequence[Summary], radii: Sequence[float], reach: float) -> Markup:
    """One step curve per run; thin upright lines at the radii that were asked for."""
    with matplotlib.style.context(["default", STYLE]):
        figure, axes = _figure(7.0, 4.4)
        for radius in radii:
            if 0 < radius <= reach:
                axes.axvline(radius, color=GREY, linewidth=1, dashes=(2, 3), alpha=0.7)
        for place, (run, summary) in enumerate(zip(runs, summaries, strict=True)):
            starts, shares = curve(run)
            ends = [*starts, 1.02 * reach]  # the last value holds on to the edge: it is above 0 only for radii without end
            axes.step(
                ends, [100 * share for share in (*shares, shares[-1])], where="post", color=_colour(place), linewidth=2, dashes=_dashes(summary) or (None, None)
            )
        axes.set(
            xlim=(0, 1.02 * reach),
            ylim=(0, 101),
            xlabel=f"radius ({_axis_norm(summaries)})",
            ylabel="accuracy (%)" if any(summary.attacked for summary in summaries) else "certified accuracy (%)",
        )
        names = ", ".join(summary.name for summary in summaries)
        return _svg(
            figure, "curves", f"Certified accuracy in per cent against radius, one step curve for each of: {names}. The table beside it has the values."
        )


def _histogram(place: int, run: Run, summary: Summary, reach: float) -> Markup | None:
    """How many inputs have a radius in each of thirty intervals of the range that all runs share. None if none has."""
    radii = [radius for radius in certified_radii(run) if 0 < radius < math.inf]
    if not radii:
        return None
    with matplotlib.style.context(["default", STYLE]):
        figure, axes = _figure(7.0, 2.2)
        axes.hist(radii, bins=30, range=(0, reach), color=_colour(place), rwidth=0.88)
        axes.set(xlim=(0, 1.02 * reach), xlabel=f"radius ({_axis_norm([summary])})", ylabel="inputs")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(visible=False, axis="x")
        return _svg(
            figure,
            f"radii{place}",
            f"Histogram of the {len(radii)} {'attacked' if summary.attacked else 'certified'} radii of {summary.name}, "
            f"from {radius_text(radii[0])} to {radius_text(radii[-1], summary.attacked)}",
        )


def _axis_norm(summaries: Sequence[Summary]) -> str:
    """The norm that all the runs share. Only names that matplotlib's font is known to have: it warns of missing glyphs."""
    norms = {summary.norm for summary in summaries}
    if len(norms) == 1 and (norms <= {"1", "2", "inf"} or not any(is_norm(norm) or not norm.isascii() or not norm.isprintable() for norm in norms)):
        return measures_text(norms)
    return "units of the input" if all(map(is_norm, norms)) else "of what each run measures"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(length=0, pad=6)
    return figure, axes


def _svg(figure: Figure, prefix: str, label: str) -> Markup:
    """The figure as an element of the page: it scales, has no metadata that points elsewhere, and its ids are its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)  # it would hold for the whole page
    drawing = re.sub(r' (xmlns(:xlink)?="[^"]*"|(width|height)="[\d.]+pt")', "", drawing)
    drawing = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", drawing)
    return Markup(drawing.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(plain(label))}" ', 1))


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _dashes(summary: Summary) -> tuple[float, ...]:
    return DASHES.get(summary.guarantee, DOTS)
