"""The operations of aten that are affine, or become affine steps and gates of ReLU. Any other is refused by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from certify.local.program import Number, Ref, Refused, Transposed, _Builder, register
from sdp.activation import GELU, SIGMOID, SILU, TANH

_A = torch.ops.aten
Signal = Ref | Tensor | Number
_COLUMNS = 2**19  # numbers, of the windows of all rows that go through a convolution at once


def _pointed(x: Signal, builder: _Builder) -> None:
    if not isinstance(x, Ref):
        raise Refused("takes a signal where a stored number is expected, or the other way round")


# --- rearrangements -------------------------------------------------------------------------------------------------------------------------------


def _rearranged(target: Any, *also: Any) -> None:
    """An operation, and others that do the same, that moves entries, some of them perhaps to several places: `terms` counts those, for its gradient."""

    def function(builder: _Builder, x: Ref, *args: Any, **options: Any) -> Ref:
        _pointed(x, builder)
        return _moved(builder, x, lambda value: target(value, *args, **options))

    register(target, *also)(function)


def _moved(builder: _Builder, x: Ref, move: Callable[[Tensor], Tensor], terms: int | None = None) -> Ref:
    """A signal whose entries are moved, some of them perhaps to several places, or to none."""
    count = math.prod(x.shape)
    source = move(torch.arange(count, dtype=torch.float64).reshape(x.shape)).flatten().long()  # by place: which entry it has
    same, places = torch.arange(count), source.argsort()
    permuted = torch.equal(source[places], same)

    def transposed(rows: Tensor, absolute: bool) -> list[Tensor]:
        return [rows.index_select(1, places) if permuted else rows.new_zeros(len(rows), count).index_add_(1, source, rows)]

    copies = -(-len(source) // max(1, count)) if terms is None else terms
    return builder.affine([x], move, terms=copies, transposed=_unchanged if torch.equal(source, same) else transposed)


def _unchanged(rows: Tensor, absolute: bool) -> list[Tensor]:
    return [rows]


_rearranged(_A.reshape.default, _A.view.default, _A._unsafe_view.default)  # what makes a signal contiguous is no step here, so that a view may need a copy
for _target in (
    _A.permute.default, _A.transpose.int, _A.t.default, _A.unsqueeze.default, _A.squeeze.dim,
    _A.squeeze.dims, _A.squeeze.default, _A.flatten.using_ints, _A.select.int, _A.slice.Tensor, _A.expand.default, _A.pixel_shuffle.default,
    _A.pixel_unshuffle.default, _A.channel_shuffle.default, _A.roll.default, _A.flip.default, _A.narrow.default, _A.diagonal.default,
):  # fmt: skip
    _rearranged(_target)


@register(_A.clone.default, _A.alias.default, _A.detach.default, _A.contiguous.default)
def _same(builder: _Builder, x: Ref, **options: Any) -> Ref:
    return x


@register(_A._assert_tensor_metadata.default)
def _asserted(builder: _Builder, x: Ref, *args: Any, **options: Any) -> Ref:
    """What a conversion expects of its input; the conversion itself is another operation."""
    return x


@register(_A.dropout.default)
def _dropout(builder: _Builder, x: Ref, p: float, train: bool) -> Ref:
    if train:
        raise Refused("drops entries at random; call eval() on the network")
    return x


def _split(target: Any) -> None:
    def function(builder: _Builder, x: Ref, *args: Any, **options: Any) -> list[Ref]:
        count = len(target(torch.zeros(x.shape, dtype=torch.float64), *args, **options))

        def piece(number: int) -> Callable[[Tensor], Tensor]:
            return lambda value: target(value, *args, **options)[number]

        return [_moved(builder, x, piece(number)) for number in range(count)]

    register(target)(function)


for _target in (_A.split.Tensor, _A.split_with_sizes.default, _A.chunk.default, _A.unbind.int):
    _split(_target)


def _joined(target: Any) -> None:
    """Concatenation of signals, and of stored numbers."""

    def function(builder: _Builder, parts: Sequence[Signal], dim: int = 0) -> Ref:
        signals = [part for part in parts if isinstance(part, Ref)]
        stored = [None if isinstance(part, Ref) else torch.as_tensor(part, dtype=torch.float64) for part in parts]

        def joined(absolute: bool, keep: bool) -> Callable[..., Tensor]:
            def join(*values: Tensor) -> Tensor:
                left = iter(values)
                whole = [next(left) if part is None else (part.abs() if absolute else part) * (1.0 if keep else 0.0) for part in stored]
                return target(whole, dim)

            return join

        nothing = [torch.zeros(ref.shape, dtype=torch.float64) for ref in signals]
        marks = (joined(True, False)(*nothing[:k], nothing[k] + 1, *nothing[k + 1 :]) for k in range(len(signals)))
        places = [torch.nonzero(mark.flatten() > 0).flatten() for mark in marks]  # the entries of one signal keep their order

        def transposed(rows: Tensor, absolute: bool) -> list[Tensor]:
            return [rows.index_select(1, mine) for mine in places]

        if all(part is None for part in stored):
            return builder.affine(signals, joined(False, True), transposed=transposed)
        constant = joined(True, True)(*nothing)
        return builder.affine(signals, joined(False, True), joined(True, False), constant, transposed=transposed)

    register(target)(function)


_joined(_A.cat.default)
_joined(_A.stack.default)


@register(_A.pad.default, _A.constant_pad_nd.default)
def _pad(builder: _Builder, x: Ref, padding: Sequence[int], mode: str | Number = "constant", value: float | None = None) -> Ref:
    if not isinstance(mode, str):
        mode, value = "constant", float(mode)
    filled = float(value or 0.0)
    sizes = list(padding)
    if mode != "constant":
        copies = math.prod(max(3, 1 + max(sizes[k : k + 2])) for k in range(0, len(sizes), 2))  # of one entry, along each axis: replicated, or around it
        return builder.affine([x], lambda v: functional.pad(v, sizes, mode), terms=copies)
    if not math.isfinite(filled):
        raise Refused(f"pads with {filled}; pad with a finite number")
    constant = functional.pad(torch.zeros(x.shape, dtype=torch.float64), sizes, value=abs(filled)) if filled else None
    return builder.affine([x], lambda v: functional.pad(v, sizes, value=filled), lambda v: functional.pad(v, sizes), constant)


# --- sums and products ----------------------------------------------------------------------------------------------------------------------------


def _spread(builder: _Builder, x: Ref, shape: torch.Size) -> Ref:
    """A signal, repeated to a shape."""
    if tuple(shape) == x.shape:
        return x
    return _moved(builder, x, lambda value: value.expand(shape))


def _sum(builder: _Builder, a: Signal, b: Signal, sign: float, alpha: Number) -> Ref:
    factor = sign * float(alpha)
    if isinstance(a, Ref) and isinstance(b, Ref):
        shape = torch.broadcast_shapes(a.shape, b.shape)
        return builder.combine((1.0, _spread(builder, a, shape)), (factor, _spread(builder, b, shape)))
    if isinstance(a, Ref):
        shift = torch.as_tensor(b, dtype=torch.float64) * factor
        spread = _spread(builder, a, torch.broadcast_shapes(a.shape, shift.shape))
        return builder.affine([spread], lambda value: value + shift, lambda value: value, shift.abs(), 2, _unchanged)
    if not isinstance(b, Ref):
        raise Refused("adds no signal")
    shift = torch.as_tensor(a, dtype=torch.float64)
    spread = _spread(builder, b, torch.broadcast_shapes(b.shape, shift.shape))
    back = _by(torch.tensor(factor, dtype=torch.float64), spread)
    return builder.affine([spread], lambda value: shift + factor * value, lambda value: abs(factor) * value, shift.abs(), 3, back)


@register(_A.add.Tensor, _A.add.Scalar)
def _add(builder: _Builder, a: Signal, b: Signal, alpha: Number = 1) -> Ref:
    return _sum(builder, a, b, 1.0, alpha)


@register(_A.sub.Tensor, _A.sub.Scalar)
def _subtract(builder: _Builder, a: Signal, b: Signal, alpha: Number = 1) -> Ref:
    return _sum(builder, a, b, -1.0, alpha)


@register(_A.rsub.Scalar, _A.rsub.Tensor)
def _subtract_from(builder: _Builder, a: Signal, b: Signal, alpha: Number = 1) -> Ref:
    return _sum(builder, b, a, -1.0, alpha)


def _by(factor: Tensor, x: Ref) -> Transposed:
    """Each entry of a signal times a number, from behind."""
    flat = factor.expand(x.shape).flatten()
    size = flat.abs()
    return lambda rows, absolute: [rows * (size if absolute else flat)]


@register(_A.neg.default)
def _negate(builder: _Builder, x: Ref) -> Ref:
    return builder.affine([x], torch.neg, lambda value: value, transposed=lambda rows, absolute: [rows if absolute else -rows])


@register(_A.mul.Tensor, _A.mul.Scalar)
def _multiply(builder: _Builder, a: Signal, b: Signal) -> Ref:
    if isinstance(a, Ref) and isinstance(b, Ref):
        raise Refused("multiplies two signals, which is neither affine nor a scalar gate; take --method smoothing")
    x, number = (a, b) if isinstance(a, Ref) else (b, a)
    if not isinstance(x, Ref):
        raise Refused("multiplies no signal")
    factor = torch.as_tensor(number, dtype=torch.float64)
    spread = _spread(builder, x, torch.broadcast_shapes(x.shape, factor.shape))
    size = factor.abs()
    return builder.affine([spread], lambda value: value * factor, lambda value: value * size, terms=1, transposed=_by(factor, spread))


@register(_A.div.Tensor, _A.div.Scalar)
def _divide(builder: _Builder, x: Signal, b: Signal) -> Ref:
    if not isinstance(x, Ref) or isinstance(b, Ref):
        raise Refused("divides by a signal, which is neither affine nor a scalar gate; take --method smoothing")
    divisor = torch.as_tensor(b, dtype=torch.float64)
    if bool((divisor == 0).any()):
        raise Refused("divides by zero")
    spread, size = _spread(builder, x, torch.broadcast_shapes(x.shape, divisor.shape)), divisor.abs()
    flat = divisor.expand(spread.shape).flatten()

    def transposed(rows: Tensor, absolute: bool) -> list[Tensor]:
        return [rows / (flat.abs() if absolute else flat)]

    return builder.affine([spread], lambda value: value / divisor, lambda value: value / size, terms=1, transposed=transposed)


def _reduced(target: Any) -> None:
    def function(builder: _Builder, x: Ref, *args: Any, **options: Any) -> Ref:
        if options.get("dtype") not in (None, torch.float64):
            raise Refused(f"changes the numbers to {options['dtype']}")
        made = target(torch.zeros(x.shape, dtype=torch.float64), *args, **options)
        return builder.affine([x], lambda value: target(value, *args, **options), terms=math.prod(x.shape) // max(1, made.numel()) + 2)

    register(target)(function)


for _target in (_A.mean.dim, _A.sum.dim_IntList, _A.mean.default, _A.sum.default):
    _reduced(_target)


def _pooled(target: Any, adaptive: bool) -> None:
    def function(builder: _Builder, x: Ref, size: Sequence[int], *args: Any, **options: Any) -> Ref:
        made = target(torch.ones(x.shape, dtype=torch.float64), size, *args, **options)
        if bool((made < 0).any()):
            raise Refused("divides by a negative number; multiply by it afterwards")
        terms = max(math.prod(x.shape[2:]), math.prod(made.shape[2:])) if adaptive else math.prod(size)  # adaptive pools may also spread an entry
        return builder.affine([x], lambda value: target(value, size, *args, **options), terms=terms + 2)

    register(target)(function)


_pooled(_A.avg_pool1d.default, adaptive=False)
_pooled(_A.avg_pool2d.default, adaptive=False)
_pooled(_A.adaptive_avg_pool1d.default, adaptive=True)
_pooled(_A.adaptive_avg_pool2d.default, adaptive=True)


@register(_A.linear.default)
def _linear(builder: _Builder, x: Ref, weight: Tensor, bias: Tensor | None = None) -> Ref:
    if not isinstance(weight, Tensor) or isinstance(bias, Ref):
        raise Refused("multiplies two signals, which is neither affine nor a scalar gate; take --method smoothing")
    size = weight.abs()
    constant = None if bias is None else bias.abs()

    def transposed(rows: Tensor, absolute: bool) -> list[Tensor]:
        return [(rows.reshape(-1, len(weight)) @ (size if absolute else weight)).reshape(len(rows), -1)]

    terms = max(weight.shape) + 1
    return builder.affine([x], lambda v: functional.linear(v, weight, bias), lambda v: functional.linear(v, size), constant, terms, transposed)


@register(_A.addmm.default)
def _addmm(builder: _Builder, bias: Tensor, x: Ref, weight: Tensor) -> Ref:
    return _linear(builder, x, weight.T, bias)


@register(_A.mm.default, _A.matmul.default)
def _matmul(builder: _Builder, a: Signal, b: Signal) -> Ref:
    if isinstance(a, Ref) and isinstance(b, Tensor) and b.dim() == 2:
        return _linear(builder, a, b.T)
    raise Refused("multiplies two signals, or a stored matrix from the left; only `x @ W` and linear layers are known here")


def _convolved_back(
    x: Ref,
    weight: Tensor,
    size: Tensor,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Transposed:
    """Of a convolution, for batches of rows."""
    axes = weight.dim() - 2
    stride, padding, dilation = (list(v) * (axes if len(v) == 1 else 1) for v in (stride, padding, dilation))
    spread = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    made = [weight.shape[0], *((length + 2 * p - d * (taps - 1) - 1) // s + 1 for length, taps, s, p, d in spread)]
    options = (None, stride, padding, dilation, False, [0] * axes, groups, [True, False, False])
    count = max(1, _COLUMNS // (math.prod(weight.shape[1:]) * math.prod(made[1:])))
    shape = torch.zeros(1, dtype=torch.float64).expand(count, *x.shape[1:])  # of the input nothing but its shape is used

    def back(rows: Tensor, kernel: Tensor) -> Tensor:
        return _A.convolution_backward.default(rows.reshape(len(rows), *made), shape[: len(rows)], kernel, *options)[0].flatten(1)

    def transposed(rows: Tensor, absolute: bool) -> list[Tensor]:
        kernel = size if absolute else weight
        return [back(rows, kernel) if len(rows) <= count else torch.cat([back(part, kernel) for part in rows.split(count)])]

    return transposed


def _convolved(target: Any, plain: bool = False) -> None:
    """Convolutions; a plain one is not transposed, and has numbers for its padding."""

    def function(builder: _Builder, x: Ref, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> Ref:
        if not isinstance(weight, Tensor) or isinstance(bias, Ref):
            raise Refused("has a kernel that depends on the input")
        taps, size = math.prod(weight.shape[2:]), weight.abs()
        constant = None if bias is None else bias.abs().reshape(-1, *[1] * len(weight.shape[2:]))
        return builder.affine(
            [x],
            lambda value: target(value, weight, bias, *args, **options),
            lambda value: target(value, size, None, *args, **options),
            constant,
            terms=max(weight.shape[:2]) * taps + 1,
            transposed=_convolved_back(x, weight, size, *args, **options) if plain and x.shape[0] == 1 and len(x.shape) == weight.dim() else None,
        )

    register(target)(function)


_convolved(_A.conv1d.default, plain=True)
_convolved(_A.conv2d.default, plain=True)
_convolved(_A.conv2d.padding)
_convolved(_A.conv1d.padding)
_convolved(_A.conv_transpose1d.default)
_convolved(_A.conv_transpose2d.input)


@register(_A._native_batch_norm_legit_no_training.default)
def _batch_norm(
    builder: _Builder, x: Ref, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Ref, None, None]:
    """In eval mode: `(x - mean) weight / sqrt(variance + eps) + bias`, by channel."""
    spread = (-1, *[1] * (len(x.shape) - 2))
    scale = torch.rsqrt(variance + eps) if weight is None else weight / torch.sqrt(variance + eps)
    moved = -mean * scale if bias is None else bias - mean * scale
    constant = (mean * scale).abs() + (0.0 if bias is None else bias.abs())
    scale, moved, constant = (part.reshape(spread) for part in (scale, moved, constant))
    size = scale.abs()
    return builder.affine([x], lambda value: value * scale + moved, lambda value: value * size, constant, 8, _by(scale, x)), None, None


# --- gates ----------------------------------------------------------------------------------------------------------------------------------------


@register(_A.relu.default)
def _relu(builder: _Builder, x: Ref) -> Ref:
    return builder.gate(x)


@register(_A.leaky_relu.default)
def _leaky_relu(builder: _Builder, x: Ref, slope: float = 0.01) -> Ref:
    return builder.combine((slope, x), (1.0 - slope, builder.gate(x)))


@register(_A.prelu.default)
def _prelu(builder: _Builder, x: Ref, slope: Tensor) -> Ref:
    channels = slope.reshape(-1, *[1] * (len(x.shape) - 2)) if len(x.shape) > 1 and slope.numel() > 1 else slope.reshape(())
    rest = 1.0 - channels
    size = channels.abs(), rest.abs()
    backs = _by(channels, x), _by(rest, x)
    return builder.affine(
        [x, builder.gate(x)],
        lambda v, bent: channels * v + rest * bent,
        lambda v, bent: size[0] * v + size[1] * bent,
        terms=4,
        transposed=lambda rows, absolute: [part for back in backs for part in back(rows, absolute)],
    )


@register(_A.abs.default)
def _absolute(builder: _Builder, x: Ref) -> Ref:
    return builder.combine((-1.0, x), (2.0, builder.gate(x)))


@register(_A.hardtanh.default)
def _hardtanh(builder: _Builder, x: Ref, low: float = -1.0, high: float = 1.0) -> Ref:
    return _clamp(builder, x, low, high)


@register(_A.relu6.default)
def _relu6(builder: _Builder, x: Ref) -> Ref:
    return _clamp(builder, x, 0.0, 6.0)


@register(_A.clamp.default)
def _clamp(builder: _Builder, x: Ref, low: Number | None = None, high: Number | None = None) -> Ref:
    """`min(x, high)` and then `max(., low)`, as clamp does where the two cross."""
    low, high = (None if end in (infinity, None) else end for end, infinity in ((low, -math.inf), (high, math.inf)))
    if low is not None and high is not None and low > high:
        raise Refused(f"clamps between {low} and {high}")
    if low is not None and low > -math.inf:
        x = builder.combine((1.0, builder.gate(builder.combine((1.0, x), constant=-float(low)))), constant=float(low))
    if high is not None and high < math.inf:
        x = builder.combine((-1.0, builder.gate(builder.combine((-1.0, x), constant=float(high)))), constant=float(high))
    return x


@register(_A.clamp_min.default)
def _clamp_min(builder: _Builder, x: Ref, low: Number) -> Ref:
    return _clamp(builder, x, low, None)


@register(_A.clamp_max.default)
def _clamp_max(builder: _Builder, x: Ref, high: Number) -> Ref:
    return _clamp(builder, x, None, high)


@register(_A.hardsigmoid.default)
def _hardsigmoid(builder: _Builder, x: Ref) -> Ref:
    """`clamp(x + 3, 0, 6) / 6`."""
    bent = _clamp(builder, builder.combine((1.0, x), constant=3.0), 0.0, 6.0)
    return builder.affine([bent], lambda value: value / 6, terms=1, transposed=lambda rows, absolute: [rows / 6])


@register(_A.maximum.default)
def _maximum(builder: _Builder, a: Signal, b: Signal) -> Ref:
    return builder.maximum(*_both(builder, a, b))


@register(_A.minimum.default)
def _minimum(builder: _Builder, a: Signal, b: Signal) -> Ref:
    return builder.minimum(*_both(builder, a, b))


def _both(builder: _Builder, a: Signal, b: Signal) -> tuple[Ref, Ref]:
    if not (isinstance(a, Ref) and isinstance(b, Ref)):
        raise Refused("compares a signal with stored numbers; write clamp")
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return _spread(builder, a, shape), _spread(builder, b, shape)


@register(_A.max_pool2d.default, _A.max_pool1d.default)
def _max_pool(
    builder: _Builder,
    x: Ref,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil: bool = False,
) -> Ref:
    """The maximum along each axis in turn, in a tournament."""
    axes = len(kernel)
    stride, padding, dilation = (list(v) * (axes if len(v) == 1 else 1) for v in (stride or kernel, padding, dilation))
    for axis in range(axes):
        dim = axis - axes
        taps = _taps(x.shape[dim], kernel[axis], stride[axis], padding[axis], dilation[axis], ceil)
        along = (-1, *[1] * (-dim - 1))
        picked = [(_moved(builder, x, functools.partial(_taken, dim=dim, index=index), terms=kernel[axis]), inside.reshape(along)) for index, inside in taps]
        while len(picked) > 1:
            pairs = [_larger(builder, *a, *b) for a, b in zip(picked[::2], picked[1::2], strict=False)]
            picked = pairs + picked[2 * len(pairs) :]
        x = picked[0][0]
    return x


def _taken(value: Tensor, dim: int, index: Tensor) -> Tensor:
    return value.index_select(dim, index)


def _larger(builder: _Builder, a: Ref, a_inside: Tensor, b: Ref, b_inside: Tensor) -> tuple[Ref, Tensor]:
    """The maximum where both are inside, else the one that is; no gate is undecided where there is nothing to compare."""
    both, only = (a_inside & b_inside).double(), (a_inside & ~b_inside).double()
    outside = both - 1
    by_both, by_only, by_other = (_by(part, a) for part in (both, only, 1 - only))

    def apart(rows: Tensor, absolute: bool) -> list[Tensor]:
        (kept,) = by_both(rows, absolute)
        return [kept, kept if absolute else -kept]

    def chosen(rows: Tensor, absolute: bool) -> list[Tensor]:
        return [*by_only(rows, absolute), *by_other(rows, absolute), rows]

    difference = builder.affine([a, b], lambda v, w: (v - w) * both + outside, lambda v, w: (v + w) * both, outside.abs(), 3, apart)
    larger = builder.affine([a, b, builder.gate(difference)], lambda v, w, beyond: v * only + w * (1 - only) + beyond, terms=3, transposed=chosen)
    return larger, a_inside | b_inside


def _taps(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> list[tuple[Tensor, Tensor]]:
    """For each tap of a window: where it reads, by output, and whether that is inside."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil else room // stride) + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1  # a window that begins in the padding on the right is left out
    places = torch.arange(count) * stride - padding + dilation * torch.arange(kernel)[:, None]  # (taps, outputs)
    inside = (places >= 0) & (places < size)
    if not bool(inside.any(dim=0).all()):
        raise Refused("has a window without an entry of its input")
    return list(zip(places.clamp(0, size - 1), inside, strict=True))


for _target, _activation in ((_A.tanh.default, TANH), (_A.sigmoid.default, SIGMOID), (_A.silu.default, SILU)):
    register(_target)(lambda builder, x, _activation=_activation: builder.gate(x, _activation))


@register(_A.gelu.default)
def _gelu(builder: _Builder, x: Ref, approximate: str = "none") -> Ref:
    if approximate != "none":
        raise Refused(f"is approximated by {approximate}; take approximate='none'")
    return builder.gate(x, GELU)


@register(_A.softplus.default)
def _softplus(builder: _Builder, x: Ref, beta: Number = 1, threshold: Number = 20) -> Ref:
    raise Refused("changes to a line at a threshold, where it is not continuous; take another activation")
