"""LipSDP of convolutional networks by frequency: from torch modules to a chain on one torus (`sdp.frequency`), every rounding bounded.

**The torus.** All layers share one torus: of size N_k at level k, with N_{k-1} the stride times N_k. On each axis the image of level k has n_k <= N_k pixels
and lies at 0..n_k - 1. Call a signal clean if its differences (between two inputs of the network) vanish outside the image; the input, put on the torus with
zeros around it, is clean. For a convolution `v[i] = sum_t K[t] x[stride i + dilation t - before]` of the network, and its twin on the torus, which takes the
positions modulo N_{k-1}:

1. Both agree at each i < n_k if each position that the network reads inside the image is the same on the torus (N_{k-1} >= n_{k-1}), and each that it reads
   outside, where it finds the zeros of the padding, is outside 0..n_{k-1} - 1 modulo N_{k-1} too, and x is clean. This is checked position by position, for
   the smallest tori first; N_{k-1} >= n_{k-1} + padding, rounded up to the strides, always passes.
2. A layer that reads no position outside the image needs no clean x: what the torus holds there reaches no pixel of the image.
3. The output of the torus is clean if x is, and no i >= n_k reads a pixel. Otherwise what follows has to make it so, or to do without.

**The mask.** After an activation with slopes in [a, b] let the torus hold `da = m s dv`, m = 1 on the image and 0 elsewhere: where s is a slope of the
activation, m s is in [min(a, 0), max(b, 0)] everywhere on the torus, so it is a pointwise nonlinearity with those slopes, and its output is clean.
Where dv is clean already, `da = 0 = s 0` outside for any s in [a, b]; where the next layer is one of (2), the activation may act on the whole torus. In both
cases [a, b] is kept. A linear signal that has to be clean and is not is masked by a nonlinearity of its own, with slopes in [0, 1].
This is why no skip connection and no sorting is taken here: part of their signal passes linearly, and the mask is no slope of it.

The output of the network is a part of that of the torus, and the input has the norm that it has there. So a Lipschitz constant of the torus is one of the
network. Circular padding is exact where the torus is the image (N_{k-1} = n_{k-1}), and is refused where it cannot be.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import nn

import lipnet
from certify.bound import Array, Assumption, Bound, Domain
from certify.convolution import TWIDDLE, Reach, roots_of_unity, two
from certify.errors import CertifyError, Problem, Unsupported
from certify.graph import Graph
from certify.methods import Layerwise, LipschitzMethod
from certify.registry import Shape, rule_for, rule_of
from certify.rounding import multiply_up, up
from certify.rules.operators import ELEMENTWISE
from certify.rules.torch_conv import padding_of
from certify.slopes import slopes
from certify.spectral import as_float64, largest_singular_value, pair_distances
from lipnet.layers.base import Layer
from sdp.activation import PiecewiseLinear
from sdp.frequency import FrequencyChain, Tail, prove_frequencies, solve_frequencies
from sdp.lipsdp import lipsdp
from sdp.lure import LureSystem
from sdp.proof import UNIT, gamma, prove
from sdp.wiring import Wiring

Index = NDArray[np.int64]
_SIGNALS = 1200  # channels, with those that strides make: of the matrix at one frequency
_NUMBERS = 2**26  # in the matrices of all frequencies
_TAIL = 250  # signals of the layers behind the image, up to which they are part of the program
_TAIL_ALONE = 6000  # up to which they have LipSDP of their own
_TAIL_SECONDS = 60.0
_OUT = 1 + 2.0**-20  # covers the roundings in the bounds on roundings
_REARRANGED = (torch.flatten, "flatten", "reshape", "view", torch.reshape)
_PROVED = frozenset({Assumption.FLOAT64_LINALG})
_CLOSE = 1e-5  # of what is proved to what is claimed; otherwise multipliers further inside are tried
_FORM = "LipSDPFrequency takes a chain of Conv2d, average pools, batch normalisation and elementwise activations on images, then Flatten and linear layers"


@dataclasses.dataclass(frozen=True)
class LipSDPFrequency(LipschitzMethod):
    """LipSDP of a convolutional network, from l2 to l2, by one linear matrix inequality for each frequency of the torus that its images lie on.

    Holds everywhere, so on every domain. Exactly LipSDP of the whole network where all padding is circular; a bound on it for zero padding. What is proved is
    the smaller of this and the product of the layers. Newton's method proposes the multipliers, to a relative gap of `tolerance` or for `seconds`.
    """

    tolerance: float = 1e-6
    seconds: float = math.inf
    until: float = dataclasses.field(default=math.inf, repr=False, compare=False)  # of time.monotonic: then what is reached is proved

    def __post_init__(self) -> None:
        if not (0 < self.tolerance < 1 and self.seconds > 0):
            raise ValueError(f"LipSDPFrequency needs a tolerance in (0, 1) and seconds > 0, got {self.tolerance} and {self.seconds}")

    def bound(self, graph: Graph, domain: Domain) -> Bound:
        network = ConvNet.of(graph)
        torus = network.torus()
        product = Layerwise().bound(graph, domain)
        value, parts, pairs, evidence = self._proved(network, torus)
        if not value < product.value:
            value, parts = product.value, product.parts or (product,)
        if product.pairs is not None:
            either = up(math.sqrt(2) * value)  # of any two outputs
            pairs = np.minimum(product.pairs, either if pairs is None else np.minimum(pairs, either))
        return Bound(value, repr(self), domain=domain, assumptions=product.assumptions | _PROVED, evidence=evidence, parts=parts, pairs=pairs)

    def _proved(self, network: ConvNet, torus: tuple[int, int]) -> tuple[float, tuple[Bound, ...], Array | None, dict[str, object]]:
        """The bound of the convolutions times that of what follows; inf if there is none."""
        chain, exponent = network.chain(torus)
        network, chain = network.without_constants(chain)
        tail = network.joined_tail()
        with np.errstate(all="ignore"):  # of proposals; what is not finite is not proved
            proposals = solve_frequencies(chain, tail, self.tolerance, min(self.seconds, max(self.until - time.monotonic(), 0.01)))
        best, used = Halves(math.inf, math.inf), proposals[0]
        for proposal in proposals:
            if not (math.isfinite(proposal.claimed) and np.isfinite(proposal.multipliers).all()):
                break
            found = network.prove(chain, tail, proposal.multipliers)
            if found.value < best.value:
                best, used = found, proposal
            if best.value <= (proposal.claimed if tail is not None else multiply_up(proposal.claimed, found.last)) * (1 + _CLOSE):
                break
        evidence = {
            "torus": torus,
            "exponent": exponent,
            "multipliers": used.multipliers,
            "claimed": float(np.ldexp(used.claimed, exponent)),
            "status": used.status,
        }
        best = best.times(exponent)
        if not math.isfinite(best.value):
            return math.inf, (), None, evidence
        how = f"LipSDP at {chain.frequencies} frequencies of a {torus[0]}x{torus[1]} torus, {chain.inputs + chain.count} signals each"
        parts = (Bound(best.first, how, assumptions=_PROVED, name="image"),)
        if not network.tail:
            return best.value, parts, None, evidence
        behind = "LipSDP, or the product of norms" if tail is None else "LipSDP, in the metric of the channels"
        pairs = None if best.pairs is None else np.nextafter(best.pairs * best.first, np.inf) * (best.pairs > 0)
        return best.value, (*parts, Bound(best.last, behind, assumptions=_PROVED, name="behind")), pairs, evidence


@dataclasses.dataclass(frozen=True, eq=False)
class Halves:
    """What is proved of the part on the image and of the part behind it, in one metric of the channels between them."""

    first: float
    last: float = 1.0
    pairs: Array | None = None  # of the second part, for each pair of outputs

    def times(self, exponent: int) -> Halves:
        """With the first half `2^exponent` times as large; inf where that is no float64."""
        if not math.isfinite(self.first) or math.frexp(self.first)[1] + exponent > 1023:
            return dataclasses.replace(self, first=math.inf)
        return dataclasses.replace(self, first=up(math.ldexp(self.first, exponent)) if exponent else self.first)

    @property
    def value(self) -> float:
        """Of the whole; inf where a half is."""
        return multiply_up(self.first, self.last) if math.isfinite(self.first) and math.isfinite(self.last) else math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution of the image, or what is one: an average pool, a scaling of the channels, a space-to-depth rearrangement."""

    where: str
    kernel: Array  # (out, in, height, width)
    rows: Reach
    columns: Reach
    error: float = 0.0  # of each entry, relative

    @property
    def looks_outside(self) -> bool:
        return self.rows.looks_outside or self.columns.looks_outside


@dataclasses.dataclass(frozen=True)
class Bend:
    """An elementwise activation."""

    where: str
    slopes: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A linear layer behind the image."""

    where: str
    weight: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
    """A linear map on the torus at each frequency. The exact one is within `error` of `value` in each real and imaginary part, and both are within `size`."""

    value: NDArray[np.complex128]  # (frequencies, out, in)
    error: Array  # (out, in)
    size: Array  # (out, in), of the moduli

    def after(self, first: Response) -> Response:
        """The composition: `gamma_{2k+4}` for the sums of 2k products, and what the errors do; a modulus is at most sqrt(2) times its parts."""
        a, b = self.value, first.value
        made = (a.real @ b.real - a.imag @ b.imag) + 1j * (a.real @ b.imag + a.imag @ b.real)
        size = self.size @ first.size * _OUT
        error = (gamma(2 * a.shape[2] + 4) * size + 2 * (self.error @ first.size + self.size @ first.error)) * _OUT + 2.0**-1000 * (size > 0)
        return Response(made, error, size)

    def normalized(self) -> tuple[Response, int]:
        """Divided by the power of two that brings the largest entry near 1; exact, but for what underflows."""
        exponent = math.frexp(float(self.size.max(initial=0.0)))[1]
        if not -1000 < exponent < 1000:
            raise CertifyError("a kernel holds numbers whose products are no float64; load weights of ordinary size")
        factor = 2.0**-exponent
        error = self.error * factor + (2.0**-1000 * (self.size > 0) if exponent else 0.0)
        return Response(self.value * factor, error, self.size * factor * _OUT), exponent


@dataclasses.dataclass(frozen=True, eq=False)
class ConvNet:
    """The steps of a network on the image, and those behind it. What has no step is refused."""

    channels: int  # of the input
    image: tuple[Convolution | Bend, ...]
    tail: tuple[Matrix | Bend, ...]
    last: Shape  # of the last image

    @classmethod
    def of(cls, graph: Graph) -> ConvNet:
        """Reads a network. Raises Unsupported that names every node that stands in the way."""
        return _Reader(graph).network()

    @property
    def convolutions(self) -> list[Convolution]:
        return [step for step in self.image if isinstance(step, Convolution)]

    def torus(self) -> tuple[int, int]:
        """The smallest torus at the level of the last image on which every layer is what it is in the network. Raises Unsupported where there is none."""
        found = []
        for reaches in ([step.rows for step in self.convolutions], [step.columns for step in self.convolutions]):
            phases = _phases(reaches)
            most = max(-(-reach.enough() // m) for reach, m in zip(reaches, phases, strict=False))
            sizes = (n for n in range(1, most + 1) if all(reach.agrees(n * m) for reach, m in zip(reaches, phases, strict=False)))
            found.append(next(sizes, 0))
        if 0 in found:
            circular = next(step for step in self.convolutions if step.rows.wraps or step.columns.wraps)
            why = (
                f"its image of {circular.rows.size}x{circular.columns.size} is not a whole torus together with the other layers; "
                "LipSDPFrequency takes circular padding where every layer has it, in the 'same' geometry with strides that divide the image"
            )
            raise Unsupported([Problem(circular.where, "circular padding", why)])
        self._check_work((found[0], found[1]))
        return found[0], found[1]

    def size(self, torus: tuple[int, int]) -> tuple[int, int]:
        """Signals at each frequency of a torus, and how many frequencies it has."""
        down, across = (_phases([getattr(step, axis) for step in self.convolutions]) for axis in ("rows", "columns"))
        level, channels = 0, self.channels
        signals = channels * down[0] * across[0]
        for step in self.image:
            if isinstance(step, Convolution):
                level, channels = level + 1, len(step.kernel)
            else:
                signals += channels * down[level] * across[level]
        return signals, torus[0] * (torus[1] // 2 + 1)

    def _check_work(self, torus: tuple[int, int]) -> None:
        """Refuse what would take too long, with numbers, before anything is computed."""
        signals, frequencies = self.size(torus)
        numbers = signals**2 * frequencies
        if signals > _SIGNALS or numbers > _NUMBERS:
            why = (
                f"has {signals} signals at each of {frequencies} frequencies; LipSDPFrequency takes up to {_SIGNALS} signals and "
                f"{_NUMBERS} numbers in all matrices together, so take Layerwise(), or a smaller image or total stride"
            )
            raise Unsupported([Problem("", "the network", why)])

    def chain(self, torus: tuple[int, int]) -> tuple[FrequencyChain, int]:
        """The network on this torus (of the last image), masked where it has to be, each map divided by a power of two; and the sum of the exponents.

        A nonlinearity behind a map that is divided by c, and before one that is multiplied by c, has the same slopes.
        """
        maps = _Maps(self.convolutions, torus)
        layers: list[tuple[Response, float, float]] = []
        pending, clean, level = maps.identity(0, self.channels), True, 0
        fresh = True  # nothing but the identity is pending
        for place, step in enumerate(self.image):
            if isinstance(step, Convolution):
                if step.looks_outside and not clean:
                    layers.append((pending, 0.0, 1.0))
                    fresh = clean = True
                made = maps.response(level)
                pending, fresh = made if fresh else made.after(pending), False
                clean, level = clean and not maps.spills(level), level + 1
                continue
            low, high = step.slopes
            following = next((later for later in self.image[place:] if isinstance(later, Convolution)), None)
            if not clean and (low <= 0 <= high or (following is not None and following.looks_outside)):
                low, high, clean = min(low, 0.0), max(high, 0.0), True
            layers.append((pending, low, high))
            pending, fresh = maps.identity(level, pending.value.shape[1] // maps.copies(level)), True
        scaled = [response.normalized() for response in (*(response for response, _, _ in layers), pending)]
        maps_of, exponent = [response for response, _ in scaled], sum(power for _, power in scaled)
        lower, upper = ([np.full(response.value.shape[1], slope[k]) for response, *slope in layers] for k in (0, 1))
        return FrequencyChain(tuple(part.value for part in maps_of), tuple(part.error for part in maps_of), tuple(lower), tuple(upper)).alive(), exponent

    def without_constants(self, chain: FrequencyChain) -> tuple[ConvNet, FrequencyChain]:
        """Without the channels and the neurons behind the image that are constant: multipliers of theirs would have no upper end."""
        weights = [step.weight for step in self.tail if isinstance(step, Matrix)]
        if not weights:
            return self, chain
        kept = _some(np.asarray(chain.weights[-1].any(axis=(0, 2)) | chain.errors[-1].any(axis=1)))
        channels, height, width = self.last
        weights[0] = weights[0].reshape(-1, channels, height * width)[:, kept].reshape(len(weights[0]), -1)
        for k in range(len(weights) - 1):
            alive = _some(np.asarray(weights[k].any(axis=1)))
            weights[k], weights[k + 1] = weights[k][alive], weights[k + 1][:, alive]
        left = iter(weights)
        tail = tuple(Matrix(step.where, next(left)) if isinstance(step, Matrix) else step for step in self.tail)
        ends = chain.weights[-1][:, kept], chain.errors[-1][kept]
        narrow = dataclasses.replace(chain, weights=(*chain.weights[:-1], ends[0]), errors=(*chain.errors[:-1], ends[1]))
        return dataclasses.replace(self, tail=tail, last=(len(kept), height, width)), narrow

    def prove(self, chain: FrequencyChain, tail: Tail | None, multipliers: Array) -> Halves:
        """Both halves from proposed multipliers of the program: t of the chain and, with a tail, mu and those of the tail.

        With `D = diag(sqrt(mu))`, up to a factor: `D` times the image is proved with t, and the tail behind `D^-1` with its own.
        """
        t, mu, last = np.split(multipliers, [chain.count, chain.count + (0 if tail is None else chain.outputs)])
        if tail is None:
            return Halves(prove_frequencies(chain, t), self.tail_alone)
        middle = float(np.median(mu))
        scale = np.sqrt(np.clip(mu / middle, 2.0**-400, 2.0**400))  # any positive numbers will do
        return Halves(prove_frequencies(chain.scaled(scale), t / middle), *self._tail_bound(scale, last))

    def joined_tail(self) -> Tail | None:
        """The layers behind the image as part of the program; None where there are none, or too many."""
        channels, height, width = self.last
        widths = [len(step.weight) for step in self.tail if isinstance(step, Matrix)]
        if (
            not widths
            or not all(step.weight.any() for step in self.tail if isinstance(step, Matrix))
            or channels * min(height * width, widths[0]) + sum(widths) > _TAIL
            or channels * height * width > _TAIL_ALONE
        ):
            return None
        return Tail(self._tail_system(np.ones(channels)), np.repeat(np.arange(channels), height * width))

    def _tail_system(self, scale: Array) -> LureSystem:  # (channels,), positive
        """The tail behind a division of each channel by its number."""
        channels, height, width = self.last
        wiring = Wiring(channels * height * width)
        signal, first = wiring.input(), True
        for step in self.tail:
            if isinstance(step, Bend):
                low, high = step.slopes
                signal = wiring.nonlinear(signal, PiecewiseLinear((0.0,), (low, high), (0.0, 0.0)))
                continue
            weight = self._divided(step.weight, scale) if first else step.weight
            signal, first = wiring.linear(weight, signal, 2 * UNIT * np.abs(weight) if first else None), False
        return wiring.system(signal)

    def _divided(self, weight: Array, scale: Array) -> Array:
        return weight / np.repeat(scale, self.last[1] * self.last[2])

    def _tail_bound(self, scale: Array, multipliers: Array) -> tuple[float, Array | None]:
        """A proved constant of the tail behind the division, and for a single linear layer one for each pair of outputs."""
        if len(self.tail) > 1:
            return prove(self._tail_system(scale), multipliers), None
        weight = self._divided(self.tail[0].weight, scale) if isinstance(self.tail[0], Matrix) else np.zeros((0, 0))
        lengths = np.abs(weight).max(axis=1, initial=0.0) * math.sqrt(weight.shape[1]) * (1 + 1e-6)  # or more; squares could vanish
        pairs = (pair_distances(weight) + 2 * UNIT * (lengths + lengths[:, None])) * (1 + 4 * UNIT)
        np.fill_diagonal(pairs, 0.0)
        return largest_singular_value(weight, relative_error=2 * UNIT), pairs

    @functools.cached_property
    def tail_alone(self) -> float:
        """The smaller of the product of the norms and the slopes of the tail and, where it is not linear and not too large, its LipSDP."""
        value = 1.0
        for step in self.tail:
            value = multiply_up(value, largest_singular_value(step.weight) if isinstance(step, Matrix) else max(map(abs, step.slopes)))
        wide = math.prod(self.last) + sum(len(step.weight) for step in self.tail if isinstance(step, Matrix))
        if value == 0 or len(self.tail) < 3 or wide > _TAIL_ALONE:
            return value
        return min(value, lipsdp(self._tail_system(np.ones(self.last[0])), tolerance=_CLOSE, seconds=_TAIL_SECONDS).bound)


def _some(kept: NDArray[np.bool_]) -> Index:
    """The places that are kept, at least one."""
    return np.flatnonzero(kept) if kept.any() else np.zeros(1, dtype=np.int64)


def _phases(reaches: Sequence[Reach]) -> list[int]:  # of each level, the last one 1
    """How many pixels of a level differ modulo the strides that are still to come."""
    made = [1]
    for reach in reversed(reaches):
        made.insert(0, made[0] * reach.stride)
    return made


class _Maps:
    """The responses of the convolutions at one of each pair of frequencies w, -w of a torus.

    A signal of a level is, for each phase (a, b) of its pixels modulo the strides to come, a signal on the torus of the last level: the channels of those are
    ordered by a, b and the channel. The output `m' q + b` reads `stride b + dilation t - before + m q` with `m = stride m'`: phase and shift on that torus.
    """

    def __init__(self, convolutions: Sequence[Convolution], torus: tuple[int, int]) -> None:
        self.convolutions, self.torus = convolutions, torus
        self.phases = [_phases([getattr(step, axis) for step in convolutions]) for axis in ("rows", "columns")]
        every = ((f, g) for f in range(torus[0]) for g in range(torus[1]))
        self.frequencies = [pair for pair in every if pair <= ((-pair[0]) % torus[0], (-pair[1]) % torus[1])]

    def copies(self, level: int) -> int:
        """Signals that each channel of a level is."""
        return self.phases[0][level] * self.phases[1][level]

    def spills(self, level: int) -> bool:
        step = self.convolutions[level]
        return any(reach.spills(n * m[level]) for reach, n, m in zip((step.rows, step.columns), self.torus, self.phases, strict=True))

    def identity(self, level: int, channels: int) -> Response:
        eye = np.eye(channels * self.copies(level))
        return Response(np.broadcast_to(eye.astype(np.complex128), (len(self.frequencies), *eye.shape)), np.zeros_like(eye), eye)

    def response(self, level: int) -> Response:
        """By direct summation, with the rounding of `certify.convolution`: an entry is known to `gamma_{taps + 80}` times the sum of its |taps|."""
        step = self.convolutions[level]
        down, across = (_waves(reach, n, m[level], m[level + 1]) for reach, n, m in zip((step.rows, step.columns), self.torus, self.phases, strict=True))
        out, into = step.kernel.shape[:2]
        flat = step.kernel.reshape(out * into, -1).T  # (taps, out in)
        both = down.shape[1] * across.shape[1], down.shape[2] * across.shape[2]  # phases of the output, of the input

        def channels(waves: Array, taps: Array) -> Array:  # (out phases, in phases, taps), (taps, out in) -> (out, in)
            return (waves @ taps).reshape(*both, out, into).transpose(0, 2, 1, 3).reshape(both[0] * out, both[1] * into)

        def joined(first: Array, second: Array) -> Array:
            return np.asarray(np.einsum("bat,cdu->bcadtu", first, second).reshape(*both, -1))

        value = np.empty((len(self.frequencies), both[0] * out, both[1] * into), dtype=np.complex128)
        for k, (f, g) in enumerate(self.frequencies):
            wave = joined(down[f], across[g])
            value[k].real, value[k].imag = channels(np.ascontiguousarray(wave.real), flat), channels(np.ascontiguousarray(wave.imag), flat)
        size = channels(joined((down[0] != 0).astype(np.float64), (across[0] != 0).astype(np.float64)), np.abs(flat)) * _OUT
        return Response(value, ((gamma(len(flat) + TWIDDLE) + step.error) * size * _OUT + 2.0**-1000) * (size > 0), size)


def _waves(reach: Reach, points: int, phases: int, later: int) -> NDArray[np.complex128]:  # (points, later, phases, taps)
    """`exp(2 pi i f r / points)` where tap t of output phase b reads input phase a of the pixel r further on, else 0."""
    b, t = np.meshgrid(np.arange(later), np.arange(reach.taps), indexing="ij")
    shift, phase = np.divmod(reach.stride * b + reach.dilation * t - reach.before, phases)
    made = np.zeros((points, later, phases, reach.taps), dtype=np.complex128)
    made[:, b, phase, t] = roots_of_unity(points, points)[:, shift % points]
    return made


class _Reader:
    """Goes through the nodes of a graph, and notes every problem."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.image: list[Convolution | Bend] = []
        self.tail: list[Matrix | Bend] = []
        self.problems: list[Problem] = []
        self.shape: Shape = graph.input_shape
        self.last: Shape = ()

    def network(self) -> ConvNet:
        """The steps. Raises Unsupported."""
        if len(self.shape) != 3:
            raise Unsupported([Problem("", "the input", f"has the shape {self.shape}; {_FORM}; for other inputs there are LipSDP and the bound of the layers")])
        before = None
        for node in self.graph.trace.nodes:
            if node.op == "output" or (node.name not in self.graph.shapes and node.op in ("call_function", "call_method", "get_attr")):
                continue
            signals = [one for one in node.all_input_nodes if one.name in self.graph.shapes]
            if before is not None and (signals != [before] or node.op not in ("call_module", "call_function", "call_method")):
                self.refuse(node.name, str(node.target), "joins or splits signals, and the border of the torus would cut what passes linearly")
            elif before is not None:
                self.read(node)
            before, self.shape = node, self.graph.shapes[node.name]
        if not self.problems and not any(isinstance(step, Convolution) for step in self.image):
            self.refuse("", "the network", "has no convolution, so take LipSDP or Layerwise()")
        if self.problems:
            raise Unsupported(self.problems)
        return ConvNet(self.graph.input_shape[0], tuple(self.image), tuple(self.tail), self.last or self.shape)

    def refuse(self, where: str, what: str, why: str) -> None:
        self.problems.append(Problem(where, what, f"{why}; {_FORM}" if _FORM not in why else why))

    def read(self, node: torch.fx.Node) -> None:
        """One node."""
        if node.op == "call_module" and _is(self.graph.module(node), nn.Flatten) and len(self.graph.shapes[node.name]) != 1:
            self.refuse(str(node.target), "Flatten", "leaves more than one dimension")
        elif node.op == "call_module":
            self.module(str(node.target), self.graph.module(node))
        elif node.target in ELEMENTWISE:
            self.module(node.name, ELEMENTWISE[node.target])
        elif node.target in _REARRANGED and self.graph.shapes[node.name] == (math.prod(self.shape),):
            self.flatten()
        else:
            self.refuse(node.name, getattr(node.target, "__name__", str(node.target)), "is no step of such a chain")

    def module(self, where: str, module: nn.Module) -> None:
        """One module; a layer of lipnet is read as the plain modules that it is frozen to."""
        if type(module) is nn.Sequential:  # from a layer that was frozen
            for child in module:
                self.module(where, child)
        elif _is(module, nn.Identity, nn.Dropout, nn.Dropout2d, lipnet.BatchCentering):
            return
        elif _is(module, nn.Flatten):
            self.flatten()
        elif slopes(module) is not None and rule_for(module) is rule_of(nn.ReLU):
            self.bend(Bend(where, slopes(module) or (0.0, 0.0)))
        elif _is(module, nn.BatchNorm2d) and not _has_positive_variance(module):
            self.refuse(where, "BatchNorm2d", "has no running variance, or one that is not positive with eps added; train it first")
        elif _is(module, lipnet.Scale, lipnet.Normalize, nn.BatchNorm2d):
            self.scaling(where, module)
        elif _is(module, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.PixelUnshuffle) and not self.last:
            self.on_image(where, module)
        elif _is(module, nn.Linear) and self.last:
            self.tail.append(Matrix(where, as_float64(module.get_parameter("weight"))))
        elif isinstance(module, Layer) and type(module.frozen()) in (nn.Conv2d, nn.Linear, nn.Sequential, nn.AvgPool2d):
            self.module(where, module.frozen())
        else:
            self.refuse(where, type(module).__name__, "is no step of such a chain" + (" behind the image" if self.last else ""))

    def flatten(self) -> None:
        self.last = self.last or self.shape

    def bend(self, step: Bend) -> None:
        (self.tail if self.tail else self.image).append(step)

    def scaling(self, where: str, module: nn.Module) -> None:
        """A number for each channel, as a convolution of one tap."""
        if self.last:
            self.refuse(where, type(module).__name__, "is no step of such a chain behind the image")
            return
        factors, error = _factors(module)
        _, height, width = self.shape
        kernel = np.diag(np.broadcast_to(factors, (self.shape[0],)))[:, :, None, None]
        rows, columns = (Reach(size, size, 1, 1, 0, 1, False) for size in (height, width))
        self.image.append(Convolution(where, kernel, rows, columns, error))

    def on_image(self, where: str, module: nn.Module) -> None:
        """A convolution, or what is one."""
        error, mode, why = 0.0, "zeros", ""
        padding: Sequence[int]
        dilation: Sequence[int] = (1, 1)
        channels, *size = self.shape
        if isinstance(module, nn.Conv2d):
            kernel, stride, padding, dilation, mode = _whole(module), module.stride, padding_of(module), module.dilation, module.padding_mode
            if mode not in ("zeros", "circular"):
                why = f"padding_mode={mode!r} shows pixels of the border more than once; use 'zeros' or 'circular'"
        elif isinstance(module, nn.PixelUnshuffle):
            factor = module.downscale_factor
            kernel = np.eye(channels * factor**2).reshape(channels * factor**2, channels, factor, factor)
            stride, padding = (factor, factor), (0, 0, 0, 0)
        else:
            kernel, stride, padding, why = _average(module, channels, (size[0], size[1]))
            error = UNIT
        if why:
            self.refuse(where, type(module).__name__, why)
            return
        reaches = []
        for axis in (0, 1):
            before, after, taps = padding[2 * axis], padding[2 * axis + 1], kernel.shape[2 + axis]
            outputs = (size[axis] + before + after - dilation[axis] * (taps - 1) - 1) // stride[axis] + 1
            reaches.append(Reach(size[axis], outputs, taps, stride[axis], before, dilation[axis], mode == "circular" and before + after > 0))
        self.image.append(Convolution(where, kernel, reaches[0], reaches[1], error))
        self.shape = (len(kernel), reaches[0].outputs, reaches[1].outputs)


def _is(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is known by the rule of one of these very types; a subclass with a rule of its own is not."""
    found = rule_for(module)
    return any(isinstance(module, cls) and found is rule_of(cls) for cls in types)


def _has_positive_variance(layer: nn.Module) -> bool:
    variance = getattr(layer, "running_var", None)
    return variance is not None and bool((as_float64(variance) + getattr(layer, "eps", 0.0) > 0).all())


def _whole(layer: nn.Conv2d) -> Array:  # (out, in, height, width)
    """The kernel without groups."""
    kernel, groups = as_float64(layer.weight), layer.groups
    out, into = len(kernel) // groups, kernel.shape[1]
    made = np.zeros((len(kernel), into * groups, *kernel.shape[2:]))
    for k in range(groups):
        made[k * out : (k + 1) * out, k * into : (k + 1) * into] = kernel[k * out : (k + 1) * out]
    return made


def _average(module: nn.Module, channels: int, size: tuple[int, int]) -> tuple[Array, tuple[int, int], tuple[int, ...], str]:
    """Kernel, stride and padding of an average pool, and why it is no convolution, if it is none."""
    why, padding, divisor = "", (0, 0, 0, 0), None
    if isinstance(module, nn.AvgPool2d):
        taps, stride, (down, across) = two(module.kernel_size), two(module.stride), two(module.padding)
        padding, divisor = (down, down, across, across), module.divisor_override
        if module.ceil_mode or (any(padding) and not module.count_include_pad and divisor is None):
            why = "averages fewer pixels at the border than inside; use ceil_mode=False, and count_include_pad=True or no padding"
    else:
        asked = module.output_size if isinstance(module.output_size, tuple | list) else (module.output_size, module.output_size)
        outputs = [n if wanted is None else int(wanted) for n, wanted in zip(size, asked, strict=True)]
        taps = stride = (size[0] // outputs[0] or 1, size[1] // outputs[1] or 1)
        if any(n % wanted for n, wanted in zip(size, outputs, strict=True)):
            why = f"averages over windows of different sizes, from {size} to {tuple(outputs)}; choose sizes that divide the image"
    kernel = np.zeros((channels, channels, *taps))
    kernel[np.arange(channels), np.arange(channels)] = 1.0 / (taps[0] * taps[1] if divisor is None else divisor)
    return kernel, stride, padding, why


def _factors(module: nn.Module) -> tuple[Array, float]:
    """By what each channel is multiplied, and the relative error of that."""
    if isinstance(module, lipnet.Scale):
        return np.array([module.factor]), 0.0
    if isinstance(module, lipnet.Normalize):
        return 1 / as_float64(module.divisor), UNIT
    if not isinstance(module, nn.BatchNorm2d) or module.running_var is None:
        raise AssertionError(f"{type(module).__name__} has no factors; please report this")
    weight = np.ones(1) if module.weight is None else as_float64(module.weight)
    return weight / np.sqrt(as_float64(module.running_var) + module.eps), 4 * UNIT
