"""`LowRank(...)`: certified radii of ordinary ReLU networks, by a proved semidefinite relaxation around each input."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import torch
import torch.fx
from torch import nn

import lipnet
from certify.bound import Array
from certify.errors import CertifyError, Problem
from certify.graph import Graph
from certify.singly import OneByOne
from certify.spectral import as_float64
from sdp import burer_monteiro
from sdp import lowrank as interior_point
from sdp.lowrank_proof import prove_margin
from sdp.relaxation import Affine, Region, Relaxation, ReLUNetwork, relax

SOLVERS = {
    "interior-point": (interior_point.propose, interior_point.memory),
    "burer-monteiro": (burer_monteiro.propose, burer_monteiro.memory),
}
_KNOWN = "nn.Linear, nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout and lipnet.Normalize, one after the other"
_REARRANGING = {torch.flatten, "flatten", torch.reshape, "reshape", "view"}
_ACTIVATING = {torch.relu, nn.functional.relu, "relu"}
_NEAREST, _FARTHEST = 1e-6, 1e12  # of the radius that an attack needs: nothing smaller is looked for; and where no attack is found, nothing larger
_ROUNDS, _STEPS = 12, 12  # of the attack


@dataclasses.dataclass(frozen=True)
class LowRank(OneByOne[ReLUNetwork]):
    """No other class has a larger logit anywhere in a ball: each margin is bounded below by a semidefinite relaxation (Raghunathan, Steinhardt & Liang 2018).

    The relaxation is the one that Chiu & Zhang (2023) solve at low rank, with pre-activation bounds and chords. A solver proposes its multipliers, an
    interior-point method or factors of low rank (Burer & Monteiro 2003), and `sdp.lowrank_proof` proves a bound from them. With a `radius`, that ball is
    tried: a certificate has the next number above it, with which it was proved, or 0. Without, the largest radius is searched to within `tolerance` of its
    size; what is reported was proved, for each class at that radius or at a larger one.
    """

    name: ClassVar[str] = "lowrank"
    radius: float | None = None
    norm: float = 2.0  # 2 or inf
    tolerance: float = 0.01  # of the search, relative
    accuracy: float = 1e-5  # of the solver, relative to the size of the last layer
    memory: float = 4.0  # GiB that the solver may use
    solver: str = "interior-point"  # or "burer-monteiro": less exact and less memory

    def __post_init__(self) -> None:
        if self.norm not in (2, math.inf):
            raise CertifyError(f"LowRank is for norm=2 and norm=math.inf, got {self.norm}")
        if self.radius is not None and not (self.radius >= 0 and math.isfinite(self.radius)):
            raise CertifyError(f"a radius is finite and not negative, got radius={self.radius}; leave it out to search for the largest")
        for name, value in (("tolerance", self.tolerance), ("accuracy", self.accuracy)):
            if not 0 < value < 1:
                raise CertifyError(f"{name} is between 0 and 1, got {name}={value}")
        if not self.memory > 0:
            raise CertifyError(f"memory is a positive number of GiB, got memory={self.memory}")
        if self.solver not in tuple(SOLVERS):
            raise CertifyError(f"the multipliers of LowRank are proposed by {' or '.join(map(repr, SOLVERS))}, got solver={self.solver!r}")

    def see(self, graph: Graph) -> ReLUNetwork:
        return relu_network(graph)

    def around(
        self,
        network: ReLUNetwork,
        x: Array,  # (inputs,)
        z: Array,  # (classes,) its logits
    ) -> tuple[int, int, float]:
        """Prediction, the class that limits the radius, and the radius; -1, -1, 0 for logits that are not finite."""
        if not np.isfinite(z).all():
            return -1, -1, 0.0
        balls = _Balls(self, network, x, z)
        if self.radius is not None:
            tried = math.nextafter(self.radius, math.inf)
            return balls.prediction, balls.limit, tried if balls.holds(tried) else 0.0
        return balls.prediction, balls.limit, balls.largest()

    def proved(
        self,
        network: ReLUNetwork,
        x: Array,  # (inputs,)
        z: Array,  # (classes,)
        radius: float,
    ) -> bool:
        """Whether the prediction is proved not to change in the closed ball of this radius."""
        return bool(np.isfinite(z).all()) and _Balls(dataclasses.replace(self, radius=None), network, x, z).holds(radius)


class _Balls:
    """Balls around one input, and the other classes in the order in which an attack reaches them."""

    def __init__(self, method: LowRank, network: ReLUNetwork, x: Array, z: Array) -> None:
        self.method, self.network, self.x = method, network, x
        self.prediction = int(np.argmax(z))
        self.reach = _reach(network, x, self.prediction, len(z), method.norm)
        self.others = [int(j) for j in np.argsort(self.reach, kind="stable") if j != self.prediction]
        self.limit = self.others[0]  # the class that failed last

    def holds(self, radius: float) -> bool:
        """Whether every margin is proved to be positive in the closed ball."""
        relaxation = self._relaxed(radius)
        return all(self._positive(relaxation, other) for other in self.others)

    def largest(self) -> float:
        """The largest radius that was found for the first class, and for each other that does not reach it: what holds in a ball holds in a smaller one."""
        low = math.inf
        for other in self.others:
            if low > 0 and (math.isinf(low) or not self._positive(self._relaxed(low), other)):
                low = self._largest(other, low)
        return low

    def _largest(self, other: int, high: float) -> float:
        """A radius at which the margin is proved to be positive, within the tolerance of one at which it is not; 0 where none was found.

        The relaxation is often within some per cent of the attack, so the search comes from there, with steps that grow.
        """
        high = min(float(self.reach[other]), high)
        if math.isinf(high):  # no attack reaches this class: as far as the lines go
            high = 1.0
            while self._positive(self._relaxed(high), other):
                high *= 16
                if high > _FARTHEST:
                    return high / 16
        low, first, step = 0.0, high, self.method.tolerance
        while high > low * (1 + self.method.tolerance) and high > first * _NEAREST:
            step, radius = (2 * step, high / (1 + step)) if low == 0 else (step, math.sqrt(low) * math.sqrt(high))
            if self._positive(self._relaxed(radius), other):
                low = radius
            else:
                high = radius
        self.limit = other
        return low

    def _relaxed(self, radius: float) -> Relaxation | None:
        """None for numbers that overflow."""
        try:
            return relax(self.network, Region(self.x, radius, self.method.norm))
        except ValueError:
            return None

    def _positive(self, relaxation: Relaxation | None, other: int) -> bool:
        """Whether one margin is proved to be positive: by lines, or else by the semidefinite program."""
        if relaxation is None:
            return False
        row, offset = relaxation.margin(self.prediction, other)
        if float(relaxation.smallest(row[None], offset[None])[0]) > 0:
            return True
        if relaxation.unstable and self._fits(relaxation):
            propose, _ = SOLVERS[self.method.solver]
            proposal = propose(relaxation, row, offset, self.method.accuracy, goal=0.0)
            if prove_margin(relaxation, row, offset, proposal.multipliers) > 0:
                return True
        self.limit = other
        return False

    def _fits(self, relaxation: Relaxation) -> bool:
        """Whether the solver has the memory; in a search, a ball that is too large is not proved. Raises CertifyError for the one ball that was asked for."""
        _, memory = SOLVERS[self.method.solver]
        needed = memory(relaxation) / 2**30
        if needed <= self.method.memory or self.method.radius is None:
            return needed <= self.method.memory
        raise CertifyError(
            f"the ball of radius {self.method.radius:g} leaves {relaxation.unstable} neurons unstable, for which the solver needs about {needed:.1f} GiB; "
            f"it may use {self.method.memory:g}; take a smaller radius, or allow more in Python (LowRank's memory)"
        )


def _reach(network: ReLUNetwork, x: Array, label: int, classes: int, norm: float) -> Array:  # (classes,)
    """The radius in which projected gradient steps bring each other logit above that of the label; where to look first, never a bound."""
    rows = np.eye(classes)[label] - np.eye(classes)
    low, high = np.zeros(classes), np.full(classes, math.inf)
    margin, slope = _margins(network, np.tile(x, (classes, 1)), rows)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        radius = margin / np.linalg.norm(slope, ord=2 if norm == 2 else 1, axis=1)  # ... of the linear function
        radius = np.where(np.isfinite(radius) & (radius > 0), radius, 1.0)
        for _ in range(_ROUNDS):
            move, reached = np.zeros((classes, len(x))), np.zeros(classes, dtype=bool)
            for step in range(_STEPS):
                _, slope = _margins(network, x + move, rows)
                size = radius[:, None] * (1.0 if step == 0 else 2 / (2 + step))
                if norm == 2:
                    move = move - size * slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-300)
                    move *= np.minimum(1.0, radius[:, None] / np.maximum(np.linalg.norm(move, axis=1, keepdims=True), 1e-300))
                else:
                    move = np.clip(move - size * np.sign(slope), -radius[:, None], radius[:, None])
                reached |= _margins(network, x + move, rows)[0] <= 0
            low, high = np.where(reached, low, radius), np.where(reached, radius, high)
            radius = np.where(np.isinf(high), 2 * radius, (low + high) / 2)
    return high


def _margins(network: ReLUNetwork, x: Array, rows: Array) -> tuple[Array, Array]:  # (N, inputs), (N, classes) -> (N,), (N, inputs)
    """`rows f(x)` and its derivative, each row at its own input."""
    value, active = (x - network.shift) / network.divisor, []
    for step in network.steps:
        value = value @ step.weight.T + step.bias
        active.append((value > 0) | (not step.relu))
        value = value * active[-1]
    found = (value * rows).sum(axis=1)
    for step, on in zip(reversed(network.steps), reversed(active), strict=True):
        rows = (rows * on) @ step.weight
    return found, rows / network.divisor


def relu_network(graph: Graph) -> ReLUNetwork:
    """A chain of linear layers and relu, as its frozen network computes it. Raises CertifyError that names every node that is something else."""
    inputs = math.prod(graph.input_shape)
    shift, divisor = np.zeros(inputs), np.ones(inputs)
    steps: list[Affine] = []
    found: list[Problem] = []
    before: torch.fx.Node | None = None
    for node in graph.trace.nodes:
        if node.op == "placeholder":
            before = node
            continue
        if node.op == "output":
            if [before] != node.all_input_nodes:
                found.append(Problem(str(before), "output", "what the network returns is not the end of the chain; leave out what is not returned"))
            continue
        name = type(graph.module(node)).__name__ if node.op == "call_module" else str(getattr(node.target, "__name__", node.target))
        where = str(node.target) if node.op == "call_module" else node.name
        if [before] != node.all_input_nodes or (node.op != "call_module" and node.target not in _REARRANGING | _ACTIVATING):
            found.append(Problem(where, name, "is not part of one chain" if [before] != node.all_input_nodes else "none of these"))
        elif node.op != "call_module":
            if node.target in _ACTIVATING:
                _activate(steps, graph.input_of(node))
        elif isinstance(module := graph.module(node), lipnet.Normalize):
            if steps or (shift != 0).any() or (divisor != 1).any():
                found.append(Problem(where, name, "is known as the first layer only"))
            else:
                shift, divisor = (_per_entry(as_float64(part), graph.input_of(node)) for part in (module.shift, module.divisor))
        else:
            for part in _plain(lipnet.freeze(module)):
                if isinstance(part, nn.Linear) and len(graph.input_of(node)) == 1:
                    bias = np.zeros(part.out_features) if part.bias is None else as_float64(part.bias)
                    steps.append(Affine(as_float64(part.weight), bias, relu=False))
                elif isinstance(part, nn.ReLU):
                    _activate(steps, graph.input_of(node))
                elif not isinstance(part, nn.Flatten | nn.Identity | nn.Dropout):
                    found.append(Problem(where, name, "none of these" if type(part) is not nn.Linear else "acts on more than vectors; put an nn.Flatten first"))
                    break
        before = node
    if found or not steps:
        raise CertifyError(f"LowRank sees through chains of {_KNOWN}; in the way here: {'; '.join(map(str, found)) or 'there is no linear layer'}")
    return ReLUNetwork(tuple(steps), shift, divisor)


def _activate(steps: list[Affine], shape: tuple[int, ...]) -> None:
    """relu of what was made so far; of the input itself, relu of the identity."""
    if steps:
        steps[-1] = dataclasses.replace(steps[-1], relu=True)
    else:
        size = math.prod(shape)
        steps.append(Affine(np.eye(size), np.zeros(size), relu=True))


def _plain(module: nn.Module) -> list[nn.Module]:
    return [part for child in module for part in _plain(child)] if type(module) is nn.Sequential else [module]


def _per_entry(values: Array, shape: tuple[int, ...]) -> Array:
    """One number, or one per channel, for each entry of an input."""
    column = values.reshape(-1, *(1,) * (len(shape) - 1))
    return np.ascontiguousarray(np.broadcast_to(column, shape)).ravel()
