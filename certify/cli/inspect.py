"""`certify inspect MODEL`: what is in a model, and what can be certified of it."""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from certify.cli.arguments import add_json, add_model, load_model
from certify.text import up_text

if TYPE_CHECKING:
    from certify.errors import CertifyError
    from certify.graph import Graph
    from certify.local.program import Program
    from certify.models import Model

HELP = "Show the layers of a model, its input, and which certifiers apply."
_COPIES = 100_000  # of an input, as the published tables of smoothing have
_UNDECIDED = 1000  # gates of a ball whose cost is predicted
_LIPSDP = 900  # operations of one program in l2 over the cube of what is solved: within a factor of three, on 129 to 885 signals
_PROOF = 15  # the same over the cube of all signals
_LIPSDP_INF, _LIPSDP_ONE, _PROGRAM = 3300, 5000, 0.02  # the same from the maximum norm and from l1; seconds of the smallest
_FREQUENCY, _AT_LEAST = 6e3, 0.05  # the same at each frequency, and seconds: within a factor of three of what chains of 25 to 144 signals took
_LOWRANK = 100  # ... of that of the relaxation over the cube of its constraints: 70 to 145 at 40 and 60 neurons
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
    console.print(f"model   {model.spec}   {model.parameters:,} parameters   sha256 {model.sha256[:12]}", markup=False, soft_wrap=True)
    extent = f", in [{model.input_range[0]:g}, {model.input_range[1]:g}]" if model.input_range else ""
    console.print(f"input   {'x'.join(map(str, model.input_shape)) if model.input_shape else 'shape not stored'}{extent}")
    for name, value in model.opened.items():
        if said := _OPENED.get(name) or (", ".join(map(str, value)) if isinstance(value, list) else str(value)):
            console.print(f"{name.replace('_', ' ')}: {said}", markup=False, soft_wrap=True)
    for name, kind, detail in about["layers"]:
        console.print(f"  {name:<12} {kind}({detail})", markup=False, soft_wrap=True)
    if about["operators"]:
        counts = Counter(operation for _, operation, _ in about["operators"])
        shown = ", ".join(f"{count} {operation}" for operation, count in sorted(counts.items()))
        console.print(f"graph   by {about['seen_by']}: {shown}", markup=False, soft_wrap=True)
    for method, verdict in about["certifiers"].items():
        console.print(f"certifier {method}: {'applies' if verdict['applies'] else 'does not apply'}{_cost_text(method, verdict)}", markup=False, soft_wrap=True)
        for problem in verdict["problems"]:
            console.print(f"  {problem}", markup=False, soft_wrap=True)
    return 0


def _cost_text(method: str, verdict: Mapping[str, Any]) -> str:
    """What a certifier will cost; predictions are rough."""
    parts = []
    if "bound" in verdict:
        parts.append(f"l2 bound {up_text(verdict['bound'], 3)}, in {duration_text(verdict['seconds'])}")
    if "signals" in verdict and verdict["signals"] is None:
        parts.append("its matrices are too large to look at here")
    elif "signals" in verdict:
        at = {"lipsdp": "a matrix inequality of", "lowrank": "in a large ball", "frequency": f"at each of {verdict.get('frequencies')} frequencies"}
        size = f"{at[method]} {verdict['signals']:,} signals, about {verdict['mebibytes']:,} MiB"
        what = {"lowrank": " for each radius that is tried", "lipsdp": f" for its {verdict.get('programs')} programs"}
        parts.append(f"{size} and {duration_text(verdict['seconds'])}{what.get(method, '')}")
    if "gates" in verdict:
        cost = f"about {verdict['mebibytes']:,} MiB and {duration_text(verdict['seconds'])}"
        parts.append(f"{verdict['gates']:,} gates, and a ball that leaves {verdict['undecided']:,} of them undecided takes {cost}")
    if "copies_per_second" in verdict:
        rate = f"about {float(format(verdict['copies_per_second'], '.2g')):,.0f} noisy copies per second here"
        room = "" if verdict["mebibytes"] is None else f" and {verdict['mebibytes']:,} MiB"
        parts.append(f"{rate}, so {duration_text(verdict['seconds'])}{room} for an input at {_COPIES:,} copies")
    return "".join(f"; {part}" for part in parts)


def duration_text(seconds: float) -> str:
    """In the unit that fits, to one digit: predictions are no better."""
    if seconds < 1:
        return "less than a second"
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {float(format(seconds / size, '.1g')):,.0f} {unit}"
    return f"about {float(format(seconds, '.1g')):,.0f} s"


def certifiers(model: Model) -> dict[str, Any]:
    """By method: whether it applies, every node that stands in its way, and what it would cost."""
    _, graph, seen = _of_graph(model)
    return {**seen, "smoothing": _smoothing(model, graph)}


def verdicts_of_graph(model: Model) -> dict[str, Any]:
    """The same, of the certifiers that look at the structure."""
    return _of_graph(model)[2]


def _about(model: Model) -> dict[str, Any]:
    from certify.graph import leaves

    operators, graph, certifiers = _of_graph(model)
    return {
        "model": model.spec,
        "sha256": model.sha256,
        "parameters": model.parameters,
        "input_shape": model.input_shape,
        "input_range": model.input_range,
        "classes": model.classes,
        "opened": dict(model.opened),
        "layers": [(path, type(module).__name__, module.extra_repr()) for path, module in leaves(model.net)],
        "seen_by": graph.seen_by if graph is not None else "",
        "operators": operators,
        "certifiers": {**certifiers, "smoothing": _smoothing(model, graph)},
    }


def _of_graph(model: Model) -> tuple[list[tuple[str, str, Sequence[int]]], Graph | None, dict[str, Any]]:
    """The nodes of its graph, that graph, and the certifiers that see through it: layer by layer, by LipSDP, and by a relaxation around each input."""
    import torch

    from certify.errors import Unsupported
    from certify.graph import Graph

    try:
        graph = Graph.of(model.net, model.shape)
    except Unsupported as error:
        refused = _verdict(error)
        return [], None, dict.fromkeys(("margin", "lipsdp", "frequency", "local", "lowrank"), refused)
    with torch.no_grad():
        margin = _margin(graph)
        of_layers = {"margin": margin, "lipsdp": _lipsdp(graph) if margin["applies"] else margin, "frequency": _frequency(graph)}
        certifiers = {**of_layers, "local": _local(graph), "lowrank": _lowrank(graph)}
    return _operators(graph), graph, certifiers


def _operators(graph: Graph) -> list[tuple[str, str, Sequence[int]]]:
    """Each module that is called and each function: where, what, and the shape that it makes of one input."""
    from certify.tracing import name_of

    return [
        (str(node.target), type(graph.module(node)).__name__, graph.shapes[node.name])
        if node.op == "call_module"
        else (node.name, name_of(node.target), graph.shapes[node.name])
        for node in graph.trace.nodes
        if node.op.startswith("call_") and node.name in graph.shapes
    ]


def _verdict(error: CertifyError | None) -> dict[str, Any]:
    """Whether a certifier applies, and every node that stands in its way."""
    from certify.errors import Unsupported

    problems = [] if error is None else [str(problem) for problem in error.problems] if isinstance(error, Unsupported) else [str(error)]
    return {"applies": error is None, "problems": problems}


def _margin(graph: Graph) -> dict[str, Any]:
    from certify.bound import Everywhere
    from certify.errors import Unsupported
    from certify.methods import Layerwise

    start = time.perf_counter()
    try:
        bound = Layerwise().bound(graph, Everywhere())
    except Unsupported as error:
        return _verdict(error)
    return {**_verdict(None), "bound": bound.value, "seconds": time.perf_counter() - start}


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
    if signals is None and (counted := _counted(graph)) is not None:
        signals = counted, counted
    if signals is None:
        return {**_verdict(None), "signals": None, "solved": None, "mebibytes": None, "seconds": None}
    size = {"signals": signals[0], "solved": signals[1], "inputs": math.prod(graph.input_shape), "outputs": math.prod(graph.shapes[graph.output.name])}
    return {**_verdict(None), **size, "mebibytes": _mebibytes(memory(signals[0])), "programs": _programs(size, 2), "seconds": lipsdp_seconds(size, 2)}


def lipsdp_seconds(size: Mapping[str, Any], norm: float, pairs: bool = True) -> float:
    """About how long LipSDP of this size takes here, with a program for each difference of two outputs or without."""
    gates, whole = size["signals"] - size["inputs"] - 1, size["signals"] ** 3
    operations = {2: _LIPSDP * size["solved"] ** 3 + _PROOF * whole, math.inf: _LIPSDP_INF * whole, 1: _LIPSDP_ONE * (gates + 2) ** 3}[norm]
    return _programs(size, norm, pairs) * (operations / _flops() + _PROGRAM)


def _programs(size: Mapping[str, Any], norm: float, pairs: bool = True) -> int:
    between = math.comb(size["outputs"], 2) if pairs else 0
    return size["outputs"] + between if norm == math.inf else (1 + between) * (size["inputs"] if norm == 1 else 1)


def _counted(graph: Graph) -> int | None:
    """The signals of a network whose matrices are too large to look at: its inputs, its gates and 1. Fewer where some neurons have no weights."""
    from certify.errors import CertifyError
    from certify.local.method import program_of

    try:
        return math.prod(graph.input_shape) + _gates(program_of(graph)) + 1
    except CertifyError:
        return None


def _gates(program: Program) -> int:
    return sum(math.prod(program.shapes[program.steps[k].inputs[0]]) for k in program.gates)


def _frequency(graph: Graph) -> dict[str, Any]:
    """LipSDP by one program for all frequencies, complex matrices of the signals at each."""
    from certify.errors import CertifyError
    from certify.frequency import ConvNet

    try:
        network = ConvNet.of(graph)
        signals, frequencies = network.size(network.torus())
    except CertifyError as error:
        return _verdict(error)
    seconds = frequencies * (_FREQUENCY * signals**3 / _flops() + _AT_LEAST)
    mebibytes = _mebibytes(4 * 16 * signals**2 * frequencies)
    return {**_verdict(None), "signals": signals, "frequencies": frequencies, "mebibytes": mebibytes, "seconds": seconds}


def _local(graph: Graph) -> dict[str, Any]:
    """Bounds around one input: what a ball costs that leaves so many gates undecided. A gradient of each, then forms in them for every row of the output."""
    import torch

    from certify.errors import CertifyError
    from certify.local.method import program_of

    try:
        program = program_of(graph)
    except CertifyError as error:
        return _verdict(error)
    gates = _gates(program)
    inputs, undecided, rows = math.prod(graph.input_shape), min(gates, _UNDECIDED), max(1, program.outputs - 1)
    start = time.perf_counter()
    program.run(torch.zeros(inputs, dtype=torch.float64))
    run = time.perf_counter() - start
    seconds = 2 * undecided * run + 2 * rows * (undecided**3 / 3 + 2 * inputs * undecided**2) / _flops()
    mebibytes = _mebibytes(4 * 8 * (inputs * undecided + undecided**2))
    return {**_verdict(None), "gates": gates, "undecided": undecided, "mebibytes": mebibytes, "seconds": seconds}


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
    signals = 1 + min(inputs, neurons + 1) + neurons
    return {
        **_verdict(None),
        "signals": signals,
        "mebibytes": _mebibytes(memory_for(inputs, neurons, False)),
        "seconds": _LOWRANK * (5 * neurons) ** 3 / _flops(),
    }


@functools.cache
def _flops() -> float:
    """Operations per second of a product and a Cholesky factorisation of middling matrices, on this machine now."""
    import numpy as np

    size = 400
    matrix = np.random.default_rng(0).standard_normal((size, size))
    gram = matrix @ matrix.T + size * np.eye(size)
    start = time.perf_counter()
    for _ in range(3):
        np.linalg.cholesky(gram)
        matrix @ matrix
    return 3 * (2 + 1 / 3) * size**3 / (time.perf_counter() - start)


def _mebibytes(size: int) -> int:
    return -(-size // 2**20)


def _smoothing(model: Model, graph: Graph | None) -> dict[str, Any]:
    """Whether the model is a classifier of such inputs, how fast it runs, and what a batch takes where it is largest; any sigma will do for that."""
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
    rate = len(x) / (time.perf_counter() - start)
    mebibytes = None if graph is None else _mebibytes(4 * len(x) * _widest(graph))
    return {"applies": True, "problems": [], "copies_per_second": rate, "mebibytes": mebibytes, "seconds": _COPIES / rate}


def _widest(graph: Graph) -> int:
    """The most numbers of one input that an operation reads and makes together."""
    shapes = graph.shapes
    sizes = ([shapes[name] for name in (node.name, *(part.name for part in node.all_input_nodes)) if name in shapes] for node in graph.trace.nodes)
    return max(sum(map(math.prod, parts)) for parts in sizes)
