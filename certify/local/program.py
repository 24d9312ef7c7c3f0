"""A network as a short program of affine steps and scalar gates, from `torch.export`; every step knows what its rounding can be.

MaxMin, GroupSort, Householder, leaky ReLU, clamps and max pools are affine steps and gates of ReLU: one gate for each comparison.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from certify.errors import CertifyError, Problem, Unsupported
from certify.registry import Shape
from lipnet.checkpoint import first_line
from sdp.activation import RELU, Activation

Number = int | float
Transposed = Callable[[Tensor, bool], Sequence[Tensor]]  # (n, results) -> (n, entries of each input): through a step from behind; True: absolute values
Operator = Callable[..., Any]
_operators: dict[Any, Operator] = {}
_CLOSE = 1e-9  # relative difference of program and network in float64, tried on a few inputs
_TRIES = (0.1, 1.0, 10.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """One affine map of earlier values. No entry of its result, nor of a gradient through it, is a sum of more than `terms` products of two stored numbers."""

    name: str
    inputs: tuple[int, ...]
    apply: Callable[..., Tensor]
    size: Callable[..., Tensor]  # with the absolute values of its coefficients, and without its constant
    constant: Tensor | None  # at least the absolute value of its constant; None: it has none
    terms: int
    transposed: Transposed | None = None  # None: by autograd

    def back(self, rows: Tensor, shapes: Sequence[Shape], absolute: bool) -> Sequence[Tensor]:  # (n, results) -> (n, entries of each input)
        """What rows of gradients to its result are to its inputs, of these shapes; with `absolute`, through `size` in place of `apply`."""
        if self.transposed is not None:
            return self.transposed(rows, absolute)
        with torch.enable_grad():
            leaves = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
            made = (self.size if absolute else self.apply)(*leaves)
        found = torch.autograd.grad(made, leaves, rows.reshape(len(rows), *made.shape), allow_unused=True, is_grads_batched=True)
        return [rows.new_zeros(len(rows), leaf.numel()) if part is None else part.flatten(1) for part, leaf in zip(found, leaves, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """One scalar function of each entry of an earlier value."""

    name: str
    input: int
    activation: Activation

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.input,)


Step = Affine | Gate
Bend = Callable[[Gate, Tensor], Tensor]
_V = TypeVar("_V")


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Value 0 is one input, with a batch of one; value `k + 1` is what step k makes of earlier values. All in float64."""

    input_shape: Shape
    steps: tuple[Step, ...]
    shapes: tuple[Shape, ...]  # of every value, with the batch of one
    output: int

    @classmethod
    def of(cls, net: nn.Module, input_shape: Shape) -> Program:
        """The program of a network in eval mode, of one tensor to one row of outputs.

        Raises Unsupported that names every operation that has no form as affine steps and gates, and a network whose program gives other numbers than itself.
        """
        if not all(torch.isfinite(tensor).all() for tensor in net.state_dict().values() if tensor.is_floating_point()):
            raise CertifyError("the network holds NaN or infinite numbers; load weights that are finite")
        net = copy.deepcopy(net).double().eval()
        exported = _export(net, input_shape)
        builder = _Builder(tuple(input_shape))
        output = _interpret(exported, builder)
        program = cls(tuple(input_shape), tuple(builder.steps), tuple(tuple(example.shape) for example in builder.examples), output)
        _check(program, net)
        return program

    @property
    def inputs(self) -> int:
        """How many numbers one input has."""
        return math.prod(self.input_shape)

    @property
    def outputs(self) -> int:
        """How many numbers it returns."""
        return math.prod(self.shapes[self.output])

    @functools.cached_property
    def gates(self) -> tuple[int, ...]:
        """The steps that are gates."""
        return tuple(k for k, step in enumerate(self.steps) if isinstance(step, Gate))

    @functools.cached_property
    def growth(self) -> float:
        """At least what a change of any number is multiplied by on its way to another one, forward or in a gradient, whatever the gates do."""
        values = [torch.ones(math.prod(self.input_shape), dtype=torch.float64, requires_grad=True)]

        def steep(gate: Gate, z: Tensor) -> Tensor:
            values.append(max(map(abs, gate.activation.range)) * z + 1)
            return values[-1]

        def sized(step: Affine) -> Callable[..., Tensor]:
            def apply(*inputs: Tensor) -> Tensor:
                values.append(step.size(*inputs) + 1)
                return values[-1]

            return apply

        with torch.enable_grad():  # a one is added at every value, so that the last ones, and the gradients of their sum, are for changes anywhere
            self.run(values[0], steep, sized)
            total = torch.stack([value.sum() for value in values]).sum()
        found = torch.autograd.grad(total, values, allow_unused=True)
        return max(float(value.detach().max()) for value in (*values, *(g for g in found if g is not None)) if value.numel())

    @functools.cached_property
    def largest_constant(self) -> float:
        """At least the absolute value of every number that a step adds."""
        constants = [step.constant for step in self.steps if isinstance(step, Affine) and step.constant is not None]
        return max((float(constant.max()) for constant in constants if constant.numel()), default=0.0)

    @functools.cached_property
    def widest(self) -> int:
        """The most numbers in one value."""
        return max(map(math.prod, self.shapes))

    @functools.cached_property
    def last_use(self) -> dict[int, int]:
        """By value: the last step that reads it; no step for the output."""
        uses = {value: k for k, step in enumerate(self.steps) for value in step.inputs}
        return {value: k for value, k in uses.items() if value != self.output}

    def run(self, x: Tensor, gate: Bend | None = None, affine: Callable[[Affine], Callable[..., Tensor]] | None = None) -> Tensor:
        """The output, with something else in place of the gates, or of the affine steps, where it is given."""

        def applied(step: Affine, inputs: Sequence[Tensor]) -> Tensor:
            return (step.apply if affine is None else affine(step))(*inputs)

        def bent(step: Gate, z: Tensor) -> Tensor:
            return evaluate(step.activation, z) if gate is None else gate(step, z)

        return self.follow(x.reshape(1, *self.input_shape), applied, bent).flatten()

    def follow(self, start: _V, affine: Callable[[Affine, Sequence[_V]], _V], gate: Callable[[Gate, _V], _V]) -> _V:
        """The output, for values of any kind; each is forgotten after its last use."""
        values = {0: start}
        for k, step in enumerate(self.steps):
            values[k + 1] = affine(step, [values[i] for i in step.inputs]) if isinstance(step, Affine) else gate(step, values[step.input])
            for i in step.inputs:
                if self.last_use.get(i) == k:
                    values.pop(i, None)
        return values[self.output]

    def back(self, value: int, rows: Tensor, gate: Callable[[Gate, Tensor], Tensor], absolute: bool = False) -> Tensor:  # (n, entries) -> (n, inputs)
        """What rows of gradients to a value are to the input; `gate` says what they are before a gate, for those behind it. `absolute` is for all steps."""
        found = self.follow_back(value, rows, lambda step, shapes, behind: step.back(behind, shapes, absolute), gate) if len(rows) else None
        return rows.new_zeros(len(rows), self.inputs) if found is None else found

    def follow_back(self, value: int, start: _V, affine: Callable[[Affine, Sequence[Shape], _V], Sequence[_V]], gate: Callable[[Gate, _V], _V]) -> _V | None:
        """The same for gradients of any kind that can be added; `affine` is told the shapes of what its step reads. None where the value has no input."""
        held: dict[int, Any] = {value: start}
        for k in reversed(range(value)):
            if k + 1 in held:
                step, behind = self.steps[k], held.pop(k + 1)
                parts = affine(step, [self.shapes[i] for i in step.inputs], behind) if isinstance(step, Affine) else [gate(step, behind)]
                for i, part in zip(step.inputs, parts, strict=True):
                    held[i] = held[i] + part if i in held else part
        return held.get(0)


def evaluate(activation: Activation, z: Tensor) -> Tensor:
    """The value of a gate, to 1e-9."""
    if activation == RELU:
        return torch.relu(z)
    low, high = activation.image(*2 * [z.detach().numpy()])
    return torch.from_numpy(np.asarray((low + high) / 2))


def register(*targets: Any) -> Callable[[Operator], Operator]:
    """An operator of aten: `function(builder, *args, **kwargs)`, in which signals are `Ref` and all else is as in the exported graph."""

    def keep(function: Operator) -> Operator:
        for target in targets:
            _operators[target] = function
        return function

    return keep


@dataclasses.dataclass(frozen=True)
class Ref:
    """A value of the program that is being built."""

    value: int
    shape: Shape


class Refused(Exception):
    """Why an operation, as it is called here, has no form as affine steps and gates."""


class _Builder:
    """Steps, as the operators append them."""

    def __init__(self, input_shape: Shape) -> None:
        self.steps: list[Step] = []
        self.examples: list[Tensor] = [torch.zeros(1, *input_shape, dtype=torch.float64)]  # the values at an input of zeros, for their shapes
        self.name = ""
        self.comparisons: dict[tuple[int, int], Ref] = {}

    @property
    def input(self) -> Ref:
        return Ref(0, tuple(self.examples[0].shape))

    def affine(
        self,
        inputs: Sequence[Ref],
        apply: Callable[..., Tensor],
        size: Callable[..., Tensor] | None = None,
        constant: Tensor | None = None,
        terms: int = 0,
        transposed: Transposed | None = None,
    ) -> Ref:
        """`apply` of signals; with `size=None` its coefficients are not negative and it has no constant."""
        example = apply(*(torch.zeros(ref.shape, dtype=torch.float64) for ref in inputs))
        numbers = tuple(ref.value for ref in inputs)
        bound = None if constant is None else constant.expand_as(example)
        self.steps.append(Affine(self.name, numbers, apply, apply if size is None else size, bound, terms, transposed))
        return self._made(example)

    def gate(self, ref: Ref, activation: Activation = RELU) -> Ref:
        """A scalar function of each entry."""
        self.steps.append(Gate(self.name, ref.value, activation))
        return self._made(torch.zeros(ref.shape, dtype=torch.float64))

    def _made(self, example: Tensor) -> Ref:
        self.examples.append(example)
        return Ref(len(self.steps), tuple(example.shape))

    def combine(self, *parts: tuple[float, Ref], constant: float = 0.0) -> Ref:
        """`c_1 x_1 + c_2 x_2 + ... + constant`, of one shape."""
        factors = [float(factor) for factor, _ in parts]

        def weighted(*values: Tensor) -> Tensor:
            return functools.reduce(operator.add, (value * factor for value, factor in zip(values, factors, strict=True))) + constant

        def size(*values: Tensor) -> Tensor:
            return functools.reduce(operator.add, (value * abs(factor) for value, factor in zip(values, factors, strict=True)))

        shift = torch.tensor(abs(constant), dtype=torch.float64) if constant else None

        def transposed(rows: Tensor, absolute: bool) -> list[Tensor]:
            return [rows * (abs(factor) if absolute else factor) if factor != 1 else rows for factor in factors]

        return self.affine([ref for _, ref in parts], weighted, size, shift, len(parts) + 1, transposed)

    def beyond(self, a: Ref, b: Ref) -> Ref:
        """`relu(a - b)`; one gate for the maximum and the minimum of the same two signals."""
        if (a.value, b.value) not in self.comparisons:
            self.comparisons[a.value, b.value] = self.gate(self.combine((1, a), (-1, b)))
        return self.comparisons[a.value, b.value]

    def maximum(self, a: Ref, b: Ref) -> Ref:
        return self.combine((1, b), (1, self.beyond(a, b)))

    def minimum(self, a: Ref, b: Ref) -> Ref:
        return self.combine((1, a), (-1, self.beyond(a, b)))


def _export(net: nn.Module, input_shape: Shape) -> torch.export.ExportedProgram:
    """The network as operations of aten that work on nothing in place."""
    if not any(True for _ in net.parameters()) and not list(net.buffers()):
        net = nn.Sequential(net)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(net, (torch.zeros(1, *input_shape, dtype=torch.float64),), strict=False)
            return exported.run_decompositions({})
    except Exception as error:  # whatever a forward and the exporter raise
        line = first_line(error)
        raise Unsupported([Problem("", type(net).__name__, f"torch.export cannot see through its forward ({type(error).__name__}: {line})")]) from error


def _interpret(exported: torch.export.ExportedProgram, builder: _Builder) -> int:
    """Append every operation of an exported network; returns the value of its output."""
    constants = {**exported.state_dict, **exported.constants}
    values: dict[torch.fx.Node, Any] = {}
    problems: list[Problem] = []
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")}
    signals = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    if len(signals) != 1:
        raise Unsupported([Problem("", "forward", f"takes {len(signals)} inputs; networks of one input can be bounded")])
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            values[node] = builder.input if spec.kind is InputKind.USER_INPUT else constants[spec.target].detach()
        elif node.op == "output":
            return _output(node, values, problems)
        elif node.op == "get_attr":
            problems.append(Problem(node.name, str(node.target), "is a graph within the graph; write the forward without control flow"))
            values[node] = None
        else:
            values[node] = _call(node, values, builder, problems)
    raise AssertionError("an exported graph without an output; please report this")


def _output(node: torch.fx.Node, values: dict[torch.fx.Node, Any], problems: list[Problem]) -> int:
    if problems:
        raise Unsupported(problems)
    returned = [values[arg] for arg in node.all_input_nodes]
    outputs: Any = node.args[0]
    if len(outputs) != 1 or len(returned) != 1 or not isinstance(returned[0], Ref):
        raise Unsupported([Problem("output", "forward", "must return one tensor that depends on its input")])
    if len(returned[0].shape) != 2:
        raise Unsupported([Problem("output", "forward", f"returns outputs of shape {returned[0].shape[1:]} for one input; a row of numbers is needed")])
    return returned[0].value


def _call(node: torch.fx.Node, values: dict[torch.fx.Node, Any], builder: _Builder, problems: list[Problem]) -> Any:
    """What one operation makes; None, and a problem, where it has no form here. Operations on stored numbers alone must not round."""
    args: Any = torch.fx.node.map_arg(node.args, lambda arg: values[arg])
    kwargs: Any = torch.fx.node.map_arg(node.kwargs, lambda arg: values[arg])
    target: Any = node.target
    builder.name, name = node.name, getattr(node.target, "__name__", str(node.target))
    unknown = Problem(node.name, name, "has no form as affine steps and scalar gates here; take --method layerwise or smoothing")
    if any(values[arg] is None for arg in node.all_input_nodes):  # named already; go on, to name every problem at once
        problems += [] if target is operator.getitem or target in _operators or target in _EXACT else [unknown]
        return None
    if target is operator.getitem:
        return args[0][args[1]]
    if not any(isinstance(values[arg], Ref | tuple | list) for arg in node.all_input_nodes):
        if target in _EXACT:
            return target(*args, **kwargs)
        problems.append(Problem(node.name, name, "computes with stored numbers, and may round; store the result instead"))
        return None
    function = _operators.get(target)
    if function is None:
        problems.append(unknown)
        return None
    try:
        return function(builder, *args, **kwargs)
    except Refused as error:
        problems.append(Problem(node.name, name, str(error)))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        problems.append(Problem(node.name, name, f"is called in a way that is not known here ({(str(error).splitlines() or [''])[0]})"))
    return None


_A = torch.ops.aten
_EXACT: frozenset[Any] = frozenset(
    {
        _A.view.default, _A.reshape.default, _A.permute.default, _A.transpose.int, _A.t.default, _A.unsqueeze.default, _A.squeeze.dim, _A.squeeze.default,
        _A.select.int, _A.slice.Tensor, _A.expand.default, _A.clone.default, _A.alias.default, _A.detach.default, _A.neg.default, _A.abs.default,
        _A.cat.default, _A.stack.default, _A.flatten.using_ints, _A.lift_fresh_copy.default, _A.detach_.default, _A.zeros.default, _A.full.default,
        _A.ones.default, _A._assert_tensor_metadata.default,
    }
)  # fmt: skip


@torch.no_grad()
def _check(program: Program, net: nn.Module) -> None:
    """Refuse a network that gives other numbers than its program, or that treats an input differently beside others."""
    generator = torch.Generator().manual_seed(0)
    for scale in _TRIES:
        x = scale * torch.randn(3, *program.input_shape, generator=generator, dtype=torch.float64)
        own = net(x.clone())
        if not isinstance(own, Tensor):
            raise Unsupported([Problem("output", "forward", f"returns {type(own).__name__}; it must return one tensor")])
        made = torch.stack([program.run(row) for row in x])
        if not torch.isfinite(made).all():
            raise Unsupported([Problem("", type(net).__name__, f"returns NaN or infinite numbers for inputs of size {scale:g}; rescale its weights")])
        if own.shape != made.shape or not torch.allclose(own, made, rtol=_CLOSE, atol=_CLOSE * (1 + float(made.abs().max()))):
            why = "gives other outputs than its forward as torch.export sees it; look for random numbers, branches on values, operations that mix inputs, and "
            why += "large numbers that cancel"
            raise Unsupported([Problem("", type(net).__name__, why)])
