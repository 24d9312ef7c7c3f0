"""`certify inspect MODEL`: what is in a model, and what can be certified of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from certify.cli.arguments import add_json, add_model, load_model

if TYPE_CHECKING:
    from certify.errors import CertifyError
    from certify.graph import Graph
    from certify.models import Model

HELP = "Show the layers of a model, its input, and which certifiers apply."
EPILOG = "example:\n  certify inspect runs/demo/sandwich.safetensors"

_OPENED = {"trusted": "the file was trusted, and ran code when it was loaded"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL."""
    add_model(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the layers and what stands in the way of a bound; exit code 0 also when nothing can be certified, as that is the answer."""
    from certify.cli.console import out, print_json

    model = load_model(args)
    about = _about(model)
    if args.json:
        print_json(about)
        return 0
    console = out()
    console.print(f"model   {model.spec}   {model.parameters:,} parameters   sha256 {model.sha256[:12]}")
    extent = f", in [{model.input_range[0]:g}, {model.input_range[1]:g}]" if model.input_range else ""
    console.print(f"input   {'x'.join(map(str, model.input_shape)) if model.input_shape else 'shape not stored'}{extent}")
    for name, value in model.opened.items():
        if said := _OPENED.get(name) or (", ".join(map(str, value)) if isinstance(value, list) else str(value)):
            console.print(f"{name.replace('_', ' ')}: {said}", markup=False)
    for name, kind, detail in about["layers"]:
        console.print(f"  {name:<12} {kind}({detail})", markup=False)
    for method, verdict in about["certifiers"].items():
        size = f"; {_size_text(method, verdict)}" if "signals" in verdict else ""
        rate = f"; about {float(format(verdict['copies_per_second'], '.2g')):,.0f} noisy copies per second here" if "copies_per_second" in verdict else ""
        console.print(f"certifier {method}: {'applies' if verdict['applies'] else 'does not apply'}{size}{rate}")
        for problem in verdict["problems"]:
            console.print(f"  {problem}", markup=False)
    return 0


def _size_text(method: str, verdict: Mapping[str, Any]) -> str:
    """What a semidefinite certifier has to solve."""
    if verdict["signals"] is None:
        return "its matrices are too large to look at here"
    which = {"lipsdp": "a matrix inequality of", "lowrank": "in a large ball"}[method]
    return f"{which} {verdict['signals']:,} signals, about {verdict['mebibytes']:,} MiB"


def _about(model: Model) -> dict[str, Any]:
    from certify.graph import leaves

    return {
        "model": model.spec,
        "sha256": model.sha256,
        "parameters": model.parameters,
        "input_shape": model.input_shape,
        "input_range": model.input_range,
        "classes": model.classes,
        "opened": dict(model.opened),
        "layers": [(path, type(module).__name__, module.extra_repr()) for path, module in leaves(model.net)],
        "certifiers": {**_of_graph(model), "smoothing": _smoothing(model)},
    }


def _of_graph(model: Model) -> dict[str, Any]:
    """Those that see through the network: layer by layer, by LipSDP, and by a semidefinite relaxation around each input."""
    import torch

    from certify.errors import Unsupported
    from certify.graph import Graph

    try:
        graph = Graph.of(model.net, model.shape)
    except Unsupported as error:
        refused = _verdict(error)
        return {"margin": refused, "lipsdp": refused, "lowrank": refused}
    with torch.no_grad():
        margin = _margin(graph)
        return {"margin": margin, "lipsdp": _lipsdp(graph) if margin["applies"] else margin, "lowrank": _lowrank(graph)}


def _verdict(error: CertifyError | None) -> dict[str, Any]:
    """Whether a certifier applies, and every node that stands in its way."""
    from certify.errors import Unsupported

    problems = [] if error is None else [str(problem) for problem in error.problems] if isinstance(error, Unsupported) else [str(error)]
    return {"applies": error is None, "problems": problems}


def _margin(graph: Graph) -> dict[str, Any]:
    from certify.bound import Everywhere
    from certify.errors import Unsupported
    from certify.methods import Layerwise

    try:
        Layerwise().bound(graph, Everywhere())
    except Unsupported as error:
        return _verdict(error)
    return _verdict(None)


def _lipsdp(graph: Graph) -> dict[str, Any]:
    """... and the size of its inequality on all inputs; it takes the bound of the layers as well, so it does not apply where that does not."""
    from certify.errors import CertifyError, Unsupported
    from certify.lure import memory, problems_of, signals_of

    if problems := problems_of(graph):
        return _verdict(Unsupported(problems))
    try:
        signals = signals_of(graph)
    except CertifyError as error:
        return _verdict(error)
    return {**_verdict(None), "signals": signals, "mebibytes": None if signals is None else _mebibytes(memory(signals))}


def _lowrank(graph: Graph) -> dict[str, Any]:
    """... and the size of its relaxation in a ball of l2 in which every neuron may change sign."""
    from certify.errors import CertifyError
    from certify.lowrank import relu_network
    from sdp.lowrank import memory_for

    try:
        network = relu_network(graph)
    except CertifyError as error:
        return _verdict(error)
    inputs, neurons = len(network.shift), sum(len(step.bias) for step in network.steps if step.relu)
    return {**_verdict(None), "signals": 1 + min(inputs, neurons + 1) + neurons, "mebibytes": _mebibytes(memory_for(inputs, neurons, False))}


def _mebibytes(size: int) -> int:
    return -(-size // 2**20)


def _smoothing(model: Model) -> dict[str, Any]:
    """Whether the model is a classifier of such inputs, and how fast it runs; any sigma will do for that."""
    import torch

    from certify.errors import CertifyError
    from certify.smoothing import Gaussian
    from certify.smoothing.method import Smoothing

    method = Smoothing(Gaussian(0.5))
    try:
        forward, _, _ = method.prepared(model.net, model.shape)
    except CertifyError as error:
        return {"applies": False, "problems": [str(error)]}
    x = torch.zeros(method.rows(model.shape), *model.shape)
    start = time.perf_counter()
    with torch.no_grad():
        forward(x)
    return {"applies": True, "problems": [], "copies_per_second": len(x) / (time.perf_counter() - start)}
