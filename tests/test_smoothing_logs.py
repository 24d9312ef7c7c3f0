"""Published logs: what printing hid, rows that cannot be, folders made of logs and logs made of folders."""

import json
import math
import os
import pathlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from certify.cli import main
from certify.errors import CertifyError
from certify.report import Run, notes, summarize
from certify.results import read_manifest, read_rows
from certify.smoothing import logs

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
GOOD = HEADER + "0\t3\t3\t0.486\t1\t0:02:31.238689\n20\t7\t-1\t0.0\t0\t16.6\n40\t4\t1\t1.91\t0\t1 day, 0:00:01\n60\t2\t2\t0.5\t1\t\n"
SETTING = ("--sigma", "0.5", "--n", "100000", "--alpha", "0.001")


def line(radius, index=0, label=1, prediction=1, correct="1"):
    return logs.Line(f"line {index + 2}", index, label, prediction, radius, correct, None)


def kinds(lines, sigma=0.5, n=100_000, alpha=0.001):
    return Counter(finding.kind for finding in logs.audit(lines, logs.cohen(sigma, n, alpha)))


def published(sigma, k, n=100_000, alpha=0.001):
    """The radius of the published code, by its own formula."""
    return sigma * stats.norm.ppf(stats.beta.ppf(alpha, k, n - k + 1))


def written(tmp_path, text=GOOD, name="log.tsv"):
    path = tmp_path / name
    path.write_text(text)
    return path


# printing


@pytest.mark.parametrize("form", ["{:.3}", "{:.2}", "{:.3f}", "{:.6f}", "{}", "{:.0f}", "{:.2e}", "{:g}"])
@given(radius=st.floats(1e-7, 1e3))
def test_the_radius_lies_between_the_least_and_the_most_that_print_like_it(form, radius):
    found = line(form.format(radius))
    assert found.least <= radius <= found.most
    assert found.least >= 0


def test_what_printing_rounded_up_is_rounded_down_by_half_a_unit():
    assert line("1.91").least == pytest.approx(1.905)
    assert line("1.91").least <= 1.905 <= published(0.5, 100_000) < 1.91
    assert line("0.0734").least == pytest.approx(0.07335)
    assert line("1.0").least == pytest.approx(0.95)  # {:.3} drops zeros; how many, nobody knows
    assert line("5.2e-05").least == pytest.approx(5.15e-5)
    assert line("0.0").least == 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:02:31.5", 151.5), ("1 day, 0:00:01", 86401), ("16.6", 16.6), ("17", 17), ("", None), ("x", None), ("1e9999", None)]
)
def test_times_are_read_or_left_out(text, seconds):
    assert logs.seconds(text) == seconds


# audit


@pytest.mark.parametrize(("name", "sigma", "above", "between"), [
    ("cifar10__resnet110__noise_0.12__test__sigma_0.12", 0.12, 0, 0),
    ("cifar10__resnet110__noise_0.12__test__sigma_0.50", 0.5, 0, 0),
    ("cifar10__resnet110__noise_0.50__test__sigma_0.50", 0.5, 9, 6),
    ("imagenet__resnet50__noise_0.25__test__sigma_0.25", 0.25, 122 + 6, 21),  # 0.978, and 0.955 > 0.9529 + 0.0005
])  # fmt: skip
def test_logs_of_the_authors_have_rows_that_cannot_be(name, sigma, above, between):
    path = pathlib.Path(os.environ.get("LIPNET_DATA", "")) / "cohen_tsv" / f"{name}.tsv"
    if "LIPNET_DATA" not in os.environ or not path.is_file():
        pytest.skip("LIPNET_DATA names no folder with cohen_tsv in it")
    lines = logs.read_log(path).lines
    assert kinds(lines, sigma) == {kind: count for kind, count in {"above": above, "between": between}.items() if count}
    if above:
        assert not kinds(lines, sigma, alpha=0.01)  # what the rows are consistent with


@pytest.mark.parametrize("form", ["{:.3}", "{:.4f}", "{}", "{:.2}"])
@pytest.mark.parametrize(("n", "alpha"), [(100, 0.001), (10_000, 0.05), (100_000, 0.001)])
def test_nothing_is_said_against_a_log_of_the_published_code(form, n, alpha):
    counts = np.unique(np.concatenate([np.arange(n - 40, n + 1), np.linspace(0.55 * n, n, 60).astype(int)]))
    lines = [line(form.format(float(published(0.25, k, n, alpha))), index) for index, k in enumerate(counts) if published(0.25, k, n, alpha) > 0]
    assert len(lines) > 30
    assert not kinds(lines, 0.25, n, alpha)


def test_the_largest_possible_radius_is_that_of_all_votes():
    largest = 0.5 * 3.811456563389952  # n = 100000, alpha = 0.001, one-sided; 40-digit arithmetic
    assert not kinds([line(f"{largest:.9f}")])
    assert not kinds([line("1.91")])
    assert kinds([line(f"{largest + 1e-4:.9f}")]) == {"above": 1}
    assert kinds([line("1.92")]) == {"above": 1}
    assert kinds([line("1.91")], alpha=0.0005) == {"above": 1}


def test_a_radius_between_those_of_neighbouring_counts_is_of_no_count():
    low, high = published(0.5, 99_999), published(0.5, 100_000)
    assert kinds([line(f"{(low + high) / 2:.3f}")]) == {"between": 1}
    assert not kinds([line(f"{low:.3f}"), line(f"{high:.3f}", 1)])


def test_every_kind_of_impossible_line_is_found():
    assert kinds([line("0.3"), line("0.4", 1), line("0.3")]) == {"duplicate": 1}
    assert kinds([line(text, i) for i, text in enumerate(["nan", "inf", "-0.1", "-inf", "1e999"])]) == {"number": 5}
    assert kinds([line("0.3", prediction=-1, correct="0")]) == {"abstained": 1}
    assert kinds([line("0.3", correct="0")]) == {"correct": 1}
    assert kinds([line("0.3", prediction=2, correct="1"), line("0.3", 1, prediction=2, correct="0")]) == {"correct": 1}
    assert kinds([line("0.0", label=None, prediction=-1, correct="1")]) == {"correct": 1}
    assert not kinds([line("0.0", label=None, prediction=-1, correct="0")])
    counting = [line("0.3", i, prediction=i % 2, correct=str((i + 1) // 2)) for i in range(6)]
    (finding,) = logs.audit(counting, logs.cohen(0.5, 100_000, 0.001))
    assert finding.kind == "cumulative"
    assert "looks cumulative" in finding.text


def test_check_says_what_a_log_cannot_be_right_about(tmp_path, capsys):
    path = written(tmp_path, GOOD + "60\t2\t2\t1.96\t0\t0\n80\t2\t-1\t0.1\t0\t0\n100\t1\t1\tnan\t1\t0\n")
    assert main(["check", str(path), *SETTING]) == 4
    shown = capsys.readouterr().out
    for text in ("line 6 (idx 60): the idx is also that of line 5", "1.96 is above 1.905728", "line 7 (idx 80)", "line 8 (idx 100)", "correct is 0"):
        assert text in shown
    assert main(["check", str(path), *SETTING, "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["kinds"] == {"duplicate": 1, "number": 1, "abstained": 1, "above": 1, "correct": 1}
    assert told["rows"] == 7
    assert main(["check", str(written(tmp_path)), *SETTING]) == 0
    assert "no counts to compute a radius from, 0 contradictions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "give --sigma too"),
        (["--sigma", "0.5"], "give --n too"),
        (["--sigma", "0.5", "--n", "100"], "give --alpha too"),
        (["--sigma", "0", "--n", "100", "--alpha", "0.1"], "sigma is a positive"),
        (["--sigma", "0.5", "--n", "0", "--alpha", "0.1"], "whole numbers of copies"),
        (["--sigma", "0.5", "--n", "100", "--alpha", "nan"], "strictly between 0 and 1"),
        (["--sigma", "0.5", "--n", "100", "--alpha", "0.1", "--n0", "0"], "at least one copy"),
    ],
    ids=str,
)
def test_the_setting_of_a_log_has_to_be_given(tmp_path, capsys, arguments, match):
    path = written(tmp_path)
    assert main(["check", str(path), *arguments]) == 2
    assert match in capsys.readouterr().err
    assert main(["convert", str(path), "--from", "cohen", "-o", str(tmp_path / "a"), *arguments]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "found none"),
        ("idx\tlabel\tpredict\tcorrect\ttime\n0\t1\t1\t1\t0\n", "a log of predictions, it has no column radius"),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\tradius_proxy\n", "the columns of a log are"),
        ("0\t1\t1\t0.3\t1\t0\n", "the columns of a log are"),
        (HEADER, "no lines beside its header"),
        (HEADER + "0\t1\t1\t0.3\n", "line 2 has 4 cells for 6 columns"),
        (HEADER + "0\t1.5\t1\t0.3\t1\t0\n", "label '1.5', where a whole number belongs"),
        (HEADER + "-1\t1\t1\t0.3\t1\t0\n", "only label and predict may be -1"),
        (HEADER + "0\t1\t-2\t0.3\t1\t0\n", "only label and predict may be -1"),
        (HEADER + "0\t1\t1\tbig\t1\t0\n", "radius 'big', where a number belongs"),
        (HEADER + "0\t1\t1\t1_0\t1\t0\n", "where a number belongs"),
        (HEADER + "0\t1\t1\t1e99999\t1\t0\n", "where a number belongs"),
        (HEADER + "0\t1\t1\t0.3\tyes\t0\n", "correct 'yes', where a number belongs"),
    ],
)
def test_what_is_no_log_is_refused_in_one_sentence(tmp_path, capsys, text, match):
    path = written(tmp_path, text)
    for command in (["check", str(path)], ["convert", str(path), "--from", "cohen", "-o", str(tmp_path / "a")]):
        assert main([*command, *SETTING]) == 2
        message = capsys.readouterr().err.strip()
        assert match in message
        assert "\n" not in message


def test_bytes_are_no_log(tmp_path, capsys):
    (tmp_path / "log.tsv").write_bytes(b"\xff\xfe\x00")
    assert main(["check", str(tmp_path / "log.tsv"), *SETTING]) == 2
    assert "this is no text" in capsys.readouterr().err


# folders


def converted(tmp_path, text=GOOD, setting=SETTING):
    assert main(["convert", str(written(tmp_path, text)), "--from", "cohen", *setting, "-o", str(tmp_path / "a")]) == 0
    return tmp_path / "a"


def test_a_folder_of_a_log_says_what_it_is(tmp_path, capsys):
    out = converted(tmp_path)
    manifest, rows = read_manifest(out), read_rows(out)
    assert (manifest["guarantee"], manifest["failure"], manifest["norm"], manifest["seed"]) == ("probabilistic", 0.001, "2", None)
    assert manifest["method"].startswith("Smoothing as in Cohen")
    assert "FixedN(n0=100, n=100000, alpha=0.001)" in manifest["method"]
    assert len(manifest["log"]["sha256"]) == 64
    assert manifest["assumptions"] == ["PUBLISHED_LOG"]
    assert not any("counts" in row for row in rows)
    assert [row["status"] for row in rows] == ["certified", "abstained", "misclassified", "certified"]
    assert [row.get("seconds") for row in rows] == [151.238689, 16.6, 86401.0, None]
    assert rows[0]["radius"] == pytest.approx(0.4855)
    assert rows[0]["radius"] <= 0.4855
    summary = summarize(Run("a", manifest, rows), [0.485, 0.4856])
    assert summary.certified == (0.25, 0.0)
    assert any("the radii are those of a published log" in note for note in notes([summary]))
    capsys.readouterr()
    assert main(["report", str(out), "--html", str(tmp_path / "r.html")]) == 0
    assert "those of a published log" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "r.html").read_text()
    assert "as a published log claims, for each input" in page
    assert "nothing was computed again" in page
    assert main(["check", str(out)]) == 0
    assert "4 rows compared with their log" in capsys.readouterr().out


def test_a_cumulative_column_is_replaced(tmp_path, capsys):
    text = HEADER + "".join(f"{i}\t1\t{i % 2}\t0.3\t{(i + 1) // 2}\t0\n" for i in range(6))
    out = converted(tmp_path, text)
    assert [row["status"] for row in read_rows(out)] == ["misclassified", "certified"] * 3
    assert read_manifest(out)["log"]["correct"] == "cumulative"
    capsys.readouterr()
    assert main(["check", str(out)]) == 4
    assert "looks cumulative" in capsys.readouterr().out


def test_impossible_rows_are_kept_counted_and_found(tmp_path, capsys):
    out = converted(tmp_path, GOOD + "80\t2\t2\t1.96\t1\t0\n")
    assert "1 of 5 rows cannot be right" in capsys.readouterr().err
    assert any("1 of its rows cannot be right" in note for note in notes([summarize(Run("a", read_manifest(out), read_rows(out)), [])]))
    assert main(["check", str(out)]) == 4
    assert "input 80: the radius 1.96 is above" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (GOOD + "0\t3\t3\t0.4\t1\t0\n", "idx 0 stands in line 6 again"),
        (GOOD + "80\t3\t3\tnan\t1\t0\n", "radius nan"),
        (GOOD + "80\t3\t3\t-1\t1\t0\n", "radius -1"),
    ],
)
def test_lines_that_no_row_can_hold_are_refused(tmp_path, capsys, text, match):
    path = written(tmp_path, text)
    assert main(["convert", str(path), "--from", "cohen", *SETTING, "-o", str(tmp_path / "a")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def edit(out, row=lambda found: None, manifest=lambda found: None):
    (part,) = out.glob("part-*")
    rows = [json.loads(text) for text in part.read_text().splitlines()]
    row(rows[0])
    part.write_text("".join(json.dumps(each) + "\n" for each in rows))
    (out / "results.jsonl").unlink()
    stored = read_manifest(out)
    manifest(stored)
    (out / "manifest.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("gone", [False, True], ids=["with its log", "without it"])
@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(radius=0.486),
        lambda row: row.update(radius=math.nan),
        lambda row: row.update(radius=-1.0),
        lambda row: row.update(prediction=-1),
        lambda row: row.update(label=4),
        lambda row: row.update(status="misclassified"),
        lambda row: row.update(guarantee="proof"),
        lambda row: row.update(norm="inf"),
        lambda row: row.update(index=7),
        lambda row: row["printed"].update(radius="1.96"),
        lambda row: row["printed"].update(radius=1.5),
        lambda row: row["printed"].update(radius="nan"),
        lambda row: row["printed"].update(correct="0"),
        lambda row: row.pop("printed"),
    ],
)
def test_check_finds_changed_rows_of_a_log(tmp_path, capsys, change, gone):
    out = converted(tmp_path)
    edit(out, row=change)
    if gone:
        (tmp_path / "log.tsv").unlink()
    capsys.readouterr()
    assert main(["check", str(out)]) == 4
    shown = capsys.readouterr().out
    assert "contradiction: input " in shown
    assert ("is not at" in shown) == gone


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda manifest: manifest.update(failure=1e-6), 4),
        (lambda manifest: manifest.update(guarantee="proof"), 4),
        (lambda manifest: manifest.update(norm="inf"), 4),
        (lambda manifest: manifest.update(assumptions=[]), 4),
        (lambda manifest: manifest.update(assumption_sentences={}), 4),
        (lambda manifest: manifest["input"].update(units="of bytes"), 4),
        (lambda manifest: manifest["data"].update(count=10**6), 4),
        (lambda manifest: manifest.update(method=manifest["method"].replace("0.001", "0.0001")), 4),
        (lambda manifest: manifest["smoothing"].update(noise="Gaussian(sigma=1.0)"), 4),
        (lambda manifest: manifest["smoothing"].update(schedule="FixedN(n0=100, n=1000000, alpha=0.001)"), 4),
        (lambda manifest: manifest["log"].update(sha256="0" * 64), 4),
        (lambda manifest: manifest.update(selection=[0]), 4),
        (lambda manifest: manifest["smoothing"].update(share="Share(rivals=0.2)"), 2),
        (lambda manifest: manifest["smoothing"].update(noise="Uniform(half_width=1.0)"), 2),
        (lambda manifest: manifest["smoothing"].pop("bound"), 2),
        (lambda manifest: manifest["smoothing"].update(noise=3), 2),
        (lambda manifest: manifest["smoothing"].update(schedule="1"), 2),
        (lambda manifest: manifest["smoothing"].update(bound="Share(rivals=0.0)"), 2),
        (lambda manifest: manifest["smoothing"].update(distance="x"), 2),
        (lambda manifest: manifest.pop("smoothing"), 2),
        (lambda manifest: manifest.update(log=3), 2),
        (lambda manifest: manifest["data"].update(sha256="0" * 64), 2),
        (lambda manifest: manifest.pop("data"), 2),
        (lambda manifest: manifest.pop("selection"), 2),
    ],
)
def test_check_finds_a_changed_manifest_of_a_log(tmp_path, capsys, change, code):
    out = converted(tmp_path)
    edit(out, manifest=change)
    capsys.readouterr()
    assert main(["check", str(out)]) == code
    captured = capsys.readouterr()
    assert ("contradiction: " in captured.out) if code == 4 else captured.err.startswith("certify: error: ")


def test_what_is_there_is_resumed_or_left_alone(tmp_path, capsys):
    out = converted(tmp_path)
    before = (out / "results.jsonl").read_bytes()
    assert converted(tmp_path) == out
    assert (out / "results.jsonl").read_bytes() == before
    assert len(list(out.glob("part-*"))) == 1
    capsys.readouterr()
    again = ["convert", str(tmp_path / "log.tsv"), "--from", "cohen", "-o", str(out)]
    assert main([*again, "--sigma", "0.25", "--n", "100000", "--alpha", "0.001"]) == 2
    assert "started with method" in capsys.readouterr().err
    written(tmp_path, GOOD.replace("0.486", "0.487"))
    assert main([*again, *SETTING]) == 2
    assert "started with data" in capsys.readouterr().err
    assert main([*again[:-1], str(tmp_path / "log.tsv"), *SETTING]) == 2
    assert "choose another -o" in capsys.readouterr().err


def test_a_folder_becomes_a_log_and_the_log_is_not_overwritten(tmp_path, capsys):
    out, log = converted(tmp_path), tmp_path / "out.tsv"
    command = ["convert", str(out), "--to", "cohen", "-o", str(log)]
    assert main(command) == 0
    lines = log.read_text().splitlines()
    assert lines[0] + "\n" == HEADER
    assert [text.split("\t")[:5] for text in lines[1:3]] == [["0", "3", "3", "0.485499", "1"], ["20", "7", "-1", "0.000000", "0"]]
    assert main(command) == 0  # it is what would be written
    log.write_text("mine")
    capsys.readouterr()
    assert main(command) == 2
    assert "this is there already" in capsys.readouterr().err
    assert log.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"guarantee": "attack"}, "of the kind 'attack'"),
        ({"guarantee": "estimate"}, "of the kind 'estimate'"),
        ({"guarantee": "hope"}, "of the kind 'hope'"),
        ({"norm": "1"}, "bounds on l1 norm"),
        ({"selection": 3}, "is not what certify run writes"),
    ],
    ids=str,
)
def test_radii_that_are_no_certificates_are_not_written_as_a_log(tmp_path, capsys, change, match):
    out = converted(tmp_path)
    edit(out, manifest=lambda manifest: manifest.update(change))
    capsys.readouterr()
    assert main(["convert", str(out), "--to", "cohen", "-o", str(tmp_path / "out.tsv")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out.tsv").exists()


def test_the_setting_belongs_to_logs_alone(tmp_path, capsys):
    out = converted(tmp_path)
    for command in (["check", str(out)], ["convert", str(out), "--to", "cohen", "-o", str(tmp_path / "x.tsv")]):
        capsys.readouterr()
        assert main([*command, "--sigma", "0.5"]) == 2
        assert "--sigma" in capsys.readouterr().err


def test_rows_refuse_what_is_no_radius():
    with pytest.raises(CertifyError, match="which is no radius"):
        logs.row_of(line("nan"))
