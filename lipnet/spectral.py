"""Spectral norms for training: differentiable, in the dtype of the weight. `certify.spectral` is what proves one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gram_iteration(
    weight: Tensor,  # (..., rows, columns), real or complex
    steps: int = 6,
) -> Tensor:  # (...)
    """An upper bound on the largest singular value: `|G_t|_F^(1/2^t)` with `G_1 = W'W`, `G_{t+1} = G_t^2` (Delattre et al. 2023).

    An upper bound in exact arithmetic for every number of steps, decreasing in it; the excess is `(sum_i r_i^(2^(t+1)))^(1/2^(t+1))` with
    `r_i = sigma_i / sigma_1`, so it vanishes quickly unless many singular values are equal. Rescaled at each step, so it cannot overflow. Differentiable.
    In float32 rounding can take it 5e-7 (relative) below the true norm: use `certify.spectral` where the number is to be proved.
    """
    if steps < 1:
        raise ValueError(f"gram_iteration needs at least one step, got steps={steps}")
    size = _entries(weight.detach()).abs().amax(-1).clamp_min(torch.finfo(weight.dtype).tiny)  # the value does not depend on it
    weight = _divided(weight, size)
    gram = weight @ weight.mH if weight.shape[-2] < weight.shape[-1] else weight.mH @ weight
    log_scale = torch.zeros(weight.shape[:-2], dtype=weight.real.dtype, device=weight.device)
    for _ in range(steps - 1):
        scale = _frobenius(gram)
        gram = _divided(gram, scale)
        gram = gram @ gram
        log_scale = 2 * (log_scale + scale.log())
    return size * torch.exp((_frobenius(gram).log() + log_scale) / 2**steps)


def conv_gram_iteration(
    kernel: Tensor,  # (out, in, height, width)
    steps: int = 5,
) -> Tensor:  # ()
    """An upper bound on the norm of a convolution with this kernel, for zero and circular padding at every size of image. Differentiable.

    The largest `gram_iteration` over the frequencies of a torus of 4 k points per axis, divided by `cos(pi (k - 1) / (2 N))` per axis for what lies between
    the points: along a line through its maximum the response is a function of exponential type (k - 1) / 2, which is at least M cos(d |x - x*|) near it.
    The factor is 1.07 for 3 x 3. Rounding as in `gram_iteration`. Only the largest has a gradient, so the others are computed without.
    """
    height, width = kernel.shape[-2:]
    grid = (4 * height, 4 * width)
    response = torch.fft.rfft2(kernel, s=grid).permute(2, 3, 0, 1).flatten(0, 1)
    with torch.no_grad():
        worst = gram_iteration(response, steps).argmax(0, keepdim=True)
    between = math.cos(math.pi * (height - 1) / (2 * grid[0])) * math.cos(math.pi * (width - 1) / (2 * grid[1]))
    return gram_iteration(response[worst], steps)[0] / between


def _frobenius(gram: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_entries(gram), dim=-1).clamp_min(torch.finfo(gram.dtype).tiny)


def _entries(matrix: Tensor) -> Tensor:  # (..., rows, columns) -> (..., real numbers)
    """The entries of each matrix as real numbers: norms and quotients of complex ones are many times slower."""
    return torch.view_as_real(matrix.resolve_conj()).flatten(-3) if matrix.is_complex() else matrix.flatten(-2)


def _divided(matrix: Tensor, size: Tensor) -> Tensor:
    """Each matrix over a real number of its own."""
    if matrix.is_complex():
        return torch.view_as_complex(torch.view_as_real(matrix.resolve_conj()) / size[..., None, None, None])
    return matrix / size[..., None, None]


def power_iteration_estimate(
    weight: Tensor,  # (rows, columns)
    steps: int = 20,
    seed: int = 0,
) -> Tensor:  # ()
    """An estimate from below of the largest singular value. Never a bound: the iterate may miss the top singular vector."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(weight.shape[1], generator=generator, dtype=torch.float64).to(weight)
    with torch.no_grad():
        for _ in range(steps):
            vector = torch.nn.functional.normalize(weight.mT @ (weight @ vector), dim=0)
    return torch.linalg.vector_norm(weight @ vector)
