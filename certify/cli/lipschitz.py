"""`certify lipschitz MODEL`: a proved Lipschitz constant."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from certify.cli.arguments import add_json, add_model

if TYPE_CHECKING:
    from certify.bound import Bound

HELP = "Prove a Lipschitz constant of a model, l2 to l2, everywhere."
EPILOG = "example:\n  certify lipschitz runs/demo/bro.safetensors --layers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the method and what to print."""
    add_model(parser)
    parser.add_argument("--method", choices=["layerwise"], default="layerwise", help="layerwise: products along chains, sums over branches")
    parser.add_argument("--layers", action="store_true", help="print the bound of each layer too")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the bound, rounded up, with what it assumes."""
    from certify import models
    from certify.cli.console import out, print_json
    from certify.methods import Layerwise, lipschitz
    from certify.text import up_text

    model = models.load(args.model, args.input_shape)
    bound = lipschitz(model.net, Layerwise(), input_shape=model.shape)
    if args.json:
        print_json({"model": model.spec, "sha256": model.sha256, "bound": bound_json(bound)})
        return 0
    console = out()
    console.print(f"{model.spec}   Lipschitz constant at most {up_text(bound.value)} (l2 to l2, everywhere; proof, {bound.method})", soft_wrap=True)
    if bound.pairs is not None:
        console.print(f"  differences of two outputs: at most {up_text(float(bound.pairs.max()))}")
    if args.layers:
        for depth, part in bound.table():
            console.print(f"  {'  ' * depth + (part.name or '-'):<12} {up_text(part.value):<14} {part.method}", markup=False)
    for assumption in sorted(bound.assumptions, key=lambda a: a.name):
        console.print(f"  assumes {assumption.name}: {assumption.value}", soft_wrap=True)
    return 0


def bound_json(bound: Bound) -> dict[str, Any]:
    """A bound as plain data; the value both as a number and exactly, in hexadecimal."""
    return {
        "value": bound.value,
        "hex": bound.value.hex(),
        "method": bound.method,
        "norm": list(bound.norm),
        "domain": repr(bound.domain),
        "assumptions": sorted(assumption.name for assumption in bound.assumptions),
        "network": bound.evidence.get("network"),
        "largest_pair": None if bound.pairs is None else float(bound.pairs.max()),
        "parts": [
            {"name": part.name, "type": part.evidence.get("module"), "depth": depth, "value": part.value, "how": part.method} for depth, part in bound.table()
        ],
    }
