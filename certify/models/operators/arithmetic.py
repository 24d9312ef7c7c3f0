"""Sums, and products with constants."""

from __future__ import annotations

import math
import operator

import torch
from torch import nn

import lipnet
from certify.models.operators.importer import Importer, Node, Signal, by_channel, handles

_GATED = {nn.Sigmoid: nn.SiLU, nn.Hardsigmoid: nn.Hardswish}  # `x s(x)` of these is an activation with slopes of its own


@handles("Add", "Sub")
def _add(importer: Importer, node: Node, x: Signal) -> Signal:
    function = operator.add if node.op == "Add" else operator.sub
    a, b = (importer.values[name] for name in node.inputs)
    if isinstance(a, Signal) and isinstance(b, Signal):
        if a.shape != b.shape or a.batch != b.batch:
            node.refuse(f"signals of the shapes {a.shape} and {b.shape} do not have one shape, so entries would be repeated")
        return importer.signal(node, importer.graph.call_function(function, (a.node, b.node)), a.shape, a.batch)
    if isinstance(a, Signal):
        return importer.with_constant(node, a, importer.weight(node, 1), function)
    return importer.with_constant(node, _neg(importer, node, x) if node.op == "Sub" else x, importer.weight(node, 0), operator.add)


@handles("Mul")
def _mul(importer: Importer, node: Node, x: Signal) -> Signal:
    """With a constant, or with a signal, which has no Lipschitz constant, but for the two products that are activations."""
    a, b = (importer.values[name] for name in node.inputs)
    if isinstance(a, Signal) and isinstance(b, Signal):
        return _product(importer, node, a, b)
    held = importer.weight(node, 1 if a is x else 0)
    array = importer.aligned(node, x, held)
    return importer.scaled(node, x, array.ravel()) if by_channel(array, x) else importer.with_constant(node, x, held, operator.mul)


def _product(importer: Importer, node: Node, a: Signal, b: Signal) -> Signal:
    """Entry by entry; one of the two may be repeated along axes of length 1, as where channels are weighted."""
    for x, gate in ((a, b), (b, a)):
        kind = _GATED.get(type(importer.module(gate)))
        if kind is not None and gate.node.args == (x.node,) and gate.batch == x.batch:
            return importer.call(node, kind(), x)
    if a.rank != b.rank or a.batch != b.batch or any(m != n and 1 not in (m, n) for m, n in zip(a.shape, b.shape, strict=True)):
        node.refuse(f"signals of the shapes {a.shape} and {b.shape} do not fit")
    shape = tuple(max(m, n) for m, n in zip(a.shape, b.shape, strict=True))
    return importer.signal(node, importer.graph.call_function(operator.mul, (a.node, b.node)), shape, a.batch, a.nonnegative and b.nonnegative)


@handles("Div")
def _div(importer: Importer, node: Node, x: Signal) -> Signal:
    """By powers of two as a product, which is exact; by other positive numbers as a normalisation."""
    divisors = importer.factors(node, x, 1)
    if all(abs(math.frexp(float(c))[0]) == 0.5 and 1e-30 < abs(c) < 1e30 for c in divisors):
        return importer.scaled(node, x, 1 / divisors)
    if not (divisors > 0).all():
        node.refuse("divisors must be positive, or powers of two")
    layer = lipnet.Normalize([0.0] * len(divisors), [float(c) for c in divisors]).to(importer.dtype)
    layer.divisor.copy_(torch.tensor(layer.std, dtype=importer.dtype))
    return importer.call(node, layer, x)


@handles("Neg")
def _neg(importer: Importer, node: Node, x: Signal) -> Signal:
    return importer.signal(node, importer.graph.call_function(operator.neg, (x.node,)), x.shape, x.batch)
