"""`freeze`: from layers whose weights are functions of parameters to plain torch modules that hold the weights."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrize

from lipnet.layers.base import Layer


class LayerTracer(torch.fx.Tracer):
    """Traces a network with our layers, and torch's own, as leaves."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, Layer) or super().is_leaf_module(module, qualified_name)


@contextlib.contextmanager
def left_as_it_was(net: nn.Module) -> Iterator[None]:
    """While a forward is traced, the numbers that it makes on its way, and what it keeps of its signals, become attributes of its modules; no longer."""
    held = [(vars(module), dict(vars(module))) for module in net.modules()]
    try:
        yield
    finally:
        for now, before in held:
            now.clear()
            now.update(before)


@torch.no_grad()
def freeze(net: nn.Module) -> nn.Module:
    """The network as plain torch modules in eval mode: equal outputs, nothing of this package inside, and the weights in it are numbers.

    `nn.Sequential` stays one; a layer becomes `nn.Linear`, or a small Sequential or traced graph of them; a network with a forward of its own is traced
    by torch.fx. The numbers are those that the layers compute now, in the dtype of their parameters. The original is left as it was.
    Raises `torch.fx`'s error for a forward that cannot be traced (one that branches on the values of its input).
    """
    return _frozen(net).eval()


def _frozen(module: nn.Module) -> nn.Module:
    if isinstance(module, Layer):
        return module.frozen()
    if type(module) is nn.Sequential:
        return nn.Sequential(OrderedDict((name, _frozen(child)) for name, child in module._modules.items() if child is not None))
    if not any(isinstance(child, Layer) for child in module.modules()):
        return _unparametrized(copy.deepcopy(module))
    with left_as_it_was(module):
        graph = LayerTracer().trace(module)
        traced = torch.fx.GraphModule(module, graph)
    for name, child in list(traced.named_modules()):
        if isinstance(child, Layer):
            traced.set_submodule(name, child.frozen())
    return _unparametrized(copy.deepcopy(traced))


def _unparametrized(net: nn.Module) -> nn.Module:
    """The network with torch's parametrised weights as numbers. (`remove_parametrizations` would change the class, which the original shares.)"""
    for part in list(net.modules()):
        if parametrize.is_parametrized(part):
            values = {name: getattr(part, name).detach().clone() for name in part._modules["parametrizations"]._modules}  # type: ignore[union-attr]
            part.__class__ = type(part).__mro__[1]
            del part._modules["parametrizations"]
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value))
    return net
