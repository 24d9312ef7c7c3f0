"""`certify run --method smoothing` and `certify check`, end to end: counts do not depend on who counted them, and no change to a folder goes unseen."""

import errno
import json
import math
import os
import pathlib
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

import certify.results
import lipnet
from certify import data
from certify.cli import main
from certify.smoothing.bounds import Tally
from certify.smoothing.engine import Engine

SETTING = ("--method", "smoothing", "--sigma", "0.25", "--levels", "16", "--seed", "3", "--batch", "256", "--quiet")
LONG = ("--n", "4000", "--limit", "40")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network trained for a second on noisy digits."""
    torch.manual_seed(0)
    net = nn.Sequential(lipnet.BROLinear(64, 64), lipnet.MaxMin(), lipnet.UnitRowLinear(64, 10))
    train = data.digits("train")
    x, y = torch.from_numpy(train.inputs), torch.from_numpy(train.labels)
    optimizer, loss = torch.optim.Adam(net.parameters(), lr=0.01), lipnet.OffsetCrossEntropy()
    for _ in range(40):
        optimizer.zero_grad()
        loss(net(x + 0.25 * torch.randn_like(x)), y).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    lipnet.save(net, path, input_shape=(64,), input_range=(0.0, 1.0), classes=tuple("0123456789"))
    return str(path)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The results of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert main(["run", model, "digits", "-o", str(out), *SETTING, *LONG]) == 0
    return out


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """A run that is soon checked."""
    out = tmp_path_factory.mktemp("small")
    assert main(["run", model, "digits", "-o", str(out), *SETTING, "--n", "400", "--limit", "8"]) == 0
    return out


def run(model, out, *more):
    return main(["run", model, "digits", "-o", str(out), *SETTING, *more])


def results(folder):
    return (pathlib.Path(folder) / "results.jsonl").read_bytes()


def whole_rows(folder):
    return sum(part.read_text().count("\n") for part in folder.glob("part-*"))


def started(*arguments, before=lambda: None):
    """The command line in a process of its own, which has all that this one has imported."""
    process = os.fork()
    if process == 0:
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts something in the background has it ignored
            before()
            code = main(list(arguments))
        finally:
            os._exit(code)
    return process


def slowly():
    """In this process every batch takes 20 ms longer, so that there is time to stop it."""
    count = Engine._count
    Engine._count = lambda self, *batch: (time.sleep(0.02), count(self, *batch))[1]


def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def stopped(processes, out, with_signal, rows=4):
    """Stop them all as soon as they have written so many rows between them. Returns how they ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and whole_rows(out) < rows:
        time.sleep(0.002)
    for process in processes:
        os.kill(process, with_signal)
    return [ended(process) for process in processes]


def one_sentence(capsys, match):
    message = capsys.readouterr().err.strip()
    assert message.startswith("certify: error: ")
    assert match in message
    assert "\n" not in message


# what is counted


def test_run_report_and_check_agree(model, whole, tmp_path, capsys):
    capsys.readouterr()
    assert main(["report", str(whole), "--eps", "0,0.1,0.25", "--json", "--tsv", str(tmp_path / "r.tsv")]) == 0
    (summary,) = json.loads(capsys.readouterr().out)["runs"]
    found = [json.loads(line) for line in results(whole).splitlines()]
    assert [row["index"] for row in found] == list(range(40))
    beyond = [np.mean([row["status"] == "certified" and row["radius"] > eps for row in found]) for eps in (0, 0.1, 0.25)]
    assert summary["certified"] == beyond
    assert 1 > beyond[0] > beyond[1] > beyond[2] > 0.1
    assert (summary["guarantee"], summary["failure"]) == ("probabilistic", 0.001)
    assert summary["clean"] == np.mean([row["prediction"] == row["label"] for row in found])
    printed = [line.split("\t") for line in (tmp_path / "r.tsv").read_text().splitlines()[1:]]
    assert all(0 <= row["radius"] - float(cells[3]) < 1e-6 for row, cells in zip(found, printed, strict=True))
    assert main(["convert", str(whole), "--to", "cohen", "-o", str(tmp_path / "c.tsv")]) == 0
    assert (tmp_path / "c.tsv").read_bytes() == (tmp_path / "r.tsv").read_bytes()
    capsys.readouterr()
    assert main(["check", str(whole)]) == 0
    assert "40 rows computed again from their counts, 0 contradictions" in capsys.readouterr().out
    assert run(model, whole, *LONG) == 0  # once more: there is nothing left to do
    assert len(list(whole.glob("part-*"))) == 1


@pytest.mark.parametrize(
    "more",
    [
        ("--fixed",),
        ("--scores", "softmax:0.5"),
        ("--scores", "sparsemax:0.5"),
        ("--norm", "inf"),
        ("--levels", "0"),
        ("--target", "0.1"),
        ("--tol", "0.05"),
        ("--shared-noise",),
        ("--dtype", "bfloat16"),
        ("--scores", "softmax:0.5", "--lipschitz", "layerwise"),
    ],
    ids=str,
)
def test_every_kind_of_run_can_be_checked(model, tmp_path, capsys, more):
    assert run(model, tmp_path / "a", "--n", "400", "--limit", "5", *more) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path / "a")]) == 0
    assert "5 rows computed again from their counts, 0 contradictions" in capsys.readouterr().out


def test_shards_give_the_same_results(model, whole, tmp_path):
    for shard in ("1/3", "0/3", "2/3"):
        assert not (tmp_path / "a/results.jsonl").exists()
        assert run(model, tmp_path / "a", *LONG, "--shard", shard) == 0
    assert results(tmp_path / "a") == results(whole)
    assert run(model, tmp_path / "a", *LONG, "--shard", "99/100") == 0  # a shard without inputs


def test_shards_of_shared_noise_give_the_same_results_and_the_manifest_says_that_it_is_shared(model, tmp_path):
    few = ("--n", "1000", "--limit", "12", "--shared-noise")
    for shard in ("1/3", "0/3", "2/3"):
        assert run(model, tmp_path / "a", *few, "--shard", shard) == 0
    assert run(model, tmp_path / "b", *few) == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert "not independent" in manifest["smoothing"]["shared"]
    assert manifest["prepared"][-1] == "first layer exact, its products with the noise shared"
    del manifest["smoothing"]["shared"]
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    assert main(["check", str(tmp_path / "a")]) == 4


def test_a_lipschitz_constant_is_proved_recorded_and_proved_again(model, tmp_path, capsys):
    soft = ("--n", "400", "--limit", "8", "--sigma", "0.1", "--levels", "4096", "--scores", "softmax:0.3")
    assert run(model, tmp_path / "plain", *soft) == run(model, tmp_path / "aware", *soft, "--lipschitz", "layerwise") == 0
    plain, aware = ([json.loads(line)["radius"] for line in results(tmp_path / name).splitlines()] for name in ("plain", "aware"))
    assert np.median(aware) > 1.1 * np.median(plain) > 0
    path = tmp_path / "aware/manifest.json"
    manifest = json.loads(path.read_text())
    loaded = certify.models.load(model)
    proved = certify.lipschitz(loaded.net, input_shape=(64,))
    assert manifest["smoothing"]["lipschitz"] == proved.value
    assert manifest["smoothing"]["pair"] == proved.pairs.max() < 1.4 * proved.value
    assert manifest["smoothing"]["proof"] == "Layerwise()"
    assert manifest["dtype"] == "weights as stored, evaluated in float64"
    assert "REAL_ARITHMETIC" in manifest["assumptions"]
    for value, match in (
        (manifest["smoothing"]["lipschitz"] / 2, "what is proved is"),
        ("1", "what is proved is"),
        (10**400, "what is proved is"),
        (None, "dtype"),
        (math.inf, "what is proved is"),
    ):
        path.write_text(json.dumps({**manifest, "smoothing": {**manifest["smoothing"], "lipschitz": value}}))
        capsys.readouterr()
        assert main(["check", str(tmp_path / "aware")]) == 4
        assert match in capsys.readouterr().out
    for pair in (manifest["smoothing"]["pair"] / 2, manifest["smoothing"]["pair"] * 1.01, "1", 10**400, None, math.inf):
        path.write_text(json.dumps({**manifest, "smoothing": {**manifest["smoothing"], "pair": pair}}))
        assert main(["check", str(tmp_path / "aware")]) == 4
    assert run(model, tmp_path / "c", "--n", "400", "--limit", "8", "--lipschitz", "layerwise") == 2  # votes have no Lipschitz constant
    one_sentence(capsys, "votes")


def test_a_distance_that_is_larger_than_needed_holds_and_a_smaller_one_does_not(model, tmp_path, capsys, monkeypatch):
    """Folders of before have the worst rounding of a copy to the grid in place of the mean one."""
    soft = ("--n", "400", "--limit", "8", "--sigma", "0.1", "--levels", "1024", "--scores", "softmax:0.3", "--lipschitz", "layerwise")
    moved = certify.Smoothing._moved
    with monkeypatch.context() as before:
        before.setattr(certify.Smoothing, "_moved", lambda self, elements: moved(self, elements) * math.sqrt(3))
        assert run(model, tmp_path / "old", *soft) == 0
    assert run(model, tmp_path / "new", *soft) == 0
    old, new = ([json.loads(line)["radius"] for line in results(tmp_path / name).splitlines()] for name in ("old", "new"))
    assert all(a <= b for a, b in zip(old, new, strict=True))
    assert sum(old) < 0.999 * sum(new)
    assert main(["check", str(tmp_path / "old")]) == main(["check", str(tmp_path / "new")]) == 0
    path = tmp_path / "new/manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    for factor in (0.9, 1.1):  # radii are as stored with neither
        path.write_text(json.dumps({**manifest, "smoothing": {**manifest["smoothing"], "distance": manifest["smoothing"]["distance"] * factor}}))
        assert main(["check", str(tmp_path / "new")]) == 4
    (tmp_path / "old/manifest.json").write_text(text)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "old")]) == 4
    assert "its counts give" in capsys.readouterr().out


def test_a_run_that_left_a_torn_line_is_resumed(model, whole, tmp_path):
    assert run(model, tmp_path / "a", *LONG, "--shard", "0/2") == 0
    (part,) = (tmp_path / "a").glob("part-*")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:7]) + lines[7][:90])
    assert run(model, tmp_path / "a", *LONG) == 0
    assert results(tmp_path / "a") == results(whole)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 4), (4, 1)])
def test_killed_processes_lose_nothing(model, whole, tmp_path, first, then):
    out = tmp_path / "a"
    command = ["run", model, "digits", "-o", str(out), *SETTING, *LONG]
    assert stopped([started(*command, "--shard", f"{i}/{first}", before=slowly) for i in range(first)], out, signal.SIGKILL).count(-signal.SIGKILL) > 0
    kept = whole_rows(out)
    assert 0 < kept < 40
    assert [ended(process) for process in [started(*command, "--shard", f"{i}/{then}") for i in range(then)]] == [0] * then
    assert results(out) == results(whole)
    assert whole_rows(out) == 40


def test_an_interrupt_leaves_whole_rows(model, whole, tmp_path, capfd):
    out = tmp_path / "a"
    process = started("run", model, "digits", "-o", str(out), *SETTING, *LONG, before=slowly)
    assert stopped([process], out, signal.SIGINT) == [130]
    assert "repeat the command" in capfd.readouterr().err
    (part,) = out.glob("part-*")
    text = part.read_text()
    assert text.endswith("\n")
    assert all(json.loads(line)["counts"] for line in text.splitlines())
    assert run(model, out, *LONG) == 0
    assert results(out) == results(whole)


def test_a_file_that_cannot_grow_leaves_what_was_done(model, whole, tmp_path, capfd):
    out = tmp_path / "a"

    def little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    assert ended(started("run", model, "digits", "-o", str(out), *SETTING, *LONG, before=little_room)) == 2
    assert capfd.readouterr().err.strip() == f"certify: error: {out}: this cannot be written, File too large; see to that, or choose another place"
    (part,) = out.glob("part-*")
    assert part.stat().st_size == 10_000  # its last line is torn
    assert run(model, out, *LONG) == 0
    assert results(out) == results(whole)


def test_a_full_disk_is_one_sentence(model, whole, tmp_path, monkeypatch, capsys):
    out, opened = tmp_path / "a", pathlib.Path.open

    class Full:
        """A file on a disk that has room for five and a half rows."""

        def __init__(self, file):
            self.file, self.room = file, 5

        def write(self, text):
            self.room -= 1
            if self.room < 0:
                self.file.write(text[: len(text) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.write(text)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(pathlib.Path, "open", lambda path, *mode, **more: Full(opened(path, *mode, **more)) if mode == ("a",) else opened(path, *mode, **more))
    assert run(model, out, *LONG) == 2
    one_sentence(capsys, "No space left on device")
    monkeypatch.undo()
    assert whole_rows(out) == 5
    assert run(model, out, *LONG) == 0
    assert results(out) == results(whole)


def test_a_network_that_fails_later_leaves_what_was_done(tmp_path, capsys):
    (tmp_path / "late.py").write_text(
        "from torch import nn\n"
        "class Late(nn.Module):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += 1\n"
        "        if self.calls > 12: raise RuntimeError('out of memory\\nand so on')\n"
        "        return x[:, :10]\n"
        "def make(): return Late()\n"
    )
    assert main(["run", f"{tmp_path}/late.py:make", "digits", "--input-shape", "64", "-o", str(tmp_path / "a"), *SETTING, "--n", "400", "--limit", "20"]) == 2
    one_sentence(capsys, "failed on a batch of 256 noisy copies: out of memory; what was done is kept")
    assert 0 < whole_rows(tmp_path / "a") < 20


# what a folder is of


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--sigma", "0.26"), "started with method"),
        (("--alpha", "0.01"), "started with method"),
        (("--n", "500"), "started with method"),
        (("--n0", "90"), "started with method"),
        (("--fixed",), "started with method"),
        (("--tol", "0.1"), "started with method"),
        (("--levels", "240"), "started with method"),
        (("--scores", "softmax:1"), "started with method"),
        (("--vote-margin", "0.1"), "started with method"),
        (("--batch", "64"), "started with method"),
        (("--norm", "inf"), "started with method"),
        (("--seed", "4"), "started with"),
        (("--limit", "9"), "started with selection"),
    ],
    ids=str,
)
def test_settings_cannot_change_within_a_folder(model, small, capsys, more, match):
    capsys.readouterr()
    assert run(model, small, "--n", "400", "--limit", "8", *more) == 2
    one_sentence(capsys, match)


def test_model_data_and_method_cannot_change_within_a_folder(model, small, tmp_path, capsys):
    capsys.readouterr()
    torch.manual_seed(1)
    lipnet.save(nn.Sequential(lipnet.UnitRowLinear(64, 10)), tmp_path / "other.safetensors", input_shape=(64,), input_range=(0.0, 1.0))
    assert run(str(tmp_path / "other.safetensors"), small, "--n", "400", "--limit", "8") == 2
    one_sentence(capsys, "started with model")
    assert main(["run", model, "digits:train", "-o", str(small), *SETTING, "--n", "400", "--limit", "8"]) == 2
    one_sentence(capsys, "started with data")
    assert main(["run", model, "digits", "-o", str(small), "--limit", "8"]) == 2
    one_sentence(capsys, "started with method")


def test_a_folder_has_rows_with_a_lipschitz_constant_or_without(model, tmp_path, capsys):
    soft = ("--n", "200", "--limit", "4", "--levels", "4096", "--scores", "softmax:0.3")
    for first, then in (((), ("--lipschitz", "layerwise")), (("--lipschitz", "layerwise"), ())):
        out = tmp_path / f"{len(first)}"
        assert run(model, out, *soft, *first, "--shard", "0/2") == 0
        capsys.readouterr()
        assert run(model, out, *soft, *then) == 2
        one_sentence(capsys, "started with smoothing {'lipschitz': ")
        path = out / "manifest.json"
        manifest = json.loads(path.read_text())
        if first:  # the constant as another machine proves it
            manifest["smoothing"]["lipschitz"] *= 1 + 1e-14
            path.write_text(json.dumps(manifest))
        assert run(model, out, *soft, *first) == main(["check", str(out)]) == 0


# what check finds


def changed(small, tmp_path, rows=lambda found: None, manifest=lambda found: None):
    """A copy of the folder with other contents."""
    out = tmp_path / "changed"
    shutil.copytree(small, out)
    (out / "results.jsonl").unlink()
    (part,) = out.glob("part-*")
    found = [json.loads(line) for line in part.read_text().splitlines()]
    rows(next(row for row in found if row["status"] == "certified"))
    part.write_text("".join(json.dumps(row) + "\n" for row in found))
    stored = json.loads((out / "manifest.json").read_text())
    manifest(stored)
    (out / "manifest.json").write_text(json.dumps(stored))
    return out


def move_a_vote(row):
    sums = row["counts"]["looks"][-1]["sums"]
    label = row["prediction"]
    other = next(k for k, votes in enumerate(sums) if votes and k != label)
    sums[label], sums[other] = sums[label] + 1, sums[other] - 1


def move_many_votes(row):
    sums = row["counts"]["looks"][-1]["sums"]
    sums[row["prediction"]], sums[(row["prediction"] + 1) % 10] = sums[row["prediction"]] - 50, sums[(row["prediction"] + 1) % 10] + 50


def select_another(row):
    sums = row["counts"]["selection"]["sums"]
    label = row["prediction"]
    sums[label], sums[(label + 1) % 10] = sums[(label + 1) % 10], sums[label]


def more_radius(row):
    row["radius"] *= 1.001
    row["counts"]["radius"] *= 1.001


ROWS = {
    "radius": lambda row: row.update(radius=row["radius"] * (1 + 1e-6)),
    "smaller radius": lambda row: row.update(radius=row["radius"] * 0.9),
    "negative radius": lambda row: row.update(radius=-row["radius"]),
    "infinite radius": lambda row: row.update(radius=math.inf),
    "no number": lambda row: row.update(radius=math.nan),
    "no radius": lambda row: row.pop("radius"),
    "both radii": more_radius,
    "prediction": lambda row: row.update(prediction=(row["prediction"] + 1) % 10),
    "label": lambda row: row.update(label=(row["label"] + 1) % 10),
    "status": lambda row: row.update(status="misclassified"),
    "inner status": lambda row: row["counts"].update(status="below target"),
    "guarantee": lambda row: row.update(guarantee="proof"),
    "norm": lambda row: row.update(norm="inf"),
    "method": lambda row: row.update(method="margin"),
    "alpha": lambda row: row.update(alpha=1e-4),
    "inner alpha": lambda row: row["counts"].update(alpha=1e-4),
    "n": lambda row: row.update(n=401),
    "off grid": lambda row: row.update(off_grid=0.5),
    "ledger": lambda row: row["counts"]["ledger"][0].update(alpha=1e-4),
    "shorter ledger": lambda row: row["counts"]["ledger"].pop(),
    "p_lower": lambda row: row["counts"].update(p_lower=row["counts"]["p_lower"] + 1e-6),
    "p_upper": lambda row: row["counts"].update(p_upper=row["counts"]["p_upper"] * 0.999),
    "a vote": move_a_vote,
    "votes": move_many_votes,
    "one vote more": lambda row: row["counts"]["looks"][-1]["sums"].__setitem__(row["prediction"], row["counts"]["looks"][-1]["sums"][row["prediction"]] + 1),
    "n of a look": lambda row: row["counts"]["looks"][-1].update(n=401),
    "fraction of a vote": lambda row: row["counts"]["looks"][-1]["sums"].__setitem__(0, 0.5),
    "undecided": lambda row: row["counts"]["looks"][-1].update(undecided=-1),
    "a look": lambda row: row["counts"]["looks"].pop(),
    "no look": lambda row: row["counts"].update(looks=[]),
    "selection": select_another,
    "selection size": lambda row: row["counts"]["selection"].update(n=90),
    "no selection": lambda row: row["counts"].pop("selection"),
    "no counts": lambda row: row.pop("counts"),
    "counts are text": lambda row: row.update(counts="many"),
    "another class": lambda row: [tally["sums"].append(0) for tally in (row["counts"]["selection"], *row["counts"]["looks"])],
    "index": lambda row: row.update(index=300),
    "a radius of 400 digits": lambda row: row.update(radius=10**400),
    "an alpha of 400 digits": lambda row: row.update(alpha=10**400),
    "a count beyond int64": lambda row: row["counts"]["looks"][-1]["sums"].__setitem__(0, 2**64 - 1),
}


@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_check_finds_changed_rows(small, tmp_path, capsys, change):
    out = changed(small, tmp_path, rows=change)
    capsys.readouterr()
    assert main(["check", str(out)]) == 4
    assert "contradiction: input " in capsys.readouterr().out


def smoothing(**more):
    return lambda manifest: manifest["smoothing"].update(more)


def in_method(old, new):
    def change(manifest):
        assert old in manifest["method"]
        manifest["method"] = manifest["method"].replace(old, new)

    return change


MANIFESTS = {
    "noise": smoothing(noise="Gaussian(sigma=0.5)"),
    "scores": smoothing(scores="Softmax(temperature=1.0)"),
    "bound": smoothing(bound="Hoeffding()"),
    "schedule": smoothing(schedule="FixedN(n0=100, n=400, alpha=0.001)"),
    "share": smoothing(share="Share(rivals=0.0)"),
    "levels": smoothing(levels=255),
    "no levels": smoothing(levels=None),
    "distance": smoothing(distance=0.0),
    "classifier": smoothing(classifier="0" * 64),
    "classes": smoothing(classes=11),
    "target": smoothing(target=0.1),
    "tolerance": smoothing(tolerance=0.1),
    "batch": smoothing(batch=1),
    "unknown": smoothing(more=1),
    "missing": lambda manifest: manifest["smoothing"].pop("distance"),
    "sigma of the method": in_method("sigma=0.25", "sigma=0.5"),
    "alpha of the method": in_method("alpha=0.001", "alpha=0.01"),
    "levels of the method": in_method("levels=16", "levels=15"),
    "seed of the method": in_method("seed=3", "seed=4"),
    "seed": lambda manifest: manifest.update(seed=4),
    "failure": lambda manifest: manifest.update(failure=1e-6),
    "guarantee": lambda manifest: manifest.update(guarantee="proof"),
    "norm": lambda manifest: manifest.update(norm="inf"),
    "assumptions": lambda manifest: manifest.update(assumptions=[]),
    "parameters": lambda manifest: manifest["model"].update(parameters=1),
    "class names": lambda manifest: manifest["model"]["classes"].reverse(),
    "count": lambda manifest: manifest["data"].update(count=8),
    "selected inputs": lambda manifest: manifest.update(selection=[0, 1, 2]),
    "units": lambda manifest: manifest["input"].update(units="of bytes"),
    "a sentence": lambda manifest: manifest["assumption_sentences"].update(EVAL_MODE="Nothing is assumed."),
    "a failure of 400 digits": lambda manifest: manifest.update(failure=10**400),
    "a distance of 400 digits": smoothing(distance=10**400),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_check_finds_a_changed_manifest(small, tmp_path, capsys, change):
    out = changed(small, tmp_path, manifest=change)
    capsys.readouterr()
    assert main(["check", str(out)]) == 4
    assert "contradiction: " in capsys.readouterr().out


def test_check_finds_lines_that_are_no_rows_and_rows_beside_others(small, tmp_path, capsys):
    for name, more, match in (
        ("same", lambda row: json.dumps({**row, "seconds": 9.0}), None),
        ("torn", lambda row: json.dumps({**row, "radius": 9.0})[:-1], "0-x.jsonl, line 1: this is no row"),
        ("deep", lambda row: "[" * 100_000, "0-x.jsonl, line 1: this is no row"),
        ("index", lambda row: json.dumps({**row, "index": True}), "0-x.jsonl, line 1: this is no row"),
        ("other", lambda row: json.dumps({**row, "radius": 9.0}), "0-x.jsonl, line 1, is another row of it"),
    ):
        out = tmp_path / name
        shutil.copytree(small, out)
        row = json.loads((out / "results.jsonl").read_text().splitlines()[0])
        (out / "part-0-of-0-x.jsonl").write_text(more(row) + "\n")
        capsys.readouterr()
        assert main(["check", str(out)]) == (0 if match is None else 4)
        assert match is None or match in capsys.readouterr().out


@pytest.mark.parametrize("scores", ["softmax:0.3", "sparsemax:0.3"])
def test_soft_scores_of_a_copy_add_up_to_one(model, tmp_path, capsys, scores):
    """Less for the rivals and no more for the class would be a larger radius, of counts that nothing counts."""
    out = tmp_path / "a"
    assert run(model, out, "--n", "200", "--limit", "4", "--scores", scores, "--vote-margin", "0.01") == 0
    assert main(["check", str(out)]) == 0
    (part,) = out.glob("part-*")
    (out / "results.jsonl").unlink()
    rows, manifest = [json.loads(line) for line in part.read_text().splitlines()], json.loads((out / "manifest.json").read_text())
    method = certify.smoothing.rows.method_of(manifest)
    procedure = method.procedure((64,))
    row = min((row for row in rows if row["radius"] > 0), key=lambda row: row["radius"])
    top, radius, looks = row["prediction"], row["radius"], row["counts"]["looks"]
    for look in looks:
        for name in ("sums", "squares"):
            look[name] = [number if k == top else 0 for k, number in enumerate(look[name])]
    outcome = procedure.decide(Tally.from_json(row["counts"]["selection"]), [Tally.from_json(look) for look in looks])
    row["counts"].update(outcome.to_json())
    row.update(radius=outcome.radius, n=looks[-1]["n"])
    assert outcome.radius > 1.01 * radius
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert main(["check", str(out)]) == 4
    assert "add up to less" in capsys.readouterr().out


BROKEN = {
    "method": (lambda manifest: manifest.update(method="Smoothing(noise=exit())"), "is not the printed form of"),
    "another method": (lambda manifest: manifest.update(method="print('no')"), "is not the printed form of"),
    "no method": (lambda manifest: manifest.pop("method"), "is not the printed form of"),
    "argument": (in_method("seed=3", "speed=3"), "is none of this version"),
    "no smoothing": (lambda manifest: manifest.pop("smoothing"), "says nothing of the smoothing"),
    "smoothing": (lambda manifest: manifest.update(smoothing=[]), "says nothing of the smoothing"),
    "no model": (lambda manifest: manifest.pop("model"), "it has no model.spec"),
    "model": (lambda manifest: manifest.update(model=3), "it has no model.spec"),
    "no shape": (lambda manifest: manifest["model"].pop("input_shape"), "it has no model.input_shape"),
    "shape": (lambda manifest: manifest["model"].update(input_shape=["x"]), "lists of whole numbers"),
    "no data": (lambda manifest: manifest.pop("data"), "it has no data.spec"),
    "no digest": (lambda manifest: manifest["data"].pop("sha256"), "it has no data.sha256"),
    "no selection": (lambda manifest: manifest.pop("selection"), "it has no selection"),
    "selection": (lambda manifest: manifest.update(selection=[[1]]), "lists of whole numbers"),
    "no norm": (lambda manifest: manifest.pop("norm"), "it has no norm"),
    "no guarantee": (lambda manifest: manifest.pop("guarantee"), "it has no guarantee"),
    "model digest": (lambda manifest: manifest["model"].update(sha256="0" * 64), "the model has sha256"),
    "data digest": (lambda manifest: manifest["data"].update(sha256="0" * 64), "the data has sha256"),
    "a constant of votes": (smoothing(lipschitz=10**400), "votes: they jump"),
    "a target of 400 digits": (in_method("target=None", f"target={10**400}"), "the target is a radius"),
}


@pytest.mark.parametrize(("change", "match"), BROKEN.values(), ids=BROKEN)
def test_a_manifest_that_is_none_is_refused_in_one_sentence(small, tmp_path, capsys, change, match):
    out = changed(small, tmp_path, manifest=change)
    capsys.readouterr()
    assert main(["check", str(out)]) == 2
    one_sentence(capsys, match)


def test_check_finds_a_changed_results_file(small, tmp_path, capsys):
    out = tmp_path / "a"
    shutil.copytree(small, out)
    text = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(text.replace('"misclassified"', '"certified"').replace('"radius": 0.', '"radius": 1.'))
    capsys.readouterr()
    assert main(["check", str(out)]) == 4
    assert "results.jsonl does not have the rows" in capsys.readouterr().out


# what is refused before anything is counted


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--sigma=0"], "sigma is a positive, finite number"),
        (["--sigma=-1"], "sigma is a positive, finite number"),
        (["--sigma=nan"], "sigma is a positive, finite number"),
        (["--alpha=0"], "strictly between 0 and 1, got 0"),
        (["--alpha=1"], "strictly between 0 and 1, got 1"),
        (["--alpha=nan"], "strictly between 0 and 1, got nan"),
        (["--n=5"], "the least that can at this alpha is 11"),
        (["--n=5", "--fixed"], "the least that can at this alpha is 11"),
        (["--n=0"], "whole numbers of copies"),
        (["--n0=0"], "at least one copy"),
        (["--vote-margin=-0.1"], "vote margin is at least 0"),
        (["--vote-margin=nan"], "a vote margin is at least 0"),
        (["--levels=-1"], "whole number from 1 to 65536"),
        (["--batch=0"], "at least one row"),
        (["--seed=-1"], "a seed is a whole number"),
        (["--scores=softmax:0"], "temperature is a positive"),
        (["--scores=softmax:nan"], "temperature is a positive"),
        (["--scores=sparsemax:0"], "temperature is a positive"),
        (["--target=9"], "cannot certify a radius above 9"),
        (["--tol=-1"], "the tolerance is a radius"),
        (["--limit=0"], "none of its 360 inputs is selected"),
        (["--method=margin"], "--sigma is for --method smoothing"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_one_sentence(model, tmp_path, capsys, arguments, match):
    assert run(model, tmp_path / "a", "--n", "400", *arguments) == 2
    one_sentence(capsys, match)
    assert not whole_rows(tmp_path / "a")


def test_sigma_has_no_default(model, tmp_path, capsys):
    assert main(["run", model, "digits", "-o", str(tmp_path / "a"), "--method", "smoothing"]) == 2
    one_sentence(capsys, "needs --sigma")


@pytest.mark.parametrize("text", ["soft", "softmax:x", "sparsemax:x", "hard:1", ""])
def test_other_scores_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "m", "d", "-o", "o", f"--scores={text}"])
    assert stop.value.code == 2
    assert "scores are hard or softmax:T" in capsys.readouterr().err


def test_inputs_outside_the_range_of_the_model_are_refused(tmp_path, capsys):
    torch.manual_seed(0)
    net = nn.Sequential(lipnet.UnitRowLinear(64, 10))
    lipnet.save(net, tmp_path / "half.safetensors", input_shape=(64,), input_range=(0.0, 0.5))
    assert run(str(tmp_path / "half.safetensors"), tmp_path / "a", "--n", "400") == 2
    one_sentence(capsys, "inputs are in [0, 1], the model takes [0.0, 0.5]")


FACTORIES = """
from torch import nn
class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
    def forward(self, x):
        return self.function(x)
class Stubborn(nn.Linear):
    def train(self, mode=True):
        return super().train(True)
def stubborn(): return Stubborn(64, 10)
def flat(): return Module(lambda x: x.sum(1))
def one(): return Module(lambda x: x[:, :1])
def pair(): return Module(lambda x: (x, x))
def fewer(): return Module(lambda x: x[1:, :10])
def narrow(): return nn.Linear(63, 10)
def half(): return nn.Linear(64, 10).half()
def nan(): return Module(lambda x: x[:, :10] * float("nan"))
def training(): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.9)).train()
"""


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("stubborn", "training mode (at Stubborn)"),
        ("flat", "this network returns (256,) for 256 inputs"),
        ("one", "at least two classes, this network returns (256, 1)"),
        ("pair", "this network returns tuple"),
        ("fewer", "returns (255, 10) for 256 inputs"),
        ("narrow", "does not take 256 inputs of shape (64,)"),
        ("half", "; convert it with net.float()"),
    ],
)
def test_what_is_no_classifier_of_such_inputs_is_refused(tmp_path, capsys, name, match):
    (tmp_path / "nets.py").write_text(FACTORIES)
    assert main(["run", f"{tmp_path}/nets.py:{name}", "digits", "--input-shape", "64", "-o", str(tmp_path / "a"), *SETTING, "--n", "400"]) == 2
    one_sentence(capsys, match)


def test_a_factory_that_returns_a_network_in_training_mode_gets_it_in_eval_mode(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(FACTORIES)
    command = [f"{tmp_path}/nets.py:training", "digits", "--input-shape", "64", *SETTING, "--n", "400", "--limit", "6"]
    assert main(["run", *command, "-o", str(tmp_path / "a")]) == 0
    assert main(["run", *command, "-o", str(tmp_path / "b"), "--shard", "0/2"]) == 0
    assert main(["run", *command, "-o", str(tmp_path / "b"), "--shard", "1/2"]) == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")  # neither dropout nor the rest of a batch is in it


def test_a_network_that_answers_nan_certifies_nothing(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(FACTORIES)
    out = tmp_path / "a"
    assert main(["run", f"{tmp_path}/nets.py:nan", "digits", "--input-shape", "64", "-o", str(out), *SETTING, "--n", "400", "--limit", "4"]) == 0
    assert all(json.loads(line)["status"] == "abstained" for line in results(out).splitlines())
    assert main(["check", str(out), "--model", f"{tmp_path}/nets.py:nan"]) == 0


def test_the_manifest_names_all_that_the_numbers_depend_on(small):
    manifest = certify.results.read_manifest(small)
    assert manifest["method"].startswith("Smoothing(noise=Gaussian(sigma=0.25), scores=Hardmax(), schedule=GroupSequential(")
    assert manifest["smoothing"].keys() >= {"noise", "scores", "bound", "schedule", "share", "distance", "classifier", "levels", "classes", "batch"}
    assert (manifest["seed"], manifest["failure"], manifest["guarantee"]) == (3, 0.001, "probabilistic")


@pytest.mark.parametrize(("rank", "size"), [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_ranks_of_a_launcher_share_a_folder(rank, size, tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text("from torch import nn\nclass Some(nn.Module):\n    def forward(self, x): return x[:, :10]\ndef make(): return Some()\n")
    command = ["run", f"{tmp_path}/nets.py:make", "digits", "--input-shape", "64", *SETTING, "--n", "400", "--limit", "10"]
    assert main([*command, "-o", str(tmp_path / "whole")]) == 0
    for index in (2, 0, 1):
        monkeypatch.setenv(rank, str(index))
        monkeypatch.setenv(size, "3")
        assert main([*command, "-o", str(tmp_path / "shared")]) == 0
    assert len(list((tmp_path / "shared").glob("part-*-of-3-*.jsonl"))) == 3
    assert (tmp_path / "shared/results.jsonl").read_bytes() == (tmp_path / "whole/results.jsonl").read_bytes()


def test_inspect_says_that_smoothing_applies_where_no_rule_does(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(FACTORIES)
    assert main(["inspect", f"{tmp_path}/nets.py:flat", "--input-shape", "64", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["certifiers"]["smoothing"]["applies"]
    (tmp_path / "own.py").write_text("from torch import nn\nclass Odd(nn.Module):\n    def forward(self, x): return x[:, :10] ** 3\ndef make(): return Odd()\n")
    assert main(["inspect", f"{tmp_path}/own.py:make", "--input-shape", "64"]) == 0
    shown = capsys.readouterr().out
    assert "certifier margin: does not apply" in shown
    assert "certifier smoothing: applies; about " in shown


def test_another_forward_with_the_same_numbers_is_another_model(tmp_path, capsys):
    for sign in ("+", "-"):
        code = f"from torch import nn\nclass N(nn.Module):\n    def forward(self, x): return {sign}x[:, :10]\ndef make(): return N()\n"
        (tmp_path / f"nets{sign == '+'}.py").write_text(code)
    command = ["digits", "--input-shape", "64", "-o", str(tmp_path / "a"), *SETTING, "--n", "400", "--limit", "4"]
    assert main(["run", f"{tmp_path}/netsTrue.py:make", *command]) == 0
    capsys.readouterr()
    assert main(["run", f"{tmp_path}/netsFalse.py:make", *command]) == 2
    one_sentence(capsys, "started with model")
