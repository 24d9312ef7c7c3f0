"""Multipliers for the semidefinite relaxation of a ReLU network, by factors of low rank. They are proposals: see `sdp.lowrank_proof`.

Burer & Monteiro (2003), for this relaxation Chiu & Zhang (2023): `X = [e_0'; R] [e_0'; R]'`, where R has one row for each signal and few columns, the first of
them the signals themselves. So a step costs two products of the network's rows with R. The problem in R is not convex; where the slack of its multipliers is
positive semidefinite they are those of the relaxation, and where it is not, the eigenvector of its least eigenvalue is the way out, as one more column.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from sdp.lowrank import Proposal, Scaled
from sdp.lowrank_proof import Multipliers
from sdp.ranged import Ranged
from sdp.relaxation import Relaxation

Array = NDArray[np.float64]
_FAMILIES = ("positive", "above", "chord", "product", "square", "sides", "ball")
_MORE = 6  # columns, beyond those of the start
_FIRST, _USUAL, _LARGEST = 5.0, 30.0, 1e3  # penalties; large ones make the steps slow, and most multipliers converge without
_STEPS = 1000  # of L-BFGS in a round
_HISTORY = 20  # of L-BFGS
_STUCK = 4  # rounds without a better bound
_LIFTS = 10.0 ** np.arange(-10.0, 2.01, 0.25)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # a proposal of numbers that overflow proves nothing
def propose(
    relaxation: Relaxation,
    row: Ranged,  # (signals,)
    offset: Ranged,  # ()
    accuracy: float = 1e-5,
    goal: float | None = None,
    steps: int = 60,
) -> Proposal:
    """Multipliers for the minimum of `row s + offset` to within `accuracy` of the size of its row, or the best that so many rounds find.

    With a `goal`, stops once the minimum is, as far as a solver knows, on one side of it.
    """
    return _Factors(Scaled.of(relaxation, row, offset)).run(accuracy, goal, steps)


def memory(relaxation: Relaxation) -> int:
    """About how many bytes `propose` needs."""
    inputs, unstable = len(relaxation.region.center), relaxation.unstable
    signals = unstable + (inputs if relaxation.region.boxed else min(inputs, unstable + 1))
    columns = len(relaxation.layers) + 1 + _MORE
    return 8 * (10 * signals**2 + 8 * unstable * (inputs + unstable) + (2 * _HISTORY + 10) * signals * columns)


@dataclasses.dataclass(frozen=True, eq=False)
class _Slack:
    """The Lagrangian `constant + 2 linear's + s' quadratic s` of multipliers."""

    constant: float
    linear: Array  # (signals,)
    quadratic: Array  # (signals, signals)


class _Factors:
    """An augmented Lagrangian in R, with L-BFGS inside. The neurons' outputs are in units of their largest, so that every one lies in [0, 1]."""

    def __init__(self, problem: Scaled) -> None:
        self.problem, self.inputs = problem, problem.inputs
        count, self.signals = problem.rows.shape
        self.rows, self.objective = problem.rows.copy(), problem.objective.copy()
        self.rows[:, self.inputs :] *= problem.upper
        self.objective[self.inputs :] *= problem.upper
        self.slope, self.chord = problem.slope / problem.upper, problem.chord / problem.upper
        sizes = (*(count,) * 5, self.inputs if problem.boxed else 0, int(problem.ball))
        self.ends = np.cumsum(sizes)[:-1]
        self.signed = np.repeat([name != "product" for name in _FAMILIES], sizes)
        self.low, self.high = problem.low[: sizes[5]], problem.high[: sizes[5]]
        self.lift = np.repeat([float(name == "square" or name == ("ball" if problem.ball else "sides")) for name in _FAMILIES], sizes)
        self.zero = np.zeros(len(self.lift))

    def values(self, R: Array) -> tuple[Array, Array]:  # (signals, r) -> (constraints,), (U, r)
        """What has to be 0, or not above 0; and the neurons' inputs."""
        E, A, upper = R[: self.inputs], R[self.inputs :], self.problem.upper
        V = self.rows @ R
        V[:, 0] += self.problem.offset
        a, v = A[:, 0], V[:, 0]
        parts = [-a, v - upper * a, a - self.slope * v - self.chord, (A * (upper[:, None] * A - V)).sum(axis=1), (A * A).sum(axis=1) - a]
        if self.problem.boxed:
            parts.append((E * E).sum(axis=1) - (self.low + self.high) * E[:, 0] + self.low * self.high)
        if self.problem.ball:
            parts.append(np.array([(E * E).sum() - 1.0]))
        return np.concatenate(parts), V

    def gradient(self, R: Array, V: Array, multipliers: Array) -> Array:  # (signals, r)
        """The derivative of the objective and of the multipliers times the constraints."""
        positive, above, chord, product, square, sides, ball = np.split(multipliers, self.ends)
        E, A, upper = R[: self.inputs], R[self.inputs :], self.problem.upper
        of_v = -product[:, None] * A
        of_v[:, 0] += above - self.slope * chord
        found = self.rows.T @ of_v
        found[:, 0] += self.objective
        found[self.inputs :] += product[:, None] * (2 * upper[:, None] * A - V) + 2 * square[:, None] * A
        found[self.inputs :, 0] += chord - positive - above * upper - square
        if self.problem.boxed:
            found[: self.inputs] += 2 * sides[:, None] * E
            found[: self.inputs, 0] -= sides * (self.low + self.high)
        if self.problem.ball:
            found[: self.inputs] += 2 * ball * E
        return found

    def slack(self, multipliers: Array) -> _Slack:
        """The Lagrangian as a quadratic form: the dual bound is its least value."""
        positive, above, chord, product, square, sides, ball = np.split(multipliers, self.ends)
        inputs, problem = self.inputs, self.problem
        quadratic = np.zeros((self.signals, self.signals))
        quadratic[inputs:] = -product[:, None] * self.rows / 2
        quadratic += quadratic.T
        diagonal = quadratic.ravel()[:: self.signals + 1]
        diagonal[inputs:] += product * problem.upper + square
        linear = self.objective + self.rows.T @ (above - self.slope * chord)
        linear[inputs:] += chord - positive - above * problem.upper - square - product * problem.offset
        constant = problem.constant + float(above @ problem.offset - chord @ (self.slope * problem.offset + self.chord))
        if problem.boxed:
            diagonal[:inputs] += sides
            linear[:inputs] -= sides * (self.low + self.high)
            constant += float(sides @ (self.low * self.high))
        if problem.ball:
            diagonal[:inputs] += ball
            constant -= float(ball[0])
        return _Slack(constant, linear / 2, quadratic)

    def lifted(self, multipliers: Array) -> tuple[float, Array, float, Array]:
        """The best bound with the squares, and the ball or the sides, raised by one number: that adds it to every eigenvalue of the slack.

        The bound, those multipliers, and the least eigenvalue before, with its vector.
        """
        slack, raised = self.slack(multipliers), self.slack(self.lift)
        none = self.slack(self.zero)
        try:
            eigenvalues, vectors = np.linalg.eigh(slack.quadratic)
        except np.linalg.LinAlgError:  # numbers that overflowed
            return -math.inf, multipliers, 0.0, np.zeros((self.signals, 1))
        lifts = max(-float(eigenvalues[0]), 0.0) + _LIFTS
        linear = (vectors.T @ slack.linear)[:, None] + (vectors.T @ (raised.linear - none.linear))[:, None] * lifts
        bounds = slack.constant + (raised.constant - none.constant) * lifts - (linear**2 / (eigenvalues[:, None] + lifts)).sum(axis=0)
        best = int(np.argmax(np.nan_to_num(bounds, nan=-math.inf)))
        return float(bounds[best]), multipliers + lifts[best] * self.lift, float(eigenvalues[0]), vectors[:, :1]

    def forward(self, e: Array) -> Array:  # (signals,)
        """The signals of one input."""
        s, first = np.concatenate([e, np.zeros(len(self.rows))]), 0
        for count in self.problem.layers:
            part = slice(first, first + count)
            s[self.inputs + first : self.inputs + first + count] = np.maximum(self.rows[part] @ s + self.problem.offset[part], 0.0) / self.problem.upper[part]
            first += count
        return s

    def inside(self, e: Array) -> Array:
        """An input of the region."""
        if self.problem.ball:
            e = e / max(1.0, float(np.linalg.norm(e)))
        return np.clip(e, self.low, self.high) if self.problem.boxed else e

    def slope_at(self, s: Array) -> Array:  # (inputs,)
        """The derivative of the objective by the input."""
        slope, active, last = self.objective.copy(), (s[self.inputs :] > 0) / self.problem.upper, len(self.rows)
        for count in reversed(self.problem.layers):
            part = slice(last - count, last)
            slope += self.rows[part].T @ (slope[self.inputs :][part] * active[part])
            last -= count
        return slope[: self.inputs]

    def attack(self, e: Array) -> tuple[float, Array]:
        """The least objective that projected gradient steps from an input find, and its signals."""
        best, found = math.inf, self.forward(e)
        for step in range(40):
            s = self.forward(e)
            value = float(self.objective @ s)
            if value < best:
                best, found = value, s
            slope = self.slope_at(s)
            move = slope / max(float(np.linalg.norm(slope)), 1e-300) if self.problem.ball else np.sign(slope)
            e = self.inside(e - 2 / (2 + step) * move)
        return best, found

    def solved(self, R: Array, multipliers: Array, penalty: float, tolerance: float) -> Array:
        """The factors of a round."""

        def lagrangian(flat: Array) -> tuple[float, Array]:
            R = flat.reshape(self.signals, -1)
            values, V = self.values(R)
            moved = self.moved(multipliers, penalty, values)
            return float(self.objective @ R[:, 0] + moved @ moved / (2 * penalty)), self.gradient(R, V, moved).ravel()

        options = {"maxiter": _STEPS, "maxfun": 2 * _STEPS, "maxcor": _HISTORY, "ftol": 1e-15, "gtol": tolerance}
        return np.asarray(scipy.optimize.minimize(lagrangian, R.ravel(), jac=True, method="L-BFGS-B", options=options).x).reshape(self.signals, -1)

    def moved(self, multipliers: Array, penalty: float, values: Array) -> Array:
        """The multipliers after a round."""
        found = multipliers + penalty * values
        return np.where(self.signed, np.maximum(found, 0.0), found)

    def start(self) -> tuple[float, Array]:
        """The best attack from the center and from four other inputs, as the first column, and a little noise beside it."""
        rng = np.random.default_rng(0)
        starts = [np.zeros(self.inputs), *rng.standard_normal((4, self.inputs))]
        least, s = min((self.attack(self.inside(e)) for e in starts), key=lambda found: found[0])
        columns = sum(count > 0 for count in self.problem.layers)
        return least, np.hstack([s[:, None], 1e-2 * rng.standard_normal((self.signals, columns))])

    def run(self, accuracy: float, goal: float | None, steps: int) -> Proposal:
        """Rounds until the gap is below the accuracy, a bound is on one side of the goal, or nothing is left to try."""
        problem = self.problem
        limits = (-math.inf, math.inf) if goal is None else (goal / problem.unit, goal / problem.unit + 1e-7)
        least, R = self.start()
        upper, lower, best, most = least + problem.constant, -math.inf, self.lift, R.shape[1] + _MORE
        multipliers, penalty, missing, since, done = self.zero, _FIRST, math.inf, 0, 0
        while done < steps:
            done += 1
            R = self.solved(R, multipliers, penalty, min(max(1e-10, 1e-3 * missing), 1e-3))
            values, _ = self.values(R)
            moved = self.moved(multipliers, penalty, values)
            if not (np.isfinite(R).all() and np.isfinite(moved).all()):
                break
            before, missing = missing, float(np.abs(moved - multipliers).max()) / penalty
            multipliers = moved
            bound, raised, eigenvalue, vector = self.lifted(multipliers)
            # a constraint that is missed costs about its multiplier, which may still grow by about 1: the row has size 1
            broken = np.abs(np.where(self.signed, np.maximum(values, 0.0), values))
            claimed = float(self.objective @ R[:, 0] + (np.abs(multipliers) + 1.0) @ broken) + problem.constant
            upper = min(upper, float(self.objective @ self.forward(self.inside(R[: self.inputs, 0]))) + problem.constant)
            since = 0 if bound > lower + 0.05 * (claimed - lower) else since + 1
            if bound > lower:
                lower, best = bound, raised
            if min(upper, claimed) - lower < accuracy or upper < limits[0] or lower > limits[1]:
                upper = min(upper, claimed)
                break
            penalty = min(1.7 * penalty, _USUAL) if missing > 0.4 * before and penalty < _USUAL else penalty
            if since < _STUCK:
                continue
            if R.shape[1] < most and eigenvalue < -accuracy / 10:
                R = np.hstack([R, 0.05 * vector])
            elif penalty < _LARGEST:
                penalty *= 3
            else:
                break
            since = 0
        return Proposal(self.back(best), lower * problem.unit, upper * problem.unit, done)

    def back(self, multipliers: Array) -> Multipliers:
        """... in the units of the network."""
        found = dict(zip(_FAMILIES, np.split(multipliers, self.ends), strict=True))
        upper = self.problem.upper
        for name, power in (("positive", 1), ("chord", 1), ("product", 1), ("square", 2)):
            found[name] = found[name] / upper**power
        return self.problem.back(found)
