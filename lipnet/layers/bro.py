"""Block reflector orthogonal layers (BRO; Lai et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipnet import functional
from lipnet.contractions import BCOP
from lipnet.layers.base import Layer, OneKernelLayer, check_sizes, linear, rank_of


class BROLinear(Layer):
    """`y = W x + b`, W a corner of the block reflector `I - 2 V (V'V)^-1 V'`. 1-Lipschitz in l2, orthogonal where in = out.

    V is (max(in, out), rank); rank defaults to half of that, as in the paper; rank = max(in, out) would only give W = -I. The corner of an orthogonal
    matrix has orthonormal columns (in < out) or rows (in > out). V starts close to the first columns of the identity, as in the published code, so W close to
    a diagonal of -1 and 1: this trains faster than a random V. Shapes: (..., in) -> (..., out).
    """

    def __init__(self, in_features: int, out_features: int, rank: int | None = None, bias: bool = True) -> None:
        super().__init__()
        size = max(in_features, out_features)
        check_sizes(in_features=in_features, out_features=out_features)
        rank = rank_of(rank, size, "max(in_features, out_features)")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.vectors = nn.Parameter(torch.eye(size, rank) + 0.05 * torch.randn(size, rank) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def weight(self) -> Tensor:  # (out, in)
        """W, from V."""
        return functional.block_reflector(self.vectors, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(), self.bias)

    def frozen(self) -> nn.Module:
        return linear(self.weight(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class BROConv2d(OneKernelLayer):
    """`y = (I - 2 V V^T) x + b`, V a convolution with orthonormal columns by an explicit kernel: 1-Lipschitz in l2 at every size of image.

    V has (kernel_size + 1) / 2 taps and is made by block convolutions (BCOP), so that the layer is one plain convolution with kernel_size taps: orthogonal
    with circular padding and in = out, a contraction with zero padding or fewer channels. The published form inverts V^T V per frequency, is
    orthogonal at one size only and has a dense spatial kernel. `rank` defaults to half of max(in * stride^2, out). Stride as in `SandwichConv2d`.
    V starts close to channels of its own, so that the layer starts close to a change of some signs.
    Shapes: (batch, in, height, width) -> (batch, out, height / stride, width / stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        rank: int | None = None,
        padding_mode: str = "zeros",
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding_mode)
        self._size = max(in_channels * stride**2, out_channels)
        self.rank = rank_of(rank, self._size, "max(in_channels * stride^2, out_channels)")
        self._taps = (kernel_size + 1) // 2
        free = BCOP().initial_kernel(self._size, self.rank, self._taps)
        free[:, : self.rank] = torch.eye(self._size, self.rank) + 0.01 * torch.randn(self._size, self.rank)
        self.free = nn.Parameter(free)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def weight(self) -> Tensor:  # (out, in * stride^2, size, size)
        """The kernel of `I - 2 V V^T`, cut to the channels that are there."""
        kernel = -2 * functional.gram_kernel(BCOP().kernel(self.free, self.rank, self._taps))
        centre = torch.zeros_like(kernel)
        centre[:, :, self.kernel_size // 2, self.kernel_size // 2] = torch.eye(self._size, dtype=kernel.dtype, device=kernel.device)
        return (centre + kernel)[: self.out_channels, : self.in_channels * self.stride**2]

    def extra_repr(self) -> str:
        return self._shown(rank=self.rank)
