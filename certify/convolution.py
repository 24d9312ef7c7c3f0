"""Spectral norms of stored convolutions, proved: float64, every rounding included.

A convolution of an image is part of a convolution on a torus, which is one matrix for each frequency. `zeros_axis` and `circular_axis` say which torus and
why, `_polyphase` turns strides into channels, `_largest_gram` bounds the matrices, and `_any_frequency` what lies between those of a coarser grid. Of a small
image, where the torus is no more than a bound, the convolution is written out as a matrix.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from certify.bound import Array
from certify.errors import CertifyError
from certify.rounding import multiply_up, up
from certify.spectral import largest_singular_value
from sdp.proof import UNIT, gamma

Sizes = int | Sequence[int]
Complex = NDArray[np.complex128]
_SLACK = 1 + 2.0**-44  # covers the few roundings in the error terms themselves
TWIDDLE = 80  # units of rounding in a product of two roots of unity, see _responses
_MATRIX = 1024  # rows or columns up to which a convolution is written out: about half a second on one core
_WORK = 3e10  # flops up to which every frequency of the torus is looked at: about 3 s on one core
_FINENESS = 24  # points of the coarser grid for each degree: 1 / cos(pi / 48) = 1.0022 per axis
_CHUNK = 2**22  # numbers in the largest array


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the torus that a convolution is part of, and the taps that count."""

    torus: int  # N, a multiple of the stride; 0 where no output ever meets the image
    taps: tuple[int, int]  # first and one past the last of the kernel
    stride: int
    dilation: int
    copies: int = 1  # how often an output of the torus may be repeated

    @property
    def phases(self) -> int:
        """Taps `t` and `t + phases` meet the same pixels modulo the stride."""
        return self.stride // math.gcd(self.stride, self.dilation)

    @property
    def degree(self) -> int:
        """Of each phase as a trigonometric polynomial."""
        return (self.taps[1] - self.taps[0] - 1) // self.phases

    @property
    def points(self) -> int:
        """The frequencies of the torus that differ: `turn * f / (N / stride)` modulo 1 for whole f are the multiples of `1 / points`."""
        frequencies = self.torus // self.stride
        turn = self.dilation // math.gcd(self.stride, self.dilation)
        return frequencies // math.gcd(frequencies, turn) if self.degree else 1

    @property
    def coarse(self) -> int:
        """Points of a grid that does not grow with the image."""
        return min(self.points, _FINENESS * self.degree) if self.degree else 1

    def between(self, points: int) -> float:
        """`max_theta |p(theta)| <= between * max_grid |p|` for polynomials p of this degree, rounded up; see _any_frequency."""
        return 1.0 if points == self.points else _any_frequency(self.degree, points)


@dataclasses.dataclass(frozen=True)
class Reach:
    """What one convolution reads along one axis."""

    size: int
    outputs: int
    taps: int
    stride: int
    before: int  # of the padding
    dilation: int
    wraps: bool  # the padding is circular

    @property
    def positions(self) -> NDArray[np.int64]:  # (outputs, taps)
        """That the network reads."""
        return self.read(np.arange(self.outputs))

    def read(self, outputs: NDArray[np.int64]) -> NDArray[np.int64]:  # (len(outputs), taps)
        """The positions behind some outputs, before any torus."""
        return self.stride * outputs[:, None] + self.dilation * np.arange(self.taps) - self.before

    @property
    def marks(self) -> Array:  # (outputs, taps, size)
        """1 where a tap of an output reads a pixel."""
        read = self.positions % self.size if self.wraps else self.positions
        return np.asarray(read[:, :, None] == np.arange(self.size), dtype=np.float64)

    @property
    def looks_outside(self) -> bool:
        """Whether the network reads zeros of a padding, so that the torus must have zeros there."""
        return not self.wraps and bool(self._outside(self.positions).any())

    def _outside(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.asarray((positions < 0) | (positions >= self.size))

    def agrees(self, torus: int) -> bool:
        """Whether the outputs of the image are those of the torus of this size, for a clean input."""
        if torus % self.stride or self.size > torus or self.outputs > torus // self.stride:
            return False
        if self.wraps:
            return torus == self.size
        positions = self.positions
        return bool(self._outside(positions[self._outside(positions)] % torus).all())

    def spills(self, torus: int) -> bool:
        """Whether an output of the torus that is outside the image reads a pixel."""
        return not self._outside(self.read(np.arange(self.outputs, torus // self.stride)) % torus).all()

    def enough(self) -> int:
        """A size from which on every multiple of the stride agrees, unless the padding is circular."""
        last = self.stride * (self.outputs - 1) + self.dilation * (self.taps - 1) - self.before
        return max(self.size + self.before, last + 1, self.stride * self.outputs)


def zeros_axis(size: int, taps: int, stride: int, before: int, after: int, dilation: int) -> list[Axis]:
    """The smallest torus known to hold `y[i] = sum_t K[t] x[stride i + dilation t - before]`, with x = 0 outside `0..n-1` (n = size).

    On the torus of size N, a multiple of the stride, let X be x followed by N - n zeros, and Y the outputs at all N / stride places. Then y is a part of Y,
    so its norm is at most that of the torus, if (1) each position that y reads, taken modulo N, is the same pixel or one of the zeros `n..N-1`, and (2) the
    outputs are at different places. Outputs that meet no pixel are left out first. What remains is in a range i0..i1, which reads positions from
    `first = stride i0 + dilation t0 - before` to `last = stride i1 + dilation t1 - before`, with t0..t1 a range of taps that holds all that meet a pixel.
    (1) A position j < 0 goes to j + N, which is at least n if `N >= n - first`; a position j >= n stays if `N >= last + 1`. So N is the first multiple of the
    stride that is at least `max(n, n - first, last + 1)`: n without padding, n + k // 2 for 'same' padding at stride 1, never more than n + p + stride - 1
    for padding up to p on both sides.
    (2) follows: i1 meets a pixel by some t >= t0, so `stride i1 + dilation t0 - before <= n - 1` and `stride (i1 - i0) <= n - 1 - first < N`.
    A shift of the whole by `before` is a permutation of the torus. If only one output remains, it is exactly the kernel as a matrix, of the taps that meet a
    pixel: one output of a torus that holds those taps once and whose stride is its size.
    Where some taps meet no pixel, the torus of the others and that of all of them are both returned. Each gives a bound, and either may be the smaller.
    """
    outputs = _outputs(size, taps, stride, before + after, dilation)
    met = []  # (t, first i, last i) for which tap t meets a pixel
    for t in range(taps):
        low, high = max(0, -((dilation * t - before) // stride)), min(outputs - 1, (size - 1 + before - dilation * t) // stride)
        met += [(t, low, high)] if low <= high else []
    if not met:
        return [Axis(0, (0, 0), stride, dilation)]
    i0, i1 = min(low for _, low, _ in met), max(high for *_, high in met)
    t0, t1 = met[0][0], met[-1][0]
    if i0 == i1:
        torus = dilation * (t1 - t0) + 1
        return [Axis(torus, (t0, t1 + 1), torus, dilation)]
    axes = []
    for start, end in sorted({(t0, t1), (0, taps - 1)}):
        first, last = stride * i0 + dilation * start - before, stride * i1 + dilation * end - before
        needed = max(size, size - first, last + 1)
        axes.append(Axis(-(-needed // stride) * stride, (start, end + 1), stride, dilation))
    return axes


def circular_axis(size: int, taps: int, stride: int, before: int, after: int, dilation: int) -> list[Axis]:
    """The torus of `y[i] = sum_t K[t] x[(stride i + dilation t - before) mod n]`: N = n, whatever the padding.

    Exact for the 'same' geometry, where the stride divides n and there are n / stride outputs. In general the outputs are at the multiples of
    `g = gcd(stride, n)`, so y is a part of the convolution with stride g, in which each place occurs at most `ceil(outputs / (n / g))` times. That is a bound,
    and a loose one (by up to stride / g) where the stride does not divide n. Without padding nothing wraps around, and it is the axis of zero padding.
    """
    if before == after == 0:
        return zeros_axis(size, taps, stride, 0, 0, dilation)
    outputs = _outputs(size, taps, stride, before + after, dilation)
    common = math.gcd(stride, size)
    return [Axis(size, (0, taps), common, dilation, copies=-(-outputs * common // size))]


def convolution_norm(
    kernel: Array,  # (out, in / groups, height, width)
    input_size: tuple[int, int],
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,  # one number, (height, width), or (top, bottom, left, right)
    dilation: Sizes = 1,
    groups: int = 1,
    mode: str = "zeros",  # or "circular"
) -> float:
    """A proved upper bound on the l2 operator norm of a convolution of images of this size, as torch defines it.

    Exact, up to rounding, for "circular" with 'same' geometry, and wherever the inputs or the outputs of a group are at most 1024 numbers. Else, for "zeros",
    the norm on the torus of `zeros_axis`; measured over the exact norm, for 3 taps and 'same' padding: at most 1.09 at 8 x 8, 1.02 at 16 x 16. A transposed
    convolution has the norm of the convolution that it transposes. Where the torus has too many frequencies a coarser grid is used, with the factor that covers
    what lies between (at most 0.5 %).
    Raises CertifyError for NaN or infinite numbers, ValueError for a geometry that does not exist.
    """
    return convolution_bound(kernel, input_size, stride=stride, padding=padding, dilation=dilation, groups=groups, mode=mode)[0]


def convolution_bound(
    kernel: Array,  # (out, in / groups, height, width)
    input_size: tuple[int, int],
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    mode: str = "zeros",
) -> tuple[float, str]:
    """`convolution_norm`, and how it was found in a few words."""
    _check(kernel, groups)
    if mode not in ("zeros", "circular"):
        raise ValueError(f"mode must be 'zeros' or 'circular', got {mode!r}")
    (down, across), (row_step, column_step) = two(stride), two(dilation)
    top, bottom, left, right = _four(padding)
    make = zeros_axis if mode == "zeros" else circular_axis
    rows = make(input_size[0], kernel.shape[2], down, top, bottom, row_step)
    columns = make(input_size[1], kernel.shape[3], across, left, right, column_step)
    found = [_torus_bound(kernel, axes, groups) for axes in itertools.product(rows, columns)]
    reads = []
    ends = zip(input_size, kernel.shape[2:], (down, across), ((top, bottom), (left, right)), (row_step, column_step), strict=True)
    for size, taps, step, (before, after), apart in ends:
        reads.append(Reach(size, _outputs(size, taps, step, before + after, apart), taps, step, before, apart, mode == "circular"))
    same = mode == "circular" and all(read.outputs * read.stride == read.size for read in reads)
    if not (same or all(axis.points == 1 for axis in (*rows, *columns))):  # the torus is the image, or it has one frequency
        found.append(_matrix_bound(kernel, reads[0], reads[1], groups))
    return min(found, key=lambda bound: bound[0])


def any_size_norm(
    kernel: Array,  # (out, in / groups, height, width)
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
    points: tuple[int, int] | None = None,  # of the grid; more than the degree of the kernel on each axis
) -> float:
    """A proved upper bound on `convolution_norm` for every size of image and every zero padding, and for "circular" in the 'same' geometry.

    The supremum over all frequencies, from a grid of them.
    """
    _check(kernel, groups)
    axes = [Axis(s, (0, k), s, d) for s, k, d in zip(two(stride), kernel.shape[2:], two(dilation), strict=True)]
    grid = points or (_FINENESS * axes[0].degree or 1, _FINENESS * axes[1].degree or 1)
    value = _norm_on_grid(_polyphase(kernel, axes, groups), grid)
    for axis, count in zip(axes, grid, strict=True):
        value = multiply_up(value, _any_frequency(axis.degree, count))
    return value


def root_up(count: int) -> float:
    """The square root of a whole number: exact where it is whole, else rounded up."""
    root = math.isqrt(count)
    return float(root) if root * root == count else up(math.sqrt(count))


def _check(kernel: Array, groups: int) -> None:
    if kernel.ndim != 4 or kernel.shape[0] % groups:
        raise ValueError(f"a kernel is (out, in / groups, height, width) with groups dividing out, got {kernel.shape} and groups={groups}")
    if not np.isfinite(kernel).all():
        raise CertifyError("a kernel holds NaN or infinite numbers; load weights that are finite")


def _torus_bound(kernel: Array, axes: tuple[Axis, Axis], groups: int) -> tuple[float, str]:
    """A proved upper bound on the norm of the convolution on a torus, and what was done."""
    if any(axis.torus == 0 for axis in axes):
        return 0.0, "every output is zero"
    taps = _polyphase(kernel, axes, groups)
    points = axes[0].points, axes[1].points
    text = f"norm on the {axes[0].torus}x{axes[1].torus} torus"
    if _work(taps, points) > _WORK and (axes[0].coarse, axes[1].coarse) != points:
        points = axes[0].coarse, axes[1].coarse
        text += f", from a grid of {points[0]}x{points[1]} frequencies"
    value = _norm_on_grid(taps, points)
    for axis, count in zip(axes, points, strict=True):
        value = multiply_up(value, axis.between(count))
    copies = axes[0].copies * axes[1].copies
    return value if copies == 1 else multiply_up(value, root_up(copies)), text


def _matrix_bound(kernel: Array, rows: Reach, columns: Reach, groups: int) -> tuple[float, str]:
    """A proved upper bound on the norm of the convolution, written out: no entry is more than one number of the kernel. inf where it is too large for that."""
    out, into = len(kernel) // groups * rows.outputs * columns.outputs, kernel.shape[1] * rows.size * columns.size
    small, numbers = min(out, into), max(read.outputs * read.taps * read.size for read in (rows, columns))
    if groups * max(small**3, small * max(out, into) * _MATRIX // 8) > _MATRIX**3 or numbers > 8 * _MATRIX**2:
        return math.inf, ""
    down, across = rows.marks, columns.marks
    if max(marks.sum(axis=1).max() for marks in (down, across)) > 1:  # two taps meet one pixel
        return math.inf, ""
    value = 0.0
    for part in kernel.reshape(groups, -1, *kernel.shape[1:]):
        matrix = np.einsum("oitu,ytr,xuc->oyxirc", part, down, across, optimize=True).reshape(out, into)
        value = max(value, largest_singular_value(matrix))
    return value, f"norm as {f'{groups} matrices' if groups > 1 else 'a matrix'} of {out}x{into}"


def two(sizes: Sizes) -> tuple[int, int]:
    """One number for both axes, or one for each."""
    down, across = (sizes, sizes) if isinstance(sizes, int) else sizes
    return down, across


def _four(padding: Sizes) -> tuple[int, int, int, int]:
    if not isinstance(padding, int) and len(padding) == 4:
        top, bottom, left, right = padding
        return top, bottom, left, right
    down, across = two(padding)
    return down, down, across, across


def _outputs(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    if min(size, taps, stride, dilation) < 1 or padding < 0:
        raise ValueError(f"size, taps, stride and dilation must be positive and padding not negative, got {size}, {taps}, {stride}, {dilation}, {padding}")
    outputs = (size + padding - dilation * (taps - 1) - 1) // stride + 1
    if outputs < 1:
        raise ValueError(f"a kernel of {taps} taps with dilation {dilation} is larger than the image of {size} with padding {padding}")
    return outputs


def _any_frequency(degree: int, points: int) -> float:
    """`1 / cos(pi degree / (2 points))`, rounded up: the supremum of a kernel's norm over an axis is at most that times the largest on the grid.

    Let |p| for `p(x) = u* K(x) v = sum_{q=0}^degree c_q exp(iqx)` (u, v the singular vectors at a maximum of the norm) be largest, M, at x0. With the phase
    that makes it real there, `f(x) = Re(phase exp(-i degree x / 2) p(x))` has f(x0) = M, |f| <= M, and f(2y) is a real trigonometric polynomial of this
    degree in y; the inequality of Bernstein and Szego, `(d/dy f(2y))^2 + degree^2 f(2y)^2 <= degree^2 M^2`, gives
    `f(x) >= M cos(degree |x - x0| / 2)`. The nearest point of the grid is within pi / points. One axis after the other, with the other fixed.
    """
    if points <= degree:
        raise ValueError(f"a grid for {degree + 1} taps needs more than {degree} points, got {points}")
    if degree == 0:
        return 1.0
    return up(1 / (math.cos(math.pi * degree / (2 * points)) - 2.0**-48))  # 2^-48: the roundings of the argument and of cos, together below 2^-50


def _polyphase(kernel: Array, axes: Sequence[Axis], groups: int) -> Array:  # (taps, groups, out / groups, in / groups * phases)
    """The convolution as one of stride 1: pixels that differ modulo the stride become channels.

    The tap `t = phases r + a` reads pixel `dilation t` from `stride i`, which is entry r * dilation / gcd(stride, dilation) of the channel of a, up to a shift
    that belongs to a. So a frequency response is `sum_r K[phases r + a] exp(i r phi)` for column a, up to a phase of the column.
    """
    (top, bottom), (left, right) = axes[0].taps, axes[1].taps
    rows, columns = min(axes[0].phases, bottom - top), min(axes[1].phases, right - left)  # the other phases meet no tap
    down, across = axes[0].degree + 1, axes[1].degree + 1
    padded = np.zeros((*kernel.shape[:2], down * rows, across * columns))
    padded[:, :, : bottom - top, : right - left] = kernel[:, :, top:bottom, left:right]
    split = padded.reshape(groups, len(kernel) // groups, kernel.shape[1], down, rows, across, columns)
    taps = split.transpose(3, 5, 0, 1, 2, 4, 6)  # (tap down, tap across, group, out, in, row, column)
    return taps.reshape(*taps.shape[:4], -1)


def _work(taps: Array, points: tuple[int, int]) -> float:
    """About how many operations `_norm_on_grid` takes."""
    groups, out, inner = taps.shape[2:]
    small, large = 2 * min(out, inner), 2 * max(out, inner)
    return points[0] * (points[1] // 2 + 1) * groups * small**2 * (2 * large + small)


def _norm_on_grid(
    taps: Array,  # (down, across, groups, out, in)
    points: tuple[int, int],
) -> float:
    """A proved upper bound on the largest singular value of `sum_t taps[t] exp(i <t, 2 pi f / points>)` over all whole f."""
    if not taps.any():
        return 0.0
    exponent = math.frexp(float(np.abs(taps).max()))[1]
    scaled = np.ldexp(taps, -exponent)  # exact, but for numbers 2^-1000 times smaller than the largest; keeps squares from overflow
    if taps.shape[3] > taps.shape[4]:
        scaled = scaled.swapaxes(3, 4)
    size = np.abs(scaled).sum(axis=(0, 1))  # (groups, rows, columns)
    spread = float(np.sqrt((size * size).sum(axis=(1, 2))).max()) * (1 + 1e-6)
    rounding = gamma(taps.shape[0] * taps.shape[1] + TWIDDLE) * spread + 2.0**-500  # of the responses, in the Frobenius norm
    return _unscaled((math.sqrt(_largest_gram(_responses(scaled, points))) + rounding) * _SLACK, exponent)


def spectrum_norm(
    spectrum: Complex,  # (frequencies, rows, columns)
) -> float:
    """A proved upper bound on the largest singular value of a stack of complex matrices. Raises CertifyError for NaN or infinite numbers."""
    if not np.isfinite(spectrum).all():
        raise CertifyError("a spectrum holds NaN or infinite numbers; load weights that are finite")
    if not spectrum.any():
        return 0.0
    if spectrum.shape[1] > spectrum.shape[2]:
        spectrum = spectrum.swapaxes(1, 2)
    exponent = math.frexp(max(float(np.abs(part).max()) for part in (spectrum.real, spectrum.imag)))[1]
    step = max(1, _CHUNK // (2 * spectrum.shape[1] * spectrum.shape[2]))
    chunks = (spectrum[start : start + step] for start in range(0, len(spectrum), step))
    scaled = (_complex(np.ldexp(chunk.real, -exponent), np.ldexp(chunk.imag, -exponent)) for chunk in chunks)
    return _unscaled((math.sqrt(_largest_gram(scaled)) + 2.0**-500) * _SLACK, exponent)


def _unscaled(value: float, exponent: int) -> float:
    try:
        return up(math.ldexp(value, exponent))
    except OverflowError:
        raise CertifyError("a kernel holds numbers so large that its norm is not a float64; load weights that are smaller") from None


def _largest_gram(
    responses: Iterable[Complex],  # of (some, n, k)
) -> float:
    """A proved upper bound on the largest eigenvalue of `B B*`, over all matrices B.

    A Cholesky factorisation of `w I - G` that runs to its end has shown `w I - G >= -g / (1 - g) tr(w I - G)`, g = gamma_{n+1} for real numbers (Higham,
    theorem 10.3). The real and the imaginary part of a complex inner product are real ones of twice the length, with errors of at most
    `gamma_2n sum |Re a| |Re b| + |Im a| |Im b| <= gamma_2n |a| |b|` and as much; together sqrt(2) times that. So `g = 3 gamma_{n+1}` is enough, and four times
    as much is taken for blocked LAPACK, as in sdp.proof. In the same way the rounding of `G = B B*` is at most `3 gamma_k |b_i| |b_j|`, so `3 gamma_k tr(G)` in
    the Frobenius norm.
    """
    size = inner = 0
    passed = largest_trace = 0.0
    for response in responses:
        size, inner = response.shape[1:]
        gram = response @ response.conj().swapaxes(1, 2)
        largest_trace = max(largest_trace, float(np.trace(gram, axis1=1, axis2=2).real.max()))
        passed = _pass(gram, passed)
    g = gamma(12 * (size + 4))
    shift = g / (1 - 2 * g) * size * passed + 2 * UNIT * passed + size**2 * 2.0**-900
    return (passed + shift + gamma(3 * (inner + 4)) * largest_trace * (1 + 1e-6)) * _SLACK


def _responses(taps: Array, points: tuple[int, int]) -> Iterator[Complex]:  # of (some, rows, columns)
    """The response at each frequency, one of each conjugate pair.

    By direct summation. A root of unity is known to 32 units of rounding (its angle to `2.4 * 2 pi`, sine and cosine to eight each), a product of two to 68,
    so an entry of the response to `gamma_{taps + 80} sum_t |taps|`.
    """
    down, across, groups, rows, columns = taps.shape
    flat = taps.reshape(down * across, -1)
    vertical, horizontal = roots_of_unity(points[0], down), roots_of_unity(points[1], across)
    half = points[1] // 2 + 1
    step = max(1, _CHUNK // (2 * groups * rows * columns))
    for start in range(0, points[0] * half, step):
        f, g = np.divmod(np.arange(start, min(start + step, points[0] * half)), half)
        waves = (vertical[f][:, :, None] * horizontal[g][:, None, :]).reshape(len(f), -1)
        made = _complex(np.ascontiguousarray(waves.real) @ flat, np.ascontiguousarray(waves.imag) @ flat)
        yield made.reshape(-1, rows, columns)


def _complex(real: Array, imaginary: Array) -> Complex:
    """Both parts as they are: `real + 1j * imaginary` would round, and overflow, in between."""
    made = np.empty(real.shape, dtype=np.complex128)
    made.real, made.imag = real, imaginary
    return made


def roots_of_unity(points: int, taps: int) -> Complex:  # (points, taps)
    """`exp(2 pi i f t / points)`, by the C library's sine and cosine: numpy's are faster and less exact."""
    roots = np.array([complex(math.cos(2 * math.pi * r / points), math.sin(2 * math.pi * r / points)) for r in range(points)])
    return roots[np.outer(np.arange(points), np.arange(taps)) % points]


def _pass(
    gram: Complex,  # (some, n, n)
    value: float,
) -> float:
    """A number w, at least `value`, such that for each Gram matrix the Cholesky factorisation of `w' I - gram` runs to its end for some `w' <= w`.

    Close to the smallest such number: a few power iterations say which matrix to ask for its eigenvalues, and then those that still fail are asked.
    """
    vector = np.random.default_rng(0).standard_normal((gram.shape[1], 1))
    estimate = gram @ vector
    for _ in range(6):
        estimate = gram @ (estimate / (np.linalg.norm(estimate, axis=1, keepdims=True) + 1e-200))
    likely = int(np.linalg.norm(estimate, axis=(1, 2)).argmax())
    proposal = max(_eigenvalue(gram[[likely]]), 0.0)
    value = max(value, proposal * (1 + 2.0**-42) + 1e-26)
    left = gram
    for attempt in range(40):
        left = left[~_has_factor(left, value)]
        if not len(left):
            return value
        value = max(value, _eigenvalue(left)) * (1 + 2.0 ** (attempt - 42))
    raise AssertionError("the norm of a convolution could not be proved; please report this")


def _eigenvalue(gram: Complex) -> float:
    """The largest eigenvalue of all; a proposal only."""
    return float(np.linalg.eigvalsh(gram).max())


def _has_factor(gram: Complex, value: float) -> NDArray[np.bool_]:
    """Which of `value I - gram` have a Cholesky factor. LAPACK by torch, which says that for each matrix; it reads the lower half and a real diagonal."""
    difference = -gram
    index = np.arange(gram.shape[1])
    difference[:, index, index] += value
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(difference))
    diagonal = factor.diagonal(dim1=1, dim2=2).real.numpy()
    return (failed.numpy() == 0) & (np.isfinite(diagonal) & (diagonal > 0)).all(axis=1)  # a NaN anywhere reaches the diagonal
