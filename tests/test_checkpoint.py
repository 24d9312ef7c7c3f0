"""Checkpoints: what was saved comes back to the bit, everything else is refused in one sentence, and nothing in a file is ever run."""

import builtins
import hashlib
import importlib
import json
import os
import pathlib
import pickle
import random
import stat
import struct
import sys
import time

import pytest
import safetensors.torch
import tables
import torch
from torch import nn

import lipnet
from lipnet import checkpoint

# Round trip

MORE = {
    "householder-turned": (lambda: turned(lipnet.Householder(6)), (6, 2)),
    "sandwich-everything": (lambda: lipnet.SandwichLinear(5, 4, nn.LeakyReLU(0.3), lipnet.Cholesky(0.25), bias=False), (5,)),
    "sandwich-aol-abs": (lambda: lipnet.SandwichLinear(5, 4, lipnet.Abs(), lipnet.AOL()), (5,)),
    "ldlt-softplus": (lambda: lipnet.LDLTBlock(4, 3, [5, 2], nn.Softplus(2.0, 5.0), 0.75, lipnet.Cayley()), (4,)),
    "gershgorin-elu": (lambda: lipnet.GershgorinBlock(4, 3, (5,), nn.ELU(0.5, inplace=True), 1e-3), (4,)),
    "bro-rank": (lambda: lipnet.BROLinear(6, 4, rank=2), (6,)),
    "normalize-one": (lambda: lipnet.Normalize([0.1], [1 / 3]), (1, 4)),
    "scale": (lambda: lipnet.Scale(0.1), (3,)),
    "unit-rows-no-bias": (lambda: lipnet.UnitRowLinear(5, 3, bias=False), (5,)),
    "groupsort-1": (lambda: lipnet.GroupSort(1), (5,)),
    "linear-no-bias": (lambda: nn.Linear(3, 2, bias=False), (3,)),
    "flatten": (lambda: nn.Flatten(2, 3), (2, 3, 4, 5)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 3)), (6,)),
    "identity": (nn.Identity, (2,)),
    "dropout": (lambda: nn.Dropout(0.75), (50,)),
    "leaky": (lambda: nn.LeakyReLU(0.25, inplace=True), (9,)),
    "elu": (lambda: nn.ELU(1.5), (9,)),
    "celu": (lambda: nn.CELU(0.5), (9,)),
    "hardtanh": (lambda: nn.Hardtanh(-0.25, 0.5), (9,)),
    "gelu-tanh": (lambda: nn.GELU("tanh"), (9,)),
    "softplus": (lambda: nn.Softplus(3.0, 1.0), (9,)),
    "sequential-empty": (nn.Sequential, (3,)),
    **{kind.__name__: (kind, (9,)) for kind in (nn.ReLU, nn.ReLU6, nn.SELU, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.SiLU, nn.GELU, nn.LogSigmoid)},
}
EXAMPLES = {**{row.name: (row.make, row.shape) for row in tables.LAYERS}, **MORE}
each = pytest.mark.parametrize(("make", "shape"), EXAMPLES.values(), ids=EXAMPLES)


def turned(layer):
    with torch.no_grad():
        layer.angle.add_(torch.linspace(0.1, 0.9, len(layer.angle)))
    return layer


def classifier():
    """A network with a module of every family, nested."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        lipnet.Normalize([0.5], [0.25]),
        nn.Sequential(lipnet.SandwichLinear(12, 10, nn.Tanh(), lipnet.Cholesky(0.5)), nn.Sequential(lipnet.BROLinear(10, 8, rank=3), lipnet.MaxMin())),
        lipnet.LDLTBlock(8, 8, (5, 6), lipschitz=1.25),
        lipnet.GroupSort(4),
        lipnet.GershgorinBlock(8, 6, (4,), nn.LeakyReLU(0.2)),
        lipnet.Householder(6),
        nn.Dropout(0.5),
        nn.Linear(6, 6),
        lipnet.Abs(),
        lipnet.Scale(0.5),
        lipnet.UnitRowLinear(6, 3),
    )


def same(a, b):
    """Equal state dicts: names, dtypes and bits."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_module_comes_back_to_the_bit(make, shape, dtype, tmp_path):
    torch.manual_seed(1)
    net = make().to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lipnet.save(net, tmp_path / "net.safetensors")
    loaded = lipnet.load(tmp_path / "net.safetensors")
    assert type(loaded) is type(net)
    assert repr(loaded) == repr(net).replace(", inplace=True", "").replace("inplace=True", "")  # every constructor argument
    assert same(loaded, net)
    assert not any(module.training for module in loaded.modules())
    x = torch.randn(5, *shape, dtype=dtype)
    assert torch.equal(loaded(x.clone()), net.eval()(x.clone()))


def test_there_is_an_example_of_every_call():
    """A module that is added to the table of calls gets a round trip here."""
    seen = {"torch.nn.Sequential"}
    for make, _ in EXAMPLES.values():
        for module in make().modules():
            seen.add(checkpoint._NAMES.get(type(module)))
            seen.add(checkpoint._NAMES.get(type(getattr(module, "orthonormalizer", None))))
    assert set(checkpoint.CALLS) <= seen


def test_a_nested_network_comes_back_to_the_bit(tmp_path):
    net = classifier()
    assert net.training
    lipnet.save(net, tmp_path / "net.safetensors")
    assert net.training  # saving changes nothing
    loaded = lipnet.load(str(tmp_path / "net.safetensors"))
    assert repr(loaded) == repr(net)
    assert same(loaded, net)
    x = torch.randn(7, 1, 12)
    assert torch.equal(loaded(x), net.eval()(x))
    assert all(p.requires_grad for p in loaded.parameters())
    assert all(p.device.type == "cpu" for p in loaded.state_dict().values())


def test_arguments_come_back_with_their_values(tmp_path):
    net = nn.Sequential(
        lipnet.SandwichLinear(3, 4, nn.ELU(0.5), lipnet.Cholesky(0.125)),
        lipnet.LDLTBlock(4, 2, [3], nn.Hardtanh(-2.0, 3.0), 0.1, lipnet.AOL()),
        nn.Unflatten(1, (1, 2)),
    )
    lipnet.save(net, tmp_path / "net.safetensors")
    sandwich, block, unflatten = lipnet.load(tmp_path / "net.safetensors")
    assert sandwich.orthonormalizer == lipnet.Cholesky(0.125)
    assert (type(sandwich.activation), sandwich.activation.alpha) == (nn.ELU, 0.5)
    assert (block.orthonormalizer, block.hidden, block.lipschitz) == (lipnet.AOL(), (3,), 0.1)
    assert (block.activation.min_val, block.activation.max_val) == (-2.0, 3.0)
    assert unflatten.unflattened_size == (1, 2)


def test_names_of_a_sequential_are_kept(tmp_path):
    net = nn.Sequential()
    net.add_module("stem", nn.Linear(2, 3))
    net.add_module("ünïcode head", nn.Linear(3, 2))
    lipnet.save(net, tmp_path / "net.safetensors")
    assert [name for name, _ in lipnet.load(tmp_path / "net.safetensors").named_children()] == ["stem", "ünïcode head"]


def test_mixed_and_half_precision_are_kept(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4).bfloat16(), nn.Linear(4, 4).double(), nn.Linear(4, 2).half(), lipnet.Householder(2))
    lipnet.save(net, tmp_path / "net.safetensors")
    loaded = lipnet.load(tmp_path / "net.safetensors")
    assert [loaded[i].weight.dtype for i in range(3)] == [torch.bfloat16, torch.float64, torch.float16]
    assert same(loaded, net)
    x = torch.randn(5, 3).bfloat16()
    assert torch.equal(loaded[0](x), net[0](x))


def test_numbers_that_are_hard_to_write_are_kept(tmp_path):
    net = nn.Sequential(lipnet.Scale(0.1 + 0.2), nn.Linear(2, 3, dtype=torch.float64))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[5e-324, -0.0], [1.7976931348623157e308, 1e-300], [0.1, 1 / 3]]))
    lipnet.save(net, tmp_path / "net.safetensors")
    loaded = lipnet.load(tmp_path / "net.safetensors")
    assert loaded[0].factor == 0.1 + 0.2
    assert torch.equal(loaded[1].weight.view(torch.int64), net[1].weight.view(torch.int64))  # -0.0 too


def test_memory_that_is_shared_or_not_contiguous_is_no_obstacle(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].weight.data = torch.arange(9.0).reshape(3, 3).T
    net[1].weight = net[0].weight
    lipnet.save(net, tmp_path / "net.safetensors")
    assert same(lipnet.load(tmp_path / "net.safetensors"), net)


def test_a_module_that_is_used_twice_is_there_twice(tmp_path):
    torch.manual_seed(0)
    shared = lipnet.MaxMin()
    net = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared).eval()
    try:
        lipnet.save(net, tmp_path / "net.safetensors")
    except lipnet.CheckpointError:
        return  # refusing it would do
    x = torch.randn(20, 4)
    assert torch.equal(lipnet.load(tmp_path / "net.safetensors")(x), net(x))


def test_facts_of_the_input_come_back(tmp_path):
    path = tmp_path / "net.safetensors"
    lipnet.save(nn.ReLU(), path, input_shape=(1, 28, 28), input_range=(-0.5, 1.0), classes=("cat", "dög", ""))
    found = lipnet.open_checkpoint(path)
    assert (found.input_shape, found.input_range, found.classes) == ((1, 28, 28), (-0.5, 1.0), ("cat", "dög", ""))
    assert isinstance(found.net, nn.ReLU)
    lipnet.save(nn.ReLU(), path)
    found = lipnet.open_checkpoint(path)
    assert (found.input_shape, found.input_range, found.classes) == (None, None, None)


def test_saving_and_loading_leave_the_random_numbers_alone(tmp_path):
    net = classifier()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    lipnet.save(net, tmp_path / "net.safetensors")
    lipnet.load(tmp_path / "net.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_networks_make_equal_files(tmp_path):
    lipnet.save(classifier(), tmp_path / "a")
    lipnet.save(classifier(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Writing


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    lipnet.save(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        lipnet.save(nn.Linear(3, 3), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_overwrites_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "net.safetensors"
    lipnet.save(nn.Linear(2, 2), path)
    lipnet.save(nn.Linear(3, 5), path)
    assert lipnet.load(path).weight.shape == (5, 3)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX modes")
def test_a_file_gets_the_mode_of_any_new_file(tmp_path):
    lipnet.save(nn.ReLU(), tmp_path / "a")
    (tmp_path / "b").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


class Custom(nn.Module):
    def forward(self, x):
        return x


class Narrow(nn.Linear):
    pass


class Chain(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("make", "kind", "where"),
    [
        (lambda: Custom(), "Custom", "''"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), Custom())), "Custom", "'1.1'"),
        (lambda: nn.Sequential(Narrow(2, 2)), "Narrow", "'0'"),
        (lambda: nn.Sequential(Chain(nn.ReLU())), "Chain", "'0'"),
        (lambda: nn.Sequential(nn.LSTM(2, 2)), "LSTM", "'0'"),
        (lambda: nn.Sequential(lipnet.SandwichLinear(2, 2, Custom())), "Custom", "'0.activation'"),
        (lambda: nn.Sequential(nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))), "ParametrizedLinear", "'1'"),
    ],
)
def test_what_is_not_in_the_table_is_refused_by_name_and_place(make, kind, where, tmp_path):
    with pytest.raises(lipnet.CheckpointError, match=rf"{kind} \(at {where}\) is neither.*keep the code that builds") as caught:
        lipnet.save(make(), tmp_path / "net.safetensors")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_module_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(lipnet.CheckpointError, match=r"(?s)Custom.*'1'.*LSTM.*'2'"):
        lipnet.save(nn.Sequential(nn.ReLU(), Custom(), nn.LSTM(2, 2)), tmp_path / "net.safetensors")


def test_a_network_that_was_changed_by_hand_is_refused(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight = nn.Parameter(torch.zeros(5, 2))
    with pytest.raises(lipnet.CheckpointError, match=r"differs from what its constructor arguments rebuild: '0.weight' is \(5, 2\), expected \(2, 2\)"):
        lipnet.save(net, tmp_path / "net.safetensors")
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_buffer("extra", torch.zeros(1))
    with pytest.raises(lipnet.CheckpointError, match=r"'0.extra' is \(1,\), expected no such tensor"):
        lipnet.save(net, tmp_path / "net.safetensors")


def test_the_constant_of_a_block_at_every_pixel_is_that_of_its_block(tmp_path):
    """It had one of its own, which a file kept in place of the one that the block runs."""
    torch.manual_seed(0)
    layer = lipnet.LDLTConv2d(2, 2, [3]).eval()
    layer.block.lipschitz = 5.0
    lipnet.save(layer, tmp_path / "net.safetensors")
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(lipnet.load(tmp_path / "net.safetensors")(x), layer(x))
    with pytest.raises(AttributeError):
        layer.lipschitz = 2.0


@pytest.mark.parametrize("change", ["forward hook", "forward pre-hook", "forward"])
def test_a_network_that_does_more_than_its_modules_is_refused(change, tmp_path):
    net = nn.Sequential(nn.Linear(2, 2))
    if change == "forward hook":
        net[0].register_forward_hook(lambda module, inputs, output: 5 * output)
    elif change == "forward pre-hook":
        net.register_forward_pre_hook(lambda module, inputs: (5 * inputs[0],))
    else:
        net[0].forward = lambda x: 5 * x
    with pytest.raises(lipnet.CheckpointError):
        lipnet.save(net, tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    "facts",
    [
        {"input_range": (0.0, float("nan"))},
        {"input_range": (1.0, 0.0)},
        {"input_range": (0.0,)},
        {"input_shape": ("a",)},
        {"input_shape": (-3,)},
        {"input_shape": (0,)},
        {"input_shape": (2.5,)},
        {"classes": "abc"},
    ],
    ids=str,
)
def test_facts_that_make_no_sense_are_refused_when_saving(facts, tmp_path):
    with pytest.raises(ValueError, match=r"(?i)range|shape|class"):
        lipnet.save(nn.ReLU(), tmp_path / "net.safetensors", **facts)
    assert list(tmp_path.iterdir()) == []


# Files that are not checkpoints


def refused(path, match=None):
    """The one sentence with which a file is refused."""
    with pytest.raises(lipnet.CheckpointError, match=match) as caught:
        lipnet.open_checkpoint(path)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), lipnet.GroupSort(3), nn.Linear(3, 2))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\0" * 8,
        b"\0" * 9,
        b"\x10\0\0\0\0\0\0\0{",
        b"<!DOCTYPE html>\n<html><body>404: Not found</body></html>\n" * 20,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        struct.pack("<Q", 2**64 - 1) + b"{" + b" " * 100,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**6) + b"{}" + b" " * 98,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"{}" + b"\0" * 50,
        struct.pack("<Q", 8) + b"{\xff\xfe\xfd   }",
        struct.pack("<Q", 16) + b'{"a": [1, 2, 3]}',
        struct.pack("<Q", 9) + b"{}}}}}}}}",
        pickle.dumps({"weight": [1.0, 2.0]}),
        b"PK\x03\x04" + b"\0" * 100,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    assert str(path) in refused(path)


def test_missing_files_and_directories_are_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "missing.safetensors")
    assert "directory" in refused(tmp_path)
    refused(tmp_path / ("x" * 300), "cannot be read")


def test_a_name_that_no_file_can_have_is_refused():
    with pytest.raises(lipnet.CheckpointError):
        lipnet.load("net\0.safetensors")


class Malicious:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def test_pickles_are_refused_and_never_run(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "net.safetensors"
    path.write_bytes(pickle.dumps(Malicious(trace)))
    refused(path, "not a safetensors file")
    torch.save({"net": Malicious(trace)}, path)
    refused(path, "not a safetensors file")
    assert not trace.exists()


def test_tensors_without_a_description_are_refused_with_advice(tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "net.safetensors")
    refused(tmp_path / "net.safetensors", "no description of a network; write it with lipnet.save")


# Tampering


def content(path):
    """Everything that a caller gets from a file."""
    found = lipnet.open_checkpoint(path)
    tensors = {name: (tensor.dtype, tensor.numpy(force=True).tobytes()) for name, tensor in found.net.state_dict().items()}
    return repr(found.net), tensors, found.input_shape, found.input_range, found.classes


def outcome(path):
    """What a file gives, and the sentence with which it is refused: one of the two is None. Any other exception is the test's failure."""
    try:
        return content(path), None
    except lipnet.CheckpointError as error:
        return None, str(error)


def tampered(path, data, original, what):
    """Whether changed bytes are refused; if they are not, all that comes back must be what it was (a space of the padding that became another one)."""
    path.write_bytes(data)
    found, message = outcome(path)
    if message is None:
        assert found == original, what
        return False
    assert message, what
    assert "\n" not in message, what
    return True


def test_a_file_with_one_changed_byte_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    lipnet.save(small(), path, input_shape=(4,), input_range=(0.0, 1.0), classes=("a", "b"))
    good, original = path.read_bytes(), content(path)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    pick = random.Random(0)
    places = [*range(8), *(pick.randrange(8, header) for _ in range(172)), *(pick.randrange(header, len(good)) for _ in range(120))]
    kept = 0
    for place in places:
        value = good[place] ^ (1 << pick.randrange(8)) if pick.random() < 0.7 else pick.choice([b for b in range(256) if b != good[place]])
        kept += not tampered(path, good[:place] + bytes([value]) + good[place + 1 :], original, f"byte {place} became {value}")
    assert kept <= 3
    assert not tampered(path, good, original, "nothing")


def test_a_file_that_is_cut_off_or_longer_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    lipnet.save(small(), path)
    good, original = path.read_bytes(), content(path)
    pick = random.Random(1)
    for length in {0, 1, 7, 8, 9, 10, len(good) - 1, len(good) - 4, *(pick.randrange(len(good)) for _ in range(52))}:
        assert tampered(path, good[:length], original, f"cut to {length}")
    for extra in (b"\0", b"x" * 4, good):
        assert tampered(path, good + extra, original, f"{len(extra)} more bytes")
    assert tampered(path, good[1:], original, "first byte missing")
    assert tampered(path, good[: len(good) // 2] + good[len(good) // 2 + 1 :], original, "middle byte missing")


def test_swapped_weights_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    lipnet.save(small(), path)
    good = path.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    path.write_bytes(good[:header] + good[header + 4 : header + 8] + good[header : header + 4] + good[header + 8 :])
    refused(path, "its sha256 does not match")


# Files by someone who knows the format


def call(name, **arguments):
    return {"call": name, "args": arguments}


def about(net, **changes):
    return {"schema": 1, "lipnet": "0", "net": net, "input": {"shape": None, "range": None}, "classes": None, **changes}


def forge(path, description, tensors=None):
    """A file with any description (a dict, or the text itself) and any tensors, and the right sha256."""
    text = description if isinstance(description, str) else json.dumps(description)
    tensors = tensors or {}
    path.write_bytes(safetensors.torch.save(tensors, {"lipnet": text, "sha256": checkpoint._digest(text, tensors)}))
    return path


LINEAR = call("torch.nn.Linear", in_features=2, out_features=3)
WEIGHTS = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
SANDWICH = {"log_psi": torch.zeros(2), "free": torch.ones(2, 4), "bias": torch.zeros(2)}


def test_a_forged_file_that_is_right_is_accepted(tmp_path):
    """So that the refusals below are of what they change."""
    assert lipnet.load(forge(tmp_path / "net", about(LINEAR), WEIGHTS)).weight.tolist() == [[1.0, 1.0]] * 3
    assert lipnet.load(forge(tmp_path / "net", about(call("lipnet.SandwichLinear", in_features=2, out_features=2)), SANDWICH)).out_features == 2
    facts = {"input": {"shape": [2], "range": [0, 1]}, "classes": ["a", "b", "c"]}
    assert lipnet.open_checkpoint(forge(tmp_path / "net", about(LINEAR, **facts), WEIGHTS)).classes == ("a", "b", "c")


def test_the_digest_is_of_names_dtypes_shapes_and_bytes(tmp_path):
    """The format, once, without the library's own function."""
    text, weight = json.dumps(about(call("torch.nn.Linear", in_features=2, out_features=1, bias=False))), torch.tensor([[1.0, 2.0]])
    digest = hashlib.sha256(text.encode() + b"weight torch.float32 (1, 2)" + struct.pack("<2f", 1, 2)).hexdigest()
    (tmp_path / "net").write_bytes(safetensors.torch.save({"weight": weight}, {"lipnet": text, "sha256": digest}))
    assert lipnet.load(tmp_path / "net").weight.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "subprocess.run",
        "torch.load",
        "torch.nn.Conv2d",
        "torch.nn.Module",
        "lipnet.load",
        "lipnet.layers.MaxMin",
        "",
        "ReLU",
    ],
)
@pytest.mark.parametrize("where", ["top", "child", "argument"])
def test_calls_outside_the_table_are_refused_and_nothing_runs(name, where, tmp_path, monkeypatch):
    ran = []
    for module, function in ((os, "system"), (builtins, "eval"), (builtins, "exec"), (importlib, "import_module"), (torch, "load")):
        monkeypatch.setattr(module, function, lambda *args, **kwargs: ran.append(args))
    bad = call(name, command=f"touch {tmp_path / 'trace'}")
    net = {
        "top": bad,
        "child": call("torch.nn.Sequential", a=call("torch.nn.ReLU"), b=bad),
        "argument": call("lipnet.SandwichLinear", in_features=2, out_features=2, activation=bad),
    }
    path = forge(tmp_path / "net", about(net[where]))
    with pytest.raises(lipnet.CheckpointError) as caught:
        lipnet.load(path)
    monkeypatch.undo()
    assert repr(name) in str(caught.value)
    assert "none of the modules that a checkpoint may hold" in str(caught.value)
    assert ran == []
    assert list(tmp_path.iterdir()) == [path]


def test_loading_imports_nothing_by_name(tmp_path, monkeypatch):
    path = tmp_path / "net"
    lipnet.save(classifier(), path)
    before = set(sys.modules)

    def fail(*args, **kwargs):
        raise AssertionError(f"imported {args}")

    monkeypatch.setattr(importlib, "import_module", fail)
    loaded = lipnet.load(path)
    monkeypatch.undo()
    assert same(loaded, classifier())
    assert set(sys.modules) == before


HUGE = 10**12


@pytest.mark.parametrize(
    "net",
    [
        call("torch.nn.Linear", in_features=HUGE, out_features=1),
        call("torch.nn.Linear", in_features=HUGE, out_features=HUGE),
        call("torch.nn.Linear", in_features=10**30, out_features=1),
        call("torch.nn.Linear", in_features=10**8, out_features=4),
        call("lipnet.BROLinear", in_features=10**8, out_features=1, rank=4),
        call("lipnet.SandwichLinear", in_features=10**8, out_features=4),
        call("lipnet.UnitRowLinear", in_features=HUGE, out_features=1),
        call("lipnet.Householder", channels=10**9),
        call("lipnet.LDLTBlock", in_features=2, out_features=2, hidden=[10**8, 4]),
        call("lipnet.GershgorinBlock", in_features=HUGE, out_features=2, hidden=[1]),
        call("torch.nn.Sequential", **{str(i): call("torch.nn.Linear", in_features=10**7, out_features=10) for i in range(20)}),
    ],
    ids=lambda net: net["call"],
)
def test_huge_sizes_are_refused_without_memory_or_time(net, tmp_path):
    resource = pytest.importorskip("resource")
    path = forge(tmp_path / "net", about(net), WEIGHTS)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux; the smallest of these would take 400 MB
    assert grown < 100 * 1024 or sys.platform != "linux"
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "nonsense"])
def test_a_file_has_no_say_in_where_tensors_live(device, tmp_path):
    refused(forge(tmp_path / "net", about({**LINEAR, "args": {**LINEAR["args"], "device": device}}), WEIGHTS), "device")


@pytest.mark.parametrize("depth", [2_000, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":', '{"call":"torch.nn.Sequential","args":{"0":'])
def test_deep_nesting_is_refused(depth, opening, tmp_path):
    closing = {"[": "]", '{"a":': "}"}.get(opening, "}}")
    text = json.dumps(about("HERE")).replace('"HERE"', opening * depth + "0" + closing * depth)
    refused(forge(tmp_path / "net", text), "recursion|nest")


def test_nesting_as_deep_as_it_can_be_built_gives_a_network_or_a_sentence(tmp_path):
    loaded = []
    for depth in range(50, 500, 25):
        opening, closing = '{"call": "torch.nn.Sequential", "args": {"0": ' * depth, "}}" * depth
        text = json.dumps(about("HERE")).replace('"HERE"', opening + json.dumps(call("torch.nn.ReLU")) + closing)
        found, message = outcome(forge(tmp_path / "net", text))
        loaded.append(found is not None)
        assert found is not None or "\n" not in message
    assert loaded[0]
    assert not loaded[-1]


@pytest.mark.parametrize(
    "net",
    [
        call("torch.nn.Linear", in_features=2),
        call("torch.nn.Linear", in_features=2, out_features=3, width=4),
        call("torch.nn.Linear", in_features="2", out_features=3),
        call("torch.nn.Linear", in_features=2.0, out_features=3),
        call("torch.nn.Linear", in_features=None, out_features=3),
        call("torch.nn.Linear", in_features=[2], out_features=3),
        call("torch.nn.Linear", in_features=-2, out_features=3),
        call("torch.nn.Linear", in_features=call("torch.nn.ReLU"), out_features=3),
        call("lipnet.BROLinear", in_features=0, out_features=3),
        call("lipnet.BROLinear", in_features=-1, out_features=3),
        call("lipnet.BROLinear", in_features=2, out_features=3, rank=4),
        call("lipnet.BROLinear", in_features=2.0, out_features=3),
        call("lipnet.UnitRowLinear", in_features=True, out_features=3),
        call("lipnet.LDLTBlock", in_features=2, out_features=3, hidden=[]),
        call("lipnet.LDLTBlock", in_features=2, out_features=3, hidden=4),
        call("lipnet.LDLTBlock", in_features=2, out_features=3, hidden="45"),
        call("lipnet.LDLTBlock", in_features=2, out_features=3, hidden=[[4]]),
        call("lipnet.LDLTBlock", in_features=2, out_features=3, hidden=[4], lipschitz=-1),
        call("lipnet.GershgorinBlock", in_features=2, out_features=3, hidden=[4], lipschitz="1"),
        call("lipnet.GershgorinBlock", in_features=2, out_features=3, hidden=[4], orthonormalizer=call("lipnet.Cayley")),
        call("lipnet.SandwichLinear", in_features=2, out_features=2, orthonormalizer=call("lipnet.Cholesky", ridge=0)),
        call("lipnet.Householder", channels=3),
        call("lipnet.GroupSort", size=0),
        call("lipnet.GroupSort", size="4"),
        call("lipnet.MaxMin", size=2),
        call("lipnet.Scale", factor=0),
        call("lipnet.Scale", factor="3"),
        call("lipnet.Normalize", mean=[0.0], std=[0.0]),
        call("lipnet.Normalize", mean=[0.0], std=[1.0, 2.0]),
        call("lipnet.Normalize", mean=["0"], std=[1.0]),
        call("lipnet.Normalize", mean=0.0, std=1.0),
        call("torch.nn.Unflatten", dim=1, unflattened_size=[2, "3"]),
        call("torch.nn.Dropout", p=2),
        call("torch.nn.Dropout", p="0.5"),
        call("torch.nn.Sequential", a=3),
        call("torch.nn.Sequential", **{"a.b": call("torch.nn.ReLU")}),
        call("torch.nn.Sequential", **{"": call("torch.nn.ReLU")}),
        call("torch.nn.Sequential", forward=call("torch.nn.ReLU")),
        call("torch.nn.Sequential", _modules=call("torch.nn.ReLU")),
        call("torch.nn.Sequential", a=call("lipnet.Cayley")),
        {"call": "torch.nn.ReLU"},
        {"args": {}},
        {},
        {"call": "torch.nn.ReLU", "args": [1]},
        {"call": "torch.nn.ReLU", "args": None},
        {"call": ["torch.nn.ReLU"], "args": {}},
        {"call": {"call": "torch.nn.ReLU", "args": {}}, "args": {}},
        {"call": None, "args": {}},
        {"call": "torch.nn.Sequential", "args": [{"call": "torch.nn.ReLU", "args": {}}]},
    ],
    ids=lambda net: json.dumps(net)[:90],
)
def test_calls_with_wrong_arguments_are_refused(net, tmp_path):
    refused(forge(tmp_path / "net", about(net)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation": 3},
        {"activation": "relu"},
        {"activation": call("lipnet.Cayley")},
        {"orthonormalizer": "Cayley"},
        {"orthonormalizer": call("torch.nn.ReLU")},
        {"bias": "no"},
    ],
    ids=json.dumps,
)
def test_arguments_of_the_wrong_type_are_refused(arguments, tmp_path):
    refused(forge(tmp_path / "net", about(call("lipnet.SandwichLinear", in_features=2, out_features=2, **arguments)), SANDWICH))


@pytest.mark.parametrize(
    ("net", "tensors"),
    [
        (call("torch.nn.Linear", in_features=2, out_features=3, bias="no"), WEIGHTS),
        (call("torch.nn.Sequential", a=None), {}),
        (call("torch.nn.ELU", alpha="1"), {}),
        (call("torch.nn.GELU", approximate="wrong"), {}),
        (call("torch.nn.Flatten", start_dim="first"), {}),
        (call("torch.nn.Identity", anything=3), {}),
    ],
    ids=lambda value: value.get("call", ""),
)
def test_arguments_that_save_never_writes_are_refused(net, tensors, tmp_path):
    refused(forge(tmp_path / "net", about(net), tensors))


@pytest.mark.parametrize(
    ("net", "changes"),
    [
        (call("torch.nn.Hardtanh", min_val=1.0, max_val=0.0), {}),
        (call("torch.nn.Hardtanh", min_value=-3.0), {}),
        (call("torch.nn.Linear", in_features=0, out_features=3), {}),
        (call("torch.nn.ReLU"), {"input": {"shape": None, "range": [0.0]}}),
        (call("torch.nn.ReLU"), {"input": {"shape": None, "range": []}}),
    ],
    ids=str,
)
def test_no_other_exception_escapes(net, changes, tmp_path):
    refused(forge(tmp_path / "net", about(net, **changes)))


@pytest.mark.parametrize("schema", [99, 0, None, "1", [1], 1.5])
def test_other_schemas_are_refused(schema, tmp_path):
    refused(forge(tmp_path / "net", about(LINEAR, schema=schema), WEIGHTS), "checkpoint schema .*, this version reads 1; update lipnet")


@pytest.mark.parametrize(
    "text", ["", "3", "null", '"text"', "[]", "{}", '{"schema": 1}', "{", '{"schema": 1, "net": ', "\0", "NaN", '{"schema": NaN}', "1" * 5000]
)
def test_text_that_describes_nothing_is_refused(text, tmp_path):
    refused(forge(tmp_path / "net", text))


@pytest.mark.parametrize("missing", ["net", "input", "classes", "schema"])
def test_an_incomplete_description_is_refused(missing, tmp_path):
    description = about(LINEAR)
    del description[missing]
    refused(forge(tmp_path / "net", description, WEIGHTS))


@pytest.mark.parametrize("net", [None, 3, "torch.nn.ReLU", True, [], [LINEAR], call("lipnet.Cayley"), call("lipnet.Cholesky", ridge=1.0)], ids=str)
def test_what_is_no_module_is_refused(net, tmp_path):
    refused(forge(tmp_path / "net", about(net)), "the file describes .*, not a network")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_in_calls(number, tmp_path):
    for net in (
        call("lipnet.Scale", factor="X"),
        call("lipnet.Normalize", mean=["X"], std=[1.0]),
        call("torch.nn.ELU", alpha="X"),
        call("lipnet.LDLTBlock", in_features=1, out_features=1, hidden=[1], lipschitz="X"),
    ):
        refused(forge(tmp_path / "net", json.dumps(about(net)).replace('"X"', number)))


@pytest.mark.parametrize(
    "changes",
    [
        {"input": {"shape": None, "range": [0.0, "NaN"]}},
        {"input": {"shape": None, "range": [1.0, 0.0]}},
        {"input": {"shape": None, "range": [0.0, 1.0, 2.0]}},
        {"input": {"shape": None, "range": "01"}},
        {"input": {"shape": [-3], "range": None}},
        {"input": {"shape": [0], "range": None}},
        {"input": {"shape": [2.7], "range": None}},
        {"input": {"shape": "123", "range": None}},
        {"input": {"shape": ["1"], "range": None}},
        {"classes": "abc"},
        {"classes": [1, {}]},
    ],
    ids=str,
)
def test_facts_that_make_no_sense_are_refused(changes, tmp_path):
    text = json.dumps(about(call("torch.nn.ReLU"), **changes)).replace('"NaN"', "NaN")
    refused(forge(tmp_path / "net", text))


@pytest.mark.parametrize(
    "changes",
    [
        {"input": {"shape": 3, "range": None}},
        {"input": {"shape": ["a"], "range": None}},
        {"input": {"shape": None, "range": 1.0}},
        {"input": {"shape": None, "range": ["a", "b"]}},
        {"input": []},
        {"input": None},
        {"input": {}},
        {"classes": 5},
    ],
    ids=str,
)
def test_facts_of_the_wrong_type_are_refused(changes, tmp_path):
    refused(forge(tmp_path / "net", about(LINEAR, **changes), WEIGHTS))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "'bias' is absent, expected"),
        ({"weight": WEIGHTS["weight"]}, r"'bias' is absent, expected \(3,\)"),
        ({**WEIGHTS, "extra": torch.zeros(1)}, r"'extra' is \(1,\), expected no such tensor"),
        ({**WEIGHTS, "weight": torch.zeros(2, 3)}, r"'weight' is \(2, 3\), expected \(3, 2\)"),
        ({**WEIGHTS, "weight": torch.zeros(6)}, r"'weight' is \(6,\), expected \(3, 2\)"),
        ({**WEIGHTS, "weight": torch.zeros(0)}, r"'weight' is \(0,\), expected \(3, 2\)"),
        ({**WEIGHTS, "bias": torch.zeros(())}, r"'bias' is \(\), expected \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, message, tmp_path):
    refused(forge(tmp_path / "net", about(LINEAR), tensors), message)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64], ids=str)
def test_tensors_of_other_kinds_of_numbers_are_refused(dtype, tmp_path):
    refused(forge(tmp_path / "net", about(LINEAR), {**WEIGHTS, "weight": torch.ones(3, 2, dtype=dtype)}))
    normalize = call("lipnet.Normalize", mean=[0.0], std=[1.0])
    refused(forge(tmp_path / "net", about(normalize), {"shift": torch.zeros(1, dtype=dtype), "divisor": torch.ones(1, dtype=dtype)}))


def test_a_digest_that_is_missing_is_refused(tmp_path):
    text = json.dumps(about(LINEAR))
    (tmp_path / "net").write_bytes(safetensors.torch.save(WEIGHTS, {"lipnet": text}))
    refused(tmp_path / "net", "its sha256 does not match")


def test_a_loaded_network_is_independent_of_its_file(tmp_path):
    path = tmp_path / "net"
    lipnet.save(small(), path)
    loaded = lipnet.load(path)
    with path.open("r+b") as file:  # in place, as rsync --inplace or cp do
        file.write(b"\0" * path.stat().st_size)
    assert same(loaded, small())
    with torch.no_grad():
        loaded[0].weight.add_(1)  # and they may be written to
    assert not same(loaded, small())
