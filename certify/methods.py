"""`lipschitz(net, method, input_shape=..., domain=...)`: a proved Lipschitz constant of a whole network."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
import torch.fx
from torch import nn

from certify.bound import Array, Assumption, Bound, Domain, Everywhere
from certify.errors import Problem, Unsupported
from certify.graph import Graph
from certify.registry import Shape, head_for, operator_for
from certify.spectral import pair_distances
from certify.together import together

_IDENTITY = Bound(1.0, "composition")


class LipschitzMethod(abc.ABC):
    """A way to bound a whole network; a value with its own options, whose repr is what a certificate records."""

    @abc.abstractmethod
    def bound(self, graph: Graph, domain: Domain) -> Bound:
        """A bound of the network on the domain, l2 to l2. Raises Unsupported for a network that this method cannot bound."""


@dataclasses.dataclass(frozen=True)
class Layerwise(LipschitzMethod):
    """The product of the bounds of the layers along a chain, and their sum where branches are added; each from the layer's rule.

    Holds everywhere, so on every domain. Where the last node is a linear layer the bound carries a constant for each pair of outputs,
    `|w_i - w_j|` times the bound of everything before.
    """

    def bound(self, graph: Graph, domain: Domain) -> Bound:
        layers = graph.said
        values: dict[torch.fx.Node, Any] = {}
        problems: list[Problem] = []
        for node in graph.trace.nodes:
            try:
                values[node] = _value(graph, node, values, layers)
            except Unsupported as error:
                problems += [dataclasses.replace(p, where=p.where or node.name) for p in error.problems]
                values[node] = _IDENTITY  # go on, to name every problem at once
            except OverflowError as error:
                problems.append(Problem(node.name, "the network", f"{error}, so its layers have no bound that can be written down"))
                values[node] = _IDENTITY
        if problems:
            raise Unsupported(problems)
        return dataclasses.replace(values[graph.output], domain=domain, method=repr(self))


def lipschitz(net: nn.Module, method: LipschitzMethod | None = None, *, input_shape: Shape, domain: Domain | None = None) -> Bound:
    """A proved Lipschitz constant of `net`, l2 to l2, on `domain` (everywhere by default).

    `input_shape` is that of one input, without the batch. What is certified is the network as `lipnet.freeze` gives it, in exact arithmetic; the bound
    remembers a digest of its numbers, so that it cannot be used for other weights. Nothing in the network vouches for itself: each constant is computed
    from the stored numbers by a rule of `certify.rules`.
    Raises Unsupported, naming every node that has no rule, is in training mode, has hooks or overrides what its rule relies on; ValueError for a shape that
    the network does not take.
    """
    if not isinstance(method, LipschitzMethod | None):
        raise ValueError(f"a method is a value such as certify.LipSDP(), got {method!r:.80}")
    if not isinstance(domain, Domain | None):
        raise ValueError(f"a domain is a value such as certify.Ball(x, radius, p) or certify.Box(low, high), got a {type(domain).__name__}")
    graph = Graph.of(net, input_shape)
    with torch.no_grad():
        bound = (method or Layerwise()).bound(graph, domain or Everywhere())
    assumptions = bound.assumptions | {Assumption.REAL_ARITHMETIC, Assumption.EVAL_MODE}
    return dataclasses.replace(bound, assumptions=assumptions, evidence={**bound.evidence, "network": graph.digest})


def _value(graph: Graph, node: torch.fx.Node, values: dict[torch.fx.Node, Any], layers: dict[torch.fx.Node, Bound | Unsupported]) -> Any:
    """The bound from the input to a node; None for constants and sizes."""
    if node.op == "placeholder":
        return _IDENTITY
    if node.op == "call_module":
        layer = layers[node]
        if isinstance(layer, Unsupported):
            raise layer
        if node is graph.output and len(graph.shapes[node.name]) == 1:
            layer = dataclasses.replace(layer, pairs=_pairs(graph.module(node)))
        return layer @ values[node.all_input_nodes[0]]
    if node.op in ("call_function", "call_method"):
        rule = operator_for(node.target)
        if rule is None and node.name in graph.shapes:
            raise AssertionError(f"{node} passed the check of the graph without a rule; please report this")
        if rule is None or node.name not in graph.shapes:
            return None
        bounds = [bound for bound in (rule(graph.call(node, values)), together(graph, node, values)) if bound is not None]
        return min(bounds, key=lambda bound: bound.value, default=None)
    return None  # get_attr, output


def _pairs(module: nn.Module) -> Array | None:
    """A constant for each pair of outputs of a linear layer."""
    head = head_for(module)
    return None if head is None else pair_distances(head(module))
