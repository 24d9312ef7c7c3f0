"""Sums, and products with constants."""

from __future__ import annotations

import math
import operator

import torch

import lipnet
from certify.models.operators.importer import Importer, Node, Signal, handles


@handles("Add", "Sub")
def _add(importer: Importer, node: Node, x: Signal) -> Signal:
    function = operator.add if node.op == "Add" else operator.sub
    a, b = (importer.values[name] for name in node.inputs)
    if isinstance(a, Signal) and isinstance(b, Signal):
        if a.shape != b.shape or a.batch != b.batch:
            node.refuse(f"signals of the shapes {a.shape} and {b.shape} do not have one shape, so entries would be repeated")
        return Signal(importer.graph.call_function(function, (a.node, b.node)), a.shape, a.batch)
    if isinstance(a, Signal):
        return importer.shifted(node, a, 1, function)
    if node.op == "Sub":
        x = Signal(importer.graph.call_function(operator.neg, (x.node,)), x.shape, x.batch)
    return importer.shifted(node, x, 0, operator.add)


@handles("Mul")
def _mul(importer: Importer, node: Node, x: Signal) -> Signal:
    return importer.scaled(node, x, importer.factors(node, x, 1 if importer.values[node.inputs[0]] is x else 0))


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
    return Signal(importer.graph.call_function(operator.neg, (x.node,)), x.shape, x.batch)
