"""Cost of the layers: training step and frozen forward against a plain layer and against the peers that are installed, side by side, one thread.

python -m benchmarks.layers [--quick] [--json FILE]

A first layer gets images, which need no gradient: a plain convolution makes two passes, its output and the gradient of its weights, two in a row make five.
Inside a network the input needs a gradient too: three passes and six.
Peak memory is of fresh processes, so the order of the rows does not matter.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lipnet
from benchmarks.rows import Row, arguments, show, side_by_side

CHANNELS, SIZE, BATCH = 64, 32, 32
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "AOL": (lambda: lipnet.ContractionConv2d(CHANNELS, CHANNELS, contraction=lipnet.AOL()), "<= 1.15"),
    "BCOP": (lambda: lipnet.ContractionConv2d(CHANNELS, CHANNELS), "-"),
    "BRO": (lambda: lipnet.BROConv2d(CHANNELS, CHANNELS), "<= 2.5"),
    "sandwich, AOL": (lambda: lipnet.SandwichConv2d(CHANNELS, CHANNELS), "<= 2.5"),
    "sandwich, BCOP": (lambda: lipnet.SandwichConv2d(CHANNELS, CHANNELS, orthonormalizer=lipnet.BCOP()), "<= 2.5"),
    "SLL": (lambda: lipnet.SLLConv2d(CHANNELS), "-"),
    "CPL": (lambda: lipnet.CPLConv2d(CHANNELS), "-"),
    "LiResNet": (lambda: lipnet.LiResConv2d(CHANNELS), "-"),
    "AOL, one squaring": (lambda: lipnet.ContractionConv2d(CHANNELS, CHANNELS, contraction=lipnet.AOL(squarings=1)), "-"),
    "BRO, Fourier": (lambda: lipnet.FourierBROConv2d(CHANNELS, CHANNELS, SIZE), "-"),
    "sandwich, Cayley, Fourier": (lambda: lipnet.FourierSandwichConv2d(CHANNELS, CHANNELS, SIZE), "-"),
}
INSIDE = ("AOL", "BCOP", "BRO", "sandwich, AOL", "sandwich, BCOP")
DENSE = (784, 256)
Peers = dict[str, tuple[str, Callable[[Any], nn.Module]]]
CONVOLUTION_PEERS: Peers = {
    "orthogonium AOC": ("orthogonium.layers", lambda m: m.AdaptiveOrthoConv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="zeros")),
    "deel-torchlip SpectralConv2d": ("deel.torchlip", lambda m: m.SpectralConv2d(CHANNELS, CHANNELS, 3, padding=1)),
}
DENSE_PEERS: Peers = {
    "orthogonium OrthoLinear": ("orthogonium.layers", lambda m: m.OrthoLinear(*DENSE)),
    "deel-torchlip SpectralLinear": ("deel.torchlip", lambda m: m.SpectralLinear(*DENSE)),
}
PEAK = """
import pathlib, torch, lipnet
from torch import nn

def mebibytes(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

torch.set_num_threads(1)
before = mebibytes("VmRSS")
{layer}(torch.randn(8, 256, 64, 64)).square().sum().backward()
print(mebibytes("VmHWM") - before)
"""


def step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward, weight construction included."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).square().sum().backward()

    return run


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward pass without gradients."""

    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


def installed(peers: Peers) -> dict[str, nn.Module]:
    """The layers of the peers that are there."""
    found = {}
    for name, (module, make) in peers.items():
        try:
            found[name] = make(importlib.import_module(module))
        except ImportError:
            print(f"{name} is not installed: left out")
    return found


def peak(layer: str) -> float:
    """MiB that a training step of a layer, written as Python, adds to a fresh process at its highest (Linux; `ru_maxrss` would begin at the parent's size)."""
    return float(subprocess.run([sys.executable, "-c", PEAK.format(layer=layer)], check=True, capture_output=True, text=True).stdout)


def lbdn_cayley(free: Tensor) -> Tensor:
    """The Cayley transform as the LBDN paper writes it: two products with an inverse."""
    rows = free.shape[0]
    u, v = free.mT[:rows], free.mT[rows:]
    eye = torch.eye(rows)
    z = u - u.mT + v.mT @ v
    inverse = torch.linalg.inv(eye + z)
    return torch.cat([inverse @ (eye - z), -2 * v @ inverse]).mT


def main() -> None:
    """Measure and print every row."""
    args = arguments(__doc__ or "")
    rounds = 3 if args.quick else 11
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    leaf = x.clone().requires_grad_()
    plain = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    rows = []
    layers = {name: (make(), goal) for name, (make, goal) in CONVOLUTIONS.items()}
    for name, (layer, goal) in layers.items():
        rows.append(Row(f"training step, first layer, {name} / plain conv", *side_by_side(step(layer, x), step(plain, x), rounds), goal))
    for name in INSIDE:
        layer, goal = layers[name]
        rows.append(Row(f"training step, inside a network, {name} / plain conv", *side_by_side(step(layer, leaf), step(plain, leaf), rounds), goal))
    for peer, other in installed(CONVOLUTION_PEERS).items():
        rows.append(Row(f"training step, BCOP / {peer}", *side_by_side(step(layers["BCOP"][0], x), step(other, x), rounds)))
    twice = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
    for where, given in (("first layer", x), ("inside a network", leaf)):
        what = f"training step, {where}, two plain convs with a ReLU between / plain conv"
        rows.append(Row(what, *side_by_side(step(twice, given), step(plain, given), rounds)))
        for name in ("sandwich, AOL", "sandwich, BCOP"):
            what = f"training step, {where}, {name} / the plain modules it is"
            rows.append(Row(what, *side_by_side(step(layers[name][0], given), step(twice, given), rounds)))
    vectors, dense = torch.randn(256, DENSE[0]), lipnet.BROLinear(*DENSE)
    for peer, other in {"plain linear": nn.Linear(*DENSE), **installed(DENSE_PEERS)}.items():
        what = f"training step, BROLinear {DENSE[0]} -> {DENSE[1]}, batch 256 / {peer}"
        rows.append(Row(what, *side_by_side(step(dense, vectors), step(other, vectors), rounds)))
    for name, like in (("BCOP", plain), ("BRO", plain), ("sandwich, BCOP", twice)):
        frozen = lipnet.freeze(layers[name][0])
        rows.append(Row(f"frozen forward, {name} / the plain modules it is", *side_by_side(forward(frozen, x), forward(like, x), rounds), "<= 1.05"))
    rows.append(Row("forward, MaxMin / ReLU", *side_by_side(forward(lipnet.MaxMin(), x), forward(nn.ReLU(), x), 3 * rounds), "<= 1.7"))
    rows.append(Row("with gradient, MaxMin / ReLU", *side_by_side(step(lipnet.MaxMin(), leaf), step(nn.ReLU(), leaf), rounds)))
    free = torch.randn(256, 512, requires_grad=True)

    def cayley(map_: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            free.grad = None
            map_(free).square().sum().backward()

        return run

    ours, theirs = side_by_side(cayley(lipnet.functional.cayley), cayley(lbdn_cayley), 3 * rounds)
    rows.append(Row("Cayley 256 x 512 with gradient, ours / LBDN form", ours, theirs, f"<= {1 / 1.3:.2f}"))
    what = "MiB at the peak, BROConv2d training step at 64 x 64, 256 channels, batch 8 / plain conv"
    rows.append(Row(what, peak("lipnet.BROConv2d(256, 256)"), peak("nn.Conv2d(256, 256, 3, padding=1)"), "<= 2"))
    show(rows, "seconds, median (MiB where it says so)", args.json)


if __name__ == "__main__":
    main()
