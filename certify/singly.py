"""Methods that certify one input at a time, and what the rows of their results folders have in common."""

from __future__ import annotations

import abc
import ast
import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from certify.bound import Array, Assumption
from certify.certificate import Certificate
from certify.data import Dataset
from certify.errors import CertifyError
from certify.graph import Graph
from certify.margins import RobustnessMethod, gap, logits, same_gap
from certify.spectral import as_float64

Seen = TypeVar("Seen")


@dataclasses.dataclass(frozen=True)
class OneByOne(RobustnessMethod, Generic[Seen]):
    """A method that looks around each input; a dataclass whose fields are plain data, so that its printed form is the method."""

    name: ClassVar[str]  # in rows, and after --method
    radius: float | None
    norm: float

    @abc.abstractmethod
    def see(self, graph: Graph) -> Seen:
        """The network as the method takes it. Raises CertifyError or Unsupported that names every node in the way."""

    @abc.abstractmethod
    def around(
        self,
        seen: Seen,
        x: Array,  # (inputs,)
        z: Array,  # (classes,) its logits
    ) -> tuple[int, int, float]:
        """Prediction, the class that limits the radius, and the radius; -1, -1, 0 for logits that are not finite."""

    @abc.abstractmethod
    def proved(self, seen: Seen, x: Array, z: Array, radius: float) -> bool:
        """Whether the prediction is proved not to change in the closed ball of this radius."""

    @property
    def assumptions(self) -> frozenset[Assumption]:
        """What the certificates take for granted."""
        return frozenset({Assumption.REAL_ARITHMETIC, Assumption.FLOAT64_LINALG, Assumption.EVAL_MODE})

    def certify(self, net: nn.Module, inputs: Tensor) -> Certificate:
        graph = Graph.of(net, tuple(inputs.shape[1:]))
        seen = self.see(graph)
        z = logits(graph, inputs)
        found = [self.around(seen, as_float64(x).ravel(), row) for x, row in zip(inputs, z, strict=True)]
        prediction, runner_up, radius = (
            (np.array(values) for values in zip(*found, strict=True)) if found else (np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0),)
        )
        return Certificate(
            prediction=prediction,
            runner_up=runner_up,
            abstained=prediction < 0,
            radius=radius,
            norm=self.norm,
            method=repr(self),
            assumptions=self.assumptions,
        )


def row(method: OneByOne[Any], graph: Graph, seen: object, dataset: Dataset, index: int) -> dict[str, Any]:
    """The row of a results folder for one input."""
    start = time.perf_counter()
    x, z = _at(graph, dataset, index)
    prediction, runner_up, radius = method.around(seen, x, z)
    return {
        "schema": 1,
        "index": index,
        "label": int(dataset.labels[index]),
        "prediction": prediction,
        "runner_up": runner_up,
        "margin": gap(z),
        "method": method.name,
        "norm": f"{method.norm:g}",
        "radius": radius,
        "status": _status(prediction, int(dataset.labels[index])),
        "guarantee": "proof",
        "seconds": round(time.perf_counter() - start, 6),
    }


def contradictions(method: OneByOne[Any], graph: Graph, seen: object, dataset: Dataset, row: Mapping[str, Any], tolerance: float) -> list[str]:
    """What a row claims and a new proof does not give; its radius may be smaller than what could be proved."""
    index, radius = row["index"], row.get("radius")
    x, z = _at(graph, dataset, index)
    prediction = int(np.argmax(z)) if np.isfinite(z).all() else -1
    label = int(dataset.labels[index])
    known = {"label": label, "prediction": prediction, "status": _status(prediction, label)}
    known |= {"method": method.name, "norm": f"{method.norm:g}", "guarantee": "proof"}
    wrong = [f"input {index}: {key} is stored as {row.get(key)!r}, the proof gives {value!r}" for key, value in known.items() if row.get(key) != value]
    if "margin" in row and not same_gap(row["margin"], gap(z)):
        wrong.append(f"input {index}: the margin is stored as {row['margin']!r}, the logits give {gap(z)!r}")
    if isinstance(radius, bool) or not isinstance(radius, float | int) or not 0 <= radius <= sys.float_info.max:
        return [*wrong, f"input {index}: the radius is stored as {radius!r}, which no proof gives"]
    if radius > 0 and not method.proved(seen, x, z, radius * (1 - tolerance)):
        wrong.append(f"input {index}: the radius is stored as {radius!r}, and the proof does not reach it")
    return wrong


def method_of(manifest: Mapping[str, Any], known: Sequence[type[OneByOne[Any]]]) -> OneByOne[Any]:
    """The method that the manifest of a run names, one of these types. Raises CertifyError where it names none."""
    text = str(manifest.get("method"))
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            options = {word.arg or "": _literal(word.value) for word in call.keywords}
            for cls in known:
                if ast.unparse(call.func) == cls.__name__:
                    return cls(**options)
    except (SyntaxError, TypeError, ValueError, OverflowError, RecursionError, MemoryError):
        pass
    raise CertifyError(f"the manifest's method {text[:80]!r} is not the printed form of one of this version; make the folder again with certify run")


def _literal(node: ast.expr) -> Any:
    return math.inf if ast.unparse(node) == "inf" else ast.literal_eval(node)


def _at(graph: Graph, dataset: Dataset, index: int) -> tuple[Array, Array]:
    """An input and its logits."""
    x = torch.from_numpy(dataset.inputs[index : index + 1])
    return as_float64(x).ravel(), logits(graph, x)[0]


def _status(prediction: int, label: int) -> str:
    return "abstained" if prediction < 0 else "certified" if prediction == label else "misclassified"
