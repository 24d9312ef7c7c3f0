"""`certify inspect MODEL`: what is in a model, and what can be certified of it."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from certify.cli.arguments import add_json, add_model, load_model

if TYPE_CHECKING:
    from certify.models import Model

HELP = "Show the layers of a model, its input, and which certifiers apply."
EPILOG = "example:\n  certify inspect runs/demo/sandwich.safetensors"


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
    for name, kind, detail in about["layers"]:
        console.print(f"  {name:<12} {kind}({detail})", markup=False)
    for method, verdict in about["certifiers"].items():
        rate = f"; about {float(format(verdict['copies_per_second'], '.2g')):,.0f} noisy copies per second here" if "copies_per_second" in verdict else ""
        console.print(f"certifier {method}: {'applies' if verdict['applies'] else 'does not apply'}{rate}")
        for problem in verdict["problems"]:
            console.print(f"  {problem}", markup=False)
    return 0


def _about(model: Model) -> dict[str, Any]:
    from certify.errors import Unsupported
    from certify.graph import leaves
    from certify.methods import lipschitz

    layers = [(path, type(module).__name__, module.extra_repr()) for path, module in leaves(model.net)]
    problems: list[str] = []
    try:
        lipschitz(model.net, input_shape=model.shape)
    except Unsupported as error:
        problems = [str(problem) for problem in error.problems]
    return {
        "model": model.spec,
        "sha256": model.sha256,
        "parameters": model.parameters,
        "input_shape": model.input_shape,
        "input_range": model.input_range,
        "classes": model.classes,
        "layers": layers,
        "certifiers": {"margin": {"applies": not problems, "problems": problems}, "smoothing": _smoothing(model)},
    }


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
