"""Signals and constants of an ONNX graph, the graph of torch.fx that is made of them, and the table of the operators that are on the list."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.fx
from torch import Tensor, nn
from torch.func import functional_call

from certify.models.weights import ModelError
from certify.registry import Shape

Array = npt.NDArray[Any]
Sizes = tuple[int, int]
ANY: Sizes = (7919, 104729)  # two trial lengths of a batch that may be of any length: a size that follows both is the batch, one that follows neither is not
OLDEST, NEWEST = 7, 28  # the opsets that the table below was written for; before 7 operators broadcast and train by other rules
WIDEST = 4096  # of a border; a larger one is no network but an attempt on the memory
_LARGEST = 2**26  # numbers in one folded constant, and in one signal of one input
BATCH_NORM: dict[int, Callable[..., nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Node:
    """One node of a file."""

    name: str
    op: str
    inputs: tuple[str, ...]  # "" where an optional one is left out
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]  # as Python values and arrays
    opset: int
    label: str  # as messages call it

    def get(self, name: str, default: Any) -> Any:
        """The value of an attribute."""
        return self.attributes.get(name, default)

    def refuse(self, why: str, attribute: str = "") -> NoReturn:
        """Raise ModelError that names the node, the operator and the attribute."""
        what = (
            f", attribute {attribute}={self.attributes.get(attribute)!r}" if attribute in self.attributes else f", attribute {attribute}" if attribute else ""
        )
        raise ModelError(f"node {self.label} ({self.op}{what}): {why}; so it is not imported, export the network without it")


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """A tensor that depends on the input: `(any batch, *shape)` in torch; in the file with the batch in front, or, where `batch` is None, without one."""

    node: torch.fx.Node
    shape: Shape
    batch: Sizes | None
    nonnegative: bool = False

    def full(self, trial: int) -> Shape:
        """The shape in the file, for one of the two trial batches."""
        return self.shape if self.batch is None else (self.batch[trial], *self.shape)

    @property
    def rank(self) -> int:
        """The number of axes in the file."""
        return len(self.full(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A tensor that does not depend on the input, for each of the two trial batches: the two differ in what was computed from the length of the batch."""

    trials: tuple[Array, Array]


Fold = Callable[[Node, Sequence[Array | None]], Array]  # one node on constants, as ONNX defines it
Handler = Callable[["Importer", Node, Signal], Signal]

HANDLERS: dict[str, tuple[Handler, frozenset[str]]] = {}
_EITHER_SIDE = {"Add", "Sub", "Mul", "MatMul"}
_FOLDED = {"Add", "Sub", "Mul", "Div", "Neg", "Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Identity"}


def handles(*ops: str, attributes: Sequence[str] = ()) -> Callable[[Handler], Handler]:
    """Decorator: the function imports these operators, whose first input that is no constant it is given; other attributes than these are refused."""

    def decorator(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(ops, (handler, frozenset(attributes))))
        return handler

    return decorator


def operators() -> tuple[str, ...]:
    """The names of the operators that are on the list, of signals or of constants."""
    return tuple(sorted({*HANDLERS, *_FOLDED, "Constant", "Shape"}))


class Importer:
    """Reads nodes in the order of the file and writes a torch.fx graph."""

    def __init__(self, constants: Mapping[str, Array], fold: Fold, dtype: torch.dtype) -> None:
        self.values: dict[str, Signal | Known] = {name: Known((array, array)) for name, array in constants.items()}
        self.fold, self.dtype = fold, dtype
        self.root, self.graph = nn.Module(), torch.fx.Graph()
        self.set_aside: Node | None = None  # a last Softmax or LogSoftmax

    def input(self, name: str, shape: Shape, batch: Sizes | None) -> None:
        """The one input of the network."""
        if math.prod(shape) > _LARGEST:
            raise ModelError(f"its input is of shape {shape}; more than {_LARGEST} numbers are not supported")
        self.values[name] = Signal(self.graph.placeholder("x"), shape, batch)

    def read(self, node: Node) -> None:
        """One more node."""
        if self.set_aside is not None:
            node.refuse(f"it comes after the {self.set_aside.op} {self.set_aside.label}, which can only be set aside as the last node")
        operands = [self._operand(node, name) for name in node.inputs]
        signals = [operand for operand in operands if isinstance(operand, Signal)]
        made: Signal | Known
        if node.op == "Constant":
            made = self._constant(node)
        elif node.op == "Shape":
            made = _shape(node, operands[0])
        elif not signals:
            made = self._folded(node, operands)
        elif node.op in HANDLERS:
            handler, allowed = HANDLERS[node.op]
            for attribute in sorted(node.attributes.keys() - allowed):
                node.refuse("this attribute is not on the list", attribute)
            if operands[0] is not signals[0] and node.op not in _EITHER_SIDE:
                node.refuse("its first input must be the signal, the others constants")
            made = handler(self, node, signals[0])
        else:
            node.refuse(f"this operator is not on the list; known are {', '.join(sorted(HANDLERS))}")
        if any(name in self.values for name in node.outputs):
            node.refuse("it writes a name that is written already")
        self.values[node.outputs[0]] = made

    def finish(self, name: str) -> tuple[torch.fx.GraphModule, Signal]:
        """The network whose output has this name, and its output. Weights and biases that stand in two nodes are put together."""
        output = self.values.get(name)
        if not isinstance(output, Signal):
            raise ModelError(f"its output {name!r} does not depend on its input; nothing is there to certify")
        self.graph.output(output.node)
        net = torch.fx.GraphModule(self.root, self.graph)
        _put_biases_into_layers(net)
        net.graph.eliminate_dead_code()
        net = torch.fx.GraphModule(net, net.graph)  # holds what is used alone
        return net.eval().requires_grad_(False), output

    # What the handlers are made of

    def call(self, node: Node, module: nn.Module, x: Signal, nonnegative: bool = False) -> Signal:
        """A module on a signal; its shape is that of a trial run without numbers."""
        module = module.to(self.dtype).eval()
        try:
            held = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
            shape = tuple(functional_call(module, held, torch.empty(1, *x.shape, dtype=self.dtype, device="meta")).shape[1:])
        except (RuntimeError, ValueError, IndexError) as error:  # torch's words for sizes that do not fit
            node.refuse(f"torch's {type(module).__name__} does not take it ({str(error).splitlines()[0]})")
        if math.prod(shape) > _LARGEST:
            node.refuse(f"it makes a signal of {shape}, more than {_LARGEST} numbers for each input")
        name = f"{node.op.lower()}_{len(self.root._modules)}"
        self.root.add_module(name, module)
        return Signal(self.graph.call_module(name, (x.node,)), shape, x.batch, nonnegative)

    def constant(self, node: Node, place: int, default: Array | None = None) -> Array:
        """An input of a node that must be a constant, the same for every batch."""
        value = self.values.get(node.inputs[place]) if place < len(node.inputs) and node.inputs[place] else None
        if value is None and default is not None:
            return default
        if not isinstance(value, Known) or not (value.trials[0] is value.trials[1] or np.array_equal(*value.trials)):
            node.refuse(f"its input {place} must be a constant that does not depend on the batch")
        array = value.trials[0]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            node.refuse(f"its input {place} holds NaN or infinite numbers")
        return array

    def weight(self, node: Node, place: int, rank: int | None = None) -> Tensor:
        """A constant of the network's own type, exactly."""
        array = self.constant(node, place)
        if rank is not None and array.ndim != rank:
            node.refuse(f"its input {place} has the shape {array.shape}; {rank} axes are supported")
        tensor = torch.from_numpy(np.array(array, order="C"))
        if tensor.dtype != self.dtype:
            node.refuse(f"its input {place} is of {array.dtype}, the network of {self.dtype}")
        return tensor

    def sizes(self, node: Node, place: int, attribute: str) -> list[int] | None:
        """Whole numbers that later opsets give as an input and earlier ones as an attribute; None where they are left out."""
        if place < len(node.inputs) and node.inputs[place]:
            return [int(size) for size in self.constant(node, place).ravel()]
        return [int(size) for size in node.attributes[attribute]] if attribute in node.attributes else None

    def number(self, node: Node, place: int, attribute: str) -> float | None:
        """The same for one number of the network's own type."""
        if place < len(node.inputs) and node.inputs[place]:
            held = self.weight(node, place)
            if held.numel() != 1:
                node.refuse(f"its input {place} must be one number")
            return float(held)
        return float(node.attributes[attribute]) if attribute in node.attributes else None

    def rearranged(self, node: Node, x: Signal, targets: Sequence[Sequence[int]]) -> Signal:
        """`x` with the shape that the file gives it, for the two trial batches; the inputs of a batch must stay apart."""
        first, second = (_resolved(node, target, x.full(trial)) for trial, target in enumerate(targets))
        batch: Sizes | None
        if x.batch is None:
            batch, shape = ((1, 1), first[1:]) if len(first) > 1 and first[0] == 1 else (None, first)
        elif len(first) > 1 and (first[0], second[0]) == x.batch and first[1:] == second[1:]:
            batch, shape = x.batch, first[1:]
        elif x.batch == (1, 1):
            batch, shape = None, first
        else:
            node.refuse(f"it makes {_text(first, x.batch)} of {_text(x.full(0), x.batch)}, which does not keep the inputs of a batch apart, each with an axis")
        if math.prod(shape) != math.prod(x.shape) or not shape or 0 in shape:
            node.refuse(f"it makes {shape} of the {x.shape} of each input")
        if shape == x.shape:
            return dataclasses.replace(x, batch=batch)
        made = x if len(x.shape) == 1 else self.call(node, nn.Flatten(), x)
        made = made if len(shape) == 1 else self.call(node, nn.Unflatten(1, shape), made)
        return Signal(made.node, shape, batch, x.nonnegative)

    def shifted(self, node: Node, x: Signal, place: int, function: Callable[..., Any]) -> Signal:
        """`x + c` or `x - c`."""
        name = f"constant_{len(self.root._buffers)}"
        self.root.register_buffer(name, self.aligned(node, x, self.weight(node, place)).clone())
        return Signal(self.graph.call_function(function, (x.node, self.graph.get_attr(name))), x.shape, x.batch)

    def aligned(self, node: Node, x: Signal, array: Tensor) -> Tensor:
        """A constant as it is broadcast to each input of a batch, without axes of length 1 in front. One that would repeat the signal to fit is refused."""
        if array.ndim > x.rank:
            node.refuse(f"its constant of shape {tuple(array.shape)} has more axes than the signal")
        if array.ndim == x.rank and x.batch is not None:
            if array.shape[0] != 1:
                node.refuse(f"its constant of shape {tuple(array.shape)} has an entry of its own for each input of a batch")
            array = array[0]
        while array.ndim and array.shape[0] == 1:
            array = array[0]
        if array.ndim > len(x.shape) or any(a not in (1, b) for a, b in zip(array.shape[::-1], x.shape[::-1], strict=False)):
            node.refuse(f"its constant of shape {tuple(array.shape)} would repeat the entries of a signal of shape {x.shape}")
        return array

    def scaled(self, node: Node, x: Signal, factors: Tensor) -> Signal:
        """`c x`, one number or one for each channel: batch normalisation with nothing to normalise."""
        if factors.numel() == 1:
            return Signal(self.graph.call_function(operator.mul, (x.node, float(factors))), x.shape, x.batch)
        kind = BATCH_NORM.get(len(x.shape))
        if kind is None:
            node.refuse(f"one number for each channel is not supported on a signal of shape {x.shape}")
        layer = kind(len(factors), eps=0.0).to(self.dtype)
        with torch.no_grad():
            layer.weight.copy_(factors)
        return self.call(node, layer, x)

    def factors(self, node: Node, x: Signal, place: int) -> Tensor:
        """A constant factor: one number, or one for each channel."""
        array = self.aligned(node, x, self.weight(node, place))
        if array.numel() > 1 and (array.ndim != len(x.shape) or not array.numel() == array.shape[0] == x.shape[0]):
            node.refuse(f"its constant has the shape {tuple(array.shape)}; one number, or one for each channel of {x.shape}, are supported")
        return array.ravel()

    def bordered(self, node: Node, x: Signal, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Signal:
        """A constant border around each channel."""
        if not any([*before, *after]):
            return x
        if not all(0 <= size <= WIDEST for size in (*before, *after)):
            node.refuse(f"a border of {list(before)} before and {list(after)} after is not supported")
        sides: Any = tuple(size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair)  # torch takes the last axis first
        kind: Callable[[Any, float], nn.Module] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}[len(before)]
        return self.call(node, nn.ZeroPad2d(sides) if len(before) == 2 and value == 0 else kind(sides, value), x, x.nonnegative and value >= 0)

    def _operand(self, node: Node, name: str) -> Signal | Known | None:
        if name and name not in self.values:
            node.refuse(f"its input {name!r} is not written by a node before it")
        return self.values[name] if name else None

    def _constant(self, node: Node) -> Known:
        if len(node.attributes) != 1 or not node.attributes.keys() <= {"value", "value_int", "value_ints", "value_float", "value_floats"}:
            node.refuse("this form of a constant is not on the list", next(iter(node.attributes), "value"))
        name, value = next(iter(node.attributes.items()))
        array = value if name == "value" else np.array(value, dtype=np.int64 if "int" in name else np.float32)
        return Known((array, array))

    def _folded(self, node: Node, operands: Sequence[Signal | Known | None]) -> Known:
        """A node of constants. Those that could make much of little are kept to a size."""
        if node.op not in _FOLDED:
            node.refuse(f"this operator of constants is not on the list; known are {', '.join(sorted(_FOLDED))}")
        made = []
        for trial in (0, 1):
            arrays = [operand.trials[trial] if isinstance(operand, Known) else None for operand in operands]
            shapes = [array.shape for array in arrays if array is not None]
            try:
                size = math.prod(np.broadcast_shapes(*shapes)) if node.op in ("Add", "Sub", "Mul", "Div") else sum(map(math.prod, shapes))
                if node.op == "Gather":
                    size = math.prod(shapes[0]) * math.prod(shapes[1])
                if size > _LARGEST:
                    node.refuse(f"it would make up to {size} numbers of constants")
                made.append(np.asarray(self.fold(node, arrays)))
            except ModelError:
                raise
            except Exception as error:  # of many kinds
                node.refuse(f"it cannot be computed from constants ({(str(error).splitlines() or [type(error).__name__])[0]})")
        return Known((made[0], made[1]))


def _put_biases_into_layers(net: torch.fx.GraphModule) -> None:
    """A linear layer without bias, of which nothing but its sum with a constant is used, is one with bias."""
    for add in list(net.graph.nodes):
        if add.op != "call_function" or add.target not in (operator.add, operator.sub) or add.args[1].op != "get_attr":
            continue
        before, held = add.args[0], net.get_buffer(str(add.args[1].target))
        layer = net.get_submodule(str(before.target)) if before.op == "call_module" else None
        if isinstance(layer, nn.Linear) and layer.bias is None and len(before.users) == 1 and held.shape == (layer.out_features,):
            layer.bias = nn.Parameter(held if add.target is operator.add else -held)
            add.replace_all_uses_with(before)
            net.graph.erase_node(add)


def _shape(node: Node, x: Signal | Known | None) -> Known:
    """The sizes of a tensor, or some of them."""
    for attribute in node.attributes.keys() - {"start", "end"}:
        node.refuse("this attribute is not on the list", attribute)
    which = slice(node.get("start", None), node.get("end", None))
    if x is None:
        node.refuse("it has no input")
    shapes = [x.full(trial) if isinstance(x, Signal) else x.trials[trial].shape for trial in (0, 1)]
    first, second = (np.array(shape[which], dtype=np.int64) for shape in shapes)
    return Known((first, second))


def _resolved(node: Node, target: Sequence[int], shape: Shape) -> Shape:
    """A shape with one -1 in it, as sizes."""
    sizes = [int(size) for size in target]
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = math.prod(shape) // rest if rest > 0 else -1
    if any(size < 0 for size in sizes) or math.prod(sizes) != math.prod(shape):
        node.refuse(f"{list(target)} is no shape for {shape}")
    return tuple(sizes)


def _text(shape: Sequence[int], batch: Sizes) -> str:
    """A shape with N for the length of the batch."""
    return "x".join("N" if size == batch[0] == ANY[0] else f"{size // ANY[0]}N" if batch == ANY and size % ANY[0] == 0 else str(size) for size in shape)
