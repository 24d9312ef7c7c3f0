"""Elementwise functions, and the last softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

import lipnet
from certify.models.operators.importer import Importer, Node, Signal, handles


def _activation(op: str, make: Callable[[Node], nn.Module], attributes: Sequence[str] = (), nonnegative: bool = False) -> None:
    @handles(op, attributes=attributes)
    def _(importer: Importer, node: Node, x: Signal) -> Signal:
        return importer.call(node, make(node), x, nonnegative)


def _same(given: float, usual: float) -> bool:
    """Whether an attribute is this number, as float32 holds it: of another one the slopes would be others."""
    return bool(np.float32(given) == np.float32(usual))


def _selu(node: Node) -> nn.Module:
    for attribute, usual in (("alpha", 1.6732632423543772), ("gamma", 1.0507009873554805)):
        if not _same(node.get(attribute, usual), usual):
            node.refuse(f"only {usual} is supported", attribute)
    return nn.SELU()


def _gelu(node: Node) -> nn.Module:
    approximate = node.get("approximate", "none")
    if approximate not in ("none", "tanh"):
        node.refuse("this value is not on the list", "approximate")
    return nn.GELU(approximate)


def _celu(node: Node) -> nn.Module:
    alpha = float(node.get("alpha", 1.0))
    if not alpha > 0:
        node.refuse("only positive numbers are supported", "alpha")
    return nn.CELU(alpha)


def _swish(node: Node) -> nn.Module:
    if node.get("alpha", 1.0) != 1:
        node.refuse("only 1 is supported", "alpha")
    return nn.SiLU()


_activation("Relu", lambda _: nn.ReLU(), nonnegative=True)
_activation("LeakyRelu", lambda node: nn.LeakyReLU(float(node.get("alpha", 0.01))), ("alpha",))
_activation("Elu", lambda node: nn.ELU(float(node.get("alpha", 1.0))), ("alpha",))
_activation("Celu", _celu, ("alpha",))
_activation("Selu", _selu, ("alpha", "gamma"))
_activation("Gelu", _gelu, ("approximate",))
_activation("Sigmoid", lambda _: nn.Sigmoid(), nonnegative=True)
_activation("Tanh", lambda _: nn.Tanh())
_activation("Softsign", lambda _: nn.Softsign())
_activation("Softplus", lambda _: nn.Softplus(), nonnegative=True)
_activation("HardSwish", lambda _: nn.Hardswish())
_activation("Swish", _swish, ("alpha",))
_activation("Mish", lambda _: nn.Mish())
_activation("Abs", lambda _: lipnet.Abs(), nonnegative=True)


@handles("Clip", attributes=("min", "max"))
def _clip(importer: Importer, node: Node, x: Signal) -> Signal:
    """Between two numbers, or on one side."""
    low, high = (importer.number(node, place, name) for place, name in ((1, "min"), (2, "max")))
    if low is None and high is None:
        return x
    if low == 0 and high is None:
        return importer.call(node, nn.ReLU(), x, nonnegative=True)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not low < high:
        node.refuse(f"to [{low}, {high}] is not supported; the first number must be smaller", "max")
    return importer.call(node, nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high), x, low >= 0)


@handles("HardSigmoid", attributes=("alpha", "beta"))
def _hard_sigmoid(importer: Importer, node: Node, x: Signal) -> Signal:
    """torch's own has slope 1 / 6 and offset 1 / 2; others are `alpha x + beta` cut at 0 and 1."""
    alpha, beta = float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        node.refuse("it must be a finite number", "beta" if math.isfinite(alpha) else "alpha")
    if _same(alpha, 1 / 6) and beta == 0.5:
        return importer.call(node, nn.Hardsigmoid(), x, nonnegative=True)
    line = importer.scaled(node, x, torch.tensor([alpha], dtype=torch.float64))
    line = importer.with_constant(node, line, torch.tensor(beta, dtype=importer.dtype), operator.add)
    return importer.call(node, nn.Hardtanh(0.0, 1.0), line, nonnegative=True)


@handles("PRelu")
def _prelu(importer: Importer, node: Node, x: Signal) -> Signal:
    """With one slope, or one for each channel."""
    slopes = importer.factors(node, x, 1)
    layer = nn.PReLU(len(slopes))
    layer.weight = nn.Parameter(slopes.clone())
    return importer.call(node, layer, x)


@handles("Softmax", "LogSoftmax", attributes=("axis",))
def _softmax(importer: Importer, node: Node, x: Signal) -> Signal:
    """Set aside: it keeps the order of the logits, and margins are of logits. `finish` and `read` see to it that it is the last node."""
    axis = node.get("axis", -1 if node.opset >= 13 else 1)
    if len(x.shape) != 1 or axis % x.rank != x.rank - 1 or x.shape == (1,):
        node.refuse(f"on a signal of shape {x.shape} it is not supported; along the classes, as the last node, it is", "axis")
    importer.set_aside = node
    return x
