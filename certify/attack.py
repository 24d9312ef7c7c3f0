"""Attacks: upper bounds on the radius of an input, by points that the network gives another class. The only file that imports foolbox.

A method only proposes points. What counts is done here: the frozen network in float64 gives the point another class, by more than rounding can, and the
distance is that of the very float64 numbers of the point, rounded up. Nothing here certifies anything.
"""

from __future__ import annotations

import abc
import base64
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.bound import Array, Estimate
from certify.data import Dataset
from certify.errors import CertifyError
from certify.margins import Runs, check_inputs, logits
from certify.opaque import runnable
from certify.rounding import up
from lipnet.checkpoint import first_line

_CLEAR = 1e-6  # of the largest logit: what another class is to be ahead by, so that it is with another BLAS too, which may move a weight by some 1e-7
_AHEAD = 1e-9  # and by what it has to be when a point is looked at again: far above the rounding of a forward pass in float64
_FOOLBOX = ("ddn", "pgd", "deepfool", "fmn")
_FAR = 1e6  # bounds for foolbox where there are none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(abc.ABC):
    """A way to look for near inputs of another class; a value with its own options.

    With `clip`, points stay in [0, 1]: their distances are upper bounds on the radius with and without that range.
    """

    norm: float = 2.0
    steps: int = 100
    restarts: int = 10
    seed: int = 0
    clip: bool = False

    def __post_init__(self) -> None:
        if self.norm not in (2, math.inf):
            raise CertifyError(f"attacks are in l2 or in the maximum norm, got norm {self.norm!r}; pass 2 or math.inf")
        if self.steps < 1 or self.restarts < 1 or self.seed < 0:
            raise CertifyError(f"an attack takes at least one step and one restart and a seed of at least 0, got {self.steps}, {self.restarts} and {self.seed}")

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name that rows have."""

    @abc.abstractmethod
    def propose(
        self,
        net: nn.Module,
        x: Tensor,  # (1, ...)
        z: Array,  # (classes,) the logits there
        seed: int,
    ) -> Tensor:  # (N, ...)
        """Points of another class than x, as far as the method can tell, and near."""


@dataclasses.dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent of `z_j - z_i` on a sphere whose radius shrinks where another class is met and grows where none is, then bisection
    towards the input (the radius as in Rony et al. 2019, the gradient as in Madry et al. 2018).

    `restarts` rows, one for each of the likeliest other classes j, further ones from random points.
    """

    @property
    def name(self) -> str:
        return "pgd"

    def propose(self, net: nn.Module, x: Tensor, z: Array, seed: int) -> Tensor:
        label, others = int(np.argmax(z)), len(z) - 1
        order = np.argsort(-np.delete(z, label), kind="stable")
        classes = np.delete(np.arange(len(z)), label)[order]
        targets = torch.from_numpy(classes[np.arange(self.restarts) % others])
        _, slope = _ascent(net, x.expand(self.restarts, *x.shape[1:]), label, targets)
        radius = _first_order(torch.from_numpy(z), label, targets, slope, self.norm)  # (restarts,)
        noise = torch.randn(slope.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        delta = _on_sphere(noise, radius, self.norm) * (torch.arange(self.restarts) >= others)[:, None]
        best, found = torch.full_like(radius, math.inf), delta.clone()
        for step in range(self.steps):
            left = (1 + math.cos(math.pi * step / self.steps)) / 2  # from 1 to 0
            delta = self._inside(x, delta)
            values, slope = _ascent(net, x + delta.reshape(-1, *x.shape[1:]), label, targets)
            size = _sizes(delta, self.norm)
            met = flipped(values, z)
            better = met & (size < best)
            best, found = torch.where(better, size, best), torch.where(better[:, None], delta, found)
            change = 0.002 + 0.1 * left
            grown = torch.where(best.isfinite(), torch.minimum(radius * (1 + change), best), radius * 1.3)
            radius = torch.where(met, torch.minimum(size, best) * (1 - change), grown)
            length = (0.05 + 0.95 * left) * radius
            delta = _on_sphere(delta + length[:, None] * _steepest(slope, self.norm), radius, self.norm)
        return nearer(net, x, x + found[best.isfinite()].reshape(-1, *x.shape[1:]), z)

    def _inside(self, x: Tensor, delta: Tensor) -> Tensor:
        return (x.flatten() + delta).clamp(0, 1) - x.flatten() if self.clip else delta


@dataclasses.dataclass(frozen=True)
class Foolbox(Attack):
    """An attack of the foolbox library (Rauber et al. 2020), then bisection towards the input: `ddn` in l2, `deepfool`, `fmn` and `pgd` in both norms.

    `pgd` is for one radius at a time: that is doubled until a point is found, then bisected. Needs the extra `lipnet[attacks]`.
    """

    attack: str = "ddn"
    restarts: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack not in _FOOLBOX:
            raise CertifyError(f"no attack is known by the name {self.attack!r}; known are {', '.join(_FOOLBOX)} of foolbox")
        if self.attack == "ddn" and self.norm != 2:
            raise CertifyError("ddn is an attack in l2, got norm inf; take pgd, fmn or deepfool")
        _foolbox()

    @property
    def name(self) -> str:
        return f"foolbox-{self.attack}"

    def propose(self, net: nn.Module, x: Tensor, z: Array, seed: int) -> Tensor:
        foolbox, label = _foolbox(), int(np.argmax(z))
        model = foolbox.PyTorchModel(net, bounds=(0, 1) if self.clip else (-_FAR, _FAR), device="cpu")
        rows, labels = x.expand(self.restarts, *x.shape[1:]).clone(), torch.full((self.restarts,), label)
        with torch.random.fork_rng([]), torch.enable_grad():
            torch.manual_seed(seed)
            if self.attack != "pgd":
                _ascent(net, x, label, torch.tensor([label]))  # refuses a network without gradients
                points = self._made(foolbox).run(model, rows, labels)
            else:
                points = by_radius(lambda radius: self._made(foolbox).run(model, rows, labels, epsilon=radius), net, x, z, self.norm)
        points = points.detach()
        return nearer(net, x, points[flipped(net(points.clone()).detach(), z)], z)

    def _made(self, foolbox: ModuleType) -> Any:
        """The attack as foolbox's own value."""
        l2 = self.norm == 2
        made = {
            "ddn": "DDNAttack",
            "pgd": "L2ProjectedGradientDescentAttack" if l2 else "LinfProjectedGradientDescentAttack",
            "deepfool": "L2DeepFoolAttack" if l2 else "LinfDeepFoolAttack",
            "fmn": "L2FMNAttack" if l2 else "LInfFMNAttack",
        }
        return getattr(foolbox.attacks, made[self.attack])(steps=self.steps)


@dataclasses.dataclass(frozen=True, eq=False)
class Attacked:
    """What was found of one input: the class there, a point of another class, and its distance, an upper bound on every radius that holds."""

    prediction: int  # -1 where the logits are not finite
    other: int  # the class of the point; -1 where there is none
    point: Array | None
    distance: Estimate  # rounded up; infinite where no point was found


def falsify(net: nn.Module, inputs: Tensor, *attacks: Attack) -> list[Attacked]:
    """For each input (N, ...) the nearest point that one of the attacks finds and the frozen network in float64 gives another class. An upper bound each."""
    if not all(isinstance(attack, Attack) for attack in attacks):
        raise CertifyError(f"an attack is a value such as certify.PGD(), got {attacks!r:.80}")
    check_inputs(inputs)
    graph = runnable(net, tuple(inputs.shape[1:]))
    return [nearest(graph, inputs[index : index + 1], attacks, index) for index in range(len(inputs))]


def nearest(
    graph: Runs,
    inputs: Tensor,  # (1, ...)
    attacks: Sequence[Attack],
    index: int,
) -> Attacked:
    """The nearest point of all that the attacks propose, each looked at alone. Random numbers depend on the seed and the input's number only."""
    if not attacks or len({attack.norm for attack in attacks}) != 1:
        raise CertifyError("attacks that are compared are in one norm; pass at least one, and all with the same norm")
    x, norm = inputs.double(), attacks[0].norm
    (z,) = logits(graph, x)
    if not np.isfinite(z).all():
        return Attacked(-1, -1, None, Estimate(math.inf, "", (norm, norm)))
    label = int(np.argmax(z))
    best = Attacked(label, -1, None, Estimate(math.inf, "+".join(attack.name for attack in attacks), (norm, norm)))
    for attack in attacks:
        if attack.clip and not (x.min() >= 0 and x.max() <= 1):
            raise CertifyError(f"input {index} is not in [0, 1], to which the points are to be clipped; leave out clip")
        seed = int(np.random.SeedSequence([attack.seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        proposed = attack.propose(graph.double, x, z, seed).numpy()
        for point in proposed.clip(0, 1) if attack.clip else proposed:
            away = distance(point, x.numpy()[0], norm)
            if away < best.distance.value:
                (there,) = logits(graph, torch.from_numpy(point)[None])
                if _clear(there, z, _CLEAR):
                    best = Attacked(label, int(np.argmax(there)), point, Estimate(away, attack.name, (norm, norm)))
    return best


def distance(point: Array, x: Array, norm: float) -> float:
    """|point - x| in l2 or the maximum norm, rounded up at every step."""
    gaps = np.abs(point - x).ravel()
    gaps = np.where(gaps > 0, np.nextafter(gaps, np.inf), gaps)
    if norm == math.inf:
        return float(gaps.max())
    with np.errstate(over="ignore", under="ignore"):
        squares = np.nextafter(gaps * gaps, np.inf)[gaps > 0]
    return up(math.sqrt(up(math.fsum(squares)))) if len(squares) else 0.0


def row(graph: Runs, dataset: Dataset, attacks: Sequence[Attack], index: int) -> dict[str, Any]:
    """The row of a results folder for one input: the point is in it, so that it can be looked at again. A wrong prediction is not attacked: distance 0."""
    start = time.perf_counter()
    x, label = torch.from_numpy(dataset.inputs[index : index + 1]), int(dataset.labels[index])
    (z,) = logits(graph, x)
    prediction = int(np.argmax(z)) if np.isfinite(z).all() else -1
    found = nearest(graph, x, attacks, index) if prediction == label else None
    point = None if found is None else found.point
    return {
        "schema": 1,
        "index": index,
        "label": label,
        "prediction": prediction,
        "other": -1 if found is None else found.other,
        "method": "+".join(attack.name for attack in attacks) if found is None else found.distance.method,
        "norm": f"{attacks[0].norm:g}",
        "radius": 0.0 if found is None else None if point is None else found.distance.value,
        "status": _status(prediction, label, point is not None),
        "guarantee": "attack",
        "point": None if point is None else base64.b64encode(point.astype("<f8").tobytes()).decode(),
        "seconds": round(time.perf_counter() - start, 6),
    }


def contradictions(graph: Runs, dataset: Dataset, row: Mapping[str, Any], norm: str, clip: bool, tolerance: float) -> list[str]:
    """What a row claims and its point does not show. Its distance may be larger than that of the point, never smaller."""
    index, radius, kept = row["index"], row.get("radius"), row.get("point")
    x, label = dataset.inputs[index], int(dataset.labels[index])
    (z,) = logits(graph, torch.from_numpy(x[None]))
    prediction = int(np.argmax(z)) if np.isfinite(z).all() else -1
    known = {"label": label, "prediction": prediction, "norm": norm, "guarantee": "attack", "status": _status(prediction, label, kept is not None)}
    wrong = [f"input {index}: {key} is stored as {row.get(key)!r}, the network gives {value!r}" for key, value in known.items() if row.get(key) != value]
    if kept is None:
        told = None if prediction == label else 0.0
        return wrong if radius == told else [*wrong, f"input {index}: the distance is stored as {radius!r}, and there is no point"]
    try:
        point = np.frombuffer(base64.b64decode(kept, validate=True), "<f8").reshape(x.shape).astype(np.float64)
    except (TypeError, ValueError):
        return [*wrong, f"input {index}: the point is not one of {x.size} numbers in base64"]
    (there,) = logits(graph, torch.from_numpy(point)[None])
    if not np.isfinite(point).all() or not _clear(there, z, _AHEAD) or int(np.argmax(there)) != row.get("other"):
        wrong.append(f"input {index}: the network gives the point the class {int(np.argmax(there))}, stored is {row.get('other')!r}")
    if clip and not _in_range(point):
        wrong.append(f"input {index}: the point is not in [0, 1]")
    away = distance(point, x.astype(np.float64), float(norm))
    if not isinstance(radius, float) or not away * (1 - tolerance) <= radius < math.inf:
        wrong.append(f"input {index}: the distance is stored as {radius!r}, that of the point is {away!r}")
    return wrong


def _status(prediction: int, label: int, attacked: bool) -> str:
    return "abstained" if prediction < 0 else "misclassified" if prediction != label else "attacked" if attacked else "survived"


def _clear(there: Array, z: Array, share: float) -> bool:
    """Whether another class than that of the logits `z` is ahead by more than this share of the largest logit, `z` included."""
    label = int(np.argmax(z))
    return bool(np.isfinite(there).all() and np.delete(there, label).max() - there[label] > share * max(np.abs(there).max(), np.abs(z).max()))


def flipped(
    there: Tensor,  # (N, classes)
    z: Array,  # (classes,)
) -> Tensor:
    """`_clear`, for many."""
    label = int(np.argmax(z))
    others = torch.cat([there[:, :label], there[:, label + 1 :]], dim=1).amax(1)
    return (others - there[:, label] > _CLEAR * there.abs().amax(1).clamp_min(float(np.abs(z).max()))) & there.isfinite().all(1)


def _ascent(net: nn.Module, points: Tensor, label: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The logits at some points, and the gradient of `z_target - z_label` (N, numbers of an input). Raises CertifyError for a network that has none."""
    with torch.enable_grad():
        points = points.detach().clone().requires_grad_()
        try:
            z = net(points.clone())  # some networks work in place
            (slope,) = torch.autograd.grad((z.gather(1, targets[:, None])[:, 0] - z[:, label]).sum(), points)
        except RuntimeError as error:  # a change in place of what gradients need, or an output that is cut off from the input
            why = f"attacks follow gradients, and torch finds none of this network ({first_line(error)})"
            raise CertifyError(f"{why}; let its forward overwrite nothing, and pass on its input without rounding, detach and no_grad") from error
    return z.detach(), slope.flatten(1).nan_to_num()


def _first_order(z: Tensor, label: int, targets: Tensor, slope: Tensor, norm: float) -> Tensor:
    """The distance at which the targets would be level with the class, were the network linear; 1 where it does not move."""
    steep = _sizes(slope, 2.0) if norm == 2 else slope.abs().sum(1)  # the dual norm
    return torch.where(steep > 0, (z[label] - z[targets]) / steep, torch.ones(())).clamp(1e-9, _FAR)


def _sizes(delta: Tensor, norm: float) -> Tensor:
    return torch.linalg.vector_norm(delta, norm, dim=1)


def _steepest(slope: Tensor, norm: float) -> Tensor:
    """The unit step of this norm along which the slope is largest."""
    return slope.sign() if norm == math.inf else slope / _sizes(slope, 2.0).clamp_min(torch.finfo(slope.dtype).tiny)[:, None]


def _on_sphere(delta: Tensor, radius: Tensor, norm: float) -> Tensor:
    """In l2 the nearest point on the sphere, in the maximum norm the nearest one in the ball."""
    if norm == math.inf:
        return torch.maximum(torch.minimum(delta, radius[:, None]), -radius[:, None])
    return _steepest(delta, norm) * radius[:, None]


def _in_range(point: Array) -> bool:
    return bool(point.min() >= 0 and point.max() <= 1)


@torch.no_grad()
def nearer(net: nn.Module, x: Tensor, points: Tensor, z: Array) -> Tensor:
    """Points of another class, moved towards x as far as bisection keeps them there."""
    if not len(points):
        return points
    low, high = torch.zeros(len(points), dtype=torch.float64), torch.ones(len(points), dtype=torch.float64)
    column = (-1, *(1,) * (points.dim() - 1))
    for _ in range(30):
        middle = (low + high) / 2
        between = x + middle.reshape(column) * (points - x)
        met = flipped(net(between.clone()), z)
        low, high = torch.where(met, low, middle), torch.where(met, middle, high)
    moved = x + high.reshape(column) * (points - x)
    return torch.where((high < 1).reshape(column), moved, points)


def _foolbox() -> ModuleType:
    """The library. Raises CertifyError that names the extra where it is not installed."""
    try:
        import foolbox
    except ImportError as error:
        raise CertifyError(f"attacks of foolbox need the extra lipnet[attacks] ({error}); install it, or take pgd, which needs nothing") from error
    module: ModuleType = foolbox
    return module


def by_radius(
    run: Callable[[float], Tensor],
    net: nn.Module,
    x: Tensor,  # (1, ...)
    z: Array,  # (classes,) the logits there
    norm: float,
) -> Tensor:
    """The points of an attack within a given radius, at the smallest radius at which it finds some: from the first order on doubled, then bisected to 1 %."""
    label = int(np.argmax(z))
    targets = torch.tensor([int(np.argmax(np.delete(z, label)))])
    targets += targets >= label
    radius = float(_first_order(torch.from_numpy(z), label, targets, _ascent(net, x, label, targets)[1], norm)[0])
    low, high, kept = 0.0, math.inf, x[:0]
    for _ in range(40):
        points = run(radius).detach().double()
        met = points[flipped(net(points.clone()).detach(), z)]
        if len(met):
            high, kept = radius, met
        else:
            low = radius
        if high - low < 0.01 * high or radius > _FAR:
            break
        radius = 2 * radius if high == math.inf else (low + high) / 2
    return kept
