"""Proofs of Lipschitz constants as files: written only if `sdp.check` accepts them, read only if they are whole.

One safetensors file, so that anybody can read its arrays and nothing in it is ever executed. Tensors `STEP.NAME` are the arrays of the steps, in float64
(`which` in int64); the metadata `proof` is JSON:

    format, method, proves      a number; the kind of check and what is proved, in words
    norm                        of the input: "2", "inf" or "1"
    inputs, steps, output       the network: entries of x; what, of, activation, arrays of each step; the number of the signal that is f(x)
    multipliers, rho, bound     hexadecimal, so exact
    names                       which tensor of the model's file an array is
    sha256, network             of each array; of the network, with its arrays
    about                       texts; with `model_sha256` the proof is about that file of a model only, the others are not looked at

What is proved is about the network of these steps with the numbers that stand there, everywhere, in real arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdp import check
from sdp.wiring import Step

Array = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
_NORMS = {2: "2", math.inf: "inf", 1: "1"}
_NAMED = {"linear": "matrix", "shift": "offset", "scale": "factor"}  # what the name of a step is about
_FIELDS = ["format", "method", "proves", "norm", "inputs", "steps", "output", "multipliers", "rho", "bound", "names", "sha256", "network", "about"]
_INFLATIONS = (0.0, *(10.0**k for k in range(-13, -3)))


@dataclasses.dataclass(frozen=True, eq=False)
class Proof:
    """What stands in a file. Whether it holds, `sdp.check.check` says."""

    steps: tuple[Step, ...]
    output: int  # the number of a step
    inputs: int
    multipliers: Array  # (nonlinearities,), from l-infinity (nonlinearities + inputs,), from l1 (inputs, nonlinearities)
    rho: float
    bound: float
    norm: float
    about: Mapping[str, str]
    names: Mapping[int, str]  # by step
    network: str  # its digest


def digest(steps: Sequence[Step], output: int, inputs: int) -> str:
    """The sha256 of a network: its steps, with their arrays, and which signal is the output. Names of tensors are no part of it."""
    return str(_describe(steps, output, inputs)[0]["network"])


def write(
    path: str | os.PathLike[str],
    steps: Sequence[Step],
    output_number: int,  # of the signal that is f(x)
    inputs: int,
    multipliers: Array,  # as in `Proof`
    bound: float,  # what `sdp.prove` made of them; from l1, the largest along one coordinate
    norm: float = 2,
    about: Mapping[str, str] | None = None,
    names: Mapping[int, str] | None = None,  # the tensors of the model's file that the matrices (offsets, factors) of some steps are
) -> float:
    """Writes a proof, atomically, and returns the constant that it proves: the bound, with what the checker's own error terms need on top of it.

    Raises ValueError for what the checker does not accept with 1e-4 more either: steps made on a region (their slopes hold there only), multipliers that do
    not prove the bound, numbers that are not finite.
    """
    if norm not in _NORMS:
        raise ValueError(f"proofs are written from l2, l-infinity and l1, got p={norm:g}")
    if not (math.isfinite(bound) and bound > 0):
        raise ValueError(f"a proof is of a finite bound above 0, got {bound}")
    unnamed = [k for k in names or {} if not (0 <= k < len(steps) and steps[k].what in _NAMED)]
    if unnamed:
        raise ValueError(f"the names of tensors are those of {', '.join(_NAMED)} steps, got one for step {unnamed[0]} of {len(steps)}")
    if not all(isinstance(text, str) for text in (*(names or {}).values(), *(about or {}), *(about or {}).values())):
        raise ValueError("the names of tensors, and what a proof is about, are texts")
    document, arrays = _describe(steps, output_number, inputs)
    document |= {
        "format": check.FORMAT,
        "method": check.METHOD,
        "proves": check.WORDS[_NORMS[norm]],
        "norm": _NORMS[norm],
        "multipliers": [float(number).hex() for number in np.ravel(multipliers)],
        "names": {f"{k}.{_NAMED[steps[k].what]}": name for k, name in (names or {}).items()},
        "about": dict(about or {}),
    }
    said = ""
    with _part_of(pathlib.Path(path)) as temporary:
        for inflation in _INFLATIONS:
            claimed = math.nextafter(bound * (1 + inflation), math.inf) if inflation else float(bound)
            rho = claimed if norm == math.inf else math.nextafter(claimed * claimed, 0.0)  # rho <= claimed^2, exactly
            _store(temporary, document | {"rho": rho.hex(), "bound": claimed.hex()}, arrays)
            holds, said = check.check(temporary)
            if holds:
                read(temporary)
                os.replace(temporary, path)
                return claimed
        raise ValueError(
            f"no proof of {bound:g} was written: the checker did not accept it, nor {_INFLATIONS[-1]:g} more: {said.partition(f'{temporary}: ')[2]}"
        )


def read(path: str | os.PathLike[str]) -> Proof:
    """What stands in a file. Raises ValueError, in one sentence, for one that is not whole or not well-formed; whether it holds is not looked at."""
    try:
        meta, arrays, hashes = check.tensors(path)
        return _proof(json.loads(meta["proof"]), arrays, hashes)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as problem:
        raise ValueError(f"{os.fspath(path)} is no proof: {problem if isinstance(problem, ValueError) else repr(problem)}") from None


def _proof(document: dict[str, Any], arrays: Arrays, hashes: dict[str, str]) -> Proof:
    """A document, if all parts of it are there and fit together."""
    if sorted(document) != sorted(_FIELDS):
        raise ValueError(f"its fields are {sorted(document)}, they should be {sorted(_FIELDS)}")
    if document["format"] != check.FORMAT:
        raise ValueError(f"its format is {document['format']!r}, known is {check.FORMAT}")
    norm, inputs, steps, output, names = (document[field] for field in ("norm", "inputs", "steps", "output", "names"))
    if norm not in check.WORDS or document["proves"] != check.WORDS[norm] or document["method"] != check.METHOD:
        raise ValueError("its norm, its method or its words are not known")
    if not all(type(number) is int for number in (inputs, output, *(j for step in steps for j in step["of"]))):
        raise ValueError("its inputs and signals are not whole numbers")
    if not all(isinstance(text, str) for field in (names, document["about"]) for pair in field.items() for text in pair):
        raise ValueError("its names, and what it is about, are not texts")
    used = {f"{k}.{name}" for k, step in enumerate(steps) for name in step["arrays"]}
    if used != set(arrays) or not set(names) <= {f"{k}.{_NAMED.get(step['what'])}" for k, step in enumerate(steps)}:
        raise ValueError(f"its steps have the arrays {sorted(used)}, the file {sorted(arrays)}")
    for name, array in arrays.items():
        if (array.dtype == np.int64) != name.endswith(".which") or not np.isfinite(array).all():
            raise ValueError(f"its array {name} has NaN, infinity, or the wrong type")
    if document["sha256"] != hashes or document["network"] != _network(inputs, output, steps, hashes):
        raise ValueError("its steps or arrays are not those that it was written with")
    rho, bound, *multipliers = (float.fromhex(number) for number in (document["rho"], document["bound"], *document["multipliers"]))
    if not all(0 <= number < math.inf for number in (rho, bound, *multipliers)):
        raise ValueError("its multipliers, rho and bound are not all finite and not negative")
    count = check.rebuild(document, arrays)[0].shape[1]
    shape = {"2": (count,), "inf": (count + inputs,), "1": (inputs, count)}[norm]
    if len(multipliers) != math.prod(shape):
        raise ValueError(f"it has {len(multipliers)} multipliers for {count} nonlinearities and {inputs} inputs")
    return Proof(
        tuple(
            Step(step["what"], tuple(step["of"]), {name: arrays[f"{k}.{name}"] for name in step["arrays"]}, step["activation"]) for k, step in enumerate(steps)
        ),
        output,
        inputs,
        np.array(multipliers).reshape(shape),
        rho,
        bound,
        next(p for p, text in _NORMS.items() if text == norm),
        document["about"],
        {int(name.partition(".")[0]): tensor for name, tensor in names.items()},
        document["network"],
    )


def _describe(steps: Sequence[Step], output: int, inputs: int) -> tuple[dict[str, Any], Arrays]:
    """The part of the document that is the network, and its arrays."""
    arrays = {
        f"{k}.{name}": np.ascontiguousarray(array, dtype="<i8" if name == "which" else "<f8")
        for k, step in enumerate(steps)
        for name, array in sorted(step.numbers.items())
    }
    hashes = {name: sha256(f"{_kind(array)} {list(array.shape)} ".encode() + array.tobytes()).hexdigest() for name, array in arrays.items()}
    told = [{"what": step.what, "of": list(step.of), "activation": step.name, "arrays": sorted(step.numbers)} for step in steps]
    network = _network(inputs, output, told, hashes)
    return {"inputs": inputs, "output": output, "steps": told, "sha256": hashes, "network": network}, arrays


def _network(inputs: int, output: int, steps: list[Any], hashes: Mapping[str, str]) -> str:
    return sha256(json.dumps([inputs, output, steps, hashes], sort_keys=True).encode()).hexdigest()


def _kind(array: NDArray[Any]) -> str:
    return "I64" if array.dtype == np.int64 else "F64"


def _store(path: str, document: dict[str, Any], arrays: Arrays) -> None:
    """A safetensors file: the length of its header, the header, the bytes of the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"proof": json.dumps(document, allow_nan=False)}}
    end = 0
    for name, array in arrays.items():
        header[name] = {"dtype": _kind(array), "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _part_of(path: pathlib.Path) -> Iterator[str]:
    """A file beside it, which is gone afterwards."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    os.chmod(temporary, 0o644)
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
