"""`Denoised(denoiser, classifier, ...)`: a base classifier that takes the noise off first, by a diffusion model (Salman et al. 2020, Carlini et al. 2023)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from certify.bound import Array
from certify.errors import CertifyError
from certify.smoothing.diffusion import timestep


class Denoised(nn.Module):
    """`classifier(denoiser(.))` for inputs in [0, 1] with noise of `sigma` on them: smooth it with `Gaussian(sigma)`.

    The denoiser is one step of a diffusion model: it is called with `sqrt(abar_t) (2 z - 1)` and the step t, (batch,) int64, the step whose noise is nearest to
    sigma, and gives the image on [-1, 1], or the noise in it (of further channels, a learned variance, only the first are taken). The classifier gets the image
    on [0, 1], cut off there. The certificate is that of the noise that was added; the step only decides how accurate the classifier is.
    Shapes: (batch, channels, height, width) -> (batch, classes). Raises CertifyError for a sigma beyond the levels of the schedule.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        classifier: nn.Module,
        sigma: float,
        abar: Array,  # (steps,): the schedule of the model, such as certify.smoothing.diffusion.linear()
        predicts: Literal["image", "noise"] = "noise",
    ) -> None:
        super().__init__()
        if predicts not in ("image", "noise"):
            raise CertifyError(f"a denoiser predicts the image or the noise, got {predicts!r}")
        self.denoiser, self.classifier, self.sigma, self.predicts = denoiser, classifier, float(sigma), predicts
        self.step = timestep(sigma, abar)
        self.abar = float(abar[self.step])

    def forward(self, z: Tensor) -> Tensor:
        """Logits of noisy inputs."""
        noisy = self.abar**0.5 * (2 * z - 1)
        found = self.denoiser(noisy, torch.full((len(z),), self.step, dtype=torch.int64, device=z.device))[:, : z.shape[1]]
        image = found if self.predicts == "image" else (noisy - (1 - self.abar) ** 0.5 * found) / self.abar**0.5
        logits: Tensor = self.classifier((image.clamp(-1, 1) + 1) / 2)
        return logits
