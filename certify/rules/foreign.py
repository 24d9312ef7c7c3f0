"""Rules for layers of deel-torchlip 1.0.5 and orthogonium 0.0.4, by the names of their classes; neither package is imported.

Layers that are torch's own with another weight (SpectralLinear, OrthoLinear, AdaptiveOrthoConv2d, AOLConv2D, ...) override nothing and get torch's rule, for
the weight that their forward reads. The others are here. A forward was read in one release, so its rule holds for that release and refuses the others.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from certify.bound import Assumption, Bound
from certify.convolution import convolution_bound
from certify.errors import Problem, Unsupported
from certify.registry import Rule, Shape, register_name, rule_of
from certify.rounding import multiply_up, up
from certify.rules.residual import slope_restricted
from certify.spectral import as_float64, largest_singular_value

_PROVED = frozenset({Assumption.FLOAT64_LINALG})
_SQRT_2 = 1.4142135623730951  # the float64 that orthogonium divides by


def _refuse(layer: nn.Module, why: str) -> NoReturn:
    raise Unsupported([Problem("", type(layer).__name__, why)])


def _register(package: str, version: str, names: Sequence[str]) -> Callable[[Rule], Rule]:
    """Register a rule for the classes of these names in one release of a package."""

    def decorator(rule: Rule) -> Rule:
        @functools.wraps(rule)
        def checked(layer: Any, shape: Shape) -> Bound:
            try:
                found = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found = "an unknown release"
            if found != version:
                _refuse(layer, f"its rule is for {package} {version}, and {found} is installed; install that release, or register a rule for this one")
            return rule(layer, shape)

        register_name(*names)(checked)
        return rule

    return decorator


def _torchlip(*names: str) -> Callable[[Rule], Rule]:
    return _register("deel-torchlip", "1.0.5", [f"deel.torchlip.modules.{name}" for name in names])


def _orthogonium(*names: str) -> Callable[[Rule], Rule]:
    return _register("orthogonium", "0.0.4", [f"orthogonium.layers.{name}" for name in names])


def _torch_bound(kind: type[nn.Module], layer: nn.Module, shape: Shape) -> Bound:
    """What is known of torch's own module, of which the layer calls the forward."""
    rule = rule_of(kind)
    if rule is None:
        raise AssertionError(f"{kind.__name__} has no rule; please report this")
    return rule(layer, shape)


def _coefficient(layer: Any) -> float:
    """The number that a forward of torchlip multiplies its output by; `Sequential(..., k_coef_lip=...)` sets it anew in the layers that it is given."""
    value = layer._coefficient_lip
    if not (isinstance(value, int | float) and math.isfinite(value)):
        _refuse(layer, f"has the coefficient {value!r}; a finite Python number is needed")
    return float(value)


def _check_fits(layer: nn.Module, shape: Shape, *sizes: Sequence[int]) -> None:
    """Refuse tensors that repeat the signal to fit them: each repetition would count in the norm."""
    for size in sizes:
        if torch.broadcast_shapes((1, *shape), tuple(size)) != (1, *shape):
            _refuse(layer, f"combines a signal of shape {shape} with numbers of shape {tuple(size)[1:]}, which repeats the signal; give it its channels")


def _channels(shape: Shape, tensor: torch.Tensor | None) -> tuple[int, ...]:
    """The shape in which torchlip adds a tensor with one entry for each channel."""
    return (1, 1 if tensor is None else tensor.numel(), *(1 for _ in shape[1:]))


def _check_image(layer: nn.Module, shape: Shape) -> None:
    if len(shape) != 3:
        _refuse(layer, f"takes one input of shape (channels, height, width), got {shape}")


# Activations


@_torchlip("activation.MaxMin")
def _(layer: Any, shape: Shape) -> Bound:
    """`k (relu(x), relu(-x))`: |k|.

    `|relu(a) - relu(b)|^2 + |relu(-a) - relu(-b)|^2` is `(a - b)^2` where a and b have one sign, and `a^2 + b^2 <= (a - b)^2` where they do not.
    """
    return Bound(abs(_coefficient(layer)), "torchlip MaxMin: positive and negative parts, times k")


@_torchlip("activation.GroupSort")
def _(layer: Any, shape: Shape) -> Bound:
    """`k sort(x)`, in groups of channels: |k|, as sorting is 1-Lipschitz. Also GroupSort2 and FullSort."""
    return Bound(abs(_coefficient(layer)), "torchlip GroupSort: sorts, times k")


@_torchlip("activation.LPReLU")
def _(layer: Any, shape: Shape) -> Bound:
    """x for x > 0 and `clamp(weight, -k, k) x` for x < 0: slopes 1 and those. At least 1, whatever k."""
    k = _coefficient(layer)
    return Bound(max(1.0, float(np.abs(as_float64(torch.clamp(layer.weight, -k, k))).max())), "torchlip LPReLU: largest slope")


def _check_pairs(layer: nn.Module, shape: Shape, axis: int, theta: Sequence[int] | None = None) -> None:
    """Refuse an activation of the two halves of an axis that is the batch, or whose angles repeat the signal."""
    axis %= len(shape) + 1
    if axis == 0:
        _refuse(layer, "splits the batch in halves; use axis=1")
    half = tuple(size // 2 if i + 1 == axis else size for i, size in enumerate(shape))
    if theta is not None:
        _check_fits(layer, half, theta)


@_torchlip("activation.HouseHolder")
def _(layer: Any, shape: Shape) -> Bound:
    """Each pair z of the halves stays on one side of the line at the angle theta / 2, and is reflected at it on the other: 1.

    Both are isometries and agree on the line. The coefficient k is not used by the forward.
    """
    _check_pairs(layer, shape, 1, _channels(shape, layer.theta))
    return Bound(1.0, "torchlip HouseHolder: reflects beyond a line")


@_orthogonium("custom_activations.HouseHolder")
def _(layer: Any, shape: Shape) -> Bound:
    """The same, divided by sqrt(2): 0.7072."""
    _check_pairs(layer, shape, layer.axis, layer.theta.shape)
    return Bound(up(1 / _SQRT_2), "orthogonium HouseHolder: reflects beyond a line, divided by sqrt(2)")


@_orthogonium("custom_activations.HouseHolder_Order_2")
def _(layer: Any, shape: Shape) -> Bound:
    """Sectors of the plane by atan2. Where the angle rounds to 2 pi none is selected: (1, -1e-9) goes to 0 and (1, 0) to (0.7, 0)."""
    _refuse(layer, "selects no sector where its angle rounds to 2 pi, and returns 0 there: a jump, so no Lipschitz constant exists; use HouseHolder or MaxMin")


@_orthogonium("custom_activations.MaxMin")
def _(layer: Any, shape: Shape) -> Bound:
    """Maximum and minimum of the two halves of an axis: each pair is sorted."""
    _check_pairs(layer, shape, layer.axis)
    return Bound(1.0, "orthogonium MaxMin: sorts")


@_orthogonium("custom_activations.Abs")
def _(layer: Any, shape: Shape) -> Bound:
    return Bound(1.0, "absolute value")


@_orthogonium("custom_activations.SoftHuber")
def _(layer: Any, shape: Shape) -> Bound:
    """`d (sqrt(1 + (z / d)^2) - 1)` has the slope `(z / d) / sqrt(1 + (z / d)^2)`, in (-1, 1)."""
    if not (math.isfinite(layer.delta) and layer.delta != 0):
        _refuse(layer, f"has delta={layer.delta!r}, which must be finite and not 0")
    return Bound(1.0, "orthogonium SoftHuber: slopes in (-1, 1)")


# Convolutions


@_torchlip("unconstrained.PadConv1d", "unconstrained.PadConv2d", "conv.SpectralConv1d", "conv.SpectralConv2d", "conv.FrobeniusConv2d")
def _(layer: Any, shape: Shape) -> Bound:
    """torch's convolution of `pad(x)`, where pad is the identity in all modes but symmetric ones: torch's rule."""
    marker = torch.empty(0)
    if isinstance(layer.pad, nn.Module) or layer.pad(marker) is not marker:
        _refuse(layer, "symmetric padding shows pixels of the border more than once, so the norm of the kernel is no bound; use padding_mode='zeros'")
    return _torch_bound(nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d, layer, shape)


# Pools


@_torchlip("pooling.ScaledAvgPool2d")
def _(layer: Any, shape: Shape) -> Bound:
    """torch's average pool, times k and the root of the size of a window: their product. Above k with ceil_mode or divisor_override."""
    pool = _torch_bound(nn.AvgPool2d, layer, shape)
    scale = abs(_coefficient(layer) * float(layer.scalingFactor))
    return Bound(multiply_up(scale, pool.value), f"torchlip ScaledAvgPool2d: {scale:g} times {pool.method}", assumptions=pool.assumptions)


@_torchlip("pooling.ScaledAdaptiveAvgPool2d")
def _(layer: Any, shape: Shape) -> Bound:
    """torch's adaptive average pool, times `k sqrt(height width)` of the input: their product."""
    pool = _torch_bound(nn.AdaptiveAvgPool2d, layer, shape)
    scale = abs(math.sqrt(shape[-2] * shape[-1]) * _coefficient(layer))
    return Bound(multiply_up(scale, pool.value), f"torchlip ScaledAdaptiveAvgPool2d: {scale:g} times {pool.method}", assumptions=pool.assumptions)


@_torchlip("pooling.ScaledL2NormPool2d")
def _(layer: Any, shape: Shape) -> Bound:
    """`k sqrt(taps mean(x^2))` over windows: `|k| sqrt(taps / entries)` for the window with the fewest entries, if no two overlap.

    With ceil_mode a window at the border holds fewer entries than the kernel has taps, and the mean is over those.
    """
    _check_image(layer, shape)
    kernel, stride = ((sizes, sizes) if isinstance(sizes, int) else tuple(sizes) for sizes in (layer.kernel_size, layer.stride or layer.kernel_size))
    if layer.norm_type != 2 or any(step < taps for taps, step in zip(kernel, stride, strict=True)):
        _refuse(layer, f"is known for the l2 norm of windows that do not overlap, got norm_type={layer.norm_type}, kernel_size={kernel}, stride={stride}")
    entries = 1
    for n, taps, step in zip(shape[1:], kernel, stride, strict=True):
        ones = torch.ones(1, 1, n, 1, dtype=torch.float64)
        entries *= int(functional.avg_pool2d(ones, (taps, 1), (step, 1), 0, layer.ceil_mode, True, 1).min())
    taps = math.prod(kernel)
    repeated = 1.0 if entries == taps else up(up(math.sqrt(taps / entries)))
    return Bound(multiply_up(abs(_coefficient(layer)), repeated), f"torchlip ScaledL2NormPool2d: windows of {entries} to {taps} entries")


@_torchlip("pooling.ScaledAdaptativeL2NormPool2d")
def _(layer: Any, shape: Shape) -> Bound:
    """`k |x|` of each channel: |k|."""
    _check_image(layer, shape)
    return Bound(abs(_coefficient(layer)), "torchlip ScaledAdaptativeL2NormPool2d: l2 norms, times k")


# Centring and rearrangements


@_torchlip("normalization.LayerCentering")
def _(layer: Any, shape: Shape) -> Bound:
    """`x - mean(x) + bias`, the mean over dimensions of one input: an orthogonal projection."""
    dims = [layer.dim] if isinstance(layer.dim, int) else list(layer.dim or ())
    if not dims or any(dim % (len(shape) + 1) == 0 for dim in dims):
        _refuse(layer, f"takes the mean over dim={layer.dim}, which for inputs of shape {shape} mixes the batch; name the dimensions of one input")
    _check_fits(layer, shape, _channels(shape, layer.bias))
    return Bound(1.0, "torchlip LayerCentering: a projection")


@_orthogonium("normalization.LayerCentering2D")
def _(layer: Any, shape: Shape) -> Bound:
    """`x - mean(x) + bias`, the mean over the last two dimensions: an orthogonal projection."""
    _check_image(layer, shape)
    _check_fits(layer, shape, layer.bias.shape)
    return Bound(1.0, "orthogonium LayerCentering2D: a projection")


@_orthogonium("normalization.BatchCentering2D")
def _(layer: Any, shape: Shape) -> Bound:
    """`x - running mean + bias` in eval mode: a shift."""
    _check_fits(layer, shape, layer.running_mean.shape, layer.bias.shape)
    return Bound(1.0, "orthogonium BatchCentering2D: a shift in eval mode")


@_torchlip("normalization.BatchLipNorm")
def _(layer: Any, shape: Shape) -> Bound:
    """`(x - mean) scale + bias` in eval mode, one scale for all channels from the running sums; a shift with `normalize=False`. Also BatchCentering.

    The larger of the scale that the layer computes and the exact one: its variance is a difference in which digits cancel. The first forward in eval mode
    after training makes sums of several batches into one, with another number of samples; tracing has run it.
    """
    _check_fits(layer, shape, _channels(shape, layer.bias), _channels(shape, layer.running_sum_bmean))
    if layer.normalize and int(layer.running_num_batches) > 1:
        _refuse(layer, "has sums of several batches, which its next forward in eval mode changes; run it once in eval mode")
    computed = float(layer.get_scaling(training=False))
    if not math.isfinite(computed):
        _refuse(layer, f"computes the scale {computed} from its running statistics; train it first")
    scale = max(abs(computed), _exact_scale(layer))
    return Bound(scale, "torchlip BatchLipNorm: 1 / largest standard deviation" if layer.normalize else "torchlip BatchCentering: a shift in eval mode")


def _exact_scale(layer: Any) -> float:
    """`1 / sqrt(max v)` rounded up, v the variance of each channel, or 1 where that is below eps."""
    batches = int(layer.running_num_batches)
    if not layer.normalize or batches == 0:
        return 1.0
    samples = Fraction(float(layer.total_num_samples)) or Fraction(float(layer.running_mean_sample_per_batches))
    if samples <= 1:
        _refuse(layer, "has statistics of one sample, which have no variance; train it first")
    sums = zip(as_float64(layer.running_sum_bmean).tolist(), as_float64(layer.running_sum_bmeansq).tolist(), strict=True)
    variances = [(Fraction(square) / batches - (Fraction(mean) / batches) ** 2) * samples / (samples - 1) for mean, square in sums]
    largest = max(v if v >= Fraction(layer.eps) else Fraction(1) for v in variances)
    return 1.0 if largest == 1 else up(up(up(1 / math.sqrt(largest))))


@_orthogonium("channel_shuffle.ChannelShuffle")
def _(layer: Any, shape: Shape) -> Bound:
    """Every group_out-th channel from 0, then from 1, and so on: a permutation."""
    if layer.group_out < 1:
        _refuse(layer, f"has group_out={layer.group_out}, which must be positive")
    return Bound(1.0, "orthogonium ChannelShuffle: a permutation")


# Residual layers


def _potential(layer: nn.Module, norm: float, how: str) -> Bound:
    """`x - 2 M' s(M x + b)` with slopes of s in [0, 1] has Jacobians `I - 2 M'JM`, with eigenvalues in `[1 - 2 |M|^2, 1]`."""
    name = type(layer).__name__.removeprefix("Parametrized")
    return Bound(max(1.0, up(multiply_up(2.0, multiply_up(norm, norm)) - 1)), f"{name}: max(1, 2 |M|^2 - 1), M the {how}", assumptions=_PROVED)


@_orthogonium("conv.SLL.sll_layer.SDPBasedLipschitzResBlock")
def _(layer: Any, shape: Shape) -> Bound:
    """`x - 2 K' s(K x + b)`, K a convolution with zero padding and K' its transpose at the same size."""
    _check_image(layer, shape)
    slope_restricted(layer.activation)
    norm, how = convolution_bound(as_float64(layer.kernel), (shape[1], shape[2]), padding=layer.padding, groups=layer.groups)
    return _potential(layer, norm, how)


@_orthogonium("conv.SLL.sll_layer.AOCLipschitzResBlock")
def _(layer: Any, shape: Shape) -> Bound:
    """`x - 2 K' s(K x + b)`, K a convolution without padding, whatever the block was asked for; dilation is not used by the forward."""
    _check_image(layer, shape)
    slope_restricted(layer.activation)
    if layer.padding_mode == "circular" and layer.padding != 0:
        _refuse(layer, f"has circular padding {layer.padding} on both of its convolutions, of which the second is then not the transpose of the first")
    norm, how = convolution_bound(as_float64(layer.in_conv.weight), (shape[1], shape[2]), groups=layer.groups)
    return _potential(layer, norm, how)


@_orthogonium("conv.SLL.sll_layer.SDPBasedLipschitzDense")
def _(layer: Any, shape: Shape) -> Bound:
    """`x - 2 W' T s(W x + b)` with a diagonal T >= 0: `M = T^1/2 W`. The larger of T as the layer computes it, and in float64."""
    slope_restricted(layer.activation)
    steps = np.maximum(as_float64(layer.compute_t()), as_float64(copy.deepcopy(layer).double().compute_t()))
    if not (np.isfinite(steps).all() and (steps >= 0).all()):
        _refuse(layer, "has steps T that are not finite; load other weights")
    norm = largest_singular_value(np.sqrt(steps)[:, None] * as_float64(layer.weight), relative_error=2.0**-51)
    return _potential(layer, norm, "weight times the root of its steps")


@_torchlip("residual.LipResidual")
def _(layer: Any, shape: Shape) -> Bound:
    """`sigmoid(alpha) x + (1 - sigmoid(alpha)) y`, of two inputs."""
    _refuse(layer, "adds two inputs; write a * x + (1 - a) * f(x) with a Python number a into the forward of a module")


@_orthogonium("residual.AdditiveResidual", "residual.PrescaledAdditiveResidual")
def _(layer: Any, shape: Shape) -> Bound:
    """`a x + (1 - a) f(x)` with `a = sigmoid(alpha)`, and `(x + f(alpha x)) / (1 + |alpha|)`."""
    _refuse(layer, "weighs its branches by a parameter; write a * x + (1 - a) * f(x) with a Python number a into the forward of a module")
