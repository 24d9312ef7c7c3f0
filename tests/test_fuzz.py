"""Files that others made, ONNX networks and data sets, damaged at random or built to do harm: one sentence and exit code 2, or a network that is right."""

import gzip
import io
import itertools
import json
import struct
import time
import zipfile

import numpy as np
import pytest
import torch

from certify import data
from certify.cli import main
from certify.models.weights import ModelError

RANDOM = 300  # damaged networks in a run of the tests; a longer run takes another number and another seed
SEED = 0
EXTREME = (0, 1, -1, 2, 3, 7, 1000, 4096, 10**6, 2**31 - 1, -(2**31), 2**31, 10**12, 2**62, 2**63 - 1, -(2**63))
OPERATORS = (
    "Relu", "Add", "Mul", "Range", "Shape", "Concat", "Gather", "Slice", "Reshape", "Expand", "ConstantOfShape", "Pad", "Softmax", "If", "Loop", "LRN",
)  # fmt: skip
NAMES = ("", "x", "h", "../../secret", "\0", "a" * 5000, "é\n")


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


def model(onnx, nodes, shape, held=(), opset=17, tensors=()):
    """The message of a network from `x` to `y`, unchecked; a node is (operator, inputs, outputs, attributes)."""
    helper = onnx.helper
    made = [helper.make_node(op, inputs, outputs, name=f"{op}{i}", **attributes) for i, (op, inputs, outputs, attributes) in enumerate(nodes)]
    stored = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in dict(held).items()]
    x, y = helper.make_tensor_value_info("x", 1, shape), helper.make_tensor_value_info("y", 1, None)
    y.type.tensor_type.shape.SetInParent()
    return helper.make_model(helper.make_graph(made, "net", [x], [y], [*stored, *tensors]), opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def network(onnx):
    """One that meets most of the importer: windows, parts, constants that are folded, a shape that is computed, a last softmax."""
    rng = np.random.default_rng(0)
    held = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"w": (4, 2, 3, 3), "b": (4,), "m": (16, 3), "c": (3,)}.items()}
    held |= {name: np.array(value, np.int64) for name, value in {"zero": [0], "one": [1], "two": [2], "last": [-1]}.items()}
    nodes = [
        ("Conv", ["x", "w", "b"], ["h"], {"pads": [1, 1, 1, 1], "strides": [2, 2]}), ("Relu", ["h"], ["r"], {}),
        ("Slice", ["r", "zero", "two", "one"], ["s"], {}), ("Split", ["r"], ["p", "q"], {"axis": 1}), ("Mul", ["p", "q"], ["g"], {}),
        ("Concat", ["s", "g"], ["j"], {"axis": 1}), ("Add", ["j", "r"], ["k"], {}), ("MaxPool", ["k"], ["l"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Shape", ["l"], ["sizes"], {}), ("Gather", ["sizes", "zero"], ["n"], {}), ("Concat", ["n", "last"], ["to"], {"axis": 0}),
        ("Reshape", ["l", "to"], ["flat"], {}), ("Gemm", ["flat", "m", "c"], ["logits"], {}), ("Softmax", ["logits"], ["y"], {}),
    ]  # fmt: skip
    return model(onnx, nodes, ["N", 2, 8, 8], held)


def damaged(content, rng):
    """Bytes changed, the end cut off, or a piece put elsewhere."""
    start, stop, place = (int(i) for i in rng.integers(0, len(content), 3))
    if rng.random() < 0.2:
        return content[:start]
    if rng.random() < 0.3:
        return content[:place] + content[min(start, stop) : max(start, stop)] + content[place:]
    changed = np.frombuffer(content, np.uint8).copy()
    changed[rng.integers(0, len(content), int(rng.choice([1, 3, 30, 3000])))] = rng.integers(0, 256)
    return changed.tobytes()


def fields(message):
    """Every field that is set in a message and in those inside it."""
    for field, value in message.ListFields():
        yield message, field, value
        if field.message_type:
            for inner in value if hasattr(value, "__len__") else [value]:
                yield from fields(inner)


def changed(onnx, content, rng):
    """A valid message with some fields given other values of their own type: sizes, names, operators, numbers."""
    whole = onnx.load_model_from_string(content)
    for _ in range(int(rng.choice([1, 1, 2, 4]))):
        every = list(fields(whole))
        message, field, value = every[rng.integers(0, len(every))]
        many = hasattr(value, "__len__") and not isinstance(value, str | bytes)
        if field.message_type and not many:
            message.ClearField(field.name)
        elif many and rng.random() < 0.5:
            chosen = value[rng.integers(0, len(value))]
            value.extend([type(chosen).FromString(chosen.SerializeToString()) if field.message_type else chosen])
        elif many and (field.message_type or rng.random() < 0.3):
            del value[int(rng.integers(0, len(value)))]
        elif many:
            value[int(rng.integers(0, len(value)))] = another(value[0], field.name, rng)
        else:
            setattr(message, field.name, another(value, field.name, rng))
    return whole.SerializeToString()


def another(value, name, rng):
    if isinstance(value, int):
        return int(EXTREME[rng.integers(0, 9 if name in ("data_type", "elem_type", "type", "data_location") else len(EXTREME))]) if name != "type" else 2
    if isinstance(value, float):
        return float(rng.choice([0.0, -1.0, np.nan, np.inf, 1e38]))
    if isinstance(value, bytes):
        return np.full(len(value) // 4, rng.choice([np.nan, np.inf, 1e38]), np.float32).tobytes() if rng.random() < 0.5 else value[: len(value) // 2]
    return str(rng.choice(OPERATORS if name == "op_type" else NAMES))


def test_damaged_networks_are_refused_in_one_sentence_or_give_what_another_program_gives(onnx, tmp_path):
    from certify.models.onnx import from_onnx

    rng, path, content, counts = (
        np.random.default_rng(SEED),
        tmp_path / "net.onnx",
        network(onnx).SerializeToString(),
        {"imported": 0, "refused": 0, "at length": 0},
    )
    path.write_bytes(content)
    assert "differs from onnxruntime" in from_onnx(path).notes[-1]
    for i in range(RANDOM):
        try:
            path.write_bytes(damaged(content, rng) if i % 3 == 0 else changed(onnx, content, rng))
        except (TypeError, ValueError):  # no message of the format holds it
            continue
        try:
            imported = from_onnx(path)
        except ModelError as error:
            counts["refused" if len(str(error).splitlines()) == 1 and len(str(error)) <= 1200 else "at length"] += 1
        else:
            assert torch.isfinite(imported.net(torch.zeros(2, *imported.input_shape))).all()
            counts["imported"] += 1
    assert counts["at length"] == 0
    assert counts["refused"] >= RANDOM // 3
    assert counts["imported"] >= RANDOM // 50


def whole(*sizes):
    return np.array(sizes, np.int64)


def nested(onnx):
    """Fields inside fields, three thousand deep."""
    inner = b""
    for _ in range(3000):
        size, length = len(inner), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        inner = b"\x3a" + length + bytes([size]) + inner
    return inner


def repeated(op, inputs, count, **attributes):
    """One operator after the other, each on what the one before it makes, twice where it takes two."""
    names = ["x", *(f"h{i}" for i in range(count - 1)), "y"]
    return [(op, [a] * inputs, [b], attributes) for a, b in itertools.pairwise(names)]


ADDED = ("Add", ["x", "c"], ["y"], {})
RELU = ("Relu", ["x"], ["y"], {})
HARMFUL = {
    "a constant of 10^12 numbers": lambda onnx: model(onnx, [("ConstantOfShape", ["s"], ["c"], {}), ADDED], ["N", 3], {"s": whole(10**6, 10**6)}),
    "many large constants": lambda onnx: model(
        onnx, [*(("ConstantOfShape", ["s"], [f"c{i}"], {}) for i in range(300)), RELU], ["N", 3], {"s": whole(2**20)}
    ),
    "an expansion to 10^12": lambda onnx: model(onnx, [("Expand", ["o", "s"], ["c"], {}), ADDED], ["N", 3], {"s": whole(10**6, 10**6), "o": np.ones(1)}),
    "a range of 10^12": lambda onnx: model(onnx, [("Range", ["a", "b", "a"], ["c"], {}), ADDED], ["N", 3], {"a": np.int64(1), "b": np.int64(10**12)}),
    "a tensor that claims 10^12": lambda onnx: model(
        onnx, [("Add", ["x", "w"], ["y"], {})], ["N", 3], tensors=[onnx.TensorProto(name="w", data_type=1, dims=[10**6, 10**6], raw_data=b"1234")]
    ),
    "sizes whose product wraps around": lambda onnx: model(
        onnx, [("Add", ["x", "w"], ["y"], {})], ["N", 3], tensors=[onnx.TensorProto(name="w", data_type=1, dims=[2**32, 2**32], raw_data=b"")]
    ),
    "an input of 2^124": lambda onnx: model(onnx, [RELU], ["N", 2**62, 2**62]),
    "a batch of 2^40": lambda onnx: model(onnx, [RELU], [2**40, 3]),
    "a signal that doubles": lambda onnx: model(onnx, repeated("Concat", 2, 60, axis=1), ["N", 3]),
    "a product that grows": lambda onnx: model(onnx, repeated("Mul", 2, 40), ["N", 3]),
    "windows that take for ever": lambda onnx: model(onnx, [("MaxPool", ["x"], ["y"], {"kernel_shape": [2048] * 2, "pads": [1024] * 4})], ["N", 1, 4000, 4000]),
    "too many nodes": lambda onnx: model(onnx, repeated("Relu", 1, 20_001), ["N", 3]),
    "a circle": lambda onnx: model(onnx, [("Add", ["x", "b"], ["a"], {}), ("Relu", ["a"], ["b"], {}), ("Relu", ["b"], ["y"], {})], ["N", 3]),
    "a name written twice": lambda onnx: model(onnx, [RELU, ("Tanh", ["x"], ["y"], {})], ["N", 3]),
    "an output without a name": lambda onnx: model(onnx, [("Split", ["x"], ["y", ""], {"axis": 1})], ["N", 4]),
    "a node that writes nothing": lambda onnx: model(onnx, [("Relu", ["x"], [], {}), RELU], ["N", 3]),
    "an opset of the future": lambda onnx: model(onnx, [RELU], ["N", 3], opset=10**9),
    "quantised": lambda onnx: model(
        onnx, [("DequantizeLinear", ["q", "s"], ["c"], {}), ADDED], ["N", 3], {"q": np.ones(3, np.int8), "s": np.float32(1)}
    ),
    "NaN as a weight": lambda onnx: model(onnx, [ADDED], ["N", 3], {"c": np.array([1, np.nan, 2], np.float32)}),
    "NaN as an attribute": lambda onnx: model(onnx, [("LeakyRelu", ["x"], ["y"], {"alpha": np.nan})], ["N", 3]),
    "NaN as a size": lambda onnx: model(onnx, [("Reshape", ["x", "c"], ["y"], {})], ["N", 3], {"c": np.array([np.nan, 3], np.float32)}),
    "a negative variance": lambda onnx: model(onnx, [("BatchNormalization", ["x", "c", "c", "c", "c"], ["y"], {})], ["N", 3], {"c": -np.ones(3, np.float32)}),
    "messages in messages": nested,
    "an endless number": lambda onnx: b"\xff" * 100_000,
    "a pickle": lambda onnx: b"\x80\x04cos\nsystem\n(S'touch made'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("case", HARMFUL)
def test_networks_that_would_do_harm_are_refused_at_once(onnx, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    made = HARMFUL[case](onnx)
    (tmp_path / "net.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    begin = time.monotonic()
    assert main(["inspect", "net.onnx"]) == 2
    assert time.monotonic() - begin < 10  # a second, on a machine with nothing else to do
    out, error = capsys.readouterr()
    assert (out, len(error.splitlines())) == ("", 1)
    assert error.startswith("certify: error: net.onnx: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx"]


def test_a_name_of_a_file_of_tensors_leads_nowhere_else(onnx, tmp_path, capsys):
    (tmp_path / "secret").write_bytes(bytes(12))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "circle").symlink_to(folder / "circle")
    for location in ("../secret", str(tmp_path / "secret"), "\0", "a" * 5000, "circle", "/dev/zero", "/dev/stdin", "..", ""):
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[3], data_location=1)
        tensor.external_data.add(key="location", value=location)
        (folder / "net.onnx").write_bytes(model(onnx, [("Add", ["x", "w"], ["y"], {})], ["N", 3], tensors=[tensor]).SerializeToString())
        assert main(["inspect", str(folder / "net.onnx")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# Data


def header(text, version=(1, 0)):
    """The start of a .npy file with this header."""
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text.encode()


def npz(path, x, y=None):
    """An archive of these bytes as x.npy, and of a label as y.npy."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1, np.int64) if y is None else y)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", buffer.getvalue())
    return str(path)


DESCRIBED = {
    "10^12 numbers": "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}",
    "sizes whose product wraps around": "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
    "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}",
    "a number as a truth": "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1, 3)}",
    "records": "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 3)}",
    "no such type": "{'descr': '<q9', 'fortran_order': False, 'shape': (1, 3)}",
    "code": "{'descr': __import__('os').system('touch made'), 'fortran_order': False, 'shape': (1, 3)}",
    "brackets in brackets": "(" * 9000,
    "minus after minus": "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "-" * 9000 + "1,)}",
    "long": "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3)}" + " " * 60000,
    "nothing": "",
}


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0), (9, 9)])
def test_arrays_that_claim_what_they_are_not_are_refused(tmp_path, monkeypatch, version):
    monkeypatch.chdir(tmp_path)
    for name, text in DESCRIBED.items():
        spec = npz(tmp_path / "set.npz", header(text, version) + bytes(12))
        with pytest.raises(data.DataError) as error:
            data.load(spec)
        assert len(str(error.value).splitlines()) == 1, name
        assert len(str(error.value)) < 600, name
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def test_small_files_that_unpack_to_gigabytes_are_refused_before_they_do(tmp_path):
    """Two GiB of zeros, in an archive of which every part says so, and in a gzip file of as many members as it takes."""
    text = header("{'descr': '|u1', 'fortran_order': False, 'shape': (2097152, 1024)}")
    spec = npz(tmp_path / "set.npz", text + bytes(2**20))
    content = (tmp_path / "set.npz").read_bytes()
    sizes = (struct.pack("<I", len(text) + size) for size in (2**20, 2**31))  # in the directory, and before the data
    (tmp_path / "set.npz").write_bytes(content.replace(*sizes))
    with pytest.raises(data.DataError, match=r"would unpack to 2 GiB from 0.00\d+ MiB"):
        data.load(spec)
    images = 2**31 // 784
    member = gzip.compress(bytes(2**20))
    packed = gzip.compress(struct.pack(">4I", 0x803, images, 28, 28)) + member * (images * 784 // 2**20) + gzip.compress(bytes(images * 784 % 2**20))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(packed)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 1) + bytes(1))
    with pytest.raises(data.DataError, match=r"would unpack to 2 GiB from \d\.\d+ MiB"):
        data.load(f"mnist:{tmp_path}")


def test_the_command_line_says_what_is_wrong_with_data_in_one_line(tmp_path, capsys):
    import lipnet

    torch.manual_seed(0)
    lipnet.save(torch.nn.Sequential(torch.nn.Linear(3, 2)).eval(), tmp_path / "net.safetensors", input_shape=(3,))
    good = io.BytesIO()
    np.save(good, np.full((1, 3), 0.5, np.float32))
    rng, codes = np.random.default_rng(SEED), []
    for i in range(30):
        spec = npz(tmp_path / "set.npz", damaged(good.getvalue(), rng)) if i else npz(tmp_path / "set.npz", good.getvalue())
        codes.append(main(["run", str(tmp_path / "net.safetensors"), spec, "-o", str(tmp_path / f"run{i}"), "--json"]))
        out, error = capsys.readouterr()
        assert codes[-1] == 0 or (out, len(error.splitlines())) == ("", 1), error
        assert codes[-1] == 2 or json.loads(out)
    assert codes[0] == 0
    assert codes.count(2) >= 15
    assert set(codes) <= {0, 2}
