"""From a network whose forward torch.fx cannot trace to the graph that `certify.tracing` makes: through torch.export, operator by operator.

`torch.export` runs the forward on tensors without numbers, so what branches on shapes is seen as it runs for inputs of this shape, and what branches on numbers
is refused. Each operator of the exported network becomes the module of torch that runs it, with the same stored numbers, or one of the few functions that the
rules know. The exports for two lengths of a batch must be one graph, and one whose length is a symbol puts no condition on it: no number comes from the batch.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import map_arg

from certify.errors import Problem, Unsupported
from certify.functions import PLACE, SPLITTING, module_for_exported, piece
from certify.registry import Shape, reason_for
from lipnet.checkpoint import first_line

_BATCHES = (3, 5)
_ATEN = torch.ops.aten
_ARITHMETIC: dict[str, Callable[..., Any]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg}
_REDUCING = {"mean": torch.mean, "sum": torch.sum}
_COMPARING = {"maximum": torch.maximum, "minimum": torch.minimum}
_RESHAPING = ("view", "reshape", "_unsafe_view", "flatten", "unflatten")
REARRANGING = {
    name: [getattr(getattr(_ATEN, name), overload) for overload in getattr(_ATEN, name).overloads()]
    for name in (
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "narrow",
        "flip",
        "roll",
        "repeat",
        "index_select",
        "unfold",
        "diagonal",
    )
}  # operators that stay what they are: they pick entries
_SAME = ("clone", "alias", "contiguous", "detach", "lift_fresh_copy")


@torch.no_grad()
def raised(net: nn.Module, input_shape: Shape, why: str) -> tuple[nn.Module, torch.fx.Graph, list[Problem]]:
    """A module, a graph of its modules that computes what the network does, and every operator that has no form there. Raises Unsupported."""
    first, second = (_raise(net, input_shape, batch, why) for batch in _BATCHES)
    if not first.problems and not (_same(first, second) and _is_for_all_batches(net, input_shape)):
        raise Unsupported(
            [Problem("", type(net).__name__, "computes with the number of inputs in a batch, or with random numbers; each input must stand alone")]
        )
    return first.module(), first.graph, first.problems


def _is_for_all_batches(net: nn.Module, input_shape: Shape) -> bool:
    """Whether the forward does the same for a batch of any length: it exports without a condition on the length, which is a symbol, and counts nothing from it.

    Two lengths may give one graph by chance: those of a forward that branches on `len(x) > 64`.
    """
    length = torch.export.Dim("length", min=2, max=2**20)
    try:
        program = _export(net, input_shape, _BATCHES[0], {0: length})
    except Exception:  # of many kinds, one of them for conditions on the length
        return False
    return not any(isinstance(node.meta.get("val"), torch.SymInt) and node.target is not _ATEN.sym_size.int for node in program.graph.nodes)


def _export(net: nn.Module, input_shape: Shape, batch: int, dynamic: Any = None) -> torch.export.ExportedProgram:
    dtype = next((p.dtype for p in net.state_dict().values() if p.is_floating_point()), torch.float32)
    first = next(iter(inspect.signature(net.forward).parameters.values()), None)
    if first is not None and first.kind is first.VAR_POSITIONAL:  # forward(*args), of copies that average weights, say
        dynamic = dynamic and (dynamic,)
    with warnings.catch_warnings(), _unlogged():
        warnings.simplefilter("ignore")  # of torch, about itself
        x = torch.zeros(batch, *input_shape, dtype=dtype)
        return torch.export.export(copy.deepcopy(net), (x,), dynamic_shapes=None if dynamic is None else (dynamic,), strict=False).run_decompositions({})


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """torch writes a page on an operator that does not take its arguments; the error says it too."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _raise(net: nn.Module, input_shape: Shape, batch: int, why: str) -> _Raising:
    try:
        program = _export(net, input_shape, batch)
    except Exception as error:  # of many kinds
        line = first_line(error)
        text = (
            f"its forward cannot be traced by torch.fx ({why}), nor exported by torch.export ({type(error).__name__}: {line}); branches on values are not known"
        )
        raise Unsupported([Problem("", type(net).__name__, text)]) from None
    return _Raising(program, type(net).__name__)


def _same(first: _Raising, second: _Raising) -> bool:
    """Whether two graphs are one, with the same modules and numbers."""
    ours, others = first.module(), second.module()
    states = ours.state_dict(), others.state_dict()
    return (
        str(first.graph) == str(second.graph)
        and [(name, str(module)) for name, module in first.modules.items()] == [(name, str(module)) for name, module in second.modules.items()]
        and states[0].keys() == states[1].keys()
        and all(torch.equal(tensor.nan_to_num(), states[1][name].nan_to_num()) for name, tensor in states[0].items())
    )


class _Raising:
    """Reads an exported network, node by node, and writes a graph."""

    def __init__(self, program: torch.export.ExportedProgram, name: str) -> None:
        self.graph = torch.fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.numbers: dict[str, Tensor] = {}
        self.problems: list[Problem] = []
        self.values: dict[torch.fx.Node, Any] = {}  # a node of the new graph for a signal, or a value that does not depend on the input
        self.names: dict[int, str] = {}  # of the stored tensors
        self._inputs(program, name)
        for node in program.graph.nodes:
            if node.op == "call_function" and node.users:
                self.node(node)
            elif node.op == "output":
                self._output(program, node, name)
        for made in list(self.graph.nodes):
            if made.target is _split and not made.users:
                self.graph.erase_node(made)

    def module(self) -> torch.fx.GraphModule:
        """The modules and numbers, with the graph."""
        root = nn.Module()
        for name, module in self.modules.items():
            root.add_module(name, module)
        for name, tensor in self.numbers.items():
            root.register_buffer(name, tensor)
        return torch.fx.GraphModule(root, self.graph).eval()

    def _inputs(self, program: torch.export.ExportedProgram, name: str) -> None:
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        signals = 0
        for spec in program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT:
                signals += 1
                self.values[node] = self.graph.placeholder("x") if signals == 1 else None
                continue
            value = program.state_dict[spec.target] if spec.target in program.state_dict else program.constants.get(spec.target)
            self.values[node] = value.detach() if isinstance(value, Tensor) else value
            if isinstance(value, Tensor):
                self.names[id(self.values[node])] = str(spec.target)
        if signals != 1:
            self.problems.append(Problem("", name, f"its forward takes {signals} inputs; networks of one input can be bounded"))

    def _output(self, program: torch.export.ExportedProgram, node: torch.fx.Node, name: str) -> None:
        outputs = program.graph_signature.output_specs
        if any(spec.kind is not torch.export.graph_signature.OutputKind.USER_OUTPUT for spec in outputs):
            self.problems.append(Problem("", name, "its forward changes its buffers or its input; make it a function of its input alone"))
        made = [self.values.get(part) for part in node.all_input_nodes]
        if len(outputs) != 1 or len(made) != 1 or not isinstance(made[0], torch.fx.Node):
            self.problems.append(Problem("output", name, "its forward must return one tensor, which depends on its input"))
            made = [part for part in self.values.values() if isinstance(part, torch.fx.Node)]
        self.graph.output(made[0])

    def node(self, node: torch.fx.Node) -> None:
        """One operator."""
        arguments, options = map_arg((node.args, dict(node.kwargs)), lambda part: self.values[part])
        signals = [part for part in _flat((arguments, list(options.values()))) if isinstance(part, torch.fx.Node)]
        try:
            self.values[node] = self._signal(node, arguments, dict(options), signals) if signals else self._constant(node, arguments, dict(options))
        except Unsupported as error:
            path = _path(node)
            where = f"{path} ({node.name})" if path else node.name
            self.problems += [Problem(where, problem.what, problem.why) for problem in error.problems]
            self.values[node] = self.graph.call_function(unknown, tuple(signals))

    def _constant(self, node: torch.fx.Node, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        """What is computed from stored numbers alone, as the forward computes it."""
        return node.target(*arguments, **options)  # type: ignore[operator]

    def _signal(self, node: torch.fx.Node, arguments: Any, options: dict[str, Any], signals: Sequence[torch.fx.Node]) -> torch.fx.Node:
        """An operator on signals. Raises Unsupported."""
        if node.target is operator.getitem:
            return self._part(node, arguments, signals)
        name, first = _name(node.target), arguments[0] if arguments else ()
        made = tuple(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else ()
        if name in _SAME:
            return signals[0]
        if name in _ARITHMETIC or name == "rsub":
            return self._arithmetic(name, list(arguments), options)
        if name in _COMPARING:
            return self.graph.call_function(_COMPARING[name], tuple(self._argument(part) for part in arguments), options)
        if name == "cat":
            return self.graph.call_function(torch.cat, ([self._argument(part) for part in first], *arguments[1:]), options)
        if name == "stack":
            dim = arguments[1] if len(arguments) > 1 else options.get("dim", 0)
            parts = [self.graph.call_function(_ATEN.unsqueeze.default, (self._argument(part), dim)) for part in first]
            return self.graph.call_function(torch.cat, (parts, dim))
        if len(signals) == 1 and first is signals[0]:
            if name in _RESHAPING:
                return self.graph.call_function(torch.reshape, (first, (-1, *made[1:])))
            if name == "expand":
                return self.graph.call_method("expand", (first, -1, *made[1:]))
            if name in _REDUCING:
                return self.graph.call_function(_REDUCING[name], tuple(arguments), options)
            if name in REARRANGING:
                return self.graph.call_function(node.target, tuple(self._argument(part) for part in arguments), options)  # type: ignore[arg-type]
            if name in SPLITTING:
                return self.graph.call_function(_split, (first, name, *arguments[1:]), options)  # each part is taken from it, and it is never run
        place = PLACE.get(name, 0)
        if len(signals) == 1 and len(arguments) > place and arguments[place] is signals[0]:
            others = [part for k, part in enumerate(arguments) if k != place]
            module = module_for_exported(name, others, options)
            if module is not None:
                return self._module(node, module, signals[0], [part for part in others if isinstance(part, Tensor)])
        raise Unsupported([Problem("", str(node.target), reason_for(name))])

    def _part(self, node: torch.fx.Node, arguments: Sequence[Any], signals: Sequence[torch.fx.Node]) -> torch.fx.Node:
        """A tensor of several that an operator makes: any of a split, the first of the others."""
        source, index = signals[0], arguments[1]
        if source.target is _split:
            return self.graph.call_function(piece, (source.args[0], source.args[1], index, *source.args[2:]), dict(source.kwargs))
        if (source.op == "call_module" and index == 0) or source.target is unknown:
            return source
        raise Unsupported([Problem("", "getitem", f"takes tensor {index} of what {source.name} makes, of which no bound is known")])

    def _arithmetic(self, name: str, arguments: list[Any], options: dict[str, Any]) -> torch.fx.Node:
        """With `a + alpha b` as two steps."""
        alpha = options.pop("alpha", 1)
        if options or len(arguments) > 2:
            raise Unsupported([Problem("", name, f"with {sorted(options) or 'three arguments'} is not supported; leave them out")])
        if name == "rsub":
            name, arguments = "sub", arguments[::-1]
        if alpha != 1:
            second = arguments[1]
            arguments[1] = self.graph.call_function(operator.mul, (second, alpha)) if isinstance(second, torch.fx.Node) else second * alpha
        return self.graph.call_function(_ARITHMETIC[name], tuple(self._argument(part) for part in arguments))

    def _argument(self, value: Any) -> Any:
        """A stored tensor becomes a node of its own."""
        if not isinstance(value, Tensor):
            return value
        name = self.names.get(id(value), "constant").replace(".", "_")
        name = _free(name, {known for known, tensor in self.numbers.items() if tensor is not value} | self.modules.keys())
        self.numbers[name] = value
        return self.graph.get_attr(name)

    def _module(self, node: torch.fx.Node, module: nn.Module, x: torch.fx.Node, held: Sequence[Tensor]) -> torch.fx.Node:
        """A call of a module, which has the path of the one that was exported, with _ for each point; a path that is taken gets another _."""
        path = _path(node) or next((self.names[id(part)].rpartition(".")[0] for part in held if id(part) in self.names), "") or node.name
        name = _free(path.replace(".", "_"), self.modules.keys() | self.numbers.keys())
        self.modules[name] = module
        return self.graph.call_module(name, (x,))


def _split(x: Tensor, name: str, *arguments: Any, **options: Any) -> Any:
    raise AssertionError("a split stands for its parts; please report this")


def unknown(*signals: Tensor) -> Any:
    """Stands for an operator that has been named as a problem."""
    raise AssertionError("a graph with problems is not run; please report this")


def _flat(arguments: Any) -> list[Any]:
    return [part for arg in arguments for part in _flat(arg)] if isinstance(arguments, list | tuple) else [arguments]


def _name(target: Any) -> str:
    """Of an operator of torch, without the overload: `aten.conv2d.default` is conv2d. Those of others keep their namespace, and are not taken for torch's."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).removeprefix("aten::")
    return str(getattr(target, "__name__", target))


def _path(node: torch.fx.Node) -> str:
    """The innermost module of torch's own whose forward called an operator; "" where that is a forward of somebody's own."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    return str(path) if str(kind).startswith(("torch.nn.", "<class 'torch.nn.")) else ""


def _free(name: str, taken: Any) -> str:
    name = name if name and not name[0].isdigit() else f"_{name}"
    while name in taken:
        name += "_"
    return name
