"""The law of the noise: thresholds and total variation against 400-bit sums, draws against their probabilities (a right law fails once in 1e9)."""

import mpmath
import numpy as np
import pytest
from scipy import special, stats

from certify.rounding import multiply_up
from certify.smoothing.noise import Gauss, Grid, noisy_rows, row_table, spec, total_variation
from certify.smoothing.noise.tables import tables

FAILURE = 1e-9


@pytest.mark.parametrize(("sigma", "levels"), [(1e-3, 1), (0.05, 1), (0.3, 1), (1.0, 7), (0.1, 16), (0.12, 255), (0.25, 255), (0.5, 255)])
def test_thresholds_and_total_variation(sigma, levels):
    with mpmath.workprec(400):
        s = mpmath.mpf(sigma) * levels
        t = tables(sigma, levels)
        ideal = [mpmath.erfc((j - mpmath.mpf(1) / 2) / (s * mpmath.sqrt(2))) / 2 for j in range(1, len(t.thresholds) + 60)]
        assert list(t.thresholds) == [q for p in ideal if (q := int(mpmath.nint(p * 2**64)))]
        drawn = [mpmath.mpf(q) / 2**64 for q in t.thresholds] + [mpmath.mpf(0)] * 60
        law = {0: 1 - 2 * drawn[0], **{k: drawn[k - 1] - drawn[k] for k in range(1, len(ideal))}}
        gaussian = {0: 1 - 2 * ideal[0], **{k: ideal[k - 1] - ideal[k] for k in range(1, len(ideal))}}
        apart = (abs(law[0] - gaussian[0]) + 2 * sum(abs(law[k] - gaussian[k]) for k in law if k)) / 2 + ideal[-1]
        assert apart <= t.total_variation <= apart * (1 + mpmath.mpf(10) ** -6) + mpmath.mpf(10) ** -38
    assert total_variation(sigma, 3072, levels) == multiply_up(3072.0, t.total_variation)
    assert t.total_variation < 1e-16


def test_no_fewer_bits_would_do():
    """At 224 x 224 x 3 the loss is far below the 7e-5 that 1e5 samples resolve; 32-bit thresholds would lose 9e-3 there."""
    assert total_variation(0.5, 150_528) < 3.2e-12
    q = np.array(tables(0.5, 255).thresholds) / 2**64
    blunt = np.round(q * 2**32) / 2**32 - q
    assert (np.abs(np.diff(blunt)).sum() + abs(blunt[0])) * 150_528 > 8e-3


@pytest.mark.parametrize("s", [0.3, 1.0, 8.0, 127.5])
def test_draws_of_whole_numbers_follow_the_law(s):
    noise, n = Grid(s, seed=20, levels=1, scale=(1.0,)), 1 << 20
    k = noisy_rows(noise, np.zeros((1, 1 << 12), np.int32), row_table(0, 5, np.arange(1 << 8))).astype(np.int64).ravel()
    support = np.arange(-round(10 * s) - 2, round(10 * s) + 3)
    expected = n * (special.ndtr((support + 0.5) / s) - special.ndtr((support - 0.5) / s))
    inner = np.flatnonzero(expected >= 20)
    edges = support[inner[0] : inner[-1] + 2]  # everything beyond joins the outermost two
    counted = np.bincount(np.clip(np.searchsorted(edges, k, side="right") - 1, 0, len(inner) - 1), minlength=len(inner))
    probabilities = np.diff(special.ndtr((edges - 0.5) / s), prepend=0)[1:]
    probabilities[0], probabilities[-1] = special.ndtr((edges[1] - 0.5) / s), special.ndtr(-(edges[-2] - 0.5) / s)
    if len(inner) == 1:
        probabilities[:] = 1
    statistic = np.sum((counted - n * probabilities) ** 2 / (n * probabilities))
    assert abs(probabilities.sum() - 1) < 1e-12
    assert stats.chi2.isf(1 - FAILURE, len(inner) - 1) < statistic < stats.chi2.isf(FAILURE, len(inner) - 1)


@pytest.mark.parametrize("noise", [Grid(8.0, seed=1, levels=1), Gauss(1.0, seed=1)], ids=repr)
def test_neighbours_are_independent(noise):
    """Elements, samples and streams beside each other: eight classes each, as many in each pair of classes as there should be."""
    samples, elements, base = 64, 4096, row_table(0, [[3], [4]], np.arange(64)).reshape(-1, 3)
    x = np.zeros((1, elements), np.int32 if isinstance(noise, Grid) else np.float32)
    y = noisy_rows(noise, x, base).reshape(2, samples, elements)
    cuts = np.quantile(y, np.arange(1, 8) / 8)
    classes = np.searchsorted(cuts, y)
    shares = np.bincount(classes.ravel(), minlength=8) / classes.size
    for a, b in ((classes[..., :-1], classes[..., 1:]), (classes[:, :-1], classes[:, 1:]), (classes[0], classes[1]), (classes[..., :-4], classes[..., 4:])):
        counted = np.bincount((8 * a + b).ravel(), minlength=64).reshape(8, 8)
        expected = counted.sum() * np.outer(shares, shares)
        assert np.sum((counted - expected) ** 2 / expected) < stats.chi2.isf(FAILURE, 63)


def test_the_pieces_of_box_and_muller():
    words = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32)
    edges = [0, 1, 2, 3, 2**29, 2**30, 2**31, 2**31 - 1, 2**32 - 1, 2**32 - 2, 2**32 - 128, 2**32 - 129, *(int(2**i / 2**0.5) for i in range(8, 33))]
    words = np.concatenate([words, np.array(edges, dtype=np.uint32), np.arange(2**32 - 5000, 2**32, dtype=np.uint32)])
    with np.errstate(divide="ignore"):
        exact = -2 * np.log((words | 1).astype(np.float32).astype(np.float64) / 2**32)
    found = spec.minus_two_log(words)
    assert (found >= 0).all()
    assert (np.abs(found - exact) <= 3e-7 * exact + 1e-30).all()
    cosine, sine = spec.cos_sin(words)
    angle = 2 * np.pi * words.astype(np.float64) / 2**32
    assert np.abs(cosine - np.cos(angle)).max() < 1.2e-7
    assert np.abs(sine - np.sin(angle)).max() < 1.2e-7
    assert spec.minus_two_log(np.zeros(1, np.uint32)) ** 0.5 < 6.661


def test_floats_look_normal():
    z = noisy_rows(Gauss(1.0, seed=8), np.zeros((1, 1 << 12), np.float32), row_table(0, 1, np.arange(256))).astype(np.float64).ravel()
    n = z.size
    apart = stats.kstest(z, "norm").statistic
    assert apart < np.sqrt(np.log(2 / FAILURE) / (2 * n))  # Dvoretzky, Kiefer & Wolfowitz with Massart's constant
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - mean) < 6.2 * np.sqrt(variance / n)
