"""Certificates between attacks: the distance of a point of another class is never below a radius that is proved of the same network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from certify.report.summary import Run, lookup, norm_text, number, summarize
from certify.results import model_identity

_TOLERANCE = 1e-6  # relative; the weights of a layer may differ by some 1e-7 when they are computed by another BLAS
_LONG = ("point", "seconds")


@dataclass(frozen=True)
class Between:
    """One input that is classified right: the largest radius that is proved of it, and the smallest distance at which an attack changes it."""

    index: int
    label: int | None
    radius: float  # 0 where nothing is proved
    by: str  # the run that proves it
    distance: float  # infinite where no attack found a point
    found_by: str
    contradicted: bool

    @property
    def share(self) -> float:
        """The part of the distance that is certified. What is left of it is for better proofs and better attacks to settle."""
        return min(self.radius / self.distance, 1.0) if self.distance else 1.0


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
    if "INPUT_RANGE" in str(lookup(certified.manifest, "assumptions")) and not _within(certified, attacked):
        return f"{certified.name} is about inputs in a range only, and {attacked.name} may leave it; attack again with --clip, which keeps to [0, 1]"
    for what, one, other in (
        ("model", _model(certified), _model(attacked)),
        ("data", *(lookup(run.manifest, "data", "sha256") for run in (certified, attacked))),
    ):
        if one is None or one != other:
            return f"{certified.name} and {attacked.name} are not of the same {what}; attack what was certified"
    return None


def _within(certified: Run, attacked: Run) -> bool:
    """Whether the attacks kept to inputs that the certificates are about."""
    ends = lookup(certified.manifest, "within")
    covered = isinstance(ends, list) and len(ends) == 2 and all(number(end) is not None for end in ends) and ends[0] <= 0 and ends[1] >= 1
    return covered and lookup(attacked.manifest, "attack", "clip") is True


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


def sandwiches(runs: Sequence[Run]) -> list[tuple[list[Run], list[Run], list[Between]]]:
    """The certificates and the attacks that are of the same network, data and norm, and each input between the best of both."""
    pairs = [(proof, attack) for attack in runs if summarize(attack, ()).attacked for proof in runs if incomparable(proof, attack) is None]
    groups: list[tuple[list[Run], list[Run]]] = []
    for proof, attack in pairs:
        known = next((group for group in groups if incomparable(group[0][0], attack) is None), None)
        proofs, attacks = known or ([], [])
        proofs += [proof] if all(proof is not run for run in proofs) else []
        attacks += [attack] if all(attack is not run for run in attacks) else []
        if known is None:
            groups.append((proofs, attacks))
    return [(proofs, attacks, found) for proofs, attacks in groups if (found := _between(proofs, attacks))]


def sandwich_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Those for machines: numbers as computed; a distance that no attack found is null."""
    return [
        {
            "certified": [run.name for run in proofs],
            "attacked": [run.name for run in attacks],
            "inputs": [{**asdict(entry), "distance": entry.distance if math.isfinite(entry.distance) else None} for entry in found],
        }
        for proofs, attacks, found in sandwiches(runs)
    ]


def _between(proofs: Sequence[Run], attacks: Sequence[Run]) -> list[Between]:
    """By distance, then by radius. An input that an attack did not try, or that is classified wrong, is not there."""
    ours: dict[int, list[tuple[float, str, Mapping[str, Any]]]] = {}
    for proof in proofs:
        for row in proof.rows:
            ours.setdefault(row["index"], []).append((_radius(row), proof.name, row))
    theirs: dict[int, list[tuple[float, str, Mapping[str, Any]]]] = {}
    for attack in attacks:
        for row in attack.rows:
            if row.get("status") in ("attacked", "survived"):
                theirs.setdefault(row["index"], []).append((_distance(row), attack.name, row))
    found = []
    for index in ours.keys() & theirs.keys():
        radius, by, row = max(ours[index], key=lambda entry: entry[0])
        distance, found_by, _ = min(theirs[index], key=lambda entry: entry[0])
        wrong = any(_why(mine, other) for _, _, mine in ours[index] for _, _, other in theirs[index])
        found.append(Between(index, row.get("label"), radius, by, distance, found_by, wrong))
    return sorted(found, key=lambda entry: (entry.distance, entry.radius, entry.index))


def _radius(row: Mapping[str, Any]) -> float:
    return (number(row.get("radius")) or 0.0) if row.get("status") == "certified" else 0.0


def _distance(row: Mapping[str, Any]) -> float:
    distance = number(row.get("radius"))
    return math.inf if row.get("status") == "survived" or distance is None else distance


def accused(runs: Sequence[Run]) -> set[str]:
    """The names of the runs that are contradicted."""
    attacks = [run for run in runs if summarize(run, ()).attacked]
    return {one.name for one in runs for other in attacks if incomparable(one, other) is None and contradictions(one, other)}


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


def _model(run: Run) -> Any:
    """What the network depends on: the numbers, and how they were opened; where the file lies does not matter."""
    model = lookup(run.manifest, "model")
    return model_identity(model) if isinstance(model, Mapping) and model.get("sha256") else None


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if key not in _LONG})
