"""Arguments that several subcommands share, and how they are read."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from certify.text import parse_radius

if TYPE_CHECKING:
    from certify.lipsdp import LipSDP, Report
    from certify.models import Model
    from certify.smoothing.schedule import Procedure


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what a model may need to be told."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="net.safetensors, net.onnx, net.pth with --arch, rnet, efficientnet-lite0, pkg.module:factory or ./file.py:factory (run that code)",
    )
    add_opening(parser)


def add_opening(parser: argparse.ArgumentParser) -> None:
    """What a model may need to be told: its architecture, whether its file may run code, and what is done to an input before the network sees it."""
    parser._negative_number_matcher = re.compile(r"-[\d.][-+\d.,eE]*$")  # so that -1,1 is a value and no option
    parser.add_argument("--input-shape", type=shape, metavar="C,H,W", help="the shape of one input of the data, for a model that does not carry it")
    parser.add_argument("--arch", metavar="NAME", help="of a file of weights: mlp, cnn_a, conv_small, ... (docs/cli.md), or pkg.module:factory (runs code)")
    parser.add_argument("--trust-file", action="store_true", help="let the file run code: a whole pickled module, TorchScript or a .pt2 loads no other way")
    parser.add_argument("--bgr", action="store_true", help="the network takes blue, green, red; the channels are turned round first")
    parser.add_argument("--input-range", type=numbers, metavar="LO,HI", help="then x in [0, 1] becomes LO + (HI - LO) x, such as 0,255 or -1,1")
    parser.add_argument("--mean", type=numbers, metavar="M,...", help="subtracted then, one number or one for each channel, in the units of --input-range")
    parser.add_argument("--std", type=numbers, metavar="S,...", help="what the difference is divided by; radii stay in the units of the data")
    parser.add_argument("--layout", choices=["nchw", "nhwc"], help="nhwc: the network takes the channels last (the data have them first)")


def load_model(args: argparse.Namespace, stored: Mapping[str, Any] | None = None) -> Model:
    """The model that these arguments name; what they leave out is taken from what is stored of an earlier one."""
    from certify import models
    from certify.cli.console import note
    from certify.errors import CertifyError

    stored = stored or {}
    for name, kind in (("model", "spec"), ("arch", "arch")):
        code = stored.get(kind)
        if getattr(args, name, None) is None and isinstance(code, str) and ":" in code and not os.path.exists(code):
            raise CertifyError(f"the folder names {code}, which would run code; if that is wanted, say so with --{name} {code}")
    if stored.get("trusted") and not args.trust_file:
        raise CertifyError(f"the folder is of {stored.get('spec')}, which ran code when it was loaded; if that is wanted again, say so with --trust-file")
    shape_of = args.input_shape or (tuple(stored["input_shape"]) if "input_shape" in stored else None)
    opening = {name: getattr(args, name, None) or stored.get(name) for name in ("arch", "mean", "std", "input_range", "layout", "bgr")}
    model = models.load(getattr(args, "model", None) or stored["spec"], shape_of, trust_file=args.trust_file, **opening)
    for sentence in model.notes:
        note(sentence)
    return model


def given_options(args: argparse.Namespace, add: Callable[[argparse._ActionsContainer], None]) -> list[str]:
    """Which of the options that `add` adds were given, that is have another value than where nothing is said."""
    parser = argparse.ArgumentParser()
    add(parser)
    return [name for name, value in vars(parser.parse_args([])).items() if getattr(args, name) != value]


def option_of(name: str) -> str:
    """An option as it is written."""
    return f"--{name.replace('_', '-')}"


_SAID = r"(?:^|(?<=got )|(?<=take )|(?<=after )|(?<=with )|(?<=for )|(?<=or )|(?<=and )|(?<=: ))"  # where a sentence speaks of an argument, and prints no value
_ARGUMENTS = (  # of Python, as a message names them, and what is said on the command line for the same
    (_SAID + "pairs=False", "--no-pairs"),
    (_SAID + "levels=None", "--levels 0"),
    (_SAID + r"Softmax\(\.\.\.\) or Sparsemax\(\.\.\.\)", "--scores softmax:T or sparsemax:T"),
    (r"\ban Exponential\(\) or a Rayleigh\(\) law", "--law exponential or rayleigh"),
    (r"\bmath\.inf\b", "inf"),
)
_OPTION = re.compile(_SAID + r"(batch|how|n0|norm|radius|seconds|solver)=(['\"]?)([-+\w.]+)\2")


def in_options(message: str, args: argparse.Namespace) -> str:
    """A message of the library in the words of the command: the options that it has in place of arguments of Python."""
    for argument, option in _ARGUMENTS:
        message = re.sub(argument, option, message)
    return _OPTION.sub(lambda found: f"{option_of(found[1])} {found[3]}" if found[1] in args else found[0], message)


def numbers(text: str) -> tuple[float, ...]:
    """`0.485,0.456,0.406` as numbers."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(number) for number in found):
        raise argparse.ArgumentTypeError(f"a list of numbers such as 0.485,0.456,0.406 is needed, got {text!r}")
    return found


def span(text: str) -> tuple[float, float]:
    """`0,1` as the two ends of a range."""
    found = numbers(text)
    if len(found) != 2 or not found[0] < found[1]:
        raise argparse.ArgumentTypeError(f"a range is its smallest and its largest number, such as 0,1, got {text!r}")
    return found[0], found[1]


def add_lipsdp(group: argparse._ArgumentGroup) -> None:
    """The options of LipSDP."""
    group.add_argument("--norm", choices=["1", "2", "inf"], default="2", help="of the inputs (default 2); 1 and 2 to l2, inf to l-infinity")
    group.add_argument(
        "--solver",
        default="newton",
        metavar="NAME",
        help="newton (default), first-order, split, closed-form, rescaled, scs, clarabel, or one that cvxpy finds (MOSEK, ...); the proof is always ours",
    )
    group.add_argument("--device", default="cpu", help="where the first-order solver runs (default cpu)")
    group.add_argument("--multipliers", choices=["neuron", "layer"], default="neuron", help="one for each nonlinearity (default) or one for each layer")
    group.add_argument("--no-pairs", action="store_true", help="no program for each difference of two outputs (faster, smaller radii)")
    group.add_argument("--tolerance", type=float, default=1e-7, metavar="T", help="relative gap at which the solver may stop (default 1e-7)")
    group.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="time limit of each program; what it reached is proved")


def lipsdp(args: argparse.Namespace, report: Report | None) -> LipSDP:
    """The method that these options are."""
    from certify.lipsdp import LipSDP

    return LipSDP(
        solver=args.solver,
        multipliers=args.multipliers,
        norm=float(args.norm),
        pairs=not args.no_pairs,
        tolerance=args.tolerance,
        seconds=args.seconds,
        device=args.device,
        report=report,
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
    """--limit, --indices and --shard."""
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--limit", type=int, metavar="N", help="the first N inputs only")
    some.add_argument("--indices", type=indices, metavar="A:B:C", help="these inputs only")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="do every N-th input, from the I-th on (default: this rank of torchrun or Slurm)")


def add_eps(parser: argparse.ArgumentParser) -> None:
    """--eps."""
    usual = "36/255, 72/255, 108/255 and 1, in the maximum norm 1/255, 2/255 and 8/255"
    parser.add_argument("--eps", type=radii, action="extend", metavar="R,...", help=f"radii of the table, such as 36/255,0.5 (default {usual})")


def add_radii(parser: argparse.ArgumentParser) -> None:
    """--eps and --fail-under."""
    add_eps(parser)
    parser.add_argument("--fail-under", type=gate, action="append", default=[], metavar="ACC@R", help="exit with 1 if the certified accuracy at R is below ACC")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def add_setting(group: argparse._ArgumentGroup) -> None:
    """--sigma, --n, --alpha and --n0 of a published log, which does not say them itself."""
    group.add_argument("--sigma", type=float, metavar="S", help="the standard deviation of the noise, in the units of the radii")
    group.add_argument("--n", type=int, metavar="N", help="the noisy copies of each input")
    group.add_argument("--alpha", type=float, metavar="A", help="each certificate fails with at most this probability (one-sided, as --alpha of certify.py)")
    group.add_argument("--n0", type=int, metavar="N", help="the copies that chose the class (default 100)")


def setting(args: argparse.Namespace) -> Procedure:
    """The procedure that these say. Raises CertifyError for what is left out."""
    from certify.errors import CertifyError
    from certify.smoothing.logs import cohen

    for name in ("sigma", "n", "alpha"):
        if getattr(args, name) is None:
            raise CertifyError(f"a log does not say how it was made: give --{name} too, such as --sigma 0.5 --n 100000 --alpha 0.001")
    return cohen(args.sigma, args.n, args.alpha, 100 if args.n0 is None else args.n0)


def shape(text: str) -> tuple[int, ...]:
    """`1,28,28` -> (1, 28, 28)."""
    if not re.fullmatch(r"\d+(,\d+)*", text) or "0" in text.split(","):
        raise argparse.ArgumentTypeError(f"a shape is a list of positive sizes such as 1,28,28, got {text!r}")
    return tuple(int(size) for size in text.split(","))


def radius(text: str) -> float:
    """`36/255` or `0.25` as a float64, rounded to nearest."""
    try:
        return parse_radius(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def radii(text: str) -> list[tuple[str, float]]:
    """`36/255,0.5` as pairs of text and value."""
    return [(part.strip(), radius(part)) for part in text.split(",")]


def gate(text: str) -> tuple[float, str, float]:
    """`0.40@36/255` as accuracy, text and value of the radius."""
    accuracy, at, where = text.partition("@")
    try:
        value = float(accuracy)
    except ValueError:
        value = -1.0
    if not at or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a gate is ACCURACY@RADIUS such as 0.40@36/255, with an accuracy in [0, 1], got {text!r}")
    return value, where, radius(where)


def shard(text: str) -> tuple[int, int]:
    """`0/4` as index and count."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"a shard is I/N with I in 0 .. N-1, such as 0/4, got {text!r}")
    return int(match[1]), int(match[2])


def shard_here() -> tuple[int, int]:
    """The shard of this process among those that torchrun or Slurm started together; all of the inputs without them."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        found = f"{os.environ.get(rank, '')}/{os.environ.get(size, '')}"
        if re.fullmatch(r"\d+/\d+", found):
            return shard(found)
    return 0, 1


def indices(text: str) -> slice:
    """`0:1000:20` as a slice; `7` is one index."""
    parts = text.split(":")
    if not all(re.fullmatch(r"\d*", part) for part in parts) or len(parts) > 3 or text in ("", ":", "::") or (len(parts) == 3 and parts[2] in ("", "0")):
        raise argparse.ArgumentTypeError(f"indices are START:STOP:STEP such as 0:1000:20, got {text!r}")
    if len(parts) == 1:
        return slice(int(text), int(text) + 1)
    return slice(*(int(part) if part else None for part in parts))
