"""Smoothing in a results folder: the rows of a run, what its manifest says of the method, and rows computed again from their counts."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from certify.bound import Array, assumed
from certify.data import Dataset
from certify.errors import CertifyError
from certify.report.summary import number
from certify.smoothing.bounds import Tally
from certify.smoothing.engine import Forward
from certify.smoothing.method import Smoothing, certified_radius
from certify.smoothing.noise.counts import UNIT
from certify.smoothing.noises import ContrastBrightness, TwoSteps
from certify.smoothing.schedule import Procedure, Status
from certify.smoothing.shared import FirstOnce
from certify.smoothing.values import parse
from lipnet.checkpoint import first_line

_SHARED = "all inputs share their noise: each certificate fails with at most its alpha, but whether one does is not independent of the others"
_NUMBERS = {
    "float32": "weights as stored, evaluated in float32",
    "float64": "weights as stored, evaluated in float64",
    "bfloat16": "weights rounded to bfloat16, evaluated in bfloat16: the certificates are of that network",
}
_TOLERANCE = 1e-9  # relative; another machine rounds the last digits otherwise


def rows(
    method: Smoothing, forward: Forward, classes: int, dataset: Dataset, pending: Sequence[int], device: torch.device | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each input as it is decided, with all counts in it. The number of an input in the data set keys its noise."""
    distances: dict[int, float] = {}

    def inputs() -> Iterator[tuple[int, Tensor, float]]:
        """One at a time, so that a large data set is not copied."""
        for index in pending:
            placed, apart = method.place(dataset.inputs[index : index + 1])
            distances[index] = float(apart[0])
            yield index, placed[0], distances[index]

    start = time.perf_counter()
    for done in method.run(_told(forward), classes, dataset.inputs.shape[1:], inputs(), device):
        now = time.perf_counter()
        counts = {"selection": done.selection.to_json(), "looks": [tally.to_json() for tally in done.looks], **done.outcome.to_json()}
        distance = distances.pop(done.index)
        yield {
            "schema": 1,
            "index": done.index,
            "label": int(dataset.labels[done.index]),
            **_verdict(int(done.selection.favourite), distance, certified_radius(done.outcome, distance), int(dataset.labels[done.index])),
            "method": "smoothing",
            "norm": method.noise.unit,
            "guarantee": "probabilistic",
            "alpha": done.outcome.alpha,
            "n": done.looks[-1].n,
            "counts": counts,
            "seconds": round(now - start, 6),
        }
        start = now


def _told(forward: Forward) -> Forward:
    """The same function, whose failure (memory, mostly) is one sentence: the rows before it are kept."""

    if isinstance(forward, FirstOnce):
        return dataclasses.replace(forward, rest=_told(forward.rest))

    def run(x: Tensor) -> Tensor:
        try:
            return forward(x)
        except Exception as error:  # torch raises many kinds here
            raise CertifyError(
                f"the network failed on a batch of {len(x)} noisy copies: {first_line(error)}; what was done is kept, repeat the command to go on"
            ) from error

    return run


def facts(method: Smoothing, procedure: Procedure, prepared: Sequence[str], classes: Any) -> dict[str, Any]:
    """What the manifest of a run says of its method."""
    return {
        "method": repr(method),
        "norm": method.noise.unit,
        "guarantee": "probabilistic",
        "failure": method.schedule.alpha,
        "seed": method.seed,
        "smoothing": {
            **procedure.settings(),
            "classifier": procedure.classifier.digest,
            "levels": method.levels,
            "classes": classes,
            "batch": method.batch,
            "engine": method.engine,
            **({"shared": _SHARED} if method.shared else {}),
            **({} if method.lipschitz is None else {"proof": method.lipschitz.method}),
        },
        "prepared": list(prepared),
        "dtype": _NUMBERS["float64" if method.lipschitz is not None else method.dtype],
        **assumed(method.assumptions),
    }


def contradictions(row: Mapping[str, Any], procedure: Procedure, classes: Any, distance: float) -> list[str]:
    """What a row claims and its counts do not give; `distance` is that of its input from the grid.

    Rows of contrast and brightness may have the radius of `TwoSteps`, which is true as well.
    """
    wrong, classifier = _contradictions(row, procedure, classes, distance), procedure.classifier
    if wrong and isinstance(classifier.noise, ContrastBrightness):
        before = dataclasses.replace(procedure, classifier=dataclasses.replace(classifier, noise=TwoSteps(classifier.noise)))
        return wrong if _contradictions(row, before, classes, distance) else []
    return wrong


def _contradictions(row: Mapping[str, Any], procedure: Procedure, classes: Any, distance: float) -> list[str]:
    where = f"input {row.get('index')}"
    try:
        outcome = procedure.around(distance).check_row({**row["counts"], "classifier": procedure.classifier.digest})
        sums, last = row["counts"]["selection"]["sums"], row["counts"]["looks"][-1]
    except (CertifyError, KeyError, TypeError, ValueError, OverflowError) as error:
        return [f"{where}: {_sentence(error)}"]
    if outcome.status is Status.UNFINISHED:
        return [f"{where}: its counts end before a look that decides"]
    if len(sums) != classes:
        return [f"{where}: its counts are of {len(sums)} classes, the manifest says {classes!r}"]
    if not all(_adds_up(Tally.from_json(tally)) for tally in (row["counts"]["selection"], *row["counts"]["looks"])):
        return [f"{where}: its soft scores add up to less than those of so many copies do"]
    selected = max(range(len(sums)), key=lambda k: sums[k])
    proved: dict[str, Any] = {
        **_verdict(selected, distance, certified_radius(outcome, distance), row.get("label")),
        "schema": 1,
        "method": "smoothing",
        "alpha": outcome.alpha,
        "n": last["n"],
    }
    return [f"{where}: {key} is stored as {row.get(key)!r}, its counts give {value!r}" for key, value in proved.items() if not _same(row.get(key), value)]


def off_grid(method: Smoothing, image: Array) -> float:
    """How far an input is from the grid of the run, in l2, rounded up: what `Smoothing.place` takes from its radius."""
    return float(method.place(image[None])[1][0])


def method_of(manifest: Mapping[str, Any]) -> Smoothing:
    """The method that the manifest of a run names. Raises CertifyError where it names none."""
    text = manifest.get("method")
    try:
        call = ast.parse(text, mode="eval").body if isinstance(text, str) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        call = None
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != Smoothing.__name__ or call.args:
        raise CertifyError(f"the manifest's method {str(text)[:80]!r} is not the printed form of one of this version; make the folder again with certify run")
    try:
        return Smoothing(**{word.arg or "": _value(word.value) for word in call.keywords})
    except TypeError as error:
        raise CertifyError(f"the manifest's method {str(text)[:80]!r} is none of this version: {error}") from error


def _value(node: ast.expr) -> Any:
    """An argument of the method: a word, or what `parse` reads."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else parse(ast.unparse(node))


def as_stored(procedure: Procedure, manifest: Mapping[str, Any]) -> Procedure:
    """With the distance that a run stored, where that is more than is needed: its radii are smaller then, and hold."""
    settings = manifest.get("smoothing")
    stored = settings.get("distance") if isinstance(settings, Mapping) else None
    return dataclasses.replace(procedure, distance=stored) if isinstance(stored, float) and procedure.distance < stored < 1 else procedure


def differences(manifest: Mapping[str, Any], method: Smoothing, procedure: Procedure) -> list[str]:
    """What a manifest says of its method and the method itself does not."""
    stored = manifest.get("smoothing")
    if not isinstance(stored, Mapping):
        raise CertifyError("the manifest says nothing of the smoothing it is of; make the folder again with certify run")
    proved = json.loads(json.dumps(facts(method, procedure, (), stored.get("classes"))))
    wrong = _unlike("smoothing.", stored, proved["smoothing"])
    named = ("norm", "guarantee", "failure", "seed", "assumptions", "assumption_sentences", "dtype")
    return [*_unlike("", {key: manifest.get(key) for key in named}, {key: proved[key] for key in named}), *wrong]


def _unlike(prefix: str, stored: Mapping[str, Any], proved: Mapping[str, Any]) -> list[str]:
    return [
        f"the manifest has {prefix}{key} {stored.get(key)!r}, its method gives {proved.get(key)!r}"
        for key in {**proved, **stored}
        if not _same(stored.get(key), proved.get(key))
    ]


def _same(stored: Any, proved: Any) -> bool:
    """Whether two stored values are one, up to the last digits of a float."""
    if isinstance(proved, float):
        found = number(stored)
        return found is not None and math.isclose(found, proved, rel_tol=_TOLERANCE)
    return type(stored) is type(proved) and bool(stored == proved)


def _adds_up(tally: Tally) -> bool:
    """Whether soft scores may be sums of what is counted: those of a copy add up to 1, before each of them is rounded down to a multiple of 1 / UNIT."""
    copies, total = tally.n - int(tally.undecided), int(tally.sums.sum())
    return tally.squares is None or (tally.unit == UNIT and total >= copies * (UNIT - tally.classes))


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, CertifyError) else f"the row lacks what certificates are computed from: {error!r}"


def _verdict(selected: int, distance: float, radius: float, label: Any) -> dict[str, Any]:
    """Prediction, radius and status of a row. A target that is missed leaves the prediction and its smaller radius."""
    if not radius > 0:
        return {"prediction": -1, "radius": 0.0, "off_grid": distance, "status": "abstained"}
    return {"prediction": selected, "radius": radius, "off_grid": distance, "status": "certified" if selected == label else "misclassified"}
