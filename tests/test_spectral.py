"""Spectral norms: those for training (lipnet.spectral) against their formulas, those that are proved (certify.spectral) against exact arithmetic."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_proof import exact, exact_gram, exact_shift, exactly_semidefinite

from certify import CertifyError
from certify.spectral import as_float64, largest_singular_value, pair_distances
from lipnet.spectral import gram_iteration, power_iteration_estimate

few = settings(deadline=None, max_examples=30)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm(matrix):
    return torch.linalg.matrix_norm(matrix.double(), 2)


def with_singular_values(*values, seed=0):
    size = len(values)
    left, right = torch.linalg.qr(normal(size, size, seed=seed))[0], torch.linalg.qr(normal(size, size, seed=seed + 1))[0]
    return left * torch.tensor(values, dtype=torch.float64) @ right.mT


# Gram iteration


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (16, 16), (1, 7), (7, 1), (1, 1)], ids=str)
def test_gram_iteration_is_an_upper_bound_that_falls_to_the_norm(shape):
    weight = normal(*shape)
    truth = norm(weight).item()
    bounds = [gram_iteration(weight, steps).item() for steps in range(1, 13)]
    assert all(bound >= truth * (1 - 1e-13) for bound in bounds)
    assert all(later <= earlier * (1 + 1e-13) for earlier, later in itertools.pairwise(bounds))
    assert bounds[-1] <= truth * (1 + 1e-6)
    if min(shape) > 1:
        assert bounds[0] > truth * 1.2


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("seed", range(3))
def test_the_excess_of_gram_iteration_is_that_of_its_formula(steps, seed):
    weight = normal(9, 14, seed=seed)
    ratios = torch.linalg.svdvals(weight) / norm(weight)
    excess = (ratios**2.0 ** (steps + 1)).sum() ** (1 / 2 ** (steps + 1))
    assert (gram_iteration(weight, steps) / norm(weight)).item() == pytest.approx(excess.item(), rel=1e-12)


def test_gram_iteration_converges_superlinearly_where_there_is_a_gap():
    """With sigma = (1, 1/2): excess about 2^-(2^(t+1)) / 2^(t+1), that is 1/64 and 1/2048 and 1/2^20 and 1/2^37."""
    weight = with_singular_values(1.0, 0.5)
    excess = [gram_iteration(weight, steps).item() - 1 for steps in (1, 2, 3, 4)]
    assert excess == pytest.approx([2**-6, 2**-11, 2**-20, 2**-37], rel=0.05)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_iteration_of_an_orthogonal_matrix(steps, dtype):
    weight = torch.linalg.qr(normal(64, 64))[0].to(dtype)
    assert gram_iteration(weight, steps).item() == pytest.approx(64 ** (1 / 2 ** (steps + 1)), rel=1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, scale) for scale in (1e-100, 1e-12, 1e3, 1e60)] + [(torch.float32, scale) for scale in (1e-25, 1e-18, 1e-10, 1e-3, 1e3, 1e10, 1e18)],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_gram_iteration_at_every_scale(dtype, scale, steps):
    weight = normal(64, 64)
    expected = gram_iteration(weight, steps).item() * scale
    assert gram_iteration((weight * scale).to(dtype), steps).item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-4, abs=0)


@few
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.integers(1, 9))
def test_gram_iteration_in_float32_is_below_the_norm_by_rounding_only(rows, columns, seed, steps):
    weight = normal(rows, columns, seed=seed, dtype=torch.float32)
    assert gram_iteration(weight, steps) >= norm(weight) * (1 - 2e-6)


def test_gram_iteration_takes_batches():
    weight = normal(3, 2, 5, 4)
    found = gram_iteration(weight, 3)
    assert found.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        assert found[i, j].item() == pytest.approx(gram_iteration(weight[i, j], 3).item(), rel=1e-13)


def test_the_gradient_of_gram_iteration_is_that_of_finite_differences_and_tends_to_the_singular_vectors():
    weight = with_singular_values(2.0, 1.0, 0.5, 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: gram_iteration(w, 3), (weight,))
    gram_iteration(weight, 8).backward()
    u, _, vh = torch.linalg.svd(weight.detach())
    torch.testing.assert_close(weight.grad, torch.outer(u[:, 0], vh[0]), rtol=1e-9, atol=1e-9)


def test_gram_iteration_of_a_zero_matrix_is_nearly_zero_with_a_finite_gradient():
    weight = torch.zeros(3, 4, requires_grad=True)
    value = gram_iteration(weight)
    value.backward()
    assert 0 <= value < 1e-30
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("steps", [0, -1])
def test_gram_iteration_refuses_no_steps(steps):
    with pytest.raises(ValueError, match=f"at least one step, got steps={steps}"):
        gram_iteration(torch.eye(2), steps)


# Power iteration


@few
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 10**6), st.integers(0, 30), st.integers(0, 5))
def test_power_iteration_is_never_above_the_norm(rows, columns, seed, steps, start):
    weight = normal(rows, columns, seed=seed)
    assert steps == 0 or power_iteration_estimate(weight, steps, start) <= norm(weight) * (1 + 1e-12)


def test_power_iteration_converges_where_there_is_a_gap():
    weight = with_singular_values(3.0, 1.0, 0.5).requires_grad_()
    value = power_iteration_estimate(weight)
    assert value.item() == pytest.approx(3, rel=1e-12)
    value.backward()
    u, _, vh = torch.linalg.svd(weight.detach())
    torch.testing.assert_close(weight.grad, torch.outer(u[:, 0], vh[0]), rtol=1e-7, atol=1e-7)


def test_power_iteration_may_be_far_below_the_norm():
    """The start of seed 0 is orthogonal to the top singular vector of this matrix: norm 10, estimate 1, and Gram iteration is not deceived."""
    start = torch.nn.functional.normalize(torch.randn(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=0)
    weight = torch.stack([10 * torch.stack([-start[1], start[0]]), start])
    assert norm(weight).item() == pytest.approx(10)
    assert power_iteration_estimate(weight, steps=3, seed=0).item() == pytest.approx(1)
    assert gram_iteration(weight).item() == pytest.approx(10)
    assert largest_singular_value(as_float64(weight)) == pytest.approx(10)


def test_the_gradient_of_power_iteration_holds_the_iterate_constant():
    weight = normal(5, 4).requires_grad_()
    power_iteration_estimate(weight, steps=1).backward()
    start = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = weight.detach()
    iterate = torch.nn.functional.normalize(w.mT @ w @ start, dim=0)
    torch.testing.assert_close(weight.grad, torch.outer(w @ iterate / (w @ iterate).norm(), iterate))


def test_power_iteration_follows_its_seed_and_no_other():
    weight = normal(30, 30)
    torch.manual_seed(1)
    first = power_iteration_estimate(weight, 2, seed=5)
    torch.manual_seed(2)
    assert power_iteration_estimate(weight, 2, seed=5) == first
    assert power_iteration_estimate(weight, 2, seed=6) != first


# The proved norm


def hadamard(size):
    return np.array([[1.0]]) if size == 1 else np.block([[hadamard(size // 2), hadamard(size // 2)], [hadamard(size // 2), -hadamard(size // 2)]])


KNOWN = [
    ([[3.0, 0.0], [4.0, 5.0]], Fraction(45)),  # W'W = [[25, 20], [20, 25]]
    ([[3.0, 0.0, 0.0], [4.0, 5.0, 0.0]], Fraction(45)),
    ([[1.0, 2.0, 2.0]], Fraction(9)),
    ([[-7.0]], Fraction(49)),
    (np.diag([1.0, -8.0, 0.5]), Fraction(64)),
    (np.ones((6, 11)), Fraction(66)),
    (hadamard(8), Fraction(8)),
    (hadamard(64), Fraction(64)),
    (hadamard(16)[:5], Fraction(16)),
    (np.eye(30), Fraction(1)),
    (np.kron(np.eye(4), [[3.0, 0.0], [4.0, 5.0]]), Fraction(45)),
    (np.array([[2.0, 1.0], [1.0, 3.0]]) @ np.array([[0.0, -1.0], [1.0, 0.0]]), None),  # golden: norm (5 + sqrt 5) / 2
]


@pytest.mark.parametrize(("matrix", "squared"), KNOWN, ids=range(len(KNOWN)))
def test_known_norms_are_met_from_above(matrix, squared):
    matrix = np.array(matrix)
    for found in (largest_singular_value(matrix), largest_singular_value(matrix.T)):
        if squared is None:
            assert found == pytest.approx((5 + math.sqrt(5)) / 2, rel=1e-9)
        else:
            assert Fraction(found) ** 2 >= squared  # without rounding
            assert Fraction(found) ** 2 <= squared * (1 + Fraction(2, 10**9))
        assert len(matrix) > 16 or exactly_semidefinite(exact_shift(Fraction(found) ** 2, exact_gram(exact(matrix))))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(["normal", "integer", "rank 1", "orthogonal", "uneven"]))
def test_the_proved_norm_is_above_the_exact_one_and_within_1e_9(rows, columns, seed, kind):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns))
    if kind == "integer":
        matrix = rng.integers(-9, 10, (rows, columns)).astype(np.float64)
        matrix[0, 0] = 1
    elif kind == "rank 1":
        matrix = np.outer(matrix[:, 0], matrix[0])
    elif kind == "orthogonal":
        matrix = np.linalg.qr(rng.standard_normal((6, 6)))[0][:rows, :columns]
    elif kind == "uneven":
        matrix = matrix * 10.0 ** rng.integers(-8, 8, (rows, 1))
    bound = Fraction(largest_singular_value(matrix))
    gram = exact_gram(exact(matrix))
    assert exactly_semidefinite(exact_shift(bound**2, gram))
    assert not exactly_semidefinite(exact_shift(bound**2 * (1 - Fraction(2, 10**9)), gram))


@pytest.mark.parametrize("shape", [(200, 200), (128, 300), (300, 10)], ids=str)
def test_the_proved_norm_of_large_matrices_is_tight(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    assert 1 - 1e-13 <= largest_singular_value(matrix) / np.linalg.norm(matrix, 2) <= 1 + 1e-10


@pytest.mark.parametrize("size", [8, 64, 200])
def test_float32_matrices_that_are_nearly_orthogonal(size):
    """Their top singular values are equal but for rounding: the case in which iterations stop early."""
    matrix = as_float64(torch.linalg.qr(normal(size, size, dtype=torch.float32))[0])
    found = largest_singular_value(matrix)
    assert 1 - 1e-13 <= found / np.linalg.norm(matrix, 2) <= 1 + 1e-9
    assert found != 1


@pytest.mark.parametrize("exponent", [-1000, -300, -31, -1, 1, 17, 300, 1000])
def test_scaling_by_a_power_of_two_scales_the_proved_norm(exponent):
    for matrix in ([[3.0, 0.0], [4.0, 5.0]], np.random.default_rng(0).standard_normal((7, 5))):
        assert largest_singular_value(np.array(matrix) * 2.0**exponent) == largest_singular_value(np.array(matrix)) * 2.0**exponent


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_tiny_and_huge_matrices(scale):
    matrix = np.array([[3.0, 0.0], [4.0, 5.0]]) * scale
    found = Fraction(largest_singular_value(matrix))
    gram = exact_gram(exact(matrix))
    assert exactly_semidefinite(exact_shift(found**2, gram))
    assert not exactly_semidefinite(exact_shift(found**2 * (1 - Fraction(2, 10**9)), gram))


def test_entries_of_very_different_size():
    matrix = np.array([[1e300, 0.0], [1e-300, 1e-300]])
    assert 1e300 <= largest_singular_value(matrix) <= 1e300 * (1 + 1e-9)


def test_a_norm_beyond_float64_is_refused():
    assert largest_singular_value(np.full((2, 2), 8e307)) >= 1.6e308
    with pytest.raises(CertifyError, match="its norm is not a float64"):
        largest_singular_value(np.full((2, 2), 1e308))


@pytest.mark.parametrize("entry", [5e-324, 1e-310, 2.0**-1024])
def test_subnormal_matrices(entry):
    found = largest_singular_value(np.array([[entry, 0.0], [0.0, entry]]))
    assert entry <= found <= 4 * entry + 1e-322


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 3), (3, 0), (0, 0)], ids=str)
def test_zero_and_empty_matrices_have_norm_zero(shape):
    assert largest_singular_value(np.zeros(shape)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(CertifyError, match=r"^a weight holds NaN or infinite numbers; load weights that are finite$"):
        largest_singular_value(np.array([[1.0, bad]]))


def test_the_argument_is_left_alone():
    matrix = np.array([[3.0, 0.0], [4.0, 5.0]])
    largest_singular_value(matrix)
    assert matrix.tolist() == [[3.0, 0.0], [4.0, 5.0]]


@few
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([2.0**-53, 2.0**-24, 2.0**-8, 0.25, 1.0]))
def test_relative_error_is_the_worst_case_entry_by_entry(rows, columns, seed, relative):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns))
    found = Fraction(largest_singular_value(matrix, relative))
    u, _, vh = np.linalg.svd(matrix)
    signs = np.sign(np.outer(u[:, 0], vh[0]) * matrix)  # raises the top singular value most, to first order
    for moves in (signs, np.ones_like(matrix), rng.choice([-1.0, 1.0], matrix.shape)):
        moved = [[x * (1 + Fraction(relative) * int(move)) for x, move in zip(row, line, strict=True)] for row, line in zip(exact(matrix), moves, strict=True)]
        assert exactly_semidefinite(exact_shift(found**2, exact_gram(moved)))
    assert found <= Fraction(np.linalg.norm(matrix, 2)) * (1 + Fraction(20 * relative) * rows + Fraction(1, 10**9))


def test_the_error_of_the_gram_matrix_covers_any_order_of_summation(monkeypatch):
    seen = []
    monkeypatch.setattr("sdp.largest_eigenvalue", lambda matrix, error: seen.append((matrix, error)) or 1.0)
    for shape in ((3, 5), (5, 3), (1, 40)):
        matrix = np.random.default_rng(0).standard_normal(shape) * 1.7
        largest_singular_value(matrix)
        gram, error = seen[-1]
        wide = matrix if shape[0] <= shape[1] else matrix.T
        scale = Fraction(2) ** -math.frexp(np.abs(matrix).max())[1]
        rows = [[scale * x for x in row] for row in exact(wide)]
        sizes = exact_gram([[abs(x) for x in row] for row in rows])
        for i, j in itertools.product(range(len(rows)), repeat=2):
            assert abs(Fraction(gram[i, j]) - exact_gram(rows)[i][j]) <= Fraction(error[i, j])
            assert Fraction(error[i, j]) >= sizes[i][j] * wide.shape[1] / 2**53


def test_as_float64_is_exact_and_takes_every_floating_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = normal(4, 3, dtype=dtype).requires_grad_()
        found = as_float64(tensor.mT)
        assert found.dtype == np.float64
        assert found.flags.c_contiguous
        assert np.array_equal(found, tensor.detach().mT.double().numpy())


# Distances of rows


def test_distances_of_pythagorean_rows():
    rows = np.array([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [2.0, 3.0, 6.0], [3.0, 4.0, 12.0], [0.0, 0.0, 0.0]])
    squared = [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in exact(rows)] for x in exact(rows)]
    assert [math.isqrt(int(s)) ** 2 == s for s in squared[0]] == [True] * 5  # 0, 5, 7, 13, 0
    found = pair_distances(rows)
    for i, j in itertools.product(range(5), repeat=2):
        assert Fraction(found[i, j]) ** 2 >= squared[i][j]
        assert found[i, j] == pytest.approx(math.sqrt(squared[i][j]), rel=1e-14, abs=1e-100)
    assert found[0, 4] < 1e-100


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6), st.integers(-100, 100), st.floats(0, 16))
def test_distances_are_never_below_and_within_1e_13(classes, features, seed, exponent, closeness):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal(features) + 10.0**-closeness * rng.standard_normal((classes, features))) * 10.0**exponent  # rows may nearly be equal
    found = pair_distances(rows)
    assert np.array_equal(found, found.T)
    assert (np.diagonal(found) == 0).all()
    for x, y in itertools.combinations(range(classes), 2):
        squared = sum(((a - b) ** 2 for a, b in zip(exact(rows)[x], exact(rows)[y], strict=True)), Fraction(0))
        assert Fraction(found[x, y]) ** 2 >= squared
        assert Fraction(found[x, y]) ** 2 <= squared * (1 + Fraction(1, 10**13)) + Fraction(1, 10**280)


def test_distances_of_long_rows_are_never_below():
    """Sums of many squares round by more than one unit."""
    rows = np.random.default_rng(0).standard_normal((8, 1001))
    found, entries, rounded = pair_distances(rows), exact(rows), 0
    for i, j in itertools.combinations(range(8), 2):
        squared = sum(((a - b) ** 2 for a, b in zip(entries[i], entries[j], strict=True)), Fraction(0))
        assert Fraction(found[i, j]) ** 2 >= squared
        rounded += Fraction(float(np.nextafter(np.sqrt(((rows[j] - rows[i]) ** 2).sum()), np.inf))) ** 2 < squared
    assert (found <= np.linalg.norm(rows[:, None] - rows, axis=2) * (1 + 1e-12)).all()


@pytest.mark.parametrize("size", [1e-160, 1e-200, 1e-290])
def test_distances_of_tiny_rows_are_never_below(size):
    found = pair_distances(np.array([[0.0, 0.0], [3 * size, 4 * size]]))
    assert Fraction(found[0, 1]) ** 2 >= Fraction(3 * size) ** 2 + Fraction(4 * size) ** 2


@pytest.mark.parametrize("size", [1e-155, 1e-158, 1e-200, 1e-290])
def test_distances_of_tiny_rows_beside_an_ordinary_one_are_never_below(size):
    found = pair_distances(np.array([[0.0, 0.0], [3 * size, 4 * size], [1.0, 0.0]]))
    assert Fraction(found[0, 1]) ** 2 >= Fraction(3 * size) ** 2 + Fraction(4 * size) ** 2
    assert found[0, 1] < 1e-100


def test_distances_of_huge_rows_are_never_below():
    with np.errstate(over="ignore"):
        assert pair_distances(np.array([[0.0, 0.0], [3e200, 4e200]]))[0, 1] >= 5e200


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_distances_of_rows_that_are_not_finite_are_refused(bad):
    with np.errstate(all="ignore"), pytest.raises(CertifyError, match="NaN or infinite"):
        pair_distances(np.array([[bad, 0.0], [bad, 1.0]]))
