"""The documentation is true: its transcripts are what the commands print, its commands are read, and the fields it lists are those that are written.

A block ```console of README.md or docs/ is a transcript. Commands begin with `$ `, what follows is what they print, stdout and stderr together. The blocks
of a page run one after the other in one folder, in this process, where blocks ```python that begin with `# NAME.py` are files of that name. `$ echo $?` is
the exit code, which is 0 where it is not shown. White space is not compared; `...` stands for anything; a decimal number for numbers near it, as training
differs from machine to machine; all other text is exact. `needs=PACKAGE` leaves a block out where that is not installed, `no-run` always: for what takes
minutes, or files of others.
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
import torch
from torch import nn

import certify
import certify.data
import lipnet
from certify.cli import Exit, _parser, console, main

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEAR, SHARES = 0.2, 21.0  # how far a decimal number may be from the one that is shown, relative; and a share, in points: one input of five
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
    parts = re.split(f"({_NUMBER.pattern})", shown)
    pattern = "".join(f"({_NUMBER.pattern})" if _NUMBER.fullmatch(part) else re.escape(part).replace(r"\.\.\.", ".*?") for part in parts)
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


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """`net.safetensors`, which pages name without saying how it was made: two hidden layers of 24, trained on digits for a moment."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))
    digits, optimizer = certify.data.digits("train"), torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(torch.from_numpy(digits.inputs)), torch.from_numpy(digits.labels)).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    lipnet.save(made.eval(), path, input_shape=(64,), input_range=(0, 1))
    return path


@pytest.mark.parametrize("page", [page for page in PAGES if any(language == "console" for language, *_ in blocks(page))], ids=lambda page: page.name)
def test_transcripts_are_what_is_printed(page, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_EVERY", math.inf)  # no lines of progress on slow machines
    for path in (ROOT / "examples", ROOT / "sdp", net):
        os.symlink(path, tmp_path / path.name)
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
            words = [{"S": "0.5", "N": "100", "A": "0.001", "I": "3", "R": "0.1"}.get(word, word) for word in shlex.split(bare)]
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


FILES = ROOT / "docs" / "files.md"
RUNS = {
    "margin": ("run",),
    "lipsdp": ("run", "--bound", "lipsdp"),
    "local": ("run", "--method", "local"),
    "lowrank": ("run", "--method", "lowrank"),
    "smoothing": ("run", "--method", "smoothing", "--sigma", "0.2", "--n", "200", "--levels", "16", "--fixed"),
    "attack": ("attack", "--steps", "5"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with one of everything that is written, by method."""
    folder = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    model = str(folder / "net.safetensors")
    lipnet.save(nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10)).eval(), model, input_shape=(64,), input_range=(0, 1))
    for name, (command, *options) in RUNS.items():
        assert main([command, model, "digits", "-o", str(folder / name), "--limit", "2", "--quiet", *options]) == Exit.DONE
    assert main(["convert", str(folder / "smoothing"), "--to", "cohen", "-o", str(folder / "log.tsv")]) == Exit.DONE
    log = ["convert", str(folder / "log.tsv"), "--from", "cohen", "--sigma", "0.2", "--n", "200", "--alpha", "0.001", "-o", str(folder / "log")]
    assert main(log) == Exit.DONE
    assert main(["lipschitz", model, "--method", "lipsdp", "--no-pairs", "--save-proof", str(folder / "net.proof")]) == Exit.DONE
    return folder


def table(heading):
    """The rows of the first table under a heading of files.md: the names of the first column, and the other cells."""
    text = FILES.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (lines, *_) = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()[2:]]
    return [(re.findall(r"`([^`]+)`", first), rest) for first, *rest in cells]


def fields(heading, method):
    """The fields that a table has for a method."""

    def there(where):
        everywhere, _, but = where.partition(" but ")
        return method != but if everywhere == "all" else method in where.split(", ")

    return {name for names, (where, *_) in table(heading) for name in names if there(where)}


@pytest.mark.parametrize("name", [*RUNS, "log"])
def test_rows_and_manifests_have_the_fields_that_the_page_lists(name, written):
    method = "margin" if name == "lipsdp" else name
    (part,) = (written / name).glob("part-*.jsonl")
    for line in part.read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == fields("Rows", method)
    for line in (written / name / "results.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == fields("Rows", method) - {"seconds"}
    assert set(json.loads((written / name / "manifest.json").read_text(encoding="utf-8"))) == fields("The manifest", method)


def test_what_stands_inside_of_fields_is_on_the_page(written):
    text = FILES.read_text(encoding="utf-8")
    manifests = {name: json.loads((written / name / "manifest.json").read_text(encoding="utf-8")) for name in (*RUNS, "log")}
    row = json.loads((written / "smoothing" / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    inside = [manifests["margin"]["model"], manifests["margin"]["data"], manifests["margin"]["input"], manifests["lipsdp"]["bound"]]
    inside += [manifests["attack"]["attack"], manifests["log"]["log"], row["counts"], row["counts"]["looks"][0]]
    assert not [name for about in inside for name in about if f"`{name}`" not in text]


def test_logs_proofs_and_json_have_the_fields_that_the_page_lists(written, capsys):
    text = FILES.read_text(encoding="utf-8")
    columns = (written / "log.tsv").read_text(encoding="utf-8").splitlines()[0].split("\t")
    assert ", ".join(f"`{name}`" for name in columns) in text
    from safetensors import safe_open

    with safe_open(written / "net.proof", "np") as file:
        stored = set(json.loads(file.metadata()["proof"]))
    listed = text.partition("with these fields: ")[2].partition(". What")[0]
    assert stored == set(re.findall(r"`(\w+)`", listed))
    shown = {command: set(names) for commands, (cell, *_) in table("JSON on stdout") for names in [re.findall(r"`(\w+)`", cell)] for command in commands}
    capsys.readouterr()
    model, margin, attack = str(written / "net.safetensors"), str(written / "margin"), str(written / "attack")
    commands = {
        "certify inspect": ["inspect", model],
        "certify lipschitz": ["lipschitz", model],
        "certify report": ["report", margin, attack],
        "certify check DIR": ["check", margin],
        "certify check FILE.proof": ["check", str(written / "net.proof")],
    }
    found = {}
    for name, words in commands.items():
        assert main([*words, "--json"]) == Exit.DONE
        found[name] = json.loads(capsys.readouterr().out)
    for name, about in found.items():
        assert shown[name] - {"proof" if name == "certify lipschitz" else "", "kinds"} == set(about), name
    assert shown["certify run"] == shown["certify audit"] == shown["certify attack"] == shown["certify report"]
    of_runs = text.partition("Each of `runs` has ")[2].partition(".\n")[0]
    assert {key for run in found["certify report"]["runs"] for key in run} == set(re.findall(r"`(\w+)`", of_runs)) - {"radii"}


def test_exit_codes_are_listed():
    for page in (FILES, ROOT / "docs" / "cli.md"):
        text = page.read_text(encoding="utf-8").partition("## Exit codes\n")[2]
        assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)} == {int(code) for code in Exit}


def test_the_page_on_choosing_has_every_method_and_the_numbers_of_the_audit():
    text, audit = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("which.md", "audit.md"))
    (commands,) = (action for action in _parser()._actions if action.dest == "command")
    choices = {action.dest: action.choices for action in commands.choices["run"]._actions}
    wanted = {f"--method {name}" for name in choices["method"]} | {f"--method margin --bound {name}" for name in choices["bound"] if name != "layerwise"}
    listed = text.partition("## What do you have?")[0]
    assert set(re.findall(r"^\| `([^`]+)`", listed, flags=re.MULTILINE)) == wanted | {"certify attack", "certify run ..."}
    rows = [line for line in text.splitlines() if "5 inputs" in line or "10 inputs" in line or "inputs in [0, 1]" in line]
    radii = [number for row in rows for number in re.findall(r"\d\.\d{4}", row)]
    assert len(radii) == 13
    assert all(number in audit for number in radii)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, place = target.partition("#")
        if not path.startswith("http"):
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if place else ()
            assert not place or place in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, f"{page.name}: {target}"
