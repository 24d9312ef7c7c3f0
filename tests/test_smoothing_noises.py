"""Noises: each radius against the worst classifier there is, found numerically (Neyman & Pearson), and known answers."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from certify.bound import Estimate
from certify.errors import CertifyError
from certify.smoothing import diffusion, noises
from certify.smoothing.noises import (
    Ablation,
    Brightness,
    Contrast,
    ContrastBrightness,
    CyclicTranslation,
    Exponential,
    FoldedNormal,
    FourierBlur,
    Gamma,
    Gaussian,
    GaussianLinf,
    Laplace,
    LogNormalGamma,
    Rayleigh,
    TwoSteps,
    Uniform,
    UniformLinf,
    UniformTo,
    general_lipschitz,
)

SCORES = [(0.6, None), (0.9, None), (0.99, None), (0.7, 0.1), (0.45, 0.2), (0.9, 0.001)]


def extremes(q0, q1, p_a, p_b):
    """The least mean under q1 of a score with mean p_a under q0, and the greatest of one with p_b: weights on a grid or of draws, sorted by their ratio."""
    ratio = np.where(q0 > 0, q1 / np.where(q0 > 0, q0, 1), np.inf)
    order = np.argsort(ratio, kind="stable")
    under0, under1 = np.cumsum(q0[order]), np.cumsum(q1[order])
    least = np.interp(p_a, under0, under1)
    return least, under1[-1] - np.interp(1 - p_b, under0, under1)


def gap(density0, density1, x, p_a, p_b):
    """Top class minus rival, both at their worst; positive where the certificate holds."""
    weights = np.gradient(x)
    q0, q1 = density0(x) * weights, density1(x) * weights
    least, greatest = extremes(q0 / q0.sum(), q1 / q1.sum(), p_a, p_b)
    return least - greatest


SHIFTS = [
    (Gaussian(1.3), stats.norm(scale=1.3), True),
    (Laplace(0.7), stats.laplace(scale=0.7), True),
    (Uniform(2.0), stats.uniform(-2, 4), True),
    (Brightness(0.4), stats.norm(scale=0.4), True),
    (Contrast(0.4), stats.norm(scale=0.4), True),
    (LogNormalGamma(0.4), stats.norm(scale=0.4), True),
    (CyclicTranslation(3.0), stats.norm(scale=3), True),
    (FourierBlur(Exponential(1.3)), stats.expon(scale=1.3), False),
    (FourierBlur(UniformTo(2.0)), stats.uniform(0, 2), False),
    (FourierBlur(FoldedNormal(1.5)), stats.halfnorm(scale=1.5), False),
    (FourierBlur(Rayleigh(0.8)), stats.rayleigh(scale=0.8), False),
]


@pytest.mark.parametrize(("p_a", "p_b"), SCORES)
@pytest.mark.parametrize(("noise", "law", "both"), SHIFTS, ids=lambda v: repr(v) if isinstance(v, noises.Noise) else "")
def test_no_classifier_changes_inside_and_some_does_just_outside(noise, law, both, p_a, p_b):
    found = float(noise.radius(p_a, p_b))
    assert found > 0
    scale = law.std()
    x = np.linspace(law.ppf(1e-9) - found - scale, law.ppf(1 - 1e-9) + found + scale, 400_001)
    for sign in (1, -1) if both else (1,):
        for change, holds in ((-2e-3, True), (2e-3, False)):
            shift = sign * found * (1 + change)
            assert (gap(law.pdf, lambda t, s=shift: law.pdf(t - s), x, p_a, 1 - p_a if p_b is None else p_b) > 0) == holds


@pytest.mark.parametrize(("p_a", "p_b"), SCORES)
@pytest.mark.parametrize(
    ("noise", "law"),
    [(Gamma(Exponential(2.0)), stats.expon(scale=2.0)), (Gamma(Rayleigh()), stats.rayleigh())],
    ids=lambda v: repr(v) if isinstance(v, noises.Noise) else "",
)
def test_no_classifier_changes_within_the_interval_of_exponents(noise, law, p_a, p_b):
    least, greatest = map(float, noise.interval(p_a, p_b))
    assert least < 1 < greatest
    assert float(noise.radius(p_a, p_b)) == pytest.approx(min(math.log(greatest), -math.log(least)))
    x = np.exp(np.linspace(math.log(law.ppf(1e-9) * least / 2), math.log(law.ppf(1 - 1e-9) * greatest * 2), 400_001))
    for edge, inside in ((greatest, -1), (least, 1)):
        for change, holds in ((2e-3 * inside, True), (-2e-3 * inside, False)):
            g = edge * (1 + change)
            assert (gap(law.pdf, lambda t, g=g: law.pdf(t / g) / g, x, p_a, 1 - p_a if p_b is None else p_b) > 0) == holds


@pytest.mark.parametrize(
    ("noise", "law"), [(Laplace(1.0), stats.laplace()), (Uniform(1.0), stats.uniform(-1, 2))], ids=lambda v: repr(v) if isinstance(v, noises.Noise) else ""
)
def test_l1_radii_hold_for_shifts_along_two_axes(noise, law):
    """Neyman & Pearson in two dimensions; the worst is along one axis."""
    p, edge, n = 0.8, 1.0 if isinstance(noise, Uniform) else 9.0, 1200
    found, width = float(noise.radius(p)), 2 * edge / n
    for share in (0.5, 0.2):
        shift = np.round(found * np.array([share, 1 - share]) / width) * width
        x = np.arange(-n // 2, n // 2 + round(found / width) + 1) * width + width / 2
        one = [law.pdf(x - s) * width for s in (0.0, 0.0, *shift)]
        q0, q1 = np.outer(one[0], one[1]).ravel(), np.outer(one[2], one[3]).ravel()
        least, _ = extremes(q0 / q0.sum(), q1 / q1.sum(), p, 1 - p)
        assert least > 0.5 - 2e-3


def test_closed_forms_meet_known_answers():
    p = np.array([0.6, 0.8, 0.99])
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(Laplace(2.0).radius(p), -2 * np.log(2 * (1 - p)), **close)
    np.testing.assert_allclose(Uniform(2.0).radius(p), 4 * (p - 0.5), **close)
    assert float(Uniform(0.5 * math.sqrt(3)).radius(0.99)) == pytest.approx(0.84870489571, abs=1e-9)
    np.testing.assert_allclose(UniformLinf(2.0, 10).radius(p), 4 * (1 - (1.5 - p) ** 0.1), **close)
    np.testing.assert_allclose(UniformLinf(2.0, 1).radius(p), Uniform(2.0).radius(p), **close)
    np.testing.assert_allclose(FourierBlur(Exponential(1.3)).radius(p), -1.3 * np.log(2 - 2 * p), rtol=1e-8)
    np.testing.assert_allclose(FourierBlur(UniformTo(1.3)).radius(p), 1.3 * (p - 0.5), rtol=1e-8)
    np.testing.assert_allclose(FourierBlur(FoldedNormal(1.3)).radius(p), 1.3 * (stats.norm.ppf((1 + p) / 2) - stats.norm.ppf(0.75)), rtol=1e-8)
    np.testing.assert_allclose(FourierBlur(Rayleigh(1.3)).radius(p), 1.3 * (np.sqrt(-2 * np.log(1 - p)) - math.sqrt(2 * math.log(2))), rtol=1e-8)
    for law, power in ((Exponential(), 1.0), (Rayleigh(), 0.5)):
        low, high = Gamma(law).interval(p)
        np.testing.assert_allclose(low, np.log2(1 / p) ** power, rtol=1e-8)
        np.testing.assert_allclose(high, np.log2(1 / (1 - p)) ** power, rtol=1e-8)
    assert float(Gaussian(1.0).radius(0.9)) / float(GaussianLinf(1.0, 3072).radius(0.9)) == pytest.approx(55.4256, abs=1e-4)
    assert (Laplace(1.0).radius(np.array([0.9, 0.7]), np.array([0.05, 0.3])) >= [0.5 * math.log(18), 0.5 * math.log(7 / 3)] - np.float64(1e-9)).all()


def test_laplace_dominates_the_published_two_class_radius():
    rng = np.random.default_rng(0)
    p, q = np.sort(rng.dirichlet([1, 1, 1], 500)[:, :2], axis=1)[:, ::-1].T
    published = np.maximum(np.log(p / q) / 2, -np.log(1 - p + q))
    found = Laplace(1.0).radius(p, q)
    assert (found >= published - 1e-10).all()
    assert (found > published + 0.01).any()


def test_radii_are_below_the_exact_numbers_and_zero_where_nothing_is_certified():
    every = [noise for noise, _, _ in SHIFTS] + [
        UniformLinf(1.0, 10),
        GaussianLinf(1.0, 10),
        Ablation(45, 784),
        ContrastBrightness(0.4, 0.4),
        Gamma(Rayleigh()),
    ]
    for noise in every:
        assert (noise.radius(np.array([0.0, 0.3, 0.5])) == 0).all()
        assert (noise.radius(np.array([0.2, 0.4]), np.array([0.3, 0.4])) == 0).all()
        found = noise.radius(np.linspace(0.5, 1, 30))
        assert np.isfinite(found).all()
        assert (np.diff(found) >= 0).all()
        assert float(noise.radius(1.0, 0.0)) > 0
        assert noise.measure
        assert noise.norm is None or f"l{noise.norm:g}" in noise.measure or noise.norm == 0
        with pytest.raises(CertifyError, match=r"lie in \[0, 1\]"):
            noise.radius(1.5)


@pytest.mark.parametrize("d", [2, 3])
def test_uniform_noise_against_linf_keeps_the_overlap(d):
    """The two laws overlap in (1 - r / 2 half_width)^d, and the worst scores lose all that is left: exactly the margin, at the radius."""
    noise, p_a, p_b = UniformLinf(0.5, d), 0.8, 0.1
    found = float(noise.radius(p_a, p_b))
    lost = 1 - (1 - found) ** d
    assert p_a - lost == pytest.approx(p_b + lost, abs=1e-9)
    assert p_a - lost > p_b + lost


def test_ablation_meets_known_answers_and_rational_arithmetic():
    assert [float(Ablation(k, d).radius(1.0)) for d, k in [(784, 45), (1024, 75), (50176, 2000)]] == [11, 9, 17]
    for d, k, p, q in [(30, 4, 0.9, 0.1), (784, 45, 0.95, None), (784, 45, 0.8, 0.01), (10, 1, 0.99, 0.0), (5, 5, 0.99, None)]:
        found = int(Ablation(k, d).radius(p, q))

        def seen(rho, d=d, k=k):
            return 1 - Fraction(math.comb(d - rho, k), math.comb(d, k))

        margin = Fraction(p) - (1 - Fraction(p) if q is None else Fraction(q))
        assert 2 * seen(found) < margin or found == 0
        assert 2 * seen(found + 1) >= margin * (1 - Fraction(1, 10**7))


def test_ablation_by_brute_force():
    """All classifiers of what is kept, at worst: those masks that meet a changed pixel turn against the top class."""
    d, k = 6, 2
    masks = list(itertools.combinations(range(d), k))
    for p in (0.7, 0.85, 1.0):
        found = int(Ablation(k, d).radius(p))
        for rho in range(d):
            worst = p - sum(any(pixel < rho for pixel in mask) for mask in masks) / len(masks)
            assert (worst > 0.5 + 1e-9) == (rho <= found)


@pytest.mark.parametrize("p", [0.9, 0.99])
def test_contrast_and_brightness_hold_together(p):
    """Neyman & Pearson in two dimensions by Monte Carlo: the composed parameter is normal, with mean (k, b) and standard deviations (s, e^-k t)."""
    noise, rng = ContrastBrightness(0.4, 0.3), np.random.default_rng(0)
    z = rng.standard_normal((400_000, 2))
    error = math.sqrt((p * (1 - p) * math.exp(stats.norm.ppf(p) ** 2) + 0.25) / 400_000)  # of the quantile, times the ratio of the densities, and of the mean
    for box in (0.0, 0.1, math.log(1.2)):
        b = float(noise.brightness(box, p))
        assert b > 0
        for k, sign in itertools.product((-box, box / 2, box), (-1, 1)):
            spread = np.array([0.4, 0.3])
            draws = [z * spread, z * spread * [1, math.exp(-k)] + [k, sign * b]]
            ratio = [(-((x[:, 0] - k) ** 2) + x[:, 0] ** 2) / 0.32 + (-((x[:, 1] - sign * b) ** 2) * math.exp(2 * k) + x[:, 1] ** 2) / 0.18 for x in draws]
            assert (ratio[1] <= np.quantile(ratio[0], p)).mean() > 0.5 - 5 * error
    assert float(noise.brightness(0.0, p)) == pytest.approx(float(Brightness(0.3).radius(p)), rel=1e-9)
    together = float(noise.radius(p))
    assert float(noise.brightness(together, p)) >= together > 0


def test_the_two_steps_of_contrast_and_brightness_meet_known_answers():
    """Of single contrasts, s = t = 0.4, p = 0.95: 0.526 at ln 0.8 and 0.496 at ln 1.2; a box of contrasts has the lesser end."""
    noise = TwoSteps(ContrastBrightness(0.4, 0.4))
    z = [stats.norm.ppf(q) for q in (2 * stats.norm.cdf(0.8 * stats.norm.ppf(0.975)) - 1, 2 - 2 * stats.norm.cdf(1.2 * stats.norm.ppf(1 - 0.475)))]
    assert [round(0.4 * math.exp(-k) * math.sqrt(v**2 - (k / 0.4) ** 2), 3) for k, v in zip((math.log(0.8), math.log(1.2)), z, strict=True)] == [0.526, 0.496]
    assert 0.3 < float(noise.brightness(math.log(1.2), 0.95)) <= 0.496 < float(noise.noise.brightness(math.log(1.2), 0.95))
    assert float(noise.brightness(found := float(noise.radius(0.95)), 0.95)) >= found > 0
    with pytest.raises(CertifyError, match="contrast >= 0"):
        noise.noise.brightness(-0.1, 0.95)


def test_general_lipschitz_gives_an_estimate_and_never_a_certificate():
    def normal(b, samples, rng):
        return rng.standard_normal(samples) / 0.5  # d/db of -(z - b)^2 / (2 sigma^2) at z = b + sigma N(0, 1)

    found = general_lipschitz(normal, np.linspace(0, 2, 201), p=0.9)
    assert isinstance(found, Estimate)
    assert found.value == pytest.approx(0.5 * stats.norm.ppf(0.9), rel=0.05)
    with pytest.raises(CertifyError, match="between 1/2 and 1"):
        general_lipschitz(normal, np.linspace(0, 2, 11), p=0.4)


def test_timesteps_meet_those_of_the_released_models():
    cosine, linear = diffusion.cosine(), diffusion.linear()
    released = {0.12: (cosine, 573), 0.25: (cosine, 1158), 0.5: (cosine, 1984), 1.0: (cosine, 2809)}
    for sigma, (abar, first_above) in released.items():
        found, levels = diffusion.timestep(sigma, abar), diffusion.noise_level(abar)
        assert levels[first_above - 1] < sigma <= levels[first_above]
        assert found in (first_above - 1, first_above)
    assert diffusion.timestep(0.25, linear) in (144, 145)
    assert diffusion.noise_level(linear)[145] == pytest.approx(0.25158, abs=1e-5)
    assert diffusion.noise_level(cosine)[573] == pytest.approx(0.12012, abs=1e-5)
    with pytest.raises(CertifyError, match=r"knows noise of sigma .* got 1000"):
        diffusion.timestep(1000.0, linear)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Laplace(0.0), "scale is a positive"),
        (lambda: Uniform(-1.0), "half_width is a positive"),
        (lambda: UniformLinf(1e308, 10), "half_width is a positive, finite number, from 1e-200 to 1e200"),  # its radii would be inf
        (lambda: Laplace(1e308), "scale is a positive"),
        (lambda: Gaussian(1e-310), "sigma is a positive"),  # its radii would have a few digits, rounded either way
        (lambda: Gaussian(math.nan), "sigma is a positive"),
        (lambda: UniformLinf(1.0, 0), "dimension is a whole number"),
        (lambda: GaussianLinf(1.0, 2.5), "dimension is a whole number"),
        (lambda: Ablation(0, 10), "keep is a whole number"),
        (lambda: Ablation(11, 10), "cannot keep 11 of 10"),
        (lambda: Brightness(math.inf), "sigma is a positive"),
        (lambda: ContrastBrightness(1.0, -1.0), "tau is a positive"),
        (lambda: Rayleigh(-1.0), "scale is a positive"),
        (lambda: Gamma(UniformTo()), "LogNormalGamma"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message):
    with pytest.raises(CertifyError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
