"""CROWN among the undecided gates (Zhang et al. 2018): rows `center + g d + c p` bounded by lines in place of gates, from the last layer to the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from certify.local.layer import Layer
from certify.local.region import Region
from certify.local.relax import above_relu
from sdp.proof import gamma


def upper_bounds(
    layers: Sequence[Layer],
    region: Region,
    center: Tensor,  # (rows,)
    inputs: Tensor,  # (rows, inputs)
    gates: Tensor,  # (rows, gates of the layers)
    slopes: Tensor | None = None,
    size: Tensor | None = None,
) -> Tensor:  # (rows,)
    """At least the largest `center + inputs d + gates p` over the region."""
    total, g = linear_upper_bounds(layers, region, center, inputs, gates, slopes, size)
    return total + region.support(g)


def linear_upper_bounds(
    layers: Sequence[Layer],
    region: Region,
    center: Tensor,  # (rows,)
    inputs: Tensor,  # (rows, inputs)
    gates: Tensor,  # (rows, gates of the layers)
    slopes: Tensor | None = None,  # (rows, gates of the layers): of the lines below those gates that have them through zero, and above them in an ellipsoid
    size: Tensor | None = None,  # (rows,), at least `|center| + |inputs| |d| + |gates| |p|`, where that is known
) -> tuple[Tensor, Tensor]:
    """`total` and `g` with `center + inputs d + gates p <= total + g d` on the region, the rounding of all that is computed here in `total`."""
    constant, g, c = center, inputs, gates
    if size is None:
        parts = zip(layers, gates.split([len(layer.center) for layer in layers], dim=-1), strict=True)
        size = sum(((part.abs() * layer.peak).sum(-1) for layer, part in parts), center.abs() + inputs.abs() @ region.reach)
    terms, stop = inputs.shape[-1] + 16, gates.shape[-1]
    for layer in reversed(layers):
        start = stop - len(layer.center)
        above, below = c[..., start:stop].clamp(min=0), c[..., start:stop].clamp(max=0)
        lines = layer.lines
        if slopes is not None and layer.through_zero:
            slope = slopes[..., start:stop].clamp(0.0, 1.0)
            lines = dataclasses.replace(lines, low_slope=slope)
            if layer.ellipsoid is not None:
                lines = dataclasses.replace(lines, high_slope=slope, high_shift=above_relu(layer.low, layer.high, slope))
        weight = above * lines.high_slope + below * lines.low_slope
        shift = (above * lines.high_shift).sum(-1) + (below * lines.low_shift).sum(-1)
        if layer.ellipsoid is not None:
            shift = torch.fmin(shift, layer.ellipsoid.intercepts(layer.low, layer.high, c[..., start:stop], weight))
            size = size + shift.abs()
        constant = constant + shift + weight @ layer.center + weight.abs() @ layer.slack
        size = size + weight.abs() @ layer.size
        size = size + (above * lines.high_shift.abs() - below * lines.low_shift.abs()).sum(-1)
        g, c = _plus(g, weight, layer.inputs), _plus(c[..., :start], weight, layer.earlier)
        terms, stop = terms + 2 * (stop - start) + 8, start
    return constant + 2 * gamma(terms) * size, g


def first_slopes(layers: Sequence[Layer], gates: Tensor) -> Tensor:  # (rows, gates of the layers)
    """The slopes with which `upper_bounds` gives what it gives without any."""
    c, stop, found = gates, gates.shape[-1], []
    for layer in reversed(layers):
        start = stop - len(layer.center)
        lines, here = layer.lines, c[..., start:stop]
        over = torch.where(here > 0, lines.high_slope, lines.low_slope)
        found.append(over if layer.ellipsoid is not None else lines.low_slope.expand(here.shape))
        c, stop = c[..., :start] + (here * over) @ layer.earlier, start
    return torch.cat(found[::-1], dim=-1)


def _plus(rows: Tensor, weight: Tensor, of: Tensor) -> Tensor:
    """`rows + weight @ of`, in one step where that is one."""
    return torch.addmm(rows, weight, of) if rows.dim() == weight.dim() == of.dim() == 2 else rows + weight @ of
