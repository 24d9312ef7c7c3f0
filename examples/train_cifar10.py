"""A convolutional network of one family, trained on CIFAR-10 (or images like it), saved, certified on test images, reported.

    python examples/train_cifar10.py data/cifar10 --family bronet --size small -o runs/cifar10

The folder holds CIFAR-10 in its binary version, or the sub-folders `train` and `test`, each with one sub-folder of images for each class. Stopped at any
time, the same command goes on from the last epoch. Training is `lipnet.train.fit`; the accuracies it shows are by the constants that the layers declare.
All that follows are the commands `certify run` and `certify report`, and those prove theirs.
"""

import argparse
import pathlib
import sys

from _train import add_arguments, certify_and_report, run, tensors, train
from torch import nn

import certify.data
import lipnet
from lipnet import nets
from lipnet.augment import Crop, Flip
from lipnet.train import EpsilonSchedule, Recipe

RADII = (36 / 255, 72 / 255, 108 / 255)
FAMILIES = {"bronet": nets.bronet, "liresnet": nets.liresnet, "sll": nets.sll, "lbdn": nets.lbdn}


def specs(folder: str) -> tuple[str, str]:
    """The data sets of certify's that a folder holds, to train on and to test on."""
    root = pathlib.Path(folder).expanduser()
    if (root / "train").is_dir() and (root / "test").is_dir():
        return f"folder:{root / 'train'}", f"folder:{root / 'test'}"
    return f"cifar10:{folder}:train", f"cifar10:{folder}"


def recipe(args: argparse.Namespace) -> Recipe:
    """EMMA asks for a radius that grows over the first half of the training; the offset cross-entropy asks for the same margin throughout."""
    emma = args.loss == "emma"
    return Recipe(
        epochs=args.epochs,
        batch=args.batch,
        learning_rate=args.rate,
        warmup_epochs=min(5.0, args.epochs / 10),
        clip=3.0,
        lookahead=args.epochs >= 50,  # slower over few epochs
        loss=lipnet.EMMA() if emma else lipnet.OffsetCrossEntropy(offset=args.offset, temperature=args.temperature),
        epsilon=EpsilonSchedule(high=args.radius) if emma else None,
        augment=[Crop(args.crop), Flip()] if args.crop else [Flip()],
    )


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Train, certify and report one convolutional network on CIFAR-10.")
    parser.add_argument("data", metavar="DIR", help="the folder with the binary version of CIFAR-10, or with folders train and test of images by class")
    add_arguments(parser, "runs/cifar10", epochs=50)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="bronet")
    parser.add_argument("--size", choices=["small", "medium", "large"], default="small")
    parser.add_argument("--loss", choices=["emma", "offset"], default="emma")
    parser.add_argument("--rate", type=float, default=2e-3, help="the learning rate after the warm-up")
    parser.add_argument("--radius", type=float, default=3.0, help="with emma: the radius that it asks for in the end, in units of 36/255")
    parser.add_argument("--offset", type=float, default=1.0, help="with offset: the margin that the loss asks for")
    parser.add_argument("--temperature", type=float, default=0.25, help="with offset: of the loss; the smaller, the sharper the margin")
    parser.add_argument("--crop", type=int, default=4, help="move each training image by up to so many pixels, 0: leave them")
    args = parser.parse_args()
    if args.family == "liresnet" and args.loss == "offset":
        parser.error("liresnet is not 1-Lipschitz, so its constants must be in the loss; use --loss emma")
    return args


def script(args: argparse.Namespace) -> int:
    """Train, save, certify and report."""
    train_spec, test_spec = specs(args.data)
    images, test_images = certify.data.load(train_spec), certify.data.load(test_spec)
    if images.classes is None or images.classes != test_images.classes:
        raise ValueError(f"the classes to train on are {images.classes}, those to test on {test_images.classes}; they must be the same")
    net: nn.Module = FAMILIES[args.family](images.inputs.shape[1:], len(images.classes), args.size)
    train(args, net, tensors(images), tensors(test_images), recipe(args), RADII)
    return certify_and_report(args, net, test_images, RADII)


if __name__ == "__main__":
    sys.exit(run("train_cifar10", arguments(), script))
