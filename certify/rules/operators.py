"""Rules for what a forward may do between modules. An argument is the `Bound` of a node, or a number or a size that does not depend on the input."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from certify.bound import Bound
from certify.errors import Problem, Unsupported
from certify.registry import register_operator


def _refuse(name: str, why: str) -> Unsupported:
    return Unsupported([Problem("", name, why)])


def _no_options(name: str, options: Mapping[str, Any]) -> None:
    if options:
        raise _refuse(name, f"the options {sorted(options)} are not supported; leave them out")


@register_operator(operator.add, torch.add, "add")
def _add(args: Sequence[Any], options: Mapping[str, Any]) -> Bound:
    """The sum of two nodes, or a shift by a constant."""
    if options or len(args) != 2:
        raise _refuse("add", f"the options {sorted(options)} and a third argument such as alpha are not supported; write a + c * b")
    bounds = [arg for arg in args if isinstance(arg, Bound)]
    if not bounds:
        raise _refuse("add", "a sum of sizes is not supported")
    return bounds[0] + bounds[1] if len(bounds) == 2 else bounds[0]


@register_operator(operator.sub, torch.sub, "sub")
def _subtract(args: Sequence[Any], options: Mapping[str, Any]) -> Bound:
    return _add(args, options)


@register_operator(operator.neg, torch.neg, "neg")
def _negate(args: Sequence[Any], options: Mapping[str, Any]) -> Bound:
    _no_options("neg", options)
    return Bound(1.0, "neg") @ args[0]


@register_operator(operator.mul, torch.mul, "mul")
def _multiply(args: Sequence[Any], options: Mapping[str, Any]) -> Bound:
    """A node times a Python number."""
    _no_options("mul", options)
    if len(args) != 2:
        raise _refuse("mul", "takes two factors")
    bounds = [arg for arg in args if isinstance(arg, Bound)]
    numbers = [arg for arg in args if isinstance(arg, int | float)]
    if len(bounds) != 1 or len(numbers) != 1:
        raise _refuse("mul", "only a product with a Python number is Lipschitz with a known constant; a product of two signals is not")
    return Bound(abs(float(numbers[0])), "times a number") @ bounds[0]


@register_operator(torch.flatten, "flatten", "reshape", "view", torch.reshape, "permute")
def _rearrange(args: Sequence[Any], options: Mapping[str, Any]) -> Bound:
    """A rearrangement of each input: the trial run has shown that the batch stays the first dimension, and the numbers what they are."""
    _no_options("reshape", {name: value for name, value in options.items() if name not in ("start_dim", "end_dim")})
    return Bound(1.0, "a rearrangement") @ args[0]


@register_operator("size", getattr)
def _size(args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """A size, as a reshape asks for it: no signal."""
    if args[1:] and not isinstance(args[1], int) and args[1] != "shape":
        raise _refuse("getattr", f"the attribute {args[1]!r} of a signal is not supported")


@register_operator(operator.getitem)
def _entry_of_size(args: Sequence[Any], options: Mapping[str, Any]) -> None:
    if isinstance(args[0], Bound):
        raise _refuse("getitem", "indexing a signal is not supported")


ELEMENTWISE = {
    torch.relu: nn.ReLU(), nn.functional.relu: nn.ReLU(), "relu": nn.ReLU(),
    torch.tanh: nn.Tanh(), nn.functional.tanh: nn.Tanh(), "tanh": nn.Tanh(),
    torch.sigmoid: nn.Sigmoid(), "sigmoid": nn.Sigmoid(),
}  # fmt: skip


@register_operator(*ELEMENTWISE, torch.abs, "abs")
def _elementwise(args: Sequence[Any], options: Mapping[str, Any]) -> Bound:
    if len(args) != 1 or any(options.values()):
        raise _refuse("activation", "options such as inplace=True are not supported in a forward; leave them out")
    return Bound(1.0, "elementwise, slopes within [-1, 1]") @ args[0]
