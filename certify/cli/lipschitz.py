"""`certify lipschitz MODEL`: a proved Lipschitz constant."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import time
from typing import TYPE_CHECKING, Any

from certify.cli.arguments import add_json, add_lipsdp, add_model, given_options, lipsdp, load_model, option_of, radius

if TYPE_CHECKING:
    from certify.bound import Bound, Domain
    from certify.methods import LipschitzMethod
    from certify.models import Model
    from sdp import Progress

HELP = "Prove a Lipschitz constant of a model, everywhere or around one input."
EPILOG = """examples:
  certify lipschitz runs/demo/bro.safetensors --layers
  certify lipschitz net.safetensors --method lipsdp
  certify lipschitz cnn.safetensors --method frequency
  certify lipschitz net.safetensors --method lipsdp --norm inf --around digits --index 3 --radius 0.1
  certify lipschitz cnn.safetensors --method local --norm inf --around digits --index 3 --radius 2/255"""


_QUICK, _AT_MOST = 10.0, 60.0  # seconds that `auto` is ready to wait for LipSDP, as predicted; and for which it waits where the prediction is wrong


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the method and what to print."""
    add_model(parser)
    parser.add_argument(
        "--method",
        choices=["layerwise", "lipsdp", "frequency", "local", "auto"],
        default="layerwise",
        help="layerwise: products along chains, sums over branches; lipsdp: a semidefinite program over the whole network, never looser; "
        "frequency: the same for convolutional chains, one program for all frequencies, at sizes that lipsdp cannot hold (docs/lipsdp.md); "
        "local: of all Jacobians around one input (docs/local.md); auto: local with --around, else lipsdp where it is quick, else layerwise",
    )
    _add_options(parser)
    parser.add_argument("--layers", action="store_true", help="print the bound of each layer too")
    add_json(parser)


def _add_options(parser: argparse._ActionsContainer) -> None:
    """Those of some of the methods."""
    add_lipsdp(parser.add_argument_group("with --method lipsdp (--norm and --no-pairs with local too, --tolerance with frequency, --seconds with both)"))
    parser.add_argument("--save-proof", type=pathlib.Path, metavar="FILE", help="with --method lipsdp: write what sdp/check.py needs to check the number alone")
    around = parser.add_argument_group("with --method lipsdp or local, around one input")
    around.add_argument("--around", metavar="DATA", help="a data set: the bound is for the ball around one of its inputs")
    around.add_argument("--index", type=int, default=0, metavar="I", help="which input (default 0)")
    around.add_argument(
        "--how",
        choices=["auto", "crown", "sdp", "complete", "interval"],
        default="auto",
        help="local: bounds row by row (crown); from l2, by LipSDP among the gates that are undecided there (sdp); by branch and bound until an example meets "
        "them (complete, up to --seconds, at most 60); by intervals, however many gates are undecided (interval); or as their count says (auto)",
    )
    around.add_argument("--radius", type=radius, metavar="R", help="of the ball, in the norm of --norm")


def run(args: argparse.Namespace) -> int:
    """Print the bound, rounded up, with what it assumes."""
    from certify.cli.console import note, out, print_json
    from certify.errors import CertifyError
    from certify.text import up_text

    _refuse_options_of_others(args)
    model, at_most = load_model(args), math.inf
    if args.method == "auto":
        at_most = _AT_MOST if args.around is None and args.seconds == math.inf else math.inf
        args.method, why = _picked(args, model)
        if args.method == "layerwise" and args.norm != "2":
            raise CertifyError(f"--norm {args.norm}: {why}, and layerwise bounds are from l2 only; say --method lipsdp, or give a ball (--around)")
        note(f"auto takes {args.method}: {why}")
    domain, where = _domain(args, model)
    bound = _bound(args, model, domain, at_most)
    proved = None if args.save_proof is None else _save(args, model, bound)
    if args.json:
        about = bound_json(bound)
        saved = {} if proved is None else {"proof": {"file": str(args.save_proof), "value": proved, "hex": proved.hex()}}
        print_json({"model": model.spec, "sha256": model.sha256, "bound": {**about, "domain": where} if args.around else about, **saved})
        return 0
    console = out()
    p, q = bound.norm
    how = {"lipsdp": _lipsdp_text, "local": _local_text}.get(args.method, lambda bound: bound.method)(bound)
    console.print(f"{model.spec}   Lipschitz constant at most {up_text(bound.value)} (l{p:g} to l{q:g}, {where}; proof, {how})", soft_wrap=True, markup=False)
    if bound.pairs is not None:
        console.print(f"  differences of two outputs: at most {up_text(float(bound.pairs.max()))}")
    if proved is not None:
        console.print(
            f"  proof of {up_text(proved)} written to {args.save_proof}; python sdp/check.py {args.save_proof} checks it alone", soft_wrap=True, markup=False
        )
    if args.layers:
        for line in _layers(args, model, bound):
            console.print(line, markup=False, soft_wrap=True)
    for assumption in sorted(bound.assumptions, key=lambda a: a.name):
        console.print(f"  assumes {assumption.name}: {assumption.value}", soft_wrap=True)
    return 0


_OPTIONS = {  # what each method takes beside those of all
    "layerwise": (),
    "frequency": ("tolerance", "seconds"),
    "lipsdp": ("norm", "solver", "device", "multipliers", "no_pairs", "tolerance", "seconds", "save_proof", "around", "index", "radius"),
    "local": ("norm", "no_pairs", "seconds", "how", "around", "index", "radius"),
}


def _refuse_options_of_others(args: argparse.Namespace) -> None:
    """A constant in another norm than the one that was asked for, say, is not what it is taken for."""
    from certify.errors import CertifyError

    own = {name for method, names in _OPTIONS.items() for name in names if args.method in (method, "auto")}
    for name in given_options(args, _add_options):
        if name not in own:
            methods = " or ".join(method for method, names in _OPTIONS.items() if name in names)
            raise CertifyError(f"{option_of(name)} is for --method {methods}, and the method is {args.method}; say which of the two is meant")
    if args.around is None and (args.index or args.radius is not None or args.how != "auto"):
        raise CertifyError("--index, --radius and --how are of a ball around an input; name the data set with --around, such as --around digits --index 3")


def _picked(args: argparse.Namespace, model: Model) -> tuple[str, str]:
    """The method that `auto` stands for, and why."""
    from certify.cli.inspect import duration_text, lipsdp_seconds, verdicts_of_graph

    seen = verdicts_of_graph(model)
    signals = seen["lipsdp"].get("signals")
    if args.around is not None:
        if seen["local"]["applies"]:
            return "local", "it is around one input, and the count of gates that are undecided there says how"
        return "lipsdp", f"it is around one input, and local does not apply ({seen['local']['problems'][0]})"
    if not seen["lipsdp"]["applies"]:
        return "layerwise", f"lipsdp does not apply ({seen['lipsdp']['problems'][0]})"
    if signals is None:
        return "layerwise", "the matrices of lipsdp are too large to look at here"
    norm, programs = float(args.norm), f"the matrix inequality of lipsdp has {signals:,} signals, and"
    whole, alone = (lipsdp_seconds(seen["lipsdp"], norm, pairs) for pairs in (True, False))
    if alone > _QUICK:
        return "layerwise", f"{programs} with --method lipsdp it would take {duration_text(alone)} here"
    if whole > _QUICK and not args.no_pairs:
        args.no_pairs = True
        return (
            "lipsdp",
            f"{programs} it takes {duration_text(alone)} here without the differences of two outputs, with them (--method lipsdp) {duration_text(whole)}",
        )
    return "lipsdp", f"{programs} it takes {duration_text(alone if args.no_pairs else whole)} here"


def _bound(args: argparse.Namespace, model: Model, domain: Domain, at_most: float) -> Bound:
    """By the method that was asked for, with its progress; by LipSDP, for so many seconds."""
    from certify.cli.console import live
    from certify.frequency import LipSDPFrequency
    from certify.local.method import Local
    from certify.methods import Layerwise, lipschitz

    if args.method != "lipsdp":
        made: LipschitzMethod = Layerwise()
        if args.method == "frequency":
            made = LipSDPFrequency(args.tolerance, args.seconds)
        elif args.method == "local":
            made = Local(float(args.norm), pairs=not args.no_pairs, how=args.how, seconds=min(args.seconds, 60.0))
        return lipschitz(model.net, made, input_shape=model.shape, domain=domain)
    with live() as say:
        method = lipsdp(args, lambda what, progress: say(progress_text(what, progress)))
        method = dataclasses.replace(method, until=time.monotonic() + at_most)
        return lipschitz(model.net, method, input_shape=model.shape, domain=domain)


def _save(args: argparse.Namespace, model: Model, bound: Bound) -> float:
    """The proof file; returns the constant that it proves."""
    from certify.errors import CertifyError
    from certify.lipsdp import save_proof

    if args.method != "lipsdp":
        raise CertifyError(f"--save-proof is for --method lipsdp; --method {args.method} has no single matrix inequality to write down")
    about = {"model": model.spec, "network": str(bound.evidence.get("network"))}
    return save_proof(bound, args.save_proof, {**about, "model_sha256": model.sha256} if args.model.endswith(".safetensors") else about)


def _domain(args: argparse.Namespace, model: Model) -> tuple[Domain, str]:
    """Where the bound is to hold, and that in words. Raises CertifyError for what does not go together."""
    from certify import data
    from certify.bound import Ball, Everywhere
    from certify.errors import CertifyError

    if args.around is None:
        if args.method == "local":
            raise CertifyError("--method local is for inputs near each other; name a ball with --around, such as --around digits --index 3 --radius 0.1")
        return Everywhere(), "everywhere"
    if args.radius is None:
        raise CertifyError("--around needs the radius of the ball too, such as --radius 0.1")
    dataset = data.load(args.around, model.shape)
    if not 0 <= args.index < len(dataset):
        raise CertifyError(f"{args.around} has the inputs 0 to {len(dataset) - 1}, got --index {args.index}")
    p = float(args.norm)
    return Ball(dataset.inputs[args.index].astype("float64"), args.radius, p), f"within {args.radius:g} of input {args.index} of {args.around} in l{p:g}"


def progress_text(what: str, progress: Progress) -> str:
    """One line of a solver's progress."""
    gap = f"within {100 * progress.gap:.2g} % of the optimum" if math.isfinite(progress.gap) else "not near the optimum yet"
    return f"{what}: step {progress.iteration}, {progress.lipschitz:.6g}, {gap}, {progress.seconds:.0f} s (Ctrl-C proves what there is)"


def _lipsdp_text(bound: Bound) -> str:
    """How the number came about."""
    from certify.text import up_text

    about = bound.evidence
    parts = [f"LipSDP with {about['nonlinearities']} nonlinearities", str(about["status"])]
    if about["eliminated"]:
        parts.append(f"{about['eliminated']} that do not bend there")
    if math.isfinite(about["gap"]):
        parts.append(f"within {100 * about['gap']:.1g} % of the program's optimum")
    parts.append(f"layer by layer, everywhere and from l2, {up_text(about['layerwise'])}")
    return ", ".join(parts)


def _local_text(bound: Bound) -> str:
    """How the number came about."""
    from certify.text import down_text, up_text

    about = bound.evidence
    ways = {"crown": "row by row", "sdp": "by LipSDP among the undecided gates", "interval": "by intervals"}
    ways["complete"] = f"by branch and bound{', and all outputs together by LipSDP' * (bound.norm[0] == 2)}, {about.get('nodes')} nodes"
    parts = [f"all Jacobians there, {ways[about['how']]}", f"{about['undecided']} of {about['gates']} gates undecided"]
    if "lower" in about:
        parts.append(f"one output reaches {down_text(about['lower'])}{'' if about['done'] else ', the search is not done'}")
    if about["layerwise"] is not None:
        parts.append(f"layer by layer and everywhere {up_text(about['layerwise'])}")
    return ", ".join(parts)


def _layers(args: argparse.Namespace, model: Model, bound: Bound) -> list[str]:
    """A table of the layers: each alone, and what LipSDP gave to it."""
    from certify.graph import Graph
    from certify.methods import Layerwise
    from certify.text import up_text

    if args.method != "lipsdp":
        return [f"  {'  ' * depth + (part.name or '-'):<12} {up_text(part.value):<14} {part.method}" for depth, part in bound.table()]
    from certify.bound import Everywhere

    alone = Layerwise().bound(Graph.of(model.net, model.shape), Everywhere())
    leaves = {name: (first, last) for name, first, last in bound.evidence["leaves"]}
    multipliers = bound.evidence["multipliers"]
    lines = [f"  {'layer':<12} {'alone':<14} {'nonlinearities':<15} multipliers"]
    for depth, part in alone.table():
        first, last = leaves.get(part.name, (0, 0))
        some = None if multipliers is None or first == last else multipliers[first:last]
        spread = "-" if some is None else f"{some.min():.3g} to {some.max():.3g}"
        lines.append(f"  {'  ' * depth + (part.name or '-'):<12} {up_text(part.value):<14} {last - first:<15} {spread}")
    return lines


def bound_json(bound: Bound) -> dict[str, Any]:
    """A bound as plain data; the value both as a number and exactly, in hexadecimal."""
    about: dict[str, Any] = {
        "value": bound.value,
        "hex": bound.value.hex(),
        "method": bound.method,
        "norm": [f"{p:g}" if math.isinf(p) else p for p in bound.norm],
        "domain": repr(bound.domain),
        "assumptions": sorted(assumption.name for assumption in bound.assumptions),
        "network": bound.evidence.get("network"),
        "largest_pair": None if bound.pairs is None else float(bound.pairs.max()),
        "parts": [
            {"name": part.name, "type": part.evidence.get("module"), "depth": depth, "value": part.value, "how": part.method} for depth, part in bound.table()
        ],
    }
    if "settings" in bound.evidence:
        numbers = {key: bound.evidence[key] for key in ("claimed", "gap", "layerwise")}
        about["lipsdp"] = {
            "settings": bound.evidence["settings"],
            "status": bound.evidence["status"],
            **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
            "nonlinearities": bound.evidence["nonlinearities"],
            "eliminated": bound.evidence["eliminated"],
        }
    return about
