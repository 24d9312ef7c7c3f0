"""From a traced network to `sdp.LureSystem`: how each module and operation becomes linear maps and scalar nonlinearities.

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
from torch.fx.node import map_arg

import lipnet
import sdp
from certify import slopes
from certify.bound import Array, Ball, Bound, Box, Domain, Everywhere
from certify.convolution import two
from certify.errors import CertifyError, Problem, Unsupported
from certify.functions import BatchNorm
from certify.graph import Graph
from certify.registry import Shape, nearest
from certify.rules.operators import ELEMENTWISE, PICKING
from certify.spectral import as_float64
from certify.tracing import inputs_of, run_call
from lipnet.functional import comparators
from lipnet.layers.base import Layer
from lipnet.layers.residual import ResidualBlock
from lipnet.layers.sll import PotentialLayer
from sdp.activation import RELU, Activation, leaky_relu
from sdp.proof import UNIT
from sdp.wiring import Index, Region, Signal, Wiring

_F = TypeVar("_F", bound=Callable[..., Any])
_modules: dict[type[nn.Module], Callable[[Lowering, Any, Wire], Wire]] = {}
_operators: dict[Any, Callable[..., Wire]] = {}
_calls: dict[Any, Callable[[Lowering, torch.fx.Node, dict[torch.fx.Node, Any]], Wire]] = {}  # those that need the node itself
_reasons: dict[type[nn.Module], str] = {
    lipnet.L2Pool2d: "an l2 norm of a block is neither elementwise nor a sorting; take --method layerwise, or another pool",
}
_SUMS = (operator.add, torch.add)
_DIVIDING = (operator.truediv, torch.div, torch.true_divide, "div", "true_divide")
_ARITHMETIC = (*_SUMS, "add", operator.sub, torch.sub, "sub", operator.mul, torch.mul, "mul", *_DIVIDING)
_ROOM = 1e-7
_SHARE = 0.5  # of the machine's memory
_LOOKED_AT = 2**24  # entries of a layer's matrix


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
    nonlinear = (node for node in graph.trace.nodes if node.op == "call_module" and _entry(graph.module(node)) is _elementwise)
    check_memory(math.prod(graph.input_shape) + sum(math.prod(graph.shapes[node.name]) for node in nonlinear))
    if problems := _of_signals(graph):
        raise Unsupported(problems)


def memory(signals: int) -> int:
    """About how many bytes a solver holds: 12 matrices of the size of the inequality."""
    return 8 * 12 * signals**2


def signals_of(graph: Graph) -> int | None:
    """The size of the matrix inequality on all inputs; None where the matrices of single layers are too large to look. Raises as `wire` does."""
    sizes = [(graph.input_of(node), graph.shapes[node.name]) for node in graph.trace.nodes if node.op == "call_module"]
    if any(math.prod(shape) * math.prod(made) > _LOOKED_AT for shape, made in sizes):
        return None
    lowering = Lowering(graph, Everywhere())
    lowering.nodes()
    return lowering.wiring.width + 1


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
    return _elementwise if cls in slopes.activations() and slopes.activation(module) is not None else None


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
        return Region(np.asarray(domain.center, dtype=np.float64).ravel(), float(domain.radius), domain.p)
    if isinstance(domain, Box):
        low, high = (np.broadcast_to(np.asarray(end, dtype=np.float64), shape).ravel() for end in (domain.low, domain.high))
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


def _refuse(module: nn.Module, why: str) -> Unsupported:
    return Unsupported([Problem("", type(module).__name__, why)])


# Linear maps


@lowers(nn.Linear, lipnet.ContractionLinear, lipnet.BROLinear, lipnet.UnitRowLinear)
def _(self: Lowering, layer: Any, x: Wire) -> Wire:
    weight = layer.weight if isinstance(layer.weight, Tensor) else layer.weight()
    matrix, bias = as_float64(weight), None if layer.bias is None else as_float64(layer.bias)
    if len(x.shape) != 1:
        repeats = math.prod(x.shape[:-1])
        self.check_memory(repeats**2 * matrix.size)
        matrix, bias = _kron(np.eye(repeats), matrix), None if bias is None else np.tile(bias, repeats)
    elif type(layer) is nn.Linear and layer is self.leaf:
        self.names[len(self.wiring.steps)] = f"{self.path}.weight"
    return self.linear(matrix, x, (*x.shape[:-1], len(weight)), bias)


@lowers(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
def _(self: Lowering, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d, x: Wire) -> Wire:
    """The matrix, from the answers to unit vectors: each is an entry of the kernel, or 0, in any order of summation."""
    with torch.no_grad():
        unbiased = _without_bias(layer)
        made = unbiased(torch.zeros(1, *x.shape, dtype=torch.float64)).shape[1:]
        self.check_memory(math.prod(x.shape) * math.prod(made))
        matrix = _answers(unbiased, x.shape)
    kernel = np.concatenate([as_float64(layer.weight).ravel(), np.zeros(1)])
    if not np.isin(matrix, kernel).all():
        raise _refuse(layer, "meets a pixel with several of its taps (reflect or replicate padding, or circular on a small image); pad by a module before it")
    bias = None if layer.bias is None else np.repeat(as_float64(layer.bias), math.prod(made[1:]))
    return self.linear(matrix, x, tuple(made), bias)


def _without_bias(layer: nn.Module) -> nn.Module:
    plain = lipnet.freeze(layer).double()
    plain.bias = None  # type: ignore[assignment]
    return plain


def _answers(function: Callable[[Tensor], Tensor], shape: Shape) -> Array:  # (outputs, inputs)
    """The matrix of a linear function on inputs of this shape."""
    entries = math.prod(shape)
    rows = torch.eye(entries, dtype=torch.float64).split(256)
    parts = [function(part.reshape(-1, *shape)).reshape(len(part), -1) for part in rows]
    return np.ascontiguousarray(torch.cat(parts).T.numpy())


@lowers(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)
def _(self: Lowering, layer: nn.BatchNorm1d, x: Wire) -> Wire:
    """`(v - mean) weight / sqrt(var + eps) + bias`, with the running statistics."""
    variance = as_float64(layer.running_var) + layer.eps  # type: ignore[arg-type]
    weight = np.ones(len(variance)) if layer.weight is None else as_float64(layer.weight)
    factor = weight / np.sqrt(variance)
    shift = -as_float64(layer.running_mean) * factor + (0.0 if layer.bias is None else as_float64(layer.bias))  # type: ignore[arg-type]
    per, count = math.prod(x.shape[1:]), len(variance)
    made = self.wiring.scale(x.signal, np.repeat(factor, per), np.repeat(8 * UNIT * np.abs(factor), per))
    size = np.abs(as_float64(layer.running_mean) * factor) + (np.zeros(count) if layer.bias is None else np.abs(as_float64(layer.bias)))  # type: ignore[arg-type]
    made = self.wiring.shift(made, np.repeat(shift, per))
    return Wire(dataclasses.replace(made, offset_error=made.offset_error + np.repeat(16 * UNIT * size, per)), x.shape)


@lowers(lipnet.Normalize)
def _(self: Lowering, layer: lipnet.Normalize, x: Wire) -> Wire:
    per = math.prod(x.shape[1:])
    mean, std = (np.repeat(np.broadcast_to(as_float64(part), (x.shape[0],)), per) for part in (layer.shift, layer.divisor))
    moved = self.wiring.shift(x.signal, -mean)
    exact = np.abs(np.frexp(std)[0]) == 0.5
    return Wire(self.wiring.scale(moved, 1 / std, np.where(exact, 0.0, 2 * UNIT / std)), x.shape)


@lowers(lipnet.Scale)
def _(self: Lowering, layer: lipnet.Scale, x: Wire) -> Wire:
    return Wire(self.wiring.scale(x.signal, layer.factor), x.shape)


@lowers(lipnet.BatchCentering)
def _(self: Lowering, layer: lipnet.BatchCentering, x: Wire) -> Wire:
    return Wire(self.wiring.shift(x.signal, np.repeat(as_float64(layer.shift()), math.prod(x.shape[1:]))), x.shape)


@lowers(lipnet.LayerCentering2d)
def _(self: Lowering, layer: lipnet.LayerCentering2d, x: Wire) -> Wire:
    pixels = math.prod(x.shape[1:])
    block = np.eye(pixels) - 1 / pixels
    self.check_memory(math.prod(x.shape) ** 2)
    bias = None if layer.bias is None else np.repeat(as_float64(layer.bias), pixels)
    ones = np.eye(x.shape[0])
    return self.linear(_kron(ones, block), x, x.shape, bias, _kron(ones, np.full((pixels, pixels), 4 * UNIT)))


@lowers(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, lipnet.ScaledAvgPool2d)
def _(self: Lowering, module: nn.Module, x: Wire) -> Wire:
    """The matrix from the answers to unit vectors, each entry one over a count."""
    made = tuple(module(torch.zeros(1, *x.shape)).shape[1:])
    self.check_memory(math.prod(x.shape) * math.prod(made))
    matrix = _answers(module, x.shape)
    return self.linear(matrix, x, made, error=4 * UNIT * np.abs(matrix))


@lowers(nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
@lowers(nn.PixelUnshuffle, nn.PixelShuffle, nn.ChannelShuffle, nn.Upsample, nn.UpsamplingNearest2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
@lowers(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
@lowers(lipnet.ReverseChannels, lipnet.ChannelsLast)
def _(self: Lowering, module: nn.Module, x: Wire) -> Wire:
    """A rearrangement, entries perhaps repeated."""
    numbered = module(torch.arange(math.prod(x.shape), dtype=torch.float64).reshape(1, *x.shape))
    which = numbered.flatten().long().numpy()
    made = tuple(numbered.shape[1:])
    return Wire(x.signal, made) if np.array_equal(which, np.arange(len(which))) else self.pick(x, which, made)


@lowers(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.Unfold, lipnet.PadChannels)
def _(self: Lowering, module: nn.Module, x: Wire) -> Wire:
    """A border of constants: rows of zeros, and the constants."""
    zeros = torch.zeros(1, *x.shape, dtype=torch.float64)
    constant = module(zeros)[0]
    if not torch.isfinite(constant).all():
        raise _refuse(module, "pads with NaN or infinity; take a finite number")
    matrix = _answers(lambda part: module(part) - constant, x.shape)
    return self.linear(matrix, x, tuple(constant.shape), constant.flatten().numpy())


# Nonlinearities


def _elementwise(self: Lowering, module: nn.Module, x: Wire) -> Wire:
    """With slopes in [a, b] the module alone is proved by the multiplier 1 for a >= 0, and 1/2 otherwise (of slopes up to 1 in size)."""
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return _by_channel(self, as_float64(module.weight), x)
    activation = slopes.activation(module)
    if activation is None:
        raise AssertionError(f"{type(module).__name__} passed the check of the lowering without slopes; please report this")
    return Wire(self.bend(x.signal, activation, 1.0 if activation.range[0] >= 0 else 0.5), x.shape)


def _by_channel(self: Lowering, below: Array, x: Wire) -> Wire:
    """PReLU: channels of one slope below zero together."""
    of_entry = np.repeat(below, math.prod(x.shape[1:]))
    groups = [np.flatnonzero(of_entry == slope) for slope in np.unique(below)]
    bent = [
        self.bend(self.wiring.pick(x.signal, group), leaky_relu(float(slope)), 1.0 if slope >= 0 else 0.5)
        for slope, group in zip(np.unique(below), groups, strict=True)
    ]
    return self.pick(Wire(self.wiring.join(bent), x.shape), np.argsort(np.concatenate(groups), kind="stable"), x.shape)


@lowers(lipnet.NActivation)
def _(self: Lowering, layer: lipnet.NActivation, x: Wire) -> Wire:
    """`-v + 2 relu(v - high) - 2 relu(low - v)`: slopes of +-1 at every entry."""
    return Wire(self.bend(x.signal, sdp.activation.Sloped(-1.0, 1.0), 0.5), x.shape)


@lowers(lipnet.MaxMin)
def _(self: Lowering, layer: lipnet.MaxMin, x: Wire) -> Wire:
    channels, per = x.shape[0], math.prod(x.shape[1:])
    places = np.arange(channels * per).reshape(channels, per)
    half = channels // 2
    pairs = (places[0::2], places[1::2]) if layer.pairing == "neighbours" else (places[:half], places[half:])
    return Wire(self.sort(x.signal, pairs[0].ravel(), pairs[1].ravel()), x.shape)


@lowers(lipnet.GroupSort)
def _(self: Lowering, layer: lipnet.GroupSort, x: Wire) -> Wire:
    """The network of comparators that the layer itself is."""
    places = np.arange(math.prod(x.shape)).reshape(-1, layer.size, math.prod(x.shape[1:]))
    signal = x.signal
    for i, j in comparators(layer.size):
        signal = self.sort(signal, places[:, i].ravel(), places[:, j].ravel())
    return Wire(signal, x.shape)


@lowers(lipnet.Householder)
def _(self: Lowering, layer: lipnet.Householder, x: Wire) -> Wire:
    """`z - 2 relu(v'z) v`: `|z|^2 - 4 r (v'z - r)` for a unit v, so 2 is its multiplier."""
    direction, per = as_float64(layer.direction()), math.prod(x.shape[1:])
    places = np.arange(math.prod(x.shape)).reshape(-1, 2, per)
    first, second = places[:, 0].ravel(), places[:, 1].ravel()
    v = [np.repeat(direction[:, k], per) for k in (0, 1)]
    wiring = self.wiring
    parts = [wiring.pick(x.signal, which) for which in (first, second)]
    beyond = self.bend(wiring.add(wiring.scale(parts[0], v[0]), wiring.scale(parts[1], v[1])), RELU, 2.0)
    made = wiring.join([wiring.add(part, wiring.scale(beyond, -2 * v_k)) for part, v_k in zip(parts, v, strict=True)])
    return Wire(wiring.pick(made, np.argsort(np.concatenate([first, second]), kind="stable")), x.shape)


@lowers(nn.MaxPool2d)
def _(self: Lowering, module: nn.MaxPool2d, x: Wire) -> Wire:
    """A tournament in each window; what is padded never wins, so a pixel that is there stands in for it."""
    made = tuple(module(torch.zeros(1, *x.shape)).shape[1:])
    taps, stride, padding, step = (two(size) for size in (module.kernel_size, module.stride, module.padding, module.dilation))
    rows, columns = ([[stride[k] * i + step[k] * t - padding[k] for t in range(taps[k])] for i in range(made[1 + k])] for k in (0, 1))
    height, width = x.shape[1:]
    windows = []
    for down in rows:
        for across in columns:
            inside = [i * width + j for i in down if 0 <= i < height for j in across if 0 <= j < width]
            windows.append((inside + inside[:1] * taps[0] * taps[1])[: taps[0] * taps[1]])
    if not all(windows):
        raise _refuse(module, "has windows with nothing but padding in them, which give -infinity; take less padding or dilation")
    one = np.array(windows, dtype=np.int64)
    groups = (np.arange(x.shape[0])[:, None, None] * height * width + one).reshape(-1, one.shape[1])
    before = self.wiring.count
    signal = self.wiring.largest(x.signal, groups)
    if self.everywhere:
        self.hints += np.split(np.ones(self.wiring.count - before), groups.shape[1] - 1) if groups.shape[1] > 1 else []
    return Wire(signal, made)


def _kron(a: Array, b: Array) -> Array:
    """The Kronecker product; exact where the entries of one are 0 and 1."""
    return np.asarray(np.kron(a, b), dtype=np.float64)


# Layers that know their own multipliers


def _with_hints(self: Lowering, module: nn.Module, x: Wire, multipliers: Array) -> Wire:
    """The frozen layer, its nonlinearities with these multipliers."""
    before = len(self.hints)
    made = self.plain(module, x)
    if self.everywhere:
        count = sum(map(len, self.hints[before:]))
        self.hints[before:] = [multipliers] if count == len(multipliers) else []
    return made


@lowers(lipnet.SandwichLinear, lipnet.SandwichConv2d)
def _(self: Lowering, layer: lipnet.SandwichLinear | lipnet.SandwichConv2d, x: Wire) -> Wire:
    """`T = Psi^2`: `2 T - W_2'W_2 = 2 Psi (B B') Psi` and `T W_1 = sqrt2 Psi B`, so the Schur complement is `B' (B B')^-1 B <= I`."""
    psi = as_float64(layer.psi()) ** 2
    pixels = 1 if isinstance(layer, lipnet.SandwichLinear) else math.prod(x.shape[1:]) // layer.stride**2
    return _with_hints(self, layer.frozen(), x, np.repeat(psi, pixels))


@lowers(lipnet.SLLLinear, lipnet.CPLLinear, lipnet.SLLConv2d, lipnet.CPLConv2d)
def _(self: Lowering, layer: PotentialLayer, x: Wire) -> Wire:
    """`2 T`, which makes the mixed block `-U'(2 T) + 2 U'T` zero."""
    pixels = math.prod(x.shape[1:]) if layer.free.dim() == 4 else 1
    return _with_hints(self, layer.frozen(), x, np.repeat(2 * as_float64(layer.steps()), pixels))


@lowers(lipnet.LDLTBlock, lipnet.GershgorinBlock)
def _(self: Lowering, layer: ResidualBlock, x: Wire) -> Wire:
    return _with_hints(self, layer.frozen(), x, np.concatenate([as_float64(part) for part in layer.weights().multipliers]))


@lowers(lipnet.LDLTConv2d)
def _(self: Lowering, layer: lipnet.LDLTConv2d, x: Wire) -> Wire:
    """The block at each pixel of the unshuffled image."""
    s = layer.stride
    image = self.module(nn.PixelUnshuffle(s).eval(), x) if s > 1 else x
    pixels = math.prod(image.shape[1:])
    weights, block = layer.block.weights(), layer.block

    def at_pixels(matrix: Tensor, bias: Tensor | None, signal: Wire) -> Wire:
        whole = _kron(as_float64(matrix), np.eye(pixels))
        self.check_memory(whole.size)
        return self.linear(whole, signal, (len(matrix), *image.shape[1:]), None if bias is None else np.repeat(as_float64(bias), pixels))

    activation = slopes.activation(block.activation)
    if activation is None:
        raise _refuse(layer, f"its activation {type(block.activation).__name__} has no known slopes")
    hidden = image
    for matrix, bias, multipliers in zip(weights.inner, block.inner_bias, weights.multipliers, strict=True):
        inner = at_pixels(matrix, bias, hidden)
        hidden = Wire(self.bend(inner.signal, activation, np.repeat(as_float64(multipliers), pixels)), inner.shape)
    return self.add(at_pixels(weights.skip, None, image), at_pixels(weights.branch, block.bias, hidden))


# Operations in a forward

Operand = Wire | Tensor | float


@lowers_operator(operator.add, torch.add, "add")
def _(self: Lowering, a: Operand, b: Operand) -> Wire:
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
    return _operators[operator.add](self, a, Wire(self.wiring.scale(b.signal, -1.0), b.shape) if isinstance(b, Wire) else -b)


@lowers_operator(operator.neg, torch.neg, "neg")
def _(self: Lowering, a: Wire) -> Wire:
    return Wire(self.wiring.scale(a.signal, -1.0), a.shape)


@lowers_operator(operator.mul, torch.mul, "mul")
def _(self: Lowering, a: Operand, b: Operand) -> Wire:
    wire, factor = (a, b) if isinstance(a, Wire) else (b, a)
    assert isinstance(wire, Wire)
    assert not isinstance(factor, Wire)
    return Wire(self.wiring.scale(wire.signal, _entries(factor, wire.shape)), wire.shape)


@lowers_operator(*_DIVIDING)
def _(self: Lowering, a: Wire, b: Tensor | float) -> Wire:
    divisor = _entries(b, a.shape)
    exact = np.abs(np.frexp(divisor)[0]) == 0.5
    return Wire(self.wiring.scale(a.signal, 1 / divisor, np.where(exact, 0.0, 2 * UNIT / np.abs(divisor))), a.shape)


def _entries(factor: Tensor | float, shape: Shape) -> Array:
    """A number, or stored ones, for each entry of a signal."""
    numbers = as_float64(factor) if isinstance(factor, Tensor) else np.asarray(float(factor))
    return np.ascontiguousarray(np.broadcast_to(numbers, (1, *shape))).ravel()


def _joined(self: Lowering, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Wire:
    """Concatenated and stacked signals: where each entry goes is seen from torch's answer to their numbers."""
    parts = [values[part] for part in inputs_of(node.args[:1])]
    if not all(isinstance(part, Wire) for part in parts):
        raise CertifyError(f"{node.name} joins a stored tensor to a signal, which has no form here; take --method layerwise")
    ends = np.cumsum([math.prod(part.shape) for part in parts])
    numbers = [torch.arange(end - math.prod(part.shape), end, dtype=torch.float64).reshape(1, *part.shape) for part, end in zip(parts, ends, strict=True)]
    moved = run_call(node, (numbers, *node.args[1:]), node.kwargs)
    return self.pick(Wire(self.wiring.join([part.signal for part in parts]), ()), moved.flatten().long().numpy(), self.graph.shapes[node.name])


def _reduced(self: Lowering, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Wire:
    """Sums are exact; an entry of the matrix of a mean is one over a count."""
    x, made = values[node.all_input_nodes[0]], self.graph.shapes[node.name]
    self.check_memory(math.prod(x.shape) * math.prod(made))
    arguments, options = map_arg((node.args[1:], dict(node.kwargs)), values.__getitem__)  # dimensions may be counted from sizes
    matrix = _answers(lambda part: run_call(node, (part, *arguments), options), x.shape)
    return self.linear(matrix, x, made, error=4 * UNIT * np.abs(matrix))


_calls.update(dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), _joined))
_calls.update(dict.fromkeys((torch.mean, "mean", torch.sum, "sum"), _reduced))


@lowers_operator(torch.flatten, "flatten", "reshape", "view", torch.reshape)
def _(self: Lowering, a: Wire, *sizes: Any) -> Wire:
    return a


def _as_module(target: Any, module: nn.Module) -> None:
    @lowers_operator(target)
    def _(self: Lowering, a: Wire) -> Wire:
        return _elementwise(self, module, a)


for _target, _module in {**ELEMENTWISE, torch.abs: lipnet.Abs(), "abs": lipnet.Abs()}.items():
    _as_module(_target, _module)
