"""Devices: one that is not there is refused in one sentence, several processes take one GPU each, float32 is float32, and a GPU certifies what a CPU does."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify.cli import main
from certify.device import ieee, usable
from certify.errors import CertifyError
from certify.smoothing import FixedN, Gaussian

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMOOTHING = ("--method", "smoothing", "--sigma", "0.25", "--n", "300", "--fixed", "--limit", "6")


def settings():
    backends = torch.backends
    parts = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    return [*(part.fp32_precision for part in parts), backends.cudnn.deterministic, backends.cudnn.benchmark]


@pytest.fixture
def model(tmp_path):
    """Whole numbers as weights, so that every logit is exact wherever it is computed."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rng = np.random.default_rng(0)
    net[1].weight.data = torch.from_numpy(rng.integers(-4, 5, (10, 64))).float()
    net[1].bias.data = torch.from_numpy(rng.integers(-4, 5, 10)).float()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    return net.eval()


def test_devices_that_are_not_there_are_refused():
    assert usable("cpu") == torch.device("cpu")
    for name in ("nonsense", "cuda:99", "", "tpu"):
        with pytest.raises(CertifyError, match=rf"cannot use the device '{name}' here: .+; take the device cpu"):
            usable(name)
    if not torch.cuda.is_available():
        with pytest.raises(CertifyError, match="'cuda' here"):
            usable("cuda")


@pytest.mark.parametrize(("variable", "value", "index"), [("LOCAL_RANK", "2", 2), ("SLURM_LOCALID", "5", 1), (None, None, 0)])
def test_processes_of_one_machine_take_one_gpu_each(variable, value, index, monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: asked.append(device))
    assert usable("cuda") == torch.device("cuda", index) == asked[-1]
    assert usable("cuda:3") == torch.device("cuda", 3)


def test_float32_is_float32_and_settings_are_put_back():
    before = settings()

    @ieee()
    def inside():
        assert settings() == ["ieee", "ieee", "ieee", True, False]
        raise KeyError("inside")

    for _ in range(2):
        with pytest.raises(KeyError):
            inside()
        assert settings() == before
    torch.set_float32_matmul_precision("high")
    try:
        with ieee():
            assert settings()[2] == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_preparation_and_batches_run_in_float32_proper(monkeypatch):
    seen = []

    class Looking(nn.Module):
        def forward(self, x):
            seen.append(settings()[0])
            return x.flatten(1)[:, :3] * 2

    method = certify.Smoothing(Gaussian(0.25), schedule=FixedN(10, 50))
    forward, *_ = method.prepared(Looking().eval(), (6,))
    assert set(seen) == {"ieee"}
    from certify.smoothing.method import _in_ieee

    seen.clear()
    _in_ieee(forward)(torch.zeros(2, 6))
    assert seen == ["ieee"]
    assert settings()[0] != "ieee"


def test_batches_are_larger_on_a_gpu():
    method, gpu = certify.Smoothing(Gaussian(0.25)), torch.device("cuda")
    assert [method.rows(shape) for shape in ((3, 32, 32), (3, 224, 224), (64,))] == [64, 32, 8192]
    assert [method.rows(shape, gpu) for shape in ((3, 32, 32), (3, 224, 224), (64,))] == [4096, 64, 65536]
    assert certify.Smoothing(Gaussian(0.25), batch=7).rows((64,), gpu) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_refuses_a_gpu_that_is_not_there(model, tmp_path, capsys):
    given = ["run", str(tmp_path / "net.pth"), "digits", "--arch", "mlp", "-o", str(tmp_path / "run")]
    assert main([*given, *SMOOTHING, "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert "cannot use the device 'cuda' here" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    assert main([*given, "--device", "cuda"]) == 2
    assert "--device is for --method smoothing" in capsys.readouterr().err
    audit = ["audit", str(tmp_path / "net.pth"), "digits", "--arch", "mlp", "-o", str(tmp_path / "audit"), "--sigma", "0.2", "--device", "cuda"]
    assert main(audit) == 2
    assert "cannot use the device 'cuda' here" in capsys.readouterr().err
    assert not (tmp_path / "audit").exists()


def test_a_folder_is_of_one_device(model, tmp_path, capsys):
    given = ["run", str(tmp_path / "net.pth"), "digits", "--arch", "mlp", "-o", str(tmp_path / "run"), *SMOOTHING]
    assert main(given) == 0
    file = tmp_path / "run" / "manifest.json"
    stored = json.loads(file.read_text())
    assert stored["device"] == "cpu"
    file.write_text(json.dumps({**stored, "device": "cuda"}))
    assert main(given) == 2
    assert "the folder was started with device cuda, now it is cpu" in capsys.readouterr().err


@GPU
@pytest.mark.parametrize("levels", [16, None])
def test_a_gpu_counts_what_a_cpu_does(levels, model):
    images = torch.from_numpy(certify.data.digits("test").inputs[:8])
    method = certify.Smoothing(Gaussian(0.25), schedule=FixedN(100, 2000), levels=levels)
    here, there = method.certify(model, images), method.certify(lipnet.freeze(model).cuda(), images)
    assert np.array_equal(here.prediction, there.prediction)
    assert np.array_equal(here.radius, there.radius) if levels else np.allclose(here.radius, there.radius, atol=0.02)


@GPU
def test_the_command_gives_the_same_rows_on_a_gpu(model, tmp_path):
    rows = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        given = ["run", str(tmp_path / "net.pth"), "digits", "--arch", "mlp", "-o", str(folder), "--quiet", "--levels", "16", "--device", device]
        assert main([*given, *SMOOTHING]) == 0
        assert json.loads((folder / "manifest.json").read_text())["device"] == device
        lines = (folder / "results.jsonl").read_text().splitlines()
        rows.append([{key: value for key, value in json.loads(line).items() if key != "run"} for line in lines])  # the run is of a device
    assert rows[0] == rows[1]
