"""Multipliers for the semidefinite relaxation of a ReLU network, by a primal-dual interior-point method. They are proposals: see `sdp.lowrank_proof`.

The relaxation is that of Raghunathan, Steinhardt & Liang (2018), whose solutions have low rank (Chiu & Zhang 2023), with the chord of each neuron added:
minimise `<C, X>` over X >= 0 with `X_00 = 1` and `<A_j, X> <= 0`, or `= 0`, where X stands for `[1; s] [1; s]'`. Every `A_j = (p_j q_j' + q_j p_j') / 2`
but that of the ball has rank two, and p_j and q_j are sums of at most three of the vectors e_0, e_i and `g_j = e_j - v_j`. So the Schur complement
`tr(A_j X A_k S^-1)` of a step is made of elementwise products of six matrices like `P X Q'`, and no A_j is ever formed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy import sparse

from sdp.lowrank_proof import Multipliers
from sdp.ranged import Ranged
from sdp.relaxation import Relaxation, all_rows

Array = NDArray[np.float64]
_FAMILIES = ("positive", "above", "chord", "product", "square", "sides", "corner", "ball")
_LARGEST = 1e300  # of a multiplier


@dataclasses.dataclass(frozen=True, eq=False)
class Proposal:
    """Multipliers and what the solver claims of the relaxation's minimum; neither number is proved."""

    multipliers: Multipliers
    lower: float  # the dual objective
    upper: float  # the primal objective; inf while its constraints are not met
    steps: int


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # a proposal of numbers that overflow proves nothing
def propose(
    relaxation: Relaxation,
    row: Ranged,  # (signals,)
    offset: Ranged,  # ()
    accuracy: float = 1e-5,
    goal: float | None = None,
    steps: int = 100,
) -> Proposal:
    """Multipliers for the minimum of `row s + offset` to within `accuracy` of the size of its row.

    With a `goal`, stops once the minimum is, as far as a solver knows, on one side of it.
    """
    return _Solver(Scaled.of(relaxation, row, offset)).run(accuracy, goal, steps)


def memory(relaxation: Relaxation) -> int:
    """About how many bytes `propose` needs."""
    return memory_for(len(relaxation.region.center), relaxation.unstable, relaxation.region.boxed)


def memory_for(inputs: int, unstable: int, boxed: bool) -> int:
    """... for so many inputs and unstable neurons, and a region with bounds on single entries or without."""
    signals = unstable + (inputs if boxed else min(inputs, unstable + 1))
    constraints = 5 * unstable + (inputs if boxed else 0) + 2
    return 8 * (12 * (signals + 1) ** 2 + 4 * (signals + unstable + 1) ** 2 + 12 * constraints**2)


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """The relaxation in units in which e and v lie in about [-1, 1] and the row has size 1, and how to go back."""

    rows: Array  # (U, signals)
    offset: Array  # (U,)
    chord: Array  # (U,) slope (v - lower) at v = 0
    slope: Array  # (U,)
    upper: Array  # (U,)
    low: Array  # (inputs,)
    high: Array  # (inputs,)
    objective: Array  # (signals,)
    constant: float
    layers: tuple[int, ...]  # unstable neurons of each
    inputs: int  # fewer than the network's where only the directions that its rows see matter
    ball: bool
    boxed: bool
    unit: float
    neuron: Array  # (U,)
    side: Array  # (the network's inputs,)

    @classmethod
    def of(cls, relaxation: Relaxation, row: Ranged, offset: Ranged) -> Scaled:
        region = relaxation.region
        inputs = len(region.center)
        rows, offsets = all_rows(relaxation.layers, inputs)
        empty = np.zeros(0)
        lower, upper, slope = (np.concatenate([empty, *(getattr(part, name) for part in relaxation.layers)]) for name in ("lower", "upper", "slope"))
        low, high = region.sides
        side = np.full(inputs, region.radius) if region.norm == 2 else np.maximum(-low, high)
        side, neuron = np.where(side > 0, side, 1.0), np.maximum(upper, -lower)
        seen = rows.value[:, :inputs] * side / neuron[:, None]
        of_inputs, of_neurons = row.value[:inputs] * side, row.value[inputs:] * neuron
        if not region.boxed and len(upper) + 1 < inputs:  # an l2 ball looks the same from every direction
            triangle = np.linalg.qr(np.vstack([seen, of_inputs]).T)[1]
            seen, of_inputs = triangle[:, :-1].T, triangle[:, -1]
        unit = float(np.abs(of_neurons).sum() + np.sqrt(of_inputs @ of_inputs)) or 1.0
        return cls(
            rows=np.hstack([seen, rows.value[:, inputs:] * neuron / neuron[:, None]]),
            offset=offsets.value / neuron,
            chord=-slope * lower / neuron,
            slope=slope,
            upper=upper / neuron,
            low=low / side,
            high=high / side,
            objective=np.concatenate([of_inputs, of_neurons]) / unit,
            constant=float(offset.value) / unit,
            layers=tuple(len(part.lower) for part in relaxation.layers),
            inputs=len(of_inputs),
            ball=region.norm == 2,
            boxed=region.boxed,
            unit=unit,
            neuron=neuron,
            side=side,
        )

    def back(self, found: dict[str, Array]) -> Multipliers:
        """The multipliers in the units of the network."""
        linear, quadratic, side = self.unit / self.neuron, self.unit / self.neuron**2, self.unit / self.side**2
        return Multipliers(
            positive=_finite(found["positive"] * linear, 0.0),
            above=_finite(found["above"] * linear, 0.0),
            chord=_finite(found["chord"] * linear, 0.0),
            product=_finite(found["product"] * quadratic, -_LARGEST),
            square=_finite(found["square"] * quadratic, 0.0),
            ball=float(_finite(found["ball"] * side[0], 0.0)[0]) if self.ball else 0.0,
            sides=_finite(found["sides"] * side, 0.0) if self.boxed else np.zeros(len(self.side)),
        )


def _finite(values: Array, least: float) -> Array:
    return np.clip(np.nan_to_num(values, nan=0.0), least, _LARGEST)


class _Solver:
    """Helmberg-Kojima-Monteiro steps with Mehrotra's predictor and corrector; dual feasible throughout."""

    def __init__(self, problem: Scaled) -> None:
        self.problem = problem
        count, signals = problem.rows.shape
        inputs = problem.inputs
        self.size = 1 + signals
        self.g = np.hstack([-problem.offset[:, None], -problem.rows])  # (U, 1 + signals)
        self.g[np.arange(count), 1 + inputs + np.arange(count)] += 1.0
        self.ball = np.concatenate([[-1.0], np.ones(inputs), np.zeros(count)])
        self.cost = np.zeros((self.size, self.size))
        self.cost[0, 0], self.cost[0, 1:], self.cost[1:, 0] = problem.constant, problem.objective / 2, problem.objective / 2
        self._factors()
        sizes = (*(count,) * 5, inputs if problem.boxed else 0, 1, int(problem.ball))
        ends = np.cumsum(sizes)
        self.place = {name: slice(end - size, end) for name, size, end in zip(_FAMILIES, sizes, ends, strict=True)}
        self.count, self.rank_two = int(ends[-1]), int(ends[-2])
        equal = np.zeros(self.count, dtype=bool)
        equal[self.place["product"]] = equal[self.place["corner"]] = True
        self.signed = np.flatnonzero(~equal)
        self.right = np.zeros(self.count)
        self.right[self.place["corner"]] = 1.0

    def _factors(self) -> None:
        """p_j and q_j as rows over e_0, e_1, ..., g_1, ...; in the order of the families."""
        problem = self.problem
        count = len(problem.rows)
        inputs, one = problem.inputs if problem.boxed else 0, np.ones(count)
        zero, a, g = np.zeros(count, dtype=int), 1 + problem.inputs + np.arange(count), self.size + np.arange(count)
        e, none, of_e = 1 + np.arange(inputs), np.zeros(inputs, dtype=int), np.ones(inputs)
        corner = (np.zeros(1, dtype=int), np.ones(1))
        p = [[(a, -one)], [(g, -one)], [(a, 1 - problem.slope), (g, problem.slope), (zero, -problem.chord)], [(a, one)], [(a, one)]]
        q = [[(zero, one)], [(zero, one)], [(zero, one)], [(g, one)], [(a, one), (zero, -problem.upper)]]
        p += [[(e, of_e), (none, -problem.low[:inputs])], [corner]]
        q += [[(e, of_e), (none, -problem.high[:inputs])], [corner]]
        self.p, self.q = _stacked(p, self.size + count), _stacked(q, self.size + count)

    def _seen(self, matrix: Array) -> Array:
        """A symmetric matrix between all pairs of the vectors e_0, e_1, ..., g_1, ..."""
        half = self.g @ matrix
        return np.block([[matrix, half.T], [half, half @ self.g.T]])

    def _values(self, matrix: Array, seen: Array) -> Array:
        """`<A_j, matrix>`, each from the entries of `_seen` that it consists of."""
        problem, inputs, size = self.problem, self.problem.inputs, self.size
        diagonal, corner = np.diagonal(matrix), matrix[0, 0]
        a, g, product = matrix[1 + inputs :, 0], seen[size:, 0], np.diagonal(seen[1 + inputs : size, size:])
        found = [-a, -g, (1 - problem.slope) * a + problem.slope * g - problem.chord * corner, product, diagonal[1 + inputs :] - problem.upper * a]
        if problem.boxed:
            low, high = problem.low, problem.high
            found.append(diagonal[1 : 1 + inputs] - (low + high) * matrix[1 : 1 + inputs, 0] + low * high * corner)
        found.append(np.array([corner]))
        if problem.ball:
            found.append(np.array([self.ball @ diagonal]))
        return np.concatenate(found)

    def _sum(self, multipliers: Array) -> Array:
        """`sum_j multipliers_j A_j`."""
        problem, inputs = self.problem, self.problem.inputs
        positive, above, chord, product, square, sides, corner, ball = (multipliers[self.place[name]] for name in _FAMILIES)
        total, diagonal = np.zeros((self.size, self.size)), np.zeros(self.size)
        total[0] = (problem.slope * chord - above) @ self.g
        total[0, 1 + inputs :] += (1 - problem.slope) * chord - positive - problem.upper * square
        total[0, 0] += corner[0] - problem.chord @ chord
        total[1 + inputs :] += product[:, None] * self.g
        diagonal[1 + inputs :] = square
        if problem.boxed:
            total[0, 1 : 1 + inputs] -= (problem.low + problem.high) * sides
            total[0, 0] += (problem.low * problem.high) @ sides
            diagonal[1 : 1 + inputs] = sides
        if problem.ball:
            diagonal += ball[0] * self.ball
        total = (total + total.T) / 2
        total[np.diag_indices(self.size)] += diagonal
        return total

    def _schur(self, primal: Array, inverse: Array, seen: Array, seen_inverse: Array) -> Array:
        """`tr(A_j X A_k S^-1)`."""
        between = [
            [_product(left @ matrix, right) for left, right in ((self.p, self.p), (self.p, self.q), (self.q, self.q))] for matrix in (seen, seen_inverse)
        ]
        (pp, pq, qq), (pp_, pq_, qq_) = between
        mixed = pq.T * pq_
        rank_two = (mixed + mixed.T + qq * pp_ + pp * qq_) / 4
        if not self.problem.ball:
            return rank_two
        whole = np.empty((self.count, self.count))
        whole[:-1, :-1] = rank_two
        across = (inverse * self.ball) @ primal
        whole[-1] = whole[:, -1] = self._values((across + across.T) / 2, self._seen((across + across.T) / 2))
        whole[-1, -1] = float(((self.ball[:, None] * primal) * (inverse * self.ball)).sum())
        return whole

    def _start(self) -> Array:
        """Multipliers for which S is positive definite: products 0, squares and ball or sides positive, and the corner as low as it has to be."""
        start = np.ones(self.count)
        start[self.place["product"]] = start[self.place["corner"]] = 0.0
        for name in ("square", "sides", "ball"):
            start[self.place[name]] = 2.0
        slack = self.cost + self._sum(start)
        start[self.place["corner"]] = 10.0 - slack[0, 0] + slack[0, 1:] @ np.linalg.solve(slack[1:, 1:], slack[1:, 0])
        return start

    def run(self, accuracy: float, goal: float | None, steps: int) -> Proposal:
        """Steps until the gap is below the accuracy, a bound is on one side of the goal, or there is no further step."""
        signed, place = self.signed, self.place
        limits = (-math.inf, math.inf) if goal is None else (goal / self.problem.unit, goal / self.problem.unit + 1e-7)
        multipliers = self._start()
        slack = self.cost + self._sum(multipliers)
        primal, gaps = np.eye(self.size), np.ones(len(signed))  # gaps_j = -<A_j, X>, in the end
        barrier = self.size + len(signed)
        lower, upper, step = -math.inf, math.inf, 0
        for step in range(steps + 1):
            factor = _factor(slack)
            if factor is None:
                break
            inverse = np.tril(scipy.linalg.lapack.dpotri(factor, lower=1)[0])
            inverse += np.tril(inverse, -1).T
            seen, seen_inverse = self._seen(primal), self._seen(inverse)
            missing = self.right - self._values(primal, seen)
            missing[signed] -= gaps
            mu = float((primal * slack).sum() + multipliers[signed] @ gaps) / barrier
            lower = 1 / float(inverse[0, 0]) - float(multipliers[place["corner"]][0])  # the corner could be so much lower
            upper = float((self.cost * primal).sum()) if np.abs(missing).max() < 1e-5 else math.inf
            if mu * barrier < accuracy or upper < limits[0] or lower > limits[1] or step == steps:
                break
            schur = self._schur(primal, inverse, seen, seen_inverse)
            schur[signed, signed] += gaps / multipliers[signed]
            solve = _solver(schur)
            if solve is None:
                break
            point = _Point(primal, gaps, multipliers, inverse, self._values(inverse, seen_inverse), solve)
            move, of_slack, of_primal, of_gaps = self._direction(point, 0.0, np.zeros_like(primal), np.zeros_like(gaps))
            first = _length(primal, of_primal, gaps, of_gaps)
            second = _length(slack, of_slack, multipliers[signed], move[signed])
            left = float(((primal + first * of_primal) * (slack + second * of_slack)).sum())
            left += float((multipliers[signed] + second * move[signed]) @ (gaps + first * of_gaps))
            target = max(min(max(left / barrier / mu, 0.0), 1.0) ** 2, 1e-3) * mu
            bent = of_primal @ of_slack @ inverse
            move, of_slack, of_primal, of_gaps = self._direction(point, target, (bent + bent.T) / 2, move[signed] * of_gaps)
            first = 0.9 * _length(primal, of_primal, gaps, of_gaps)
            second = 0.9 * _length(slack, of_slack, multipliers[signed], move[signed])
            if max(first, second) < 1e-6:
                break
            primal, gaps, multipliers = primal + first * of_primal, gaps + first * of_gaps, multipliers + second * move
            slack = self.cost + self._sum(multipliers)
        found = {name: multipliers[where] for name, where in place.items()}
        return Proposal(self.problem.back(found), lower * self.problem.unit, upper * self.problem.unit, step)

    def _direction(self, point: _Point, target: float, bent: Array, bent_gaps: Array) -> tuple[Array, Array, Array, Array]:
        """The step to `X S = target I` and `multipliers gaps = target`, where the products of the predictor's own steps are expected to be `bent`.

        What the multipliers, S, X and the gaps move by.
        """
        multipliers = point.multipliers[self.signed]
        right = target * point.of_inverse - self.right - self._values(bent, self._seen(bent))
        right[self.signed] += (target - bent_gaps) / multipliers
        move = point.solve(right)
        of_slack = self._sum(move)
        product = point.primal @ of_slack @ point.inverse
        of_primal = target * point.inverse - point.primal - (product + product.T) / 2 - bent
        of_gaps = (target - bent_gaps - point.gaps * move[self.signed]) / multipliers - point.gaps
        return move, of_slack, of_primal, of_gaps


class _Point(NamedTuple):
    """Where a step starts."""

    primal: Array  # X
    gaps: Array  # (signed,)
    multipliers: Array
    inverse: Array  # of S
    of_inverse: Array  # <A_j, S^-1>
    solve: Callable[[Array], Array]  # with the Schur complement


def _stacked(families: list[list[tuple[NDArray[np.int64], Array]]], width: int) -> sparse.csr_matrix:
    """Rows from the columns and values of their entries, family by family."""
    starts = np.cumsum([0, *(len(family[0][0]) for family in families)])
    entries = [(start + np.arange(len(columns)), columns, values) for start, family in zip(starts, families, strict=False) for columns, values in family]
    rows, columns, values = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return sparse.csr_matrix((values, (rows, columns)), shape=(starts[-1], width))


def _product(left: Array, right: sparse.csr_matrix) -> Array:
    """`left right'`."""
    return np.asarray((right @ left.T).T)


def _factor(matrix: Array) -> Array | None:
    """The lower Cholesky factor, or None."""
    factor, problem = scipy.linalg.lapack.dpotrf(matrix, lower=1, clean=0)
    return None if problem else factor


def _solver(matrix: Array) -> Callable[[Array], Array] | None:
    """Solves with a positive semidefinite matrix, scaled to a unit diagonal and with a trace of the identity added; None where there is no factor."""
    scale = np.sqrt(np.maximum(np.diagonal(matrix), 1e-300))
    matrix = matrix / scale / scale[:, None]
    for ridge in (1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7):
        matrix[np.diag_indices(len(matrix))] += ridge
        factor = _factor(matrix)
        if factor is not None:
            return functools.partial(_scaled_solve, factor, scale)
    return None


def _scaled_solve(factor: Array, scale: Array, right: Array) -> Array:
    return np.asarray(scipy.linalg.cho_solve((factor, True), right / scale, check_finite=False) / scale)


def _length(matrix: Array, move: Array, numbers: Array, of_numbers: Array) -> float:
    """How much of a move, at most all of it, keeps the matrix positive definite and the numbers positive."""
    falling = of_numbers < 0
    length = min(1.0, 1 / float((-of_numbers[falling] / numbers[falling]).max())) if falling.any() else 1.0
    while _factor(matrix + length * move) is None:
        length *= 0.8
        if length < 1e-8:
            return 0.0
    return length
