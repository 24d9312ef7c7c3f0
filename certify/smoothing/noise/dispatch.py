"""The two calls of the engine, on numpy arrays and on torch tensors: noisy copies of images, and counts of what a network says of them.

On the CPU the C kernel draws the noise where it was built (see `native.describe`), else numpy; on a GPU, Triton. The bits are the same.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np

from certify.errors import CertifyError
from certify.smoothing.noise import counts as counting
from certify.smoothing.noise import native
from certify.smoothing.noise.spec import Gauss, Grid, apply, check_rows, words

_STRIP = 1 << 16  # elements that numpy works on at a time


def noisy_rows(
    noise: Grid | Gauss,
    images: Any,  # (images, *shape), an array or a tensor: uint8, int16 or int32 for Grid, float32 for Gauss; channels last
    rows: Any,  # (rows, 3) int64, of the same kind and in the same place: slot, stream, sample
    out: Any = None,  # (rows, *shape), the same: float32, or bfloat16 (tensors only)
    *,
    bfloat16: bool = False,  # where `out` is not given
    threads: int = 1,
    backend: str | None = None,  # numpy, c or triton; the fastest there is, unless given
) -> Any:
    """The noisy copies that `rows` asks for (see spec), in `out`.

    int32 images are not copied on the CPU; below 2^30 in size, else their sums wrap around. On a GPU nothing is read back, so there a slot out of range is not
    refused: that row is NaN. Raises CertifyError for dtypes, shapes and rows that do not fit, and for a back end that is not there.
    """
    shape, elements = tuple(images.shape[1:]), math.prod(images.shape[1:])
    if out is None:
        out = _empty(images, (len(rows), *shape), bfloat16)
    _check(noise, images, rows, out)
    if len(rows) == 0:
        return out
    here = _device(images) == "cpu"
    backend = backend or ("triton" if not here else "numpy" if native.library() is None else "c")
    if backend == "triton":
        _kernels().launch_noise(noise, images.reshape(-1, elements).contiguous(), rows.contiguous(), out.view(-1, elements))
        return out
    if not here or backend not in ("numpy", "c") or (backend == "c" and native.library() is None):
        raise CertifyError(f"there is no back end {backend!r} for this noise on {_device(images)}; {native.describe()}")
    table, flat = np.asarray(rows), np.asarray(images).reshape(-1, elements)
    check_rows(table, len(images))
    narrow = _dtype(out) == "bfloat16"
    target = np.empty((len(table), elements), dtype=np.float32) if narrow else np.asarray(out).reshape(-1, elements)
    if backend == "c":
        native.noisy_rows(noise, flat, table, target, threads)
    else:
        _numpy_rows(noise, flat, table, target)
    if narrow:
        out.copy_(sys.modules["torch"].from_numpy(target).view_as(out))  # torch rounds to nearest, ties to even
    return out


def count_rows(
    logits: Any,  # (rows, classes), an array or a tensor, of a float type
    rows: Any,  # (rows, 3) int64, of the same kind and in the same place: slot and two more; slot -1 is not counted
    counts: Any,  # (slots, classes + 1) int64, the last column for invalid copies
    *,
    margin: float = 0.0,
    sums: Any = None,  # (slots, classes) int64, of soft scores and of their squares: both or neither
    squares: Any = None,
    temperature: float = 1.0,
    sparse: bool = False,  # sparsemax scores instead of those of a softmax
    backend: str | None = None,
) -> None:
    """Add votes, and soft scores where there are tables for them, to what is in the tables (see counts).

    On a GPU nothing is read back, and a slot out of range is not counted; but sparsemax scores are counted on the host.
    Raises CertifyError for shapes, dtypes and slots that do not fit.
    """
    tables = [table for table in (counts, sums, squares) if table is not None]
    counting.check(logits.shape[1], tuple(counts.shape), (_shape(sums), _shape(squares)), margin, temperature)
    if len(logits) != len(rows) or any(_dtype(table) != "int64" or not _contiguous(table) for table in (*tables, rows)):
        raise CertifyError(f"counts and rows are contiguous int64 tables, rows as many as logits; got {_dtype(counts)}, {len(rows)} rows, {len(logits)} logits")
    if len({_device(array) for array in (logits, rows, *tables)}) > 1:
        raise CertifyError(f"logits on {_device(logits)}, rows on {_device(rows)} and counts on {_device(counts)}: they are needed in one place")
    if len(rows) == 0:
        return
    if sparse and _device(logits) != "cpu":
        _count_on_the_host(logits, rows, tables, margin, temperature)
        return
    if backend == "triton" or _device(logits) != "cpu":
        _kernels().launch_stats(logits.detach().contiguous(), rows, counts, margin, sums, squares, temperature)
        return
    table = np.asarray(rows)
    check_rows(table, len(counts))
    values = logits.detach().float() if _is_tensor(logits) else logits
    if sums is None and str(values.dtype).endswith("float32") and native.count_votes(np.asarray(values), table, np.asarray(counts), margin):
        return
    soft = [None if table is None else np.asarray(table) for table in (sums, squares)]
    counting.count_rows(np.asarray(values), table[:, 0], np.asarray(counts), margin, soft[0], soft[1], temperature, sparse)


def _count_on_the_host(logits: Any, rows: Any, tables: list[Any], margin: float, temperature: float) -> None:
    """Sparsemax scores of logits on a device."""
    added = [table.new_zeros(table.shape, device="cpu") for table in tables]
    soft = {"sums": added[1], "squares": added[2]} if len(added) == 3 else {}
    count_rows(logits.detach().float().cpu(), rows.cpu(), added[0], margin=margin, temperature=temperature, sparse=True, **soft)
    for table, more in zip(tables, added, strict=True):
        table += more.to(table.device)


def _check(noise: Grid | Gauss, images: Any, rows: Any, out: Any) -> None:
    kind, wanted = type(noise).__name__, ("uint8", "int16", "int32") if isinstance(noise, Grid) else ("float32",)
    if _dtype(images) not in wanted or images.ndim < 2:
        raise CertifyError(f"{kind} noise is added to {', '.join(wanted)} of shape (images, ...), got {_dtype(images)} of shape {tuple(images.shape)}")
    elements, channels = math.prod(images.shape[1:]), len(noise.channels[0])
    if elements % channels or not elements:
        raise CertifyError(f"scale and bias are for {channels} channels, and the inputs have {elements} elements")
    if tuple(rows.shape) != (len(rows), 3) or _dtype(rows) != "int64":
        raise CertifyError(f"rows are an int64 table of slot, stream and sample, got {_dtype(rows)} of shape {tuple(rows.shape)}")
    shape = (len(rows), *images.shape[1:])
    if tuple(out.shape) != shape or _dtype(out) not in ("float32", "bfloat16") or not _contiguous(out):
        raise CertifyError(f"noisy copies go to contiguous float32 or bfloat16 of shape {shape}, got {_dtype(out)} of shape {tuple(out.shape)}")
    if len({(_device(array), _is_tensor(array)) for array in (images, rows, out)}) > 1:
        raise CertifyError(
            f"images on {_device(images)}, rows on {_device(rows)} and copies on {_device(out)}: they are needed in one place, as one kind of array"
        )


def _numpy_rows(noise: Grid | Gauss, images: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """`apply` and `draw` in strips; the lower words only where they decide."""
    step = max(1, _STRIP // out.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if isinstance(noise, Gauss):
            out[start : start + step] = apply(noise, images, part, noise.draw(part, out.shape[1]))
            continue
        word = words(noise.seed, part, out.shape[1])
        magnitude, undecided = noise.tables.magnitude(word)
        if (some := undecided.any(axis=1)).any():
            low = words(noise.seed, part[some], out.shape[1], low=True)
            magnitude[some] = noise.tables.climb(magnitude[some], word[some], low)
        out[start : start + step] = apply(noise, images, part, np.where(word >> np.uint32(31) == 1, magnitude, -magnitude))


def _is_tensor(array: object) -> bool:
    return "torch" in sys.modules and isinstance(array, sys.modules["torch"].Tensor)


def _shape(array: Any) -> tuple[int, ...] | None:
    return None if array is None else tuple(array.shape)


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _device(array: Any) -> str:
    return str(array.device) if _is_tensor(array) else "cpu"


def _contiguous(array: Any) -> bool:
    return bool(array.is_contiguous() if _is_tensor(array) else array.flags.c_contiguous)


def _empty(images: Any, shape: tuple[int, ...], bfloat16: bool) -> Any:
    if _is_tensor(images):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=torch.bfloat16 if bfloat16 else torch.float32, device=images.device)
    if bfloat16:
        raise CertifyError("numpy has no bfloat16: give torch tensors, or round float32 with spec.bfloat16_bits")
    return np.empty(shape, dtype=np.float32)


def _kernels() -> ModuleType:
    try:
        from certify.smoothing.noise import triton_kernels
    except ImportError as error:
        raise CertifyError("on a GPU the noise is drawn by Triton, which is not installed; install it with: pip install 'lipnet[gpu]'") from error
    return triton_kernels
