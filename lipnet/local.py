"""A Lipschitz bound around each input to train ordinary networks with: differentiable, in the dtype of the weights. Nothing here is a certificate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lipnet.layers import Abs, MaxMin
from lipnet.spectral import gram_iteration

_NUMBERS = 2**28  # in the matrices of a batch
_KNOWN = (nn.Linear, nn.Conv2d, nn.Flatten, nn.Identity, nn.ReLU, nn.LeakyReLU, Abs, MaxMin)


def local_bound(
    net: nn.Module,
    x: Tensor,  # (batch, ...)
    radius: float,
    p: float = 2.0,
    steps: int = 6,
) -> Tensor:  # (batch,)
    """A Lipschitz constant, l2 to l2, of a network on the l_p ball around each input, p = 2 or inf; after Huang et al. 2021. Differentiable in the weights.

    Intervals say which activations are one line on the ball. The constant is the product of the spectral norms of the layers without the rows and columns of
    those that are flat there; or, where that is smaller, the norm of the Jacobian with every undecided slope in the middle of its range, and what the
    distances from there can add, which vanishes with the radius. Never above the product of the layers. An upper bound in exact arithmetic for any `steps` of
    `gram_iteration`; no rounding is accounted for, so it is a number to train with, and `certify.Local` proves one.

    For a Sequential of Linear and Conv2d, ReLU, LeakyReLU, Abs and MaxMin, Flatten and Identity. Convolutions are written out as matrices, so this is for small
    images. Raises ValueError for any other module, and for a batch that needs too much memory.
    """
    if not (radius >= 0 and math.isfinite(radius) and p in (2, math.inf)):
        raise ValueError(f"local_bound is for balls of a finite radius in l2 or l-infinity, got radius={radius}, p={p}")
    if not isinstance(x, Tensor) or x.dim() < 2 or not len(x):
        raise ValueError(f"local_bound has a number for each input of a batch, got inputs of shape {tuple(x.shape)}; give (batch, ...)")
    chain = list(_chain(net, x))
    _fits(len(x) * sum(step.matrix.numel() + len(step.matrix) * x[0].numel() for step in chain))
    slopes = _slopes(chain, x.detach().flatten(1), radius, p)
    rows = [*(bend.largest for bend in slopes), None]
    middle = chain[0].matrix
    product = gram_iteration(_scaled(middle, rows[0]), steps).expand(len(x))
    apart = torch.zeros_like(product)
    for step, before, after in zip(chain[1:], slopes, rows[1:], strict=True):
        norm = gram_iteration(_scaled(step.matrix, after, before.largest), steps)
        added = gram_iteration(_scaled(step.matrix, after, before.half), steps) * gram_iteration(_scaled(middle, before.half), steps)
        product, apart = norm * product, norm * apart + added
        middle = step.matrix @ (before.middle[..., None] * middle)
    return torch.minimum(product, gram_iteration(middle, steps) + apart)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """An affine map, and in each entry of what it gives a line of slope `left` below 0 and of slope 1 above; after the last map, none."""

    matrix: Tensor  # (out, in)
    bias: Tensor  # (out,)
    left: Tensor | None = None  # (out,)


@dataclasses.dataclass(frozen=True, eq=False)
class _Bend:
    """The slopes of each entry around each input: the roots of their largest size and of half the width of their range, and its middle. (batch, out)"""

    largest: Tensor
    half: Tensor
    middle: Tensor


def _chain(net: nn.Module, x: Tensor) -> Iterator[_Step]:
    """The network as affine maps and bends. MaxMin is a bend in turned coordinates: of `(a + b, a - b) / sqrt(2)`, the second becomes its absolute value."""
    images, shift = _unit(x), torch.zeros_like(x[:1])
    for where, module in _modules(net, ""):
        if isinstance(module, nn.Linear):
            images, shift = nn.functional.linear(images, module.weight), module(shift)
        elif isinstance(module, nn.Conv2d):
            images, shift = module._conv_forward(images, module.weight, None), module(shift)
        elif isinstance(module, nn.Flatten | nn.Identity):
            if isinstance(module, nn.Flatten) and module.start_dim < 1:
                raise ValueError(f"local_bound has a number for each input of a batch, and Flatten(start_dim={module.start_dim}) at {where} joins them")
            images, shift = module(images), module(shift)
        else:
            pairing = module.pairing if isinstance(module, MaxMin) else None
            images, shift = (part if pairing is None else _turned(part, pairing) for part in (images, shift))
            yield _Step(images.flatten(1).T, shift.flatten(), _left(module, shift).flatten())
            images, shift = _unit(shift), torch.zeros_like(shift)
            images = images if pairing is None else _turned_back(images, pairing)
    yield _Step(images.flatten(1).T, shift.flatten())


def _modules(net: nn.Module, where: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested Sequentials, in order. Raises ValueError for one that is not known, or that does something else, with its place."""
    kind = type(net)
    if net._forward_hooks or net._forward_pre_hooks or "forward" in vars(net):
        raise ValueError(f"local_bound goes by the weights, and {kind.__name__} (at {where or 'the top'}) has hooks or a forward of its own; take them off")
    if kind is nn.Sequential:
        for name, module in net.named_children():
            yield from _modules(module, f"{where}.{name}" if where else name)
    elif any(isinstance(net, known) and kind.forward is known.forward for known in _KNOWN):  # a parametrised Linear has a class of its own
        yield where or "the top", net
    else:
        names = ", ".join(known.__name__ for known in _KNOWN)
        raise ValueError(f"local_bound knows no {kind.__name__} (at {where or 'the top'}); known, in a Sequential, are {names}")


def _left(module: nn.Module, like: Tensor) -> Tensor:
    """The slope below 0 of each entry."""
    if isinstance(module, MaxMin):
        first = torch.ones_like(like[:, : like.shape[1] // 2])
        return torch.cat([first, -first], dim=1)
    return torch.full_like(like, module.negative_slope if isinstance(module, nn.LeakyReLU) else -1.0 if isinstance(module, Abs) else 0.0)


def _turned(x: Tensor, pairing: str) -> Tensor:
    """From (a, b) to (a + b, a - b) / sqrt(2), all sums first."""
    a, b = x.chunk(2, dim=1) if pairing == "halves" else (x[:, 0::2], x[:, 1::2])
    return torch.cat([a + b, a - b], dim=1) / math.sqrt(2)


def _turned_back(x: Tensor, pairing: str) -> Tensor:
    """The inverse, which is the transpose."""
    first, second = x.chunk(2, dim=1)
    a, b = (first + second) / math.sqrt(2), (first - second) / math.sqrt(2)
    return torch.cat([a, b], dim=1) if pairing == "halves" else torch.stack([a, b], dim=2).flatten(1, 2)


@torch.no_grad()
def _slopes(chain: Sequence[_Step], x: Tensor, radius: float, p: float) -> list[_Bend]:
    """What intervals say: from the ball to the first map exactly, and from box to box behind it."""
    middle, reach, made = x, None, []
    for step in chain:
        if step.left is None:
            break
        z = middle @ step.matrix.T + step.bias
        spread = radius * torch.linalg.vector_norm(step.matrix, ord=2 if p == 2 else 1, dim=1) if reach is None else reach @ step.matrix.abs().T
        low, high = z - spread, z + spread
        on, off = low >= 0, high <= 0
        one = torch.ones_like(low)
        least = torch.where(on, one, torch.where(off, step.left, step.left.clamp(max=1)))
        most = torch.where(on, one, torch.where(off, step.left, step.left.clamp(min=1)))
        made.append(_Bend(torch.maximum(least.abs(), most.abs()).sqrt(), ((most - least) / 2).sqrt(), (most + least) / 2))
        ends = torch.stack([torch.where(end > 0, end, step.left * end) for end in (low, high)])
        bottom = torch.where(on | off, ends.amin(0), ends.amin(0).clamp(max=0))
        middle, reach = (bottom + ends.amax(0)) / 2, (ends.amax(0) - bottom) / 2
    return made


def _scaled(
    matrix: Tensor,  # (out, in) or (batch, out, in)
    rows: Tensor | None = None,  # (batch, out)
    columns: Tensor | None = None,  # (batch, in)
) -> Tensor:
    matrix = matrix if columns is None else matrix * columns[:, None]
    return matrix if rows is None else rows[..., None] * matrix


def _unit(like: Tensor) -> Tensor:  # (1 or batch, ...) -> (n, ...)
    """The unit vectors, in the shape of one input."""
    size = like[0].numel()
    _fits(size * size)
    return torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *like.shape[1:])


def _fits(numbers: int) -> None:
    if numbers > _NUMBERS:
        raise ValueError(
            f"local_bound would need matrices of {numbers:,} numbers, more than {_NUMBERS:,}; take fewer inputs at a time, smaller images or a smaller network"
        )
