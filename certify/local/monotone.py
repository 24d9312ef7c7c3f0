"""`monotone(net, domain, ...)`: in which inputs an output is proved to rise or to fall throughout a region, from bounds of its Jacobians there."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from certify.bound import Array, Assumption, Ball, Box, Domain
from certify.errors import CertifyError
from certify.graph import Graph
from certify.local.condense import condense
from certify.local.coupled import bound_jacobian
from certify.local.method import limit_of, program_of
from certify.local.program import Program
from certify.local.region import Region
from certify.registry import Shape

_WIDTH = 120
_SIGNS = {1: "+", -1: "-", 0: "."}


@dataclasses.dataclass(frozen=True, eq=False)
class Monotone:
    """`low <= J <= high` for every Clarke Jacobian J of the network inside of a domain, proved; in `signs`, +1 for `J >= 0`, -1 for `J <= 0`, else 0.

    With +1 at `[i, j]`, output i does not fall between two inputs of the domain that differ in entry j alone, from the smaller to the larger; with -1, it does
    not rise. A 0 says nothing: neither that the slope has both signs nor that it could not be proved with more pieces. Nothing is said of inputs outside of the
    domain: at its edge the slopes are those towards its inside, and where a Box has one number in an entry, no two inputs differ there.
    """

    signs: NDArray[np.int8]  # (rows, inputs)
    low: Array  # (rows, inputs), rounded down
    high: Array  # (rows, inputs), rounded up
    domain: Domain
    assumptions: frozenset[Assumption]

    def __str__(self) -> str:
        known = int(np.count_nonzero(self.signs))
        where = f"Ball of radius {self.domain.radius:g} in l{self.domain.p:g}" if isinstance(self.domain, Ball) else type(self.domain).__name__
        lines = [f"{known} of {self.signs.size} slopes have one sign on the {where}: + does not fall, - does not rise, . not known"]
        for i, row in enumerate(self.signs):
            head = f"  output {i}: "
            lines += textwrap.wrap("".join(_SIGNS[int(sign)] for sign in row), _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
        lines += [f"  assumes {assumption.name}" for assumption in sorted(self.assumptions, key=lambda a: a.name)]
        return "\n".join(lines)


@torch.no_grad()
def monotone(
    net: nn.Module | Graph,
    domain: Domain,
    *,
    input_shape: Shape | None = None,
    rows: ArrayLike | None = None,  # (rows, outputs)
    pieces: int = 1,
    along: int | None = None,
    memory: float = 4.0,
) -> Monotone:
    """Which outputs are proved not to fall, or not to rise, in which inputs, throughout a Box or a Ball (Shi et al. 2022, section on monotonicity).

    A feature that is swept over its whole range is a Box with that range in its entry and one number in all others. `rows` asks about sums `rows @ net(x)`
    instead of each output: `[[-1, 1]]` is the second minus the first. The Box is cut into `pieces` of one length along the entry `along` of the flat input, by
    default its longest edge, and what holds on each piece holds on all: more gates are decided on a smaller one. `memory`, in GiB, is for each piece. To ask
    many times, pass `certify.Graph.of(net, input_shape)` for the network, which is then looked through once.

    In float64 with the rounding of every step added, so a slope that is exactly 0 somewhere, such as where all ReLUs are shut, has no sign here.
    Raises Unsupported for what has no form as affine steps and gates, CertifyError for a domain that is neither a finite Box nor a Ball in l1, l2 or
    l-infinity, and for more undecided gates than fit into the memory.
    """
    if isinstance(net, nn.Module):
        if input_shape is None:
            raise CertifyError("monotone needs the shape of one input, without the batch; pass input_shape=..., such as input_shape=(30,)")
        net = Graph.of(net, input_shape)
    program, inputs = program_of(net), math.prod(net.input_shape)
    asked = _rows(program, rows)
    if not memory > 0:
        raise CertifyError(f"memory is a positive number of GiB, got memory={memory}")
    low, high = np.full((len(asked), inputs), np.inf), np.full((len(asked), inputs), -np.inf)
    for piece in _pieces(domain, pieces, along, inputs):
        least, most = bound_jacobian(condense(program, Region.of(piece, inputs), asked, limit=limit_of(memory))).range
        low, high = np.minimum(low, least.numpy()), np.maximum(high, most.numpy())
    return Monotone(
        signs=np.where(low >= 0, 1, np.where(high <= 0, -1, 0)).astype(np.int8),
        low=low,
        high=high,
        domain=domain,
        assumptions=frozenset({Assumption.REAL_ARITHMETIC, Assumption.FLOAT64_LINALG, Assumption.EVAL_MODE}),
    )


def _rows(program: Program, rows: ArrayLike | None) -> Tensor:
    """What is asked about, in float64. Raises CertifyError for rows of another length, and for numbers that are not finite."""
    if rows is None:
        return torch.eye(program.outputs, dtype=torch.float64)
    try:
        asked = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError):
        asked = np.zeros(0)
    if asked.ndim != 2 or asked.shape[1] != program.outputs or not len(asked) or not np.isfinite(asked).all():
        raise CertifyError(f"rows are (rows, {program.outputs}) finite numbers, one for each output of the network, got {rows}")
    return torch.from_numpy(asked)


def _pieces(domain: Domain, pieces: int, along: int | None, inputs: int) -> Iterator[Domain]:
    """The domain, or the parts of a Box between neighbouring edges; the ends of neighbours are the same number, so no input is left out."""
    if pieces < 1 or pieces != int(pieces):
        raise CertifyError(f"a Box is cut into a whole number of pieces, at least one, got pieces={pieces}")
    if along is not None and not 0 <= along < inputs:
        raise CertifyError(f"along is an entry of the flat input, 0 to {inputs - 1}, got along={along}")
    if pieces == 1:
        yield domain
        return
    if not isinstance(domain, Box):
        raise CertifyError(f"only a Box is cut into pieces, got a {type(domain).__name__}; pass certify.Box(low, high) that contains it")
    Region.of(domain, inputs)  # refuses one that is not finite, or of another size
    low, high = (np.array(end, dtype=np.float64).ravel() for end in (domain.low, domain.high))
    entry = int(np.argmax(high / 2 - low / 2)) if along is None else along
    if high[entry] / 2 - low[entry] / 2 > 2.0**1020:
        raise CertifyError(f"an edge from {low[entry]:g} to {high[entry]:g} is too long to be cut in float64; take a smaller Box")
    edges = low[entry] + (high[entry] - low[entry]) * np.linspace(0, 1, pieces + 1)
    edges[-1] = high[entry]
    for start, stop in itertools.pairwise(np.minimum(edges, high[entry])):
        first, last = low.copy(), high.copy()
        first[entry], last[entry] = start, stop
        yield Box(first, last)
