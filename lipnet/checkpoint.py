"""Checkpoints that are data: a safetensors file with the constructor calls of the network as JSON. Nothing in a file is ever executed.

The JSON is a tree of `{"call": NAME, "args": {...}}`; NAME is looked up in the fixed table `CALLS` and never imported. A network is built from it without
storage (on torch's meta device), its tensors are compared with those of the file, and only then are the file's tensors put in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import pathlib
import struct
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lipnet import contractions, layers
from lipnet._version import __version__

SCHEMA = 1
_TORCH_MODULES = (
    nn.Linear, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout,
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh, nn.ReLU6, nn.SiLU, nn.GELU, nn.Softplus, nn.LogSigmoid,
)  # fmt: skip
CALLS: Mapping[str, type] = {
    **{f"lipnet.{name}": getattr(layers, name) for name in layers.__all__},
    **{f"lipnet.{cls.__name__}": cls for cls in (contractions.Cayley, contractions.Cholesky, contractions.AOL, contractions.BCOP)},
    **{f"torch.nn.{cls.__name__}": cls for cls in _TORCH_MODULES},
}
_NAMES = {cls: name for name, cls in CALLS.items()}
_NOT_WRITTEN = ("device", "dtype", "inplace", "min_value", "max_value")  # arguments of torch's constructors that are no part of the network
_WORDS = ("none", "tanh", "zeros", "circular", "neighbours", "halves")  # the strings that an argument may be


class CheckpointError(ValueError):
    """A file that is not a whole, unchanged checkpoint, or a network that cannot be written as one."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network and what its maker said of its input."""

    net: nn.Module
    input_shape: tuple[int, ...] | None = None  # of one input, without the batch
    input_range: tuple[float, float] | None = None  # the units of the input, before any normalisation in the network
    classes: tuple[str, ...] | None = None


def save(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_shape: Sequence[int] | None = None,
    input_range: tuple[float, float] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write the network to `path` (.safetensors), atomically. Equal networks make equal files.

    Raises `CheckpointError` naming every module that is not in the table `CALLS`, has hooks or a forward of its own, or was changed by hand.
    """
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in net.state_dict().items()}
    problems: list[str] = []
    described = _describe(net, "", problems)
    if problems:
        raise CheckpointError("the network cannot be written as data: " + "; ".join(problems))
    facts = {"input": {"shape": _plain(input_shape), "range": _plain(input_range)}, "classes": _plain(classes)}
    try:
        text = json.dumps({"schema": SCHEMA, "lipnet": __version__, "net": described, **facts}, allow_nan=False)
        _input_facts(json.loads(text))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the facts of the input cannot be written ({first_line(error)}); see lipnet.Checkpoint for what they are") from error
    _check_tensors(_build(text), tensors, "the network differs from what its constructor arguments rebuild")
    data = safetensors.torch.save(tensors, {"lipnet": text, "sha256": _digest(text, tensors)})
    write_atomically(pathlib.Path(path), _with_sorted_header(data))


def _plain(fact: Any) -> Any:
    """A sequence of numbers or names as JSON has them: the smallest and the largest of an array or a tensor are numbers too."""
    return [part.item() if hasattr(part, "item") else part for part in fact] if isinstance(fact, Sequence) and not isinstance(fact, str) else fact


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The network of a checkpoint, in eval mode on the CPU. Runs no code from the file. Raises `CheckpointError` with one sentence."""
    return open_checkpoint(path).net


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The network of a checkpoint together with what is said of its input. Raises like `load`."""
    path = pathlib.Path(path)
    text, tensors = _read(path)
    try:
        about = _parse(text)
        net = _build(text)
        _check_tensors(net, tensors, "the tensors do not fit the network that the file describes")
        net.load_state_dict(tensors, assign=True)
        extra = _input_facts(about)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError, MemoryError, AssertionError) as error:
        raise CheckpointError(f"{path}: the description of the network cannot be followed ({first_line(error)}); save it again with lipnet.save") from error
    return Checkpoint(net.eval(), **extra)


def _read(path: pathlib.Path) -> tuple[str, dict[str, Tensor]]:
    """The description and the tensors of a file that is whole and unchanged. The file is read once, and the tensors do not share its memory."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); give the path of a file that lipnet.save wrote"
        ) from error
    if len(data) < 10 or data[8:9] != b"{" or _header_length(data) > len(data) - 8:
        raise CheckpointError(f"{path}: this is not a safetensors file, or it is cut off; save the network with lipnet.save")
    try:
        metadata = json.loads(data[8 : 8 + _header_length(data)]).get("__metadata__", {})
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, RuntimeError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: the file is damaged or cut off ({first_line(error)}); copy it again from where it was made") from error
    if "lipnet" not in metadata:
        raise CheckpointError(f"{path}: the file holds tensors but no description of a network; write it with lipnet.save, which adds one")
    if metadata.get("sha256") != _digest(metadata["lipnet"], tensors):
        raise CheckpointError(f"{path}: the file was changed after it was written (its sha256 does not match); copy it again from where it was made")
    return metadata["lipnet"], {name: tensor.clone() for name, tensor in tensors.items()}


def _header_length(data: bytes) -> int:
    length: int = struct.unpack("<Q", data[:8])[0]
    return length


def _with_sorted_header(data: bytes) -> bytes:
    """The same file with the entries of its header in alphabetical order; safetensors leaves the order of the metadata to chance."""
    end = 8 + _header_length(data)
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[end:]


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the description and of every tensor's name, dtype, shape and bytes."""
    hasher = hashlib.sha256(text.encode())
    hash_tensors(hasher, tensors)
    return hasher.hexdigest()


def hash_tensors(hasher: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Add every tensor's name, dtype, shape and bytes to a hash, in the order of the names. Tensors on the CPU."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


def _describe(value: Any, where: str, problems: list[str]) -> Any:
    """The JSON of a constructor argument: a number, a string, a sequence of them, or a call from the table. What has none is added to `problems`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_describe(item, where, problems) for item in value]
    kind = type(value)
    if isinstance(value, nn.Module) and ("forward" in vars(value) or value._forward_hooks or value._forward_pre_hooks):
        problems.append(f"{kind.__name__} (at {where!r}) has hooks or a forward of its own on the instance; remove them")
    if kind is nn.Sequential:
        children = value._modules.items()  # not named_children(), which leaves out the second use of a module
        return {"call": "torch.nn.Sequential", "args": {name: _describe(child, f"{where}.{name}".lstrip("."), problems) for name, child in children}}
    if kind not in _NAMES:
        problems.append(
            f"{kind.__name__} (at {where!r}) is neither nn.Sequential nor one of lipnet's layers or of the plain torch modules; "
            "save the state dict and keep the code that builds the network"
        )
        return None
    given = _arguments(value)
    return {"call": _NAMES[kind], "args": {name: _describe(argument, f"{where}.{name}".lstrip("."), problems) for name, argument in given.items()}}


def _arguments(value: Any) -> dict[str, Any]:
    """What the constructor was called with, read from the attributes of the same names (`bias` is whether there is one)."""
    given = {name: getattr(value, name) for name in _parameters(type(value))}
    if "bias" in given:
        given["bias"] = given["bias"] is not None
    return given


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a constructor that are written to a file."""
    parameters = inspect.signature(cls).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and name not in _NOT_WRITTEN}


def _parse(text: str) -> dict[str, Any]:
    """The JSON of a description, with finite numbers only."""

    def refuse(constant: str) -> float:
        raise CheckpointError(f"the description holds the number {constant}; save the network again with lipnet.save")

    about = json.loads(text, parse_constant=refuse, parse_float=lambda number: float(number) if math.isfinite(float(number)) else refuse(number))
    if not isinstance(about, dict) or about.get("schema") != SCHEMA or isinstance(about.get("schema"), float):
        found = about.get("schema") if isinstance(about, dict) else None
        raise CheckpointError(f"the file has checkpoint schema {found!r}, this version reads {SCHEMA}; update lipnet")
    return about


def _build(text: str) -> nn.Module:
    """The network that a description stands for, on the meta device: no storage is set aside for its tensors."""
    described = _parse(text)["net"]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = _construct(described)
    if not isinstance(net, nn.Module):
        raise CheckpointError(f"the file describes {type(net).__name__}, not a network")
    return net


def _construct(described: Any) -> Any:
    if isinstance(described, list):
        return tuple(_construct(item) for item in described)
    if not isinstance(described, dict):
        return described
    call, arguments = described["call"], described["args"]
    if call == "torch.nn.Sequential":
        children = OrderedDict((name, _construct(child)) for name, child in arguments.items())
        if not all(isinstance(child, nn.Module) for child in children.values()):
            raise CheckpointError("the file puts something that is no module into a Sequential; save the network again with lipnet.save")
        return nn.Sequential(children)
    if not isinstance(call, str) or call not in CALLS:
        raise CheckpointError(f"the file asks for {call!r}, which is none of the modules that a checkpoint may hold; update lipnet, or do not trust the file")
    parameters = _parameters(CALLS[call])
    for name, argument in arguments.items():
        if name not in parameters or not _fits(argument, parameters[name].default):
            shown = str(argument)[:40]
            raise CheckpointError(f"the file calls {call} with {name}={shown!r}, which lipnet.save never writes; update lipnet, or do not trust the file")
    return CALLS[call](**{name: _construct(argument) for name, argument in arguments.items()})


def _fits(argument: Any, default: Any) -> bool:
    """Whether an argument is of the kind of its default, where that says anything."""
    if isinstance(default, bool):
        return isinstance(argument, bool)
    if isinstance(default, int | float):
        return isinstance(argument, int | float) and not isinstance(argument, bool)
    return not isinstance(argument, str) or argument in _WORDS


def _check_tensors(net: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Names, shapes and kinds of numbers of the tensors are those of the network."""
    wanted = {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in net.state_dict().items()}
    found = {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted or name not in found or wanted[name][0] != found[name][0]:
            has = found[name][0] if name in found else "absent"
            needs = wanted[name][0] if name in wanted else "no such tensor"
            raise CheckpointError(f"{what}: {name!r} is {has}, expected {needs}")
        if wanted[name][1] != found[name][1]:
            raise CheckpointError(f"{what}: {name!r} holds numbers of type {tensors[name].dtype}, expected {'real' if wanted[name][1] else 'whole'} numbers")


def _input_facts(about: Mapping[str, Any]) -> dict[str, Any]:
    """Shape, range and class names as `Checkpoint` holds them. Raises ValueError for what makes no sense."""
    shape, extent, classes = about["input"]["shape"], about["input"]["range"], about["classes"]
    if shape is not None and not (isinstance(shape, list) and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape)):
        raise ValueError(f"the input shape must be a sequence of positive sizes, got {shape!r}")
    if extent is not None and not (isinstance(extent, list) and len(extent) == 2 and all(_is_number(end) for end in extent) and extent[0] < extent[1]):
        raise ValueError(f"the input range must be two finite numbers, the lower one first, got {extent!r}")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"classes must be a sequence of names, got {classes!r}")
    return {
        "input_shape": None if shape is None else tuple(shape),
        "input_range": None if extent is None else (float(extent[0]), float(extent[1])),
        "classes": None if classes is None else tuple(classes),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """The file is there whole, or as it was before. Raises OSError that names it, and no temporary file."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        lacking = f"there is no folder {path.parent}; make it first, or" if not path.parent.is_dir() else f"{error.strerror or error}; see to that, or"
        raise type(error)(f"{path}: this cannot be written, {lacking} choose another place") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; what would move a cursor is escaped, as files may put it there."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.isprintable() else repr(line)
