"""Pools and borders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from certify.models.operators.importer import Importer, Node, Signal, handles
from certify.models.operators.windows import WINDOW, window_of


@handles("MaxPool", attributes=(*WINDOW, "ceil_mode", "storage_order"))
def _max_pool(importer: Importer, node: Node, x: Signal) -> Signal:
    """Unequal borders are written as zeros, which is the same for a signal that is nowhere negative."""
    if any(node.outputs[1:]) or node.get("storage_order", 0) != 0:
        node.refuse("positions as a second output are not supported", "" if any(node.outputs[1:]) else "storage_order")
    window = window_of(node, x, node.get("kernel_shape", ()))
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
        x, padding = importer.bordered(node, x, window.before, window.after), (0,) * len(window.taps)
    kind: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[len(window.taps) - 1]
    return importer.call(node, kind(window.taps, window.strides, padding, window.dilations, ceil_mode=ceil), x, x.nonnegative)


@handles("AveragePool", attributes=(*WINDOW, "ceil_mode", "count_include_pad"))
def _average_pool(importer: Importer, node: Node, x: Signal) -> Signal:
    """Of whole windows only, where all agree what is divided by."""
    window = window_of(node, x, node.get("kernel_shape", ()))
    if set(window.dilations) != {1}:
        node.refuse("torch has no such average", "dilations")
    if node.get("ceil_mode", 0) and any(whole != cut for whole, cut in window.outputs(x.shape[1:])):
        node.refuse("what a window that is cut off is divided by differs from program to program", "ceil_mode")
    counted, padding = bool(node.get("count_include_pad", 0)), window.before
    if not window.symmetric:
        if not counted:
            node.refuse("unequal pads that do not count are not supported", "pads" if "pads" in node.attributes else "auto_pad")
        x, padding = importer.bordered(node, x, window.before, window.after), (0,) * len(window.taps)
    kind: Any = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[len(window.taps) - 1]
    return importer.call(node, kind(window.taps, window.strides, padding, count_include_pad=counted), x, x.nonnegative)


@handles("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(importer: Importer, node: Node, x: Signal) -> Signal:
    axes = len(x.shape) - 1
    if axes not in (1, 2, 3) or x.batch is None:
        node.refuse(f"on a signal of shape {x.shape} it is not supported")
    if node.op == "GlobalMaxPool":
        largest: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
        return importer.call(node, largest(x.shape[1:] if axes > 1 else x.shape[1]), x, x.nonnegative)
    mean: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1]
    return importer.call(node, mean(1), x, x.nonnegative)


_BORDERS: dict[str, Sequence[type[nn.Module]]] = {
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "edge": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "wrap": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


@handles("Pad", attributes=("mode", "pads", "value"))
def _pad(importer: Importer, node: Node, x: Signal) -> Signal:
    """A border around each channel: of one number, or of the channel's own."""
    mode = node.get("mode", "constant")
    if mode != "constant" and mode not in _BORDERS:
        node.refuse(f"known are constant, {', '.join(_BORDERS)}", "mode")
    pads, axes = importer.sizes(node, 1, "pads"), importer.sizes(node, 3, "axes")
    axes = list(range(x.rank)) if axes is None else [axis % x.rank for axis in axes if -x.rank <= axis < x.rank]
    if pads is None or len(pads) != 2 * len(axes) or len(set(axes)) != len(axes):
        node.refuse("pads and axes do not fit", "pads")
    sides = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    first = x.rank - len(x.shape) + 1  # after batch and channels
    if any(any(sides.get(axis, (0, 0))) for axis in range(first)) or (any(pads) and len(x.shape) not in (2, 3, 4)):
        node.refuse(f"a border along the batch or the channels of {x.shape} is not supported", "pads")
    value = importer.number(node, 2, "value") or 0.0
    if not math.isfinite(value):
        node.refuse("the border must be a finite number", "value")
    before, after = zip(*(sides.get(axis, (0, 0)) for axis in range(first, x.rank)), strict=True) if first < x.rank else ((), ())
    return importer.bordered(node, x, before, after, _BORDERS.get(mode, value))
