"""The importer of ONNX files: on ONNX's own tests of its operators, on networks with a known answer, and on what it must refuse."""

import collections
import json
import os
import pathlib
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import certify
from certify import models
from certify.cli import main
from certify.models.onnx import from_onnx
from certify.models.operators.importer import HANDLERS, operators
from certify.models.weights import ModelError
from lipnet.testing import largest_slope

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, name=f"the_{op.lower()}", **attributes)


def save(path, nodes, shape, weights=None, output="y", opset=17, kind=onnx.TensorProto.FLOAT):
    """A file of these nodes, from input `x` to `output`."""
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    inputs, outputs = [helper.make_tensor_value_info("x", kind, shape)], [helper.make_tensor_value_info(output, kind, None)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 21 else 10)
    if shape is not None:
        model = onnx.shape_inference.infer_shapes(model)
        model.graph.output[0].type.tensor_type.shape.SetInParent()
    path.write_bytes(model.SerializeToString())
    return path


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def export():
    """torch's own exporter, into a file."""

    def write(net, shape, path, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(net, (torch.zeros(1, *shape, dtype=next(net.parameters()).dtype),), str(path), dynamo=False, input_names=["x"], **options)
        return path

    return write


def official():
    """ONNX's own tests: of one operator each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return collect_testcases(None)


def as_networks(case):
    """A test as networks, each with an input and the output that is wanted of it, for each output: of its first input as it is; of one vector, out of which its
    first input is taken, so that axes that are no batch are met; and of one vector with all its inputs of float32 in it. What remains is stored in the file."""
    inputs, outputs = ([np.asarray(array) if isinstance(array, np.generic) else array for array in arrays] for arrays in case.data_sets[0])
    if not all(isinstance(array, np.ndarray) for array in (*inputs, *outputs)) or not inputs:
        return
    given = dict(zip((entry.name for entry in case.model.graph.input), inputs, strict=False))
    first, floats = next(iter(given)), [name for name, array in given.items() if array.dtype == np.float32 and array.size]
    for k, wanted in enumerate(outputs):
        yield with_stored(case, k, {name: array for name, array in given.items() if name != first}), inputs[0], wanted
        for signals in {tuple(floats[:1]), tuple(floats)} - {()}:
            model = with_stored(case, k, {name: array for name, array in given.items() if name not in signals})
            yield model, in_one_vector(model, {name: given[name] for name in signals}), wanted


def with_stored(case, k, arrays):
    """The network of a test with one of its outputs alone, and with these of its inputs in the file."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.append(case.model.graph.output[k])
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def in_one_vector(model, signals):
    """Put nodes before a graph that take its inputs out of one vector."""
    ends, nodes = np.cumsum([array.size for array in signals.values()]), []
    for (name, array), end in zip(signals.items(), ends, strict=True):
        held = {f"{name} from": [end - array.size], f"{name} to": [end], f"{name} shape": array.shape}
        model.graph.initializer.extend(numpy_helper.from_array(np.array(sizes, np.int64), called) for called, sizes in held.items())
        nodes += [node("Slice", ["vector", f"{name} from", f"{name} to"], [f"{name} flat"]), node("Reshape", [f"{name} flat", f"{name} shape"], [name])]
    rest = list(model.graph.node)
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend([*nodes, *rest])
    model.graph.input.append(helper.make_tensor_value_info("vector", onnx.TensorProto.FLOAT, [int(ends[-1])]))
    return np.concatenate([array.ravel() for array in signals.values()])


def test_onnx_own_tests_of_the_operators_pass_or_are_refused(tmp_path, monkeypatch):
    """Whatever is imported gives the outputs that ONNX's tests ask for, by itself: the comparison at the import is switched off here."""
    monkeypatch.setattr("certify.models.onnx._compare", lambda *_: (0.0, "nothing"))
    known, counts, wrong, seen = set(operators()), collections.Counter(), [], set()
    for case in official():
        listed = {n.op_type for n in case.model.graph.node} <= known
        for model, x, wanted in as_networks(case) if listed else ():
            path = tmp_path / "case.onnx"
            path.write_bytes(model.SerializeToString())
            try:
                net = from_onnx(path).net
            except ModelError as error:
                counts["refused" if len(str(error).splitlines()) == 1 else "wrong"] += 1
                continue
            unbatched = x.ndim == 1
            found = net(torch.from_numpy(x.copy())[None] if unbatched else torch.from_numpy(x.copy())).numpy()
            found = found[0] if unbatched else found
            last = {"Softmax": "softmax", "LogSoftmax": "log_softmax"}.get(model.graph.node[-1].op_type)
            if last:
                found = getattr(torch, last)(torch.from_numpy(found), -1).numpy()
            right = found.size == wanted.size and np.allclose(found.reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-5)
            counts["passed" if right else "wrong"] += 1
            seen.update({n.op_type for n in case.model.graph.node} if right else ())
            wrong += [] if right else [case.name]
    assert not wrong
    assert counts["passed"] >= 400
    assert seen >= set(HANDLERS) - {"PRelu"}  # of which ONNX tests slopes of other kinds alone


def window(rng, op, axes):
    """Attributes of a window, at random; at times ones that cannot be."""

    def some(low, high, count=axes):
        return [int(size) for size in rng.integers(low, high + 1, count)]

    choices = {
        "strides": some(1, 3), "dilations": some(1, 2), "pads": some(0, 2) * 2, "auto_pad": str(rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])),
    }  # fmt: skip
    choices |= {"ceil_mode": 1} if op.endswith("Pool") else {"group": 2}
    choices |= {"count_include_pad": 1} if op == "AveragePool" else {"pads": some(0, 2, 2 * axes)} if rng.random() < 0.5 else {}
    chosen = {name: value for name, value in choices.items() if rng.random() < 0.4}
    return {name: value for name, value in chosen.items() if name != "pads" or "auto_pad" not in chosen}


def test_windows_of_all_kinds_are_those_of_another_program_or_are_refused(tmp_path, monkeypatch):
    """By itself: the comparison at the import is switched off here."""
    from certify.smoothing.engines import onnx_session

    monkeypatch.setattr("certify.models.onnx._compare", lambda *_: (0.0, "nothing"))
    rng, counts = np.random.default_rng(0), collections.Counter()
    for i in range(300):
        op, axes = str(rng.choice(["Conv", "ConvTranspose", "MaxPool", "AveragePool"])), int(rng.integers(1, 4))
        attributes, taps = window(rng, op, axes), [int(size) for size in rng.integers(1, 5, axes)]
        group = attributes.get("group", 1)
        held = {} if op.endswith("Pool") else {"w": normal(4, 4 // group if op == "Conv" else 3, *taps, seed=i)}
        attributes |= {"kernel_shape": taps} if op.endswith("Pool") else {}
        nodes = [node(str(rng.choice(["Relu", "Tanh"])), ["x"], ["h"]), node(op, ["h", *held], ["y"], **attributes)]
        try:
            path = save(tmp_path / "net.onnx", nodes, [1, 4, *(int(size) for size in rng.integers(4, 9, axes))], held, opset=19)
            net, x = from_onnx(path), torch.randn(1, 4, *from_onnx(path).input_shape[1:])
            wanted = onnx_session(path.read_bytes())(x)
        except (ModelError, onnx.shape_inference.InferenceError):
            counts["refused"] += 1
            continue
        except tuple(vars(onnxruntime.capi.onnxruntime_pybind11_state)[name] for name in ("Fail", "InvalidArgument", "NotImplemented", "RuntimeException")):
            continue  # it has no such window
        torch.testing.assert_close(net.net(x), wanted, rtol=1e-4, atol=1e-5, msg=lambda text, what=(op, attributes): f"{what}: {text}")
        counts[op] += 1
    assert min(counts[op] for op in ("Conv", "ConvTranspose", "MaxPool", "AveragePool")) >= 15


def part(rng, op, rank, held):
    """Nodes of one operator on the signals h and g, and its attributes and constants at random; at times ones that cannot be."""

    def some(low, high, count=rank):
        return [int(size) for size in rng.integers(low, high + 1, count)]

    def store(name, value, kind=np.int64):
        held[name] = np.array(value, kind)
        return name

    axis = int(rng.integers(-rank, rank))
    axes = [int(a) for a in rng.choice(rank, int(rng.integers(1, rank + 1)), replace=False)]
    inputs, attributes, outputs = ["h"], {}, ["y"]
    if op == "Concat":
        inputs, attributes = ["h", "g", "h"][: int(rng.integers(1, 4))], {"axis": axis}
    elif op == "Slice":
        bounds = [store("from", some(-3, 3, len(axes))), store("to", some(-2, 9, len(axes)))]
        inputs += [*bounds, store("axes", axes), store("steps", some(1, 2, len(axes)))]
    elif op == "Split":
        inputs += [store("split", some(1, 3, 2))] if rng.random() < 0.5 else []
        attributes, outputs = {"axis": axis, **({} if len(inputs) > 1 else {"num_outputs": 2})}, ["y", "z"] if rng.random() < 0.5 else ["z", "y"]
    elif op == "Gather":
        inputs, attributes = ["h", store("places", some(-4, 3, 3) if rng.random() < 0.5 else rng.integers(-4, 4))], {"axis": axis}
    elif op in ("ReduceMean", "ReduceSum"):
        inputs, attributes = ["h", store("axes", axes if rng.random() < 0.9 else [])], {"keepdims": int(rng.integers(0, 2))}
        attributes |= {"noop_with_empty_axes": 1} if rng.random() < 0.3 else {}
    elif op == "PRelu":
        shape = [(1,), (4,), (4, 1), (1, 4, 1), (4, 1, 1), (1, 4, 1, 1)][rng.integers(0, 6)]
        inputs += [store("slope", rng.standard_normal(shape), np.float32)]
    elif op == "HardSigmoid":
        attributes = {"alpha": [0.2, 1 / 6, 0.7, -1.5][rng.integers(0, 4)], "beta": [0.5, 0.1][rng.integers(0, 2)]}
    elif op == "Clip":
        low, high = np.sort(rng.standard_normal(2))
        inputs += [store("low", low, np.float32) if rng.random() < 0.6 else "", store("high", high, np.float32) if rng.random() < 0.6 else ""]
    elif op == "Pad":
        inputs += [store("pads", [size if i % rank > 1 or rng.random() < 0.1 else 0 for i, size in enumerate(some(0, 4, 2 * rank))])]
        attributes = {"mode": str(rng.choice(["constant", "reflect", "edge", "wrap"]))}
    else:
        whole = store("all", rng.standard_normal((4, 1)), np.float32)
        inputs = [["h", "g"], ["h", "weighted"], ["weighted", "h"], ["h", "h"], ["h", whole]][rng.integers(0, 5)]
    return node(op, inputs, outputs, **attributes)


def test_parts_means_borders_and_products_are_those_of_another_program_or_are_refused(tmp_path, monkeypatch):
    """With the batch left open, of one, of two, and without one; by itself: the comparison at the import is switched off here."""
    from certify.smoothing.engines import onnx_session

    monkeypatch.setattr("certify.models.onnx._compare", lambda *_: (0.0, "nothing"))
    rng, counts = np.random.default_rng(0), collections.Counter()
    ops = ["Concat", "Slice", "Split", "Gather", "ReduceMean", "ReduceSum", "PRelu", "HardSigmoid", "Clip", "Pad", "Mul"]
    for i in range(330):
        op, batch, held = ops[i % len(ops)], ["N", 1, 2, None][rng.integers(0, 4)], {}
        shape = [4, *(int(size) for size in rng.integers(1, 6, int(rng.integers(0, 3))))]
        full = shape if batch is None else [batch, *shape]
        weigh = [node("ReduceMean", ["h", "last"], ["weighted"], keepdims=1)]
        held["last"], weigh[0].name = np.array([len(full) - 1]), "weigh"
        nodes = [node("Tanh", ["x"], ["h"]), node("Relu", ["x"], ["g"]), *weigh, part(rng, op, len(full), held)]
        try:
            path = save(tmp_path / "net.onnx", nodes, full, held, opset=19)
            net, session = from_onnx(path, tuple(shape)).net, onnx_session(path.read_bytes())
            x = torch.randn(1 if batch is None else 3 if batch == "N" else batch, *shape)
            wanted = session(x[0])[None] if batch is None else session(x)
        except (ModelError, onnx.shape_inference.InferenceError):
            counts["refused"] += 1
            continue
        except tuple(vars(onnxruntime.capi.onnxruntime_pybind11_state)[name] for name in ("Fail", "InvalidArgument", "NotImplemented", "RuntimeException")):
            counts["not run"] += 1
            continue
        torch.testing.assert_close(net(x), wanted.reshape(net(x).shape), rtol=1e-4, atol=1e-5, msg=lambda text, what=nodes[-1]: f"{what}: {text}")
        counts[op] += 1
    assert min(counts[op] for op in ops) >= 6, counts
    assert counts["refused"] >= 60, counts


def convolutional():
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False), nn.Tanh()]
    net = nn.Sequential(*first, nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(8 * 4, 12), nn.LeakyReLU(0.1), nn.Linear(12, 5)).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net, (3, 17, 17)


class Residual(nn.Module):
    """A sum, constants, and a view by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        y = torch.relu(self.stem((x - 0.25) * 2.0))
        y = torch.nn.functional.adaptive_avg_pool2d(y - 0.5 * torch.relu(self.inner(y)), 1)
        return self.head(y.view(y.size(0), -1))


def test_an_exported_network_has_the_bound_of_the_original(export, tmp_path):
    for net, shape in (convolutional(), (Residual().eval(), (1, 6, 6))):
        for kind in (torch.float32, torch.float64):
            net = net.to(kind)
            path = export(net, shape, tmp_path / "net.onnx", dynamic_axes={"x": {0: "N"}} if kind == torch.float32 else None)
            model = models.load(str(path))
            assert model.shape == shape
            assert model.opened == {}
            assert "differs from" in model.notes[0]
            x = torch.randn(7, *shape, dtype=kind)
            torch.testing.assert_close(model.net(x), net(x))
            stored = {tuple(t.shape): t for t in model.net.state_dict().values()}
            assert torch.equal(stored[tuple(list(net.modules())[-1].weight.shape)], list(net.modules())[-1].weight)
            found = certify.lipschitz(model.net, input_shape=shape).value
            torch.manual_seed(0)
            assert found >= largest_slope(model.net, shape, points=2)
            if isinstance(net, nn.Sequential) and kind == torch.float64:
                # the exporter puts the batch normalisation into the convolution, so the bound is of their product
                fused = nn.Sequential(torch.nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1]), *net[2:]).eval()
                assert found == pytest.approx(certify.lipschitz(fused, input_shape=shape).value, rel=1e-9)


class Weighted(nn.Module):
    """Channels weighted by a small network of their means, as in MobileNetV3, with the activations of it."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.small, self.head = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        y = nn.functional.hardswish(self.norm(self.stem(x)))
        y = y * nn.functional.hardsigmoid(self.small(y.mean((2, 3), keepdim=True)))
        return self.head(nn.functional.relu6(y).mean((2, 3)))


class Joined(nn.Module):
    """Concatenations, parts, a shuffle of channels, a sum over a stack, and a border that mirrors."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.slopes = nn.Conv2d(2, 4, 3), nn.Conv2d(6, 4, 1), nn.PReLU(4)
        self.up, self.head = nn.ConvTranspose2d(4, 2, 2, 2), nn.Linear(8, 3)

    def forward(self, x):
        y = self.slopes(self.first(nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")))
        y = torch.cat([x, y], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = torch.chunk(self.second(y), 2, 1)
        y = torch.stack([a, b, -a], 1)[:, 1:].sum(1)
        y = torch.cat([self.up(torch.cat([y, a], 1))[:, :, ::2, 1:7:2].mean(3), y[:, [1, 0], :, 0]], 1).mean(2)
        return self.head(torch.cat([y, y[:, 1:3], y[:, :2]], 1))


class Shaped(nn.Module):
    """Sizes that are computed, a constant that is expanded to the batch's shape, SiLU and clipping from one side."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = x.reshape(x.shape[0], x.shape[1] * x.shape[2])
        y = nn.functional.silu(self.inner(y)).clamp(min=-0.1)
        return self.head(y.view(y.shape[0], 2, -1).flatten(1) * torch.full((6,), 0.5).expand(6) - torch.zeros(6))


def test_networks_of_other_families_are_those_of_torch(export, tmp_path):
    """Whatever the opset, with the batch left open and with a batch of one."""
    torch.manual_seed(0)
    for net, shape in ((Weighted(), (3, 12, 12)), (Joined(), (2, 6, 6)), (Shaped(), (2, 3))):
        for opset in (11, 17):
            for batch in ({"x": {0: "N"}}, None):
                imported = from_onnx(export(net.eval(), shape, tmp_path / "net.onnx", opset_version=opset, dynamic_axes=batch))
                x = torch.randn(5, *shape)
                torch.testing.assert_close(imported.net(x), net(x), rtol=1e-5, atol=1e-6)
    assert any(isinstance(module, nn.SiLU) for module in imported.net.modules())
    assert certify.lipschitz(imported.net, input_shape=(2, 3)).value == pytest.approx(
        0.5 * 1.0998394 * np.prod([np.linalg.norm(layer.weight.detach().double(), 2) for layer in (net.inner, net.head)]), rel=1e-6
    )


def test_a_product_of_signals_runs_and_has_no_bound(tmp_path):
    nodes = [node("Tanh", ["x"], ["t"]), node("Mul", ["x", "t"], ["y"])]
    net = from_onnx(save(tmp_path / "net.onnx", nodes, ["N", 3])).net
    x = torch.randn(4, 3)
    torch.testing.assert_close(net(x), x * torch.tanh(x))
    with pytest.raises(certify.Unsupported, match="mul"):
        certify.lipschitz(net, input_shape=(3,))


def shifted_if_alone(x):
    return torch.relu(x) + (len(x) == 1)


def lost_below(x):
    return torch.where(x < -3, torch.nan, torch.relu(x))


@pytest.mark.parametrize(("wrong", "says"), [(shifted_if_alone, "differs from"), (lost_below, "no finite numbers")])
@pytest.mark.parametrize("batch", ["N", 1, 2, 6, None])
def test_an_import_that_is_wrong_for_one_batch_or_gives_nan_is_refused(tmp_path, monkeypatch, wrong, says, batch):
    path = save(tmp_path / "net.onnx", [node("Relu", ["x"], ["y"])], [3] if batch is None else [batch, 3])
    assert "by 0 of the largest output" in from_onnx(path).notes[-1]
    replaced = (lambda self, n, x: self.signal(n, self.graph.call_function(wrong, (x.node,)), x.shape, x.batch), frozenset())
    monkeypatch.setitem(HANDLERS, "Relu", replaced)
    with pytest.raises(ModelError, match=says):
        from_onnx(path)


def test_lipsdp_of_an_imported_network_is_that_of_the_original(export, tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    model = models.load(str(export(net, (1, 2, 3), tmp_path / "net.onnx")))
    ours, theirs = (certify.lipschitz(n, certify.LipSDP(), input_shape=(1, 2, 3)) for n in (model.net, net))
    assert ours.value == pytest.approx(theirs.value, rel=1e-6)
    assert ours.value < certify.lipschitz(net, input_shape=(1, 2, 3)).value


def test_a_last_softmax_is_set_aside_and_said(export, tmp_path, capsys):
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    path = export(nn.Sequential(logits, nn.Softmax(1)).eval(), (1, 8, 8), tmp_path / "net.onnx")
    model = models.load(str(path))
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model.net(x), logits(x))
    assert model.opened["set_aside"].startswith("Softmax")
    folder = tmp_path / "run"
    assert main(["run", str(path), "digits", "-o", str(folder), "--limit", "4"]) == 0
    assert "is set aside; outputs, margins and constants are those of the logits" in capsys.readouterr().err
    assert json.loads((folder / "manifest.json").read_text())["model"]["set_aside"].startswith("Softmax")
    assert main(["check", str(folder)]) == 0
    inside = [node("Softmax", ["x"], ["s"]), node("Relu", ["s"], ["y"])]
    with pytest.raises(ModelError, match="comes after the Softmax 'the_softmax'"):
        from_onnx(save(tmp_path / "inside.onnx", inside, ["N", 4]))


def test_one_vector_without_a_batch_and_constants_on_either_side(tmp_path):
    """As the networks of ACAS Xu are written: a matrix from the left."""
    a, b, c = normal(4, 3), normal(4, seed=1), normal(4, 2, seed=2)
    nodes = [
        node("MatMul", ["a", "x"], ["m"]), node("Add", ["b", "m"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "c"], ["n"]),
        node("Sub", ["one", "n"], ["y"]),
    ]  # fmt: skip
    imported = from_onnx(save(tmp_path / "net.onnx", nodes, [3], {"a": a, "b": b, "c": c, "one": np.float32(1)}))
    assert imported.input_shape == (3,)
    x = torch.randn(6, 3)
    torch.testing.assert_close(imported.net(x), 1 - torch.relu(x @ torch.tensor(a).T + torch.tensor(b)) @ torch.tensor(c))
    assert [type(m).__name__ for m in imported.net.children()] == ["Linear", "ReLU", "Linear"]
    expected = np.linalg.norm(a.astype(float), 2) * np.linalg.norm(c.astype(float), 2)
    assert certify.lipschitz(imported.net, input_shape=(3,)).value == pytest.approx(expected, rel=1e-9)


def test_normalisation_padding_and_layout_before_a_network(tmp_path):
    """Subtract, divide and scale by channel, turn NHWC to NCHW, pad unequally: each has a bound, and the product is the one expected."""
    w = normal(2, 3, 2, 2)
    held = {"mean": normal(3), "std": np.array([0.5, 0.3, 2.0], np.float32), "scale": np.array([1, -3, 2], np.float32).reshape(3, 1, 1), "w": w}
    nodes = [
        node("Sub", ["x", "mean"], ["a"]), node("Transpose", ["a"], ["t"], perm=[0, 3, 1, 2]), node("Mul", ["t", "scale"], ["m"]),
        node("Div", ["m", "half"], ["d"]), node("Conv", ["d", "w"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]), node("Relu", ["c"], ["r"]),
        node("MaxPool", ["r"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    ]  # fmt: skip
    imported = from_onnx(save(tmp_path / "net.onnx", nodes, ["N", 5, 5, 3], {**held, "half": np.float32(0.5)}))
    bound = certify.lipschitz(imported.net, input_shape=(5, 5, 3)).value
    conv = certify.lipschitz(
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), next(m for m in imported.net.modules() if isinstance(m, nn.Conv2d))).eval(), input_shape=(3, 5, 5)
    ).value
    assert bound == pytest.approx(3 * 2 * conv * 2, rel=1e-6)
    assert bound >= largest_slope(imported.net, (5, 5, 3), points=2)
    nodes = [node("Div", ["x", "by"], ["d"]), node("Relu", ["d"], ["y"])]
    imported = from_onnx(save(tmp_path / "div.onnx", nodes, ["N", 3, 4, 4], {"by": held["std"].reshape(1, 3, 1, 1)}))
    assert certify.lipschitz(imported.net, input_shape=(3, 4, 4)).value == pytest.approx(1 / np.float32(0.3), rel=1e-6)


REFUSED = {
    "training": ([("BatchNormalization", ["x", "c", "c", "c", "c"], {"training_mode": 1})], r"'the_batch.*' \(Batch.*, attribute training_mode=1\)"),
    "average of cut windows": ([("AveragePool", ["x"], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1})], r"\(AveragePool, .* ceil_mode=1\)"),
    "dilated average": ([("AveragePool", ["x"], {"kernel_shape": [2, 2], "dilations": [2, 2]})], r"attribute dilations=\[2, 2\]"),
    "unequal average": ([("AveragePool", ["x"], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]})], "attribute pads"),
    "unequal maximum": ([("MaxPool", ["x"], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]})], "attribute pads"),
    "positions": ([("MaxPool", ["x"], {"kernel_shape": [2, 2], "storage_order": 1})], "attribute storage_order=1"),
    "reflected": ([("Pad", ["x", "wide"], {"mode": "reflect"})], "does not take it"),
    "batch padded": ([("Pad", ["x", "pads_batch"], {})], "along the batch"),

    "a constant over a signal": ([("Div", ["c1", "x"], {})], "first input must be the signal"),
    "repeated": ([("Add", ["x", "larger"], {})], "would repeat"),
    "for each of a batch": ([("Add", ["x", "two"], {})], "for each input of a batch"),
    "more axes": ([("Add", ["x", "five"], {})], "more axes"),
    "batch in the middle": ([("Transpose", ["x"], {"perm": [1, 0, 2, 3]})], "batch must stay in front"),
    "batch flattened": ([("Flatten", ["x"], {"axis": 0})], "keep the inputs of a batch apart"),
    "batch folded": ([("Reshape", ["x", "fold"], {})], "keep the inputs of a batch apart"),
    "batch of one": ([("Reshape", ["x", "one_row"], {})], "keep the inputs of a batch apart"),
    "not listed": ([("Erf", ["x"], {})], r"\(Erf\): this operator is not on the list"),
    "not finite": ([("Add", ["x", "nan"], {})], "NaN"),
    "turned around": ([("Clip", ["x", "c1", "zero"], {})], "the first number must be smaller"),
    "rounded": ([("Flatten", ["x"], {}), ("Gemm", ["0", "matrix"], {"alpha": 0.3})], "attribute alpha=0.3"),
    "huge borders": ([("Pad", ["x", "wide"], {})] * 3, r"up to \d+ numbers for each input"),
    "huge constants": ([("Add", ["column", "row"], {}), ("Add", ["x", "0"], {})], r"10{10} numbers of constants"),
    "training dropout": ([("Dropout", ["x", "c1", "true"], {})], "training_mode is true"),
    "batch as a number": ([("Shape", ["x"], {}), ("Cast", ["0"], {"to": 1}), ("Mul", ["x", "1"], {})], "does not depend on the batch"),
    "overflow": ([("Mul", ["x", "large"], {})], "gives no finite numbers"),
    "constant": ([("Identity", ["c1"], {})], "does not depend on its input"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_on_the_list_is_refused_by_name(case, tmp_path):
    nodes, says = REFUSED[case]
    held = {
        "c": np.ones(3, np.float32), "c1": np.float32(1), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads_batch": np.array([1, 0, 0, 0, 0, 0, 0, 0]),
        "larger": normal(3, 6, 12), "two": normal(2, 3, 6, 6), "five": normal(1, 1, 3, 6, 6), "fold": np.array([-1, 6]), "one_row": np.array([1, -1]),
        "nan": np.float32(np.nan), "matrix": normal(108, 4),
        "wide": np.array([0, 0, 4096, 4096, 0, 0, 4096, 4096]), "column": normal(10**5, 1), "row": normal(1, 10**5), "true": np.array(True),
        "large": np.float32(1e38), "zero": np.float32(0),
    }  # fmt: skip
    made = [node(op, inputs, [str(i) if i < len(nodes) - 1 else "y"], **attributes) for i, (op, inputs, attributes) in enumerate(nodes)]
    with pytest.raises(ModelError, match=says) as error:
        from_onnx(save(tmp_path / "net.onnx", made, ["N", 3, 6, 6], held, opset=21))
    assert len(str(error.value).splitlines()) == 1


def test_files_that_are_no_networks_are_named(tmp_path, export, capsys):
    net, shape = convolutional()
    data = export(net, shape, tmp_path / "whole.onnx").read_bytes()
    relu = [node("Relu", ["x"], ["y"])]
    for name, content, says in (
        ("html", b"<!DOCTYPE html><html></html>", "HTML page"), ("empty", b"", "is empty"), ("cut", data[: len(data) // 2], "cut short|no valid"),
        ("text", b"not a model at all", "no ONNX file|no valid"), ("lfs", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ):  # fmt: skip
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        assert main(["inspect", str(path)]) == 2
        message = capsys.readouterr().err
        assert any(part in message for part in says.split("|")), message
    for options, says in (
        ({"shape": ["N", 3, "H", "W"]}, r"open \(\?x3x\?x\?, the batch in front\); pass --input-shape"),
        ({"shape": ["N", 3], "opset": 6}, "opset 6; 7 to"),
        ({"shape": ["N", 3], "kind": onnx.TensorProto.INT64}, "float32 or float64"),
        ({"shape": None}, "is required but missing|does not say what shape"),
    ):
        with pytest.raises(ModelError, match=says):
            from_onnx(save(tmp_path / "net.onnx", relu, **options))
    path = save(tmp_path / "net.onnx", relu, ["N", 3, "H", "W"])
    assert models.load(str(path), (3, 4, 5)).shape == (3, 4, 5)
    with pytest.raises(ModelError, match=r"its input is \?x3x\?x\? in the file, --input-shape is \(4, 4, 5\)"):
        from_onnx(path, (4, 4, 5))


def test_tensors_in_other_files_are_read_from_the_folder_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    w = normal(4, 3)
    (folder / "w.bin").write_bytes(w.tobytes())
    (tmp_path / "secret.bin").write_bytes(w.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = save(folder / "net.onnx", [node("MatMul", ["x", "w"], ["y"])], ["N", 4], {"w": w})
    model = onnx.load(path)

    def outside(location, **where):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, **where}.items():
            tensor.external_data.add(key=key, value=str(value))
        path.write_bytes(model.SerializeToString())
        return from_onnx(path)

    found = outside("w.bin", offset=0, length=48)
    assert torch.equal(next(found.net.parameters()), torch.tensor(w.T))
    before = found.sha256
    (folder / "w.bin").write_bytes((2 * w).tobytes())
    assert outside("w.bin", offset=0, length=48).sha256 != before
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), "link.bin", "", "."):
        with pytest.raises(ModelError, match="no file in the folder of the model"):
            outside(location)
    for where in ({"offset": 40}, {"length": 100}, {"offset": -8}, {"length": "many"}, {"length": 8}):
        with pytest.raises(ModelError, match=r"the tensor 'w'|no valid ONNX file"):
            outside("w.bin", **where)


def test_an_import_that_differs_is_refused(tmp_path, monkeypatch):
    """The comparison catches an importer that is wrong: one that gives a leaky slope of its own."""
    path = save(tmp_path / "net.onnx", [node("LeakyRelu", ["x"], ["y"], alpha=0.2)], ["N", 3])
    from_onnx(path)
    own = HANDLERS["LeakyRelu"]
    monkeypatch.setitem(HANDLERS, "LeakyRelu", (lambda self, n, x: self.call(n, nn.LeakyReLU(0.201), x), own[1]))
    with pytest.raises(ModelError, match=r"differs from .* of the largest output"):
        from_onnx(path)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "differs from onnx.reference" in from_onnx(path).notes[0]
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelError, match=r"pip install 'lipnet\[onnx\]'"):
        from_onnx(path)


def test_the_networks_of_acas_xu(capsys):
    """With LIPNET_DATA, a folder with acasxu/."""
    folder = pathlib.Path(os.environ.get("LIPNET_DATA", "")) / "acasxu"
    files = sorted(folder.glob("*.onnx")) if "LIPNET_DATA" in os.environ else []
    if not files:
        pytest.skip("LIPNET_DATA names no folder with networks in acasxu/")
    for path in files:
        model = models.load(str(path))
        assert (model.shape, model.parameters) == ((5,), 13305)
    assert main(["lipschitz", str(files[0]), "--json"]) == 0
    layerwise = json.loads(capsys.readouterr().out)["bound"]["value"]
    assert main(["lipschitz", str(files[0]), "--method", "lipsdp", "--json"]) == 0
    assert largest_slope(models.load(str(files[0])).net, (5,), points=4) <= json.loads(capsys.readouterr().out)["bound"]["value"] < layerwise / 10


@pytest.mark.parametrize("alpha", [float(np.float32(1 / 6)), 1 / 6 - 5e-7, 1 / 6 + 5e-7])
def test_a_slope_close_to_that_of_torch_is_the_slope_of_the_file(tmp_path, alpha):
    path = save(tmp_path / "net.onnx", [node("HardSigmoid", ["x"], ["y"], alpha=alpha, beta=0.5)], ["N", 4])
    held = float(np.float32(alpha))
    assert held <= certify.lipschitz(from_onnx(path).net, input_shape=(4,)).value <= held * (1 + 1e-6 * (alpha < 1 / 6)) + 1e-16


def test_a_selu_with_other_numbers_than_torchs_is_refused(tmp_path):
    path = save(tmp_path / "net.onnx", [node("Selu", ["x"], ["y"], gamma=1.0507018)], ["N", 4])
    with pytest.raises(ModelError, match=r"Selu, attribute gamma=1\.0507"):
        from_onnx(path)
