"""Affine maps of one number or one number per channel (scale, input normalisation, centring), channels of zeros, and channels in another order or place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.fx
from torch import Tensor, nn

from lipnet.layers.base import Layer, check_sizes


class Scale(Layer):
    """`y = factor x`: factor-Lipschitz in every l_p. With it a 1-Lipschitz network gets any constant that is asked for."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"factor must be positive and finite, got {factor}")
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Normalize(Layer):
    """`(x - mean) / std`, per channel (dim 1): the preprocessing as the first layer, so that radii stay in the units of the input.

    Lipschitz with 1 / min(std) in every l_p. Shapes: (batch, channels, ...) -> the same; mean and std have one entry, or one per channel.
    """

    shift: Tensor
    divisor: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(std):
            raise ValueError(f"mean and std must have the same number of entries, got {len(mean)} and {len(std)}")
        if not all(math.isfinite(m) for m in mean) or not all(math.isfinite(s) and s > 0 for s in std):
            raise ValueError(f"mean must be finite and std positive, got mean={tuple(mean)}, std={tuple(std)}")
        self.mean, self.std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
        self.register_buffer("shift", torch.tensor(self.mean))
        self.register_buffer("divisor", torch.tensor(self.std))

    def forward(self, x: Tensor) -> Tensor:
        return ((x.movedim(1, -1) - self.shift) / self.divisor).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


class BatchCentering(Layer):
    """`x - mean + b` per channel (dim 1): the mean of the batch while training, its running mean in eval mode. A shift, so 1-Lipschitz in every l_p.

    Batch normalisation without the division, which has no useful constant. While training, the mean of a batch depends on all of its inputs: no bound is
    claimed there. Shapes: (batch, channels, ...) -> the same.
    """

    running_mean: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, bias: bool = True) -> None:
        super().__init__()
        check_sizes(channels=channels)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.channels, self.momentum = channels, float(momentum)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def shift(self) -> Tensor:  # (channels,)
        """What is added in eval mode."""
        return -self.running_mean if self.bias is None else self.bias - self.running_mean

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _shifted(x, self.shift())
        mean = x.movedim(1, 0).flatten(1).mean(1)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        return _shifted(x, -mean if self.bias is None else self.bias - mean)

    def frozen(self) -> nn.Module:
        return torch.fx.symbolic_trace(_Shift(self.shift().detach().clone()))

    def extra_repr(self) -> str:
        return f"{self.channels}, momentum={self.momentum}, bias={self.bias is not None}"


class LayerCentering2d(Layer):
    """Each channel of each image minus its mean over the pixels, plus b: a projection and a shift, 1-Lipschitz in l2.

    Shapes: (batch, channels, height, width) -> the same.
    """

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        check_sizes(channels=channels)
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((2, 3), keepdim=True)
        return centred if self.bias is None else centred + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.channels}, bias={self.bias is not None}"


class PadChannels(Layer):
    """Channels of zeros behind those that are there (dim 1): keeps every norm. With fewer channels out than in, the last ones are left out.

    Shapes: (batch, in_channels, ...) -> (batch, out_channels, ...).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)
        return nn.functional.pad(last, (0, self.out_channels - self.in_channels)).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"


class ReverseChannels(Layer):
    """The channels (dim 1) in the other order, RGB to BGR: keeps every norm. Shapes: (batch, channels, ...) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


class ChannelsLast(Layer):
    """Images for a network that takes their channels last: keeps every norm. Shapes: (batch, channels, height, width) -> (batch, height, width, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _Shift(nn.Module):
    """A shift per channel, stored; only ever traced."""

    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return _shifted(x, self.shift)


def _shifted(
    x: Tensor,  # (batch, channels, ...)
    shift: Tensor,  # (channels,)
) -> Tensor:
    return (x.movedim(1, -1) + shift).movedim(-1, 1)
