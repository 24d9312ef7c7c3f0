"""The neighbours of float64 numbers: a sum or a difference that was rounded to nearest, rounded up or down."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def upward(values: Tensor) -> Tensor:
    """The next numbers above."""
    return torch.nextafter(values, torch.full_like(values, math.inf))


def downward(values: Tensor) -> Tensor:
    """The next numbers below."""
    return torch.nextafter(values, torch.full_like(values, -math.inf))
