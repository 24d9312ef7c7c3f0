"""Confidence bounds: against exact numbers, by coverage, and against what must fail."""

import json
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from certify.errors import CertifyError
from certify.smoothing import ClopperPearson, EmpiricalBernstein, EProcess, Hoeffding, MaurerPontil, Share, Tally
from certify.smoothing.bounds import _TAIL, Moments, _log_slack, log_e_process, surely_certified, votes

CP = ClopperPearson()
EVERY = [CP, Hoeffding(), MaurerPontil(), EmpiricalBernstein(), EProcess()]
SOFT = [Hoeffding(), MaurerPontil(), EmpiricalBernstein()]
ALPHAS = [1e-12, 1e-6, 0.001, 0.05, 0.5]


def allowed(runs, alpha):
    """How many failures a valid procedure exceeds once in a million test runs."""
    return stats.binom.isf(1e-6, runs, alpha)


def exact_tail(k, n, p):
    """P(Bin(n, p) >= k), as a rational number."""
    p = Fraction(p)
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def long_tail(k, n, p):
    """The same to 40 digits, for large n."""
    with mpmath.workdps(40):
        p = mpmath.mpf(p)
        term = mpmath.exp(mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1) + k * mpmath.log(p) + (n - k) * mpmath.log(1 - p))
        total, ratio = mpmath.mpf(0), p / (1 - p)
        while k <= n and term > total * mpmath.mpf(10) ** -20:
            total, term, k = total + term, term * ratio * (n - k) / (k + 1), k + 1
        return total


def moments(x):
    return Moments(x.shape[-1], x.sum(axis=-1), (x**2).sum(axis=-1))


@pytest.mark.parametrize(
    ("k", "n", "alpha", "known"),
    [
        (100, 100, 0.001, 0.93325430079699104353),
        (10_000, 10_000, 0.001, 0.99930946300258992169),
        (100_000, 100_000, 0.001, 0.99993092483300939297),
        (990, 1000, 0.001, 0.97603618715531137319),
        (99_900, 100_000, 0.001, 0.99865099244675306327),
        (60_000, 100_000, 0.001, 0.59520104729458454595),
        (9, 10, 0.05, 0.60583669756349521828),
    ],
)
def test_clopper_pearson_meets_known_answers_from_below(k, n, alpha, known):
    found = float(CP.lower(votes(k, n), alpha))
    assert known - 1e-8 * (1 - known) < found < known
    assert float(CP.upper(votes(n - k, n), alpha)) == pytest.approx(1 - found, rel=1e-12)


def test_clopper_pearson_upper_meets_known_answers_from_above():
    for k, n, known in [(0, 100, 0.0667456992030089565), (0, 100_000, 6.90751669906e-5), (100, 100_000, 0.00134900755324693673)]:
        assert known < float(CP.upper(votes(k, n), 0.001)) < known * (1 + 1e-8)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_clopper_pearson_is_below_the_root_in_rational_arithmetic_and_near_it(n, alpha):
    found = CP.lower(votes(np.arange(n + 1), n), alpha)
    assert found[0] == 0
    for k in range(1, n + 1):
        assert Fraction(alpha) * (1 - Fraction(1, 10**8)) < exact_tail(k, n, found[k]) <= Fraction(alpha)


@pytest.mark.parametrize("n", [1000, 100_000, 10_000_000])
def test_scipy_is_as_accurate_as_is_relied_on_and_the_inversion_holds_to_40_digits(n):
    for share in (1e-3, 0.1, 0.502, 0.9, 0.999, 0.99999, 1.0):
        k = round(share * n)
        for alpha in (1e-12, 1e-6, 0.5):
            p = float(CP.lower(votes(k, n), alpha))
            tail = long_tail(k, n, p)
            assert abs(special.betainc(k, n - k + 1, p) / tail - 1) < _TAIL / 100
            assert alpha * (1 - 1e-8) < tail <= alpha


def test_an_alpha_whose_tails_underflow_within_scipy_gives_no_bound():
    """At 6.9e-288 of 1440 in 1465 betainc said 0 where the tail was 3e12 times alpha; down to 1e-200 it is as accurate as is relied on."""
    rng, counts = np.random.default_rng(0), [(1440, 1465, 6.88034364090068e-288), (104839, 104851, 1.3e-299)]
    for k, n, alpha in counts:
        assert float(CP.lower(votes(k, n), alpha)) == 0
        assert float(CP.upper(votes(n - k, n), alpha)) == 1
    assert any(special.betainc(k, n - k + 1, p := special.betaincinv(k, n - k + 1, alpha)) < 0.5 * long_tail(k, n, float(p)) for k, n, alpha in counts)
    for n in (20, 1465, 104851):
        for missing in (0, 1, 7, 15):
            alpha = 10 ** -rng.uniform(150, 199.9)
            p = float(CP.lower(votes(n - missing, n), alpha))
            assert alpha * (1 - 1e-8) < long_tail(n - missing, n, p) <= alpha
    assert surely_certified(1000, 1000, 1e-3, 1e-250) == 0
    assert 950 < surely_certified(1000, 1000, 1e-3, 1e-50) < 999


@pytest.mark.parametrize("factor", [1 + 1e-6, 1.5, math.nan, 0.0])
def test_what_scipy_inverts_is_proved_before_it_is_returned(monkeypatch, factor):
    """What scipy.special.betaincinv is off by is small; here it is off by more."""
    inverse = special.betaincinv
    monkeypatch.setattr(special, "betaincinv", lambda a, b, p: np.minimum(inverse(a, b, p) * factor, 1.0))
    found = CP.lower(votes(np.arange(1, 41), 40), 0.001)
    assert all(exact_tail(k, 40, found[k - 1]) <= Fraction(0.001) for k in range(1, 41))
    assert (found > 0).all() or not factor > 0


@pytest.mark.parametrize("bound", [CP, EProcess(), Hoeffding(), MaurerPontil(), EmpiricalBernstein()], ids=repr)
@pytest.mark.parametrize("n", [10, 200])
def test_votes_are_covered_exactly(bound, n):
    """For every p of a grid, the probability of the counts whose bound is above p, without sampling."""
    k = np.arange(n + 1)
    for alpha in (0.001, 0.05, 0.3):
        low, high = bound.lower(votes(k, n), alpha), bound.upper(votes(k, n), alpha)
        for p in np.linspace(0.005, 0.995, 67):
            law = stats.binom.pmf(k, n, p)
            assert law[low > p].sum() <= alpha * (1 + 1e-9)
            assert law[high < p].sum() <= alpha * (1 + 1e-9)


def test_clopper_pearson_is_the_tightest_for_votes_and_bernstein_for_small_variance():
    k, n = np.array([950, 999, 1000]), 1000
    best = CP.lower(votes(k, n), 0.001)
    assert all((best > other.lower(votes(k, n), 0.001)).all() for other in EVERY[1:])
    soft = Moments(10_000, np.array(9000.0), np.array(8150.0))  # variance 0.005
    before = Moments(100, np.array(90.0), np.array(81.5))
    hoeffding, maurer, bernstein = (float(bound.lower(soft, 0.001, before)) for bound in SOFT)
    assert hoeffding < maurer < bernstein < 0.9


def test_closed_forms_meet_known_answers():
    assert float(Hoeffding().lower(votes(60, 100), 0.05)) == pytest.approx(0.6 - math.sqrt(math.log(20) / 200), abs=1e-13)
    soft = Moments(10_000, np.array(9000.0), np.array(8100 + 0.04 * 9999))
    assert float(MaurerPontil().lower(soft, 0.001)) == pytest.approx(0.890428380306564, abs=1e-12)
    before = Moments(99, np.array(89.5), np.array(81.0))  # mu = 0.9, and a variance so small that lambda is the cap
    soft = Moments(10_000, np.array(9000.0), np.array(8500.0))
    assert float(EmpiricalBernstein(cap=0.1).lower(soft, 0.001, before)) == pytest.approx(0.8909480384578874, abs=1e-12)


def test_empirical_bernstein_takes_the_best_lambda_and_its_inequality_holds():
    xi, lam = np.linspace(-1, 1, 401)[:, None], np.linspace(0.001, 0.999, 300)
    psi = -np.log1p(-lam) - lam
    assert (np.exp(lam * xi - psi * xi**2) <= 1 + lam * xi + 1e-15).all()
    c = np.array([1e-4, 0.01, 0.3, 2.0])[:, None]
    grid = ((c + psi) / lam).min(axis=1)
    best = EmpiricalBernstein(cap=0.999)._best(c[:, 0])
    assert (((c[:, 0] - np.log1p(-best) - best) / best) <= grid * (1 + 1e-9)).all()


LAWS = {
    "nearly one": lambda rng, size: 1 / (1 + np.exp(-(4 + 2 * rng.standard_normal(size)))),
    "narrow": lambda rng, size: 1 / (1 + np.exp(-(0.5 + 0.3 * rng.standard_normal(size)))),
    "two points": lambda rng, size: np.where(rng.random(size) < 0.03, 0.0, 1.0),
    "rare": lambda rng, size: np.where(rng.random(size) < 0.02, 0.1, 0.95),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("bound", SOFT, ids=repr)
def test_soft_scores_are_covered(law, bound):
    rng, runs, alpha = np.random.default_rng(5), 4000, 0.05
    mean = LAWS[law](rng, 4_000_000).mean()
    before, x = LAWS[law](rng, (runs, 30)), LAWS[law](rng, (runs, 200))
    low, high = bound.lower(moments(x), alpha, moments(before)), bound.upper(moments(x), alpha, moments(before))
    assert (low > mean).sum() <= allowed(runs, alpha)
    assert (high < mean).sum() <= allowed(runs, alpha)
    assert low.mean() > 0.4  # and says something


def test_bernstein_tuned_on_the_samples_themselves_or_narrower_fails():
    """Mutations of the same coverage test: the bound's width cut to 40 % is caught."""
    rng, runs, alpha = np.random.default_rng(6), 4000, 0.05
    x = LAWS["two points"](rng, (runs, 200))
    low = EmpiricalBernstein().lower(moments(x), alpha, moments(LAWS["two points"](rng, (runs, 30))))
    mean = x.mean(axis=1)
    assert (mean - 0.4 * (mean - low) > 0.97).sum() > allowed(runs, alpha)


def test_e_process_is_a_martingale_meets_its_known_answer_and_falls_in_p0():
    assert float(log_e_process(95, 100, 0.8)) == pytest.approx(8.07654475359637, abs=1e-12)
    k, n, p0 = np.arange(51.0), 50, 0.7
    after = p0 * np.exp(log_e_process(k + 1, n + 1, p0)) + (1 - p0) * np.exp(log_e_process(k, n + 1, p0))
    np.testing.assert_allclose(after, np.exp(log_e_process(k, n, p0)), rtol=1e-10)
    for k, n in [(30, 100), (80, 100), (100, 100), (9990, 10_000), (2000, 10_000)]:
        values = log_e_process(k, n, np.linspace(0.16, k / n, 2000)[:-1])
        above = values[values >= 0]
        assert (np.diff(above) <= 1e-9).all()


def test_e_process_logarithm_is_as_accurate_as_is_relied_on():
    for n, k, p0 in [(100, 95, 0.8), (10_000, 9900, 0.985), (10_000_000, 6_000_000, 0.5995)]:
        with mpmath.workdps(40):
            a, b, p = k + mpmath.mpf(0.5), n - k + mpmath.mpf(0.5), mpmath.mpf(p0)
            above = mpmath.mpf(float(special.betaincc(float(a), float(b), p0)))
            exact = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(n + 1) + mpmath.log(above)
            exact -= mpmath.log(2 * mpmath.acos(mpmath.sqrt(p))) + k * mpmath.log(p) + (n - k) * mpmath.log(1 - p)
            assert abs(float(exact) - float(log_e_process(k, n, p0))) < _log_slack(n) / 5


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_e_process_holds_at_all_sample_sizes_at_once(p):
    """The exact probability that its lower bound ever exceeds p within 400 votes, by dynamic programming."""
    alpha, alive, ever = 0.05, np.array([1.0]), 0.0
    for n in range(1, 401):
        alive = p * np.append(0.0, alive) + (1 - p) * np.append(alive, 0.0)
        out = log_e_process(np.arange(n + 1), n, p) >= -math.log(alpha)
        out &= np.arange(n + 1) > n * p
        ever, alive = ever + alive[out].sum(), np.where(out, 0.0, alive)
    assert 0.1 * alpha < ever <= alpha


@given(st.integers(1, 5000), st.data())
@settings(max_examples=60, deadline=None)
def test_bounds_are_ordered_and_grow_with_the_count_and_with_alpha(n, data):
    k, alpha = data.draw(st.integers(0, n - 1)), data.draw(st.floats(1e-12, 0.5))
    for bound in (CP, Hoeffding(), EProcess()):
        low, high = bound.lower(votes([k, k + 1], n), alpha), bound.upper(votes([k, k + 1], n), alpha)
        assert 0 <= low[0] <= low[1] <= 1
        assert low[0] <= k / n <= high[0] <= high[1] <= 1
        assert (bound.lower(votes([k, k + 1], n), alpha / 10) <= low).all()


def test_all_certificates_of_a_data_set_at_once():
    assert surely_certified(300, 500, 0.001, 0.001) == 296
    for inputs, alpha, failure in [(500, 0.001, 0.001), (10_000, 0.05, 0.001), (1, 0.5, 0.1), (10, 0.9, 0.01)]:
        assert surely_certified(inputs, inputs, alpha, failure) == inputs - stats.binom.isf(failure, inputs, alpha)
    assert surely_certified(2, 500, 0.001, 0.001) == 0
    with pytest.raises(CertifyError, match="got 501"):
        surely_certified(501, 500, 0.001, 0.001)


# Several classes


def drawn(rng, p, n, runs):
    return rng.multinomial(n, p, runs)


@pytest.mark.parametrize("p", [[0.5, 0.5], [0.36, 0.34, 0.30], [0.30, 0.28, *[0.42 / 8] * 8], [0.6, *[0.4 / 99] * 99]], ids=["2", "3", "10", "100"])
def test_the_interval_covers_the_top_class_and_every_rival(p):
    rng, runs, alpha, p = np.random.default_rng(7), 4000, 0.1, np.array(p)
    selection, tally = Tally(20, drawn(rng, p, 20, runs)), Tally(300, drawn(rng, p, 300, runs))
    label = selection.favourite
    low, high = Share().interval(CP, tally, label, alpha, selection)
    rival = np.array([np.delete(p, k).max() for k in range(len(p))])[label]
    assert ((low > p[label]) | (high < rival)).sum() <= allowed(runs, alpha)
    assert (high <= np.nextafter(1 - low, 2)).all()


def test_a_bound_computed_on_the_selection_samples_fails():
    rng, runs, alpha, p = np.random.default_rng(8), 4000, 0.05, np.full(10, 0.1)
    tally = Tally(1000, drawn(rng, p, 1000, runs))
    low, _ = Share().interval(CP, tally, tally.favourite, alpha)
    assert (low > 0.1).sum() > allowed(runs, alpha)


def test_a_runner_up_picked_from_the_same_counts_without_correction_fails():
    rng, runs, alpha, p = np.random.default_rng(9), 4000, 0.05, np.array([0.6, *[0.4 / 8] * 8])
    counts = drawn(rng, p, 300, runs)
    fewest = counts[:, 1:].min(axis=1)  # a rival is picked by its count, here the unluckiest
    assert (CP.upper(votes(fewest, 300), alpha) < 0.05).sum() > allowed(runs, alpha)


def test_two_classes_need_no_split():
    tally = Tally(100, np.array([90, 10]))
    low, high = Share().interval(CP, tally, np.int64(0), 0.001)
    assert float(low) == pytest.approx(float(CP.lower(votes(90, 100), 0.001)), rel=1e-12)
    assert float(high) == pytest.approx(1 - float(low))


def test_alpha_is_divided_between_the_top_class_and_all_of_its_rivals():
    tally, alpha = Tally(1000, np.array([600, 150, 130, *[20] * 6])), 0.01
    low, high = Share(0.2).interval(CP, tally, np.int64(0), alpha)
    assert float(low) == pytest.approx(float(CP.lower(votes(600, 1000), 0.8 * alpha)), rel=1e-12)
    assert float(high) == pytest.approx(float(CP.upper(votes(150, 1000), 0.2 * alpha / 8)), rel=1e-12)
    assert float(high) < 0.5 * (1 - float(low))


def test_scores_that_were_rounded_down_get_it_back_above():
    tally = Tally(2000, np.array([8000, 2000, 1000]), np.array([5500, 300, 200]), unit=8)
    _, high = Share(0.2).interval(EmpiricalBernstein(), tally, np.int64(0), 0.01)
    rival = EmpiricalBernstein().upper(Moments(2000, np.array(250.0), np.array(37.5)), 0.001)
    assert float(high) == pytest.approx(float(rival) + 1 / 8, rel=1e-12)


def test_undecided_copies_count_for_nobody_below_and_for_everybody_above():
    sure, unsure = Tally(1000, np.array([800, 150, 50])), Tally(1000, np.array([800, 100, 50]), undecided=np.array(50))
    at = np.int64(0)
    assert Share().interval(CP, sure, at, 0.01) == Share().interval(CP, unsure, at, 0.01)


def test_soft_tallies_are_fixed_point_sums():
    unit, rng = 2**24, np.random.default_rng(0)
    x = rng.dirichlet([8.0, 2.0, 1.0], 500)
    fixed = np.floor(x * unit).astype(np.int64)
    squares = -(-(fixed**2) // unit)
    tally = Tally(500, fixed.sum(axis=0), squares.sum(axis=0), unit=unit)
    low, high = Share().interval(EmpiricalBernstein(), tally, np.int64(0), 0.001)
    exact = EmpiricalBernstein().lower(moments(x[:, 0]), 0.0008)
    assert 0 < float(exact) - float(low) < 2e-7
    assert x[:, 1].mean() < float(high) < 0.35


def test_tallies_come_back_from_json():
    for tally in (Tally(10, np.array([7, 2]), undecided=np.array(1)), Tally(10, np.array([60, 30]), np.array([50, 20]), unit=10)):
        again = Tally.from_json(json.loads(json.dumps(tally.to_json())))
        assert again.to_json() == tally.to_json()
        assert (again.sums == tally.sums).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tally(100, np.array([90, 11])), "do not add up: 101"),
        (lambda: Tally(100, np.array([90, 9])), "do not add up: 99"),
        (lambda: Tally(100, np.array([101, -1])), "no negative numbers"),
        (lambda: Tally(100, np.array([90.0, 10.0])), "whole numbers"),
        (lambda: Tally(0, np.array([0, 0])), "at least one copy"),
        (lambda: Tally(100, np.array([100])), "two classes"),
        (lambda: Tally(10, np.array([50, 60]), np.array([40, 30]), unit=10), "do not add up"),
        (lambda: Tally(10, np.array([50, 40]), np.array([60, 30]), unit=10), "do not fit"),
        (lambda: Tally(10, np.array([50, 40]), np.array([20, 30]), unit=10), "do not fit"),
        (lambda: Tally(10, np.array([5, 5]), np.array([5, 5])), "unit=1"),
        (lambda: Tally.from_json({"n": 10, "sums": [5, 5]}), "not a tally"),
        (lambda: Tally.from_json({"n": 10.5, "sums": [5, 5], "undecided": 0}), "at least one copy"),
        (lambda: votes(11, 10), "from 0 to n"),
        (lambda: votes(-1, 10), "from 0 to n"),
        (lambda: votes(0.5, 10), "whole numbers"),
        (lambda: CP.lower(votes(1, 2), 0.0), "strictly between 0 and 1"),
        (lambda: CP.lower(votes(1, 2), 1.0), "strictly between 0 and 1"),
        (lambda: CP.lower(votes(1, 2), math.nan), "strictly between 0 and 1"),
        (lambda: CP.lower(Moments(10, np.array(5.5), np.array(4.0)), 0.1), "for votes"),
        (lambda: EProcess().lower(Moments(10, np.array(5.0), np.array(4.0)), 0.1), "for votes"),
        (lambda: EmpiricalBernstein(cap=1.0), "strictly between"),
        (lambda: Share(1.0), "share of alpha"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message):
    with pytest.raises(CertifyError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_it_is_fast_at_ten_million_copies():
    assert CP.lower(votes(np.arange(9_990_000, 10_000_001, 2), 10_000_000), 1e-6).shape == (5001,)
