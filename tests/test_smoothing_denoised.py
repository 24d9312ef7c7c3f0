"""Denoise, then classify: the exact denoiser of a simple law is recovered, in either form, and helps."""

import numpy as np
import pytest
import torch
from torch import nn

import certify
from certify.smoothing import FixedN, Gaussian, diffusion
from certify.smoothing.denoised import Denoised
from certify.smoothing.method import Smoothing

SIGMA, ABAR = 0.5, diffusion.linear()


class Posterior(nn.Module):
    """The best denoiser for images that are all -1 or all +1, each pixel alike: tanh of the mean over the variance. The step decides the variance."""

    def __init__(self, predicts):
        super().__init__()
        self.predicts, self.seen = predicts, []

    def forward(self, x, t):
        self.seen.append((t.unique().tolist(), float(x.detach().nan_to_num().std())))
        abar = float(ABAR[int(t[0])])
        image = torch.tanh(x.sum((1, 2, 3), keepdim=True) * abar**0.5 / (1 - abar)).expand_as(x)
        if self.predicts == "image":
            return image
        noise = (x - abar**0.5 * image) / (1 - abar) ** 0.5
        return torch.cat([noise, 7 * noise], dim=1)  # and a learned variance


class Corner(nn.Module):
    """Looks at one pixel, so that noise confuses it."""

    def forward(self, x):
        side = x[:, 0, 0, 0] - 0.5
        return torch.stack([-side, side], dim=1)


@pytest.mark.parametrize("predicts", ["image", "noise"])
def test_the_right_step_is_asked_and_both_forms_agree(predicts):
    net = Denoised(Posterior(predicts), Corner(), SIGMA, ABAR, predicts).eval()
    assert diffusion.noise_level(ABAR)[net.step] == pytest.approx(SIGMA, rel=0.01)
    torch.manual_seed(0)
    clean = (torch.rand(64, 1, 1, 1) > 0.5).float().expand(64, 1, 4, 4)
    logits = net(clean + SIGMA * torch.randn(64, 1, 4, 4))
    assert (logits.argmax(1) == clean[:, 0, 0, 0]).float().mean() > 0.95
    (steps, spread) = net.denoiser.seen[0]
    assert steps == [net.step]
    assert spread == pytest.approx(1, abs=0.1)  # what a diffusion model is used to


def test_it_certifies_more_than_the_classifier_alone():
    x = torch.cat([torch.zeros(4, 1, 4, 4), torch.ones(4, 1, 4, 4)])
    method = Smoothing(Gaussian(SIGMA), schedule=FixedN(50, 1000, 0.01))
    alone = certify.robustness(Corner().eval(), x, method)
    denoised = certify.robustness(Denoised(Posterior("noise"), Corner(), SIGMA, ABAR).eval(), x, method)
    np.testing.assert_array_equal(denoised.prediction, [0] * 4 + [1] * 4)
    assert denoised.radius.min() > 1.2 > 0.7 > np.median(alone.radius)
    assert denoised.radius.max() <= 0.5 * 4  # the true distance to the other class, over 16 pixels


@pytest.mark.parametrize(("arguments", "match"), [((100.0, ABAR), "knows noise"), ((0.5, ABAR, "both"), "image or the noise"), ((-1.0, ABAR), "sigma")])
def test_bad_settings_are_refused(arguments, match):
    with pytest.raises(certify.CertifyError, match=match):
        Denoised(Posterior("image"), Corner(), *arguments)
