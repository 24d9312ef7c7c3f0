"""A last Softmax, LogSoftmax or Sigmoid, found and set aside: it keeps the order of the logits, and margins are theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from certify.registry import Shape

_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid)
_CALLED: dict[Any, str] = {
    torch.softmax: "softmax", nn.functional.softmax: "softmax", "softmax": "softmax",
    torch.log_softmax: "log_softmax", nn.functional.log_softmax: "log_softmax", "log_softmax": "log_softmax",
    torch.sigmoid: "sigmoid", "sigmoid": "sigmoid",
}  # fmt: skip
_SCALES = (0.1, 1.0, 10.0, 1e3)  # of the random inputs on which the two are compared
_Last = Callable[[Tensor], Tensor]


def set_aside(net: nn.Module, shape: Shape) -> tuple[nn.Module, str] | None:
    """The network without its last step, and what that is, where it is one of the three over two classes or more; None for all other networks.

    What is left and the last step have to give the very outputs of the network on random inputs, else the network stays as it is.
    """
    try:
        found = _without(copy.deepcopy(net))
        if found is None:
            return None
        inner, last, name = found
        return (inner.eval(), name) if _same(net, inner, last, shape) else None
    except Exception:  # whatever a forward raises on symbolic input, or a module when it is copied: then there is nothing to be said of its last step
        return None


@torch.no_grad()
def _same(net: nn.Module, inner: nn.Module, last: _Last, shape: Shape) -> bool:
    generator = torch.Generator().manual_seed(0)
    dtype = next((tensor.dtype for tensor in net.state_dict().values() if tensor.is_floating_point()), torch.float32)
    for scale in _SCALES:
        x = (scale * torch.randn(4, *shape, generator=generator)).to(dtype)
        logits, theirs = inner(x.clone()), net(x.clone())
        if logits.dim() != 2 or len(logits) != 4 or logits.shape[1] < 2 or not torch.equal(last(logits).nan_to_num(), theirs.nan_to_num()):
            return False
    return True


def _without(net: nn.Module) -> tuple[nn.Module, _Last, str] | None:
    """The network, changed in place or traced, without the last step of its forward; that step; and its name."""
    if _is_last(net):
        return nn.Identity(), net, type(net).__name__
    if isinstance(net, torch.jit.ScriptModule) or _is_watched(net):
        return None
    trace = _Shallow().trace(net)
    last = trace.output_node().args[0]
    if not isinstance(last, torch.fx.Node) or len(last.users) != 1 or not last.args or not isinstance(last.args[0], torch.fx.Node):
        return None
    if last.op == "call_module":
        return _without_module(net, trace, last)
    kind = _CALLED.get(last.target) if last.op in ("call_function", "call_method") else None
    step = None if kind is None else _step(kind, last)
    return None if kind is None or step is None else (_up_to(net, trace, last), step, kind)


def _without_module(net: nn.Module, trace: torch.fx.Graph, last: torch.fx.Node) -> tuple[nn.Module, _Last, str] | None:
    """... where the last step is a module of it, or in a module of it, which is called once and has one name."""
    path = str(last.target)
    module = net.get_submodule(path)
    names = sum(part is module for _, part in net.named_modules(remove_duplicate=False))
    calls = sum(node.op == "call_module" and node.target == last.target for node in trace.nodes)
    found = _without(module) if (names, calls, len(last.args), len(last.kwargs)) == (1, 1, 1, 0) else None
    if found is None:
        return None
    if not _is_last(module):
        net.set_submodule(path, found[0])
    elif type(net) is nn.Sequential:
        delattr(net, path)
    else:
        net = _up_to(net, trace, last)
    return net, found[1], found[2]


def _up_to(net: nn.Module, trace: torch.fx.Graph, last: torch.fx.Node) -> nn.Module:
    """The forward as it was traced, to the input of its last node: a linear layer before it is then the last, whose rows bound the margins."""
    trace.output_node().args = (last.args[0],)
    trace.erase_node(last)
    return torch.fx.GraphModule(net, trace)


def _is_last(module: nn.Module) -> bool:
    return type(module) in _MODULES and getattr(module, "dim", 1) in (None, 1, -1) and not _is_watched(module)


def _step(kind: str, node: torch.fx.Node) -> _Last | None:
    """The call as a function of its input, where it is over the classes and has no other options."""
    options = {name: value for name, value in node.kwargs.items() if name != "_stacklevel" and value is not None}  # as torch.nn.functional passes them on
    given = [*node.args[1:], *options.values()]
    if not options.keys() <= {"dim"}:
        return None
    if kind == "sigmoid":
        return None if given else torch.sigmoid
    return (lambda x: getattr(torch, kind)(x, dim=1)) if given in ([1], [-1]) else None


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _Shallow(torch.fx.Tracer):
    """Sees one forward: every module that it calls is a leaf."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True
