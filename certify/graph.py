"""One structural view of a network: a torch.fx graph of registered modules and a few functions, with the shape at every node."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import nn
from torch.fx.node import map_arg

import lipnet
from certify import rules as rules  # fills the registry
from certify.bound import Bound
from certify.errors import CertifyError, Problem, Unsupported
from certify.registry import Call, Index, Shape, rule_for
from certify.tracing import inputs_of, leaves, name_of, of_batch, run_call, same, traced
from lipnet.checkpoint import first_line, hash_tensors

__all__ = ["Graph", "leaves"]

_BATCHES = (3, 5)  # of the trial runs: two, so that no number that is written into a forward fits both by chance


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced network on the CPU. Every method that looks at the structure of a network goes through it."""

    net: nn.Module
    trace: torch.fx.Graph
    shapes: dict[str, Shape]  # of each signal, without the batch
    input_shape: Shape
    constants: tuple[dict[str, Any], ...]  # the values of the nodes that are no signals (sizes, stored tensors), for each of the two trial batches
    seen_by: str = "torch.fx"  # or "torch.export"

    @classmethod
    def of(cls, net: nn.Module, input_shape: Shape) -> Graph:
        """Trace a network in eval mode. Raises `Unsupported` that names every node without a rule, and everything else that stands in the way."""
        input_shape = _sizes_of_one_input(net, input_shape)
        _check_numbers(net)
        net = net if _on_cpu(net) else copy.deepcopy(net).cpu()
        parent, trace, found, seen_by = traced(net, input_shape)
        try:
            shapes, constants = _trials(parent, trace, input_shape)
        except ValueError:
            if found:  # a shape that does not fit may be their doing
                raise Unsupported(found) from None
            raise
        graph = cls(parent, trace, shapes, input_shape, constants, seen_by)
        if found:
            raise Unsupported([*found, *graph._refusals(skip={problem.where for problem in found})])
        if counting := graph._counting():
            raise Unsupported(counting)
        _check_trace(net, graph)
        return graph

    def bounds(self, skip: Collection[str] = ()) -> Iterator[tuple[torch.fx.Node, Bound | Unsupported]]:
        """What the rule of each module says of it: a bound by the module's path, or the refusal with the path in it."""
        for node in self.trace.nodes:
            path = str(node.target)
            if node.op != "call_module" or path in skip or all(part.name not in self.shapes for part in node.all_input_nodes[:1]):
                continue  # the last: in a graph with problems, of what a node without a rule makes
            module = self.module(node)
            rule = rule_for(module)
            if rule is None:
                raise AssertionError(f"{node} passed the check of the graph without a rule; please report this")
            try:
                bound = rule(module, self.input_of(node))
                yield node, dataclasses.replace(bound, name=path, evidence={**bound.evidence, "module": type(module).__name__})
            except Unsupported as error:
                yield node, Unsupported([dataclasses.replace(p, where=".".join(filter(None, (path, p.where)))) for p in error.problems])
            except CertifyError as error:
                yield node, Unsupported([Problem(path, type(module).__name__, str(error))])

    @functools.cached_property
    def said(self) -> dict[torch.fx.Node, Bound | Unsupported]:
        """`bounds` of every module, proved once."""
        return dict(self.bounds())

    def _refusals(self, skip: Collection[str]) -> list[Problem]:
        """What the rules refuse beside what the types already showed, so that a message is complete."""
        return [problem for _, said in self.bounds(skip) if isinstance(said, Unsupported) for problem in said.problems]

    @functools.cached_property
    def frozen(self) -> nn.Module:
        """The network as plain torch modules: what is certified is this network's own numbers.

        A forward that computes is taken as it was traced: with the numbers that it made then, in its own type, and not those that it would make in another.
        """
        computes = any(node.op in ("call_function", "call_method", "get_attr") for node in self.trace.nodes)
        return lipnet.freeze(torch.fx.GraphModule(self.net, self.trace) if computes else self.net)

    @functools.cached_property
    def double(self) -> nn.Module:
        """The frozen network with its numbers taken exactly into float64."""
        return in_float64(self.frozen)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all that a bound depends on: the structure, the shapes, what each rule says, and every number of the frozen network."""
        hasher = hashlib.sha256(f"{self.trace} {self.input_shape} {sorted(self.shapes.items())}".encode())
        for node, said in self.said.items():
            hasher.update(f"{node.target} {said.value.hex() if isinstance(said, Bound) else said}".encode())
            hasher.update(f"{type(self.module(node)).__name__} {self.module(node).extra_repr()}".encode())
            if (divisor := getattr(self.module(node), "divisor_override", None)) is not None:  # of average pools, which do not print it
                hasher.update(f"divisor {divisor}".encode())
        for name, module in self.frozen.named_modules():
            hasher.update(f"{name} {type(module).__name__} {module.extra_repr()} {module.graph if isinstance(module, torch.fx.GraphModule) else ''}".encode())
        hash_tensors(hasher, {**self.frozen.state_dict(), **self._unsaved()})
        return hasher.hexdigest()

    def _unsaved(self) -> dict[str, torch.Tensor]:
        """The numbers that the network runs and a state dict leaves out: buffers that are not persistent, and tensors that are plain attributes."""
        saved = self.frozen.state_dict().keys()
        read = {str(node.target): self.constants[0].get(node.name) for node in self.trace.nodes if node.op == "get_attr"}
        found = {**dict(self.frozen.named_buffers()), **{name: value for name, value in read.items() if isinstance(value, torch.Tensor)}}
        held = ((path, name, value) for path, module in self.frozen.named_modules() for name, value in vars(module).items())
        found |= {f"{path}.{name}": value for path, name, value in held if isinstance(value, torch.Tensor)}
        return {f"unsaved {name}": value for name, value in found.items() if name not in saved}

    def _counting(self) -> list[Problem]:
        """The operations that read a number counted from the length of a batch which both trials have by chance: `shape[0] // 7` is 0 in both."""
        why = "counts with the number of inputs in a batch; each input must stand alone"
        return [
            Problem(node.name, name_of(node.target), why)
            for node in self.trace.nodes
            if node.name in self.shapes and any(part in self._of_batch and self._is_same(part) for part in node.all_input_nodes)
        ]

    @functools.cached_property
    def _of_batch(self) -> set[torch.fx.Node]:
        return of_batch(self.trace, *self.constants)

    def _is_same(self, node: torch.fx.Node) -> bool:
        return same(*(values.get(node.name) for values in self.constants))

    @property
    def output(self) -> torch.fx.Node:
        """The node whose value the network returns."""
        return self.trace.output_node().all_input_nodes[0]

    def input_of(self, node: torch.fx.Node) -> Shape:
        """The shape of a node's first input, without the batch."""
        return self.shapes[node.all_input_nodes[0].name]

    def module(self, node: torch.fx.Node) -> nn.Module:
        """The module that a `call_module` node calls."""
        return self.net.get_submodule(str(node.target))

    def constant(self, node: torch.fx.Node) -> Any:
        """The value of a node that is no signal; None where it depends on the batch."""
        return self.constants[0].get(node.name) if self._is_same(node) else None

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Call:
        """A call of a function or method, with these values of its signals."""

        def value(part: torch.fx.Node) -> Any:
            return values[part] if part.name in self.shapes else self.constant(part)

        signals = [part for part in inputs_of((node.args, node.kwargs)) if part.name in self.shapes]
        arguments, options = map_arg((node.args, dict(node.kwargs)), value)
        shapes = tuple(self.shapes[part.name] for part in signals)
        return Call(name_of(node.target), tuple(arguments), options, shapes, self.shapes.get(node.name, ()), lambda: self.picked(node))

    def picked(self, node: torch.fx.Node) -> Index:
        """Of a function that rearranges, repeats or leaves out the entries of one signal: which entry of one input each entry of one output is.

        The function moves numbers whatever they are, so its answer to the numbers of the entries says which went where. Raises Unsupported if an output of a
        batch holds entries of another input, or if it depends on the length of the batch.
        """
        signals = {part for part in inputs_of((node.args, node.kwargs)) if part.name in self.shapes}
        if len(signals) != 1:
            raise Unsupported([Problem(node.name, name_of(node.target), "takes its place from a signal; entries can be picked by constant places only")])
        signal = signals.pop()
        if node.target is operator.getitem and any(part in self._of_batch for part in node.all_input_nodes):
            raise Unsupported([Problem(node.name, "getitem", "takes places counted from the number of inputs in a batch; each input must stand alone")])
        shape, found = self.shapes[signal.name], []
        for batch, values in zip(_BATCHES, self.constants, strict=True):
            numbers = torch.arange(batch * math.prod(shape), dtype=torch.float64).reshape(batch, *shape)
            put = {**{part: values.get(part.name) for part in node.all_input_nodes}, signal: numbers}
            moved = run_call(node, *map_arg((node.args, dict(node.kwargs)), put.__getitem__))
            places = moved.reshape(batch, -1).long().numpy() - math.prod(shape) * np.arange(batch)[:, None]
            if ((places < 0) | (places >= math.prod(shape)) | (places != places[0])).any():
                raise Unsupported([Problem(node.name, name_of(node.target), "mixes the inputs of a batch; act on the other dimensions")])
            found.append(places[0])
        if not np.array_equal(*found):
            raise Unsupported([Problem(node.name, name_of(node.target), "depends on the number of inputs in a batch; act on the other dimensions")])
        return found[0]


def _sizes_of_one_input(net: nn.Module, input_shape: object) -> Shape:
    """The shape as a tuple. Raises ValueError for what is no network, or no shape of an input of one."""
    if not isinstance(net, nn.Module):
        raise ValueError(f"a network is a torch module, got a {type(net).__name__}; lipnet.load opens a checkpoint, certify.models.load other files")
    try:
        return tuple(operator.index(size) for size in input_shape)  # type: ignore[attr-defined]
    except TypeError:
        raise ValueError(f"input_shape is the sizes of one input, without the batch, such as (64,) or (1, 28, 28), got {input_shape!r:.80}") from None


def in_float64(frozen: nn.Module) -> nn.Module:
    """A copy of a frozen network with its numbers taken exactly into float64."""
    net = copy.deepcopy(frozen)
    for module in net.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None and module.weight is not None:
            module.eps = float(torch.finfo(module.weight.dtype).eps)  # else float64 would have its own, and be another function
    return net.double()


def _trials(net: nn.Module, trace: torch.fx.Graph, input_shape: Shape) -> tuple[dict[str, Shape], tuple[dict[str, Any], ...]]:
    """The shape of every signal, and the other values, from runs on zeros. Raises ValueError where the network does not take inputs of this shape."""
    module = torch.fx.GraphModule(net, trace)
    dtype = next((p.dtype for p in net.state_dict().values() if p.is_floating_point()), torch.float32)
    runs = []
    for batch in _BATCHES:
        recorder = _Recorder(module, batch, dtype)
        try:
            with torch.no_grad():
                recorder.run(torch.zeros(batch, *input_shape, dtype=dtype))
        except Exception as error:  # torch raises many kinds here
            line = first_line(error)
            raise ValueError(f"the network does not take inputs of shape {input_shape}: {line}; pass the shape of one input as input_shape") from error
        runs.append(recorder)
    if runs[0].shapes != runs[1].shapes:
        name = next(name for name, shape in runs[0].shapes.items() if shape != runs[1].shapes.get(name))
        raise ValueError(f"{name} mixes the inputs of a batch: the shape that it makes of one input depends on how many there are")
    return runs[0].shapes, (runs[0].constants, runs[1].constants)


@torch.no_grad()
def _check_trace(net: nn.Module, graph: Graph) -> None:
    """Refuse a network whose traced forward gives other outputs than the network itself: an `h += x`, say, is traced as if it made a new tensor."""
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in net.state_dict().values() if p.is_floating_point()), torch.float32)
    module = torch.fx.GraphModule(graph.net, graph.trace)
    for scale, batch in ((0.1, 4), (1.0, 1), (1.0, 4), (10.0, 4), (1e3, 4), (1e6, 4)):  # one input alone too: a forward may ask for that
        x = (scale * torch.randn(batch, *graph.input_shape, generator=generator)).to(dtype)
        try:
            traced, own = module(x.clone()), net(x.clone())
        except (RuntimeError, ValueError) as error:  # batch statistics of one input, say; its rule may know why
            line = first_line(error)
            raise Unsupported([*graph._refusals(skip=()), Problem("", type(net).__name__, f"does not take a batch of {batch}: {line}")]) from error
        if not isinstance(own, torch.Tensor) or not isinstance(traced, torch.Tensor):
            raise Unsupported([Problem("", type(net).__name__, f"returns {type(own).__name__}; it must return one tensor")])
        if graph.output.name not in graph.shapes:
            raise Unsupported([Problem("output", type(net).__name__, "its output does not depend on its input")])
        if own.shape != (batch, *graph.shapes[graph.output.name]):
            why = f"makes {tuple(own.shape)} of a batch of {batch}; keep the batch as the first dimension (squeeze without dim drops a batch of one)"
            raise Unsupported([Problem("", type(net).__name__, why)])
        if not (torch.equal(own.nan_to_num(), traced.nan_to_num()) and torch.equal(own.nan_to_num(), net(x.clone()).nan_to_num())):
            why = "gives other outputs than its forward as torch.fx traces it; look for operations in place, random numbers and branches on values"
            raise Unsupported([Problem("", type(net).__name__, why)])


class _Recorder(torch.fx.Interpreter):
    """Keeps the shapes of the signals, which depend on the input, and the values of all else."""

    def __init__(self, module: torch.fx.GraphModule, batch: int, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.batch, self.dtype = batch, dtype
        self.shapes: dict[str, Shape] = {}
        self.constants: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            return value
        if not isinstance(value, torch.Tensor) or not (n.op == "placeholder" or any(part.name in self.shapes for part in n.all_input_nodes)):
            self.constants[n.name] = value
            return value
        if value.dim() == 0 or value.shape[0] != self.batch:
            raise ValueError(f"{n.name} mixes the inputs of a batch: from {self.batch} inputs it makes {tuple(value.shape)}")
        if value.dtype != self.dtype:
            raise ValueError(f"{n.name} turns {self.dtype} into {value.dtype}, for which no bound is known")
        self.shapes[n.name] = tuple(value.shape[1:])
        return value


def _check_numbers(net: nn.Module) -> None:
    """Refuse tensors that hold none, and those of eight bits, with which torch computes next to nothing."""
    for tensor in _tensors(net):
        if tensor.is_meta:
            raise CertifyError("the network holds tensors without numbers, on the meta device; load its weights first")
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            raise CertifyError(f"the network holds {tensor.dtype} numbers, with which torch does not run its layers; convert it with net.float()")


def _on_cpu(net: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in _tensors(net))


def _tensors(net: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in net.state_dict().values() if isinstance(tensor, torch.Tensor)]  # quantised modules keep types there too
