"""`Local(...)`: the Lipschitz constant of a network on a ball or a box, from bounds of its Jacobians there."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from certify.bound import Array, Assumption, Ball, Bound, Box, Domain, Everywhere
from certify.errors import CertifyError, Unsupported
from certify.graph import Graph
from certify.local import _lirpa
from certify.local.bab import search
from certify.local.condense import Condensed, TooManyGates, condense
from certify.local.coupled import bound_jacobian
from certify.local.entries import Entries, by_intervals
from certify.local.lipsdp import refined, spectral_bound
from certify.local.norms import Bounded
from certify.local.program import Program
from certify.local.region import Region
from certify.methods import Layerwise, LipschitzMethod
from certify.rounding import multiply_up, up
from certify.spectral import largest_singular_value
from sdp.activation import RELU
from sdp.proof import gamma

_programs: weakref.WeakKeyDictionary[Graph, Program] = weakref.WeakKeyDictionary()
_ASSUMED = {"own": frozenset({Assumption.FLOAT64_LINALG}), "auto_lirpa": frozenset({Assumption.FLOAT64_LINALG, Assumption.FOREIGN_ROUNDING})}
_HOW = ("auto", "crown", "sdp", "complete", "interval")
_VERY_FEW = 25  # undecided gates, among which branch and bound comes to its end in seconds
_PATIENCE = 10.0  # seconds for it, where nobody asked for it by name
_FEW = 200  # for which LipSDP takes about a second
_MANY = 5000  # beyond which forms among them take hours
DUAL = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}


@dataclasses.dataclass(frozen=True)
class Local(LipschitzMethod):
    """Bounds of all Clarke Jacobians on a Ball or a Box: the largest norm of any of them is the Lipschitz constant there (Shi et al. 2022).

    `norm` is that of the inputs, and by default that of the Ball (l-infinity on a Box): from l2 to l2, from l1 to l2, and from l-infinity to l-infinity. The
    ranges of all gates come from linear relaxations (CROWN), and everything is computed among the gates that these leave undecided. `pairs` bounds the
    difference of any two outputs on its own. In float64, with the rounding of every step added; from l2 to l2 never above the product of the layers, where that
    is known. `alpha_steps` are spent on lines below the gates of ReLU that decide more of them (alpha-CROWN, Xu et al. 2021). `memory`, in GiB, is for what is
    kept of the undecided gates. Raises CertifyError where that is not enough.

    Entries of a Box that are one number are held there: the constant is for changes of the others, such as of one feature.

    `how="crown"` bounds row by row; "sdp", from l2, by LipSDP among the undecided gates too, which is smaller, and takes seconds from 300 of them on.
    `how="complete"`, for gates of two linear pieces, decides them one by one (branch and bound) until the constant of each output meets an example, or
    `seconds` are over; the evidence says how many nodes that took, the largest example, an estimate from below, and whether they meet. `how="interval"` asks
    nothing of the gates but their ranges: loose, and at the cost of a few gradients. "auto" goes by the count of undecided gates: up to 25 "complete", for ten
    seconds at most (with "sdp" from l2), up to 200 "sdp" from l2, up to 5000 "crown", and beyond, or where the memory is too small, "interval"; the evidence
    says which.

    `backend="auto_lirpa"` takes the bounds of auto_LiRPA (CROWN, row by row) on a Box or a Ball in l-infinity, where it is installed, for a second opinion:
    FOREIGN_ROUNDING is among its assumptions.
    """

    norm: float | None = None
    pairs: bool = True
    how: str = "auto"
    alpha_steps: int = 10
    memory: float = 4.0
    seconds: float = 60.0
    backend: str = "own"

    def __post_init__(self) -> None:
        if self.backend not in ("own", "auto_lirpa"):
            raise CertifyError(f'the backends are "own" and "auto_lirpa", got backend={self.backend!r}')
        if self.norm not in (None, 1, 2, math.inf):
            raise CertifyError(f"Local bounds networks from l1, l2 or l-infinity, got norm={self.norm!r}; pass 1, 2 or math.inf")
        if self.alpha_steps < 0:
            raise CertifyError(f"alpha_steps is 0 or more, got {self.alpha_steps}")
        if not self.memory > 0:
            raise CertifyError(f"memory is a positive number of GiB, got memory={self.memory}")
        if self.backend == "auto_lirpa" and self.how not in ("auto", "crown"):
            raise CertifyError(f'backend="auto_lirpa" bounds row by row alone; take backend="own" for how={self.how!r}')
        if self.how not in _HOW:
            raise CertifyError(f"how is one of {', '.join(map(repr, _HOW))}, got {self.how!r}")
        if not self.seconds > 0:
            raise CertifyError(f"seconds is a positive number, got seconds={self.seconds}")

    def bound(self, graph: Graph, domain: Domain) -> Bound:
        if isinstance(domain, Everywhere):
            raise CertifyError("a local bound is for inputs near each other; pass domain=certify.Ball(x, radius, p) or certify.Box(low, high)")
        norm = self.norm if self.norm is not None else domain.p if isinstance(domain, Ball) else math.inf
        if self.how == "sdp" and norm != 2:
            raise CertifyError(f"how='sdp' bounds networks from l2, got norm={norm:g}; take how='crown'")
        program = program_of(graph)
        region = Region.of(domain, math.prod(graph.input_shape))
        free = _free(domain, len(region.center))
        single = torch.eye(program.outputs, dtype=torch.float64)
        differences = list(itertools.combinations(range(program.outputs), 2)) if self.pairs else []
        rows = torch.cat([single, *(single[i : i + 1] - single[j : j + 1] for i, j in differences)])
        limit = limit_of(self.memory)
        if self.backend == "own":
            value, of_rows, evidence = self._own(program, region, rows, norm, free)
        else:
            foreign = _lirpa.bound_jacobian(program, graph.double, domain, rows, limit).along(free)
            of_rows, evidence = foreign.row_norms(DUAL[norm]), {"how": "auto_LiRPA"}
            value = _of_network(foreign, of_rows, program.outputs, norm)
        layers = _layerwise(graph)
        everywhere = math.inf if layers is None else multiply_up(up(math.sqrt(int(free.sum()))), layers.value) if norm == math.inf else layers.value
        used = min(value, everywhere)
        return Bound(
            value=used,
            method=repr(self),
            norm=(norm, math.inf if norm == math.inf else 2),
            domain=domain,
            assumptions=_ASSUMED[self.backend] | (frozenset() if layers is None else layers.assumptions),
            evidence={**evidence, "layerwise": None if layers is None else everywhere},
            parts=layers.parts if layers is not None and used < value and norm != math.inf else (),
            pairs=_pairs(used, of_rows[program.outputs :].numpy(), differences, program.outputs, norm),
        )

    def _own(self, program: Program, region: Region, rows: Tensor, norm: float, free: Tensor) -> tuple[float, Tensor, dict[str, Any]]:
        """Of the network, of each row, and what is to be known of them."""
        limit, most = limit_of(self.memory), _MANY if self.how == "auto" else math.inf
        try:
            condensed = None if self.how == "interval" else condense(program, region, rows, limit=limit, steps=self.alpha_steps, most=most)
        except TooManyGates:
            if self.how != "auto":
                raise
            condensed = None
        if condensed is not None:
            return self._among(condensed.along(free), program.outputs, norm)
        entries, gates, undecided = by_intervals(program, region, rows)
        entries = entries.along(free)
        of_rows = entries.row_norms(DUAL[norm])
        return _of_network(entries, of_rows, program.outputs, norm), of_rows, {"gates": gates, "undecided": undecided, "how": "interval"}

    def _among(self, condensed: Condensed, outputs: int, norm: float) -> tuple[float, Tensor, dict[str, Any]]:
        """Among the undecided gates."""
        jacobian = bound_jacobian(condensed)
        of_rows = jacobian.row_norms(DUAL[norm])
        few, how, seconds = norm == 2 and condensed.undecided <= _FEW, self.how, self.seconds
        if how == "auto":
            bent_once = all(layer.gate.activation == RELU for layer in condensed.layers)
            how = "complete" if bent_once and condensed.undecided <= _VERY_FEW else "sdp" if few else "crown"
            seconds = min(seconds, _PATIENCE)
        evidence: dict[str, Any] = {"gates": condensed.total, "undecided": condensed.undecided, "how": how}
        if how == "complete":
            found = search(jacobian.condensed, DUAL[norm], seconds=seconds)
            of_rows = torch.minimum(of_rows, found.upper)
            evidence |= {"nodes": found.nodes, "lower": float(found.lower[:outputs].max()), "done": found.done}
        value = _of_network(jacobian, of_rows, outputs, norm)
        if how == "sdp" or (few and not evidence.get("done", True)):
            value, of_rows = refined(jacobian.condensed, value, of_rows, outputs)
        elif how == "complete" and few:
            value = min(value, spectral_bound(jacobian.condensed, slice(outputs)).bound)
        return value, of_rows, evidence


def _free(domain: Domain, inputs: int) -> Tensor:  # (inputs,) of 0 and 1
    """Which entries are not the same in all inputs of a Box; all of them in a Ball, and in a Box of one input, for its Jacobian."""
    if not isinstance(domain, Box) or not (domain.low < domain.high).any():
        return torch.ones(inputs, dtype=torch.float64)
    return torch.from_numpy((domain.low < domain.high).astype(np.float64).ravel())


def program_of(graph: Graph) -> Program:
    """The program of a network, made once. Raises Unsupported that names every operation that has no form as affine steps and gates."""
    if graph not in _programs:
        _programs[graph] = Program.of(graph.double, graph.input_shape)
    return _programs[graph]


def limit_of(memory: float) -> int:
    """How many numbers of the gates may be kept in so many GiB: each, and what is computed with it, takes 32 bytes."""
    return int(min(memory, 2.0**30) * 2**30 / 32)


def spectral_norm(low: Tensor, high: Tensor) -> float:
    """At least the spectral norm of every matrix between the two: that of their middle, and that of the distance to it, entry by entry."""
    middle, half = (low / 2 + high / 2).numpy(), (high / 2 - low / 2).numpy()
    reach = half * (1 + gamma(4)) + np.abs(middle) * gamma(4) + 2.0**-1000
    return up(largest_singular_value(middle) + largest_singular_value(reach))


def _of_network(jacobian: Bounded | Entries, of_rows: Tensor, outputs: int, norm: float) -> float:
    """The constant of all outputs together."""
    of_rows = of_rows[:outputs]
    if norm == math.inf:
        return float(of_rows.max())
    low, high = (end[:outputs] for end in jacobian.range)
    together = float(torch.linalg.vector_norm(of_rows)) * (1 + 2 * gamma(outputs + 8))
    if norm == 1:
        largest = torch.maximum(low.abs(), high.abs())
        return min(together, float(torch.linalg.vector_norm(largest, dim=0).max()) * (1 + 2 * gamma(outputs + 8)) + 2.0**-500)
    return min(together, spectral_norm(low, high))


def _layerwise(graph: Graph) -> Bound | None:
    try:
        return Layerwise().bound(graph, Everywhere())
    except Unsupported:
        return None


def _pairs(value: float, of_differences: Array, which: list[tuple[int, int]], outputs: int, norm: float) -> Array | None:
    """A constant for each difference of two outputs; what follows from that of the network where it is smaller."""
    if outputs < 2:
        return None
    found = np.full((outputs, outputs), multiply_up(2.0 if norm == math.inf else up(math.sqrt(2)), value))
    np.fill_diagonal(found, 0.0)
    for (i, j), constant in zip(which, of_differences, strict=True):
        found[i, j] = found[j, i] = min(found[i, j], float(constant))
    return found
