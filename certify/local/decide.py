"""Whether rows of the output are positive on a region: branch and bound with lines that are chosen for each row (alpha-beta-CROWN, Wang et al. 2021).

A node decides some of the undecided ReLUs, each to be open or shut, and every input of the region is in a node that decides them as it does. There the input z
of such a gate has a known sign, so that for any `beta >= 0` adding `beta z` (open) or `-beta z` (shut) to a form only makes it larger. Steps of Adam propose
these beta, and slopes of the lines below the other gates; each bound on the way is computed with all its rounding, and the smallest is kept.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time

import torch
from torch import Tensor

from certify.local.alpha import Adam, rate_of, tightened
from certify.local.condense import Condensed
from certify.local.crown import first_slopes, upper_bounds
from certify.local.directed import upward
from certify.local.halfspaces import into
from certify.local.layer import Layer
from certify.local.nodes import Nodes
from sdp.proof import gamma

_STEPS = 20  # for the slopes of a row, before anything is decided
_STEPS_IN_NODE = 5
_STEPS_AT_LEAF = 200
_RATE = 0.2  # of the first step; the last is a tenth of it
_CANDIDATES = 6  # gates that are tried for each node
_WORK = 2**22  # numbers in the coefficients of one batch of nodes
_BATCH = 64
_TRIES = 40  # steps towards an input where a row is not positive
_CLEAR = 1e-6  # of the size of a row, below 0: where it counts as not positive


@torch.no_grad()
def lowest(condensed: Condensed, *, nodes: int, until: float = math.inf) -> tuple[Tensor, bool]:  # (rows,)
    """At most the smallest value of each row, and whether a point was seen where one is clearly not positive.

    Up to `nodes` are looked at for each row, until a time of time.monotonic, and only while all rows before were proved to be positive; with none, the lines
    are those of CROWN.
    """
    layers, region = condensed.layers, condensed.region
    below = -upper_bounds(layers, region, -condensed.center, -condensed.inputs, -condensed.gates) - condensed.slack
    left = torch.nonzero(~(below > 0)).flatten()
    if not nodes or not len(left):
        return below, False
    if refuted(condensed, left):
        return below, True
    forms = (-condensed.center[left], -condensed.inputs[left], -condensed.gates[left])
    below[left] = torch.fmax(below[left], -tightened(layers, region, *forms, _STEPS) - condensed.slack[left])
    left = torch.nonzero(~(below > 0)).flatten()
    for row in left[below[left].argsort()].tolist():  # the hardest first, as all have to be positive
        if time.monotonic() > until or not layers or not all(layer.through_zero for layer in layers):
            break
        below[row] = max(float(below[row]), _Search(condensed, row).run(nodes, until))
        if not below[row] > 0:
            break
    return below, False


@torch.no_grad()
def refuted(condensed: Condensed, rows: Tensor) -> bool:
    """Whether one of these rows is clearly not positive somewhere, at points found by steps along its gradient. Proves nothing that is printed."""
    region, count = condensed.region, len(rows)
    d = torch.zeros(count, len(region.center), dtype=torch.float64)
    clear = _CLEAR * (condensed.center[rows].abs() + condensed.inputs[rows].abs() @ region.reach)
    for step in range(_TRIES):
        open_, values = _forward(condensed, d, rows)
        if bool((values < -clear).any()):
            return True
        g = condensed.gradients(open_, rows)
        way = g.sign() if region.p == math.inf else g / torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp(min=1e-300)
        reach = region.reach if region.p == math.inf else region.radius
        d = into(region, d - way * reach * (0.5 if step < _TRIES // 2 else 0.1))
    return False


def _forward(condensed: Condensed, d: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of all gates at some points, and about the value of a row at each."""
    p = slopes = torch.zeros(len(d), 0, dtype=torch.float64)
    for layer in condensed.layers:
        z = layer.center + d @ layer.inputs.T + p @ layer.earlier.T
        low, high = layer.gate.activation.slopes(z.numpy(), z.numpy())
        slope = torch.as_tensor((low + high) / 2)
        value, _ = layer.gate.activation.image(z.numpy(), z.numpy())
        p, slopes = torch.cat([p, torch.as_tensor(value)], dim=1), torch.cat([slopes, slope], dim=1)
    return slopes, condensed.center[rows] + (condensed.inputs[rows] * d).sum(1) + (condensed.gates[rows] * p).sum(1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Nodes(Nodes):
    """What some nodes decide, and the slopes and multipliers that were best for them, or for their parents."""

    alpha: Tensor  # (nodes, gates)
    beta: Tensor  # (nodes, gates), in units of the row's coefficients


class _Search:
    """Branch and bound for one row: every bound is of its negative, from above."""

    def __init__(self, condensed: Condensed, row: int) -> None:
        self.condensed, self.row = condensed, row
        layers, gates = condensed.layers, condensed.undecided
        self.inputs = torch.cat([layer.inputs for layer in layers])
        self.earlier = torch.cat([torch.nn.functional.pad(layer.earlier, (0, gates - layer.earlier.shape[1])) for layer in layers])
        self.center, self.slack, self.size, self.low, self.high, self.peak = (
            torch.cat([getattr(layer, name) for layer in layers]) for name in ("center", "slack", "size", "low", "high", "peak")
        )
        self.of_row = (-condensed.center[row], -condensed.inputs[row], -condensed.gates[row])
        self.row_size = self.of_row[0].abs() + self.of_row[1].abs() @ condensed.region.reach + self.of_row[2].abs() @ self.peak
        self.batch = max(2, min(_BATCH, _WORK // (gates + self.inputs.shape[1])))
        nothing = torch.zeros(1, gates, dtype=torch.float64)
        self.root = _Nodes(nothing.to(torch.int8), first_slopes(layers, self.of_row[2][None]), nothing)
        self.unit = self.units()

    def run(self, nodes: int, until: float) -> float:
        """At most the smallest value of the row: the least of what is proved in nodes that no other stands in for."""
        number = itertools.count()
        bounds, root = self.bounded(self.root, _STEPS)
        lowest, heap = math.inf, [(-float(bounds[0]), next(number), root)]
        made = 1
        while heap and heap[0][0] <= 0 and made < nodes and time.monotonic() <= until:
            taken = [heapq.heappop(heap) for _ in range(min(self.batch // 2, len(heap)))]
            parents = _Nodes.joined([node for _, _, node in taken])
            above = torch.tensor([-low for low, _, _ in taken], dtype=torch.float64)
            ended = (parents.decided != 0).all(dim=1)
            if ended.any():
                lowest = min(lowest, -float(torch.fmin(self.bounded(parents.part(ended), _STEPS_AT_LEAF)[0], above[ended]).max()))
                parents, above = parents.part(~ended), above[~ended]
            if not lowest > 0 or not len(parents):
                heap += [(-value, next(number), parents.part(slice(k, k + 1))) for k, value in enumerate(above.tolist())]
                break
            bounds, children = self.bounded(parents.split(torch.arange(len(parents)), self.chosen(parents)), _STEPS_IN_NODE)
            made += len(children)
            for k, bound in enumerate(torch.fmin(bounds, above.repeat(2)).tolist()):
                heapq.heappush(heap, (-bound, next(number), children.part(slice(k, k + 1))))
        return min(lowest, *(low for low, _, _ in heap), math.inf)

    def layers(self, nodes: _Nodes) -> list[Layer]:
        """With the ranges of each node."""
        low = torch.where(nodes.decided > 0, self.low.clamp(min=0), self.low)
        high = torch.where(nodes.decided < 0, self.high.clamp(max=0), self.high)
        return self.condensed.with_ranges(low, high)

    def bounds(self, layers: list[Layer], nodes: _Nodes, alpha: Tensor, beta: Tensor) -> Tensor:
        """At least the largest negative of the row in each node, for any slopes between 0 and 1 and any beta that are not negative.

        With `w = +-beta` the form becomes `-row + w z`, and its coefficients are sums of at most as many terms as gates are decided.
        """
        which = torch.nonzero(nodes.decided.any(dim=0)).flatten()
        w = nodes.decided[:, which] * (beta.clamp(min=0) * self.unit)[:, which]
        center, inputs, gates = (mine + w @ part[which] for mine, part in zip(self.of_row, (self.center, self.inputs, self.earlier), strict=True))
        room = w.abs() @ self.slack[which] + 2 * gamma(len(which) + 12) * (self.row_size + w.abs() @ (self.size + self.slack)[which])
        slopes = torch.where(nodes.decided == 0, alpha, (nodes.decided > 0).double())
        return upper_bounds(layers, self.condensed.region, center, inputs, gates, slopes) + (room + self.condensed.slack[self.row])

    def bounded(self, nodes: _Nodes, steps: int) -> tuple[Tensor, _Nodes]:
        """Bounds after steps of Adam, and the slopes and multipliers that gave them."""
        parts = [self.descent(nodes.part(slice(start, start + self.batch)), steps) for start in range(0, len(nodes), self.batch)]
        return torch.cat([bounds for bounds, _ in parts]), _Nodes.joined([part for _, part in parts])

    def descent(self, nodes: _Nodes, steps: int) -> tuple[Tensor, _Nodes]:
        layers, decided = self.layers(nodes), nodes.decided != 0
        best = torch.full((len(nodes),), math.inf, dtype=torch.float64)
        values, kept = torch.where(decided, nodes.beta, nodes.alpha), torch.where(decided, nodes.beta, nodes.alpha)
        most = torch.where(decided, math.inf, 1.0)
        adam, pace = Adam(1.0, steps), torch.where(decided, _RATE, rate_of(layers, _RATE))
        for step in range(steps + 1):
            with torch.enable_grad():
                tried = values.requires_grad_(step < steps)
                bounds = self.bounds(layers, nodes, tried, tried)
                gradient = torch.autograd.grad(bounds.sum(), tried)[0].nan_to_num(0.0) if step < steps else torch.zeros_like(values)
            bounds, values = upward(bounds.detach()), tried.detach()
            better = bounds < best
            best, kept = torch.where(better, bounds, best), torch.where(better[:, None], values, kept)
            if bool((best < 0).all()):
                break
            values = torch.minimum((values - pace * adam.step(gradient)).clamp(min=0), most)
        return best, _Nodes(nodes.decided, torch.where(decided, nodes.alpha, kept), torch.where(decided, kept, 0.0))

    def coefficients(self, nodes: _Nodes, beta: Tensor) -> tuple[Tensor, Tensor]:
        """About the coefficients of all gates in the row, and by how much the lines around them are off, at most."""
        c, stop = self.of_row[2] + (nodes.decided * beta) @ self.earlier, self.condensed.undecided
        slopes = torch.where(nodes.decided == 0, nodes.alpha, (nodes.decided > 0).double())
        found, loss = [], []
        for layer in reversed(self.layers(nodes)):
            start, lines = stop - layer.count, layer.lines
            here, slope = c[:, start:stop].expand(len(nodes), -1), slopes[:, start:stop]
            above, below = here.clamp(min=0), here.clamp(max=0)
            found.append(here)
            loss.append(above * lines.high_shift - below * torch.maximum((1 - slope) * layer.high, -slope * layer.low).clamp(min=0))
            c, stop = c[:, :start] + (above * lines.high_slope + below * slope) @ layer.earlier, start
        return torch.cat(found[::-1], dim=1), torch.cat(loss[::-1], dim=1)

    def units(self) -> Tensor:
        """By layer, the largest coefficient of the row."""
        coefficients, _ = self.coefficients(self.root, self.root.beta)
        parts = coefficients[0].abs().split([layer.count for layer in self.condensed.layers])
        return torch.cat([part.max().clamp(min=1e-300).expand(len(part)) for part in parts])

    def chosen(self, nodes: _Nodes) -> Tensor:  # (nodes,)
        """For each node a gate to decide: of those where lines lose most, the one whose worse child is best."""
        _, loss = self.coefficients(nodes, nodes.beta * self.unit)
        losses, gates = torch.where(nodes.decided == 0, loss, -1.0).topk(min(_CANDIDATES, loss.shape[1]), dim=1)
        of, place = torch.nonzero(losses >= 0, as_tuple=True)
        worse = self.bounded(nodes.split(of, gates[of, place]), 0)[0].view(2, -1)
        score = torch.full(losses.shape, math.inf, dtype=torch.float64)
        score[of, place] = worse.amax(0) + 1e-3 * worse.amin(0)
        return gates[torch.arange(len(nodes)), score.argmin(dim=1)]
