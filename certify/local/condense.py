"""The program around one input, reduced to the gates that are not decided there.

On the region every decided gate is a line, so that with the outputs p of the others the program is affine: `z = center + G d + M p`, gate by gate. The
rows of G and M are gradients by autograd. With `|d|` and `|p|` bounded, what their rounding can change is at most `gamma_N` times the same program with
absolute values, N the number of products in the longest sum (Higham 2002, section 3.1; a gradient is a product of the same matrices from the other side).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from certify.errors import CertifyError
from certify.local.alpha import tightened
from certify.local.crown import upper_bounds
from certify.local.directed import downward, upward
from certify.local.program import Affine, Gate, Program
from certify.local.region import Region
from certify.local.relax import Lines, of_gate
from certify.local.sdpcrown import Ellipsoid
from sdp.activation import RELU
from sdp.proof import gamma

_TINY = 2.0**-500  # above all that underflow can change: 2^-1074 by operation, of 2^30, times the square of _GROWTH and _REACH
_GROWTH = 2.0**200
_REACH = 2.0**100
_CHUNK = 2**22  # numbers in the rows of one batch of gradients


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The undecided gates of one step: `z = center + G d + M p +- slack`, with p the outputs of all undecided gates before them."""

    gate: Gate
    index: Tensor  # (n,) which entries of the gate's input
    center: Tensor  # (n,)
    slack: Tensor  # (n,)
    inputs: Tensor  # (n, inputs): G
    earlier: Tensor  # (n, gates before): M
    size: Tensor  # (n,) at least |center| + |G| |d| + |M| |p|
    low: Tensor  # (n,) bounds of z on the region
    high: Tensor
    ellipsoid: Ellipsoid | None = None  # where all z are together on the region

    @property
    def count(self) -> int:
        return len(self.index)

    @functools.cached_property
    def lines(self) -> Lines:
        """Around each p."""
        return of_gate(self.gate.activation, self.low, self.high)

    @property
    def through_zero(self) -> bool:
        """Whether `slope z` is below p for every slope between 0 and 1."""
        return self.gate.activation == RELU

    @functools.cached_property
    def peak(self) -> Tensor:
        """At least |p|."""
        low, high = image(self.gate, self.low, self.high)
        return torch.maximum(low.abs(), high.abs())

    @functools.cached_property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest slope of each gate."""
        return slopes(self.gate, self.low, self.high)


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
    with torch.enable_grad():
        return _Sweep(program, region, limit, until, steps, most).run(rows)


def _check_scale(program: Program, region: Region, *rows: Tensor) -> None:
    """Refuse numbers so large that overflow, or what underflow loses, could matter."""
    largest = max(program.largest_constant, *(float(part.abs().max()) if part.numel() else 0.0 for part in (region.center, region.reach, *rows)))
    if not (program.growth <= _GROWTH and largest <= _REACH):
        raise CertifyError(
            f"float64 cannot follow this network here: the absolute values of its weights multiply a change by up to {program.growth:.1e}, and its inputs and "
            f"biases reach {largest:.1e}; at most {_GROWTH:.1e} and {_REACH:.1e} can be bounded; rescale the weights"
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


class _Sweep:
    """One pass through the program; gates are decided, or cut, as it goes."""

    def __init__(self, program: Program, region: Region, limit: int = 0, until: float = math.inf, steps: int = 0, most: float = math.inf) -> None:
        self.program, self.region, self.limit, self.until, self.steps, self.most = program, region, limit, until, steps, most
        self.input = region.center.clone().requires_grad_(True)
        self.cuts: list[Tensor] = []
        self.layers: list[Layer] = []
        self.slopes: list[tuple[Tensor, Tensor]] = []  # by gate: its largest |slope| everywhere, and the entries that are cut
        self.products = 1
        self.total = 0

    def run(self, rows: Tensor) -> Condensed:
        return self.outputs(self.program.follow(self.start(), self.affine, self.gate), rows)

    def start(self) -> _Signal:
        """The input."""
        shape = (1, *self.program.input_shape)
        low, high = (self.region.center + end for end in (self.region.low, self.region.high))
        return _Signal(
            self.input.reshape(shape),
            downward(low).reshape(shape),
            upward(high).reshape(shape),
            (self.region.center.abs() + self.region.reach).reshape(shape),
        )

    def affine(self, step: Affine, inputs: Sequence[_Signal]) -> _Signal:
        """The affine step in each of the three: rounding is at most `gamma` times the sum of the absolute values of all terms."""
        self.products += step.terms + len(inputs) + 2
        value = step.apply(*(signal.value for signal in inputs))
        with torch.no_grad():
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
        index = torch.nonzero(_undecided(gate, low, high)).flatten()
        if len(index):
            layer = self.sharpened(gate, signal, index, low, high)
            low[index], high[index] = layer.low, layer.high
            silent = _silent(layer)
            undecided = _undecided(gate, layer.low, layer.high)
            layer, silent = _part(layer, torch.nonzero(undecided & ~silent).flatten()), index[undecided & silent]
        else:
            layer, silent = None, index
        least, most = slopes(gate, low, high)
        slope, intercept = torch.where(least == most, least, 0.0), _intercept(gate, low, high)
        image_low, image_high = image(gate, low, high)
        size = slope.abs() * signal.size.flatten() + intercept.abs()
        size[silent] = signal.size.flatten()[silent]  # relu of what is 0 but for rounding: its error is no more than that of its input
        self.products += 4
        flat = signal.value.flatten() * slope + intercept
        cut = torch.zeros(0, dtype=torch.long)
        if layer is not None and layer.count:
            self.layers.append(dataclasses.replace(layer, ellipsoid=Ellipsoid.of(self.layers, layer, self.region)))
            cut = layer.index
            p = torch.zeros(layer.count, dtype=torch.float64, requires_grad=True)
            self.cuts.append(p)
            flat = flat.index_put((cut,), p)
            size[cut] = torch.maximum(image_low[cut].abs(), image_high[cut].abs())
            gates = sum(map(len, self.cuts))
            if self.used() > self.limit:
                raise TooManyGates(f"{gates:,} undecided gates on this region need more memory than allowed; take a smaller region")
            if gates > self.most:
                raise TooManyGates(f"{gates:,} gates are undecided on this region, and {self.most:,} at most were asked for; take a smaller region")
        self.slopes.append((torch.maximum(least.abs(), most.abs()), cut))
        shape = signal.value.shape
        return _Signal(flat.reshape(shape), image_low.reshape(shape), image_high.reshape(shape), size.reshape(shape))

    def used(self) -> int:
        """The numbers that are kept."""
        gates = sum(map(len, self.cuts))
        return gates * (self.input.numel() + gates)

    def sharpened(self, gate: Gate, signal: _Signal, index: Tensor, low: Tensor, high: Tensor) -> Layer:
        """The rows of some entries of a gate's input, and their range by linear relaxations of the gates before them (CROWN)."""
        chosen = signal.value.flatten()[index]
        inputs, *cuts = self.gradients(chosen, torch.eye(len(index), dtype=torch.float64))
        with torch.no_grad():
            earlier = torch.cat([torch.zeros(len(index), 0, dtype=torch.float64), *cuts], dim=1)
            slack = 2 * gamma(self.products) * signal.size.flatten()[index] + _TINY
            center = chosen.detach()
            centers, to_inputs, to_gates = (torch.cat([part, -part]) for part in (center, inputs, earlier))
            apart = [dataclasses.replace(layer, ellipsoid=None) for layer in self.layers]  # what gates one by one decide needs no more
            top = upper_bounds(apart, self.region, centers, to_inputs, to_gates)
            n = len(index)
            if self.layers and (self.steps or self.layers[-1].ellipsoid is not None):
                left = _undecided(gate, torch.maximum(low[index], -top[n:] - slack), torch.minimum(high[index], top[:n] + slack))
                again = torch.nonzero(left.repeat(2)).flatten()
                tighter = tightened(self.layers, self.region, centers[again], to_inputs[again], to_gates[again], self.steps)
                top[again] = torch.fmin(top[again], tighter)
            sharp_high, sharp_low = upward(top[:n] + slack), downward(-top[n:] - slack)
            lower, upper = torch.fmax(low[index], sharp_low), torch.fmin(high[index], sharp_high)  # where sums overflow they say nothing
        return Layer(gate, index, center, slack, inputs, earlier, signal.size.flatten()[index], lower, upper)

    def gradients(self, of: Tensor, rows: Tensor) -> list[Tensor]:
        """`rows @ d of / d .` to the input and to each layer of cut gates, in batches."""
        leaves = [self.input, *self.cuts]
        if not len(rows) or not of.requires_grad:
            return [torch.zeros(len(rows), leaf.numel(), dtype=torch.float64) for leaf in leaves]
        chunk = max(1, _CHUNK // max(1, of.numel() + sum(leaf.numel() for leaf in leaves)))
        parts = []
        for part in rows.split(chunk):
            if time.monotonic() > self.until:
                raise TimeoutError("the ball leaves so many gates undecided that there is no time for their gradients")
            found = torch.autograd.grad(of, leaves, part, retain_graph=True, allow_unused=True, is_grads_batched=True)
            parts.append([torch.zeros(len(part), leaf.numel(), dtype=torch.float64) if g is None else g for g, leaf in zip(found, leaves, strict=True)])
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]

    def outputs(self, signal: _Signal, rows: Tensor) -> Condensed:
        """The rows of the output, and what rounding can add to each gradient."""
        y = signal.value.flatten()
        inputs, *cuts = self.gradients(y, rows)
        room = 2 * gamma(self.products + len(y) + 4)
        slack_gates, slack_inputs = self.slack(rows, room)
        with torch.no_grad():
            center = rows @ y.detach()
            return Condensed(
                region=self.region,
                layers=tuple(self.layers),
                center=center,
                slack=room * (rows.abs() @ signal.size.flatten()) + _TINY,
                inputs=inputs,
                gates=torch.cat([torch.zeros(len(rows), 0, dtype=torch.float64), *cuts], dim=1),
                slack_gates=slack_gates,
                slack_inputs=slack_inputs,
                total=self.total,
                rounding=functools.partial(self.slack, rows, room),
            )

    @torch.enable_grad()
    def slack(self, rows: Tensor, room: float, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`room` times the gradients of the program with absolute values, in which every gate has the largest slope that it can have here.

        With `largest`, (rows, gates), at least the gradients to all z, they start from these and from the outputs, and end at the next undecided gate.
        """
        leaf = torch.zeros(self.input.numel(), dtype=torch.float64, requires_grad=True)
        slopes = iter(self.slopes)
        inside: list[Tensor] = []  # of the undecided gates
        outside: list[Tensor] = []

        def bend(gate: Gate, z: Tensor) -> Tensor:
            steepest, cut = next(slopes)
            flat = z.flatten()
            out = flat * steepest
            p = out[cut] if largest is None else torch.zeros(len(cut), dtype=torch.float64)
            p = p if p.requires_grad else p.requires_grad_(True)
            if len(cut):
                inside.append(flat[cut] if flat.requires_grad else flat[cut].requires_grad_(True))
                outside.append(p)
            return out.index_put((cut,), p).reshape(z.shape)

        y = self.program.run(leaf, bend, affine=lambda step: step.size)
        starts, leaves = [y] if largest is None else [y, *inside], [leaf, *outside]
        sizes = [len(part) for part in outside]
        parts = []
        for number, row in enumerate(rows.abs()):
            weights = [row] if largest is None else [row, *largest[number].split(sizes)]
            found = torch.autograd.grad(starts, leaves, weights, retain_graph=True, allow_unused=True)
            parts.append([torch.zeros_like(part) if g is None else g for g, part in zip(found, leaves, strict=True)])
        to_inputs, *to_gates = (torch.stack(columns) for columns in zip(*parts, strict=True))
        none = torch.zeros(len(rows), 0, dtype=torch.float64)
        return room * torch.cat([none, *to_gates], dim=1) + _TINY, room * to_inputs + _TINY


def _part(layer: Layer, keep: Tensor) -> Layer:
    fields = ("index", "center", "slack", "inputs", "earlier", "size", "low", "high")
    return dataclasses.replace(layer, **{name: getattr(layer, name)[keep] for name in fields})


def _silent(layer: Layer) -> Tensor:
    """The ReLUs of what is computed as the constant 0, such as a tie of two that are shut: nothing but rounding, and so are their gradients."""
    nothing = (layer.center == 0) & ~layer.inputs.any(dim=1) & ~layer.earlier.any(dim=1)
    return nothing if layer.gate.activation == RELU else torch.zeros_like(nothing)


def _numpy(function: Callable[..., tuple[np.ndarray, np.ndarray]], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    first, second = function(low.numpy(), high.numpy())
    return torch.from_numpy(np.ascontiguousarray(first)), torch.from_numpy(np.ascontiguousarray(second))


def slopes(gate: Gate, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest slope of each entry of a gate on its range."""
    if gate.activation == RELU:
        return (low >= 0).double(), (high > 0).double() + ((low >= 0) & (high <= 0)).double()
    return _numpy(gate.activation.slopes, low, high)


def image(gate: Gate, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A range of its values."""
    if gate.activation == RELU:
        return low.clamp(min=0), high.clamp(min=0)
    return _numpy(gate.activation.image, low, high)


def _undecided(gate: Gate, low: Tensor, high: Tensor) -> Tensor:
    """The entries that are not one line on their range."""
    least, most = slopes(gate, low, high)
    return most > least


def _intercept(gate: Gate, low: Tensor, high: Tensor) -> Tensor:
    """`p - slope z` of the entries that are one line on their range; 0 for the others."""
    return torch.zeros_like(low) if gate.activation == RELU else torch.from_numpy(gate.activation.intercept(low.numpy(), high.numpy()))
