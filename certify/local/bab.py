"""Complete branch and bound: the Lipschitz constant of an output on a region, for networks of ReLUs, between a proof and an example.

A node decides some of the undecided gates, each to be open or shut. There their slopes are known, and each of them lies in a half-space of inputs (from the
line above or below it, CROWN). Almost every input has, for every gate, a side on which it lies, or a neighbourhood in which the gate is 0 and its slope does
not matter; so the nodes that decide a gate either way hold every gradient together. A node is left out only where its half-spaces are proved to have no point
in common (`certify.local.halfspaces`), or its bound is not above an example. Where all gates are decided the half-spaces are the inputs themselves.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from certify.errors import CertifyError
from certify.local.clarke import Jacobian, bound_jacobian, with_slack
from certify.local.condense import Condensed, condense
from certify.local.crown import linear_upper_bounds
from certify.local.directed import upward
from certify.local.halfspaces import HalfSpaces, excludes, into, propose
from certify.local.layer import Layer
from certify.local.nodes import Nodes
from certify.local.program import Program
from certify.local.region import Region
from sdp.activation import RELU
from sdp.proof import gamma

_BATCH = 16  # nodes that are split together
_CANDIDATES = 3  # gates that are tried for each
_POINTS = 2000
_WORK = 2**24  # numbers in the forms of one batch of nodes
_SMALL = 1e-6  # constants below it are compared as if they were this large


@dataclasses.dataclass(frozen=True, eq=False)
class Complete:
    """By row: `upper` is at least the Lipschitz constant; `lower` is the norm of a gradient in the region, an estimate. Everywhere `done`: they meet."""

    upper: Tensor  # (rows,)
    lower: Tensor  # (rows,)
    nodes: int
    done: bool


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the search is: the row it works on, what is proved and what was seen of it, the nodes of all rows so far."""

    row: int
    upper: float
    lower: float
    nodes: int
    seconds: float


def complete(
    program: Program,
    region: Region,
    rows: Tensor,  # (rows, outputs)
    q: float,
    *,
    seconds: float = 60.0,
    tolerance: float = 1e-6,
    report: Callable[[Progress], None] | None = None,
    limit: int = 2**31,
) -> Complete:
    """The largest l_q norm of each row of the Jacobian on the region, to a relative tolerance, or as near to it as `seconds`, or an interrupt, let it come.

    That is the Lipschitz constant of each row of the outputs from the l_p norm with 1/p + 1/q = 1. Raises CertifyError for a network with gates other than
    ReLU, and where more numbers than `limit` would be kept.
    """
    return search(condense(program, region, rows, limit=limit), q, seconds=seconds, tolerance=tolerance, report=report)


@torch.no_grad()
def search(
    condensed: Condensed,
    q: float,
    *,
    seconds: float = 60.0,
    tolerance: float = 1e-6,
    report: Callable[[Progress], None] | None = None,
) -> Complete:
    """The same, of a program that is condensed already."""
    began = time.perf_counter()
    for layer in condensed.layers:
        if layer.gate.activation != RELU:
            of = f"{layer.gate.name} ({layer.gate.activation}) is smooth"
            raise CertifyError(f"complete branch and bound decides gates of two linear pieces, and {of}; take how='crown' for this network")
    jacobian = bound_jacobian(condensed)
    condensed, upper = jacobian.condensed, jacobian.row_norms(q).nan_to_num(torch.inf)
    lower = torch.zeros_like(upper)
    rows, nodes = len(upper), 0
    try:
        examples = _Examples(condensed)
        for row in range(rows):
            lower[row] = examples.largest(row, q)
        for position, row in enumerate((-upper).argsort().tolist()):
            now = time.perf_counter() - began
            until = now + (seconds - now) / (rows - position)
            of_row = _Search(condensed, row, q, float(upper[row]), examples)
            while not _meet(of_row.upper, of_row.lower, tolerance) and of_row.heap and time.perf_counter() - began < until:
                of_row.step()
                upper[row], lower[row] = of_row.upper, of_row.lower
                if report is not None:
                    report(Progress(row, of_row.upper, of_row.lower, nodes + of_row.nodes, time.perf_counter() - began))
            lower[row], nodes = of_row.lower, nodes + of_row.nodes
    except KeyboardInterrupt:  # what stands in `upper` is proved at any time
        pass
    return Complete(upper, lower, nodes, all(_meet(float(above), float(below), tolerance) for above, below in zip(upper, lower, strict=True)))


def _meet(upper: float, lower: float, tolerance: float) -> bool:
    return upper < math.inf and upper - lower <= tolerance * max(upper, _SMALL)


@dataclasses.dataclass(frozen=True, eq=False)
class _Nodes(Nodes):
    """Some nodes: what they decide, and bounds of the inputs of all gates there."""

    low: Tensor  # (nodes, gates)
    high: Tensor
    weights: Tensor  # (nodes, gates): how much a decision can change; 0 for a gate that is decided, or that depends on no input


@dataclasses.dataclass(frozen=True, eq=False)
class _Spaces:
    """By node and gate: `constant + normal d >= 0` for all inputs of the node; 0 for gates that it does not decide."""

    constant: Tensor  # (nodes, gates)
    normal: Tensor  # (nodes, gates, inputs)

    def of(self, node: int, decided: Tensor) -> HalfSpaces:
        rows = torch.nonzero(decided[node]).flatten()
        return HalfSpaces(self.constant[node, rows], self.normal[node, rows])


def _ranges(condensed: Condensed, nodes: _Nodes) -> tuple[_Nodes, _Spaces, Tensor]:
    """Sharper ranges of all gates in each node, its half-spaces, and whether two bounds of one gate say that it is empty.

    The weights of the nodes are the l1 norms of the lines around each gate.
    """
    region = condensed.region
    count, inputs = len(nodes), condensed.inputs.shape[1]
    low, high = nodes.low.clone(), nodes.high.clone()
    empty = torch.zeros(count, dtype=torch.bool)
    done: list[Layer] = []
    constants, normals, weights = [], [], []
    start = 0
    for layer in condensed.layers:
        n, part = layer.count, slice(start, start + layer.count)
        center, to_inputs, to_gates = (torch.cat([rows, -rows]) for rows in (layer.center, layer.inputs, layer.earlier))
        total, g = linear_upper_bounds(done, region, center, to_inputs, to_gates)
        total = upward(total + torch.cat([layer.slack, layer.slack]))
        top = upward(total + region.support(g))
        total, g, top = total.expand(count, 2 * n), g.expand(count, 2 * n, inputs), top.expand(count, 2 * n)
        least, most = torch.fmax(low[:, part], -top[:, n:]), torch.fmin(high[:, part], top[:, :n])  # NaN, of an overflow, says nothing
        opened, shut = nodes.decided[:, part] > 0, nodes.decided[:, part] < 0
        least, most = torch.where(opened, least.clamp(min=0), least), torch.where(shut, most.clamp(max=0), most)
        empty |= (least > most).any(dim=1)
        low[:, part], high[:, part] = least, torch.maximum(least, most)
        constants.append(torch.where(opened, total[:, :n], torch.where(shut, total[:, n:], 0.0)))
        normals.append(torch.where(opened[..., None], g[:, :n], torch.where(shut[..., None], g[:, n:], 0.0)))
        weights.append(g.abs().sum(-1).view(count, 2, n).amax(1))
        done.append(dataclasses.replace(layer, low=low[:, None, part], high=high[:, None, part]))
        start = part.stop
    return _Nodes(nodes.decided, low, high, torch.cat(weights, dim=1)), _Spaces(torch.cat(constants, dim=1), torch.cat(normals, dim=1)), empty


def _jacobian(condensed: Condensed, nodes: _Nodes, row: int) -> Jacobian:
    """Of one row of the output, in each node; the slack of the region holds in all of its nodes, and is not made anew."""
    gates = (len(nodes), condensed.undecided)
    return with_slack(
        dataclasses.replace(
            condensed,
            layers=tuple(condensed.with_ranges(nodes.low, nodes.high)),
            center=condensed.center[row].expand(len(nodes)),
            slack=condensed.slack[row].expand(len(nodes)),
            inputs=condensed.inputs[row].expand(len(nodes), -1),
            gates=condensed.gates[row].expand(gates),
            slack_gates=condensed.slack_gates[row].expand(gates),
            slack_inputs=condensed.slack_inputs[row].expand(len(nodes), -1),
        )
    )


class _Examples:
    """On which side of every gate some points of the region lie; 0 where that is within rounding."""

    def __init__(self, condensed: Condensed) -> None:
        self.condensed = condensed
        self.sides = torch.zeros(0, condensed.undecided, dtype=torch.int8)
        self.add(_points(condensed.region))

    def add(self, points: Tensor) -> Tensor:  # (points, inputs) -> (new sides, gates)
        """Keep sides that are new, and return those of all these points."""
        sides = _distinct(_sides(self.condensed, points))
        new = [row for row in sides if not (self.sides == row).all(dim=1).any()]
        self.sides = torch.cat([self.sides, *(row[None] for row in new)])
        return sides

    def lie_in(self, nodes: _Nodes) -> Tensor:  # (nodes,)
        """Whether one of the points is in each node."""
        sides, decided = self.sides.double(), nodes.decided.double()
        return (decided @ sides.T == decided.abs().sum(1)[:, None]).any(dim=1)

    def norms(self, sides: Tensor, row: int, q: float) -> Tensor:  # (sides,)
        """At most the norm of the gradient of a row where the gates are on these sides, whatever the slopes of those within rounding."""
        nodes = _Nodes(sides, (sides <= 0).double().neg(), (sides >= 0).double(), torch.zeros(sides.shape))
        low, high = _jacobian(self.condensed, nodes, row).range
        least = torch.maximum(low, -high).clamp(min=0)
        return (torch.linalg.vector_norm(least, ord=q, dim=1) * (1 - 2 * gamma(low.shape[1] + 8))).nan_to_num(0.0, 0.0, 0.0)

    def largest(self, row: int, q: float) -> float:
        """The norm of the largest gradient among all points."""
        found = [self.condensed.gradients(part.double().clamp(min=0), row).norm(p=q, dim=1) for part in self.sides.split(_nodes_at_once(self.condensed))]
        best = int(torch.cat(found).argmax())
        return float(self.norms(self.sides[best : best + 1], row, q))


def _distinct(sides: Tensor) -> Tensor:
    return torch.unique(sides, dim=0) if sides.shape[1] else sides[:1]


def _points(region: Region) -> Tensor:  # (points, inputs)
    """The center, random points, and random corners."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(_POINTS, len(region.center), generator=generator, dtype=torch.float64)
    shares[::4] = shares[::4].round()
    shares[0] = 0.5
    d = region.low + shares * (region.high - region.low)
    if region.p == 2 and torch.isfinite(torch.tensor(region.radius)):
        size = torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp(min=2.0**-1000)
        d = d / size * region.radius * torch.rand(_POINTS, 1, generator=generator, dtype=torch.float64) ** (1 / d.shape[1])
    d[0] = 0
    return into(region, d)


def _sides(condensed: Condensed, d: Tensor) -> Tensor:  # (points, inputs) -> (points, gates)
    """The sign of the input of every gate; 0 where it is within rounding."""
    p = error = torch.zeros(len(d), 0, dtype=torch.float64)
    sides = [torch.zeros(len(d), 0, dtype=torch.int8)]
    for layer in condensed.layers:
        z = layer.center + d @ layer.inputs.T + p @ layer.earlier.T
        off = layer.slack + 4 * gamma(d.shape[1] + p.shape[1] + 8) * layer.size + error @ layer.earlier.abs().T
        sides.append(torch.where(z.abs() > off, z.sign(), 0.0).to(torch.int8))
        p, error = torch.cat([p, z.clamp(min=0)], dim=1), torch.cat([error, off], dim=1)
    return torch.cat(sides, dim=1)


def _nodes_at_once(condensed: Condensed) -> int:
    gates = max(1, condensed.undecided)
    return max(1, _WORK // (2 * gates * (gates + condensed.inputs.shape[1])))


class _Search:
    """The open nodes of one row of the output, the one of the largest bound first."""

    def __init__(self, condensed: Condensed, row: int, q: float, upper: float, examples: _Examples) -> None:
        self.condensed, self.row, self.q, self.examples = condensed, row, q, examples
        self.upper, self.lower = upper, examples.largest(row, q)
        self.closed = 0.0  # the largest bound of a node in which nothing is left to decide
        self.nodes = 0
        self.number = itertools.count()
        self.heap: list[tuple[float, int, _Nodes]] = []
        if condensed.undecided:
            low, high = (torch.cat([getattr(layer, end) for layer in condensed.layers])[None] for end in ("low", "high"))
            root = _Nodes(torch.zeros(low.shape, dtype=torch.int8), low, high, torch.zeros(low.shape))
            self.push(*self.evaluate(root, torch.tensor([upper], dtype=torch.float64)))

    def push(self, nodes: _Nodes, bounds: Tensor) -> None:
        """Keep nodes, but for those whose bound is no more than what was seen."""
        for number, bound in enumerate(bounds.tolist()):
            if not bound <= self.lower:
                heapq.heappush(self.heap, (-bound, next(self.number), nodes.part(slice(number, number + 1))))

    def step(self) -> None:
        """Split the nodes of the largest bounds. `upper` changes last, when their children stand in for them."""
        taken = [heapq.heappop(self.heap) for _ in range(min(_BATCH, len(self.heap)))]
        parents = _Nodes.joined([node for _, _, node in taken])
        above = torch.tensor([-bound for bound, _, _ in taken], dtype=torch.float64)
        weights, gates = parents.weights.topk(min(_CANDIDATES, parents.weights.shape[1]), dim=1)
        ended = ~(weights > 0).any(dim=1)
        if ended.any():
            self.closed = max(self.closed, float(above[ended].max()))
        of, place = torch.nonzero(weights > 0, as_tuple=True)
        if len(of):
            children, bounds = self.evaluate(parents.split(of, gates[of, place]), above[torch.cat([of, of])])
            best = _best(bounds.view(2, -1), of)
            kept = torch.cat([best, best + len(of)])
            self.keep(children.part(kept), bounds[kept])
        self.upper = min(self.upper, max(self.closed, self.lower, -self.heap[0][0] if self.heap else 0.0))

    def evaluate(self, nodes: _Nodes, above: Tensor) -> tuple[_Nodes, Tensor]:
        """Nodes with sharper ranges, and their bounds: no more than those of their parents, and -1 where one is empty."""
        self.nodes += len(nodes)
        parts, bounds = [], []
        for start in range(0, len(nodes), _nodes_at_once(self.condensed)):
            part, _, empty = _ranges(self.condensed, nodes.part(slice(start, start + _nodes_at_once(self.condensed))))
            jacobian = _jacobian(self.condensed, part, self.row)
            change = part.weights * torch.cat([layer.peak for layer in jacobian.gates], dim=1)
            parts.append(dataclasses.replace(part, weights=torch.where((part.low < 0) & (part.high > 0), change, 0.0)))
            bounds.append(torch.where(empty, -1.0, jacobian.row_norms(self.q)))
        return _Nodes.joined(parts), torch.fmin(torch.cat(bounds), above)

    def keep(self, nodes: _Nodes, bounds: Tensor) -> None:
        """Push the nodes that are not proved to be empty; those that hold no example yet are tried."""
        unsure = torch.nonzero((bounds > self.lower) & ~self.examples.lie_in(nodes)).flatten()
        for part in unsure.split(_nodes_at_once(self.condensed)):
            tried = nodes.part(part)
            _, spaces, _ = _ranges(self.condensed, tried)
            for number, node in enumerate(part.tolist()):
                of = spaces.of(number, tried.decided)
                y, d = propose(self.condensed.region, of)
                if y is not None and excludes(self.condensed.region, of, y):
                    bounds[node] = -1.0
                elif d is not None:
                    sides = self.examples.add(d[None])
                    self.lower = max(self.lower, float(self.examples.norms(sides, self.row, self.q).max()))
        self.push(nodes, bounds)


def _best(
    bounds: Tensor,  # (2, tried)
    of: Tensor,  # (tried,) by node, in order
) -> Tensor:  # which of them
    """For each node, the gate whose worst child is best; the better child decides between equals."""
    score = bounds.amax(0) + 1e-3 * bounds.amin(0)
    chosen: dict[int, int] = {}
    for number, (node, value) in enumerate(zip(of.tolist(), score.tolist(), strict=True)):
        if node not in chosen or value < score[chosen[node]]:
            chosen[node] = number
    return torch.tensor(list(chosen.values()))
