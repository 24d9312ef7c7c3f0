"""Convolutions with one matrix for each frequency: every operation on matrices that keeps a norm makes one on images, at one size of image."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Sequence

import torch.fx
from torch import Tensor, nn

from lipnet import functional
from lipnet.contractions import BCOP, Cayley, Contraction
from lipnet.layers.base import KernelLayer, activation_of, check_sizes, contraction_of, rank_of, unshuffled


class FourierLayer(KernelLayer, abc.ABC):
    """A layer whose weights are spectra: stacks of complex matrices, one for each frequency of a torus.

    The torus is the image itself for circular padding. For zeros it is larger by `kernel_size // 2` on all sides: the image is continued by zeros, which keeps
    its norm, and cut out again in the end, which does not raise it. A spectrum holds about `height * width / 2` matrices, and is made anew in every forward:
    the layers by explicit kernels are faster, hold at every size, and freeze to plain convolutions. The weights are real tensors (..., 2), real and imaginary.
    """

    def __init__(self, in_channels: int, out_channels: int, image_size: int | Sequence[int], kernel_size: int, stride: int, padding_mode: str) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding_mode)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_sizes(height=height, width=width)
        if height % stride or width % stride or min(height, width) // stride < kernel_size:
            raise ValueError(f"image_size must be divisible by the stride {stride}, and hold {kernel_size} taps after it, got {height} x {width}")
        self.image_size = (height, width)
        margin = 2 * (kernel_size // 2) if padding_mode == "zeros" else 0
        self._size = (height // stride, width // stride)
        self._torus = (self._size[0] + margin, self._size[1] + margin)

    @property
    def _columns(self) -> int:
        """The channels behind the rearrangement."""
        return self.in_channels * self.stride**2

    @abc.abstractmethod
    def spectra(self) -> tuple[Tensor, ...]:  # of (frequencies, out, in, 2)
        """The weights that the layer runs, frequency by frequency, from the parameters."""

    @abc.abstractmethod
    def _steps(self) -> tuple[nn.Module, ...]:
        """What the forward does after the rearrangement, with the spectra as numbers."""

    def _checked(self, x: Tensor) -> Tensor:
        """The rearranged input, in the precision of the weights."""
        if x.shape[-2:] != self.image_size:
            raise ValueError(f"{type(self).__name__} is made for images of {self.image_size[0]} x {self.image_size[1]}, got {x.shape[-2]} x {x.shape[-1]}")
        return self._rearranged(x).to(next(self.parameters()).dtype)

    def frozen(self) -> nn.Module:
        return unshuffled(self.stride, *self._steps())


def on_torus(
    x: Tensor,  # (batch, in, height, width), not larger than the torus
    spectrum: Tensor,  # (frequencies, out, in, 2)
    bias: Tensor | None,  # (out,)
    torus: tuple[int, int],
    size: tuple[int, int],  # not larger either
) -> Tensor:  # (batch, out, *size)
    """The image, continued by zeros, convolved on the torus, and a corner of the result."""
    waves = torch.fft.rfft2(x, s=torus).flatten(2).permute(2, 1, 0)  # (frequencies, in, batch)
    mixed = (torch.view_as_complex(spectrum) @ waves).permute(2, 1, 0)
    image = torch.fft.irfft2(mixed.unflatten(2, (torus[0], torus[1] // 2 + 1)), s=torus)[:, :, : size[0], : size[1]]
    return image if bias is None else image + bias[:, None, None]


class FourierBROConv2d(FourierLayer):
    """`y = (I - 2 V (V^H V)^-1 V^H) x + b` at every frequency, as published (BRO; Lai et al. 2025): 1-Lipschitz in l2 for images of `image_size`.

    Orthogonal with circular padding and in = out. V comes from a kernel (channels, rank, k, k) and is orthonormalised by CholeskyQR2 at each frequency, where
    the published solve with `V^H V` loses the bound in float32 (norm 1.02 at cond(V) = 1e3, 1.7 at 1e4). `rank` defaults to half of max(in * stride^2, out).
    `BROConv2d` is the same layer by an explicit kernel. Shapes: (batch, in, height, width) -> (batch, out, height / stride, width / stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | Sequence[int],
        kernel_size: int = 3,
        stride: int = 1,
        rank: int | None = None,
        padding_mode: str = "zeros",
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, image_size, kernel_size, stride, padding_mode)
        size = max(self._columns, out_channels)
        self.rank = rank_of(rank, size, "max(in_channels * stride^2, out_channels)")
        free = 0.1 * torch.randn(size, self.rank, kernel_size, kernel_size) / (size**0.5 * kernel_size)
        free[:, :, kernel_size // 2, kernel_size // 2] += torch.eye(size, self.rank)  # close to a change of some signs
        self.free = nn.Parameter(free)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def spectra(self) -> tuple[Tensor]:
        with torch.autocast(self.free.device.type, enabled=False):
            reflector = functional.block_reflector(functional.spectrum(self.free, self._torus))
            return (torch.view_as_real(reflector[:, : self.out_channels, : self._columns].contiguous()),)

    def forward(self, x: Tensor) -> Tensor:
        (weight,), x = self.spectra(), self._checked(x)
        with torch.autocast(x.device.type, enabled=False):
            return on_torus(x, weight, self.bias, self._torus, self._size)

    def _steps(self) -> tuple[nn.Module, ...]:
        return (_on_torus(self.spectra()[0], self.bias, self._torus, self._size),)

    def extra_repr(self) -> str:
        return self._shown(image_size=self.image_size, rank=self.rank)


class FourierSandwichConv2d(FourierLayer):
    """`y = sqrt2 A^H Psi s(sqrt2 Psi^-1 B x + b)` with `A A^H + B B^H <= I` at every frequency: 1-Lipschitz in l2 for images of `image_size`.

    The convolutional sandwich layer as published (LBDN; Wang & Manchester, ICML 2023), there with `Cayley()` and circular padding only. Any contraction of
    matrices does: the proof is that of `SandwichLinear`, with A and B operators on the torus. `SandwichConv2d` is the same layer by explicit kernels.
    Shapes: (batch, in, height, width) -> (batch, out, height / stride, width / stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | Sequence[int],
        kernel_size: int = 3,
        stride: int = 1,
        activation: nn.Module | None = None,
        orthonormalizer: Contraction | None = None,
        padding_mode: str = "zeros",
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, image_size, kernel_size, stride, padding_mode)
        self.activation = activation_of(activation)
        self.orthonormalizer = contraction_of(orthonormalizer, Cayley())
        if isinstance(self.orthonormalizer, BCOP):
            raise ValueError("BCOP() makes real kernels; for one matrix at each frequency use Cayley(), Cholesky() or AOL(), or SandwichConv2d")
        columns = out_channels + self._columns
        self.free = nn.Parameter(torch.randn(out_channels, columns, kernel_size, kernel_size) * (2 / (out_channels + columns)) ** 0.5 / kernel_size)
        self.log_psi = nn.Parameter(torch.zeros(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def psi(self) -> Tensor:  # (out,)
        """The diagonal of Psi."""
        return torch.exp(self.log_psi)

    def spectra(self) -> tuple[Tensor, Tensor]:  # (frequencies, out, in * stride^2, 2), (frequencies, out, out, 2)
        """`sqrt2 Psi^-1 B` and `sqrt2 A^H Psi`."""
        with torch.autocast(self.free.device.type, enabled=False):
            both, psi = self.orthonormalizer(functional.spectrum(self.free, self._torus)), self.psi()
            a, b = both.split([self.out_channels, self._columns], dim=2)
            inner, outer = math.sqrt(2) * b / psi[:, None], math.sqrt(2) * a.mH * psi
            return torch.view_as_real(inner.resolve_conj().contiguous()), torch.view_as_real(outer.resolve_conj().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        (inner, outer), x = self.spectra(), self._checked(x)
        with torch.autocast(x.device.type, enabled=False):
            hidden = self.activation(on_torus(x, inner, self.bias, self._torus, self._torus))
            return on_torus(hidden, outer, None, self._torus, self._size)

    def _steps(self) -> tuple[nn.Module, ...]:
        inner, outer = self.spectra()
        first, last = _on_torus(inner, self.bias, self._torus, self._torus), _on_torus(outer, None, self._torus, self._size)
        return first, copy.deepcopy(self.activation), last

    def extra_repr(self) -> str:
        return self._shown(image_size=self.image_size, orthonormalizer=self.orthonormalizer)


class _OnTorus(nn.Module):
    """`on_torus` with its numbers stored; only ever traced."""

    def __init__(self, spectrum: Tensor, bias: Tensor | None, torus: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(spectrum.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.torus, self.size = torus, size

    def forward(self, x: Tensor) -> Tensor:
        return on_torus(x, self.spectrum, self.bias, self.torus, self.size)


def _on_torus(spectrum: Tensor, bias: Tensor | None, torus: tuple[int, int], size: tuple[int, int]) -> nn.Module:
    return torch.fx.symbolic_trace(_OnTorus(spectrum, bias, torus, size))
