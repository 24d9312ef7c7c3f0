"""`Smoothing(...)`: the robustness method, from a network and inputs to certificates of its smoothed classifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.bound import Array, Assumption, Bound
from certify.certificate import Certificate
from certify.device import ieee
from certify.errors import CertifyError, StaleBound
from certify.graph import Graph
from certify.margins import RobustnessMethod
from certify.registry import Shape
from certify.smoothing.bounds import ClopperPearson, ConfidenceBound, EmpiricalBernstein
from certify.smoothing.classifier import Hardmax, ScoreMap, SmoothedClassifier, Softmax, Sparsemax
from certify.smoothing.engine import Done, Engine, Forward, Source
from certify.smoothing.noise import Gauss, Grid, noisy_rows, to_grid, total_variation
from certify.smoothing.noise import counts as counting
from certify.smoothing.noise.counts import UNIT
from certify.smoothing.noise.other import DRAWN, Drawn, seen
from certify.smoothing.noises import (
    Gaussian,
    GaussianLinf,
    Laplace,
    Noise,
    Uniform,
    UniformLinf,
)
from certify.smoothing.prepare import prepared, tried
from certify.smoothing.schedule import GroupSequential, Outcome, Procedure, Schedule, Status
from certify.smoothing.shared import BLOCK, FirstOnce, SharedCopies, once


@dataclasses.dataclass(frozen=True)
class Smoothing(RobustnessMethod):
    """Randomized smoothing (Cohen, Rosenfeld & Kolter 2019): certificates of g, the class that the network gives most of the noisy copies of an input.

    Each certificate fails with probability at most `schedule.alpha`, over the noise that was drawn. It says that g does not change in the open ball; it says
    nothing of the network itself. With `levels` the copies lie on a grid of 1/levels, whose law is that of the noise to within a total variation that is
    taken from p_A; inputs off the grid are moved onto it, and the distance is taken from their radius. `levels=None` adds float noise to the inputs as they
    are, and the certificate takes for granted that it has the law it should have. What is not added (ablation, transforms) has no grid and needs
    `levels=None`; nothing is clipped between an attack and the transform. Noise depends on `seed`, the number of the input and the number of the copy alone:
    inputs are numbered from 0 in every call, so all certificates of two calls hold, but they are not independent.

    Under `Ablation` the network is given x and then 1 - x along the first axis, so twice the channels, and 0 in both where a pixel is hidden.

    `shared` draws the same noise for all inputs: copy s of each has noise s. Every certificate holds as before, with its own alpha; but whether one fails is
    then not independent of whether another does. Where the network begins with a linear layer, and runs by torch on the CPU on a grid, that layer is evaluated
    in exact arithmetic, and its products with the noise are computed once for all inputs (`certify.smoothing.shared`).

    `dtype="bfloat16"` certifies another function: the network with weights, inputs and all that lies between rounded to bfloat16, as torch evaluates it. Who
    deploys it in float32 has no certificate.

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
    batch: int | None = None  # rows of a batch; see `rows` unless given
    seed: int = 0
    engine: str = "torch"  # or "compile", "onnxruntime", "openvino" (certify.smoothing.engines)
    shared: bool = False  # one noise for all inputs
    dtype: str = "float32"  # or "bfloat16": the network in bfloat16 is then what is smoothed
    lipschitz: Bound | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.noise, Noise):
            raise CertifyError(f"a noise is a value such as certify.smoothing.Gaussian(0.25), got {self.noise!r:.80}")
        if type(self.noise) not in _DRAWN:
            drawn = ", ".join(sorted(kind.__name__ for kind in _DRAWN))
            raise CertifyError(f"no copies are drawn with {self.noise!r}, but with {drawn}; its radius can be had from counts of your own (Procedure)")
        for name, kind in _KINDS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise CertifyError(f"{name}={value!r} is not of the kind that smoothing takes; see help(Smoothing)")
        if self.dtype not in ("float32", "bfloat16"):
            raise CertifyError(f"a network is evaluated in float32 or bfloat16, got dtype={self.dtype!r}")
        if self.dtype == "bfloat16" and (self.lipschitz is not None or self.engine != "torch"):
            wanted = "with a Lipschitz constant it is evaluated in float64" if self.lipschitz is not None else f"{self.engine} runs it in float32"
            raise CertifyError(f"bfloat16 is for a network that torch runs, and {wanted}; leave one of the two out")
        if self.batch is not None and not (isinstance(self.batch, int) and self.batch >= 1):
            raise CertifyError(f"a batch has at least one row, got batch={self.batch}")
        soft = self.scores.temperature if isinstance(self.scores, Softmax | Sparsemax) else None
        counting.check(2, (1, 3), (None, None), self.vote_margin, soft or 1.0)
        if soft is not None and (most := max(self.schedule.n0, self.schedule.sizes[-1])) >= 2**23:
            raise CertifyError(f"sums of soft scores are exact for fewer than 2^23 copies, got {most}; take fewer, or votes")
        _ = self.copies, self._classifier  # refuse seeds, levels and sigmas that cannot be drawn, and constants that are not proved

    @property
    def copies(self) -> Grid | Gauss | Drawn:
        """What makes copies of the inputs."""
        added = _law(self.noise)
        if self.levels is None:
            return Gauss(added[1], self.seed) if added is not None and added[0] == "gaussian" else Drawn(self.noise, self.seed)
        if added is None:
            raise CertifyError(f"{self.noise!r} is not added to inputs on a grid, it is applied to them as they are: take levels=None")
        return Grid(added[1], self.seed, self.levels, scale=None if self.lipschitz is None else (1.0,), law=added[0])

    @property
    def _classifier(self) -> SmoothedClassifier:
        rounded = isinstance(self.copies, Gauss)  # its sigma is a float32
        noise = dataclasses.replace(self.noise, sigma=float(np.float32(self.noise.sigma))) if rounded else self.noise  # type: ignore
        return SmoothedClassifier(noise, self.scores, self.lipschitz)

    def rows(self, shape: Shape, device: torch.device | None = None) -> int:
        """Of a batch of inputs of this shape, a power of two unless given: about 2^18 numbers for images, 2^19 for others, whose networks are smaller, and 2^24
        on a GPU.
        """
        numbers, most = (2**18, 4096) if len(shape) == 3 else (2**19, 8192)
        if device is not None and device.type != "cpu":
            numbers, most = 2**24, 2**16
        return self.batch or min(max(1 << (numbers // math.prod(shape)).bit_length() >> 1, 32), most)

    def procedure(self, shape: Shape) -> Procedure:
        """From counts of inputs of this shape to certificates."""
        classifier = self._classifier
        if isinstance(self.copies, Drawn):
            self.copies.check(shape)
        if isinstance(self.noise, GaussianLinf | UniformLinf) and self.noise.dimension != np.prod(shape):
            raise CertifyError(f"{self.noise!r} is for inputs of {self.noise.dimension} entries, these have the shape {shape}")
        if (moved := self._moved(int(np.prod(shape)))) >= 0.5:
            raise CertifyError(
                f"rounding to the grid of {self.levels} levels in each of {np.prod(shape)} entries moves mean scores by up to {moved:.3g}, by their "
                "Lipschitz constant, so they certify nothing; take more levels (or none: levels=None), a larger temperature, or no constant"
            )
        bound = self.bound or (ClopperPearson() if isinstance(self.scores, Hardmax) else EmpiricalBernstein())
        return Procedure(classifier, bound, self.schedule, target=self.target, tolerance=self.tolerance, distance=self._distance(int(np.prod(shape))))

    def _distance(self, elements: int) -> float:
        """How far p_A and p_B of the copies may be from those of the classifier that the radius is of.

        The law of the grid is that far from that of the noise. The Lipschitz-aware radius is for scores that are Lipschitz: those counted are within
        4 / UNIT of them, for they are in fixed point (2 / UNIT) and made of rounded logits, and the mean of those on a grid is within `_moved` of the mean
        under the noise.
        """
        copies = self.copies
        distance = 0.0
        if not isinstance(copies, Gauss):
            distance = copies.distance() if isinstance(copies, Drawn) else total_variation(copies.sigma, elements, copies.levels, copies.law)
        if self.lipschitz is not None:
            distance += (4 / UNIT + self._moved(elements)) * (1 + 1e-12)
        return distance if distance == 0 else math.nextafter(distance, math.inf)

    def _moved(self, elements: int) -> float:
        """How far the mean of scores that are Lipschitz may be moved by the grid: `L E|u| / levels`, u what rounding N(0, s^2) in each entry changes.

        E|u| <= sqrt(elements E u_1^2), and E u_1^2 = 1/12 + sum_n (-1)^n e^(-2 pi^2 n^2 s^2) / (pi n)^2 <= 1/12, by the Fourier series of the square of the
        distance to whole numbers: its terms fall, and the first is negative.
        """
        if self.lipschitz is None or self.levels is None:
            return 0.0
        return self.scores.lipschitz(self.lipschitz).value * math.sqrt(elements / 12) / self.levels

    @property
    def norm(self) -> float | None:
        """Of the radius; None where that is no norm, but the measure of the noise."""
        return self.noise.norm

    @property
    def assumptions(self) -> frozenset[Assumption]:
        """What the certificates take for granted."""
        always = {Assumption.RANDOM_BITS, Assumption.EVAL_MODE, Assumption.ROW_BY_ROW}
        of_bound = frozenset() if self.lipschitz is None else self.lipschitz.assumptions
        copies = self.copies
        exact = copies.exact if isinstance(copies, Drawn) else isinstance(copies, Grid)
        return frozenset(always) | of_bound | (frozenset() if exact else {Assumption.FLOAT_NOISE})

    def place(self, inputs: Array) -> tuple[Tensor, Array]:  # (N, *shape) -> channels last, and (N,)
        """The inputs as copies are made of them, and what is to be taken from each radius."""
        last = np.moveaxis(inputs, 1, -1) if inputs.ndim == 4 else inputs
        if isinstance(self.copies, Drawn):
            self.copies.check_values(inputs)
            return torch.from_numpy(np.array(last, dtype=np.float64)), np.zeros(len(last))
        if self.levels is None:
            narrow = np.ascontiguousarray(last, dtype=np.float32)
            lost = np.abs(np.asarray(last, dtype=np.float64) - narrow).reshape(len(last), math.prod(last.shape[1:]))
            return torch.from_numpy(narrow), np.sqrt((lost * lost).sum(axis=1)) * (1 + 1e-9)
        whole, apart = to_grid(last, self.levels, norm=self.norm or 2.0)
        most = _EXACT - len(self.copies.tables.thresholds) if self.lipschitz is not None and isinstance(self.copies, Grid) else math.inf
        if (size := int(np.abs(whole).max(initial=0))) > most:
            raise CertifyError(
                f"with a Lipschitz constant inputs are at most {most} steps of the grid in size, for copies are float32 numbers, got {size}; take fewer levels"
            )
        return torch.from_numpy(np.ascontiguousarray(whole)), apart

    def run(
        self,
        forward: Forward,
        classes: int,
        shape: Shape,
        inputs: Iterable[tuple[int, Tensor, float]],
        device: torch.device | None = None,
        procedure: Procedure | None = None,  # its own, unless given
    ) -> Iterator[Done]:
        """Count copies of the inputs (number, placed, distance; see `place`) until each is decided."""
        device = device or torch.device("cpu")
        procedure = procedure or self.procedure(shape)
        procedure.start(classes)
        batch = self.rows(shape, device)
        slots = 3 * (batch // min(procedure.schedule.n0, procedure.schedule.sizes[0]) + 2)
        noise = self.copies
        if device.type != "cpu":
            forward = _in_ieee(forward)
        if self.shared and isinstance(forward, FirstOnce) and isinstance(noise, Grid):
            shared = SharedCopies(noise, forward, slots, batch)
            engine = Engine(shared.forward, classes, procedure, shared, batch, slots, self.vote_margin, device, shared=True, turn=BLOCK)
        else:
            source: Source = _Drawn(noise, shape, slots, batch, device) if isinstance(noise, Drawn) else _Copies(noise, shape, slots, batch, device)
            engine = Engine(forward, classes, procedure, source, batch, slots, self.vote_margin, device, self.shared)
        yield from engine.run(inputs)

    def prepared(self, net: nn.Module, shape: Shape) -> tuple[Forward, int, tuple[str, ...]]:
        """The function that is smoothed, as the engine runs it, its number of classes, and what was done to the network for it (see `prepare`).

        With a Lipschitz constant it is the very network of the bound, evaluated in float64: its logits are those of exact arithmetic but for 1e-13 of their
        size, which `_distance` has room for.
        """
        device = device_of(net)
        if self.lipschitz is None:
            run, classes, done = prepared(net, seen(self.noise, shape), self.rows(shape, device), self.engine, device, self.dtype)
            noise, here = self.copies, self.engine == "torch" and device.type == "cpu"
            if self.shared and here and isinstance(noise, Grid) and isinstance(run, nn.Module):
                found = once(run, shape, noise, self.rows(shape))
                if found is not None:
                    return found, classes, (*done, "first layer exact, its products with the noise shared")
            return run, classes, done
        if self.engine != "torch" or device.type != "cpu":
            raise CertifyError(f"with a Lipschitz constant the network is evaluated in float64 by torch on the CPU, got {self.engine} on {device.type}")
        graph = Graph.of(net, shape)
        if self.lipschitz.evidence.get("network") != graph.digest:
            raise StaleBound(str(self.lipschitz.evidence.get("network")), graph.digest)
        double, levels = graph.double, self.levels or 1

        def forward(x: Tensor) -> Tensor:
            """The copies are whole numbers here. Logits are taken from the largest, so that nothing is lost when they become float32."""
            logits = double(x.double() / levels)
            return logits - logits.amax(1, keepdim=True)

        _, _, (logits, *_) = tried(net, shape, self.rows(shape))
        return forward, logits.shape[1], ("weights as numbers", "evaluated in float64")

    def certify(self, net: nn.Module, inputs: Tensor) -> Certificate:
        shape = tuple(inputs.shape[1:])
        if 0 in shape:
            raise CertifyError(f"inputs of shape {shape} are empty")
        forward, classes, done_to = self.prepared(net, shape)
        placed, apart = self.place(numbers(inputs))
        count = len(inputs)
        prediction, radius = np.full(count, -1, dtype=np.int64), np.zeros(count)
        runner_up = np.full(count, -1, dtype=np.int64)
        for done in self.run(forward, classes, shape, zip(range(count), placed, apart.tolist(), strict=True), device_of(net)):
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
            method=f"{self!r}: {', '.join(done_to)}{'' if self.lipschitz is None else f', Lipschitz constant {self.lipschitz.value!r}'}",
            failure=self.schedule.alpha,
            assumptions=self.assumptions,
            seed=self.seed,
            measure=self.noise.measure if self.norm is None else None,
        )


_EXACT = 1 << 24  # up to here whole numbers are float32 numbers
_NUMBER = int | float
_KINDS: dict[str, Any] = {
    "scores": ScoreMap,
    "schedule": Schedule,
    "bound": ConfidenceBound | None,
    "target": _NUMBER | None,
    "tolerance": _NUMBER | None,
    "vote_margin": _NUMBER,
    "engine": str,
    "shared": bool,
}
_DRAWN = (Gaussian, GaussianLinf, *DRAWN)


def on_grid(noise: Noise) -> bool:
    """Whether it is added to the entries of an input, so that there is a grid for it."""
    return _law(noise) is not None


def _law(noise: Noise) -> tuple[str, float] | None:
    """The law of what is added to each entry, and its scale, as `Grid` takes them; None where nothing is."""
    match noise:
        case Laplace(scale):
            return "laplace", scale
        case Uniform(half_width) | UniformLinf(half_width):
            return "uniform", half_width
        case Gaussian(sigma) | GaussianLinf(sigma):
            return "gaussian", sigma
    return None


def _in_ieee(forward: Forward) -> Forward:
    """In float32 as it is written, whatever the process is set to."""

    def run(x: Tensor) -> Tensor:
        with ieee():
            return forward(x)

    return run


def _last(shape: Shape) -> Shape:
    """Channels last."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def numbers(inputs: Tensor) -> Array:
    """As numpy has them, which knows no bfloat16."""
    return (inputs.float() if inputs.dtype == torch.bfloat16 else inputs).detach().cpu().numpy()


def device_of(net: nn.Module) -> torch.device:
    """Where its numbers are."""
    return next((tensor.device for tensor in net.state_dict().values()), torch.device("cpu"))


def certified_radius(outcome: Outcome, apart: float) -> float:
    """The radius around the input itself, which is so far from where the copies were made."""
    return 0.0 if outcome.status is Status.ABSTAINED else less(outcome.radius, apart)


def less(radius: float, apart: float) -> float:
    """`radius - apart`, rounded down; not below 0."""
    if not radius > apart:
        return 0.0
    return radius if apart == 0 else float(np.nextafter(radius - apart, 0.0))


class _Copies(Source):
    """Gaussian copies, on the grid or in float, in one buffer that is used again."""

    def __init__(self, noise: Grid | Gauss, shape: Shape, slots: int, batch: int, device: torch.device) -> None:
        last = _last(shape)
        self.noise, self.device = noise, device
        self.images = torch.zeros(slots, *last, dtype=torch.int32 if isinstance(noise, Grid) else torch.float32, device=device)
        self.out = torch.empty(batch, *last, device=device)
        self.view = self.out.permute(0, 3, 1, 2) if len(shape) == 3 else self.out

    def hold(self, slot: int, image: Tensor) -> None:
        self.images[slot] = image.to(self.device, non_blocking=True)

    def draw(self, rows: np.ndarray) -> Tensor:
        noisy_rows(self.noise, self.images, torch.from_numpy(rows).to(self.device, non_blocking=True), out=self.out)
        return self.view


class _Drawn(Source):
    """Copies under any other noise, made by numpy and brought to the device."""

    def __init__(self, noise: Drawn, shape: Shape, slots: int, batch: int, device: torch.device) -> None:
        self.noise, self.device = noise, device
        self.images = np.zeros((slots, *_last(shape)))
        self.out = np.empty((batch, *_last(seen(noise.noise, shape))), dtype=np.float32)

    def hold(self, slot: int, image: Tensor) -> None:
        self.images[slot] = image.numpy()

    def draw(self, rows: np.ndarray) -> Tensor:
        self.noise.copies(self.images, rows, self.out)
        found = torch.from_numpy(self.out).to(self.device)
        return found.permute(0, 3, 1, 2) if found.dim() == 4 else found
