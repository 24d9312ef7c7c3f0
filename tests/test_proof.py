"""sdp: proofs of semidefiniteness against exact rational arithmetic, LipSDP bounds against enumeration, and the closed-form multipliers of the blocks."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lipnet
import sdp

some = settings(deadline=None, max_examples=60)


# Exact arithmetic: the ground truth of this file


def exact(matrix):
    """A float matrix as fractions, without rounding."""
    return [[Fraction(float(entry)) for entry in row] for row in np.asarray(matrix)]


def exactly_semidefinite(matrix):
    """Whether a symmetric matrix of fractions is positive semidefinite, by LDL' without rounding: a zero pivot needs a zero row."""
    rows = [list(row) for row in matrix]
    size = len(rows)
    for k in range(size):
        pivot = rows[k][k]
        if pivot < 0 or (pivot == 0 and any(rows[k][j] for j in range(k + 1, size))):
            return False
        if pivot == 0:
            continue
        for i in range(k + 1, size):
            factor = rows[i][k] / pivot
            for j in range(k + 1, size):
                rows[i][j] -= factor * rows[k][j]
    return True


def exact_shift(value, matrix):
    """`value I - matrix`."""
    return [[(value if i == j else 0) - entry for j, entry in enumerate(row)] for i, row in enumerate(matrix)]


def exact_gram(rows):
    """`W W'`."""
    return [[sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0)) for y in rows] for x in rows]


def test_the_ground_truth_itself():
    assert exactly_semidefinite(exact([[1, 1], [1, 1]]))
    assert not exactly_semidefinite(exact([[1, 1], [1, 1 - 2**-52]]))
    assert exactly_semidefinite(exact([[0, 0], [0, 1]]))
    assert not exactly_semidefinite(exact([[0, 1], [1, 5]]))
    assert exactly_semidefinite(exact([[2, -1, 0], [-1, 2, -1], [0, -1, 2]]))
    assert not exactly_semidefinite(exact([[1, 2], [2, 1]]))


# is_positive_semidefinite


@st.composite
def symmetric_matrices(draw):
    """Small symmetric matrices: any, or a Gram matrix of low rank moved by a hair; so that many are at the edge."""
    size = draw(st.integers(1, 5))
    entries = st.integers(-4, 4)
    if draw(st.booleans()):
        half = np.array(draw(st.lists(entries, min_size=size * size, max_size=size * size)), dtype=np.float64).reshape(size, size)
        matrix = half + half.T + draw(st.integers(0, 12)) * np.eye(size)
    else:
        rank = draw(st.integers(1, size))
        half = np.array(draw(st.lists(entries, min_size=size * rank, max_size=size * rank)), dtype=np.float64).reshape(size, rank)
        matrix = half @ half.T
    matrix += draw(st.sampled_from([0.0, 2.0**-48, -(2.0**-48), 2.0**-40, -(2.0**-40), 1e-3, -1e-3])) * np.eye(size)
    scale = np.exp2(draw(st.lists(st.integers(-30, 30), min_size=size, max_size=size)))
    return matrix * scale[:, None] * scale


@settings(deadline=None, max_examples=400)
@given(symmetric_matrices())
def test_nothing_is_called_semidefinite_that_is_not(matrix):
    if sdp.is_positive_semidefinite(matrix):
        assert exactly_semidefinite(exact(matrix))


def test_nothing_is_called_semidefinite_that_is_not_at_the_edge():
    """Gram matrices of rank n - 1, rounded to float64: the smallest eigenvalue is off 0 by less than LAPACK can see, to either side."""
    rng = np.random.default_rng(0)
    deceived = 0
    for _ in range(150):
        size = int(rng.integers(2, 16))
        half = rng.standard_normal((size, size - 1))
        matrix = half @ half.T
        matrix = (matrix + matrix.T) / 2
        truth = exactly_semidefinite(exact(matrix))
        assert truth or not sdp.is_positive_semidefinite(matrix)
        try:
            np.linalg.cholesky(matrix)
            deceived += not truth
        except np.linalg.LinAlgError:
            pass
    assert deceived > 5  # a plain Cholesky factorisation says yes to some that are indefinite


@pytest.mark.parametrize("size", [2, 10, 50])
def test_less_room_than_the_theorem_asks_for_is_not_enough(size):
    """`(1 - d) 11' + d I` has the smallest eigenvalue d; Higham's theorem 10.3 asks for more than `gamma_{n+1} trace`, whatever the rounding was this time."""
    asked = (size + 1) * 2.0**-53 * size

    def with_room(room):
        return np.full((size, size), 1 - room) + np.diag(np.full(size, 1.0) - (1 - room))

    assert not sdp.is_positive_semidefinite(with_room(0.9 * asked))
    assert sdp.is_positive_semidefinite(with_room(100 * asked))


@settings(deadline=None, max_examples=200)
@given(symmetric_matrices(), st.sampled_from([1e-11, 1e-3, 1.0]))
def test_what_is_clearly_definite_is_proved(matrix, margin):
    diagonal = np.abs(matrix).sum(axis=1) * (1 + margin) + 1e-9
    assert sdp.is_positive_semidefinite(matrix - np.diag(np.diagonal(matrix)) + np.diag(diagonal))  # diagonally dominant by a margin


@pytest.mark.parametrize("size", [1, 2, 10, 60])
@pytest.mark.parametrize("exponent", [-300, -20, 0, 20, 300])
def test_definite_matrices_of_every_scale_are_proved(size, exponent):
    half = np.random.default_rng(size).standard_normal((size, size + 5))
    matrix = (half @ half.T) / size + 1e-6 * np.eye(size)
    matrix = (matrix + matrix.T) / 2
    assert sdp.is_positive_semidefinite(matrix * 10.0**exponent)
    assert not sdp.is_positive_semidefinite((matrix - 1.001 * np.linalg.eigvalsh(matrix)[0] * np.eye(size)) * 10.0**exponent)


def test_a_badly_scaled_definite_matrix_is_proved():
    matrix = np.array([[1e200, 1e-3], [1e-3, 1e-200]])  # determinant 1 - 1e-6
    assert sdp.is_positive_semidefinite(matrix)
    assert not sdp.is_positive_semidefinite(matrix * np.array([[1, 1001], [1001, 1]]))


@pytest.mark.parametrize(
    "matrix",
    [
        [[math.nan, 0.0], [0.0, 1.0]],
        [[1.0, math.nan], [math.nan, 1.0]],
        [[math.inf, 0.0], [0.0, 1.0]],
        [[1.0, -math.inf], [-math.inf, 1.0]],
        [[2.0, 1.0], [0.0, 2.0]],
        [[2.0, 1.0], [1.0 + 2.0**-52, 2.0]],
        [[0.0, 0.0], [0.0, 1.0]],
        [[-1.0]],
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
    ],
)
def test_what_is_not_a_definite_symmetric_matrix_is_not_proved(matrix):
    assert not sdp.is_positive_semidefinite(np.array(matrix))


def test_an_error_that_is_not_a_number_proves_nothing():
    for bad in (math.nan, math.inf):
        assert not sdp.is_positive_semidefinite(np.eye(2), np.full((2, 2), bad))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5), st.integers(0, 10**6), st.floats(-12, 1))
def test_error_is_the_worst_case_entry_by_entry(size, seed, exponent):
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((size, size))
    matrix = half @ half.T
    matrix = (matrix + matrix.T) / 2
    error = rng.random((size, size)) * 10.0**exponent
    error = np.maximum(error, error.T)
    sign = np.sign(np.linalg.eigh(matrix)[1][:, 0])
    worst = exact(matrix)
    for i, j in itertools.product(range(size), repeat=2):  # the perturbation that lowers the smallest eigenvalue most, to first order
        worst[i][j] -= Fraction(float(error[i, j])) * int(sign[i] * sign[j])
    proved = sdp.is_positive_semidefinite(matrix, error)
    if proved:
        assert exactly_semidefinite(worst)
        assert exactly_semidefinite(exact_shift(Fraction(0), [[-x for x in row] for row in exact(matrix)]))
    smallest = np.linalg.eigvalsh(matrix)[0]
    diagonal = np.diagonal(matrix)
    relative = np.linalg.eigvalsh(matrix / np.sqrt(diagonal[:, None] * diagonal))[0]
    if smallest > 0 and relative > 1e-9 + 8 * (error / np.sqrt(diagonal[:, None] * diagonal)).sum(axis=1).max():
        assert proved


def test_an_error_in_one_row_costs_that_row_only():
    matrix = np.array([[1.0, 1 - 1e-9, 0.0], [1 - 1e-9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert sdp.is_positive_semidefinite(matrix, np.diag([0.0, 0.0, 0.5]))
    assert not sdp.is_positive_semidefinite(matrix, np.diag([0.0, 0.0, 1.0 + 1e-9]))
    assert not sdp.is_positive_semidefinite(matrix, np.diag([0.0, 2e-9, 0.0]))


def test_zero_error_is_no_error():
    assert sdp.is_positive_semidefinite(np.diag([1.0, 1e-12]), np.zeros((2, 2)))
    assert not sdp.is_positive_semidefinite(np.diag([1.0, 1e-12]), np.diag([0.0, 2e-12]))


def test_the_arguments_are_left_alone():
    matrix, error = np.diag([4.0, 9.0]), np.full((2, 2), 1e-3)
    sdp.is_positive_semidefinite(matrix, error)
    sdp.largest_eigenvalue(matrix, error)
    assert np.array_equal(matrix, np.diag([4.0, 9.0]))
    assert np.array_equal(error, np.full((2, 2), 1e-3))


# largest_eigenvalue


@some
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.integers(-200, 200))
def test_largest_eigenvalue_is_proved_and_tight(size, rank, seed, exponent):
    half = np.random.default_rng(seed).integers(-9, 10, (size, rank)).astype(np.float64)
    half[0, 0] = 1.0
    matrix = half @ half.T * 2.0**exponent  # exact
    bound = sdp.largest_eigenvalue(matrix)
    assert exactly_semidefinite(exact_shift(Fraction(bound), exact(matrix)))
    assert not exactly_semidefinite(exact_shift(Fraction(bound) * (1 - Fraction(1, 10**9)), exact(matrix)))


@some
@given(st.integers(1, 5), st.integers(0, 10**6), st.floats(-14, 0))
def test_largest_eigenvalue_covers_the_error(size, seed, exponent):
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((size, size + 1))
    matrix = half @ half.T
    matrix = (matrix + matrix.T) / 2
    error = rng.random((size, size)) * 10.0**exponent
    error = np.maximum(error, error.T)
    sign = np.sign(np.linalg.eigh(matrix)[1][:, -1])
    worst = [[Fraction(x) + Fraction(float(error[i, j])) * int(sign[i] * sign[j]) for j, x in enumerate(row)] for i, row in enumerate(exact(matrix))]
    bound = sdp.largest_eigenvalue(matrix, error)
    assert exactly_semidefinite(exact_shift(Fraction(bound), worst))
    assert bound <= np.linalg.eigvalsh(matrix)[-1] * (1 + 1e-9) + 10 * error.sum(axis=1).max()


def test_the_difference_that_is_checked_is_within_its_error_of_the_exact_one(monkeypatch):
    """`value I - matrix`, whose diagonal is rounded."""
    seen = []
    check = sdp.proof.is_positive_semidefinite
    monkeypatch.setattr(sdp.proof, "is_positive_semidefinite", lambda matrix, error: seen.append((matrix, error)) or check(matrix, error))
    half = np.random.default_rng(0).standard_normal((5, 6))
    matrix = half @ half.T
    for error_bound in (None, np.full((5, 5), 1e-12)):
        value = Fraction(sdp.largest_eigenvalue((matrix + matrix.T) / 2, error_bound))
        checked, error = seen[-1]
        for i, row in enumerate(exact_shift(value, exact((matrix + matrix.T) / 2))):
            for j, entry in enumerate(row):
                assert abs(Fraction(checked[i, j]) - entry) + Fraction(0 if error_bound is None else error_bound[i, j]) <= Fraction(error[i, j])


@pytest.mark.parametrize("multiplicity", [1, 5, 40])
def test_largest_eigenvalue_with_multiplicity(multiplicity):
    matrix = np.diag([7.0] * multiplicity + [1.0] * 3)
    assert 7 <= sdp.largest_eigenvalue(matrix) <= 7 * (1 + 1e-9)


def test_largest_eigenvalue_of_zero_is_nearly_zero():
    assert 0 <= sdp.largest_eigenvalue(np.zeros((3, 3))) < 1e-200


def test_largest_eigenvalue_of_zero_with_an_error():
    assert 2e-10 <= sdp.largest_eigenvalue(np.zeros((2, 2)), np.full((2, 2), 1e-10)) <= 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_largest_eigenvalue_of_what_is_not_finite_is_inf(bad):
    assert sdp.largest_eigenvalue(np.array([[1.0, bad], [bad, 1.0]])) == math.inf


def test_largest_eigenvalue_of_an_asymmetric_matrix_is_inf():
    assert sdp.largest_eigenvalue(np.array([[1.0, 100.0], [0.0, 1.0]])) == math.inf


# LureSystem


def scalar_system(inner=2.0, outer=-3.0, slopes=(0.0, 1.0)):
    """`y = outer phi(inner x)`."""
    return sdp.LureSystem(1, np.array([[inner, 0.0]]), np.array([slopes[0]]), np.array([slopes[1]]), np.array([[0.0, outer]]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", np.zeros((1, 3)), r"rows of a LureSystem with 1 inputs and 1 nonlinearities must be \(1, 2\), got \(1, 3\)"),
        ("rows", np.zeros((2, 2)), r"rows .* must be \(1, 2\), got \(2, 2\)"),
        ("upper", np.ones(2), r"upper .* must be \(1,\), got \(2,\)"),
        ("output", np.zeros((1, 1)), r"output .* must be \(1, 2\), got \(1, 1\)"),
        ("rows", np.array([[math.nan, 0.0]]), "finite numbers"),
        ("output", np.array([[math.inf, 0.0]]), "finite numbers"),
        ("lower", np.array([-math.inf]), "finite numbers"),
        ("upper", np.array([math.nan]), "finite numbers"),
        ("lower", np.array([1.5]), "need lower <= upper, found 1 that do not"),
    ],
)
def test_refusals_of_a_lure_system(field, value, message):
    arguments = {"inputs": 1, "rows": np.array([[2.0, 0.0]]), "lower": np.zeros(1), "upper": np.ones(1), "output": np.array([[0.0, 3.0]])}
    sdp.LureSystem(**arguments)
    with pytest.raises(ValueError, match=message):
        sdp.LureSystem(**{**arguments, field: value})


def test_a_residual_block_as_a_system():
    skip, branch, inner = np.arange(6.0).reshape(2, 3), np.ones((2, 2)), [np.full((4, 3), 2.0), np.full((2, 4), 3.0)]
    system = sdp.residual_block(skip, branch, inner, (0.0, 1.0))
    assert system.inputs == 3
    assert np.array_equal(system.output, np.hstack([skip, np.zeros((2, 4)), branch]))
    assert np.array_equal(system.rows[:4], np.hstack([inner[0], np.zeros((4, 6))]))
    assert np.array_equal(system.rows[4:], np.hstack([np.zeros((2, 3)), inner[1], np.zeros((2, 2))]))


# prove


def largest_over_slopes(system):
    """The largest norm of the Jacobian over all slopes: at their ends, as the Jacobian of a network without loops is affine in each slope by itself."""
    count, inputs = len(system.lower), system.inputs
    largest = 0.0
    for choice in itertools.product((0, 1), repeat=count):
        slopes = np.where(choice, system.upper, system.lower)
        signals = np.vstack([np.eye(inputs), np.zeros((count, inputs))])
        for j in range(count):  # rows are strictly lower triangular
            signals[inputs + j] = slopes[j] * (system.rows[j] @ signals)
        largest = max(largest, np.linalg.norm(system.output @ signals, 2))
    return largest


def feed_forward(*matrices, slopes=(0.0, 1.0)):
    """`W_L phi(.. phi(W_0 x))`."""
    *inner, last = matrices
    return sdp.residual_block(np.zeros((len(last), inner[0].shape[1])), last, inner, slopes)


def dominant_multipliers(*matrices):
    """Feasible multipliers of a ReLU network: from the last layer back, `T = row sums |M|` makes `2T - M` positive definite, M what comes from behind."""
    found = []
    behind = matrices[-1].T @ matrices[-1]
    for matrix in reversed(matrices[1:-1]):
        t = np.abs(behind).sum(axis=1)
        found.insert(0, t)
        coupling = t[:, None] * matrix
        behind = coupling.T @ np.linalg.solve(2 * np.diag(t) - behind, coupling)
    return np.concatenate([np.abs(behind).sum(axis=1), *found])


def exactly_proved(system, multipliers, bound):
    """Whether `bound^2 E_0 + sum_j t_j (p_j q_j' + q_j p_j') - O'O >= 0`, in fractions."""
    rows, output = exact(system.rows), exact(system.output)
    size = system.inputs + len(system.lower)
    total = [[Fraction(bound) ** 2 if i == j < system.inputs else Fraction(0) for j in range(size)] for i in range(size)]
    for k, row in enumerate(rows):
        p = [-Fraction(float(system.lower[k])) * x for x in row]
        q = [-Fraction(float(system.upper[k])) * x for x in row]
        p[system.inputs + k] += 1
        q[system.inputs + k] += 1
        t = Fraction(float(multipliers[k]))
        for i, j in itertools.product(range(size), repeat=2):
            total[i][j] += t * (p[i] * q[j] + q[i] * p[j])
    for row in output:
        for i, j in itertools.product(range(size), repeat=2):
            total[i][j] -= row[i] * row[j]
    return exactly_semidefinite(total)


@pytest.mark.parametrize(("inner", "outer"), [(2.0, -3.0), (1e-8, 5.0), (1e8, 1e-8), (0.1, 0.3)])
def test_one_neuron_is_exact(inner, outer):
    """`[[rho, -t w1], [-t w1, 2t - w2^2]] >= 0` asks for `rho >= t^2 w1^2 / (2t - w2^2)`, least at t = w2^2, where it is w1^2 w2^2."""
    bound = sdp.prove(scalar_system(inner, outer), np.array([outer**2]))
    assert abs(inner * outer) <= bound * (1 + 1e-16)
    assert bound <= abs(inner * outer) * (1 + 1e-9)
    # at twice the best multiplier: rho = 4/3 of the best
    assert sdp.prove(scalar_system(inner, outer), np.array([2 * outer**2])) == pytest.approx(math.sqrt(4 / 3) * abs(inner * outer), rel=1e-9)


@pytest.mark.parametrize(("slopes", "multiplier", "constant"), [((-1.0, 1.0), 0.5 * (1 + 1e-7), 1.0), ((0.25, 1.0), None, 1.0), ((-2.0, 0.5), None, 2.0)])
def test_one_neuron_with_other_slopes(slopes, multiplier, constant):
    """|x| has slopes in [-1, 1]: `[[rho - 2t, 0], [0, 2t - 1]]`, so t = 1/2 (and a hair) and rho = 1. Of [l, u] the best t is searched for."""
    system = scalar_system(1.0, 1.0, slopes)
    candidates = [multiplier] if multiplier else np.linspace(0.3, 3, 1001)
    bounds = [sdp.prove(system, np.array([t])) for t in candidates]
    assert min(bounds) >= constant
    assert min(bounds) <= constant * (1 + 1e-4 if multiplier is None else 1 + 1e-6)


def test_chains_of_single_neurons_are_exact():
    """`c phi(b phi(a x))` on each coordinate: t_2 = c^2 and t_1 = b^2 c^2 give max |a b c|, as each coordinate is one neuron after another."""
    a, b, c = np.array([1.0, -2.0, 0.5]), np.array([3.0, 0.5, 4.0]), np.array([0.25, 2.0, -1.5])
    bound = sdp.prove(feed_forward(np.diag(a), np.diag(b), np.diag(c)), np.concatenate([b**2 * c**2, c**2]))
    assert 3 <= bound <= 3 * (1 + 1e-9)  # 0.5 * 4 * 1.5


def test_a_linear_system_gives_its_spectral_norm():
    none = np.zeros(0)
    system = sdp.LureSystem(2, np.zeros((0, 2)), none, none, np.array([[3.0, 0.0], [4.0, 5.0]]))
    assert math.sqrt(45) <= sdp.prove(system, none) <= math.sqrt(45) * (1 + 1e-9)
    identity = sdp.residual_block(np.eye(4), np.zeros((4, 3)), [np.random.default_rng(0).standard_normal((3, 4))], (0.0, 1.0))
    assert 1 <= sdp.prove(identity, np.full(3, 1e-9)) <= 1 + 1e-6


@pytest.mark.parametrize("w", [0.5, -0.5, 0.9, -3.0])
def test_an_implicit_neuron_is_exact(w):
    """`z = phi(w z + x)` has slope s / (1 - s w), at most 1 / (1 - w) for 0 <= w < 1 and at most 1 / (1 - w) < 1 for w < 0 (s = 1 both times).

    `[[rho, -t], [-t, 2t (1 - w) - 1]]` is best at t = 1 / (1 - w), where rho = 1 / (1 - w)^2.
    """
    system = sdp.LureSystem(1, np.array([[1.0, w]]), np.zeros(1), np.ones(1), np.array([[0.0, 1.0]]))
    bound = sdp.prove(system, np.array([1 / (1 - w)]))
    assert 1 / (1 - w) <= bound * (1 + 1e-16)
    assert bound <= (1 + 1e-9) / (1 - w)


def test_max_min_with_one_absolute_value_is_one_lipschitz():
    """(max, min) = (a + b +- |a - b|) / 2. With t on |a - b|: `rho I + 2t ([|d|]^2 - dd') - O'O`; at t = 1/4 it is 0 but for rounding."""
    system = sdp.LureSystem(2, np.array([[1.0, -1.0, 0.0]]), -np.ones(1), np.ones(1), np.array([[0.5, 0.5, 0.5], [0.5, 0.5, -0.5]]))
    assert 1 <= sdp.prove(system, np.array([0.25 * (1 + 1e-9)])) <= 1 + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_convex_potential_layer_is_one_lipschitz(seed):
    """`x - (2/s^2) W' phi(W x)` with the multipliers t = 2/s^2: the cross term is `-t W' + (2/s^2) W' = 0`, so that rho = 1 and what remains is

    `2t I - (4/s^4) W W' = (4/s^2) (I - W W' / s^2) >= 0` for s >= |W|. At s = |W| it is singular and t is raised by a hair (rho rises by as much).
    """
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(((5, 7), (7, 5), (6, 6), (1, 4))[seed])
    norm = np.linalg.norm(w, 2)
    s = norm * (1 + 1e-9)
    layer = sdp.residual_block(np.eye(w.shape[1]), -2 / s**2 * w.T, [w], (0.0, 1.0))
    assert 1 <= sdp.prove(layer, np.full(len(w), 2 / s**2)) <= 1 + 1e-6
    at_the_norm = sdp.residual_block(np.eye(w.shape[1]), -2 / norm**2 * w.T, [w], (0.0, 1.0))
    assert 1 <= sdp.prove(at_the_norm, np.full(len(w), 2 / norm**2) * (1 + 1e-9)) <= 1 + 1e-6
    broken = sdp.residual_block(np.eye(w.shape[1]), -3 / norm**2 * w.T, [w], (0.0, 1.0))  # |1 - 3| along the top singular vector
    assert all(sdp.prove(broken, np.full(len(w), t / norm**2)) >= 2 for t in np.geomspace(0.1, 100, 50))


@pytest.mark.parametrize("seed", range(4))
def test_sll_layer_is_one_lipschitz(seed):
    """`x - 2 W T phi(W' x)`, `T = 1 / row sums |W'W|`, with the multipliers 2T: the cross term `-2 W T + 2 W T` is 0 and `4T - 4 T W'W T = 4T (T^-1 - W'W) T`

    is not negative, as `T^-1 - W'W` is diagonally dominant.
    """
    w = np.random.default_rng(seed).standard_normal(((7, 5), (5, 7), (6, 6), (4, 1))[seed])
    t = 1 / np.abs(w.T @ w).sum(axis=1)
    layer = sdp.residual_block(np.eye(len(w)), -2 * w * t, [w.T], (0.0, 1.0))
    assert 1 <= sdp.prove(layer, 2 * t * (1 + 1e-9)) <= 1 + 1e-6
    assert largest_over_slopes(layer) <= 1 + 1e-12


SHAPES = [(3, 5, 2), (2, 6, 1), (4, 3, 3, 2), (3, 4, 4, 3), (2, 3, 3, 3, 1)]


def random_network(shape, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((out, into)) / into**0.5 for into, out in itertools.pairwise(shape)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slopes", [(0.0, 1.0), (-0.1, 1.0), (0.2, 0.9), (-1.0, 1.0)], ids=str)
def test_never_below_the_largest_slope(shape, slopes):
    for seed in range(3):
        matrices = random_network(shape, seed)
        system = feed_forward(*matrices, slopes=slopes)
        truth = largest_over_slopes(system)
        best = math.inf
        rng = np.random.default_rng(seed)
        for scale in np.geomspace(1e-3, 1e3, 25):
            for noise in (0.0, 0.5):
                multipliers = scale * dominant_multipliers(*matrices) * np.exp(noise * rng.standard_normal(len(system.lower)))
                bound = sdp.prove(system, multipliers)
                assert bound >= truth * (1 - 1e-12)
                best = min(best, bound)
        if slopes == (0.0, 1.0):
            assert best <= 2.5 * truth  # and not only inf
        assert math.isfinite(best) or slopes != (0.0, 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_residual_blocks_are_never_below_the_largest_slope(seed):
    rng = np.random.default_rng(seed)
    inner = [rng.standard_normal((4, 3)), rng.standard_normal((4, 4)) / 2]
    system = sdp.residual_block(rng.standard_normal((2, 3)), rng.standard_normal((2, 4)), inner, (0.0, 1.0))
    truth = largest_over_slopes(system)
    bounds = [sdp.prove(system, np.concatenate([a * np.ones(4), b * np.ones(4)])) for a in np.geomspace(1e-3, 1e3, 13) for b in np.geomspace(1e-3, 1e3, 13)]
    assert truth * (1 - 1e-12) <= min(bounds) <= 5 * truth


@some
@given(st.sampled_from(SHAPES[:3]), st.integers(0, 10**6), st.floats(-1, 1), st.sampled_from([(0.0, 1.0), (-0.125, 1.25), (0.1, 1.0)]))
def test_what_is_proved_holds_in_exact_arithmetic(shape, seed, exponent, slopes):
    matrices = [np.round(8 * matrix) / 8 for matrix in random_network(shape, seed)]
    system = feed_forward(*matrices, slopes=slopes)
    multipliers = np.exp2(np.random.default_rng(seed).uniform(-2, 2, len(system.lower))) * 10**exponent
    bound = sdp.prove(system, multipliers)
    if math.isfinite(bound):
        assert exactly_proved(system, multipliers, bound)
        assert bound < 1e-100 or not exactly_proved(system, multipliers, bound * (1 - 1e-6))  # as small as these multipliers allow


@pytest.mark.parametrize("room", [1e-6, 1e-9, 1e-11, 1e-12])
def test_what_is_proved_at_the_edge_of_the_cone_holds_in_exact_arithmetic(room):
    """With multipliers that make `2T - W'W` nearly singular LAPACK's proposal is wrong in its first digits, and must not be believed."""
    proved = 0
    for seed in range(12):
        matrices = random_network((2, 4, 2), seed)
        top = np.linalg.eigvalsh(matrices[1].T @ matrices[1])[-1]
        system, multipliers = feed_forward(*matrices), np.full(4, top / 2 * (1 + room))
        bound = sdp.prove(system, multipliers)
        if math.isfinite(bound):
            assert exactly_proved(system, multipliers, bound)
            proved += 1
    assert proved or room < 1e-11


def test_the_matrix_that_is_checked_is_within_its_error_of_the_exact_one(monkeypatch):
    """`[[P + O'O, O'], [O, I]]`, entry by entry; the error is also no less than any order of summation could make."""
    seen = []
    check = sdp.proof.is_positive_semidefinite
    monkeypatch.setattr(sdp.proof, "is_positive_semidefinite", lambda matrix, error: seen.append((matrix.copy(), error)) or check(matrix, error))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        count, inputs = 4, 3
        rows = np.hstack([rng.standard_normal((count, inputs)), np.tril(0.2 * rng.standard_normal((count, count)), -1)])
        lower, upper = rng.uniform(-1, 0.3, count), rng.uniform(0.4, 1.3, count)
        system = sdp.LureSystem(inputs, rows, lower, upper, np.hstack([rng.standard_normal((2, inputs)), 0.1 * rng.standard_normal((2, count))]))
        multipliers = rng.uniform(0.5, 1.5, count)
        seen.clear()
        bound = Fraction(sdp.prove(system, multipliers))
        matrix, error = seen[-1]
        signals = inputs + count
        for i, j in itertools.product(range(len(matrix)), repeat=2):
            entry, size = Fraction(int(i == j and i >= signals)), Fraction(0)
            if i < signals and j < signals:
                for k in range(count):
                    t, low, high = (Fraction(float(array[k])) for array in (multipliers, lower, upper))
                    v_i, v_j = Fraction(float(rows[k, i])), Fraction(float(rows[k, j]))
                    e_i, e_j = int(i == inputs + k), int(j == inputs + k)
                    for x, y in ((e_i - low * v_i, e_j - high * v_j), (e_i - high * v_i, e_j - low * v_j)):
                        entry += t * x * y
                        size += t * abs(x * y)
            elif i < signals or j < signals:
                entry = Fraction(float(system.output[max(i, j) - signals, min(i, j)]))
            if i == j < inputs:
                assert matrix[i, i] <= entry + bound**2 + Fraction(error[i, i])
            else:
                assert abs(Fraction(matrix[i, j]) - entry) <= Fraction(error[i, j])
            added = bound**2 * (1 - Fraction(1, 10**9)) if i == j < inputs else 0
            assert error[i, j] >= (size * count + added) / 2**53


def test_larger_weights_wider_slopes_and_another_multiplier_are_noticed():
    matrices = random_network((3, 4, 2), 0)
    multipliers = dominant_multipliers(*matrices)
    bound = sdp.prove(feed_forward(*matrices), multipliers)
    assert sdp.prove(feed_forward(1.5 * matrices[0], matrices[1]), multipliers) == pytest.approx(1.5 * bound, rel=1e-9)
    assert sdp.prove(feed_forward(*matrices, slopes=(-0.5, 1.0)), multipliers) > bound * (1 + 1e-6)
    assert sdp.prove(feed_forward(*matrices, slopes=(0.0, 1.5)), multipliers) > bound * (1 + 1e-6)
    assert sdp.prove(feed_forward(matrices[0], 3 * matrices[1]), multipliers) == math.inf  # 2T - 9 W'W is not positive any more


def test_multipliers_that_prove_nothing_give_inf():
    assert sdp.prove(scalar_system(), np.zeros(1)) == math.inf
    assert sdp.prove(scalar_system(2.0, 3.0), np.array([4.49])) == math.inf  # below w2^2 / 2 no rho is enough
    assert math.isfinite(sdp.prove(scalar_system(2.0, 3.0), np.array([4.51])))


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        (np.ones(2), r"must have the shape \(1,\), one per nonlinearity, got \(2,\)"),
        (np.ones((1, 1)), r"must have the shape \(1,\)"),
        (np.ones(0), r"must have the shape \(1,\)"),
        (np.array([-1e-300]), "finite and not negative"),
        (np.array([math.nan]), "finite and not negative"),
        (np.array([math.inf]), "finite and not negative"),
    ],
)
def test_refusals_of_multipliers(multipliers, message):
    with pytest.raises(ValueError, match=message):
        sdp.prove(scalar_system(), multipliers)


# The published counterexample to coupled multipliers (LipSDP-Network) cannot be reproduced


def test_the_bound_of_coupled_multipliers_is_out_of_reach():
    """Exact constant 0.37947, "LipSDP-Network" says 0.14422: no diagonal multipliers may go below the truth."""
    system = feed_forward(np.array([[-0.3, -0.9], [0.0, -0.7]]), np.array([[-0.4, 0.4]]))
    truth = largest_over_slopes(system)
    assert truth == pytest.approx(0.37947, abs=1e-5)
    bounds = [sdp.prove(system, np.array([a, b])) for a in np.geomspace(1e-2, 10, 40) for b in np.geomspace(1e-2, 10, 40)]
    assert truth <= min(bounds) <= truth * 1.01


# The blocks and their own multipliers

BLOCKS = [(4, 4, (8,)), (4, 4, (8, 8)), (6, 3, (8, 5, 7)), (3, 6, (4, 4, 4, 4)), (1, 1, (8, 8)), (16, 10, (32, 32, 32))]
each_block = pytest.mark.parametrize("shape", BLOCKS, ids=str)
each_kind = pytest.mark.parametrize("kind", [lipnet.LDLTBlock, lipnet.GershgorinBlock], ids=lambda kind: kind.__name__)
each_constant = pytest.mark.parametrize("constant", [0.5, 1.0, 3.0])


def as_arrays(weights):
    """`[A, B, [C_1 ..], [lam_1 ..]]`."""
    skip, branch, inner, multipliers = weights
    return [skip.detach().numpy(), branch.detach().numpy(), [c.detach().numpy() for c in inner], [t.detach().numpy() for t in multipliers]]


def varied(block, seed, scale):
    """The block in float64, away from its start."""
    torch.manual_seed(seed)
    block = block.double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.startswith("log_"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            else:
                parameter.mul_(scale).add_(0.1 * scale * torch.randn_like(parameter))
    return block


def random_block(kind, shape, constant, seed, scale):
    torch.manual_seed(seed)
    return as_arrays(varied(kind(*shape, lipschitz=constant), seed + 100, scale).weights())


def inequality(skip, branch, inner, multipliers, constant):
    """`P - H'H` from its definition: `P_00 = L^2 I`, `P_ii = 2 Lam_i`, `P_{i,i-1} = -Lam_i C_i`, `H = [A 0 .. 0 B]`."""
    widths = [skip.shape[1], *(len(c) for c in inner)]
    starts = np.cumsum([0, *widths])
    blocks = [slice(a, b) for a, b in itertools.pairwise(starts)]
    p = np.zeros((starts[-1], starts[-1]))
    p[blocks[0], blocks[0]] = constant**2 * np.eye(widths[0])
    for i, (c, t) in enumerate(zip(inner, multipliers, strict=True), start=1):
        p[blocks[i], blocks[i]] = 2 * np.diag(t)
        p[blocks[i], blocks[i - 1]] = -t[:, None] * c
        p[blocks[i - 1], blocks[i]] = p[blocks[i], blocks[i - 1]].T
    h = np.zeros((len(skip), starts[-1]))
    h[:, blocks[0]] = skip
    h[:, blocks[-1]] += branch
    return p - h.T @ h


def smallest_relative_eigenvalue(matrix):
    """After scaling the diagonal to 1, which changes no sign."""
    root = np.sqrt(np.diagonal(matrix).clip(1e-300))
    return np.linalg.eigvalsh(matrix / root[:, None] / root)[0]


@each_block
@each_kind
@each_constant
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_multipliers_of_a_block_prove_its_constant(kind, shape, constant, scale):
    rng = np.random.default_rng(0)
    for seed in range(3):
        skip, branch, inner, multipliers = random_block(kind, shape, constant, seed, scale)
        assert all((t > 0).all() for t in multipliers)
        assert smallest_relative_eigenvalue(inequality(skip, branch, inner, multipliers, constant)) >= -1e-9
        for _ in range(20):  # every pattern of slopes, reachable or not
            jacobian = np.eye(skip.shape[1])
            for c in inner:
                jacobian = rng.integers(0, 2, len(c))[:, None] * (c @ jacobian) if rng.random() < 0.5 else rng.random(len(c))[:, None] * (c @ jacobian)
            assert np.linalg.norm(skip + branch @ jacobian, 2) <= constant * (1 + 1e-9)


@each_block
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_inequality_of_a_gershgorin_block_is_diagonally_dominant(shape, scale):
    """`M_ii q_i >= sum_j |M_ij| q_j` in the scaling q of the block, over the d by which A and C_1 were shrunk: what its formulas solve for."""
    for constant in (0.5, 3.0):
        block = varied(lipnet.GershgorinBlock(*shape, lipschitz=constant), 0, scale)
        arrays = as_arrays(block.weights())
        shrink = arrays[0][0] / block.free_skip.detach().numpy()[0]
        first, *others = (log.detach().exp().numpy() for log in block.log_scale)
        q = np.concatenate([first / shrink, *others])
        matrix = inequality(*arrays, constant)
        rows = np.abs(matrix) @ q
        assert (2 * np.diagonal(matrix) * q - rows >= -1e-9 * rows).all()


@each_block
@each_kind
def test_a_block_that_is_broken_violates_its_inequality(kind, shape):
    skip, branch, inner, multipliers = random_block(kind, shape, 1.0, 0, 1.0)
    slack = 1.02 if kind is lipnet.LDLTBlock else 3.0  # the closed form of Gershgorin leaves much room
    assert smallest_relative_eigenvalue(inequality(slack * skip, slack * branch, inner, multipliers, 1.0)) < -1e-6


@each_block
@each_kind
@each_constant
def test_prove_confirms_the_constant_of_a_block(kind, shape, constant):
    skip, branch, inner, multipliers = random_block(kind, shape, constant, 1, 1.0)
    system = sdp.residual_block(skip, branch, inner, (0.0, 1.0))
    bound = min(sdp.prove(system, np.concatenate(multipliers) * stretch) for stretch in (1, 1 + 1e-9, 1 + 1e-7))
    assert bound <= constant * (1 + 1e-6)
    if kind is lipnet.LDLTBlock:
        assert bound >= 0.5 * constant


@pytest.mark.parametrize("constant", [0.5, 1.0, 3.0])
def test_an_ldlt_block_with_orthonormal_rows_meets_its_constant(constant):
    """With `[At Bt]` orthonormal the inequality holds with equality: no smaller constant is proved by its multipliers."""
    torch.manual_seed(0)
    block = lipnet.LDLTBlock(6, 5, (8, 7), lipschitz=constant, orthonormalizer=lipnet.Cayley()).double()
    arguments = as_arrays(block.weights())
    assert abs(smallest_relative_eigenvalue(inequality(*arguments, constant))) < 1e-9
    assert smallest_relative_eigenvalue(inequality(*arguments, constant * (1 - 1e-4))) < -1e-7
