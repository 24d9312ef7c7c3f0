"""The command line end to end, on real data, in processes of its own where that matters."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import lipnet
from certify import data
from certify.cli import main
from certify.errors import CertifyError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network trained for two seconds on the digits."""
    torch.manual_seed(0)
    net = nn.Sequential(lipnet.BROLinear(64, 64), lipnet.MaxMin(), lipnet.UnitRowLinear(64, 10))
    train = data.digits("train")
    x, y = torch.from_numpy(train.inputs), torch.from_numpy(train.labels)
    optimizer, loss = torch.optim.Adam(net.parameters(), lr=0.01), lipnet.OffsetCrossEntropy()
    for _ in range(60):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    lipnet.save(net, path, input_shape=(64,), input_range=(0.0, 1.0), classes=tuple("0123456789"))
    return str(path)


def rows(folder):
    return [json.loads(line) for line in (pathlib.Path(folder) / "results.jsonl").read_text().splitlines()]


def certify(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "certify", *map(str, arguments)], capture_output=True, text=True, check=False, **options)


def test_run_report_and_check_agree(model, tmp_path, capsys):
    assert main(["run", model, "digits", "-o", str(tmp_path / "a"), "--eps", "0.1,36/255", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    found = rows(tmp_path / "a")
    assert [row["index"] for row in found] == list(range(360))
    at = {eps: np.mean([row["status"] == "certified" and row["radius"] > eps for row in found]) for eps in (0.1, 36 / 255)}
    text = json.dumps(summary)
    assert all(f"{value}"[:6] in text for value in at.values())
    assert main(["report", str(tmp_path / "a"), "--html", str(tmp_path / "r.html"), "--tsv", str(tmp_path / "r.tsv")]) == 0
    assert "net.safetensors" in (tmp_path / "r.html").read_text()
    assert len((tmp_path / "r.tsv").read_text().splitlines()) == 361
    capsys.readouterr()
    assert main(["check", str(tmp_path / "a")]) == 0
    assert "0 contradictions" in capsys.readouterr().out


def test_shards_and_a_resumed_run_give_the_same_results(model, tmp_path, capsys):
    assert main(["run", model, "digits", "-o", str(tmp_path / "whole"), "--limit", "90"]) == 0
    for shard in ("2/3", "0/3", "1/3"):
        assert main(["run", model, "digits", "-o", str(tmp_path / "sharded"), "--limit", "90", "--shard", shard]) == 0
    resumed = tmp_path / "resumed"
    assert main(["run", model, "digits", "-o", str(resumed), "--limit", "90", "--shard", "0/2"]) == 0
    (part,) = resumed.glob("part-*")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:20]) + lines[20][:25])  # what a killed process leaves
    assert not (resumed / "results.jsonl").exists()
    assert main(["run", model, "digits", "-o", str(resumed), "--limit", "90"]) == 0
    whole = (tmp_path / "whole/results.jsonl").read_bytes()
    assert (tmp_path / "sharded/results.jsonl").read_bytes() == whole
    assert (resumed / "results.jsonl").read_bytes() == whole
    assert len(whole.splitlines()) == 90


def test_a_killed_process_loses_nothing(model, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "certify", "run", model, "digits:train", "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not sum(part.read_text().count("\n") for part in out.glob("part-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sum(part.read_text().count("\n") for part in out.glob("part-*"))
    assert done > 0
    assert certify("run", model, "digits:train", "-o", out).returncode == 0
    assert certify("run", model, "digits:train", "-o", tmp_path / "whole").returncode == 0
    assert (out / "results.jsonl").read_bytes() == (tmp_path / "whole/results.jsonl").read_bytes()


def test_an_interrupt_says_how_to_go_on(model, tmp_path, monkeypatch, capsys):
    import certify.cli.run

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(certify.cli.run, "margin_rows", stop)
    assert main(["run", model, "digits", "-o", str(tmp_path / "a")]) == 130
    assert "repeat the command" in capsys.readouterr().err


def test_settings_cannot_change_within_a_folder(model, tmp_path, capsys):
    out = str(tmp_path / "a")
    assert main(["run", model, "digits", "-o", out, "--limit", "5"]) == 0
    assert main(["run", model, "digits", "-o", out, "--limit", "6"]) == 2
    assert "started with selection" in capsys.readouterr().err
    assert main(["run", model, "digits:train", "-o", out, "--limit", "5"]) == 2
    assert "started with data" in capsys.readouterr().err


def test_a_folder_without_rows_is_taken_over_by_the_corrected_command(model, tmp_path, monkeypatch, capsys):
    """A run that fails before its first row leaves nothing that is worth protecting."""
    import certify.cli.run

    out = tmp_path / "a"

    def fails(*_):
        raise CertifyError("it does not fit")

    monkeypatch.setattr(certify.cli.run, "margin_rows", fails)
    assert main(["run", model, "digits", "-o", str(out), "--limit", "50"]) == 2
    monkeypatch.undo()
    (out / "part-0-of-1-killed.jsonl").write_text('{"index": 0, "label": 4')  # torn
    assert main(["run", model, "digits:train", "-o", str(out), "--limit", "5"]) == 0
    assert json.loads((out / "manifest.json").read_text())["data"]["spec"] == "digits:train"
    assert len(rows(out)) == 5
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    capsys.readouterr()
    assert main(["run", model, "digits", "-o", str(out), "--limit", "5"]) == 2  # now it has rows
    assert "started with data" in capsys.readouterr().err
    for part in out.glob("part-*"):
        part.unlink()
    assert main(["run", model, "digits", "-o", str(out), "--limit", "5"]) == 2  # results.jsonl has them still


def test_a_manifest_of_another_program_is_left_alone(model, tmp_path, capsys):
    for text in ('{"name": "an app", "icons": []}', '{"schema": 1, "name": "an app"}', "", "[]"):
        (tmp_path / "manifest.json").write_text(text)
        assert main(["run", model, "digits", "-o", str(tmp_path), "--limit", "5"]) == 2
        assert (tmp_path / "manifest.json").read_text() == text


def settings(seed):
    """A manifest with what makes it that of one run."""
    return {"schema": 1, "argv": ["certify"], "model": {"sha256": "m"}, "data": {"sha256": "d"}, "method": "M()", "selection": [0, 1], "seed": seed}


def test_a_folder_at_work_is_not_taken_over(tmp_path, monkeypatch):
    """Its first row may come at any time. When its process has ended, it may be taken over, and rows that it began with are not mixed with others."""
    from certify.results import Folder, OtherRun

    monkeypatch.setattr("certify.results._TRIES", 3)
    with Folder(tmp_path, settings(0)) as first:
        with pytest.raises(OtherRun, match=r"started with seed 0, now it is 1, and another process is at work in it; wait"):
            Folder(tmp_path, settings(1))
        with Folder(tmp_path, settings(0), (1, 2)) as other:  # a shard of the same run
            other.add([{"index": 1}])
        first.add([{"index": 0}])
        assert first.finish()
    with pytest.raises(OtherRun, match="repeat the command that made it"):
        Folder(tmp_path, settings(1))


def test_where_there_are_no_locks_no_folder_is_taken_over(tmp_path, monkeypatch):
    from certify.results import Folder, OtherRun

    monkeypatch.setattr("certify.results._TRIES", 3)
    monkeypatch.setattr("certify.results.fcntl", None)
    with Folder(tmp_path, settings(0)), Folder(tmp_path, settings(0), (1, 2)):
        pass
    with pytest.raises(OtherRun, match="started with seed 0"):
        Folder(tmp_path, settings(1))


RACE = """
import json, pathlib, sys, time
from certify.results import Folder, OtherRun
path, seed, rank = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
while not (path / "go").exists():
    pass
try:
    with Folder(path / "run", json.loads(sys.argv[4]) | {"seed": seed}, (rank, 2)) as folder:
        for index in folder.pending():
            folder.add([{"index": index, "seed": seed}])
except OtherRun:
    sys.exit(7)
"""


def test_ranks_of_two_commands_that_start_together_end_as_those_of_one(tmp_path):
    """Both find a folder without rows of a third one. Whoever takes it over, no row of the other is in it, and all of its own are."""
    from certify.results import Folder

    for attempt in range(2):
        path = tmp_path / str(attempt)
        with Folder(path / "run", settings(-1)):
            pass
        command = [sys.executable, "-c", RACE, str(path)]
        processes = {(seed, rank): subprocess.Popen([*command, str(seed), str(rank), json.dumps(settings(0))]) for seed in (0, 1) for rank in (0, 1)}
        time.sleep(0.5)
        (path / "go").touch()
        codes = {key: process.wait(60) for key, process in processes.items()}
        seed = json.loads((path / "run" / "manifest.json").read_text())["seed"]
        assert seed in (0, 1)
        assert codes == {(s, rank): 0 if s == seed else 7 for s, rank in codes}
        found = [json.loads(line) for part in (path / "run").glob("part-*") for line in part.read_text().splitlines()]
        assert sorted(row["index"] for row in found) == [0, 1]
        assert {row["seed"] for row in found} == {seed}


def test_a_model_and_data_are_known_by_their_contents_and_not_by_their_paths(tmp_path, monkeypatch, capsys):
    """The same files from another folder, or copied, go on with a run; another function of the same file is another model."""
    torch.manual_seed(0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    torch.save(net.state_dict(), "net.pth")
    np.savez("d.npz", x=np.random.default_rng(0).random((6, 6), dtype=np.float32), y=np.zeros(6, dtype=np.int64))
    layers = "nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))"
    pathlib.Path("f.py").write_text(f"from torch import nn\ndef make(): return {layers}\ndef other(): return make()\n")
    for shard, model, points, arch in (
        ("0/3", "net.pth", "d.npz", "./f.py:make"),
        ("1/3", "../here/net.pth", f"{tmp_path}/here/d.npz", f"{tmp_path}/here/f.py:make"),
        ("2/3", f"{tmp_path}/copy.pth", "../d.npz", "../here/f.py:make"),
    ):
        (tmp_path / "copy.pth").write_bytes(pathlib.Path("net.pth").read_bytes())
        (tmp_path / "d.npz").write_bytes(pathlib.Path("d.npz").read_bytes())
        assert main(["run", model, points, "--arch", arch, "-o", str(tmp_path / "a"), "--shard", shard, "--quiet"]) == 0
        assert main(["attack", model, points, "--arch", arch, "-o", str(tmp_path / shard[0]), "--steps", "3", "--quiet"]) == 0
    assert len(rows(tmp_path / "a")) == 6
    assert main(["check", str(tmp_path / "a"), "--arch", "f.py:make", "--against", str(tmp_path / "2")]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code = ["--arch", "here/f.py:make"]
    assert main(["check", "a", *code]) == 2
    assert "a: its model was net.pth, and that is not there from " in capsys.readouterr().err
    assert main(["check", "a", *code, "--model", "copy.pth"]) == 0  # there is a d.npz here too, which is the same
    (tmp_path / "d.npz").unlink()
    assert main(["check", "a", *code, "--model", "copy.pth"]) == 2
    assert "say where it is now with --data" in capsys.readouterr().err
    assert main(["check", "a", *code, "--model", "copy.pth", "--data", "here/d.npz"]) == 0
    monkeypatch.chdir(tmp_path / "here")
    capsys.readouterr()
    assert main(["run", "net.pth", "d.npz", "--arch", "./f.py:other", "-o", str(tmp_path / "a")]) == 2
    assert "started with model {'arch': 'make'}, now it is {'arch': 'other'}" in capsys.readouterr().err
    np.savez("d.npz", x=np.zeros((6, 6), dtype=np.float32), y=np.zeros(6, dtype=np.int64))
    assert main(["run", "net.pth", "d.npz", "--arch", "./f.py:make", "-o", str(tmp_path / "a")]) == 2
    assert "started with data {'sha256': '" in capsys.readouterr().err


def test_rows_of_two_runs_that_were_put_together_are_noticed(model, tmp_path, capsys):
    """Every one of them is true, and the number of the wrong network; what reads the folder says so."""
    lipnet.save(lipnet.load(model), tmp_path / "other.safetensors", input_shape=(64,))  # the same network, in another file
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(["run", model, "digits", "-o", str(ours), "--limit", "4", "--shard", "0/2", "--quiet"]) == 0
    assert main(["run", str(tmp_path / "other.safetensors"), "digits", "-o", str(theirs), "--limit", "4", "--shard", "1/2", "--quiet"]) == 0
    for part in theirs.glob("part-*"):
        (ours / part.name).write_bytes(part.read_bytes())
    capsys.readouterr()
    assert main(["check", str(ours)]) == 4
    assert "contradiction: input 1: part-1-of-2-" in capsys.readouterr().out
    for command in (
        ["run", model, "digits", "-o", str(ours), "--limit", "4"],
        ["report", str(ours)],
        ["convert", str(ours), "--to", "cohen", "-o", str(tmp_path / "log.tsv")],
    ):
        assert main(command) == 2
        assert "a folder has the rows of one run" in capsys.readouterr().err
    assert main(["attack", model, "digits", "-o", str(tmp_path / "attack"), "--limit", "4", "--steps", "2", "--quiet"]) == 0
    (part,) = (tmp_path / "attack").glob("part-*")
    part.write_text(part.read_text().replace('"run": "', '"run": "0'))
    assert main(["check", str(theirs), "--against", str(tmp_path / "attack")]) == 2
    assert "a folder has the rows of one run" in capsys.readouterr().err


def test_parts_of_one_run_from_two_machines_are_put_together(model, tmp_path):
    """In folders of their own, each with its path of the model, and with other inputs of the same data."""
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(pathlib.Path(model).read_bytes())
    assert main(["run", model, "digits", "-o", str(tmp_path / "a"), "--limit", "4", "--shard", "0/2", "--quiet"]) == 0
    assert main(["run", str(copied), "digits", "-o", str(tmp_path / "b"), "--limit", "4", "--shard", "1/2", "--quiet"]) == 0
    assert main(["run", str(copied), "digits", "-o", str(tmp_path / "c"), "--indices", "3:4", "--quiet"]) == 0
    for part in [*(tmp_path / "b").glob("part-*"), *(tmp_path / "c").glob("part-*")]:
        (tmp_path / "a" / part.name).write_bytes(part.read_bytes())
    assert main(["run", model, "digits", "-o", str(tmp_path / "a"), "--limit", "4", "--quiet"]) == 0
    assert len(rows(tmp_path / "a")) == 4
    assert main(["check", str(tmp_path / "a")]) == 0


def test_rows_that_do_not_say_of_which_run_they_are_are_read_and_checked(model, tmp_path):
    """Those of earlier versions."""
    out = tmp_path / "a"
    assert main(["run", model, "digits", "-o", str(out), "--limit", "4", "--quiet"]) == 0
    tampered(out, lambda found: [row.pop("run") for row in found])
    (out / "results.jsonl").unlink()
    for command in (["check", str(out)], ["run", model, "digits", "-o", str(out), "--limit", "4"], ["report", str(out)], ["check", str(out)]):
        assert main(command) == 0


def tampered(folder, change):
    for part in folder.glob("part-*"):
        found = [json.loads(line) for line in part.read_text().splitlines()]
        change(found)
        part.write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda found: found[3].update(radius=found[3]["radius"] * 1.001 + 1e-6), "the radius is stored as"),
        (lambda found: found[3].update(radius=math.inf), "the radius is stored as"),
        (lambda found: found[3].update(prediction=(found[3]["prediction"] + 1) % 10), "prediction is stored as"),
        (lambda found: found[3].update(status="certified" if found[3]["status"] != "certified" else "misclassified"), "status is stored as"),
        (lambda found: found[3].update(label=(found[3]["label"] + 1) % 10), "label is stored as"),
        (lambda found: found[3].update(guarantee="probabilistic"), "guarantee is stored as"),
        (lambda found: found[3].pop("radius"), "the radius is stored as None"),
        (lambda found: found[3].update(margin=found[3]["margin"] + 1e-3), "the margin is stored as"),
        (lambda found: found[3].update(margin=None), "the margin is stored as None"),
        (lambda found: found[3].update(index=300), "not among those"),
    ],
)
def test_check_finds_changed_rows(model, tmp_path, capsys, change, match):
    out = tmp_path / "a"
    assert main(["run", model, "digits", "-o", str(out), "--limit", "10"]) == 0
    tampered(out, change)
    capsys.readouterr()
    assert main(["check", str(out)]) == 4
    assert match in capsys.readouterr().out


def test_check_finds_a_changed_bound_and_other_files(model, tmp_path, capsys):
    out = tmp_path / "a"
    assert main(["run", model, "digits", "-o", str(out), "--limit", "5"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    smaller = {**manifest, "bound": {**manifest["bound"], "value": manifest["bound"]["value"] * 0.999}}
    (out / "manifest.json").write_text(json.dumps(smaller))
    assert main(["check", str(out)]) == 4
    assert "stored Lipschitz bound" in capsys.readouterr().out
    (out / "manifest.json").write_text(json.dumps({**manifest, "model": {**manifest["model"], "sha256": "0" * 64}}))
    assert main(["check", str(out)]) == 2
    assert "the model has sha256" in capsys.readouterr().err
    (out / "manifest.json").write_text("{")
    assert main(["check", str(out)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_gates_decide_the_exit_code(model, tmp_path, capsys):
    out = str(tmp_path / "a")
    assert main(["run", model, "digits", "-o", out, "--fail-under", "0.05@0.01"]) == 0
    assert main(["report", out, "--fail-under", "0.05@0.01", "--fail-under", "0.99@100"]) == 1
    assert "below 0.99" in capsys.readouterr().err
    sharded = str(tmp_path / "b")
    assert main(["run", model, "digits", "-o", sharded, "--shard", "0/2", "--fail-under", "0@0.01"]) == 1
    assert "of 360 inputs are done" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "attack"])
def test_of_the_ranks_of_a_launch_the_last_one_has_the_table_and_the_exit_code(model, tmp_path, capsys, monkeypatch, command):
    words = [command, model, "digits", "-o", str(tmp_path / "a"), "--limit", "4", *(("--steps", "2") if command == "attack" else ("--fail-under", "0@0.001"))]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert main(words) == 0
        shown = capsys.readouterr()
        assert ("its inputs are done; the rank that ends last shows the table" in shown.err) == (rank == 0)
        assert ("median r" in shown.out) == (rank == 1)
    if command == "run":
        assert main([*words, "--fail-under", "1@100"]) == 1


def test_inspect_and_lipschitz(model, capsys):
    assert main(["inspect", model]) == 0
    shown = capsys.readouterr().out
    assert "BROLinear(in_features=64" in shown
    assert "certifier margin: applies" in shown
    assert main(["lipschitz", model, "--layers"]) == 0
    assert "bro: spectral norm" in capsys.readouterr().out
    assert main(["lipschitz", model, "--json"]) == 0
    bound = json.loads(capsys.readouterr().out)["bound"]
    assert float.fromhex(bound["hex"]) == bound["value"]


def test_inspect_names_every_offending_node(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Hardshrink(), nn.Linear(4, 2))\nother = 3\n"
    )
    assert main(["inspect", f"{tmp_path}/mine.py:make", "--input-shape", "4"]) == 0
    shown = capsys.readouterr().out
    assert "does not apply" in shown
    assert "Softplus at 1" in shown
    assert "Hardshrink at 2" in shown
    assert main(["lipschitz", f"{tmp_path}/mine.py:make", "--input-shape", "4"]) == 2
    assert "2 places" in capsys.readouterr().err
    assert main(["inspect", f"{tmp_path}/mine.py:other", "--input-shape", "4"]) == 2
    assert "returned int" in capsys.readouterr().err
    assert main(["inspect", f"{tmp_path}/mine.py:make"]) == 2
    assert "--input-shape" in capsys.readouterr().err


def test_inspect_shows_the_graph_and_what_each_certifier_will_cost(tmp_path, capsys):
    code = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(8, 3)
    def forward(self, x):
        h = torch.relu(self.first(x)) if x.shape[1] == 6 else x
        return self.last(torch.cat([h, 1e90 * h], dim=1))
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
    def forward(self, x):
        h = self.inner(x).unflatten(1, (2, 3))
        return nn.functional.scaled_dot_product_attention(h, h, h).flatten(1) * torch.sigmoid(x) + torch.cumsum(x, 1)
"""
    (tmp_path / "net.py").write_text(code)
    assert main(["inspect", f"{tmp_path}/net.py:Net", "--input-shape", "6", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["seen_by"] == "torch.export"
    assert [operation for _, operation, _ in about["operators"]] == ["Linear", "ReLU", "mul", "cat", "Linear"]
    assert about["operators"][3][2] == [8]
    assert about["certifiers"]["margin"]["bound"] > 1e89
    assert all(about["certifiers"][method]["seconds"] >= 0 for method in ("margin", "lipsdp", "smoothing"))
    assert main(["inspect", f"{tmp_path}/net.py:Net", "--input-shape", "6"]) == 0
    shown = capsys.readouterr().out
    assert "graph   by torch.export: 2 Linear, 1 ReLU, 1 cat, 1 mul" in shown
    assert "e+" in next(line for line in shown.splitlines() if line.startswith("certifier margin: applies; l2 bound"))
    assert "for an input at 100,000 copies" in shown
    assert main(["inspect", f"{tmp_path}/net.py:Attention", "--input-shape", "6"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "scaled_dot_product_attention: attention multiplies signals by each other" in shown
    assert "cumsum at cumsum: no rule is known" in shown


def test_durations_are_in_the_unit_that_fits():
    from certify.cli.inspect import duration_text

    texts = ["less than a second", "about 30 s", "about 3 minutes", "about 3 hours", "about 4 days", "about 3 years"]
    assert [duration_text(seconds) for seconds in (0.2, 31, 200, 10_000, 345_600, 1e8)] == texts


def test_inspect_says_what_frequencies_cost(tmp_path, capsys):
    """One channel and two, on a torus of 4 x 4 after a stride of two: 1 x 2 x 2 phases of the input and 2 of the gates, at 4 x 3 frequencies."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))\n"
    )
    command = ["inspect", f"{tmp_path}/net.py:make", "--input-shape", "1,8,8"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["certifiers"]["frequency"]
    assert (found["applies"], found["signals"], found["frequencies"], found["mebibytes"]) == (True, 1 * 2 * 2 + 2, 4 * 3, 1)
    assert found["seconds"] > 0
    assert main(command) == 0
    assert "certifier frequency: applies; at each of 12 frequencies 6 signals, about 1 MiB and" in " ".join(capsys.readouterr().out.split())


def test_inspect_says_which_semidefinite_certifiers_apply(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("certify.lure.lowering._LOOKED_AT", 60)
    start = "import lipnet\nfrom torch import nn\ndef make():\n    return "
    relu, sorting = "nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU()", "nn.Linear(8, 6), lipnet.MaxMin()"
    nets = {
        "relu": (f"nn.Sequential({relu}, nn.Linear(7, 3))", 1 + 8 + 12, 1 + 8 + 12),
        "sorting": (f"nn.Sequential({sorting}, nn.Linear(6, 3))", 1 + 8 + 3, None),  # one comparison for each pair
        "wide": ("nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))", 1 + 8 + 20, 1 + 8 + 20),  # too large to look at, and counted
    }
    for name, (code, lipsdp, lowrank) in nets.items():
        (tmp_path / f"{name}.py").write_text(start + code + "\n")
        assert main(["inspect", f"{tmp_path}/{name}.py:make", "--input-shape", "8", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["certifiers"]
        assert found["lipsdp"]["applies"]
        assert found["lipsdp"]["signals"] == lipsdp
        assert found["lowrank"]["applies"] == (lowrank is not None)
        assert found["lowrank"].get("signals") == lowrank
        assert all(found[method].get("mebibytes") is None or found[method]["mebibytes"] >= 1 for method in ("lipsdp", "lowrank"))
        assert main(["inspect", f"{tmp_path}/{name}.py:make", "--input-shape", "8"]) == 0
        shown = capsys.readouterr().out
        assert f"certifier lipsdp: applies; {'a matrix inequality of' if lipsdp else 'its matrices are too large'}" in shown
        assert ("certifier lowrank: applies; in a large ball" in shown) == (lowrank is not None)
        assert lowrank is not None or "in the way here: MaxMin at 1: none of these" in " ".join(shown.split())
    (tmp_path / "odd.py").write_text(start + "nn.Sequential(nn.Linear(8, 8), nn.Softplus())\n")
    assert main(["inspect", f"{tmp_path}/odd.py:make", "--input-shape", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["certifiers"]
    assert all(not found[method]["applies"] and "Softplus at 1" in found[method]["problems"][0] for method in ("margin", "lipsdp", "lowrank"))
    (tmp_path / "pool.py").write_text(start + "nn.Sequential(nn.Unflatten(1, (2, 2, 2)), lipnet.L2Pool2d(2), nn.Flatten(), nn.Linear(2, 2))\n")
    assert main(["inspect", f"{tmp_path}/pool.py:make", "--input-shape", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["certifiers"]
    assert [found[method]["applies"] for method in ("margin", "lipsdp", "lowrank")] == [True, False, False]
    assert "L2Pool2d at 1: an l2 norm" in found["lipsdp"]["problems"][0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["run", "MODEL", "nothing", "-o", "OUT"], "nothing"),
        (["run", "missing.safetensors", "digits", "-o", "OUT"], "cannot be read"),
        (["run", "missing.pt", "digits", "-o", "OUT"], "no such file"),
        (["run", "MODEL", "digits", "-o", "OUT", "--limit", "0"], "none of its 360"),
        (["run", "MODEL", "digits", "-o", "OUT", "--limit", "-3"], "none of its 360"),
        (["run", "MODEL", "digits", "-o", "OUT", "--indices", "400:500"], "none of its 360"),
        (["report", "OUT"], "not a results folder"),
        (["check", "OUT"], "not a results folder"),
        (["inspect", "no.module:here"], "cannot be imported"),
        (["run", "MODEL", "digits", "-o", "/dev/null/x"], "/dev/null/x"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_one_sentence(model, tmp_path, capsys, arguments, match):
    arguments = [{"MODEL": model, "OUT": str(tmp_path / "out")}.get(argument, argument) for argument in arguments]
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("certify: error: ")
    assert match in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--eps", "x"], "is not a radius"),
        (["--eps", "1/0"], "is not a radius"),
        (["--eps=-1"], "at least 0"),
        (["--fail-under", "2@0.1"], "ACCURACY@RADIUS"),
        (["--fail-under", "0.4"], "ACCURACY@RADIUS"),
        (["--shard", "3/3"], "a shard is I/N"),
        (["--indices", "a"], "START:STOP:STEP"),
        (["--indices", "::0"], "START:STOP:STEP"),
        (["--input-shape", "1,0"], "list of positive sizes"),
        (["--limit", "3", "--indices", "1:2"], "not allowed with"),
    ],
    ids=str,
)
def test_bad_flags_are_refused(arguments, match, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "m", "d", "-o", "o", *arguments])
    assert stop.value.code == 2
    assert match in capsys.readouterr().err


def test_near_chance_accuracy_is_pointed_out(tmp_path, capsys):
    torch.manual_seed(0)
    lipnet.save(nn.Sequential(lipnet.UnitRowLinear(64, 10)), tmp_path / "n.safetensors", input_shape=(64,))
    assert main(["run", str(tmp_path / "n.safetensors"), "digits", "-o", str(tmp_path / "a")]) == 0
    assert "check label order" in capsys.readouterr().err


def test_errors_leave_what_was_done(model, tmp_path, monkeypatch, capsys):
    import certify.results

    out = tmp_path / "a"
    add, calls = certify.results.Folder.add, []

    def full_disk(self, found):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        add(self, found)

    monkeypatch.setattr(certify.results.Folder, "add", full_disk)
    assert main(["run", model, "digits", "-o", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    monkeypatch.setattr(certify.results.Folder, "add", add)
    assert sum(part.read_text().count("\n") for part in out.glob("part-*")) == 64
    assert main(["run", model, "digits", "-o", str(out)]) == 0
    assert len(rows(out)) == 360


def test_help_and_version_are_there():
    for command in ("--help", "run --help", "report --help", "--version"):
        done = certify(*command.split(), env={**os.environ, "COLUMNS": "100"})
        assert done.returncode == 0
        assert "certify" in done.stdout
    assert certify().returncode == 2
