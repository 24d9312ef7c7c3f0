"""Norms of convolutions: our proved bound beside the norm that is reached, and beside the bounds and estimates of others, in one run and one thread.

python -m benchmarks.norms [--quick] [--json FILE] [--lip4conv DIR] [--network FILE ARCH ...]

Convolutions of real sizes with kernels as torch draws them, an orthogonal one (BCOP, fresh), and with `--network` those of a published network, from a file
of weights and the name of its architecture (`certify.models`). `reached` is `|A v|` for the unit vector v that 150 steps of Lanczos' method end with, in
float64: never above the norm, and short of it by about 1e-6. The table says by how much each number exceeds it; one that is below it is no bound, whatever it
claims.

Ours takes every rounding in. Plain baselines: an SVD at each frequency of the torus that ours has for larger images (numpy, float64), and 100 steps of power
iteration. lip4conv, the code of the Gram iterations (Delattre et al. 2023, 2024) and of earlier bounds, is run from a checkout, orthogonium's `get_conv_sv`
where it is installed; both in float32, as they are meant to be used. lip4conv knows no groups, and where there is a stride both mostly leave it out: the norm
without it is a bound too, a loose one. Gram iterations for zero padding are left out where they take more than 1e12 operations.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lipnet
from benchmarks.rows import Row, parser, show
from certify import convolution, models
from certify.registry import rule_for
from certify.rules.torch_conv import padding_of
from certify.spectral import as_float64

Shape = tuple[int, ...]
STEPS = 150
POWER_STEPS = 100
SLOW = 5.0
GRAMS = 4  # what both packages take where they are not told
POWER = f"power iteration, {POWER_STEPS}"
TORUS = "SVD at each frequency"
COLUMNS = (
    "ours",
    TORUS,
    POWER,
    *(f"delattre2023, {count}" for count in (GRAMS, GRAMS + 2)),
    f"delattre2024, {GRAMS}",
    "singla2021",
    "araujo2021",
    "orthogonium",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution without bias, in float64, and the shape of its input."""

    name: str
    layer: nn.Conv2d
    shape: Shape

    @property
    def circular(self) -> bool:
        """Whether opposite sides of the image are neighbours."""
        return self.layer.padding_mode == "circular"

    @property
    def plain(self) -> bool:
        """One group, no stride, as many outputs as pixels, for square images: what the published formulas are about."""
        one = self.layer.stride == (1, 1) and self.layer.groups == 1 and self.layer.dilation == (1, 1) and self.shape[1] == self.shape[2]
        return one and all(2 * int(p) + 1 == k for p, k in zip(self.layer.padding, self.layer.kernel_size, strict=True))


@dataclasses.dataclass(frozen=True)
class Method:
    """Somebody's number for the norm of a convolution, and what its authors call it."""

    name: str
    claims: str  # proof, bound or estimate
    run: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a method gave for a case."""

    case: str
    method: str
    claims: str
    value: float
    reached: float
    seconds: float

    @property
    def over(self) -> float:
        """Relative to the norm that is reached."""
        return self.value / self.reached - 1


def convolution_of(shape: Shape, out: int, taps: int, **geometry: Any) -> nn.Conv2d:
    """With the kernel that torch draws, in float32."""
    return nn.Conv2d(shape[0], out, taps, bias=False, **geometry).double().eval()


def orthogonal(channels: int, size: int) -> Case:
    """A fresh BCOP convolution: all its singular values on a torus are 1, where Gram iteration is slowest."""
    frozen = lipnet.freeze(lipnet.ContractionConv2d(channels, channels, bias=False, padding_mode="circular"))
    layer = next(module for module in frozen.modules() if isinstance(module, nn.Conv2d))
    return Case(f"BCOP 3x3, {channels} -> {channels} at {size}, circular", layer.double().eval(), (channels, size, size))


def halved(case: Case) -> Case:
    """With half the kernel."""
    with torch.no_grad():
        case.layer.weight.mul_(0.5)
    return dataclasses.replace(case, name=f"{case.name}, halved")


def cases(quick: bool) -> list[Case]:
    """Convolutions as networks have them."""
    torch.manual_seed(0)

    def made(channels: int, out: int, taps: int, size: int, **geometry: Any) -> Case:
        text = "".join(f", {key} {value}" for key, value in geometry.items() if key in ("stride", "groups"))
        border = "circular" if geometry.get("padding_mode") == "circular" else "zeros"
        layer = convolution_of((channels, size, size), out, taps, padding=taps // 2, **geometry)
        return Case(f"{taps}x{taps}, {channels} -> {out} at {size}{text}, {border}", layer, (channels, size, size))

    small = [made(16, 16, 3, 32), made(16, 16, 3, 32, padding_mode="circular"), made(16, 16, 3, 16, groups=16), orthogonal(16, 16)]
    if quick:
        return small
    return [
        *small[:2],
        made(64, 64, 3, 32),
        made(64, 64, 3, 32, padding_mode="circular"),
        made(64, 128, 3, 32, stride=2),
        made(32, 64, 5, 28),
        made(64, 256, 1, 32),
        made(3, 64, 7, 224, stride=2),
        made(64, 64, 3, 32, groups=64),
        halved(made(64, 64, 3, 32, groups=64)),
        made(256, 256, 3, 14),
        orthogonal(64, 32),
    ]


def of_network(file: str, arch: str) -> list[Case]:
    """The convolutions of a network, with the inputs that they get."""
    model = models.load(file, arch=arch)
    named = {path: layer for path, layer in model.net.named_modules() if isinstance(layer, nn.Conv2d)}
    shapes: dict[nn.Module, Shape] = {}
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: shapes.update({layer: tuple(inputs[0].shape[1:])})) for layer in named.values()]
    with torch.no_grad():
        model.net(torch.zeros(1, *model.shape))
    for hook in hooks:
        hook.remove()
    return [Case(f"{pathlib.Path(file).stem} {path}", without_bias(layer), shapes[layer]) for path, layer in named.items()]


def without_bias(layer: nn.Conv2d) -> nn.Conv2d:
    """A copy in float64."""
    made = copy.deepcopy(layer).double().eval()
    made.bias = None
    return made


def adjoint_of(layer: nn.Module, x: Tensor) -> Tensor:
    """`A' A x`."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return torch.autograd.grad(y, x, y.detach())[0]


def reached(case: Case, steps: int = STEPS) -> float:
    """The norm from below: `|A v|` for the unit vector v that Lanczos' method ends with, with full reorthogonalisation."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, *case.shape, dtype=torch.float64, generator=generator)
    basis, diagonal, beside = [(start / start.norm()).flatten()], [], []
    for _ in range(min(steps, start.numel())):
        image = adjoint_of(case.layer, basis[-1].reshape(start.shape)).flatten()
        diagonal.append(float(image @ basis[-1]))
        q = torch.stack(basis)
        for _ in range(2):
            image = image - q.mT @ (q @ image)
        beside.append(float(image.norm()))
        if beside[-1] < 1e-10 * diagonal[0]:
            break
        basis.append(image / image.norm())
    off = np.diag(beside[: len(diagonal) - 1], 1)
    vector = torch.from_numpy(np.linalg.eigh(np.diag(diagonal) + off + off.T)[1][:, -1])
    v = (torch.stack(basis[: len(diagonal)]).mT @ vector).reshape(start.shape)
    with torch.no_grad():
        return float(case.layer(v).norm() / v.norm())


def proved(case: Case) -> float:
    """Ours, by the rule of the module."""
    rule = rule_for(case.layer)
    assert rule is not None
    return rule(case.layer, case.shape).value


def each_frequency(case: Case) -> float:
    """The same torus as ours, which holds the kernel once, an SVD at each frequency, nothing proved. Without dilation."""
    layer, kernel = case.layer, as_float64(case.layer.weight)
    make = convolution.circular_axis if case.circular else convolution.zeros_axis
    pads = padding_of(layer)
    axes = [make(case.shape[1 + i], kernel.shape[2 + i], layer.stride[i], pads[2 * i], pads[2 * i + 1], layer.dilation[i])[0] for i in range(2)]
    steps, sizes = [axis.stride for axis in axes], [axis.torus // axis.stride for axis in axes]
    taps = [-(-k // step) for k, step in zip(kernel.shape[2:], steps, strict=True)]
    padded = np.zeros((*kernel.shape[:2], taps[0] * steps[0], taps[1] * steps[1]))
    padded[:, :, : kernel.shape[2], : kernel.shape[3]] = kernel
    phases = padded.reshape(layer.groups, len(kernel) // layer.groups, kernel.shape[1], taps[0], steps[0], taps[1], steps[1]).transpose(3, 5, 0, 1, 2, 4, 6)
    spectrum = np.fft.rfft2(phases, s=sizes, axes=(0, 1))
    return float(np.linalg.svd(spectrum.reshape(-1, spectrum.shape[3], kernel.shape[1] * steps[0] * steps[1]), compute_uv=False).max())


def power_iteration(case: Case) -> float:
    """What spectral normalisation divides by: `|A v|` after some steps from a random image."""
    x = torch.randn(1, *case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(POWER_STEPS):
        x = adjoint_of(case.layer, x / x.norm())
    with torch.no_grad():
        return float(case.layer(x).norm() / x.norm())


def methods(case: Case, lip4conv: ModuleType | None, orthogonium: ModuleType | None) -> Iterator[Method]:
    """Ours first."""
    yield Method("ours", "proof", lambda: proved(case))
    yield Method(TORUS, "estimate", lambda: each_frequency(case))
    yield Method(POWER, "estimate", lambda: power_iteration(case))
    weight, size, groups = case.layer.weight.detach().float(), case.shape[1], case.layer.groups
    if lip4conv is not None and groups == 1:
        yield from theirs(case, lip4conv, weight, size)
    if orthogonium is not None and (case.circular or affordable(weight)):
        layer = nn.Conv2d(1, 1, 1, padding_mode=case.layer.padding_mode)
        layer.weight, layer.stride, layer.groups = nn.Parameter(weight), case.layer.stride, groups
        yield Method("orthogonium", "bound", lambda: float(orthogonium.get_conv_sv(layer, GRAMS, return_stab_rank=False, imsize=size)))


def affordable(weight: Tensor) -> bool:
    """Whether the last product of delattre2024 takes fewer than 1e12 operations."""
    taps = [2**step * (weight.shape[-1] - 1) + 1 for step in (GRAMS - 1, GRAMS)]
    return 2 * max(weight.shape[:2]) ** 3 * taps[0] ** 2 * taps[1] ** 2 < 1e12


def theirs(case: Case, lip4conv: ModuleType, weight: Tensor, size: int) -> Iterator[Method]:
    """The bounds in lip4conv that are for this border: circular ones for a torus, the others for both."""
    if case.circular:
        for count in (GRAMS, GRAMS + 2):
            run = functools.partial(lip4conv.compute_delattre2023_backward, weight, size, count)
            yield Method(f"delattre2023, {count}", "bound", lambda run=run: float(run()))
    if affordable(weight):
        yield Method(f"delattre2024, {GRAMS}", "bound", lambda: float(lip4conv.compute_delattre2024(weight, GRAMS, False)))
    if case.plain:
        yield Method("singla2021", "bound", lambda: float(lip4conv.compute_singla2021(weight, 50, False, "cpu")))
        yield Method(
            "araujo2021", "bound", lambda: float(lip4conv.compute_araujo2021(weight, 50, padding=case.layer.padding[0], device="cpu", return_time=False))
        )


def measure(case: Case, chosen: Sequence[Method], rounds: int) -> list[Found]:
    """Median seconds of the processor, all methods in turn after a warm-up each; of the warm-up itself for what takes more than five."""
    norm = reached(case)
    values: dict[str, float] = {}
    times: dict[str, list[float]] = {method.name: [] for method in chosen}
    for turn in range(1 + rounds):
        for method in chosen:
            seconds = times[method.name]
            if turn == 0 or seconds[0] <= SLOW:
                start = time.process_time()
                values[method.name] = method.run()
                seconds.append(time.process_time() - start)
    return [Found(case.name, m.name, m.claims, values[m.name], norm, statistics.median(times[m.name][1:] or times[m.name])) for m in chosen]


def line(found: Sequence[Found]) -> str:
    """A row of the table of methods: by how much each is over the norm, and its seconds."""
    by_name = {one.method: f"{one.over:+.1e} ({one.seconds:.4f})" for one in found}
    return f"| {' | '.join([found[0].case, f'{found[0].reached:.6g}', *(by_name.get(name, '-') for name in COLUMNS)])} |"


def rows_of(found: Sequence[Found], circular: bool) -> list[Row]:
    """What is proved over what is reached, and our seconds over those of each that says as much: a number from 1e-6 below the norm to 2 % above."""
    ours, *others = found
    rows = [Row(f"{ours.case}: proved / reached", ours.value, ours.reached, "<= 1.00001" if circular else "<= 1.02")]
    equal = [other for other in others if -1e-6 <= other.over <= max(ours.over, 0.02) or other.method == TORUS]
    return rows + [Row(f"{ours.case}: seconds, ours / {other.method}", ours.seconds, other.seconds, "<= 1") for other in equal]


def peer(name: str) -> ModuleType | None:
    """A package, where it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: left out")
        return None


def checkout(folder: pathlib.Path | None) -> ModuleType | None:
    """lip4conv's bounds, whose files import each other by name."""
    if folder is None:
        print("lip4conv is left out: name a checkout by --lip4conv")
        return None
    if not (folder / "bounds.py").is_file():
        raise SystemExit(f"lip4conv: there is no {folder / 'bounds.py'}; give a checkout of blaisedelattre/lip4conv")
    sys.path.insert(0, str(folder))
    return importlib.import_module("bounds")


def arguments() -> argparse.Namespace:
    """--quick, --json, the checkout and the networks."""
    made = parser(__doc__ or "")
    made.add_argument("--lip4conv", type=pathlib.Path, metavar="DIR", help="a checkout of lip4conv")
    made.add_argument("--network", nargs=2, action="append", default=[], metavar=("FILE", "ARCH"), help="weights and their architecture, such as resnet2b")
    return made.parse_args()


def main() -> None:
    """Measure and print every method for every convolution."""
    args = arguments()
    torch.set_num_threads(1)
    lip4conv, orthogonium = checkout(args.lip4conv), peer("orthogonium.layers.conv.singular_values")
    print(f"| convolution | reached | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    table, rows = [], []
    for case in [*cases(args.quick), *(case for given in args.network for case in of_network(*given))]:
        found = measure(case, list(methods(case, lip4conv, orthogonium)), 1 if args.quick else 3)
        print(line(found), flush=True)
        table += found
        rows += rows_of(found, case.circular)
    show(rows, "constants, and seconds of the processor", None)
    if args.json:
        shown = [{**dataclasses.asdict(row), "ratio": row.ratio, "met": row.met} for row in rows]
        args.json.write_text(json.dumps({"methods": [{**dataclasses.asdict(one), "over": one.over} for one in table], "rows": shown}, indent=1) + "\n")


if __name__ == "__main__":
    main()
