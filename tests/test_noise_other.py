"""Copies under other noises than the Gaussian: their laws against closed forms (a right law fails once in 1e9), and what is done with what was drawn."""

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

import certify
from certify.errors import CertifyError
from certify.smoothing import FixedN, GroupSequential, Laplace, Uniform, UniformLinf
from certify.smoothing.method import Smoothing, _Drawn
from certify.smoothing.noise import Grid, noisy_rows, row_table, total_variation
from certify.smoothing.noise.other import Drawn
from certify.smoothing.noise.tables import tables

FAILURE = 1e-9
SHORT = GroupSequential(looks=(60, 120, 240), n0=50, alpha=0.01)
TAILS = {"laplace": lambda t: mpmath.exp(-t) / 2, "uniform": lambda t: max((1 - t) / 2, mpmath.mpf(0))}


def half_space(count, inputs, normal, offset):
    """Two classes apart by a plane."""

    class HalfSpace(torch.nn.Module):
        def forward(self, x):
            side = x.flatten(1).double() @ torch.as_tensor(normal, dtype=torch.float64) - offset
            return torch.stack([side, -side], dim=1).float()

    return HalfSpace().eval()


def sees(kinds):
    """A classifier that keeps what it is given."""

    class Sees(torch.nn.Module):
        def forward(self, x):
            kinds.append(x.clone())
            return x.flatten(1)[:, :2]

    return Sees().eval()


def ks(values, law):
    """Whether draws follow a law, by Dvoretzky, Kiefer & Wolfowitz with Massart's constant."""
    return stats.kstest(values, law).statistic < np.sqrt(np.log(2 / FAILURE) / (2 * len(values)))


# Laplace and uniform noise


@pytest.mark.parametrize("law", TAILS)
@pytest.mark.parametrize(("sigma", "levels"), [(1e-3, 1), (0.3, 1), (0.5, 1), (0.7, 7), (0.1, 16), (0.5, 255)])
def test_thresholds_and_total_variation(law, sigma, levels):
    with mpmath.workprec(400):
        s = mpmath.mpf(sigma) * levels
        t = tables(sigma, levels, law)
        ideal = [TAILS[law]((j - mpmath.mpf(1) / 2) / s) for j in range(1, len(t.thresholds) + 60)]
        assert list(t.thresholds) == [q for p in ideal if (q := int(mpmath.nint(p * 2**64)))]
        drawn = [mpmath.mpf(q) / 2**64 for q in t.thresholds] + [mpmath.mpf(0)] * 60
        apart = abs(drawn[0] - ideal[0]) + sum(abs(drawn[k - 1] - drawn[k] - ideal[k - 1] + ideal[k]) for k in range(1, len(ideal))) + ideal[-1]
        assert apart <= t.total_variation <= apart * (1 + mpmath.mpf(10) ** -6) + mpmath.mpf(10) ** -35
    assert total_variation(sigma, 3072, levels, law) < 3072 * 1e-15


@pytest.mark.parametrize(("law", "s"), [("laplace", 0.3), ("laplace", 8.0), ("uniform", 0.8), ("uniform", 20.3)])
def test_whole_numbers_follow_their_law_in_every_back_end(law, s):
    noise, rows = Grid(s, seed=20, levels=1, scale=(1.0,), law=law), row_table(0, 5, np.arange(1 << 6))
    image = np.zeros((1, 1 << 12), np.int32)
    k = noisy_rows(noise, image, rows)
    assert np.array_equal(k, noisy_rows(noise, image, rows, backend="numpy"))
    assert np.array_equal(k, noise.draw(rows, 1 << 12))
    exact = stats.laplace(scale=s) if law == "laplace" else stats.uniform(-s, 2 * s)
    edges = np.arange(-20, 21) - 0.5
    share = np.diff(exact.cdf(edges))
    counted, n = np.histogram(k, edges)[0], k.size
    assert (counted[share == 0] == 0).all()
    some = share * n > 20
    rest = 1 - share[some].sum()
    found = np.append(counted[some], n - counted[some].sum())[: some.sum() + (rest > 1e-12)]
    expected = n * np.append(share[some], rest)[: len(found)]
    assert np.sum((found - expected) ** 2 / expected) < stats.chi2.isf(FAILURE, len(found) - 1)


@pytest.mark.parametrize(("noise", "law"), [(Laplace(0.7), stats.laplace(scale=0.7)), (Uniform(0.4), stats.uniform(-0.4, 0.8))], ids=repr)
def test_floats_follow_their_law(noise, law):
    out = np.empty((256, 1 << 10), dtype=np.float32)
    Drawn(noise, 3).copies(np.full((1, 1 << 10), 0.5), row_table(0, 9, np.arange(256)), out)
    assert ks(out.astype(np.float64).ravel() - 0.5, law.cdf)
    a, b = out[:, :-1].ravel() - 0.5, out[:, 1:].ravel() - 0.5
    counted = np.histogram2d(law.cdf(a), law.cdf(b), bins=8, range=[[0, 1], [0, 1]])[0]
    assert np.sum((counted - a.size / 64) ** 2 / (a.size / 64)) < stats.chi2.isf(FAILURE, 63)


OTHERS = [Laplace(0.3), Uniform(0.3)]


@pytest.mark.parametrize("noise", OTHERS, ids=repr)
def test_a_copy_depends_on_seed_input_and_number_alone(noise):
    shape, rng = (2, 6, 6), np.random.default_rng(0)
    placed, _ = Smoothing(noise, levels=None).place(rng.random((3, *shape)).astype(np.float32))
    rows = row_table(*np.array([[i, 10 + i, j] for i in range(3) for j in (0, 1, 7, (1 << 40) + 3)]).T)

    def draw(order, batch, slots=(0, 1, 2)):
        source = _Drawn(Drawn(noise, 4), shape, 3, batch, torch.device("cpu"))
        for i in range(3):
            source.hold(slots[i], placed[i])
        moved = rows[order].copy()
        moved[:, 0] = np.array(slots)[moved[:, 0]]
        padded = np.concatenate([moved, np.tile([[-1, 0, 0]], (-len(moved) % batch, 1))])
        found = np.concatenate([source.draw(padded[i : i + batch]).numpy().copy() for i in range(0, len(padded), batch)])
        assert np.isnan(found[len(moved) :]).all()
        return found[np.argsort(order)] if len(order) == len(rows) else found

    whole = draw(np.arange(12), 12)
    assert len(np.unique(whole.reshape(12, -1), axis=0)) == 12
    assert np.array_equal(draw(np.arange(12)[::-1], 5, (2, 0, 1)), whole)
    assert np.array_equal(draw(np.array([7]), 1), whole[[7]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("certify.smoothing.noise.other._STRIP", 40)
        assert np.array_equal(draw(np.arange(12), 12), whole)


@pytest.mark.parametrize("levels", [255, None])
@pytest.mark.parametrize("noise", [Laplace(0.3), Uniform(0.5), UniformLinf(0.5, 3)], ids=repr)
def test_the_radius_of_a_half_space_is_not_above_the_truth_more_often_than_alpha(noise, levels):
    """The smoothed classifier of a half-space is itself for noise that is symmetric, and the true radius the distance from its plane in the norm of the noise.

    The copies are rounded, which moves the plane by half a step in each entry.
    """
    alpha, count, rng = 0.1, 300, np.random.default_rng(5)
    normal, offset = np.array([1.0, 0.1, -0.2]), 0.5
    x = torch.from_numpy((rng.random((count, 3)) * 255).round() / 255)
    side = x.numpy() @ normal - offset + (0 if levels is None else 0.5 / 255 * 1.3)
    dual = np.abs(normal).sum() if isinstance(noise, UniformLinf) else np.abs(normal).max()
    certificate = certify.robustness(half_space(2, 3, normal, offset), x, Smoothing(noise, schedule=FixedN(20, 300, alpha), levels=levels, seed=1))
    truth = (np.abs(x.numpy() @ normal - offset) + (0 if levels is None else 1.3 / 255)) / dual
    assert certificate.norm == noise.norm
    assert (certificate.radius > truth).sum() <= stats.binom.isf(1e-6, count, alpha)
    wide = truth < 0.2
    assert np.median(certificate.radius[wide] / truth[wide]) > (0.2 if isinstance(noise, UniformLinf) else 0.5)  # and not for nothing
    assert ((certificate.prediction == 0) == (side > 0))[certificate.radius > 0.05].all()


def test_what_is_off_the_grid_comes_off_in_the_norm_of_the_radius():
    net, x = half_space(2, 2, [1.0, 0.0], -1.0), torch.tensor([[0.0, 0.0], [0.05, -0.05]])
    for noise, apart in ((Laplace(0.5), 0.1), (Uniform(0.5), 0.1), (UniformLinf(0.5, 2), 0.05)):
        method = Smoothing(noise, schedule=SHORT, levels=10)
        lost = method.place(x.numpy())[1]
        assert lost[0] < 1e-6
        assert apart - 1e-6 <= lost[1] <= apart * 1.5
        near, far = (certify.robustness(net, x[[i]], method).radius[0] for i in (0, 1))
        assert far < near or near == 0


def test_noises_without_copies_are_refused():
    from certify.smoothing.noises import Noise

    class Mine(Noise):
        measure = "mine"

        def radius(self, p_lower, p_upper=None):
            return np.zeros(1)

    with pytest.raises(CertifyError, match="counts of your own"):
        Smoothing(Mine())
    with pytest.raises(CertifyError, match="seed"):
        Smoothing(Laplace(0.5), levels=None, seed=-1)
    with pytest.raises(CertifyError, match="steps"):
        Smoothing(Uniform(100.0)).procedure((3,))
    with pytest.raises(CertifyError, match="laplace"):
        Grid(0.5, law="cauchy")
    with pytest.raises(CertifyError, match="of 4 entries"):
        certify.robustness(half_space(2, 3, [1.0, 0, 0], 0), torch.rand(1, 3), Smoothing(UniformLinf(0.5, 4), schedule=SHORT))
