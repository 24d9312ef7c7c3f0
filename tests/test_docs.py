"""The documentation is true: its transcripts are what the commands print, its commands are read, and the fields it lists are those that are written.

A block ```console of README.md or docs/ is a transcript. Commands begin with `$ `, what follows is what they print, stdout and stderr together. The blocks of a page
run one after the other in one folder, in this process, where blocks ```python that begin with `# NAME.py` are files of that name. `$ echo $?` is the exit code, which is 0
where it is not shown. White space is not compared; `...` stands for anything; a decimal number for numbers near it, as training and eigenvalues differ from machine
to machine; all other text is exact. `needs=PACKAGE` leaves a block out where that is not installed, `no-run` always: for what takes minutes, or files of others.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from certify.cli import _parser, console, main

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEAR, SHARES = 0.2, 15.0  # how far a decimal number may be from the one that is shown, relative; and a share of few inputs, in points
_BLOCK = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d+\.\d+(?:e[-+]?\d+)?")


def blocks(page):
    """Language, marks and text of each fenced block."""
    return [(language, marks.split(), text) for language, marks, text in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def transcript(text):
    """The commands of a block, with what they print."""
    found = [part.split("\n", 1) for part in re.split(r"^\$ ", text.replace("\\\n> ", ""), flags=re.MULTILINE)]
    assert found[0] == [""], f"a transcript begins with a command, got {found[0]}"
    return [(command, shown) for command, shown in found[1:]]


def runs(marks):
    """Whether a block is run here."""
    needed = [mark.removeprefix("needs=") for mark in marks if mark.startswith("needs=")]
    return "no-run" not in marks and all(importlib.util.find_spec(name) for name in needed)


def execute(command, printed, monkeypatch):
    """The exit code of a command, in this process where it is one of ours."""
    program, *words = shlex.split(command)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            if program == "certify":
                return int(main(words))
            if program == "python":
                monkeypatch.setattr(sys, "argv", words)
                runpy.run_path(words[0], run_name="__main__")
                return 0
        except SystemExit as end:
            return end.code or 0
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    printed.write(done.stdout + done.stderr)
    return done.returncode


def words_of(text):
    """What is compared; lines of tables are as long as what stands above them."""
    return re.sub("─+", "─", text).split()


def like(shown, printed, share):
    """Whether a word is the one that is shown; of a share, the next is `%`."""
    pattern = "".join(f"({_NUMBER.pattern})" if _NUMBER.fullmatch(part) else re.escape(part).replace(r"\.\.\.", ".*?") for part in re.split(f"({_NUMBER.pattern})", shown))
    match = re.fullmatch(pattern, printed)
    pairs = zip(_NUMBER.findall(shown), match.groups(), strict=True) if match else ()
    near = SHARES if share else 0.0
    return match is not None and all(math.isclose(float(a), float(b), rel_tol=NEAR, abs_tol=near) for a, b in pairs)


def agree(shown, printed):
    """Whether a text is the one that is shown."""
    a, b = words_of(shown), words_of(printed)

    @functools.cache
    def from_here(i, j):
        if i == len(a):
            return j == len(b)
        if a[i] == "...":
            return any(from_here(i + 1, k) for k in range(len(b), j - 1, -1))
        return j < len(b) and like(a[i], b[j], i + 1 < len(a) and a[i + 1] == "%") and from_here(i + 1, j + 1)

    return from_here(0, 0)


@pytest.mark.parametrize("page", [page for page in PAGES if any(language == "console" for language, *_ in blocks(page))], ids=lambda page: page.name)
def test_transcripts_are_what_is_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_EVERY", math.inf)  # no lines of progress on slow machines
    for folder in ("examples", "sdp"):
        os.symlink(ROOT / folder, tmp_path / folder)
    code = 0
    for language, marks, text in blocks(page):
        if language == "python" and (named := re.match(r"# (\w+\.py)\n", text)):
            (tmp_path / named[1]).write_text(text, encoding="utf-8")
        for command, shown in transcript(text) if language == "console" and runs(marks) else ():
            if command == "echo $?":
                assert shown.strip() == str(code), f"{page.name}: the exit code is {code}, shown is {shown}"
                code = 0
                continue
            assert code == 0, f"{page.name}: before `{command}`, a command ended with {code}, and the page does not say so"
            printed = io.StringIO()
            code = execute(command, printed, monkeypatch)
            assert agree(shown, printed.getvalue()), f"{page.name}: `{command}` printed\n{printed.getvalue()}and the page has\n{shown}"
    assert code == 0, f"{page.name}: the last command ended with {code}, and the page does not say so"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("clean 95.0 % done", "clean  93.9 %\ndone", True),
        ("clean 95.0 % done", "clean 70.0 % done", False),
        ("at most 1.2288 (l2)", "at most 1.2287652 (l2)", True),
        ("at most 1.2288 (l2)", "at most 1.9 (l2)", False),
        ("at most 1.2288 (l2)", "at most 1.2288 (l1)", False),
        ("10 rows, 0 contradictions", "10 rows, 1 contradictions", False),
        ("sha256 ...", "sha256 f74d", True),
        ("a ... b", "a b", True),
        ("a ... b", "a x b c", False),
        ("part-0-of-1-....jsonl", "part-0-of-1-ab12.jsonl", True),
        ("", "a word", False),
        ("a word", "", False),
    ],
)
def test_a_transcript_that_differs_is_noticed(shown, printed, same):
    assert agree(shown, printed) is same


def commands_of(text):
    """The commands of a block that name no place to fill in, as words."""
    for line in text.replace("\\\n> ", "").splitlines():
        line = re.sub(r"^\$ ", "", line)
        if line.startswith("certify "):
            told = re.sub(r"^(certify \w+\s+\S.*?)(\s{3,}|\s+#).*", r"\1", line)  # without what stands beside it
            bare = re.sub(r"\[[^]]*\]", "", told)
            words = [{"S": "0.5", "N": "100", "A": "0.001"}.get(word, word) for word in shlex.split(bare)]
            yield line, [word.rstrip(".") for word in words[1:]]


def test_every_command_in_the_documentation_is_one():
    parser, count = _parser(), 0
    for page in PAGES:
        for language, _, text in blocks(page):
            for line, words in commands_of(text) if language in ("", "console") else ():
                count += 1
                try:
                    parser.parse_args(words)
                except SystemExit as end:
                    raise AssertionError(f"{page.name}: {line}") from end
    assert count > 40
