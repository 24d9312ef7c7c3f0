"""Convolutions and transposed ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from certify.models.operators.importer import Importer, Node, Signal, handles
from certify.models.operators.windows import WINDOW, window_of


@handles("Conv", attributes=(*WINDOW, "group"))
def _conv(importer: Importer, node: Node, x: Signal) -> Signal:
    weight = importer.weight(node, 1)
    window = window_of(node, x, weight.shape[2:])
    group = _groups(node, x.shape[0], weight.shape[0], x.shape[0] == weight.shape[1] * node.get("group", 1))
    if not window.symmetric:
        x = importer.bordered(node, x, window.before, window.after)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(window.taps) - 1]
    padding = window.before if window.symmetric else 0
    bias = len(node.inputs) > 2 and bool(node.inputs[2])
    layer = kind(x.shape[0], weight.shape[0], window.taps, window.strides, padding, window.dilations, group, bias, device="meta")
    return importer.call(node, _filled(importer, node, layer, weight), x)


@handles("ConvTranspose", attributes=(*WINDOW, "group", "output_padding"))
def _conv_transpose(importer: Importer, node: Node, x: Signal) -> Signal:
    weight = importer.weight(node, 1)
    window = window_of(node, x, weight.shape[2:])
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
    return importer.call(node, _filled(importer, node, layer, weight), x)


def _groups(node: Node, into: int, out: int, fits: bool) -> int:
    group = int(node.get("group", 1))
    if group < 1 or into % group or out % group or not fits:
        node.refuse(f"the weights do not fit {into} channels in {group} groups", "group")
    return group


def _filled(importer: Importer, node: Node, layer: nn.Module, weight: Tensor) -> nn.Module:
    """A convolution with the weights of the file, bit for bit."""
    layer.weight = nn.Parameter(weight)
    if layer.bias is not None:
        bias = importer.weight(node, 2, 1)
        if bias.shape != layer.bias.shape:
            node.refuse(f"its bias has the shape {tuple(bias.shape)}")
        layer.bias = nn.Parameter(bias)
    return layer
