"""`lipsdp(system, solver=...)`: multipliers by a solver, and the bound that they prove."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdp import conic
from sdp.chain import Chain, composed, first_order, rescaled_product
from sdp.lure import LureSystem
from sdp.newton import Proposal, Report, newton
from sdp.program import Program, program
from sdp.proof import prove
from sdp.start import closed_form, feasible, levels

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
OWN = ("newton", "first-order", "split", "closed-form", "rescaled")
_PART = 400  # signals of a part of a network that is split
MULTIPLIERS = ("neuron", "layer")
_LARGE = (1e9, 1e12, 1e7)  # multipliers of nonlinearities that do not move
_BLENDS = (1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3)  # towards multipliers that are well inside the cone


class Descend(Protocol):
    """`sdp.chain.first_order`, or what does the same."""

    def __call__(self, chain: Chain, start: Sequence[Array], *, stop: Callable[[float], bool]) -> tuple[list[Array], float]:
        """Better multipliers of each layer, and the constant that they stand for."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of `lipsdp`, beside the system and where to start."""

    solver: str
    norm: float
    multipliers: str
    tolerance: float
    seconds: float
    report: Report | None
    descend: Descend


def check_solver(name: str) -> None:
    """Raises ValueError for a solver that is not known, or not installed."""
    if name not in (*OWN, *conic.DIRECT):
        conic.check_cvxpy(name)


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """`bound` is proved, whatever the solver says; `claimed` is what the solver believes, and may be below the truth."""

    bound: float  # inf: nothing could be proved
    multipliers: Array
    claimed: float
    status: str
    iterations: int
    gap: float  # relative, between what Newton's method claims and the optimum of the program; inf: not known
    seconds: float  # of the solver
    proof_seconds: float


def lipsdp(
    system: LureSystem,
    solver: str = "newton",
    *,
    norm: float = 2,
    multipliers: str = "neuron",
    start: Array | None = None,
    tolerance: float = 1e-8,
    seconds: float = math.inf,
    report: Report | None = None,
    descend: Descend = first_order,
) -> Solution:
    """A proved Lipschitz constant of a system by LipSDP, from l2 (to l2), or from l-infinity for one output.

    Solvers: `newton` (the default), `first-order` (for wide chains), `split` (Newton's method on consecutive parts of a deep chain), `closed-form` (the
    multipliers of ECLipsE-Fast: cheap, loose), `rescaled` (those of the product of norms under the best diagonal scaling), `scs`, `clarabel`, or the name of
    any solver that cvxpy finds. Multipliers are one per nonlinearity (`neuron`) or per level (`layer`): both are sound. Couplings between nonlinearities
    ("LipSDP-Network") are not, and are not offered. `start` are multipliers to begin from, where the solver can. A solver that does not converge costs
    tightness, never truth: its multipliers are pushed into the cone, or the closed form is proved instead. `descend` is what runs the first-order method: by
    numpy here, or by something else elsewhere. Raises ValueError for names that are not known.
    """
    if multipliers not in MULTIPLIERS:
        raise ValueError(f"multipliers are one per 'neuron' or one per 'layer', got {multipliers!r}; couplings of neurons ('network') are not sound")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # of proposals; what is not finite is not proved
        return _solution(system, start, _Options(solver, norm, multipliers, tolerance, seconds, report, descend))


def _solution(system: LureSystem, start: Array | None, options: _Options) -> Solution:
    """Of the nonlinearities that can change, and then of all."""
    alive = _alive(system)
    if alive.all():
        return _solved(system, start, options)
    keep = np.concatenate([np.ones(system.inputs, dtype=bool), alive])
    cut = LureSystem(system.inputs, system.rows[alive][:, keep], system.lower[alive], system.upper[alive], system.output[:, keep])
    return _with_dead(system, _solution(cut, None if start is None else start[alive], options), alive, options.norm)


def _solved(system: LureSystem, start: Array | None, options: _Options) -> Solution:
    """The program of a system all of whose nonlinearities can change."""
    norm = options.norm
    reduced = _reduced(system) if norm == 2 else system
    goal = program(reduced, norm)
    if goal.count == 0 and norm == 2:
        return _proved(system, [Proposal(np.zeros(0), math.nan, "nothing to solve", 0, 0.0, 0.0)], norm)
    inside = feasible(reduced, goal)
    groups = levels(system) if options.multipliers == "layer" and system.is_explicit else None
    if groups is not None and norm != 2:
        groups = np.concatenate([groups, np.full(system.inputs, groups.max(initial=-1) + 1)])
    if start is not None:
        inside = _better(goal, inside, start)
    try:
        asked = _propose(reduced, goal, inside, groups, options)
    except KeyboardInterrupt:  # Newton's method ends by itself with what it has; others leave nothing behind
        if inside is None:
            raise
        asked = Proposal(inside[1], goal.lipschitz(inside[0]), "interrupted", 0, math.inf, 0.0)
    if start is not None and options.solver == "closed-form":
        asked = min(asked, Proposal(start, goal.lipschitz(goal.smallest_gain(start)), "closed form", 0, math.inf, 0.0), key=lambda made: made.claimed)
    return _proved(system, [asked, *_within(goal, asked, inside)], norm)


def _alive(system: LureSystem) -> NDArray[np.bool_]:
    """Which nonlinearities can change at all: the others have no row but for rounding, or rows over such only. They make the program unbounded."""
    alive = np.ones(system.count, dtype=bool)
    known = np.zeros_like(system.rows) if system.rows_error is None else system.rows_error
    moved = np.abs(system.rows) > known
    while True:
        keep = np.concatenate([np.ones(system.inputs, dtype=bool), alive])
        found = alive & moved[:, keep].any(axis=1)
        if (found == alive).all():
            return alive
        alive = found


def _with_dead(system: LureSystem, inner: Solution, alive: NDArray[np.bool_], norm: float) -> Solution:
    """A solution of the nonlinearities that can change as one of all. The others get multipliers that are large beside those of all that they lead to."""
    count = int(alive.sum())
    columns = system.rows[:, system.inputs :]
    outputs = (system.output[:, system.inputs :] ** 2).sum(axis=0) / (1.0 if norm == 2 else max(inner.bound, 1e-100))
    dead, proposals = np.flatnonzero(~alive)[:: -1 if system.is_explicit else 1], []
    for large in _LARGE:
        whole = np.zeros(system.count)
        whole[alive] = inner.multipliers[:count] * (1 + 1 / large)
        for j in dead:
            weights = np.where(alive, large, 2.0**10) * whole
            whole[j] = min(large * (1e-250 + float(outputs[j])) + float(weights @ columns[:, j] ** 2), 1e300)
        multipliers = np.concatenate([whole, inner.multipliers[count:] * (1 + 1 / large)])
        proposals.append(Proposal(multipliers, inner.claimed, inner.status, inner.iterations, inner.gap, inner.seconds))
    return _proved(system, proposals, norm)


def _propose(
    system: LureSystem,
    goal: Program,
    inside: tuple[float, Array] | None,
    groups: Labels | None,
    options: _Options,
) -> Proposal:
    """What the solver says."""
    solver, tolerance, seconds, report = options.solver, options.tolerance, options.seconds, options.report
    if solver == "scs":
        return conic.scs(goal, max(tolerance, 1e-9), seconds)
    if solver == "clarabel":
        return conic.clarabel(goal, max(tolerance, 1e-9), seconds)
    if solver not in OWN:
        return conic.cvxpy(goal, solver, tolerance, seconds)
    if inside is None:
        return Proposal(np.zeros(goal.count), math.inf, "infeasible", 0, math.inf, 0.0)
    rho, multipliers = inside
    if groups is not None:
        rho, multipliers = _grouped_start(goal, rho, multipliers, groups)
    if solver == "newton":
        return newton(goal, (rho, multipliers), groups, tolerance, seconds=seconds, report=report)
    if solver == "closed-form":
        return Proposal(multipliers, goal.lipschitz(goal.smallest_gain(multipliers)), "closed form", 0, math.inf, 0.0)
    chain = Chain.of(system) if goal.norm == 2 else None
    if chain is None:
        raise ValueError(f"the solver {solver} is for feed-forward networks in l2; take newton")
    began = time.perf_counter()
    if solver == "rescaled":
        found = chain.spread(rescaled_product(chain))
        return Proposal(found, goal.lipschitz(goal.smallest_gain(found)), "rescaled product", 0, math.inf, time.perf_counter() - began)
    if solver == "split":
        return _split(chain, goal, tolerance, seconds, report)
    t = closed_form(system)
    if t is None:
        raise AssertionError("the closed form of a system was there, and is not; please report this")
    parts, claimed = options.descend(chain, [t[place] for place in chain.places], stop=lambda _: time.perf_counter() - began > seconds)
    return Proposal(chain.spread(parts), claimed, "first order", 0, math.inf, time.perf_counter() - began)


def _split(chain: Chain, goal: Program, tolerance: float, seconds: float, report: Report | None) -> Proposal:
    """The multipliers of consecutive parts, each solved by Newton's method with what is left of the time."""
    began, solutions = time.perf_counter(), []
    for part in chain.parts(_PART):
        system = part.system()
        program_of = program(system)
        inside = feasible(system, program_of)
        if inside is None:
            return Proposal(np.zeros(goal.count), math.inf, "infeasible", 0, math.inf, time.perf_counter() - began)
        left = max(seconds - (time.perf_counter() - began), 0.0)
        found = newton(program_of, inside, tolerance=tolerance, seconds=left, report=report)
        solutions.append((found.multipliers * (1 + 1e-9), found.claimed**2 * (1 + 1e-8)))
    whole, ends = composed(solutions), np.cumsum([0, *(len(place) for place in chain.places)])
    multipliers = chain.spread([whole[a:b] for a, b in itertools.pairwise(ends)])
    return Proposal(multipliers, goal.lipschitz(goal.smallest_gain(multipliers)), f"{len(solutions)} parts", 0, math.inf, time.perf_counter() - began)


def _grouped_start(goal: Program, rho: float, multipliers: Array, groups: Labels) -> tuple[float, Array]:
    """One multiplier per group: the closed form has one per level already; a start that was given has not, and its largest are taken."""
    made = multipliers.copy()
    for label in np.unique(groups):
        made[groups == label] = multipliers[groups == label].max()
    needed = goal.smallest_gain(made)
    return (1.2 * needed, made) if math.isfinite(needed) else (rho, multipliers)


def _better(goal: Program, inside: tuple[float, Array] | None, start: Array) -> tuple[float, Array] | None:
    """A start that was given, if it is strictly feasible and better than the closed form."""
    if start.shape != (goal.count,):
        raise ValueError(f"the start must have the shape ({goal.count},), got {start.shape}")
    raised = np.maximum(start * (1 + 1e-6), 1e-12 * float(start.max(initial=0.0)))
    gain = goal.smallest_gain(raised)
    return (1.05 * gain + 1e-12, raised) if math.isfinite(gain) and (inside is None or gain < inside[0]) else inside


def _within(goal: Program, asked: Proposal, inside: tuple[float, Array] | None) -> list[Proposal]:
    """The proposal pushed towards the inside of the cone, by more and more; at last the start itself."""
    if inside is None:
        return []
    whole = max(float(asked.multipliers.max(initial=0.0)), 1e-300) / max(float(inside[1].max(initial=0.0)), 1e-300)
    blends = [asked.multipliers * (1 - part) + part * inside[1] * max(whole, 1.0) for part in _BLENDS] if np.isfinite(asked.multipliers).all() else []
    return [dataclasses.replace(asked, multipliers=multipliers) for multipliers in (*blends, inside[1])]


def _proved(system: LureSystem, proposals: list[Proposal], norm: float) -> Solution:
    """The first proposal that proves something close to the best of them, and the proof."""
    began = time.perf_counter()
    first = proposals[0]
    bound, used = prove(system, first.multipliers, norm), first
    if not bound <= first.claimed * (1 + 1e-4):
        for proposal in proposals[1:]:
            other = prove(system, proposal.multipliers, norm)
            if other < bound:
                bound, used = other, proposal
    return Solution(bound, used.multipliers, first.claimed, first.status, first.iterations, first.gap, first.seconds, time.perf_counter() - began)


def _reduced(system: LureSystem) -> LureSystem:
    """The same program with fewer inputs: only products of what rows and output do to x enter, so a triangular factor of it serves as well."""
    first = np.vstack([system.rows[:, : system.inputs], system.output[:, : system.inputs]])
    used = np.flatnonzero(first.any(axis=1))
    if len(used) >= system.inputs:
        return system
    triangle = np.asarray(np.linalg.qr(first[used].T, mode="r"))  # (rank, used): first[used] = triangle' Q'
    narrow = np.zeros((len(first), max(len(triangle), 1)))
    if len(used):
        narrow[used, : len(triangle)] = triangle.T
    count = system.count
    rows = np.hstack([narrow[:count], system.rows[:, system.inputs :]])
    return LureSystem(narrow.shape[1], rows, system.lower, system.upper, np.hstack([narrow[count:], system.output[:, system.inputs :]]))
