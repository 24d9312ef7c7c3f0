"""What LipSDP proposed, kept beside the rows that follow from it: `multipliers.safetensors` of a results folder.

Nothing in the file is believed. A repeated run and `certify check` prove the bound from these multipliers again, of the network that is at hand, which takes
a fraction of the time that solving the programs takes. Where they do not prove what is said with them, they are passed over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from certify.bound import Bound
from certify.graph import Graph
from certify.lipsdp import LipSDP
from certify.methods import lipschitz
from certify.registry import Shape
from certify.results import write_atomically

NAME = "multipliers.safetensors"
_CLOSE = 1e-6  # relative; another BLAS moves what is proved by less
_ENDED = ("interrupted", "time limit")  # of a solver, before it was done


def keep(bound: Bound, folder: pathlib.Path) -> None:
    """Write the multipliers of a bound by LipSDP, whole or not at all."""
    write_atomically(folder / NAME, save({what: np.ascontiguousarray(each) for what, each in bound.evidence["proposals"].items()}, _about(bound)))


def proved_again(net: nn.Module, method: LipSDP, shape: Shape, folder: pathlib.Path) -> Bound | None:
    """The bound that the multipliers in a folder prove of this network by this method; None where there are none, or they are of another or do not."""
    try:
        with safe_open(folder / NAME, framework="numpy") as file:
            about, proposals = file.metadata() or {}, {what: file.get_tensor(what).astype(np.float64) for what in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError):  # the last for kinds of numbers that numpy has not
        return None
    if about.get("network") != Graph.of(net, shape).digest or about.get("settings") != _settings(method):
        return None
    try:
        bound = lipschitz(net, dataclasses.replace(method, proposals=proposals, until=math.inf), input_shape=shape)
        told = json.loads(about["proves"])
        if not all(now <= (1 + _CLOSE) * before for now, before in zip(_proves(bound), told, strict=True)):
            return None
    except (ValueError, TypeError, KeyError, RecursionError):  # arrays of other sizes, or of what are no multipliers
        return None
    status = about.get("status")
    return dataclasses.replace(bound, evidence={**bound.evidence, "status": status if status in _ENDED else "proved again"})


def ended_early(bound: Bound) -> bool:
    """Whether solving ended before it was done, now or when the multipliers were found."""
    return bound.evidence.get("status") in _ENDED


def _about(bound: Bound) -> dict[str, str]:
    network, status = str(bound.evidence["network"]), str(bound.evidence["status"])
    return {"network": network, "settings": json.dumps(bound.evidence["settings"]), "proves": json.dumps(_proves(bound)), "status": status}


def _settings(method: LipSDP) -> str:
    return json.dumps(method.settings)


def _proves(bound: Bound) -> list[Any]:
    """The constant of the network, and those of all differences of two outputs together."""
    return [bound.value, 0.0 if bound.pairs is None else float(bound.pairs.sum())]
