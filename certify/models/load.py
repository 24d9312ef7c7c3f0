"""From a spec string to a network: lipnet checkpoints, ONNX files, state dicts with an architecture, and factories that the user names."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import lipnet
from certify.models.architectures import ARCHITECTURES
from certify.models.architectures import input_shape as guessed_shape
from certify.models.onnx import from_onnx
from certify.models.preprocessing import Preprocessing, preprocessing
from certify.models.pretrained import PRETRAINED, weights_of
from certify.models.softmax import set_aside
from certify.models.trusted import run_file, sources
from certify.models.weights import ModelError as ModelError
from certify.models.weights import NeedsTrust, fill, read_state_dict, unwrapped
from certify.registry import Shape
from lipnet.checkpoint import first_line, hash_tensors

FORMS = (
    "net.safetensors (written by lipnet.save), net.onnx, net.pth with --arch, "
    f"{' or '.join(PRETRAINED)} (from an installed package), pkg.module:factory or ./file.py:factory (runs that code)"
)
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pt2", ".model")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network in eval mode on the CPU, and what identifies it."""

    spec: str
    net: nn.Module
    sha256: str  # of the file, or of a factory's file and the numbers that it returned
    input_shape: Shape | None  # of one input, without the batch
    input_range: tuple[float, float] | None = None
    classes: tuple[str, ...] | None = None
    opened: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # how: architecture, preprocessing, where the tensors were in the file, ...
    notes: tuple[str, ...] = ()  # sentences for whoever loads it; unlike `opened`, no part of what it is

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    @property
    def shape(self) -> Shape:
        """The shape of one input. Raises ModelError when the model does not say."""
        if self.input_shape is None:
            raise ModelError(f"{self.spec}: the model does not say what shape its inputs have; pass --input-shape, for example --input-shape 1,28,28")
        return self.input_shape


def load(
    spec: str,
    input_shape: Shape | None = None,
    *,
    arch: str | None = None,
    trust_file: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_range: Sequence[float] | None = None,
    layout: str | None = None,
    bgr: bool | None = None,
) -> Model:
    """The model of a spec. `input_shape`, as the data have it, is for models that do not carry their own.

    `arch` says which network the tensors of a state dict belong to: a name of `certify.models.architectures`, or a factory as in a spec (which runs that code).
    `trust_file` opens a file whose loading runs code: a whole pickled module, TorchScript, an exported program.
    `mean` and `std`, one number or one for each channel, `input_range`, `layout` ("nchw" or "nhwc") and `bgr` become the first layers of the network
    (`certify.models.preprocessing`), so that radii stay in the units of the data. A last Softmax, LogSoftmax or Sigmoid is set aside, with a note.
    Raises ModelError or lipnet.CheckpointError with one sentence.
    """
    if not isinstance(arch, str | None):
        raise ModelError(f"{spec}: an architecture is a name, got {arch!r}")
    before = preprocessing(mean, std, input_range, layout, bgr)
    if before.layout == "nhwc" and input_shape is not None:
        input_shape = before.of_network(input_shape)
    model = _without_last(_load(spec, input_shape, arch, trust_file, guess=before.layout == "nchw"))
    known = ARCHITECTURES.get(str(model.opened.get("arch")))
    if known is not None and known.preprocessing is not None and before.mean is None and before.input_range is None:
        before = dataclasses.replace(known.preprocessing, layout=before.layout, bgr=before.bgr)
        note = f"{spec}: its inputs are preprocessed as {model.opened['arch']} was trained, {before.said}; --mean, --std and --input-range replace that"
        model = dataclasses.replace(model, notes=(*model.notes, note))
    return _behind(before, model)


def _behind(before: Preprocessing, model: Model) -> Model:
    """The network with what comes before it as its first layers."""
    dtype = next((tensor.dtype for tensor in model.net.state_dict().values() if tensor.is_floating_point()), torch.float32)
    layers = before.layers(dtype)
    if not layers:
        return model
    shape = before.of_data(model.input_shape)
    if before.bgr and shape is not None and (len(shape) != 3 or shape[0] != 3):
        raise ModelError(f"{model.spec}: --bgr is for images of three channels, and inputs here have the shape {shape}")
    net = nn.Sequential(*layers, model.net).eval()
    extent = before.range_of_data(model.input_range)
    numbers = len(before.mean or before.std or (0.0,))
    if shape is not None and numbers not in (1, shape[0]):
        raise ModelError(
            f"{model.spec}: --mean and --std have one number, or one for each of the {shape[0]} channels of inputs of shape {shape}, got {numbers}"
        )
    return dataclasses.replace(model, net=net, input_shape=shape, input_range=extent, opened={**model.opened, **before.facts()})


def _without_last(model: Model) -> Model:
    """The model up to its logits. What an ONNX file ends in, its importer has seen to."""
    if model.spec.endswith(".onnx") or model.input_shape is None:
        return model
    found = set_aside(model.net, model.input_shape)
    if found is None:
        return model
    net, last = found
    note = f"{model.spec}: its last step, {last}, is set aside, as it keeps the order of what it is given; outputs, margins and constants are those before it"
    return dataclasses.replace(model, net=net, opened={**model.opened, "set_aside": last}, notes=(*model.notes, note))


def _load(spec: str, input_shape: Shape | None, arch: str | None, trust: bool, guess: bool) -> Model:
    path = pathlib.Path(spec).expanduser()
    if spec in PRETRAINED and arch in (None, spec):
        return dataclasses.replace(_from_weights(spec, weights_of(spec), input_shape, spec, trust=False, guess=guess), classes=PRETRAINED[spec].classes)
    if path.suffix in _WEIGHTS and path.is_file():
        return _from_weights(spec, path, input_shape, arch, trust, guess)
    if arch is not None and (path.exists() or path.suffix not in _WEIGHTS):
        raise ModelError(f"{spec}: --arch is for a file of weights ({', '.join(_WEIGHTS[:3])}, ...); other models say themselves what they are")
    if ":" in spec and not path.exists():
        net, source = _from_factory(spec)
        return Model(spec, net, _digest(net, source), input_shape)
    if path.suffix == ".safetensors":
        checkpoint = lipnet.open_checkpoint(path)
        if input_shape is not None and checkpoint.input_shape not in (None, input_shape):
            raise ModelError(f"{spec}: the checkpoint is of inputs of shape {checkpoint.input_shape}, --input-shape is {input_shape}; leave it out")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return Model(spec, checkpoint.net, sha256, checkpoint.input_shape or input_shape, checkpoint.input_range, checkpoint.classes)
    if path.suffix == ".onnx" and path.is_file():
        imported = from_onnx(path, input_shape)
        return Model(spec, imported.net, imported.sha256, imported.input_shape, opened=imported.opened, notes=imported.notes)
    found = "no such file" if not path.exists() else "this is a folder" if path.is_dir() else "the ending says nothing that is known"
    raise ModelError(f"{spec}: {found}; a model is one of {FORMS}")


def _from_weights(spec: str, path: pathlib.Path, shape: Shape | None, arch: str | None, trust: bool, guess: bool) -> Model:
    """A state dict in the architecture that is named; or, of a file that is trusted and only then, the network that its code makes."""
    ran = {}
    try:
        tensors, where = read_state_dict(path)
    except NeedsTrust as refused:
        if not trust:
            raise
        found, ran = run_file(path, refused), {"trusted": True}
        if isinstance(found, nn.Module):
            return _ran(spec, path, found, shape, arch)
        tensors, where = unwrapped(path, found)
    if arch is None:
        known = ", ".join(ARCHITECTURES)
        some = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in list(tensors.items())[:4])
        raise ModelError(f"{spec}: it holds {len(tensors)} tensors ({some}, ...) and no architecture; name one with --arch: {known}, or pkg.module:factory")
    source = b""
    if ":" in arch:
        net, source = _from_factory(arch)
    elif arch in ARCHITECTURES:
        tensors = dict(ARCHITECTURES[arch].tensors(tensors))
        net = ARCHITECTURES[arch].build(tensors)
    else:
        raise ModelError(f"--arch {arch}: not known; known are {', '.join(ARCHITECTURES)}, and pkg.module:factory or ./file.py:factory (runs that code)")
    net = fill(net, tensors, f"--arch {arch}")
    digest = hashlib.sha256(path.read_bytes() + source).hexdigest()
    if shape is None and guess:
        shape = ARCHITECTURES[arch].input_shape if arch in ARCHITECTURES else None
        shape = shape or guessed_shape(net)
    return Model(spec, net, digest, shape, opened={"arch": arch, "tensors": where, **ran})


def _ran(spec: str, path: pathlib.Path, net: nn.Module, shape: Shape | None, arch: str | None) -> Model:
    """The network that a file holds as a whole. The files of its classes say what its numbers do, so they are part of what it is."""
    if arch is not None:
        raise ModelError(f"{spec}: it holds a whole network, which says itself what it is; leave out --arch {arch}")
    digest = hashlib.sha256(path.read_bytes() + sources(net)).hexdigest()
    return Model(spec, net, digest, shape, opened={"trusted": True})


def _from_factory(spec: str) -> tuple[nn.Module, bytes]:
    """What `module:factory` or `file.py:factory` returns, and the file it comes from. The user has named the code to run."""
    place, _, name = spec.rpartition(":")
    factory, source = _attribute(spec, place, name)
    try:
        net = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except Exception as error:  # whatever code of somebody else raises
        raise ModelError(f"{spec}: {_failed(error)}; name a function without arguments that returns the network") from error
    if not isinstance(net, nn.Module):
        raise ModelError(f"{spec}: the factory returned {type(net).__name__}, not a torch module; return the network, in eval mode")
    return net.cpu().eval(), source


def _attribute(spec: str, place: str, name: str) -> tuple[Callable[[], Any] | nn.Module, bytes]:
    try:
        module = _import_file(pathlib.Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(f"{spec}: {place!r} cannot be imported ({first_line(error)}); a model is one of {FORMS}") from error
    except Exception as error:
        raise ModelError(f"{spec}: {_failed(error)}; python {place} says more") from error
    if not hasattr(module, name):
        raise ModelError(f"{spec}: {place!r} has no {name!r}; name a function of it that returns the network")
    found: Callable[[], Any] | nn.Module = getattr(module, name)
    file = getattr(module, "__file__", None)
    return found, pathlib.Path(file).read_bytes() if file else b""


def _failed(error: Exception) -> str:
    """What went wrong in the user's own code, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (frames[-1].filename, frames[-1].lineno)
    return f"running it failed ({type(error).__name__}: {first_line(error)}, at {file}, line {line})"


def _import_file(path: pathlib.Path) -> Any:
    specification = importlib.util.spec_from_file_location(path.stem, path.resolve(strict=True))
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    specification.loader.exec_module(module)
    return module


def _digest(net: nn.Module, source: bytes) -> str:
    """Of the numbers and of the file that makes the network: two forwards may have the same numbers."""
    hasher = hashlib.sha256(repr(net).encode())
    hasher.update(hashlib.sha256(source).digest())
    hash_tensors(hasher, net.state_dict())
    return hasher.hexdigest()
