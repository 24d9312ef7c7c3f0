"""Tables on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.text import Text

_EVERY = 10.0  # seconds between plain progress lines where there is no terminal


class Advance(Protocol):
    """Says that so many more are done."""

    def __call__(self, count: int) -> None:
        """Count them."""


def write(stream: TextIO, text: str) -> None:
    """On stdout or stderr. Where its reader has left (head, a pager) it goes nowhere, and the work goes on, so that the exit code says how that ended."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _unread(stream)


def _unread(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Out(Console):
    """A console whose reader may leave; rich would end the process with 1, which is the exit code of a gate that is not met."""

    def on_broken_pipe(self) -> None:
        _unread(sys.stdout)


def out() -> Console:
    """The console of results; as wide as a page where stdout is not a terminal."""
    return _Out(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 100)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    write(sys.stdout, json.dumps(value, indent=1, allow_nan=False) + "\n")


def warn(message: str) -> None:
    """A warning in one line on stderr."""
    write(sys.stderr, f"certify: warning: {message}\n")


_SAID: ContextVar[set[str] | None] = ContextVar("_SAID", default=None)


@contextmanager
def notes_once() -> Iterator[None]:
    """Within it a note is said the first time only: an audit opens the same model for each method."""
    token = _SAID.set(set())
    try:
        yield
    finally:
        _SAID.reset(token)


def note(message: str) -> None:
    """Something to know in one line on stderr."""
    said = _SAID.get()
    if said is not None and message in said:
        return
    if said is not None:
        said.add(message)
    write(sys.stderr, f"certify: note: {message}\n")


class Say(Protocol):
    """Says where a long computation is, in one line."""

    def __call__(self, text: str) -> None:
        """Replace what was said before."""


@contextmanager
def live() -> Iterator[Say]:
    """A line that changes on a terminal; a plain line every few seconds otherwise."""
    if sys.stderr.isatty():
        with Console(stderr=True, highlight=False).status("") as status:
            yield lambda text: status.update(Text(text))
        return
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            write(sys.stderr, f"{text}\n")

    yield say


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A progress bar with an ETA on a terminal; a plain line every few seconds otherwise."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            write(sys.stderr, f"{what}: {done} of {total}\n")

    yield advance
