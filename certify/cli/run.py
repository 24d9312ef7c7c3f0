"""`certify run MODEL DATA -o DIR`: certify a data set, input by input, into a results folder."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from certify.cli.arguments import add_json, add_model, add_radii, add_selection, given_options, load_model, option_of, radius, shard_here, span
from certify.cli.noises import add_noise, noise_of
from certify.cli.report import show

if TYPE_CHECKING:
    from certify.bound import Bound
    from certify.data import Dataset
    from certify.graph import Graph
    from certify.lipsdp import LipSDP
    from certify.margins import Margin
    from certify.methods import LipschitzMethod
    from certify.models import Model
    from certify.singly import OneByOne
    from certify.smoothing.method import Smoothing

HELP = "Certify the predictions of a model on a data set; can be stopped and repeated, and split into shards."
EPILOG = """examples:
  certify run runs/demo/sandwich.safetensors digits -o runs/sandwich --eps 0.1,0.25,0.5
  certify run net.safetensors mnist:data/mnist -o runs/mnist --indices 0:10000:20 --fail-under 0.40@36/255
  certify run net.safetensors digits -o runs/l1 --method smoothing --noise laplace --scale 0.3 --levels 16
  certify run net.safetensors test.npz -o runs/big --shard 0/4      (and 1/4, 2/4, 3/4 on other machines)"""

UNITS = "of the data, before any normalisation in the model"  # of the radii
_GROUP = 64  # rows written at once
_SOLVING = 0.9  # of the time that there is; the rest is for the rows
Certify = Callable[[Sequence[int]], Iterator[Sequence[Mapping[str, Any]]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, DATA, where to, and which inputs."""
    add_model(parser)
    parser.add_argument("data", metavar="DATA", help="digits, file.npz, mnist:DIR, cifar10:DIR, folder:DIR (docs/cli.md)")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=pathlib.Path, help="the results folder; an unfinished one is resumed")
    parser.add_argument(
        "--method",
        choices=["margin", "local", "smoothing", "lowrank"],
        default="margin",
        help="margin: a proved Lipschitz bound of the network and its margins; local: bounds around each input, for networks trained in any way; "
        "smoothing: any classifier, with noise on its inputs; "
        "lowrank: a small network of linear layers and relu, with a semidefinite relaxation around each input",
    )
    add_selection(parser)
    parser.add_argument(
        "--bound",
        choices=["layerwise", "lipsdp", "frequency"],
        default="layerwise",
        help="with --method margin: of the network, layer by layer, or by a semidefinite program (tighter; lipsdp: radii in --norm, 1, 2 or inf)",
    )
    parser.add_argument("--quiet", action="store_true", help="do not print the table")
    _add_smoothing(parser.add_argument_group("with --method smoothing"))
    group = parser.add_argument_group("with --method local or lowrank (and --norm, as above)")
    group.add_argument("--radius", type=radius, metavar="R", help="only ask whether the prediction changes within R (default: search for the largest radius)")
    group.add_argument("--steps", type=int, metavar="N", help="local: steps to the radius of the first order (default 8); more is slower and a little larger")
    group.add_argument(
        "--nodes", type=int, metavar="N", help="local: most that branch and bound looks at for each margin (default: with --radius 2000, else 0)"
    )
    group.add_argument("--seconds", type=float, metavar="S", help="local: for each input (default 60); what is proved by then is its radius")
    group.add_argument("--within", type=span, metavar="LO,HI", help="local: only inputs with entries in this range count, such as 0,1 for pictures")
    group.add_argument(
        "--proposer",
        choices=["interior-point", "burer-monteiro"],
        help="lowrank: what proposes the multipliers that are proved: an interior-point method (the default), or factors of low rank, in less memory",
    )
    add_radii(parser)
    add_json(parser)


def _add_smoothing(group: argparse._ActionsContainer) -> None:
    add_noise(group)
    group.add_argument("--alpha", type=float, default=0.001, metavar="A", help="each certificate fails with at most this probability (default 0.001)")
    group.add_argument(
        "--n", "--copies", type=int, default=100_000, metavar="N", help="at most so many noisy copies of each input (default 100000); torchrun wants --copies"
    )
    group.add_argument("--n0", type=int, default=100, metavar="N", help="so many other copies choose the class (default 100)")
    group.add_argument("--fixed", action="store_true", help="one look, at all N copies, instead of several, each with its part of alpha")
    goal = group.add_mutually_exclusive_group()
    goal.add_argument("--target", type=radius, metavar="R", help="only ask whether the radius is above R: stop as soon as that is decided")
    goal.add_argument("--tol", type=float, metavar="T", help="stop once all further copies would add no more than T to the radius")
    group.add_argument(
        "--levels", type=int, metavar="G", help="inputs are multiples of 1/G (default 255); 0: as they are, and noise is float (what is not added has no grid)"
    )
    group.add_argument("--scores", type=scores, default="hard", metavar="MAP", help="hard (votes, the default), softmax:T or sparsemax:T, T the temperature")
    group.add_argument("--lipschitz", choices=["layerwise"], help="prove a Lipschitz constant of the network first: larger radii for soft scores")
    group.add_argument("--vote-margin", type=float, default=0.0, metavar="M", help="copies whose two largest logits are closer count against every class")
    group.add_argument("--batch", type=int, metavar="N", help="rows in a batch (default: 2^18 numbers for images, 2^19 for others; on a GPU 2^24)")
    group.add_argument("--engine", choices=["torch", "compile", "onnxruntime", "openvino"], default="torch", help="what runs the network (default torch)")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: certify the network as it is in bfloat16")
    group.add_argument("--device", default="cpu", metavar="NAME", help="what the network runs on: cpu (default), or a GPU: cuda, cuda:1 (needs lipnet[gpu])")
    group.add_argument("--shared-noise", action="store_true", help="one noise for all inputs: faster for small networks; certificates are then not independent")
    group.add_argument("--seed", type=int, default=0, help="of the noise")


def scores(text: str) -> tuple[str, float]:
    """`hard`, or `softmax:T` or `sparsemax:T` and its temperature."""
    kind, _, temperature = text.partition(":")
    try:
        if text == "hard" or kind in ("softmax", "sparsemax"):
            return kind, float(temperature or 1)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"scores are hard or softmax:T or sparsemax:T, such as softmax:0.5, got {text!r}")


def run(args: argparse.Namespace) -> int:
    """Load, prepare the method, certify what is not yet in the folder, print the table."""
    if not fill(args) and is_left_to_others(args):
        return 0
    return show([args.output], args.eps, args.fail_under, args.json, warn_about_labels=True, quiet=args.quiet)


def is_left_to_others(args: argparse.Namespace) -> bool:
    """Whether other ranks of the same launch have inputs to do still; a note says so. Who ends last has the table, and says whether the gates are met."""
    from certify.cli.console import note

    index, count = shard_here()
    if args.shard is not None or count == 1:
        return False
    note(f"rank {index} of {count}: its inputs are done; the rank that ends last shows the table of {args.output}")
    return True


def fill(args: argparse.Namespace, until: float = math.inf) -> bool:
    """Certify what is not yet in the folder, until a time of time.monotonic at the latest (what is begun is ended); says whether all is done."""
    from certify import data
    from certify.errors import CertifyError
    from certify.results import done_before
    from certify.smoothing.noise.other import given

    _refuse_options_of_others(args)
    model = load_model(args)
    shape = given(noise_of(args, model.shape), model.shape) if args.method == "smoothing" else model.shape
    try:
        dataset = data.load(args.data, shape)
    except data.DataError as error:
        if shape == model.shape:
            raise
        raise CertifyError(f"{error}; with --noise {args.noise} the network takes copies of shape {model.shape}, made of inputs of shape {shape}") from error
    selection = selection_of(args, len(dataset))
    manifest = manifest_of(model, dataset, selection)
    if done_before(args.output, _known(args, manifest)):
        return True
    prepare: dict[str, Callable[..., tuple[dict[str, Any], Certify]]] = {
        "margin": functools.partial(_margin, until=until),
        "local": _local,
        "smoothing": _smoothing,
        "lowrank": _lowrank,
    }
    facts, certify = prepare[args.method](args, model, dataset)
    note_labels(model, dataset, selection)
    return fill_folder(args, {**manifest, **facts}, certify, until)


def _known(args: argparse.Namespace, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What of a folder's identity is settled before anything is computed: with proved margins, all of it."""
    known = {key: manifest[key] for key in ("schema", "model", "data", "selection")}
    if args.method != "margin":
        return known
    method = f"Margin({_lipschitz_method(args)!r})"
    return {**known, "method": method, "norm": args.norm or "2", "guarantee": "proof", "seed": None, "smoothing": None, "device": manifest["device"]}


def fill_folder(args: argparse.Namespace, manifest: Mapping[str, Any], rows_of: Certify, until: float) -> bool:
    """Make the rows that the folder does not have yet; says whether all are done."""
    from certify.cli.console import progress
    from certify.results import Folder

    with Folder(args.output, manifest, args.shard or shard_here()) as folder:
        pending = folder.pending()
        with progress(f"{'attack' if manifest['guarantee'] == 'attack' else 'certify'} {args.model}", len(pending)) as advance:
            for rows in rows_of(pending):
                folder.add(rows)
                advance(len(rows))
                if time.monotonic() > until:
                    break
        return folder.finish()


def _refuse_options_of_others(args: argparse.Namespace) -> None:
    from certify.errors import CertifyError

    if args.method != "smoothing" and (found := [name for name in given_options(args, _add_smoothing) if name != "norm"]):
        raise CertifyError(f"{option_of(found[0])} is for --method smoothing, and the method is {args.method}; say which of the two is meant")
    if args.method != "margin" and args.bound != "layerwise":
        raise CertifyError(f"--bound is for --method margin, and the method is {args.method}; say which of the two is meant")
    if args.method not in ("lowrank", "local") and args.radius is not None:
        raise CertifyError(f"--radius is for --method local or lowrank, and the method is {args.method}; --eps chooses the radii of the table")
    for option, method in (("proposer", "lowrank"), ("steps", "local"), ("nodes", "local"), ("within", "local"), ("seconds", "local")):
        if args.method != method and getattr(args, option) is not None:
            raise CertifyError(f"--{option} is for --method {method}, and the method is {args.method}; say which of the two is meant")


def _margin(args: argparse.Namespace, model: Model, dataset: Dataset, until: float) -> tuple[dict[str, Any], Certify]:
    """The proved bound, for the manifest, and what makes rows with it."""
    from certify.bound import assumed
    from certify.cli.console import note
    from certify.cli.lipschitz import bound_json
    from certify.frequency import LipSDPFrequency
    from certify.graph import Graph
    from certify.lipsdp import LipSDP
    from certify.margins import Margin
    from certify.methods import lipschitz
    from certify.multipliers import ended_early, keep

    made, solved, now = _lipschitz_method(args), False, time.monotonic()
    if isinstance(made, LipSDP | LipSDPFrequency):
        made = dataclasses.replace(made, until=now + _SOLVING * (until - now))
    if isinstance(made, LipSDP):
        bound, solved = _by_lipsdp(args, made, model)
    else:
        bound = lipschitz(model.net, made, input_shape=model.shape)
    if ended_early(bound):
        again = "; repeated, it goes on with these; another -o solves again" if args.bound == "lipsdp" else ""
        note(f"{args.bound}: the time was over, or it was interrupted, before all was solved: what was reached is proved, and radii are smaller{again}")
    method, graph = Margin(bound), Graph.of(model.net, model.shape)
    facts = {
        "method": repr(method),
        "norm": f"{bound.norm[0]:g}",
        "guarantee": "proof",
        "failure": 0.0,
        "bound": bound_json(bound),
        **assumed(bound.assumptions),
        "dtype": "weights as stored, evaluated in float64",
    }

    def certify(pending: Sequence[int]) -> Iterator[Sequence[Mapping[str, Any]]]:
        """The rows; before the first of them, what the bound can be proved from again."""
        if solved:
            keep(bound, args.output)
        for group in _groups(pending):
            yield margin_rows(graph, dataset, method, group)

    return facts, certify


def _lipschitz_method(args: argparse.Namespace) -> LipschitzMethod:
    from certify.errors import CertifyError
    from certify.frequency import LipSDPFrequency
    from certify.lipsdp import LipSDP
    from certify.methods import Layerwise

    if args.bound == "lipsdp":
        return LipSDP(norm=float(args.norm or 2))
    if args.norm not in (None, "2"):
        raise CertifyError(f"--bound {args.bound} is from l2 only, got --norm {args.norm}; take --bound lipsdp")
    return LipSDPFrequency() if args.bound == "frequency" else Layerwise()


def _by_lipsdp(args: argparse.Namespace, method: LipSDP, model: Model) -> tuple[Bound, bool]:
    """By the multipliers that lie in the folder, or by new ones, and whether they are new."""
    from certify.cli.console import live, note
    from certify.cli.lipschitz import progress_text
    from certify.methods import lipschitz
    from certify.multipliers import NAME, proved_again

    found = proved_again(model.net, method, model.shape, args.output)
    if found is not None:
        note(f"lipsdp: the bound is proved again from {args.output / NAME}, and not solved for")
        return found, False
    with live() as say:
        reporting = dataclasses.replace(method, report=lambda what, progress: say(progress_text(what, progress)))
        return lipschitz(model.net, reporting, input_shape=model.shape), True


def _smoothing(args: argparse.Namespace, model: Model, dataset: Dataset) -> tuple[dict[str, Any], Certify]:
    """The smoothed classifier, for the manifest, and what makes rows with it. Refuses what could not certify anything before it starts."""
    from certify.cli.console import write
    from certify.device import usable
    from certify.errors import CertifyError
    from certify.methods import Layerwise, lipschitz
    from certify.smoothing.rows import facts, rows

    if model.input_range is not None and not (model.input_range[0] <= dataset.inputs.min() and dataset.inputs.max() <= model.input_range[1]):
        raise CertifyError(f"{args.data}: inputs are in [{dataset.inputs.min():g}, {dataset.inputs.max():g}], the model takes {list(model.input_range)}")
    shape, device = dataset.inputs.shape[1:], usable(args.device)
    method = smoothing_of(args, model.shape, lipschitz(model.net, Layerwise(), input_shape=model.shape) if args.lipschitz else None)
    procedure = method.procedure(shape)
    net = model.net if device.type == "cpu" else copy.deepcopy(model.net).to(device)
    forward, classes, done = method.prepared(net, shape)
    procedure.start(classes)
    about = {**facts(method, procedure, done, classes), "device": device.type}

    def certify(pending: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        """The rows one by one, and how fast it went."""
        start, copies = time.perf_counter(), 0
        for row in rows(method, forward, classes, dataset, pending, device):
            copies += row["n"] + args.n0
            yield [row]
        took = time.perf_counter() - start
        if copies:
            write(sys.stderr, f"{copies} noisy copies in {took:.1f} s, {copies / took:.3g} per second\n")

    return about, certify


def smoothing_of(args: argparse.Namespace, shape: tuple[int, ...], lipschitz: Bound | None = None) -> Smoothing:
    """The method that these options are, for a network that takes this shape."""
    from certify.smoothing import FixedN, GroupSequential, Hardmax, Softmax, Sparsemax
    from certify.smoothing.method import Smoothing, on_grid
    from certify.smoothing.schedule import doubling

    kind, temperature = args.scores
    noise = noise_of(args, shape)
    levels = (255 if on_grid(noise) else 0) if args.levels is None else args.levels
    return Smoothing(
        noise,
        Hardmax() if kind == "hard" else Softmax(temperature) if kind == "softmax" else Sparsemax(temperature),
        FixedN(args.n0, args.n, args.alpha) if args.fixed else GroupSequential(doubling(args.n), n0=args.n0, alpha=args.alpha),
        target=args.target,
        tolerance=args.tol,
        levels=levels or None,
        vote_margin=args.vote_margin,
        batch=args.batch,
        seed=args.seed,
        engine=args.engine,
        shared=args.shared_noise,
        dtype=args.dtype,
        lipschitz=lipschitz,
    )


def _lowrank(args: argparse.Namespace, model: Model, dataset: Dataset) -> tuple[dict[str, Any], Certify]:
    """A semidefinite relaxation around each input."""
    from certify.errors import CertifyError
    from certify.lowrank import LowRank

    if args.norm == "1":
        raise CertifyError("--method lowrank has radii in l2 and in the maximum norm, got --norm 1")
    return _one_by_one(LowRank(args.radius, float(args.norm or 2), solver=args.proposer or LowRank.solver), model, dataset)


def _local(args: argparse.Namespace, model: Model, dataset: Dataset) -> tuple[dict[str, Any], Certify]:
    """Bounds of margins and of their gradients around each input."""
    from certify.local.radius import LocalMargin

    steps = LocalMargin.steps if args.steps is None else args.steps
    method = LocalMargin(args.radius, float(args.norm or 2), steps, args.within, nodes=args.nodes, seconds=60.0 if args.seconds is None else args.seconds)
    facts, certify = _one_by_one(method, model, dataset)
    return {**facts, "within": args.within}, certify


def _one_by_one(method: OneByOne[Any], model: Model, dataset: Dataset) -> tuple[dict[str, Any], Certify]:
    """The method, for the manifest, and what makes rows with it."""
    from certify.bound import assumed
    from certify.graph import Graph
    from certify.singly import row

    graph = Graph.of(model.net, model.shape)
    seen = method.see(graph)
    facts = {
        "method": repr(method),
        "norm": f"{method.norm:g}",
        "guarantee": "proof",
        "failure": 0.0,
        **assumed(method.assumptions),
        "dtype": "weights as stored, bounded in float64",
    }
    return facts, lambda pending: ([row(method, graph, seen, dataset, index)] for index in pending)


def margin_rows(graph: Graph, dataset: Dataset, method: Margin, group: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of some inputs, evaluated one at a time, so that a row does not depend on what stands beside it."""
    import torch

    from certify.margins import gap, logits

    rows = []
    for index in group:
        start = time.perf_counter()
        z = logits(graph, torch.from_numpy(dataset.inputs[index : index + 1]))
        certificate = method.of_logits(z)
        label, prediction = int(dataset.labels[index]), int(certificate.prediction[0])
        status = "abstained" if certificate.abstained[0] else "certified" if prediction == label else "misclassified"
        rows.append(
            {
                "schema": 1,
                "index": index,
                "label": label,
                "prediction": prediction,
                "runner_up": int(certificate.runner_up[0]),
                "margin": gap(z[0]),
                "method": "margin",
                "norm": f"{certificate.norm:g}",
                "radius": float(certificate.radius[0]),
                "status": status,
                "guarantee": "proof",
                "seconds": round(time.perf_counter() - start, 6),
            }
        )
    return rows


def note_labels(model: Model, dataset: Dataset, selection: Sequence[int]) -> None:
    """A note on labels that are the numbers of no output, and on classes that model and data name differently."""
    import torch

    from certify.cli.console import note

    if model.classes and dataset.classes and model.classes != dataset.classes:
        note(f"the classes of {dataset.spec} have other names than those of {model.spec}: {_listed(dataset.classes)} and {_listed(model.classes)}")
    dtype = next((tensor.dtype for tensor in model.net.state_dict().values() if tensor.is_floating_point()), torch.float32)
    try:
        with torch.no_grad():
            outputs = model.net(torch.zeros(1, *model.shape, dtype=dtype))
    except Exception:  # the method says why it does not run
        return
    lowest, highest = (int(end) for end in (dataset.labels[selection].min(), dataset.labels[selection].max()))
    if isinstance(outputs, torch.Tensor) and outputs.dim() == 2 and highest >= outputs.shape[1] > 1:
        outside = f"and the network has {outputs.shape[1]} outputs, the classes 0 to {outputs.shape[1] - 1}: inputs of the others count as wrong"
        note(f"{dataset.spec}: labels go from {lowest} to {highest}, {outside}; number the classes as the network does")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def selection_of(args: argparse.Namespace, count: int) -> list[int]:
    """The indices that were asked for. Raises CertifyError when there are none."""
    from certify.errors import CertifyError

    chosen = slice(0, args.limit) if args.limit is not None else args.indices or slice(None)
    selection = list(range(count)[chosen]) if args.limit is None or args.limit >= 0 else []
    if not selection:
        raise CertifyError(f"{args.data}: none of its {count} inputs is selected; change --limit or --indices")
    return selection


def _groups(pending: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(pending), _GROUP):
        yield pending[start : start + _GROUP]


def manifest_of(model: Model, dataset: Dataset, selection: list[int]) -> dict[str, Any]:
    """What says which numbers a folder holds, apart from the method."""
    import numpy
    import torch

    import lipnet
    from certify.results import SCHEMA

    return {
        "schema": SCHEMA,
        "model": {
            "spec": model.spec,
            "sha256": model.sha256,
            "parameters": model.parameters,
            "input_shape": list(model.shape),
            "classes": list(model.classes) if model.classes else None,
            **model.opened,
        },
        "data": {"spec": dataset.spec, "sha256": dataset.sha256, "count": len(dataset)},
        "input": {"range": list(model.input_range) if model.input_range else None, "units": UNITS},
        "selection": selection,
        "seed": None,
        "argv": ["certify", *sys.argv[1:]],
        "versions": {"lipnet": lipnet.__version__, "torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version()},
        "device": "cpu",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
