"""Mixtures of an accurate and a smoothed classifier: against closed forms on a line, for an accurate classifier that is as much against it as it can be."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import certify
from certify import Mixed, Smoothing
from certify.smoothing import FixedN, Gaussian, GroupSequential, Laplace, Softmax

SIGMA, ALPHA = 0.5, 0.05
METHOD = Smoothing(Gaussian(SIGMA), schedule=FixedN(50, 1000, ALPHA), levels=None)


class Side(nn.Module):
    """Class 0 on the right of a plane; `strength` 40 is as sure as a softmax gets."""

    def __init__(self, strength=1.0, classes=2, offset=0.0):
        super().__init__()
        self.strength, self.classes, self.offset = strength, classes, offset

    def forward(self, x):
        side = self.strength * torch.sign(x.flatten(1)[:, 0] - self.offset)
        return torch.stack([side, -side, *[-2 * side.abs() - 1] * (self.classes - 2)], dim=1)


class Says(nn.Module):
    """The same logits everywhere."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.tensor(logits)
        self.eval()

    def forward(self, x):
        return self.logits + 0 * x.flatten(1)[:, :1]


def h0(x):
    return stats.norm.cdf(x / SIGMA)


@pytest.mark.parametrize("weight", [0.6, 0.8, 1.0])
@pytest.mark.parametrize("levels", [None, 64])
def test_the_radius_is_not_above_the_truth_of_the_worst_mixture_more_often_than_alpha(weight, levels):
    """g says class 1 everywhere: the mixture leaves class 0 where 2 h_0 - 1 = (1 - weight) / weight. x is off the grid."""
    x = torch.linspace(-1.5, 2.5, 400)[:, None] + 0.003
    change = SIGMA * stats.norm.ppf(1 / (2 * weight)) if weight < 1 else 0.0
    method = Mixed(METHOD if levels is None else Smoothing(Gaussian(SIGMA), schedule=METHOD.schedule, levels=levels), Says(-40.0, 40.0), weight)
    found = certify.robustness(Side().eval(), x, method)
    truth = x[:, 0].numpy() - change
    step = 0 if levels is None else 0.5 / levels + 1e-9  # the grid moves the plane
    right = found.prediction == 0
    allowed = stats.binom.isf(1e-6, 400, ALPHA)
    assert (right & (found.radius > truth + step)).sum() + ((found.prediction == 1) & (truth > step)).sum() <= allowed
    assert found.radius[right].max() > 0.8
    assert np.median(found.radius[truth > 1]) > 0.6 * np.median(np.minimum(truth[truth > 1], SIGMA * 2.5 - change))
    assert (found.prediction[truth < -0.3] == 1).all()  # g and h agree there, or weight g alone does
    assert (found.failure, found.norm, found.assumptions) == (ALPHA, 2.0, method.smoothing.assumptions)


def test_where_no_radius_is_certified_the_prediction_of_the_mixture_may_be():
    """Just on the left of the plane of h, g says class 0 and the mixture with it; further on it does not."""
    weight, x = 0.7, torch.tensor([[-0.05], [-0.2], [-0.5], [0.05]])
    found = certify.robustness(Side().eval(), x, Mixed(METHOD, Says(40.0, -40.0), weight))
    mixture = (1 - weight) + weight * (2 * h0(x[:, 0].numpy()) - 1)
    assert (mixture > 0.05)[[0, 1, 3]].all()
    assert found.prediction[[0, 1, 3]].tolist() == [0, 0, 0]
    assert found.radius[[0, 1]].tolist() == [0, 0]
    assert not found.abstained[[0, 1, 3]].any()
    assert mixture[2] < 0
    assert found.prediction[2] == 1  # here h is against it
    alone = certify.robustness(Side().eval(), x, METHOD)
    assert (alone.prediction[:2] == 1).all()
    unknown = certify.robustness(Side().eval(), torch.tensor([[SIGMA * stats.norm.ppf(1 - 1 / (2 * weight))]]), Mixed(METHOD, Says(40.0, -40.0), weight))
    assert unknown.abstained[0]


@pytest.mark.parametrize("levels", [None, 10])
def test_a_prediction_without_a_radius_is_that_of_the_mixture_at_the_input_itself(levels):
    """Copies are made at up to 0.05 from the input here, which moves h by as much as decides; false ones are no more than alpha allows."""
    weight, count = 0.7, 300
    even = SIGMA * stats.norm.ppf(1 - 1 / (2 * weight))  # where 0.3 + 0.7 (2 h_0 - 1) = 0
    x = torch.linspace(even - 0.08, even + 0.08, count)[:, None]
    smoothing = Smoothing(Gaussian(SIGMA), schedule=FixedN(50, 4000, ALPHA), levels=levels)
    found = certify.robustness(Side(offset=0.05 if levels else 0.0).eval(), x, Mixed(smoothing, Says(40.0, -40.0), weight))
    # copies on a grid of 0.1 fall on the right of 0.05 where the exact ones fall on the right of 0.05: rounding does not matter
    truth = np.where(x[:, 0].numpy() - (0.05 if levels else 0.0) > even, 0, 1)
    false = (~found.abstained) & (found.prediction != truth)
    assert false.sum() <= stats.binom.isf(1e-6, count, ALPHA)
    assert found.abstained.any()
    assert not found.abstained.all()


def test_soft_scores_and_several_looks_and_classes():
    x = torch.linspace(-1, 2, 60)[:, None]
    for scores, classes in ((Softmax(0.25), 2), (Softmax(0.25), 4)):
        method = Smoothing(Gaussian(SIGMA), scores, GroupSequential(looks=(200, 800), n0=50, alpha=ALPHA), levels=None)
        against = Says(-40.0, 40.0, *[-40.0] * (classes - 2))
        found = certify.robustness(Side(classes=classes).eval(), x, Mixed(method, against, 0.9))
        change = SIGMA * stats.norm.ppf(1 / 1.8)
        assert (found.radius <= np.abs(x[:, 0].numpy() - change) + 0.05).all()
        assert found.radius.max() > 0.5


def test_targets_and_tolerances_are_about_the_mixture():
    x = torch.full((20, 1), 1.0)
    for goal in ({"target": 0.4}, {"tolerance": 0.05}):
        method = Smoothing(Gaussian(SIGMA), schedule=GroupSequential(n0=50, alpha=ALPHA, looks=(100, 1000, 20_000)), levels=None, **goal)
        found = certify.robustness(Side().eval(), x, Mixed(method, Says(-40.0, 40.0), 0.8))
        assert (found.radius > 0.4).all()
        assert (found.radius > 1 - SIGMA * stats.norm.ppf(1 / 1.6)).sum() <= stats.binom.isf(1e-6, 20, ALPHA)


def test_logits_that_are_not_finite_count_as_no_score():
    found = certify.robustness(Side().eval(), torch.tensor([[1.5]]), Mixed(METHOD, Says(math.nan, 0.0), 0.8))
    assert found.prediction.tolist() == [0]
    assert found.radius[0] > 0.5


def test_what_cannot_be_mixed_is_refused():
    net, x = Side().eval(), torch.ones(1, 1)
    for weight in (0.5, 0.3, 0.0, -1.0, 1.01, math.nan):
        with pytest.raises(certify.CertifyError, match=r"weight must lie in \(1/2, 1\]"):
            Mixed(METHOD, net, weight)
    with pytest.raises(certify.CertifyError, match="Gaussian noise in l2"):
        Mixed(Smoothing(Laplace(0.5), levels=None), net, 0.8)
    with pytest.raises(certify.CertifyError, match="temperature"):
        Mixed(METHOD, net, 0.8, temperature=0.0)
    with pytest.raises(certify.CertifyError, match="same classes"):
        certify.robustness(net, x, Mixed(METHOD, Says(0.0, 0.0, 0.0), 0.8))
    with pytest.raises(certify.CertifyError, match="training mode"):
        certify.robustness(net, x, Mixed(METHOD, Side().train(), 0.8))
    with pytest.raises(certify.CertifyError, match="cannot certify anything"):
        certify.robustness(net, x, Mixed(METHOD, net, 0.501))


def test_the_certificate_says_what_it_is_of():
    found = certify.robustness(Side().eval(), torch.ones(1, 1), Mixed(METHOD, Says(0.0, 0.0), 0.8))
    assert found.method.startswith("Mixed(smoothing=Smoothing(noise=Gaussian(sigma=0.5)")
    assert "weight=0.8" in found.method
    assert "mixed with Says" in found.method
