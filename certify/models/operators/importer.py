"""Signals and constants of an ONNX graph, the graph of torch.fx that is made of them, and the table of the operators that are on the list."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

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
_FOLDED_NUMBERS = 2**26  # in all folded constants
_LARGEST, _LARGEST_BATCH = 2**24, 2**27  # numbers in one signal, of one input and of the batch that a file declares
_LIMITS = f"up to {_LARGEST} numbers for each input, and {_LARGEST_BATCH} for a batch that the file declares, are supported"
_MOST = 2**36  # products for one input in the whole network, which is tried on some: several times those of the largest image classifiers
_POOLED = 8  # a number in the window of a pool costs about as much as so many products
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


Fold = Callable[[Node, Sequence[Array | None]], Sequence[Array]]  # one node on constants, as ONNX defines it
Handler = Callable[["Importer", Node, Signal], Signal | tuple[Signal, ...]]  # more than one where the operator has several outputs
_H = TypeVar("_H", bound=Handler)

HANDLERS: dict[str, tuple[Handler, frozenset[str]]] = {}
_EITHER_SIDE = {"Add", "Sub", "Mul", "MatMul"}
_BROADCAST = {"Add", "Sub", "Mul", "Div", "Equal", "Where"}
_FOLDED = _BROADCAST | {
    "Neg", "Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "Identity", "Range", "ReduceProd", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip


def handles(*ops: str, attributes: Sequence[str] = ()) -> Callable[[_H], _H]:
    """Decorator: the function imports these operators, whose first input that is no constant it is given; other attributes than these are refused."""

    def decorator(handler: _H) -> _H:
        HANDLERS.update(dict.fromkeys(ops, (handler, frozenset(attributes))))
        return handler

    return decorator


def operators() -> tuple[str, ...]:
    """The names of the operators that are on the list, of signals or of constants."""
    return tuple(sorted({*HANDLERS, *_FOLDED, "Constant", "Shape", "Size"}))


class Importer:
    """Reads nodes in the order of the file and writes a torch.fx graph."""

    def __init__(self, constants: Mapping[str, Array], fold: Fold, dtype: torch.dtype) -> None:
        self.values: dict[str, Signal | Known] = {name: Known((array, array)) for name, array in constants.items()}
        self.fold, self.dtype = fold, dtype
        self.root, self.graph = nn.Module(), torch.fx.Graph()
        self.set_aside: Node | None = None  # a last Softmax or LogSoftmax
        self.aside: set[str] = set()  # the names of its output
        self.products, self.folded = 0, 0  # so far, of one input and among constants

    def input(self, name: str, shape: Shape, batch: Sizes | None) -> None:
        """The one input of the network."""
        if _too_large(shape, batch):
            raise ModelError(f"its input is of shape {shape}{'' if batch in (None, ANY) else f', {batch[0]} at a time'}; {_LIMITS}")
        self.values[name] = Signal(self.graph.placeholder("x"), shape, batch)

    def read(self, node: Node) -> None:
        """One more node."""
        if self.set_aside is not None and not (node.op == "Identity" and node.inputs[0] in self.aside):
            node.refuse(f"it comes after the {self.set_aside.op} {self.set_aside.label}, which can only be set aside as the last node")
        operands = [self._operand(node, name) for name in node.inputs]
        signals = [operand for operand in operands if isinstance(operand, Signal)]
        made: Signal | Known | Sequence[Signal | Known]
        if node.op == "Constant":
            made = self._constant(node)
        elif node.op in ("Shape", "Size"):
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
        for name, value in zip(node.outputs, (made,) if isinstance(made, Signal | Known) else made, strict=False):
            if name and name in self.values:
                node.refuse(f"it writes {name!r}, which is written already")
            self.values[name] = value
        if self.set_aside is not None:
            self.aside.add(node.outputs[0])

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
        self._spend(node, _products(module, x.shape, shape))
        name = f"{node.op.lower()}_{len(self.root._modules)}"
        self.root.add_module(name, module)
        return self.signal(node, self.graph.call_module(name, (x.node,)), shape, x.batch, nonnegative)

    def signal(self, node: Node, made: torch.fx.Node, shape: Shape, batch: Sizes | None, nonnegative: bool = False) -> Signal:
        """One more signal, of a size that can be held in memory."""
        if not shape or 0 in shape:
            node.refuse(f"it makes {shape} of each input, which is not one vector or more")
        if _too_large(shape, batch):
            node.refuse(f"it makes a signal of {shape}{'' if batch in (None, ANY) else f', {batch[0]} at a time'}; {_LIMITS}")
        self._spend(node, math.prod(shape))
        return Signal(made, shape, batch, nonnegative)

    def _spend(self, node: Node, products: int) -> None:
        self.products += products
        if self.products > _MOST:
            node.refuse(f"with it the network takes more than {_MOST} products for each input, which is more than can be tried")

    def axis(self, node: Node, x: Signal, axis: int, attribute: str) -> int:
        """An axis in the file as one in torch, where the batch is always in front. That of the batch is refused."""
        if not -x.rank <= axis < x.rank:
            node.refuse(f"there are {x.rank} axes", attribute)
        if x.batch is not None and axis % x.rank == 0:
            node.refuse("the inputs of a batch must stay apart, each as a whole", attribute)
        return axis % x.rank + (x.batch is None)

    def module(self, x: Signal) -> nn.Module | None:
        """The module that a signal comes from, if it comes from one."""
        return self.root.get_submodule(str(x.node.target)) if x.node.op == "call_module" else None

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
        if array.dtype != torch.empty(0, dtype=self.dtype).numpy().dtype:
            node.refuse(f"its input {place} is of {array.dtype}, the network of {self.dtype}")
        if not array.size:
            node.refuse(f"its input {place} is empty, of shape {array.shape}")
        return torch.from_numpy(np.array(array, order="C"))

    def whole(self, node: Node, place: int) -> Array:
        """A constant of whole numbers."""
        array = self.constant(node, place)
        if array.dtype.kind not in "iu":
            node.refuse(f"its input {place} is of {array.dtype}, not of whole numbers")
        return array

    def sizes(self, node: Node, place: int, attribute: str) -> list[int] | None:
        """Whole numbers that later opsets give as an input and earlier ones as an attribute; None where they are left out."""
        if place < len(node.inputs) and node.inputs[place]:
            return [int(size) for size in self.whole(node, place).ravel()]
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
        return dataclasses.replace(made, batch=batch, nonnegative=x.nonnegative)

    def with_constant(self, node: Node, x: Signal, held: Tensor, function: Callable[..., Any]) -> Signal:
        """`x + c`, `x - c` or `x * c`."""
        made = self.graph.call_function(function, (x.node, self.stored(self.aligned(node, x, held))))
        return self.signal(node, made, x.shape, x.batch)

    def stored(self, held: Tensor) -> torch.fx.Node:
        """A constant as a buffer of the network."""
        name = f"constant_{len(self.root._buffers)}"
        self.root.register_buffer(name, held.clone())
        return self.graph.get_attr(name)

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
            return self.signal(node, self.graph.call_function(operator.mul, (x.node, float(factors))), x.shape, x.batch)
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
        if not by_channel(array, x):
            node.refuse(f"its constant has the shape {tuple(array.shape)}; one number, or one for each channel of {x.shape}, are supported")
        return array.ravel()

    def bordered(self, node: Node, x: Signal, before: Sequence[int], after: Sequence[int], filled: float | Sequence[type[nn.Module]] = 0.0) -> Signal:
        """A border around each channel: of one number, or as one of these modules for one, two or three axes makes it."""
        if not any([*before, *after]):
            return x
        if not all(0 <= size <= WIDEST for size in (*before, *after)):
            node.refuse(f"a border of {list(before)} before and {list(after)} after is not supported")
        sides: Any = tuple(size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair)  # torch takes the last axis first
        if not isinstance(filled, int | float):
            return self.call(node, filled[len(before) - 1](sides), x, x.nonnegative)
        kind: Callable[[Any, float], nn.Module] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}[len(before)]
        return self.call(node, nn.ZeroPad2d(sides) if len(before) == 2 and filled == 0 else kind(sides, filled), x, x.nonnegative and filled >= 0)

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

    def _folded(self, node: Node, operands: Sequence[Signal | Known | None]) -> list[Known]:
        """The outputs of a node of constants. How much is made of little is found before it is made."""
        if node.op not in _FOLDED:
            node.refuse(f"this operator of constants is not on the list; known are {', '.join(sorted(_FOLDED))}")
        known = [operand for operand in operands if isinstance(operand, Known)]
        made = []
        for trial in (0,) if all(operand.trials[0] is operand.trials[1] for operand in known) else (0, 1):
            arrays = [operand.trials[trial] if isinstance(operand, Known) else None for operand in operands]
            try:
                size = _made_of(node.op, [array for array in arrays if array is not None])
                self.folded += size
                if self.folded > _FOLDED_NUMBERS:
                    node.refuse(f"it would make up to {size} numbers of constants; {_FOLDED_NUMBERS} are supported in all")
                made.append([np.asarray(array) for array in self.fold(node, arrays)])
            except ModelError:
                raise
            except Exception as error:  # of many kinds
                node.refuse(f"it cannot be computed from constants ({(str(error).splitlines() or [type(error).__name__])[0]})")
        return [Known((first, second)) for first, second in zip(made[0], made[-1], strict=True)]


def _made_of(op: str, arrays: Sequence[Array]) -> int:
    """At most how many numbers an operator makes of constants."""
    shapes = [array.shape for array in arrays]
    if op in _BROADCAST:
        return math.prod(np.broadcast_shapes(*shapes))
    if op == "Gather":
        return math.prod(shapes[0]) * math.prod(shapes[1])
    if op == "ConstantOfShape":
        return math.prod(int(size) for size in arrays[0].ravel())
    if op == "Expand":
        return math.prod(np.broadcast_shapes(shapes[0], tuple(int(size) for size in arrays[1].ravel())))
    if op == "Range":
        start, limit, delta = (array.item() for array in arrays)
        return max(0, math.ceil((limit - start) / delta))
    return sum(map(math.prod, shapes))


def _too_large(shape: Shape, batch: Sizes | None) -> bool:
    return math.prod(shape) > _LARGEST or (batch not in (None, ANY) and math.prod(shape) * batch[0] > _LARGEST_BATCH)


def _products(module: nn.Module, into: Shape, out: Shape) -> int:
    """At most how many a module takes for one input: its weights once for each place, or its window."""
    weight, window = getattr(module, "weight", None), getattr(module, "kernel_size", 0)
    if isinstance(weight, Tensor) and weight.dim() > 1:
        return max(math.prod(into), math.prod(out)) * weight.numel() // max(weight.shape[0], 1)
    taps = math.prod(window) if isinstance(window, tuple) else int(window) ** (len(into) - 1)
    return _POOLED * taps * math.prod(out)


def by_channel(array: Tensor, x: Signal) -> bool:
    """Whether a constant is one number, or one for each channel."""
    return array.numel() == 1 or (array.ndim == len(x.shape) and array.numel() == array.shape[0] == x.shape[0])


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
    """The sizes of a tensor, or some of them, or their product."""
    for attribute in node.attributes.keys() - ({"start", "end"} if node.op == "Shape" else set()):
        node.refuse("this attribute is not on the list", attribute)
    which = slice(node.get("start", None), node.get("end", None))
    if x is None:
        node.refuse("it has no input")
    shapes = [x.full(trial) if isinstance(x, Signal) else x.trials[trial].shape for trial in (0, 1)]
    first, second = (np.array(shape[which] if node.op == "Shape" else math.prod(shape), dtype=np.int64) for shape in shapes)
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
