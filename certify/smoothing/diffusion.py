"""Denoise, then classify: which timestep of a diffusion model has the noise level of the smoothing (Carlini et al. 2023).

The input z in [0, 1] is smoothed by N(0, sigma^2), the sum scaled to `sqrt(abar_t) (2 (z + noise) - 1)` and handed to the denoiser at step t. On [-1, 1] the
noise is 2 sigma, hence `sqrt((1 - abar_t) / abar_t) = 2 sigma`. The certificate is that of the noise that was added, sigma, whatever t is: t is a part of the
base classifier, and only its accuracy depends on it.
"""

from __future__ import annotations

import numpy as np

from certify.bound import Array
from certify.errors import CertifyError
from certify.smoothing.radius import check_sigma


def linear(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Array:
    """abar_t for t = 0, 1, ..., of the linear schedule (Ho, Jain & Abbeel 2020; guided-diffusion's ImageNet model)."""
    return np.asarray(np.cumprod(1 - np.linspace(first, last, steps)))


def cosine(steps: int = 4000) -> Array:
    """abar_t for t = 0, 1, ..., of the cosine schedule with steps of at most 0.999 (Nichol & Dhariwal 2021; their CIFAR-10 model)."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999)))


def noise_level(abar: Array) -> Array:
    """The sigma, in units where inputs lie in [0, 1], of each timestep."""
    return np.sqrt((1 - abar) / abar) / 2


def timestep(sigma: float, abar: Array) -> int:
    """The step whose noise level is nearest to sigma (in units where inputs lie in [0, 1]), in the ratio. Raises CertifyError beyond the schedule's levels."""
    check_sigma(sigma)
    levels = noise_level(abar)
    if not levels[0] <= sigma <= levels[-1]:
        raise CertifyError(f"the diffusion model knows noise of sigma {levels[0]:.3g} to {levels[-1]:.3g} for inputs in [0, 1], got {sigma}")
    return int(np.argmin(np.abs(np.log(levels / sigma))))
