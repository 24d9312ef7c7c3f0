"""`certify run --noise ...` end to end for every noise: run, resume, report and check; what a radius is of is told in words; no option is passed over."""

import itertools
import json

import pytest

import certify.results
from certify.cli import main
from certify.cli.noises import _LAWS, _NEEDS
from certify.smoothing.noises import ContrastBrightness, TwoSteps

NETS = """
import torch
from torch import nn

class Bright(nn.Module):
    def forward(self, x):
        side = x.flatten(1).mean(1) - 0.1
        return torch.stack([side, -side, 0 * side], dim=1)

def make(): return Bright()
"""
FLAT, IMAGE, TWICE = "64", "1,8,8", "2,8,8"
KINDS = {
    "gaussian": (FLAT, ["--sigma", "0.1", "--levels", "16"], "2", "Gaussian(sigma=0.1)"),
    "gaussian inf": (FLAT, ["--sigma", "0.1", "--norm", "inf", "--levels", "16"], "inf", "GaussianLinf(sigma=0.1, dimension=64)"),
    "laplace": (FLAT, ["--scale", "0.1", "--levels", "16"], "1", "Laplace(scale=0.1)"),
    "laplace float": (FLAT, ["--scale", "0.1", "--levels", "0"], "1", "Laplace(scale=0.1)"),
    "uniform": (FLAT, ["--scale", "0.2", "--norm", "1"], "1", "Uniform(half_width=0.2)"),
    "uniform inf": (FLAT, ["--scale", "0.2", "--norm", "inf", "--levels", "16"], "inf", "UniformLinf(half_width=0.2, dimension=64)"),
    "ablation": (TWICE, ["--keep", "6"], "number of changed pixels, inclusive", "Ablation(keep=6, dimension=64)"),
    "ablation flat": ("128", ["--keep", "6"], "number of changed pixels, inclusive", "Ablation(keep=6, dimension=64)"),
    "brightness": (FLAT, ["--sigma", "0.2"], "|brightness added|", "Brightness(sigma=0.2)"),
    "contrast": (FLAT, ["--sigma", "0.2"], "|ln contrast factor|", "Contrast(sigma=0.2)"),
    "gamma": (FLAT, ["--sigma", "0.2"], "|ln gamma|", "LogNormalGamma(sigma=0.2)"),
    "gamma law": (FLAT, ["--law", "rayleigh", "--scale", "1"], "|ln gamma|", "Gamma(law=Rayleigh(scale=1.0))"),
    "translation": (IMAGE, ["--sigma", "1"], "l2 norm of the shift, in pixels", "CyclicTranslation(sigma=1.0)"),
    "blur": (IMAGE, ["--law", "folded-normal", "--scale", "1"], "variance of the blur", "FourierBlur(law=FoldedNormal(scale=1.0))"),
    "contrast-brightness": (
        FLAT,
        ["--sigma", "0.2", "--tau", "0.2"],
        "max(|ln contrast factor|, |brightness added|)",
        "ContrastBrightness(sigma=0.2, tau=0.2)",
    ),
}


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return f"{path}:make"


def run(nets, out, noise, shape, *options):
    return main(
        ["run", nets, "digits", "--input-shape", shape, "-o", str(out), "--method", "smoothing", "--noise", noise, "--n", "200", "--limit", "4", *options]
    )


def one_sentence(capsys, match):
    message = capsys.readouterr().err.strip()
    assert message.startswith("certify: error: ")
    assert match in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_run_resume_report_and_check(nets, tmp_path, capsys, kind):
    (shape, options, norm, noise), name, out = KINDS[kind], kind.split()[0], tmp_path / "a"
    assert run(nets, out, name, shape, *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    lp = norm in ("1", "2", "inf")
    assert (f"(l{norm} norm, units of the input)" if lp else f"({norm})") in printed
    assert lp or "norm, units" not in printed
    manifest = certify.results.read_manifest(out)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert manifest["norm"] == norm
    assert manifest["smoothing"]["noise"] == noise
    assert {row["norm"] for row in rows} == {norm}
    assert any(row["radius"] > 0 for row in rows)
    exact = kind in ("gaussian", "gaussian inf", "laplace", "uniform", "uniform inf", "ablation", "ablation flat", "translation")
    assert ("FLOAT_NOISE" in manifest["assumptions"]) != exact
    assert (manifest["smoothing"]["distance"] > 0) == exact
    assert run(nets, out, name, shape, *options) == 0  # there is nothing left to do
    assert main(["check", str(out), "--model", nets]) == 0
    assert "4 rows computed again from their counts, 0 contradictions" in capsys.readouterr().out
    assert main(["convert", str(out), "--to", "cohen", "-o", str(tmp_path / "c.tsv")]) == (0 if norm in ("2", "inf") else 2)
    assert main(["report", str(out), "--tsv", str(tmp_path / "r.tsv"), "--html", str(tmp_path / "r.html")]) == (0 if norm in ("2", "inf") else 2)
    assert (tmp_path / "r.tsv").exists() == (norm in ("2", "inf"))
    other = [
        {"6": "7", "0.1": "0.11", "0.2": "0.21", "1": "1.1"}.get(option, option) if options[i - 1] != "--norm" else option for i, option in enumerate(options)
    ]
    assert run(nets, out, name, shape, *other) == 2
    assert "started with" in capsys.readouterr().err


def changed(out, tmp_path, old, new, also=()):
    text = (out / "manifest.json").read_text()
    for path in [out / "manifest.json", *(out.glob("part-*") if also else ())]:
        path.write_text(path.read_text().replace(old, new))
    assert (out / "manifest.json").read_text() != text
    return main(["check", str(out), "--model", json.loads(text)["model"]["spec"]])


@pytest.mark.parametrize(("old", "new"), [("Brightness(sigma=0.2)", "Brightness(sigma=0.4)"), ("Brightness(sigma=0.2)", "Gaussian(sigma=0.2)")])
def test_another_noise_in_the_manifest_is_a_contradiction(nets, tmp_path, capsys, old, new):
    assert run(nets, tmp_path / "a", "brightness", FLAT, "--sigma", "0.2") == 0
    assert changed(tmp_path / "a", tmp_path, old, new) == 4


def test_radii_of_two_steps_hold_and_larger_ones_do_not(nets, tmp_path, capsys, monkeypatch):
    """Folders of before have them: the same counts, and smaller radii."""
    options = (nets, tmp_path / "a", "contrast-brightness", FLAT, "--sigma", "0.3", "--tau", "0.4")
    with monkeypatch.context() as before:
        before.setattr(ContrastBrightness, "radius", lambda self, *scores: TwoSteps(self).radius(*scores))
        assert run(*options) == 0
    rows = [path for path in (tmp_path / "a").glob("*.jsonl") if '"radius"' in path.read_text()]
    old = [json.loads(line)["radius"] for line in rows[0].read_text().splitlines()]
    assert main(["check", str(tmp_path / "a"), "--model", nets]) == 0
    assert run(nets, tmp_path / "b", *options[2:]) == 0
    new = [json.loads(line)["radius"] for line in (tmp_path / "b" / "results.jsonl").read_text().splitlines()]
    assert all(b > 1.2 * a > 0 for a, b in zip(old, new, strict=True))
    assert main(["check", str(tmp_path / "b"), "--model", nets]) == 0
    for radius, claimed in itertools.product([old[0]], [old[0] * 1.01, new[0] * 1.01]):
        for path in rows:
            path.write_text(path.read_text().replace(repr(radius), repr(claimed)))
        assert main(["check", str(tmp_path / "a"), "--model", nets]) == 4
        for path in rows:
            path.write_text(path.read_text().replace(repr(claimed), repr(radius)))


def test_a_radius_of_a_transform_cannot_pass_for_one_of_l2(nets, tmp_path, capsys):
    assert run(nets, tmp_path / "a", "brightness", FLAT, "--sigma", "0.2") == 0
    assert changed(tmp_path / "a", tmp_path, '"|brightness added|"', '"2"', also=("rows",)) == 4
    assert "norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("noise", "shape", "options", "match"),
    [
        ("laplace", FLAT, [], "needs --scale"),
        ("laplace", FLAT, ["--sigma", "1"], "needs --scale"),
        ("laplace", FLAT, ["--scale", "1", "--sigma", "1"], "has no --sigma"),
        ("gaussian", FLAT, ["--sigma", "1", "--keep", "3"], "has no --keep"),
        ("uniform", FLAT, ["--scale", "1", "--norm", "2"], "bounds on l1 norm"),
        ("laplace", FLAT, ["--scale", "1", "--norm", "inf"], "bounds on l1 norm"),
        ("brightness", FLAT, ["--sigma", "1", "--norm", "2"], "bounds on |brightness added|"),
        ("brightness", FLAT, ["--sigma", "1", "--levels", "255"], ": take --levels 0"),
        ("ablation", TWICE, ["--keep", "65"], "cannot keep 65 of 64"),
        ("ablation", TWICE, ["--keep", "0"], "at least 1"),
        ("ablation", "1,8,8", ["--keep", "6"], "cannot be halved"),
        ("ablation", TWICE, ["--keep", "60"], "cannot certify"),
        ("gamma", FLAT, ["--law", "uniform", "--scale", "1"], "has --law exponential or rayleigh"),
        ("gamma", FLAT, ["--sigma", "1", "--law", "rayleigh", "--scale", "1"], "has no --sigma"),
        ("gamma", FLAT, [], "needs --sigma"),
        ("blur", IMAGE, ["--scale", "1"], "needs --law"),
        ("blur", FLAT, ["--law", "exponential", "--scale", "1"], "for images"),
        ("translation", FLAT, ["--sigma", "1"], "for images"),
        ("contrast-brightness", FLAT, ["--sigma", "1"], "needs --tau"),
        ("contrast", FLAT, ["--sigma", "-1"], "positive"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_one_sentence(nets, tmp_path, capsys, noise, shape, options, match):
    assert run(nets, tmp_path / "a", noise, shape, *options) == 2
    one_sentence(capsys, match)


def test_options_of_noise_are_for_smoothing(nets, tmp_path, capsys):
    for option in (["--noise", "laplace"], ["--scale", "1"], ["--keep", "3"]):
        assert main(["run", nets, "digits", "--input-shape", FLAT, "-o", str(tmp_path / "a"), *option]) == 2
        one_sentence(capsys, f"{option[0]} is for --method smoothing")


def test_every_noise_is_run_and_in_the_docs():
    import pathlib

    text = (pathlib.Path(__file__).parent.parent / "docs/cli.md").read_text()
    assert {kind.split()[0] for kind in KINDS} == set(_NEEDS)
    assert all(f"| `{name}` |" in text for name in _NEEDS)
    assert all(f"`{law}`" in text for law in _LAWS)
