"""What is known of a function's Lipschitz constant: `Bound` is proved, `Estimate` is not."""

from __future__ import annotations

import abc
import dataclasses
import enum
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certify.rounding import add_up, multiply_up, root_of_squares
from certify.text import up_text

Array = NDArray[np.float64]


class Assumption(enum.Enum):
    """What a certificate takes for granted. The value is the sentence that reports print."""

    REAL_ARITHMETIC = (
        "The certificate is of the network with its stored weights in exact arithmetic: of lipnet.freeze(net) made on the CPU. "
        "Logits are evaluated in float64; the rounding of that evaluation, and of any other forward pass, is not covered."
    )
    FLOAT64_LINALG = (
        "Norms are proved by float64 linear algebra that follows IEEE 754 with rounding to nearest and conventional (not Strassen-like) products, "
        "with every rounding error accounted for."
    )
    RANDOM_BITS = "The bits of the counter-based generator Philox4x32-10 behave like independent, uniform random bits."
    FLOAT_NOISE = (
        "What is drawn in floating point is taken to have exactly the law that it stands for, and its sum with the input, or the transform of it, for exact; "
        "for noise that is added, a grid of the inputs (levels) does without this assumption."
    )
    ROW_BY_ROW = (
        "An output of the network depends on its own input alone, not on the rest of a batch, and is the same at every call; "
        "that is tried on some batches, not proved."
    )
    FOREIGN_ROUNDING = (
        "The bound is what auto_LiRPA computed in float64, without rounding anything outwards: it was widened by 1e-9 of its largest entry and compared with "
        "gradients at a few inputs, but its rounding errors are not accounted for."
    )
    PUBLISHED_LOG = "The log states what its code computed, with the setting that is given here; it has no counts, so nothing was computed again."
    INPUT_RANGE = "Only inputs whose entries all lie in the stated range are considered; others may be nearer and are not."
    EVAL_MODE = "The network runs in eval mode, as it did when it was certified."


def assumed(assumptions: Collection[Assumption]) -> dict[str, Any]:
    """What a manifest says of them: their names, and the sentence of each."""
    ordered = sorted(assumptions, key=lambda assumption: assumption.name)
    return {"assumptions": [each.name for each in ordered], "assumption_sentences": {each.name: each.value for each in ordered}}


class Domain(abc.ABC):
    """A set of inputs."""

    @abc.abstractmethod
    def covers(self, other: Domain) -> bool:
        """True only if `other` is known to be a subset."""


def _numbers(given: object) -> Array:
    """An array in float64, which holds the numbers of every narrower type. Raises ValueError for what is none."""
    try:
        return np.array(np.asarray(given), dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last of a tensor that requires a gradient
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"a Ball or a Box has an array or a tensor of numbers in it, got a {type(given).__name__} ({line})") from None


@dataclasses.dataclass(frozen=True)
class Everywhere(Domain):
    """All inputs."""

    def covers(self, other: Domain) -> bool:
        return True


@dataclasses.dataclass(frozen=True, eq=False)
class Ball(Domain):
    """The inputs within `radius` of `center`, an array or a tensor, in the l_p norm."""

    center: Array
    radius: float
    p: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "center", _numbers(self.center))
        if not (self.radius >= 0 and self.p >= 1 and np.isfinite(self.center).all()):
            raise ValueError(f"a Ball needs a finite center, radius >= 0 and p >= 1, got radius={self.radius}, p={self.p}")

    def covers(self, other: Domain) -> bool:
        same_place = isinstance(other, Ball) and other.p == self.p and np.array_equal(other.center, self.center)
        return same_place and isinstance(other, Ball) and other.radius <= self.radius


@dataclasses.dataclass(frozen=True, eq=False)
class Box(Domain):
    """The inputs between `low` and `high`, arrays or tensors, entry by entry."""

    low: Array
    high: Array

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, _numbers(getattr(self, name)))
        if self.low.shape != self.high.shape or not (self.low <= self.high).all():
            raise ValueError("a Box needs low <= high, entry by entry and of one shape")

    def covers(self, other: Domain) -> bool:
        return isinstance(other, Box) and other.low.shape == self.low.shape and bool((self.low <= other.low).all() and (other.high <= self.high).all())


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """`|f(x) - f(y)|_q <= value |x - y|_p` for all x, y in `domain`, proved.

    Bounds are made by rules and methods from stored numbers, and from other bounds by `outer @ inner`, `a + b` and `beside([a, b])` only.
    `pairs`, where the last layer is known, are tighter constants for differences of two outputs: `|(f_i - f_j)(x) - (f_i - f_j)(y)| <= pairs[i, j] |x - y|_p`.
    """

    value: float  # rounded up
    method: str  # the repr of the method that made it, or the name of the rule
    norm: tuple[float, float] = (2, 2)  # (p of the input, q of the output)
    domain: Domain = Everywhere()
    image: Domain | None = None  # where the outputs lie, when known
    assumptions: frozenset[Assumption] = frozenset()
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what is needed to prove it again
    parts: tuple[Bound, ...] = ()  # what it was composed from, in the order of the computation
    name: str = ""  # where in the network: "0", "block.act", ...
    pairs: Array | None = None  # (outputs, outputs)

    def __post_init__(self) -> None:
        if not (self.value >= 0 and math.isfinite(self.value)):
            raise ValueError(f"a Bound is a finite number that is not negative, got {self.value}")
        if self.pairs is not None and not (self.pairs >= 0).all():
            raise ValueError("the pair constants of a Bound are not negative, got NaN or negative ones")

    def __matmul__(self, inner: Bound) -> Bound:
        """The bound of f o g from those of f and g. Raises OverflowError for a product that is no float64."""
        if inner.norm[1] != self.norm[0]:
            raise ValueError(f"cannot compose: the inner bound ends in l{inner.norm[1]:g}, the outer begins in l{self.norm[0]:g}")
        if not self.domain.covers(inner.image or Everywhere()):
            raise ValueError("cannot compose: the outer bound holds on a domain that is not known to contain the outputs of the inner function")
        return Bound(
            value=_finite(multiply_up(self.value, inner.value)),
            method="composition",
            norm=(inner.norm[0], self.norm[1]),
            domain=inner.domain,
            image=self.image,
            assumptions=self.assumptions | inner.assumptions,
            parts=(*_steps(inner), *_steps(self)),
            pairs=None if self.pairs is None else np.nextafter(self.pairs * inner.value, np.inf) * (self.pairs > 0),
        )

    def __add__(self, other: Bound) -> Bound:
        """The bound of f + g, both of the same input."""
        if self.norm != other.norm:
            raise ValueError(f"cannot add bounds in different norms, {self.norm} and {other.norm}")
        if not (self.domain.covers(other.domain) or other.domain.covers(self.domain)):
            raise ValueError("cannot add bounds that hold on different domains")
        return Bound(
            value=_finite(add_up(self.value, other.value)),
            method="sum",
            norm=self.norm,
            domain=other.domain if self.domain.covers(other.domain) else self.domain,
            assumptions=self.assumptions | other.assumptions,
            parts=(self, other),
        )

    def table(self) -> list[tuple[int, Bound]]:
        """Its parts and theirs, each with its depth, in the order of the computation. The parts of a part that two branches share are there once."""
        rows: list[tuple[int, Bound]] = []
        seen: set[int] = set()

        def visit(bound: Bound, depth: int) -> None:
            for part in bound.parts:
                rows.append((depth, part))
                if id(part) not in seen:
                    seen.add(id(part))
                    visit(part, depth + 1)

        visit(self, 0)
        return rows

    def __str__(self) -> str:
        p, q = self.norm
        lines = [f"{up_text(self.value)} from l{p:g} to l{q:g}, {_where(self.domain)}"]
        lines += [f"  {'  ' * depth + (part.name or '-'):<12} {up_text(part.value):<14} {part.method}" for depth, part in self.table()]
        lines += [f"  assumes {assumption.name}" for assumption in sorted(self.assumptions, key=lambda a: a.name)]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A lower bound on a Lipschitz constant, or an upper bound on a radius: what an attack, a sampled slope or a power iteration found.

    It composes with nothing and is never printed as a proof.
    """

    value: float
    method: str
    norm: tuple[float, float] = (2, 2)


def beside(bounds: Sequence[Bound]) -> Bound:
    """The bound of `x -> (f(x), g(x), ...)`, one after the other in one vector: `sqrt(L_f^2 + L_g^2 + ...)`, all from l2 to l2."""
    if any(bound.norm != (2, 2) or not isinstance(bound.domain, Everywhere) for bound in bounds):
        raise ValueError("only bounds from l2 to l2 that hold everywhere can be put beside each other")
    value = _finite(root_of_squares([bound.value for bound in bounds]))
    return Bound(value, "beside", assumptions=frozenset().union(*(bound.assumptions for bound in bounds)), parts=tuple(bounds))


def _finite(value: float) -> float:
    if math.isinf(value):
        raise OverflowError("the constant is beyond 1.8e308, the largest float64")
    return value


def _steps(bound: Bound) -> tuple[Bound, ...]:
    """A composition is flattened, so that a chain prints as one table."""
    return bound.parts if bound.method == "composition" else (bound,)


def _where(domain: Domain) -> str:
    return "everywhere" if isinstance(domain, Everywhere) else f"on {domain}"
