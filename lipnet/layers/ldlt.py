"""Residual blocks by a block LDL^T factorisation of their linear matrix inequality."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.fx
from torch import Tensor, nn

from lipnet import functional
from lipnet.contractions import Cholesky, Contraction
from lipnet.layers.base import Layer, check_sizes, contraction_of, unshuffled
from lipnet.layers.residual import BlockWeights, ResidualBlock


class LDLTBlock(ResidualBlock):
    """`y = A x + B w_n + b`, `w_i = s(C_i w_{i-1} + b_i)`, `w_0 = x`: L-Lipschitz in l2 for every elementwise s with slopes in [0, 1].

    The free parameters reach every block whose LipSDP inequality `P - H'H >= 0` holds strictly, with `H = [A 0 .. 0 B]` and P block tridiagonal:
    `P_00 = L^2 I`, `P_ii = 2 Lam_i`, `P_{i,i-1} = -Lam_i C_i`. Eliminating its blocks in order (LDL^T) gives
    `D_0 = L^2 I`, `D_i = 2 Lam_i - Lam_i C_i D_{i-1}^-1 C_i' Lam_i`, and the inequality is: all D_i > 0 and
    `A Sigma A' + (B + A gamma_n) D_n^-1 (B + A gamma_n)' <= I`, with `gamma_i = gamma_{i-1} D_{i-1}^-1 C_i' Lam_i` and
    `Sigma = sum_{i<n} gamma_i D_i^-1 gamma_i'`.
    The skip A is damped: for n >= 2 the identity would not be feasible. Feed-forward (A = 0) it is `SandwichLinear` with `Cholesky()`.
    The idea is that of LDL^T networks (arXiv 2512.05915); the formulas are derived here, as the code published with the paper violates its own inequality.
    Shapes: (batch, in) -> (batch, out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int],
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        orthonormalizer: Contraction | None = None,
    ) -> None:
        super().__init__()
        widths = self._set_shape(in_features, out_features, hidden, activation, lipschitz)
        self.orthonormalizer = contraction_of(orthonormalizer, Cholesky())
        self.free_inner = nn.ParameterList(torch.randn(out, into) / into**0.5 for into, out in itertools.pairwise(widths))
        self.free_output = nn.Parameter(torch.randn(out_features, in_features + widths[-1]) / (in_features + widths[-1]) ** 0.5)
        self.log_ridge = nn.Parameter(torch.zeros(len(self.hidden)))
        self.log_multiplier = nn.ParameterList(torch.zeros(width) for width in hidden)

    def weights(self) -> BlockWeights:
        with torch.autocast(self.bias.device.type, enabled=False):
            return self._weights()

    def _weights(self) -> BlockWeights:
        eye = torch.eye(self.in_features, dtype=self.bias.dtype, device=self.bias.device)
        root = self.lipschitz * eye  # F, with F'F = D_i
        inverse = eye / self.lipschitz**2  # D_i^-1
        gamma = eye
        sigma = torch.zeros_like(eye)
        inner: list[Tensor] = []
        multipliers: list[Tensor] = []
        for free, log_ridge, log_multiplier in zip(self.free_inner, self.log_ridge, self.log_multiplier, strict=True):
            multiplier, ridge = torch.exp(2 * log_multiplier), torch.exp(log_ridge) + 1e-4
            scale = torch.exp(log_multiplier)  # Lam^1/2
            sigma = sigma + gamma @ inverse @ gamma.mT
            contraction, factor = functional.cholesky_factor(free, ridge)  # I - Q Q' = ridge K^-1 K^-T
            matrix = 2**0.5 * (contraction @ root) / scale[:, None]  # C_i = sqrt2 Lam^-1/2 Q F_{i-1}
            gamma = gamma @ (multiplier[:, None] * matrix @ inverse).mT
            root = (2 * ridge) ** 0.5 * torch.linalg.solve_triangular(factor.mT, torch.diag(scale), upper=True)
            half = factor / scale  # D_i^-1 = Lam^-1/2 K'K Lam^-1/2 / (2 ridge)
            inverse = half.mT @ half / (2 * ridge)
            inner.append(matrix)
            multipliers.append(multiplier)
        skip, branch = self.orthonormalizer(self.free_output).split([self.in_features, self.hidden[-1]], dim=1)
        skip = torch.linalg.solve_triangular(torch.linalg.cholesky(sigma), skip, upper=False, left=False)
        return BlockWeights(skip, branch @ root - skip @ gamma, tuple(inner), tuple(multipliers))


class LDLTConv2d(Layer):
    """An `LDLTBlock` at every pixel, or on every patch of stride x stride pixels: L-Lipschitz in l2 at every size of image, with the L of the block.

    The pixels (patches) are separate blocks, so the constant is that of one. Between two such layers something must mix the pixels: a convolution, or patches
    of another size. There is none by larger kernels: its inequality holds frequency by frequency, and its weights would be full spectra (see `FourierLayer`).
    Shapes: (batch, in, height, width) -> (batch, out, height / stride, width / stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: Sequence[int],
        stride: int = 1,
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        orthonormalizer: Contraction | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, stride=stride)
        self.in_channels, self.out_channels, self.hidden, self.stride = in_channels, out_channels, tuple(hidden), stride
        self.block = LDLTBlock(in_channels * stride**2, out_channels, hidden, activation, lipschitz, orthonormalizer)

    @property
    def lipschitz(self) -> float:
        """The constant that the block is made for."""
        return self.block.lipschitz

    @property
    def activation(self) -> nn.Module:
        """The activation of the block."""
        return self.block.activation

    @property
    def orthonormalizer(self) -> Contraction:
        """What makes the last matrix of the block."""
        return self.block.orthonormalizer

    def weights(self) -> BlockWeights:
        """The matrices of the block."""
        return self.block.weights()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pixel_unshuffle(x, self.stride) if self.stride > 1 else x
        return self.block.run(x.movedim(1, -1), self.weights()).movedim(-1, 1)

    def frozen(self) -> nn.Module:
        return unshuffled(self.stride, torch.fx.symbolic_trace(_AtPixels(self.block.plain(self.weights()))))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, hidden={self.hidden}, stride={self.stride}, lipschitz={self.lipschitz}"


class _AtPixels(nn.Module):
    """A module on vectors, at every pixel; only ever traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)
