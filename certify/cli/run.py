"""`certify run MODEL DATA -o DIR`: certify a data set, input by input, into a results folder."""

from __future__ import annotations

import argparse
import pathlib
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from certify.cli.arguments import add_json, add_model, add_radii, indices, shard

if TYPE_CHECKING:
    from certify.bound import Bound
    from certify.data import Dataset
    from certify.graph import Graph
    from certify.margins import Margin
    from certify.models import Model

HELP = "Certify the predictions of a model on a data set; can be stopped and repeated, and split into shards."
EPILOG = """examples:
  certify run runs/demo/sandwich.safetensors digits -o runs/sandwich --eps 0.1,0.25,0.5
  certify run net.safetensors mnist:data/mnist -o runs/mnist --indices 0:10000:20 --fail-under 0.40@36/255
  certify run net.safetensors test.npz -o runs/big --shard 0/4      (and 1/4, 2/4, 3/4 on other machines)"""

_GROUP = 64  # rows written at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, DATA, where to, and which inputs."""
    add_model(parser)
    parser.add_argument("data", metavar="DATA", help="digits, file.npz, mnist:DIR, cifar10:DIR, folder:DIR (docs/cli.md)")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=pathlib.Path, help="the results folder; an unfinished one is resumed")
    parser.add_argument("--method", choices=["margin"], default="margin", help="margin: a proved Lipschitz bound of the network and its margins")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--limit", type=int, metavar="N", help="the first N inputs only")
    some.add_argument("--indices", type=indices, metavar="A:B:C", help="these inputs only")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="this process does every N-th input, beginning with the I-th")
    parser.add_argument("--quiet", action="store_true", help="do not print the table")
    add_radii(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Load, prove the bound, certify what is not yet in the folder, print the table."""
    from certify import data, models
    from certify.cli.console import progress
    from certify.cli.report import show
    from certify.graph import Graph
    from certify.margins import Margin
    from certify.methods import Layerwise, lipschitz
    from certify.results import Folder

    model = models.load(args.model, args.input_shape)
    dataset = data.load(args.data, model.shape)
    bound = lipschitz(model.net, Layerwise(), input_shape=model.shape)
    method, graph = Margin(bound), Graph.of(model.net, model.shape)
    manifest = _manifest(model, dataset, bound, method, _selection(args, len(dataset)))
    with Folder(args.output, manifest, args.shard) as folder:
        pending = folder.pending()
        with progress(f"certify {args.model}", len(pending)) as advance:
            for group in _groups(pending):
                folder.add(margin_rows(graph, dataset, method, group))
                advance(len(group))
        folder.finish()
    return show([args.output], args.eps, args.fail_under, args.json, warn_about_labels=True, quiet=args.quiet)


def margin_rows(graph: Graph, dataset: Dataset, method: Margin, group: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of some inputs, evaluated one at a time, so that a row does not depend on what stands beside it."""
    import torch

    from certify.margins import logits

    rows = []
    for index in group:
        start = time.perf_counter()
        certificate = method.of_logits(logits(graph, torch.from_numpy(dataset.inputs[index : index + 1])))
        label, prediction = int(dataset.labels[index]), int(certificate.prediction[0])
        status = "abstained" if certificate.abstained[0] else "certified" if prediction == label else "misclassified"
        rows.append(
            {
                "schema": 1,
                "index": index,
                "label": label,
                "prediction": prediction,
                "runner_up": int(certificate.runner_up[0]),
                "method": "margin",
                "norm": f"{certificate.norm:g}",
                "radius": float(certificate.radius[0]),
                "status": status,
                "guarantee": "proof",
                "seconds": round(time.perf_counter() - start, 6),
            }
        )
    return rows


def _selection(args: argparse.Namespace, count: int) -> list[int]:
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


def _manifest(model: Model, dataset: Dataset, bound: Bound, method: Margin, selection: list[int]) -> dict[str, Any]:
    """Everything that says what the numbers of a folder are."""
    import numpy
    import torch

    import lipnet
    from certify.cli.lipschitz import bound_json
    from certify.results import SCHEMA

    facts = bound_json(bound)
    return {
        "schema": SCHEMA,
        "model": {
            "spec": model.spec,
            "sha256": model.sha256,
            "parameters": model.parameters,
            "input_shape": list(model.shape),
            "classes": list(model.classes) if model.classes else None,
        },
        "data": {"spec": dataset.spec, "sha256": dataset.sha256, "count": len(dataset)},
        "input": {"range": list(model.input_range) if model.input_range else None, "units": "of the data, before any normalisation in the model"},
        "method": repr(method),
        "norm": f"{bound.norm[0]:g}",
        "guarantee": "proof",
        "failure": 0.0,
        "bound": facts,
        "assumptions": facts["assumptions"],
        "assumption_sentences": {assumption.name: assumption.value for assumption in sorted(bound.assumptions, key=lambda a: a.name)},
        "selection": selection,
        "seed": None,
        "argv": ["certify", *sys.argv[1:]],
        "versions": {"lipnet": lipnet.__version__, "torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version()},
        "device": "cpu",
        "dtype": "weights as stored, evaluated in float64",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
