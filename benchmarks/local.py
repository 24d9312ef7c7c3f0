"""Local Lipschitz constants beside auto_LiRPA, eclipse-nn and a propagation of our own through all neurons, on the same networks, in one run and one thread.

python -m benchmarks.local [--quick] [--json FILE]

Constants are of all ten outputs from l-infinity on a box: the largest l1 norm of each one's gradient. Networks have torch's own random weights, and inputs are
uniform in [0, 1]. auto_LiRPA runs in float32 for its time, which is faster there, and in float64 for its bounds; its time is ten times that of a network of the
first output alone, and, for dense networks, that of one call for the Jacobian of all outputs. Its graphs, and our programs, are made before the clock starts.
Peers that are not installed are left out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import certify
import lipnet
from benchmarks.rows import Row, parser, show
from certify.local import _lirpa, condense
from certify.local.coupled import bound_jacobian
from certify.local.program import Program
from certify.local.region import Region

NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "MLP 784-100-100-10": (lambda: mlp(784, 100, 100, 10), (784,)),
    "MLP 784-256-256-256-10": (lambda: mlp(784, 256, 256, 256, 10), (784,)),
    "CNN 2C2F, 1x28x28": (lambda: cnn((1, 8, 16), 784), (1, 28, 28)),
    "CNN 3C2F, 3x32x32": (lambda: cnn((3, 16, 32, 32), 512), (3, 32, 32)),
}
RADII = {"0.5/255": 0.5 / 255, "2/255": 2 / 255}
# By activation, sizes, seed and radius: the largest l1 norms of the gradients of all outputs, by enumeration of all linear pieces.
EXACT: dict[tuple[str, tuple[int, ...], int, float], tuple[float, ...]] = {
    ("relu", (3, 8, 8, 3), 0, 0.1): (1.9298847742607974, 3.3900729691984033, 0.8009504524869072),
    ("relu", (3, 8, 8, 3), 1, 0.1): (0.8947333872638852, 0.2008586979456793, 0.6308265293566466),
    ("relu", (3, 8, 8, 3), 2, 0.1): (0.8793291501405697, 1.5126629960784883, 0.7581319254449832),
    ("maxmin", (4, 8, 8, 3), 0, 0.1): (2.555394176447404, 2.3408251076373574, 2.7088267495605303),
    ("maxmin", (4, 8, 8, 3), 1, 0.1): (3.2061095930470573, 7.458661661972003, 4.642593669896703),
    ("maxmin", (4, 8, 8, 3), 2, 0.1): (4.028933405879822, 3.1101521161822463, 5.8019857554334004),
    ("leaky", (4, 8, 8, 3), 0, 0.3): (1.921229876840765, 1.9978378934219059, 3.141108741264521),
    ("relu", (8, 12, 12, 3), 3, 0.2): (1.7560309001816174, 5.720818875779218, 3.2966873088004993),
    ("relu", (10, 20, 15, 10, 3), 0, 0.1): (3.0293778848535213, 3.3239859695474387, 3.109793661962824),
}
ALONE = """
import benchmarks.local as here
print(*here.large())
"""


def mlp(*sizes: int) -> nn.Sequential:
    """Dense layers with ReLU."""
    layers = [layer for into, out in itertools.pairwise(sizes) for layer in (nn.Linear(into, out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn(channels: Sequence[int], features: int) -> nn.Sequential:
    """Convolutions of 4 x 4 and stride 2, then a dense layer of 100."""
    layers = [layer for into, out in itertools.pairwise(channels) for layer in (nn.Conv2d(into, out, 4, 2, 1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 100), nn.ReLU(), nn.Linear(100, 10))


def cnn_4layer_stride1_padding0() -> nn.Sequential:
    """The paper's network for CIFAR-10, with 54,144 ReLUs."""
    dense = (nn.Flatten(), nn.Linear(32 * 28 * 28, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), *dense)


def made(make: Callable[[], nn.Sequential], shape: tuple[int, ...]) -> tuple[nn.Sequential, Tensor]:
    """A network and an input, in float64."""
    torch.manual_seed(0)
    return make().double().eval(), torch.rand(1, *shape, dtype=torch.float64)


def around(x: Tensor, radius: float) -> Region:
    """The box."""
    return Region.of(certify.Ball(x.numpy(), radius, math.inf), x.numel())


def ours(program: Program, region: Region, steps: int = 0) -> tuple[Tensor, int]:
    """The constants of all outputs, and how many gates are undecided."""
    with torch.no_grad():
        condensed = condense.condense(program, region, torch.eye(program.outputs, dtype=torch.float64), steps=steps)
        return bound_jacobian(condensed).row_norms(1), condensed.undecided


def timed(run: Callable[[], object], rounds: int) -> float:
    """Median seconds, after a warm-up where there is more than one round."""
    found = []
    for _ in range(rounds + (rounds > 1)):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found[rounds > 1 :])


# --- all neurons ------------------------------------------------------------------------------------------------------------------------------------


class Uncondensed:
    """CROWN and its bounds of Jacobians (Shi et al. 2022) through every neuron of a chain of dense and convolutional layers with ReLU, all outputs at once.

    Rows are propagated only for neurons that intervals leave undecided. Nothing is rounded outwards. It is here to be compared with.
    """

    def __init__(self, net: nn.Sequential, x: Tensor, radius: float) -> None:
        self.layers = [layer for layer in net if isinstance(layer, nn.Linear | nn.Conv2d)]
        self.x, self.radius, shape = x.flatten(), radius, tuple(x.shape[1:])
        self.shapes = [shape]
        for layer in self.layers:
            shape = tuple(layer(torch.zeros(1, *(shape if isinstance(layer, nn.Conv2d) else (math.prod(shape),)), dtype=torch.float64)).shape[1:])
            self.shapes.append(shape)
        self.ends: list[tuple[Tensor, Tensor]] = []

    def map(self, k: int, rows: Tensor, weight: Tensor | None = None) -> Tensor:  # (..., inputs) -> (..., outputs)
        """`W_k` of each row."""
        layer = self.layers[k]
        weight = layer.weight if weight is None else weight
        if isinstance(layer, nn.Linear):
            return rows @ weight.T
        return functional.conv2d(rows.reshape(-1, *self.shapes[k]), weight, None, layer.stride, layer.padding).reshape(*rows.shape[:-1], -1)

    def back(self, k: int, rows: Tensor) -> Tensor:  # (..., outputs) -> (..., inputs)
        """`W_k'` of each row."""
        layer = self.layers[k]
        if isinstance(layer, nn.Linear):
            return rows @ layer.weight
        made = functional.conv_transpose2d(rows.reshape(-1, *self.shapes[k + 1]), layer.weight, None, layer.stride, layer.padding)
        return made.reshape(*rows.shape[:-1], -1)

    def bias(self, k: int) -> Tensor:
        """As long as the outputs."""
        layer = self.layers[k]
        return layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None].expand(-1, math.prod(self.shapes[k + 1][1:])).flatten()

    def ranges(self) -> None:
        """Of all inputs of ReLUs."""
        low, high = self.x - self.radius, self.x + self.radius
        for k in range(len(self.layers) - 1):
            middle = self.map(k, (low + high) / 2) + self.bias(k)
            half = self.map(k, (high - low) / 2, self.layers[k].weight.abs())
            low, high = middle - half, middle + half
            index = torch.nonzero((low < 0) & (high > 0)).flatten()
            if k and len(index):
                rows = torch.eye(len(low), dtype=torch.float64)[index]
                top = self.upper(k, torch.cat([rows, -rows]))
                low[index], high[index] = torch.maximum(low[index], -top[len(index) :]), torch.minimum(high[index], top[: len(index)])
            self.ends.append((low, high))
            low, high = low.clamp(min=0), high.clamp(min=0)

    def upper(self, k: int, rows: Tensor) -> Tensor:
        """At least the largest of rows of the inputs of the k-th ReLUs."""
        total = torch.zeros(len(rows), dtype=torch.float64)
        for j in range(k, -1, -1):
            total, rows = total + rows @ self.bias(j), self.back(j, rows)
            if j:
                low, high = self.ends[j - 1]
                on, off = low >= 0, high <= 0
                chord = torch.where(on, 1.0, torch.where(off, 0.0, high / (high - low).clamp(min=1e-300)))
                below = torch.where(on, 1.0, torch.where(off, 0.0, (high > -low).double()))
                total = total + rows.clamp(min=0) @ torch.where(on | off, 0.0, -chord * low)
                rows = rows.clamp(min=0) * chord + rows.clamp(max=0) * below
        return total + rows @ self.x + rows.abs().sum(1) * self.radius

    def row_norms(self) -> Tensor:
        """The constants of all outputs."""
        with torch.no_grad():
            self.ends = []
            self.ranges()
            return torch.stack([self.row_norm(row) for row in self.layers[-1].weight])

    def row_norm(self, last: Tensor) -> Tensor:
        """The largest l1 norm of the gradient of one output, whose last weights are given."""
        lines: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # around s e, from the last layer on
        for k in range(len(self.layers) - 2, -1, -1):
            low, high = self.ends[k]
            on, off = low >= 0, high <= 0
            index = torch.nonzero(~(on | off)).flatten()
            least, most = torch.zeros(len(low), dtype=torch.float64), torch.zeros(len(low), dtype=torch.float64)
            if len(index):
                rows = torch.eye(len(low), dtype=torch.float64)[index]
                least[index], most[index] = self.gradient(k, rows, last, lines)
            above, below = most.clamp(min=0), least.clamp(max=0)
            width = (above - below).clamp(min=1e-300)
            steep, flat = above / width, -below / width
            decided = on | off
            shift = torch.where(decided, 0.0, -above * below / width)
            lines.append((torch.where(decided, on.double(), steep), shift, torch.where(decided, on.double(), flat), -shift))
        least, most = self.gradient(-1, torch.eye(len(self.x), dtype=torch.float64), last, lines)
        slope = torch.where(least >= 0, 1.0, torch.where(most <= 0, -1.0, (most.abs() - least.abs()) / (most - least).clamp(min=1e-300)))
        shift = least.abs() - slope * least
        linear = self.gradient(-1, slope[None], last, lines)[1][0] + shift.sum()
        return torch.minimum(linear, torch.maximum(least.abs(), most.abs()).sum())

    def gradient(self, k: int, rows: Tensor, last: Tensor, lines: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The range of rows of the gradient to the outputs of the k-th ReLUs; -1: to the input. In batches."""
        found = [self._gradient(k, part, last, lines) for part in rows.split(512)]
        return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])

    def _gradient(self, k: int, rows: Tensor, last: Tensor, lines: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        count = len(rows)
        rows, total = torch.cat([rows, -rows]), torch.zeros(2 * count, dtype=torch.float64)
        for j in range(k + 1, len(self.layers) - 1):
            rows = self.map(j, rows)
            above, below = rows.clamp(min=0), rows.clamp(max=0)
            steep, shift, flat, sink = lines[len(self.layers) - 2 - j]
            total, rows = total + above @ shift + below @ sink, above * steep + below * flat
        top = total + rows @ last
        return -top[count:], top[:count]


# --- rows -------------------------------------------------------------------------------------------------------------------------------------------


def beside_others(name: str, where: str, quick: bool) -> list[Row]:
    """Time and bounds of one network in one box, ours beside the others'."""
    make, shape = NETS[name]
    radius = RADII[where]
    net, x = made(make, shape)
    program, region = Program.of(net, shape), around(x, radius)
    found, undecided = ours(program, region)
    took = timed(lambda: ours(program, region), 1 if quick else 3)
    plain = Uncondensed(net, x, radius)
    norms = plain.row_norms()
    rounds = 3 if name.startswith("MLP") and not quick else 1
    whole = timed(plain.row_norms, rounds)
    what = f"{name} at {where}, {undecided} undecided"
    rows = [
        Row(f"{what}: seconds, ours / all neurons", took, whole, "<= 0.1"),
        Row(f"{what}: largest constant, ours / all neurons", float(found.max()), float(norms.max()), "<= 1.000001"),
    ]
    if importlib.util.find_spec("auto_LiRPA"):
        single = first_row(net, x, torch.float32)
        seconds = 10 * timed(lambda: single(region.center.float() - radius, region.center.float() + radius), rounds)
        if name.startswith("MLP"):  # convolutions need too much memory so
            jacobian = _lirpa.entries(copy.deepcopy(net).float(), x.float())
            at_once = timed(lambda: jacobian(region.center.float() - radius, region.center.float() + radius), rounds)
            rows.append(Row(f"{what}: seconds, ours / auto_LiRPA, CROWN (all outputs in one call)", took, at_once, "<= 0.05"))
        exact = first_row(net, x, torch.float64)
        theirs = exact(region.center + region.low, region.center + region.high)
        rows.append(Row(f"{what}: seconds, ours / auto_LiRPA, CROWN (10 x one output)", took, seconds, "<= 0.05"))
        rows.append(Row(f"{what}: constant of the first output, ours / auto_LiRPA, CROWN", float(found[0]), float(theirs), "<= 1.000001"))
    return rows


def first_row(net: nn.Sequential, x: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """auto_LiRPA's bound of the first output, of the layers as they stand."""
    one = copy.deepcopy(net).to(dtype)
    last = one[-1]
    row = nn.Linear(last.in_features, 1, dtype=dtype)
    row.weight.data, row.bias.data = last.weight.data[:1], last.bias.data[:1]
    one = nn.Sequential(*list(one)[:-1], row)
    return _lirpa.l1_norm(one, x.to(dtype))


def memory(what: str) -> float:
    """Of this process, in GiB, as Linux counts it."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) / 2**20


def large() -> tuple[float, float, float, float, float]:
    """The paper's network for CIFAR-10 at 0.25/255: its constant, seconds, undecided gates, and GiB at the peak beyond the start, allowed and used."""
    torch.set_num_threads(1)
    net, x = made(cnn_4layer_stride1_padding0, (3, 32, 32))
    program, region = Program.of(net, (3, 32, 32)), around(x, 0.25 / 255)
    start = memory("VmRSS")
    begun = time.perf_counter()
    found, undecided = ours(program, region)
    took = time.perf_counter() - begun
    used = memory("VmHWM") - start
    batch = max(condense._CHUNK, condense._ROWS * program.widest)
    allowed = 4 * (x.numel() * undecided + undecided**2 + batch) * 8 / 2**30
    return float(found.max()), took, undecided, used, allowed


def paper() -> list[Row]:
    """That network, alone in a process."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True).stdout.split()
    _, took, undecided, used, allowed = (float(word) for word in done)
    what = f"cnn_4layer_stride1_padding0 (54,144 ReLUs) at 0.25/255, {undecided:.0f} undecided"
    return [
        Row(f"{what}: seconds / one minute", took, 60.0, "<= 0.5"),
        Row(f"{what}: GiB at the peak / 4 (inputs U + U^2 + batch) x 8 bytes", used, allowed, "<= 1"),
    ]


def reference(kind: str, sizes: tuple[int, ...], seed: int) -> tuple[nn.Sequential, Tensor]:
    """A network whose pieces were enumerated, from numpy's generator."""
    rng = np.random.default_rng(seed)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(sizes):
        layer = nn.Linear(into, out, dtype=torch.float64)
        layer.weight.data = torch.from_numpy(math.sqrt(2 / into) * rng.standard_normal((out, into)))
        layer.bias.data = torch.from_numpy(0.1 * rng.standard_normal(out))
        layers += [layer, {"relu": nn.ReLU, "maxmin": lipnet.MaxMin, "leaky": lambda: nn.LeakyReLU(0.2)}[kind]()]
    return nn.Sequential(*layers[:-1]).eval(), torch.from_numpy(rng.standard_normal(sizes[0]))[None]


def beside_exact() -> list[Row]:
    """The mean over outputs of what is proved, over the exact value."""
    rows = []
    for (kind, sizes, seed, radius), exact in EXACT.items():
        net, x = reference(kind, sizes, seed)
        program, region = Program.of(lipnet.freeze(net), sizes[:1]), around(x, radius)
        true = torch.tensor(exact)
        plain, tuned = (float((ours(program, region, steps)[0] / true).mean()) for steps in (0, 10))
        what = f"{kind} {'-'.join(map(str, sizes))}, seed {seed}, at {radius:g}"
        rows += [Row(f"{what}: ours / exact", plain, 1.0), Row(f"{what}: ours with 10 alpha steps / exact", tuned, 1.0)]
        if importlib.util.find_spec("auto_LiRPA"):
            sums = _lirpa.dense(program, 2**20)
            for optimize, name, mine in ((False, "CROWN", plain), (True, "alpha-CROWN", tuned)):
                found = []
                for row in torch.eye(len(exact), dtype=torch.float64):
                    with contextlib.redirect_stdout(io.StringIO()):
                        bound = _lirpa.l1_norm(_lirpa.row_of(sums, row), region.center[None], optimize)
                        found.append(bound(region.center + region.low, region.center + region.high))
                rows.append(Row(f"{what}: ours / auto_LiRPA, {name}", mine, float((torch.stack(found) / true).mean()), "<= 1.000001"))
    return rows


def beside_eclipse() -> list[Row]:
    """From l2 to l2 on a ball: ECLipsE-Gen-Local, where it is installed."""
    if not importlib.util.find_spec("eclipse_nn"):
        return []
    from eclipse_nn.LipConstEstimator import LipConstEstimator

    cases = [(f"relu {'-'.join(map(str, sizes))}, seed {seed}", *reference(kind, sizes, seed), radius) for kind, sizes, seed, radius in EXACT if kind == "relu"]
    cases.append(("MLP 784-100-100-10", *made(*NETS["MLP 784-100-100-10"]), 0.5))
    rows = []
    for name, net, x, radius in cases:
        dense = [layer for layer in net if isinstance(layer, nn.Linear)]
        weights, biases = [layer.weight.detach() for layer in dense], [layer.bias.detach()[:, None] for layer in dense]
        shape, domain = tuple(x.shape[1:]), certify.Ball(x[0].numpy(), radius, 2)
        start = time.perf_counter()
        mine = certify.lipschitz(net, certify.Local(pairs=False), input_shape=shape, domain=domain).value
        took = time.perf_counter() - start
        start = time.perf_counter()
        algorithm = "Fast" if len(weights[0]) < 50 else "CF"  # the others do not finish in minutes on 784 inputs
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = float(LipConstEstimator(weights=weights, biases=biases).estimate_gen_local(x.reshape(-1, 1), radius, algo=algorithm)[0])
        seconds = time.perf_counter() - start
        rows.append(Row(f"{name}, l2 ball of {radius:g}: ours / ECLipsE-Gen-Local, {algorithm}", mine, theirs, "<= 1.000001"))
        if algorithm == "CF":
            everywhere = certify.lipschitz(net, certify.LipSDP(pairs=False), input_shape=shape).value
            rows.append(Row(f"{name}: LipSDP, everywhere / ECLipsE-Gen-Local, {algorithm}, in the ball", everywhere, theirs))
        rows.append(Row(f"{name}, l2 ball of {radius:g}: seconds, ours / ECLipsE-Gen-Local, {algorithm}", took, seconds))
    return rows


def main() -> None:
    """Measure and print every row."""
    given = parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    names = list(NETS)[:1] if given.quick else list(NETS)
    rows = [row for name in names for where in RADII for row in beside_others(name, where, given.quick)]
    rows += [*beside_exact(), *beside_eclipse(), *([] if given.quick else paper())]
    show(rows, "constants, and seconds", given.json)


if __name__ == "__main__":
    main()
