"""Certified radii from margins: exact examples, ties, rounding, refusals, and attacks that must not succeed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify.graph import Graph


def of_logits(z, pairs=None, value=1.0):
    return certify.Margin(certify.Bound(value, "test", pairs=pairs)).of_logits(np.array(z, dtype=np.float64))


def linear_classifier():
    """Rows (0, 0), (3, 4), (3, 0): distances 5, 3 and 4."""
    net = nn.Sequential(nn.Linear(2, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]]))
        net[0].bias.zero_()
    return net


def test_radius_of_a_linear_classifier_is_the_distance_to_its_boundary():
    net = linear_classifier()
    bound = certify.lipschitz(net, input_shape=(2,))
    certificate = certify.robustness(net, torch.tensor([[-1.0, 0.0], [1.0, 1.0], [1.0, -2.0]]), certify.Margin(bound))
    # x = (-1, 0): z = (0, -3, -3): margins 3/5 and 3/3. x = (1, 1): z = (0, 7, 3): 7/5 and 4/4. x = (1, -2): z = (0, -5, 3): 3/3 and 8/4.
    assert certificate.prediction.tolist() == [0, 1, 2]
    assert certificate.runner_up.tolist() == [1, 2, 0]
    exact = np.array([0.6, 1.0, 1.0])
    assert (certificate.radius <= exact).all()
    np.testing.assert_allclose(certificate.radius, exact, rtol=1e-12)


def test_without_pairs_the_constant_is_root_two_times_the_bound():
    certificate = of_logits([[3.0, 1.0, 0.0]], value=2.0)
    assert certificate.radius[0] <= 2 / (2 * math.sqrt(2))
    assert certificate.radius[0] == pytest.approx(2 / (2 * math.sqrt(2)), rel=1e-14)


def test_ties_give_no_radius():
    assert of_logits([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]]).radius.tolist() == [0.0, 0.0]
    assert not of_logits([[1.0, 1.0, 0.0]]).abstained.any()
    same_rows = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    assert of_logits([[1.0, 1.0, 0.0]], pairs=same_rows).radius.tolist() == [0.0]


def test_a_margin_that_cannot_change_does_not_limit_the_radius():
    same_rows = np.array([[0.0, 0.0, 2.0], [0.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
    certificate = of_logits([[1.0, 0.5, 0.0]], pairs=same_rows)
    assert certificate.runner_up[0] == 2
    assert certificate.radius[0] == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_no_prediction(bad):
    certificate = of_logits([[1.0, bad, 0.0], [1.0, 0.0, 0.0]])
    assert certificate.abstained.tolist() == [True, False]
    assert certificate.prediction.tolist() == [-1, 0]
    assert certificate.radius[0] == 0
    assert certificate.radius[1] > 0
    assert not certificate.certified([0, 0], 0.0)[0]


def test_accuracy_counts_strictly_and_clean_accuracy_counts_predictions():
    certificate = of_logits([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]], pairs=np.array([[0.0, 2.0], [2.0, 0.0]]))
    radius = certificate.radius[0]
    assert certificate.accuracy([0, 0, 0], 0.0) == pytest.approx(2 / 3)
    assert certificate.accuracy([0, 1, 0], 0.5) == pytest.approx(2 / 3)
    assert certificate.accuracy([0, 1, 0], radius) == 0
    with pytest.raises(ValueError, match="not negative"):
        certificate.accuracy([0, 1, 0], -0.1)


def test_radii_are_rounded_down_on_exact_rationals():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = rng.integers(1, 10**6, 2)
        k = int(rng.integers(1, 1000))
        radius = of_logits([[float(a + b), float(b)]], pairs=np.array([[0.0, float(k)], [float(k), 0.0]])).radius[0]
        numerator, denominator = float(radius).as_integer_ratio()
        assert numerator * k <= int(a) * denominator  # exact: radius <= a / k
        assert radius >= (a / k) * (1 - 1e-15 * (a + b) / a * 4)


def test_a_bound_of_other_weights_is_refused():
    net = linear_classifier()
    bound = certify.lipschitz(net, input_shape=(2,))
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    with pytest.raises(certify.StaleBound, match=r"call certify\.lipschitz again"):
        certify.robustness(net, torch.zeros(1, 2), certify.Margin(bound))
    with pytest.raises(TypeError, match="proved Bound, got Estimate"):
        certify.robustness(net, torch.zeros(1, 2), certify.Margin(certify.Estimate(1.0, "attack")))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), "floating-point"),
        (torch.tensor([[math.nan, 0.0]]), "NaN"),
        (torch.zeros(1, 3), "does not take inputs of shape"),
    ],
)
def test_bad_inputs_are_refused(inputs, match):
    net = linear_classifier()
    with pytest.raises(ValueError, match=match):
        certify.robustness(net, inputs, certify.Margin(certify.lipschitz(net, input_shape=(2,))))


def test_a_network_that_is_no_classifier_is_refused():
    net = nn.Sequential(nn.Linear(2, 1)).eval()
    with pytest.raises(certify.CertifyError, match="at least two classes"):
        certify.robustness(net, torch.zeros(1, 2), certify.Margin(certify.lipschitz(net, input_shape=(2,))))


def test_no_inputs_give_an_empty_certificate():
    net = linear_classifier()
    assert len(certify.robustness(net, torch.zeros(0, 2), certify.Margin(certify.lipschitz(net, input_shape=(2,))))) == 0


def test_unit_row_head_after_layers_is_sound_for_a_fooling_direction():
    torch.manual_seed(0)
    net = nn.Sequential(lipnet.Normalize([0.5], [0.25]), lipnet.BROLinear(4, 6), lipnet.MaxMin(), lipnet.UnitRowLinear(6, 3)).eval()
    x = torch.rand(20, 4)
    certificate = certify.robustness(net, x, certify.Margin(certify.lipschitz(net, input_shape=(4,))))
    frozen = lipnet.freeze(net).double()
    direction = torch.randn(4000, 4, dtype=torch.float64)
    direction /= direction.norm(dim=1, keepdim=True)
    for i in range(len(x)):
        moved = x[i].double() + certificate.radius[i] * direction
        assert (frozen(moved).argmax(1) == int(certificate.prediction[i])).all()


def stale(net, shape, change, other=None):
    """After the change a bound that was made before is refused."""
    bound = certify.lipschitz(net, input_shape=shape)
    change(net)
    with pytest.raises(certify.StaleBound):
        certify.robustness(net, torch.randn(4, *(other or shape)), certify.Margin(bound))


def test_a_bound_for_one_size_of_image_does_not_serve_another():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    stale(net, (1, 32, 32), lambda net: None, (1, 4, 4))


def test_a_change_of_any_attribute_makes_a_bound_stale():
    stale(nn.Sequential(nn.Linear(4, 8), lipnet.MaxMin(), lipnet.Scale(1.0), nn.Linear(8, 3)).eval(), (4,), lambda net: setattr(net[2], "factor", 100.0))
    stale(nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1), nn.Linear(4, 3)).eval(), (4,), lambda net: setattr(net[1], "negative_slope", 9.0))


def test_a_rule_of_the_user_that_says_something_else_makes_a_bound_stale():
    class Gain(nn.Module):
        k = 1.0

        def forward(self, x):
            return self.k * x

    @certify.register(Gain)
    def _(module, shape):
        return certify.Bound(module.k, "gain")

    stale(nn.Sequential(Gain(), nn.Linear(4, 3)).eval(), (4,), lambda net: setattr(net[0], "k", 50.0))


def test_parametrised_weights_are_the_same_numbers_in_the_bound_and_in_the_logits():
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))).eval()
    frozen = lipnet.freeze(net)
    assert type(frozen[0]) is nn.Linear
    assert torch.equal(frozen[0].weight, net[0].weight)
    assert torch.linalg.matrix_norm(frozen.double()[0].weight, 2) <= certify.lipschitz(net, input_shape=(32,)).value
    assert torch.equal(net[0](torch.ones(1, 32)), lipnet.freeze(net)(torch.ones(1, 32)))  # the original is as it was


def test_inputs_are_left_alone():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    before = x.clone()
    certify.robustness(net.double(), x, certify.Margin(certify.lipschitz(net, input_shape=(4,))))
    assert torch.equal(x, before)


def test_root_mean_squares_keep_the_eps_of_the_type_of_the_weights():
    """Its eps is that of its type by default: in float64 the same layer is another function, 20000 times steeper at zero than the bound says."""
    net = torch.nn.Sequential(torch.nn.RMSNorm(4), torch.nn.Linear(4, 3)).eval()
    bound, graph = certify.lipschitz(net, input_shape=(4,)), Graph.of(net, (4,))
    steep = torch.autograd.functional.jacobian(lambda x: graph.double(x[None])[0], torch.zeros(4, dtype=torch.float64))
    assert torch.linalg.matrix_norm(steep, 2) <= bound.value
    x = 1e-6 * torch.randn(5, 4)
    assert torch.allclose(graph.double(x.double()).float(), net(x), atol=1e-4)
