"""The undecided gates of one step of a program, and what is known of a gate on a range of its inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from certify.local.program import Gate
from certify.local.relax import Lines, of_gate
from sdp.activation import RELU

if TYPE_CHECKING:
    from certify.local.sdpcrown import Ellipsoid

_FIELDS = ("index", "center", "slack", "inputs", "earlier", "size", "low", "high")  # of a layer, by gate


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

    def part(self, keep: Tensor) -> Layer:
        """Some of its gates."""
        return self if len(keep) == self.count else dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in _FIELDS})

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


def joined(layers: Sequence[Layer]) -> Layer:
    """One layer of several."""
    fields: dict[str, Any] = {name: torch.cat([getattr(layer, name) for layer in layers]) for name in _FIELDS}
    return layers[0] if len(layers) == 1 else dataclasses.replace(layers[0], **fields)


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


def undecided(gate: Gate, low: Tensor, high: Tensor) -> Tensor:
    """The entries that are not one line on their range."""
    least, most = slopes(gate, low, high)
    return most > least


def intercept_of(gate: Gate, low: Tensor, high: Tensor) -> Tensor:
    """`p - slope z` of the entries that are one line on their range; 0 for the others."""
    return torch.zeros_like(low) if gate.activation == RELU else torch.from_numpy(gate.activation.intercept(low.numpy(), high.numpy()))
