"""What the rows of a run say, as numbers: accuracies, the median radius, the bound; and how such numbers are written for people (see `certify.text`)."""

from __future__ import annotations

import math
import re
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from certify.text import decimal, down_text, up_text

SCHEMA = 1
GUARANTEES = ("proof", "probabilistic", "attack", "estimate")  # from the strongest to the weakest
MISSING = "-"
USUAL = {"2": (36 / 255, 72 / 255, 108 / 255, 1.0), "inf": (1 / 255, 2 / 255, 8 / 255)}  # the radii at which published tables give accuracies
_ENOUGH = 10  # inputs, for a word about their accuracy


@dataclass(frozen=True)
class Run:
    """One results folder, already read."""

    name: str
    manifest: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Summary:
    """One run in one line. Every share is of all rows: errors and abstentions count as not right and not certified."""

    name: str
    method: str
    guarantee: str  # the weakest that the manifest or a row names
    failure: float | None  # the probability, for each input, that the certificate is wrong
    norm: str  # 1, 2 or inf; or, for radii in no norm, what they are a bound on, in words
    data: str  # which inputs: the sha256 of the data, or else their name
    count: int  # rows
    expected: int  # inputs that were selected; more than `count` when the run is not finished
    clean: float | None  # None: the inputs have no labels, or there are no rows
    certified: tuple[float | None, ...]  # at each radius: right, and certified strictly beyond it; of an attack: right, and no point found within it
    median_radius: float | None
    bound: float | None
    errors: int
    abstained: int
    log: str | None = None  # the published log that the radii are from, and what is known against it; None for radii that were computed
    near_chance: bool = False  # whether the clean accuracy is below twice that of guessing, as far as labels are known

    @property
    def proved(self) -> bool:
        """Whether the radii are certificates, for sure or with a stated probability: neither attacks, nor estimates, nor of unknown origin."""
        return self.guarantee in GUARANTEES[:2]

    @property
    def attacked(self) -> bool:
        """Whether shares and radii are upper bounds, which are rounded up."""
        return self.guarantee == "attack"


def summarize(run: Run, radii: Sequence[float]) -> Summary:
    """The numbers of a run. A row counts at radius eps if its status is certified and its radius is strictly greater than eps."""
    labelled = _labelled(run)
    certified = certified_radii(run)
    statuses = [row.get("status") for row in run.rows]
    clean = sum(map(_right, run.rows)) / len(run.rows) if labelled else None
    return Summary(
        name=run.name,
        method=str(lookup(run.manifest, "method") or MISSING),
        guarantee=_guarantee(run),
        failure=number(lookup(run.manifest, "failure")),
        norm=str(lookup(run.manifest, "norm") or MISSING),
        data=str(lookup(run.manifest, "data", "sha256") or lookup(run.manifest, "data", "spec") or MISSING),
        count=len(run.rows),
        expected=_expected(run),
        clean=clean,
        certified=tuple(_share_beyond(certified, radius) if labelled else None for radius in radii),
        median_radius=_median(certified, up=_guarantee(run) == "attack"),
        bound=number(lookup(run.manifest, "bound", "value")),
        errors=statuses.count("error"),
        abstained=statuses.count("abstained"),
        log=_log(run),
        near_chance=clean is not None and _near_chance(clean, run),
    )


def usual_radii(norms: Iterable[str]) -> list[float]:
    """The radii of tables in these norms, in ascending order; where nothing is usual, those of l2."""
    return sorted({radius for norm in norms for radius in USUAL.get(norm, USUAL["2"])})


def of_one_norm(summaries: Sequence[Summary]) -> list[list[Summary]]:
    """The summaries by norm, in the order of their first: radii in two norms stand in no table and no drawing together."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.norm, []).append(summary)
    return list(groups.values())


def curve(run: Run) -> tuple[list[float], list[float]]:
    """The exact step curve (r_0 = 0 < r_1 < ..., a_0 >= a_1 >= ...): the share of rows with a radius > r is a_i for every r in [r_i, r_(i+1))."""
    ordered = certified_radii(run)
    radii = sorted({0.0, *filter(math.isfinite, ordered)})
    return radii, [_share_beyond(ordered, radius) for radius in radii]


def certified_radii(run: Run) -> list[float]:
    """The radius of every row, in ascending order; 0 for a row that is not certified, or whose prediction is not its label.

    Of an attack, the distance that it found; infinite where it found no point. Such a run is never shown as one that certifies.
    """
    return sorted(certified_radius(row) for row in run.rows)


def certified_radius(row: Mapping[str, Any]) -> float:
    """The radius of a row where it counts, otherwise 0; of an attack the distance, infinite where it found no point."""
    radius = number(row.get("radius"))
    if row.get("guarantee") == "attack" and row.get("status") in ("attacked", "survived") and _right(row):
        return math.inf if row["status"] == "survived" or radius is None else radius
    if row.get("status") != "certified" or radius is None or not radius > 0:
        return 0.0
    wrong = row.get("label") is not None and "prediction" in row and not _right(row)
    return 0.0 if wrong else radius


def notes(summaries: Sequence[Summary]) -> list[str]:
    """One sentence for everything that a reader of the numbers has to know beside them."""
    found = [sentence for summary in summaries for sentence in _notes_of(summary)]
    if len({summary.norm for summary in summaries}) > 1:
        found.append("The runs measure perturbations in different norms: their radii cannot be compared.")
    if len({(summary.data, summary.expected) for summary in summaries}) > 1:
        found.append("The runs are not on the same inputs: compare their accuracies with care.")
    return found


def as_json(summaries: Sequence[Summary], radii: Sequence[float]) -> dict[str, Any]:
    """The summaries for machines: numbers as computed, not rounded; null where a number is missing or not finite."""
    runs = [_as_json(summary) for summary in summaries]
    return {
        "schema": SCHEMA,
        "radii": list(radii),
        "runs": [{key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in run.items()} for run in runs],
        "notes": notes(summaries),
    }


def percent(share: float | None, up: bool = False) -> str:
    """A share as a percentage, rounded down to 0.1 %: 0.9999 is 99.9 %. With `up`, for upper bounds, rounded up."""
    return MISSING if share is None else f"{(decimal(share) * 100).quantize(Decimal('0.1'), ROUND_CEILING if up else ROUND_FLOOR)} %"


def radius_text(radius: float | None, up: bool = False) -> str:
    """A radius rounded down, or with `up` rounded up: to 4 decimals; to 3 digits if it is below 0.01, to 6 from 1e9 on."""
    if radius is None:
        return MISSING
    if not math.isfinite(radius) or radius == 0:
        return f"{radius:g}"
    if 0.01 <= radius < 1e9:
        return str(decimal(radius).quantize(Decimal("0.0001"), ROUND_CEILING if up else ROUND_FLOOR))
    digits = 3 if radius < 0.01 else 6
    return up_text(radius, digits) if up else down_text(radius, digits)


def bound_text(bound: float | None, digits: int = 5) -> str:
    """A Lipschitz bound rounded up to so many digits: 1.0000003 is 1.0001."""
    return MISSING if bound is None else up_text(bound, digits)


def radius_label(radius: float) -> str:
    """A radius that was asked for, as people write it: a short decimal, or n/255, or else rounded down (what is certified beyond it stays true)."""
    steps = round(radius * 255) if math.isfinite(radius) else 0
    if steps / 255 == radius and len(repr(radius)) > 6:
        return f"{steps}/255"
    return f"{radius:g}" if float(f"{radius:g}") == radius else radius_text(radius)


def norm_text(norm: str) -> str:
    """The name of a norm in a sentence: l2, linf; what is no norm, as it is."""
    return "unstated" if norm == MISSING else f"l{norm}" if is_norm(norm) else norm


def is_norm(norm: str) -> bool:
    """Whether radii are in a norm (an unstated one too), and not of something else that is named in words."""
    return re.fullmatch(r"-|inf|\d+(\.\d+)?", norm) is not None


def measures_text(norms: Iterable[str]) -> str:
    """What radii in these norms, and of these measures in words, are bounds on."""
    distinct = sorted(set(norms))
    lp = ", ".join(norm_text(norm) for norm in distinct if is_norm(norm))
    return "; ".join([*([f"{lp} norm, units of the input"] if lp else []), *(norm for norm in distinct if not is_norm(norm))])


def plain(text: Any) -> str:
    """Text in which every character can be printed: no control sequences for a terminal, no bytes that a page must not have."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def lookup(manifest: Mapping[str, Any], *keys: str) -> Any:
    """manifest[keys[0]][keys[1]]..., or None if any of it is missing."""
    value: Any = manifest
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _as_json(summary: Summary) -> dict[str, Any]:
    """The shares of an attack have a name of their own: nobody who looks for certificates may find them."""
    run = {**asdict(summary), "certified": list(summary.certified), "complete": summary.count == summary.expected}
    if summary.attacked:
        run["not_attacked"] = run.pop("certified")
    return run


def _right(row: Mapping[str, Any]) -> bool:
    """Whether the classifier answered, and with the label."""
    return row.get("label") is not None and row.get("prediction") == row["label"] and row.get("status") not in ("abstained", "error")


def _labelled(run: Run) -> bool:
    """Whether every row has a label; a row that ended in an error may lack it."""
    rows = [row for row in run.rows if row.get("status") != "error"] or run.rows
    return bool(rows) and all(row.get("label") is not None for row in rows)


def _near_chance(clean: float, run: Run) -> bool:
    """Below twice the accuracy of guessing, or for two classes below 60 %; nothing is said of fewer than ten inputs."""
    labels = {row.get("label") for row in run.rows} - {None}
    return len(run.rows) >= _ENOUGH and len(labels) > 1 and clean < min(2 / len(labels), 0.6)


def _share_beyond(ordered: Sequence[float], radius: float) -> float:
    return (len(ordered) - bisect_right(ordered, radius)) / max(len(ordered), 1)


def _median(ordered: Sequence[float], up: bool) -> float | None:
    """The median; between a number and infinity the number, for half of the rows have no more than that, or infinity for upper bounds."""
    if not ordered:
        return None
    middle = statistics.median(ordered)
    return middle if math.isfinite(middle) or up else statistics.median_low(ordered)


def _guarantee(run: Run) -> str:
    """The weakest guarantee that the manifest or a row names; a name that is not known is weaker than all."""
    named = {str(source["guarantee"]) for source in (run.manifest, *run.rows) if source.get("guarantee") is not None}
    return max(named, key=lambda name: (GUARANTEES.index(name) if name in GUARANTEES else len(GUARANTEES), name), default=MISSING)


def _expected(run: Run) -> int:
    selection, count = lookup(run.manifest, "selection"), lookup(run.manifest, "data", "count")
    if selection is not None:
        return len(selection)
    return len(run.rows) if count is None else int(count)


def _notes_of(summary: Summary) -> list[str]:
    name, count, expected = summary.name, summary.count, summary.expected
    if count == 0:
        return [f"{name}: no input is done yet."]
    told = {
        f"{name}: not finished, {count} of {expected} inputs are done; the shares are of those {count}.": count < expected,
        f"{name}: {count} rows for {expected} inputs; run `certify check` before trusting any number.": count > expected,
        f"{name}: clean accuracy {percent(summary.clean)} is near that of guessing; check label order and preprocessing before trusting any radius.": (
            summary.near_chance
        ),
        f"{name}: {summary.errors} of {count} inputs ended in an error; they count as not right and not certified.": summary.errors,
        f"{name}: abstained on {summary.abstained} of {count} inputs; they count as not right and not certified.": summary.abstained,
        f"{name}: the inputs have no labels, so there are no accuracies; the radius is that of the prediction, right or wrong.": summary.clean is None,
        f"{name}: {summary.log}": summary.log,
        f"{name}: guarantee {summary.guarantee}, so nothing is certified; the radii are no lower bounds.": not summary.proved and not summary.attacked,
        f"{name}: an attack, so nothing is certified: shares (right, and no point of another class found within r) and radii are upper bounds.": (
            summary.attacked
        ),
    }
    return [sentence for sentence, holds in told.items() if holds]


def _log(run: Run) -> str | None:
    """A sentence, for radii that were not computed here."""
    if lookup(run.manifest, "log") is None:
        return None
    named, digest = lookup(run.manifest, "log", "name") or "no name", str(lookup(run.manifest, "log", "sha256"))[:12]
    impossible = lookup(run.manifest, "log", "impossible")
    against = f" {impossible} of its rows cannot be right: see `certify check`." if impossible else ""
    return f"the radii are those of a published log ({named}, sha256 {digest}), as it claims them; nothing was computed again.{against}"


def number(value: Any) -> float | None:
    """A number as a float; None for anything else, and for a whole number that is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return None
