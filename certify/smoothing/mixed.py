"""`Mixed(...)`: certificates of an accurate classifier mixed with a smoothed one (adaptive smoothing, Bai et al. 2024), at a fixed weight."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor, nn

from certify.bound import Array
from certify.certificate import Certificate
from certify.errors import CertifyError
from certify.margins import RobustnessMethod
from certify.smoothing import radius
from certify.smoothing.classifier import SmoothedClassifier
from certify.smoothing.engine import Done
from certify.smoothing.method import Smoothing, device_of, less, numbers
from certify.smoothing.noises import Gaussian, Noise
from certify.smoothing.prepare import tried
from certify.smoothing.radius import check_sigma, normal_quantile
from certify.smoothing.schedule import Procedure

_ROUNDING = 1e-6  # of the scores of `accurate`, in float32, and of the sums with them


@dataclasses.dataclass(frozen=True)
class Mixed(RobustnessMethod):
    """Certificates of `argmax_k (1 - weight) g_k(x) + weight h_k(x)`: g the softmax scores of `accurate` at x itself, h the smoothed scores of the network.

    `certify.robustness(robust, x, Mixed(smoothing, accurate, weight))` smooths `robust` by Gaussian noise, as `smoothing` says. Within the radius of
    `radius.mixed`, the smoothed top class leads by more than `(1 - weight) / weight`, so it is that of the mixture whatever g is: nothing is asked of
    `accurate`, but that its scores lie in [0, 1] (they are 0 where its logits are not finite). Where no radius is certified, the prediction of the mixture at
    x may still be, from g(x) and bounds on h(x): its radius is 0. Otherwise the input is abstained. Both fail together with at most `schedule.alpha`.
    Raises CertifyError for a weight outside (1/2, 1], for other noise, and for a Lipschitz constant.
    """

    smoothing: Smoothing
    accurate: nn.Module = dataclasses.field(repr=False)
    weight: float  # of the smoothed classifier
    temperature: float = 1.0  # of the softmax of `accurate`

    def __post_init__(self) -> None:
        if type(self.smoothing.noise) is not Gaussian or self.smoothing.lipschitz is not None:
            raise CertifyError(f"a mixture is certified with Gaussian noise in l2, without a Lipschitz constant, got {self.smoothing!r}")
        check_sigma(self.temperature, "temperature")
        radius.mixed(0.9, self.smoothing.noise.sigma, self.weight)  # refuses the weight

    def certify(self, net: nn.Module, inputs: Tensor) -> Certificate:
        shape, count = tuple(inputs.shape[1:]), len(inputs)
        forward, classes, done_to = self.smoothing.prepared(net, shape)
        g = self._scores(inputs, classes)
        placed, apart = self.smoothing.place(numbers(inputs))
        procedure = self._procedure(shape)
        prediction, found = np.full(count, -1, dtype=np.int64), np.zeros(count)
        runner_up = np.full(count, -1, dtype=np.int64)
        numbered = zip(range(count), placed, apart.tolist(), strict=True)
        for done in self.smoothing.run(forward, classes, shape, numbered, device_of(net), procedure):
            i = done.index
            chosen, runner_up[i] = self._first_two(g[i], done)
            found[i], certain = self._certified(procedure, done, chosen, g[i], float(apart[i]))
            prediction[i] = chosen if certain else -1
        return Certificate(
            prediction=prediction,
            runner_up=runner_up,
            abstained=prediction < 0,
            radius=found,
            norm=2.0,
            method=f"{self!r}: {', '.join(done_to)}, mixed with {type(self.accurate).__name__}",
            failure=self.smoothing.schedule.alpha,
            assumptions=self.smoothing.assumptions,
            seed=self.smoothing.seed,
        )

    def _procedure(self, shape: tuple[int, ...]) -> Procedure:
        """That of the smoothed classifier, with the radius of the mixture: what targets and tolerances are about."""
        procedure = self.smoothing.procedure(shape)
        noise = procedure.classifier.noise
        assert isinstance(noise, Gaussian)
        return dataclasses.replace(procedure, classifier=SmoothedClassifier(_InMixture(noise.sigma, self.weight), self.smoothing.scores))

    @torch.no_grad()
    def _scores(self, inputs: Tensor, classes: int) -> Array:  # (N, classes)
        """g."""
        shape = tuple(inputs.shape[1:])
        batch = self.smoothing.rows(shape)
        own, _, (logits, *_) = tried(self.accurate, shape, batch, device_of(self.accurate))
        if logits.shape[1] != classes:
            raise CertifyError(f"the classifiers of a mixture have the same classes, got {logits.shape[1]} and, of the one that is smoothed, {classes}")
        parts = inputs.detach().to(logits.device, logits.dtype).split(batch)
        z = torch.cat([own(part) for part in parts]).double().cpu().numpy()
        finite = np.isfinite(z).all(axis=1, keepdims=True)
        return np.where(finite, special.softmax(np.where(finite, z, 0.0) / self.temperature, axis=1), 0.0)

    def _first_two(self, g: Array, done: Done) -> tuple[int, int]:
        """The classes that the mixture favours, by the copies that choose."""
        selection = done.selection
        scores = (1 - self.weight) * g + self.weight * selection.sums / (selection.n * selection.unit)
        chosen = int(scores.argmax())
        scores[chosen] = -1
        return chosen, int(scores.argmax())

    def _certified(self, procedure: Procedure, done: Done, chosen: int, g: Array, apart: float) -> tuple[float, bool]:
        """The radius around x, and whether the mixture says `chosen` at x. All looks hold at once, and copies were made so far from x."""
        sigma, best, certain = float(procedure.classifier.noise.sigma), 0.0, False  # type: ignore[attr-defined]
        rival = float(np.delete(g, chosen).max())
        for look, tally in enumerate(done.looks):
            low, high = procedure.interval(look, done.selection, tally, chosen)
            best = max(best, less(float(procedure.classifier.radius(low, high)), apart))
            least, most = _shifted(float(low), -apart / sigma), _shifted(float(high), apart / sigma)
            certain = certain or (1 - self.weight) * (float(g[chosen]) - rival) + self.weight * (least - most) > _ROUNDING
        return best, certain or best > 0


@dataclasses.dataclass(frozen=True)
class _InMixture(Noise):
    """Gaussian noise, with the radius of the mixture."""

    sigma: float
    weight: float
    measure = Gaussian.measure
    norm = Gaussian.norm

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        return radius.mixed(p_lower, self.sigma, self.weight, p_upper)


def _shifted(p: float, by: float) -> float:
    """`Phi(Phi^-1(p) + by)`, to 1e-11: a smoothed score moves by no more on the way from the copies to the input."""
    return p if by == 0 or not 0 < p < 1 else float(special.ndtr(normal_quantile(np.asarray(p)) + by))
