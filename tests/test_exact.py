"""Proofs in whole numbers: they accept what floats prove, at the same rho, and nothing that is not feasible in fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from test_proof import exactly_proved, largest_over_slopes
from test_proof_file import proposed, wired

import sdp
from sdp import exact


@pytest.mark.parametrize("norm", [2, math.inf])
def test_whole_numbers_prove_what_floats_prove(norm):
    """At the same rho; and not a millionth less."""
    for seed in range(60):
        wiring, output = wired(seed, outputs=1 if norm == math.inf else None)
        system = wiring.system(output)
        multipliers, bound = proposed(system, norm)
        rho = bound**2 if norm == 2 else bound
        assert sdp.prove_exactly(system, multipliers, rho, norm), seed
        assert not sdp.prove_exactly(system, multipliers, rho * (1 - 1e-6), norm), seed


@pytest.mark.parametrize("seed", range(20))
def test_what_whole_numbers_prove_is_feasible_in_fractions(seed):
    rng = np.random.default_rng(seed)
    system = sdp.feed_forward(
        [rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7) for shape in ((3, 2), (2, 3))], slopes=((0.0, 1.0), (-0.3, 0.9))[seed % 2]
    )
    multipliers, bound = proposed(system)
    for change in (0.0, 1e-15, -1e-15, -1e-14, 1e-13, -1e-13, -1e-12, -1e-11):
        claim = bound * (1 + change)
        if sdp.prove_exactly(system, multipliers, math.nextafter(claim * claim, 0.0)):
            assert exactly_proved(system, multipliers, claim)
    assert not sdp.prove_exactly(system, multipliers, bound**2 * (1 - 1e-7))


def test_whole_numbers_cover_the_errors_of_a_system():
    """The worst network within the errors has the constant that is proved, or less."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        exactly = sdp.feed_forward([rng.standard_normal(shape) for shape in ((3, 2), (2, 3))], slopes=((0.0, 1.0), (-1.0, 1.0))[seed % 2])
        errors = [10.0 ** -(seed % 5 + 2) * rng.random(part.shape) * (part != 0) for part in (exactly.rows, exactly.output)]
        system = sdp.LureSystem(2, exactly.rows, exactly.lower, exactly.upper, exactly.output, *errors)
        multipliers, bound = proposed(system)
        if not math.isfinite(bound):
            continue
        assert sdp.prove_exactly(system, multipliers, bound**2)
        low, high = 0.5 * bound**2, bound**2
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if sdp.prove_exactly(system, multipliers, middle) else (middle, high)
        for _ in range(20):
            rows, output = (part + rng.choice([-1.0, 1.0], part.shape) * error for part, error in zip((system.rows, system.output), errors, strict=True))
            assert largest_over_slopes(sdp.LureSystem(2, rows, system.lower, system.upper, output)) <= math.sqrt(high) * (1 + 1e-12)


def test_the_factor_is_not_trusted(monkeypatch):
    """With R = 0 what is left is the matrix itself: accepted only if it is diagonally dominant, by more than the errors."""
    none = np.zeros(0)

    def accepted(rho, output, error):
        system = sdp.LureSystem(1, np.zeros((0, 1)), none, none, np.array([[output]]), None, np.array([[error]]))
        return sdp.prove_exactly(system, none, rho)

    assert accepted(1.0001, 1.0, 0.0)
    assert not accepted(1 - 2.0**-40, 1.0, 0.0)
    assert not accepted(1.0001, 1.0, 1e-3)
    monkeypatch.setattr(np.linalg, "cholesky", np.zeros_like)
    for sign in (1, -1):
        assert accepted(2.0, 0.9 * sign, 0.05)
        assert not accepted(2.0, 0.9 * sign, 0.2)
        assert not accepted(2.0, 1.2 * sign, 0.0)
    monkeypatch.setattr(np.linalg, "cholesky", lambda matrix: np.full_like(matrix, math.nan))
    assert not accepted(2.0, 0.9, 0.05)


@pytest.mark.parametrize("seed", range(20))
def test_the_errors_of_the_matrix_cover_every_network_within(seed):
    """Large errors, in eighths, so that the networks at their ends are exact; also where squares of errors count."""
    rng = np.random.default_rng(seed)
    rows, output, rows_error, output_error = (rng.integers(low, 9, shape) / 8 for low, shape in ((-8, (3, 5)), (-8, (2, 5)), (0, (3, 5)), (0, (2, 5))))
    slopes = -rng.random(3), rng.random(3)
    matrix, error = exact._matrix(sdp.LureSystem(2, rows, *slopes, output, rows_error, output_error), np.ones(3), 2.0, 2)
    for signs in (np.sign(rows) + (rows == 0), *rng.choice([-1.0, 1.0], (5, 3, 5))):
        other = sdp.LureSystem(2, rows + signs * rows_error, *slopes, output + signs[:2] * output_error)
        moved = exact._matrix(other, np.ones(3), 2.0, 2)[0]
        assert ((abs(moved + -matrix) + -error).numbers <= 0).all()


def test_whole_numbers_refuse_what_is_no_bound():
    system = sdp.feed_forward([np.eye(2), np.eye(2)])
    multipliers = np.ones(2)
    assert sdp.prove_exactly(system, multipliers, 1.0 + 2.0**-30)
    for rho in (0.0, -1.0, math.nan, math.inf, 1e-300, 1 - 2.0**-30):
        assert not sdp.prove_exactly(system, multipliers, rho)
    assert not sdp.prove_exactly(system, np.zeros(2), 1.0)
    assert not sdp.prove_exactly(system, np.array([1e300, 1.0]), 1.0)
    with pytest.raises(ValueError, match="not negative"):
        sdp.prove_exactly(system, -multipliers, 1.0)


def test_products_of_whole_numbers_are_exact():
    rng = np.random.default_rng(0)
    for bits in (1, 23, 24, 25, 48, 60, 200, 700):
        a, b = (
            np.array([int(rng.integers(-(2**62), 2**62)) ** 12 >> max(0, 744 - bits) for _ in range(35)], dtype=object).reshape(5, 7)
            * rng.choice([-1, 1], (5, 7))
            for _ in range(2)
        )
        assert (exact.product(a, b.T) == a.dot(b.T)).all()
    edge = np.full((3, 5), -(2**24), dtype=object)
    assert (exact.product(edge, edge.T) == edge.dot(edge.T)).all()
    numbers = np.array([1e-300, -5e-324, 0.1, 0.0, -1e300, 3.0])
    made = exact.Dyadic.of(numbers)
    assert [Fraction(int(n)) * Fraction(2) ** made.power for n in made.numbers] == [Fraction(x) for x in numbers]
