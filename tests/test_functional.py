"""The maps that layers are made of: orthonormal rows, contractions, reflections and sorting, each against its own mathematics."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lipnet
from lipnet import functional

SHAPES = [(5, 9), (9, 5), (7, 7), (1, 1), (1, 6), (6, 1)]
few = settings(deadline=None, max_examples=25)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm(matrix):
    return torch.linalg.matrix_norm(matrix.double(), 2).item()


def off_orthonormal(matrix):
    """`max |Q Q' - I|` over the shorter side."""
    q = matrix.double() if matrix.shape[-2] <= matrix.shape[-1] else matrix.double().mT
    return (q @ q.mT - torch.eye(q.shape[-2], dtype=torch.float64)).abs().max().item()


def with_condition(rows, columns, condition, seed=0):
    """A matrix with singular values from 1 down to 1 / condition, evenly in their logarithm."""
    left, right = torch.linalg.qr(normal(rows, columns, seed=seed))[0], torch.linalg.qr(normal(columns, columns, seed=seed + 1))[0]
    return left * torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64) @ right.mT


# Cayley


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cayley_is_orthonormal(shape, dtype, tolerance):
    q = functional.cayley(normal(*shape, dtype=dtype))
    assert q.dtype == dtype
    assert q.shape == shape
    assert off_orthonormal(q) < tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cayley_is_the_paper_formula_with_two_solves(shape):
    free = normal(*shape)
    tall = free if shape[0] >= shape[1] else free.mT
    size = tall.shape[1]
    u, v, eye = tall[:size], tall[size:], torch.eye(size, dtype=torch.float64)
    z = u - u.mT + v.mT @ v
    exact = torch.cat([torch.linalg.solve(eye + z, eye - z), -2 * torch.linalg.solve(eye + z, v, left=False)])
    torch.testing.assert_close(functional.cayley(free), exact if shape[0] >= shape[1] else exact.mT, rtol=1e-10, atol=1e-12)


def test_cayley_of_known_matrices():
    # U = [[0, a], [-a, 0]]: Z = [[0, 2a], [-2a, 0]], (I - Z) / (I + Z) is the rotation by -2 atan(2a); with a = 1/2 a quarter turn.
    torch.testing.assert_close(functional.cayley(torch.tensor([[0.0, 0.5], [-0.5, 0.0]])), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    # U = 0, V = v: Z = v^2, so [(1 - v^2), -2 v] / (1 + v^2); with v = 3: (-0.8, -0.6).
    torch.testing.assert_close(functional.cayley(torch.tensor([[0.0], [3.0]])), torch.tensor([[-0.8], [-0.6]]))
    torch.testing.assert_close(functional.cayley(torch.zeros(2, 5)), torch.eye(2, 5))


def test_cayley_uses_the_skew_part_of_the_square_only():
    free, symmetric = normal(9, 5), normal(5, 5, seed=1)
    shifted = free.clone()
    shifted[:5] += symmetric + symmetric.mT
    torch.testing.assert_close(functional.cayley(shifted), functional.cayley(free))


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e2])
def test_cayley_at_every_scale(scale):
    free = normal(32, 48) * scale
    assert off_orthonormal(functional.cayley(free)) < 1e-9
    assert off_orthonormal(functional.cayley(free.float())) < (1e-5 if scale <= 1 else 5e-2)  # the docstring: float32 loses digits with the scale


def test_cayley_takes_batches():
    free = normal(3, 4, 6)
    torch.testing.assert_close(functional.cayley(free)[1], functional.cayley(free[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cayley_of_complex_matrices(shape):
    free = torch.complex(normal(*shape), normal(*shape, seed=1))
    size = min(shape)
    tall = free if shape[0] >= shape[1] else free.mH
    u, v, eye = tall[:size], tall[size:], torch.eye(size, dtype=free.dtype)
    z = u - u.mH + v.mH @ v
    exact = torch.cat([torch.linalg.solve(eye + z, eye - z), -2 * torch.linalg.solve(eye + z, v, left=False)])
    made = functional.cayley(free)
    torch.testing.assert_close(made, exact if shape[0] >= shape[1] else exact.mH, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(functional.cayley(torch.stack([free.conj(), free]))[1], made)


# Cholesky and AOL


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 2.0])
def test_cholesky_is_a_contraction_with_the_slack_of_its_formula(shape, ridge):
    free = normal(*shape)
    q = functional.cholesky_contraction(free, ridge)
    a = ridge * (free**2).sum() / shape[0]  # ridge times the mean squared row
    k = torch.linalg.cholesky(free @ free.mT + a * torch.eye(shape[0], dtype=torch.float64))
    inverse = torch.linalg.inv(k)
    torch.testing.assert_close(torch.eye(shape[0], dtype=torch.float64) - q @ q.mT, a * inverse @ inverse.mT, rtol=1e-9, atol=1e-11)
    assert norm(q) < 1
    assert norm(functional.cholesky_contraction(free.float(), ridge)) <= 1 + 1e-6


def test_cholesky_of_a_row_is_known():
    # One row g of norm 5, ridge 1/4: K^2 = 25 + 25/4, so |Q| = 5 / sqrt(31.25) = sqrt(0.8).
    assert norm(functional.cholesky_contraction(torch.tensor([[3.0, 4.0]]), 0.25)) == pytest.approx(math.sqrt(0.8), rel=1e-6)


def test_cholesky_tends_to_orthonormal_rows():
    q = functional.cholesky_contraction(normal(5, 9), 1e-9)
    assert off_orthonormal(q) < 1e-7


def test_cholesky_takes_its_ridge_by_name():
    assert torch.equal(functional.cholesky_contraction(normal(2, 3), ridge=0.5), functional.cholesky_contraction(normal(2, 3), 0.5))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_cholesky_does_not_depend_on_the_scale(scale):
    free = normal(5, 9)
    torch.testing.assert_close(functional.cholesky_contraction(scale * free), functional.cholesky_contraction(free), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(functional.cholesky_contraction((scale * free).float()), functional.cholesky_contraction(free.float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_aol_is_a_contraction(shape, scale):
    for seed in range(5):
        free = normal(*shape, seed=seed) * scale
        assert norm(functional.aol_contraction(free)) <= 1 + 1e-14
        assert norm(functional.aol_contraction(free.float())) <= 1 + 1e-6
        assert norm(functional.aol_contraction(free)) > 0.2  # not a constant 0


def test_aol_is_exact_where_rows_are_orthogonal():
    diagonal = torch.tensor([3.0, -0.5, 100.0])
    torch.testing.assert_close(functional.aol_contraction(torch.diag(diagonal)), torch.diag(diagonal.sign()))
    q = torch.linalg.qr(normal(9, 5))[0].mT
    torch.testing.assert_close(functional.aol_contraction(q), q, rtol=1e-12, atol=1e-12)


def test_aol_of_known_rows():
    # Rows (3, 4) and (4, 3): Gram [[25, 24], [24, 25]], sums 49; the Gram norm is 49 too (vector (1, 1)), so the contraction has norm exactly 1.
    w = torch.tensor([[3.0, 4.0], [4.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(functional.aol_contraction(w), w / 7)
    assert norm(functional.aol_contraction(w)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("map_", [functional.cholesky_contraction, functional.aol_contraction, functional.block_reflector])
def test_a_zero_matrix_stays_a_contraction(map_):
    for dtype in (torch.float32, torch.float64):
        made = map_(torch.zeros(4, 3, dtype=dtype))
        assert torch.isfinite(made).all()
        assert norm(made) <= 1


# Block reflectors


@pytest.mark.parametrize(("size", "rank"), [(6, 1), (6, 3), (6, 5), (6, 6), (1, 1), (32, 16)])
def test_block_reflector_is_symmetric_orthogonal_and_reflects_rank_directions(size, rank):
    for seed in range(3):
        v = normal(size, rank, seed=seed)
        w = functional.block_reflector(v)
        torch.testing.assert_close(w, w.mT, rtol=0, atol=1e-15)
        eigenvalues = torch.linalg.eigvalsh(w)
        assert (eigenvalues.abs() - 1).abs().max() < 1e-4  # the second ridge leaves 2e-7 cond(V)^2 at most
        assert w.trace().item() == pytest.approx(size - 2 * rank, abs=1e-3)  # rank eigenvalues -1, the rest 1
        assert norm(w) <= 1 + 1e-14
        torch.testing.assert_close(w @ v, -v, rtol=1e-4, atol=1e-4)


def test_block_reflector_makes_only_the_corner_that_is_asked_for():
    v = normal(7, 3)
    whole = functional.block_reflector(v)
    torch.testing.assert_close(functional.block_reflector(v, 2, 6), whole[:2, :6], rtol=0, atol=1e-15)
    torch.testing.assert_close(functional.block_reflector(v, rows=4), whole[:4], rtol=0, atol=1e-15)
    torch.testing.assert_close(functional.block_reflector(torch.stack([-v, v]), columns=4)[1], whole[:, :4], rtol=0, atol=1e-15)


def test_block_reflector_of_a_vector_is_the_householder_matrix():
    # v = (3, 4) / 5: I - 2 v v' = [[7, -24], [-24, -7]] / 25
    exact = torch.tensor([[7.0, -24.0], [-24.0, -7.0]], dtype=torch.float64) / 25
    torch.testing.assert_close(functional.block_reflector(torch.tensor([[30.0], [40.0]], dtype=torch.float64)), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_block_reflector_keeps_its_norm_in_float32_where_the_plain_solve_loses_it(seed):
    v = with_condition(64, 32, 1e4, seed).float()
    w = functional.block_reflector(v)
    singular_values = torch.linalg.svdvals(w.double())
    assert singular_values[0] <= 1 + 1e-5
    assert singular_values[-1] > 0.999
    plain = torch.eye(64) - 2 * v @ torch.linalg.solve(v.mT @ v, v.mT)
    assert norm(plain) > 1.001  # what the bound above would not survive


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_block_reflector_of_a_rank_deficient_matrix_stays_a_contraction(dtype, scale):
    v = normal(8, 1) @ normal(1, 4, seed=1) * scale
    v[:, 3] = 0
    w = functional.block_reflector(v.to(dtype))
    assert norm(w) <= 1 + 1e-5
    assert torch.linalg.eigvalsh(w.double())[0] < -0.99  # the one direction that there is, is reflected
    assert w.trace().item() == pytest.approx(8 - 2, abs=0.05)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.floats(-3, 3))
def test_orthonormal_columns_never_exceed_norm_one(rows, columns, seed, exponent):
    v = normal(max(rows, columns), min(rows, columns), seed=seed) * 10**exponent
    assert norm(functional.orthonormal_columns(v)) <= 1 + 1e-14
    assert norm(functional.orthonormal_columns(v.float())) <= 1 + 2e-6


# Precision and gradients

MATRIX_MAPS = [
    functional.cayley, functional.cholesky_contraction, functional.aol_contraction, functional.orthonormal_columns, functional.block_reflector,
]  # fmt: skip


@pytest.mark.parametrize("map_", MATRIX_MAPS, ids=lambda map_: map_.__name__)
def test_matrix_maps_stay_in_float32_under_autocast(map_):
    free = normal(48, 24, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (free.mT @ free).dtype == torch.bfloat16  # autocast is on
        made, from_half = map_(free), map_(free.bfloat16())
    assert made.dtype == from_half.dtype == torch.float32
    assert torch.equal(made, map_(free))
    assert norm(made) <= 1 + 1e-5
    assert norm(from_half) <= 1 + 1e-5
    if map_ is functional.cayley:
        assert off_orthonormal(made) < 1e-5
        assert off_orthonormal(from_half) < 1e-5


@pytest.mark.parametrize("map_", MATRIX_MAPS, ids=lambda map_: map_.__name__)
@pytest.mark.parametrize("shape", [(5, 3), (3, 3)], ids=str)
def test_gradients_are_those_of_finite_differences(map_, shape):
    assert torch.autograd.gradcheck(map_, (normal(*shape, seed=3).requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("map_", [functional.cayley, functional.cholesky_contraction, functional.aol_contraction], ids=lambda map_: map_.__name__)
def test_gradients_of_wide_matrices(map_):
    assert torch.autograd.gradcheck(map_, (normal(3, 5, seed=3).requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("map_", [functional.cayley, functional.orthonormal_columns, functional.block_reflector], ids=lambda map_: map_.__name__)
@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (2, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_of_every_kind(map_, shape, dtype):
    free = torch.complex(normal(*shape, seed=3), normal(*shape, seed=4)) if dtype.is_complex else normal(*shape, seed=3)
    free.requires_grad_()
    assert torch.autograd.gradcheck(map_, (free,), atol=1e-6, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(map_, (free,), atol=1e-5)


def test_cayley_of_wide_matrices_has_second_and_batched_derivatives():
    for free in (normal(2, 4, seed=3), torch.complex(normal(2, 5, seed=3), normal(2, 5, seed=4))):
        free.requires_grad_()
        assert torch.autograd.gradcheck(functional.cayley, (free,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(functional.cayley, (free,))
    free = normal(3, 2, 4)
    torch.testing.assert_close(torch.vmap(functional.cayley, in_dims=1)(free.movedim(0, 1)), functional.cayley(free))
    torch.testing.assert_close(torch.func.jacfwd(functional.cayley)(free[0]), torch.func.jacrev(functional.cayley)(free[0]))


def test_a_constant_first_factor_leaves_the_gradient_of_an_orthonormal_basis():
    """The gradient of CholeskyQR2 is that of a QR decomposition, also where the columns are nearly dependent."""
    weights = normal(12, 6, seed=5)
    for condition in (1, 1e2, 1e4):
        gradients = []
        for map_ in (functional.orthonormal_columns, lambda v: (lambda q, r: q * r.diagonal().sign())(*torch.linalg.qr(v))):
            v = with_condition(12, 6, condition).requires_grad_()
            (map_(v) * weights).sum().backward()
            gradients.append(v.grad)
        ours, exact = gradients
        # a direction with s^2 = mean / condition^2 is shortened by 1e-12 condition^2 by both ridges together
        assert (ours - exact).norm() <= (1e-6 + 1e-11 * condition**2) * exact.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's
def test_cayley_and_max_min_are_plain_operators_where_torch_records():
    layer, x = torch.nn.Sequential(lipnet.SandwichLinear(6, 4), lipnet.MaxMin()), normal(2, 6, dtype=torch.float32)
    for strict in (True, False):
        torch.testing.assert_close(torch.export.export(layer, (x,), strict=strict).module()(x), layer(x))
    traced = torch.jit.trace(functional.max_min, (x,))
    assert "PythonOp" not in str(traced.graph)
    assert torch.equal(traced(x), functional.max_min(x))


# Sorting


@pytest.mark.parametrize("size", range(1, 11))
def test_comparators_sort_by_the_zero_one_principle(size):
    """A network of comparators sorts everything if it sorts every sequence of zeros and ones (Knuth, TAOCP 3, theorem 5.3.4Z)."""
    for pair in functional.comparators(size):
        assert 0 <= pair[0] < pair[1] < size
    for bits in itertools.product((0, 1), repeat=size):
        values = list(bits)
        for i, j in functional.comparators(size):
            values[i], values[j] = max(values[i], values[j]), min(values[i], values[j])
        assert values == sorted(bits, reverse=True)


@pytest.mark.parametrize(("size", "count"), [(1, 0), (2, 1), (3, 3), (4, 5), (8, 19)])
def test_comparators_are_as_few_as_known(size, count):
    assert len(functional.comparators(size)) == count


def test_every_comparator_of_four_is_needed():
    """The 0-1 principle notices a network that is one comparator short."""
    network = functional.comparators(4)
    for missing in range(len(network)):
        failures = 0
        for bits in itertools.product((0, 1), repeat=4):
            values = list(bits)
            for i, j in network[:missing] + network[missing + 1 :]:
                values[i], values[j] = max(values[i], values[j]), min(values[i], values[j])
            failures += values != sorted(bits, reverse=True)
        assert failures


def by_torch_sort(x, size, dim):
    return x.unflatten(dim, (-1, size)).sort(dim=dim + 1, descending=True).values.flatten(dim, dim + 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("shape", [(5, 12), (2, 12, 3, 4), (3, 12, 7), (0, 12)], ids=str)
def test_group_sort_is_torch_sort(size, shape):
    x = normal(*shape)
    assert torch.equal(functional.group_sort(x, size), by_torch_sort(x, size, 1))


@pytest.mark.parametrize(("shape", "dim"), [((5, 3, 12), 2), ((12, 5), 0), ((2, 3, 12, 2), 2)], ids=str)
def test_group_sort_along_other_dimensions(shape, dim):
    x = normal(*shape)
    assert torch.equal(functional.group_sort(x, 4, dim), by_torch_sort(x, 4, dim))
    assert torch.equal(functional.max_min(x, dim), by_torch_sort(x, 2, dim))


@pytest.mark.parametrize(("shape", "dim"), [((5, 3, 12), -1), ((2, 12, 3), -2), ((2, 12, 2), -2), ((2, 12, 3, 4), -3)], ids=str)
def test_group_sort_along_dimensions_counted_from_the_end(shape, dim):
    x = normal(*shape)
    assert torch.equal(functional.group_sort(x, 4, dim), functional.group_sort(x, 4, len(shape) + dim))


def test_max_min_of_known_pairs():
    x = torch.tensor([[1.0, 2.0, 3.0, -4.0], [-1.0, -2.0, 0.0, 0.0]])
    assert functional.max_min(x).tolist() == [[2.0, 1.0, 3.0, -4.0], [-1.0, -2.0, 0.0, 0.0]]


@pytest.mark.parametrize("pairing", ["neighbours", "halves"])
@pytest.mark.parametrize(("shape", "dim"), [((5, 12), 1), ((2, 12, 3, 4), 1), ((12, 5), 0), ((0, 12), 1), ((5, 3, 12), -1), ((2, 12, 2), -2)], ids=str)
def test_max_min_sorts_its_pairs(pairing, shape, dim):
    x = normal(*shape)
    found, given = (z.movedim(dim, 0) for z in (functional.max_min(x, dim, pairing), x))
    first, second = (slice(0, None, 2), slice(1, None, 2)) if pairing == "neighbours" else (slice(0, 6), slice(6, None))
    assert torch.equal(found[first], torch.maximum(given[first], given[second]))
    assert torch.equal(found[second], torch.minimum(given[first], given[second]))
    traced = torch.fx.symbolic_trace(_Sorting(dim, pairing))
    assert torch.equal(traced(x), functional.max_min(x, dim, pairing))
    assert {node.target for node in traced.graph.nodes} >= {torch.maximum, torch.minimum}


class _Sorting(torch.nn.Module):
    def __init__(self, dim, pairing):
        super().__init__()
        self.dim, self.pairing = dim, pairing

    def forward(self, x):
        return functional.max_min(x, self.dim, self.pairing)


@pytest.mark.parametrize("pairing", ["neighbours", "halves"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 4), 1), ((2, 4, 3), -2), ((4, 2), 0)], ids=str)
def test_max_min_has_derivatives_of_every_kind(pairing, shape, dim):
    def sorted_(x):
        return functional.max_min(x, dim, pairing)

    x = normal(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(sorted_, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sorted_(x) ** 2, (x,), check_fwd_over_rev=True)
    x = x.detach()
    assert torch.equal(torch.func.jacrev(sorted_)(x), torch.func.jacfwd(sorted_)(x))
    batch = normal(*shape, 5)
    assert torch.equal(torch.vmap(sorted_, in_dims=-1)(batch), torch.stack([sorted_(batch[..., i]) for i in range(5)]))
    hessian = torch.func.hessian(lambda x: (sorted_(x) ** 3).sum())(x).reshape(x.numel(), -1)
    torch.testing.assert_close(hessian, torch.diag(6 * x.flatten()))  # the sum of the cubes, in any order


@pytest.mark.parametrize("pairing", ["neighbours", "halves"])
def test_the_gradient_of_max_min_at_ties_is_a_convex_combination(pairing):
    x = torch.ones(1, 2, requires_grad=True)
    (functional.max_min(x, pairing=pairing) * torch.tensor([[2.0, 5.0]])).sum().backward()
    assert x.grad.sum() == 7
    assert 2 <= x.grad.min() <= x.grad.max() <= 5


def test_max_min_keeps_the_memory_format_and_dtype():
    x = normal(2, 4, 3, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    for pairing in ("neighbours", "halves"):
        found = functional.max_min(x, pairing=pairing)
        assert found.dtype == torch.bfloat16
        assert found.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert torch.equal(gradient, torch.ones_like(x))


def test_max_min_refuses_other_pairings():
    with pytest.raises(ValueError, match="pairing must be 'neighbours' or 'halves', got 'random'"):
        functional.max_min(torch.zeros(2, 4), pairing="random")


def test_group_sort_refuses_channels_that_do_not_divide():
    with pytest.raises(RuntimeError, match=r"unflatten|divisible|invalid"):
        functional.group_sort(torch.zeros(2, 5), 2)


@few
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000), st.sampled_from([1.0, 2.0, math.inf]))
def test_group_sort_is_a_contraction_and_keeps_norms(size, groups, seed, p):
    x, y = normal(2, 1, size * groups, seed=seed)
    moved = torch.linalg.vector_norm(functional.group_sort(x, size) - functional.group_sort(y, size), p)
    assert moved <= torch.linalg.vector_norm(x - y, p) * (1 + 1e-14)
    assert torch.linalg.vector_norm(functional.group_sort(x, size), p).item() == pytest.approx(torch.linalg.vector_norm(x, p).item(), rel=1e-14)


# Householder


def direction(angle):
    return torch.stack([torch.sin(angle / 2), -torch.cos(angle / 2)], dim=1)


def paper_householder(a, b, t):
    """The case formula of Singla, Singla & Feizi 2021, one pair at a time."""
    if a * math.sin(t / 2) - b * math.cos(t / 2) <= 0:
        return a, b
    return a * math.cos(t) + b * math.sin(t), a * math.sin(t) - b * math.cos(t)


@pytest.mark.parametrize("seed", range(3))
def test_householder_is_the_case_formula(seed):
    x, angle = normal(50, 6, seed=seed), normal(3, seed=seed + 10) * 3
    found = functional.householder(x, direction(angle))
    sides = set()
    for row, made in zip(x.tolist(), found.tolist(), strict=True):
        for pair in range(3):
            expected = paper_householder(*row[2 * pair : 2 * pair + 2], angle[pair].item())
            assert made[2 * pair : 2 * pair + 2] == pytest.approx(expected, rel=1e-12, abs=1e-13)
            sides.add(expected == tuple(row[2 * pair : 2 * pair + 2]))
    assert sides == {True, False}  # both cases were met


@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 3, 4), (4, 6, 2)], ids=str)
def test_householder_at_a_right_angle_sorts_each_pair(shape):
    """With v = (1, -1) / sqrt 2 the larger of a pair comes last, with -v first."""
    x, unit = normal(*shape), direction(torch.full((3,), math.pi / 2, dtype=torch.float64))
    swapped = functional.max_min(x).unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
    torch.testing.assert_close(functional.householder(x, unit), swapped)
    torch.testing.assert_close(functional.householder(x, -unit), functional.max_min(x))


def test_a_fresh_householder_layer_gives_min_and_max():
    x = normal(5, 6, dtype=torch.float32)
    torch.testing.assert_close(lipnet.Householder(6)(x).unflatten(1, (-1, 2)).flip(2).flatten(1), lipnet.MaxMin()(x))


def test_householder_along_other_dimensions():
    x, unit = normal(2, 6, 3, 4), direction(normal(3, seed=1))
    for dim in (0, 2, 3, -1, -3):
        torch.testing.assert_close(functional.householder(x.movedim(1, dim), unit, dim), functional.householder(x, unit).movedim(1, dim))


@few
@given(st.integers(0, 1000), st.floats(-4, 4))
def test_householder_keeps_norms_and_contracts(seed, angle):
    x, y = normal(2, 7, 6, seed=seed)
    unit = direction(torch.full((3,), angle, dtype=torch.float64))
    fx, fy = functional.householder(x, unit), functional.householder(y, unit)
    torch.testing.assert_close(fx.norm(dim=1), x.norm(dim=1))
    assert ((fx - fy).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-13)).all()


@pytest.mark.parametrize("angle", [0.0, 0.7, math.pi / 2, 3.0, -2.0])
def test_householder_is_continuous_across_its_mirror(angle):
    unit = direction(torch.tensor([angle], dtype=torch.float64))
    along = torch.stack([-unit[:, 1], unit[:, 0]], dim=1)  # on the mirror: unit'along = 0
    for step in (1e-3, 1e-8):
        here, there = functional.householder(along - step * unit, unit), functional.householder(along + step * unit, unit)
        torch.testing.assert_close(here, along - step * unit)
        torch.testing.assert_close(there, along - step * unit)  # reflected
    torch.testing.assert_close(functional.householder(along, unit), along)


def test_a_direction_that_is_not_a_unit_vector_breaks_the_norm():
    x = torch.tensor([[3.0, 0.0]])
    assert functional.householder(x, torch.tensor([[1.5, 0.0]])).norm() > 3


# Unit rows


def test_unit_rows():
    rows = functional.unit_rows(torch.tensor([[3.0, 4.0], [0.0, -2.0], [1e-6, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]]))
    assert functional.unit_rows(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]


# Norms of convolutions


def test_conv_gram_iteration_is_the_largest_over_its_frequencies_with_the_gradient_of_that():
    kernel = normal(4, 3, 3, 5).requires_grad_()
    responses = torch.fft.rfft2(kernel, s=(12, 20)).permute(2, 3, 0, 1)
    between = math.cos(math.pi * 2 / 24) * math.cos(math.pi * 4 / 40)
    exact = lipnet.spectral.gram_iteration(responses, 5).max() / between
    found = lipnet.spectral.conv_gram_iteration(kernel)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(bound, kernel)[0] for bound in (found, exact)), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lipnet.spectral.conv_gram_iteration, (kernel,))
    assert torch.autograd.gradgradcheck(lipnet.spectral.conv_gram_iteration, (kernel,))


def test_gram_iteration_takes_lazily_conjugated_matrices():
    weight = torch.complex(normal(3, 5), normal(3, 5, seed=1))
    torch.testing.assert_close(lipnet.spectral.gram_iteration(weight.mH), lipnet.spectral.gram_iteration(weight))
