"""What once certified another function than the network, or ended in a traceback: smoothing refuses it, leaves it as it is, or says it in one sentence."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify import data
from certify.cli import main
from certify.errors import CertifyError
from certify.methods import lipschitz
from certify.smoothing import FixedN, Gaussian, Softmax, UniformTo
from certify.smoothing.method import Smoothing
from certify.smoothing.prepare import close, prepared

SHORT = FixedN(n0=50, n=500, alpha=0.05)


class Mixes(nn.Module):
    """A logit depends on the other rows, and one class is masked, whose size is that of all rounding errors together."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        z = self.linear(x)
        z = z - 3 * z.nan_to_num().mean(0, keepdim=True)
        return torch.cat([z, torch.full_like(z[:, :1], -1e9)], dim=1)


@pytest.mark.parametrize("batch", [2, 3, 256])
def test_a_masked_class_does_not_hide_what_the_rows_of_a_batch_do_to_each_other(batch):
    torch.manual_seed(0)
    with pytest.raises(CertifyError, match="depends on the other inputs of its batch"):
        certify.robustness(Mixes().eval(), torch.rand(2, 8), Smoothing(Gaussian(0.2), schedule=SHORT, batch=batch))


def test_a_masked_class_is_no_reason_to_refuse():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, x):
            return torch.nn.functional.pad(self.linear(x), (0, 1), value=-1e9)

    torch.manual_seed(0)
    assert all(prepared(Masked().eval(), (8,), batch)[1] == 4 for batch in (1, 2, 64))


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_close_allows_rounding_and_no_more(offset):
    torch.manual_seed(0)
    expected = torch.randn(64, 5) + offset
    assert close(expected * (1 + 1e-6), expected)
    assert not close(torch.cat([expected[:, :1] * 1.01, expected[:, 1:]], dim=1), expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("where", ["root", "linear", "relu"])
def test_a_module_with_a_forward_of_its_own_is_run_as_it_is(where, shared):
    """It cuts off where no random batch goes: what was traced by type lost it, and was certified instead."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval().requires_grad_(False)
    module = {"root": net, "linear": net[0], "relu": net[1]}[where]
    usual = module.forward
    module.forward = lambda x: usual(x).clamp(-50, 50)
    method = Smoothing(Gaussian(0.2), schedule=SHORT, batch=2048, shared=shared)
    forward, _, _ = method.prepared(net, (8,))
    x = 1e4 * torch.rand(2048, 8)
    assert torch.equal(forward(x), net(x))


def test_a_network_that_cannot_be_copied_is_refused_in_a_sentence():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, x):
            self.seen = self.linear(x)
            return self.seen

    net = Keeps().eval()
    net(torch.rand(2, 8))
    with pytest.raises(CertifyError, match="cannot be copied"):
        prepared(net, (8,), 64)


def test_a_lipschitz_constant_is_for_copies_that_float32_holds():
    """Beyond 2^24 steps of the grid float32 moves a copy by more than the half step that was taken from the probabilities."""
    net = nn.Sequential(nn.Linear(2, 3)).eval()
    bound = lipschitz(net, input_shape=(2,))
    method = Smoothing(Gaussian(0.001), Softmax(1.0), SHORT, levels=65536, lipschitz=bound)
    method.place(np.full((1, 2), 100.0))
    with pytest.raises(CertifyError, match="take fewer levels"):
        method.place(np.full((1, 2), 300.0))


@pytest.mark.parametrize(("levels", "temperature"), [(1, 0.05), (255, 1e-6)])
def test_a_grid_too_coarse_for_the_lipschitz_constant_is_named(levels, temperature):
    net = nn.Sequential(nn.Linear(6, 3)).eval()
    method = Smoothing(Gaussian(0.1), Softmax(temperature), SHORT, levels=levels, lipschitz=lipschitz(net, input_shape=(6,)))
    with pytest.raises(CertifyError, match=f"the grid of {levels} levels .* take more levels"):
        certify.robustness(net, torch.rand(1, 6), method)


def test_soft_scores_are_summed_exactly_of_the_copies_that_choose_too():
    with pytest.raises(CertifyError, match="fewer than 2\\^23 copies, got 8388608"):
        Smoothing(Gaussian(1.0), Softmax(1.0), FixedN(n0=2**23, n=1000, alpha=0.05))


def test_inputs_in_bfloat16_are_the_numbers_that_they_are():
    net, x = nn.Sequential(nn.Linear(6, 3)).eval(), torch.rand(3, 6).bfloat16()
    for method in (Smoothing(Gaussian(0.1), schedule=SHORT), certify.Mixed(Smoothing(Gaussian(0.1), schedule=SHORT), net, 0.8)):
        np.testing.assert_array_equal(certify.robustness(net, x, method).radius, certify.robustness(net, x.float(), method).radius)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bound": Gaussian(1.0)},
        {"bound": True},
        {"schedule": Softmax(1.0)},
        {"scores": "hard"},
        {"target": "1"},
        {"tolerance": (1, 2)},
        {"engine": UniformTo(1.0)},
        {"shared": 3.7},
        {"vote_margin": None},
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_refused_in_a_sentence(wrong):
    with pytest.raises(CertifyError, match=f"{next(iter(wrong))}="):
        Smoothing(Gaussian(1.0), **wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("review")
    lipnet.save(nn.Sequential(nn.Linear(64, 10)), path / "net.safetensors", input_shape=(64,), input_range=(0.0, 1.0))
    digits = data.digits("test")
    np.savez(path / "few.npz", x=digits.inputs[:3], y=digits.labels[:3])
    few = ("--n", "200", "--n0", "20", "--alpha", "0.05", "--quiet")
    command = ["run", str(path / "net.safetensors"), str(path / "few.npz"), "-o", str(path / "run"), "--method", "smoothing"]
    assert main([*command, "--noise", "laplace", "--scale", "0.1", "--shared-noise", *few]) == 0
    return path / "run"


def tampered(folder, to, change):
    shutil.copytree(folder, to)
    manifest = json.loads((to / "manifest.json").read_text())
    change(manifest)
    (to / "manifest.json").write_text(json.dumps(manifest))
    return str(to)


@pytest.mark.parametrize("value", [-1, True, [[]], {"a": 1}, "x"], ids=str)
@pytest.mark.parametrize("place", ["selection", "input.range", "assumptions", "assumption_sentences", "model.input_shape"])
def test_a_report_of_a_changed_manifest_is_one_or_one_sentence(folder, tmp_path, capsys, place, value):
    def change(manifest):
        *path, last = place.split(".")
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    assert main(["report", tampered(folder, tmp_path / "t", change), "--html", str(tmp_path / "page.html")]) in (0, 2)
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize("text", ["bound=Gaussian(sigma=1.0)", "target='x'", "tolerance=Uniform(half_width=1.0)", "engine=Softmax()", "shared=2.5"])
def test_check_of_a_changed_method_is_one_sentence(folder, tmp_path, capsys, text):
    def change(manifest):
        name = text.split("=")[0]
        head, _, rest = manifest["method"].partition(f"{name}=")
        manifest["method"] = head + text + rest[rest.index(", ") :]

    assert main(["check", tampered(folder, tmp_path / "t", change)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_compares_the_range_of_the_inputs_with_the_model(folder, tmp_path, capsys):
    assert main(["check", tampered(folder, tmp_path / "t", lambda manifest: manifest["input"].update(range=[0.0, 255.0]))]) == 4
    assert "input.range" in capsys.readouterr().out
