"""ONNX operators as torch's own modules, so that the rules see through an imported network. What is not on the list, operator or value, is refused by name.

A signal is kept as torch has it, a batch of inputs in front, whether or not the file writes the batch: every operator must keep the inputs of a batch apart.
This file knows plain nodes and arrays; `certify.models.onnx` makes them of a file.
"""

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

import lipnet
from certify.models.weights import ModelError
from certify.registry import Shape

Array = npt.NDArray[Any]
Sizes = tuple[int, int]
ANY: Sizes = (7919, 104729)  # two trial lengths of a batch that may be of any length: a size that follows both is the batch, one that follows neither is not
OLDEST, NEWEST = 7, 28  # the opsets that the table below was written for; before 7 operators broadcast and train by other rules
_WIDEST = 4096  # of a border; a larger one is no network but an attempt on the memory
_LARGEST = 2**26  # numbers in one folded constant, and in one signal of one input


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

_handlers: dict[str, tuple[Handler, frozenset[str]]] = {}
_EITHER_SIDE = {"Add", "Sub", "Mul", "MatMul"}
_FOLDED = {"Add", "Sub", "Mul", "Div", "Neg", "Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Identity"}


def _handles(*ops: str, attributes: Sequence[str] = ()) -> Callable[[Handler], Handler]:
    """Decorator: the function imports these operators, whose first input that is no constant it is given; other attributes than these are refused."""

    def decorator(handler: Handler) -> Handler:
        _handlers.update(dict.fromkeys(ops, (handler, frozenset(attributes))))
        return handler

    return decorator


def operators() -> tuple[str, ...]:
    """The names of the operators that are on the list, of signals or of constants."""
    return tuple(sorted({*_handlers, *_FOLDED, "Constant", "Shape"}))


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
        elif node.op in _handlers:
            handler, allowed = _handlers[node.op]
            for attribute in sorted(node.attributes.keys() - allowed):
                node.refuse("this attribute is not on the list", attribute)
            if operands[0] is not signals[0] and node.op not in _EITHER_SIDE:
                node.refuse("its first input must be the signal, the others constants")
            made = handler(self, node, signals[0])
        else:
            node.refuse(f"this operator is not on the list; known are {', '.join(sorted(_handlers))}")
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
        kind = _BATCH_NORM.get(len(x.shape))
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
        if not all(0 <= size <= _WIDEST for size in (*before, *after)):
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


_BATCH_NORM: dict[int, Callable[..., nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d,
}  # fmt: skip


# Linear maps


def _exactly(node: Node, tensor: Tensor, attribute: str) -> Tensor:
    """A constant times a factor of the node, where the product is a number of the same type: the weights stay those of the file."""
    factor = float(node.get(attribute, 1.0))
    product = tensor * factor
    mantissa, _ = math.frexp(factor)
    if abs(mantissa) != 0.5 or not torch.equal(product / factor, tensor):  # not a power of two, or too small or too large
        node.refuse("the product with the weights would be rounded; 1 and other powers of two are supported", attribute)
    return product


def _linear(self: Importer, node: Node, x: Signal, weight: Tensor, bias: Tensor | None = None) -> Signal:
    if not x.shape or weight.shape[1] != x.shape[-1]:
        node.refuse(f"weights for {weight.shape[1]} entries do not fit a signal of shape {x.shape}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=self.dtype)
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return self.call(node, layer, x)


@_handles("Gemm", attributes=("alpha", "beta", "transA", "transB"))
def _gemm(self: Importer, node: Node, x: Signal) -> Signal:
    """`alpha x B + beta C`."""
    if node.get("transA", 0) != 0:
        node.refuse("the first factor must not be transposed", "transA")
    if x.batch is None or len(x.shape) != 1:
        node.refuse(f"a signal of shape {x.shape} is not one vector for each input")
    weight = self.weight(node, 1, 2)
    weight = _exactly(node, weight if node.get("transB", 0) else weight.T, "alpha")
    if len(node.inputs) < 3 or not node.inputs[2]:
        return _linear(self, node, x, weight)
    outputs = Signal(x.node, (weight.shape[0],), x.batch)
    held = self.aligned(node, outputs, self.weight(node, 2)).expand(weight.shape[0])
    return _linear(self, node, x, weight, _exactly(node, held, "beta"))


@_handles("MatMul")
def _matmul(self: Importer, node: Node, x: Signal) -> Signal:
    """`x B`, or `A x` of a vector."""
    if self.values[node.inputs[0]] is x:
        return _linear(self, node, x, self.weight(node, 1, 2).T)
    if x.batch is not None or len(x.shape) != 1:
        node.refuse(f"a constant from the left on a signal of {'a batch of ' if x.batch else ''}{x.shape} is not supported; put the signal first")
    return _linear(self, node, x, self.weight(node, 0, 2))


@dataclasses.dataclass(frozen=True)
class _Window:
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        return self.before == self.after

    def outputs(self, sizes: Shape) -> list[tuple[int, int]]:
        """Along each axis, how many places it has, the last one whole and the last one cut."""
        spans = [n + b + a - d * (k - 1) - 1 for n, b, a, d, k in zip(sizes, self.before, self.after, self.dilations, self.taps, strict=True)]
        return [(span // stride + 1, -(-span // stride) + 1) for span, stride in zip(spans, self.strides, strict=True)]


_WINDOW = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


def _window(node: Node, x: Signal, taps: Sequence[int]) -> _Window:
    """Kernel, stride, dilation and padding, with `auto_pad` as numbers."""
    axes = len(taps)
    if axes not in (1, 2, 3) or len(x.shape) != axes + 1 or x.batch is None:
        node.refuse(f"a window of {list(taps)} on a signal of shape {x.shape} is not supported")
    if tuple(node.get("kernel_shape", taps)) != tuple(taps):
        node.refuse(f"the weights are of {list(taps)}", "kernel_shape")
    strides, dilations = ([int(size) for size in node.get(name, [1] * axes)] for name in ("strides", "dilations"))
    pads, auto = [int(size) for size in node.get("pads", [0] * 2 * axes)], node.get("auto_pad", "NOTSET")
    for name, sizes, count in (("strides", strides, axes), ("dilations", dilations, axes), ("pads", pads, 2 * axes), ("kernel_shape", taps, axes)):
        if len(sizes) != count or not all((0 if name == "pads" else 1) <= size <= _WIDEST for size in sizes):
            node.refuse(f"{count} sizes from {0 if name == 'pads' else 1} to {_WIDEST} are supported", name)
    if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        node.refuse("this value is not on the list", "auto_pad")
    if auto != "NOTSET" and any(pads):
        node.refuse(f"pads={pads} and auto_pad cannot both be given", "auto_pad")
    before, after = pads[:axes], pads[axes:]
    if auto.startswith("SAME"):
        totals = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, s, d, k in zip(x.shape[1:], strides, dilations, taps, strict=True)]
        less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
        before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
    return _Window(tuple(taps), tuple(strides), tuple(dilations), tuple(before), tuple(after))


@_handles("Conv", attributes=(*_WINDOW, "group"))
def _conv(self: Importer, node: Node, x: Signal) -> Signal:
    weight = self.weight(node, 1)
    window = _window(node, x, weight.shape[2:])
    group = _groups(node, x.shape[0], weight.shape[0], x.shape[0] == weight.shape[1] * node.get("group", 1))
    if not window.symmetric:
        x = self.bordered(node, x, window.before, window.after)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(window.taps) - 1]
    padding = window.before if window.symmetric else 0
    bias = len(node.inputs) > 2 and bool(node.inputs[2])
    layer = kind(x.shape[0], weight.shape[0], window.taps, window.strides, padding, window.dilations, group, bias, device="meta")
    return self.call(node, _filled(self, node, layer, weight), x)


@_handles("ConvTranspose", attributes=(*_WINDOW, "group", "output_padding"))
def _conv_transpose(self: Importer, node: Node, x: Signal) -> Signal:
    weight = self.weight(node, 1)
    window = _window(node, x, weight.shape[2:])
    if node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        node.refuse("only explicit pads are supported", "auto_pad")
    if not window.symmetric:
        node.refuse("only equal pads before and after are supported", "pads")
    group = _groups(node, x.shape[0], x.shape[0], x.shape[0] == weight.shape[0])
    extra = [int(size) for size in node.get("output_padding", [0] * len(window.taps))]
    if len(extra) != len(window.taps) or not all(0 <= size < stride for size, stride in zip(extra, window.strides, strict=True)):
        node.refuse("an output padding of at least the stride is not supported", "output_padding")
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(window.taps) - 1]
    bias = len(node.inputs) > 2 and bool(node.inputs[2])
    layer = kind(x.shape[0], weight.shape[1] * group, window.taps, window.strides, window.before, extra, group, bias, window.dilations, device="meta")
    return self.call(node, _filled(self, node, layer, weight), x)


def _groups(node: Node, into: int, out: int, fits: bool) -> int:
    group = int(node.get("group", 1))
    if group < 1 or into % group or out % group or not fits:
        node.refuse(f"the weights do not fit {into} channels in {group} groups", "group")
    return group


def _filled(self: Importer, node: Node, layer: nn.Module, weight: Tensor) -> nn.Module:
    """A convolution with the weights of the file, bit for bit."""
    layer.weight = nn.Parameter(weight)
    if layer.bias is not None:
        bias = self.weight(node, 2, 1)
        if bias.shape != layer.bias.shape:
            node.refuse(f"its bias has the shape {tuple(bias.shape)}")
        layer.bias = nn.Parameter(bias)
    return layer


@_handles("BatchNormalization", attributes=("epsilon", "momentum", "training_mode", "spatial"))
def _batch_norm(self: Importer, node: Node, x: Signal) -> Signal:
    """With stored statistics; `momentum` matters in training alone."""
    for attribute, wanted in (("training_mode", 0), ("spatial", 1)):
        if node.get(attribute, wanted) != wanted:
            node.refuse("only inference, with one mean and variance for each channel, is supported", attribute)
    if len(x.shape) not in _BATCH_NORM or x.batch is None or len(node.outputs) > 1:
        node.refuse(f"on a signal of shape {x.shape}, with {len(node.outputs)} outputs, it is not supported; export in eval mode")
    tensors = [self.weight(node, place, 1) for place in (1, 2, 3, 4)]
    if any(len(tensor) != x.shape[0] for tensor in tensors):
        node.refuse(f"its constants do not fit {x.shape[0]} channels")
    layer = _BATCH_NORM[len(x.shape)](x.shape[0], eps=float(node.get("epsilon", 1e-5))).to(self.dtype)
    layer.load_state_dict(dict(zip(("weight", "bias", "running_mean", "running_var"), tensors, strict=True)), strict=False)
    return self.call(node, layer, x)


# Sums and products


@_handles("Add", "Sub")
def _add(self: Importer, node: Node, x: Signal) -> Signal:
    function = operator.add if node.op == "Add" else operator.sub
    a, b = (self.values[name] for name in node.inputs)
    if isinstance(a, Signal) and isinstance(b, Signal):
        if a.shape != b.shape or a.batch != b.batch:
            node.refuse(f"signals of the shapes {a.shape} and {b.shape} do not have one shape, so entries would be repeated")
        return Signal(self.graph.call_function(function, (a.node, b.node)), a.shape, a.batch)
    if isinstance(a, Signal):
        return self.shifted(node, a, 1, function)
    if node.op == "Sub":
        x = Signal(self.graph.call_function(operator.neg, (x.node,)), x.shape, x.batch)
    return self.shifted(node, x, 0, operator.add)


@_handles("Mul")
def _mul(self: Importer, node: Node, x: Signal) -> Signal:
    return self.scaled(node, x, self.factors(node, x, 1 if self.values[node.inputs[0]] is x else 0))


@_handles("Div")
def _div(self: Importer, node: Node, x: Signal) -> Signal:
    """By powers of two as a product, which is exact; by other positive numbers as a normalisation."""
    divisors = self.factors(node, x, 1)
    if all(abs(math.frexp(float(c))[0]) == 0.5 and 1e-30 < abs(c) < 1e30 for c in divisors):
        return self.scaled(node, x, 1 / divisors)
    if not (divisors > 0).all():
        node.refuse("divisors must be positive, or powers of two")
    layer = lipnet.Normalize([0.0] * len(divisors), [float(c) for c in divisors]).to(self.dtype)
    layer.divisor.copy_(torch.tensor(layer.std, dtype=self.dtype))
    return self.call(node, layer, x)


@_handles("Neg")
def _neg(self: Importer, node: Node, x: Signal) -> Signal:
    return Signal(self.graph.call_function(operator.neg, (x.node,)), x.shape, x.batch)


# Activations


def _activation(op: str, make: Callable[[Node], nn.Module], attributes: Sequence[str] = (), nonnegative: bool = False) -> None:
    @_handles(op, attributes=attributes)
    def _(self: Importer, node: Node, x: Signal) -> Signal:
        return self.call(node, make(node), x, nonnegative)


def _selu(node: Node) -> nn.Module:
    for attribute, usual in (("alpha", 1.6732632423543772), ("gamma", 1.0507009873554805)):
        if abs(node.get(attribute, usual) - usual) > 1e-6:
            node.refuse(f"only {usual} is supported", attribute)
    return nn.SELU()


def _gelu(node: Node) -> nn.Module:
    approximate = node.get("approximate", "none")
    if approximate not in ("none", "tanh"):
        node.refuse("this value is not on the list", "approximate")
    return nn.GELU(approximate)


def _hard_sigmoid(node: Node) -> nn.Module:
    """With torch's slope 1 / 6 and offset 1 / 2."""
    for attribute, default, wanted in (("alpha", 0.2, 1 / 6), ("beta", 0.5, 0.5)):
        if abs(node.get(attribute, default) - wanted) > 1e-6:
            node.refuse(f"only {wanted:.7g} is supported, the default is {default}", attribute)
    return nn.Hardsigmoid()


_activation("Relu", lambda _: nn.ReLU(), nonnegative=True)
_activation("LeakyRelu", lambda node: nn.LeakyReLU(float(node.get("alpha", 0.01))), ("alpha",))
_activation("Elu", lambda node: nn.ELU(float(node.get("alpha", 1.0))), ("alpha",))
_activation("Selu", _selu, ("alpha", "gamma"))
_activation("Gelu", _gelu, ("approximate",))
_activation("Sigmoid", lambda _: nn.Sigmoid(), nonnegative=True)
_activation("Tanh", lambda _: nn.Tanh())
_activation("Softsign", lambda _: nn.Softsign())
_activation("HardSigmoid", _hard_sigmoid, ("alpha", "beta"), nonnegative=True)
_activation("HardSwish", lambda _: nn.Hardswish())
_activation("Abs", lambda _: lipnet.Abs(), nonnegative=True)


@_handles("Clip", attributes=("min", "max"))
def _clip(self: Importer, node: Node, x: Signal) -> Signal:
    """Between two numbers, or at zero from below."""
    low, high = (self.number(node, place, name) for place, name in ((1, "min"), (2, "max")))
    if low is None and high is None:
        return x
    if low == 0 and high is None:
        return self.call(node, nn.ReLU(), x, nonnegative=True)
    if low is None or high is None or not low < high:
        node.refuse(f"to [{low}, {high}] is not supported; two ends are needed, the first smaller", "min" if low is None else "max")
    return self.call(node, nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high), x, low >= 0)


# Pools and borders


@_handles("MaxPool", attributes=(*_WINDOW, "ceil_mode", "storage_order"))
def _max_pool(self: Importer, node: Node, x: Signal) -> Signal:
    """Unequal borders are written as zeros, which is the same for a signal that is nowhere negative."""
    if len(node.outputs) > 1 or node.get("storage_order", 0) != 0:
        node.refuse("positions as a second output are not supported", "storage_order" if len(node.outputs) < 2 else "")
    window = _window(node, x, node.get("kernel_shape", ()))
    ceil, auto = bool(node.get("ceil_mode", 0)), node.get("auto_pad", "NOTSET")
    if auto.startswith("SAME") and set(window.dilations) != {1}:
        node.refuse("programs do not agree on such a border with dilations", "auto_pad")
    if ceil and auto != "NOTSET" and any(whole != cut for whole, cut in window.outputs(x.shape[1:])):
        node.refuse(f"programs do not agree on the last window with auto_pad={auto}", "ceil_mode")
    if ceil:
        starts = zip(window.outputs(x.shape[1:]), window.strides, x.shape[1:], window.before, strict=True)
        if any(whole != cut and (cut - 1) * stride >= n + before for (whole, cut), stride, n, before in starts):
            node.refuse("a last window that begins beyond the image is dropped by some and kept by others", "ceil_mode")
        ceil = any(whole != cut for whole, cut in window.outputs(x.shape[1:]))
    padding = window.before
    if not window.symmetric:
        narrow = all(size < taps for side in (window.before, window.after) for size, taps in zip(side, window.taps, strict=True))
        if ceil or not x.nonnegative or not narrow or set(window.dilations) != {1}:
            node.refuse(
                "unequal pads are supported where the pool follows a ReLU, without ceil_mode and dilations", "pads" if "pads" in node.attributes else "auto_pad"
            )
        x, padding = self.bordered(node, x, window.before, window.after), (0,) * len(window.taps)
    kind: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[len(window.taps) - 1]
    return self.call(node, kind(window.taps, window.strides, padding, window.dilations, ceil_mode=ceil), x, x.nonnegative)


@_handles("AveragePool", attributes=(*_WINDOW, "ceil_mode", "count_include_pad"))
def _average_pool(self: Importer, node: Node, x: Signal) -> Signal:
    """Of whole windows only, where all agree what is divided by."""
    window = _window(node, x, node.get("kernel_shape", ()))
    if set(window.dilations) != {1}:
        node.refuse("torch has no such average", "dilations")
    if node.get("ceil_mode", 0) and any(whole != cut for whole, cut in window.outputs(x.shape[1:])):
        node.refuse("what a window that is cut off is divided by differs from program to program", "ceil_mode")
    counted, padding = bool(node.get("count_include_pad", 0)), window.before
    if not window.symmetric:
        if not counted:
            node.refuse("unequal pads that do not count are not supported", "pads" if "pads" in node.attributes else "auto_pad")
        x, padding = self.bordered(node, x, window.before, window.after), (0,) * len(window.taps)
    kind: Any = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[len(window.taps) - 1]
    return self.call(node, kind(window.taps, window.strides, padding, count_include_pad=counted), x, x.nonnegative)


@_handles("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(self: Importer, node: Node, x: Signal) -> Signal:
    axes = len(x.shape) - 1
    if axes not in (1, 2, 3) or x.batch is None:
        node.refuse(f"on a signal of shape {x.shape} it is not supported")
    if node.op == "GlobalMaxPool":
        largest: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
        return self.call(node, largest(x.shape[1:] if axes > 1 else x.shape[1]), x, x.nonnegative)
    mean: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1]
    return self.call(node, mean(1), x, x.nonnegative)


@_handles("Pad", attributes=("mode", "pads", "value"))
def _pad(self: Importer, node: Node, x: Signal) -> Signal:
    """A border of one number around each channel."""
    if node.get("mode", "constant") != "constant":
        node.refuse("only a constant border is supported", "mode")
    pads, axes = self.sizes(node, 1, "pads"), self.sizes(node, 3, "axes")
    axes = list(range(x.rank)) if axes is None else [axis % x.rank for axis in axes if -x.rank <= axis < x.rank]
    if pads is None or len(pads) != 2 * len(axes) or len(set(axes)) != len(axes):
        node.refuse("pads and axes do not fit", "pads")
    sides = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    first = x.rank - len(x.shape) + 1  # after batch and channels
    if any(any(sides.get(axis, (0, 0))) for axis in range(first)) or (any(pads) and len(x.shape) not in (2, 3, 4)):
        node.refuse(f"a border along the batch or the channels of {x.shape} is not supported", "pads")
    value = self.number(node, 2, "value") or 0.0
    if not math.isfinite(value):
        node.refuse("the border must be a finite number", "value")
    before, after = zip(*(sides.get(axis, (0, 0)) for axis in range(first, x.rank)), strict=True) if first < x.rank else ((), ())
    return self.bordered(node, x, before, after, value)


# Rearrangements


@_handles("Identity")
def _identity(self: Importer, node: Node, x: Signal) -> Signal:
    return x


@_handles("Dropout", attributes=("ratio", "seed"))
def _dropout(self: Importer, node: Node, x: Signal) -> Signal:
    """The identity, when not training."""
    if len(node.inputs) > 2 and node.inputs[2] and bool(self.constant(node, 2).any()):
        node.refuse("its input training_mode is true; export in eval mode")
    return x


@_handles("Cast", attributes=("to",))
def _cast(self: Importer, node: Node, x: Signal) -> Signal:
    if {1: torch.float32, 11: torch.float64}.get(node.get("to", 0)) != self.dtype:
        node.refuse(f"a signal must stay {self.dtype}", "to")
    return x


@_handles("Flatten", attributes=("axis",))
def _flatten(self: Importer, node: Node, x: Signal) -> Signal:
    axis = node.get("axis", 1)
    if not -x.rank <= axis <= x.rank:
        node.refuse(f"there are {x.rank} axes", "axis")
    at = axis + x.rank if axis < 0 else axis
    return self.rearranged(node, x, [(math.prod(x.full(trial)[:at]), math.prod(x.full(trial)[at:])) for trial in (0, 1)])


@_handles("Reshape", attributes=("allowzero",))
def _reshape(self: Importer, node: Node, x: Signal) -> Signal:
    target = self.values.get(node.inputs[1])
    if not isinstance(target, Known) or any(array.ndim != 1 for array in target.trials):
        node.refuse("its shape must be computed from constants and sizes")
    targets = []
    for trial, array in enumerate(target.trials):
        full, sizes = x.full(trial), [int(size) for size in array]
        if not node.get("allowzero", 0):
            sizes = [full[i] if size == 0 and i < len(full) else size for i, size in enumerate(sizes)]
        targets.append(sizes)
    return self.rearranged(node, x, targets)


@_handles("Squeeze", "Unsqueeze", attributes=("axes",))
def _squeeze(self: Importer, node: Node, x: Signal) -> Signal:
    axes = self.sizes(node, 1, "axes")
    if node.op == "Squeeze":
        axes = [i for i, size in enumerate(x.full(0)) if size == 1] if axes is None else [axis + x.rank if axis < 0 else axis for axis in axes]
        if any(not 0 <= axis < x.rank or x.full(0)[axis] != 1 for axis in axes):
            node.refuse(f"only axes of length 1 of {x.full(0)} can be left out", "axes")
        return self.rearranged(node, x, [[size for i, size in enumerate(x.full(trial)) if i not in axes] for trial in (0, 1)])
    rank = x.rank + len(axes or ())
    at = {axis + rank if axis < 0 else axis for axis in axes or ()}
    if len(at) != len(axes or ()) or any(not 0 <= axis < rank for axis in at):
        node.refuse(f"{axes} are no axes of a tensor with {rank}", "axes")
    targets = []
    for trial in (0, 1):
        sizes = iter(x.full(trial))
        targets.append([1 if i in at else next(sizes) for i in range(rank)])
    return self.rearranged(node, x, targets)


@_handles("Transpose", attributes=("perm",))
def _transpose(self: Importer, node: Node, x: Signal) -> Signal:
    order = [int(axis) for axis in node.get("perm", list(range(x.rank))[::-1])]
    if sorted(order) != list(range(x.rank)):
        node.refuse(f"it is no order of {x.rank} axes", "perm")
    if x.batch is not None and order[0] != 0:
        node.refuse("the batch must stay in front", "perm")
    moved = [axis - 1 for axis in order[1:]] if x.batch is not None else order
    shape = tuple(x.shape[axis] for axis in moved)
    long = [axis for axis in moved if x.shape[axis] > 1]
    if long == sorted(long):  # only axes of length 1 move
        return self.rearranged(node, x, [shape if x.batch is None else (x.batch[trial], *shape) for trial in (0, 1)])
    made = self.graph.call_method("permute", (x.node, 0, *(axis + 1 for axis in moved)))
    return Signal(made, shape, x.batch, x.nonnegative)


@_handles("Softmax", "LogSoftmax", attributes=("axis",))
def _softmax(self: Importer, node: Node, x: Signal) -> Signal:
    """Set aside: it keeps the order of the logits, and margins are of logits. `finish` and `read` see to it that it is the last node."""
    axis = node.get("axis", -1 if node.opset >= 13 else 1)
    if len(x.shape) != 1 or axis % x.rank != x.rank - 1 or x.shape == (1,):
        node.refuse(f"on a signal of shape {x.shape} it is not supported; along the classes, as the last node, it is", "axis")
    self.set_aside = node
    return x
