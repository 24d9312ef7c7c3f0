"""Certified accuracy at equal budget: our families and the peers, same data, epochs, number of parameters, recipe, machine and thread count, in one run.

python -m benchmarks.training --data mnist:DIR [--peer-code LBDN=DIR ...] [--minutes 2] [--json FILE]

Each network has the largest width (or rank of its dense layers) for which its trainable numbers stay within the budget. All get the same number of epochs:
`--epochs`, or as many as the network in the middle, by seconds, does in `--minutes`. Each is trained by Adam in batches of 256, with the best of four
learning rates, chosen in two epochs of 10,000 images by the certified accuracy at the middle radius on the last 5,000 training images, on which nothing is
trained. The loss is one for all. On images of 1 channel: the offset cross-entropy of `z / L` (offset 3, temperature 0.25), L the constant that the network's
own code gives to its features, 1 for most. On others: EMMA (temperature 0.6) with the pair constants `L |w_i - w_j|`, its radius rising from 0.1 to 3 times
36/255. Which of ours is compared with the peers is decided on the held-out images too. Our architectures, and the numbers in the losses, were chosen there
too, in runs of our networks; the peers' follow their papers within the budget and were not searched.

`proved` is by our proof, from the weights that run; `claimed` by the constant that the peer's code prints, which is no certificate. Logits are the network's
own, in float32. Networks of 1 channel are compared at the radii usual for MNIST, others at those for CIFAR-10. The peers that are not found are left out; the
papers' code is named as NAME=DIR, a checkout each of LBDN, SLL, BRONet and LiResNet.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import certify
import certify.data
import lipnet
from benchmarks import peers
from benchmarks.peers import Make, Papers, Shape
from benchmarks.rows import Row, show
from certify.bound import Array
from certify.spectral import as_float64, pair_distances

RATES = (2e-2, 1e-2, 3e-3, 1e-3)
FIRST_IMAGES, FIRST_EPOCHS = 10_000, 2  # of the run that chooses the rate
HELD_OUT = 5000
BUDGETS = {"dense": 400_000, "conv": 100_000}
PAPERS = ("LBDN", "SLL", "BRONet", "LiResNet")


def dense() -> dict[str, Make]:
    """Four of our families with dense layers and a head.

    A reflector of rank r costs `r max(in, out)` numbers at any width, so that low ranks leave room for width, and for a layer more.
    """

    def stack(layers: int, layer: Callable[[int, int, int], list[nn.Module]]) -> Make:
        def make(shape: Shape, width: int) -> nn.Sequential:
            sizes = (math.prod(shape), *(width for _ in range(layers)))
            parts = (part for into, out in itertools.pairwise(sizes) for part in layer(into, out, width))
            return nn.Sequential(nn.Flatten(), *parts, lipnet.UnitRowLinear(width, 10))

        return make

    return {
        "ours, BRO": stack(3, lambda into, out, width: [lipnet.BROLinear(into, out, rank=2 * width // 5), lipnet.MaxMin()]),
        "ours, BRO of 4 layers": stack(4, lambda into, out, width: [lipnet.BROLinear(into, out, rank=max(1, width // 3)), lipnet.MaxMin()]),
        "ours, Cayley": stack(3, lambda into, out, _: [lipnet.ContractionLinear(into, out), lipnet.MaxMin()]),
        "ours, sandwich": stack(3, lambda into, out, _: [lipnet.SandwichLinear(into, out)]),
    }


def convolutional() -> dict[str, Make]:
    """Three of our families: a layer that halves the image, two blocks there with centring, a reduction by 2, two BRO layers and a head; and a shallow one.

    The shallow one has one block and one BRO layer, with centring there too: few epochs train it further. The channels are fixed and the budget decides the
    rank of the dense reflectors, which hold nearly all of the numbers.
    """

    def network(channels: int, block: Callable[[int], nn.Module], shallow: bool = False) -> Make:
        def make(shape: Shape, rank: int) -> nn.Sequential:
            layers: list[nn.Module] = [lipnet.Normalize([0.5], [1.0]), lipnet.ContractionConv2d(shape[0], channels, stride=2), lipnet.MaxMin()]
            for _ in range(1 if shallow else 2):
                layers += [block(channels), lipnet.BatchCentering(channels, bias=False), lipnet.MaxMin()]
            layers += [lipnet.ContractionConv2d(channels, channels, kernel_size=1, stride=2), lipnet.MaxMin(), nn.Flatten()]
            features, width = channels * (shape[1] // 4) * (shape[2] // 4), 16 * channels
            if shallow:
                layers += [lipnet.BROLinear(features, width, rank=rank), lipnet.BatchCentering(width, bias=False), lipnet.MaxMin()]
            else:
                for into, wanted in ((features, rank), (width, 2 * rank)):
                    layers += [lipnet.BROLinear(into, width, rank=wanted), lipnet.MaxMin()]
            return nn.Sequential(*layers, lipnet.UnitRowLinear(width, 10))

        return make

    return {
        "ours, BRO of 16 channels": network(16, lambda channels: lipnet.BROConv2d(channels, channels)),
        "ours, BRO of 24 channels": network(24, lambda channels: lipnet.BROConv2d(channels, channels)),
        "ours, shallow BRO": network(24, lambda channels: lipnet.BROConv2d(channels, channels), shallow=True),
        "ours, LiResNet": network(16, lambda channels: lipnet.LiResConv2d(channels, depth=2)),
    }


def parameters(net: nn.Module) -> int:
    """The number of trainable numbers."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def width_within(make: Make, shape: Shape, budget: int) -> int:
    """The largest even width for which the network stays within the budget."""
    low, high = 1, 2
    while parameters(make(shape, 2 * high)) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(make(shape, 2 * middle)) <= budget else (low, middle)
    return 2 * low


class DividedOffset(nn.Module):
    """Offset cross-entropy of `z / L`; `constants` is L, for all pairs alike."""

    def __init__(self, offset: float, temperature: float) -> None:
        super().__init__()
        self.offset, self.temperature = offset, temperature
        self.loss = lipnet.OffsetCrossEntropy(offset, temperature)

    def forward(self, logits: Tensor, labels: Tensor, constants: Tensor) -> Tensor:
        return self.loss(logits / constants[0, 0], labels)


class TemperedEMMA(nn.Module):
    """EMMA of `z / T` with the constants `K / T`: the same margins, and a cross-entropy that is sharper or softer about them."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature, self.emma = temperature, lipnet.EMMA()

    def forward(self, logits: Tensor, labels: Tensor, constants: Tensor) -> Tensor:
        return self.emma(logits / self.temperature, labels, constants / self.temperature)


def constants(net: nn.Module) -> Tensor:
    """L as the network's own code gives it, for each pair of the ten classes."""
    assert isinstance(net, nn.Sequential)
    return torch.as_tensor(peers.claim(net)).reshape(1, 1).expand(10, 10)


def pair_constants(net: nn.Module) -> Tensor:
    """`L |w_i - w_j|`, w the rows of the network's last layer."""
    assert isinstance(net, nn.Sequential)
    return lipnet.pair_constants(peers.head_rows(net[-1]), peers.claim(net))


@dataclasses.dataclass(frozen=True)
class Data:
    """Images (N, C, H, W) and labels: to train on, held out, to test on; and the radii of the comparison."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    radii: tuple[float, ...]

    @property
    def shape(self) -> Shape:
        """Of one image."""
        return tuple(self.train[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class Found:
    """What a network reached."""

    name: str
    parameters: int
    rate: float
    epochs: int
    seconds: float  # per epoch
    held_out: list[float]  # clean, and certified by our proof at each radius, on the held-out images
    proved: float  # the constant of the features
    claimed: float
    accuracies: list[float]  # the same as `held_out` on the test images
    by_claim: list[float]  # the same by the claimed constant

    @property
    def chosen_by(self) -> float:
        """Certified accuracy at the middle radius on the held-out images."""
        return self.held_out[2]

    @property
    def ours(self) -> bool:
        """Whether it is one of our networks."""
        return self.name.startswith("ours")


def load(specs: Sequence[str], quick: bool) -> Data:
    """One spec of certify's with a training split, or two."""
    train, test = (certify.data.load(spec) for spec in (specs if len(specs) == 2 else (f"{specs[0]}:train", specs[0])))
    x, y, xt, yt = (torch.from_numpy(array) for array in (train.inputs, train.labels, test.inputs, test.labels))
    if quick:
        x, y, xt, yt = x[:6000], y[:6000], xt[:500], yt[:500]
    held = min(HELD_OUT, len(x) // 4)
    radii = (0.5, 1.0, 1.58) if x.shape[1] == 1 else (36 / 255, 72 / 255, 108 / 255)
    return Data((x[:-held], y[:-held]), (x[-held:], y[-held:]), (xt, yt), radii)


def train(make: Callable[[], nn.Sequential], data: Data, epochs: int, rate: float, images: int | None = None) -> tuple[nn.Sequential, float]:
    """A trained network and its seconds per epoch, of the processor; on the first `images` only, where that is given."""
    torch.manual_seed(0)
    net = make()
    shared: dict[str, Any] = {"epochs": epochs, "learning_rate": rate, "lookahead": False, "optimizer": "adam"}
    grey = data.shape[0] == 1
    recipe = (
        lipnet.Recipe(loss=DividedOffset(3.0, 0.25), **shared) if grey else lipnet.Recipe(loss=TemperedEMMA(0.6), epsilon=lipnet.EpsilonSchedule(), **shared)
    )
    x, y = (part[:images] for part in data.train)
    start = time.process_time()
    lipnet.fit(net, x, y, recipe, constants=constants if grey else pair_constants)
    return net, (time.process_time() - start) / epochs * len(data.train[0]) / len(x)


@torch.no_grad()
def logits(net: nn.Module, images: Tensor) -> Array:
    """As the network runs."""
    return torch.cat([net(part) for part in images.split(1000)]).double().numpy()


def claimed_accuracies(z: Array, labels: Tensor, pairs: Array, radii: Sequence[float]) -> list[float]:
    """The share of images whose margins exceed `r K` for every other class."""
    y = labels.numpy()
    gaps = z[np.arange(len(z)), y][:, None] - z
    others = np.arange(z.shape[1]) != y[:, None]
    return [float(((gaps > radius * pairs[y]) | ~others).all(axis=1).mean()) for radius in radii]


def measure(name: str, make: Callable[[], nn.Sequential], data: Data, epochs: int, rate: float, images: int | None = None) -> Found:
    """Train, prove and certify at one learning rate. A training that diverges has reached nothing."""
    nothing = [0.0] * (1 + len(data.radii))
    try:
        net, seconds = train(make, data, epochs, rate, images)
    except RuntimeError as error:
        print(f"  {name}, rate {rate:g}: {error}", flush=True)
        return Found(name, parameters(make()), rate, epochs, math.nan, [-1.0] * len(nothing), math.inf, math.inf, nothing, nothing)
    count = parameters(net)
    net = peers.settle(net)
    z, held_out = logits(net, data.test[0]), logits(net, data.held_out[0])
    with torch.no_grad():
        claimed = float(peers.claim(net))
    bound = peers.prove(net, data.shape)

    def accuracies(z: Array, labels: Tensor) -> list[float]:
        certificate = certify.Margin(bound).of_logits(z)
        return [certificate.accuracy(labels.numpy(), radius) for radius in (0.0, *data.radii)]

    rows = pair_distances(as_float64(peers.head_rows(net[-1])))
    by_claim = claimed_accuracies(z, data.test[1], claimed * rows, (0.0, *data.radii))
    features = float(bound.evidence["features"])
    return Found(name, count, rate, epochs, seconds, accuracies(held_out, data.held_out[1]), features, claimed, accuracies(z, data.test[1]), by_claim)


def compare(kind: str, networks: dict[str, Make], data: Data, args: argparse.Namespace) -> list[Found]:
    """Every network in turn, printed as it is found."""
    budget = args.budget or BUDGETS[kind]
    makes: dict[str, Callable[[], nn.Sequential]] = {}
    for name, make in networks.items():
        width = width_within(make, data.shape, budget)
        makes[name] = functools.partial(make, data.shape, width)
        print(f"  {name:<28} width {width:>4}, {parameters(makes[name]()):>7} parameters", flush=True)
    epochs = args.epochs or (1 if args.quick else epochs_within(makes, data, 60 * args.minutes))
    print(f"{kind}: at most {budget} parameters, {epochs} epochs, {len(data.train[0])} images to train on, {len(data.test[0])} to test on")
    print(heading(data.radii), flush=True)
    all_found = []
    for name, one in makes.items():
        first = max((measure(name, one, data, FIRST_EPOCHS, rate, FIRST_IMAGES) for rate in RATES), key=lambda found: found.chosen_by)
        found = measure(name, one, data, epochs, first.rate)
        all_found.append(found)
        print(line(found), flush=True)
    return all_found


def epochs_within(makes: dict[str, Callable[[], nn.Sequential]], data: Data, seconds: float) -> int:
    """The epochs that the network in the middle does in so many seconds, by a short run of each."""
    middle = statistics.median(train(make, data, 1, RATES[-1], images=2560)[1] for make in makes.values())
    return max(1, round(seconds / middle))


def heading(radii: Sequence[float]) -> str:
    """The head of the table."""
    shown = [f"{radius:.3g}" for radius in radii]
    columns = ["network", "parameters", "rate", "s / epoch", "L proved", "L claimed", "clean", *shown, *(f"{radius} claimed" for radius in shown)]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def line(found: Found) -> str:
    """A row of the table."""
    numbers = [f"{accuracy:.4f}" for accuracy in (*found.accuracies, *found.by_claim[1:])]
    cells = [found.name, f"{found.parameters}", f"{found.rate:g}", f"{found.seconds:.1f}", f"{found.proved:.5f}", f"{found.claimed:.5f}", *numbers]
    return f"| {' | '.join(cells)} |"


def rows_of(all_found: Sequence[Found], radii: Sequence[float]) -> list[Row]:
    """The best of ours, by the held-out images, beside each peer; the time is a goal only for the peer that is best by the held-out images."""
    trained = [one for one in all_found if math.isfinite(one.proved)]
    ours, others = [one for one in trained if one.ours], [one for one in trained if not one.ours]
    if not ours or not others:
        return []
    best, best_peer = (max(group, key=lambda found: found.chosen_by) for group in (ours, others))
    rows = []
    for peer in others:
        for i, radius in enumerate(("clean", *(f"{radius:.3g}" for radius in radii))):
            rows.append(Row(f"accuracy at {radius}: {best.name} / {peer.name}", best.accuracies[i], max(peer.accuracies[i], 1e-9), ">= 1"))
        rows.append(Row(f"seconds per epoch: {best.name} / {peer.name}", best.seconds, peer.seconds, "<= 1" if peer is best_peer else "-"))
    return rows


def main() -> None:
    """Train, prove, certify and print every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="SPEC", help="mnist:DIR or cifar10:DIR, or two data sets: to train on and to test on")
    parser.add_argument("--nets", nargs="+", choices=sorted(BUDGETS), help="which networks; by default both, and conv for images in colour")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks whose names contain one of these")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--minutes", type=float, default=2.0, help="of training for the network in the middle, where no number of epochs is given")
    parser.add_argument("--budget", type=int, help="trainable numbers")
    parser.add_argument("--quick", action="store_true", help="one epoch of few images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-code", nargs="+", default=[], metavar="NAME=DIR", help=f"checkouts of the papers' code: {', '.join(PAPERS)}")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    if len(args.data) > 2:
        parser.error("--data takes one data set with a training split, or two")
    papers = {name: Papers(name, pathlib.Path(folder)) for name, _, folder in (given.partition("=") for given in args.peer_code)}
    if unknown := set(papers) - set(PAPERS):
        parser.error(f"--peer-code knows {', '.join(PAPERS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    data = load(args.data, args.quick)
    kinds = args.nets or (["dense", "conv"] if data.shape[0] == 1 else ["conv"])
    results, all_rows = {}, []
    for kind in kinds:
        networks = {**dense(), **peers.dense(papers)} if kind == "dense" else {**convolutional(), **peers.convolutional(papers)}
        if args.only:
            networks = {name: make for name, make in networks.items() if any(part in name for part in args.only)}
        results[kind] = compare(kind, networks, data, args)
        all_rows += [dataclasses.replace(row, what=f"{kind}, {row.what}") for row in rows_of(results[kind], data.radii)]
    if all_rows:
        show(all_rows, "equal epochs and parameters", None)
    if args.json:
        found = {kind: [dataclasses.asdict(one) for one in some] for kind, some in results.items()}
        rows = [{**dataclasses.asdict(row), "ratio": row.ratio, "met": row.met} for row in all_rows]
        args.json.write_text(json.dumps({"data": args.data, "radii": data.radii, "networks": found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
