"""Published logs of certification (Cohen, Rosenfeld & Kolter's code and what descends from it): read, made into rows, and audited against their own setting.

A log has a line for each input: `idx label predict radius correct time`, -1 for an abstention. It has no counts, so its radii are claims: they can be shown
to be impossible, not to be true.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from certify.bound import Array, Assumption
from certify.errors import CertifyError
from certify.report.tsv import COLUMNS
from certify.smoothing.bounds import ClopperPearson, Share, votes
from certify.smoothing.classifier import SmoothedClassifier
from certify.smoothing.noises import Gaussian
from certify.smoothing.schedule import FixedN, Procedure
from certify.smoothing.values import read

_SLACK = 1e-6  # relative to the radius; what is beyond it is a contradiction and not a rounding of ours or of theirs
_MOST_BYTES = 2**28
_NUMBER = re.compile(r"[-+]?(\d{1,30}\.?\d{0,30}|\.\d{1,30})(e[-+]?\d{1,3})?|[-+]?(nan|inf)", re.ASCII | re.IGNORECASE)

KINDS = {
    "duplicate": "lines repeat an idx",
    "number": "radii are no numbers that are at least 0",
    "abstained": "abstentions have a radius",
    "above": "radii are above the largest possible",
    "between": "radii are of no number of votes",
    "correct": "lines have a correct that is not label == predict",
    "cumulative": "column is cumulative",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a log. The radius is as it was printed, which says how it was rounded; it may be anything that a float prints as."""

    place: str  # where it stands, for messages
    index: int
    label: int | None  # None for -1, which is what inputs without a label have
    prediction: int  # -1 for an abstention
    radius: str
    correct: str  # 0 or 1, or what else is printed there
    seconds: float | None

    @property
    def right(self) -> bool:
        """Whether the prediction is the label; `correct` says what the log says."""
        return self.prediction >= 0 and self.prediction == self.label

    @property
    def said(self) -> float:
        """`correct` as a number."""
        return float(self.correct)

    @property
    def least(self) -> float:
        """The smallest radius that prints like this, rounded down: half a unit of the last printed digit below it.

        A format that drops zeros has rounded to a finer unit than the last digit shows ("1.0" for 0.9996, printed with {:.3}), never to a coarser one, so this
        holds for every format that rounds to nearest. At least 0.
        """
        exact = Decimal(self.radius)
        return max(math.nextafter(float(exact - _half_unit(exact)), -math.inf), 0.0) if exact > 0 else 0.0

    @property
    def most(self) -> float:
        """The largest radius that prints like this, rounded up."""
        exact = Decimal(self.radius)
        return math.nextafter(float(exact + _half_unit(exact)), math.inf)


@dataclasses.dataclass(frozen=True)
class Log:
    """A log as it was read."""

    name: str
    sha256: str  # of the file
    lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something in a log that cannot be."""

    kind: str  # of KINDS
    text: str
    index: int = -1  # of the line


def cohen(sigma: float, n: int, alpha: float, n0: int = 100) -> Procedure:
    """The procedure of the published code: n0 copies choose the class, one look at n others, p_B <= 1 - p_A.

    Its `proportion_confint(k, n, alpha=2 * alpha, method="beta")[0]` is the one-sided Clopper-Pearson bound at alpha.
    """
    return Procedure(SmoothedClassifier(Gaussian(sigma)), ClopperPearson(), FixedN(n0, n, alpha), Share(0.0))


def read_log(path: pathlib.Path) -> Log:
    """The log in a file. Raises CertifyError with one sentence for what is no log of certified radii; what its numbers say is for `audit`."""
    if path.stat().st_size > _MOST_BYTES:
        raise CertifyError(f"{path}: {path.stat().st_size} bytes are more than any log has; give a file of tab-separated lines")
    content = path.read_bytes()
    try:
        header, *rest = content.decode("utf-8-sig").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise CertifyError(f"{path}: this is no text ({error}); give a log of tab-separated lines") from error
    names = _names(path, header.split("\t"))
    lines = tuple(_line(path, number, dict(zip(names, _cells(path, number, text, names), strict=True))) for number, text in enumerate(rest, 2) if text.strip())
    if not lines:
        raise CertifyError(f"{path}: the log has no lines beside its header")
    return Log(path.name, hashlib.sha256(content).hexdigest(), lines)


def _names(path: pathlib.Path, names: Sequence[str]) -> list[str]:
    found = [name.strip() for name in names]
    if {"idx", "label", "predict"} <= set(found) and "radius" not in found:
        raise CertifyError(f"{path}: this is a log of predictions, it has no column radius, so it certifies nothing; give the log of certify.py")
    if found not in (list(COLUMNS), list(COLUMNS[:-1])):
        raise CertifyError(f"{path}: the columns of a log are {' '.join(COLUMNS)} (the last may be left out), found {' '.join(found)[:80] or 'none'}")
    return found


def _cells(path: pathlib.Path, number: int, text: str, names: Sequence[str]) -> list[str]:
    cells = [cell.strip() for cell in text.split("\t")]
    if len(cells) != len(names):
        raise CertifyError(f"{path}: line {number} has {len(cells)} cells for {len(names)} columns; a line that was cut off has to be removed")
    return cells


def _line(path: pathlib.Path, number: int, cells: Mapping[str, str]) -> Line:
    for name in ("idx", "label", "predict"):
        if not re.fullmatch(r"-?\d{1,15}", cells[name], re.ASCII):
            raise CertifyError(f"{path}: line {number} has {name} {cells[name][:40]!r}, where a whole number belongs")
    for name in ("radius", "correct"):
        if not _NUMBER.fullmatch(cells[name]):
            raise CertifyError(f"{path}: line {number} has {name} {cells[name][:40]!r}, where a number belongs")
    index, label, prediction = (int(cells[name]) for name in ("idx", "label", "predict"))
    if index < 0 or label < -1 or prediction < -1:
        raise CertifyError(f"{path}: line {number} has idx {index}, label {label} and predict {prediction}; only label and predict may be -1")
    return Line(f"line {number}", index, None if label < 0 else label, prediction, cells["radius"], cells["correct"], seconds(cells.get("time", "")))


def seconds(text: str) -> float | None:
    """`0:02:31.2`, `1 day, 0:02:31` or `16.6`; None for anything else, for a time is no part of a certificate."""
    match = re.fullmatch(r"(?:(\d{1,6}) days?, )?(\d{1,6}):(\d\d):(\d\d(?:\.\d*)?)|(\d{1,9}(?:\.\d*)?)", text)
    if match is None:
        return None
    days, hours, minutes, rest, alone = (float(part or 0) for part in match.groups())
    return 86400 * days + 3600 * hours + 60 * minutes + rest + alone


def _half_unit(exact: Decimal) -> Decimal:
    """Half a unit of the last printed digit."""
    return Decimal(5).scaleb(int(exact.as_tuple().exponent) - 1)


def row_of(line: Line) -> dict[str, Any]:
    """The row of a results folder: the radius rounded down, and what the log printed, for `line_of`. Raises CertifyError for a radius that is no number."""
    if not _is_radius(line):
        raise CertifyError(f"{line.place} (idx {line.index}) has the radius {line.radius}, which is no radius; certify check names every such line of the log")
    answered = line.prediction >= 0
    return {
        "schema": 1,
        "index": line.index,
        "label": line.label,
        "prediction": line.prediction,
        "radius": line.least if answered else 0.0,
        "status": "abstained" if not answered else "certified" if line.right else "misclassified",
        "method": "log",
        "norm": "2",
        "guarantee": "probabilistic",
        "printed": {"radius": line.radius, "correct": line.correct},
        **({} if line.seconds is None else {"seconds": line.seconds}),
    }


def line_of(row: Mapping[str, Any]) -> Line:
    """The line that a row was made of. Raises CertifyError where it does not say."""
    try:
        index, label, prediction, printed = row["index"], row["label"], row["prediction"], row["printed"]
        text, correct = printed["radius"], printed["correct"]
    except (KeyError, TypeError) as error:
        raise CertifyError(f"input {row.get('index')}: the row does not say what the log printed ({error!r})") from error
    whole = all(type(number) is int for number in (index, prediction)) and (label is None or type(label) is int)
    if not whole or not all(isinstance(cell, str) and _NUMBER.fullmatch(cell) for cell in (text, correct)):
        raise CertifyError(f"input {index}: index, label and prediction are whole numbers, and what the log printed are numbers as text")
    return Line(f"input {index}", index, label, prediction, text, correct, row.get("seconds"))


def facts(log: Log, spec: str, procedure: Procedure, selection: Sequence[int]) -> dict[str, Any]:
    """What the manifest of a folder says of the log that it was made of."""
    schedule, noise = procedure.schedule, procedure.classifier.noise
    return {
        "data": {"spec": spec, "sha256": log.sha256, "count": len(selection)},
        "input": {"range": None, "units": "those of the sigma of the log"},
        "method": f"Smoothing as in Cohen, Rosenfeld & Kolter 2019, from a log: {noise!r}, {schedule!r}, one-sided Clopper-Pearson, p_B = 1 - p_A",
        "norm": "2",
        "guarantee": "probabilistic",
        "failure": schedule.alpha,
        "log": {
            "name": log.name,
            "sha256": log.sha256,
            "impossible": len({line.index for line in log.lines} & {finding.index for finding in audit(log.lines, procedure) if finding.kind != "cumulative"}),
            "correct": "cumulative" if is_cumulative(log.lines) else "of each line",
            "radius": "the least that prints like the one in the log",
        },
        "smoothing": procedure.settings(),
        "assumptions": [Assumption.PUBLISHED_LOG.name],
        "assumption_sentences": {Assumption.PUBLISHED_LOG.name: Assumption.PUBLISHED_LOG.value},
        "selection": list(selection),
        "seed": None,
    }


def procedure_of(manifest: Mapping[str, Any]) -> Procedure:
    """The procedure that the manifest of a log's folder describes. Raises CertifyError where it describes none."""
    settings = manifest.get("smoothing")
    if not isinstance(settings, Mapping) or not isinstance(manifest.get("log"), Mapping):
        raise CertifyError("the manifest says nothing of the log or the smoothing it is of; make the folder again with certify convert")
    try:
        found = read(settings)
    except TypeError as error:
        raise CertifyError(f"the manifest's smoothing is not what certify convert writes ({error}); make the folder again with it") from error
    noise, schedule = found.classifier.noise, found.schedule
    if not (isinstance(noise, Gaussian) and isinstance(schedule, FixedN)) or found != cohen(noise.sigma, schedule.n, schedule.alpha, schedule.n0):
        raise CertifyError("the manifest's smoothing is not that of a published log; make the folder again with certify convert")
    return found


def log_differences(manifest: Mapping[str, Any], procedure: Procedure) -> list[str]:
    """What the manifest of a log's folder says and its setting does not."""
    log = Log(str(manifest["log"].get("name")), manifest["data"]["sha256"], ())
    named = ("method", "norm", "guarantee", "failure", "seed", "input", "assumptions", "assumption_sentences")
    proved = facts(log, "", procedure, manifest["selection"])
    wrong = [f"the manifest has {key} {manifest.get(key)!r}, its setting gives {proved[key]!r}" for key in named if manifest.get(key) != proved[key]]
    if manifest["data"].get("count") != proved["data"]["count"]:
        wrong.append(f"the manifest has data.count {manifest['data'].get('count')!r}, and {proved['data']['count']} lines are selected")
    if manifest["log"].get("sha256") != log.sha256:
        wrong.append("the manifest names two different logs")
    return wrong


def row_differences(rows: Sequence[Mapping[str, Any]], selection: Sequence[int], log: Log | None) -> list[str]:
    """Rows that are not what their own line gives, or, where the log is at hand, not what its line gives."""
    selected, wrong = set(selection), []
    lines = {} if log is None else {line.index: line for line in log.lines}
    for row in rows:
        where = f"input {row['index']}"
        try:
            proved = row_of(lines[row["index"]] if lines else line_of(row))
        except (CertifyError, KeyError) as error:
            wrong.append(str(error) if isinstance(error, CertifyError) else f"{where} is not in the log")
            continue
        if row["index"] not in selected:
            wrong.append(f"{where} is not among those that were selected")
        differing = [key for key in proved if row.get(key) != proved[key]]
        wrong += [f"{where}: {key} is stored as {row.get(key)!r}, its line of the log gives {proved[key]!r}" for key in differing]
    return wrong


def audit(lines: Sequence[Line], procedure: Procedure) -> list[Finding]:
    """Everything in the lines that `procedure` cannot have computed, whatever the counts were. No finding is no proof that a radius is true."""
    known = [line for line in lines if _is_radius(line)]
    found = [*_duplicates(lines), *_no_radii(lines), *_abstentions(known), *_impossible([line for line in known if line.prediction >= 0], procedure)]
    return [*found, *_not_correct(lines)]


def _is_radius(line: Line) -> bool:
    return math.isfinite(float(line.radius)) and Decimal(line.radius) >= 0


def _duplicates(lines: Sequence[Line]) -> Iterator[Finding]:
    counts = Counter(line.index for line in lines)
    seen: dict[int, Line] = {}
    for line in lines:
        if counts[line.index] > 1 and seen.setdefault(line.index, line) is not line:
            yield Finding("duplicate", f"{_where(line)}: the idx is also that of {seen[line.index].place}", line.index)


def _no_radii(lines: Sequence[Line]) -> Iterator[Finding]:
    for line in lines:
        if not _is_radius(line):
            yield Finding("number", f"{_where(line)}: the radius {line.radius} is no number that is at least 0", line.index)


def _abstentions(lines: Sequence[Line]) -> Iterator[Finding]:
    for line in lines:
        if line.prediction < 0 and Decimal(line.radius) > 0:
            yield Finding("abstained", f"{_where(line)}: the radius is {line.radius}, and predict is -1, an abstention", line.index)


def _impossible(lines: Sequence[Line], procedure: Procedure) -> Iterator[Finding]:
    """Radii that no number of votes gives: all votes give the largest one, k votes and k + 1 votes give radii with nothing between them."""
    if not lines:
        return
    n, alpha = procedure.schedule.sizes[-1], procedure.schedule.alpha
    sigma = procedure.classifier.noise.sigma  # type: ignore[attr-defined]
    least, most = (np.asarray([getattr(line, end) for line in lines]) for end in ("least", "most"))
    least, most = least * (1 - _SLACK) - 1e-8 * sigma, most * (1 + _SLACK) + 1e-8 * sigma
    largest = float(_radii(procedure, np.asarray([n]))[0])
    low, high = np.full(len(lines), -1), np.full(len(lines), n)  # radius(low) < least <= radius(high)
    while (high - low > 1).any():
        middle = np.maximum((low + high) // 2, 0)
        enough = _radii(procedure, middle) >= least
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    nearest = _radii(procedure, high)
    for line, lower, upper, k, radius in zip(lines, least, most, high, nearest, strict=True):
        if lower > largest:
            said = f"the radius {line.radius} is above {largest:.7g}, the largest that {n} copies can give at alpha={alpha:g}"
            yield Finding("above", f"{_where(line)}: {said}", line.index)
        elif radius > upper:
            below = float(_radii(procedure, np.asarray([k - 1]))[0])
            said = f"the radius {line.radius} is of no number of votes: {k - 1} of {n} give {below:.7g}, {k} give {radius:.7g}"
            yield Finding("between", f"{_where(line)}: {said}", line.index)


def _radii(procedure: Procedure, k: Array) -> Array:
    """The radius of k votes for the class."""
    n = procedure.schedule.sizes[-1]
    return procedure.classifier.radius(procedure.bound.lower(votes(k, n), procedure.schedule.alpha))


def _not_correct(lines: Sequence[Line]) -> Iterator[Finding]:
    wrong = [line for line in lines if line.said != line.right]
    if wrong and is_cumulative(lines):
        yield Finding("cumulative", f"the column correct looks cumulative: it counts on in {len(wrong)} of {len(lines)} lines; use label == predict instead")
        return
    for line in wrong:
        yield Finding("correct", f"{_where(line)}: correct is {line.correct}, label is {_label(line)} and predict is {line.prediction}", line.index)


def is_cumulative(lines: Sequence[Line]) -> bool:
    """Whether `correct` counts the correct lines so far, as some repositories print it, instead of saying whether this one is."""
    grows = all(after.said - before.said == after.right for before, after in itertools.pairwise(lines))
    return grows and bool(lines) and lines[0].said >= lines[0].right and lines[-1].said > 1


def _where(line: Line) -> str:
    return line.place if line.place.startswith("input") else f"{line.place} (idx {line.index})"


def _label(line: Line) -> int:
    return -1 if line.label is None else line.label
