"""The smoothed classifier: which noise, which scores, which Lipschitz constant. One for all inputs: it is what the certificates are of."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from certify.bound import Array, Bound
from certify.errors import CertifyError
from certify.rounding import multiply_up, up
from certify.smoothing import radius
from certify.smoothing.noises import Gaussian, Noise
from certify.smoothing.radius import check_sigma


class ScoreMap(abc.ABC):
    """From logits to scores in [0, 1] whose sum is 1; a value, and a part of the classifier."""

    @abc.abstractmethod
    def __call__(
        self,
        logits: Array,  # (..., classes)
    ) -> Array:
        """The scores, row by row."""

    @abc.abstractmethod
    def slope(self, classes: float = math.inf) -> float:
        """The largest Euclidean norm of the gradient of one score; infinite where a score jumps."""

    @abc.abstractmethod
    def weight(self, classes: float = math.inf) -> float:
        """The gradient of a score s_k is a sum of differences of two gradients of logits, z_k - z_j; the largest sum of their weights."""

    def lipschitz(self, logits: Bound) -> Bound:
        """`|s_k(x) - s_k(y)| <= value |x - y|_p` for each score s_k, from a bound of the logits in l2, or of differences of two of them, where those are known
        and give less. Raises CertifyError for scores that jump, or nearly."""
        classes = math.inf if logits.pairs is None else len(logits.pairs)
        slope = self.slope(classes)
        if not math.isfinite(slope):
            raise CertifyError(f"the scores of {self!r} are votes: they jump, and have no Lipschitz constant; take Softmax(...) or Sparsemax(...)")
        try:
            found = Bound(slope, method=repr(self), norm=(2, math.inf)) @ logits
        except OverflowError as error:
            raise CertifyError(f"{self!r} of logits with a Lipschitz constant of {logits.value:g}: {error}; take a larger temperature") from error
        if logits.pairs is None:
            return found
        return dataclasses.replace(found, value=min(found.value, multiply_up(self.weight(classes), float(logits.pairs.max()))))


@dataclasses.dataclass(frozen=True)
class Hardmax(ScoreMap):
    """A vote for the largest logit, the first of several."""

    def __call__(self, logits: Array) -> Array:
        return np.eye(logits.shape[-1])[np.argmax(logits, axis=-1)]

    def slope(self, classes: float = math.inf) -> float:
        return math.inf

    def weight(self, classes: float = math.inf) -> float:
        return math.inf


@dataclasses.dataclass(frozen=True)
class Softmax(ScoreMap):
    """softmax(logits / temperature). The gradient of s_k is s_k (e_k - s) / temperature, at most sqrt(2)/4 / temperature long.

    As a sum over j of s_k s_j (e_k - e_j) / temperature it has the weights s_k (1 - s_k) / temperature, at most 1/4 / temperature.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_sigma(self.temperature, "temperature")

    def __call__(self, logits: Array) -> Array:
        return np.asarray(special.softmax(logits / self.temperature, axis=-1))

    def slope(self, classes: float = math.inf) -> float:
        return up(up(math.sqrt(2) / 4) / self.temperature)

    def weight(self, classes: float = math.inf) -> float:
        return up(0.25 / self.temperature)


@dataclasses.dataclass(frozen=True)
class Sparsemax(ScoreMap):
    """The projection of logits / temperature on the simplex (Martins & Astudillo 2016). Gradients: sqrt(1 - 1/m) / temperature, m the support.

    In the support, the gradient of s_k is the sum over the others j in it of (e_k - e_j) / m / temperature, of weights 1 - 1/m.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_sigma(self.temperature, "temperature")

    def __call__(self, logits: Array) -> Array:
        z = -np.sort(-logits / self.temperature, axis=-1)
        excess = np.cumsum(z, axis=-1) - 1
        support = np.sum(z * np.arange(1, z.shape[-1] + 1) > excess, axis=-1, keepdims=True)
        threshold = np.take_along_axis(excess, support - 1, -1) / support
        return np.maximum(logits / self.temperature - threshold, 0.0)

    def slope(self, classes: float = math.inf) -> float:
        return up(up(math.sqrt(1 - 1 / classes)) / self.temperature)

    def weight(self, classes: float = math.inf) -> float:
        return up(up(1 - 1 / classes) / self.temperature)


@dataclasses.dataclass(frozen=True)
class SmoothedClassifier:
    """g(x) = the class of the largest mean score under the noise.

    Noise, map and temperature are the classifier's identity: a certificate says that g does not change around x, so g is the same for all x. To choose the
    map or its temperature by what an input is given (the best of several radii) certifies no classifier at all: see `choose_scores`, which decides on held-out
    inputs, once. `lipschitz`, a proved Bound of the logits in l2 that holds everywhere, gives the larger, Lipschitz-aware radius of soft scores.
    Raises TypeError for a Lipschitz constant that is not a Bound, CertifyError for one that cannot be used.
    """

    noise: Noise
    scores: ScoreMap = Hardmax()
    lipschitz: Bound | None = None  # of the logits

    def __post_init__(self) -> None:
        if not (isinstance(self.noise, Noise) and isinstance(self.scores, ScoreMap)):
            raise TypeError(f"a smoothed classifier has one noise and one map to scores, got {self.noise!r} and {self.scores!r}")
        if self.lipschitz is not None:
            radius.slope(self.lipschitz)
            self.scores.lipschitz(self.lipschitz)
            if not isinstance(self.noise, Gaussian):
                raise CertifyError(f"the Lipschitz-aware radius is for Gaussian noise in l2, got {self.noise!r}")

    def radius(self, p_lower: ArrayLike, p_upper: ArrayLike | None = None) -> Array:
        """What the noise, and the Lipschitz constant where there is one, certify for these bounds on the smoothed scores."""
        if self.lipschitz is None or not isinstance(self.noise, Gaussian):
            return self.noise.radius(p_lower, p_upper)
        return radius.lipschitz_aware(p_lower, self.noise.sigma, self.scores.lipschitz(self.lipschitz), p_upper)

    @property
    def digest(self) -> str:
        """The sha256 of noise and map, which every row of results carries. (The network has a digest of its own; a Lipschitz constant is evidence.)"""
        return hashlib.sha256(f"{self.noise!r} {self.scores!r}".encode()).hexdigest()


def choose_scores(held_out: Mapping[ScoreMap, ArrayLike]) -> ScoreMap:
    """The map with the largest mean radius over held-out inputs: a choice for the classifier, once, that costs no alpha.

    `held_out` has, for each candidate, its radii on the same inputs (0 where it is wrong or abstains). Raises CertifyError for fewer than 30 of them: a map
    chosen for a few inputs is a map chosen for an input.
    """
    radii = {scores: np.asarray(values, dtype=np.float64) for scores, values in held_out.items()}
    sizes = {len(values) for values in radii.values()}
    if len(sizes) != 1 or min(sizes) < 30:
        raise CertifyError(f"a map is chosen on at least 30 held-out inputs, the same for each candidate, got {sorted(sizes)}")
    return max(radii, key=lambda scores: float(radii[scores].mean()))
