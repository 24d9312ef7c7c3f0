"""Results for people: what the rows of some runs say, as a table for the terminal, a page, Cohen's TSV, or JSON. The only place that formats.

Takes plain data (`Run`), knows neither torch nor how a run was made. matplotlib and jinja2 are imported by `html`, when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence

from certify.report.summary import Run, Summary, as_json, bound_text, curve, notes, of_one_norm, percent, radius_label, radius_text, summarize, usual_radii
from certify.report.table import print_table
from certify.report.tsv import tsv

__all__ = [
    "Run",
    "Summary",
    "as_json",
    "bound_text",
    "curve",
    "html",
    "notes",
    "of_one_norm",
    "percent",
    "print_table",
    "radius_label",
    "radius_text",
    "summarize",
    "tsv",
    "usual_radii",
]


def html(runs: Sequence[Run], radii: Sequence[float], title: str) -> str:
    """The runs as one page that refers to nothing outside itself. See `certify.report.page.html`."""
    from certify.report.page import html as render

    return render(runs, radii, title)
