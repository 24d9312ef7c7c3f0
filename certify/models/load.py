"""From a spec string to a network: lipnet checkpoints, and factories that the user names."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

import lipnet
from certify.errors import CertifyError
from certify.registry import Shape
from lipnet.checkpoint import hash_tensors

FORMS = "net.safetensors (written by lipnet.save), pkg.module:factory or ./file.py:factory (runs that code)"
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pt2")


class ModelError(CertifyError):
    """One sentence: what was asked, what was found, what to do next."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network in eval mode on the CPU, and what identifies it."""

    spec: str
    net: nn.Module
    sha256: str  # of the file, or of a factory's file and the numbers that it returned
    input_shape: Shape | None  # of one input, without the batch
    input_range: tuple[float, float] | None = None
    classes: tuple[str, ...] | None = None

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


def load(spec: str, input_shape: Shape | None = None) -> Model:
    """The model of a spec. `input_shape` is for models that do not carry their own. Raises ModelError or lipnet.CheckpointError with one sentence."""
    path = pathlib.Path(spec).expanduser()
    if ":" in spec and not path.exists():
        net, source = _from_factory(spec)
        return Model(spec, net, _digest(net, source), input_shape)
    if path.suffix == ".safetensors":
        checkpoint = lipnet.open_checkpoint(path)
        if input_shape is not None and checkpoint.input_shape not in (None, input_shape):
            raise ModelError(f"{spec}: the checkpoint is of inputs of shape {checkpoint.input_shape}, --input-shape is {input_shape}; leave it out")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return Model(spec, checkpoint.net, sha256, checkpoint.input_shape or input_shape, checkpoint.input_range, checkpoint.classes)
    if path.suffix in _PICKLES and path.exists():
        raise ModelError(
            f"{spec}: a pickle can run code when it is loaded, so it is not opened; load its weights into a network of lipnet layers and lipnet.save that"
        )
    found = "no such file" if not path.exists() else "the ending says nothing that is known"
    raise ModelError(f"{spec}: {found}; a model is one of {FORMS}")


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
