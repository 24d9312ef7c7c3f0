"""Where a local bound holds: inputs in a box, in a ball, or in both."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch
from torch import Tensor

from certify.bound import Ball, Box, Domain
from certify.errors import CertifyError
from certify.local.directed import downward, upward
from sdp.proof import gamma

_TINY = 2.0**-500  # far above what squares and products lose by underflow


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """The inputs `center + d` with `low <= d <= high`, and `|d|_p <= radius` where there is a ball. Float64, flat; convex, and the center is in it."""

    center: Tensor  # (inputs,)
    low: Tensor  # (inputs,), not positive
    high: Tensor  # (inputs,), not negative
    radius: float = math.inf
    p: float = math.inf

    @classmethod
    def of(cls, domain: Domain, inputs: int) -> Region:
        """The region of a Ball in l1, l2 or l-infinity, or of a Box. Raises CertifyError for any other domain, and for one of another size."""
        if isinstance(domain, Ball) and domain.center.size == inputs and domain.p in (1, 2, math.inf) and math.isfinite(domain.radius):
            center = torch.from_numpy(np.array(domain.center, dtype=np.float64).ravel())
            reach = torch.full_like(center, domain.radius)
            return cls(center, -reach, reach, domain.radius if domain.p != math.inf else math.inf, domain.p)
        if isinstance(domain, Box) and domain.low.size == inputs and np.isfinite(domain.low).all() and np.isfinite(domain.high).all():
            low, high = (torch.from_numpy(np.array(end, dtype=np.float64).ravel()) for end in (domain.low, domain.high))
            center = low / 2 + high / 2
            return cls(center, downward(low - center).clamp(max=0), upward(high - center).clamp(min=0))
        raise CertifyError(f"a local bound is on a finite Box, or a Ball of finite radius in l1, l2 or l-infinity, of {inputs} inputs, got {_named(domain)}")

    def clipped(self, smallest: float, largest: float) -> Region:
        """The inputs of the region with all entries in a range. Raises CertifyError where the center is outside of it."""
        if not (smallest <= float(self.center.min()) and float(self.center.max()) <= largest):
            entries = f"entries from {float(self.center.min()):g} to {float(self.center.max()):g}"
            raise CertifyError(f"the input has {entries}, outside of [{smallest:g}, {largest:g}]; take a range that holds it")
        low = torch.maximum(self.low, downward(float(smallest) - self.center)).clamp(max=0)
        high = torch.minimum(self.high, upward(float(largest) - self.center)).clamp(min=0)
        return dataclasses.replace(self, low=low, high=high)

    @property
    def reach(self) -> Tensor:
        """The largest `|d|`, entry by entry."""
        return torch.maximum(-self.low, self.high)

    @property
    def _room(self) -> float:
        """Relative, for the rounding of a product of the inputs and a few operations more."""
        return 2 * gamma(len(self.center) + 6)

    @functools.cached_property
    def _around(self) -> tuple[Tensor | None, Tensor]:
        """The middle of the box, None where that is 0, and half of its width with room for the rounding of products with both."""
        middle = (self.low + self.high) / 2
        half = torch.maximum(self.high - middle, middle - self.low)
        return middle if bool(middle.any()) else None, half + self._room * (half + middle.abs())

    def support(self, g: Tensor) -> Tensor:  # (..., inputs) -> (...)
        """At least the largest `g d` over the region."""
        size, (middle, half) = g.abs(), self._around
        box = size @ half + _TINY
        if middle is not None:
            box = box + g @ middle
        if not math.isfinite(self.radius):
            return box
        dual = math.inf if self.p == 1 else 2
        ball = torch.linalg.vector_norm(size, ord=dual, dim=-1) * self.radius
        return torch.minimum(box, ball * (1 + self._room) + _TINY * max(1.0, self.radius))


def _named(domain: Domain) -> str:
    """What was asked for, in a few words."""
    if isinstance(domain, Ball):
        return f"a Ball of {domain.center.size} of radius {domain.radius:g} in l{domain.p:g}"
    if isinstance(domain, Box):
        return f"a Box of {domain.low.size}{'' if np.isfinite(domain.low).all() and np.isfinite(domain.high).all() else ' without an end'}"
    return type(domain).__name__
