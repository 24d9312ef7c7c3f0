"""The slopes of elementwise activations: the smallest known interval that holds every difference quotient, rounded outward."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

import lipnet
from sdp import activation as scalar

Slopes = tuple[float, float]

_SIXTH = 0.1666666716337204  # in float32, rounded up: what ONNX files hold, and what torch's gradients are; torch's forward divides by 6

_SLOPES: dict[type[nn.Module], Callable[..., Slopes]] = {
    nn.Identity: lambda _: (1.0, 1.0),
    nn.ReLU: lambda _: (0.0, 1.0),
    nn.ReLU6: lambda _: (0.0, 1.0),
    nn.Hardtanh: lambda _: (0.0, 1.0),
    nn.LeakyReLU: lambda m: _leaky(m.negative_slope),
    nn.ELU: lambda m: (min(m.alpha, 0.0), max(m.alpha, 1.0)),
    nn.CELU: lambda m: (0.0, 1.0) if m.alpha > 0 else (-math.inf, math.inf),  # exp(x / alpha) has no bound for a negative alpha
    nn.SELU: lambda _: (0.0, 1.7581),  # scale * alpha = 1.758099...
    nn.Tanh: lambda _: (0.0, 1.0),
    nn.Sigmoid: lambda _: (0.0, 0.25),
    nn.LogSigmoid: lambda _: (0.0, 1.0),
    nn.Softsign: lambda _: (0.0, 1.0),
    nn.SiLU: lambda _: (-0.0998394, 1.0998394),  # extrema of s(x) (1 + x (1 - s(x))), at |x| = 2.3993573
    nn.GELU: lambda m: (
        (-0.1289045, 1.1289045) if m.approximate == "none" else (-0.1290, 1.1290)
    ),  # erf form: 1/2 +- (erf(1)/2 + e^-1/sqrt(pi)), at |x| = sqrt(2)
    nn.Mish: lambda _: (-0.1125262, 1.0884982),  # extrema of the derivative of x tanh(log(1 + e^x)), at x = -2.2563764 and 1.4905712
    nn.Hardswish: lambda _: (-3 * _SIXTH, 9 * _SIXTH),  # (2 x + 3) / 6 between -3 and 3; exact products
    nn.Hardsigmoid: lambda _: (0.0, _SIXTH),
    nn.Softshrink: lambda m: (0.0, 1.0) if m.lambd >= 0 else (-math.inf, math.inf),
    nn.Tanhshrink: lambda _: (0.0, 1.0),
    nn.RReLU: lambda m: _leaky((m.lower + m.upper) / 2),  # in eval mode
    nn.PReLU: lambda m: _leaky(*m.weight.detach().double().tolist()),
    lipnet.Abs: lambda _: (-1.0, 1.0),
}


def _leaky(*below: float) -> Slopes:
    """Of what has slope 1 above zero and one of these below."""
    return (min(1.0, *below), max(1.0, *below)) if all(map(math.isfinite, below)) else (-math.inf, math.inf)


def slopes(module: nn.Module) -> Slopes | None:
    """The slope range of an elementwise activation, or None for a module that is not known to have one. Subclasses count as their base."""
    found = next((_SLOPES[cls] for cls in type(module).__mro__ if cls in _SLOPES), None)
    low, high = (math.inf, -math.inf) if found is None else found(module)
    return (low, high) if -math.inf < low <= high < math.inf else None


_SHAPES: dict[type[nn.Module], Callable[..., scalar.Activation]] = {
    nn.ReLU: lambda _: scalar.RELU,
    nn.ReLU6: lambda _: scalar.clamp(0.0, 6.0),
    nn.Hardtanh: lambda m: scalar.clamp(float(m.min_val), float(m.max_val)) if math.isfinite(m.min_val - m.max_val) else scalar.Sloped(0.0, 1.0),
    nn.LeakyReLU: lambda m: scalar.leaky_relu(float(m.negative_slope)),
    nn.Tanh: lambda _: scalar.TANH,
    nn.Sigmoid: lambda _: scalar.SIGMOID,
    nn.SiLU: lambda _: scalar.SILU,
    nn.GELU: lambda m: scalar.GELU if m.approximate == "none" else scalar.Sloped(*slopes(m) or (-math.inf, math.inf)),
    lipnet.Abs: lambda _: scalar.ABS,
}


def activation(module: nn.Module) -> scalar.Activation | None:
    """The activation with its slopes between any two inputs, where they are known, or with its slopes everywhere; None as `slopes`."""
    found = slopes(module)
    if found is None:
        return None
    cls = next(cls for cls in type(module).__mro__ if cls in _SLOPES)
    return _SHAPES[cls](module) if cls in _SHAPES else scalar.Sloped(*found)


def activations() -> tuple[type[nn.Module], ...]:
    """The module types with a known slope range."""
    return tuple(_SLOPES)
