"""What the rules of convolutions of our own share: kernels of odd size that keep the size of the image."""

from __future__ import annotations

import math

import numpy as np

from certify.bound import Array, Assumption, Bound
from certify.convolution import convolution_bound
from certify.registry import Shape
from certify.rounding import up
from sdp.proof import gamma


def same_conv_bound(
    kernel: Array,  # (out, in * stride^2, size, size)
    shape: Shape,  # (in, height, width)
    stride: int,
    padding_mode: str,
    name: str,
) -> Bound:
    """The norm of the convolution behind a space-to-depth rearrangement, at the size of the input."""
    half = kernel.shape[-1] // 2
    value, how = convolution_bound(kernel, (shape[1] // stride, shape[2] // stride), padding=(half, half), mode=padding_mode)
    return Bound(value, f"{name}: {how}", assumptions=frozenset({Assumption.FLOAT64_LINALG}))


def tapwise(
    kernel: Array,  # (out, in, height, width)
) -> float:
    """The sum over the taps of their Frobenius norms: a cheap bound on the norm of any convolution with this kernel, and of its absolute values."""
    exponent = math.frexp(float(np.abs(kernel).max(initial=0.0)))[1]
    scaled = np.ldexp(kernel, -exponent)  # exact but for what vanishes beside the largest; squares of tiny kernels would all vanish
    taps = np.sqrt((scaled * scaled).sum(axis=(0, 1)))
    return up(float(np.ldexp(taps.sum() * (1 + gamma(kernel.size + 10)) + kernel.size * 2.0**-530, exponent))) if scaled.any() else 0.0
