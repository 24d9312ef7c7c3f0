"""Smoothing against a faithful re-creation of the published loop (Cohen, Rosenfeld & Kolter 2019): time for each noisy copy, and copies for each question.

python -m benchmarks.smoothing [--quick] [--json FILE] [--log FILE SIGMA]...

The peer makes one batch of copies of one image after the other with torch.randn, waits for the votes of each batch, counts them one by one, and takes its
radius from the beta distribution. Ours is the engine as `certify.robustness` runs it, everything included. Seconds are those of the processor. The networks are
a perceptron on scikit-learn's digits, trained for a few seconds with noise, and a ResNet-20 for CIFAR-10 images with weights as they are drawn: its time does
not depend on them. Questions are asked about the 360 held-out digits, and about the inputs of published logs where `--log` names some, with votes drawn again.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import certify
from benchmarks.rows import Row, parser, show, side_by_side
from certify import data
from certify.smoothing import FixedN, Gaussian, GroupSequential, Procedure, Schedule, SmoothedClassifier, Tally
from certify.smoothing.engines import ENGINES
from certify.smoothing.logs import Log, read_log
from certify.smoothing.schedule import Status, doubling

SIGMA, ALPHA, N = 0.5, 0.001, 100_000
BATCHES = (1000, 400)  # of the published loop, by default and in the commands of its README; on one thread of a CPU images are faster by 64


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016; a strided shortcut is a 1 x 1 convolution)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        same = stride == 1 and into == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Their sum."""
        return nn.functional.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet(depth: int) -> nn.Module:
    """For images of 3 x 32 x 32: 20 layers, or 110."""
    each = (depth - 2) // 6
    widths = (16,) * (1 + each) + (32,) * each + (64,) * each
    blocks = [Block(into, out, 2 if out > into else 1) for into, out in itertools.pairwise(widths)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    ).eval()


def perceptron() -> nn.Module:
    """64-128-128-10, trained on the digits with the noise that it is to meet."""
    train = data.digits("train")
    x, y = torch.from_numpy(train.inputs), torch.from_numpy(train.labels)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x + SIGMA * torch.randn_like(x)), y).backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def published(net: nn.Module, images: Tensor, n0: int, n: int, batch: int) -> list[tuple[int, float]]:
    """`Smooth.certify`: n0 copies to select and n to estimate, image after image."""

    def sample(image: Tensor, left: int) -> np.ndarray:
        counts = np.zeros(10, dtype=int)
        while left > 0:
            this, left = min(batch, left), left - batch
            copies = image.repeat((this, *[1] * image.dim()))
            predictions = net(copies + torch.randn_like(copies) * SIGMA).argmax(1).cpu().numpy()
            for index in predictions:
                counts[index] += 1
        return counts

    found = []
    for image in images:
        label = int(sample(image, n0).argmax())
        votes = int(sample(image, n)[label])
        p_lower = stats.beta.ppf(ALPHA, votes, n - votes + 1)
        found.append((label, SIGMA * float(stats.norm.ppf(p_lower))) if p_lower >= 0.5 else (-1, 0.0))
    return found


def ours(net: nn.Module, images: Tensor, schedule: Schedule, **options: Any) -> Callable[[], object]:
    """The same question, with the network compiled once before."""
    method = certify.Smoothing(Gaussian(SIGMA), schedule=schedule, **options)
    shape = tuple(images.shape[1:])
    forward, _, _ = method.prepared(net, shape)
    placed, apart = method.place(images.numpy())
    return lambda: list(method.run(forward, 10, shape, zip(range(len(placed)), placed, apart.tolist(), strict=True)))


def timed(one: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float]:
    """In turn, in seconds of the processor: all runs have one thread, and waiting for another job is no work."""
    return side_by_side(one, peer, rounds, time.process_time)


def speed(quick: bool) -> list[Row]:
    """Seconds for the same number of copies."""
    rounds = 3 if quick else 5
    digits, pictures = torch.from_numpy(data.digits("test").inputs[:20]), torch.rand(4, 3, 32, 32)
    mlp, resnet20 = perceptron(), resnet(20)
    look, few = FixedN(100, 10_000, ALPHA), FixedN(100, 1_100, ALPHA)

    def peer(net: nn.Module, images: Tensor, schedule: FixedN, batch: int) -> Callable[[], object]:
        return lambda: published(net, images, schedule.n0, schedule.n, batch)

    rows = []
    for what, goal, options in (("digits perceptron", "<= 0.67", {}), ("digits perceptron, shared noise", "<= 0.33", {"shared": True})):
        for batch in BATCHES:
            times = timed(ours(mlp, digits, look, **options), peer(mlp, digits, look, batch), rounds)
            rows.append(Row(f"{what} / published loop, batch {batch}", *times, goal))
    for engine in ENGINES:
        if any(importlib.util.find_spec(module) is None for module in {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}.get(engine, ())):
            print(f"{engine} is not installed: left out")
            continue
        for batch in (*BATCHES, 64):
            times = timed(ours(resnet20, pictures, few, engine=engine), peer(resnet20, pictures, few, batch), rounds)
            rows.append(Row(f"ResNet-20 by {engine} / published loop, batch {batch}", *times, "<= 0.67" if engine == "torch" else "<= 0.50"))
    times = timed(ours(resnet20, pictures, few, dtype="bfloat16"), peer(resnet20, pictures, few, 64), rounds)
    return [*rows, Row("ResNet-20 in bfloat16 by torch / published loop, batch 64", *times)]


def copies(quick: bool) -> list[Row]:
    """Noisy copies for the same question at the same alpha, about the held-out digits."""
    net, held_out = perceptron(), data.digits("test")
    count = 40 if quick else 360
    images, labels = torch.from_numpy(held_out.inputs[:count]), held_out.labels[:count]

    def asked(schedule: Schedule, **goal: float) -> tuple[float, np.ndarray]:
        method = certify.Smoothing(Gaussian(SIGMA), schedule=schedule, levels=16, **goal)  # type: ignore[arg-type]
        forward, _, _ = method.prepared(net, (64,))
        placed, apart = method.place(images.numpy())
        used, radii = 0, np.zeros(count)
        for done in method.run(forward, 10, (64,), zip(range(count), placed, apart.tolist(), strict=True)):
            used += done.selection.n + done.looks[-1].n
            if done.outcome.prediction == labels[done.index]:
                radii[done.index] = max(done.outcome.radius - apart[done.index], 0.0)
        return used / count, radii

    return questions(asked, "digits", SIGMA)


def replayed(log: Log, sigma: float, quick: bool) -> list[Row]:
    """The same about the inputs of a published log, of the published n and alpha: votes are drawn with the share that makes each radius, or where it has none
    from 0.25 to 0.5; all other votes are for one class."""
    lines = log.lines[:40] if quick else log.lines

    votes = np.arange(N // 2, N + 1)
    least = sigma * stats.norm.ppf(stats.beta.ppf(0.001, votes, N - votes + 1))  # the radius that they make
    some = np.random.default_rng(0).uniform(0.25, 0.5, len(lines))
    found = np.searchsorted(least, [float(line.radius) for line in lines]).clip(max=len(votes) - 1)
    shares = np.where([line.prediction >= 0 for line in lines], votes[found] / N, some)

    def asked(schedule: Schedule, **goal: float) -> tuple[float, np.ndarray]:
        procedure, rng = Procedure(SmoothedClassifier(Gaussian(sigma)), schedule=schedule, **goal), np.random.default_rng(1)  # type: ignore[arg-type]
        used, radii = 0, np.zeros(len(lines))

        def tally(n: int, p: float) -> np.ndarray:
            votes = rng.binomial(n, p)
            return np.array([votes, n - votes])

        for i, (line, p) in enumerate(zip(lines, shares, strict=True)):
            selection, looks, outcome = Tally(schedule.n0, tally(schedule.n0, p)), [], None
            for before, n in itertools.pairwise((0, *schedule.sizes)):
                looks.append(Tally(n, tally(n - before, p) + (looks[-1].sums if looks else 0)))
                outcome = procedure.decide(selection, looks, outcome)
                if outcome.status is not Status.UNFINISHED:
                    break
            assert outcome is not None
            used += schedule.n0 + looks[-1].n
            radii[i] = outcome.radius if line.right and outcome.prediction == 0 else 0.0
        return used / len(lines), radii

    return questions(asked, log.name.split("__test")[0], sigma)


def questions(asked: Callable[..., tuple[float, np.ndarray]], what: str, sigma: float) -> list[Row]:
    """What `asked` says of a schedule and a goal (the mean number of copies, and the radii where the prediction is right) against all N copies."""
    fixed, full = asked(FixedN(100, N, ALPHA))
    rows = []
    for target in (sigma / 2, sigma):
        used, radii = asked(GroupSequential(doubling(N), alpha=ALPHA), target=target)
        rows.append(Row(f"{what}: copies, radius above {target:g}? / all {N}", used, fixed, "<= 0.10"))
        rows.append(Row(f"{what}: certified above {target:g} / by all {N}", float((radii > target).mean()), float((full > target).mean())))
    for tolerance in (0.02, 0.01):
        used, radii = asked(GroupSequential(doubling(N), alpha=ALPHA), tolerance=tolerance)
        rows.append(Row(f"{what}: copies, tolerance {tolerance} / all {N}", used, fixed, "<= 0.50"))
        rows.append(Row(f"{what}: average certified radius, tolerance {tolerance} / by all", float(radii.mean()), float(full.mean()), ">= 0.98"))
    return rows


def worth() -> list[Row]:
    """What the second class is worth: a radius at the same counts, with bounds on all classes and with p_B = 1 - p_A (the published rule)."""
    classifier = SmoothedClassifier(Gaussian(1.0))
    selection, tally = Tally(100, np.array([60, 15, 25])), Tally(100_000, np.array([60_000, 15_000, 25_000]))
    procedure = Procedure(classifier, schedule=FixedN(100, 100_000, ALPHA))
    p_lower, _ = procedure.interval(0, selection, tally)
    return [
        Row("radius at votes of 60, 25, 15 % / with p_B = 1 - p_A", float(procedure.radius(0, selection, tally)), float(classifier.radius(p_lower)), ">= 1")
    ]


def main() -> None:
    """Measure and print every row."""
    options = parser(__doc__ or "")
    options.add_argument("--log", nargs=2, action="append", default=[], metavar=("FILE", "SIGMA"), help="a published log, of this noise")
    args = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logs = [(read_log(pathlib.Path(file)), float(sigma)) for file, sigma in args.log]
    rows = [*speed(args.quick), *copies(args.quick), *(row for log, sigma in logs for row in replayed(log, sigma, args.quick)), *worth()]
    assert all(math.isfinite(row.ratio) for row in rows)
    show(rows, "seconds of the processor (median), copies, radii", args.json)


if __name__ == "__main__":
    main()
