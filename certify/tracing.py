"""From a network to one torch.fx graph of modules and a few functions: by torch.fx, and by torch.export (`certify.exported`) where that cannot.

A function that is a module (`certify.functions`) becomes one in the graph, what is computed from stored numbers alone becomes a stored number, and each tensor
of a split a node of its own.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.nn.utils import parametrize

from certify.errors import Problem, Unsupported
from certify.exported import raised, unknown
from certify.functions import SPLITTING, module_for, piece
from certify.registry import IN_TRAINING, Shape, nearest, operator_for, problems_of, reason_for, rule_for
from certify.slopes import slopes
from lipnet.frozen import left_as_it_was
from lipnet.layers.base import Layer

_SIZE_METHODS = ("size", "dim", "ndimension", "numel")
_COUNTING = tuple(getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem"))


class Tracer(torch.fx.Tracer):
    """Modules with a rule are leaves. A subclass of torch's own with another forward is none: what it runs is seen instead."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, Layer):
            return True
        if isinstance(module, parametrize.ParametrizationList) or _own_parametrized(module):  # what it computes is computed from stored numbers alone
            return False
        return (rule_for(module) is not None and not _runs_another_forward(module)) or super().is_leaf_module(module, qualified_name)


def _own_parametrized(module: nn.Module) -> bool:
    """A parametrised module with a forward of somebody's own, whose class torch has made, but not its forward."""
    written = type(module).__mro__[1] if parametrize.is_parametrized(module) else nn.Module
    return not written.__module__.startswith("torch.") and (nearest(module) is None or _runs_another_forward(module))


def _runs_another_forward(module: nn.Module) -> bool:
    known = nearest(module)
    return known is not None and known.__module__.startswith("torch.") and getattr(type(module), "forward", None) is not getattr(known, "forward", None)


def leaves(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are bounded as a whole, by path."""
    tracer, inside = Tracer(), "\0"
    for path, module in net.named_modules():
        if not path.startswith(inside) and (tracer.is_leaf_module(module, path) or not list(module.children())):
            yield path, module
            inside = f"{path}."


def traced(net: nn.Module, input_shape: Shape) -> tuple[nn.Module, torch.fx.Graph, list[Problem], str]:
    """A module in eval mode, a graph of its modules that computes what the network does, every problem of a module or a node in it, and who saw through it.

    Raises Unsupported.
    """
    parent = nn.Sequential(net).train(net.training) if Tracer().is_leaf_module(net, "") else net
    try:
        with left_as_it_was(parent):
            own_names = set(vars(parent))
            trace = Tracer().trace(parent)
            _check_arguments(trace)
            held = torch.fx.GraphModule(parent, trace) if vars(parent).keys() - own_names else parent  # with the numbers that were made on the way
    except Exception as error:  # whatever the forward raises on symbolic input
        return *_exported(parent, input_shape, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"), "torch.export"
    found, own = _module_problems(parent, trace), {path for path, _ in parent.named_modules()}
    if any(module.training for module in parent.modules()):  # found, and a run in training mode would change the network
        held = copy.deepcopy(held).eval()
    parent, problems = _lifted(held, trace, input_shape)
    return parent, trace, [*found, *problems, *_node_problems(parent, trace, own)], "torch.fx"


def _check_arguments(trace: torch.fx.Graph) -> None:
    """Raises TypeError where what is left out in a call with one input stands in the graph as an input; torch.export leaves it out too."""
    _, *others = (node for node in trace.nodes if node.op == "placeholder")
    if others and all(node.args or str(node.target).startswith("*") for node in others):
        raise TypeError(f"it takes {', '.join(str(node.target) for node in others)} too, which may be left out")


def _exported(net: nn.Module, input_shape: Shape, why: str) -> tuple[nn.Module, torch.fx.Graph, list[Problem]]:
    """By torch.export. A module with problems of its own is named before anything is exported."""
    inside = [problem for path, module in net.named_modules() for problem in problems_of(module, path, leaf=False)]
    if inside:
        whole = dict(leaves(net))
        inside = [problem for path, module in net.named_modules() for problem in problems_of(module, path, leaf=path in whole)]
        raise Unsupported([*inside, Problem("", type(net).__name__, f"its forward cannot be traced by torch.fx ({why})")])
    parent, trace, found = raised(net, input_shape, why)
    return parent, trace, [*found, *_node_problems(parent, trace, set())]


def _module_problems(net: nn.Module, trace: torch.fx.Graph) -> list[Problem]:
    numbers: set[torch.fx.Node] = set()  # computed from stored ones alone: no rule is needed for what computes them
    for node in trace.nodes:
        if node.op == "get_attr" or (node.all_input_nodes and all(part in numbers for part in node.all_input_nodes)):
            numbers.add(node)
    called = {node.target for node in trace.nodes if node.op == "call_module" and node not in numbers}
    inside_leaf = tuple(f"{path}." for path in called)
    found = [p for path, module in net.named_modules() for p in problems_of(module, path, leaf=path in called and not path.startswith(inside_leaf))]
    return [p for p in found if not (net.training and p.where and p.why == IN_TRAINING)]  # said once, of the network


def _node_problems(net: nn.Module, trace: torch.fx.Graph, own: set[str]) -> list[Problem]:
    """Every node without a rule, and every call that no rule is for; and what is wrong with modules that are not the network's own."""
    found = []
    placeholders, sizes = [node for node in trace.nodes if node.op == "placeholder"], _sizes(trace)
    if len(placeholders) != 1:
        found.append(Problem("", type(net).__name__, f"its forward takes {len(placeholders)} inputs; networks of one input can be bounded"))
    for node in trace.nodes:
        if node.op in ("call_function", "call_method") and operator_for(node.target) is None and node not in sizes and node.target is not unknown:
            found.append(Problem(node.name, name_of(node.target), reason_for(node.target)))
        if node.op == "call_module":
            where, module = str(node.target), net.get_submodule(str(node.target))
            if where not in own:
                found += problems_of(module, where, leaf=True)
            if len(node.args) != 1 or node.kwargs:
                found.append(Problem(where, type(module).__name__, "is called with more than one argument, or by keyword"))
            if _grows_in_place(module):
                found.append(Problem(where, type(module).__name__, "works in place with slopes beyond 1; pass inplace=False"))
        if node.op == "output" and not isinstance(node.args[0], torch.fx.Node):
            found.append(Problem("output", type(net).__name__, "its forward must return one tensor"))
    return found


def name_of(target: Any) -> str:
    """What a message calls a function or a tensor method."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _grows_in_place(module: nn.Module) -> bool:
    """Whether a module may make a signal larger that others read under another name; with slopes within [-1, 1] their bounds hold all the same."""
    low, high = slopes(module) or (-1.0, 1.0)
    return bool(getattr(module, "inplace", False)) and not -1 <= low <= high <= 1


def of_batch(trace: torch.fx.Graph, first: Mapping[str, Any], second: Mapping[str, Any]) -> set[torch.fx.Node]:
    """The nodes that are counted from the length of a batch, by their values for two lengths: those that differ, and what is computed from them.

    A part of what differs is only counted from it where it differs itself: `shape[1]` is a part of the shape.
    """
    found: set[torch.fx.Node] = set()
    for node in trace.nodes:
        from_nodes = inputs_of((node.args[1:] if node.target is operator.getitem else node.args, node.kwargs))
        if node.name in first and (not same(first[node.name], second.get(node.name)) or any(part in found for part in from_nodes)):
            found.add(node)
    return found


def same(first: Any, second: Any) -> bool:
    """Whether two values of a node are one."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
    return type(first) is type(second) and bool(first == second)


def _sizes(trace: torch.fx.Graph) -> set[torch.fx.Node]:
    """The nodes that are sizes of signals, and numbers that are counted from those."""
    found: set[torch.fx.Node] = set()
    for node in trace.nodes:
        asked = (node.op == "call_method" and node.target in _SIZE_METHODS) or (node.target is getattr and node.args[1] in ("shape", "ndim"))
        if asked or (node.target in _COUNTING and node.all_input_nodes and all(part in found for part in node.all_input_nodes)):
            found.add(node)
    return found


# Functions become modules


@torch.no_grad()
def _lifted(net: nn.Module, trace: torch.fx.Graph, input_shape: Shape) -> tuple[nn.Module, list[Problem]]:
    """Changes the graph in place, and returns the module that holds what was added; the network itself, where nothing was."""
    lift = _Lift(net, trace, input_shape)
    for node in list(trace.nodes):
        if node.op in ("call_function", "call_method", "call_module"):
            lift.node(node)
    for node in reversed(list(trace.nodes)):
        if not node.users and (node.op == "get_attr" or node in lift.constants):
            trace.erase_node(node)
    return (net if lift.parent is net else _holder(lift.parent, trace)), lift.problems


class _Lift:
    def __init__(self, net: nn.Module, trace: torch.fx.Graph, input_shape: Shape) -> None:
        self.net, self.parent, self.trace, self.input_shape = net, net, trace, input_shape
        self.problems: list[Problem] = []
        self.constants: dict[torch.fx.Node, Any] = {}
        self.sizes = _sizes(trace)
        self.counted: dict[str, Any] | None = None

    def node(self, node: torch.fx.Node) -> None:
        """One call."""
        inputs = node.all_input_nodes
        if inputs and all(self._is_constant(part) for part in inputs):
            self._fold(node)
        elif node.op == "call_module":
            return
        elif node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node) and _splits(node.args[0]) and isinstance(node.args[1], int):
            split = node.args[0]
            made = self._before(node).call_function(piece, (split.args[0], name_of(split.target), node.args[1], *split.args[1:]), dict(split.kwargs))
            self._replace(node, made)
            if not split.users:
                self.trace.erase_node(split)
        elif (
            node.args and isinstance(node.args[0], torch.fx.Node) and not (name_of(node.target) == "relu" and not any((*node.args[1:], *node.kwargs.values())))
        ):
            self._module(node)

    def _module(self, node: torch.fx.Node) -> None:
        """The module that a call is, where it is one."""
        others = [part for part in inputs_of((node.args[1:], node.kwargs)) if not self._is_constant(part)]
        if any(part not in self.sizes for part in others):
            return
        known = {part: self._size(part) for part in others}
        if any(value is None for value in known.values()):
            return
        arguments, options = map_arg((node.args[1:], dict(node.kwargs)), lambda part: known[part] if part in known else self._value(part))
        try:
            module = module_for(node.target, arguments, dict(options))
        except Unsupported as error:
            self.problems += [Problem(node.name, problem.what, problem.why) for problem in error.problems]
            module = nn.Identity()
        if module is not None:
            path = self._add(node.name, module)
            self._replace(node, self._before(node).create_node("call_module", path, (node.args[0],)))

    def _before(self, node: torch.fx.Node) -> torch.fx.Graph:
        self.trace.inserting_before(node)
        return self.trace

    def _replace(self, node: torch.fx.Node, made: torch.fx.Node) -> None:
        node.replace_all_uses_with(made)
        self.trace.erase_node(node)
        self.trace.inserting_before(self.trace.output_node())

    def _is_constant(self, node: torch.fx.Node) -> bool:
        return node.op == "get_attr" or node in self.constants

    def _value(self, node: torch.fx.Node) -> Any:
        if node in self.constants:
            return self.constants[node]
        parent, _, name = str(node.target).rpartition(".")
        return getattr(self.parent.get_submodule(parent), name)

    def _fold(self, node: torch.fx.Node) -> None:
        """What is computed from stored numbers alone, as the forward computes it."""
        arguments, options = map_arg((node.args, dict(node.kwargs)), self._value)
        try:
            value = self._run(node, arguments, options)
        except Exception as error:  # whatever the forward raises
            self.problems.append(Problem(node.name, name_of(node.target), f"cannot be computed ({(str(error).splitlines() or [''])[0]})"))
            return
        if isinstance(value, Tensor):
            self._replace(node, self._before(node).create_node("get_attr", self._add(f"{node.name}_constant", value.detach().clone())))
            return
        self.constants[node] = value
        if isinstance(value, tuple | list):  # of tensors, which are taken from it one by one
            return
        for user in list(node.users):
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda part: value if part is node else part)

    def _run(self, node: torch.fx.Node, arguments: Any, options: Any) -> Any:
        if node.op != "call_module":
            return run_call(node, arguments, options)
        copies = [part.clone() if isinstance(part, Tensor) else part for part in arguments]  # a module may work in place
        return self.net.get_submodule(str(node.target))(*copies, **options)

    def _add(self, name: str, value: nn.Module | Tensor) -> str:
        """A new module or stored number beside those of the network, which stays as it is."""
        if self.parent is self.net:
            self.parent = _holder(self.net, self.trace)
        while hasattr(self.parent, name):
            name += "_"
        if isinstance(value, Tensor):
            self.parent.register_buffer(name, value)
        else:
            self.parent.add_module(name, value)
        return name

    def _size(self, node: torch.fx.Node) -> Any:
        """A number that is counted from sizes, for inputs of this shape; None where it depends on the batch."""
        if self.counted is None:
            self.counted = self._count()
        return self.counted.get(node.name)

    def _count(self) -> dict[str, Any]:
        runs = []
        dtype = next((p.dtype for p in self.net.state_dict().values() if p.is_floating_point()), torch.float32)
        for batch in (3, 5):
            run = _Counter(torch.fx.GraphModule(self.parent, self.trace), self.sizes)
            with contextlib.suppress(Exception):  # found again, and named, by the trial run
                run.run(torch.zeros(batch, *self.input_shape, dtype=dtype))
            runs.append(run.found)
        counted = {node.name for node in of_batch(self.trace, *runs)}
        return {name: value for name, value in runs[0].items() if same(value, runs[1].get(name)) and name not in counted}


class _Counter(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, sizes: set[torch.fx.Node]) -> None:
        super().__init__(module)
        self.names = {node.name for node in sizes}
        self.found: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.found[n.name] = tuple(value) if isinstance(value, torch.Size) else value
        return value


def run_call(node: torch.fx.Node, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """What a function or a tensor method makes of these arguments."""
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **options)
    target: Any = node.target
    return target(*arguments, **options)


def inputs_of(arguments: Any) -> Sequence[torch.fx.Node]:
    """The nodes among some arguments, each as often as it stands there."""
    found: list[torch.fx.Node] = []
    map_arg(arguments, found.append)
    return found


def _splits(node: torch.fx.Node) -> bool:
    functions = [getattr(torch, name) for name in SPLITTING if hasattr(torch, name)]
    return (node.op == "call_method" and node.target in SPLITTING) or (node.op == "call_function" and node.target in functions)


def _holder(net: nn.Module, trace: torch.fx.Graph) -> torch.fx.GraphModule:
    """The modules and numbers that a graph uses, under their own names, in one module to which others can be added. All are in eval mode."""
    return torch.fx.GraphModule(net, trace).eval()
