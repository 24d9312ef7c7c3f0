"""Contrast and brightness together: the exact certificate against integrals in another order, in 30 digits, over whole boxes, and at work."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import optimize, special, stats

import certify
from certify import Smoothing
from certify.smoothing import FixedN, contrast
from certify.smoothing.contrast import Box, gained, worst
from certify.smoothing.noises import Brightness, Contrast, ContrastBrightness, TwoSteps

# The worst set is {ratio of densities > lambda}. In V it is an interval for each U (m > 1), or what is outside of one: the code integrates over V, the tests
# over U, from the ratio itself: 2 ln ratio = (terms without U, V) + 2 (k / sigma) U + (1 - m^2) V^2 + 2 m^2 shift V.


def roots(level, k, sigma, shift, u, sqrt=np.sqrt, most=np.maximum, exp=math.exp):
    """Where `2 (k / sigma) U + (1 - m^2) V^2 + 2 m^2 shift V = level`, in V: centre and half-width, 0 where it is nowhere."""
    square = exp(2 * k) - 1
    centre = (square + 1) * shift / square
    return centre, sqrt(most((2 * k / sigma * u - level) / square + centre**2, 0))


def exactly(level, k, sigma, shift):
    """In 30 digits, the chances of the set above a level, without the attack and with it."""
    with mpmath.workdps(30):
        k, sigma, shift, level = map(mpmath.mpf, (k, sigma, shift, level))
        m, far = mpmath.exp(k), k / sigma
        edge = (level - m**4 * shift**2 / (m**2 - 1)) / (2 * far)  # where the half-width is 0

        def inside(u, mean, spread):
            centre, width = roots(level, k, sigma, shift, u, mpmath.sqrt, max, mpmath.exp)
            return mpmath.ncdf((centre + width - mean) / spread) - mpmath.ncdf((centre - width - mean) / spread)

        found = []
        for law in ((0, 0, 1), (far, shift, 1 / m)):
            total = mpmath.mpf(k < 0)  # the interval is all that is not in the set, for k < 0
            places = [x for x in (law[0] + step for step in (-14, -6, -2, 2, 6, 14)) if x > edge]
            if places:
                start = [edge] if edge > law[0] - 14 else []
                held = mpmath.quad(lambda u, law=law: mpmath.npdf(u - law[0]) * inside(u, law[1], law[2]), start + places)
                total += held if k > 0 else -held
            found.append(total)
        return float(found[0]), float(found[1])


CASES = [  # k, sigma, shift, level
    (0.3, 0.4, 1.2, 3.0),
    (-0.3, 0.4, 1.2, 3.0),
    (0.2, 0.4, 0.0, 1.0),
    (-0.2, 0.4, 0.0, 1.0),
    (0.05, 0.4, 2.5, 9.0),
    (-0.05, 0.4, 2.5, 9.0),
    (0.7, 0.5, 1.0, 2.0),
    (-0.7, 0.5, 1.0, 5.0),
    (1.2, 1.0, 1.5, 4.0),
    (-1.2, 1.0, 1.5, 7.0),
    (0.4, 0.1, 0.3, 20.0),
    (-0.4, 0.1, 0.3, 30.0),
    (0.3, 1.5, 3.0, -2.0),
    (-0.3, 1.5, 3.0, -1.0),
]


def close(found, exact):
    """Not below the truth, and hardly above."""
    return exact <= found <= exact + 1e-9


@pytest.mark.parametrize(("k", "sigma", "shift", "level"), CASES)
def test_what_a_set_can_gain_is_the_exact_number_rounded_up(k, sigma, shift, level):
    q, most = exactly(level, k, sigma, shift)
    assert 1e-9 < q < most < 1
    far = np.array([abs(k) / sigma])

    def found(k=k, far=far, shift=shift):
        return float(gained(np.array([q]), np.array([k]), far, shift)[0, 0])

    assert close(found(), most)
    # each of these has a sign or a factor wrong
    wrong = [found(k=-k), found(shift=shift * math.exp(k)), found(shift=shift * math.exp(-k)), found(far=far / 2), found(far=2 * far)]
    assert [close(number, most) for number in wrong] == [False, shift == 0, shift == 0, False, False]
    assert found(k=-k) < most or found(k=k) < found(k=-k)
    assert found(far=2 * far) > most  # a far that is too large is safe
    assert found(shift=1.1 * shift + 0.01) > most


def above(level, k, sigma, shift, attacked):
    """The chance of the set above a level, by a sum over the root of how far U is from where the interval has no width, in which all is smooth."""
    far, mean, scale = (k / sigma, shift, math.exp(k)) if attacked else (0.0, 0.0, 1.0)
    edge = (level - math.exp(4 * k) * shift**2 / math.expm1(2 * k)) * sigma / (2 * k)
    root, step = np.linspace(math.sqrt(max(far - 9 - edge, 0.0)), math.sqrt(max(far + 9 - edge, 0.0)), 2001, retstep=True)
    u = edge + root**2
    centre, width = roots(level, k, sigma, shift, u)
    inside = special.ndtr((centre + width - mean) * scale) - special.ndtr((centre - width - mean) * scale)
    held = float(2 * step * root * stats.norm.pdf(u - far) @ inside)
    return held if k > 0 else 1 - held


def level_of(p, k, sigma, shift):
    """Of the set that is left out at chance p."""
    return optimize.brentq(lambda level: above(level, k, sigma, shift, False) - (1 - p), -400, 400, xtol=1e-12)


def kept(p, k, sigma, shift):
    """The least chance, after an attack, of a set that has chance p without it."""
    return 1 - above(level_of(p, k, sigma, shift), k, sigma, shift, True) if k != 0 else float(special.ndtr(special.ndtri(p) - shift))


@pytest.mark.parametrize(
    ("sigma", "tau", "p_a", "p_b"),
    [(0.4, 0.4, 0.95, None), (0.4, 0.4, 0.7, 0.1), (0.1, 0.3, 0.99, None), (0.5, 0.1, 0.99, None), (0.8, 0.8, 0.999, None), (0.4, 0.3, 0.45, 0.2)],
)
def test_radii_are_those_of_the_worst_classifier_in_the_box(sigma, tau, p_a, p_b):
    noise = ContrastBrightness(sigma, tau)

    def margin(k, b):
        """Of the top class over its rival, both at their worst."""
        other = kept(1 - p_b, k, sigma, b / tau) if p_b is not None else kept(p_a, k, sigma, b / tau)
        return kept(p_a, k, sigma, b / tau) + other - 1

    found = float(noise.radius(p_a, p_b))
    inside = [margin(share * found, part * found) for share, part in itertools.product(np.linspace(-1, 1, 11), (1.0, 0.4))]
    assert min(inside) > -1e-9
    assert min(margin(k, 1.0005 * found) for k in (-1.0005 * found, 1.0005 * found)) < 0
    box = 0.5 * found
    b = float(noise.brightness(box, p_a, p_b))
    assert b > found
    assert min(margin(share * box, b) for share in np.linspace(-1, 1, 11)) > -1e-9
    assert min(margin(share * box, 1.0005 * b) for share in (-1, 1)) < 0


def test_single_contrasts_meet_known_answers():
    """The largest |b| at s = t = 0.4, by 4e5 draws: 0.620 at ln 0.8 and 0.632 at ln 1.2 for p = 0.95, 0.902 and 0.911 for p = 0.99."""
    for p, draws in ((0.95, (0.620, 0.632)), (0.99, (0.902, 0.911))):
        for factor, drawn in zip((0.8, 1.2), draws, strict=True):
            k = math.log(factor)

            def half(b, p=p, k=k):
                return float(gained(np.array([1 - p]), np.array([k]), np.array([abs(k) / 0.4]), b / 0.4)[0, 0]) - 0.5

            b = optimize.brentq(half, 0.1, 2)
            assert b == pytest.approx(drawn, abs=2e-3)
            assert kept(p, k, 0.4, b / 0.4) == pytest.approx(0.5, abs=1e-6)


def test_the_limits_are_those_of_one_transform():
    noise, p = ContrastBrightness(0.4, 0.3), 0.97
    alone = float(Brightness(0.3).radius(p))
    assert float(noise.brightness(0.0, p)) == pytest.approx(alone, rel=1e-12)
    for contrast_, slack in ((1e-12, 2e-4), (1e-4, 4e-4)):
        assert alone * (1 - slack) < float(noise.brightness(contrast_, p)) < alone
    assert float(noise.brightness(0.0, 0.7, 0.1)) == pytest.approx(float(Brightness(0.3).radius(0.7, 0.1)), rel=1e-12)
    # contrast alone, where there is noise in the brightness: its change of width helps the attack as well, the less the smaller sigma
    for sigma, share in ((0.5, 0.6), (0.01, 0.999)):
        most = float(Contrast(sigma).radius(p))
        assert worst(np.array([1 - p]), Box(share * most, sigma, 0.0)) < 1
        assert worst(np.array([1 - p]), Box(most, sigma, 0.0)) > 1
        assert float(ContrastBrightness(sigma, 1e3).radius(p)) < most


def test_no_radius_is_below_that_of_two_steps_and_more_certainty_is_never_worse():
    p = np.array([0.5, 0.501, 0.6, 0.8, 0.99, 1 - 1e-5, 1.0])
    for sigma, tau in ((0.02, 0.4), (0.4, 0.4), (0.4, 0.02), (2.0, 0.4), (0.4, 3.0)):
        noise = ContrastBrightness(sigma, tau)
        found, boxes = noise.radius(p), np.array([noise.brightness(k * sigma, p) for k in (0.0, 0.3, 1.0)])
        assert (found >= TwoSteps(noise).radius(p)).all()
        assert (boxes >= [TwoSteps(noise).brightness(k * sigma, p) for k in (0.0, 0.3, 1.0)]).all()
        assert (np.diff(found) >= -1e-9 * found[1:]).all()
        assert (np.diff(boxes, axis=1) >= -1e-9 * boxes[:, 1:]).all()
        assert (np.diff(boxes, axis=0) <= 0).all()
        assert found[0] == 0
        rivals = noise.radius(0.8, np.array([0.2, 0.1, 0.01]))
        assert rivals[0] == pytest.approx(found[3], rel=1e-9)
        assert (np.diff(rivals) > 0).all()
        assert (noise.radius(np.array([0.2, 0.4, 0.0]), np.array([0.3, 0.4, 1.0])) == 0).all()
    assert float(ContrastBrightness(0.4, 0.4).radius(0.999)) > 1.7 * float(TwoSteps(ContrastBrightness(0.4, 0.4)).radius(0.999))


def test_extreme_noise_gives_a_radius_without_a_warning():
    with np.errstate(all="raise", under="ignore"):
        for sigma, tau in itertools.product((1e-200, 1e-30, 1e-3, 1e3, 1e30, 1e200), repeat=2):
            noise = ContrastBrightness(sigma, tau)
            found = noise.radius(np.array([0.0, 0.5 + 1e-12, 0.9]))
            assert (found >= 0).all()
            assert found[0] == 0
            assert found[2] <= min(float(Brightness(tau).radius(0.9)), float(Contrast(sigma).radius(0.9)))
    assert ContrastBrightness(0.3, 0.2).brightness(100.0, 0.999) == 0


def test_the_sum_over_points_is_as_near_as_it_says():
    """Against a sum with an eighth of the step; with steps twice as long many would not be."""
    rng, short = np.random.default_rng(0), 0
    for rise, slope in ((0.0, 0.0), (0.3, 1.0), (1.0, 5.0), (8.0, 0.5), (0.1, 64.0), (3.0, 20.0)):
        z, weight, error = contrast._points(rise, slope, 1.0)
        step = z[1] - z[0]
        fine, long = ((part := step * factor) * np.arange(-math.ceil(9 / part), math.ceil(9 / part) + 1) for factor in (0.125, 2.0))
        for a, b, c in zip(rng.choice([-rise, rise], 8), rng.choice([-slope, slope], 8), rng.normal(0, 1 + slope, 8), strict=True):

            def total(at, weights, a=a, b=b, c=c):
                return float(weights @ special.ndtr(a * at**2 + b * at + c))

            exact, crude = (total(at, (at[1] - at[0]) * stats.norm.pdf(at)) for at in (fine, long))
            assert abs(total(z, weight) - exact) <= error + 1e-14
            short += abs(crude - exact) > error
    assert short > 10


def test_chances_bend_no_more_than_they_are_said_to():
    """Half the mean of |h| is below the bound, and so are second differences of the largest chance."""
    z, weight = np.polynomial.hermite_e.hermegauss(200)
    weight = weight / weight.sum()
    for sigma in (0.1, 0.4, 1.0):
        u, v = z[:, None] / sigma, z[None]
        h = u**2 - 1 / sigma**2 + 2 * u * (1 - v**2) + v**4 - 4 * v**2 + 1
        most = math.sqrt(1 / (2 * sigma**4) + 2 / sigma**2 + 8)
        assert weight @ h @ weight == pytest.approx(0, abs=1e-8)
        assert 0.3 * most < weight @ np.abs(h) @ weight / 2 < most
        for q, shift in ((0.01, 1.5), (0.3, 0.5), (1e-4, 3.0)):
            k, step = np.linspace(0.2, 1.2, 40) * min(sigma, 0.5), 0.005 * sigma
            ends = [gained(np.array([q]), at, at / sigma, shift)[0] for at in (k - step, k, k + step)]
            assert (ends[0] + ends[2] - 2 * ends[1] > -most * step**2).all()


def test_a_box_is_no_better_than_any_of_its_contrasts(monkeypatch):
    """Also where few contrasts have to tell of all, and chords alone would not do."""
    rng, above_chords = np.random.default_rng(1), 0
    for case in range(40):
        monkeypatch.setattr(contrast, "_ALL", -np.cos(np.linspace(0, math.pi, 19 if case < 15 else 4)))
        sigma, q = 10 ** rng.uniform(-1, 0.5), 10 ** rng.uniform(-5, -0.4, 2)
        box = Box(float(rng.uniform(0.1, 1.5) * min(sigma, 1.0)), float(sigma), float(rng.uniform(0, 2)))
        k = np.linspace(-1, 1, 61) * box.contrast
        each = gained(q, k, np.abs(k) / sigma, box.shift).sum(axis=0)
        assert each.max() <= worst(q, box) * (1 + 1e-9)
        few = gained(q, at := contrast._ALL * box.contrast, np.abs(at) / sigma, box.shift).sum(axis=0)
        above_chords += (each > np.interp(k, at, few) * (1 + 1e-6)).any()
    assert above_chords > 0


def test_the_parabola_over_a_chord_is_the_least_that_bends_so(monkeypatch):
    """A chance that bends as far as any may, between three contrasts: its own maximum is found; half the bend would miss it."""
    box = Box(0.3, 0.7, 1.0)
    most = 2 * math.sqrt(1 / (2 * box.sigma**4) + 2 / box.sigma**2 + 8)

    def bent(k):
        return 0.7 + 0.05 * k - most / 2 * (k + 0.07) ** 2

    monkeypatch.setattr(contrast, "_sums", lambda chances, box, parts: bent(box.contrast * parts))
    for parts in ([-1.0, 0.0, 1.0], [-1.0, -0.3, 1.0], [-1.0, -0.9, 0.9, 1.0]):
        monkeypatch.setattr(contrast, "_ALL", np.array(parts))
        exact = optimize.minimize_scalar(lambda k: -bent(k), bounds=(-0.3, 0.3), method="bounded", options={"xatol": 1e-9})
        assert worst(np.array([0.1]), box) == pytest.approx(-exact.fun, abs=1e-7)
        assert worst(np.array([0.1]), box) >= -exact.fun


class Worst(torch.nn.Module):
    """Of copies e^k ((0, 1) + b): class 1 where (k, b) is in the set that is best against the attack (shift_k, shift_b), class 0 elsewhere."""

    def __init__(self, sigma, tau, k, b, level):
        super().__init__()
        self.sigma, self.tau, self.k, self.b, self.level = sigma, tau, k, b, level

    def forward(self, x):
        x = x.double()
        width = x[:, 1] - x[:, 0]
        u, v, m = width.log() / self.sigma, x[:, 0] / width / self.tau, math.exp(self.k)
        side = 2 * self.k / self.sigma * u + (1 - m**2) * v**2 + 2 * m**2 * self.b / self.tau * v - self.level
        return torch.stack([-side, side], dim=1)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_radius_of_the_worst_classifier_is_not_above_the_truth_more_often_than_alpha(sign):
    """The network is the worst that there is at a score of 0.9 against one corner of the box, so its radius is the truth."""
    sigma, tau, p, alpha, count = 0.3, 0.4, 0.9, 0.1, 150

    truth = optimize.brentq(lambda r: kept(p, sign * r, sigma, r / tau) - 0.5, 0.1, 1.0, xtol=1e-7)
    net = Worst(sigma, tau, sign * truth, truth, level_of(p, sign * truth, sigma, truth / tau)).eval()
    method = Smoothing(ContrastBrightness(sigma, tau), schedule=FixedN(20, 2000, alpha), levels=None, seed=7)
    certificate = certify.robustness(net, torch.tensor([[0.0, 1.0]]).expand(count, -1), method)
    assert (certificate.prediction == 0).all()
    assert (certificate.radius > truth).sum() <= stats.binom.isf(1e-6, count, alpha)
    assert np.median(certificate.radius) > 0.95 * truth
