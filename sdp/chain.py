"""Feed-forward systems as chains of matrices: what can be had layer by layer, at the cost of layer-sized matrices only.

`f(x) = W_L s(W_{L-1} ... s(W_0 x))`. Everything here proposes multipliers, scaled so that LipSDP is feasible with `rho = L^2`; `sdp.prove` makes the bounds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdp.lure import LureSystem
from sdp.start import levels

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The matrices of a feed-forward system, its slopes, and which nonlinearities make up each layer."""

    weights: tuple[Array, ...]  # W_0 .. W_L
    lower: tuple[Array, ...]
    upper: tuple[Array, ...]
    places: tuple[NDArray[np.int64], ...]

    @classmethod
    def of(cls, system: LureSystem) -> Chain | None:
        """The chain that a system is; None for one with skips, or an implicit one."""
        if not system.is_explicit or not system.count:
            return None
        level, inputs = levels(system), system.inputs
        places = [np.flatnonzero(level == k) for k in range(int(level.max()) + 1)]
        columns = [np.arange(inputs), *(inputs + place for place in places)]
        blocks = [system.rows[place] for place in places] + [system.output]
        if any(np.delete(block, columns[k], axis=1).any() for k, block in enumerate(blocks)):
            return None
        weights = tuple(np.ascontiguousarray(block[:, columns[k]]) for k, block in enumerate(blocks))
        return cls(weights, tuple(system.lower[place] for place in places), tuple(system.upper[place] for place in places), tuple(places))

    def parts(self, size: int) -> list[Chain]:
        """Consecutive networks that compose to this one, cut behind nonlinearities, each with at most so many signals (or one layer)."""
        cuts, signals = [0], self.weights[0].shape[1]
        for k, lower in enumerate(self.lower):
            if signals + len(lower) > size and k > cuts[-1]:
                cuts.append(k)
                signals = len(self.lower[k - 1])
            signals += len(lower)
        made = []
        for first, last in itertools.pairwise([*cuts, len(self.lower)]):
            end = self.weights[last] if last == len(self.lower) else np.eye(len(self.lower[last - 1]))
            made.append(Chain((*self.weights[first:last], end), self.lower[first:last], self.upper[first:last], self.places[first:last]))
        return made

    def system(self) -> LureSystem:
        """The chain as a system of its own, its nonlinearities in the order of the layers."""
        inputs, count = self.weights[0].shape[1], sum(map(len, self.lower))
        ends = np.cumsum([0, *(len(part) for part in self.lower)])
        rows, output = np.zeros((count, inputs + count)), np.zeros((len(self.weights[-1]), inputs + count))
        starts = [0, *(inputs + ends[:-1])]
        for k, weight in enumerate(self.weights[:-1]):
            rows[ends[k] : ends[k + 1], starts[k] : starts[k] + weight.shape[1]] = weight
        output[:, starts[-1] : starts[-1] + self.weights[-1].shape[1]] = self.weights[-1]
        empty = np.zeros(0)
        return LureSystem(inputs, rows, np.concatenate([empty, *self.lower]), np.concatenate([empty, *self.upper]), output)

    def spread(self, parts: Sequence[Array]) -> Array:
        """One vector, in the order of the system's nonlinearities, from one for each layer."""
        made = np.zeros(sum(map(len, self.places)))
        for place, part in zip(self.places, parts, strict=True):
            made[place] = part
        return made


def composed(
    solutions: Sequence[tuple[Array, float]],  # of consecutive networks: multipliers, in the order of their nonlinearities, and rho
) -> Array:
    """Multipliers of the composition, which is proved by them with the product of all rho: those of each part times the rho of all that follow."""
    later, made = 1.0, []
    for multipliers, rho in reversed(solutions):
        made.append(multipliers * later)
        later *= rho
    return np.concatenate(made[::-1])


def rescaled_product(chain: Chain, iterations: int = 200) -> tuple[Array, ...]:
    """Multipliers `D_k^2` of the product `prod |D_{k+1} W_k D_k^-1|`, smallest over positive diagonal D (1 at both ends); slopes in [-1, 1].

    With `X_k = D_k^2`, scaled, `[[W'T W, -W'T], [-T W, T]] >= 0` for each layer is LipSDP with these multipliers, so LipSDP is never above this product.
    """
    import scipy.optimize  # slow to import

    sizes = [len(part) for part in chain.lower]
    ends = np.cumsum([0, *sizes])

    def parts(logs: Array) -> list[Array]:
        return [np.ones(chain.weights[0].shape[1]), *(np.exp(logs[a:b]) for a, b in itertools.pairwise(ends)), np.ones(len(chain.weights[-1]))]

    def value(logs: Array) -> tuple[float, Array]:
        scales, total, gradient = parts(logs), 0.0, np.zeros_like(logs)
        for k, weight in enumerate(chain.weights):
            u, s, v = np.linalg.svd(scales[k + 1][:, None] * weight / scales[k], full_matrices=False)
            total += math.log(max(float(s[0]), 1e-300))
            if k < len(sizes):
                gradient[ends[k] : ends[k + 1]] += u[:, 0] ** 2
            if k > 0:
                gradient[ends[k - 1] : ends[k]] -= v[0] ** 2
        return total, gradient

    found = scipy.optimize.minimize(value, np.zeros(ends[-1]), jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    scales = parts(found.x)
    norms = [float(np.linalg.norm(scales[k + 1][:, None] * weight / scales[k], 2)) for k, weight in enumerate(chain.weights)]
    later = np.cumprod([1.0, *(norm**2 for norm in norms[:0:-1])])[1:][::-1]  # the squared norms of what follows each layer
    return tuple(scales[k + 1] ** 2 * later[k] for k in range(len(sizes)))


def first_order(
    chain: Chain,
    start: Sequence[Any],  # multipliers of each layer, feasible with rho = 1
    powers: Sequence[float] = (8, 32, 128, 512),
    iterations: int = 150,
    xp: Any = np,  # numpy or torch: arrays, `linalg`, on any device
    stop: Callable[[float], bool] = lambda lipschitz: False,
) -> tuple[list[Any], float]:
    """Better multipliers by L-BFGS on the logarithms of t, and L: only matrices of the size of a layer, every iterate feasible.

    `X_0 = I`, `S_i = X_{i-1} + 2 W' diag(a b t) W`, `X_i = 2 diag(t) - R S_i^-1 R'`, `R = diag((a + b) t) W`, and `L^2 = |W_L X_L^-1 W_L'|`, smoothed as the
    Schatten norms of the given powers. A step to where some X is not positive definite is refused. The multipliers returned are those for `rho = L^2`, or the
    start where L is no float64 there.
    """
    sizes = [len(part) for part in start]
    best, logs = math.inf, xp.log(xp.concatenate(list(start)))
    kept = logs
    for power in powers:

        def value(point: Any, power: float = power) -> tuple[float, Any]:
            return _smoothed(chain, _split(xp.exp(point), sizes), power, xp)

        logs = _lbfgs(value, logs, iterations, stop, xp)
        exact = math.exp(0.5 * _smoothed(chain, _split(xp.exp(logs), sizes), math.inf, xp)[0])
        if exact < best:
            best, kept = exact, logs
        if stop(best):
            break
    factor = best**2 if best < 1e150 else 1.0
    return [part * factor for part in _split(xp.exp(kept), sizes)], best


def _split(vector: Any, sizes: Sequence[int]) -> list[Any]:
    ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    return [vector[a:b] for a, b in itertools.pairwise(ends)]


def _smoothed(chain: Chain, t: Sequence[Any], power: float, xp: Any) -> tuple[float, Any]:
    """`log |W_L X_L^-1 W_L'|_power` and its gradient in log t; inf where it is not defined."""
    kept = []
    x = xp.eye(chain.weights[0].shape[1], dtype=t[0].dtype, **_device(t[0]))
    try:
        for weight, low, high, scale in zip(chain.weights, chain.lower, chain.upper, t, strict=False):
            total, product = low + high, low * high
            s = x if not bool((product != 0).any()) else x + 2 * weight.T @ ((product * scale)[:, None] * weight)
            xp.linalg.cholesky(s)
            r = (total * scale)[:, None] * weight
            a = xp.linalg.solve(s, r.T)
            x = 2 * xp.diag(scale) - r @ a
            x = (x + x.T) / 2
            kept.append((weight, total, product, scale, a))
        xp.linalg.cholesky(x)
        last = chain.weights[-1]
        inner = xp.linalg.solve(x, last.T)
        values, vectors = xp.linalg.eigh((last @ inner + inner.T @ last.T) / 2)
    except (np.linalg.LinAlgError, RuntimeError):  # torch's own error is a RuntimeError
        return math.inf, None
    largest = float(values[-1])
    if not largest > 0:
        return -math.inf, xp.concatenate([0 * part for part in t])
    relative = xp.clip(values / largest, 0, None)
    if math.isinf(power):
        return math.log(largest), None
    sums = float((relative**power).sum())
    weights = relative ** (power - 1) / (largest * sums)
    side = inner @ vectors
    g = -(side * weights) @ side.T  # d / dX_L
    gradient = []
    for weight, total, product, scale, a in reversed(kept):
        ga = g @ a.T
        change = 2 * xp.diagonal(g) - 2 * total * (ga * weight).sum(1)
        g = a @ ga
        if bool((product != 0).any()):
            change = change + 2 * product * ((weight @ g) * weight).sum(1)
        gradient.append(change * scale)
    return math.log(largest) + math.log(sums) / power, xp.concatenate(gradient[::-1])


def _device(like: Any) -> dict[str, Any]:
    return {"device": like.device} if hasattr(like, "device") and type(like).__module__.startswith("torch") else {}


def _lbfgs(function: Callable[[Any], tuple[float, Any]], point: Any, iterations: int, stop: Callable[[float], bool], xp: Any, memory: int = 20) -> Any:
    """Minimise a function that is inf outside its domain, by L-BFGS with a step that is halved until it pays."""
    value, gradient = function(point)
    if gradient is None:
        return point
    pairs: list[tuple[Any, Any]] = []
    history = [value]
    for _ in range(iterations):
        direction = -_scaled(gradient, pairs)
        slope = float(direction @ gradient)
        if not slope < 0:
            pairs, direction = [], -gradient
            slope = float(direction @ gradient)
        largest = float(abs(direction).max())
        length = min(1.0, (2.0 if pairs else 0.1) / max(largest, 1e-300))
        for _ in range(30):
            further, other = function(point + length * direction)
            if further <= value + 1e-4 * length * slope:
                break
            length /= 2
        else:
            return point
        moved, change = length * direction, other - gradient
        if float(moved @ change) > 1e-12 * float((moved @ moved) ** 0.5 * (change @ change) ** 0.5):
            pairs = [*pairs[-memory + 1 :], (moved, change)]
        point, value, gradient = point + moved, further, other
        history.append(value)
        if stop(math.exp(value / 2)) or (len(history) > 10 and history[-11] - value < 1e-7):
            return point
    return point


def _scaled(gradient: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
    """The inverse Hessian times the gradient, by the two loops of L-BFGS."""
    q, alphas = gradient, []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q = q - alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        q = q * ((s @ y) / (y @ y))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + s * (alpha - (y @ q) / (s @ y))
    return q
