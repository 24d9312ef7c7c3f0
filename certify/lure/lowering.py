"""A network's nodes followed one after the other, each lowered to linear maps and scalar nonlinearities by the entry for it in a table.

A layer without an entry of its own is seen as the plain modules that it freezes to. Convolutions become matrices, at the size of their input.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

import lipnet
import sdp
from certify import slopes
from certify.bound import Array, Ball, Bound, Box, Domain, Everywhere
from certify.errors import CertifyError, Problem, Unsupported
from certify.graph import Graph
from certify.registry import Shape, nearest
from certify.rules.operators import PICKING
from certify.spectral import as_float64
from lipnet.layers.base import Layer
from sdp.activation import Activation, leaky_relu
from sdp.wiring import Index, Region, Signal, Wiring

_F = TypeVar("_F", bound=Callable[..., Any])
_modules: dict[type[nn.Module], Callable[[Lowering, Any, Wire], Wire]] = {}
_operators: dict[Any, Callable[..., Wire]] = {}
_calls: dict[Any, Callable[[Lowering, torch.fx.Node, dict[torch.fx.Node, Any]], Wire]] = {}  # those that need the node itself
_reasons: dict[type[nn.Module], str] = {
    lipnet.L2Pool2d: "an l2 norm of a block is neither elementwise nor a sorting; take --method layerwise, or another pool",
}
_SUMS = (operator.add, torch.add)
DIVIDING = (operator.truediv, torch.div, torch.true_divide, "div", "true_divide")
_ARITHMETIC = (*_SUMS, "add", operator.sub, torch.sub, "sub", operator.mul, torch.mul, "mul", *DIVIDING)
_ROOM = 1e-7
_SHARE = 0.5  # of the machine's memory
_NO_DOMAIN = "take finite numbers, or leave the domain out for a bound that holds everywhere"
_LOOKED_AT = 2**22  # entries of a layer's matrix: a second or two; four times as many take half a minute


@dataclasses.dataclass(frozen=True, eq=False)
class Wire:
    """A signal of the wiring, flattened, and the shape that it has in the network."""

    signal: Signal
    shape: Shape


@dataclasses.dataclass(frozen=True, eq=False)
class Wired:
    """A network as a system."""

    wiring: Wiring
    output: Signal
    system: sdp.LureSystem
    given: Array | None  # multipliers that the layers hand over, scaled for a bound of the whole network; None where they do not chain
    leaves: tuple[tuple[str, int, int], ...]  # by path: the first and the last nonlinearity of each module
    names: dict[int, str]  # of the steps whose matrix is a stored tensor of the network: its name in the state dict


def wire(graph: Graph, domain: Domain) -> Wired:
    """The network of a graph on a domain. Raises Unsupported that names every module and operation that cannot be seen so, before anything is computed."""
    check(graph)
    return Lowering(graph, domain).run()


def check(graph: Graph) -> None:
    """Raises Unsupported, naming everything that cannot be seen as a system, and CertifyError for what cannot fit, before any norm is computed."""
    if problems := _of_types(graph):
        raise Unsupported(problems)
    nonlinear = (node for node in graph.trace.nodes if node.op == "call_module" and _entry(graph.module(node)) is Lowering.elementwise)
    check_memory(math.prod(graph.input_shape) + sum(math.prod(graph.shapes[node.name]) for node in nonlinear))
    if problems := _of_signals(graph):
        raise Unsupported(problems)


def memory(signals: int) -> int:
    """About how many bytes a solver holds: 12 matrices of the size of the inequality."""
    return 8 * 12 * signals**2


def signals_of(graph: Graph) -> tuple[int, int] | None:
    """The size of the matrix inequality on all inputs, and of what a solver works on in l2; None where the matrices of single layers are too large to look.

    Raises as `wire` does.
    """
    sizes = [(graph.input_of(node), graph.shapes[node.name]) for node in graph.trace.nodes if node.op == "call_module"]
    if any(math.prod(shape) * math.prod(made) > _LOOKED_AT for shape, made in sizes):
        return None
    lowering = Lowering(graph, Everywhere())
    output, _, _ = lowering.nodes()
    wiring = lowering.wiring
    return wiring.width + 1, wiring.count + 1 + min(wiring.inputs, wiring.reads(output))


def problems_of(graph: Graph) -> list[Problem]:
    """What keeps a network from being a system of scalar nonlinearities: types and operations first, then what the rules refuse, and signals overwritten."""
    return _of_types(graph) or _of_signals(graph)


def _of_signals(graph: Graph) -> list[Problem]:
    refused = [problem for said in graph.said.values() if isinstance(said, Unsupported) for problem in said.problems]
    return refused or _overwritten(graph)


def _of_types(graph: Graph) -> list[Problem]:
    found = []
    for node in graph.trace.nodes:
        if node.op == "call_module":
            found += [dataclasses.replace(problem, where=str(node.target)) for problem in _module_problems(graph.module(node))]
        elif node.op in ("call_function", "call_method") and node.name in graph.shapes and node.target not in (*_operators, *_calls, *PICKING):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            found.append(Problem(node.name, str(name), "has no form as linear maps and scalar nonlinearities here; take --method layerwise"))
        elif node.target in _ARITHMETIC and node.name in graph.shapes and any(_is_size(graph, arg) for arg in node.all_input_nodes):
            found.append(
                Problem(node.name, getattr(node.target, "__name__", str(node.target)), "counts with the number of inputs in a batch; write the number itself")
            )
    return found


def _is_size(graph: Graph, node: torch.fx.Node) -> bool:
    return node.name not in graph.shapes and graph.constant(node) is None


def _overwritten(graph: Graph) -> list[Problem]:
    """The nodes that read a signal after a module worked on it in place: what they read is not what the trace says."""
    reader = _Reader(torch.fx.GraphModule(graph.net, graph.trace))
    dtype = next((p.dtype for p in graph.net.state_dict().values() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        reader.run(torch.zeros(1, *graph.input_shape, dtype=dtype))
    why = "reads a signal that another module has overwritten; pass inplace=False there"
    return [Problem(str(node.target) if node.op == "call_module" else node.name, node.op.removeprefix("call_"), why) for node in reader.late]


class _Reader(torch.fx.Interpreter):
    """Finds the nodes whose arguments changed since they were made; all views of a tensor share its count of changes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.versions: dict[torch.fx.Node, int] = {}
        self.late: list[torch.fx.Node] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        if any(self.env[arg]._version != self.versions[arg] for arg in n.all_input_nodes if arg in self.versions):
            self.late.append(n)
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.versions[n] = value._version
        return value


def _module_problems(module: nn.Module) -> list[Problem]:
    entry = _entry(module)
    if entry is not None:
        inside = getattr(module, "activation", None)
        return [] if inside is None else _module_problems(inside)
    name = type(module).__name__
    reason = next((_reasons[cls] for cls in type(module).__mro__ if cls in _reasons), None)
    if reason is None and isinstance(module, Layer) and _is_plain(module.frozen()):
        return []
    return [Problem("", name, reason or "has no form as linear maps and scalar nonlinearities here; take --method layerwise")]


def _is_plain(frozen: nn.Module) -> bool:
    """Whether a frozen layer is made of modules with an entry, and of sums of them."""
    for part in frozen.modules():
        if isinstance(part, torch.fx.GraphModule):
            if any(node.op in ("call_function", "call_method") and node.target not in _SUMS for node in part.graph.nodes):
                return False
        elif not list(part.children()) and _entry(part) is None:
            return False
    return True


def _entry(module: nn.Module) -> Callable[[Lowering, Any, Wire], Wire] | None:
    """The entry of the class by whose rule the module is bounded: one with a rule of its own may compute something else than its base."""
    cls = nearest(module) or type(module)
    if cls in _modules:
        return _modules[cls]
    return Lowering.elementwise if cls in slopes.activations() and slopes.activation(module) is not None else None


class Lowering:
    """Interprets a trace: wires in place of tensors."""

    def __init__(self, graph: Graph, domain: Domain) -> None:
        self.graph, self.everywhere = graph, isinstance(domain, Everywhere)
        self.wiring = Wiring(math.prod(graph.input_shape), region_of(domain, graph.input_shape))
        self.path, self.names = "", dict[int, str]()
        self.leaf: nn.Module | None = None
        self.hints: list[Array] = []  # the layers' own multipliers, in the order of the nonlinearities

    def run(self) -> Wired:
        """The whole network, as a system."""
        output, leaves, scales = self.nodes()
        chain = all(len(node.users) <= 1 and len(node.all_input_nodes) <= 1 and node.op in ("placeholder", "call_module", "output") for node in self._signals())
        given = self._given(scales) if chain and self.everywhere else None
        return Wired(self.wiring, output, self.wiring.system(output), given, tuple(leaves), self.names)

    def nodes(self) -> tuple[Signal, list[tuple[str, int, int]], list[tuple[int, int, float]]]:
        """All nodes, in order: the output, the nonlinearities of each module, and its constant beside its multipliers."""
        values: dict[torch.fx.Node, Any] = {}
        leaves: list[tuple[str, int, int]] = []
        scales: list[tuple[int, int, float]] = []
        self.check_memory()
        for node in self.graph.trace.nodes:
            before = self.wiring.count, len(self.hints)
            if node.op == "placeholder":
                values[node] = Wire(self.wiring.input(), self.graph.input_shape)
            elif node.op == "call_module":
                self.path, self.leaf = str(node.target), self.graph.module(node)
                try:
                    values[node] = self.module(self.leaf, values[node.all_input_nodes[0]])
                except Unsupported as error:
                    raise Unsupported([dataclasses.replace(problem, where=self.path) for problem in error.problems]) from None
                leaves.append((str(node.target), before[0], self.wiring.count))
                said = self.graph.said[node]
                scales.append((before[1], len(self.hints), said.value if isinstance(said, Bound) else math.inf))
            elif node.op == "get_attr":
                values[node] = self.graph.constant(node)
            elif node.op != "output":
                values[node] = self.operation(node, values)
            self.check_memory()
        return values[self.graph.output].signal, leaves, scales

    def _signals(self) -> list[torch.fx.Node]:
        return [node for node in self.graph.trace.nodes if node.name in self.graph.shapes or node.op == "output"]

    def _given(self, scales: Sequence[tuple[int, int, float]]) -> Array | None:
        """Multipliers of a chain: those of each module, times the squared constants of all that follow.

        At the edge of the cone rounding has no room, so each step gets a little: its multipliers half as much as its squared constant.
        """
        later, parts = 1.0, list(self.hints)
        for first, last, constant in reversed(scales):
            for k in reversed(range(first, last)):
                parts[k] = parts[k] * later * (1 + _ROOM / 2)
                later *= 1 + _ROOM
            later *= constant * constant
        whole = np.concatenate([np.zeros(0), *parts])
        return whole if len(whole) == self.wiring.count and np.isfinite(whole).all() else None

    def operation(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Any:
        """One call in a forward; the number itself for sizes."""
        if node.name not in self.graph.shapes:
            return self.graph.constant(node)
        shape = self.graph.shapes[node.name]
        if node.target in PICKING:
            signal = next(part for part in node.all_input_nodes if part.name in self.graph.shapes)
            return self.pick(values[signal], self.graph.picked(node), shape)
        if node.target in _calls:
            return _calls[node.target](self, node, values)
        arguments = [values[arg] if isinstance(arg, torch.fx.Node) else arg for arg in node.args]
        if node.target in _ARITHMETIC:
            arguments = [self.spread(arg, shape) if isinstance(arg, Wire) else arg for arg in arguments]
        made = _operators[node.target](self, *arguments)
        return dataclasses.replace(made, shape=shape)

    def module(self, module: nn.Module, x: Wire) -> Wire:
        """One module: by its entry, or as the plain modules that it freezes to."""
        entry = _entry(module)
        if entry is not None:
            return entry(self, module, x)
        if isinstance(module, Layer):
            return self.plain(module.frozen(), x)
        raise AssertionError(f"{type(module).__name__} passed the check of the lowering without an entry; please report this")

    def plain(self, module: nn.Module, x: Wire) -> Wire:
        """Frozen modules: a Sequential, a traced graph of modules and sums, or one module."""
        if isinstance(module, torch.fx.GraphModule):
            values: dict[torch.fx.Node, Any] = {}
            for node in module.graph.nodes:
                if node.op == "placeholder":
                    values[node] = x
                elif node.op == "call_module":
                    values[node] = self.plain(module.get_submodule(str(node.target)), values[node.args[0]])
                elif node.op == "output":
                    return values[node.args[0]]
                elif node.target in _SUMS:
                    values[node] = self.add(*(values[arg] for arg in node.args))
                else:
                    raise CertifyError(f"the operation {node.target} of a frozen layer has no form as a linear map here; please report this")
        if type(module) is nn.Sequential:
            for part in module:
                x = self.plain(part, x)
            return x
        return self.module(module, x)

    def elementwise(self, module: nn.Module, x: Wire) -> Wire:
        """With slopes in [a, b] the module alone is proved by the multiplier 1 for a >= 0, and 1/2 otherwise (of slopes up to 1 in size)."""
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            return self._by_channel(as_float64(module.weight), x)
        activation = slopes.activation(module)
        if activation is None:
            raise AssertionError(f"{type(module).__name__} passed the check of the lowering without slopes; please report this")
        return Wire(self.bend(x.signal, activation, 1.0 if activation.range[0] >= 0 else 0.5), x.shape)

    def _by_channel(self, below: Array, x: Wire) -> Wire:
        """PReLU: channels of one slope below zero together."""
        of_entry = np.repeat(below, math.prod(x.shape[1:]))
        groups = [np.flatnonzero(of_entry == slope) for slope in np.unique(below)]
        bent = [
            self.bend(self.wiring.pick(x.signal, group), leaky_relu(float(slope)), 1.0 if slope >= 0 else 0.5)
            for slope, group in zip(np.unique(below), groups, strict=True)
        ]
        return self.pick(Wire(self.wiring.join(bent), x.shape), np.argsort(np.concatenate(groups), kind="stable"), x.shape)

    def linear(self, matrix: Array, x: Wire, shape: Shape, bias: Array | None = None, error: Array | None = None) -> Wire:
        """`matrix @ x + bias`."""
        self.check_memory(len(matrix) * self.wiring.width)
        made = self.wiring.linear(matrix, x.signal, error)
        return Wire(made if bias is None else self.wiring.shift(made, bias), shape)

    def pick(self, x: Wire, which: Index, shape: Shape) -> Wire:
        """Some of the entries."""
        return Wire(self.wiring.pick(x.signal, which), shape)

    def spread(self, x: Wire, shape: Shape) -> Wire:
        """The entries repeated to fit this shape, as torch does."""
        if x.shape == shape:
            return x
        numbers = np.arange(math.prod(x.shape)).reshape(1, *x.shape)
        return self.pick(x, np.broadcast_to(numbers, (1, *shape)).ravel(), shape)

    def add(self, x: Wire, y: Wire) -> Wire:
        """The sum of two signals of one shape."""
        return Wire(self.wiring.add(x.signal, y.signal), x.shape)

    def bend(self, signal: Signal, activation: Activation, multiplier: Array | float) -> Signal:
        """New nonlinearities, with the multipliers by which their layer is proved on its own."""
        before = self.wiring.count
        made = self.wiring.nonlinear(signal, activation)
        if self.wiring.count - before == len(signal):
            self.hints.append(np.broadcast_to(np.asarray(multiplier, dtype=np.float64), (len(signal),)).copy())
        return made

    def sort(self, signal: Signal, first: Index, second: Index) -> Signal:
        """A comparator for each pair: `|max|^2 + |min|^2 = |z|^2 - 2 r (d - r)`, so 1 is its multiplier."""
        before = self.wiring.count
        made = self.wiring.sort(signal, first, second)
        self.hints.append(np.ones(self.wiring.count - before))
        return made

    def check_memory(self, more: int = 0) -> None:
        """Refuse before the machine has to."""
        check_memory(self.wiring.width + 1, more)


def check_memory(signals: int, more: int = 0) -> None:
    """Raises CertifyError, with the estimate, for so many signals and so many more numbers if they do not fit into this machine."""
    needed = memory(signals) + 8 * more
    available = int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > available:
        raise CertifyError(
            f"LipSDP needs at least {needed / 2**30:.1f} GiB for the {signals} signals that it has met so far, {available / 2**30:.1f} GiB may be used; "
            "take --method layerwise, --method frequency for convolutions, or a smaller network"
        )


def region_of(domain: Domain, shape: Shape) -> Region | None:
    """A domain as a region of flat inputs; None for everywhere. Raises CertifyError for one that does not fit."""
    if isinstance(domain, Everywhere):
        return None
    if isinstance(domain, Ball):
        if np.shape(domain.center) != tuple(shape):
            raise CertifyError(f"the ball has a center of shape {np.shape(domain.center)}, the network takes inputs of shape {tuple(shape)}")
        if domain.p not in (1, 2, math.inf) or not math.isfinite(domain.radius):
            raise CertifyError(f"LipSDP is on a Ball of finite radius in l1, l2 or l-infinity, got the radius {domain.radius:g} in l{domain.p:g}; {_NO_DOMAIN}")
        return Region(np.asarray(domain.center, dtype=np.float64).ravel(), float(domain.radius), domain.p)
    if isinstance(domain, Box):
        if not (np.isfinite(domain.low).all() and np.isfinite(domain.high).all()):
            raise CertifyError(f"LipSDP is on a Box of finite numbers, got one without an end; {_NO_DOMAIN}")
        try:
            low, high = (np.broadcast_to(end, shape).ravel() for end in (domain.low, domain.high))
        except ValueError:
            raise CertifyError(f"the box has ends of shape {domain.low.shape}, the network takes inputs of shape {tuple(shape)}") from None
        center = low / 2 + high / 2
        return Region(center, np.nextafter(np.maximum(high - center, center - low), np.inf), math.inf)
    raise CertifyError(f"a local bound is for a Ball or a Box, got {domain!r}")


def lowers(*types: type[nn.Module]) -> Callable[[_F], _F]:
    """Decorator: the function lowers modules of these types."""

    def decorator(function: _F) -> _F:
        _modules.update(dict.fromkeys(types, function))
        return function

    return decorator


def lowers_operator(*targets: Any) -> Callable[[_F], _F]:
    """Decorator: the function lowers these functions and tensor methods."""

    def decorator(function: _F) -> _F:
        _operators.update(dict.fromkeys(targets, function))
        return function

    return decorator


def lowers_node(*targets: Any) -> Callable[[_F], _F]:
    """Decorator: the function lowers these functions and tensor methods, and is given the node and the values of all."""

    def decorator(function: _F) -> _F:
        _calls.update(dict.fromkeys(targets, function))
        return function

    return decorator


def refuse(module: nn.Module, why: str) -> Unsupported:
    """The refusal of a module, to be raised by its entry."""
    return Unsupported([Problem("", type(module).__name__, why)])
