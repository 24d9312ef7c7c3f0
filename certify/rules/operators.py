"""Rules for what a forward may do between modules. An argument is the `Bound` of a signal, or a number, a size or a stored tensor."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.bound import Array, Bound, beside
from certify.convolution import root_up
from certify.errors import Problem, Unsupported
from certify.exported import REARRANGING
from certify.functions import SPLITTING, piece
from certify.registry import Call, Shape, register_operator, register_reason
from certify.rounding import one_over_root, up
from certify.spectral import as_float64


def _refuse(name: str, why: str) -> Unsupported:
    return Unsupported([Problem("", name, why)])


def _no_options(name: str, options: Mapping[str, Any]) -> None:
    if options:
        raise _refuse(name, f"the options {sorted(options)} are not supported; leave them out")


def _times(factor: float, bound: Bound, how: str) -> Bound:
    return bound if factor == 1 else Bound(factor, how) @ bound


def _spread(call: Call) -> list[Bound]:
    """The bounds of the signals as they are repeated to fit each other: the root of how often each entry is, for each signal."""
    spread = []
    for bound, shape in zip(call.bounds, call.shapes, strict=True):
        copies = math.prod(call.made) // max(math.prod(shape), 1)
        spread.append(_times(root_up(copies), bound, f"each entry {copies} times"))
    return spread


@register_operator(operator.add, torch.add, "add", operator.sub, torch.sub, "sub")
def _add(call: Call) -> Bound:
    """The sum of two signals, or a shift by a constant."""
    if call.options or len(call.args) != 2:
        raise _refuse(call.name, f"the options {sorted(call.options)} and a third argument such as alpha are not supported; write a + c * b")
    if any(arg is None for arg in call.args):
        raise _refuse(call.name, "adds a number that depends on how many inputs there are in a batch")
    spread = _spread(call)
    return spread[0] + spread[1] if len(spread) == 2 else spread[0]


@register_operator(operator.neg, torch.neg, "neg")
def _negate(call: Call) -> Bound:
    _no_options("neg", call.options)
    return Bound(1.0, "neg") @ call.args[0]


@register_operator(operator.mul, torch.mul, "mul")
def _multiply(call: Call) -> Bound:
    """A signal times a number, or entry by entry times a stored tensor."""
    signal, numbers = _factor(call)
    return _times(float(numbers.max(initial=0.0)), signal, "times a number" if numbers.ndim == 0 else "times stored numbers: the largest")


@register_operator(operator.truediv, torch.div, torch.true_divide, "div", "true_divide")
def _divide(call: Call) -> Bound:
    """A signal divided by a number, or entry by entry by a stored tensor."""
    signal, numbers = _factor(call)
    if not isinstance(call.args[0], Bound):
        raise _refuse(call.name, "divides by a signal, which has no Lipschitz constant; divide by a number")
    smallest = float(numbers.min(initial=math.inf))
    factor = math.inf if smallest == 0 else 1 / smallest if math.frexp(smallest)[0] == 0.5 else up(1 / smallest)
    if not math.isfinite(factor):
        raise _refuse(call.name, f"divides by {smallest:g}; larger numbers are needed")
    return _times(factor, signal, "divided by a number" if numbers.ndim == 0 else "divided by stored numbers: the smallest")


def _factor(call: Call) -> tuple[Bound, Array]:
    """The signal, repeated to fit, and the sizes of the numbers that go with it."""
    _no_options(call.name, call.options)
    numbers = [arg for arg in call.args if isinstance(arg, int | float | Tensor) and not isinstance(arg, bool)]
    if len(call.args) != 2 or len(call.bounds) != 1 or len(numbers) != 1:
        raise _refuse(
            call.name,
            "only with a number or a stored tensor is it Lipschitz with a known constant; a product of two signals (a gate, attention) is not",
        )
    sizes = np.abs(as_float64(numbers[0])) if isinstance(numbers[0], Tensor) else np.asarray(abs(float(numbers[0])))
    if not np.isfinite(sizes).all():
        raise _refuse(call.name, "with NaN or infinite numbers is not supported")
    return _spread(call)[0], sizes


REARRANGED: tuple[Any, ...] = (torch.flatten, "flatten", "reshape", "view", torch.reshape)


@register_operator(*REARRANGED)
def _rearrange(call: Call) -> Bound:
    """A rearrangement of each input: the trial run has shown that the batch stays the first dimension, and the numbers what they are."""
    _no_options("reshape", {name: value for name, value in call.options.items() if name not in ("start_dim", "end_dim")})
    return Bound(1.0, "a rearrangement") @ call.args[0]


_BOTH = (
    "permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze", "unflatten", "narrow", "select", "flip", "roll", "tile", "repeat_interleave",
    "index_select", "diagonal", "clone",
)  # fmt: skip
PICKING: tuple[Any, ...] = (
    operator.getitem, piece, "expand", "repeat", "unfold", "contiguous", "detach", *(getattr(torch, name) for name in _BOTH), *_BOTH,
    *(overload for overloads in REARRANGING.values() for overload in overloads),
)  # fmt: skip


@register_operator(*PICKING)
def _pick(call: Call) -> Bound:
    """Entries are moved, left out or repeated, wherever they are: the root of how often one of them is shown."""
    if not call.bounds:
        raise _refuse(call.name, "is not supported here")
    _check_roll(call)
    shown = int(np.bincount(call.picked()).max(initial=0))
    return Bound(root_up(shown), "a rearrangement" if shown == 1 else f"an entry is shown up to {shown} times") @ call.bounds[0]


def _check_roll(call: Call) -> None:
    """Refuse to roll the batch: by a multiple of the lengths of the trial batches, it looks as if it did nothing."""
    if call.name.split(".")[0] == "roll":
        given = call.args[2] if len(call.args) > 2 else call.options.get("dims")
        dims = given if isinstance(given, list | tuple) else [given]
        if not dims or any(not isinstance(dim, int) or dim % (len(call.made) + 1) == 0 for dim in dims):
            raise _refuse("roll", f"over dims={given} mixes the inputs of a batch; name the other dimensions")


@register_operator("size", "dim", "ndimension", "numel", getattr)
def _size(call: Call) -> Bound:
    """A size is no signal; an attribute that is a signal is refused."""
    raise _refuse(call.name, f"{call.args[1]!r} of a signal is not supported" if len(call.args) > 1 else "is not supported")


@register_operator(torch.cat, torch.concat, torch.concatenate, torch.stack)
def _concatenate(call: Call) -> Bound:
    """`sqrt(L_1^2 + L_2^2 + ...)`; stored tensors add nothing."""
    dim = call.args[1] if len(call.args) > 1 else call.options.get("dim", call.options.get("axis", 0))
    parts = call.args[0] if call.args else None
    if not isinstance(parts, list | tuple) or not isinstance(dim, int) or dim % (len(call.made) + 1) == 0:
        raise _refuse(call.name, f"puts inputs of a batch together along dim={dim}; a list of signals and another dimension are needed")
    bounds = call.bounds
    return bounds[0] if len(bounds) == 1 else beside(bounds)


@register_operator(torch.maximum, torch.minimum, "maximum", "minimum")
def _larger(call: Call) -> Bound:
    """Entry by entry the larger or the smaller: of two signals it moves no more than both beside each other, with a stored tensor no more than the signal."""
    _no_options(call.name, call.options)
    stored = [arg for arg in call.args if isinstance(arg, Tensor)]
    if len(call.args) != 2 or len(call.bounds) + len(stored) != 2 or not all(torch.isfinite(numbers).all() for numbers in stored):
        raise _refuse(call.name, "is known of two signals, and of a signal and a stored tensor of finite numbers")
    bounds = _spread(call)
    return bounds[0] if len(bounds) == 1 else beside(bounds)


@register_operator(torch.mean, "mean", torch.sum, "sum")
def _reduce(call: Call) -> Bound:
    """Sums of so many entries each: their root; of means, one over it."""
    options = {name: value for name, value in call.options.items() if name not in ("dim", "axis", "keepdim")}
    _no_options(call.name, options)
    dims = call.args[1] if len(call.args) > 1 else call.options.get("dim", call.options.get("axis"))
    count = _reduced(call.name, dims, call.shapes[0])
    factor = root_up(count) if call.name == "sum" else one_over_root(count)
    return Bound(factor, f"{call.name} of {count} entries") @ call.args[0]


def _reduced(name: str, dims: Any, shape: Shape) -> int:
    """How many entries each sum is of."""
    each = [dims] if isinstance(dims, int) else dims
    if not isinstance(each, Sequence) or not each or not all(isinstance(dim, int) for dim in each) or any(dim % (len(shape) + 1) == 0 for dim in each):
        raise _refuse(name, f"over dim={dims} mixes the inputs of a batch; name the other dimensions")
    return math.prod(shape[dim % (len(shape) + 1) - 1] for dim in each)


ELEMENTWISE = {
    torch.relu: nn.ReLU(), nn.functional.relu: nn.ReLU(), "relu": nn.ReLU(),
    torch.tanh: nn.Tanh(), nn.functional.tanh: nn.Tanh(), "tanh": nn.Tanh(),
    torch.sigmoid: nn.Sigmoid(), nn.functional.sigmoid: nn.Sigmoid(), "sigmoid": nn.Sigmoid(),
}  # fmt: skip


@register_operator(*ELEMENTWISE, torch.abs, operator.abs, "abs")
def _elementwise(call: Call) -> Bound:
    if len(call.args) != 1 or any(call.options.values()):
        raise _refuse("activation", "options such as inplace=True are not supported in a forward; leave them out")
    return Bound(1.0, "elementwise, slopes within [-1, 1]") @ call.args[0]


register_reason(
    "attention multiplies signals by each other, so it is not Lipschitz on all inputs (Kim, Papamakarios, Mnih 2021); smoothing does without",
    torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward, "scaled_dot_product_attention",
)  # fmt: skip
register_reason(
    "is known with a stored matrix as its second factor; a product of two signals is not Lipschitz on all inputs",
    torch.matmul, operator.matmul, torch.bmm, torch.mm, torch.einsum, "matmul", "bmm", "mm", "einsum", "baddbmm", torch.baddbmm,
)  # fmt: skip
register_reason("is a product of two signals (a gate), which is not Lipschitz on all inputs", torch.nn.functional.glu, "glu")
register_reason(
    "has jumps, so no Lipschitz constant exists", torch.sign, "sign", torch.round, "round", torch.floor, "floor", torch.ceil, "ceil", "argmax", torch.argmax
)
register_reason(
    "torch switches softplus to the identity above its threshold, which makes a jump of 2e-9, so no Lipschitz constant exists; use relu or tanh",
    torch.nn.functional.softplus, "softplus",
)  # fmt: skip
register_reason("drops entries at random, as in training mode; pass training=self.training", "native_dropout", "bernoulli")
register_reason(
    "divides by a norm, which has no useful constant near zero", torch.nn.functional.normalize, torch.nn.functional.cosine_similarity, "linalg_vector_norm"
)
register_reason(f"makes several tensors ({', '.join(SPLITTING)}), of which each must be taken by its index", *SPLITTING)
