"""The GPU: its noise, bit by bit and in time, and certificates beside the published loop (Cohen, Rosenfeld & Kolter 2019) and beside what the machine allows.

python -m benchmarks.gpu [--quick] [--json FILE] [--device cuda:1]

Noise is compared with numpy's, and timed against the eager chain of the published code (repeat, randn, times sigma, plus) in one buffer of CIFAR-10 images.
The network is a ResNet-110 with weights as they are drawn: its time does not depend on them. The peer makes batches of 1000 and of 400 copies in float32, as
torch has it (convolutions in TF32 where the GPU has that), waits for the votes of each, and counts them one by one. Ours is the engine as `certify run` runs
it: in float32 proper, and in bfloat16. The floor is the time that the products of the network take at the rate of a large bfloat16 product on this GPU.
`--device cpu` shows that all of it runs, with few copies.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import certify
from benchmarks.rows import Row, parser, show, side_by_side
from benchmarks.smoothing import ALPHA, SIGMA, published, resnet
from certify.device import usable
from certify.smoothing import FixedN, Gaussian
from certify.smoothing.noise import Gauss, Grid, count_rows, noisy_rows, row_table

SHAPE = (32, 32, 3)  # channels last
CHECKED = 2000  # copies whose bits are compared with numpy's


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done: the rest is the same for all."""

    batch: int  # of noise: on a GPU many times what a launch costs
    copies: int  # of one image
    rounds: int
    product: int  # side of the matrices whose product says what the machine allows


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, once all that was asked of the device is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def bits(device: torch.device) -> list[Row]:
    """Noisy copies that are not those of numpy, of two images under both kinds of noise."""
    table = row_table(np.arange(CHECKED) % 2, np.arange(CHECKED) % 3, np.arange(CHECKED) * 977)
    rows = []
    for name, noise, images in (
        ("grid", Grid(SIGMA), np.random.default_rng(0).integers(0, 256, (2, *SHAPE), dtype=np.uint8)),
        ("gauss", Gauss(SIGMA), np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)),
    ):
        own = noisy_rows(noise, torch.from_numpy(images).to(device), torch.from_numpy(table).to(device)).cpu().numpy()
        wanted = noisy_rows(noise, images, table, backend="numpy")
        differing = float((own.view(np.uint32) != wanted.view(np.uint32)).sum())
        rows.append(Row(f"{name}: numbers that differ from numpy's / all", differing, float(own.size), "<= 0"))
    return rows


def noise(device: torch.device, size: Size) -> list[Row]:
    """Seconds for a batch of copies of one image, and how many numbers that is in a second."""
    now, numbers = clock(device), size.batch * 3 * 32 * 32
    table = torch.from_numpy(row_table(0, 0, range(size.batch))).to(device)
    image = torch.full((3, 32, 32), 0.4, device=device)

    def eager() -> Tensor:
        batch = image.repeat((size.batch, 1, 1, 1))
        return batch + torch.randn_like(batch) * SIGMA

    rows = []
    for name, kind, dtype in (("grid", Grid(SIGMA), torch.float32), ("gauss", Gauss(SIGMA), torch.float32), ("grid, bfloat16", Grid(SIGMA), torch.bfloat16)):
        images = torch.full((1, *SHAPE), 100, dtype=torch.int32, device=device) if isinstance(kind, Grid) else torch.full((1, *SHAPE), 0.4, device=device)
        out = torch.empty(size.batch, *SHAPE, dtype=dtype, device=device)

        def draw(kind: Grid | Gauss = kind, images: Tensor = images, out: Tensor = out) -> None:
            noisy_rows(kind, images, table, out)

        own, chain = side_by_side(draw, eager, 10 * size.rounds, now)
        rows.append(Row(f"noise, {name} / repeat, randn, times sigma, plus", own, chain, f"<= {1 / 3:.2f}"))
        rows.append(Row(f"noise, {name}: 10^9 numbers in a second / 300", numbers / own / 1e9, 300.0, ">= 1"))
    logits = torch.randn(size.batch, 10, device=device)
    counts = torch.zeros(1, 11, dtype=torch.int64, device=device)
    voting = side_by_side(lambda: count_rows(logits, table, counts), lambda: logits.argmax(1).cpu(), 10 * size.rounds, now)
    return [*rows, Row("counting / argmax, brought to the host", *voting)]


def certificates(device: torch.device, size: Size) -> list[Row]:
    """Seconds for the copies of one image."""
    now, schedule = clock(device), FixedN(100, size.copies, ALPHA)
    net, pictures = resnet(110).to(device), torch.rand(1, 3, 32, 32)

    def ours(dtype: str) -> Callable[[], object]:
        method = certify.Smoothing(Gaussian(SIGMA), schedule=schedule, dtype=dtype)
        forward, _, _ = method.prepared(net, (3, 32, 32))
        placed, apart = method.place(pictures.numpy())
        return lambda: list(method.run(forward, 10, (3, 32, 32), zip(range(1), placed, apart.tolist(), strict=True), device))

    rows, floor = [], operations(net, device) * (size.copies + schedule.n0) / rate(size.product, device)
    for batch in (1000, 400):
        for dtype, goal in (("float32", "-"), ("bfloat16", "<= 0.25")):
            times = side_by_side(ours(dtype), lambda batch=batch: published(net, pictures.to(device), schedule.n0, size.copies, batch), size.rounds, now)  # type: ignore[misc]
            rows.append(Row(f"ResNet-110, {size.copies} copies, {dtype} / published loop, batch {batch}", *times, goal))
    own = min(row.ours for row in rows)
    return [*rows, Row("ResNet-110: floor by its products / ours, seconds", floor, own)]


def operations(net: nn.Module, device: torch.device) -> float:
    """Of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32, device=device))
    return float(counter.get_total_flops())


def rate(side: int, device: torch.device) -> float:
    """Operations in a second, of a bfloat16 product of random numbers."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    seconds, _ = side_by_side(lambda: a @ b, lambda: None, 10, clock(device))
    return 2.0 * side**3 / seconds


def main() -> None:
    """Measure and print every row."""
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cuda", help="which (default cuda)")
    args = options.parse_args()
    device = usable(args.device)
    here = device.type == "cpu"
    size = Size(64, 128, 1, 256) if here else Size(65_536, 20_000, 3, 8192) if args.quick else Size(65_536, 100_000, 5, 8192)
    torch.manual_seed(0)
    print("CPU" if here else torch.cuda.get_device_name(device))
    show([*bits(device), *noise(device, size), *certificates(device, size)], "seconds (median), or as the row says", args.json)


if __name__ == "__main__":
    main()
