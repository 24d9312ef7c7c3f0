"""`certify attack MODEL DATA -o DIR`: look for near inputs of another class; their distances are upper bounds on every radius that holds."""

from __future__ import annotations

import argparse
import math
import pathlib
from typing import TYPE_CHECKING

from certify.cli.arguments import add_eps, add_json, add_model, add_selection, load_model
from certify.cli.report import show
from certify.cli.run import fill_folder, is_left_to_others, manifest_of, note_labels, selection_of

if TYPE_CHECKING:
    from certify.attack import Attack

HELP = "Attack the predictions of a model: upper bounds on their radii, in a results folder like those of certify run. Certifies nothing."
EPILOG = """examples:
  certify attack net.safetensors digits -o runs/attacked --eps 0.1,0.25
  certify attack net.safetensors digits -o runs/linf --norm inf --attack pgd,foolbox-fmn
  certify check runs/certified --against runs/attacked"""

NAMES = ("pgd", "foolbox-ddn", "foolbox-pgd", "foolbox-deepfool", "foolbox-fmn", "autoattack")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, DATA, where to, which inputs, and how."""
    add_model(parser)
    parser.add_argument("data", metavar="DATA", help="digits, file.npz, mnist:DIR, cifar10:DIR, folder:DIR (docs/cli.md)")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=pathlib.Path, help="the results folder; an unfinished one is resumed")
    parser.add_argument("--norm", choices=["2", "inf"], default="2", help="that is to be small (default 2)")
    parser.add_argument(
        "--attack", type=names, default=("pgd",), metavar="NAME,...", help=f"the nearest point that any of them finds: {', '.join(NAMES)} (default pgd)"
    )
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of each attack (default 100)")
    parser.add_argument("--restarts", type=int, metavar="N", help="rows that an attack runs side by side (default: 10 for pgd, 1 for the others)")
    parser.add_argument("--clip", action="store_true", help="only points in [0, 1]")
    parser.add_argument("--seed", type=int, default=0, help="of random starts")
    add_selection(parser)
    parser.add_argument("--quiet", action="store_true", help="do not print the table")
    add_eps(parser)
    add_json(parser)


def names(text: str) -> tuple[str, ...]:
    """`pgd,foolbox-ddn` as names that are known."""
    found = tuple(part.strip() for part in text.split(","))
    for name in found:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"no attack is known by the name {name!r}; known are {', '.join(NAMES)}")
    return found


def run(args: argparse.Namespace) -> int:
    """Load, attack what is not yet in the folder, print the table."""
    if not fill(args) and is_left_to_others(args):
        return 0
    return show([args.output], args.eps, [], args.json, warn_about_labels=True, quiet=args.quiet)


def fill(args: argparse.Namespace, until: float = math.inf) -> bool:
    """Attack what is not yet in the folder, until a time of time.monotonic at the latest (what is begun is ended); says whether all is done."""
    from certify import data
    from certify.attack import row
    from certify.bound import assumed
    from certify.errors import CertifyError
    from certify.opaque import runnable

    attacks = [_made(name, args) for name in args.attack]
    model = load_model(args)
    dataset, graph = data.load(args.data, model.shape), runnable(model.net, model.shape)
    selection = selection_of(args, len(dataset))
    note_labels(model, dataset, selection)
    if args.clip and model.input_range not in (None, (0.0, 1.0)):
        raise CertifyError(f"{args.model}: the model takes inputs in {list(model.input_range)}, and --clip keeps points in [0, 1]; leave out --clip")
    manifest = {
        **manifest_of(model, dataset, selection),
        "method": " and ".join(map(repr, attacks)),
        "norm": args.norm,
        "guarantee": "attack",
        "failure": None,
        "attack": {"clip": args.clip},
        **assumed(()),
        "seed": args.seed,
        "dtype": "weights as stored, evaluated in float64",
    }
    return fill_folder(args, manifest, lambda pending: ([row(graph, dataset, attacks, index)] for index in pending), until)


def _made(name: str, args: argparse.Namespace) -> Attack:
    from certify.attack import PGD, Foolbox
    from certify.autoattack import AutoAttack

    library, _, attack = name.rpartition("-")
    norm, restarts = float(args.norm), {} if args.restarts is None else {"restarts": args.restarts}
    if library:
        return Foolbox(attack, norm=norm, steps=args.steps, seed=args.seed, clip=args.clip, **restarts)
    if name == "autoattack":
        return AutoAttack(norm=norm, steps=args.steps, seed=args.seed, clip=args.clip, **restarts)
    return PGD(norm=norm, steps=args.steps, seed=args.seed, clip=args.clip, **restarts)
