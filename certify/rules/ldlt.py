"""Rules for `lipnet.layers.ldlt`."""

from __future__ import annotations

import lipnet
from certify.bound import Bound
from certify.errors import Unsupported
from certify.registry import Shape, problems_of, register
from certify.rules.residual import block_bound


@register(lipnet.LDLTBlock)
def _(layer: lipnet.LDLTBlock, shape: Shape) -> Bound:
    return block_bound(layer, "ldlt")


@register(lipnet.LDLTConv2d)
def _(layer: lipnet.LDLTConv2d, shape: Shape) -> Bound:
    """The bound of the block: pixels, or patches that do not overlap, are separate inputs of it."""
    problems = problems_of(layer.block, "block", leaf=True)
    if problems:
        raise Unsupported(problems)
    return block_bound(layer, "ldlt at each pixel")
