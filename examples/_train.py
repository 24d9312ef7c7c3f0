"""What the training scripts share: data as tensors, a live line, the end of a script, and the commands that certify and report."""

import argparse
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import certify.data
import lipnet
from certify.cli import main as certify_command
from lipnet.train import EpochReport, Recipe, fit, print_progress


def add_arguments(parser: argparse.ArgumentParser, output: str, epochs: int) -> None:
    """The arguments of every script."""
    parser.add_argument("-o", "--output", type=pathlib.Path, default=pathlib.Path(output), help="where training state, checkpoint and report go")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--limit", type=int, default=1000, help="certify so many test images in the end, evenly spread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; with 1, a resumed training ends in the same bits as one that was not stopped")


def tensors(dataset: certify.data.Dataset) -> tuple[Tensor, Tensor]:
    """Images and labels of a data set of certify's."""
    return torch.from_numpy(dataset.inputs), torch.from_numpy(dataset.labels)


def train(
    args: argparse.Namespace, net: nn.Module, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor], recipe: Recipe, radii: Sequence[float]
) -> None:
    """Train with a live line on stderr, or with one line for each epoch where it is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"train {args.family}", total=args.epochs, shown="")

        def show(report: EpochReport) -> None:
            certified = " ".join(f"{100 * accuracy:.1f}@{radius:.3g}" for radius, accuracy in zip(radii, report.certified, strict=True))
            progress.update(task, completed=report.epoch, shown=f"clean {100 * (report.clean or math.nan):.1f} certified {certified} %")

        shown = show if console.is_terminal else print_progress
        fit(net, *train_set, recipe, validation=test_set, radii=radii, seed=args.seed, folder=args.output, progress=shown)


def certify_and_report(args: argparse.Namespace, net: nn.Module, data: certify.data.Dataset, radii: Sequence[float]) -> int:
    """Save the network, then `certify run` on test images and `certify report`; returns the exit code of the last command."""
    model, folder, eps = args.output / f"{args.family}.safetensors", args.output / "results", ",".join(f"{radius:.10g}" for radius in radii)
    lipnet.save(net, model, input_shape=data.inputs.shape[1:], input_range=(0.0, 1.0), classes=data.classes)
    shutil.rmtree(folder, ignore_errors=True)  # results of an earlier training are of other weights
    step = max(1, len(data) // max(1, args.limit))  # images in folders are sorted by class
    code = certify_command(["run", str(model), data.spec, "-o", str(folder), "--eps", eps, "--indices", f"0:{step * args.limit}:{step}", "--quiet"])
    if code:
        return code
    report = args.output / "report.html"
    code = certify_command(["report", str(folder), "--eps", eps, "--html", str(report)])
    Console(stderr=True).print(f"report: {report}")
    return code


def run(name: str, args: argparse.Namespace, script: Callable[[argparse.Namespace], int]) -> int:
    """The exit code of a script: its own; 2 with one sentence if it could not be done, 130 if it was interrupted."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    console = Console(stderr=True)
    try:
        return script(args)
    except KeyboardInterrupt:
        console.print(f"{name}: interrupted; the state after the last epoch is kept, repeat the command to go on")
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"{name}: error: {error}", markup=False, soft_wrap=True)
        return 2
