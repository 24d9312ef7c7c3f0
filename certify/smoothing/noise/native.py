"""The C form of the noise: found where it was built from this very source, and tried against numpy's before it is trusted. Without it numpy is used."""

from __future__ import annotations

import ctypes
import functools
import itertools
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from certify.smoothing.noise import build
from certify.smoothing.noise.build import LIBRARY, digest
from certify.smoothing.noise.counts import count_rows
from certify.smoothing.noise.spec import Floats, Gauss, Grid, Rows, apply, row_table

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_COMMON = (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, ctypes.c_uint64)
_CHUNK = 1024  # as in _noise.c


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, if they are there, of this version, load, and give the bits of the specification on a trial."""
    return load(LIBRARY)


def load(path: pathlib.Path) -> ctypes.CDLL | None:
    """As `library`, from a file."""
    try:
        found = ctypes.CDLL(str(path))
        if (ctypes.c_char * 64).in_dll(found, "certify_noise_source").value.decode() != digest():
            return None
        found.certify_noise_grid.argtypes = (*_COMMON, _POINTER, ctypes.c_int32, ctypes.c_int32, _POINTER, _POINTER, _POINTER)
        found.certify_noise_gauss.argtypes = (*_COMMON, ctypes.c_float, _POINTER)
        found.certify_noise_votes.argtypes = (_POINTER, _POINTER, _LONG, _LONG, ctypes.c_float, _POINTER)
        found.certify_noise_add.argtypes = (_POINTER, _POINTER, _LONG, _LONG, _POINTER)
    except (OSError, AttributeError, ValueError):  # not built, built for another machine, or of another version
        return None
    for kernel in (found.certify_noise_grid, found.certify_noise_gauss, found.certify_noise_add, found.certify_noise_votes):
        kernel.restype = None
    return found if _agrees(found) else None


def describe() -> str:
    """Which form of the noise the CPU runs, in a sentence."""
    if library() is not None:
        return "noise on the CPU is drawn by the compiled kernel"
    return (
        f"noise on the CPU is drawn by numpy, the same bits in about ten times the time: {LIBRARY.name} "
        + ("is of another version, does not load here, or gives other bits" if LIBRARY.exists() else "was not built")
        + f"; with a C compiler there, run: python {build.__file__}"
    )


def noisy_rows(noise: Grid | Gauss, images: np.ndarray, rows: Rows, out: Floats, threads: int = 1) -> None:
    """Fill `out` (rows, elements) from `images` (images, elements) by the compiled kernel, which must be there; rows are shared out among threads."""
    kernels = library()
    assert kernels is not None
    cuts = np.linspace(0, len(rows), max(1, min(threads, len(rows))) + 1).astype(int)
    parts = list(itertools.pairwise(cuts))
    if len(parts) == 1:
        _fill(kernels, noise, images, rows, out)
        return
    with ThreadPoolExecutor(len(parts)) as pool:  # ctypes lets go of Python's lock during the call
        list(pool.map(lambda part: _fill(kernels, noise, images, rows[slice(*part)], out[slice(*part)]), parts))


def _fill(kernels: ctypes.CDLL, noise: Grid | Gauss, images: np.ndarray, rows: Rows, out: Floats) -> None:
    scale, bias = _repeated(noise)
    images = np.ascontiguousarray(images, dtype=np.int32 if isinstance(noise, Grid) else np.float32)
    rows = np.ascontiguousarray(rows)
    common = (images.ctypes.data, rows.ctypes.data, *out.shape, scale.ctypes.data, bias.ctypes.data, len(scale) - _CHUNK, noise.seed)
    if isinstance(noise, Grid):
        t = noise.tables
        kernels.certify_noise_grid(*common, t.lookup.ctypes.data, t.shift, t.offset, t.high.ctypes.data, t.low.ctypes.data, out.ctypes.data)
    else:
        kernels.certify_noise_gauss(*common, noise.sigma, out.ctypes.data)


def add_rows(
    noise: NDArray[np.float64],  # (rows, width)
    image: NDArray[np.float64],  # (width,)
    out: Floats,  # (rows, width)
) -> None:
    """out = noise + image, rounded once to float32; numpy does the same, in four times the time."""
    kernels = library()
    if kernels is None or not (noise.flags.c_contiguous and image.flags.c_contiguous and out.flags.c_contiguous):
        np.add(noise, image, out=out, casting="same_kind")
    else:
        kernels.certify_noise_add(noise.ctypes.data, image.ctypes.data, *out.shape, out.ctypes.data)


def count_votes(logits: Floats, rows: Rows, counts: NDArray[np.int64], margin: float) -> bool:
    """As `counts.count_rows` of votes, where the kernel is there; rows have been checked."""
    if (kernels := library()) is None or not (logits.flags.c_contiguous and rows.flags.c_contiguous and counts.flags.c_contiguous):
        return False
    kernels.certify_noise_votes(logits.ctypes.data, rows.ctypes.data, *logits.shape, margin, counts.ctypes.data)
    return True


@functools.lru_cache(maxsize=8)
def _repeated(noise: Grid | Gauss) -> tuple[Floats, Floats]:
    """Scale and bias of a chunk and one period more, so that each chunk finds its own from anywhere in the period."""
    repeated = [np.resize(part, _CHUNK + len(part)) for part in noise.channels]
    return repeated[0], repeated[1]


def _agrees(kernels: ctypes.CDLL) -> bool:
    """A compiler that fuses a multiplication with an addition, say, does not get past this."""
    rows, elements = row_table([0, 0, -1], 7, [0, 1 << 33, 0]), 2000
    images = np.arange(elements, dtype=np.int32)[None] % 256
    for noise in (Grid(0.25, seed=1, scale=(0.3,), bias=(-0.7,)), Gauss(0.7, seed=1, scale=(0.3,), bias=(-0.7,))):
        out = np.empty((len(rows), elements), dtype=np.float32)
        _fill(kernels, noise, images, rows, out)
        if not np.array_equal(apply(noise, images, rows, noise.draw(rows, elements)), out, equal_nan=True):
            return False
    addend, image, out = np.arange(300.0).reshape(2, 150) / 7, np.arange(150.0) / 11, np.empty((2, 150), dtype=np.float32)
    kernels.certify_noise_add(addend.ctypes.data, image.ctypes.data, *out.shape, out.ctypes.data)
    logits = np.where(np.arange(48).reshape(12, 4) % 13 == 5, np.nan, np.arange(48).reshape(12, 4) * 7 % 5).astype(np.float32)
    counts, expected, slots = np.zeros((3, 5), dtype=np.int64), np.zeros((3, 5), dtype=np.int64), row_table(np.arange(12) % 4 - 1, 0, 0)
    kernels.certify_noise_votes(logits.ctypes.data, slots.ctypes.data, *logits.shape, 1.0, counts.ctypes.data)
    count_rows(logits, slots[:, 0], expected, 1.0)
    return np.array_equal(out, (addend + image).astype(np.float32)) and np.array_equal(counts, expected)
