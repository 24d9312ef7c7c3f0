"""What all benchmarks share: timing side by side in one run, and rows `what, ours, peer, ratio, goal, met`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: what ours took or reached, what the peer did, their ratio and what was aimed at."""

    what: str
    ours: float
    peer: float
    goal: str = "-"  # such as "<= 1.15"; of the ratio ours / peer

    @property
    def ratio(self) -> float:
        """Ours over the peer's."""
        return self.ours / self.peer

    @property
    def met(self) -> str:
        """Whether the goal is met; "-" where there is none."""
        if self.goal == "-":
            return "-"
        sign, value = self.goal.split()
        return "yes" if (self.ratio <= float(value) if sign == "<=" else self.ratio >= float(value)) else "no"


def side_by_side(ours: Callable[[], object], peer: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
    """Median seconds of both, run in turn after one warm-up each, so that a drift of the machine meets both alike."""
    ours()
    peer()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, found in zip((ours, peer), times, strict=True):
            start = clock()
            run()
            found.append(clock() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def parser(description: str) -> argparse.ArgumentParser:
    """With --quick and --json."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="fewer rounds")
    made.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows there too")
    return made


def arguments(description: str) -> argparse.Namespace:
    """--quick and --json, parsed."""
    return parser(description).parse_args()


def show(rows: Sequence[Row], unit: str, file: pathlib.Path | None) -> None:
    """Print a table, and write it as JSON where asked."""
    width = max(len(row.what) for row in rows)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {unit}")
    print(f"{'what':<{width}}  {'ours':>10}  {'peer':>10}  {'ratio':>7}  {'goal':>8}  met")
    for row in rows:
        print(f"{row.what:<{width}}  {row.ours:>10.4g}  {row.peer:>10.4g}  {row.ratio:>7.2f}  {row.goal:>8}  {row.met}")
    if file:
        file.write_text(json.dumps([{**dataclasses.asdict(row), "ratio": row.ratio, "met": row.met} for row in rows], indent=1) + "\n")
