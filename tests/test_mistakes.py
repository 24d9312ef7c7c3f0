"""Natural mistakes end in one sentence: what was asked, what was found, what to do next. None of them gives a number of something else."""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify.cli import Exit, main


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def certificate(net, inputs):
    return certify.robustness(net, inputs, certify.Margin(certify.lipschitz(net, input_shape=(6,))))


@pytest.fixture(scope="module")
def model(net, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model") / "net.safetensors")
    lipnet.save(net, path, input_shape=(6,), input_range=(0, 1))
    return path


@pytest.fixture(scope="module")
def points(inputs, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "d.npz")
    np.savez(path, x=inputs.numpy(), y=np.array([0, 1, 2, 0]))
    return path


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([[0], [1], [2], [0]]),  # would be compared with each other
        nn.functional.one_hot(torch.tensor([0, 1, 2, 0])),
        [1],
        1,
        [0, 1, 2],
        torch.tensor([0.5, 1, 2, 0]),
        ["0", "1", "2", "0"],
        torch.tensor([True, False, True, True]),
    ],
    ids=["columns", "one-hot", "one", "number", "too few", "floats", "names", "bools"],
)
def test_labels_of_another_kind_give_no_accuracy(certificate, labels):
    with pytest.raises(ValueError, match="one whole number for each of 4 inputs, got the shape"):
        certificate.accuracy(labels, 0.1)


@pytest.mark.parametrize("radius", [[0.1, 0.2], "0.1", None, float("nan"), -1])
def test_a_radius_is_one_number(certificate, radius):
    with pytest.raises(ValueError, match="a radius is one number"):
        certificate.accuracy([0, 1, 2, 0], radius)


def test_no_input_has_no_accuracy(net, inputs):
    none = certify.robustness(net, inputs[:0], certify.LocalMargin())
    assert str(none).startswith("0 inputs, median certified l2 radius -")
    with pytest.raises(ValueError, match="there is no input"):
        none.accuracy([], 0.1)


MISTAKES = {
    "shape": (lambda net, x: certify.lipschitz(net, input_shape=6), r"input_shape is the sizes of one input.* got 6"),
    "shape in words": (lambda net, x: certify.lipschitz(net, input_shape="6"), r"input_shape is the sizes of one input.* got '6'"),
    "path": (lambda net, x: certify.lipschitz("net.safetensors", input_shape=(6,)), "a network is a torch module, got a str; lipnet.load"),
    "weights": (lambda net, x: certify.lipschitz(net.state_dict(), input_shape=(6,)), "a network is a torch module, got a OrderedDict"),
    "method in words": (lambda net, x: certify.lipschitz(net, "lipsdp", input_shape=(6,)), "a method is a value such as"),
    "method as a class": (lambda net, x: certify.lipschitz(net, certify.LipSDP, input_shape=(6,)), "a method is a value such as"),
    "domain": (lambda net, x: certify.lipschitz(net, input_shape=(6,), domain=(x[0], 0.1)), "a domain is a value such as certify.Ball"),
    "size of a ball": (
        lambda net, x: certify.lipschitz(net, certify.Local(), input_shape=(6,), domain=certify.Ball(x[0, :5], 0.1)),
        "of 6 inputs, got a Ball of 5 of radius 0.1 in l2$",
    ),
    "endless box": (
        lambda net, x: certify.lipschitz(net, certify.Local(), input_shape=(6,), domain=certify.Box([0.0] * 6, [math.inf] * 6)),
        "on a finite Box, .* got a Box of 6 without an end",
    ),
    "endless box of LipSDP": (
        lambda net, x: certify.lipschitz(net, certify.LipSDP(), input_shape=(6,), domain=certify.Box([-math.inf] * 6, [math.inf] * 6)),
        "on a Box of finite numbers, got one without an end; .* leave the domain out",
    ),
    "box of a batch": (
        lambda net, x: certify.lipschitz(net, certify.LipSDP(), input_shape=(6,), domain=certify.Box(x[:1], x[:1] + 1)),
        r"the box has ends of shape \(1, 6\), the network takes inputs of shape \(6,\)$",
    ),
    "endless ball": (
        lambda net, x: certify.lipschitz(net, certify.LipSDP(), input_shape=(6,), domain=certify.Ball(x[0], math.inf)),
        "of finite radius in l1, l2 or l-infinity, got the radius inf in l2",
    ),
    "ball in l3": (
        lambda net, x: certify.lipschitz(net, certify.LipSDP(), input_shape=(6,), domain=certify.Ball(x[0], 1.0, 3)),
        "got the radius 1 in l3",
    ),
    "ball of words": (lambda net, x: certify.Ball("middle", 0.1), "has an array or a tensor of numbers in it, got a str"),
    "box": (lambda net, x: certify.Box(x[0], x), "a Box needs low <= high"),
    "array": (lambda net, x: certify.robustness(net, x.numpy(), certify.LocalMargin()), "inputs are a tensor .* got ndarray; torch.from_numpy"),
    "one input": (lambda net, x: certify.robustness(net, x[0], certify.LocalMargin()), r"a batch \(N, ...\), got the shape \(6,\); a single input x is"),
    "no method": (lambda net, x: certify.robustness(net, x, certify.LocalMargin), "a method is a value such as certify.Margin"),
    "a bound": (lambda net, x: certify.robustness(net, x, certify.lipschitz(net, input_shape=(6,))), "a method is a value such as certify.Margin"),
    "attacked array": (lambda net, x: certify.falsify(net, x.numpy(), certify.PGD()), "inputs are a tensor"),
    "attack as a class": (lambda net, x: certify.falsify(net, x, certify.PGD), "an attack is a value such as certify.PGD"),
    "norm in words": (lambda net, x: certify.PGD(norm="inf"), "got norm 'inf'; pass 2 or math.inf"),
    "norm of Local": (lambda net, x: certify.Local("inf"), "got norm='inf'; pass 1, 2 or math.inf"),
    "norm of LipSDP": (lambda net, x: certify.LipSDP(norm="2"), "got norm='2'; pass 1, 2 or math.inf"),
    "sigma alone": (lambda net, x: certify.Smoothing(0.25), "a noise is a value such as certify.smoothing.Gaussian"),
    "training": (lambda net, x: certify.lipschitz(nn.Sequential(nn.Linear(6, 3), nn.ReLU()), input_shape=(6,)), "has one place without one: .*net.eval"),
    "device": (lambda net, x: lipnet.fit(net, x, torch.zeros(4).long(), lipnet.Recipe(epochs=1), device="gpu"), "cannot use the device 'gpu' here"),
    "trained on arrays": (lambda net, x: lipnet.fit(net, x.numpy(), np.zeros(4), lipnet.Recipe(epochs=1)), "must be tensors, got ndarray"),
    "trained by a dict": (lambda net, x: lipnet.fit(net, x, torch.zeros(4).long(), {"epochs": 1}), "recipe must be a value such as lipnet.Recipe"),
    "validated by images": (
        lambda net, x: lipnet.fit(net, x, torch.zeros(4).long(), lipnet.Recipe(epochs=1), validation=x),
        "validation must be a pair, images and labels, got Tensor",
    ),
    "one radius": (
        lambda net, x: lipnet.fit(net, x, torch.zeros(4).long(), lipnet.Recipe(epochs=1), radii=0.1),
        "radii must be finite",
    ),
    "trained on others": (
        lambda net, x: lipnet.fit(net, x[:, :5], torch.zeros(4).long(), lipnet.Recipe(epochs=1)),
        r"the network does not take images of shape \(5,\)",
    ),
    "labels of 32 bits": (lambda net, x: lipnet.OffsetCrossEntropy()(net(x), torch.zeros(4).int()), r"labels.long\(\) converts"),
    "one-hot labels": (lambda net, x: lipnet.EMMA()(net(x), torch.zeros(4, 3), torch.ones(3, 3)), r"got labels \(4, 3\) of torch.float32"),
    "no folder": (lambda net, x: lipnet.save(net, "none/net.safetensors"), "there is no folder none; make it first"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_arguments_of_another_kind_are_named(net, inputs, name):
    mistake, sentence = MISTAKES[name]
    with pytest.raises(OSError if name == "no folder" else ValueError, match=sentence) as refused:
        mistake(net, inputs)
    assert len(str(refused.value).splitlines()) == 1


def test_tensors_are_centers_and_facts(net, inputs, tmp_path):
    """A tensor is as good as an array where it has the same numbers."""
    ball, box = certify.Ball(inputs[0], 0.1), certify.Box(inputs[0] - 0.1, inputs[0] + 0.1)
    for domain, same in ((ball, certify.Ball(inputs[0].double().numpy(), 0.1)), (box, certify.Box((inputs[0] - 0.1).numpy(), (inputs[0] + 0.1).numpy()))):
        found, again = (certify.lipschitz(net, certify.Local(), input_shape=(6,), domain=each) for each in (domain, same))
        assert found.value == again.value
        assert domain.covers(same)
        assert same.covers(domain)
    lipnet.save(net, tmp_path / "net.safetensors", input_shape=inputs.shape[1:], input_range=(inputs.min(), np.float32(1)))
    assert lipnet.open_checkpoint(tmp_path / "net.safetensors").input_range == (float(inputs.min()), 1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--norm", "inf"], "--norm is for --method lipsdp or local, and the method is layerwise"),
        (["--solver", "scs"], "--solver is for --method lipsdp,"),
        (["--no-pairs"], "--no-pairs is for --method lipsdp or local"),
        (["--tolerance", "0.1"], "--tolerance is for --method frequency or lipsdp"),
        (["--save-proof", "x.proof"], "--save-proof is for --method lipsdp"),
        (["--around", "digits", "--radius", "0.1"], "--around is for --method lipsdp or local"),
        (["--method", "lipsdp", "--how", "crown"], "--how is for --method local"),
        (["--method", "lipsdp", "--radius", "0.1"], "name the data set with --around"),
        (["--method", "lipsdp", "--index", "1"], "name the data set with --around"),
        (["--method", "frequency", "--norm", "inf"], "--norm is for --method lipsdp or local"),
        (["--method", "local", "--around", "digits"], "--around needs the radius of the ball too"),
    ],
)
def test_an_option_of_another_method_of_lipschitz_is_refused(model, options, said, capsys):
    assert main(["lipschitz", model, *options]) == Exit.ERROR
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "lipschitz {net} --method local --around {data} --radius 0.1 --how sdp --norm inf",
            "--how sdp bounds networks from l2, got --norm inf; take --how crown",
        ),
        ("lipschitz {net} --method lipsdp --device nonsense", "; take the device cpu"),
        ("lipschitz {net} --method local --around {data} --radius 0.1 --seconds -1", "got --seconds -1"),
        ("lipschitz {net} --method frequency", "for other inputs there are LipSDP and the bound of the layers"),
        ("run {net} {data} -o {out} --method smoothing --sigma 0.5 --batch 0", "got --batch 0"),
        ("run {net} {data} -o {out} --method smoothing --sigma 0.5 --n0 0", "got --n0 0"),
        ("run {net} {data} -o {out} --method smoothing --sigma 0.5 --lipschitz layerwise", "; take --scores softmax:T or sparsemax:T"),
        ("run {net} {data} -o {out} --method smoothing --noise brightness --sigma 0.3 --levels 16", ": take --levels 0"),
        ("run {net} {data} -o {out} --method smoothing --noise gamma --law uniform --scale 1", "has --law exponential or rayleigh"),
        ("run {net} {data} -o {net}", "a results folder is a folder, and this is a file"),
    ],
)
def test_what_to_do_is_said_in_the_options_of_the_command(model, points, tmp_path, capsys, command, said):
    assert main([word.format(net=model, data=points, out=tmp_path / "a") for word in command.split()]) == Exit.ERROR
    shown = capsys.readouterr().err
    assert said in shown
    assert not re.search(r"\b(how|norm|device|seconds|batch|levels|pairs|n0)=", shown)


def test_only_what_the_command_has_is_said_in_its_options():
    from certify.cli.arguments import in_options

    said = "take how='crown' or pairs=False, and norm=math.inf; your Flatten has start_dim=0, and at alpha=0.001 of the last look"
    wanted = "take {} or --no-pairs, and --norm inf; your Flatten has start_dim=0, and at alpha=0.001 of the last look"
    assert in_options(said, argparse.Namespace(how=None, norm="2")) == wanted.format("--how crown")
    assert in_options(said, argparse.Namespace(alpha=0.001, norm="2")) == wanted.format("how='crown'")
    printed = "the folder was started with method Smoothing(FixedN(n0=100), levels=None, batch=8, norm=2), now it is Local(how='crown', seconds=60.0)"
    assert in_options(printed, argparse.Namespace(n0=1, batch=1, levels=1, norm="2", how="crown", seconds=1.0)) == printed


@pytest.mark.parametrize(
    "option", ["--n=9", "--alpha=0.1", "--n0=3", "--fixed", "--target=1", "--levels=16", "--scores=softmax:1", "--batch=3", "--seed=1", "--shared-noise"]
)
def test_an_option_of_smoothing_is_refused_by_other_methods(model, points, option, tmp_path, capsys):
    for method in ("margin", "local"):
        assert main(["run", model, points, "-o", str(tmp_path / "a"), "--method", method, option]) == Exit.ERROR
        assert f"{option.partition('=')[0]} is for --method smoothing, and the method is {method}" in capsys.readouterr().err
    assert main(["run", model, points, "-o", str(tmp_path / "a"), "--seconds", "3"]) == Exit.ERROR
    assert "--seconds is for --method local" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_places_that_cannot_be_written_are_named(model, points, tmp_path, capsys):
    run = ["run", model, points, "-o", str(tmp_path / "a")]
    assert main([*run, "--quiet"]) == Exit.DONE
    (tmp_path / "file").write_text("")
    for words, place in (
        (["run", model, points, "-o", str(tmp_path / "file" / "a")], "file/a"),
        (["report", str(tmp_path / "a"), "--html", str(tmp_path / "none" / "r.html")], "none/r.html"),
        (["report", str(tmp_path / "a"), "--tsv", str(tmp_path)], ""),
    ):
        assert main(words) == Exit.ERROR
        said = capsys.readouterr().err
        assert f"{tmp_path / place}: this cannot be written" in said
        assert "choose another place" in said
        assert "Errno" not in said
    assert main([*run, "--limit", "2"]) == Exit.ERROR
    assert "was started with selection 4 of them, 0, 1, 2, 3, now it is 2 of them, 0, 1;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("x.npy", "numpy.savez"), ("x.csv", "numpy.savez"), (".", "say what is in it, such as folder:."), ("x", "the known")]
)
def test_data_of_another_form_are_told_what_to_become(name, said):
    with pytest.raises(certify.data.DataError, match=said):
        certify.data.load(name)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def make(:\n", "SyntaxError: .*line 1"),
        ("def make():\n    return missing\n", "NameError: name 'missing' is not defined, at .*theirs.py, line 2"),
        ("def make(width):\n    return width\n", "TypeError: make.. missing 1 required"),
        ("raise RuntimeError('not today')\n", "RuntimeError: not today, at .*theirs.py, line 1"),
    ],
)
def test_code_that_fails_is_named_by_its_line(code, said, tmp_path, capsys):
    (tmp_path / "theirs.py").write_text(code)
    assert main(["inspect", f"{tmp_path / 'theirs.py'}:make"]) == Exit.ERROR
    assert re.search(said, shown := capsys.readouterr().err)
    assert len(shown.splitlines()) == 1


def test_files_by_another_name_and_missing_ones_are_named(net, tmp_path, capsys):
    lipnet.save(net, tmp_path / "net.pth")
    for name, said in (("net.pth", "it is a safetensors file by another name"), ("none.pth", "none.pth: no such file"), (".", "this is a folder")):
        assert main(["inspect", str(tmp_path / name), *(["--arch", "mlp"] if name != "." else [])]) == Exit.ERROR
        assert said in capsys.readouterr().err


def test_labels_that_the_network_has_no_output_for_are_pointed_out(model, inputs, tmp_path, capsys):
    np.savez(tmp_path / "d.npz", x=inputs.numpy(), y=np.array([1, 2, 3, 1]))
    said = "labels go from 1 to 3, and the network has 3 outputs, the classes 0 to 2: inputs of the others count as wrong"
    smoothing = ["run", "--method", "smoothing", "--sigma", "0.2", "--n", "99"]
    for place, command in enumerate((["run"], ["attack"], ["audit", "--skip", "local,lipsdp"], smoothing)):
        assert main([command[0], model, str(tmp_path / "d.npz"), "-o", str(tmp_path / str(place)), *command[1:]]) == Exit.DONE
        assert capsys.readouterr().err.count(said) == 1
    assert main(["run", model, str(tmp_path / "d.npz"), "-o", str(tmp_path / "a"), "--limit", "2", "--quiet"]) == Exit.DONE
    assert "labels" not in capsys.readouterr().err


def test_an_audit_refuses_at_once_what_cannot_be_smoothed(model, points, tmp_path, capsys):
    for option, said in ((["--sigma", "-1"], "sigma is a positive"), (["--sigma", "1", "--n", "5"], "cannot certify anything")):
        assert main(["audit", model, points, "-o", str(tmp_path / "a"), *option]) == Exit.ERROR
        assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert main(["audit", model, points, "-o", str(tmp_path / "a"), "--skip", "local,lipsdp", "--limit", "1"]) == Exit.DONE
    capsys.readouterr()
    assert main(["check", str(tmp_path / "a")]) == Exit.ERROR
    assert f"it has some in it (attack, margin); name one, such as {tmp_path / 'a' / 'attack'}" in capsys.readouterr().err


def test_a_path_is_data_too(points):
    assert len(certify.data.load(pathlib.Path(points), (6,))) == 4


def test_usage_is_one_sentence(model, capsys):
    for words, said in (
        (["run", model], "DATA, -o/--output; certify run --help"),
        (["nothing"], "certify --help"),
        (["run", "--seed", "x"], "certify run --help"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        shown = capsys.readouterr().err
        assert ended.value.code == Exit.ERROR
        assert said in shown
        assert len(shown.splitlines()) == 1


def test_means_that_do_not_fit_are_named(model, capsys):
    assert main(["inspect", model, "--mean", "0.1,0.2"]) == Exit.ERROR
    assert "one number, or one for each of the 6 channels of inputs of shape (6,), got 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--fail-under", "1@9"], ["--fail-under", "1@9", "--json"], []], ids=["table", "json", "no gate"])
def test_the_exit_code_is_that_of_the_work_where_the_reader_of_stdout_has_left(model, points, words, tmp_path):
    assert main(["run", model, points, "-o", str(tmp_path / "a"), "--quiet"]) == Exit.DONE
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "certify", "report", str(tmp_path / "a"), *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == (Exit.GATE if words else Exit.DONE)
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_a_terminal_without_the_letters_of_a_name_gets_them_escaped(model, points, tmp_path):
    folder = tmp_path / "dïgits→"
    assert main(["run", model, points, "-o", str(folder), "--quiet"]) == Exit.DONE
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-m", "certify", "report", str(folder)], env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.DONE
    assert "gits" in done.stdout
    run = f"exec {sys.executable} -m certify run {shlex.quote(model)} {shlex.quote(points)} -o {shlex.quote(str(folder))}"
    assert subprocess.run(f"{run} >&- 2>&-", shell=True, check=False).returncode == Exit.DONE
