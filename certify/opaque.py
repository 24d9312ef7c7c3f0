"""A network that is only run: what attacks need of it. Where its structure is known too, it is a `Graph`."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

import lipnet
from certify.errors import CertifyError, Unsupported
from certify.graph import Graph, in_float64
from certify.registry import Shape
from certify.smoothing.prepare import tried
from lipnet.checkpoint import first_line

_ROWS = 4  # of the batches on which it is tried


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """A network whose operations have no rules, frozen, its numbers taken exactly into float64."""

    double: nn.Module
    input_shape: Shape


def runnable(net: nn.Module, input_shape: Shape) -> Graph | Opaque:
    """The network's graph; where that is refused, the network as something that is run.

    Raises CertifyError for a network that is no function of one input, as far as a few batches show (random numbers, outputs that depend on other rows of a
    batch), or no classifier of inputs of this shape; like `Graph.of`, ValueError where no input has this shape.
    """
    try:
        return Graph.of(net, input_shape)
    except Unsupported as refused:
        try:
            frozen = lipnet.freeze(net)
        except Exception as error:  # layers of lipnet in a forward that torch.fx cannot trace
            raise refused from error
    tried(copy.deepcopy(frozen).float(), input_shape, _ROWS)
    double = in_float64(frozen)
    try:
        double(torch.zeros(1, *input_shape, dtype=torch.float64))
    except Exception as error:  # an operation that is only there in float32
        raise CertifyError(f"the network does not run in float64 ({first_line(error)}), in which attacks look at their points") from error
    return Opaque(double, input_shape)
