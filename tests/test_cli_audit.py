"""`certify audit`: every method in a folder of its own, resumed, refused or left out with its reason, and one report."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify.cli import Exit, main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("audit") / "net.safetensors"
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    digits, optimizer = certify.data.load("digits", (1, 8, 8)), torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.from_numpy(digits.inputs)), torch.from_numpy(digits.labels)).backward()
        optimizer.step()
    lipnet.save(net.eval(), path, input_shape=(1, 8, 8), input_range=(0.0, 1.0))
    return str(path)


def test_all_that_applies_is_run_and_shown(model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    command = ["audit", model, "digits", "-o", str(out), "--limit", "3", "--budget", "60s", "--sigma", "0.2", "--levels", "16", "--n", "200"]
    assert main(command) == Exit.DONE
    shown = capsys.readouterr()
    assert {path.name for path in out.iterdir()} == {"attack", "margin", "lipsdp", "local", "smoothing", "report.html"}
    for folder in ("attack", "margin", "lipsdp", "local", "smoothing"):
        assert folder in shown.out
        assert len((out / folder / "results.jsonl").read_text().splitlines()) == 3
    radii = {
        folder: [json.loads(line)["radius"] for line in (out / folder / "results.jsonl").read_text().splitlines()] for folder in ("margin", "local", "attack")
    }
    assert all(a <= b <= c for a, b, c in zip(radii["margin"], radii["local"], radii["attack"], strict=True))
    for folder in ("margin", "lipsdp", "local", "smoothing", "attack"):
        assert main(["check", str(out / folder)]) == Exit.DONE
    assert main(["check", str(out / "local"), "--against", str(out / "attack")]) == Exit.DONE
    before = (out / "local" / "results.jsonl").read_text()
    assert main([*command, "--budget", "5s"]) == Exit.DONE  # resumed with another budget: nothing is done again
    assert (out / "local" / "results.jsonl").read_text() == before


def test_semidefinite_bounds_keep_to_the_budget_and_are_proved_again_when_it_is_repeated(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10)).eval()
    lipnet.save(net, tmp_path / "net.safetensors", input_shape=(1, 8, 8))
    command = ["audit", str(tmp_path / "net.safetensors"), "digits", "-o", str(tmp_path / "a"), "--limit", "10", "--skip", "attack,local,margin"]
    assert main([*command, "--budget", "1s", "--shard", "0/2"]) == Exit.DONE
    assert "lipsdp: the time was over, or it was interrupted, before all was solved" in capsys.readouterr().err
    assert main([*command, "--budget", "20s"]) == Exit.DONE
    said = capsys.readouterr().err
    assert "lipsdp: the bound is proved again from" in said
    assert "the time was over" in said  # then
    assert main(["check", str(tmp_path / "a/lipsdp")]) == Exit.DONE
    monkeypatch.setattr("certify.multipliers.lipschitz", None)
    assert main([*command, "--budget", "1s"]) == Exit.DONE  # nothing is left to do
    assert len((tmp_path / "a/lipsdp/results.jsonl").read_text().splitlines()) == 10


def test_an_attack_that_is_closer_than_a_certificate_ends_with_4(model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    command = ["audit", model, "digits", "-o", str(out), "--limit", "2", "--skip", "lipsdp,local"]
    assert main(command) == Exit.DONE
    part = next((out / "margin").glob("part-*.jsonl"))
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    part.write_text("".join(json.dumps({**row, "radius": 1e3}) + "\n" for row in rows))
    assert main(command) == Exit.CONTRADICTION
    assert "contradiction" in capsys.readouterr().err


def test_what_is_left_out_and_what_is_refused(model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    assert main(["audit", model, "digits", "-o", str(out), "--norm", "inf", "--limit", "2", "--skip", "lipsdp", "--within", "0,1"]) == Exit.DONE
    err = capsys.readouterr().err
    assert "margin is left out: its radii are in l2" in err
    assert "lipsdp is left out: as --skip asks" in err
    assert {path.name for path in out.iterdir()} == {"attack", "local", "report.html"}
    assert main(["audit", model, "digits", "-o", str(out), "--skip", "magic"]) == Exit.ERROR
    assert "--skip knows attack, margin" in capsys.readouterr().err
    assert main(["audit", model, "digits", "-o", str(out), "--skip", "attack,margin,lipsdp,frequency,local"]) == Exit.ERROR
    assert "no method applies" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["audit", model, "digits", "-o", str(out), "--budget", "soon"])
    assert "a time is such as 90s, 10m or 2h" in capsys.readouterr().err


def test_attacks_outside_of_a_range_do_not_contradict_radii_within_it(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`x_1 + x_2` against 0: with both entries in [0.05, 0.95] nothing changes, and without, a half in each does."""
    net = nn.Linear(2, 2, bias=False).eval()
    net.weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    model, points, out = str(tmp_path / "net.safetensors"), str(tmp_path / "d.npz"), tmp_path / "a"
    lipnet.save(nn.Sequential(net), model, input_shape=(2,))
    np.savez(points, x=np.array([[0.1, 0.9]], dtype=np.float32), y=np.array([0]))
    command = ["audit", model, points, "--norm", "inf", "--skip", "lipsdp"]
    assert main([*command, "-o", str(out), "--within", "0.05,0.95"]) == Exit.DONE
    assert "local radii are not compared with them" in capsys.readouterr().err
    assert main(["check", str(out / "local"), "--against", str(out / "attack")]) == Exit.ERROR
    assert "about inputs in a range only" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "b"), "--within", "-0.5,1"]) == Exit.DONE
    assert json.loads((tmp_path / "b" / "attack" / "manifest.json").read_text())["attack"]["clip"]  # a part of the range
    assert main(["check", str(tmp_path / "b" / "local"), "--against", str(tmp_path / "b" / "attack")]) == Exit.DONE
    manifest = tmp_path / "b" / "local" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "within": [-9, 9]}))
    assert main(["check", str(tmp_path / "b" / "local")]) == Exit.CONTRADICTION


@pytest.mark.parametrize("within", ["1", "0,1,2", "1,0", "0,0"])
def test_a_range_is_two_numbers(model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], within: str) -> None:
    for command in (["audit"], ["run", "--method", "local"]):
        with pytest.raises(SystemExit):
            main([*command, model, "digits", "-o", str(tmp_path / "a"), "--within", within])
        assert "a range is its smallest and its largest number" in capsys.readouterr().err


def theirs(folder: pathlib.Path, classes: int, seen: str) -> str:
    """A factory in a file, of a linear layer on 64 numbers that are made of the input."""
    (folder / "theirs.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.head = torch.nn.Linear(64, {classes})\n"
        "    def forward(self, x):\n"
        f"        return self.head({seen})\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
    )
    return f"{folder / 'theirs.py'}:make"


def test_a_network_that_no_rule_knows_is_attacked_and_smoothed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, spec = tmp_path / "a", theirs(tmp_path, 10, "torch.fft.fft2(x).abs().flatten(1)")
    command = ["audit", spec, "digits", "-o", str(out), "--input-shape", "1,8,8", "--limit", "2", "--sigma", "0.1", "--levels", "16", "--n", "200"]
    assert main(command) == Exit.DONE
    assert {path.name for path in out.iterdir()} == {"attack", "smoothing", "report.html"}
    assert "margin is left out" in capsys.readouterr().err
    assert main(["check", str(out / "attack"), "--model", spec]) == Exit.DONE


def test_a_method_that_stops_is_named_with_the_way_around_it(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, spec, points = tmp_path / "a", theirs(tmp_path, 2, "(4 * x).long().to(x.dtype)"), str(tmp_path / "points.npz")
    np.savez(points, x=np.full((2, 64), 0.4, dtype=np.float32), y=np.array([0, 1]))  # one of the two is right
    command = ["audit", spec, points, "-o", str(out), "--input-shape", "64", "--sigma", "0.1", "--levels", "0", "--n", "200", "--skip", "local"]
    assert main(command) == Exit.ERROR
    assert "attack: attacks follow gradients" in (said := capsys.readouterr().err)
    assert "add --skip local,attack" in said
    assert main([*command, "--limit", "1"]) == Exit.ERROR
    assert "choose another -o" in (said := capsys.readouterr().err)
    assert "add --skip" not in said
    assert main([*command[:-1], "local,attack"]) == Exit.DONE
