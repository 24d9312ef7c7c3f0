"""Noise that all inputs share: what the first linear layer of a network makes of it is computed once for all of them.

W (X + k) = W X + W k does not hold in floating point: there the right side depends on how a copy is divided into input and noise, and is no function of the
copy, of which alone certificates are. On the grid X and k are whole numbers, and with weights that are multiples of some power of two, such that every sum is
exact in float64, both sides are one number to the last bit. So what is smoothed is the network with this first layer: weights rounded so (to within 2^-32 of
their sum, where float32 products lose 2^-24), exact sums, and one rounding to float32 at the end.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from certify.bound import Array
from certify.errors import CertifyError
from certify.registry import Shape
from certify.smoothing.engine import Forward, Source
from certify.smoothing.noise import Grid, native, noisy_rows, row_table
from certify.smoothing.prepare import PART, Parts, close, own_forwards

LARGEST = 1 << 20  # of an entry of a copy, in steps of the grid
BLOCK = 1024  # copies whose noise goes through the layer at once
_KEPT = 1 << 23  # numbers that are kept of such products
_MOST_ELEMENTS = 4096
_AFFINE_FUNCTIONS, _AFFINE_METHODS = (torch.flatten, operator.sub, operator.truediv), ("flatten", "movedim")


@dataclasses.dataclass(frozen=True, eq=False)
class First:
    """y = X V + c of whole numbers X up to LARGEST in size, exact: the entries of V and c of an output are multiples of one power of two u, and no sum is
    above 2^53 u, in whichever order it is taken.
    """

    weight: Tensor  # (elements, outputs) float64
    bias: Tensor  # (outputs,) float64

    @classmethod
    def nearest(cls, weight: Tensor, bias: Tensor) -> First:
        """From any weights: with u = 2^-52 of a power of two above all sums, rounding adds less than they still have room for, for up to 2^32 elements."""
        total = (weight.abs().sum(0) * LARGEST + bias.abs()) * (1 + 1e-9)
        unit = torch.from_numpy(np.ldexp(1.0, torch.frexp(total).exponent.numpy() - 52))
        return cls((weight / unit).round() * unit, (bias / unit).round() * unit)

    def __call__(
        self,
        copies: Tensor,  # (rows, elements), whole numbers
    ) -> Tensor:  # (rows, outputs) float64
        """Without rounding."""
        return torch.addmm(self.bias, copies.double(), self.weight)


@dataclasses.dataclass(frozen=True, eq=False)
class FirstOnce:
    """A network as a function of copies in whole numbers, channels last: `first` in exact arithmetic, rounded to float32, and `rest`."""

    first: First
    rest: Forward

    def __call__(self, copies: Tensor) -> Tensor:
        return self.rest(self.first(copies.flatten(1)).float())


def once(net: nn.Module, shape: Shape, noise: Grid, batch: int) -> FirstOnce | None:
    """The network (as `prepared` gives it, on the CPU) divided behind its first linear layer.

    None: it does not begin with one, after changes of shape, and of mean and scale, or its outputs would not stay those of the network on random batches.
    """
    whole = net.net if isinstance(net, Parts) else net
    if own_forwards(whole):
        return None
    try:
        traced = whole if isinstance(whole, fx.GraphModule) else fx.symbolic_trace(whole)
        (node,) = (node for node in traced.graph.nodes if node.op == "placeholder")
        while not _is_linear(traced, node):
            (following,) = node.users
            if not _is_affine(traced, following, node):
                return None
            node = following
        first, rest = _divided(traced, node, shape, float(noise.channels[0][0]))
    except Exception:  # a forward that torch.fx cannot trace, a node that several read, shapes of no such layer
        return None
    found = FirstOnce(first, rest)
    return found if _same(found, net, shape, noise, batch) else None


@torch.no_grad()
def _same(found: FirstOnce, net: nn.Module, shape: Shape, noise: Grid, batch: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    last = (*shape[1:], shape[0]) if len(shape) == 3 else shape
    for low, high in ((0, noise.levels + 1), (-4 * noise.levels, 4 * noise.levels)):
        copies = torch.randint(low, high, (batch, *last), generator=generator)
        inputs = copies.float() * float(noise.channels[0][0])
        if not close(found(copies), net(inputs.permute(0, 3, 1, 2) if len(shape) == 3 else inputs)):
            return False
    return True


def _is_linear(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.Linear
    return node.op == "call_function" and node.target is nn.functional.linear and all(map(_constant, (*node.args[1:], *node.kwargs.values())))


def _is_affine(traced: fx.GraphModule, node: fx.Node, argument: fx.Node) -> bool:
    """Whether a node makes an affine function of one argument: that is its first, and the others are constants."""
    if _is_linear(traced, node):
        return node.args[0] is argument
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) in (nn.Flatten, nn.Identity)
    known = node.target in (_AFFINE_FUNCTIONS if node.op == "call_function" else _AFFINE_METHODS if node.op == "call_method" else ())
    return known and node.args[0] is argument and all(map(_constant, (*node.args[1:], *node.kwargs.values())))


def _constant(part: Any) -> bool:
    return part is None or isinstance(part, int | float) or (isinstance(part, fx.Node) and part.op == "get_attr")


def _divided(traced: fx.GraphModule, linear: fx.Node, shape: Shape, scale: float) -> tuple[First, nn.Module]:
    """The affine function up to a node, by what it makes of the unit vectors in float64; and what follows."""
    head, rest = fx.Graph(), fx.Graph()
    early: dict[fx.Node, fx.Node] = {}
    late = {linear: rest.placeholder("x")}
    for node in traced.graph.nodes:
        if linear not in early:
            early[node] = head.node_copy(node, early.__getitem__)
        if node.op == "output":
            rest.output(late[node.args[0]])
        elif node.op == "get_attr" or (linear in early and node is not linear):
            late[node] = rest.node_copy(node, late.__getitem__)
    head.output(early[linear])
    if (elements := math.prod(shape)) > _MOST_ELEMENTS:
        raise ValueError(f"{elements} unit vectors take too much memory")
    unit = torch.eye(elements, dtype=torch.float64)
    points = unit.view(elements, *shape[1:], shape[0]).permute(0, 3, 1, 2) if len(shape) == 3 else unit.view(elements, *shape)
    affine = copy.deepcopy(fx.GraphModule(traced, head)).double()
    with torch.no_grad():
        (bias,) = affine(torch.zeros_like(points[:1]))
        weight = (affine(points) - bias) * scale
    if weight.shape != (elements, len(bias)) or not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"{tuple(weight.shape)} numbers, not all of them finite")
    return First.nearest(weight, bias), fx.GraphModule(traced, rest).eval().requires_grad_(False)


class SharedCopies(Source):
    """Draws nothing: what the first layer makes of a copy is made where the rest is evaluated (`forward`), some rows at a time, which then stay in a cache.

    It is the exact sum of what that layer makes of the input and of the noise, rounded to float32.
    """

    def __init__(self, noise: Grid, net: FirstOnce, slots: int, batch: int) -> None:
        self.noise, self.first, self.rest = dataclasses.replace(noise, scale=(1.0,), bias=(0.0,)), net.first, net.rest
        elements, outputs = net.first.weight.shape
        self.largest = LARGEST - len(noise.tables.thresholds)
        self.origin = torch.zeros(1, elements, dtype=torch.int32)
        self.images = np.zeros((slots, outputs))
        self.part = PART if batch % PART == 0 else batch
        self.made = torch.empty(self.part, outputs)
        self.kept: collections.OrderedDict[int, Array] = collections.OrderedDict()
        self.most = max(_KEPT // (BLOCK * outputs), 2)

    def hold(self, slot: int, image: Tensor) -> None:
        if (size := int(image.abs().max())) > self.largest:
            raise CertifyError(
                f"with shared noise inputs are at most {self.largest} steps of the grid in size, got {size}; scale them, or do not share the noise"
            )
        self.images[slot] = self.first(image.reshape(1, -1))[0].numpy()

    def draw(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows)

    def forward(
        self,
        rows: Tensor,  # (batch, 3): slot, stream, sample
    ) -> Tensor:
        """The logits of copies."""
        slot, sample = (np.ascontiguousarray(rows.numpy()[:, column]) for column in (0, 2))
        new = (np.diff(slot) != 0) | (np.diff(sample) != 1) | (sample[1:] % BLOCK == 0)
        new[self.part - 1 :: self.part] = True
        cuts = (np.flatnonzero(new) + 1).tolist()  # stretches of one slot whose samples follow each other and lie in one block, in one part
        made, logits = self.made.numpy(), []
        for start, end in itertools.pairwise((0, *cuts, len(slot))):
            into = made[start % self.part : (end - 1) % self.part + 1]
            if slot[start] < 0:
                into[:] = np.nan
            else:
                block, first = divmod(int(sample[start]), BLOCK)
                native.add_rows(self._products(block)[first : first + end - start], self.images[slot[start]], into)
            if end % self.part == 0:
                logits.append(self.rest(self.made).clone())  # what a ReLU alone returns is the buffer itself
        return torch.cat(logits)

    def _products(self, block: int) -> Array:
        """(BLOCK, outputs): of the noise of these samples and the weights."""
        if block not in self.kept:
            rows = torch.from_numpy(row_table(0, 0, np.arange(BLOCK) + block * BLOCK))
            self.kept[block] = (noisy_rows(self.noise, self.origin, rows).double() @ self.first.weight).numpy()
        self.kept.move_to_end(block)
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)
        return self.kept[block]
