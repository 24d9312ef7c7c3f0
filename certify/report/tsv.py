"""A run in the columns of Cohen, Rosenfeld and Kolter's published logs (locuslab/smoothing), which their and others' scripts read."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from certify.report.summary import MISSING, Run, measures_text, summarize
from certify.text import decimal

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


def tsv(run: Run) -> str:
    """One line per row, by index. The radius is rounded down to 6 decimals; abstained and error: predict -1, radius 0; no label: label -1, correct 0.

    As in the published logs, a row that is not correct may have a radius; it counts only where correct is 1.
    Raises `ValueError` for attacks and estimates, and for radii of anything but l2 balls or larger ones: whoever reads these columns takes the radius for a
    certificate in l2.
    """
    summary = summarize(run, ())
    guarantee = summary.guarantee
    if guarantee in ("attack", "estimate"):
        raise ValueError(f"{run.name}: the radii are of the kind {guarantee!r}, and the TSV columns are for certified radii; use the JSON form instead")
    if summary.norm not in ("2", "inf", MISSING):
        raise ValueError(
            f"{run.name}: the radii are bounds on {measures_text([summary.norm])}, and whoever reads a log takes its radii for l2; use the JSON form"
        )
    lines = [COLUMNS, *(_cells(row) for row in sorted(run.rows, key=lambda row: row["index"]))]
    return "".join("\t".join(line) + "\n" for line in lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    label = row.get("label")
    answered = row["status"] not in ("abstained", "error") and row.get("prediction") is not None
    predict = row["prediction"] if answered else -1
    radius = row.get("radius") if answered else None
    correct = answered and label is not None and predict == label
    took = datetime.timedelta(seconds=row.get("seconds") or 0)
    return str(row["index"]), str(-1 if label is None else label), str(predict), _six_decimals(radius or 0.0), str(int(correct)), str(took)


def _six_decimals(radius: float) -> str:
    if not math.isfinite(radius):
        return "inf" if radius > 0 else "0.000000"
    return str(decimal(radius).quantize(Decimal("0.000001"), ROUND_FLOOR))
