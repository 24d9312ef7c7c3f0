"""ONNX files: opened without running anything in them, imported operator by operator, and compared with another program that reads the same file.

The only file that imports the package `onnx`, and only when an ONNX file is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.fx
from torch import Tensor

from certify.models.operators.importer import ANY, NEWEST, OLDEST, Array, Fold, Importer, Node, Signal, Sizes
from certify.models.weights import ModelError, check_start
from certify.registry import Shape
from lipnet.checkpoint import first_line

_LARGEST = 2**31  # bytes; what one message of the format can hold
_NODES = 20_000
_LONGEST = 1200  # of a message: names in a file may be of any length
_TOLERANCE = 1e-4  # of the largest output: float32 sums in another order differ by less, another function by more
_SCALES = (0.01, 0.1, 1.0, 10.0)  # of the random inputs of the comparison
_BATCHES = (3, 1)  # of the comparison, where the file leaves the length of the batch open


@dataclasses.dataclass(frozen=True, eq=False)
class Imported:
    """A network from an ONNX file, in eval mode."""

    net: torch.fx.GraphModule
    input_shape: Shape  # of one input, without the batch
    sha256: str  # of the file, and of the files of tensors that it names
    opened: Mapping[str, Any]  # what was set aside
    notes: tuple[str, ...]


def from_onnx(path: str | pathlib.Path, input_shape: Shape | None = None) -> Imported:
    """The network of an ONNX file as torch's own modules, with the numbers of the file.

    Operators and values of attributes are those of a list; all others are refused, naming node, operator and attribute. A last Softmax or LogSoftmax is set
    aside: it keeps the order of the logits. Every import is compared with onnxruntime, or with `onnx.reference` where that is not installed, on random inputs.
    `input_shape` is for files that leave it open. Raises ModelError with one sentence.
    """
    path = pathlib.Path(path)
    check_start(path)
    try:
        import onnx
    except ImportError as error:
        raise ModelError(f"{path}: reading ONNX files needs the package onnx ({error}); install it with: pip install 'lipnet[onnx]'") from error
    hasher = hashlib.sha256()
    try:
        model = _read(onnx, path, hasher)
        return _imported(onnx, model, path, input_shape, hasher.hexdigest())
    except ModelError as error:
        said = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise ModelError(said if len(said) <= _LONGEST else f"{said[: _LONGEST - 3]}...") from None


def _imported(onnx: Any, model: Any, path: pathlib.Path, input_shape: Shape | None, sha256: str) -> Imported:
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(opsets) != 1 or not OLDEST <= opsets[0] <= NEWEST:
        raise ModelError(f"it is written in opset {' and '.join(map(str, opsets)) or 'unknown'}; {OLDEST} to {NEWEST} are known, so export it in one of these")
    opset = opsets[0]
    if model.functions or model.graph.sparse_initializer:
        raise ModelError("it holds functions of its own or sparse tensors, which are not supported; export it without them")
    if len(model.graph.node) > _NODES:
        raise ModelError(f"it has {len(model.graph.node)} nodes; up to {_NODES} are supported")
    constants = {tensor.name: _array(onnx, path, tensor) for tensor in model.graph.initializer}
    if len(constants) != len(model.graph.initializer):
        raise ModelError("two of its tensors have one name, so programs may read either; export it again")
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ModelError(f"it has {len(inputs)} inputs and {len(model.graph.output)} outputs; networks of one input and one output can be certified")
    kind = inputs[0].type.tensor_type
    dtype = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.DOUBLE: torch.float64}.get(kind.elem_type)
    if dtype is None:
        raise ModelError(f"its input {inputs[0].name!r} is not of float32 or float64; export it in one of these")
    shape, batch = _input_shape(kind, input_shape)
    importer = Importer(constants, _folding(onnx, model.graph, opset), dtype)
    importer.input(inputs[0].name, shape, batch)
    for place, proto in enumerate(model.graph.node):
        importer.read(_node(onnx, path, proto, place, opset))
    wanted = model.graph.output[0].name
    net, output = importer.finish(wanted)
    last = importer.set_aside
    opened, notes = dict[str, Any](), list[str]()
    if last is not None and wanted in importer.aside:
        opened["set_aside"] = f"{last.op} {last.label}"
        notes.append(f"{path.name}: its last node, {last.op} {last.label}, is set aside; outputs, margins and constants are those of the logits before it")
        del model.graph.output[:]
        model.graph.output.append(onnx.helper.make_tensor_value_info(last.inputs[0], kind.elem_type, None))
    difference, by = _compare(onnx, model, net, shape, batch, output, dtype)
    if math.isinf(difference):
        raise ModelError(f"it gives no finite numbers on random inputs of sizes {_SCALES[0]:g} to {_SCALES[-1]:g}, here or in {by}; look at its weights")
    if not difference <= _TOLERANCE:
        raise ModelError(
            f"the import differs from {by} by {difference:.1g} of the largest output on random inputs, more than {_TOLERANCE:g}; please report this"
        )
    notes.append(f"{path.name}: the import differs from {by} by {difference:.1g} of the largest output, on random inputs")
    return Imported(net, shape, sha256, opened, tuple(notes))


def _read(onnx: Any, path: pathlib.Path, hasher: Any) -> Any:
    """The message in a file, with the tensors that lie in other files put into it, checked by the package itself."""
    if path.stat().st_size > _LARGEST:
        raise ModelError(f"{path}: it has {path.stat().st_size / 2**30:.1f} GiB; files of up to {_LARGEST / 2**30:.0f} GiB can be read")
    data = path.read_bytes()
    hasher.update(data)
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # of the protobuf package, which has several
        raise ModelError(f"{path}: it is no ONNX file, or is cut short ({first_line(error)}); fetch it again") from None
    room = _LARGEST - len(data)
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            room -= _take_in(onnx, path, tensor, hasher, room)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, and others for sizes
        raise ModelError(f"{path}: it is no valid ONNX file ({first_line(error)}); export it again") from None
    return model


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)


def _take_in(onnx: Any, path: pathlib.Path, tensor: Any, hasher: Any, room: int) -> int:
    """Read a tensor from a file beside the model: in its folder or below it, and nowhere else."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    folder = path.resolve().parent
    try:
        file = (folder / where.get("location", "")).resolve()
        inside = file.is_relative_to(folder) and file.is_file()
    except (OSError, RuntimeError, ValueError):  # names that are too long, links in a circle, a zero byte
        inside = False
    if not inside:
        _cannot(path, tensor, f"lies in {where.get('location', '')[:200]!r}, which is no file in the folder of the model; put it there")
    try:
        offset, size = int(where.get("offset", 0)), file.stat().st_size
        length = int(where.get("length", size - offset))
    except ValueError:
        offset, size, length = -1, 0, 0
    if offset < 0 or length < 0 or offset + length > size or length > room:
        _cannot(path, tensor, f"is said to be {where.get('length')} bytes from {where.get('offset')} of {file.name}, which has {size}; fetch both again")
    with file.open("rb") as opened:
        opened.seek(offset)
        tensor.raw_data = opened.read(length)
    hasher.update(tensor.raw_data)
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]
    return length


def _cannot(path: pathlib.Path, tensor: Any, why: str) -> NoReturn:
    raise ModelError(f"{path}: the tensor {tensor.name!r} {why}")


def _array(onnx: Any, path: pathlib.Path, tensor: Any) -> Array:
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except Exception as error:  # sizes that do not fit the data, types that numpy has not
        _cannot(path, tensor, f"cannot be read ({first_line(error)}); export the network again")


def _node(onnx: Any, path: pathlib.Path, proto: Any, place: int, opset: int) -> Node:
    """A node as plain values."""
    values = {}
    for attribute in proto.attribute:
        value = _array(onnx, path, attribute.t) if attribute.type == onnx.AttributeProto.TENSOR else onnx.helper.get_attribute_value(attribute)
        values[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
    outputs = tuple(proto.output)
    if not outputs or not outputs[0]:
        raise ModelError(f"node {proto.name or place!r} ({op}) writes nothing; export the network again")
    return Node(
        proto.name, op, tuple(proto.input), outputs, values, opset, repr(proto.name) if proto.name else f"{place}, which writes {', '.join(map(repr, outputs))}"
    )


def _folding(onnx: Any, graph: Any, opset: int) -> Fold:
    """What ONNX's own reference makes of a node of constants."""
    protos = {proto.output[0]: proto for proto in graph.node if proto.output}

    def fold(node: Node, arrays: Sequence[Array | None]) -> list[Array]:
        from onnx.reference import ReferenceEvaluator

        given = {name: array for name, array in zip(node.inputs, arrays, strict=True) if array is not None}
        infos = [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape) for name, array in given.items()]
        one = onnx.helper.make_graph([protos[node.outputs[0]]], "one", infos, [onnx.helper.make_empty_tensor_value_info(name) for name in node.outputs])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy remarks on divisions by zero
            return [np.asarray(array) for array in ReferenceEvaluator(one, opsets={"": opset}).run(None, given)]

    return fold


def _input_shape(kind: Any, asked: Shape | None) -> tuple[Shape, Sizes | None]:
    """The shape of one input, and the length of the batch as the file has it: `ANY`, a number, or None where the file has no axis for it."""
    sizes = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.shape.dim]
    if not kind.HasField("shape") or not sizes:
        if asked is None:
            raise ModelError("the file does not say what shape its input has; pass --input-shape, for example --input-shape 1,28,28")
        return asked, ANY
    written = "x".join("?" if size is None else str(size) for size in sizes)
    if len(sizes) > 1 and asked is None and None not in sizes[1:]:
        return tuple(size or 0 for size in sizes[1:]), ANY if sizes[0] is None else (sizes[0], sizes[0])
    if len(sizes) == 1 and asked is None and sizes[0] is not None:
        return (sizes[0],), None
    if asked is None:
        raise ModelError(f"the file leaves sizes of its input open ({written}, the batch in front); pass --input-shape, for example --input-shape 3,224,224")
    if len(asked) == len(sizes) - 1 and all(size in (None, wanted) for size, wanted in zip(sizes[1:], asked, strict=True)):
        return asked, ANY if sizes[0] is None else (sizes[0], sizes[0])
    if len(asked) == len(sizes) and all(size in (None, wanted) for size, wanted in zip(sizes, asked, strict=True)):
        return asked, None
    raise ModelError(f"its input is {written} in the file, --input-shape is {asked}; leave it out, or give the sizes without the batch")


@torch.no_grad()
def _compare(onnx: Any, model: Any, net: torch.fx.GraphModule, shape: Shape, batch: Sizes | None, output: Signal, dtype: torch.dtype) -> tuple[float, str]:
    """The largest difference of the import from another program, as a part of the largest output at that scale, and which program. The other program takes
    batches as the file declares them, or of `_BATCHES`, and the import others: it must not matter to it how many inputs come at a time."""
    others, refused = _others(onnx, model), []
    length = 1 if batch in (None, ANY) else batch[0]
    split = list(_BATCHES) if batch == ANY else [length] * -(-sum(_BATCHES) // length)
    own = [*_BATCHES, sum(split) - sum(_BATCHES)]
    for by, make in others:
        generator, largest = torch.Generator().manual_seed(0), 0.0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = make()
                for scale in _SCALES:
                    x = scale * torch.randn(sum(split), *shape, generator=generator, dtype=dtype)
                    theirs = _rows(run, x.split(split), batch, output)
                    largest = max(largest, _difference(_run(net, x.split(own)), theirs))
        except ModelError:
            raise
        except Exception as error:  # not installed, or does not know an operator or a type: the next one is asked
            refused.append(f"{by}: {first_line(error)}")
            continue
        return largest, by
    raise ModelError(f"no other program runs the file, so the import cannot be compared ({'; '.join(refused)}); export it again")


def _run(net: torch.fx.GraphModule, parts: Sequence[Tensor]) -> Tensor:
    try:
        return torch.cat([net(part) for part in parts if len(part)])
    except RuntimeError as error:  # torch's word for many things, memory among them
        raise ModelError(f"torch does not run the import ({first_line(error)}); please report this") from None


def _others(onnx: Any, model: Any) -> Iterator[tuple[str, Callable[[], Callable[[Tensor], Tensor]]]]:
    def reference() -> Callable[[Tensor], Tensor]:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(model)
        name = evaluator.input_names[0]
        return lambda x: torch.from_numpy(np.asarray(evaluator.run(None, {name: x.numpy()})[0]))

    def session() -> Callable[[Tensor], Tensor]:
        from certify.smoothing.engines import onnx_session

        return onnx_session(model.SerializeToString())

    yield "onnxruntime", session
    yield "onnx.reference", reference


def _rows(run: Callable[[Tensor], Tensor], parts: Sequence[Tensor], batch: Sizes | None, output: Signal) -> Tensor:
    """The outputs for each input, whatever batch the file takes."""
    rows = []
    for part in parts:
        found, wanted = run(part[0] if batch is None else part), (len(part), *output.shape)
        if tuple(found.shape) != (output.shape if output.batch is None else wanted):
            raise ValueError(f"it returns {tuple(found.shape)} for {len(part)} inputs")
        rows.append(found.reshape(wanted))
    return torch.cat(rows)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if not (torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return math.inf
    gap, largest = float((ours.double() - theirs.double()).abs().max()), float(theirs.abs().max())
    ratio = gap / max(largest, torch.finfo(theirs.dtype).tiny)
    return ratio if ratio >= 0 else math.inf
