"""Copies under the noises that have no kernel, as a specification and as what runs: the parameters of each copy from its random words, then what is done.

Words are those of `spec`: they depend on the seed, the number of the input and the number of the copy alone. Inputs are held channels last, in float64, and
copies are rounded to float32 at the end, so whatever is computed here is one transform of the input after another; nothing is clipped.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from certify.bound import Array
from certify.smoothing.noise.spec import Floats, Rows, check_seed, minus_two_log, words
from certify.smoothing.noises import Laplace, Noise, Uniform, UniformLinf

_STRIP = 1 << 17  # numbers that are worked on at a time


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Copies under this noise; see `parameters` and `applied` for what they are."""

    noise: Noise
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def copies(
        self,
        images: Array,  # (images, *shape), channels last
        rows: Rows,
        out: Floats,  # (rows, *shape), channels last
    ) -> None:
        """Fill `out`; a row of slot -1 is NaN."""
        step = max(1, _STRIP // math.prod(images.shape[1:]))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            with np.errstate(over="ignore", invalid="ignore"):  # what is too large for float32 is infinite, and the network says what it makes of that
                found = applied(self.noise, images[part[:, 0]], self.parameters(part, images.shape[1:]))
                out[start : start + step] = found
            out[start : start + step][part[:, 0] < 0] = np.nan

    def parameters(self, rows: Rows, shape: tuple[int, ...]) -> NDArray[np.generic]:
        """What is drawn for each copy of an input of this shape (channels last).

        Laplace and uniform noise: (rows, *shape), each number from 32 bits of its own; Laplace noise is at most 22.2 scales large (beyond: 2e-10).
        """
        noise, elements = self.noise, math.prod(shape)
        match noise:
            case Laplace():
                word = words(self.seed, rows, elements)
                size = minus_two_log(word << np.uint32(1)) / np.float32(2)  # of 31 bits; the top one is the sign
                return np.where(word >> np.uint32(31) == 1, size, -size).reshape(len(rows), *shape)
            case Uniform() | UniformLinf():
                return ((words(self.seed, rows, elements).astype(np.float64) + 0.5) * 2.0**-31 - 1).reshape(len(rows), *shape)
        raise TypeError(f"nothing draws {noise!r}; please report this")


def applied(
    noise: Noise,
    images: Array,  # (rows, *shape), channels last
    drawn: NDArray[np.generic],  # what `Drawn.parameters` gives
) -> Array:  # (rows, *shape), channels last
    """What is done to each input."""
    match noise:
        case Laplace(scale):
            return images + scale * drawn.astype(np.float64)
        case Uniform(half_width) | UniformLinf(half_width):
            return images + half_width * drawn.astype(np.float64)
    raise TypeError(f"nothing applies {noise!r}; please report this")
