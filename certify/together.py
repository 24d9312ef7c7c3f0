"""Signals that are put beside each other, where more is known of them together than of each: entries of one signal, and the larger and the smaller of two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx

from certify.bound import Bound, beside
from certify.convolution import root_up
from certify.errors import Unsupported
from certify.graph import Graph
from certify.registry import Index
from certify.rules.operators import PICKING, REARRANGED
from certify.tracing import inputs_of

_CALLS = ("call_function", "call_method")
_COMPARED: dict[Any, str] = {torch.maximum: "larger", "maximum": "larger", torch.minimum: "smaller", "minimum": "smaller"}
_BESIDE = (torch.cat, torch.concat, torch.concatenate, torch.stack)


def together(graph: Graph, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Bound | None:
    """The bound of signals beside each other, by what they have in common; None where that is nothing.

    The larger and the smaller of two signals, entry by entry, are these two in another order, and sorting moves no two points apart (MaxMin). Entries of one
    signal, each of them once, are no longer than that signal.
    """
    parts = node.args[0] if node.target in _BESIDE and node.args else None
    if not isinstance(parts, list | tuple) or not all(isinstance(part, torch.fx.Node) and part.name in graph.shapes for part in parts):
        return None
    signals = _sorted(graph, parts) or parts
    origins = [_origin(graph, signal) for signal in signals]
    if len({origin for origin, _ in origins}) == 1:
        shown = int(np.bincount(np.concatenate([places for _, places in origins])).max(initial=0))
        return Bound(root_up(shown), "entries of one signal") @ values[origins[0][0]]
    return None if signals is parts else beside([values[signal] for signal in signals])


def _sorted(graph: Graph, parts: Sequence[Any]) -> Sequence[Any] | None:
    """The two signals of one shape of which two nodes are the larger and the smaller, entry by entry."""
    which = {_COMPARED.get(part.target) for part in parts if part.op in _CALLS and not part.kwargs}
    if len(parts) != 2 or which != {"larger", "smaller"}:
        return None
    signals, others = ([signal for signal in part.args if isinstance(signal, torch.fx.Node) and signal.name in graph.shapes] for part in parts)
    same = len(signals) == 2 and others in (signals, signals[::-1]) and graph.shapes[signals[0].name] == graph.shapes[signals[1].name]
    return signals if same else None


def _origin(graph: Graph, node: torch.fx.Node) -> tuple[torch.fx.Node, Index]:
    """The signal that a node moves entries of, through any number of such nodes, and which entry of it each of its own is."""
    places: Index = np.arange(math.prod(graph.shapes[node.name]))
    while node.op in _CALLS and node.target in (*PICKING, *REARRANGED):
        signals = [part for part in inputs_of((node.args, node.kwargs)) if part.name in graph.shapes]
        if len(signals) != 1:
            break
        try:
            places = graph.picked(node)[places]
        except Unsupported:
            break
        node = signals[0]
    return node, places
