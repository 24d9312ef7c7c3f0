"""The functions of torch that are modules, with the numbers that they were called with: `F.max_pool2d(x, 3)` is `nn.MaxPool2d(3)` of x.

So one rule serves both, and every method that sees through modules sees through functions. Each maker takes what the function takes after its first argument,
by torch's names and in torch's order; what it does not take is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import lipnet
from certify.errors import Problem, Unsupported

Maker = Callable[..., nn.Module]
_M = TypeVar("_M", bound=Maker)

_makers: dict[Any, Maker] = {}  # by function, and by name of a tensor method
_aten: dict[str, Maker] = {}  # by name of an operator of an exported network
PLACE = {"addmm": 1}  # of the signal among the arguments, where it is not the first


def module_for(target: Any, arguments: Sequence[Any], options: dict[str, Any]) -> nn.Module | None:
    """The module that a function or a tensor method is, when it is called with these other arguments; None where it is none. Raises Unsupported."""
    return _made(_makers.get(target), target, arguments, options)


def module_for_exported(target: Any, arguments: Sequence[Any], options: dict[str, Any]) -> nn.Module | None:
    """The same for an operator of an exported network, by its name without the overload."""
    return _made(_aten.get(target), target, arguments, options)


def _made(maker: Maker | None, target: Any, arguments: Sequence[Any], options: dict[str, Any]) -> nn.Module | None:
    if maker is None:
        return None
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    try:
        return maker(*arguments, **options).eval()
    except Unsupported:
        raise
    except Exception as error:  # of many kinds: arguments that the maker does not take, or that torch's constructor refuses
        raise Unsupported([Problem("", name, f"is called in a way that no rule is known for ({(str(error).splitlines() or [''])[0]})")]) from None


def _function(*names: str, homes: Sequence[Any] = (functional,), method: bool = False, exported: bool = True) -> Callable[[_M], _M]:
    """Decorator: the function makes the module of the functions of these names."""

    def decorator(maker: _M) -> _M:
        for name in names:
            _makers.update({getattr(home, name): maker for home in homes if hasattr(home, name)})
            if method:
                _makers[name] = maker
            if exported:
                _aten[name] = maker
        return maker

    return decorator


def _operator(*names: str) -> Callable[[_M], _M]:
    """Decorator: the function makes the module of the exported operators of these names."""
    return _function(*names, homes=(), exported=True)


def _refuse(name: str, why: str) -> NoReturn:
    raise Unsupported([Problem("", name, why)])


def piece(x: Tensor, name: str, index: int, *arguments: Any, **options: Any) -> Tensor:
    """One of the tensors that a splitting method makes: `piece(x, "chunk", 0, 2, dim=1)` is `x.chunk(2, dim=1)[0]`."""
    return getattr(x, name)(*arguments, **options)[index]


SPLITTING = ("split", "split_with_sizes", "chunk", "tensor_split", "unbind")  # methods of tensors, and functions of torch


# Elementwise


@_function("relu")
def _relu(inplace: bool = False) -> nn.Module:
    return nn.ReLU(inplace)


@_function("relu6")
def _relu6(inplace: bool = False) -> nn.Module:
    return nn.ReLU6(inplace)


@_operator("abs")
def _abs() -> nn.Module:
    return lipnet.Abs()


@_operator("tanh")
def _tanh() -> nn.Module:
    return nn.Tanh()


@_operator("sigmoid")
def _sigmoid() -> nn.Module:
    return nn.Sigmoid()


@_function("hardtanh")
def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> nn.Module:
    return nn.ReLU6(inplace) if (min_val, max_val) == (0, 6) else nn.Hardtanh(min_val, max_val, inplace)


@_function("clamp", "clip", homes=(torch,), method=True)
def _clamp(min: float | None = None, max: float | None = None) -> nn.Module:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    if not all(isinstance(end, int | float) for end in (low, high)) or not low < high:
        _refuse("clamp", f"to [{low}, {high}] is not supported; two numbers are needed, the first smaller")
    return nn.ReLU() if (low, high) == (0, math.inf) else _hardtanh(float(low), float(high))


@_function("clamp_min", homes=(torch,), method=True)
def _clamp_min(min: float) -> nn.Module:
    return _clamp(min)


@_function("clamp_max", homes=(torch,), method=True)
def _clamp_max(max: float) -> nn.Module:
    return _clamp(None, max)


@_function("leaky_relu")
def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace)


@_function("prelu", homes=(functional, torch), method=True)
def _prelu(weight: Tensor) -> nn.Module:
    layer = nn.PReLU(weight.numel(), device="meta")
    layer.weight = nn.Parameter(weight.detach().reshape(-1))
    return layer


@_function("elu", exported=False)
def _elu(alpha: float = 1.0, inplace: bool = False) -> nn.Module:
    return nn.ELU(alpha, inplace)


@_operator("elu")
def _exported_elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> nn.Module:
    if (scale, input_scale) == (1, 1):
        return nn.ELU(alpha)
    if input_scale == 1 and (alpha, scale) == (1.6732632423543772848170429916717, 1.0507009873554804934193349852946):
        return nn.SELU()
    if scale == 1 and input_scale * alpha == 1:
        return nn.CELU(alpha)
    _refuse("elu", f"with alpha={alpha}, scale={scale} and input_scale={input_scale} is not supported")


@_function("celu")
def _celu(alpha: float = 1.0, inplace: bool = False) -> nn.Module:
    return nn.CELU(alpha, inplace)


@_function("selu")
def _selu(inplace: bool = False) -> nn.Module:
    return nn.SELU(inplace)


@_function("gelu")
def _gelu(approximate: str = "none") -> nn.Module:
    return nn.GELU(approximate)


@_function("silu")
def _silu(inplace: bool = False) -> nn.Module:
    return nn.SiLU(inplace)


@_function("mish")
def _mish(inplace: bool = False) -> nn.Module:
    return nn.Mish(inplace)


@_function("hardswish")
def _hardswish(inplace: bool = False) -> nn.Module:
    return nn.Hardswish(inplace)


@_function("hardsigmoid")
def _hardsigmoid(inplace: bool = False) -> nn.Module:
    return nn.Hardsigmoid(inplace)


@_function("logsigmoid", exported=False)
@_operator("log_sigmoid")
def _logsigmoid() -> nn.Module:
    return nn.LogSigmoid()


@_function("softsign")
def _softsign() -> nn.Module:
    return nn.Softsign()


@_function("softshrink")
def _softshrink(lambd: float = 0.5) -> nn.Module:
    return nn.Softshrink(lambd)


@_function("tanhshrink")
def _tanhshrink() -> nn.Module:
    return nn.Tanhshrink()


@_function("rrelu", exported=False)
def _rrelu(lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False, inplace: bool = False) -> nn.Module:
    _check_eval("rrelu", training)
    return nn.RReLU(lower, upper, inplace)


def _check_eval(name: str, training: bool) -> None:
    if training:
        _refuse(name, "is called in training mode, where its outputs are random; pass training=self.training")


@_function("dropout", "dropout1d", "dropout2d", "dropout3d", exported=False)
def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    _check_eval("dropout", training)
    return nn.Identity()


@_function("alpha_dropout", "feature_alpha_dropout", exported=False)
def _alpha_dropout(p: float = 0.5, training: bool = False, inplace: bool = False) -> nn.Module:
    return _dropout(p, training)


@_operator("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
def _exported_dropout(p: float, train: bool) -> nn.Module:
    return _dropout(p, train)


# Linear


def _with_numbers(layer: Any, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """A layer, made without storage, with these numbers."""
    layer.weight = None if weight is None else nn.Parameter(weight.detach())
    layer.bias = None if bias is None else nn.Parameter(bias.detach())
    return layer


@_function("linear")
def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    if weight.dim() != 2:
        _refuse("linear", f"with a weight of shape {tuple(weight.shape)} is not supported; two axes are needed")
    return _with_numbers(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), weight, bias)


@_function("matmul", "mm", homes=(torch, operator), method=True)
def _matmul(other: Tensor) -> nn.Module:
    if other.dim() != 2:
        _refuse("matmul", f"with a constant of shape {tuple(other.shape)} is not supported; two axes are needed")
    return _linear(other.T)


@_operator("addmm")
def _addmm(bias: Tensor, other: Tensor) -> nn.Module:
    if bias.shape != (other.shape[1],):
        _refuse("addmm", f"with an offset of shape {tuple(bias.shape)} is not supported")
    return _linear(other.T, bias)


def _convolution(
    dimensions: int, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> nn.Module:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    into, taps = weight.shape[1] * groups, tuple(weight.shape[2:])
    return _with_numbers(kind(into, len(weight), taps, _each(stride), _each(padding), _each(dilation), groups, device="meta"), weight, bias)


def _transposed(
    dimensions: int, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1
) -> nn.Module:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    out, taps = weight.shape[1] * groups, tuple(weight.shape[2:])
    layer = kind(len(weight), out, taps, _each(stride), _each(padding), _each(output_padding), groups, True, _each(dilation), device="meta")
    return _with_numbers(layer, weight, bias)


def _each(sizes: Any) -> Any:
    """Sizes as torch's constructors take them."""
    if not isinstance(sizes, list | tuple):
        return sizes
    return tuple(sizes) if len(sizes) > 1 else sizes[0]


def _of_dimensions(name: str, make: Callable[..., nn.Module], homes: Sequence[Any] = (functional,)) -> None:
    """A function in one, two and three dimensions."""
    for dimensions in (1, 2, 3):

        @_function(f"{name}{dimensions}d", homes=homes)
        def _(*arguments: Any, dimensions: int = dimensions, **options: Any) -> nn.Module:
            return make(dimensions, *arguments, **options)


_of_dimensions("conv", _convolution)
_of_dimensions("conv_transpose", _transposed)


@_operator("convolution")
def _exported_convolution(
    weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int
) -> nn.Module:
    dimensions = weight.dim() - 2
    if transposed:
        return _transposed(dimensions, weight, bias, stride, padding, output_padding, groups, dilation)
    return _convolution(dimensions, weight, bias, stride, padding, dilation, groups)


# Normalisation


@_function("batch_norm", exported=False)
def _batch_norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> nn.Module:
    if training or running_mean is None or running_var is None:
        _refuse("batch_norm", "normalises by the statistics of the batch; it needs running statistics and training=False")
    layer = BatchNorm(len(running_mean), eps=eps, device="meta")
    layer.running_mean, layer.running_var, layer.num_batches_tracked = running_mean.detach(), running_var.detach(), torch.tensor(0)
    return _with_numbers(layer, weight, bias)


class BatchNorm(nn.BatchNorm2d):
    """As the function is: for images, and for signals with fewer or more axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@_operator("batch_norm")
def _exported_batch_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool, momentum: float, eps: float, cudnn: bool = True
) -> nn.Module:
    return _batch_norm(mean, var, weight, bias, training, momentum, eps)


@_operator("_native_batch_norm_legit_no_training")
def _native_batch_norm(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float) -> nn.Module:
    return _batch_norm(mean, var, weight, bias, False, momentum, eps)


@_function("layer_norm")
@_operator("native_layer_norm")
def _layer_norm(normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, cudnn: bool = True) -> nn.Module:
    return _with_numbers(nn.LayerNorm(tuple(normalized_shape), eps, device="meta"), weight, bias)


@_function("rms_norm")
def _rms_norm(normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> nn.Module:
    layer = nn.RMSNorm(tuple(normalized_shape), eps, device="meta")
    layer.weight = None if weight is None else nn.Parameter(weight.detach())  # type: ignore[assignment]
    return layer


@_function("group_norm")
def _group_norm(num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, cudnn: bool = True) -> nn.Module:
    channels = next((len(tensor) for tensor in (weight, bias) if tensor is not None), num_groups)
    return _with_numbers(nn.GroupNorm(num_groups, channels, eps, device="meta"), weight, bias)


@_function("softmax", homes=(functional, torch), method=True)
def _softmax(dim: int, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> nn.Module:
    return nn.Softmax(_no_type(dim, dtype))


@_function("log_softmax", homes=(functional, torch), method=True)
def _log_softmax(dim: int, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> nn.Module:
    return nn.LogSoftmax(_no_type(dim, dtype))


@_operator("_softmax")
def _exported_softmax(dim: int, half_to_float: bool) -> nn.Module:
    return nn.Softmax(dim)


@_operator("_log_softmax")
def _exported_log_softmax(dim: int, half_to_float: bool) -> nn.Module:
    return nn.LogSoftmax(dim)


def _no_type(dim: int, dtype: torch.dtype | None) -> int:
    if dtype is not None:
        _refuse("softmax", f"with dtype={dtype} is not supported; leave it out")
    return dim


# Pools, borders and rearrangements


def _max_pool(
    dimensions: int, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False
) -> nn.Module:
    kind: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dimensions - 1]
    return kind(_each(kernel_size), _each(stride or None), _each(padding), _each(dilation), return_indices, ceil_mode)


def _avg_pool(
    dimensions: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> nn.Module:
    if dimensions == 1:
        return nn.AvgPool1d(_each(kernel_size), _each(stride or None), _each(padding), ceil_mode, count_include_pad)
    kind: Any = (nn.AvgPool2d, nn.AvgPool3d)[dimensions - 2]
    return kind(_each(kernel_size), _each(stride or None), _each(padding), ceil_mode, count_include_pad, divisor_override)


def _adaptive_avg_pool(dimensions: int, output_size: Any) -> nn.Module:
    kind: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1]
    return kind(_each(output_size))


def _adaptive_max_pool(dimensions: int, output_size: Any, return_indices: bool = False) -> nn.Module:
    kind: Any = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[dimensions - 1]
    return kind(_each(output_size), return_indices)


_of_dimensions("max_pool", _max_pool, (functional, torch))
_of_dimensions("avg_pool", _avg_pool)
_of_dimensions("adaptive_avg_pool", _adaptive_avg_pool)
_of_dimensions("adaptive_max_pool", _adaptive_max_pool)


@_operator("max_pool2d_with_indices")
def _max_pool_with_indices(*arguments: Any, **options: Any) -> nn.Module:
    return _max_pool(2, *arguments, **options)


_PADS: dict[str, tuple[Callable[..., nn.Module], ...]] = {
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
}


@_function("pad")
def _pad(pad: Sequence[int], mode: str = "constant", value: float | None = None) -> nn.Module:
    dimensions = len(pad) // 2
    sides: Any = tuple(int(size) for size in pad)
    if mode not in _PADS or dimensions not in (1, 2, 3) or len(pad) % 2:
        _refuse("pad", f"with mode={mode!r} and pad={list(pad)} is not supported")
    if mode != "constant":
        return _PADS[mode][dimensions - 1](sides)
    return nn.ZeroPad2d(sides) if dimensions == 2 and not value else _PADS[mode][dimensions - 1](sides, value or 0.0)


@_operator("constant_pad_nd")
def _constant_pad(pad: Sequence[int], value: float = 0.0) -> nn.Module:
    return _pad(pad, value=value)


@_function("pixel_shuffle", homes=(functional, torch))
def _pixel_shuffle(upscale_factor: int) -> nn.Module:
    return nn.PixelShuffle(upscale_factor)


@_function("pixel_unshuffle", homes=(functional, torch))
def _pixel_unshuffle(downscale_factor: int) -> nn.Module:
    return nn.PixelUnshuffle(downscale_factor)


@_function("interpolate", exported=False)
def _interpolate(size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None, **others: Any) -> nn.Module:
    if any(others.values()):
        _refuse("interpolate", f"with {sorted(others)} is not supported")
    return nn.Upsample(size, scale_factor, mode, align_corners)


@_operator("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def _upsample_nearest(output_size: Sequence[int] | None, scale_factors: Sequence[float] | None) -> nn.Module:
    return nn.Upsample(tuple(output_size), mode="nearest") if output_size else nn.Upsample(scale_factor=tuple(scale_factors or ()), mode="nearest")
