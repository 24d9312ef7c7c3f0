"""How many noisy copies are looked at, when, and what alpha each look spends; and the certificate that follows from the counts alone.

Class A is chosen on `n0` copies that are not used again. At look j, over n_j copies, the bounds fail with probability at most alpha_j. The alphas of all looks
sum to alpha at most, so with probability at least 1 - alpha no look fails: whichever rule stops, and whichever look is reported, the radius is true.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from certify.bound import Array
from certify.errors import CertifyError
from certify.smoothing.bounds import ClopperPearson, ConfidenceBound, Share, Tally, check_alpha
from certify.smoothing.classifier import Hardmax, SmoothedClassifier

_MOST = 2**28  # copies, when it is asked how many would do
_UNIT = 2**24  # of soft scores in fixed point


class Schedule(abc.ABC):
    """The sizes of the looks and the alpha of each; a value. `n0` copies choose the class, and the looks are at cumulative numbers of other copies."""

    n0: int
    alpha: float
    spends_once: ClassVar[bool] = False  # all looks share the one alpha

    @property
    @abc.abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """The cumulative number of copies at each look."""

    @property
    @abc.abstractmethod
    def alphas(self) -> tuple[float, ...]:
        """What each look spends."""

    def ledger(self, looks: int) -> tuple[Spent, ...]:
        """What has been spent after each of the first looks."""
        sums = itertools.accumulate(map(Fraction, self.alphas[:looks]))
        return tuple(Spent(n, alpha, min(float(total), self.alpha)) for n, alpha, total in zip(self.sizes, self.alphas, sums, strict=False))

    def check(self, bound: ConfidenceBound) -> None:
        """Raises CertifyError where this bound cannot be looked at on this schedule."""
        if self.spends_once and not bound.time_uniform:
            raise CertifyError(f"{bound!r} holds at one look only, and to look again with the same alpha is peeking; use EProcess(), or GroupSequential(...)")

    def _check_sizes(self) -> None:
        check_alpha(self.alpha)
        if self.n0 < 1:
            raise CertifyError(f"the class is chosen on at least one copy, got n0={self.n0}")
        whole = all(isinstance(n, int) for n in (self.n0, *self.sizes))
        if not whole or not self.sizes or self.sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.sizes)):
            raise CertifyError(f"looks are at growing whole numbers of copies, from 1 on, got {self.sizes} after n0={self.n0}")


@dataclasses.dataclass(frozen=True)
class Spent:
    """One line of the ledger: the look at `n` copies spent `alpha`, and all looks so far `total`."""

    n: int
    alpha: float
    total: float


@dataclasses.dataclass(frozen=True)
class FixedN(Schedule):
    """One look, at n copies (Cohen, Rosenfeld & Kolter 2019)."""

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        self._check_sizes()

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.n,)

    @property
    def alphas(self) -> tuple[float, ...]:
        return (self.alpha,)


def doubling(n: int, first: int = 100) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... below n, and n."""
    return (*itertools.takewhile(lambda size: size < n, (first * 2**j for j in range(64))), n)


@dataclasses.dataclass(frozen=True)
class GroupSequential(Schedule):
    """Several looks, each with its own part of alpha (a union bound; alpha spending, Lan & DeMets 1983). The default.

    `spending` are whole shares: look j spends `alpha * spending[j] / sum(spending)`. Left empty, half goes to the last look and the rest to the others equally.
    """

    looks: tuple[int, ...] = doubling(100_000)
    spending: tuple[int, ...] = ()
    n0: int = 100
    alpha: float = 0.001

    def __post_init__(self) -> None:
        object.__setattr__(self, "looks", tuple(self.looks))
        others = len(self.looks) - 1
        object.__setattr__(self, "spending", tuple(self.spending) or (1,) * others + (max(others, 1),))
        self._check_sizes()
        if len(self.spending) != len(self.looks) or not all(share == int(share) and share >= 1 for share in self.spending):
            raise CertifyError(f"spending is one whole share, at least 1, for each of the {len(self.looks)} looks, got {self.spending}")

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.looks

    @property
    def alphas(self) -> tuple[float, ...]:
        parts = [Fraction(self.alpha) * share / sum(self.spending) for share in self.spending]
        return tuple(value if Fraction(value) <= part else math.nextafter(value, 0) for part, value in zip(parts, map(float, parts), strict=True))


@dataclasses.dataclass(frozen=True)
class Anytime(Schedule):
    """A look after every `step` copies up to n, all with the one alpha: for bounds that hold at all sample sizes at once, `EProcess()`; others are refused."""

    spends_once: ClassVar[bool] = True
    n0: int = 100
    n: int = 100_000
    step: int = 1000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        if self.step < 1:
            raise CertifyError(f"looks are at least one copy apart, got step={self.step}")
        self._check_sizes()

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*range(self.step, self.n, self.step), self.n)

    @property
    def alphas(self) -> tuple[float, ...]:
        return (self.alpha,) * len(self.sizes)


class Status(enum.Enum):
    """How an input ended. The value is what rows store."""

    CERTIFIED = "certified"  # a positive radius, and the target where there is one
    BELOW_TARGET = "below target"  # a positive radius that is not above the target
    ABSTAINED = "abstained"  # nothing is certified
    UNFINISHED = "unfinished"  # the next look may tell


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the counts of one input certify: with probability at least 1 - alpha, `prediction` is the class in the open ball of `radius`."""

    status: Status
    prediction: int  # -1 where nothing is certified
    radius: float
    p_lower: float  # of the look that is reported, the one with the largest radius
    p_upper: float
    alpha: float  # the failure probability of the whole schedule
    ledger: tuple[Spent, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words."""
        return {**dataclasses.asdict(self), "status": self.status.value, "ledger": [dataclasses.asdict(line) for line in self.ledger]}


@dataclasses.dataclass(frozen=True)
class Procedure:
    """From counts to certificates: the classifier, the confidence bound, the schedule, and when to stop. One for all inputs.

    `target`: stop once the radius is above it, or once upper bounds say that it is out of reach. `tolerance`: stop once the last look would add no more than
    that to the radius, if the scores stayed as they are. Both in the units of the radius, and neither can make a certificate untrue. `distance`: how far the
    law of the copies is from that of the noise, in total variation, at most; it is taken from p_A and added to p_B.
    """

    classifier: SmoothedClassifier
    bound: ConfidenceBound = dataclasses.field(default_factory=ClopperPearson)
    schedule: Schedule = dataclasses.field(default_factory=GroupSequential)
    share: Share = dataclasses.field(default_factory=Share)
    target: float | None = None
    tolerance: float | None = None
    distance: float = 0.0

    def __post_init__(self) -> None:
        self.schedule.check(self.bound)
        if not 0 <= self.distance < 1:
            raise CertifyError(f"a total variation lies in [0, 1), got {self.distance}")
        for name, value in (("target", self.target), ("tolerance", self.tolerance)):
            if value is not None and not 0 <= value <= sys.float_info.max:
                raise CertifyError(f"the {name} is a radius, a finite number that is not negative, got {value}")

    def around(self, distance: float) -> Procedure:
        """For copies made around a point so far from the input: a target around the input is that much larger around the point."""
        return self if self.target is None or distance == 0 else dataclasses.replace(self, target=math.nextafter(self.target + distance, math.inf))

    def settings(self) -> dict[str, Any]:
        """What a manifest stores of it: plain numbers, and the printed forms of its values. `values.read` makes it again."""
        classifier, bound = self.classifier, self.classifier.lipschitz
        return {
            "noise": repr(classifier.noise),
            "scores": repr(classifier.scores),
            "lipschitz": None if bound is None else bound.value,
            "pair": None if bound is None or bound.pairs is None else float(bound.pairs.max()),  # of a difference of two logits
            **{name: repr(getattr(self, name)) for name in ("bound", "schedule", "share")},
            "target": self.target,
            "tolerance": self.tolerance,
            "distance": self.distance,
        }

    def interval(self, look: int, selection: Tally, tally: Tally, label: int | None = None) -> tuple[Array, Array]:
        """`(p_lower, p_upper)` at this look (of separate runs along the leading axes), for the class that `selection` favours, or for `label`, which was
        chosen without a look at `tally` either."""
        chosen = selection.favourite if label is None else np.asarray(label)
        p_lower, p_upper = self.share.interval(self.bound, tally, chosen, self.schedule.alphas[look], selection)
        if self.distance == 0:
            return p_lower, p_upper
        return np.maximum(np.nextafter(p_lower - self.distance, -1), 0.0), np.minimum(np.nextafter(p_upper + self.distance, 2), 1.0)

    def radius(self, look: int, selection: Tally, tally: Tally) -> Array:
        """The radius at this look."""
        return self.classifier.radius(*self.interval(look, selection, tally))

    def best(self, classes: int) -> float:
        """The largest radius that this schedule can certify: all copies agree, at the look that makes most of it."""
        looks = range(len(self.schedule.sizes))
        return max(float(self.radius(j, self._unanimous(self.schedule.n0, classes), self._unanimous(self.schedule.sizes[j], classes))) for j in looks)

    def start(self, classes: int) -> None:
        """Raises CertifyError where no counts at all would certify the target (or anything), and says how many copies could."""
        target, best = self.target or 0.0, self.best(classes)
        if best > target:
            return
        n = self._enough(classes, target)
        last, alpha = self.schedule.sizes[-1], self.schedule.alphas[-1]
        goal = f"a radius above {target:g}" if target else "anything"
        advice = f"the least that can at this alpha is {n}" if n else f"nor can any other number that is tried, up to {_MOST}"
        raise CertifyError(f"{last} copies cannot certify {goal} at alpha={alpha:g} of the last look, even if all agree (radius {best:.6g}); {advice}")

    def _enough(self, classes: int, target: float) -> int | None:
        """The least size of the last look that can certify a radius above target, by bisection; None where none up to _MOST can."""

        def enough(n: int) -> bool:
            votes = self._unanimous(self.schedule.n0, classes), self._unanimous(n, classes)
            return float(self.radius(len(self.schedule.sizes) - 1, *votes)) > target

        low, high = 0, _MOST
        if not enough(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def _unanimous(self, n: int, classes: int) -> Tally:
        sums = n * np.eye(1, classes, dtype=np.int64)[0]
        return Tally(n, sums) if isinstance(self.classifier.scores, Hardmax) else Tally(n, sums * _UNIT, sums * _UNIT, unit=_UNIT)

    def decide(self, selection: Tally, looks: Sequence[Tally], earlier: Outcome | None = None) -> Outcome:
        """What one input's counts at the looks so far certify; UNFINISHED while the next look is worth its copies.

        `earlier`, the outcome of all looks but the last, saves computing it again. Raises CertifyError for counts that are not of this schedule: other sizes,
        or cumulative counts that fall.
        """
        self._check(selection, looks)
        first, radius, p_lower, p_upper = 0, -1.0, 0.0, 1.0
        if earlier is not None:
            first, radius, p_lower, p_upper = len(looks) - 1, earlier.radius, earlier.p_lower, earlier.p_upper
        for j, tally in enumerate(looks[first:], start=first):
            low, high = self.interval(j, selection, tally)
            if (found := float(self.classifier.radius(low, high))) > radius:
                radius, p_lower, p_upper = found, float(low), float(high)
        if not self._stop(radius, selection, looks):
            status = Status.UNFINISHED
        elif not radius > 0:
            status = Status.ABSTAINED
        else:
            status = Status.CERTIFIED if self.target is None or radius > self.target else Status.BELOW_TARGET
        return Outcome(
            status=status,
            prediction=int(selection.favourite) if radius > 0 else -1,
            radius=radius,
            p_lower=p_lower,
            p_upper=p_upper,
            alpha=self.schedule.alpha,
            ledger=self.schedule.ledger(len(looks)),
        )

    def _stop(self, radius: float, selection: Tally, looks: Sequence[Tally]) -> bool:
        """Whether to stop here; any answer is valid."""
        if len(looks) == len(self.schedule.sizes):
            return True
        if self.target is not None and (radius > self.target or self._reach(len(looks) - 1, selection, looks[-1]) <= self.target):
            return True
        return self.tolerance is not None and self._outlook(selection, looks[-1]) - radius <= self.tolerance

    def _reach(self, look: int, selection: Tally, tally: Tally) -> float:
        """The largest radius that these counts leave likely: the top class at its upper bound, the next one at its lower, and at an equal share of the rest."""
        alpha, label = self.schedule.alphas[look], int(selection.favourite)
        top = float(self.bound.upper(tally.above(), alpha, selection.below())[label])
        rivals = np.delete(self.bound.lower(tally.below(), alpha, selection.below()), label)
        rival = max(float(rivals.max()), (1 - top) / len(rivals))
        return float(self.classifier.radius(top, min(rival, 1 - top)))

    def _outlook(self, selection: Tally, tally: Tally) -> float:
        """The radius at the last look if the scores stayed as they are."""
        n = self.schedule.sizes[-1]
        sums, undecided = ((array * (n / tally.n)).astype(np.int64) for array in (tally.sums, tally.undecided))
        squares = None if tally.squares is None else np.minimum(np.ceil(tally.squares * (n / tally.n)).astype(np.int64), sums)
        if squares is None:  # what the rounding left over goes to the top class
            sums[int(selection.favourite)] += n - int(sums.sum() + undecided)
        return float(self.radius(len(self.schedule.sizes) - 1, selection, Tally(n, sums, squares, undecided, tally.unit)))

    def _check(self, selection: Tally, looks: Sequence[Tally]) -> None:
        sizes = tuple(tally.n for tally in looks)
        if selection.n != self.schedule.n0 or not looks or sizes != self.schedule.sizes[: len(sizes)]:
            raise CertifyError(
                f"the schedule selects on {self.schedule.n0} copies and looks at {self.schedule.sizes}, the counts are of {selection.n} and {sizes}"
            )
        hard = isinstance(self.classifier.scores, Hardmax)
        for tally in (selection, *looks):
            if tally.sums.ndim != 1 or tally.classes != selection.classes or tally.unit != selection.unit or (tally.unit == 1) != hard:
                raise CertifyError(
                    f"the counts of one input are of one shape and of {self.classifier.scores!r}, got {tally.sums.shape} in units of 1/{tally.unit}"
                )
        for before, after in itertools.pairwise(looks):
            grown = [after.sums - before.sums, after.undecided - before.undecided]
            if after.squares is not None and before.squares is not None:
                grown.append(after.squares - before.squares)
            if any((part < 0).any() for part in grown):
                raise CertifyError(f"counts are cumulative, those at {after.n} copies are below those at {before.n}")

    def row(self, selection: Tally, looks: Sequence[Tally]) -> dict[str, Any]:
        """What a results folder stores of one input: the counts, from which `check_row` computes the rest again, and the rest."""
        return {
            "classifier": self.classifier.digest,
            "selection": selection.to_json(),
            "looks": [tally.to_json() for tally in looks],
            **self.decide(selection, looks).to_json(),
        }

    def check_row(self, row: Mapping[str, Any]) -> Outcome:
        """The outcome that the counts of a row give. Raises CertifyError where the row claims another one, or is of another classifier.

        Radius and bounds may differ by 1e-9, relative: another machine rounds the last digits otherwise.
        """
        if row.get("classifier") != self.classifier.digest:
            raise CertifyError(f"the row is of classifier {str(row.get('classifier'))[:12]}, this one is {self.classifier.digest[:12]}")
        try:
            selection, looks = Tally.from_json(row["selection"]), [Tally.from_json(look) for look in row["looks"]]
            claimed = {key: row[key] for key in ("status", "prediction", "radius", "p_lower", "p_upper", "alpha", "ledger")}
        except (KeyError, TypeError) as error:
            raise CertifyError(f"the row lacks what certificates are computed from: {error!r}") from error
        outcome = self.decide(selection, looks)
        found = outcome.to_json()
        for key, value in claimed.items():
            if key in ("radius", "p_lower", "p_upper"):
                same = isinstance(value, float | int) and math.isclose(value, found[key], rel_tol=1e-9, abs_tol=1e-12)
            else:
                same = value == found[key]
            if not same:
                raise CertifyError(f"the row claims {key} {value}, its counts give {found[key]}")
        return outcome
