"""Free matrix -> contraction, as values that are passed to layers.

Each is a frozen dataclass that is called on a free matrix of any scale and returns one of the same shape with spectral norm at most 1 (in exact
arithmetic; the rule of the layer measures what rounding leaves). `Cayley()` gives orthonormal rows; the others give up some of the norm for less cost.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from lipnet import functional


class Contraction(abc.ABC):
    """A map from free matrices to matrices with spectral norm at most 1."""

    @abc.abstractmethod
    def __call__(
        self,
        free: Tensor,  # (rows, columns)
    ) -> Tensor:  # (rows, columns)
        """The contraction made from a free matrix."""

    def initial_kernel(self, rows: int, columns: int, size: int) -> Tensor:
        """A free tensor to start from, for `kernel`; close to an orthonormal matrix at the centre of the kernel."""
        raise ValueError(f"{self!r} makes matrices only; for convolution kernels use AOL() or BCOP()")

    def kernel(self, free: Tensor, columns: int, size: int) -> Tensor:  # (rows, columns, size, size)
        """The kernel of a convolution with norm at most 1, for zero and for circular padding, at every size of image."""
        raise ValueError(f"{self!r} makes matrices only; for convolution kernels use AOL() or BCOP()")


@dataclasses.dataclass(frozen=True)
class Cayley(Contraction):
    """Orthonormal rows by the Cayley transform (Trockman & Kolter 2021). One inverse of size min(rows, columns)."""

    def __call__(self, free: Tensor) -> Tensor:
        return functional.cayley(free)


@dataclasses.dataclass(frozen=True)
class Cholesky(Contraction):
    """`K^-1 G` with `K K' = G G' + a I`, a = ridge * mean squared row. Strictly inside the unit ball; one Cholesky factor."""

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"Cholesky needs ridge > 0, got {self.ridge}")

    def __call__(self, free: Tensor) -> Tensor:
        return functional.cholesky_contraction(free, self.ridge)


@dataclasses.dataclass(frozen=True)
class AOL(Contraction):
    """Rows rescaled by the absolute row sums of the Gram matrix (Prach & Lampert 2022). No factorisation; loose at a random start.

    With `squarings` the sums are of the Gram matrix squared so many times, and their root: tighter with each, at the cost of one larger product
    (a random 3 x 3 kernel of 64 channels has norm 0.36, 0.61, 0.80 and 0.91 with 0, 1, 2 and 3).
    """

    squarings: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.squarings, int) and 0 <= self.squarings <= 6):
            raise ValueError(f"AOL takes squarings from 0 to 6, got {self.squarings!r}")

    def __call__(self, free: Tensor) -> Tensor:
        return functional.aol_contraction(free, self.squarings)

    def initial_kernel(self, rows: int, columns: int, size: int) -> Tensor:
        free = 0.01 * torch.randn(rows, columns, size, size) / (columns * size**2) ** 0.5
        free[:, :, size // 2, size // 2] += torch.nn.init.orthogonal_(torch.empty(rows, columns))
        return free

    def kernel(self, free: Tensor, columns: int, size: int) -> Tensor:
        return functional.aol_kernel(free, self.squarings)


@dataclasses.dataclass(frozen=True)
class BCOP(Contraction):
    """Orthonormal rows (columns, where there are more rows) by block convolutions (Li et al. 2019); kernels with an even number of rows.

    Each factor is orthonormalised by CholeskyQR2, not by the unconverged Bjorck iteration of the published code.
    """

    def __call__(self, free: Tensor) -> Tensor:
        return functional.bcop_kernel(free, free.shape[1], 1)[:, :, 0, 0]

    def initial_kernel(self, rows: int, columns: int, size: int) -> Tensor:
        if size > 1 and rows % 2:
            raise ValueError(f"BCOP() moves one half of the channels, so their number must be even, got {rows}")
        half = torch.nn.init.orthogonal_(torch.empty(rows, rows)).split(rows // 2, dim=1) if size > 1 else ()
        steps = [half[2 * i // (2 * size - 2)] for i in range(2 * (size - 1))]  # a half moves forth, the other half follows: the centre stays
        free = torch.cat([torch.nn.init.orthogonal_(torch.empty(rows, columns)), *steps], dim=1)
        return free + 0.01 * torch.randn_like(free) / rows**0.5

    def kernel(self, free: Tensor, columns: int, size: int) -> Tensor:
        return functional.bcop_kernel(free, columns, size)
