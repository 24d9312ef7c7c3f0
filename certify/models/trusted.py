"""Files whose loading runs code of theirs: whole pickled modules, TorchScript, exported programs. Opened only where the user says that the file is trusted."""

from __future__ import annotations

import copy
import inspect
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from certify.errors import Problem, Unsupported
from certify.models.weights import ModelError, NeedsTrust
from certify.registry import Shape, register_name
from lipnet.checkpoint import first_line


def run_file(path: pathlib.Path, refused: NeedsTrust) -> Any:
    """What a file holds that was refused as such a one: a module in eval mode on the CPU, or other objects. Runs the code in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _OPEN[refused.kind](path)
            return found.cpu().eval() if isinstance(found, nn.Module) else found
    except Exception as error:  # whatever the code of the file raises
        raise ModelError(f"{path}: it is trusted, and running it failed ({type(error).__name__}: {first_line(error)}); is what it needs installed?") from error


class Program(nn.Module):
    """TorchScript or an exported program: a function that is run and not looked into.

    It is no submodule, as it has hooks and forwards of its own making; its parameters are this module's too, and it moves with it.
    """

    def __init__(self, program: nn.Module, kind: str) -> None:
        super().__init__()
        self.kind, self._held = kind, (program,)
        for name, parameter in program.named_parameters():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(parameter, requires_grad=False))

    def forward(self, x: Tensor) -> Any:
        return self._held[0](x)

    def extra_repr(self) -> str:
        return self.kind

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        self._held[0]._apply(fn)
        return cast(Program, super()._apply(fn, recurse))

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates what its own programs hold
            return Program(copy.deepcopy(self._held[0], memo), self.kind).train(self.training)


@register_name(f"{__name__}.{Program.__qualname__}")
def _(program: Program, shape: Shape) -> NoReturn:
    raise Unsupported(
        [Problem("", program.kind, "its inside is not looked into; give the network itself (a factory, or weights and --arch), or take --method smoothing")]
    )


_OPEN = {
    "pickle": lambda path: torch.load(path, map_location="cpu", weights_only=False),
    "script": lambda path: Program(torch.jit.load(str(path), map_location="cpu").eval(), "TorchScript"),
    "exported": lambda path: Program(torch.export.load(path).module(), "exported program"),
}


def sources(net: nn.Module) -> bytes:
    """The files of the classes of a network that are not torch's: they say what its numbers do."""
    classes = {type(module) for module in net.modules() if not type(module).__module__.startswith(("torch.", "lipnet."))}
    files = set()
    for cls in classes:
        try:
            files.add(inspect.getfile(cls))
        except (TypeError, OSError):  # made at run time, as those of TorchScript are, whose code is in the file itself
            continue
    return b"".join(pathlib.Path(file).read_bytes() for file in sorted(files) if pathlib.Path(file).is_file())
