"""Bounds of Jacobians by auto_LiRPA (Xu et al. 2020; Shi et al. 2022), where it is installed: a second opinion. The only file that imports it.

It rounds nothing outwards, and has no message for what its Jacobians leave out: skip connections from the input, and inputs beside the first. So a network
goes there as dense maps between its gates, one row of its outputs at a time, and nothing comes back before it was compared with gradients by autograd.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from certify.bound import Ball, Box, Domain
from certify.errors import CertifyError
from certify.local.directed import downward, upward
from certify.local.entries import Entries
from certify.local.program import Gate, Program
from certify.local.region import Region
from lipnet.checkpoint import first_line
from sdp.activation import RELU
from sdp.proof import gamma

INSTALL = (
    "git clone https://github.com/Verified-Intelligence/auto_LiRPA && "
    "pip install --no-deps ./auto_LiRPA appdirs graphviz ninja oslo.concurrency pyyaml sortedcontainers tqdm"
)
_ROOM = 1e-9  # of the largest entry: by how much its float64 is trusted, and what it returns is widened
_SAMPLES = 16


class Gated(nn.Module):
    """A row of a program's outputs: dense maps to each gate from the input and from the gates before it, and nothing else."""

    def __init__(self, sums: list[dict[int, nn.Linear]]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(part for parts in sums for part in parts.values())
        self.sources = [list(parts) for parts in sums]

    def forward(self, x: Tensor) -> Tensor:
        values, z = [x], x
        maps = iter(self.maps)
        for sources in self.sources:
            z = functools.reduce(operator.add, [next(maps)(values[source]) for source in sources])
            values.append(torch.relu(z))
        return z


class _Jacobian(nn.Module):
    """The gradient of a network, or the l1 norm of that of a network of one output."""

    def __init__(self, net: nn.Module, norm: bool) -> None:
        super().__init__()
        parts = _lirpa()
        self.net, self.of, self.norm = net, parts.JacobianOP, parts.GradNorm(norm=1) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        found = self.of.apply(self.net(x), x)
        return found if self.norm is None else self.norm(found)


def bound_jacobian(program: Program, net: nn.Module, domain: Domain, rows: Tensor, limit: int = 2**27) -> Entries:
    """Bounds of all gradients of `rows @ net` on a Box, or a Ball in l-infinity, that hold at its center and at some points of it as autograd sees them.

    Raises CertifyError where they do not, where auto_LiRPA is missing or fails, and for dense maps of more numbers than `limit`.
    """
    if not isinstance(domain, Box) and not (isinstance(domain, Ball) and domain.p == math.inf):
        raise CertifyError('backend="auto_lirpa" is for a Box, or a Ball in l-infinity; take backend="own" for other norms')
    region = Region.of(domain, math.prod(program.input_shape))
    _lirpa()
    sums = dense(program, limit)
    points = _points(region)
    seen = torch.einsum("ro,poi->pri", rows, _gradients(net, points, program.input_shape))
    found = []
    for row, jacobians in zip(rows, seen.unbind(1), strict=True):
        found.append(_checked(row_of(sums, row), region, points[:1], jacobians))
    low, high, total = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Entries(low, high, total)


def dense(program: Program, limit: int) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """For each step of gates, and for the output: the matrix from each signal that it depends on (0: the input, k: the k-th gates), with the constant."""
    leaves = [torch.zeros(math.prod(program.input_shape), dtype=torch.float64, requires_grad=True)]
    sums: list[dict[int, tuple[Tensor, Tensor]]] = []
    used = 0

    def keep(z: Tensor) -> None:
        nonlocal used
        used += z.numel() * sum(leaf.numel() for leaf in leaves)
        if used > limit:
            raise CertifyError(f'backend="auto_lirpa" would need more than {limit:,} numbers for the maps between the gates; take backend="own"')
        sums.append(_maps(z.flatten(), leaves))

    def cut(gate: Gate, z: Tensor) -> Tensor:
        if gate.activation != RELU:
            raise CertifyError(f'backend="auto_lirpa" is for ReLU and what is made of it, not for {gate.name}; take backend="own"')
        keep(z)
        leaves.append(torch.zeros(z.numel(), dtype=torch.float64, requires_grad=True))
        return leaves[-1].reshape(z.shape)

    with torch.enable_grad():
        keep(program.run(leaves[0], cut))
    return sums


def _maps(z: Tensor, leaves: list[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """The matrices of an affine function of some signals: only those that are not zero, but always one."""
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if z.requires_grad:
        found = torch.autograd.grad(z, leaves, torch.eye(len(z), dtype=torch.float64), retain_graph=True, allow_unused=True, is_grads_batched=True)
    constant = z.detach()
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for number, matrix in enumerate(found):
        if matrix is not None and bool(matrix.any()):
            made[number] = matrix.detach(), constant
            constant = torch.zeros_like(constant)
    return made or {0: (torch.zeros(len(z), len(leaves[0]), dtype=torch.float64), constant)}


def row_of(sums: list[dict[int, tuple[Tensor, Tensor]]], row: Tensor) -> Gated:
    """The module of one row of the outputs."""
    last = {source: (row[None] @ matrix, row[None] @ constant) for source, (matrix, constant) in sums[-1].items()}
    return Gated([{source: _linear(*maps) for source, maps in parts.items()} for parts in (*sums[:-1], last)])


def _linear(matrix: Tensor, constant: Tensor) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, matrix.shape[1], matrix.shape[0], dtype=torch.float64)
    made.weight.data, made.bias.data = matrix, constant
    return made


def _points(region: Region) -> Tensor:  # (points, inputs)
    """The center, corners, and points between."""
    generator = torch.Generator().manual_seed(0)
    part = torch.rand(_SAMPLES, len(region.center), generator=generator, dtype=torch.float64)
    part[::2] = part[::2].round()
    return torch.cat([region.center[None], region.center + region.low + part * (region.high - region.low)])


def _gradients(net: nn.Module, points: Tensor, shape: tuple[int, ...]) -> Tensor:  # (points, outputs, inputs)
    with torch.enable_grad():
        return torch.stack([torch.autograd.functional.jacobian(lambda x: net(x.reshape(1, *shape))[0], point) for point in points])


def _checked(net: nn.Module, region: Region, center: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of one row, widened by what float64 is trusted for. Raises CertifyError where a gradient by autograd (the first: at the center) is outside."""
    at_center, low, high, total = propagate(net, center, region.center + region.low, region.center + region.high)
    room = _ROOM * float(torch.maximum(low.abs(), high.abs()).max()) + 2.0**-500
    low, high, total = low - room, high + room, total + room * low.numel()
    agrees = bool(((at_center - seen[0]).abs() <= room).all())
    inside = bool(((low <= seen) & (seen <= high)).all()) and bool((seen.abs().sum(1) <= total * (1 + 2 * gamma(seen.shape[1] + 8))).all())
    if not (agrees and inside):
        what = "is outside of its bounds" if agrees else "is not what it computes at the center"
        raise CertifyError(f'auto_LiRPA does not bound this network: a gradient by autograd {what}; take backend="own"')
    return low, high, total


def propagate(net: nn.Module, center: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As auto_LiRPA (CROWN) returns them, for a network of one output: its gradient at the center, bounds of all entries on the box, and of their l1 norm."""
    try:
        with _quiet(center.dtype):
            jacobian = _bounded(_Jacobian(net, norm=False), center)
            ends = jacobian.compute_jacobian_bounds(_box(center, low, high), optimize=False)
            at_center = jacobian(center)
        total = l1_norm(net, center)(low, high)
    except Exception as error:  # whatever a graph that it does not know raises
        line = first_line(error)
        raise CertifyError(f'auto_LiRPA cannot bound the Jacobian of this network ({type(error).__name__}: {line}); take backend="own"') from error
    return at_center.detach().flatten(), ends[0].detach().flatten(), ends[1].detach().flatten(), total


def entries(net: nn.Module, center: Tensor) -> Callable[[Tensor, Tensor], object]:
    """What bounds all entries of the Jacobian of a network on boxes around a center, of all its outputs in one call (CROWN)."""
    with _quiet(center.dtype):
        jacobian = _bounded(_Jacobian(net, norm=False), center)

    def bound(low: Tensor, high: Tensor) -> object:
        with _quiet(center.dtype):
            return jacobian.compute_jacobian_bounds(_box(center, low, high), optimize=False)

    return bound


def l1_norm(net: nn.Module, center: Tensor, optimize: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """What bounds the l1 norm of the gradient of a network of one output on boxes around a center; `optimize` its slopes (alpha-CROWN)."""
    with _quiet(center.dtype):
        norm = _bounded(_Jacobian(net, norm=True), center)

    def bound(low: Tensor, high: Tensor) -> Tensor:
        with _quiet(center.dtype):
            found = norm.compute_jacobian_bounds(_box(center, low, high), optimize=optimize, bound_lower=False)[1]
            return found.detach().flatten()[0]

    return bound


def _bounded(module: nn.Module, center: Tensor) -> Any:
    return _lirpa().BoundedModule(module, center, bound_opts={"conv_mode": "matrix"}, device="cpu")


def _box(center: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What auto_LiRPA takes for a box; a last place wider, for the sums that made its ends."""
    ends = downward(low).reshape(center.shape), upward(high).reshape(center.shape)
    parts = _lirpa()
    return parts.BoundedTensor(center, parts.PerturbationLpNorm(norm=math.inf, x_L=ends[0], x_U=ends[1]))


@dataclasses.dataclass(frozen=True)
class _Names:
    BoundedModule: Any
    BoundedTensor: Any
    PerturbationLpNorm: Any
    JacobianOP: Any
    GradNorm: Any


def _lirpa() -> _Names:
    """Its names. It sets up the log, the warnings and the depth of recursion of the whole process when it is imported: all are put back."""
    root = logging.getLogger()
    handlers, level, depth = list(root.handlers), root.level, sys.getrecursionlimit()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from auto_LiRPA import BoundedModule, BoundedTensor
            from auto_LiRPA.jacobian import GradNorm, JacobianOP
            from auto_LiRPA.perturbations import PerturbationLpNorm
    except Exception as error:  # its own internals are of torch's private ones
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({type(error).__name__}: {error})"
        raise CertifyError(f'auto_LiRPA {found}; take backend="own", or install it from its source: {INSTALL}') from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        sys.setrecursionlimit(depth)  # with its million, a file of many brackets ends the process
    return _Names(BoundedModule, BoundedTensor, PerturbationLpNorm, JacobianOP, GradNorm)


@contextlib.contextmanager
def _quiet(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype, which its graphs of gradients are made in, and none of torch's warnings of how it traces."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
