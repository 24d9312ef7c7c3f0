"""`LocalMargin(...)`: certified radii of any network that `Local` sees through, from bounds of the margins and of their gradients in growing balls."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from certify.bound import Array, Assumption, Ball, Everywhere
from certify.errors import CertifyError, Unsupported
from certify.graph import Graph
from certify.local import clarke, coupled
from certify.local.condense import Condensed, condense, output_range
from certify.local.crown import upper_bounds
from certify.local.decide import lowest
from certify.local.directed import downward, upward
from certify.local.method import DUAL, limit_of, program_of
from certify.local.program import Gate, Program
from certify.local.region import Region
from certify.methods import Layerwise
from certify.rounding import multiply_up, up
from certify.singly import OneByOne
from sdp.activation import RELU
from sdp.proof import gamma

_GROWTH = 1.5  # of a step, after one that succeeded
_NEAREST = 1e-6  # of a step, the smallest that is tried
_LOOKED_AT = 8  # margins whose gradients say how large the first ball is
_WORK = 1e11  # products for the bounds of the gradients in one ball
_RATE = 2e9  # of them in a second, where time is short
_FARTHEST = 1e9
_MOST = 10_000  # steps
_NODES = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A network, and constants of the differences of its outputs that hold everywhere."""

    program: Program
    everywhere: Array | None  # (outputs, outputs)


@dataclasses.dataclass(frozen=True)
class LocalMargin(OneByOne[Seen]):
    """No other class has a larger logit anywhere in a ball: every margin is followed from the input outwards, ball by ball, and stays positive.

    From a ball to the next larger one a margin falls by at most the difference of their radii times a bound of its gradient in the larger (the staircase of
    RecurJac, Zhang et al. 2019), and is at least what linear relaxations (CROWN) prove of it there, and what the layers' norms prove everywhere; the
    largest of the three is kept. The balls grow by about one of `steps` parts of the radius that the gradient at the input would give, by less where that
    is too far, and the search ends within one of `2 steps` parts of the radius. With a `radius`, only that is asked: linear relaxations with lines chosen
    for each margin, then branch and bound with up to `nodes` for each (alpha-beta-CROWN, Wang et al. 2021; 2000 unless given), then balls that grow up to
    there; a point of another class ends it. A search goes on by such questions where `nodes` are given, up to the same part of the radius. `within` leaves
    out all inputs with entries outside of a range. Norms: 1, 2 and inf. `seconds` are for each input: what is proved by then is the radius.
    """

    name: ClassVar[str] = "local"
    radius: float | None = None
    norm: float = 2.0
    steps: int = 8
    within: tuple[float, float] | None = None
    memory: float = 1.0  # GiB, for the gates that a ball leaves undecided
    nodes: int | None = None
    seconds: float = dataclasses.field(default=math.inf, repr=False)  # it changes how much is found, not what a radius means

    def __post_init__(self) -> None:
        if self.norm not in (1, 2, math.inf):
            raise CertifyError(f"LocalMargin is for norm=1, 2 and math.inf, got norm={self.norm!r}")
        if self.radius is not None and not (self.radius >= 0 and math.isfinite(self.radius)):
            raise CertifyError(f"a radius is finite and not negative, got radius={self.radius}; leave it out to search for the largest")
        if not isinstance(self.steps, int) or not 1 <= self.steps <= _MOST or not self.memory > 0 or not self.seconds > 0:
            raise CertifyError(
                f"a whole number of steps from 1 to {_MOST:,}, and positive memory and seconds are needed, "
                f"got {self.steps} steps, {self.memory} GiB and {self.seconds} seconds"
            )
        if self.nodes is not None and not (isinstance(self.nodes, int) and self.nodes >= 0):
            raise CertifyError(f"nodes is the most that branch and bound looks at for each margin, 0 or more, got {self.nodes}")
        if self.within is not None and not (_numbers(self.within) and len(self.within) == 2 and -math.inf < self.within[0] < self.within[1] < math.inf):
            raise CertifyError(f"within is the smallest and the largest entry that an input can have, such as (0, 1), got {self.within}")

    def see(self, graph: Graph) -> Seen:
        try:
            bound = Layerwise().bound(graph, Everywhere())
        except Unsupported:
            bound = None
        program = program_of(graph)
        if program.outputs < 2:
            raise CertifyError(f"a classifier returns at least two numbers for an input, this network returns {program.outputs}")
        if bound is None or self.norm == math.inf:
            return Seen(program, None)
        pairs = np.full((program.outputs, program.outputs), multiply_up(up(math.sqrt(2)), bound.value)) if bound.pairs is None else bound.pairs
        return Seen(program, pairs)  # from l2, and so from l1, in which differences are no smaller

    @property
    def assumptions(self) -> frozenset[Assumption]:
        return super().assumptions | (frozenset() if self.within is None else {Assumption.INPUT_RANGE})

    def around(self, seen: Seen, x: Array, z: Array) -> tuple[int, int, float]:
        if not np.isfinite(z).all():
            return -1, -1, 0.0
        walk = _Walk(self, seen, x, int(np.argmax(z)))
        reached = walk.to(math.inf if self.radius is None else math.nextafter(self.radius, math.inf))
        return walk.prediction, walk.limit, reached if self.radius is None or reached > self.radius else 0.0

    def proved(self, seen: Seen, x: Array, z: Array, radius: float) -> bool:
        whole = dataclasses.replace(self, seconds=math.inf)
        return bool(np.isfinite(z).all()) and _Walk(whole, seen, x, int(np.argmax(z))).to(radius) >= radius


class _Walk:
    """The margins of one input, in balls that grow."""

    def __init__(self, method: LocalMargin, seen: Seen, x: Array, prediction: int) -> None:
        self.method, self.program, self.x, self.prediction = method, seen.program, x, prediction
        self.others = [j for j in range(seen.program.outputs) if j != prediction]
        unit = torch.eye(seen.program.outputs, dtype=torch.float64)
        self.rows = unit[prediction] - unit[self.others]
        everywhere = np.full(len(self.others), math.inf) if seen.everywhere is None else seen.everywhere[prediction, self.others]
        self.everywhere = torch.from_numpy(np.ascontiguousarray(everywhere))
        self.limit = self.others[0]
        self.nodes = method.nodes if method.nodes is not None else _NODES * (method.radius is not None)
        self.end = time.monotonic() + method.seconds

    def to(self, goal: float) -> float:
        """The largest radius that is proved, up to a goal: the margins are positive at every point nearer than that, and at `goal` too where it is reached."""
        start, slopes = self.at_input()
        if not bool((start > 0).all()):
            self.limit = self.others[int(start.argmin())]
            return 0.0
        best = self._limited(start, self.everywhere, 0.0)  # what is known without looking around the input
        if math.isfinite(goal):
            answer = True if best >= goal else self.asked(goal)
            if answer is not None:
                return goal if answer else best
        first = float((start / slopes.clamp(min=1e-300)).min())  # to the first order
        size = 1.0 + float(np.linalg.norm(self.x, ord=self.method.norm))  # where all gates are shut or flat the gradient is 0, and says nothing
        usual = min(first, size) / self.method.steps
        radius, margins, step = 0.0, start, usual
        while radius < min(goal, _FARTHEST) and time.monotonic() < self.end:
            target = min(radius + step, goal)
            found = self._tried(target)
            if found is not None:
                below, slopes = found
                slopes = torch.minimum(slopes, self.everywhere)
                fallen = downward(margins - upward(slopes * upward(torch.tensor(target - radius, dtype=torch.float64))))
                after = torch.maximum(torch.maximum(below, fallen), downward(start - upward(self.everywhere * target)))
                if bool((after > 0).all()):
                    radius, margins = target, after
                    step = min(step * _GROWTH, max(usual, radius / 4))
                    continue
                best = max(best, min(target, self._limited(margins, slopes, radius)))  # the slopes are of no point beyond the ball
            step /= 2 if radius > 0 else 4
            if step < max(best, radius) / (2 * self.method.steps) or step < usual * _NEAREST:
                break
        reached = min(max(best, radius), goal)
        return self.searched(reached) if self.nodes and math.isinf(goal) else reached

    def searched(self, low: float) -> float:
        """A radius that is proved, or a larger one by branch and bound."""
        high = math.inf
        while 0 < low < _FARTHEST and low * (1 + 1 / (2 * self.method.steps)) < high and time.monotonic() < self.end:
            target = min(low * _GROWTH, (low + high) / 2)
            low, high = (target, high) if self.asked(target, 1 / 3) else (low, target)
        return low

    def _limited(self, margins: Tensor, slopes: Tensor, radius: float) -> float:
        """How far the margins reach from a ball with these slopes; notes which comes to an end first."""
        reach = margins / slopes.clamp(min=1e-300)
        first = int(reach.argmin())
        self.limit = self.others[first]
        return max(0.0, math.nextafter(radius + math.nextafter(float(reach[first]), -math.inf), -math.inf)) if float(reach[first]) > 0 else 0.0

    def _tried(self, radius: float) -> tuple[Tensor, Tensor] | None:
        """None for a ball that leaves too many gates undecided for the memory, or for a third of the time that is left."""
        try:
            return self.in_ball(radius)
        except (CertifyError, TimeoutError):
            return None

    def asked(self, radius: float, share: float = 0.75) -> bool | None:
        """Whether all margins are positive in a closed ball; False where a point of it was seen that has another class, None where neither is known.

        Within a share of the time that is left.
        """
        now = time.monotonic()
        try:
            below, refuted = lowest(self.condensed(radius, 0.8 * share), nodes=self.nodes, until=now + share * (self.end - now))
        except (CertifyError, TimeoutError):
            return None
        self.limit = self.others[int(below.argmin())]
        return True if bool((downward(below) > 0).all()) else False if refuted else None

    def at_input(self) -> tuple[Tensor, Tensor]:
        """At most the margins, and about the size of the gradients of the smallest of them; 0 for the others."""
        leaf = torch.from_numpy(self.x.copy()).requires_grad_(True)
        low, high = output_range(self.program, self.region(0.0))
        above, below = self.rows.clamp(min=0), self.rows.clamp(max=0)
        room = 2 * gamma(len(low) + 4) * (self.rows.abs() @ torch.maximum(low.abs(), high.abs()))
        margins = downward(above @ low + below @ high - room)
        nearest = margins.argsort()[:_LOOKED_AT]
        with torch.enable_grad():
            y = self.program.run(leaf, lambda gate, z: torch.relu(z) if gate.activation == RELU else _leaning(gate, z))
            gradients = torch.autograd.grad(y, leaf, self.rows[nearest], is_grads_batched=True)[0]
        slopes = torch.zeros_like(margins)
        slopes[nearest] = torch.linalg.vector_norm(gradients, ord=DUAL[self.method.norm], dim=1)
        return margins, slopes

    def region(self, radius: float) -> Region:
        """The ball, cut with the range of inputs where there is one."""
        ball = Region.of(Ball(self.x, radius, self.method.norm), self.x.size)
        return ball if self.method.within is None else ball.clipped(*self.method.within)

    def condensed(self, radius: float, share: float = 1 / 3) -> Condensed:
        """The margins in the closed ball, within a share of the time that is left."""
        now = time.monotonic()
        return condense(self.program, self.region(radius), self.rows, limit=limit_of(self.method.memory), until=now + share * (self.end - now))

    def in_ball(self, radius: float) -> tuple[Tensor, Tensor]:
        """At most the smallest margin to each other class in the closed ball, and at least its Lipschitz constant there."""
        seconds = (self.end - time.monotonic()) / 3
        condensed = self.condensed(radius)
        below = -upper_bounds(condensed.layers, condensed.region, -condensed.center, -condensed.inputs, -condensed.gates) - condensed.slack
        slopes, allowed = torch.full_like(below, math.inf), min(_WORK, _RATE * seconds)
        more, less = coupled.products(condensed)
        if less < allowed:
            jacobian = coupled.bound_jacobian(condensed, effort=0.0) if more < allowed else clarke.bound_jacobian(condensed)
            slopes = jacobian.row_norms(DUAL[self.method.norm])
        return downward(below), slopes


def _numbers(within: Sequence[object]) -> bool:
    return all(isinstance(end, int | float) for end in within)


def _leaning(gate: Gate, z: Tensor) -> Tensor:
    """A gate with its slope at z, as a line through the origin: for a gradient, where the value is of no use."""
    least, most = gate.activation.slopes(*2 * [z.detach().numpy()])
    return z * torch.from_numpy(np.asarray((least + most) / 2))
