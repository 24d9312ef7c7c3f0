"""LipSDP of convolutional networks, one small matrix inequality for each frequency.

On a torus, a convolution is one matrix for each frequency. Let the signals s of a network of convolutions and pointwise nonlinearities be stacked channel by
channel, and let all pixels of a channel share a multiplier. By Parseval's equality the form of LipSDP, summed over the pixels, is the mean over the
frequencies of `s(w)* P(w) s(w)` with

    P(w) = rho E_0 + sum_j t_j (p_j(w) q_j(w)* + q_j(w) p_j(w)*) - H_L(w)* H_L(w),

so it is not negative if every P(w) is positive semidefinite, and then `|df|^2 <= rho |dx|^2`. Nothing is lost: the form and its constraints do not change
when the torus is shifted, so the mean of optimal multipliers over all shifts is optimal too, and is the same for all pixels of a channel.

A real network has `P(-w) = conj P(w)`, so one of each pair of frequencies is enough. What follows the convolutions (a tail, on the flattened image) is joined
by a metric mu, one number for each channel: `rho E_0 + ... - H_L* diag(mu) H_L >= 0` at every frequency, and `diag(mu) (x) I + ... >= 0` for the tail.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sdp.lure import LureSystem
from sdp.newton import Proposal, Report, newton
from sdp.program import Program, factors, program
from sdp.proof import prove_every
from sdp.start import best_multiplier, feasible

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
Labels = NDArray[np.int64]
_NUMBERS = 2**18  # complex numbers in the matrices of all frequencies that Newton's method works on at a time
_ROUNDS = 6  # of adding frequencies
_SMALL = 1e-60  # of the largest channel of a layer: what is smaller counts as this
_BLENDS = (1e-9, 1e-7, 1e-5, 1e-3, 0.03, 0.3)  # towards multipliers that are well inside the cone


@dataclasses.dataclass(frozen=True, eq=False)
class FrequencyChain:
    """`a_k = s_k(H_k a_{k-1})`, `f(x) = H_{L} a_L`, `a_0 = x`: every H_k a convolution on one torus, every s_k pointwise, with its slopes for each channel.

    The matrices of the network may differ from the weights by as much as the errors in each real and each imaginary part, at every frequency: what is proved
    holds for every network within. With strides, the pixels that differ modulo what is still to come are channels of their own.
    Raises ValueError for shapes that do not fit, NaN, infinities, and lower > upper.
    """

    weights: tuple[Complex, ...]  # H_0 .. H_L: (frequencies, out, in), one of each pair w, -w
    errors: tuple[Array, ...]  # (out, in), not negative
    lower: tuple[Array, ...]  # (out,) of H_0 .. H_{L-1}
    upper: tuple[Array, ...]

    def __post_init__(self) -> None:
        shapes = [weight.shape for weight in self.weights]
        fits = all(len(shape) == 3 for shape in shapes) and all(a[0] == b[0] and a[1] == b[2] for a, b in itertools.pairwise(shapes))
        if not fits or [error.shape for error in self.errors] != [shape[1:] for shape in shapes]:
            raise ValueError(f"the weights of a chain are (frequencies, out, in) and fit each other and their errors, got {shapes}")
        wanted = [(shape[1],) for shape in shapes[:-1]]
        if [part.shape for part in self.lower] != wanted or [part.shape for part in self.upper] != wanted:
            raise ValueError(f"the slopes of a chain are one pair for each row of each weight but the last, so {wanted}")
        if not all(np.isfinite(array).all() for array in (*self.weights, *self.errors, *self.lower, *self.upper)):
            raise ValueError("a chain needs finite numbers, found NaN or infinity in its weights, errors or slopes")
        if any((error < 0).any() for error in self.errors) or any((low > high).any() for low, high in zip(self.lower, self.upper, strict=True)):
            raise ValueError("a chain needs errors that are not negative and slopes with lower <= upper")

    @property
    def frequencies(self) -> int:
        """How many there are, of each pair one."""
        return len(self.weights[0])

    @property
    def inputs(self) -> int:
        """Channels of x."""
        return self.weights[0].shape[2]

    @property
    def count(self) -> int:
        """Of the multipliers: channels with a nonlinearity."""
        return sum(map(len, self.lower))

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.weights[-1].shape[1]

    def at(self, which: Labels) -> FrequencyChain:
        """Some of the frequencies."""
        return dataclasses.replace(self, weights=tuple(weight[which] for weight in self.weights))

    def alive(self) -> FrequencyChain:
        """The same function without the channels whose input is zero, whatever x is. (Their multipliers would have no upper end in Newton's method.)"""
        weights, errors, lower, upper = list(self.weights), list(self.errors), list(self.lower), list(self.upper)
        for k in range(len(lower)):
            kept = np.flatnonzero(weights[k].any(axis=(0, 2)) | errors[k].any(axis=1))
            weights[k], errors[k], lower[k], upper[k] = weights[k][:, kept], errors[k][kept], lower[k][kept], upper[k][kept]
            weights[k + 1], errors[k + 1] = weights[k + 1][:, :, kept], errors[k + 1][:, kept]
        return FrequencyChain(tuple(weights), tuple(errors), tuple(lower), tuple(upper))

    def scaled(self, scale: Array) -> FrequencyChain:  # (outputs,), positive
        """With each channel of the output multiplied by a number."""
        weight, error = self.weights[-1] * scale[:, None], self.errors[-1] * scale[:, None]
        rounding = 2.0**-52 * np.max([np.abs(weight.real).max(axis=0), np.abs(weight.imag).max(axis=0)], axis=0)
        exact = np.frexp(scale)[0] == 0.5  # a power of two
        error = np.where(exact[:, None], error, (error + rounding) * (1 + 2.0**-50) + 2.0**-1060 * (rounding > 0))
        return dataclasses.replace(self, weights=(*self.weights[:-1], weight), errors=(*self.errors[:-1], error))

    def system(self, frequency: int) -> LureSystem:
        """The real system of twice the size whose LipSDP, with each multiplier twice, is that of a frequency: `R + iS` is `[[R, -S], [S, R]]`.

        Real and imaginary parts stand together, layer by layer, so that the system is a chain again.
        """
        weights, errors = [real_form(weight[frequency]) for weight in self.weights], [np.tile(error, (2, 2)) for error in self.errors]
        return chain_system(weights, errors, *([np.tile(part, 2) for part in parts] for parts in (self.lower, self.upper)))

    def doubled(self, multipliers: Array) -> Array:
        """The multipliers of `system`."""
        parts = np.split(multipliers, np.cumsum([len(part) for part in self.lower])[:-1])
        return np.concatenate([np.zeros(0), *(np.tile(part, 2) for part in parts)])


def real_form(matrix: Complex) -> Array:
    """`[[R, -S], [S, R]]` of `R + iS`."""
    return np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]])


def chain_system(weights: Sequence[Array], errors: Sequence[Array], lower: Sequence[Array], upper: Sequence[Array]) -> LureSystem:
    """`a_k = s_k(W_k a_{k-1})`, `f(x) = W_L a_L` as a `LureSystem`, each matrix known to within its errors."""
    inputs, widths = weights[0].shape[1], [len(weight) for weight in weights[:-1]]
    ends = inputs + np.cumsum([0, *widths])
    starts = [0, *ends]
    rows, output = np.zeros((sum(widths), ends[-1])), np.zeros((len(weights[-1]), ends[-1]))
    rows_error, output_error = np.zeros_like(rows), np.zeros_like(output)
    for k, (weight, error) in enumerate(zip(weights, errors, strict=True)):
        columns = slice(starts[k], ends[k])
        whole, whole_error = (output, output_error) if k == len(widths) else (rows, rows_error)
        place = slice(None) if k == len(widths) else slice(ends[k] - inputs, ends[k + 1] - inputs)
        whole[place, columns], whole_error[place, columns] = weight, error
    low, high = (np.concatenate([np.zeros(0), *parts]) for parts in (lower, upper))
    return LureSystem(inputs, rows, low, high, output, rows_error, output_error)


def prove_frequencies(
    chain: FrequencyChain,
    multipliers: Array,  # (chain.count,), not negative
) -> float:
    """A proved Lipschitz constant (l2 to l2, on the torus) of a chain, from proposed multipliers: the largest over the frequencies; inf if they prove none.

    Raises ValueError for multipliers of the wrong shape, negative or not finite.
    """
    if multipliers.shape != (chain.count,):
        raise ValueError(f"multipliers must have the shape ({chain.count},), one for each channel with a nonlinearity, got {multipliers.shape}")
    return prove_every([functools.partial(chain.system, frequency) for frequency in range(chain.frequencies)], chain.doubled(multipliers))


# Proposals


@dataclasses.dataclass(frozen=True, eq=False)
class Tail:
    """What follows the convolutions: a system of the pixels of the output, and the channel of each."""

    system: LureSystem
    channels: Labels  # (system.inputs,)

    @functools.cached_property
    def reduced(self) -> Tail:
        """The same program with fewer inputs: of the pixels of a channel, which share their mu, only the products of what is done to them matter."""
        inputs = self.system.inputs
        first = np.vstack([self.system.rows[:, :inputs], self.system.output[:, :inputs]])
        used = np.flatnonzero(first.any(axis=1))
        blocks, labels = [], []
        for channel in range(int(self.channels.max()) + 1):
            block = first[:, self.channels == channel]
            if len(used) < block.shape[1]:
                narrow = np.zeros((len(first), len(used)))
                narrow[used] = np.asarray(np.linalg.qr(block[used].T, mode="r")).T
                block = narrow
            blocks.append(block)
            labels += block.shape[1] * [channel]
        narrow, count = np.hstack(blocks), self.system.count
        rows, output = np.hstack([narrow[:count], self.system.rows[:, inputs:]]), np.hstack([narrow[count:], self.system.output[:, inputs:]])
        return Tail(LureSystem(narrow.shape[1], rows, self.system.lower, self.system.upper, output), np.array(labels, dtype=np.int64))

    @functools.cached_property
    def program(self) -> Program:
        """`sum_k mu_k E_k + sum_j t_j (...) - output'output >= 0`: a multiplier for each input, then the system's own."""
        inputs, size = self.system.inputs, self.system.size
        eye = np.eye(inputs, size)
        left, right = factors(self.system)
        return Program(np.vstack([eye / 2, left]), np.vstack([eye, right]), np.zeros(size), -(self.system.output.T @ self.system.output), 2)


@dataclasses.dataclass(frozen=True, eq=False)
class FrequencyProgram:
    """`min rho` such that every P(w) and the matrix of the tail are positive semidefinite: a `Barrier` for Newton's method.

    The multipliers are those of the chain and, with a tail, mu for each channel of its output, then those of the tail.
    """

    rows: Complex  # (frequencies, nonlinearities, size): v_j
    lower: Array
    upper: Array
    output: Complex  # (frequencies, outputs, size): o_k
    tail: Tail | None = None
    norm: float = 2

    @classmethod
    def of(cls, chain: FrequencyChain, tail: Tail | None = None) -> FrequencyProgram:
        """The program of a chain."""
        count, inputs = chain.count, chain.inputs
        ends = inputs + np.cumsum([0, *(len(part) for part in chain.lower)])
        starts = [0, *ends]
        rows = np.zeros((chain.frequencies, count, inputs + count), dtype=np.complex128)
        for k, weight in enumerate(chain.weights[:-1]):
            rows[:, ends[k] - inputs : ends[k + 1] - inputs, starts[k] : ends[k]] = weight
        output = np.zeros((chain.frequencies, chain.outputs, inputs + count), dtype=np.complex128)
        output[:, :, starts[len(chain.lower)] : ends[-1]] = chain.weights[-1]
        lower, upper = (np.concatenate([np.zeros(0), *parts]) for parts in (chain.lower, chain.upper))
        return cls(rows, lower, upper, output, tail)

    @functools.cached_property
    def guarded(self) -> NDArray[np.bool_]:
        """All but those of the chain where every range of slopes ends in 0: no other multiplier adds to `2 t_j` on the diagonal then."""
        kept = np.ones(self.count, dtype=bool)
        kept[: len(self.lower)] = bool((self.lower * self.upper != 0).any())
        return kept

    @functools.cached_property
    def left(self) -> Complex:  # (frequencies, size, own)
        """Columns p_j and, with a tail, `-o_k / 2`."""
        return self._columns(self.lower, -0.5)

    @functools.cached_property
    def right(self) -> Complex:  # (frequencies, size, own)
        """Columns q_j and, with a tail, o_k."""
        return self._columns(self.upper, 1.0)

    def _columns(self, slopes: Array, factor: float) -> Complex:
        selector = np.eye(len(slopes), self.rows.shape[2], self.inputs)
        made = selector - slopes[:, None] * self.rows
        if self.tail is not None:
            made = np.concatenate([made, factor * self.output], axis=1)
        return np.ascontiguousarray(made.conj().swapaxes(1, 2))

    @property
    def inputs(self) -> int:
        """Channels of x."""
        return self.rows.shape[2] - self.rows.shape[1]

    @property
    def size(self) -> int:
        """Of all matrices together."""
        return self.rows.shape[0] * self.rows.shape[2] + (0 if self.tail is None else self.tail.program.size)

    @property
    def own(self) -> int:
        """The multipliers that the frequencies see."""
        return len(self.lower) + (0 if self.tail is None else self.output.shape[1])

    @property
    def count(self) -> int:
        """Of the multipliers."""
        return self.own + (0 if self.tail is None else self.tail.system.count)

    @functools.cached_property
    def _last(self) -> int:
        """The first signal that the output reads."""
        return int(self.output.any(axis=(0, 1)).argmax())

    def matrix(self, rho: float, multipliers: Array) -> Complex:  # (frequencies, size, size)
        """Every P(w): `p q* + q p* = 2 e e' - (a + b)(e v + v* e') + 2 a b v* v` for slopes in [a, b]."""
        t, inputs, last = multipliers[: len(self.lower)], self.inputs, self._last
        half = np.zeros((len(self.rows), self.rows.shape[2], self.rows.shape[2]), dtype=np.complex128)
        half[:, inputs:] = -((self.lower + self.upper) * t)[:, None] * self.rows
        bent = np.flatnonzero(self.lower * self.upper)
        if len(bent):
            v = self.rows[:, bent]
            half += v.conj().swapaxes(1, 2) @ ((self.lower * self.upper * t)[bent, None] * v)
        weights = np.ones(self.output.shape[1]) if self.tail is None else multipliers[len(self.lower) : self.own]
        seen = self.output[:, :, last:]
        half[:, last:, last:] -= seen.conj().swapaxes(1, 2) @ (weights[:, None] / 2 * seen)
        made = half + half.conj().swapaxes(1, 2)
        index = np.arange(self.rows.shape[2])
        made[:, index, index] += np.concatenate([np.full(inputs, rho), 2 * t])
        return made

    def factor(self, rho: float, multipliers: Array) -> tuple[Complex, Array | None] | None:
        """The Cholesky factors of every P(w), and of the tail."""
        try:
            found: Complex = np.linalg.cholesky(self.matrix(rho, multipliers)).astype(np.complex128, copy=False)
        except np.linalg.LinAlgError:
            return None
        if not np.isfinite(np.diagonal(found, axis1=1, axis2=2)).all():
            return None
        if self.tail is None:
            return found, None
        tail = self.tail.program.factor(0.0, self._of_tail(multipliers))
        return None if tail is None else (found, tail)

    def log_det(self, factor: tuple[Complex, Array | None]) -> float:
        """The sum over the frequencies, and of the tail."""
        own = 2 * float(np.log(np.diagonal(factor[0], axis1=1, axis2=2).real).sum())
        return own if self.tail is None or factor[1] is None else own + self.tail.program.log_det(factor[1])

    def derivatives(self, factor: tuple[Complex, Array | None]) -> tuple[Array, Array]:
        """Of the sum in (rho, t): with `Z = P(w)^-1`, `2 Re p_j* Z q_j`, and minus the Hessian.

        That is `2 Re [(p_j* Z q_k)(p_k* Z q_j) + (p_j* Z p_k)(q_k* Z q_j)]`.
        """
        inverse = _inverse(factor[0])
        left, right, gains = inverse @ self.left, inverse @ self.right, inverse[:, :, : self.inputs]
        across = left.conj().swapaxes(1, 2)
        cross, first, second = across @ right, across @ left, right.conj().swapaxes(1, 2) @ right
        hessian = np.zeros((self.count + 1, self.count + 1))
        own = slice(1, self.own + 1)
        hessian[own, own] = 2 * ((cross * cross.swapaxes(1, 2)).sum(axis=0) + (first * second.conj()).sum(axis=0)).real
        gram = gains.conj().swapaxes(1, 2) @ gains
        hessian[0, 0] = (gram.real**2 + gram.imag**2).sum()
        reach = gains.conj().swapaxes(1, 2)
        hessian[0, own] = hessian[own, 0] = 2 * ((reach @ left) * (reach @ right).conj()).sum(axis=(0, 1)).real
        gradient = np.zeros(self.count + 1)
        gradient[0] = np.trace(gram, axis1=1, axis2=2).real.sum()
        gradient[own] = 2 * np.diagonal(cross, axis1=1, axis2=2).real.sum(axis=0)
        if self.tail is not None and factor[1] is not None:
            self._add_tail(gradient, hessian, *self.tail.program.derivatives(factor[1]))
        return gradient, hessian

    def lipschitz(self, rho: float) -> float:
        """The constant that a feasible rho stands for."""
        return math.sqrt(max(rho, 0.0))

    def gains(self, multipliers: Array) -> Array:  # (frequencies,)
        """The smallest rho for each frequency with these multipliers, by Schur complements; inf if there is none. Proposals, not proofs."""
        matrix, inputs = self.matrix(0.0, multipliers), self.inputs
        rest, cross, first = matrix[:, inputs:, inputs:], matrix[:, inputs:, :inputs], matrix[:, :inputs, :inputs]
        try:
            half = np.linalg.solve(np.linalg.cholesky(rest), cross)
        except np.linalg.LinAlgError:
            return np.concatenate([self._part(k).gains(multipliers) for k in range(len(matrix))]) if len(matrix) > 1 else np.array([np.inf])
        needed = half.conj().swapaxes(1, 2) @ half - first
        return np.maximum(np.linalg.eigvalsh(needed)[:, -1], 0.0) if np.isfinite(needed).all() else np.full(len(matrix), np.inf)

    def _part(self, frequency: int) -> FrequencyProgram:
        """Of one frequency."""
        return dataclasses.replace(self, rows=self.rows[[frequency]], output=self.output[[frequency]])

    def _of_tail(self, multipliers: Array) -> Array:
        """One mu for each input of the tail, and the tail's own multipliers."""
        if self.tail is None:
            return np.zeros(0)
        first = self.own - int(self.tail.channels.max()) - 1
        return np.concatenate([multipliers[first + self.tail.channels], multipliers[self.own :]])

    def _add_tail(self, gradient: Array, hessian: Array, of_tail: Array, of_tail_twice: Array) -> None:
        """The derivatives of the tail, summed over the pixels that share their mu."""
        if self.tail is None:
            return
        inputs, channels = self.tail.system.inputs, int(self.tail.channels.max()) + 1
        spread = np.zeros((channels + self.tail.system.count, inputs + self.tail.system.count))
        spread[self.tail.channels, np.arange(inputs)] = 1.0
        spread[channels:, inputs:] = np.eye(self.tail.system.count)
        gradient[-len(spread) :] += spread @ of_tail[1:]
        hessian[-len(spread) :, -len(spread) :] += spread @ of_tail_twice[1:, 1:] @ spread.T


def solve_frequencies(
    chain: FrequencyChain,
    tail: Tail | None = None,
    tolerance: float = 1e-8,
    seconds: float = math.inf,
    report: Report | None = None,
) -> list[Proposal]:
    """Multipliers of a chain and its tail by Newton's method; then the same, further and further inside the cone, for when the first prove too little.

    Where there are too many frequencies it works on some of them, and adds those that need the largest rho until none needs more. An infinite `claimed` says
    that no feasible multipliers were found.
    """
    began = time.perf_counter()
    small = None if tail is None else tail.reduced
    count = chain.count + (0 if small is None else chain.outputs + small.system.count)
    inside = feasible_frequencies(chain, small)
    if inside is None:
        return [Proposal(np.zeros(count), math.inf, "infeasible", 0, math.inf, time.perf_counter() - began)]
    chain, sizes = _alike(chain)
    scales = np.concatenate([sizes**2, np.ones(count - len(sizes))])
    inside = inside[0], inside[1] * scales
    room = max(_NUMBERS // (chain.inputs + count) ** 2, 4)
    active = np.arange(chain.frequencies) if chain.frequencies <= room else np.unique(np.linspace(0, chain.frequencies - 1, room // 2).astype(np.int64))
    best = Proposal(inside[1], math.sqrt(inside[0]), "closed form", 0, math.inf, 0.0)
    for _ in range(_ROUNDS):
        left = seconds - (time.perf_counter() - began)
        found = newton(FrequencyProgram.of(chain.at(active), small), inside, tolerance=tolerance, seconds=left, report=report)
        rho = _gains(chain, small, found.multipliers)
        claimed = math.sqrt(float(rho.max()))
        if claimed < best.claimed:
            best = dataclasses.replace(found, claimed=claimed)
        if len(active) == chain.frequencies or claimed <= found.claimed * (1 + tolerance) or found.status in ("time limit", "interrupted"):
            break
        active = np.union1d(active, np.argsort(-rho)[: max(room // 4, 2)])
    best = dataclasses.replace(best, multipliers=best.multipliers / scales, seconds=time.perf_counter() - began)
    inside = inside[0], inside[1] / scales
    return [best, *(dataclasses.replace(best, multipliers=best.multipliers * (1 - part) + inside[1] * part) for part in _BLENDS)]


def feasible_frequencies(chain: FrequencyChain, tail: Tail | None = None) -> tuple[float, Array] | None:
    """rho and multipliers that are strictly feasible at every frequency, and for the tail; None where none are found."""
    multipliers, outer, last = closed_form(chain), 1.0, np.zeros(0)
    if tail is not None:
        goal = program(tail.system)
        inside = feasible(tail.system, goal)
        if inside is None:
            return None
        outer, last = inside
    for power in range(60):
        rho = float(_gains(chain, None, multipliers * 4.0**power).max())
        if math.isfinite(rho):
            break
    else:
        return None
    best = min((float(_gains(chain, None, multipliers * 4.0**power * factor).max()), factor) for factor in (1.0, 1.5, 2.0, 3.0, 5.0, 8.0))
    made = multipliers * 4.0**power * best[1] * outer
    mu = np.zeros(0) if tail is None else np.full(chain.outputs, outer)
    return (1.2 * best[0] * outer + 1e-12, np.concatenate([made, mu, last]))


def _alike(chain: FrequencyChain) -> tuple[FrequencyChain, Array]:
    """The chain with the input of each channel divided by its size, and the sizes. Multiplied by their squares the multipliers are those of the same program.

    Channels that training has all but removed would otherwise have multipliers 10^15 times as large as others, and Newton's method would lose its direction.
    """
    weights, sizes = list(chain.weights), [np.zeros(0)]
    for k in range(len(chain.lower)):
        size = np.sqrt((np.abs(weights[k]) ** 2).sum(axis=2).max(axis=0))
        size = np.maximum(size, max(_SMALL * float(size.max(initial=0.0)), 1e-100))
        weights[k], weights[k + 1] = weights[k] / size[:, None], weights[k + 1] * size
        sizes.append(size)
    return dataclasses.replace(chain, weights=tuple(weights)), np.concatenate(sizes)


def closed_form(chain: FrequencyChain) -> Array:  # (chain.count,)
    """Multipliers feasible with `rho = 1` and no output: `sdp.start.closed_form` at every frequency, with the channels of a layer scaled to the same size.

    Scaling a channel does not change the program, and this scale is near the central path, which the same multiplier for all channels may be far from.
    """
    matrix = np.broadcast_to(np.eye(chain.inputs, dtype=np.complex128), (chain.frequencies, chain.inputs, chain.inputs))
    made = [np.zeros(0)]
    for weight, lower, upper in zip(chain.weights, chain.lower, chain.upper, strict=False):
        adjoint = weight.conj().swapaxes(1, 2)
        gains = weight @ np.linalg.solve(matrix, adjoint)
        sizes = np.sqrt(np.maximum(np.diagonal(gains, axis1=1, axis2=2).real.max(axis=0), 1e-100))
        sizes = np.maximum(sizes, _SMALL * sizes.max(initial=0.0))
        size = max(float(np.linalg.eigvalsh(gains / sizes / sizes[:, None])[:, -1:].max(initial=0.0)), 1e-100)
        t = best_multiplier(size, lower, upper) / sizes**2 if len(lower) else sizes
        made.append(t)
        both = ((lower + upper) * t)[:, None] * weight
        inner = matrix + adjoint @ ((2 * t * lower * upper)[:, None] * weight)
        matrix = 2 * np.diag(t) - both @ np.linalg.solve(inner, both.conj().swapaxes(1, 2))
        matrix = (matrix + matrix.conj().swapaxes(1, 2)) / 2
    return np.concatenate(made)


def _inverse(factors: Complex) -> Complex:
    """Of lower triangular matrices."""
    return np.stack([scipy.linalg.lapack.ztrtri(factor, lower=1)[0] for factor in factors])


def _gains(chain: FrequencyChain, tail: Tail | None, multipliers: Array) -> Array:  # (frequencies,)
    """The smallest rho for each frequency, a part of the frequencies at a time."""
    step = max(_NUMBERS // (chain.inputs + chain.count) ** 2, 1)
    parts: list[Callable[[], FrequencyProgram]] = [
        functools.partial(FrequencyProgram.of, chain.at(np.arange(start, min(start + step, chain.frequencies))), tail)
        for start in range(0, chain.frequencies, step)
    ]
    return np.concatenate([part().gains(multipliers) for part in parts])
