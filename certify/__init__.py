"""What a network is certified to do. Imports lipnet and sdp; neither imports it.

Names are loaded when they are first used, so that `certify --help` and `import certify` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certify import data as data
    from certify.attack import PGD as PGD
    from certify.attack import Foolbox as Foolbox
    from certify.attack import falsify as falsify
    from certify.autoattack import AutoAttack as AutoAttack
    from certify.bound import Assumption as Assumption
    from certify.bound import Ball as Ball
    from certify.bound import Bound as Bound
    from certify.bound import Box as Box
    from certify.bound import Domain as Domain
    from certify.bound import Estimate as Estimate
    from certify.bound import Everywhere as Everywhere
    from certify.certificate import Certificate as Certificate
    from certify.errors import CertifyError as CertifyError
    from certify.errors import StaleBound as StaleBound
    from certify.errors import Unsupported as Unsupported
    from certify.frequency import LipSDPFrequency as LipSDPFrequency
    from certify.graph import Graph as Graph
    from certify.lipsdp import LipSDP as LipSDP
    from certify.local.method import Local as Local
    from certify.local.monotone import Monotone as Monotone
    from certify.local.monotone import monotone as monotone
    from certify.local.radius import LocalMargin as LocalMargin
    from certify.lowrank import LowRank as LowRank
    from certify.margins import Margin as Margin
    from certify.margins import robustness as robustness
    from certify.methods import Layerwise as Layerwise
    from certify.methods import lipschitz as lipschitz
    from certify.registry import register as register
    from certify.registry import register_head as register_head
    from certify.smoothing.method import Smoothing as Smoothing
    from certify.smoothing.mixed import Mixed as Mixed

_HOME = {
    "AutoAttack": "autoattack", "Foolbox": "attack", "PGD": "attack", "falsify": "attack",
    "Assumption": "bound", "Ball": "bound", "Bound": "bound", "Box": "bound", "Domain": "bound", "Estimate": "bound", "Everywhere": "bound",
    "Certificate": "certificate",
    "CertifyError": "errors", "StaleBound": "errors", "Unsupported": "errors",
    "LipSDPFrequency": "frequency",
    "Graph": "graph",
    "LipSDP": "lipsdp",
    "Local": "local.method", "LocalMargin": "local.radius", "Monotone": "local.monotone", "monotone": "local.monotone",
    "Layerwise": "methods", "lipschitz": "methods",
    "register": "registry", "register_head": "registry",
    "LowRank": "lowrank",
    "Margin": "margins", "robustness": "margins",
    "Smoothing": "smoothing.method", "Mixed": "smoothing.mixed",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "data":
        return importlib.import_module("certify.data")
    if name not in _HOME:
        raise AttributeError(f"module 'certify' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"certify.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
