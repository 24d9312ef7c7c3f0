"""Certificates between attacks: the distance of a point of another class is never below a radius that is proved of the same network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from certify.report.summary import Run, lookup, norm_text, number, summarize

_TOLERANCE = 1e-6  # relative; the weights of a layer may differ by some 1e-7 when they are computed by another BLAS
_LONG = ("point", "seconds")


def incomparable(certified: Run, attacked: Run) -> str | None:
    """Why the rows of the two runs say nothing of each other, in one sentence; None where they do."""
    ours, theirs = summarize(certified, ()), summarize(attacked, ())
    if theirs.guarantee != "attack":
        return f"{attacked.name}: the radii are of the kind {theirs.guarantee!r}, and not attacks; make a folder of attacks with certify attack"
    if ours.guarantee == "probabilistic":
        return (
            f"{certified.name}: the certificates are of a smoothed classifier, another one than the network that {attacked.name} attacks; they are not compared"
        )
    if ours.guarantee != "proof":
        return f"{certified.name}: the radii are of the kind {ours.guarantee!r}, and not proved; name a folder of certify run first, then one of certify attack"
    if ours.norm != theirs.norm:
        return f"{certified.name} has radii in {norm_text(ours.norm)}, {attacked.name} in {norm_text(theirs.norm)}; attack again with --norm {ours.norm}"
    for what, one, other in (
        ("model", _model(certified), _model(attacked)),
        ("data", *(lookup(run.manifest, "data", "sha256") for run in (certified, attacked))),
    ):
        if one is None or one != other:
            return f"{certified.name} and {attacked.name} are not of the same {what}; attack what was certified"
    return None


def contradictions(certified: Run, attacked: Run) -> list[str]:
    """A sentence with both rows for each input that an attack changes within its certified radius, or that the two runs predict differently."""
    found = {row.get("index"): row for row in attacked.rows}
    return [
        f"input {row['index']}: {certified.name} certifies {row['radius']!r}, {attacked.name} {why}: {_text(row)} against {_text(found[row['index']])}"
        for row in certified.rows
        if row.get("index") in found and (why := _why(row, found[row["index"]]))
    ]


def all_contradictions(runs: Sequence[Run]) -> list[str]:
    """Those of every two of the runs that can be compared."""
    attacks = [run for run in runs if summarize(run, ()).attacked]
    return [message for one in runs for other in attacks if incomparable(one, other) is None for message in contradictions(one, other)]


def _why(row: Mapping[str, Any], attack: Mapping[str, Any]) -> str | None:
    """What an attack shows of a row that cannot be right. A radius of 0 claims nothing."""
    radius, distance = number(row.get("radius")), number(attack.get("radius"))
    if radius is None or not radius > 0 or row.get("status") == "abstained":
        return None
    if attack.get("status") != "abstained" and attack.get("prediction") != row.get("prediction"):
        return "sees another prediction there"
    if attack.get("status") == "attacked" and distance is not None and distance < radius * (1 - _TOLERANCE):
        return f"changes it at {distance!r}"
    return None


def _model(run: Run) -> dict[str, Any] | None:
    """What the network depends on: the numbers, and how they were opened; where the file lies does not matter."""
    model = lookup(run.manifest, "model")
    return {key: value for key, value in model.items() if key != "spec"} if isinstance(model, Mapping) and model.get("sha256") else None


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if key not in _LONG})
