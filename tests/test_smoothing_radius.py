"""Radii: known answers, worst cases found by brute force, and coverage on classifiers whose smoothed function is known."""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, optimize, sparse, stats
from torch import nn

import certify
from certify.bound import Ball, Bound, Estimate
from certify.errors import CertifyError
from certify.smoothing import (
    ClopperPearson,
    EmpiricalBernstein,
    FixedN,
    Gaussian,
    GroupSequential,
    Hardmax,
    Hoeffding,
    MaurerPontil,
    Procedure,
    SmoothedClassifier,
    Softmax,
    Sparsemax,
    Tally,
    choose_scores,
)
from certify.smoothing import radius as r

PHI, QUANTILE = stats.norm.cdf, stats.norm.ppf


def ramp(c, lipschitz):
    return lambda t: np.clip(1 - lipschitz * (t - c), 0, 1)


def smoothed(f, x, sigma=1.0, points=20_001):
    t = np.linspace(-9, 9, points) * sigma
    return integrate.trapezoid(f(x + t) * stats.norm.pdf(t, scale=sigma), t)


def test_gaussian_radii_meet_known_answers_from_below():
    for p, sigma, known in [(0.999, 0.5, 1.54511615308391), (0.99, 0.25, 0.58158696851), (0.5, 1.0, 0.0), (0.4, 1.0, 0.0), (0.0, 1.0, 0.0)]:
        found = float(r.gaussian(p, sigma))
        assert known - 1e-10 < found <= known + 1e-11 * (known < 1)
    assert float(r.gaussian(0.8, 2.0, 0.1)) == pytest.approx(QUANTILE(0.8) - QUANTILE(0.1), abs=1e-10)
    assert float(r.gaussian(0.3, 1.0, 0.4)) == 0


def test_quantiles_are_rounded_down_and_scipy_is_as_accurate_as_is_relied_on():
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(60), 10 ** -rng.uniform(1, 15, 30), 1 - 10 ** -rng.uniform(1, 14, 30), [0.5, 0.5 + 1e-9, 0.5 - 1e-12]])
    with mpmath.workdps(40):
        for value, z in zip(p, r.normal_quantile(p), strict=True):
            exact = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(float(value)) - 1)
            assert mpmath.mpf(float(z)) < exact
            assert exact - mpmath.mpf(float(z)) < 1.01 * r.SLACK * max(1, abs(exact))


def test_the_mean_of_phi_is_as_accurate_as_is_relied_on():
    with mpmath.workdps(40):
        for c in (-9.0, -2.5, 0.0, 1.3, 6.0):
            for width in (1e-6, 0.02, 0.7, 3.9, 5.0, 40.0):
                antiderivative = [t * mpmath.ncdf(-t) - mpmath.npdf(t) for t in (mpmath.mpf(c), mpmath.mpf(c) + mpmath.mpf(width))]
                exact = (antiderivative[1] - antiderivative[0]) / mpmath.mpf(width)
                assert abs(r._mean_tail(np.array(c), width) / exact - 1) < r.SLACK / 10


@pytest.mark.parametrize(
    ("p", "upper", "lipschitz", "known"),
    [
        (0.9, None, 1.0, 1.33442308074784),
        (0.99, None, 0.5, 2.66242236641903),
        (0.7, 0.2, 0.5, 0.796074278572215),
        (0.8, None, 0.2, 1.6005228551568),
        (0.999, None, 2.0, 3.1218331649050),
    ],
)
def test_lipschitz_aware_radii_meet_known_answers_from_below(p, upper, lipschitz, known):
    found = float(r.lipschitz_aware(p, 1.0, Bound(lipschitz, ""), upper))
    assert known - 1e-9 < found < known + 1e-12
    assert found > float(r.gaussian(p, 1.0, upper))


def test_lipschitz_aware_radii_have_the_right_limits():
    p, q = np.array([0.6, 0.9, 0.99]), np.array([0.3, 0.1, 0.001])
    np.testing.assert_allclose(r.lipschitz_aware(p, 1.0, Bound(1e6, ""), q), r.gaussian(p, 1.0, q), atol=1e-9)
    np.testing.assert_allclose(r.lipschitz_aware(p, 1e-7, Bound(2.0, ""), q), (p - q) / 4, rtol=1e-8)
    np.testing.assert_allclose(r.lipschitz_aware(p, 1.0, Bound(1e14, ""), q), r.gaussian(p, 1.0, q))
    assert (r.lipschitz_aware(p, 1.0, Bound(0.0, ""), q) > 1e6).all()


@pytest.mark.parametrize(("p_a", "p_b"), [(0.9, 0.1), (0.7, 0.2), (0.45, 0.3)])
def test_two_ramps_meet_the_lipschitz_aware_radius(p_a, p_b):
    """It is tight: the falling ramp of the top class and the rising one of the rival cross there, and not before."""
    lipschitz = 0.5
    found = float(r.lipschitz_aware(p_a, 1.0, Bound(lipschitz, ""), p_b))
    at = [optimize.brentq(lambda c, p=p: smoothed(ramp(c, lipschitz), 0.0) - p, -20, 20) for p in (p_a, 1 - p_b)]
    gap = [smoothed(ramp(at[0], lipschitz), x) - (1 - smoothed(ramp(at[1], lipschitz), x)) for x in (found - 1e-4, found + 1e-4)]
    assert gap[0] > 0 > gap[1]


def test_no_lipschitz_score_falls_faster_than_the_ramp():
    """Against a linear program over all L-Lipschitz scores on a grid."""
    lipschitz, p, shift = 0.5, 0.9, 0.7
    u = np.linspace(-8, 8, 401)
    step = u[1] - u[0]
    difference = sparse.diags_array([1.0, -1.0], offsets=[1, 0], shape=(len(u) - 1, len(u)))
    found = optimize.linprog(
        stats.norm.pdf(u - shift) * step,
        A_ub=sparse.vstack([difference, -difference]),
        b_ub=np.full(2 * (len(u) - 1), lipschitz * step),
        A_eq=stats.norm.pdf(u)[None] * step,
        b_eq=[p],
        bounds=(0, 1),
    ).fun
    c = optimize.brentq(lambda c: smoothed(ramp(c, lipschitz), 0.0) - p, -20, 20)
    assert found == pytest.approx(smoothed(ramp(c, lipschitz), shift), abs=2e-4)
    assert found > PHI(QUANTILE(p) - shift) + 0.02


def test_random_lipschitz_scores_keep_their_order_inside():
    rng, lipschitz = np.random.default_rng(1), 0.8
    t = np.linspace(-12, 12, 4001)
    for _ in range(30):
        f = np.interp(t, np.linspace(-12, 12, 40), rng.random(40))
        f = np.clip(np.cumsum(np.clip(np.diff(f, prepend=f[0]) * 3, -lipschitz * 0.006, lipschitz * 0.006)) + rng.random(), 0, 1)
        p = min(integrate.trapezoid(f * stats.norm.pdf(t), t), 1.0)
        found = float(r.lipschitz_aware(p, 1.0, Bound(lipschitz, ""))) - 1e-6
        if found > 0:
            for x in (-min(found, 4), min(found, 4)):
                assert integrate.trapezoid(f * stats.norm.pdf(t - x), t) > 0.5


def test_a_lipschitz_constant_must_be_proved_everywhere_and_of_l2():
    with pytest.raises(TypeError, match="proved Bound, got Estimate"):
        r.lipschitz_aware(0.9, 1.0, Estimate(1.0, "power iteration"))
    with pytest.raises(CertifyError, match="everywhere"):
        r.lipschitz_aware(0.9, 1.0, Bound(1.0, "", domain=Ball(np.zeros(2), 1.0)))
    with pytest.raises(CertifyError, match="from l2"):
        r.lipschitz_aware(0.9, 1.0, Bound(1.0, "", norm=(math.inf, 2)))
    with pytest.raises(TypeError, match="proved Bound"):
        SmoothedClassifier(Gaussian(1.0), Softmax(), Estimate(1.0, "power iteration"))
    with pytest.raises(CertifyError, match="they jump"):
        SmoothedClassifier(Gaussian(1.0), Hardmax(), Bound(1.0, ""))


@pytest.mark.parametrize(("scores", "least"), [(Softmax(0.7), 0.99), (Sparsemax(0.7), 0.95)], ids=repr)
def test_slopes_of_score_maps_are_met_and_not_exceeded(scores, least):
    rng = np.random.default_rng(2)
    for classes in (2, 5):
        z = rng.standard_normal((4000, classes)) * 0.7
        z[:, 2:] -= 3.0 * (rng.random((4000, 1)) < 0.5) if isinstance(scores, Softmax) else 0.0
        gradients = np.stack([(scores(z + e) - scores(z - e))[:, 0] / 2e-5 for e in 1e-5 * np.eye(classes)], axis=1)
        slope = np.linalg.norm(gradients, axis=1).max()
        assert least * scores.slope(classes) < slope < scores.slope(classes) * (1 + 1e-6)
        assert np.allclose(scores(z).sum(axis=1), 1)
        apart = np.where(np.arange(classes) > 0, -gradients, 0.0)  # the gradient in terms of the differences z_0 - z_j
        assert np.allclose(gradients[:, 0], apart.sum(axis=1), atol=1e-4)
        assert least * scores.weight(classes) < np.abs(apart).sum(axis=1).max() < scores.weight(classes) * (1 + 1e-6)
    for pair, value in ((1.0, scores.weight(5)), (9.0, 2 * scores.slope(5))):
        found = scores.lipschitz(Bound(2.0, "", pairs=pair * (1 - np.eye(5))))
        assert value <= found.value <= value * (1 + 1e-15)
        assert found.norm == (2, math.inf)
    assert scores.lipschitz(Bound(2.0, "")).value == pytest.approx(2 * scores.slope())


@pytest.mark.parametrize("scores", [Softmax(0.7), Sparsemax(0.7)], ids=repr)
def test_constants_of_differences_of_logits_bound_scores(scores):
    """Logits that share most of what they do: the constant of their differences is far below that of all of them, and scores are not steeper than it says."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    with torch.no_grad():
        net[2].weight.copy_(0.2 * net[2].weight + net[2].weight[:1])
    logits = certify.lipschitz(net, input_shape=(3,))
    value, alone = scores.lipschitz(logits).value, scores.lipschitz(dataclasses.replace(logits, pairs=None)).value
    assert value < 0.5 * alone
    x = 3 * torch.randn(4000, 3, dtype=torch.float64)
    y = x + 0.01 * torch.randn(4000, 3, dtype=torch.float64)
    with torch.no_grad():
        moved = np.abs(scores(net(x).numpy()) - scores(net(y).numpy())).max(axis=1)
    assert (moved <= value * np.linalg.norm((x - y).numpy(), axis=1) + 1e-15).all()


# Mixed classifiers


def test_mixed_radii_meet_known_answers_and_the_worst_partner():
    assert float(r.mixed(0.999, 1.0, 0.8)) == pytest.approx(2.772, abs=1e-3)
    assert float(r.mixed(0.95, 2.0, 0.9)) == pytest.approx(2 * (QUANTILE(0.95) - QUANTILE(1 / 1.8)), abs=1e-9)
    np.testing.assert_allclose(r.mixed([0.7, 0.9], 1.0, 1.0, [0.2, 0.1]), r.gaussian([0.7, 0.9], 1.0, [0.2, 0.1]), atol=1e-9)
    for weight, p, q in [(0.8, 0.99, 0.01), (0.9, 0.8, 0.05), (0.6, 0.98, 0.001)]:
        found = float(r.mixed(p, 1.0, weight, q))
        margin = [weight * (PHI(QUANTILE(p) - x) - PHI(QUANTILE(q) + x)) - (1 - weight) for x in (found, found + 1e-8)]
        assert margin[0] > 0 > margin[1]
        paper = (QUANTILE(weight * p) - QUANTILE(weight * q + 1 - weight)) / 2
        assert found >= paper
    assert float(r.mixed(0.6, 1.0, 0.55)) == 0


# Coverage on a toy with three classes, soft and hard

W, B, X = np.array([1.0, -0.6, 0.1]), np.array([0.0, 0.3, 0.5]), 0.9  # logits W t + B at t = X + noise


def logits(t):
    return t[..., None] * W + B


def truth(scores, label):
    """Where the smoothed classifier first leaves `label`, on either side of X; 0 where it is another class at X."""
    t, weights = np.polynomial.hermite_e.hermegauss(120)
    if isinstance(scores, Hardmax):
        t = np.linspace(-8, 8, 4001)
        weights = stats.norm.pdf(t)
    x = X + np.linspace(-3.5, 3.5, 1401)
    g = np.argmax(np.einsum("t,xtc->xc", weights, scores(logits(x[:, None] + t))), axis=1)
    changed = np.abs(x - X)[g != label]
    return float(changed.min()) + 0.0051 if len(changed) and g[len(x) // 2] == label else (0.0 if len(changed) else math.inf)


UNIT = 2**24
MAPS = [Hardmax(), Softmax(1.0), Softmax(0.2), Sparsemax(1.0)]
SCHEDULES = [FixedN(n0=50, n=400, alpha=0.1), GroupSequential(looks=(50, 100, 200, 400), n0=50, alpha=0.1)]


def tallies(scores, rng, runs, sizes):
    """Cumulative tallies of separate runs."""
    fixed = np.floor(scores(logits(X + rng.standard_normal((runs, sizes[-1])))) * UNIT).astype(np.int64)
    if isinstance(scores, Hardmax):
        votes = (fixed // UNIT).cumsum(axis=1)
        return [Tally(n, votes[:, n - 1]) for n in sizes]
    squares = -(-(fixed**2) // UNIT)
    return [Tally(n, fixed[:, :n].sum(axis=1), squares[:, :n].sum(axis=1), unit=UNIT) for n in sizes]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("scores", MAPS, ids=repr)
@pytest.mark.parametrize("aware", [False, True], ids=["cohen", "lipschitz"])
def test_claimed_radii_are_true_in_all_but_alpha_of_the_runs(schedule, scores, aware):
    if aware and isinstance(scores, Hardmax):
        pytest.skip("votes have no Lipschitz constant")
    rng, runs = np.random.default_rng(11), 2000
    lipschitz = Bound(float(np.linalg.norm(W)) * (1 + 1e-12), "") if aware else None
    classifier = SmoothedClassifier(Gaussian(1.0), scores, lipschitz)
    (selection,) = tallies(scores, rng, runs, (schedule.n0,))
    looks = tallies(scores, rng, runs, schedule.sizes)
    true = np.array([truth(scores, label) for label in range(3)])[selection.favourite]
    bounds = [ClopperPearson()] if isinstance(scores, Hardmax) else []
    for bound in [*bounds, EmpiricalBernstein(), MaurerPontil(), Hoeffding()]:
        procedure = Procedure(classifier, bound, schedule)
        claimed = np.max([procedure.radius(j, selection, tally) for j, tally in enumerate(looks)], axis=0)
        assert (claimed > true).sum() <= stats.binom.isf(1e-6, runs, schedule.alpha)
        assert claimed.mean() > 0 or isinstance(bound, Hoeffding | MaurerPontil)
        if aware:
            without = Procedure(SmoothedClassifier(Gaussian(1.0), scores), bound, schedule)
            assert claimed.mean() >= np.max([without.radius(j, selection, tally) for j, tally in enumerate(looks)], axis=0).mean()


# The map belongs to the classifier: the counterexample of Delattre et al.'s released code


def jumps(t):
    return np.stack([np.where(t < 0, 0.2, 0.0), np.where((t >= 0) & (t < 1.1), 3.0, 0.0), np.where(t >= 1.1, 0.4, 0.0)], axis=-1)


def exact_scores(scores, x):
    """The mean of each score, in closed form: three intervals."""
    edges = PHI(np.array([-np.inf, 0.0, 1.1, np.inf]) - x)
    return np.diff(edges) @ scores(jumps(np.array([-1.0, 0.5, 2.0])))


def test_the_best_of_two_maps_for_each_input_certifies_what_is_false():
    """Two inputs 0.01 apart get different classes, each with a radius above 0.3 in exact arithmetic, as soon as the map is chosen for each of them."""
    best = {}
    for x in (-0.2, -0.19):
        means = {scores: exact_scores(scores, x) for scores in (Hardmax(), Softmax(1.0))}
        found = [(float(r.gaussian(np.sort(m)[-1], 1.0, np.sort(m)[-2])), int(m.argmax())) for m in means.values()]
        best[x] = max(found)
    assert [round(best[x][0], 3) for x in best] == [0.328, 0.324]
    assert best[-0.2][1] != best[-0.19][1]


def test_a_classifier_has_one_map_and_rows_of_another_are_refused():
    with pytest.raises(TypeError, match="one map"):
        SmoothedClassifier(Gaussian(1.0), (Hardmax(), Softmax(1.0)))
    hard, soft = SmoothedClassifier(Gaussian(1.0)), SmoothedClassifier(Gaussian(1.0), Softmax(1.0))
    with pytest.raises(AttributeError):
        hard.scores = Softmax(1.0)
    assert len({hard.digest, soft.digest, SmoothedClassifier(Gaussian(1.0), Softmax(1.1)).digest, SmoothedClassifier(Gaussian(1.1)).digest}) == 4
    procedures = [Procedure(classifier, bound, FixedN(n0=10, n=100)) for classifier, bound in ((hard, ClopperPearson()), (soft, Hoeffding()))]
    row = procedures[0].row(Tally(10, np.array([9, 1])), [Tally(100, np.array([90, 10]))])
    procedures[0].check_row(row)
    with pytest.raises(CertifyError, match="the row is of classifier"):
        procedures[1].check_row(row)
    with pytest.raises(CertifyError, match="of Softmax"):
        procedures[1].decide(Tally(10, np.array([9, 1])), [Tally(100, np.array([90, 10]))])


def test_a_map_is_chosen_once_on_held_out_inputs():
    rng = np.random.default_rng(0)
    radii = {Softmax(1.0): rng.random(50), Softmax(0.1): rng.random(50) + 0.2}
    assert choose_scores(radii) == Softmax(0.1)
    with pytest.raises(CertifyError, match="at least 30 held-out inputs"):
        choose_scores({scores: values[:1] for scores, values in radii.items()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0), "sigma is a positive"),
        (lambda: Gaussian(-1.0), "sigma is a positive"),
        (lambda: Gaussian(math.nan), "sigma is a positive"),
        (lambda: r.gaussian(0.9, math.inf), "sigma is a positive"),
        (lambda: r.gaussian(1.1, 1.0), r"lie in \[0, 1\]"),
        (lambda: r.gaussian(math.nan, 1.0), r"lie in \[0, 1\]"),
        (lambda: r.gaussian(0.9, 1.0, -0.1), r"lie in \[0, 1\]"),
        (lambda: r.mixed(0.9, 1.0, 0.5), "weight"),
        (lambda: Softmax(0.0), "temperature is a positive"),
        (lambda: Sparsemax(-1.0), "temperature is a positive"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message):
    with pytest.raises(CertifyError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_sparsemax_projection_is_a_projection():
    z = np.random.default_rng(3).standard_normal((50, 4)) * 2
    found = Sparsemax(0.5)(z)
    other = np.random.default_rng(4).dirichlet(np.ones(4), 50)
    assert ((found - z / 0.5) * (other - found)).sum(axis=1).min() >= -1e-9
    np.testing.assert_allclose(found.sum(axis=1), 1)
