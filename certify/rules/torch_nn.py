"""Rules for torch's own modules."""

from __future__ import annotations

from torch import nn

from certify import slopes
from certify.bound import Array, Assumption, Bound
from certify.convolution import root_up
from certify.errors import Problem, Unsupported
from certify.registry import Shape, register, register_head, register_reason
from certify.spectral import as_float64, largest_singular_value


def linear_bound(weight: Array, method: str) -> Bound:
    """The spectral norm of a stored matrix."""
    return Bound(largest_singular_value(weight), f"{method}: spectral norm", assumptions=frozenset({Assumption.FLOAT64_LINALG}))


@register(nn.Linear)
def _(layer: nn.Linear, shape: Shape) -> Bound:
    if layer.weight.dim() != 2:
        raise Unsupported([Problem("", "Linear", f"holds a weight of shape {tuple(layer.weight.shape)}; two axes are needed")])
    return linear_bound(as_float64(layer.weight), "linear")


@register_head(nn.Linear)
def _(layer: nn.Linear) -> Array:
    return as_float64(layer.weight)


@register(*slopes.activations())
def _(module: nn.Module, shape: Shape) -> Bound:
    """The largest slope of an elementwise activation."""
    found = slopes.slopes(module)
    if found is None:
        raise Unsupported([Problem("", type(module).__name__, f"has no largest slope with {module.extra_repr()}; use other settings")])
    low, high = found
    return Bound(max(abs(low), abs(high)), f"{type(module).__name__}: slopes in [{low:g}, {high:g}]")


@register(nn.Flatten)
def _(module: nn.Flatten, shape: Shape) -> Bound:
    """A rearrangement of each input, as long as the batch stays apart."""
    if module.start_dim != 1:
        raise Unsupported([Problem("", "Flatten", f"start_dim={module.start_dim} may mix the inputs of a batch; use start_dim=1")])
    return Bound(1.0, "flatten: a rearrangement")


@register(nn.Unflatten)
def _(module: nn.Unflatten, shape: Shape) -> Bound:
    return Bound(1.0, "unflatten: a rearrangement")


@register(nn.Softmax, nn.Softmin, nn.Softmax2d)
def _(module: nn.Softmax | nn.Softmin | nn.Softmax2d, shape: Shape) -> Bound:
    """1/2, attained at two equal largest entries.

    Of outputs p the Jacobian is `diag(p) - pp'`, symmetric, and its rows have the sums of sizes `2 p_i (1 - p_i) <= 1/2`, so its eigenvalues are at most that.
    """
    _check_dim(module, shape, -3 if isinstance(module, nn.Softmax2d) else module.dim)
    return Bound(0.5, f"{type(module).__name__}: 1/2")


@register(nn.LogSoftmax)
def _(module: nn.LogSoftmax, shape: Shape) -> Bound:
    """`sqrt(n)` for n entries: the Jacobian `I - 1p'` is a projection, so its norm is that of `1p'`, which is `sqrt(n) |p| <= sqrt(n)`; 0 for one entry."""
    return Bound(root_up(_check_dim(module, shape, module.dim)), "LogSoftmax: root of its entries")


def _check_dim(module: nn.Module, shape: Shape, dim: int | None) -> int:
    """The size of a dimension. The batch, and the dimension that torch chooses, are refused."""
    if dim is None or dim % (len(shape) + 1) == 0:
        raise Unsupported([Problem("", type(module).__name__, f"acts along dim={dim}, which may mix the inputs of a batch; name another dimension")])
    return shape[dim % (len(shape) + 1) - 1]


@register(nn.Dropout)
def _(module: nn.Dropout, shape: Shape) -> Bound:
    return Bound(1.0, "dropout: the identity in eval mode")


register_reason(
    "torch switches Softplus to the identity above its threshold, which makes a jump of 2e-9, so no Lipschitz constant exists; use nn.ReLU or nn.Tanh",
    nn.Softplus,
)
register_reason(
    "attention multiplies signals by each other, so it is not Lipschitz on all inputs (Kim, Papamakarios, Mnih 2021); smoothing does without",
    nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer,
)  # fmt: skip
register_reason(
    "multiplies two signals (a gate), which is not Lipschitz on all inputs; smoothing does without",
    nn.GLU,
    nn.Bilinear,
    nn.LSTM,
    nn.GRU,
    nn.LSTMCell,
    nn.GRUCell,
)
register_reason("has a jump, so no Lipschitz constant exists; use Softshrink or ReLU", nn.Hardshrink, nn.Threshold)
register_reason("divides by powers of sums over channels, for which no rule is known; leave it out", nn.LocalResponseNorm)
