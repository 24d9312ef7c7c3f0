"""Copies under the noises that have no kernel, as a specification and as what runs: the parameters of each copy from its random words, then what is done.

Words are those of `spec`: they depend on the seed, the number of the input and the number of the copy alone. Inputs are held channels last, in float64, and
copies are rounded to float32 at the end, so whatever is computed here is one transform of the input after another; nothing is clipped.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from certify.bound import Array
from certify.errors import CertifyError
from certify.smoothing.noise.spec import Floats, Grid, Rows, check_seed, minus_two_log, words
from certify.smoothing.noise.tables import total_variation
from certify.smoothing.noises import (
    Ablation,
    Brightness,
    Contrast,
    ContrastBrightness,
    CyclicTranslation,
    FourierBlur,
    Gamma,
    Laplace,
    LogNormalGamma,
    Noise,
    Uniform,
    UniformLinf,
)

DRAWN = (Laplace, Uniform, UniformLinf, Ablation, Brightness, Contrast, ContrastBrightness, CyclicTranslation, FourierBlur, Gamma, LogNormalGamma)
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
        out: Floats,  # (rows, *shape), channels last; the shape that is `seen`
    ) -> None:
        """Fill `out`; a row of slot -1 is NaN."""
        step = max(1, _STRIP // math.prod(images.shape[1:]))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            with np.errstate(over="ignore", invalid="ignore"):  # what is too large for float32 is infinite, and the network says what it makes of that
                found = applied(self.noise, images[part[:, 0]], self.parameters(part, images.shape[1:]))
                out[start : start + step] = found
            out[start : start + step][part[:, 0] < 0] = np.nan

    @property
    def exact(self) -> bool:
        """Whether the copies have the law of the noise up to `distance`, with no word on floating point."""
        return isinstance(self.noise, Ablation | CyclicTranslation)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises CertifyError for inputs of a shape (channels first) that this noise is not for."""
        noise = self.noise
        if isinstance(noise, CyclicTranslation | FourierBlur) and len(shape) != 3:
            raise CertifyError(f"{noise!r} is for images of shape (channels, height, width), these inputs have the shape {shape}")
        count = math.prod(shape[1:] if len(shape) == 3 else shape)
        if isinstance(noise, Ablation) and noise.dimension != count:
            what = "pixels" if len(shape) == 3 else "entries"
            raise CertifyError(f"{noise!r} is for inputs of {noise.dimension} pixels, these have the shape {shape} and {count} {what}")

    def check_values(self, inputs: Array) -> None:
        """Raises CertifyError for inputs that this noise is not for."""
        if isinstance(self.noise, Gamma | LogNormalGamma) and not (np.all(inputs >= 0) and np.all(inputs <= 1)):
            raise CertifyError(f"{self.noise!r} is for inputs in [0, 1], these are in [{inputs.min():g}, {inputs.max():g}]")

    def distance(self) -> float:
        """How far, in total variation, the law of a copy is from that of the noise, at most; rounded up.

        Ablation keeps sets that are equally likely unless two of the 64-bit words are equal: `d (d - 1) / 2 / 2^64`, which also bounds the distance.
        """
        if isinstance(self.noise, Ablation):
            return math.nextafter(math.comb(self.noise.dimension, 2) / 2**64, math.inf)
        if isinstance(self.noise, CyclicTranslation):
            return total_variation(self.noise.sigma, 2, levels=1)
        return 0.0

    def parameters(self, rows: Rows, shape: tuple[int, ...]) -> NDArray[np.generic]:
        """What is drawn for each copy of an input of this shape (channels last).

        Laplace and uniform noise: (rows, *shape), each number from 32 bits of its own; Laplace noise is at most 22.2 scales large (beyond: 2e-10). Ablation:
        (rows, *places) bool, what is kept: the places whose 64-bit words are the least. All sets of places are equally likely where no two words are equal.
        Transforms: (rows, 1 or 2), from 52 bits each; shifts are whole numbers, with the law of `Grid` in steps of one pixel.
        """
        noise, elements = self.noise, math.prod(shape)
        match noise:
            case Laplace():
                word = words(self.seed, rows, elements)
                size = minus_two_log(word << np.uint32(1)) / np.float32(2)  # of 31 bits; the top one is the sign
                return np.where(word >> np.uint32(31) == 1, size, -size).reshape(len(rows), *shape)
            case Uniform() | UniformLinf():
                return ((words(self.seed, rows, elements).astype(np.float64) + 0.5) * 2.0**-31 - 1).reshape(len(rows), *shape)
            case Ablation(keep):
                lot = _both(self.seed, rows, math.prod(places(shape)))
                return (lot <= np.partition(lot, keep - 1, axis=1)[:, keep - 1 : keep]).reshape(len(rows), *places(shape))
            case CyclicTranslation(sigma):
                return Grid(sigma, self.seed, levels=1).draw(rows, 2)
            case FourierBlur(law) | Gamma(law):
                return law.quantile(_uniform(self.seed, rows, 1))
            case Brightness(sigma) | Contrast(sigma) | LogNormalGamma(sigma):
                return sigma * np.asarray(special.ndtri(_uniform(self.seed, rows, 1)))
            case ContrastBrightness(sigma, tau):
                return np.array([sigma, tau]) * special.ndtri(_uniform(self.seed, rows, 2))
        raise TypeError(f"nothing draws {noise!r}; please report this")


def places(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What is hidden as one in an input of this shape (channels last): a pixel with all its channels in an image, else an entry."""
    return shape[:-1] if len(shape) == 3 else shape


def seen(noise: Noise, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the network is given copies in, of inputs of this shape (channels first)."""
    return (2 * shape[0], *shape[1:]) if isinstance(noise, Ablation) else shape


def given(noise: Noise, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of inputs (channels first) whose copies a network of inputs of this shape takes. Raises CertifyError where there is none."""
    if not isinstance(noise, Ablation):
        return shape
    if shape[0] % 2:
        raise CertifyError(f"under ablation a network takes x and 1 - x, one after the other along the first axis; inputs of shape {shape} cannot be halved")
    return (shape[0] // 2, *shape[1:])


def _shifted(images: Array, by: NDArray[np.int64]) -> Array:
    """Each image (rows, height, width, channels) moved by so many pixels, cyclically."""
    down, right = ((np.arange(size) - by[:, [axis]]) % size for axis, size in enumerate(images.shape[1:3]))
    return images[np.arange(len(images))[:, None, None], down[:, :, None], right[:, None, :]]


def _blurred(images: Array, variance: Array) -> Array:
    """Each image (rows, height, width, channels) with the multiplier `exp(-|w|^2 variance / 2)` on its discrete Fourier transform."""
    height, width = images.shape[1:3]
    square = (2 * np.pi * np.fft.fftfreq(height)[:, None, None]) ** 2 + (2 * np.pi * np.fft.rfftfreq(width)[:, None]) ** 2
    found = np.fft.rfft2(images, axes=(1, 2)) * np.exp(-square * variance / 2)
    return np.fft.irfft2(found, s=(height, width), axes=(1, 2))


def _uniform(seed: int, rows: Rows, count: int) -> Array:
    """(rows, count): uniform in (0, 1), the middles of 2^52 equal parts."""
    return ((_both(seed, rows, count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _both(seed: int, rows: Rows, count: int) -> NDArray[np.uint64]:
    """(rows, count): 64 random bits each."""
    high, low = (words(seed, rows, count, low).astype(np.uint64) for low in (False, True))
    return high << np.uint64(32) | low


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
        case Ablation():
            kept = drawn[..., None] if images.ndim == 4 else drawn
            return np.concatenate([np.where(kept, images, 0.0), np.where(kept, 1 - images, 0.0)], axis=-1 if images.ndim == 4 else 1)
        case CyclicTranslation():
            return _shifted(images, drawn.astype(np.int64))
    first, last = (drawn[:, i].astype(np.float64).reshape(-1, *[1] * (images.ndim - 1)) for i in (0, -1))  # of one parameter or of two
    match noise:
        case Brightness():
            return images + first
        case Contrast():
            return np.exp(first) * images
        case LogNormalGamma():
            return np.asarray(images ** np.exp(first))
        case Gamma():
            return np.asarray(images**first)
        case ContrastBrightness():
            return np.exp(first) * (images + last)
        case FourierBlur():
            return _blurred(images, first)
    raise TypeError(f"nothing applies {noise!r}; please report this")
