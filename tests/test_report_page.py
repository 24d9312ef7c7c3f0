"""The page of certify report: drawings claim no more than the rows, one norm to a plot, damage is named by file and line, a browser shows it."""

from __future__ import annotations

import html as stdlib_html
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import torch
from test_graph import Residual
from test_report import HOSTILE, assert_whole, manifest, many, row
from torch import nn

from certify import lipschitz
from certify.cli import main
from certify.cli.lipschitz import bound_json
from certify.errors import CertifyError
from certify.report import Run, bound_text, curve, histograms, html, plots, radius_text, summarize, usual_radii
from certify.report.folder import read
from certify.report.sandwich import sandwiches

PARTS = [
    {"name": "0", "type": "Conv2d", "depth": 0, "value": 3.0, "how": "conv2d 3x3"},
    {"name": "1", "type": None, "depth": 0, "value": 4.5, "how": "sum"},
    {"name": "1.0", "type": "Conv2d", "depth": 1, "value": 2.5, "how": "conv2d 3x3"},
    {"name": "1.1", "type": "Identity", "depth": 1, "value": 2.0, "how": "identity"},
    {"name": "2", "type": "ReLU", "depth": 0, "value": 1.0, "how": "slopes in [0, 1]"},
    {"name": "3", "type": "Linear", "depth": 0, "value": 0.1, "how": "linear"},
]


def bound(value, method="Layerwise()", parts=PARTS):
    return {"value": value, "method": method, "norm": [2, 2], "domain": "Everywhere()", "assumptions": [], "parts": parts, "network": "ab" * 32}


def attack(run, seed=0, name="attacked", closer=()):
    """Distances above every certified radius of a run, except for the inputs that are named."""
    draw = random.Random(seed)
    rows = []
    for found in run.rows:
        right = found["status"] != "misclassified" and draw.random() < 0.9
        survived = right and draw.random() < 0.1
        distance = found["radius"] * (0.5 if found["index"] in closer else draw.uniform(1.0, 3.0)) if right else 0.0
        status = "survived" if survived else "attacked" if right else "misclassified"
        rows.append({**found, "status": status, "guarantee": "attack", "radius": None if survived else distance})
    return Run(name, {**run.manifest, "method": "PGD()", "guarantee": "attack", "bound": None}, rows)


def written(folder, run):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(run.manifest))
    (folder / "part-0.jsonl").write_text("".join(json.dumps(found) + "\n" for found in run.rows))
    return folder


def shown(*runs):
    return [plots.shown(place, run, summarize(run, ())) for place, run in enumerate(runs)]


def words(page):
    return " ".join(stdlib_html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL))).split())


# what drawings and their tables claim


def corners(path):
    """The points of a drawn line, or of a filled shape."""
    return [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path)]


def painted(drawing, colour):
    """The marks in this colour: the beginning of each, with its path where it has one of its own."""
    return [tag for tag in re.findall(r"<(?:path|use)[^>]*>", drawing) if re.search(rf"(fill|stroke): var\(--{colour}\)", tag)]


@pytest.mark.parametrize("seed", range(6))
def test_a_drawn_curve_of_certificates_is_never_above_the_rows_and_that_of_an_attack_never_below(seed):
    proof = many(seed=seed, count=500, scale=10.0 ** random.Random(seed).uniform(-3, 2))
    far = [many("far", seed, 500, 10.0**4)] if seed > 3 else []  # then the scale is logarithmic
    items = shown(proof, attack(proof, seed), *far)
    drawing = plots.curves(items, []).drawing
    room = corners(re.search(r'id="curves-A-patch_2">\s*<path d="([^"]*)"', drawing)[1])
    (left, bottom), (right, top) = room[0], room[2]
    x = plots._radius_scale(items)
    assert x.log == bool(far)
    radii = x.edges(1000)
    for item, sign in zip(items, (1, -1, 1), strict=False):
        (path,) = [tag for tag in painted(drawing, item.colour) if "stroke-width: 2" in tag]
        points, steps = corners(path), curve(item.run)
        drawn, exact = [], []
        for place, radius in enumerate(radii):
            across = left + (right - left) * place / 1000
            drawn.append((bottom - [y for x, y in points if x <= across + 1e-5][-1]) / (bottom - top))
            exact.append([share for start, share in zip(*steps, strict=True) if start <= radius][-1])
        assert all(sign * (ours - share) <= 1e-6 for ours, share in zip(drawn, exact, strict=True))
        columns = zip(drawn, exact[2:], strict=False) if sign > 0 else zip(drawn[2:], exact, strict=False)
        assert all(sign * (ours - share) >= -1e-6 for ours, share in columns)  # and no more than a five hundredth of the width from them


def test_the_table_beside_a_curve_has_the_accuracies_of_the_rows():
    proof = many(count=300)
    plot = plots.curves(shown(proof, attack(proof)), usual_radii(["2"]))
    radii = {label: float(Fraction(label)) for label, *_ in plot.rows}
    assert {"0", "36/255", "72/255", "108/255", "1"} <= set(radii)
    for label, certified, attacked in plot.rows:
        exact = [1000 * summarize(run, [radii[label]]).certified[0] for run in (proof, attack(proof))]
        assert (certified, attacked) == (f"{math.floor(exact[0] + 1e-9) / 10:.1f} %", f"{math.ceil(exact[1] - 1e-9) / 10:.1f} %")


@pytest.mark.parametrize("seed", range(5))
def test_a_sandwich_has_the_best_certificate_and_the_nearest_attack_of_each_input(seed):
    weak, strong = many("weak", seed, 60), many("strong", seed + 9, 60)
    best = Run("best", weak.manifest, [max(pair, key=lambda found: found["radius"]) for pair in zip(weak.rows, strong.rows, strict=True)])
    far, near = attack(best, 1, "far"), attack(best, 2, "near")
    ((proofs, attacks, found),) = sandwiches([far, weak, strong, near])
    assert ([run.name for run in proofs], [run.name for run in attacks]) == (["weak", "strong"], ["far", "near"])
    assert len({entry.index for entry in found}) == len(found) > 30
    for entry in found:
        ours = [run.rows[entry.index] for run in (weak, strong)]
        theirs = [run.rows[entry.index] for run in (far, near) if run.rows[entry.index]["status"] in ("attacked", "survived")]
        assert entry.radius == max(one["radius"] if one["status"] == "certified" else 0.0 for one in ours)
        assert entry.distance == min(math.inf if one["radius"] is None else one["radius"] for one in theirs)
    assert [entry.distance for entry in found] == sorted(entry.distance for entry in found)
    assert sandwiches([far, near, weak, many("other", model={"sha256": "00"})])[0][0] == [weak]
    assert sandwiches([attack(many("linf", norm="inf")), weak]) == []


def test_a_distance_beyond_the_edge_of_a_sandwich_is_said_to_be():
    proof = many(count=60)
    far = attack(proof)
    next(found for found in far.rows if found["status"] == "attacked")["radius"] = 1e4
    (((_, _, found),), items) = sandwiches([proof, far]), shown(proof, far)
    assert "1 with a point beyond the upper edge" in plots.sandwich(found, {item.summary.name: item for item in items}).caption


def test_a_contradiction_is_named_and_red_and_the_page_begins_with_nothing_else():
    proof = many("proved", count=40)
    inside = [found["index"] for found in proof.rows if found["status"] == "certified"][:3]
    against = attack(proof, closer=inside)
    closer = [index for index in inside if against.rows[index]["status"] == "attacked"]
    page = html([proof, against], [], "t")
    assert len(closer) >= 2
    assert f"{len(closer)} contradictions" in words(page)
    crosses = re.search(r'id="sandwich-A-B-contradictions">(.*?)</g>', page, re.DOTALL)[1]
    assert crosses.count("<use") == len(closer)
    assert len([tag for tag in painted(page, "weak") if "stroke-width: 2.5" in tag and "<path" in tag and "clip-path" in tag]) == len(closer)
    for index in closer:
        assert f"input {index}: proved certifies" in words(page)
    assert '<dl class="tiles">' not in page
    assert "does not hold as it stands" in words(page)
    assert "contradictions" not in html([proof, attack(proof)], [], "t")
    assert "does not hold" not in html([proof, attack(proof)], [], "t")


def test_a_waterfall_multiplies_parts_and_not_those_inside_of_a_sum():
    items = shown(many("layers", bound=bound(1.35)), many("whole", bound=bound(0.7, "LipSDP()", [])))
    plot = plots.waterfall(PARTS, [(item, item.summary.bound) for item in items])
    assert [cells[3] for cells in plot.rows] == ["3", "13.5", "7.5", "6", "13.5", "1.35"]
    assert [cells[0] for cells in plot.rows] == ["0", "1", "\N{MIDDLE DOT} 1.0", "\N{MIDDLE DOT} 1.1", "2", "3"]
    assert (len(painted(plot.drawing, "grows")), len(painted(plot.drawing, "shrinks"))) == (4, 1)  # all but the ReLU, which changes nothing
    assert len(painted(plot.drawing, "c0")) == len(painted(plot.drawing, "c1")) == 2  # a bar and an upright line
    for tag, (before, after) in zip(painted(plot.drawing, "grows"), ((1, 3), (3, 13.5), (3, 7.5), (3, 6)), strict=True):
        (start, end), (one, three) = sorted({x for x, _ in corners(tag)}), sorted({x for x, _ in corners(painted(plot.drawing, "grows")[0])})
        assert (end - start) / (three - one) == pytest.approx(math.log(after / before) / math.log(3), abs=1e-6)
        assert (start - one) / (three - one) == pytest.approx(math.log(before) / math.log(3), abs=1e-6)
    page = html([item.run for item in items], [], "t")
    assert page.count("Lipschitz bound from layer to layer") == 1  # one network, two bounds of it
    assert plots.waterfall([], []) is None
    assert plots.waterfall([{"name": "0", "value": 1e200}] * 9, []).rows[-1][3] == "-"  # beyond what is followed, no number is given
    assert len(painted(plots.waterfall([{"name": str(i), "value": 2.0} for i in range(90)], []).drawing, "grows")) == 40


def test_a_waterfall_begins_each_branch_where_its_sum_does():
    """(2 + (3 * 5 + 4)) * 7, after a layer of 10, as the bounds of a residual network list it: the first branch has the second's beginning in it."""
    listed = [(0, 10, "a"), (0, 21, "sum"), (1, 2, "b"), (1, 19, "sum"), (2, 15, "composition"), (3, 3, "c"), (3, 5, "d"), (2, 4, "e"), (0, 7, "f")]
    parts = [{"name": how, "depth": depth, "value": float(value), "how": how} for depth, value, how in listed]
    plot = plots.waterfall(parts, [])
    assert [cells[3] for cells in plot.rows] == ["10", "210", "20", "190", "150", "30", "150", "40", "1470"]
    assert len(painted(plot.drawing, "grows")) == 8  # the composition is its parts


def test_a_waterfall_of_a_residual_network_ends_at_its_bound():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), Residual(), nn.ReLU(), Residual(), nn.Linear(4, 3)).eval()
    found = lipschitz(net, input_shape=(4,))
    parts = bound_json(found)["parts"]
    assert {"sum", "composition"} & {part["how"] for part in parts}
    assert plots.waterfall(parts, []).rows[-1][3] == bound_text(found.value)


def test_histograms_count_every_row_once():
    draw = random.Random(0)
    run = many(count=700)
    run = Run("m", run.manifest, [{**found, "margin": draw.choice([0.0, 1e-3, draw.expovariate(1), 1e6])} for found in run.rows])
    run.rows[5].update(status="error", label=None)
    run.rows[6].update(radius=0.0, status="certified", prediction=3)
    for each in (run, attack(run), many("huge", scale=1e28)):
        (item,) = shown(each)
        assert sum(int(cells[-1]) for cells in histograms.radii(item, plots.reach([item])).rows) == len(each.rows)
    plot = histograms.margins(*shown(run))
    right = sum(found["prediction"] == found["label"] for found in run.rows)
    assert [sum(int(cells[place]) for cells in plot.rows) for place in (1, 2, 3)] == [right, 699 - right, 1]
    assert histograms.margins(*shown(many())) is None


def test_abstentions_stand_beside_the_radii_of_a_smoothed_classifier():
    run = many("s", guarantee="probabilistic", failure=0.001, method="Smoothing(noise=Gaussian(sigma=0.25))", bound=None)
    count = sum(found["status"] == "abstained" for found in run.rows)
    page = words(html([run], [], "t"))
    assert f"Under none: {sum(found['status'] == 'misclassified' for found in run.rows)} misclassified, {count} abstained." in page
    assert "probabilistic of the smoothed classifier" in page
    assert "Over all 360 inputs, at most 0.36 of them are expected to be wrong." in page


def test_margins_that_cannot_change_have_radii_beyond_every_edge(tmp_path):
    """What a last layer of zeros gives: the largest float64."""
    endless = [row(index, sys.float_info.max, margin=1.0) for index in range(9)]
    mixed = [*endless[:2], *(row(index, 0.1 * index, margin=1.0) for index in range(2, 9))]
    runs = [Run("endless", manifest(data={"count": 9}), endless), Run("mixed", manifest(data={"count": 9}), mixed)]
    page = words(html([read(written(tmp_path / run.name, run)) for run in runs], [], "t"))
    assert "9 are beyond the right edge" in page
    assert "2 are beyond the right edge" in page
    assert "100.0 % 100.0 % 100.0 % 100.0 % 1.79769e+308" in page
    assert plots.reach(shown(*runs)) == 0.8
    largest = sys.float_info.max
    every = Run("all", manifest(bound=bound(largest)), [row(i, 0.1 * i, margin=largest * (i > 0), seconds=largest) for i in range(5)])
    assert_whole(html([every, runs[1], attack(every)], [], "t"))


def test_time_and_tightness_are_of_runs_that_certify():
    proof = many("p")
    slow = Run("slow", proof.manifest, [{**found, "seconds": 2.5} for found in many("slow", 1).rows])
    plot = plots.costs(shown(proof, slow, attack(proof)))
    assert [cells[:2] for cells in plot.rows] == [("A p", "2 ms"), ("B slow", "2.5 s")]
    assert plot.rows[0][3] == radius_text(summarize(proof, ()).median_radius)
    assert plots.costs(shown(proof, attack(proof))) is None


def test_norms_never_share_a_drawing_or_a_table(tmp_path, capsys):
    runs = [many("two"), many("inf", norm="inf", scale=0.03), many("words", norm="|ln gamma|"), many("two2", 3)]
    page = html(runs, [], "t")
    drawings = re.findall(r'aria-label="Accuracy against radius, ([^"]*)"', page)
    assert drawings == ["A: two, B: two2", "C: inf", "D: words"]
    sections = [section.split("<figcaption>")[0] for section in page.split('aria-label="Accuracy against radius')[1:]]
    assert [len({colour for colour in "012345" if painted(section, f"c{colour}")}) for section in sections] == [2, 1, 1]
    sections = page.split("<h2>All runs (")
    assert "r = 36/255" in sections[1]
    assert "r = 2/255" not in sections[1]
    assert "r = 2/255" in sections[2]
    assert "r = 36/255" not in sections[2].split("</table>")[0]
    folders = [str(written(tmp_path / run.name, Run("", run.manifest, [{**found, "norm": run.manifest["norm"]} for found in run.rows]))) for run in runs[:2]]
    assert main(["report", *folders]) == 0
    two, inf = capsys.readouterr().out.split("linf norm")[0].rsplit("\nrun ", 1)
    assert "r=108/255" in two
    assert "r=8/255" not in two
    assert "r=8/255" in inf
    assert "r=108/255" not in inf


def test_what_is_near_chance_is_pointed_out():
    rows = [row(i, 0.1, "certified" if i % 10 == 0 else "misclassified", label=i % 10, prediction=0) for i in range(100)]
    run = Run("guess", manifest(data={"count": 100}), rows)
    assert summarize(run, ()).near_chance
    assert "guess: clean accuracy 10.0 % is near that of guessing" in words(html([run], [], "t"))
    assert not summarize(many(), ()).near_chance


def test_what_the_inputs_go_through_is_said():
    model = {"spec": "n.pth", "sha256": "ab" * 32, "arch": "mlp", "input_shape": [3, 8, 8]}
    page = words(html([many(model={**model, "mean": [0.5, 0.25], "std": [0.2, 0.1]})], [], "t"))
    assert "n.pth, sha256 abababababab, architecture mlp, inputs 3 × 8 × 8" in page
    assert "the mean 0.5, 0.25 is subtracted, and what is left divided by 0.2, 0.1" in page
    normalised = bound(1.0, parts=[{"name": "0", "type": "Normalize", "depth": 0, "value": 2.0, "how": "scales by 2"}])
    both = words(html([many(model=model, bound=normalised), many("b", 1, model=model, bound=None)], [], "t"))
    assert both.count("inside the network (scales by 2)") == 1  # one model, said once
    assert "none outside" not in both
    said = words(html([many(model={**model, "input_range": [0.0, 16.0], "bgr": True, "layout": "nhwc"})], [], "t"))
    assert "turned round (blue, green, red), then the range 0 to 1 becomes 0 to 16, then the channels come last, as the first layers" in said


def test_ten_thousand_inputs_make_a_small_page():
    proof = many("a", 0, 10_000)
    start = time.process_time()
    runs = [proof, many("b", 1, 10_000), attack(proof, closer=range(0, 10_000, 3)), attack(proof, 1, "again")]
    page = html(
        [Run(run.name, run.manifest, [{**found, "margin": 3 * found["radius"] if found["radius"] else 0.1} for found in run.rows]) for run in runs], [], "t"
    )
    assert len(page) < 700_000
    assert time.process_time() - start < 20


# folders


def broken(tmp_path, line=None, **changes):
    """A folder whose third row, or its line, is another; then the sentence that refuses it."""
    run = many(count=5)
    folder = written(tmp_path / "a", run)
    lines = (folder / "part-0.jsonl").read_text().splitlines()
    found = {**run.rows[2], **changes}
    lines[2] = line if line is not None else json.dumps({key: value for key, value in found.items() if value is not Ellipsis})
    (folder / "part-0.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"radius": -0.1}, "radius is -0.1"),
        ({"radius": math.nan}, "radius is nan"),
        ({"radius": math.inf}, "radius is inf"),
        ({"line": '{"index": 2, "status": "certified", "radius": 1e999}'}, "radius is inf"),
        ({"radius": 10**400}, "radius is a number of many digits"),
        ({"radius": "0.5"}, "radius is '0.5'"),
        ({"radius": True}, "radius is True"),
        ({"radius": [0.5]}, r"radius is \[0.5\]"),
        ({"radius": ..., "status": "certified"}, "there is no radius"),
        ({"radius": None, "status": "certified"}, "there is no radius"),
        ({"index": ...}, "there is no index"),
        ({"index": -1}, "index is -1"),
        ({"index": 2.0}, "index is 2.0"),
        ({"index": 1}, "input 1 has another row"),
        ({"status": ...}, "there is no status"),
        ({"status": 7}, "status is 7"),
        ({"label": "3"}, "label is '3'"),
        ({"prediction": 3.5}, "prediction is 3.5"),
        ({"margin": -1.0}, "margin is -1.0"),
        ({"seconds": "now"}, "seconds is 'now'"),
        ({"guarantee": {}}, "guarantee is {}"),
        ({"norm": "inf"}, "in the manifest '2'"),
        ({"line": "{"}, "cannot be read"),
        ({"line": "[1, 2]"}, "not a row"),
        ({"line": "[" * 100_000}, "cannot be read"),
        ({"line": "9" * 5000}, "cannot be read"),
    ],
    ids=str,
)
def test_a_row_that_is_none_is_named_by_file_and_line(tmp_path, capsys, changes, match):
    folder = broken(tmp_path, **changes)
    with pytest.raises(CertifyError, match=match) as caught:
        read(folder)
    assert f"{folder / 'part-0.jsonl'}, line 3: " in str(caught.value)
    assert main(["report", str(folder), "--html", str(tmp_path / "r.html")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("certify: error: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_a_row_of_another_guarantee_is_no_attack(tmp_path):
    run = attack(many(count=5))
    run.rows[2].pop("guarantee")
    with pytest.raises(CertifyError, match=r"line 3: the guarantee is None, in a folder of attacks"):
        read(written(tmp_path / "a", run))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"selection": 3}, "selection is 3"),
        ({"selection": [0, "1"]}, "selection is"),
        ({"norm": 2}, "norm is 2"),
        ({"guarantee": ["proof"]}, "guarantee is"),
        ({"failure": 2}, "failure is 2"),
        ({"model": "x"}, "model is 'x'"),
        ({"bound": {"value": -1}}, "bound.value is -1"),
        ({"bound": {"value": 1.0, "parts": [{"value": "1"}]}}, "bound.parts is"),
        ({"bound": {"value": 1.0, "parts": [3]}}, "bound.parts is"),
        ({"assumptions": "ALL"}, "assumptions is"),
        ({"assumption_sentences": []}, "assumption_sentences is"),
        ({"data": {"count": -1}}, "data.count is -1"),
        ({"input": {"range": [0]}}, "input.range is"),
        ({"versions": 1}, "versions is 1"),
        ({"argv": [1]}, "argv is"),
    ],
    ids=str,
)
def test_a_manifest_with_fields_of_another_kind_is_refused(tmp_path, changes, match):
    run = many(count=5)
    with pytest.raises(CertifyError, match=match) as caught:
        read(written(tmp_path / "a", Run("a", {**run.manifest, **changes}, run.rows)))
    assert "manifest.json" in str(caught.value)


JUNK = [None, True, -1, 0, 1.5, 1e308, math.nan, -math.inf, 10**30, "", "proof", HOSTILE, [], [[]], {}, {"a": 1}, "inf", "attacked", "survived", "certified"]


def test_whatever_is_in_a_folder_makes_a_page_or_one_sentence(tmp_path, capsys):
    draw = random.Random(0)
    codes = set()
    for trial in range(60):
        run = many(count=4, bound=bound(1.0))
        about, rows = json.loads(json.dumps(run.manifest)), json.loads(json.dumps(run.rows))
        inside = [about, about["model"], about["data"], about["bound"], about["bound"]["parts"][1], about["input"], *rows]
        for _ in range(draw.choice([1, 1, 2])):
            where = draw.choice(inside)
            key = draw.choice(sorted(where))
            if draw.random() < 0.2:
                del where[key]
            else:
                where[key] = draw.choice(JUNK)
        folders = [written(tmp_path / str(trial) / "a", Run("a", about, rows)), written(tmp_path / str(trial) / "b", attack(run))]
        code = main(["report", *map(str, folders), "--html", str(tmp_path / str(trial) / "r.html")])
        said = capsys.readouterr().err
        codes.add(code)
        assert code in (0, 2, 3, 4)
        assert (code == 2) == said.startswith("certify: error: "), said
        assert code != 2 or (said.count("\n") == 1 and str(tmp_path / str(trial) / "a") in said), said
        assert "Error" not in said, said  # the name of one of Python's errors says nothing to whoever reads it
    assert {0, 2} <= codes


def test_empty_unfinished_and_equally_named_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "it has no manifest.json" in capsys.readouterr().err
    run = many(count=7, selection=list(range(9)))
    one, other = written(tmp_path / "x" / "run", run), written(tmp_path / "y" / "run", many(count=9))
    with (one / "part-0.jsonl").open("a") as part:
        part.write('{"index": 8, "rad')  # what a killed process leaves
    assert main(["report", str(one), str(other), "--html", str(tmp_path / "r.html")]) == 0
    page = words((tmp_path / "r.html").read_text())
    assert "not finished, 7 of 9 inputs are done" in page
    assert f"A {one}" in page
    assert f"B {other}" in page
    capsys.readouterr()
    assert main(["report", str(one), str(one)]) == 2
    assert "named 2 times" in capsys.readouterr().err


def test_json_has_the_contradictions_and_every_sandwich(tmp_path, capsys):
    proof = many("p", count=30)
    folders = [written(tmp_path / "p", proof), written(tmp_path / "q", attack(proof, closer=range(30)))]
    assert main(["report", *map(str, folders), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    (sandwich,) = found["sandwiches"]
    assert (sandwich["certified"], sandwich["attacked"]) == (["p"], ["q"])
    assert sum(entry["contradicted"] for entry in sandwich["inputs"]) == sum("changes it at" in message for message in found["contradictions"]) > 10
    assert all(entry["distance"] is None or entry["distance"] >= 0 for entry in sandwich["inputs"])


# a browser

# Each width in a frame of its own: how wide the page is there, and the letters of drawings that are cut off or cover each other.
LOOK = """addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, wrong = [];
    for (const svg of page.querySelectorAll("figure svg")) {
      const box = svg.getBoundingClientRect();
      const texts = [...svg.querySelectorAll("text")].map(text => ({...text.getBoundingClientRect().toJSON(), text}));
      texts.filter(a => a.left < box.left - 1 || a.right > box.right + 1 || a.bottom > box.bottom + 1).forEach(a => wrong.push("cut: " + a.text.textContent));
      const marks = texts.filter(one => one.text.style.fontWeight != 700);
      marks.forEach((a, i) => marks.slice(0, i).forEach(b => {
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
          wrong.push("covered: " + a.text.textContent + " by " + b.text.textContent);
      }));
    }
    const whole = page.documentElement, drawings = page.querySelectorAll("figure svg").length;
    found[frame.width] = {wide: whole.scrollWidth, room: whole.clientWidth, drawings, wrong};
  }
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
});"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine")
    folder = tmp_path_factory.mktemp("browser")

    def run(page, *options):
        (folder / "r.html").write_text(page, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *options, (folder / "r.html").as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    return run


@pytest.fixture(scope="module")
def page():
    proof = many("margin of a network with a name that takes its place", count=80, bound=bound(1.35))
    proof = Run(proof.name, proof.manifest, [{**found, "margin": 3 * found["radius"]} for found in proof.rows])
    smoothed = many("smoothed", 4, 80, 20.0, guarantee="probabilistic", failure=0.001, method="Smoothing(sigma=0.25)", bound=None)
    return html([proof, smoothed, attack(proof, closer=[3, 4]), many("inf", 1, 80, 0.03, norm="inf")], [0.1], "Certified robustness")


def test_a_browser_shows_the_page_on_a_telephone_and_on_a_screen(page, browse):
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{stdlib_html.escape(page)}"></iframe>' for width in (360, 768, 1200))
    shown_there = browse(f"<body>{frames}<script>{LOOK}</script></body>", "--dump-dom")
    found = json.loads(stdlib_html.unescape(re.search("FOUND(.*)END", shown_there, re.DOTALL)[1]))
    assert set(found) == {"360", "768", "1200"}
    for width, seen in found.items():
        assert seen["wide"] <= seen["room"], width  # nothing to scroll sideways
        assert seen["wrong"] == [], width
        assert seen["drawings"] >= 10


def test_a_browser_draws_the_page_in_light_and_in_dark(page, browse, tmp_path):
    from PIL import Image

    corners = {}
    for name, options in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        picture = tmp_path / f"{name}.png"
        browse(page, *options, f"--screenshot={picture}", "--window-size=1200,2400")
        image = Image.open(picture).convert("RGB")
        corners[name] = image.getpixel((5, 5))
        assert len(image.resize((300, 600)).getcolors(180_000)) > 500  # an empty page has one
    assert corners["light"] == (255, 255, 255)
    assert max(corners["dark"]) < 40


def test_the_page_begins_with_a_run_that_certifies_something():
    """A proof of nothing at the radius stands behind a certificate with a probability, and before it where it proves anything there."""
    chance = {"guarantee": "probabilistic", "failure": 0.001, "method": "Smoothing()", "bound": None}
    for scale, leads in ((1e-9, "smoothed"), (0.4, "proved")):
        page = words(html([many("proved", scale=scale), many("smoothed", **chance)], [0.05], "t"))
        assert f"inputs, {leads} gives the right answer and certifies" in page
