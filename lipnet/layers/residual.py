"""What the residual blocks with a linear matrix inequality share: `w_0 = x`, `w_i = s(C_i w_{i-1} + b_i)`, `y = A x + B w_n + b`."""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch.fx
from torch import Tensor, nn

from lipnet.layers.base import Layer, activation_of, check_sizes, linear


class BlockWeights(NamedTuple):
    """The matrices that a residual block runs, and the multipliers of its certificate."""

    skip: Tensor  # A, (out, in)
    branch: Tensor  # B, (out, hidden[-1])
    inner: tuple[Tensor, ...]  # C_1 .. C_n, (hidden[i], hidden[i-1])
    multipliers: tuple[Tensor, ...]  # lam_1 .. lam_n, (hidden[i],), positive


class ResidualBlock(Layer, abc.ABC):
    """`y = A x + B w_n + b` over n inner layers; a subclass says how its weights come from free parameters."""

    in_features: int
    out_features: int
    hidden: tuple[int, ...]
    activation: nn.Module
    lipschitz: float
    inner_bias: nn.ParameterList
    bias: nn.Parameter

    @abc.abstractmethod
    def weights(self) -> BlockWeights:
        """The weights from the free parameters, with `L^2 |dx|^2 - |dy|^2 >= 0` proved by the multipliers in exact arithmetic."""

    def _set_shape(self, in_features: int, out_features: int, hidden: Sequence[int], activation: nn.Module | None, lipschitz: float) -> list[int]:
        """Keep the arguments that all blocks share; returns the widths of w_0 .. w_n."""
        check_sizes(in_features=in_features, out_features=out_features, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        if not hidden:
            raise ValueError("hidden needs at least one width, got none; a block without inner layers is a linear layer")
        if not 0 < lipschitz < float("inf"):
            raise ValueError(f"lipschitz must be positive and finite, got {lipschitz}")
        self.in_features, self.out_features, self.hidden = in_features, out_features, tuple(hidden)
        self.activation = activation_of(activation)
        self.lipschitz = float(lipschitz)
        self.inner_bias = nn.ParameterList(torch.zeros(width) for width in hidden)
        self.bias = nn.Parameter(torch.zeros(out_features))
        return [in_features, *hidden]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weights())

    def frozen(self) -> nn.Module:
        return self.plain(self.weights())

    def run(self, x: Tensor, weights: BlockWeights) -> Tensor:  # (..., in) -> (..., out)
        """The block with these weights."""
        hidden = x
        for matrix, bias in zip(weights.inner, self.inner_bias, strict=True):
            hidden = self.activation(nn.functional.linear(hidden, matrix, bias))
        return nn.functional.linear(x, weights.skip) + nn.functional.linear(hidden, weights.branch, self.bias)

    def plain(self, weights: BlockWeights) -> nn.Module:
        """The block with these weights as plain torch modules."""
        steps = [part for matrix, bias in zip(weights.inner, self.inner_bias, strict=True) for part in (linear(matrix, bias), copy.deepcopy(self.activation))]
        return torch.fx.symbolic_trace(_SkipAndBranch(linear(weights.skip), nn.Sequential(*steps, linear(weights.branch, self.bias))))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, hidden={self.hidden}, lipschitz={self.lipschitz}"


class _SkipAndBranch(nn.Module):
    """`skip(x) + branch(x)`; only ever traced."""

    def __init__(self, skip: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.skip, self.branch = skip, branch

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)
