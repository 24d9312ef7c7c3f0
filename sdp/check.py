"""Checks the proof of a Lipschitz constant: `python check.py PROOF [MODEL.safetensors]` says in one sentence whether it holds. Exit code 0: it does, 1: not.

It stands alone. A proof is a safetensors file: arrays, and as JSON the steps that make a network f. A signal is a matrix over s = [x; a], the input and the
nonlinearities, with radii. With e's = a and v's its argument, of slopes in [l, u], `(da - l dv)(da - u dv) <= 0`; with t >= 0, f = C s and `M = sum t (2 e e' -
(l + u)(e v' + v e') + 2 l u v v')`, `[[rho E_x + M, C'], [C, I]] >= 0` gives `|df|_2 <= sqrt(rho) |dx|_2` (from l1: entry by entry of x), and for one output
`[[diag(mu) + M, C'], [C, 2 rho - sum mu]] >= 0` gives `|df| <= rho |dx|_inf`. `A >= 0` if A - R R' is diagonally dominant, for any R: nothing is trusted but
sums and products of IEEE float64, rounded to nearest, in any order."""

import hashlib
import json
import sys
from fractions import Fraction
from typing import Any

import numpy as np

FORMAT, METHOD, LIMIT = 1, "LipSDP with one multiplier per nonlinearity; diagonally dominant but for a square", 20_000
U, UP, TINY = 2.0**-53, 1 + 2.0**-20, 2.0**-1000  # half an ulp of 1; above the rounding of radii, of up to LIMIT terms; above all underflow
SLOPES = {"relu": (0.0, 1.0), "abs": (-1.0, 1.0), "tanh": (0.0, 1.0), "sigmoid": (0.0, 0.25), "softplus": (0.0, 1.0), "clamp": (0.0, 1.0)}
SLOPES |= {"silu": (-0.09983932013, 1.09983932013), "gelu": (-0.12890414519, 1.12890414519)}  # rounded outward
WORDS = {"2": "|f(x) - f(y)|_2 <= L |x - y|_2", "inf": "|f(x) - f(y)| <= L |x - y|_inf", "1": "|f(x) - f(y)|_2 <= L |x - y|_1"}


def _need(holds: Any, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def tensors(path: Any) -> tuple[dict[str, str], dict[str, np.ndarray], dict[str, str]]:
    """The metadata of a safetensors file; its tensors, without rounding, in float64 or int64, but for those of other types; the sha256 of each."""
    data, found, kinds = np.fromfile(path, np.uint8).tobytes(), {}, {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}
    start, made = 8 + int.from_bytes(data[:8], "little"), {}
    _need(8 < start <= len(data), "it is cut short, or is no safetensors file")
    header = json.loads(data[8:start])
    meta = {**header.pop("__metadata__", {}), "sha256": hashlib.sha256(data).hexdigest()}
    for name, entry in header.items():
        (begin, end), shape, kind = entry["data_offsets"], entry["shape"], entry["dtype"]
        _need(0 <= begin <= end <= len(data) - start, f"it is cut short, in its tensor {name}")
        if kind in kinds:
            found[name] = np.frombuffer(data[start + begin : start + end], kinds[kind]).reshape(shape).astype("<i8" if kind == "I64" else "<f8")
            made[name] = hashlib.sha256(f"{kind} {shape} ".encode() + data[start + begin : start + end]).hexdigest()
    return meta, found, made


def plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Matrices are pairs (middle, radius). A sum; where one of the two is 0 it is not rounded."""
    total = a[0] + b[0]
    return np.stack([total, UP * (a[1] + b[1] + 2 * U * np.abs(total) * ((a[0] != 0) & (b[0] != 0)))])


def times(a: np.ndarray, b: np.ndarray, product: Any = np.matmul) -> np.ndarray:
    """A product: k terms that are not 0 are rounded k - 1 times in their sum, and once more each, but for powers of two."""
    (x, dx), (y, dy) = np.abs(a), np.abs(b)
    terms = product(((x != 0) | (dx != 0)).astype(float), ((y != 0) | (dy != 0)).astype(float))
    exact = any((np.frexp(part[part != 0])[0] == 0.5).all() for part in (x, y))
    radius = 2 * U * np.maximum(terms - exact, 0.0) * product(x, y) + product(x, dy) + product(dx, y + dy)
    return np.stack([product(a[0], b[0]), UP * radius + TINY * (terms != 0)])


def rebuild(document: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arguments of the nonlinearities, their slopes (lower, upper), and the output."""
    at, output, steps, signals = document["inputs"], document["output"], document["steps"], list[np.ndarray]()
    width = at + sum(int((arrays[f"{k}.lower"] != arrays[f"{k}.upper"]).sum()) for k, step in enumerate(steps) if step["what"] == "nonlinear")
    _need(0 < at <= width <= LIMIT and 0 <= output < len(steps), f"its output is signal {output} of {len(steps)}, over {width} numbers of at most {LIMIT}")
    first, rows, ranges = np.stack([np.eye(at, width), np.zeros((at, width))]), [np.zeros((2, 0, width))], [np.zeros((2, 0))]
    for k, (what, of, name, keys) in enumerate((step["what"], step["of"], step["activation"], step["arrays"]) for step in steps):
        count = {"input": 0, "linear": 1, "shift": 1, "scale": 1, "add": 2, "pick": 1, "join": len(of) or 1, "nonlinear": 1}.get(what)
        _need(len(of) == count and all(0 <= j < k for j in of), f"step {k} cannot be {what!r} of the signals {of}")
        a, *others = [signals[j] for j in of] or [first]
        parts = {key: arrays[f"{k}.{key}"] for key in keys}
        shapes = [part.shape[what == "linear" :] for key, part in parts.items() if key != "which"] + [b.shape[1:2] for b in others if what == "add"]
        _need(all(shape == a.shape[1:2] for shape in shapes), f"step {k} ({what}) has parts for {shapes} numbers, not for {a.shape[1:2]}")
        if what == "linear":
            a = times(np.stack([parts["matrix"], parts.get("error", 0 * parts["matrix"])]), a)
        elif what == "scale":
            a = times(np.stack([parts["factor"], parts["error"]])[..., None], a, np.multiply)
        elif what == "pick":
            a = a[:, parts["which"].ravel()]
        elif what in ("add", "join"):
            a = plus(a, others[0]) if what == "add" else np.concatenate([a, *others], axis=1)
        elif what == "nonlinear":
            lower, upper, (word, *ends) = parts["lower"], parts["upper"], name.rstrip(")").replace("(", ",").split(",")
            known = {**SLOPES, "leaky_relu": sorted([1.0, *map(float, ends)]), "slopes": sorted(map(float, ends))}.get(word, ())
            _need(len(known) == 2 and bool(ends) == (word in ("leaky_relu", "clamp", "slopes")), f"step {k} is {name!r}, whose slopes are not known")
            holds = (lower > -1e9) & (lower <= known[0]) & (known[1] <= upper) & (upper < 1e9)  # above it underflow is more than TINY
            _need(holds.all(), f"the slopes of step {k} are narrower than those of {name} everywhere, {known}")
            bends, slope = np.flatnonzero(lower != upper), np.where(lower == upper, lower, 0.0)
            rows, ranges = [*rows, a[:, bends]], [*ranges, np.stack([lower, upper])[:, bends]]
            a = times(np.stack([slope, 0 * slope])[..., None], a, np.multiply)
            a[0, bends, at + np.arange(len(bends))], at = 1.0, at + len(bends)
        signals.append(a)
    return np.concatenate(rows, axis=1), np.concatenate(ranges, axis=1), signals[output]


def prove(norm: str, rho: float, multipliers: np.ndarray, v: np.ndarray, slopes: np.ndarray, c: np.ndarray) -> None:
    """Raises ValueError unless the multipliers prove rho."""
    n, (low, high) = v.shape[2] - v.shape[1], slopes
    if norm == "1":  # one entry of x after another
        for i, row in enumerate(multipliers.reshape(n, len(low))):
            kept = [i, *range(n, v.shape[2])]
            prove("2", rho, row, v[:, :, kept], slopes, c[:, :, kept])
        return
    t, mu = multipliers[: len(low)], multipliers[len(low) :]
    _need(len(mu) == (n if norm == "inf" else 0) and len(t) == len(low) and (norm == "2" or len(c[0]) == 1), f"its multipliers are {len(multipliers)}")
    factors = [np.stack([g, 8 * U * np.abs(g) + TINY])[..., None] for g in (t * low * high, -t * (low + high), t)]
    inner = plus(times(factors[1], v, np.multiply), times(factors[2], np.stack([np.eye(len(t), v.shape[2], n), 0 * v[0]]), np.multiply))
    half = plus(times(v.transpose(0, 2, 1), times(factors[0], v, np.multiply)), np.pad(inner, ((0, 0), (n, 0), (0, 0))))
    a = np.pad(plus(half, half.transpose(0, 2, 1)), ((0, 0), (0, c.shape[1]), (0, c.shape[1])))
    a[:, v.shape[2] :, : v.shape[2]], a[:, : v.shape[2], v.shape[2] :] = c, c.transpose(0, 2, 1)
    added = np.diag([*mu, *(0 * t), float(2 * Fraction(rho) - sum(map(Fraction, mu)))] if norm == "inf" else [rho] * n + [0.0] * len(t) + [1.0] * len(c[0]))
    a = plus(a, np.stack([added, 2 * U * np.abs(added)]))
    diagonal, eye = np.diagonal(a[0]), np.eye(a.shape[1])
    _need(np.isfinite(a).all() and (diagonal > 0).all(), "its matrix has a diagonal that is not positive")
    root = np.ldexp(1.0, np.round(-np.log2(diagonal) / 2).astype(int))  # powers of two that make the diagonal about 1
    a = a * root[:, None] * root + np.array([0.0, TINY])[:, None, None]
    r = np.linalg.cholesky(a[0] - (8 * U * len(eye) * (len(eye) + 8) + 2 * a[1].sum(axis=1)) * eye)  # or raises LinAlgError, a ValueError
    rest = plus(a, times(np.stack([-r, 0 * r]), np.stack([r.T, 0 * r])))
    _need((np.diagonal(rest[0]) >= UP * (np.abs(rest[0]) * (1 - eye) + rest[1]).sum(axis=1)).all(), "its matrix is not proved to be positive semidefinite")


@np.errstate(all="ignore")
def check(path: Any, model: Any = None) -> tuple[bool, str]:
    """Whether the proof holds, and for the tensors of a model, and a sentence."""
    try:
        meta, arrays, made = tensors(path)
        document = json.loads(meta["proof"])
        norm, names, rho, bound = document["norm"], document["names"], float.fromhex(document["rho"]), float.fromhex(document["bound"])
        t = np.array([float.fromhex(number) for number in document["multipliers"]])
        network = hashlib.sha256(json.dumps([document["inputs"], document["output"], document["steps"], made], sort_keys=True).encode()).hexdigest()
        _need([document[key] for key in ("format", "method", "proves")] == [FORMAT, METHOD, WORDS[norm]], "its format or its words are not those known")
        _need((document["sha256"], document["network"]) == (made, network), "its steps or arrays are not those that it was written with")
        numbers = np.concatenate([[rho, bound], t, *(part.ravel() for part in arrays.values())])
        _need(np.isfinite(numbers).all() and (numbers[: len(t) + 2] >= 0).all(), "it has NaN, infinity or a negative multiplier")
        _need(Fraction(bound) ** (1 if norm == "inf" else 2) >= Fraction(rho), "its bound is below what its rho stands for")
        prove(norm, rho, t, *rebuild(document, arrays))
        if model is not None:
            known, theirs, _ = tensors(model)
            _need(document["about"].get("model_sha256", known["sha256"] if names else "") == known["sha256"], f"it is not about the file {model}")
            wrong = [tensor for name, tensor in names.items() if tensor not in theirs or not np.array_equal(theirs[tensor], arrays[name])]
            _need(not wrong, f"{len(wrong)} of its arrays are not the tensors of {model} that they should be: {wrong[:3]}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as problem:
        return False, f"rejected: {path}: {problem if isinstance(problem, OSError | ValueError) else f'it is no proof ({problem!r})'}"
    of = f"the network {network[:16]} in {path}" + (f", {len(names)} of whose {len(arrays)} arrays are tensors of {model}" if model is not None else "")
    return True, f"proved: {WORDS[norm]} for all x and y, L = {bound * (1 + 1e-9):.10g}, in real arithmetic, for {of}"


if __name__ == "__main__":
    holds, sentence = check(*sys.argv[1:]) if len(sys.argv) in (2, 3) else (False, "usage: check.py PROOF [MODEL.safetensors]")
    sys.stdout.write(sentence + "\n")
    sys.exit(not holds)
