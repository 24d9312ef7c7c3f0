"""What rearranges the entries of each input, or leaves them as they are."""

from __future__ import annotations

import math

import torch

from certify.models.operators.importer import Importer, Known, Node, Signal, handles


@handles("Identity")
def _identity(importer: Importer, node: Node, x: Signal) -> Signal:
    return x


@handles("Dropout", attributes=("ratio", "seed"))
def _dropout(importer: Importer, node: Node, x: Signal) -> Signal:
    """The identity, when not training."""
    if len(node.inputs) > 2 and node.inputs[2] and bool(importer.constant(node, 2).any()):
        node.refuse("its input training_mode is true; export in eval mode")
    return x


@handles("Cast", attributes=("to",))
def _cast(importer: Importer, node: Node, x: Signal) -> Signal:
    if {1: torch.float32, 11: torch.float64}.get(node.get("to", 0)) != importer.dtype:
        node.refuse(f"a signal must stay {importer.dtype}", "to")
    return x


@handles("Flatten", attributes=("axis",))
def _flatten(importer: Importer, node: Node, x: Signal) -> Signal:
    axis = node.get("axis", 1)
    if not -x.rank <= axis <= x.rank:
        node.refuse(f"there are {x.rank} axes", "axis")
    at = axis + x.rank if axis < 0 else axis
    return importer.rearranged(node, x, [(math.prod(x.full(trial)[:at]), math.prod(x.full(trial)[at:])) for trial in (0, 1)])


@handles("Reshape", attributes=("allowzero",))
def _reshape(importer: Importer, node: Node, x: Signal) -> Signal:
    target = importer.values.get(node.inputs[1])
    if not isinstance(target, Known) or any(array.ndim != 1 or array.dtype.kind not in "iu" for array in target.trials):
        node.refuse("its shape must be computed from constants and sizes, in whole numbers")
    targets = []
    for trial, array in enumerate(target.trials):
        full, sizes = x.full(trial), [int(size) for size in array]
        if not node.get("allowzero", 0):
            sizes = [full[i] if size == 0 and i < len(full) else size for i, size in enumerate(sizes)]
        targets.append(sizes)
    return importer.rearranged(node, x, targets)


@handles("Squeeze", "Unsqueeze", attributes=("axes",))
def _squeeze(importer: Importer, node: Node, x: Signal) -> Signal:
    axes = importer.sizes(node, 1, "axes")
    if node.op == "Squeeze":
        axes = [i for i, size in enumerate(x.full(0)) if size == 1] if axes is None else [axis + x.rank if axis < 0 else axis for axis in axes]
        if any(not 0 <= axis < x.rank or x.full(0)[axis] != 1 for axis in axes):
            node.refuse(f"only axes of length 1 of {x.full(0)} can be left out", "axes")
        return importer.rearranged(node, x, [[size for i, size in enumerate(x.full(trial)) if i not in axes] for trial in (0, 1)])
    rank = x.rank + len(axes or ())
    at = {axis + rank if axis < 0 else axis for axis in axes or ()}
    if len(at) != len(axes or ()) or any(not 0 <= axis < rank for axis in at):
        node.refuse(f"{axes} are no axes of a tensor with {rank}", "axes")
    targets = []
    for trial in (0, 1):
        sizes = iter(x.full(trial))
        targets.append([1 if i in at else next(sizes) for i in range(rank)])
    return importer.rearranged(node, x, targets)


@handles("Transpose", attributes=("perm",))
def _transpose(importer: Importer, node: Node, x: Signal) -> Signal:
    order = [int(axis) for axis in node.get("perm", list(range(x.rank))[::-1])]
    if sorted(order) != list(range(x.rank)):
        node.refuse(f"it is no order of {x.rank} axes", "perm")
    if x.batch is not None and order[0] != 0:
        node.refuse("the batch must stay in front", "perm")
    moved = [axis - 1 for axis in order[1:]] if x.batch is not None else order
    shape = tuple(x.shape[axis] for axis in moved)
    long = [axis for axis in moved if x.shape[axis] > 1]
    if long == sorted(long):  # only axes of length 1 move
        return importer.rearranged(node, x, [shape if x.batch is None else (x.batch[trial], *shape) for trial in (0, 1)])
    made = importer.graph.call_method("permute", (x.node, 0, *(axis + 1 for axis in moved)))
    return importer.signal(node, made, shape, x.batch, x.nonnegative)
