"""From the printed form of a value back to the value: `Gaussian(sigma=0.5)` is what a results folder stores."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from certify.bound import Bound
from certify.errors import CertifyError
from certify.smoothing import bounds, classifier, noises, schedule

_PROVED = 1e-6  # relative; how much a Lipschitz constant may differ when it is proved again with another BLAS
_KINDS = (bounds.ConfidenceBound, bounds.Share, noises.Noise, noises.Law, classifier.ScoreMap, schedule.Schedule)
_PARTS = {"noise": noises.Noise, "scores": classifier.ScoreMap, "bound": bounds.ConfidenceBound, "schedule": schedule.Schedule, "share": bounds.Share}
_KNOWN: dict[str, Any] = {
    name: found
    for module in (bounds, noises, classifier, schedule)
    for name, found in vars(module).items()
    if isinstance(found, type) and issubclass(found, _KINDS) and not name.startswith("_")
}


def parse(text: str) -> Any:
    """The value that prints as `text`: a constructor of this package with numbers, tuples and such values in it. Nothing else is run.

    Raises CertifyError for any other text, and for arguments that the constructor refuses.
    """
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise CertifyError(f"{str(text)[:80]!r} is not the printed form of a value of this version: {error}") from error


def read(settings: Mapping[str, Any], lipschitz: Bound | None = None) -> schedule.Procedure:
    """The procedure whose `settings()` these are. `lipschitz` is the Bound of the logits, proved again, where the settings have one.

    Raises CertifyError for settings that are incomplete, and for a Lipschitz constant that is not proved: none is given, or a larger one.
    """
    stored = settings.get("lipschitz")
    if stored is not None and lipschitz is None:
        raise CertifyError(f"the radii are of a Lipschitz constant {stored!r}, what is proved is none")
    proved = None if stored is None or lipschitz is None else with_constants(lipschitz, stored, settings.get("pair"))
    try:
        parts = {name: parse(settings[name]) for name in _PARTS}
        rest = {name: settings[name] for name in ("target", "tolerance", "distance")}
    except KeyError as error:
        raise CertifyError(f"the settings of a smoothing run lack {error}") from error
    for name, kind in _PARTS.items():
        if not isinstance(parts[name], kind):
            raise CertifyError(f"the {name} of a smoothing run is {str(settings[name])[:80]!r}, which is of another kind")
    return schedule.Procedure(classifier.SmoothedClassifier(parts.pop("noise"), parts.pop("scores"), proved), **parts, **rest)


def with_constants(
    proved: Bound,
    lipschitz: Any,  # of the logits
    pair: Any,  # the largest of a difference of two of them; None: it was not used
) -> Bound:
    """The Bound with the constants that a run stored. Raises CertifyError where one of them is less than what is proved again."""
    most = None if proved.pairs is None else float(proved.pairs.max())
    told = f"the radii are of a Lipschitz constant {lipschitz!r}, what is proved is {proved.value!r}"
    if not _covers(lipschitz, proved.value):
        raise CertifyError(told)
    if pair is not None and (proved.pairs is None or not _covers(pair, most)):
        raise CertifyError(f"{told}; and of {pair!r} for a difference of two logits, what is proved is {most!r}")
    return dataclasses.replace(proved, value=lipschitz, pairs=None if pair is None or proved.pairs is None else np.full_like(proved.pairs, pair))


def _covers(stored: object, proved: float | None) -> bool:
    return isinstance(stored, float) and proved is not None and proved * (1 - _PROVED) <= stored < math.inf


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _KNOWN[node.func.id](*map(_value, node.args), **{word.arg or "": _value(word.value) for word in node.keywords})
    if isinstance(node, ast.Tuple):
        return tuple(map(_value, node.elts))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | None):
        return node.value
    raise TypeError(f"{ast.unparse(node)} has no place in it")
