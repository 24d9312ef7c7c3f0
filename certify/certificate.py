"""What is certified of each input."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from certify.bound import Assumption
from certify.text import down_text


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """For each input: no perturbation of l_p norm below `radius` changes `prediction`; with probability at least 1 - failure where that is not 0.

    Radii are in the units of the input and rounded down; 0 where nothing is certified. An abstained input has no prediction. Where `norm` is None the radius
    is about changes of another kind, such as a brightness that is added, and bounds the `measure` of them: it says nothing of perturbations in any norm.
    """

    prediction: NDArray[np.int64]  # (N,)
    runner_up: NDArray[np.int64]  # (N,) the class that limits the radius
    abstained: NDArray[np.bool_]  # (N,)
    radius: NDArray[np.float64]  # (N,)
    norm: float | None
    method: str
    failure: float = 0.0  # per input
    assumptions: frozenset[Assumption] = frozenset()
    seed: int | None = None
    measure: str | None = None  # what the radius is a bound on, in words, where that is no l_p norm

    def __post_init__(self) -> None:
        if (self.norm is None) == (self.measure is None):
            raise ValueError(f"a radius is in a norm, or else of a measure in words, got the norm {self.norm} and the measure {self.measure!r}")

    def __len__(self) -> int:
        return len(self.prediction)

    def certified(self, labels: Sequence[int] | NDArray[np.int64], radius: float) -> NDArray[np.bool_]:
        """Which inputs are given their label, for certain, within the closed ball of this radius (`radius=0`: given their label at all)."""
        if not (isinstance(radius, numbers.Real) and radius >= 0):
            raise ValueError(f"a radius is one number that is not negative, got {radius!r}")
        known = np.asarray(labels)
        if known.shape != self.prediction.shape or (known.dtype.kind not in "iu" and len(self)):
            raise ValueError(
                f"labels are one whole number for each of {len(self)} inputs, got the shape {known.shape} of {known.dtype}; give them as ({len(self)},)"
            )
        right = (self.prediction == known) & ~self.abstained
        return right if radius == 0 else right & (self.radius > radius)

    def accuracy(self, labels: Sequence[int] | NDArray[np.int64], radius: float) -> float:
        """The fraction of inputs that are given their label, for certain, within the closed ball of this radius."""
        if not len(self):
            raise ValueError("there is no input, so there is no fraction of them; certify at least one")
        return float(self.certified(labels, radius).mean())

    def __str__(self) -> str:
        chance = "for certain" if self.failure == 0 else f"each with probability at least {1 - self.failure:g}"
        kind, of = ("", f" of {self.measure}") if self.norm is None else (f"l{self.norm:g} ", "")
        median = f"{down_text(float(np.median(self.radius)))}{of}" if len(self) else "-"
        return f"{len(self)} inputs, median certified {kind}radius {median} ({chance}; {self.method})"
