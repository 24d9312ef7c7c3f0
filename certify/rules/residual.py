"""What the rules of residual blocks share: their linear matrix inequality is proved, with the block's own multipliers."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

import sdp
from certify.bound import Assumption, Bound
from certify.errors import Problem, Unsupported
from certify.registry import problems_of
from certify.slopes import Slopes, activations, slopes
from certify.spectral import as_float64
from lipnet import LDLTConv2d
from lipnet.layers.residual import ResidualBlock

_STRETCH = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # multipliers at the edge of the cone leave no room for rounding; slightly larger ones do


def slope_restricted(activation: nn.Module) -> Slopes:
    """The slopes of an activation inside a layer, which must lie in [0, 1]. Raises Unsupported otherwise."""
    problems = problems_of(activation, "activation", leaf=isinstance(activation, activations()))
    if problems:
        raise Unsupported(problems)
    found = slopes(activation)
    if found is None or not 0 <= found[0] <= found[1] <= 1:
        why = "its slopes are not known" if found is None else f"its slopes are in [{found[0]:g}, {found[1]:g}]"
        raise Unsupported(
            [Problem("activation", type(activation).__name__, f"{why}; this layer needs an elementwise activation with slopes in [0, 1], such as nn.ReLU")]
        )
    return found


def block_bound(layer: ResidualBlock | LDLTConv2d, name: str) -> Bound:
    """The smallest L that the layer's multipliers prove for the matrices that it runs. Raises Unsupported when they prove none."""
    slope_restricted(layer.activation)
    weights = layer.weights()
    system = sdp.residual_block(as_float64(weights.skip), as_float64(weights.branch), [as_float64(matrix) for matrix in weights.inner], (0.0, 1.0))
    multipliers = np.concatenate([as_float64(part) for part in weights.multipliers])
    value, proposal = math.inf, multipliers
    for proposal in sorted((multipliers * (1 + stretch) for stretch in _STRETCH), key=lambda proposed: sdp.estimate(system, proposed)):
        value = sdp.prove(system, proposal)
        if math.isfinite(value):
            break
    if not math.isfinite(value):
        raise Unsupported([Problem("", type(layer).__name__, "its multipliers do not prove a bound for its weights as they are now; retrain, or use float64")])
    evidence = {"multipliers": proposal}
    return Bound(value, f"{name}: LMI proved with the layer's multipliers", assumptions=frozenset({Assumption.FLOAT64_LINALG}), evidence=evidence)
