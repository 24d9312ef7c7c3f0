"""Certified accuracy at equal budget: our families and the peers, same data, epochs, number of parameters, recipe, machine and thread count, in one run.

python -m benchmarks.training --data mnist:DIR [--peer-code LBDN=DIR ...] [--minutes 2] [--json FILE]

Each network has the largest width for which its trainable numbers stay within the budget. All get the same number of epochs: `--epochs`, or as many as the
network in the middle, by seconds, does in `--minutes`. Each is trained with the better of two learning rates, chosen in a first run of a fifth of the epochs by
the certified accuracy at the middle radius on the last 5,000 training images, on which nothing is trained. The loss is the offset cross-entropy of `z / L`, L
the constant that the network's own code gives to its features: 1 for most; those that are not 1-Lipschitz are trained as if they were divided by it.

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

RATES = (1e-2, 2e-3)
HELD_OUT = 5000
BUDGETS = {"dense": 400_000, "conv": 100_000}
PAPERS = ("LBDN", "SLL", "BRONet", "LiResNet")


def dense() -> dict[str, Make]:
    """Our families with three dense layers and a head."""

    def stack(layer: Callable[[int, int], list[nn.Module]]) -> Make:
        def make(shape: Shape, width: int) -> nn.Sequential:
            sizes = (math.prod(shape), width, width, width)
            return nn.Sequential(nn.Flatten(), *(part for into, out in itertools.pairwise(sizes) for part in layer(into, out)), lipnet.UnitRowLinear(width, 10))

        return make

    def sll(shape: Shape, width: int) -> nn.Sequential:
        start = (nn.Flatten(), lipnet.ContractionLinear(math.prod(shape), width))
        return nn.Sequential(*start, lipnet.SLLLinear(width), lipnet.SLLLinear(width), lipnet.UnitRowLinear(width, 10))

    return {
        "ours, sandwich (Cayley)": stack(lambda into, out: [lipnet.SandwichLinear(into, out)]),
        "ours, sandwich (Cholesky)": stack(lambda into, out: [lipnet.SandwichLinear(into, out, orthonormalizer=lipnet.Cholesky())]),
        "ours, BRO": stack(lambda into, out: [lipnet.BROLinear(into, out), lipnet.MaxMin()]),
        "ours, Cayley": stack(lambda into, out: [lipnet.ContractionLinear(into, out), lipnet.MaxMin()]),
        "ours, SLL": sll,
    }


def convolutional() -> dict[str, Make]:
    """Our families with a layer that halves the image, two blocks there, patches, a dense layer and a head."""
    builders = {"BRO": lipnet.nets.bronet, "LiResNet": lipnet.nets.liresnet, "SLL": lipnet.nets.sll, "sandwich": lipnet.nets.lbdn}

    def make(shape: Shape, width: int, builder: Callable[..., nn.Sequential]) -> nn.Sequential:
        return builder(shape, 10, (width, 2, 4 * width, 1))

    return {f"ours, {name}": functools.partial(make, builder=builder) for name, builder in builders.items()}


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


def constants(net: nn.Module) -> Tensor:
    """L as the network's own code gives it, for each pair of the ten classes."""
    assert isinstance(net, nn.Sequential)
    value = peers.claim(net)
    return (value if isinstance(value, Tensor) else torch.tensor(value)).reshape(1, 1).expand(10, 10)


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
    chosen_by: float  # certified accuracy at the middle radius on the held-out images
    proved: float  # the constant of the features
    claimed: float
    accuracies: list[float]  # clean, and certified by our proof at each radius, on the test images
    by_claim: list[float]  # the same by the claimed constant

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
    """A trained network and its seconds per epoch; on the first `images` only, where that is given."""
    torch.manual_seed(0)
    net = make()
    loss = DividedOffset(*((3.0, 0.25) if data.shape[0] == 1 else (1.0, 0.25)))
    recipe = lipnet.Recipe(epochs=epochs, learning_rate=rate, lookahead=False, optimizer="adam", loss=loss)
    x, y = (part[:images] for part in data.train)
    start = time.perf_counter()
    lipnet.fit(net, x, y, recipe, constants=constants)
    return net, (time.perf_counter() - start) / epochs * len(data.train[0]) / len(x)


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


def measure(name: str, make: Callable[[], nn.Sequential], data: Data, epochs: int, rate: float) -> Found:
    """Train, prove and certify at one learning rate. A training that diverges has reached nothing."""
    nothing = [0.0] * (1 + len(data.radii))
    try:
        net, seconds = train(make, data, epochs, rate)
    except RuntimeError as error:
        print(f"  {name}, rate {rate:g}: {error}", flush=True)
        return Found(name, parameters(make()), rate, epochs, math.nan, -1.0, math.inf, math.inf, nothing, nothing)
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
    chosen_by = accuracies(held_out, data.held_out[1])[2]
    features = float(bound.evidence["features"])
    return Found(name, count, rate, epochs, seconds, chosen_by, features, claimed, accuracies(z, data.test[1]), by_claim)


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
        first = max((measure(name, one, data, max(1, round(epochs / 5)), rate) for rate in RATES), key=lambda found: found.chosen_by)
        found = measure(name, one, data, epochs, first.rate) if epochs > 1 else first
        all_found.append(found)
        print(line(found), flush=True)
    return all_found


def epochs_within(makes: dict[str, Callable[[], nn.Sequential]], data: Data, seconds: float) -> int:
    """The epochs that the network in the middle does in so many seconds, by a short run of each."""
    middle = statistics.median(train(make, data, 1, RATES[1], images=2560)[1] for make in makes.values())
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
    """The best of ours, by the held-out images, beside each peer, and beside the best peer at each radius."""
    ours, others = [one for one in all_found if one.ours], [one for one in all_found if not one.ours]
    if not ours or not others:
        return []
    best, best_peer = (max(group, key=lambda found: found.chosen_by) for group in (ours, others))
    rows = []
    for i, radius in enumerate(("clean", *(f"{radius:.3g}" for radius in radii))):
        peer = max(others, key=lambda found: found.accuracies[i])
        rows.append(Row(f"accuracy at {radius}: {best.name} / best peer ({peer.name})", best.accuracies[i], peer.accuracies[i], ">= 1"))
    rows.append(Row(f"seconds per epoch: {best.name} / {best_peer.name}, the best peer", best.seconds, best_peer.seconds, "<= 1"))
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
