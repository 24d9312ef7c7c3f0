"""Files of weights: opened without running code, unwrapped, put into an architecture, and refused by what they are."""

import json
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import certify
from certify import models
from certify.cli import main
from certify.models.architectures import ARCHITECTURES
from certify.models.weights import ModelError, read_state_dict
from lipnet.testing import largest_slope


@pytest.fixture
def mlp(tmp_path):
    """A dense network, and a file of its weights as training scripts wrap them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).eval()
    path = tmp_path / "net.pth"
    torch.save({"epoch": 3, "state_dict": [{f"module.{name}": tensor for name, tensor in net.state_dict().items()}], "optimizer": {"lr": 0.1}}, path)
    return net, path


class Runs:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_wrapped_weights_find_their_network(mlp):
    net, path = mlp
    model = models.load(str(path), arch="mlp")
    x = torch.randn(5, 64)
    assert torch.equal(model.net(x), net(x))
    assert model.shape == (64,)
    assert model.opened == {"arch": "mlp", "tensors": "['state_dict'] [0] without the prefix module."}


def test_mean_and_std_are_the_first_layer_and_radii_are_in_the_units_of_the_data(mlp):
    net, path = mlp
    model = models.load(str(path), arch="mlp", input_shape=(1, 8, 8), mean=[0.5], std=[0.25])
    x = torch.rand(5, 1, 8, 8)
    assert torch.allclose(model.net(x), net((x - 0.5) / 0.25), atol=1e-6)
    plain = models.load(str(path), arch="mlp", input_shape=(1, 8, 8))
    ours, theirs = (certify.lipschitz(m.net, input_shape=(1, 8, 8)).value for m in (model, plain))
    assert ours == pytest.approx(4 * theirs, rel=1e-6)


def test_a_run_remembers_how_the_model_was_opened(mlp, tmp_path, capsys):
    folder = tmp_path / "run"
    opening = ["--arch", "mlp", "--mean", "0.1", "--std", "0.5"]
    assert main(["run", str(mlp[1]), "digits", "-o", str(folder), "--limit", "5", *opening]) == 0
    assert json.loads((folder / "manifest.json").read_text())["model"]["std"] == [0.5]
    assert main(["check", str(folder)]) == 0
    assert main(["run", str(mlp[1]), "digits", "-o", str(folder), "--limit", "5", *opening[:2]]) == 2
    manifest = json.loads((folder / "manifest.json").read_text())
    for field, value in (("arch", "os:getcwd"), ("std", ["a"]), ("spec", "os:getcwd")):
        changed = {**manifest, "model": {**manifest["model"], field: value}}
        (folder / "manifest.json").write_text(json.dumps(changed))
        capsys.readouterr()
        assert main(["check", str(folder)]) == 2
        message = capsys.readouterr().err
        assert ("would run code" in message) or ("are numbers" in message)


@pytest.mark.parametrize("kind", ["module", "reduce", "script", "html", "lfs", "empty", "cut", "bomb", "exported", "list"])
def test_what_is_no_file_of_weights_is_named_and_never_run(kind, mlp, tmp_path, capsys):
    net, path = mlp
    file, mark = tmp_path / "other.pth", tmp_path / "ran"
    says = {
        "module": "whole pickled module", "reduce": "can run code", "script": "TorchScript", "html": "HTML page", "lfs": "Git LFS", "empty": "is empty",
        "cut": "cut short", "bomb": "would unpack to", "exported": "exported program", "list": "no state dict is found",
    }  # fmt: skip
    if kind == "module":
        torch.save(net, file)
    elif kind == "reduce":
        torch.save({"state_dict": Runs(str(mark))}, file)
    elif kind == "script":
        torch.jit.script(net).save(str(file))
    elif kind == "html":
        file.write_text("\n<!DOCTYPE html><html>not here</html>")
    elif kind == "lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(path.read_bytes()[:1500])
    elif kind == "bomb":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}))
            archive.writestr("archive/data/0", bytes(2**28))
    elif kind == "exported":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("models/model.json", "{}")
    else:
        torch.save([torch.zeros(2), torch.zeros(3)], file)
    assert main(["inspect", str(file), "--arch", "mlp"]) == 2
    message = capsys.readouterr().err.strip()
    assert says[kind] in message
    assert len(message.splitlines()) == 1
    assert not mark.exists()


def test_architectures_that_do_not_fit_say_where(mlp, tmp_path):
    _, path = mlp
    for arch, says in (
        (None, "no architecture; name one with --arch: mlp"),
        ("cnn_a", "has convolutions"),
        ("nope", "not known; known are mlp"),
        ("resnet2b", "the file lacks"),
    ):
        with pytest.raises(ModelError, match=says):
            models.load(str(path), arch=arch)
    file = tmp_path / "factory.py"
    file.write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 11), nn.ReLU(), nn.Linear(11, 10))\n")
    with pytest.raises(ModelError, match=r"3 of 4 tensors do not fit: .* is 12(x64)? in the file, 11(x64)? in the architecture"):
        models.load(str(path), arch=f"{file}:make")
    file.write_text(file.read_text().replace("11", "12"))
    assert models.load(str(path), arch=f"{file}:make").parameters == 910
    with pytest.raises(ModelError, match="is for a file of weights"):
        models.load(f"{file}:make", arch="mlp")


def test_convolutional_architectures_take_their_sizes_from_the_file(tmp_path):
    torch.manual_seed(0)
    shapes = {"cnn_a": (1, 8 * 7 * 7), "conv_small": (0, 8 * 5 * 5)}
    for arch, (padding, features) in shapes.items():
        convolutions = [nn.Conv2d(1, 4, 4, 2, padding), nn.ReLU(), nn.Conv2d(4, 8, 4, 2, padding), nn.ReLU()]
        net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(features, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
        torch.save(net.state_dict(), tmp_path / "net.pth")
        model = models.load(str(tmp_path / "net.pth"), arch=arch)
        assert model.shape == (1, 28, 28)
        x = torch.randn(2, 1, 28, 28)
        assert torch.equal(model.net(x), net(x))
    residual = ARCHITECTURES["resnet2b"].make({})
    torch.save({"state_dict": residual.state_dict()}, tmp_path / "res.pth")
    model = models.load(str(tmp_path / "res.pth"), arch="resnet2b")
    assert model.shape == (3, 32, 32)
    assert largest_slope(model.net, (3, 32, 32), points=2) <= certify.lipschitz(model.net, input_shape=model.shape).value


IMAGENET, CIFAR = [0.485, 0.456, 0.406], [0.4914, 0.4822, 0.4465]
SDP_FO = [0.49137, 0.48235, 0.44667], [0.24706, 0.24353, 0.26157]
PUBLISHED = {
    "mnist_2_20.pth": ("mlp", None, None, 0.84), "mnist_6_100_nat.pth": ("mlp", None, None, 0.94), "mnist_cnn_a_adv.model": ("cnn_a", None, None, 0.95),
    "mnist_conv_small_nat.pth": ("conv_small", [0.1307], [0.3081], 0.95),
    "cifar_base.pth": ("cnn_a", IMAGENET, [0.225], 0.60), "cifar_wide.pth": ("cnn_a", IMAGENET, [0.225], 0.62),
    "cifar_cnn_a_adv.model": ("cnn_a", *SDP_FO, 0.65), "cifar_cnn_a_mix.model": ("cnn_a", *SDP_FO, 0.75),
    "cifar_conv_small_pgd.pth": ("conv_small", CIFAR, [0.2023, 0.1994, 0.201], 0.62), "cifar_marabou_small.pth": ("conv_small", None, None, 0.62),
    "cifar_conv_small_sigmoid.pth": ("conv_small_sigmoid", CIFAR, [0.2023, 0.1994, 0.201], 0.65),
    "resnet2b.pth": ("resnet2b", CIFAR, [0.2471, 0.2435, 0.2616], 0.69),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_as_accurate_as_published(name):
    """With LIPNET_DATA, a folder with models/ (the weights), mnist/ and cifar10/."""
    folder = pathlib.Path(os.environ.get("LIPNET_DATA", ""))
    if "LIPNET_DATA" not in os.environ or not (folder / "models" / name).is_file():
        pytest.skip("LIPNET_DATA names no folder with the published weights in models/")
    arch, mean, std, least = PUBLISHED[name]
    model = models.load(str(folder / "models" / name), arch=arch, mean=mean, std=std)
    if name.startswith("mnist"):
        data = certify.data.load(f"mnist:{folder / 'mnist'}", model.shape)
        inputs, labels = data.inputs[:2000], data.labels[:2000]
    else:
        arrays = np.load(folder / "cifar10" / "cifar_exact_subset.npz")
        inputs, labels = arrays["x_test"].transpose(0, 3, 1, 2) / np.float32(255), arrays["y_test"]
    assert model.shape == inputs.shape[1:]
    with torch.no_grad():
        found = model.net(torch.from_numpy(inputs).to(next(model.net.parameters()).dtype)).argmax(1).numpy()
    assert np.mean(found == labels) > least


def test_a_shape_is_guessed_only_where_the_network_takes_one_size(tmp_path):
    file = tmp_path / "factory.py"
    file.write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))\n")
    torch.save(models.load(f"{file}:make").net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(ModelError, match="pass --input-shape"):
        _ = models.load(str(tmp_path / "net.pth"), arch=f"{file}:make").shape


def test_older_files_of_torch_are_read_too(mlp, tmp_path):
    net, _ = mlp
    torch.save(net.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    tensors, where = read_state_dict(tmp_path / "old.pt")
    assert where == ""
    assert all(torch.equal(tensors[name], tensor) for name, tensor in net.state_dict().items())
