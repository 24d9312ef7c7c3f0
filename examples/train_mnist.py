"""A dense network of one family, trained on MNIST for large certified radii, saved, certified on test images, reported.

    python examples/train_mnist.py data/mnist --family bro -o runs/mnist

The folder holds the four files of MNIST. Stopped at any time, the same command goes on from the last epoch. Training is `lipnet.train.fit`; the accuracies
it shows are by the constants that the layers declare. All that follows are the commands `certify run` and `certify report`, and those prove theirs.
"""

import argparse
import sys
from collections.abc import Callable

from _train import add_arguments, certify_and_report, run, tensors, train
from torch import nn

import certify.data
import lipnet
from lipnet.augment import Crop
from lipnet.train import Recipe

RADII = (0.5, 1.0, 1.58)
FAMILIES: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "sandwich": lambda inputs, width: [lipnet.SandwichLinear(inputs, width)],
    "bro": lambda inputs, width: [lipnet.BROLinear(inputs, width), lipnet.MaxMin()],
    "ldlt": lambda inputs, width: [lipnet.LDLTBlock(inputs, width, hidden=(width,))],
    "gershgorin": lambda inputs, width: [lipnet.GershgorinBlock(inputs, width, hidden=(width,))],
}


def network(family: str, width: int, depth: int) -> nn.Module:
    """`depth` layers of a family, and a head with rows of norm 1."""
    sizes = [784] + [width] * depth
    layers = [layer for inputs in sizes[:-1] for layer in FAMILIES[family](inputs, width)]
    return nn.Sequential(nn.Flatten(), *layers, lipnet.UnitRowLinear(width, 10))


def recipe(args: argparse.Namespace) -> Recipe:
    """Offset cross-entropy: the margin that it asks for is what certifies at a large radius."""
    return Recipe(
        epochs=args.epochs,
        batch=args.batch,
        learning_rate=args.rate,
        warmup_epochs=min(1.0, args.epochs / 10),
        clip=3.0,
        lookahead=False,  # slower over few epochs
        loss=lipnet.OffsetCrossEntropy(offset=args.offset, temperature=args.temperature),
        augment=[Crop(args.shift)] if args.shift else [],
    )


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Train, certify and report one dense network on MNIST.")
    parser.add_argument("data", metavar="DIR", help="the folder with the four files of MNIST")
    add_arguments(parser, "runs/mnist", epochs=15)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="bro")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3, help="layers before the last one")
    parser.add_argument("--rate", type=float, default=1e-2, help="the learning rate after the warm-up")
    parser.add_argument("--offset", type=float, default=2.0, help="the margin that the loss asks for")
    parser.add_argument("--temperature", type=float, default=0.25, help="of the loss; the smaller, the sharper the margin")
    parser.add_argument("--shift", type=int, default=0, help="move each training image by up to so many pixels, 0: leave them")
    return parser.parse_args()


def script(args: argparse.Namespace) -> int:
    """Train, save, certify and report."""
    net = network(args.family, args.width, args.depth)
    images, test_images = certify.data.load(f"mnist:{args.data}:train"), certify.data.load(f"mnist:{args.data}")
    train(args, net, tensors(images), tensors(test_images), recipe(args), RADII)
    return certify_and_report(args, net, test_images, RADII)


if __name__ == "__main__":
    sys.exit(run("train_mnist", arguments(), script))
