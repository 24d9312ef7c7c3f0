"""`certify report DIR...`: results folders as a table, an HTML page, TSV or JSON."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from certify.cli.arguments import add_json, add_radii

if TYPE_CHECKING:
    from certify.report import Run, Summary

HELP = "Show results folders side by side."
EPILOG = "example:\n  certify report runs/demo/* --eps 0.1,0.25,0.5 --html report.html --fail-under 0.90@0.25"

Radii = Sequence[tuple[str, float]]
Gates = Sequence[tuple[float, str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders and where to write."""
    parser.add_argument("folders", metavar="DIR", nargs="+", type=pathlib.Path, help="results folders of certify run and certify attack")
    parser.add_argument("--html", metavar="FILE", type=pathlib.Path, help="write one self-contained page")
    parser.add_argument("--tsv", metavar="FILE", type=pathlib.Path, help="write idx, label, predict, radius, correct, time (one folder)")
    add_radii(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the files that were asked for, then print the table. Refused for folders whose fields are not of the kinds that certify run writes."""
    from certify.errors import CertifyError

    try:
        return _run(args)
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        folders = ", ".join(map(str, args.folders))
        raise CertifyError(f"{folders}: a folder is not what certify run writes ({error!r}); certify check says where") from error


def _run(args: argparse.Namespace) -> int:
    from certify.errors import CertifyError
    from certify.report import html, tsv
    from certify.results import write_atomically

    runs = _read(args.folders)
    if args.html:
        write_atomically(args.html, html(runs, [value for _, value in args.eps or ()], title="Certified robustness"))
    if args.tsv:
        if len(runs) != 1:
            raise CertifyError(f"--tsv writes one folder, got {len(runs)}; call certify report once for each")
        write_atomically(args.tsv, tsv(runs[0]))
    return show(args.folders, args.eps, args.fail_under, args.json)


def show(folders: Sequence[pathlib.Path], eps: Radii | None, gates: Gates, as_json: bool, warn_about_labels: bool = False, quiet: bool = False) -> int:
    """Print what the folders hold; the exit code says whether the gates are met and whether every input ended well."""
    from certify.cli import Exit
    from certify.cli.console import out, print_json, warn
    from certify.report import as_json as report_json
    from certify.report import of_one_norm, print_table, summarize
    from certify.report.sandwich import all_contradictions, sandwich_json

    runs = _read(folders)
    radii = _asked(eps, runs)
    summaries = [summarize(run, radii) for run in runs]
    for summary in summaries:
        if warn_about_labels and summary.near_chance:
            warn(f"clean accuracy of {summary.name} is {100 * (summary.clean or 0):.1f} %: check label order and preprocessing before trusting any radius")
    contradicted = all_contradictions(runs)
    if as_json:
        print_json({**report_json(summaries, radii), "contradictions": contradicted, "sandwiches": sandwich_json(runs)})
    elif not quiet:
        for group in of_one_norm(summaries):
            here = [run for run, summary in zip(runs, summaries, strict=True) if summary.norm == group[0].norm]
            print_table([summarize(run, _asked(eps, here)) for run in here], _asked(eps, here), out())
    for message in contradicted:
        warn(f"contradiction: {message}")
    if contradicted:
        return Exit.CONTRADICTION
    asked = [summarize(run, [gate[2] for gate in gates]) for run in runs]
    certifying = [summary for summary in asked if not summary.attacked]
    failed = [message for summary in certifying for message in _failed(summary, gates)]
    if gates and not certifying:
        failed = ["--fail-under is of certified accuracies, and attacks certify nothing; name a folder of certify run too"]
    for message in failed:
        warn(message)
    if failed:
        return Exit.GATE
    return Exit.SOME_FAILED if any(summary.errors for summary in summaries) else Exit.DONE


def _read(folders: Sequence[pathlib.Path]) -> list[Run]:
    """The folders, each by a name of its own: that of the folder, or where two have the same, the path."""
    import dataclasses

    from certify.errors import CertifyError
    from certify.report.folder import read

    runs = [read(folder) for folder in folders]
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise CertifyError(f"{folder}: the folder is named {places.count(place)} times; name each once")
    names = [run.name for run in runs]
    return [dataclasses.replace(run, name=run.name if names.count(run.name) == 1 else str(place)) for run, place in zip(runs, places, strict=True)]


def _asked(eps: Radii | None, runs: Sequence[Run]) -> list[float]:
    """The radii that were asked for, or those that are usual in the norms of the runs."""
    from certify.report import summarize, usual_radii

    return [value for _, value in eps] if eps else usual_radii(summarize(run, ()).norm for run in runs)


def _failed(summary: Summary, gates: Gates) -> list[str]:
    """A sentence for each gate that is not met. An incomplete folder meets none."""
    found = []
    for (wanted, text, _), accuracy in zip(gates, summary.certified, strict=True):
        if summary.count < summary.expected:
            found.append(f"{summary.name}: {summary.count} of {summary.expected} inputs are done, so --fail-under {wanted:g}@{text} is not met; repeat the run")
        elif accuracy is None or accuracy < wanted:
            shown = "unknown (no labels)" if accuracy is None else f"{accuracy:.4f}"
            found.append(f"{summary.name}: certified accuracy at {text} is {shown}, below {wanted:g}")
    return found
