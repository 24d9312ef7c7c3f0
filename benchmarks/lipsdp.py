"""LipSDP beside other solvers, on the same networks, in one run and one thread: what is proved, and the seconds that it takes.

python -m benchmarks.lipsdp [--quick] [--json FILE] [--network FILE]

Networks of the grid have Gaussian weights of variance 1 / inputs from numpy's default generator, 16 inputs and 4 outputs; their optima are known to 1e-6
(where Clarabel finishes, it agrees to 1e-8). A solver that is not done after 60 seconds is stopped: its time is a lower bound then, and what it claims is no
bound at all. eclipse-nn and SDPA are left out where they are not installed. `--network` names a published network of dense layers with ReLU, as a state dict.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import certify
import sdp
from benchmarks.rows import Row, parser, show
from certify.bound import Array
from lipnet.functional import comparators
from sdp.lure import feed_forward
from sdp.published import groupsort

OPTIMA = {(16, 2): 1.884777, (32, 2): 1.633027, (64, 2): 2.192595, (128, 2): 2.900339, (16, 4): 2.176237, (32, 4): 2.926639, (64, 4): 4.256883}
OPTIMA |= {(16, 8): 9.248976, (32, 8): 10.095849, (128, 4): 5.421681, (64, 8): 12.293212, (128, 8): 18.278320}  # by width and hidden layers
SORTED = (((6, 8, 3), 2, 0), ((6, 8, 8, 8, 3), 2, 2), ((5, 4, 4, 4, 2), 2, 4), ((16, 32, 32, 10), 2, 6), ((6, 8, 3), 4, 10))
LIMIT = 60.0
ALONE = """
import sys, time
import benchmarks.lipsdp as here
import sdp
system = here.feed_forward(here.grid(128, 8))
start = time.process_time()
print(sdp.lipsdp(system).bound, time.process_time() - start)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20)
"""


def weights(sizes: Sequence[int], seed: int = 0) -> list[Array]:
    """Gaussian matrices."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((out, into)) / math.sqrt(into) for into, out in itertools.pairwise(sizes)]


def grid(width: int, layers: int) -> list[Array]:
    """One network of the grid."""
    return weights((16, *(width for _ in range(layers)), 4), 1000 * width + layers)


def sorted_network(matrices: Sequence[Array], size: int) -> sdp.LureSystem:
    """With groups of `size` sorted between the layers."""
    wiring = sdp.Wiring(matrices[0].shape[1])
    signal = wiring.input()
    for matrix in matrices[:-1]:
        signal = wiring.linear(matrix, signal)
        first = np.arange(0, len(matrix), size)
        for i, j in comparators(size):
            signal = wiring.sort(signal, first + i, first + j)
    return wiring.system(wiring.linear(matrices[-1], signal))


def timed(system: sdp.LureSystem, solver: str) -> tuple[float, sdp.Solution]:
    """Seconds of the processor, proof included."""
    start = time.process_time()
    found = sdp.lipsdp(system, solver, tolerance=1e-6 if solver == "scs" else 1e-8, seconds=LIMIT)
    return time.process_time() - start, found


def on_the_grid(quick: bool) -> list[Row]:
    """What is proved over the optimum, and Newton's time over that of others."""
    rows = []
    for (width, layers), optimum in OPTIMA.items():
        system = feed_forward(grid(width, layers))
        if system.size > (300 if quick else 600):
            continue
        took, found = timed(system, "newton")
        what = f"n = {system.size}, {layers} layers of {width}"
        rows.append(Row(f"{what}: proved L / optimum", found.bound, optimum, "<= 1.00001"))
        for name, seconds, done, goal in others(system):
            rows.append(Row(f"{what}: seconds, newton / {name}{'' if done else ' (stopped)'}", took, seconds, goal))
        if (fast := eclipse(grid(width, layers))) is not None:
            rows.append(Row(f"{what}: proved L / eclipse-nn's ECLipsE-Fast", found.bound, fast))
    return rows


def others(system: sdp.LureSystem) -> list[tuple[str, float, bool, str]]:
    """Solver, seconds, whether it finished, and the goal, for the sizes that each can be asked for."""
    found = []
    if system.size <= 80:
        found.append(("clarabel", "<= 0.1" if system.size == 80 else "-"))
        found.append(("CLARABEL", "-"))
    if system.size <= 272:
        found.append(("scs", "<= 0.1" if system.size == 272 else "-"))
    if system.size in (144, 272) and importlib.util.find_spec("sdpap"):
        found.append(("SDPA", "<= 0.1" if system.size == 272 else "-"))
    made = []
    for name, goal in found:
        took, solution = timed(system, name)
        done = any(word in solution.status.lower() for word in ("solved", "optimal")) and "inaccurate" not in solution.status.lower()
        made.append((name if name in ("clarabel", "scs") else f"{name} by cvxpy", took, done, goal))
    return made


def eclipse(matrices: Sequence[Array]) -> float | None:
    """What eclipse-nn's fast method prints; None where it is not installed."""
    if not importlib.util.find_spec("eclipse_nn"):
        return None
    from eclipse_nn.LipConstEstimator import LipConstEstimator

    with contextlib.redirect_stdout(io.StringIO()):
        return float(LipConstEstimator(weights=[torch.from_numpy(matrix) for matrix in matrices]).estimate("ECLipsE_Fast"))


def wide() -> list[Row]:
    """n = 1040, alone in a process."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True).stdout.split()
    bound, seconds, memory = (float(word) for word in done)
    return [
        Row("n = 1040, 8 layers of 128: proved L / optimum", bound, OPTIMA[128, 8], "<= 1.00001"),
        Row("n = 1040: seconds / ten minutes", seconds, 600.0, "<= 1"),
        Row("n = 1040: GiB at the peak / 2 GiB", memory, 2.0, "<= 1"),
    ]


def sorting() -> list[Row]:
    """Comparators against the published constraints."""
    rows = []
    for sizes, size, seed in SORTED:
        matrices = weights(sizes, seed)
        what = f"{'MaxMin' if size == 2 else f'GroupSort({size})'} {'-'.join(map(str, sizes))}: comparators / published constraints, both proved"
        goal = "<= 0.935" if size == 2 else "<= 1"  # 7 %, to the nearest
        rows.append(Row(what, sdp.lipsdp(sorted_network(matrices, size)).bound, groupsort(matrices, size), goal))
    return rows


def real(file: pathlib.Path) -> list[Row]:
    """A published network, as `certify.lipschitz` sees it."""
    net = dense(torch.load(file, weights_only=True, map_location="cpu"))
    shape = (net[1].in_features,)
    start = time.process_time()
    ours = certify.lipschitz(net, certify.LipSDP(pairs=False), input_shape=shape).value
    took = time.process_time() - start
    fast = certify.lipschitz(net, certify.LipSDP(solver="closed-form", pairs=False), input_shape=shape).value
    layers = certify.lipschitz(net, input_shape=shape).value
    name = file.stem
    rows = [
        Row(f"{name}: proved L / product of norms", ours, layers, "<= 1"),
        Row(f"{name}: proved L / closed form, proved", ours, fast, "<= 1"),
        Row(f"{name}: seconds / ten minutes", took, 600.0, "<= 1"),
    ]
    print_fast = eclipse([module.weight.detach().double().numpy() for module in net if isinstance(module, nn.Linear)])
    return rows if print_fast is None else [*rows, Row(f"{name}: proved L / eclipse-nn's ECLipsE-Fast", ours, print_fast)]


def dense(stored: Any) -> nn.Sequential:
    """Dense layers with ReLU between them, from a state dict (perhaps in a list, under `state_dict`)."""
    while isinstance(stored, list | tuple) or "state_dict" in stored:
        stored = stored[0] if isinstance(stored, list | tuple) else stored["state_dict"]
    layers: list[nn.Module] = [nn.Flatten()]
    for key, weight in stored.items():
        if key.endswith("weight"):
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data, layer.bias.data = weight, stored[key.replace("weight", "bias")]
            layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def main() -> None:
    """Measure and print every row."""
    args = parser(__doc__ or "")
    args.add_argument("--network", type=pathlib.Path, metavar="FILE", help="a state dict of dense layers")
    given = args.parse_args()
    torch.set_num_threads(1)
    rows = [*on_the_grid(given.quick), *sorting(), *([] if given.quick else wide()), *(real(given.network) if given.network else [])]
    show(rows, "constants, and seconds of the processor", given.json)


if __name__ == "__main__":
    main()
