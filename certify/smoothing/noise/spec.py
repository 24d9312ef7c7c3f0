"""The noise, as a specification: which random words belong to which element of which sample, and what is made of them. numpy only, no torch.

A row of a batch is `slot, stream, sample`: the image it is a noisy copy of, the stream its noise is from (the image's number in the data set; one number for
all images where they share their noise), and which sample of that stream it is. Element e of it depends on the seed, the stream, the sample and e alone, so
results do not depend on batches, blocks, devices, shards or where a run was interrupted. Elements are counted channels last. A row of slot -1 is padding: it
comes out as NaN, so that a network which mixes the rows of a batch shows it, and it is counted nowhere.

The words are Philox4x32-10 (Salmon et al., SC 2011) of the key `seed` and the counter (e // 4, low word of sample, stream, high word of sample), word e % 4 of
the four. Bit 31 of the last counter word asks for the 32 lower bits of a 64-bit number. Everything that is proved takes these words as independent and uniform.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from certify.errors import CertifyError
from certify.smoothing.noise.tables import TAILS, Tables, tables

Rows = NDArray[np.int64]  # (rows, 3): slot, stream, sample
Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

SELECTION = 1 << 40  # the first sample of those that choose the class: disjoint from those that certify it


def row_table(slot: ArrayLike, stream: ArrayLike, sample: ArrayLike) -> Rows:
    """The rows of a batch, from arrays or numbers that broadcast."""
    return np.stack(np.broadcast_arrays(*(np.atleast_1d(np.asarray(part, dtype=np.int64)) for part in (slot, stream, sample))), axis=-1)


def check_rows(rows: Rows, images: int) -> None:
    """Raises CertifyError unless slots are -1 or number images, streams have 32 bits and samples 63."""
    slot, stream, sample = rows.T
    if len(rows) and not (slot.min() >= -1 and slot.max() < images and stream.min() >= 0 and stream.max() < 1 << 32 and sample.min() >= 0):
        raise CertifyError(f"each row has a slot from -1 to {images - 1}, a stream from 0 to 2^32 - 1 and a sample that is not negative")


def philox(c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, seed: int) -> tuple[Words, ...]:
    """Philox4x32-10 of counters that broadcast; the 64-bit seed is the key, low word first."""
    a, b, c, d = (np.array(part, dtype=np.uint64) for part in np.broadcast_arrays(c0, c1, c2, c3))
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    for turn in range(10):
        key0, key1 = (np.uint64((word + turn * step) & 0xFFFFFFFF) for word, step in ((seed, 0x9E3779B9), (seed >> 32, 0xBB67AE85)))
        a *= np.uint64(0xD2511F53)
        c *= np.uint64(0xCD9E8D57)
        a, b, c, d = (c >> half) ^ b ^ key0, c & mask, (a >> half) ^ d ^ key1, a & mask
    return tuple(part.astype(np.uint32) for part in (a, b, c, d))


def words(seed: int, rows: Rows, elements: int, low: bool = False) -> Words:
    """(rows, elements): the random word of each element; `low`, the lower one."""
    _, stream, sample = (part[:, None] for part in rows.T)
    group = np.arange(-(-elements // 4))
    found = philox(group, sample & 0xFFFFFFFF, stream, sample >> 32 | low << 31, seed)
    return np.stack(found, axis=-1).reshape(len(rows), -1)[:, :elements]


def check_seed(seed: int) -> None:
    """Raises CertifyError unless it can be the key of Philox."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise CertifyError(f"a seed is a whole number from 0 to 2^64 - 1, got {seed}")


def _check(sigma: float, seed: int, scale: tuple[float, ...] | None, bias: tuple[float, ...]) -> None:
    if not 1e-30 <= sigma <= 1e30:
        raise CertifyError(f"sigma is a positive, finite number that float32 can hold, got {sigma}")
    check_seed(seed)
    sizes = {len(bias), len(bias if scale is None else scale)}
    if 0 in sizes or len(sizes - {1}) > 1 or not np.isfinite([*(scale or ()), *bias]).all():
        raise CertifyError(f"scale and bias are finite numbers, one or one for each channel, got {scale} and {bias}")


def _channels(scale: tuple[float, ...], bias: tuple[float, ...]) -> tuple[Floats, Floats]:
    both = np.broadcast_arrays(np.array(scale, dtype=np.float32), np.array(bias, dtype=np.float32))
    return both[0].copy(), both[1].copy()


@dataclasses.dataclass(frozen=True)
class Grid:
    """Whole-number noise: k = N(0, (sigma levels)^2) rounded to the nearest integer, for images X of whole numbers that stand for X / levels.

    `law` names the noise where it is not Gaussian: Laplace noise of scale sigma, or uniform noise on [-sigma, sigma]; all that follows is true of each.
    Rounding to the grid commutes with adding a point X of it, so X + k is `round(X + levels sigma z)`, z normal, and smoothing any f with it is Gaussian
    smoothing of f after rounding to the grid, a function of real inputs. Its radius holds for real perturbations of X / levels with no word on floating point
    (Voracek & Hein 2022), but for the total variation of `tables.total_variation`, which is taken from every lower bound on a probability.

    With U the 64-bit number of an element (both words), V = U or its complement, whichever has no top bit, and Q_j the thresholds of `tables`:
    |k| = #{j : V < Q_j}, and k > 0 where U has the top bit. A network is given `(X + k) scale + bias` in float32: one multiplication and one addition,
    each rounded to nearest, so scaling is part of f. `scale` is 1 / levels unless given. Raises CertifyError for numbers out of range.
    """

    sigma: float  # in the units of the input, in which the grid's step is 1 / levels
    seed: int = 0
    levels: int = 255
    scale: tuple[float, ...] | None = None  # one, or one for each channel
    bias: tuple[float, ...] = (0.0,)
    law: str = "gaussian"  # or "laplace", "uniform"

    def __post_init__(self) -> None:
        _check(self.sigma, self.seed, self.scale, self.bias)
        if self.law not in TAILS:
            raise CertifyError(f"the law of whole-number noise is one of {', '.join(TAILS)}, got {self.law!r}")
        if not isinstance(self.levels, int) or not 1 <= self.levels <= 1 << 16:
            raise CertifyError(f"the levels of a grid are a whole number from 1 to 65536, got {self.levels}")

    @property
    def tables(self) -> Tables:
        """Thresholds and what is made of them."""
        return tables(self.sigma, self.levels, self.law)

    @property
    def channels(self) -> tuple[Floats, Floats]:
        """Scale and bias of each channel, as the float32 numbers that are used."""
        return _channels(self.scale or (1 / self.levels,), self.bias)

    def draw(self, rows: Rows, elements: int) -> Integers:
        """(rows, elements): k, by its definition."""
        high, low = (words(self.seed, rows, elements, low).astype(np.uint64) for low in (False, True))
        u = high << np.uint64(32) | low
        negative = u >> np.uint64(63) == 0
        thresholds = np.array(self.tables.thresholds[::-1], dtype=np.uint64)  # increasing
        magnitude = len(thresholds) - np.searchsorted(thresholds, np.where(negative, u, ~u), side="right")
        return np.where(negative, -magnitude, magnitude).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Gauss:
    """Float noise: `(x + sigma z) scale + bias` in float32, z by Box & Muller 1958 from two words each, every operation rounded to nearest, none fused.

    Bit by bit the same everywhere, but a certificate from it takes for granted that these float32 numbers are normal ones: nobody has proved how far that is
    from true. |z| is at most 6.66 (beyond that a normal number lies with probability 3e-11). Raises CertifyError for numbers out of range.
    """

    sigma: float  # in the units of the input; the nearest float32 is used
    seed: int = 0
    scale: tuple[float, ...] | None = None  # one, or one for each channel
    bias: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        _check(self.sigma, self.seed, self.scale, self.bias)

    @property
    def channels(self) -> tuple[Floats, Floats]:
        """Scale and bias of each channel, as the float32 numbers that are used."""
        return _channels(self.scale or (1.0,), self.bias)

    def draw(self, rows: Rows, elements: int) -> Floats:
        """(rows, elements): z."""
        four = words(self.seed, rows, -(-elements // 4) * 4)
        pairs = four.reshape(len(rows), -1, 2)
        radius = np.sqrt(minus_two_log(pairs[..., 0]))  # numpy's is correctly rounded; torch's on the CPU is not
        cosine, sine = cos_sin(pairs[..., 1])
        return np.stack([radius * cosine, radius * sine], axis=-1).reshape(len(rows), -1)[:, :elements]


_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def _polynomial(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + np.float32(c)
    return y


def minus_two_log(word: Words) -> Floats:
    """-2 ln(u), u = float32(word | 1) / 2^32, to a relative error of 3e-7 (measured), and never below 0.

    Cephes' logf: u = 2^-n (1 + t) with 1 + t in [sqrt(1/2), sqrt(2)).
    """
    f = np.float32
    bits = (word | np.uint32(1)).astype(f).view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> 23
    t = (bits - (exponent << 23)).view(f) - f(1)
    n = (32 - exponent).astype(f)
    square = t * t
    y = _polynomial(t, _LOG) * t * square - n * f(-2.12194440e-4) - f(0.5) * square
    y = n * f(0.693359375) - (t + y)
    return y + y


def cos_sin(word: Words) -> tuple[Floats, Floats]:
    """cos and sin of 2 pi word / 2^32, to an error of 1.2e-7 (measured): the nearest quarter of a turn is exact, Cephes' polynomials do the rest."""
    f = np.float32
    quarter = (word + np.uint32(0x20000000)) >> np.uint32(30)
    x = (word - (quarter << np.uint32(30))).view(np.int32).astype(f) * f(2 * np.pi / 2**32)
    z = x * x
    sine = _polynomial(z, _SIN) * z * x + x
    cosine = _polynomial(z, _COS) * z * z - f(0.5) * z + f(1)
    odd = quarter & 1 == 1
    first, second = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    return np.where((quarter == 1) | (quarter == 2), -first, first), np.where(quarter >= 2, -second, second)


def apply(
    noise: Grid | Gauss,
    images: NDArray[np.generic],  # (images, elements): whole numbers for Grid
    rows: Rows,
    drawn: Integers | Floats,  # (rows, elements): what `noise.draw` gives
) -> Floats:  # (rows, elements)
    """The noisy copies as a network gets them."""
    scale, bias = (np.resize(part, images.shape[1]) for part in noise.channels)
    picked = images[rows[:, 0]]
    exact = isinstance(noise, Grid)
    moved = (picked.astype(np.int32) + drawn).astype(np.float32) if exact else picked.astype(np.float32) + np.float32(noise.sigma) * drawn
    moved *= scale
    moved += bias
    moved[rows[:, 0] < 0] = np.nan
    return np.asarray(moved)


def bfloat16_bits(y: Floats) -> NDArray[np.uint16]:
    """The 16 bits of each number rounded to bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(y, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(y), np.uint32(0x7FC0), rounded).astype(np.uint16)


def to_grid(inputs: ArrayLike, levels: int = 255, norm: float = 2.0) -> tuple[Integers, NDArray[np.float64]]:
    """The nearest whole numbers X to `levels` times the inputs (N, ...), and the distances from X / levels in this norm (1, 2 or inf), rounded up: to be
    taken from the radius.

    The distance of a float32 image from the bytes it was made of is not 0, since k / 255 is not a float32 number: about 1e-8 for each element, in l2.
    Raises CertifyError for inputs that are not finite or too large.
    """
    x = np.asarray(inputs, dtype=np.float64)
    if not (np.abs(x) * levels < 1 << 30).all():
        raise CertifyError(f"inputs on a grid of {levels} levels are finite, and below {2**30 // levels} in size")
    nearest = np.rint(x * levels)
    # x levels, X / levels and their difference have errors below 2^-52 (|x| + 1/levels) each
    apart = np.abs(x - nearest / levels) + (np.abs(x) + 1 / levels) * 2.0**-51
    distance = np.linalg.norm(apart.reshape(len(x), math.prod(x.shape[1:])), ord=norm, axis=1) * (1 + 1e-9)
    return nearest.astype(np.int32), distance
