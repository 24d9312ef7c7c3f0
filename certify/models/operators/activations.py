"""Elementwise functions, and the last softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

import lipnet
from certify.models.operators.importer import Importer, Node, Signal, handles


def _activation(op: str, make: Callable[[Node], nn.Module], attributes: Sequence[str] = (), nonnegative: bool = False) -> None:
    @handles(op, attributes=attributes)
    def _(importer: Importer, node: Node, x: Signal) -> Signal:
        return importer.call(node, make(node), x, nonnegative)


def _selu(node: Node) -> nn.Module:
    for attribute, usual in (("alpha", 1.6732632423543772), ("gamma", 1.0507009873554805)):
        if abs(node.get(attribute, usual) - usual) > 1e-6:
            node.refuse(f"only {usual} is supported", attribute)
    return nn.SELU()


def _gelu(node: Node) -> nn.Module:
    approximate = node.get("approximate", "none")
    if approximate not in ("none", "tanh"):
        node.refuse("this value is not on the list", "approximate")
    return nn.GELU(approximate)


def _hard_sigmoid(node: Node) -> nn.Module:
    """With torch's slope 1 / 6 and offset 1 / 2."""
    for attribute, default, wanted in (("alpha", 0.2, 1 / 6), ("beta", 0.5, 0.5)):
        if abs(node.get(attribute, default) - wanted) > 1e-6:
            node.refuse(f"only {wanted:.7g} is supported, the default is {default}", attribute)
    return nn.Hardsigmoid()


_activation("Relu", lambda _: nn.ReLU(), nonnegative=True)
_activation("LeakyRelu", lambda node: nn.LeakyReLU(float(node.get("alpha", 0.01))), ("alpha",))
_activation("Elu", lambda node: nn.ELU(float(node.get("alpha", 1.0))), ("alpha",))
_activation("Selu", _selu, ("alpha", "gamma"))
_activation("Gelu", _gelu, ("approximate",))
_activation("Sigmoid", lambda _: nn.Sigmoid(), nonnegative=True)
_activation("Tanh", lambda _: nn.Tanh())
_activation("Softsign", lambda _: nn.Softsign())
_activation("HardSigmoid", _hard_sigmoid, ("alpha", "beta"), nonnegative=True)
_activation("HardSwish", lambda _: nn.Hardswish())
_activation("Abs", lambda _: lipnet.Abs(), nonnegative=True)


@handles("Clip", attributes=("min", "max"))
def _clip(importer: Importer, node: Node, x: Signal) -> Signal:
    """Between two numbers, or at zero from below."""
    low, high = (importer.number(node, place, name) for place, name in ((1, "min"), (2, "max")))
    if low is None and high is None:
        return x
    if low == 0 and high is None:
        return importer.call(node, nn.ReLU(), x, nonnegative=True)
    if low is None or high is None or not low < high:
        node.refuse(f"to [{low}, {high}] is not supported; two ends are needed, the first smaller", "min" if low is None else "max")
    return importer.call(node, nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high), x, low >= 0)


@handles("Softmax", "LogSoftmax", attributes=("axis",))
def _softmax(importer: Importer, node: Node, x: Signal) -> Signal:
    """Set aside: it keeps the order of the logits, and margins are of logits. `finish` and `read` see to it that it is the last node."""
    axis = node.get("axis", -1 if node.opset >= 13 else 1)
    if len(x.shape) != 1 or axis % x.rank != x.rank - 1 or x.shape == (1,):
        node.refuse(f"on a signal of shape {x.shape} it is not supported; along the classes, as the last node, it is", "axis")
    importer.set_aside = node
    return x
