"""One structural view of a network: a torch.fx trace whose leaves are registered modules, with the shape at every node."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.fx
from torch import nn

import lipnet
from certify import rules as rules  # fills the registry
from certify.bound import Bound
from certify.errors import CertifyError, Problem, Unsupported
from certify.registry import Shape, operator_for, problems_of, rule_for
from certify.slopes import slopes
from lipnet.checkpoint import hash_tensors
from lipnet.layers.base import Layer

_BATCHES = (3, 5)  # of the trial runs: two, so that no number that is written into a forward fits both by chance


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced network on the CPU. Every method that looks at the structure of a network goes through it."""

    net: nn.Module
    trace: torch.fx.Graph
    shapes: dict[str, Shape]  # of the output of each tensor node, without the batch
    input_shape: Shape

    @classmethod
    def of(cls, net: nn.Module, input_shape: Shape) -> Graph:
        """Trace a network in eval mode. Raises `Unsupported` that names every node without a rule, and everything else that stands in the way."""
        net = net if _on_cpu(net) else copy.deepcopy(net).cpu()
        trace, found = _trace(net)
        if trace is None:
            raise Unsupported(found)
        parent = _as_parent(net)
        if any(module.training for module in net.modules()):  # found, and a run in training mode would change the network
            parent = copy.deepcopy(parent).eval()
        try:
            graph = cls(parent, trace, _shapes(parent, trace, input_shape), tuple(input_shape))
        except ValueError:
            if found:  # a shape that does not fit may be their doing
                raise Unsupported(found) from None
            raise
        if found:
            raise Unsupported([*found, *graph._refusals(skip={problem.where for problem in found})])
        _check_trace(net, graph)
        return graph

    def bounds(self, skip: Collection[str] = ()) -> Iterator[tuple[torch.fx.Node, Bound | Unsupported]]:
        """What the rule of each module says of it: a bound by the module's path, or the refusal with the path in it."""
        for node in self.trace.nodes:
            path = str(node.target)
            if node.op != "call_module" or path in skip:
                continue
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
        """The network as plain torch modules: what is certified is this network's own numbers."""
        return lipnet.freeze(self.net)

    @functools.cached_property
    def double(self) -> nn.Module:
        """The frozen network with its numbers taken exactly into float64."""
        return copy.deepcopy(self.frozen).double()

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all that a bound depends on: the structure, the shapes, what each rule says, and every number of the frozen network."""
        hasher = hashlib.sha256(f"{self.trace} {self.input_shape} {sorted(self.shapes.items())}".encode())
        for node, said in self.said.items():
            hasher.update(f"{node.target} {said.value.hex() if isinstance(said, Bound) else said}".encode())
            hasher.update(f"{type(self.module(node)).__name__} {self.module(node).extra_repr()}".encode())
        for name, module in self.frozen.named_modules():
            hasher.update(f"{name} {type(module).__name__} {module.extra_repr()} {module.graph if isinstance(module, torch.fx.GraphModule) else ''}".encode())
        hash_tensors(hasher, self.frozen.state_dict())
        return hasher.hexdigest()

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


def leaves(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are bounded as a whole, by path."""
    tracer, inside = _Tracer(), "\0"
    for path, module in net.named_modules():
        if not path.startswith(inside) and (tracer.is_leaf_module(module, path) or not list(module.children())):
            yield path, module
            inside = f"{path}."


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, Layer) or rule_for(module) is not None or super().is_leaf_module(module, qualified_name)


def _trace(net: nn.Module) -> tuple[torch.fx.Graph | None, list[Problem]]:
    """The trace, where there is one, and every problem of a module or a node in it."""
    net = _as_parent(net)
    found: list[Problem] = []
    try:
        trace = _Tracer().trace(net)
    except Exception as error:  # whatever the forward raises on symbolic input
        whole = dict(leaves(net))
        inside = [p for path, module in net.named_modules() for p in problems_of(module, path, leaf=path in whole)]
        line = (str(error).splitlines() or [""])[0]
        return None, [*inside, Problem("", type(net).__name__, f"its forward cannot be traced ({type(error).__name__}: {line})")]
    called = {node.target for node in trace.nodes if node.op == "call_module"}
    inside_leaf = tuple(f"{path}." for path in called)
    for path, module in net.named_modules():
        found += problems_of(module, path, leaf=path in called and not path.startswith(inside_leaf))
    placeholders = [node for node in trace.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        found.append(Problem("", type(net).__name__, f"its forward takes {len(placeholders)} inputs; networks of one input can be bounded"))
    for node in trace.nodes:
        if node.op in ("call_function", "call_method") and operator_for(node.target) is None:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            found.append(Problem(node.name, str(name), "no rule is known for this operation in a forward"))
        if node.op == "call_module" and (len(node.args) != 1 or node.kwargs):
            found.append(Problem(str(node.target), type(net.get_submodule(str(node.target))).__name__, "is called with more than one argument, or by keyword"))
        if node.op == "call_module" and _grows_in_place(net.get_submodule(str(node.target))):
            where = str(node.target)
            found.append(Problem(where, type(net.get_submodule(where)).__name__, "works in place with slopes beyond 1; pass inplace=False"))
        if node.op == "output" and not isinstance(node.args[0], torch.fx.Node):
            found.append(Problem("output", type(net).__name__, "its forward must return one tensor"))
    return trace, found


def _grows_in_place(module: nn.Module) -> bool:
    """Whether a module may make a signal larger that others read under another name; with slopes within [-1, 1] their bounds hold all the same."""
    low, high = slopes(module) or (-1.0, 1.0)
    return bool(getattr(module, "inplace", False)) and not -1 <= low <= high <= 1


def _shapes(net: nn.Module, trace: torch.fx.Graph, input_shape: Shape) -> dict[str, Shape]:
    """The shape at every node, from a run on zeros. Raises ValueError where the network does not take inputs of this shape."""
    module = torch.fx.GraphModule(net, trace)
    dtype = next((p.dtype for p in net.state_dict().values() if p.is_floating_point()), torch.float32)
    runs = []
    for batch in _BATCHES:
        recorder = _Recorder(module, batch, dtype)
        try:
            with torch.no_grad():
                recorder.run(torch.zeros(batch, *input_shape, dtype=dtype))
        except Exception as error:  # torch raises many kinds here
            line = (str(error).splitlines() or [""])[0]
            raise ValueError(f"the network does not take inputs of shape {tuple(input_shape)}: {line}; pass the shape of one input as input_shape") from error
        runs.append(recorder.shapes)
    if runs[0] != runs[1]:
        name = next(name for name in runs[0] if runs[0][name] != runs[1].get(name))
        raise ValueError(f"{name} mixes the inputs of a batch: the shape that it makes of one input depends on how many there are")
    return runs[0]


@torch.no_grad()
def _check_trace(net: nn.Module, graph: Graph) -> None:
    """Refuse a network whose traced forward gives other outputs than the network itself: an `h += x`, say, is traced as if it made a new tensor."""
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in net.state_dict().values() if p.is_floating_point()), torch.float32)
    module = torch.fx.GraphModule(graph.net, graph.trace)
    for scale in (0.1, 1.0, 10.0, 1e3, 1e6):
        x = (scale * torch.randn(4, *graph.input_shape, generator=generator)).to(dtype)
        traced, own = module(x.clone()), net(x.clone())
        if not isinstance(own, torch.Tensor) or not isinstance(traced, torch.Tensor):
            raise Unsupported([Problem("", type(net).__name__, f"returns {type(own).__name__}; it must return one tensor")])
        if not (torch.equal(own.nan_to_num(), traced.nan_to_num()) and torch.equal(own.nan_to_num(), net(x.clone()).nan_to_num())):
            why = "gives other outputs than its forward as torch.fx traces it; look for operations in place, random numbers and branches on values"
            raise Unsupported([Problem("", type(net).__name__, why)])


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, batch: int, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.batch, self.dtype = batch, dtype
        self.shapes: dict[str, Shape] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op != "get_attr":
            if value.dim() == 0 or value.shape[0] != self.batch:
                raise ValueError(f"{n.name} mixes the inputs of a batch: from {self.batch} inputs it makes {tuple(value.shape)}")
            if value.dtype != self.dtype:
                raise ValueError(f"{n.name} turns {self.dtype} into {value.dtype}, for which no bound is known")
            self.shapes[n.name] = tuple(value.shape[1:])
        return value


def _as_parent(net: nn.Module) -> nn.Module:
    """A network that is a single leaf, put into a Sequential so that it can be traced."""
    return nn.Sequential(net).train(net.training) if isinstance(net, Layer) or rule_for(net) is not None else net


def _on_cpu(net: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in net.state_dict().values())
