"""What every layer of this package is: a module whose weights are functions of its parameters, and which can be frozen."""

from __future__ import annotations

import abc
from typing import Literal

import torch.fx
from torch import Tensor, nn

from lipnet.contractions import Contraction


class Layer(nn.Module):
    """A module with a known Lipschitz constant. Concrete layers are final: they are not to be subclassed.

    Its weights are computed from its parameters at every call, so there is no second copy that could go stale. Every argument of the
    constructor is kept as an attribute of the same name (`bias` as the parameter or None): a checkpoint is made of them.
    """

    def frozen(self) -> nn.Module:
        """Plain torch modules with the same outputs, holding the weights as this layer's forward computes them now.

        A layer without weights is traced as it stands.
        """
        return torch.fx.symbolic_trace(self)


def activation_of(given: nn.Module | None) -> nn.Module:
    """The activation inside a layer: ReLU unless another module is given."""
    if given is not None and not isinstance(given, nn.Module):
        raise TypeError(f"activation must be a torch module such as nn.ReLU(), got {given!r}")
    return nn.ReLU() if given is None else given


def contraction_of(given: Contraction | None, default: Contraction) -> Contraction:
    """The contraction of a layer: the default unless another value is given."""
    if given is not None and not isinstance(given, Contraction):
        raise TypeError(f"a contraction must be a value such as lipnet.Cayley() or lipnet.AOL(), got {given!r}")
    return default if given is None else given


def linear(
    weight: Tensor,  # (out, in)
    bias: Tensor | None = None,  # (out,)
) -> nn.Linear:
    """A plain `nn.Linear` that holds copies of the given numbers."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    plain.weight.data.copy_(weight.detach())
    if bias is not None:
        plain.bias.data.copy_(bias.detach())
    return plain


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are not positive whole numbers, naming the argument."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive whole number, got {size!r}")


def rank_of(
    given: int | None,
    size: int,
    what: str,  # that the size is, for the message
) -> int:
    """The rank of a block reflector: half of the size unless another is given, and not above it."""
    rank = max(size // 2, 1) if given is None else given
    check_sizes(rank=rank)
    if rank > size:
        raise ValueError(f"rank must be at most {what} = {size}, got {rank}")
    return rank


def same_conv(
    x: Tensor,  # (batch, in, height, width)
    kernel: Tensor,  # (out, in, size, size), size odd
    bias: Tensor | None,
    padding_mode: str,
) -> Tensor:  # (batch, out, height, width)
    """A convolution that keeps the size of the image."""
    half = kernel.shape[-1] // 2
    if padding_mode == "circular":
        return nn.functional.conv2d(nn.functional.pad(x, (half, half, half, half), mode="circular"), kernel, bias)
    return nn.functional.conv2d(x, kernel, bias, padding=half)


def conv(kernel: Tensor, bias: Tensor | None, padding_mode: str) -> nn.Conv2d:
    """A plain `nn.Conv2d` that holds copies of the given numbers and keeps the size of the image."""
    out, into, size, _ = kernel.shape
    mode: Literal["zeros", "circular"] = "circular" if padding_mode == "circular" else "zeros"
    plain = nn.Conv2d(into, out, size, padding=size // 2, padding_mode=mode, bias=bias is not None, device=kernel.device, dtype=kernel.dtype)
    plain.weight.data.copy_(kernel.detach())
    if bias is not None and plain.bias is not None:
        plain.bias.data.copy_(bias.detach())
    return plain


def check_conv(kernel_size: int, stride: int, padding_mode: str) -> None:
    """Refuse kernels without a centre and paddings for which no bound holds."""
    check_sizes(kernel_size=kernel_size, stride=stride)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the padding is the same on both sides, got {kernel_size}")
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"padding_mode must be 'zeros' or 'circular', got {padding_mode!r}: reflected or replicated pixels count more than once, "
            "so the layer would not be 1-Lipschitz"
        )


def unshuffled(stride: int, *modules: nn.Module) -> nn.Module:
    """The modules behind a space-to-depth rearrangement, where there is a stride."""
    parts = (*((nn.PixelUnshuffle(stride),) if stride > 1 else ()), *modules)
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


class KernelLayer(Layer, abc.ABC):
    """A layer on images by explicit kernels, behind a space-to-depth rearrangement where there is a stride; one convolution unless a subclass says more."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding_mode: str) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        check_conv(kernel_size, stride, padding_mode)
        self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding_mode = in_channels, out_channels, kernel_size, stride, padding_mode
        self.bias: nn.Parameter | None

    def _rearranged(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, self.stride) if self.stride > 1 else x

    def _shown(self, **more: object) -> str:
        """What every such layer shows of itself, with more in between."""
        between = "".join(f"{name}={value}, " for name, value in more.items())
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
        return f"{sizes}{between}padding_mode={self.padding_mode}, bias={self.bias is not None}"


class OneKernelLayer(KernelLayer):
    """A `KernelLayer` that is one convolution."""

    @abc.abstractmethod
    def weight(self) -> Tensor:  # (out, in * stride^2, size, size)
        """The kernel, from the parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return same_conv(self._rearranged(x), self.weight(), self.bias, self.padding_mode)

    def frozen(self) -> nn.Module:
        return unshuffled(self.stride, conv(self.weight(), self.bias, self.padding_mode))
