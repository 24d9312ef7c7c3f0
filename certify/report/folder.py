"""Results folders as the report reads them: every field that it uses is of its kind, or one sentence says in which file and line it is not.

What is passed over, as everywhere, is a last line without a newline: that is what a killed process leaves.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from certify.errors import CertifyError
from certify.report.summary import Run, lookup
from certify.results import read_manifest, run_of

_TIMES = ("seconds",)  # what two rows of one input may differ in

Test = Callable[[Any], bool]


def read(path: pathlib.Path) -> Run:
    """The manifest and the rows of a folder, one for each input, in the order of the inputs. Raises CertifyError with one sentence."""
    file = path / "manifest.json"
    manifest = _made(file, lambda: read_manifest(path))
    for keys, (test, kind) in _MANIFEST.items():
        value = lookup(manifest, *keys.split("."))
        if value is not None and not test(value):
            raise CertifyError(f"{file}: {keys} is {_short(value)}, which is not {kind}; make the folder again, this is not what certify run writes")
    return Run(path.resolve().name, manifest, _rows(path, manifest))


def _rows(path: pathlib.Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows, run = dict[int, tuple[str, dict[str, Any]]](), run_of(manifest)
    for file in sorted(path.glob("part-*.jsonl")):
        for number, line in _lines(file):
            where = f"{file}, line {number}"
            row = _row(where, line, manifest)
            if row.get("run", run) != run:
                raise CertifyError(
                    f"{where}: this is a row of the run {_short(row['run'])}, the manifest is of {run}; a folder has the rows of one run, take it out"
                )
            before, known = rows.setdefault(row["index"], (where, row))
            if _timeless(known) != _timeless(row):
                raise CertifyError(f"{where}: input {row['index']} has another row in {before}, and the two differ; delete the wrong one")
    return [rows[index][1] for index in sorted(rows)]


def _lines(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The whole lines of a file, with their numbers."""
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        yield from ((number, line) for number, line in enumerate(stream, 1) if line.endswith("\n"))


def _row(where: str, line: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """One row, every field of it of its kind."""
    row = _made(where, lambda: json.loads(line))
    if not isinstance(row, dict):
        raise CertifyError(f"{where}: this is {_short(row)}, which is not a row; delete the line and repeat the run")
    for key, (test, kind) in _ROW.items():
        if not test(row.get(key)):
            found = f"{key} is {_short(row[key])}" if key in row else f"there is no {key}"
            raise CertifyError(f"{where}: {found}, and it should be {kind}; delete the line and repeat the run")
    if row["status"] in _WITH_RADIUS and row.get("radius") is None:
        raise CertifyError(f"{where}: the status is {row['status']}, and there is no radius; delete the line and repeat the run")
    if manifest.get("guarantee") == "attack" and row.get("guarantee") != "attack":
        raise CertifyError(f"{where}: the guarantee is {_short(row.get('guarantee'))}, in a folder of attacks; delete the line and repeat the run")
    if row.get("norm") is not None and manifest.get("norm") is not None and row["norm"] != manifest["norm"]:
        raise CertifyError(
            f"{where}: the norm is {_short(row['norm'])}, in the manifest {_short(manifest['norm'])}; a folder has one norm; delete the line and repeat the run"
        )
    return row


def _made(where: object, read_it: Callable[[], Any]) -> Any:
    """What it returns; text that Python cannot read as JSON is refused in a sentence."""
    try:
        return read_it()
    except CertifyError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        reason = str(error).split("\n")[0] if isinstance(error, ValueError | OSError) else "it is nested too deeply"
        raise CertifyError(f"{where}: this cannot be read ({reason}); delete it and repeat the run") from error


def _timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _TIMES}


def _short(value: Any) -> str:
    text = "a number of many digits" if isinstance(value, int) and abs(value) >= 10**40 else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_size(value: Any) -> bool:
    """A number that is not negative, and neither NaN nor beyond what a float64 holds: margins that cannot change have radii that are not far from that."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _is_part(value: Any) -> bool:
    """A part of a Lipschitz bound."""
    return isinstance(value, dict) and _or_none(_is_size)(value.get("value")) and _or_none(_is_whole)(value.get("depth"))


def _is_chance(value: Any) -> bool:
    return _is_size(value) and value <= 1


def _is_range(value: Any) -> bool:
    return _list_of(lambda end: isinstance(end, int | float) and not isinstance(end, bool) and abs(end) <= sys.float_info.max)(value) and len(value) == 2


_WITH_RADIUS = ("certified", "attacked")
_SIZE = (_or_none(_is_size), "a finite number that is not negative, or null")
_WORD = (_or_none(_is_text), "text")
_ROW: dict[str, tuple[Test, str]] = {
    "index": (lambda value: _is_whole(value) and value >= 0, "a whole number from 0 on"),
    "status": (_is_text, "text such as certified or misclassified"),
    "label": (_or_none(_is_whole), "a whole number, or null"),
    "prediction": (_or_none(_is_whole), "a whole number, or null"),
    "radius": _SIZE,
    "margin": _SIZE,
    "seconds": _SIZE,
    "guarantee": _WORD,
    "norm": _WORD,
    "method": _WORD,
}
_OBJECT: tuple[Test, str] = (lambda value: isinstance(value, dict), "an object")
_NAMES: tuple[Test, str] = (_list_of(_is_text), "a list of texts")
_NUMBERS: tuple[Test, str] = (_list_of(_is_whole), "a list of whole numbers")
_MANIFEST: dict[str, tuple[Test, str]] = {
    **dict.fromkeys(("method", "norm", "guarantee", "model.spec", "model.sha256", "data.spec", "data.sha256", "input.units", "bound.method"), _WORD),
    **dict.fromkeys(("model", "data", "input", "bound", "assumption_sentences", "versions", "log", "bound.lipsdp"), _OBJECT),
    **dict.fromkeys(("assumptions", "bound.assumptions", "argv"), _NAMES),
    **dict.fromkeys(("selection", "model.input_shape"), _NUMBERS),
    "data.count": (lambda value: _is_whole(value) and value >= 0, "a whole number from 0 on"),
    "failure": (_is_chance, "a probability, or null"),
    "input.range": (_is_range, "a pair of numbers"),
    "bound.value": (_is_size, "a number that is not negative"),
    "bound.norm": (lambda value: isinstance(value, list) and all(isinstance(each, int | float | str) for each in value), "a list of norms"),
    "bound.parts": (_list_of(_is_part), "a list of parts with their values"),
}
