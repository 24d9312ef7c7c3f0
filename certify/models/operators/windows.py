"""The window that convolutions and pools move over their input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from certify.models.operators.importer import WIDEST, Node, Signal
from certify.registry import Shape


@dataclasses.dataclass(frozen=True)
class Window:
    """Its sizes along each axis, and the border that it is moved over."""

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


WINDOW = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


def window_of(node: Node, x: Signal, taps: Sequence[int]) -> Window:
    """Kernel, stride, dilation and padding, with `auto_pad` as numbers."""
    axes = len(taps)
    if axes not in (1, 2, 3) or len(x.shape) != axes + 1 or x.batch is None:
        node.refuse(f"a window of {list(taps)} on a signal of shape {x.shape} is not supported")
    if tuple(node.get("kernel_shape", taps)) != tuple(taps):
        node.refuse(f"the weights are of {list(taps)}", "kernel_shape")
    strides, dilations = ([int(size) for size in node.get(name, [1] * axes)] for name in ("strides", "dilations"))
    pads, auto = [int(size) for size in node.get("pads", [0] * 2 * axes)], node.get("auto_pad", "NOTSET")
    for name, sizes, count in (("strides", strides, axes), ("dilations", dilations, axes), ("pads", pads, 2 * axes), ("kernel_shape", taps, axes)):
        if len(sizes) != count or not all((0 if name == "pads" else 1) <= size <= WIDEST for size in sizes):
            node.refuse(f"{count} sizes from {0 if name == 'pads' else 1} to {WIDEST} are supported", name)
    if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        node.refuse("this value is not on the list", "auto_pad")
    if auto != "NOTSET" and any(pads):
        node.refuse(f"pads={pads} and auto_pad cannot both be given", "auto_pad")
    before, after = pads[:axes], pads[axes:]
    if auto.startswith("SAME"):
        totals = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, s, d, k in zip(x.shape[1:], strides, dilations, taps, strict=True)]
        less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
        before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
    return Window(tuple(taps), tuple(strides), tuple(dilations), tuple(before), tuple(after))
