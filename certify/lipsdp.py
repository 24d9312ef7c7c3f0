"""`LipSDP(...)`: the Lipschitz constant of a whole network by a semidefinite program, solved by `sdp` and proved there."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import sdp
from certify.bound import Array, Assumption, Bound, Box, Domain, Everywhere
from certify.device import usable
from certify.errors import CertifyError
from certify.graph import Graph
from certify.lure import Lowering, check
from certify.methods import Layerwise, LipschitzMethod
from certify.registry import Shape
from certify.rounding import multiply_up, up
from sdp import LureSystem, Progress, Solution, proof_file
from sdp.chain import Chain, first_order
from sdp.lipsdp import MULTIPLIERS, check_solver

Report = Callable[[str, Progress], None]  # what is being solved ("network", "outputs 3 - 7", ...), and how far


@dataclasses.dataclass(frozen=True)
class LipSDP(LipschitzMethod):
    """LipSDP (Fazlyab et al. 2019) with one multiplier per nonlinearity: at most the product of the layers' norms, and often several times less.

    `norm` is that of the inputs: 2 (to l2), 1 (to l2), or inf (each output, so to l-infinity). On a Ball or a Box the slopes are those that the activations
    have there, and what does not bend there is eliminated; entries of a Box that are one number are held. `pairs` bounds each difference of two outputs by a
    program of its own, which gives larger radii than `sqrt(2) L`; with `pairs=False` that is what stands in their place. MaxMin, GroupSort, Householder and max
    pools are one ReLU per comparator, which is never looser than the constraints published for them (Pauli et al. 2024). Whatever the solver says, the bound is
    what `sdp.prove` proves from its multipliers, and never above the product of the layers (from l-infinity, times the root of the number of inputs). Ctrl-C
    ends the solver, and what it reached is proved.
    """

    solver: str = "newton"  # see sdp.lipsdp
    multipliers: str = "neuron"  # or "layer"
    norm: float = 2
    pairs: bool = True
    tolerance: float = 1e-7
    seconds: float = math.inf  # of each program
    device: str = "cpu"  # where torch runs the first-order method; all others, and the proof, are numpy's
    report: Report | None = dataclasses.field(default=None, repr=False, compare=False)
    until: float = dataclasses.field(default=math.inf, repr=False, compare=False)  # of time.monotonic: then what is reached is proved, as after Ctrl-C
    proposals: Mapping[str, Array] | None = dataclasses.field(default=None, repr=False, compare=False)  # multipliers to prove in place of solving

    def __post_init__(self) -> None:
        if self.norm not in (1, 2, math.inf):
            raise CertifyError(f"LipSDP bounds networks from l1, l2 or l-infinity, got norm={self.norm!r}; pass 1, 2 or math.inf")
        if self.multipliers not in MULTIPLIERS:
            raise CertifyError(
                f"multipliers are 'neuron' or 'layer', got {self.multipliers!r}; couplings of neurons ('network') are not sound (docs/lipsdp.md)"
            )
        if not 0 < self.tolerance < 1 or not self.seconds > 0:
            raise CertifyError(f"a tolerance between 0 and 1 and a positive time are needed, got {self.tolerance:g} and {self.seconds:g} seconds")
        usable(self.device)
        try:
            check_solver(self.solver)
        except ValueError as error:
            raise CertifyError(str(error)) from None

    @property
    def settings(self) -> dict[str, object]:
        """The options as plain data, from which `LipSDP.from_settings` makes the method again."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.compare}
        return {name: str(value) if value == math.inf else value for name, value in plain.items()}

    @classmethod
    def from_settings(cls, settings: object) -> LipSDP:
        """The method of these options. Raises CertifyError for what `settings` never gives."""
        kinds = {"solver": str, "multipliers": str, "norm": float, "pairs": bool, "tolerance": float, "seconds": float, "device": str}
        if not isinstance(settings, dict) or set(settings) != set(kinds):
            raise CertifyError(f"the settings of LipSDP are {', '.join(kinds)}, got {settings!r}")
        try:
            plain: dict[str, Any] = {name: value if isinstance(value, bool) else kinds[name](value) for name, value in settings.items()}
            return cls(**plain)
        except (TypeError, ValueError) as error:
            raise CertifyError(f"the settings of LipSDP are not what it writes: {error}") from None

    def bound(self, graph: Graph, domain: Domain) -> Bound:
        check(graph)
        layers = Layerwise().bound(graph, Everywhere())
        wired = Lowering(graph, domain).run()
        found = _Solved(self, _moving(wired.system, graph.input_shape, domain), wired.given)
        value = found.value()
        product = multiply_up(up(math.sqrt(found.system.inputs)), layers.value) if self.norm == math.inf else layers.value
        used = min(value, product)
        pairs = found.pairs(used) if len(wired.system.output) > 1 else None
        if pairs is not None and layers.pairs is not None and self.norm != math.inf:
            pairs = np.minimum(pairs, layers.pairs)
        return Bound(
            value=used,
            method=repr(self),
            norm=(self.norm, math.inf if self.norm == math.inf else 2),
            domain=domain,
            assumptions=layers.assumptions | {Assumption.FLOAT64_LINALG},
            evidence={
                "multipliers": found.multipliers,
                "settings": self.settings,
                "status": found.status,
                "claimed": found.claimed,
                "gap": found.gap,
                "layerwise": layers.value,
                "nonlinearities": wired.system.count,
                "eliminated": wired.wiring.fixed,
                "leaves": wired.leaves,
                "wired": wired,
                "proposals": found.proposals,
                "proof": (value, np.array(found.all_multipliers) if self.norm == 1 else found.multipliers),
            },
            parts=layers.parts if used < value and self.norm != math.inf else (),
            pairs=pairs,
        )


def save_proof(bound: Bound, path: pathlib.Path, about: Mapping[str, str]) -> float:
    """Write the proof of a bound by LipSDP, for `sdp/check.py`; returns the constant that it proves, a little more than the bound.

    Raises CertifyError for bounds on a region and, from l-infinity, for several outputs: each of them has a proof of its own.
    """
    if not isinstance(bound.domain, Everywhere):
        raise CertifyError("a proof file is of a bound that holds everywhere; leave the ball out")
    wired, (value, multipliers) = bound.evidence["wired"], bound.evidence["proof"]
    if bound.norm[0] == math.inf and len(wired.system.output) > 1:
        raise CertifyError(f"a proof from l-infinity is of one output, the network has {len(wired.system.output)}; take l2 or l1")
    steps, output = wired.wiring.steps, wired.output.number
    return proof_file.write(path, steps, output, wired.wiring.inputs, multipliers, value, bound.norm[0], about, wired.names)


def _by_torch(device: str, chain: Chain, start: Sequence[Array], *, stop: Callable[[float], bool]) -> tuple[list[Array], float]:
    """The first-order method in float64 by torch, on a GPU perhaps. It proposes; the proof is of the numbers that come back."""

    def there(arrays: Sequence[Array]) -> tuple[Any, ...]:
        return tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)

    moved = Chain(there(chain.weights), there(chain.lower), there(chain.upper), chain.places)
    found, claimed = first_order(moved, there(start), xp=torch, stop=stop)
    return [part.cpu().numpy() for part in found], claimed


def _moving(system: LureSystem, shape: Shape, domain: Domain) -> LureSystem:
    """With the entries that differ between inputs of a Box as inputs; with all of them for a Box of one input, and elsewhere."""
    free = np.flatnonzero(np.broadcast_to(domain.low < domain.high, shape)) if isinstance(domain, Box) else np.zeros(0, dtype=np.int64)
    return system.along(*free) if len(free) else system


class _Solved:
    """The programs of one network, solved one after the other until Ctrl-C or the end of the time; or, where there are proposals for them, only proved."""

    def __init__(self, method: LipSDP, system: LureSystem, given: Array | None) -> None:
        self.method, self.system, self.given = method, system, given
        self.multipliers: Array | None = None
        self.all_multipliers: list[Array] = []
        self.proposals: dict[str, Array] = {}  # by program
        self.status, self.claimed, self.gap = "nothing to solve", math.nan, math.inf

    def value(self) -> float:
        """The constant of the network, by the worst of its programs."""
        worst = 0.0
        for what, system in self._programs():
            solution = self._solve(what, system, self.given)
            self.all_multipliers.append(solution.multipliers)
            if solution.bound >= worst:
                worst, self.multipliers, self.claimed, self.gap = solution.bound, solution.multipliers, solution.claimed, solution.gap
            self.status = solution.status if self.status != "interrupted" else self.status
        return worst

    def _programs(self) -> Iterator[tuple[str, LureSystem]]:
        system = self.system
        if self.method.norm == 2:
            yield "network", system
        elif self.method.norm == 1:
            for i in range(system.inputs):
                yield f"input {i}", system.along(i)
        else:
            for k in range(len(system.output)):
                error = None if system.output_error is None else system.output_error[k : k + 1]
                yield f"output {k}", system.with_output(system.output[k : k + 1], error)

    def pairs(self, value: float) -> Array:  # (outputs, outputs)
        """A constant for each difference of two outputs: of its own program, or what follows from that of the network."""
        outputs = len(self.system.output)
        factor = 2.0 if self.method.norm == math.inf else up(math.sqrt(2))
        found = np.full((outputs, outputs), multiply_up(factor, value))
        np.fill_diagonal(found, 0.0)
        if not self.method.pairs:
            return found
        for i, j in itertools.combinations(range(outputs), 2):
            system, what = self.system.difference(i, j), f"outputs {i} - {j}"
            parts = {what: system} if self.method.norm != 1 else {f"{what}, input {k}": system.along(k) for k in range(system.inputs)}
            if self.method.proposals is not None and not self.method.proposals.keys() >= parts.keys():
                continue  # the time was over before it
            worst = 0.0
            for what, part in parts.items():
                if self.status == "interrupted":
                    return found
                if time.monotonic() > self.method.until:
                    self.status = "time limit"
                    return found
                solution = self._solve(what, part, None)
                self.status = solution.status if solution.status == "interrupted" else self.status
                worst = max(worst, solution.bound)
            found[i, j] = found[j, i] = min(float(found[i, j]), worst)
        return found

    def _solve(self, what: str, system: LureSystem, start: Array | None) -> Solution:
        solution = self._proved(system, self.method.proposals[what]) if self.method.proposals is not None else self._proposed(what, system, start)
        self.proposals[what] = solution.multipliers
        return solution

    def _proved(self, system: LureSystem, multipliers: Array) -> Solution:
        bound = sdp.prove(system, multipliers, math.inf if self.method.norm == math.inf else 2)
        return Solution(bound, multipliers, math.nan, "proved again", 0, math.inf, 0.0, 0.0)

    def _proposed(self, what: str, system: LureSystem, start: Array | None) -> Solution:
        report, left = self.method.report, self.method.until - time.monotonic()
        return sdp.lipsdp(
            system,
            self.method.solver,
            norm=math.inf if self.method.norm == math.inf else 2,
            multipliers=self.method.multipliers,
            start=start if self.method.norm == 2 else None,
            tolerance=self.method.tolerance,
            seconds=min(self.method.seconds, max(left, 0.01)),
            report=None if report is None else lambda progress: report(what, progress),
            descend=first_order if self.method.device == "cpu" else functools.partial(_by_torch, self.method.device),
        )
