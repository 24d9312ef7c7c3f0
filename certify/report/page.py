"""The runs as one HTML page: plots as inline SVG with their numbers beside them, assumptions, provenance. No script, nothing loaded from elsewhere, the same
bytes every time.

The only file that imports jinja2, as figure.py is of matplotlib; `certify.report.html` imports both when it is called.
"""

from __future__ import annotations

import pathlib
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from certify.report import histograms
from certify.report.plots import Plot, Shown, costs, curves, reach, sandwich, shown, time_text, waterfall
from certify.report.sandwich import accused, all_contradictions, sandwiches
from certify.report.summary import (
    MISSING,
    USUAL,
    Run,
    Summary,
    bound_text,
    certified_radii,
    is_norm,
    lookup,
    measures_text,
    norm_text,
    notes,
    of_one_norm,
    percent,
    plain,
    radius_label,
    radius_text,
    summarize,
    usual_radii,
)
from certify.text import decimal

# Each with a contrast of at least 3 : 1 against the ground, and apart for the three kinds of colour blindness (tested). The last is that of the text.
COLOURS = {
    "light": ("#0a53c4", "#d9601a", "#00957a", "#b65fc4", "#6b2a10", "#2f2a3d"),
    "dark": ("#6b8cff", "#cf6a30", "#3fe0a0", "#a472c0", "#ecd540", "#dcecf6"),
}
GROUNDS = {"light": "#ffffff", "dark": "#14171c"}
_LONG = 12  # facts of an origin that are longer are shortened in the header; the whole is under Provenance


@dataclass(frozen=True)
class Group:
    """The runs whose radii are in one norm: only these share tables and plots."""

    norm: str
    measures: str
    radii: Sequence[float]
    items: Sequence[Shown]
    curves: Plot
    sandwiches: Sequence[tuple[str, Plot]]
    costs: Plot | None


@dataclass(frozen=True)
class Item:
    """One run as the template shows it."""

    shown: Shown
    outcomes: Sequence[tuple[str, str]]
    radii: Plot
    margins: Plot | None
    same_margins: str  # the letter of the run that has the same ones and shows them
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class First:
    """What the page begins with."""

    summary: Summary
    headline: str
    shares: Sequence[tuple[float, float | None]]  # certified accuracies


@dataclass(frozen=True)
class Statement:
    """What the radii of some runs mean."""

    names: Sequence[str]
    guarantee: str
    text: str


def html(runs: Sequence[Run], radii: Sequence[float], title: str) -> str:
    """The page. Beside the radii that are asked for, tables have those that are usual. Text of the runs is data: every character of it is escaped."""
    summaries = [summarize(run, radii) for run in runs]
    contradicted = all_contradictions(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, radius=radius_text, bound=bound_text, label=radius_label, norm=norm_text, plain=plain, drawn=Markup)
    groups = _groups(runs, radii)
    return environment.get_template("report.html.j2").render(
        title=title,
        grounds=GROUNDS,
        colours=COLOURS,
        first=None if contradicted else _first(groups, radii),
        subjects=_subjects(runs),
        statements=_statements(runs, summaries, accused(runs)),
        inputs=_inputs(runs),
        contradictions=contradicted,
        notes=notes(summaries),
        groups=groups,
        items=_items(groups),
        waterfalls=_waterfalls([item for group in groups for item in group.items]),
        assumptions=_assumptions(runs),
    )


def _groups(runs: Sequence[Run], radii: Sequence[float]) -> list[Group]:
    """The runs by norm, each with the radii that were asked for and those that are usual in it. Letters go through the whole page."""
    made, place = [], 0
    for group in of_one_norm([summarize(run, ()) for run in runs]):
        norm = group[0].norm
        known = sorted({*radii, *USUAL.get(norm, ())}) if radii else usual_radii([norm])
        chosen = [run for run in runs if summarize(run, ()).norm == norm]
        items = [shown(place + i, run, summarize(run, known)) for i, run in enumerate(chosen)]
        place += len(items)
        by_name = {item.summary.name: item for item in items}
        between = [
            (f"{_listed(proofs)} against {_listed(attacks)}", sandwich(found, by_name)) for proofs, attacks, found in sandwiches([item.run for item in items])
        ]
        made.append(Group(norm, measures_text([norm]), known, items, curves(items, known), between, costs(items)))
    return made


def _listed(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs)


def _waterfalls(items: Sequence[Shown]) -> list[tuple[str, Plot]]:
    """The layers of each network in each pair of norms, with all the bounds that the runs have for it."""
    networks: dict[str, list[Shown]] = {}
    for item in items:
        bound = lookup(item.run.manifest, "bound")
        if bound is not None:
            same = lookup(bound, "network") or item.letter  # without a digest it may be any other
            networks.setdefault(f"{same} {_arrow(lookup(bound, 'norm'))} {lookup(bound, 'domain')}", []).append(item)
    plots = []
    for group in networks.values():
        lists = [parts for parts in (lookup(item.run.manifest, "bound", "parts") for item in group) if parts]
        plot = waterfall(lists[0] if lists else [], [(item, item.summary.bound) for item in group if item.summary.bound])
        plots += [(", ".join(item.summary.name for item in group), plot)] if plot else []
    return plots


def _subjects(runs: Sequence[Run]) -> list[list[tuple[str, str]]]:
    """Which model, how its inputs are prepared, and in which units radii are; once for all runs that share the answer."""
    digests = [lookup(run.manifest, "model", "sha256") for run in runs]
    bounds = [lookup(run.manifest, "bound", "parts") or () for run in runs]  # not all runs of a model have one
    known = {digest: bound for digest, bound in zip(digests, bounds, strict=True) if digest and bound}
    told = (_subject(run.manifest, bound or known.get(digest, ())) for run, digest, bound in zip(runs, digests, bounds, strict=True))
    return [list(facts) for facts in dict.fromkeys(map(tuple, told)) if facts]


def _subject(manifest: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    model, digest, shape = lookup(manifest, "model", "spec"), lookup(manifest, "model", "sha256"), lookup(manifest, "model", "input_shape")
    size, arch = " × ".join(map(str, shape or ())), lookup(manifest, "model", "arch")
    about = [f"sha256 {digest[:_LONG]}" if digest else "", f"architecture {arch}" if arch else "", f"inputs {size}" if size else ""]
    facts = [("Model", ", ".join(filter(None, (str(model), *about))))] if model or digest else []
    return [*facts, ("Preprocessing", _preprocessing(manifest, parts))] if facts else []


def _preprocessing(manifest: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> str:
    """What is done to the inputs before the network; a part of the model, so that radii are in the units of the data."""
    said = _done_first(lookup(manifest, "model") or {})
    layers = [part for part in parts if part.get("type") == "Normalize"]
    if said:
        return f"{', then '.join(said)}, as the first layers of the network"
    if layers:
        return f"inside the network ({layers[0].get('how') or layers[0].get('name')})"
    return "none outside of the network: whatever it does to its inputs is one of its layers"


def _done_first(model: Mapping[str, Any]) -> list[str]:
    """What the options of the command line put before the network, in the order in which it is done."""
    mean, std, extent = model.get("mean"), model.get("std"), model.get("input_range")
    said = ["the channels are turned round (blue, green, red)"] if model.get("bgr") else []
    said += [f"the range 0 to 1 becomes {_numbers(extent).replace(', ', ' to ')}"] if extent is not None else []
    said += [f"the mean {_numbers(mean)} is subtracted, and what is left divided by {_numbers(std)}"] if mean is not None or std is not None else []
    return said + (["the channels come last"] if model.get("layout") == "nhwc" else [])


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, int | float) else str(value) for value in values) if isinstance(values, list | tuple) else str(values)


def _first(groups: Sequence[Group], radii: Sequence[float]) -> First | None:
    """The run the page begins with: of those computed here, in the first norm that has any, with the strongest guarantee that certifies any input at a radius,
    the largest accuracy there.
    """
    for group in groups:
        known = [item.summary for item in group.items if item.summary.proved and item.summary.log is None and item.summary.clean is not None]
        if known:
            chosen = sorted(set(radii)) or list(group.radii)
            at = [group.radii.index(radius) for radius in chosen]
            place = next((place for place in at if group.radii[place] > 0), None)
            saying = [summary for summary in known if place is None or summary.certified[place]] or known
            leader = max(
                [summary for summary in saying if summary.guarantee == "proof"] or saying,
                key=lambda summary: (summary.clean if place is None else summary.certified[place], summary.median_radius, summary.clean),
            )
            shares = [(radius, leader.certified[place]) for radius, place in zip(chosen, at, strict=True)]
            return First(leader, _headline(leader, group.radii, place), shares)
    return None


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


def _statements(runs: Sequence[Run], summaries: Sequence[Summary], wrong: set[str]) -> list[Statement]:
    """The sentence that each run's radii stand for; runs with the same sentence share it."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for run, summary in zip(runs, summaries, strict=True):
        told = "contradicted by an attack (see above), so this does not hold as it stands: " * (summary.name in wrong)
        grouped.setdefault((summary.guarantee, told + _statement(run, summary)), []).append(summary.name)
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
        return f"{claimed}for each input, with {chance}, {claim} {subject} does not change{proviso}.{apart}{_expected(summary)}"
    if summary.guarantee == "attack":
        return f"an attack found a {change} that changes the prediction. The radius is an upper bound and certifies nothing."
    return f"the radius ({measures_text([summary.norm])}) is {'an estimate' if summary.guarantee == 'estimate' else 'of unknown origin'} and certifies nothing."


def _expected(summary: Summary) -> str:
    """How many of the certificates may be wrong, all together."""
    if not summary.failure or not summary.count:
        return ""
    return f" Over all {summary.count} inputs, at most {bound_text(float(decimal(summary.failure) * summary.count), 2)} of them are expected to be wrong."


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


def _items(groups: Sequence[Group]) -> list[Item]:
    """Every run. Margins are of a network: of several runs that have the same ones the first shows them."""
    items: list[Item] = []
    drawn: dict[str, str] = {}
    for group in groups:
        for item in group.items:
            own, shared = reach([item]), reach(group.items)
            origin = [lookup(item.run.manifest, what, "sha256") for what in ("model", "data")]
            key = repr(origin) + repr([(row.get("index"), row.get("margin"), row.get("label"), row.get("prediction")) for row in item.run.rows])
            first = drawn.setdefault(key, item.letter)
            found = histograms.margins(item)
            same = first if found and first != item.letter else ""
            items.append(
                Item(
                    item,
                    _outcomes(item.run, item.summary),
                    histograms.radii(item, shared if own > shared / 10 else own),
                    None if same else found,
                    same,
                    _provenance(item.run.manifest),
                )
            )
    return items


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
        "Median time per input": time_text(statistics.median(seconds)) if seconds else MISSING,
    }
    if bound:
        facts["Lipschitz bound"] = bound_text(summary.bound, digits=9)
        facts["Bound by"] = f"{lookup(bound, 'method') or MISSING}, norms {_arrow(lookup(bound, 'norm'))}, domain {lookup(bound, 'domain') or MISSING}"
    return list(facts.items())


def _arrow(norms: Any) -> str:
    return " to ".join(norm_text(f"{norm:g}" if isinstance(norm, int | float) else str(norm)) for norm in norms) if norms else MISSING


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
