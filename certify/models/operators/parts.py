"""Parts of signals, signals put side by side, and means and sums along axes."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import nn

from certify.models.operators.importer import Importer, Node, Signal, handles


@handles("Concat", attributes=("axis",))
def _concat(importer: Importer, node: Node, x: Signal) -> Signal:
    """Signals side by side."""
    parts = [part for part in (importer.values.get(name) for name in node.inputs) if isinstance(part, Signal)]
    at = importer.axis(node, x, node.get("axis", 0), "axis")
    others = {(part.batch, part.shape[: at - 1], part.shape[at:]) for part in parts}
    if len(parts) != len(node.inputs) or len(others) != 1:
        node.refuse("its inputs must be signals with the same lengths along the other axes, and none of them a constant", "axis")
    length = sum(part.shape[at - 1] for part in parts)
    made = importer.graph.call_function(torch.cat, (tuple(part.node for part in parts), at))
    return importer.signal(node, made, _with(x, at, length), x.batch, all(part.nonnegative for part in parts))


@handles("Slice", attributes=("starts", "ends", "axes"))
def _slice(importer: Importer, node: Node, x: Signal) -> Signal:
    """Every so many entries between two, along some axes."""
    starts, ends, axes, steps = (importer.sizes(node, i + 1, name) for i, name in enumerate(("starts", "ends", "axes", "steps")))
    if starts is None or ends is None:
        node.refuse("it needs constants to start and to end at", "starts")
    axes, steps = list(range(len(starts))) if axes is None else axes, [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or len({axis % x.rank for axis in axes}) != len(axes):
        node.refuse("starts, ends, axes and steps do not fit", "axes")
    if not all(step > 0 for step in steps):
        node.refuse(f"steps of {steps} are not supported; they must be positive")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if x.batch is not None and axis in (0, -x.rank) and all(slice(start, end, step).indices(length) == (0, length, 1) for length in x.batch):
            continue  # the whole batch
        at = importer.axis(node, x, axis, "axes")
        x = _part(importer, node, x, at, range(x.shape[at - 1])[start:end:step])
    return x


@handles("Split", attributes=("axis", "split", "num_outputs"))
def _split(importer: Importer, node: Node, x: Signal) -> tuple[Signal, ...]:
    """One part after the other: of the lengths that are given, or of one length, the last of which may be cut where their number is given."""
    if not all(node.outputs):  # which ends onnxruntime, and all that runs with it
        node.refuse("each of its outputs needs a name")
    at = importer.axis(node, x, node.get("axis", 0), "axis")
    length, count = x.shape[at - 1], node.get("num_outputs", len(node.outputs))
    sizes = importer.sizes(node, 1, "split")
    if sizes is None:
        if count != len(node.outputs) or (length % count and "num_outputs" not in node.attributes):
            node.refuse(f"{length} entries do not make {len(node.outputs)} equal parts", "num_outputs")
        most = -(-length // count)
        sizes = [max(0, min(most, length - i * most)) for i in range(count)]
    elif "num_outputs" in node.attributes:
        node.refuse("it cannot be given beside the lengths", "num_outputs")
    if len(sizes) != len(node.outputs) or min(sizes) < 1 or sum(sizes) != length:
        node.refuse(f"parts of {sizes} are no {len(node.outputs)} parts of {length} entries", "split")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(_part(importer, node, x, at, range(end - size, end)) for size, end in zip(sizes, ends, strict=True))


@handles("Gather", attributes=("axis",))
def _gather(importer: Importer, node: Node, x: Signal) -> Signal:
    """Entries at constant places along one axis; a single place leaves the axis out."""
    at, places = importer.axis(node, x, node.get("axis", 0), "axis"), importer.whole(node, 1)
    length = x.shape[at - 1]
    if places.ndim > 1 or places.size == 0 or not all(-length <= int(place) < length for place in places.ravel()):
        node.refuse(f"it takes one place or a list of places among {length}, not {places.tolist() if places.size < 10 else places.shape}")
    wanted = [int(place) % length for place in places.ravel()]
    if places.ndim == 0:
        made = importer.graph.call_function(operator.getitem, (x.node, (*[slice(None)] * at, wanted[0])))
        return importer.signal(node, made, (*x.shape[: at - 1], *x.shape[at:]), x.batch, x.nonnegative)
    steps = {b - a for a, b in itertools.pairwise(wanted)} or {1}
    if len(steps) == 1 and min(steps) > 0:
        return _part(importer, node, x, at, range(wanted[0], wanted[-1] + 1, min(steps)))
    made = importer.graph.call_function(torch.index_select, (x.node, at, importer.stored(torch.tensor(wanted))))
    return importer.signal(node, made, _with(x, at, len(wanted)), x.batch, x.nonnegative)


def _part(importer: Importer, node: Node, x: Signal, at: int, places: range) -> Signal:
    if places == range(x.shape[at - 1]):
        return x
    cut = slice(places[0], places[-1] + 1, places.step if places.step > 1 and len(places) > 1 else None) if places else slice(0, 0)
    made = importer.graph.call_function(operator.getitem, (x.node, (*[slice(None)] * at, cut)))
    return importer.signal(node, made, _with(x, at, len(places)), x.batch, x.nonnegative)


def _with(x: Signal, at: int, length: int) -> tuple[int, ...]:
    """The shape with another length along one of torch's axes."""
    return (*x.shape[: at - 1], length, *x.shape[at:])


@handles("ReduceMean", "ReduceSum", attributes=("axes", "keepdims", "noop_with_empty_axes"))
def _reduce(importer: Importer, node: Node, x: Signal) -> Signal:
    """A mean or a sum along axes; the mean of whole channels as the pool that it is."""
    axes = importer.sizes(node, 1, "axes")
    if not axes and node.get("noop_with_empty_axes", 0):
        return x
    dims = sorted(importer.axis(node, x, axis, "axes") for axis in axes or range(x.rank))
    if len(set(dims)) != len(dims):
        node.refuse("an axis is given twice", "axes")
    keep = bool(node.get("keepdims", 1))
    shape = tuple(1 if axis in dims else size for axis, size in enumerate(x.shape, 1) if keep or axis not in dims)
    if node.op == "ReduceMean" and dims == list(range(2, len(x.shape) + 1)) and len(dims) in (1, 2, 3):
        mean: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(dims) - 1]
        pooled = importer.call(node, mean(1), x, x.nonnegative)
        return pooled if keep else importer.rearranged(node, pooled, [pooled.full(trial)[: pooled.rank - len(dims)] for trial in (0, 1)])
    made = importer.graph.call_method("mean" if node.op == "ReduceMean" else "sum", (x.node, tuple(dims)), {"keepdim": True} if keep else {})
    return importer.signal(node, made, shape, x.batch, x.nonnegative)
