"""How functions and tensor methods in a forward are lowered."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import map_arg

import lipnet
from certify.bound import Array
from certify.errors import CertifyError
from certify.lure.layers import answers
from certify.lure.lowering import DIVIDING, Lowering, Wire, lowers_node, lowers_operator
from certify.registry import Shape
from certify.rules.operators import ELEMENTWISE
from certify.spectral import as_float64
from certify.tracing import inputs_of, run_call
from sdp.proof import UNIT

# Operations in a forward

Operand = Wire | Tensor | float


@lowers_operator(operator.add, torch.add, "add")
def _add(self: Lowering, a: Operand, b: Operand) -> Wire:
    if isinstance(a, Wire) and isinstance(b, Wire):
        return self.add(a, b)
    wire, constant = (a, b) if isinstance(a, Wire) else (b, a)
    assert isinstance(wire, Wire)
    assert not isinstance(constant, Wire)
    offset = as_float64(constant) if isinstance(constant, Tensor) else np.asarray(float(constant))
    whole = np.broadcast_to(offset, (1, *wire.shape)).ravel()
    return Wire(self.wiring.shift(wire.signal, whole), wire.shape)


@lowers_operator(operator.sub, torch.sub, "sub")
def _(self: Lowering, a: Operand, b: Operand) -> Wire:
    return _add(self, a, Wire(self.wiring.scale(b.signal, -1.0), b.shape) if isinstance(b, Wire) else -b)


@lowers_operator(operator.neg, torch.neg, "neg")
def _(self: Lowering, a: Wire) -> Wire:
    return Wire(self.wiring.scale(a.signal, -1.0), a.shape)


@lowers_operator(operator.mul, torch.mul, "mul")
def _(self: Lowering, a: Operand, b: Operand) -> Wire:
    wire, factor = (a, b) if isinstance(a, Wire) else (b, a)
    assert isinstance(wire, Wire)
    assert not isinstance(factor, Wire)
    return Wire(self.wiring.scale(wire.signal, _entries(factor, wire.shape)), wire.shape)


@lowers_operator(*DIVIDING)
def _(self: Lowering, a: Wire, b: Tensor | float) -> Wire:
    divisor = _entries(b, a.shape)
    exact = np.abs(np.frexp(divisor)[0]) == 0.5
    return Wire(self.wiring.scale(a.signal, 1 / divisor, np.where(exact, 0.0, 2 * UNIT / np.abs(divisor))), a.shape)


def _entries(factor: Tensor | float, shape: Shape) -> Array:
    """A number, or stored ones, for each entry of a signal."""
    numbers = as_float64(factor) if isinstance(factor, Tensor) else np.asarray(float(factor))
    return np.ascontiguousarray(np.broadcast_to(numbers, (1, *shape))).ravel()


@lowers_node(torch.cat, torch.concat, torch.concatenate, torch.stack)
def _(self: Lowering, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Wire:
    """Concatenated and stacked signals: where each entry goes is seen from torch's answer to their numbers."""
    parts = [values[part] for part in inputs_of(node.args[:1])]
    if not all(isinstance(part, Wire) for part in parts):
        raise CertifyError(f"{node.name} joins a stored tensor to a signal, which has no form here; take --method layerwise")
    ends = np.cumsum([math.prod(part.shape) for part in parts])
    numbers = [torch.arange(end - math.prod(part.shape), end, dtype=torch.float64).reshape(1, *part.shape) for part, end in zip(parts, ends, strict=True)]
    moved = run_call(node, (numbers, *node.args[1:]), node.kwargs)
    return self.pick(Wire(self.wiring.join([part.signal for part in parts]), ()), moved.flatten().long().numpy(), self.graph.shapes[node.name])


@lowers_node(torch.mean, "mean", torch.sum, "sum")
def _(self: Lowering, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Wire:
    """Sums are exact; an entry of the matrix of a mean is one over a count."""
    x, made = values[node.all_input_nodes[0]], self.graph.shapes[node.name]
    self.check_memory(math.prod(x.shape) * math.prod(made))
    arguments, options = map_arg((node.args[1:], dict(node.kwargs)), values.__getitem__)  # dimensions may be counted from sizes
    matrix = answers(lambda part: run_call(node, (part, *arguments), options), x.shape)
    return self.linear(matrix, x, made, error=4 * UNIT * np.abs(matrix))


@lowers_operator(torch.flatten, "flatten", "reshape", "view", torch.reshape)
def _(self: Lowering, a: Wire, *sizes: Any) -> Wire:
    return a


def _as_module(target: Any, module: nn.Module) -> None:
    @lowers_operator(target)
    def _(self: Lowering, a: Wire) -> Wire:
        return self.elementwise(module, a)


for _target, _module in {**ELEMENTWISE, torch.abs: lipnet.Abs(), operator.abs: lipnet.Abs(), "abs": lipnet.Abs()}.items():
    _as_module(_target, _module)
