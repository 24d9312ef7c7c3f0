"""`Smoothing(...)`: the robustness method, from a network and inputs to certificates of its smoothed classifier."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

import lipnet
from certify.bound import Array, Assumption, Bound
from certify.certificate import Certificate
from certify.errors import CertifyError, StaleBound
from certify.graph import Graph
from certify.margins import RobustnessMethod
from certify.registry import Shape
from certify.smoothing.bounds import ClopperPearson, ConfidenceBound, EmpiricalBernstein
from certify.smoothing.classifier import Hardmax, ScoreMap, SmoothedClassifier
from certify.smoothing.engine import Done, Engine, Forward, Source
from certify.smoothing.engines import compiled
from certify.smoothing.noise import Gauss, Grid, noisy_rows, to_grid, total_variation
from certify.smoothing.noise.counts import UNIT
from certify.smoothing.noises import Gaussian, GaussianLinf, Noise
from certify.smoothing.schedule import GroupSequential, Outcome, Procedure, Schedule, Status


@dataclasses.dataclass(frozen=True)
class Smoothing(RobustnessMethod):
    """Randomized smoothing (Cohen, Rosenfeld & Kolter 2019): certificates of g, the class that the network gives most of the noisy copies of an input.

    Each certificate fails with probability at most `schedule.alpha`, over the noise that was drawn. It says that g does not change in the open ball; it says
    nothing of the network itself. With `levels` the copies lie on a grid of 1/levels, whose law is Gaussian to within a total variation that is taken from
    p_A; inputs off the grid are moved onto it, and the distance is taken from their radius. `levels=None` adds float noise to the inputs as they are, and the
    certificate takes for granted that it is Gaussian. Noise depends on `seed`, the number of the input and the number of the copy alone.

    `lipschitz`, a proved Bound of the logits of the very network, from l2 to l2 and everywhere, gives soft scores a larger radius where sigma is small.
    """

    noise: Noise
    scores: ScoreMap = dataclasses.field(default_factory=Hardmax)
    schedule: Schedule = dataclasses.field(default_factory=GroupSequential)
    bound: ConfidenceBound | None = None  # Clopper-Pearson for votes, empirical Bernstein for soft scores
    target: float | None = None
    tolerance: float | None = None
    levels: int | None = 255
    vote_margin: float = 0.0  # copies whose two largest logits are not further apart count against every class
    batch: int | None = None  # rows of a batch; about 2^18 numbers unless given
    seed: int = 0
    engine: str = "torch"  # or "compile", "onnxruntime", "openvino" (certify.smoothing.engines)
    lipschitz: Bound | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.noise, Gaussian | GaussianLinf):
            raise CertifyError(f"copies are drawn with Gaussian noise so far, got {self.noise!r}; its radius can be had from counts of your own (Procedure)")
        if (self.batch is not None and self.batch < 1) or self.vote_margin < 0:
            raise CertifyError(f"a batch has at least one row and a vote margin is not negative, got batch={self.batch} and vote_margin={self.vote_margin}")
        _ = self.copies, self._classifier  # refuse seeds, levels and sigmas that cannot be drawn, and constants that are not proved

    @property
    def copies(self) -> Grid | Gauss:
        """What is added to the inputs."""
        sigma = self.noise.sigma  # type: ignore[attr-defined]
        return Gauss(sigma, self.seed) if self.levels is None else Grid(sigma, self.seed, self.levels)

    @property
    def _classifier(self) -> SmoothedClassifier:
        return SmoothedClassifier(self.noise, self.scores, self.lipschitz)

    def rows(self, shape: Shape) -> int:
        """Of a batch of inputs of this shape: a power of two from 32 to 4096, unless given."""
        return self.batch or min(max(1 << (2**18 // math.prod(shape)).bit_length() - 1, 32) if math.prod(shape) <= 2**18 else 32, 4096)

    def procedure(self, shape: Shape) -> Procedure:
        """From counts of inputs of this shape to certificates."""
        classifier = self._classifier
        if isinstance(self.noise, GaussianLinf) and self.noise.dimension != np.prod(shape):
            raise CertifyError(f"{self.noise!r} is for inputs of {self.noise.dimension} entries, these have the shape {shape}")
        bound = self.bound or (ClopperPearson() if isinstance(self.scores, Hardmax) else EmpiricalBernstein())
        return Procedure(classifier, bound, self.schedule, target=self.target, tolerance=self.tolerance, distance=self._distance(int(np.prod(shape))))

    def _distance(self, elements: int) -> float:
        """How far p_A and p_B of the copies may be from those of the classifier that the radius is of.

        The law of the grid is that far from the Gaussian. The Lipschitz-aware radius is for scores that are Lipschitz: those counted are within 2 / UNIT of
        them, for they are in fixed point, and within `L sqrt(elements) / (2 levels)`, for a grid moves every entry by half a step at most.
        """
        distance = 0.0 if self.levels is None else total_variation(self.noise.sigma, elements, self.levels)  # type: ignore[attr-defined]
        if self.lipschitz is not None:
            slope = self.scores.lipschitz(self.lipschitz).value
            distance += (2 / UNIT + (0.0 if self.levels is None else slope * math.sqrt(elements) / (2 * self.levels))) * (1 + 1e-12)
        return distance if distance == 0 else math.nextafter(distance, math.inf)

    @property
    def norm(self) -> float:
        """Of the radius."""
        return np.inf if isinstance(self.noise, GaussianLinf) else 2.0

    @property
    def assumptions(self) -> frozenset[Assumption]:
        """What the certificates take for granted."""
        return frozenset({Assumption.RANDOM_BITS, Assumption.EVAL_MODE, *(() if self.levels else (Assumption.FLOAT_NOISE,))})

    def place(self, inputs: Array) -> tuple[Tensor, Array]:  # (N, *shape) -> channels last, and (N,)
        """The inputs as copies are made of them, and what is to be taken from each radius."""
        last = np.moveaxis(inputs, 1, -1) if inputs.ndim == 4 else inputs
        if self.levels is None:
            return torch.from_numpy(np.ascontiguousarray(last, dtype=np.float32)), np.zeros(len(inputs))
        whole, apart = to_grid(last, self.levels)  # in l2, which the maximum norm is not above
        return torch.from_numpy(np.ascontiguousarray(whole)), apart

    def run(
        self, forward: Forward, classes: int, shape: Shape, inputs: Iterable[tuple[int, Tensor, float]], device: torch.device | None = None
    ) -> Iterator[Done]:
        """Count copies of the inputs (number, placed, distance; see `place`) until each is decided."""
        device = device or torch.device("cpu")
        procedure = self.procedure(shape)
        procedure.start(classes)
        batch = self.rows(shape)
        slots = 3 * (batch // min(procedure.schedule.n0, procedure.schedule.sizes[0]) + 2)
        source = _Copies(self.copies, shape, slots, batch, device)
        yield from Engine(forward, classes, procedure, source, batch, slots, self.vote_margin, device).run(inputs)

    def prepared(self, net: nn.Module, shape: Shape) -> tuple[Forward, tuple[str, ...]]:
        """The function that is smoothed, as the engine runs it, and what was done to the network for it (see `prepared`)."""
        plain, done = prepared(net, shape)
        return compiled(plain, shape, self.rows(shape), self.engine), (*done, f"run by {self.engine}")

    def certify(self, net: nn.Module, inputs: Tensor) -> Certificate:
        shape = tuple(inputs.shape[1:])
        if self.lipschitz is not None and self.lipschitz.evidence.get("network") != (digest := Graph.of(net, shape).digest):
            raise StaleBound(str(self.lipschitz.evidence.get("network")), digest)
        device = next((tensor.device for tensor in net.state_dict().values()), torch.device("cpu"))
        forward, _ = self.prepared(net, shape)
        classes = count_classes(forward, shape, self.rows(shape), device)
        placed, apart = self.place(inputs.detach().cpu().numpy())
        count = len(inputs)
        prediction, radius = np.full(count, -1, dtype=np.int64), np.zeros(count)
        runner_up = np.full(count, -1, dtype=np.int64)
        for done in self.run(forward, classes, shape, zip(range(count), placed, apart.tolist(), strict=True), device):
            found = certified_radius(done.outcome, float(apart[done.index]))
            sums = done.looks[-1].sums.copy()
            sums[int(done.selection.favourite)] = -1
            runner_up[done.index] = int(sums.argmax())
            if found > 0:
                prediction[done.index], radius[done.index] = int(done.selection.favourite), found
        return Certificate(
            prediction=prediction,
            runner_up=runner_up,
            abstained=prediction < 0,
            radius=radius,
            norm=self.norm,
            method=repr(self),
            failure=self.schedule.alpha,
            assumptions=self.assumptions,
            seed=self.seed,
        )


def certified_radius(outcome: Outcome, apart: float) -> float:
    """The radius around the input itself, which is so far from where the copies were made."""
    if outcome.status is Status.ABSTAINED or not outcome.radius > apart:
        return 0.0
    return outcome.radius if apart == 0 else float(np.nextafter(outcome.radius - apart, 0.0))


def prepared(net: nn.Module, shape: Shape) -> tuple[nn.Module, tuple[str, ...]]:
    """The function that is smoothed, and what was done to the network for it: its weights as numbers, batch normalisation folded into convolutions, channels
    last. Raises CertifyError for a module in training mode, which looks at other inputs of a batch or draws at random.
    """
    training = next((name or type(net).__name__ for name, module in net.named_modules() if module.training), None)
    if training is not None:
        raise CertifyError(f"the network is in training mode (at {training}), where an output may depend on the other inputs of a batch; call net.eval() first")
    done = ["weights as numbers"]
    try:
        plain = lipnet.freeze(net)
    except Exception:  # a forward that torch.fx cannot trace: it is run as it is
        plain, done = copy.deepcopy(net), []
    if any(isinstance(module, nn.BatchNorm2d) for module in plain.modules()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.fx.experimental.optimization import fuse

                plain = fuse(plain)
            done.append("batch normalisation folded into convolutions")
        except Exception:  # not traceable, or built otherwise: as it is
            pass
    if len(shape) == 3:
        plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        done.append("channels last")
    return plain.eval().requires_grad_(False), tuple(done)


@torch.no_grad()
def count_classes(forward: Forward, shape: Shape, batch: int, device: torch.device | None = None) -> int:
    """How many the network has. Raises CertifyError where it is no classifier of such inputs."""
    x = torch.zeros(batch, *shape, device=device)
    try:
        logits = forward(x)
    except Exception as error:  # torch raises many kinds here
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CertifyError(f"the network does not take {batch} inputs of shape {shape} in float32: {line}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != batch or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CertifyError(f"a classifier returns (batch, classes) with at least two classes, this network returns {found} for {batch} inputs")
    return int(logits.shape[1])


class _Copies(Source):
    """Gaussian copies, on the grid or in float, in one buffer that is used again."""

    def __init__(self, noise: Grid | Gauss, shape: Shape, slots: int, batch: int, device: torch.device) -> None:
        last = (*shape[1:], shape[0]) if len(shape) == 3 else shape
        self.noise, self.device = noise, device
        self.images = torch.zeros(slots, *last, dtype=torch.int32 if isinstance(noise, Grid) else torch.float32, device=device)
        self.out = torch.empty(batch, *last, device=device)
        self.view = self.out.permute(0, 3, 1, 2) if len(shape) == 3 else self.out

    def hold(self, slot: int, image: Tensor) -> None:
        self.images[slot] = image.to(self.device, non_blocking=True)

    def draw(self, rows: np.ndarray) -> Tensor:
        noisy_rows(self.noise, self.images, torch.from_numpy(rows).to(self.device, non_blocking=True), out=self.out)
        return self.view
