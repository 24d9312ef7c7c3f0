"""`certify convert`: between results folders and the logs of certification that others publish."""

from __future__ import annotations

import argparse
import pathlib
import sys
from datetime import datetime, timezone

from certify.cli.arguments import add_setting, setting

HELP = "Write a results folder as a log of Cohen, Rosenfeld & Kolter's kind, or make a results folder of such a log."
EPILOG = """examples:
  certify convert runs/smooth --to cohen -o smooth.tsv
  certify convert sigma_0.50.tsv --from cohen --sigma 0.5 --n 100000 --alpha 0.001 -o runs/cohen-0.50"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From what, to what."""
    parser.add_argument("source", metavar="DIR|FILE.tsv", type=pathlib.Path, help="a results folder with --to, a log with --from")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["cohen"], help="write the log: idx, label, predict, radius, correct, time")
    way.add_argument("--from", choices=["cohen"], dest="origin", help="read the log; its radii are claims, which nothing here proves")
    parser.add_argument("-o", "--output", metavar="FILE.tsv|DIR", required=True, type=pathlib.Path, help="where to; what is there already is not overwritten")
    add_setting(parser.add_argument_group("with --from, which the log does not say"))


def run(args: argparse.Namespace) -> int:
    """One way or the other."""
    return _to_log(args) if args.to else _from_log(args)


def _to_log(args: argparse.Namespace) -> int:
    """What certify report --tsv writes. Refused for radii that are no certificates, and for a norm whose balls do not contain those of l2."""
    from certify.cli import Exit
    from certify.cli.console import out, warn
    from certify.errors import CertifyError
    from certify.report import Run, summarize, tsv
    from certify.report.summary import measures_text
    from certify.results import foreign, read_manifest, read_rows, write_atomically

    if any(value is not None for value in (args.sigma, args.n, args.alpha, args.n0)):
        raise CertifyError("--sigma, --n, --alpha and --n0 say how a log was made; they are for --from")
    found = Run(args.source.resolve().name, read_manifest(args.source), read_rows(args.source))
    try:
        summary, text = summarize(found, ()), ""
        if summary.proved and summary.norm in ("2", "inf"):
            text = tsv(found)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise CertifyError(f"{args.source}: the folder is not what certify run writes ({error!r}); certify check says where") from error
    if not summary.proved:
        raise CertifyError(f"{args.source}: the radii are of the kind {summary.guarantee!r}, and whoever reads a log takes its radii for certificates")
    if summary.norm not in ("2", "inf"):
        raise CertifyError(f"{args.source}: the radii are bounds on {measures_text([summary.norm])}, and whoever reads a log takes its radii for l2")
    if not found.rows:
        raise CertifyError(f"{args.source}: there are no results yet; run certify run first")
    if strangers := foreign(args.source, found.manifest):
        raise CertifyError(f"{args.source}: {strangers[0]}")
    if args.output.exists() and (not args.output.is_file() or args.output.read_bytes() != text.encode()):
        raise CertifyError(f"{args.output}: this is there already, and is something else; choose another -o, or delete it first")
    write_atomically(args.output, text)
    if summary.count < summary.expected:
        warn(f"{summary.name}: only {summary.count} of {summary.expected} inputs are done, and the log has no others")
    out().print(f"{args.output}: {summary.count} lines", markup=False, soft_wrap=True)
    return Exit.DONE


def _from_log(args: argparse.Namespace) -> int:
    """A results folder whose rows are as the log claims, each radius rounded down by what printing hid; the manifest says so."""
    import lipnet
    from certify.cli import Exit
    from certify.cli.console import out, warn
    from certify.errors import CertifyError
    from certify.results import SCHEMA, Folder
    from certify.smoothing.logs import facts, read_log, row_of

    procedure = setting(args)
    log = read_log(args.source)
    rows = {}
    for line in log.lines:
        if line.index in rows:
            raise CertifyError(f"{args.source}: idx {line.index} stands in {line.place} again; certify check names every line that cannot be right")
        rows[line.index] = row_of(line)
    manifest = {
        "schema": SCHEMA,
        **facts(log, str(args.source), procedure, sorted(rows)),
        "argv": ["certify", *sys.argv[1:]],
        "versions": {"lipnet": lipnet.__version__},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with Folder(args.output, manifest) as folder:
        pending = folder.pending()
        if pending:
            folder.add([rows[index] for index in pending])
        folder.finish()
    out().print(f"{args.output}: {len(rows)} rows as {log.name} claims them (sha256 {log.sha256[:12]})", markup=False, soft_wrap=True)
    if impossible := manifest["log"]["impossible"]:
        warn(f"{impossible} of {len(rows)} rows cannot be right at this setting; certify check {args.output} names them")
    return Exit.DONE
