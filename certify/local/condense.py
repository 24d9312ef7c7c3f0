"""The program around one input, reduced to the gates that are not decided there.

On the region every decided gate is a line, so that with the outputs p of the others the program is affine: `z = center + G d + M p`, gate by gate. The
rows of G and M are gradients. With `|d|` and `|p|` bounded, what their rounding can change is at most `gamma_N` times the same program with
absolute values, N the number of products in the longest sum (Higham 2002, section 3.1; a gradient is a product of the same matrices from the other side).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from certify.errors import CertifyError
from certify.local.alpha import tightened
from certify.local.crown import upper_bounds
from certify.local.directed import downward, upward
from certify.local.layer import Layer, image, intercept_of, joined, slopes, undecided
from certify.local.program import Affine, Gate, Program
from certify.local.region import Region
from certify.local.sdpcrown import Ellipsoid
from sdp.activation import RELU
from sdp.proof import gamma

_TINY = 2.0**-500  # above all that underflow can change: 2^-1074 by operation, of 2^30, times the square of _GROWTH and _REACH
_GROWTH = 2.0**200
_REACH = 2.0**100
_CHUNK = 2**17  # numbers of a value in one batch of gradients: they stay in the cache of the processor
_ROWS = 64  # of gradients in the smallest batch, so that weights are not read too often


@dataclasses.dataclass(frozen=True, eq=False)
class Condensed:
    """`y = center + J0 d + V p` for rows C of the output, and the layers of gates; `slack_gates` and `slack_inputs` bound what rounding adds to gradients."""

    region: Region
    layers: tuple[Layer, ...]
    center: Tensor  # (rows,) C y at the center with p = 0
    slack: Tensor  # (rows,)
    inputs: Tensor  # (rows, inputs): J0
    gates: Tensor  # (rows, gates): V
    slack_gates: Tensor  # (rows, gates) of the gradient to each p
    slack_inputs: Tensor  # (rows, inputs) of the gradient to the input
    total: int  # gates of the program, decided or not
    rounding: Callable[[Tensor], tuple[Tensor, Tensor]] = dataclasses.field(
        repr=False
    )  # (rows, gates), at least the gradients to all z -> what `slack_gates` and `slack_inputs` may then be

    def with_gradients(self, largest: Tensor) -> Condensed:  # (rows, gates)
        """The same with less slack, for `largest` at least the gradients to all z, in place of those of the program with absolute values.

        Where each gate adds to a sum from which it takes away again (MaxMin, GroupSort) those grow threefold from gate to gate, and the gradients do not.
        """
        gates, inputs = self.rounding(largest)
        return dataclasses.replace(self, slack_gates=torch.fmin(self.slack_gates, gates), slack_inputs=torch.fmin(self.slack_inputs, inputs))

    def along(self, free: Tensor) -> Condensed:  # (inputs,) of 0 and 1
        """The same with Jacobians of changes of some entries, where no other entry of an input of the region changes: `d` is 0 there."""
        layers = tuple(dataclasses.replace(layer, inputs=layer.inputs * free) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, inputs=self.inputs * free, slack_inputs=self.slack_inputs * free)

    @property
    def undecided(self) -> int:
        """How many gates are left."""
        return sum(layer.count for layer in self.layers)

    def with_ranges(self, low: Tensor, high: Tensor) -> list[Layer]:  # (nodes, gates) each
        """The layers with the ranges of some nodes in place of those of the region."""
        counts = [layer.count for layer in self.layers]
        ranges = zip(self.layers, low.split(counts, dim=1), high.split(counts, dim=1), strict=True)
        return [dataclasses.replace(layer, low=least, high=most) for layer, least, most in ranges]

    def gradients(self, slopes: Tensor, rows: Tensor | int) -> Tensor:  # (n, gates) -> (n, inputs)
        """About the gradients of n rows, or of one row n times, where the gates have these slopes."""
        to_gates, stop = self.gates[rows].expand(slopes.shape), slopes.shape[1]
        to_inputs = self.inputs[rows].expand(len(slopes), -1)
        for layer in reversed(self.layers):
            start = stop - layer.count
            p = slopes[:, start:stop] * to_gates[:, start:stop]
            to_gates, to_inputs, stop = to_gates[:, :start] + p @ layer.earlier, to_inputs + p @ layer.inputs, start
        return to_inputs


class TooManyGates(CertifyError):
    """A region leaves more gates undecided than can be kept, or than were allowed."""


@torch.no_grad()
def condense(
    program: Program,
    region: Region,
    rows: Tensor,  # (rows, outputs)
    *,
    limit: int = 2**31,
    until: float = math.inf,
    steps: int = 0,
    most: float = math.inf,
) -> Condensed:
    """The program on a region, seen from some rows of its output; with `steps` of `certify.local.alpha`, ranges of gates are smaller.

    Raises TooManyGates where more numbers than `limit` would be needed or more gates than `most` are undecided, CertifyError where float64 has no room, and
    TimeoutError at a time of time.monotonic.
    """
    _check_scale(program, region, rows)
    if len(rows) * len(region.center) > limit:
        raise CertifyError(f"{len(rows):,} rows of {len(region.center):,} inputs need more memory than allowed; ask for fewer rows, such as with pairs=False")
    return _Sweep(program, region, limit, until, steps, most).run(rows)


def _check_scale(program: Program, region: Region, *rows: Tensor) -> None:
    """Refuse numbers so large that overflow, or what underflow loses, could matter."""
    largest = max(program.largest_constant, *(float(part.abs().max()) if part.numel() else 0.0 for part in (region.center, region.reach, *rows)))
    if not (program.growth <= _GROWTH and largest <= _REACH):
        raise CertifyError(
            f"float64 cannot follow this network here: the absolute values of its weights multiply a change by up to {program.growth:.1e}, and its inputs and "
            f"biases reach {largest:.1e}; at most {_GROWTH:.1e} and {_REACH:.1e} can be bounded; rescale the weights, or take a smaller region"
        )


@torch.no_grad()
def output_range(program: Program, region: Region) -> tuple[Tensor, Tensor]:  # (outputs,) each
    """Bounds of every output on a region, step by step (interval arithmetic): loose, but for the smallest regions."""
    _check_scale(program, region)
    sweep = _Sweep(program, region)
    output = program.follow(sweep.start(), sweep.affine, _bent)
    return output.low.flatten(), output.high.flatten()


@torch.no_grad()
def gate_ranges(program: Program, region: Region, rows: Tensor) -> list[tuple[Gate, Tensor, Tensor]]:
    """Each gate and bounds of its inputs on a region, by intervals."""
    _check_scale(program, region, rows)
    sweep, found = _Sweep(program, region), []

    def bent(gate: Gate, signal: _Signal) -> _Signal:
        found.append((gate, signal.low.flatten(), signal.high.flatten()))
        return _bent(gate, signal)

    program.follow(sweep.start(), sweep.affine, bent)
    return found


def _bent(gate: Gate, signal: _Signal) -> _Signal:
    """A gate by the range of its values alone."""
    low, high = (end.reshape(signal.low.shape) for end in image(gate, signal.low.flatten(), signal.high.flatten()))
    return _Signal(low, low, high, signal.size)


@dataclasses.dataclass(frozen=True, eq=False)
class _Signal:
    """A value of the program: as an affine function of the inputs and the cut gates, its range, and the size of all its terms."""

    value: Tensor
    low: Tensor
    high: Tensor
    size: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Bend:
    """What a gate does to gradients."""

    slope: Tensor  # 0 where it is cut
    steepest: Tensor  # the largest |slope|, everywhere
    cut: Tensor  # its entries that are
    gates: slice  # and their place among all gates that are cut


class _Sweep:
    """One pass through the program; gates are decided, or cut, as it goes."""

    def __init__(self, program: Program, region: Region, limit: int = 0, until: float = math.inf, steps: int = 0, most: float = math.inf) -> None:
        self.program, self.region, self.limit, self.until, self.steps, self.most = program, region, limit, until, steps, most
        self.layers: list[Layer] = []
        self.apart: list[Layer] = []  # the same without ellipsoids: what gates one by one decide needs no more
        self.gates = 0  # that are cut
        self.bends: dict[Gate, _Bend] = {}
        self.products = 1
        self.total = 0

    def run(self, rows: Tensor) -> Condensed:
        return self.outputs(self.program.follow(self.start(), self.affine, self.gate), rows)

    def start(self) -> _Signal:
        """The input."""
        shape = (1, *self.program.input_shape)
        low, high = (self.region.center + end for end in (self.region.low, self.region.high))
        return _Signal(
            self.region.center.reshape(shape),
            downward(low).reshape(shape),
            upward(high).reshape(shape),
            (self.region.center.abs() + self.region.reach).reshape(shape),
        )

    def affine(self, step: Affine, inputs: Sequence[_Signal]) -> _Signal:
        """The affine step in each of the three: rounding is at most `gamma` times the sum of the absolute values of all terms."""
        self.products += step.terms + len(inputs) + 2
        value = step.apply(*(signal.value for signal in inputs))
        middle = [(signal.low + signal.high) / 2 for signal in inputs]
        half = [(signal.high - signal.low) / 2 for signal in inputs]
        size, reach = (step.size(*parts) for parts in ([s.size for s in inputs], [m.abs() + h for m, h in zip(middle, half, strict=True)]))
        center, width = step.apply(*middle), step.size(*half)
        if step.constant is not None:
            size, reach = size + step.constant, reach + step.constant
        room = 2 * gamma(step.terms + 12) * reach + _TINY
        return _Signal(value, center - width - room, center + width + room, size)

    def gate(self, gate: Gate, signal: _Signal) -> _Signal:
        """Decide what the range decides, sharpen the range of the rest, and cut what is still undecided."""
        low, high = signal.low.flatten().clone(), signal.high.flatten().clone()
        self.total += len(low)
        index = torch.nonzero(undecided(gate, low, high)).flatten()
        layers, silent = [], index[:0]
        for part in index.split(self.batch):
            found = self.sharpened(gate, signal, part, low, high)
            nothing = _silent(found)
            layers.append(found.part(torch.nonzero(~nothing).flatten()))
            silent = torch.cat([silent, found.index[nothing]])
            self.admit(self.gates + sum(layer.count for layer in layers))
        layer = joined(layers)
        least, most = slopes(gate, low, high)
        slope, intercept = torch.where(least == most, least, 0.0), intercept_of(gate, low, high)
        image_low, image_high = image(gate, low, high)
        size = slope.abs() * signal.size.flatten() + intercept.abs()
        size[silent] = signal.size.flatten()[silent]  # relu of what is 0 but for rounding: its error is no more than that of its input
        self.products += 4
        value = signal.value.flatten() * slope + intercept
        cut, first = torch.zeros(0, dtype=torch.long), self.gates
        if layer.count:
            layer = dataclasses.replace(layer, ellipsoid=Ellipsoid.of(self.layers, layer, self.region))
            self.apart.append(layer if layer.ellipsoid is None else dataclasses.replace(layer, ellipsoid=None))
            self.layers.append(layer)
            self.gates += layer.count
            cut = layer.index
            value[cut] = 0.0
            size[cut] = torch.maximum(image_low[cut].abs(), image_high[cut].abs())
        self.bends[gate] = _Bend(slope.index_fill(0, cut, 0.0), torch.maximum(least.abs(), most.abs()), cut, slice(first, self.gates))
        shape = signal.value.shape
        return _Signal(value.reshape(shape), image_low.reshape(shape), image_high.reshape(shape), size.reshape(shape))

    def admit(self, gates: int) -> None:
        """Refuse more undecided gates than can be kept, or than were asked for, as soon as so many are seen."""
        if gates * (self.program.inputs + gates) > self.limit:
            raise TooManyGates(f"at least {gates:,} undecided gates on this region need more memory than allowed; take a smaller region")
        if gates > self.most:
            raise TooManyGates(f"at least {gates:,} gates are undecided on this region, and {self.most:,} at most were asked for; take a smaller region")

    def sharpened(self, gate: Gate, signal: _Signal, index: Tensor, low: Tensor, high: Tensor) -> Layer:
        """Sharpen the ranges of some entries of a gate's input by linear relaxations of the gates before them (CROWN); those that are still undecided."""
        center, size = signal.value.flatten()[index], signal.size.flatten()[index]
        inputs, earlier = self.gradients(gate.input, torch.zeros(len(index), len(low), dtype=torch.float64).scatter_(1, index[:, None], 1.0))
        slack = 2 * gamma(self.products) * size + _TINY
        layer = Layer(gate, index, center, slack, inputs, earlier, size, low[index], high[index])
        bound = functools.partial(upper_bounds, self.apart, self.region)
        layer = _below(layer, bound(layer.center, layer.inputs, layer.earlier, size=layer.size))
        high[index] = layer.high
        if gate.activation == RELU:  # one that is shut needs no bound from below
            layer = layer.part(torch.nonzero(~(layer.high <= 0)).flatten())
        layer = _above(layer, bound(-layer.center, -layer.inputs, -layer.earlier, size=layer.size))
        low[layer.index] = layer.low
        layer = layer.part(torch.nonzero(undecided(gate, layer.low, layer.high)).flatten())
        ways = [self.apart] * (self.steps > 0) + [self.layers] * any(before.ellipsoid is not None for before in self.layers)  # neither is always the sharper
        for layers in ways:
            if not (layers and layer.count):
                break
            center, inputs, earlier = (torch.cat([rows, -rows]) for rows in (layer.center, layer.inputs, layer.earlier))
            top = tightened(layers, self.region, center, inputs, earlier, self.steps)
            layer = _above(_below(layer, top[: layer.count]), top[layer.count :])
            low[layer.index], high[layer.index] = layer.low, layer.high
            layer = layer.part(torch.nonzero(undecided(gate, layer.low, layer.high)).flatten())
        return layer

    def gradients(self, value: int, rows: Tensor) -> tuple[Tensor, Tensor]:  # (n, entries) -> (n, inputs), (n, gates)
        """`rows @ d value / d .` to the input and to the cut gates."""
        if time.monotonic() > self.until:
            raise TimeoutError("the ball leaves so many gates undecided that there is no time for their gradients")
        to_gates = torch.zeros(len(rows), self.gates, dtype=torch.float64)

        def bent(gate: Gate, found: Tensor) -> Tensor:
            bend = self.bends[gate]
            to_gates[:, bend.gates] = found[:, bend.cut]
            return found * bend.slope

        return self.program.back(value, rows, bent), to_gates

    @property
    def batch(self) -> int:
        """So many rows of gradients at once that what is computed of them stays small."""
        return max(_ROWS, _CHUNK // self.program.widest)

    def outputs(self, signal: _Signal, rows: Tensor) -> Condensed:
        """The rows of the output, and what rounding can add to each gradient."""
        y = signal.value.flatten()
        inputs, gates = (torch.cat(parts) for parts in zip(*(self.gradients(self.program.output, part) for part in rows.split(self.batch)), strict=True))
        room = 2 * gamma(self.products + len(y) + 4)
        slack_gates, slack_inputs = self.slack(rows, room)
        return Condensed(
            region=self.region,
            layers=tuple(self.layers),
            center=rows @ y,
            slack=room * (rows.abs() @ signal.size.flatten()) + _TINY,
            inputs=inputs,
            gates=gates,
            slack_gates=slack_gates,
            slack_inputs=slack_inputs,
            total=self.total,
            rounding=functools.partial(self.slack, rows, room),
        )

    def slack(self, rows: Tensor, room: float, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`room` times the gradients of the program with absolute values, in which every gate has the largest slope that it can have here.

        With `largest`, (rows, gates), at least the gradients to all z, they start from these and from the outputs, and end at the next undecided gate.
        """
        batches = [slice(start, start + self.batch) for start in range(0, max(1, len(rows)), self.batch)]
        parts = [self.steepest(rows[batch], None if largest is None else largest[batch]) for batch in batches]
        gates, inputs = (room * torch.cat(columns) + _TINY for columns in zip(*parts, strict=True))
        return gates, inputs

    def steepest(self, rows: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:  # (rows, gates), (rows, inputs)
        """The gradients of the program with absolute values, from the outputs, and from `given` at the cut gates where it is there."""
        to_gates = torch.zeros(len(rows), self.gates, dtype=torch.float64)

        def steep(gate: Gate, found: Tensor) -> Tensor:
            bend = self.bends[gate]
            to_gates[:, bend.gates] = found[:, bend.cut]
            before = found * bend.steepest
            return before if given is None else before.index_copy_(1, bend.cut, given[:, bend.gates])

        return to_gates, self.program.back(self.program.output, rows.abs(), steep, absolute=True)


def _below(layer: Layer, top: Tensor) -> Layer:
    """With bounds from above; where sums overflow they say nothing."""
    return dataclasses.replace(layer, high=torch.fmin(layer.high, upward(top + layer.slack)))


def _above(layer: Layer, top: Tensor) -> Layer:
    """With bounds of the negatives from above."""
    return dataclasses.replace(layer, low=torch.fmax(layer.low, downward(-top - layer.slack)))


def _silent(layer: Layer) -> Tensor:
    """The ReLUs of what is computed as the constant 0, such as a tie of two that are shut: nothing but rounding, and so are their gradients."""
    nothing = (layer.center == 0) & (layer.gate.activation == RELU)
    some = torch.nonzero(nothing).flatten()
    nothing[some] = ~layer.inputs[some].any(dim=1) & ~layer.earlier[some].any(dim=1)
    return nothing
