"""AutoAttack (Croce & Hein 2020) by the package pyautoattack. The only file that imports it."""

from __future__ import annotations

import dataclasses
import logging
import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from certify.attack import Attack, by_radius, nearer
from certify.bound import Array
from certify.errors import CertifyError

_TARGETS = 9  # classes that the targeted attacks of the standard version try
_QUERIES = 50  # of the square attack for each step of the others, as in the standard version: 5000 for 100
_DLR = 4  # classes that the difference of logits ratio needs


@dataclasses.dataclass(frozen=True)
class AutoAttack(Attack):
    """The four attacks of AutoAttack's standard version, for one radius at a time: that is doubled until one of them finds a point, then bisected.

    APGD on cross-entropy, targeted APGD and targeted FAB (from four classes on, untargeted FAB below), and Square, for pictures, in l2 of sizes it can tile
    (28 and 32 are, 12 is not). They keep to [0, 1] with and without `clip`. With the default `steps=100` each is as in the standard version. Needs the extra
    `lipnet[attacks]`.
    """

    restarts: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _package()

    @property
    def name(self) -> str:
        return "autoattack"

    def propose(self, net: nn.Module, x: Tensor, z: Array, seed: int) -> Tensor:
        if not (x.min() >= 0 and x.max() <= 1):
            raise CertifyError(f"AutoAttack is for inputs in [0, 1], got entries from {float(x.min()):g} to {float(x.max()):g}; take another attack")
        package, label, classes = _package(), int(np.argmax(z)), len(z)
        attacks = ["apgd-ce", *(["apgd-t", "fab-t"] if classes >= _DLR else ["fab"]), *(["square"] if x.dim() == 4 and _is_tiled(x, self.norm) else [])]
        rows, labels = x.float().expand(self.restarts, *x.shape[1:]).clone(), torch.full((self.restarts,), label)

        def run(radius: float) -> Tensor:
            made = package.AutoAttack(
                lambda points: net(points.double()).float(),
                attacks=attacks,
                eps=radius,
                norm="L2" if self.norm == 2 else "Linf",
                seed=seed % 2**31,
                version="custom",
            )
            made.apgd.n_restarts = made.fab.n_restarts = made.apgd_targeted.n_restarts = 1
            made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = self.steps
            made.apgd_targeted.n_target_classes = made.fab.n_target_classes = min(_TARGETS, classes - 1)
            made.square.n_queries = _QUERIES * self.steps
            points: Tensor = made.run_standard_evaluation(rows, labels, batch_size=len(rows))[0]
            return points

        with torch.random.fork_rng([]), torch.enable_grad():
            return nearer(net, x, by_radius(run, net, x, z, self.norm), z)


def _is_tiled(x: Tensor, norm: float) -> bool:
    """Whether the tiles that Square starts from in l2, with sides of a fifth of the height and as many as fit, lie within the picture where it puts them."""
    height, width = x.shape[2:]
    side = height // 5
    first = (height - 5 * side) // 2
    return norm == math.inf or (side > 0 and all(first + length // side * side <= length for length in (height, width)))


def _package() -> ModuleType:
    """The package, silent. Raises CertifyError that names the extra where it is not installed."""
    try:
        import pyautoattack
    except ImportError as error:
        raise CertifyError(f"AutoAttack needs the extra lipnet[attacks] ({error}); install it, or take pgd, which needs nothing") from error
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # its warnings are of whole test sets
    module: ModuleType = pyautoattack
    return module
