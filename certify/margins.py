"""`robustness(net, inputs, method)`: a certified radius for each input."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from certify.bound import Array, Bound, Everywhere
from certify.certificate import Certificate
from certify.errors import CertifyError, StaleBound
from certify.graph import Graph
from certify.rounding import up

_BATCH = 1024


class Runs(Protocol):
    """A network that can be run as it is certified and attacked."""

    @property
    def double(self) -> nn.Module:
        """Frozen, its numbers taken exactly into float64."""


class RobustnessMethod(abc.ABC):
    """A way to certify predictions; a value with its own options."""

    @abc.abstractmethod
    def certify(self, net: nn.Module, inputs: Tensor) -> Certificate:
        """A certificate for each input."""


@dataclasses.dataclass(frozen=True)
class Margin(RobustnessMethod):
    """`radius = min_j (z_i - z_j) / K_ij`, i the predicted class, K the constants of a proved bound (Tsuzuku, Sato & Sugiyama 2018).

    K_ij are the bound's own pair constants where it has them; otherwise `sqrt(2) L` for a bound to l2, `2 L` to l-infinity. Logits are those of the frozen
    network in float64.
    A tie gives radius 0; logits that are not finite give no prediction. The bound must hold everywhere and belong to the very numbers of the network.
    """

    bound: Bound

    def __repr__(self) -> str:
        return f"Margin({self.bound.method})"

    def certify(self, net: nn.Module, inputs: Tensor) -> Certificate:
        if not isinstance(self.bound, Bound):
            raise TypeError(f"Margin needs a proved Bound, got {type(self.bound).__name__}; an estimate cannot certify anything")
        if self.bound.norm[1] not in (2, math.inf) or not isinstance(self.bound.domain, Everywhere):
            raise CertifyError(f"Margin needs a bound from some l_p to l2 or l-infinity that holds everywhere, got {self.bound.norm} on {self.bound.domain}")
        graph = Graph.of(net, tuple(inputs.shape[1:]))
        if self.bound.evidence.get("network") != graph.digest:
            raise StaleBound(str(self.bound.evidence.get("network")), graph.digest)
        return self.of_logits(logits(graph, inputs))

    def of_logits(
        self,
        z: Array,  # (N, classes)
    ) -> Certificate:
        """The certificate that these logits give."""
        rows = np.arange(len(z))
        finite: NDArray[np.bool_] = np.asarray(np.isfinite(z).all(axis=1))
        prediction = np.where(finite, np.argmax(np.where(finite[:, None], z, 0.0), axis=1), -1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            gaps = np.nextafter(z[rows, prediction][:, None] - z, -np.inf)
            radii = np.nextafter(gaps / self._constants(z.shape[1])[prediction], -np.inf)
        radii[rows, prediction] = np.inf
        radii[~finite] = 0.0
        runner_up = np.argmin(radii, axis=1)
        radius = np.where(finite, np.maximum(radii[rows, runner_up], 0.0), 0.0)
        return Certificate(
            prediction=prediction,
            runner_up=runner_up,
            abstained=~finite,
            radius=radius,
            norm=self.bound.norm[0],
            method=repr(self),
            assumptions=self.bound.assumptions,
        )

    def _constants(self, classes: int) -> Array:
        """K, with the diagonal and equal rows at the smallest positive number (a margin that cannot change has an infinite radius)."""
        fallback = np.full((classes, classes), up((up(math.sqrt(2)) if self.bound.norm[1] == 2 else 2.0) * self.bound.value))
        pairs = fallback if self.bound.pairs is None else self.bound.pairs
        return np.maximum(pairs, np.finfo(np.float64).tiny)


def robustness(net: nn.Module, inputs: Tensor, method: RobustnessMethod) -> Certificate:
    """Certify the predictions of `net` at `inputs` (N, ...), in the units of `inputs`.

    Raises ValueError for inputs that are not finite, Unsupported for a network that the method cannot see through, StaleBound for a bound of other weights.
    """
    if not isinstance(method, RobustnessMethod):
        raise ValueError(f"a method is a value such as certify.Margin(bound), certify.LocalMargin() or certify.Smoothing(...), got {method!r:.80}")
    check_inputs(inputs)
    return method.certify(net, inputs)


def check_inputs(inputs: Tensor) -> None:
    """Raises ValueError for what is no batch of finite floating-point numbers."""
    if not isinstance(inputs, Tensor):
        raise ValueError(f"inputs are a tensor (N, ...), got {type(inputs).__name__}; torch.from_numpy makes one of an array")
    if not torch.is_floating_point(inputs):
        raise ValueError(f"inputs must be floating-point numbers, got {inputs.dtype}; convert them with inputs.float() and scale them as in training")
    if inputs.dim() < 2:
        raise ValueError(f"inputs are a batch (N, ...), got the shape {tuple(inputs.shape)}; a single input x is the batch x[None]")
    if not torch.isfinite(inputs).all():
        raise ValueError("inputs hold NaN or infinite numbers; leave these rows out")


def gap(
    z: Array,  # (classes,)
) -> float | None:
    """How far the largest logit is ahead of the next, rounded down; None for logits that are not finite. What a row says of its margin."""
    if not np.isfinite(z).all():
        return None
    second, first = np.sort(z)[-2:]
    return max(0.0, float(np.nextafter(first - second, -np.inf)))


def same_gap(stored: object, found: float | None) -> bool:
    """Whether a stored margin is the one that is found again. Both are of logits that another BLAS may move by some 1e-7 of their size, layer by layer."""
    if found is None or isinstance(stored, bool) or not isinstance(stored, float | int):
        return stored is found
    room = 1e-5 * max(1.0, found)
    return found - room <= stored <= found + room


@torch.no_grad()
def logits(graph: Runs, inputs: Tensor) -> Array:
    """The logits of the frozen network, with its weights and the inputs taken exactly into float64."""
    net = graph.double
    batches = [net(batch.cpu().double().clone()) for batch in inputs.split(_BATCH)]
    z = torch.cat(batches) if batches else torch.empty(0, 1)
    if z.dim() != 2 or z.shape[1] < 2:
        raise CertifyError(f"a classifier returns (batch, classes) with at least two classes, this network returns {tuple(z.shape)} for {len(inputs)} inputs")
    return z.numpy()
