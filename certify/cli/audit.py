"""`certify audit MODEL DATA -o DIR`: every certifier that applies, and attacks, each in a results folder of its own, and one report of all."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

from certify.cli.arguments import add_json, add_model, add_opening, add_radii, add_selection, load_model, span

HELP = "Certify and attack a model by all methods that apply, within a budget of time, and write one report."
EPILOG = """examples:
  certify audit net.safetensors digits -o runs/audit
  certify audit mnist_cnn_a_adv.model mnist:data/mnist --arch cnn_a -o runs/cnn_a --norm inf --within 0,1 --budget 20m
  certify audit efficientnet-lite0 folder:pictures -o runs/lite0 --sigma 0.12 --n 1000"""

_SOLVED, _SIGNALS = 400, 2000  # of a matrix inequality: what a solver works on, and with all inputs; a program of that size takes seconds
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, DATA, where to, how long, and what to ask."""
    add_model(parser)
    parser.add_argument("data", metavar="DATA", help="digits, file.npz, mnist:DIR, cifar10:DIR, folder:DIR (docs/cli.md)")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=pathlib.Path, help="a results folder for each method, and report.html; resumed")
    parser.add_argument("--budget", type=duration, default=600.0, metavar="T", help="about so long, such as 90s, 10m or 2h (default 10m); repeat to go on")
    parser.add_argument("--norm", choices=["2", "inf"], default="2", help="of the radii (default 2)")
    add_selection(parser)
    parser.add_argument("--within", type=span, metavar="LO,HI", help="local radii are of inputs in this range only, such as 0,1; attacks then keep to [0, 1]")
    parser.add_argument("--skip", type=lambda text: tuple(text.split(",")), default=(), metavar="NAME,...", help=f"leave out some of: {', '.join(NAMES)}")
    group = parser.add_argument_group("smoothing (left out without --sigma)")
    group.add_argument("--sigma", type=float, metavar="S", help="the standard deviation of normal noise, in the units of the data")
    group.add_argument("--levels", type=int, metavar="G", help="inputs are multiples of 1/G (default 255); 0: they are not, and noise is float")
    group.add_argument("--n", "--copies", type=int, default=1000, metavar="N", help="noisy copies of each input (default 1000); torchrun wants --copies")
    group.add_argument("--seed", type=int, default=0, help="of noise and attacks")
    group.add_argument("--device", default="cpu", metavar="NAME", help="what the network runs on here: cpu (default), or a GPU: cuda, cuda:1")
    add_radii(parser)
    add_json(parser)


def duration(text: str) -> float:
    """`90s`, `10m`, `2h` or seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not match or not 0 < float(match[1]) < math.inf:
        raise argparse.ArgumentTypeError(f"a time is such as 90s, 10m or 2h, got {text!r}")
    return float(match[1]) * _SECONDS[match[2] or "s"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One method: how long it may take beside the others, its command with arguments of its own, and those that it takes from the audit."""

    share: float
    command: str
    arguments: tuple[str, ...]
    takes: tuple[str, ...] = ()


STAGES = {
    "attack": Stage(2, "attack", ("--steps", "40"), ("norm", "seed", "clip")),
    "margin": Stage(1, "run", ("--method", "margin")),
    "lipsdp": Stage(2, "run", ("--method", "margin", "--bound", "lipsdp"), ("norm",)),
    "frequency": Stage(2, "run", ("--method", "margin", "--bound", "frequency")),
    "local": Stage(4, "run", ("--method", "local"), ("norm", "within")),
    "smoothing": Stage(4, "run", ("--method", "smoothing"), ("sigma", "levels", "n", "seed", "device")),
}
NAMES = tuple(STAGES)


def run(args: argparse.Namespace) -> int:
    """Look at the model, run what applies, one after the other, and show all of it."""
    from certify.cli.console import notes_once

    with notes_once():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from certify import data
    from certify.cli import report
    from certify.cli.console import note
    from certify.cli.inspect import certifiers
    from certify.cli.run import note_labels, selection_of, smoothing_of
    from certify.device import usable
    from certify.errors import CertifyError
    from certify.results import OtherRun, writing

    if unknown := set(args.skip) - set(NAMES):
        raise CertifyError(f"--skip knows {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    end = time.monotonic() + args.budget
    model = load_model(args)
    dataset = data.load(args.data, model.shape)
    count = len(selection := selection_of(args, len(dataset)))
    note_labels(model, dataset, selection)
    note(f"{model.spec}: {model.parameters:,} parameters, {count} inputs of {args.data}, about {args.budget:.0f} seconds")
    args.clip = args.within is not None and args.within[0] <= 0 and args.within[1] >= 1 and model.input_range in (None, (0.0, 1.0))
    if args.within is not None and not args.clip:
        note("attacks can be kept in [0, 1] only, which is not the range here: they are not, and local radii are not compared with them")
    seen = certifiers(model)
    left_out = {name: why for name in NAMES if (why := _left_out(name, args, seen))}
    for name, why in left_out.items():
        note(f"{name} is left out: {why}")
    chosen = [name for name in NAMES if name not in left_out]
    if not chosen:
        raise CertifyError(f"{args.model}: no method applies that is not skipped; certify inspect names what stands in the way")
    if "smoothing" in chosen:
        usable(args.device)
        smoothing_of(_arguments("smoothing", args), model.shape).procedure(model.shape).start(2)  # a sigma that is none is not to be found last
    with writing(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    for position, name in enumerate(chosen):
        share = STAGES[name].share / sum(STAGES[other].share for other in chosen[position:])
        seconds = max(1.0, share * (end - time.monotonic()))
        note(f"{name}: up to {seconds:.0f} seconds")
        try:
            done = _fill(name, args, seconds, count)
        except OtherRun as error:
            raise CertifyError(f"{name}: {error}") from error
        except CertifyError as error:
            raise CertifyError(f"{name}: {error}; to audit by the others, add --skip {','.join([*args.skip, name])}") from error
        if not done:
            note(f"{name}: not all inputs are done; repeat the command, or raise --budget, to go on")
    folders = [args.output / name for name in chosen]
    code = report.run(argparse.Namespace(folders=folders, html=args.output / "report.html", tsv=None, eps=args.eps, fail_under=args.fail_under, json=args.json))
    note(f"the report is {args.output / 'report.html'}")
    return code


def _left_out(name: str, args: argparse.Namespace, seen: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a method is not run; nothing where it is."""
    verdict = seen[name] if name != "attack" else seen["margin"] if seen["margin"]["applies"] else seen["smoothing"]  # whatever can be run can be attacked
    if name in args.skip:
        return "as --skip asks"
    if name == "smoothing" and args.sigma is None:
        return "give --sigma, in the units of the data; 0.12 is a first choice for pictures in [0, 1] and networks that were not trained with noise"
    if args.norm == "inf" and name in ("margin", "frequency", "smoothing"):
        return "its radii are in l2; repeat with --norm 2 into another folder"
    if not verdict["applies"]:
        problems = verdict["problems"]
        return problems[0] + (f" (and {len(problems) - 1} more: certify inspect names them)" if len(problems) > 1 else "")
    if name == "lipsdp" and not _is_solved(verdict):
        size = (
            "more signals than are looked at" if verdict["signals"] is None else f"{verdict['signals']:,} signals, {verdict['solved']:,} of them to solve for"
        )
        return f"its matrix inequality has {size}, and an audit solves for up to {_SOLVED}; certify run --bound lipsdp takes the time it needs"
    whole = "lipsdp" not in args.skip and _is_solved(seen["lipsdp"])
    return "lipsdp applies, and is tighter" if name == "frequency" and whole else ""


def _is_solved(lipsdp: Mapping[str, Any]) -> bool:
    """Whether an audit runs LipSDP, by what `inspect` says of it. By sizes and not by predicted times: a repeated audit is to decide the same."""
    return bool(lipsdp["applies"]) and lipsdp["signals"] is not None and lipsdp["solved"] <= _SOLVED and lipsdp["signals"] <= _SIGNALS


def _fill(name: str, args: argparse.Namespace, seconds: float, count: int) -> bool:
    """Run one method into its folder, as its own command would, for so long; says whether all inputs are done."""
    import importlib

    made = _arguments(name, args)
    if name == "local":
        made.seconds = max(1.0, seconds / count)
    done: bool = importlib.import_module(f"certify.cli.{STAGES[name].command}").fill(made, time.monotonic() + seconds)
    return done


def _arguments(name: str, args: argparse.Namespace) -> argparse.Namespace:
    """Those of a method's own command."""
    import importlib

    stage = STAGES[name]
    parser = argparse.ArgumentParser()
    importlib.import_module(f"certify.cli.{stage.command}").add_arguments(parser)
    made = parser.parse_args([args.model, args.data, "-o", str(args.output / name), "--quiet", *stage.arguments])
    opening = argparse.ArgumentParser()
    add_opening(opening)
    passed = {*vars(opening.parse_args([])), "limit", "indices", "shard", *stage.takes}
    for option in passed:
        setattr(made, option, getattr(args, option))
    return made
