"""The command line: results to stdout, progress and messages to stderr. One module per subcommand, each with HELP, EPILOG, add_arguments and run."""

from __future__ import annotations

import argparse
import enum
import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = ("inspect", "lipschitz", "run", "attack", "audit", "report", "check", "convert")


class Exit(enum.IntEnum):
    """The exit codes; part of the public interface (docs/cli.md)."""

    DONE = 0  # and every gate is met
    GATE = 1  # a --fail-under was not met
    ERROR = 2  # usage, model or data: one sentence says why
    SOME_FAILED = 3  # finished, but some inputs ended in an error
    CONTRADICTION = 4  # a stored number is not what the proof gives, or an attack is closer than a certificate
    INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit code."""
    _stream_for_names()
    args = _parser().parse_args(argv)
    try:
        code: int = importlib.import_module(f"certify.cli.{args.command}").run(args)
        return code
    except KeyboardInterrupt:
        print("certify: interrupted; what was done is kept, repeat the command to go on", file=sys.stderr)  # noqa: T201
        return Exit.INTERRUPTED
    except OSError as error:
        where = (
            error.strerror or str(error)
            if error.filename is None
            else f"{error.filename}: {error.strerror}; look at the path, its permissions and the room there"
        )
        print(f"certify: error: {where}", file=sys.stderr)  # noqa: T201
        return Exit.ERROR
    except ValueError as error:
        from certify.cli.arguments import in_options

        print(f"certify: error: {in_options(str(error), args)}", file=sys.stderr)  # noqa: T201
        return Exit.ERROR


def _stream_for_names() -> None:
    """Names of files and classes have letters that a terminal may not have; and a process may be started without stdout or stderr (`>&-`)."""
    nowhere = open(os.devnull, "w", encoding="utf-8") if sys.stdout is None or sys.stderr is None else None  # noqa: SIM115
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.ERROR, f"{self.prog}: error: {message}; {self.prog} --help lists what can be said\n")


class _Version(argparse.Action):
    """Prints the version; looked up only then, as it takes longer than all the rest."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(f"certify {importlib.metadata.version('lipnet')}\n")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="certify", description="Prove how robust a classifier is.", epilog="certify COMMAND --help says more.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"certify.cli.{name}")
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP, epilog=module.EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(sub)
    return parser
