"""Cost of the noise on one thread, against the noise of the published smoothing code (repeat, randn, times sigma, plus) and against torch.randn alone.

python -m benchmarks.noise [--quick] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rows import Row, arguments, show, side_by_side
from certify.smoothing.noise import Gauss, Grid, count_rows, native, noisy_rows, row_table

SIGMA, SHAPE, CLASSES = 0.5, (32, 32, 3), 10
BATCH, CALLS = 256, 8


def ours(noise: Grid | Gauss, backend: str | None) -> Callable[[], None]:
    """Noisy copies of one image into one buffer, sample after sample."""
    image = torch.full((1, *SHAPE), 100, dtype=torch.int32) if isinstance(noise, Grid) else torch.full((1, *SHAPE), 0.4)
    out = torch.empty(BATCH, *SHAPE)

    def run() -> None:
        for call in range(CALLS):
            rows = torch.from_numpy(row_table(0, 0, range(call * BATCH, (call + 1) * BATCH)))
            noisy_rows(noise, image, rows, out, backend=backend)

    return run


def cohen() -> Callable[[], Tensor]:
    """As in `_sample_noise` of the code of Cohen, Rosenfeld & Kolter 2019, up to what the network is given."""
    image = torch.full((3, 32, 32), 0.4)

    def run() -> Tensor:
        for _ in range(CALLS):
            batch = image.repeat((BATCH, 1, 1, 1))
            noisy = batch + torch.randn_like(batch) * SIGMA
        return noisy

    return run


def randn() -> None:
    """Normal numbers alone."""
    for _ in range(CALLS):
        torch.randn(BATCH, 3, 32, 32)


def counting(logits: Tensor) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """Votes into a table, and one at a time as in `_count_arr` of the same code."""
    rows, table = torch.from_numpy(row_table(0, 0, range(len(logits)))), torch.zeros(1, CLASSES + 1, dtype=torch.int64)

    def one_by_one() -> Tensor:
        counts = torch.zeros(CLASSES, dtype=torch.int64).numpy()
        for index in logits.argmax(1).numpy():
            counts[index] += 1
        return torch.from_numpy(counts)

    return lambda: count_rows(logits, rows, table), one_by_one


def main() -> None:
    """Measure and print every row."""
    args = arguments(__doc__ or "")
    rounds = 5 if args.quick else 21
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(native.describe())
    rows = []
    for name, noise in (("grid", Grid(SIGMA)), ("gauss", Gauss(SIGMA))):
        rows.append(Row(f"{name} / repeat, randn, times sigma, plus", *side_by_side(ours(noise, None), cohen(), rounds), f"<= {1 / 2.5:.2f}"))
        rows.append(Row(f"{name} / torch.randn", *side_by_side(ours(noise, None), randn, rounds), f"<= {1 / 1.5:.2f}"))
    rows.append(Row("grid by numpy / repeat, randn, times sigma, plus", *side_by_side(ours(Grid(SIGMA), "numpy"), cohen(), 3)))
    rows.append(Row("counts / one by one", *side_by_side(*counting(torch.randn(10_000, CLASSES)), rounds)))
    show(rows, f"seconds for {CALLS} batches of {BATCH} CIFAR-10 images (counts: 10,000 rows), median", args.json)


if __name__ == "__main__":
    main()
