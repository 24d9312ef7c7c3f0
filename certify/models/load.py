"""From a spec string to a network: lipnet checkpoints, ONNX files, state dicts with an architecture, and factories that the user names."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import lipnet
from certify.models.architectures import ARCHITECTURES
from certify.models.architectures import input_shape as guessed_shape
from certify.models.onnx import from_onnx
from certify.models.weights import ModelError as ModelError
from certify.models.weights import fill, read_state_dict
from certify.registry import Shape
from lipnet.checkpoint import hash_tensors

FORMS = "net.safetensors (written by lipnet.save), net.onnx, net.pth with --arch, pkg.module:factory or ./file.py:factory (runs that code)"
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
    opened: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # how: architecture, mean and std, where the tensors were in the file
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
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Model:
    """The model of a spec. `input_shape` is for models that do not carry their own.

    `arch` says which network the tensors of a state dict belong to: a name of `certify.models.architectures`, or a factory as in a spec (which runs that code).
    `mean` and `std`, one number or one for each channel, become the first layer of the network, so that radii stay in the units of the data.
    Raises ModelError or lipnet.CheckpointError with one sentence.
    """
    if not isinstance(arch, str | None) or not all(isinstance(number, int | float) for number in (*(mean or ()), *(std or ()))):
        raise ModelError(f"{spec}: an architecture is a name, mean and std are numbers, got {arch!r}, {mean!r} and {std!r}")
    model = _load(spec, input_shape, arch)
    if mean is None and std is None:
        return model
    channels = max(len(mean or ()), len(std or ()))
    before = lipnet.Normalize(_repeated(mean or [0.0], channels), _repeated(std or [1.0], channels))
    before = before.to(next((tensor.dtype for tensor in model.net.state_dict().values() if tensor.is_floating_point()), torch.float32))
    opened = {**model.opened, "mean": list(before.mean), "std": list(before.std)}
    return dataclasses.replace(model, net=nn.Sequential(before, model.net).eval(), opened=opened)


def _repeated(values: Sequence[float], channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


def _load(spec: str, input_shape: Shape | None, arch: str | None) -> Model:
    path = pathlib.Path(spec).expanduser()
    if path.suffix in _WEIGHTS and path.is_file():
        return _from_weights(spec, path, input_shape, arch)
    if arch is not None:
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
    found = "no such file" if not path.exists() else "the ending says nothing that is known"
    raise ModelError(f"{spec}: {found}; a model is one of {FORMS}")


def _from_weights(spec: str, path: pathlib.Path, shape: Shape | None, arch: str | None) -> Model:
    """A state dict in the architecture that is named."""
    tensors, where = read_state_dict(path)
    if arch is None:
        known = ", ".join(ARCHITECTURES)
        some = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in list(tensors.items())[:4])
        raise ModelError(f"{spec}: it holds {len(tensors)} tensors ({some}, ...) and no architecture; name one with --arch: {known}, or pkg.module:factory")
    source = b""
    if ":" in arch:
        net, source = _from_factory(arch)
    elif arch in ARCHITECTURES:
        net = ARCHITECTURES[arch](tensors)
    else:
        raise ModelError(f"--arch {arch}: not known; known are {', '.join(ARCHITECTURES)}, and pkg.module:factory or ./file.py:factory (runs that code)")
    net = fill(net, tensors, f"--arch {arch}")
    digest = hashlib.sha256(path.read_bytes() + source).hexdigest()
    return Model(spec, net, digest, shape or guessed_shape(net), opened={"arch": arch, "tensors": where})


def _from_factory(spec: str) -> tuple[nn.Module, bytes]:
    """What `module:factory` or `file.py:factory` returns, and the file it comes from. The user has named the code to run."""
    place, _, name = spec.rpartition(":")
    factory, source = _attribute(spec, place, name)
    net = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    if not isinstance(net, nn.Module):
        raise ModelError(f"{spec}: the factory returned {type(net).__name__}, not a torch module; return the network, in eval mode")
    return net.cpu().eval(), source


def _attribute(spec: str, place: str, name: str) -> tuple[Callable[[], Any] | nn.Module, bytes]:
    try:
        module = _import_file(pathlib.Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(f"{spec}: {place!r} cannot be imported ({error}); a model is one of {FORMS}") from error
    if not hasattr(module, name):
        raise ModelError(f"{spec}: {place!r} has no {name!r}; name a function of it that returns the network")
    found: Callable[[], Any] | nn.Module = getattr(module, name)
    file = getattr(module, "__file__", None)
    return found, pathlib.Path(file).read_bytes() if file else b""


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
