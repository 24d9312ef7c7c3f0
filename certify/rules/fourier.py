"""Rules for `lipnet.layers.fourier`. The discrete Fourier transform keeps norms, so a layer is as long as the longest of its matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import lipnet
from certify.bound import Assumption, Bound
from certify.convolution import spectrum_norm
from certify.registry import Shape, register
from certify.rounding import multiply_up, up
from certify.rules.residual import slope_restricted
from certify.spectral import as_float64
from sdp.proof import gamma


@register(lipnet.FourierBROConv2d)
def _(layer: lipnet.FourierBROConv2d, shape: Shape) -> Bound:
    """The largest norm of its matrices. Where a frequency is its own conjugate, or has its conjugate in the stack too, the transform runs their mean."""
    (weight,) = layer.spectra()
    return Bound(spectrum_norm(_complex(weight)), f"bro, {len(weight)} frequencies", assumptions=frozenset({Assumption.FLOAT64_LINALG}))


@register(lipnet.FourierSandwichConv2d)
def _(layer: lipnet.FourierSandwichConv2d, shape: Shape) -> Bound:
    """`|[A B]|^2` as for the dense layer, over the frequencies: A and B are operators on the torus, J is a diagonal there."""
    slope_restricted(layer.activation)
    inner, outer = map(_complex, layer.spectra())
    psi = as_float64(layer.psi())
    both = np.concatenate([outer.conj().swapaxes(1, 2) / psi[:, None], psi[:, None] * inner], axis=2)
    rounded = gamma(4) * (1 + both.shape[1] ** 0.5)  # of each entry, so of the Frobenius norm, which is at most sqrt(rows) times the norm
    norm = multiply_up(spectrum_norm(both), up(1 + rounded))
    how = f"sandwich, {layer.orthonormalizer}: |A A^H + B B^H|, {len(inner)} frequencies"
    return Bound(up(up(norm * norm) / 2), how, assumptions=frozenset({Assumption.FLOAT64_LINALG}))


def _complex(spectrum: Tensor) -> NDArray[np.complex128]:  # (frequencies, out, in)
    """The matrices as the layer runs them."""
    parts = as_float64(spectrum)
    return parts[..., 0] + 1j * parts[..., 1]
