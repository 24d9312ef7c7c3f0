"""The noise and the counts as Triton kernels: the bits of spec.py and counts.py. Importing this imports triton; `dispatch` does when it is needed.

The rows are a table in device memory and nothing is read back, so both can be part of a CUDA graph that is replayed with other rows in the same table (call
each once before, which compiles it and puts its tables on the device).
Fusing multiplications with additions is switched off at every launch: it would change bits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from certify.smoothing.noise.counts import UNIT
from certify.smoothing.noise.spec import Gauss, Grid

OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
GROUPS = 256  # of four elements, for each program


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    for _ in tl.static_range(10):
        a0 = c0
        a2 = c2
        c0 = tl.umulhi(a2, 0xCD9E8D57) ^ c1 ^ key0
        c2 = tl.umulhi(a0, 0xD2511F53) ^ c3 ^ key1
        c1 = a2 * 0xCD9E8D57
        c3 = a0 * 0xD2511F53
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def in_order(a, b, c, d):
    """Four numbers of each group, in the order of the elements: 16-byte stores."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def minus_two_log(word):
    bits = (word | 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    n = (32 - exponent).to(tl.float32)
    square = t * t
    y = t * 7.0376836292e-2 + -1.1514610310e-1
    y = y * t + 1.1676998740e-1
    y = y * t + -1.2420140846e-1
    y = y * t + 1.4249322787e-1
    y = y * t + -1.6668057665e-1
    y = y * t + 2.0000714765e-1
    y = y * t + -2.4999993993e-1
    y = y * t + 3.3333331174e-1
    y = y * t * square - n * -2.12194440e-4 - 0.5 * square
    y = n * 0.693359375 - (t + y)
    return y + y


@triton.jit
def cos_sin(word):
    quarter = ((word + 0x20000000) >> 30).to(tl.int32)
    x = (word - (quarter.to(tl.uint32) << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    z = x * x
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * x + x
    c = z * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    odd = (quarter & 1) == 1
    first = tl.where(odd, s, c)
    second = tl.where(odd, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -first, first), tl.where(quarter >= 2, -second, second)


@triton.jit
def to_bfloat16(y):
    """Ties to even, in integers: the cast of Triton's interpreter cuts off. NaN stays NaN."""
    bits = y.to(tl.uint32, bitcast=True)
    bits = tl.where(y != y, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def noise_rows(
    images_ptr,  # (images, elements): integers, or float32
    rows_ptr,  # (rows, 3) int64: slot, stream, sample
    out_ptr,  # (rows, elements) float32 or bfloat16
    images,
    elements,
    seed_ptr,  # (2,) int64: low and high word
    scale_ptr,  # (CHANNELS,)
    bias_ptr,
    sigma,  # of Gauss
    lookup_ptr,  # the tables of Grid
    high_ptr,
    low_ptr,
    SHIFT: tl.constexpr,  # 0: Gauss
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows_ptr + 3 * row)
    stream = tl.load(rows_ptr + 3 * row + 1)
    sample = tl.load(rows_ptr + 3 * row + 2)
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = group * 0
    c1 = zero + sample.to(tl.uint32)
    c2 = zero + stream.to(tl.uint32)
    c3 = zero + (sample >> 32).to(tl.uint32)
    key0 = zero + tl.load(seed_ptr).to(tl.uint32)
    key1 = zero + tl.load(seed_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox(group, c1, c2, c3, key0, key1)
    e = tl.program_id(1) * (GROUPS * 4) + tl.arange(0, GROUPS * 4)
    mask = e < elements
    inside = e < tl.where((slot >= 0) & (slot < images), elements, 0)
    pixels = tl.load(images_ptr + slot * elements + e, mask=inside, other=0)
    if SHIFT > 0:
        word = in_order(w0, w1, w2, w3)
        positive = word >> 31
        v = (word ^ (0 - positive)).to(tl.int32, bitcast=True)
        entry = tl.load(lookup_ptr + ((v | 1).to(tl.float32).to(tl.int32, bitcast=True) >> SHIFT) - OFFSET)
        step = entry.to(tl.int32)
        magnitude = (entry >> 32).to(tl.int32) + (v < step).to(tl.int32)
        climbing = (v == step) | (step == -2)
        left = tl.max(climbing.to(tl.int32), axis=0)
        if left > 0:
            l0, l1, l2, l3 = philox(group, c1, c2, c3 | 0x80000000, key0, key1)
            low = in_order(l0, l1, l2, l3) ^ (0 - positive)
            while left > 0:
                high_of = tl.load(high_ptr + magnitude, mask=climbing, other=-1)
                low_of = tl.load(low_ptr + magnitude, mask=climbing, other=0).to(tl.uint32, bitcast=True)
                climbing = climbing & ((v < high_of) | ((v == high_of) & (low < low_of)))
                magnitude = magnitude + climbing.to(tl.int32)
                left = tl.max(climbing.to(tl.int32), axis=0)
        y = (pixels.to(tl.int32) + tl.where(positive == 1, magnitude, -magnitude)).to(tl.float32)
    else:
        first = tl.sqrt_rn(minus_two_log(w0))
        second = tl.sqrt_rn(minus_two_log(w2))
        a, b = cos_sin(w1)
        c, d = cos_sin(w3)
        y = pixels + sigma * in_order(first * a, first * b, second * c, second * d)
    channel = e % CHANNELS
    y = y * tl.load(scale_ptr + channel) + tl.load(bias_ptr + channel)
    y = tl.where(inside, y, float("nan"))
    if out_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(out_ptr + row * elements + e, to_bfloat16(y), mask=mask)
    else:
        tl.store(out_ptr + row * elements + e, y, mask=mask)


@triton.jit
def exponential(x):
    """exp(x) in units of 2^-40, whole, for -60 <= x <= 0."""
    nearest = (x * 1.44269504088896341 - 0.5).to(tl.int32)
    n = nearest.to(tl.float32)
    x = x - n * 0.693359375 - n * -2.12194440e-4
    y = x * 1.9875691500e-4 + 1.3981999507e-3
    y = y * x + 8.3334519073e-3
    y = y * x + 4.1665795894e-2
    y = y * x + 1.6666665459e-1
    y = y * x + 5.0000001201e-1
    y = y * (x * x) + x + 1.0
    return (y * ((nearest + 167) << 23).to(tl.float32, bitcast=True)).to(tl.int64)


@triton.jit
def stats_rows(
    logits_ptr,  # (rows, classes), each row contiguous
    rows_ptr,  # (rows, 3) int64: slot, stream, sample
    counts_ptr,  # (slots, classes + 1) int64
    sums_ptr,  # (slots, classes) int64
    squares_ptr,
    rows,
    classes,
    slots,
    stride,
    margin,
    temperature,
    MARGIN: tl.constexpr,
    SOFT: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,  # a power of two, not below classes
    UNIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(rows_ptr + 3 * row, mask=row < rows, other=-1)
    counted = (slot >= 0) & (slot < slots)
    k = tl.arange(0, CLASSES)[None, :]
    there = (k < classes) & counted[:, None]
    x = tl.load(logits_ptr + row[:, None] * stride + k, mask=there, other=0.0).to(tl.float32)
    finite = (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    valid = tl.min(finite.to(tl.int32), axis=1) == 1
    x = tl.where(there & finite, x, float("-inf"))
    most = tl.max(x, axis=1)
    top = tl.min(tl.where(x == most[:, None], k, CLASSES), axis=1)
    if MARGIN:
        second = tl.max(tl.where(k == top[:, None], float("-inf"), x), axis=1)
        valid = valid & (most - second > margin)
    one = tl.full((ROWS,), 1, tl.int64)
    tl.atomic_add(counts_ptr + slot * (classes + 1) + tl.where(valid, top, classes), one, mask=counted, sem="relaxed")
    if SOFT:
        scored = there & valid[:, None]
        apart = tl.where(scored, x - most[:, None], 0.0)
        e = tl.where(scored, exponential(tl.maximum(tl.div_rn(apart, temperature), -60.0)), 0)
        total = tl.sum(e, axis=1)
        q = e * UNIT // tl.where(total > 0, total, 1)[:, None]
        at = slot[:, None] * classes + k
        tl.atomic_add(sums_ptr + at, q, mask=scored & (q > 0), sem="relaxed")
        tl.atomic_add(squares_ptr + at, q * q, mask=scored & (q > 0), sem="relaxed")


@functools.lru_cache(maxsize=16)
def _on_device(noise: Grid | Gauss, device: torch.device) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Seed, scale and bias; the tables of Grid."""

    def put(array: object) -> torch.Tensor:
        return torch.as_tensor(array, device=device)

    common = (put([noise.seed & 0xFFFFFFFF, noise.seed >> 32]), *map(put, noise.channels))
    if isinstance(noise, Gauss):
        return common, (common[0], common[0], common[0])
    t = noise.tables
    return common, (put(t.lookup.copy()), put(t.high.copy()), put(t.low.view("int32").copy()))


def launch_noise(noise: Grid | Gauss, images: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, groups: int = GROUPS) -> None:
    """Fill `out` (rows, elements) from `images` (images, elements), all contiguous and on one device."""
    (seed, scale, bias), (lookup, high, low) = _on_device(noise, images.device)
    shift, offset = (noise.tables.shift, noise.tables.offset) if isinstance(noise, Grid) else (0, 0)
    elements = out.shape[1]
    grid = (len(rows), triton.cdiv(elements, 4 * groups))
    # fmt: off
    with torch.cuda.device_of(images):
        noise_rows[grid](
            images, rows, out, len(images), elements, seed, scale, bias, noise.sigma, lookup, high, low,
            SHIFT=shift, OFFSET=offset, CHANNELS=len(scale), GROUPS=groups, **OPTIONS,
        )
    # fmt: on


def launch_stats(
    logits: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    margin: float = 0.0,
    sums: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    temperature: float = 1.0,
    block: int = 0,
) -> None:
    """Add the votes, and the soft scores where there are tables for them, to what is there."""
    classes = logits.shape[1]
    wide = triton.next_power_of_2(classes)
    block = block or max(1, min(64, 4096 // wide))
    soft = sums is not None
    # fmt: off
    with torch.cuda.device_of(logits):
        stats_rows[(triton.cdiv(len(rows), block),)](
            logits, rows, counts, sums if soft else counts, squares if soft else counts, len(rows), classes, len(counts), logits.stride(0),
            float(margin), float(temperature), MARGIN=margin > 0, SOFT=soft, ROWS=block, CLASSES=wide, UNIT=UNIT, **OPTIONS,
        )
    # fmt: on
