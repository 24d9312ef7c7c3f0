"""certify.report: numbers by hand, rounding that keeps sentences true, a page that is whole, closed and deterministic."""

from __future__ import annotations

import datetime
import html as stdlib_html
import io
import itertools
import json
import math
import pathlib
import random
import re
import subprocess
import sys
from fractions import Fraction
from html.parser import HTMLParser

import pytest
from rich.console import Console

from certify.report import (
    Run,
    as_json,
    bound_text,
    curve,
    html,
    notes,
    percent,
    plots,
    print_table,
    radius_label,
    radius_text,
    summarize,
    tsv,
    usual_radii,
)
from certify.report.figure import INKS
from certify.report.page import COLOURS, GROUNDS
from certify.text import parse_radius

HOSTILE = """<script>alert('1')</script> "&amp; $x_1$ [red]{{ 7*7 }}\x1b[31m\x00 名"""
VOID = {"meta", "br", "link", "img", "input", "hr"}


def row(index, radius=None, status="certified", label=3, prediction=3, **more):
    found = {"schema": 1, "index": index, "label": label, "prediction": prediction, "method": "margin", "norm": "2", "status": status, "seconds": 0.002}
    return {**found, **({} if radius is None else {"radius": radius}), **more}


def manifest(**more):
    parts = [{"name": "0", "type": "Linear", "value": 12.5, "how": "svd"}, {"name": "1", "type": "ReLU", "value": 1.0, "how": "slopes in [0, 1]"}]
    found = {
        "schema": 1,
        "model": {"spec": "runs/demo/sandwich.safetensors", "sha256": "9f3c" * 16, "parameters": 41000, "input_shape": [1, 8, 8], "classes": 10},
        "data": {"spec": "digits", "sha256": "ab12" * 16, "count": 5},
        "method": "Margin(bound=Layerwise())",
        "norm": "2",
        "guarantee": "proof",
        "failure": 0.0,
        "bound": {"value": 1.0000003, "method": "Layerwise()", "norm": [2, 2], "domain": "Everywhere()", "assumptions": ["REAL_ARITHMETIC"], "parts": parts},
        "assumptions": ["REAL_ARITHMETIC"],
        "assumption_sentences": {"REAL_ARITHMETIC": "The stored weights in exact arithmetic."},
        "seed": 7,
        "argv": ["certify", "run", "a b.safetensors"],
        "versions": {"lipnet": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "created": "2026-11-21T04:00:00+00:00",
        "selection": None,
        "input": {"range": [0, 1], "units": "pixel intensity"},
    }
    return {**found, **more}


def five(name="five", **more):
    """Right: 0, 1, 2. Certified radii 0.5, 0.25, 0.1; the radius of the misclassified row does not count."""
    rows = [row(0, 0.5), row(1, 0.25), row(2, 0.1), row(3, 0.9, "misclassified", prediction=4), row(4, status="abstained", prediction=None)]
    return Run(name, manifest(**more), rows)


def many(name="many", seed=0, count=360, scale=0.5, **more):
    draw = random.Random(seed)
    kinds = draw.choices(["certified", "misclassified", "abstained"], [90, 7, 3], k=count)
    rows = [row(i, round(draw.gammavariate(3, scale / 3), 6), kind, prediction=4 if kind == "misclassified" else 3) for i, kind in enumerate(kinds)]
    return Run(name, manifest(data={"spec": "digits", "sha256": "ab12" * 16, "count": count}, **more), rows)


def unlabelled(name="unlabelled"):
    return Run(name, manifest(data={"count": 3}), [row(0, 0.5, label=None), row(1, 0.25, label=None), row(2, 0.0, label=None)])


def printed(runs, radii, width=80):
    console = Console(file=io.StringIO(), width=width)
    print_table([summarize(run, radii) for run in runs], radii, console)
    return console.file.getvalue()


# numbers


def test_the_numbers_of_five_rows_are_those_found_by_hand():
    summary = summarize(five(), [0.0, 0.1, 0.25, 0.4999, 0.5])
    assert summary.clean == 3 / 5
    assert summary.certified == (3 / 5, 2 / 5, 1 / 5, 1 / 5, 0.0)  # strictly greater: 0.1, 0.25 and 0.5 do not count at themselves
    assert summary.median_radius == 0.1  # of 0, 0, 0.1, 0.25, 0.5
    assert (summary.count, summary.expected, summary.abstained, summary.errors) == (5, 5, 1, 0)
    assert (summary.guarantee, summary.bound, summary.norm) == ("proof", 1.0000003, "2")


def test_an_error_counts_as_not_right_and_not_certified():
    run = five()
    failed = Run("failed", run.manifest, [*run.rows[:4], {"index": 4, "status": "error", "message": "out of memory"}])
    summary = summarize(failed, [0.0])
    assert (summary.clean, summary.certified, summary.errors) == (3 / 5, (3 / 5,), 1)
    assert any("1 of 5 inputs ended in an error" in note for note in notes([summary]))


def test_inputs_without_labels_have_radii_but_no_accuracies():
    summary = summarize(unlabelled(), [0.0, 0.3])
    assert (summary.clean, summary.certified, summary.median_radius) == (None, (None, None), 0.25)
    line = next(line for line in printed([unlabelled()], [0.0, 0.3]).splitlines() if line.startswith("unlabelled"))
    assert line.split() == ["unlabelled", "proof", "-", "-", "-", "0.2500", "1.0001"]
    assert curve(unlabelled()) == ([0.0, 0.25, 0.5], [2 / 3, 1 / 3, 0.0])


def test_a_certified_row_whose_prediction_is_not_its_label_does_not_count():
    run = Run("wrong", manifest(), [row(0, 1.0), row(1, 1.0, prediction=4)])
    assert summarize(run, [0.5]).certified == (0.5,)
    assert curve(run)[1][0] == 0.5


@pytest.mark.parametrize(
    ("selection", "count", "expected", "said"),
    [
        (None, 9, 9, "5 of 9 inputs are done"),
        ([0, 1, 2, 3, 4, 8], 9, 6, "5 of 6 inputs are done"),
        ([0, 1, 2, 3, 4], 9, 5, None),
        ([0], 9, 1, "5 rows for 1 inputs"),
    ],
)
def test_a_run_that_is_not_finished_says_so(selection, count, expected, said):
    summary = summarize(five(selection=selection, data={"count": count}), [0.0])
    assert summary.expected == expected
    assert summary.clean == 3 / 5  # of the rows that are there
    assert as_json([summary], [0.0])["runs"][0]["complete"] is (said is None)
    told = [note for note in notes([summary]) if "abstained" not in note]
    assert (not told) if said is None else (len(told) == 1 and said in told[0])
    assert said is None or said in " ".join(printed([five(selection=selection, data={"count": count})], [0.0]).split())


def test_a_run_without_rows_and_with_an_empty_manifest_is_shown():
    run = Run("empty", {}, [])
    summary = summarize(run, [0.1])
    assert (summary.clean, summary.certified, summary.median_radius, summary.bound, summary.guarantee) == (None, (None,), None, None, "-")
    assert curve(run) == ([0.0], [0.0])
    assert "empty: no input is done yet." in printed([run], [0.1])
    assert tsv(run) == "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    assert_whole(html([run], [0.1], "t"))
    assert_whole(html([], [0.1], "t"))


def test_the_weakest_guarantee_is_the_one_that_is_shown():
    for weak in ("probabilistic", "attack", "estimate", "wishful"):
        run = Run("mixed", manifest(), [row(0, 1.0, guarantee="proof"), row(1, 1.0, guarantee=weak)])
        assert summarize(run, []).guarantee == weak
    for weak in ("attack", "estimate", "wishful"):
        run = Run("weak", manifest(guarantee=weak), [row(0, 1.0)])
        assert any("nothing is certified" in note for note in notes([summarize(run, [])]))
        page = html([run], [0.1], "t")
        assert "certifies nothing" in page
        assert "does not change" not in page
        assert '<dl class="tiles">' not in page


def test_runs_that_cannot_be_compared_are_said_to_be():
    assert notes([summarize(many("a"), []), summarize(many("b", norm="inf"), [])])[-1].startswith("The runs measure perturbations in different norms")
    assert notes([summarize(many("a"), []), summarize(many("b", count=20), [])])[-1].startswith("The runs are not on the same inputs")


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_the_share_of_rows_with_a_greater_radius_at_every_radius(seed):
    run = many(seed=seed, count=37)
    radii, shares = curve(run)
    beyond = [entry["radius"] if entry["status"] == "certified" else 0.0 for entry in run.rows]
    assert radii == sorted(set(radii))
    assert radii[0] == 0.0
    for radius in [*beyond, *(value + 1e-9 for value in beyond), *(max(0.0, value - 1e-9) for value in beyond), 99.0]:
        place = max(i for i, start in enumerate(radii) if start <= radius)
        assert shares[place] == sum(value > radius for value in beyond) / len(beyond) == summarize(run, [radius]).certified[0]


def test_a_radius_without_end_stays_in_the_curve_and_is_no_median_of_its_own():
    run = Run("endless", manifest(), [row(0, math.inf), row(1, 0.5)])
    assert curve(run) == ([0.0, 0.5], [1.0, 0.5])
    assert summarize(run, []).median_radius == 0.5
    assert_whole(html([run], [0.1], "t"))
    assert "inf" in tsv(run)


@pytest.mark.parametrize("bad", [math.nan, -0.5, None, "0.5"])
def test_what_is_not_a_radius_counts_as_zero(bad):
    assert summarize(Run("odd", manifest(), [{**row(0), "radius": bad}]), [0.0]).certified == (0.0,)


# rounding


def test_shares_are_never_rounded_up():
    assert [percent(share) for share in (0.9999, 1.0, 0.0, 0.57, 0.29, 2 / 3, None)] == ["99.9 %", "100.0 %", "0.0 %", "57.0 %", "29.0 %", "66.6 %", "-"]
    for count in (3, 7, 360, 1000, 10_000):
        for right in range(0, count + 1, max(1, count // 500)):
            assert Fraction(percent(right / count)[:-2]) == Fraction(1000 * right // count, 10)


def test_radii_are_rounded_down_and_bounds_up():
    assert [radius_text(value) for value in (0.57, 0.99999, 12.34567, 0.0, 0.00123456, 3.9999e-7, math.inf, None)] == [
        "0.5700", "0.9999", "12.3456", "0", "0.00123", "3.99e-7", "inf", "-",
    ]  # fmt: skip
    assert [bound_text(value) for value in (1.0, 1.0000003, 21.11, 0.1 + 0.2, 99999.1, 123456.7, 1e-9, math.inf, None)] == [
        "1", "1.0001", "21.11", "0.30001", "1.0000e+5", "1.2346e+5", "1.0000e-9", "inf", "-",
    ]  # fmt: skip
    assert bound_text(1.0000003, digits=9) == "1.0000003"
    draw = random.Random(0)
    for _ in range(2000):
        value = 10 ** draw.uniform(-12, 12)
        assert value * (1 - 0.01) <= float(radius_text(value)) <= value <= float(bound_text(value)) <= value * (1 + 1e-3)


@pytest.mark.parametrize(("text", "value"), [("36/255", 36 / 255), ("0.25", 0.25), ("0", 0.0), ("1e-3", 0.001), (" 1 / 4 ", 0.25)])
def test_a_radius_is_a_number_or_a_fraction_and_is_shown_as_it_was_written(text, value):
    assert parse_radius(text) == value
    assert float(Fraction(radius_label(value))) == value


@pytest.mark.parametrize("text", ["", "x", "-1", "1/0", "nan", "inf", "1/nan", "1/2/3", "1/", "1e308/1e-308", "-1/-0"])
def test_what_is_no_radius_is_refused_in_one_sentence(text):
    with pytest.raises(ValueError, match=r"is not a radius; write .* such as 0.25 or 36/255") as caught:
        parse_radius(text)
    assert repr(text) in str(caught.value)


# table


def test_the_table_fits_80_columns_and_has_no_colour_codes():
    runs = [many("sandwich"), many("almost orthogonal, 12 layers", 1), many("smoothed", 2, guarantee="probabilistic", bound=None), many(HOSTILE, 3)]
    radii = [36 / 255, 0.25, 0.5]
    text = printed(runs, radii)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "[red]" in "".join(text.split())  # a name is no markup
    for summary in (summarize(run, radii) for run in runs):
        for number in (percent(summary.clean), *map(percent, summary.certified), radius_text(summary.median_radius), bound_text(summary.bound)):
            assert number in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_every_number_of_eight_radii_is_whole_at_every_width(width):
    radii = [place / 16 for place in range(1, 9)]
    runs = [many("sandwich"), many("a-long-name-without-any-space-in-it", 1), many("smoothed", 2, guarantee="probabilistic")]
    text = printed(runs, radii, width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    assert all(f"r={radius_label(radius)}" in words for radius in radii)
    for summary in (summarize(run, radii) for run in runs):
        shares = [percent(share).split()[0] for share in (summary.clean, *summary.certified)]
        assert all(number in words for number in (*shares, radius_text(summary.median_radius), bound_text(summary.bound), summary.guarantee))


# page


class Whole(HTMLParser):
    """Fails on a tag that is not closed, or closed in the wrong order; gathers ids, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.attributes, self.text, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def assert_whole(page):
    found = Whole()
    found.feed(page)
    found.close()
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "iframe", "link", "object", "embed", "img", "base", "form"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert all(value.startswith("#") and value[1:] in found.ids for name, value in found.attributes if name.endswith("href") or name == "src")
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(found.ids)
    assert not re.search(r"""https?://|@import|url\((?!#)|<script|javascript:""", page)
    return found


RUNS = [
    many("sandwich"),
    many("aol", 1, scale=0.3),
    many("smoothed", 2, guarantee="probabilistic", failure=0.001, method="Smoothing(sigma=0.25)", bound=None),
    unlabelled(),
]
RADII = [36 / 255, 0.25, 0.5]


@pytest.fixture(scope="module")
def page():
    return html(RUNS, RADII, "Four classifiers")


def test_the_page_is_whole_and_refers_to_nothing_outside_itself(page):
    found = assert_whole(page)
    drawings = len(re.findall(r"<figure", page))
    assert drawings >= 1 + len(RUNS)
    assert len(re.findall(r'role="img" aria-label="[^"]+"', page)) == drawings  # each says what it is
    known = set(re.findall(r"--([a-z0-9]+):", page))
    assert set(re.findall(r"var\(--([^)]*)\)", page)) <= known  # colours are the page's, for light and dark
    assert {*INKS, "c"} <= known
    assert {found.split(":")[1].strip() for found in re.findall(r"(?:fill|stroke): ?[^;\"]+", page.split("</style>")[1])} <= {
        "none",
        *(f"var(--{name})" for name in INKS),
    }
    assert ("name", "viewport") in found.attributes


def test_the_page_has_every_number_of_the_summaries_and_of_the_curves(page):
    text = " ".join(" ".join(assert_whole(page).text).split())
    for run in RUNS:
        summary = summarize(run, RADII)
        usual = summarize(run, sorted({*RADII, *usual_radii(["2"])}))
        row_of_table = [percent(share) for share in (summary.clean, *usual.certified)] + [
            radius_text(summary.median_radius),
            bound_text(summary.bound),
            str(summary.abstained),
            str(summary.errors),
        ]
        assert " ".join(row_of_table) in text
        assert all(str(value) in text for value in (summary.name, summary.method, summary.guarantee, summary.count))
    for radius in (0, 1):
        line = " ".join(percent(summarize(Run("", {}, [{**entry, "label": entry["label"] or 3} for entry in run.rows]), [radius]).certified[0]) for run in RUNS)
        assert f" {radius} {line} " in text
    for fact in (
        "9f3c" * 16,
        "ab12" * 16,
        "certify run 'a b.safetensors'",
        "torch 2.13.0",
        "Seed 7",
        "REAL_ARITHMETIC",
        "The stored weights in exact arithmetic.",
        "1.0000003",
    ):
        assert fact in text
    for note in notes([summarize(run, RADII) for run in RUNS]):
        assert note in text


def test_the_page_says_what_a_certificate_means(page):
    text = " ".join(" ".join(assert_whole(page).text).split())
    assert "for every perturbation of l2 norm below the radius the prediction of the network does not change (real arithmetic, see assumptions)" in text
    assert (
        "with probability at least 1 - 0.001, for every perturbation of l2 norm below the radius the prediction of the smoothed classifier does not change"
        in text
    )


def test_the_page_begins_with_the_best_proof_and_not_with_a_better_chance():
    better = many("chance", scale=5.0, guarantee="probabilistic", failure=0.001)
    text = " ".join(" ".join(assert_whole(html([many("weaker", scale=0.1), many("proved"), better], [0.0, 0.25], "t")).text).split())
    assert f"On {percent(summarize(many(), [0.25]).certified[0])} of 360 inputs, proved gives the right answer and certifies that no" in text


def test_the_page_is_the_same_every_time_and_leaves_settings_alone(page):
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert html(RUNS, RADII, "Four classifiers") == page
        assert dict(matplotlib.rcParams) == before


def test_hostile_text_stays_text():
    parts = [{"name": HOSTILE, "type": HOSTILE, "value": 2.0, "how": HOSTILE}]
    told = {
        "model": {"spec": HOSTILE, "sha256": HOSTILE},
        "data": {"spec": HOSTILE, "sha256": HOSTILE, "count": 360},
        "method": HOSTILE,
        "norm": HOSTILE,
        "bound": {"value": 2.0, "method": HOSTILE, "norm": [HOSTILE], "domain": HOSTILE, "parts": parts},
        "assumptions": [HOSTILE],
        "assumption_sentences": {HOSTILE: HOSTILE},
        "argv": [HOSTILE],
        "versions": {HOSTILE: HOSTILE},
        "device": HOSTILE,
        "input": {"range": [0, 1], "units": HOSTILE},
    }
    for guarantee in ("proof", HOSTILE):
        rows = many().rows
        text = html([Run(HOSTILE, {**manifest(guarantee=guarantee), **told}, [*rows, {"index": 360, "status": HOSTILE}])], RADII, HOSTILE)
        found = assert_whole(text)
        assert not {"\x1b", "\x00"} & set(text)
        assert stdlib_html.escape("<script>alert(") in text
        assert "{{ 7*7 }}" in "".join(found.text)


def test_the_page_does_without_any_key_of_the_manifest():
    whole = manifest()
    for key in whole:
        assert_whole(html([Run("less", {name: value for name, value in whole.items() if name != key}, five().rows)], [0.1], "t"))
    assert_whole(html([Run("least", {"model": {"spec": "x"}}, five().rows)], [], "t"))
    assert_whole(html([five(bound={"value": 2.0})], [0.1], "t"))


def linear_light(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]


def test_the_colours_can_be_seen_on_light_and_on_dark():
    def luminance(colour):
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear_light(colour), strict=True))

    for ground, colours in COLOURS.items():
        for colour in colours:
            dark, light = sorted((luminance(colour), luminance(GROUNDS[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, ground)


# Machado, Oliveira & Fernandes 2009, at full severity, of linear light.
SEEN = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
XYZ = ((0.4124 / 0.9505, 0.3576 / 0.9505, 0.1805 / 0.9505), (0.2126, 0.7152, 0.0722), (0.0193 / 1.089, 0.1192 / 1.089, 0.9505 / 1.089))


@pytest.mark.parametrize("eyes", SEEN)
def test_the_colours_are_apart_whatever_eyes_one_has(eyes):
    def times(matrix, vector):
        return [min(1.0, max(0.0, sum(a * b for a, b in zip(line, vector, strict=True)))) for line in matrix]

    def lab(colour):
        x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in times(XYZ, times(SEEN[eyes], linear_light(colour))))
        return 116 * y - 16, 500 * (x - y), 200 * (y - z)

    for colours in COLOURS.values():
        assert len(colours) == plots.COLOURS
        for one, other in itertools.combinations(colours, 2):
            assert math.dist(lab(one), lab(other)) > 15, (one, other)  # 2 can just be seen


# other forms


def test_tsv_says_the_same_as_the_rows():
    run = Run(
        "tsv",
        manifest(),
        [row(2, 0.1234569, seconds=61.5), row(0, 0.9, "misclassified", prediction=4), row(1, 0.7, "abstained"), {"index": 3, "status": "error"}],
    )
    lines = [line.split("\t") for line in tsv(run).splitlines()]
    assert lines == [
        ["idx", "label", "predict", "radius", "correct", "time"],
        ["0", "3", "4", "0.900000", "0", "0:00:00.002000"],
        ["1", "3", "-1", "0.000000", "0", "0:00:00.002000"],
        ["2", "3", "3", "0.123456", "1", "0:01:01.500000"],
        ["3", "-1", "-1", "0.000000", "0", "0:00:00"],
    ]


def test_tsv_read_back_gives_the_same_accuracies():
    run = many()
    entries = [dict(zip(("idx", "label", "predict", "radius", "correct", "time"), line.split("\t"), strict=True)) for line in tsv(run).splitlines()[1:]]
    for radius in (0.0, 0.1, 0.5):
        share = sum(entry["correct"] == "1" and float(entry["radius"]) > radius for entry in entries) / len(entries)
        assert share == summarize(run, [radius]).certified[0]
    assert [int(entry["idx"]) for entry in entries] == [entry["index"] for entry in run.rows]
    assert all(datetime.datetime.strptime(entry["time"], "%H:%M:%S.%f").microsecond == 2000 for entry in entries)


@pytest.mark.parametrize("guarantee", ["attack", "estimate"])
def test_tsv_refuses_radii_that_are_no_certificates(guarantee):
    with pytest.raises(ValueError, match="columns are for certified radii"):
        tsv(five(guarantee=guarantee))


def test_json_has_the_numbers_unrounded_and_nothing_that_json_has_not():
    endless = Run("endless", manifest(), [row(0, math.inf)])
    found = json.loads(json.dumps(as_json([summarize(run, RADII) for run in (five(), endless)], RADII), allow_nan=False))
    assert found["radii"] == RADII
    assert found["runs"][0]["certified"] == [0.4, 0.2, 0.0]
    assert (found["runs"][0]["bound"], found["runs"][1]["median_radius"]) == (1.0000003, None)
    assert found["notes"]


def test_importing_the_report_waits_for_neither_matplotlib_nor_jinja2_nor_torch():
    code = "import sys, certify.report; print(sorted({'matplotlib', 'jinja2', 'torch', 'numpy'} & set(sys.modules)))"
    root = pathlib.Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True).stdout == "[]\n"


# radii of something that is no norm


def test_a_radius_in_no_norm_is_named_in_words_wherever_it_is_shown():
    measure = "|ln contrast factor|"
    folder = many("c", norm=measure, guarantee="probabilistic", method="Smoothing(noise=Contrast(sigma=0.2))", failure=0.001, bound=None)
    text = printed([folder], [0.1])
    assert f"certified beyond that radius ({measure})" in " ".join(text.split())
    assert "norm" not in text
    assert "units of the input" not in " ".join(text.split())
    page = html([folder], [0.1], "t")
    assert f"for every change of &#34;{measure}&#34; below the radius" in page
    assert f"no change of &#34;{measure}&#34; up to 0.1" in page
    assert f"Units of the radii: those of {measure}." in page
    assert f"radius ({measure})" in page
    assert not re.search(r"\bl2\b|norm, units|perturbation", re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL))
    both = [folder, many("d")]
    assert notes([summarize(run, [0.1]) for run in both])[-1].startswith("The runs measure perturbations in different norms")
    assert f"l2 norm, units of the input; {measure}" in " ".join(printed(both, [0.1]).split())
    apart = html(both, [0.1], "t")
    assert f"<h2>All runs ({measure})</h2>" in apart
    assert "<h2>All runs (l2 norm, units of the input)</h2>" in apart
    for norm in (measure, "1", "number of changed pixels, inclusive"):
        with pytest.raises(ValueError, match="takes its radii for l2"):
            tsv(many("c", norm=norm))
