"""Copies under other noises than the Gaussian: their laws against closed forms (a right law fails once in 1e9), and what is done with what was drawn."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

import certify
from certify.bound import Assumption
from certify.errors import CertifyError
from certify.smoothing import (
    Ablation,
    Brightness,
    Contrast,
    ContrastBrightness,
    CyclicTranslation,
    Exponential,
    FixedN,
    FoldedNormal,
    FourierBlur,
    Gamma,
    GroupSequential,
    Laplace,
    LogNormalGamma,
    Rayleigh,
    Softmax,
    Uniform,
    UniformLinf,
    UniformTo,
)
from certify.smoothing.method import Smoothing, _Drawn
from certify.smoothing.noise import SELECTION, Grid, noisy_rows, row_table, total_variation
from certify.smoothing.noise.other import Drawn, applied, given
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


@pytest.mark.parametrize(("noise", "law"), [(Laplace(0.7), stats.laplace(scale=0.7)), (Uniform(0.4), stats.uniform(-0.4, 0.8))], ids=["laplace", "uniform"])
def test_floats_follow_their_law(noise, law):
    out = np.empty((256, 1 << 10), dtype=np.float32)
    Drawn(noise, 3).copies(np.full((1, 1 << 10), 0.5), row_table(0, 9, np.arange(256)), out)
    assert ks(out.astype(np.float64).ravel() - 0.5, law.cdf)
    a, b = out[:, :-1].ravel() - 0.5, out[:, 1:].ravel() - 0.5
    counted = np.histogram2d(law.cdf(a), law.cdf(b), bins=8, range=[[0, 1], [0, 1]])[0]
    assert np.sum((counted - a.size / 64) ** 2 / (a.size / 64)) < stats.chi2.isf(FAILURE, 63)


OTHERS = [
    Laplace(0.3),
    Uniform(0.3),
    Ablation(5, 36),
    Brightness(0.2),
    Gamma(Rayleigh(0.8)),
    CyclicTranslation(1.5),
    FourierBlur(Exponential(2.0)),
    ContrastBrightness(0.3, 0.2),
]


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
        assert lost[1] == pytest.approx(apart, abs=1e-6)
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


# ablation


def every(noise, images, rows):
    """Copies of images (N, *shape), channels last, by the specification."""
    out = np.empty((len(rows), *(images.shape[1:] if not isinstance(noise, Ablation) else seen_last(images.shape[1:]))), dtype=np.float32)
    Drawn(noise, 11).copies(images, rows, out)
    return out


def seen_last(shape):
    return (*shape[:-1], 2 * shape[-1]) if len(shape) == 3 else (2 * shape[0], *shape[1:])


@pytest.mark.parametrize("keep", [1, 2, 5, 6])
def test_every_set_of_places_is_kept_as_often(keep):
    """Six places: all sets of `keep` of them, by chi-square."""
    kept = Drawn(Ablation(keep, 6), 2).parameters(row_table(0, 3, np.arange(40_000)), (6,))
    assert (kept.sum(axis=1) == keep).all()
    sets = math.comb(6, keep)
    counted = np.unique(kept @ (1 << np.arange(6)), return_counts=True)[1]
    assert len(counted) == sets
    assert sets == 1 or np.sum((counted - 40_000 / sets) ** 2 / (40_000 / sets)) < stats.chi2.isf(FAILURE, sets - 1)


@pytest.mark.parametrize("shape", [(6,), (3, 2, 4), (2, 5)], ids=str)
def test_the_network_is_given_what_is_kept_twice_and_zeros(shape):
    """x and 1 - x where a place is kept, 0 and 0 where it is hidden, along the first axis; all channels of a pixel together."""
    seen = []
    noise = Ablation(2, math.prod(shape[1:] if len(shape) == 3 else shape))
    x = torch.rand(2, *shape)
    method = Smoothing(noise, schedule=FixedN(5, 30, 0.1), levels=None, seed=2, batch=128)
    certify.robustness(sees(seen), x, method)
    rows = [row for batch in seen[-1:] for row in batch if not row.isnan().any()]
    assert len(rows) == 70
    for row in rows:
        first, second = row[: shape[0]], row[shape[0] :]
        kept = (first + second) > 0
        per_place = kept.all(0) if len(shape) == 3 else kept
        assert per_place.sum() == 2
        assert (kept == per_place).all()
        original = min(x, key=lambda image: float((first - image * kept).abs().sum()))
        assert torch.equal(first, original * kept)
        assert torch.equal(second, (1 - original) * kept)


def test_the_radius_of_ablation_is_not_above_the_truth_more_often_than_alpha():
    """Class 0 where one bright pixel at least is seen: p_0 = 1 - C(d - m, k) / C(d, k) with m bright ones, so the true radius is found by counting."""
    d, keep, alpha = 60, 6, 0.1

    class Bright(torch.nn.Module):
        def forward(self, x):
            some = x[:, :60].amax(1)  # hidden entries are 0
            return torch.stack([some, 0.5 - 0 * some], dim=1)

    def share(m):
        return 1 - math.comb(d - m, keep) / math.comb(d, keep)

    counts = np.repeat([0, 12, 20, 35, 50], 60)
    x = torch.from_numpy((np.arange(d) < counts[:, None]).astype(np.float32))
    fewest = [next(r for r in range(d) if share(r) > 0.5) if m == 0 else next(r for r in range(m + 1) if share(m - r) <= 0.5) for m in counts]
    truth = np.array(fewest) - 1  # one less than has to be made bright, or dark; in the first case no classifier is worse
    certificate = certify.robustness(Bright().eval(), x, Smoothing(Ablation(keep, d), schedule=FixedN(20, 1000, alpha), levels=None, seed=6))
    assert certificate.norm is None
    assert certificate.measure == "number of changed pixels, inclusive"
    assert Assumption.FLOAT_NOISE not in certificate.assumptions
    assert "of number of changed pixels, inclusive" in str(certificate)
    assert (certificate.radius > truth).sum() <= stats.binom.isf(1e-6, len(x), alpha)
    assert (truth == 6)[:60].all()
    assert np.median(certificate.radius[:60]) == 6
    assert certificate.radius[-1] >= 3


def test_ablation_is_for_inputs_of_its_size_and_has_no_grid():
    with pytest.raises(CertifyError, match="levels=None"):
        Smoothing(Ablation(2, 6))
    method = Smoothing(Ablation(2, 6), schedule=SHORT, levels=None)
    with pytest.raises(CertifyError, match="6 pixels"):
        method.procedure((3, 2, 2))
    method.procedure((3, 2, 3))
    assert 0 < method.procedure((6,)).distance < 1e-18
    with pytest.raises(CertifyError, match="halved"):
        given(Ablation(2, 6), (3, 2, 3))
    assert given(Ablation(2, 6), (6, 2, 3)) == (3, 2, 3)


# transforms

TRANSFORMS = [
    Brightness(0.2),
    Contrast(0.3),
    LogNormalGamma(0.4),
    Gamma(Exponential(1.0)),
    Gamma(Rayleigh(0.8)),
    CyclicTranslation(1.5),
    FourierBlur(Exponential(2.0)),
    FourierBlur(FoldedNormal(1.0)),
    ContrastBrightness(0.3, 0.2),
]


def done(noise, image, parameter):
    """The transform of one image (channels first) with this parameter, by its definition."""
    a, *rest = np.asarray(parameter, dtype=np.float64)
    match noise:
        case Brightness():
            return image + a
        case Contrast():
            return np.exp(a) * image
        case LogNormalGamma():
            return image ** np.exp(a)
        case Gamma():
            return image**a
        case ContrastBrightness():
            return np.exp(a) * (image + rest[0])
        case CyclicTranslation():
            return np.roll(image, (int(a), int(rest[0])), axis=(1, 2))
        case FourierBlur():
            height, width = image.shape[1:]
            w = [2 * np.pi * np.fft.fftfreq(size) for size in (height, width)]
            factor = np.exp(-(w[0][:, None] ** 2 + w[1][None] ** 2) * a / 2)
            return np.fft.ifft2(np.fft.fft2(image) * factor).real


LAWS = {
    "Brightness(sigma=0.2)": stats.norm(scale=0.2),
    "Contrast(sigma=0.3)": stats.norm(scale=0.3),
    "LogNormalGamma(sigma=0.4)": stats.norm(scale=0.4),
    "Gamma(law=Exponential(scale=1.0))": stats.expon(),
    "Gamma(law=Rayleigh(scale=0.8))": stats.rayleigh(scale=0.8),
    "FourierBlur(law=Exponential(scale=2.0))": stats.expon(scale=2),
    "FourierBlur(law=FoldedNormal(scale=1.0))": stats.halfnorm(),
    "FourierBlur(law=UniformTo(scale=3.0))": stats.uniform(0, 3),
    "ContrastBrightness(sigma=0.3, tau=0.2)": (stats.norm(scale=0.3), stats.norm(scale=0.2)),
}


@pytest.mark.parametrize("noise", [*(noise for noise in TRANSFORMS if not isinstance(noise, CyclicTranslation)), FourierBlur(UniformTo(3.0))], ids=repr)
def test_parameters_follow_their_law(noise):
    found = Drawn(noise, 8).parameters(row_table(0, 2, np.arange(60_000)), (4, 4, 1))
    laws = np.atleast_1d(np.array(LAWS[repr(noise)], dtype=object))
    assert found.shape == (60_000, len(laws))
    assert all(ks(column, law.cdf) for column, law in zip(found.T, laws, strict=True))
    assert abs(np.corrcoef(found[1:, 0], found[:-1, -1])[0, 1]) < 6.2 / np.sqrt(60_000)
    assert abs(np.corrcoef(found[:, 0], found[:, -1])[0, 1]) < 6.2 / np.sqrt(60_000) or len(laws) == 1


def test_shifts_are_rounded_normal_numbers_to_a_known_distance():
    noise = CyclicTranslation(1.5)
    found = Drawn(noise, 8).parameters(row_table(0, 2, np.arange(60_000)), (9, 9, 1))
    assert np.array_equal(found, np.rint(found))
    share = np.diff(stats.norm(scale=1.5).cdf(np.arange(-5, 7) - 0.5))
    for column in found.T:
        counted = np.bincount(np.clip(column, -5, 5).astype(int) + 5, minlength=11)
        share[0], share[-1] = stats.norm.cdf(-4.5 / 1.5), stats.norm.sf(4.5 / 1.5)
        assert np.sum((counted - 60_000 * share) ** 2 / (60_000 * share)) < stats.chi2.isf(FAILURE, 10)
    method = Smoothing(noise, schedule=SHORT, levels=None)
    assert 0 < method.procedure((1, 9, 9)).distance < 1e-16
    assert Assumption.FLOAT_NOISE not in method.assumptions


@pytest.mark.parametrize("noise", TRANSFORMS, ids=repr)
def test_the_network_sees_the_transform_that_is_certified(noise):
    """Through the engine: each copy is the transform of its input, with the parameter that was drawn, and the smoothed classifier is attacked by the same."""
    images, rows = np.random.default_rng(1).random((2, 5, 6, 2)), row_table([0, 1, 1, -1, 0], [0, 1, 1, 0, 0], [3, 4, 5, 0, 1 << 40])
    out = every(noise, images, rows)
    drawn = Drawn(noise, 11).parameters(rows, (5, 6, 2))
    assert np.isnan(out[3]).all()
    for i in (0, 1, 2, 4):
        image = np.moveaxis(images[rows[i, 0]], -1, 0)
        np.testing.assert_allclose(np.moveaxis(out[i], -1, 0), done(noise, image, drawn[i]), rtol=1e-6, atol=1e-6)
    seen = []
    x = torch.rand(1, 2, 5, 6)
    certify.robustness(sees(seen), x, Smoothing(noise, schedule=FixedN(5, 20, 0.1), levels=None, seed=11, batch=32))
    numbers = np.concatenate([SELECTION + np.arange(5), np.arange(20)])
    expected = every(noise, np.moveaxis(x.double().numpy(), 1, -1), row_table(0, 0, numbers))
    assert np.array_equal(seen[-1][:25].numpy(), np.moveaxis(expected, -1, 1))


@pytest.mark.parametrize("noise", TRANSFORMS, ids=repr)
def test_attacks_compose_with_the_transform(noise):
    """The copy of an attacked input is a copy of the input, with another parameter: what every radius here rests on."""
    image, rng = rng_image(), np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.exponential(0.5, 2) if isinstance(noise, FourierBlur | Gamma) else rng.normal(0, 0.5, 2)
        match noise:
            case Gamma():
                whole, parts = (a * b,), ((a,), (b,))
            case CyclicTranslation():
                whole, parts = (3, 1), ((2, -3), (1, 4))
            case ContrastBrightness():
                whole, parts = (a + 0.2, 0.1 + np.exp(-0.2) * b), ((0.2, 0.1), (a, b))
            case _:
                whole, parts = (a + b,), ((a,), (b,))
        last = np.moveaxis(image, 0, -1)[None]
        attacked = np.moveaxis(done(noise, image, parts[0]), 0, -1)[None]
        np.testing.assert_allclose(applied(noise, attacked, np.array([parts[1]])), applied(noise, last, np.array([whole])), rtol=1e-9, atol=1e-9)


def rng_image():
    return np.random.default_rng(3).random((2, 5, 6))


class Statistic(torch.nn.Module):
    """Class 0 where a statistic of the copy, which falls or rises with the parameter, is above a threshold."""

    def __init__(self, statistic, threshold):
        super().__init__()
        self.statistic, self.threshold = statistic, threshold

    def forward(self, x):
        side = self.statistic(x) - self.threshold
        return torch.stack([side, -side], dim=1)


def mean(x):
    return x.flatten(1).mean(1)


def cosine(x):
    """How much of the lowest horizontal wave is left: exp(-(2 pi / 8)^2 b / 2) after a blur of variance b."""
    return (x * torch.cos(2 * torch.pi * torch.arange(8) / 8)).flatten(1).mean(1) / 0.125


W = (2 * np.pi / 8) ** 2 / 2
WAVE = torch.cos(2 * torch.pi * torch.arange(8) / 8).expand(1, 8, 8) / 4


@pytest.mark.parametrize(
    ("noise", "x", "statistic", "thresholds", "true"),
    [  # the base classifier is a half-line in the parameter, so the radius at its score is the truth: |t - its median|
        (Brightness(0.2), torch.full((1, 8, 8), 0.5), mean, [0.35, 0.42, 0.6], lambda t: abs(t - 0.5)),
        (Contrast(0.3), torch.full((1, 8, 8), 0.5), mean, [0.35, 0.42, 0.6], lambda t: abs(np.log(t / 0.5))),
        (LogNormalGamma(0.4), torch.full((1, 8, 8), 0.5), mean, [0.35, 0.42, 0.6], lambda t: abs(np.log(np.log(t) / np.log(0.5)))),
        (Gamma(Exponential(1.0)), torch.full((1, 8, 8), 0.5), mean, [0.2, 0.4, 0.9], lambda t: abs(np.log(np.log(t) / np.log(0.5) / np.log(2)))),
        (FourierBlur(Exponential(2.0)), WAVE, cosine, [0.02, 0.1, 0.15], lambda t: -np.log(t) / W - 2 * np.log(2)),
    ],
    ids=lambda v: repr(v) if hasattr(v, "measure") else "",
)
def test_the_radius_of_a_transform_is_not_above_the_truth_more_often_than_alpha(noise, x, statistic, thresholds, true):
    alpha, count = 0.1, 100
    for threshold in thresholds:
        net = Statistic(statistic, threshold).eval()
        method = Smoothing(noise, schedule=FixedN(20, 300, alpha), levels=None, seed=int(1000 * threshold))
        certificate = certify.robustness(net, x.expand(count, -1, -1, -1), method)
        truth = float(true(threshold))
        assert certificate.norm is None
        assert certificate.measure == noise.measure
        assert Assumption.FLOAT_NOISE in certificate.assumptions
        assert truth > 0
        assert (certificate.radius > truth).sum() <= stats.binom.isf(1e-6, count, alpha)
        assert np.median(certificate.radius) > 0.4 * truth or truth < 0.2


def test_shifts_of_a_pattern_are_certified_to_the_distance_of_another():
    """Class 0 where the bright column stays on the left of three columns of seven around it; the true radius is the shift that makes it even odds, 3.5."""
    x = torch.zeros(1, 1, 3, 41)
    x[..., 20] = 1

    class Left(torch.nn.Module):
        def forward(self, image):
            inside = image[:, 0, 0, 10:24].amax(1)
            return torch.stack([inside, 0.5 + 0 * inside], dim=1)

    certificate = certify.robustness(Left().eval(), x.expand(100, -1, -1, -1), Smoothing(CyclicTranslation(3.0), schedule=FixedN(20, 400, 0.1), levels=None))
    assert (certificate.radius > 3.5 + 1e-3).sum() <= stats.binom.isf(1e-6, 100, 0.1)
    assert np.median(certificate.radius) > 2.5
    assert certificate.measure == "l2 norm of the shift, in pixels"


def test_contrast_and_brightness_together_are_certified_below_the_truth():
    """mean(e^k (x + b)) > c: a half-plane in (k, b) but for its curve, so the smoothed score of an attack is an integral."""
    noise, x, c, alpha = ContrastBrightness(0.3, 0.3), 0.9, 0.35, 0.1
    net, images = Statistic(mean, c).eval(), torch.full((60, 1, 2, 2), x)
    certificate = certify.robustness(net, images, Smoothing(noise, schedule=FixedN(20, 1000, alpha), levels=None))
    z, weights = np.polynomial.hermite_e.hermegauss(80)

    def score(k, b):
        """P(e^(k + s z) (x + b + e^-k t w) > c)"""
        return float(weights @ stats.norm.sf((c * np.exp(-(k + 0.3 * z)) - x - b) * np.exp(k) / 0.3) / weights.sum())

    truth = next(r for r in np.linspace(0, 2, 2001) if min(score(k, b) for k in (-r, r) for b in (-r, r)) <= 0.5)
    assert np.median(certificate.radius) > 0
    assert (certificate.radius > truth).sum() <= stats.binom.isf(1e-6, 60, alpha)


def test_transforms_of_inputs_that_they_are_not_for_are_refused():
    for noise in TRANSFORMS:
        with pytest.raises(CertifyError, match="levels=None"):
            Smoothing(noise)
    for noise in (CyclicTranslation(1.0), FourierBlur(Exponential(1.0))):
        with pytest.raises(CertifyError, match="images"):
            Smoothing(noise, schedule=SHORT, levels=None).procedure((64,))
    for noise in (LogNormalGamma(0.3), Gamma(Rayleigh())):
        for value in (-0.01, 1.01):
            with pytest.raises(CertifyError, match=r"\[0, 1\]"):
                certify.robustness(half_space(2, 2, [1.0, 0.0], 0), torch.full((1, 2), value), Smoothing(noise, schedule=SHORT, levels=None))
    bound = certify.Bound(1.0, "mine")
    with pytest.raises(CertifyError, match="l2"):
        Smoothing(Brightness(0.2), scores=Softmax(1.0), levels=None, lipschitz=bound)
