"""Counts are exact whole numbers: votes, invalid copies, margins and soft scores, row by row as a plain loop would have it."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from certify.errors import CertifyError
from certify.smoothing import Sparsemax
from certify.smoothing.noise import count_rows, counts, native, row_table
from certify.smoothing.noise.dispatch import _count_on_the_host

SLOTS, CLASSES, N = 3, 6, 200


def case():
    logits = np.random.default_rng(0).normal(size=(N, CLASSES)).astype(np.float32) * 3
    logits[3, 1], logits[4, 2], logits[5, 3], logits[6] = np.nan, np.inf, -np.inf, 0
    logits[7, 2] = logits[7, 4] = 40
    logits[8] = [3e38, -3e38, 0, 0, 0, 0]
    logits[9] = [1, 1.25, 0, 0, 0, 0]
    logits[10] = [1, np.nextafter(np.float32(1.25), np.float32(2)), 0, 0, 0, 0]
    return logits, row_table(np.arange(N) % (SLOTS + 1) - 1, 0, 0)


def by_hand(logits, rows, margin):
    """With exact differences."""
    found = np.zeros((SLOTS, CLASSES + 1), dtype=np.int64)
    for line, slot in zip(logits.tolist(), rows[:, 0], strict=True):
        if slot < 0:
            continue
        if not all(map(math.isfinite, line)):
            found[slot, -1] += 1
            continue
        most = max(line)
        second = sorted(line)[-2]
        clear = margin == 0 or Fraction(most) - Fraction(second) > margin
        found[slot, line.index(most) if clear else CLASSES] += 1
    return found


@pytest.mark.parametrize("margin", [0.0, 0.25, 1e-3, 3.0])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("compiled", [True, False])
def test_votes(margin, kind, compiled, monkeypatch):
    logits, rows = case()
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    found = kind(np.zeros((SLOTS, CLASSES + 1), dtype=np.int64))
    for part in (slice(0, 50), slice(50, N)):  # added to what is there
        count_rows(kind(logits[part]), kind(rows[part]), found, margin=margin)
    assert np.array_equal(np.asarray(found), by_hand(logits, rows, margin))
    assert np.asarray(found).sum() == (rows[:, 0] >= 0).sum()


def test_a_margin_is_never_rounded_down():
    """0.1 is below its float32, 0.7 above, and 1 - 2^-25 rounds to 1."""
    for margin in (0.1, 0.7):
        gap = np.float32(margin)
        logits = np.array([[gap, 0], [np.nextafter(gap, np.float32(0)), 0], [np.nextafter(gap, np.float32(1)), 0]], dtype=np.float32)
        found = np.zeros((1, 3), dtype=np.int64)
        count_rows(logits, row_table(0, 0, np.arange(3)), found, margin=margin)
        assert found.tolist() == [[1, 0, 2]]
    found = np.zeros((1, 3), dtype=np.int64)
    count_rows(np.array([[1, 2.0**-25]], dtype=np.float32), row_table(0, 0, 0), found, margin=1.0)
    assert found.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_soft_scores_are_a_softmax_in_fixed_point(classes, temperature):
    logits = np.random.default_rng(1).normal(size=(500, classes)).astype(np.float32) * 4
    logits[0, 0], logits[1] = 3e38, 0
    q = counts.soft_scores(logits, temperature)
    scaled = logits.astype(np.float64) / np.float64(np.float32(temperature))
    exact = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    assert (q >= 0).all()
    assert (q.sum(axis=1) <= counts.UNIT).all()
    assert (q.sum(axis=1) > counts.UNIT - classes).all()
    assert np.abs(q / counts.UNIT - exact).max() < 2 / counts.UNIT
    assert (q[1] == counts.UNIT // classes).all()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0, 1e-20])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_sparse_scores_are_a_sparsemax_in_fixed_point(classes, temperature):
    logits = np.random.default_rng(1).normal(size=(500, classes)).astype(np.float32) * 4
    logits[0, 0], logits[1], logits[2, :2] = 3e38, 0, (3e38, -3e38)
    q = counts.sparse_scores(logits, temperature)
    exact = Sparsemax(float(np.float32(temperature)))(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(exact.sum(axis=1), 1, atol=1e-9)
    assert (q >= 0).all()
    assert (q.sum(axis=1) <= counts.UNIT).all()
    assert (q.sum(axis=1) > counts.UNIT - classes).all()
    assert np.abs(q / counts.UNIT - exact).max() < 2 / counts.UNIT
    assert (q[1] == counts.UNIT // classes).all()


def test_sparse_scores_of_a_million_classes_do_not_overflow():
    q = counts.sparse_scores(np.zeros((1, 1 << 20), dtype=np.float32))
    assert (q == 1).all()


def test_sums_of_sparse_scores_are_those_of_the_valid_copies():
    """NaN, infinities, close votes and padding are in no sum; a device that is not the CPU has them counted on the host."""
    logits, rows = case()
    for margin in (0.0, 0.25):
        votes = by_hand(logits, rows, margin)
        tables = [torch.zeros(SLOTS, CLASSES + 1, dtype=torch.int64), *(torch.zeros(SLOTS, CLASSES, dtype=torch.int64) for _ in "12")]
        found, sums, squares = tables
        count_rows(torch.from_numpy(logits), torch.from_numpy(rows), found, margin=margin, sums=sums, squares=squares, temperature=0.7, sparse=True)
        assert np.array_equal(found, votes)
        expected = np.zeros((2, SLOTS, CLASSES), dtype=np.int64)
        for line, slot in zip(logits, rows[:, 0], strict=True):
            alone = by_hand(line[None], row_table(0, 0, 0), margin)
            if slot >= 0 and not alone[0, -1]:
                q = counts.sparse_scores(line[None], 0.7)[0]
                expected[:, slot] += np.stack([q, q * q])
        assert np.array_equal(sums, expected[0])
        assert np.array_equal(squares, expected[1])
        again = [torch.zeros_like(table) for table in tables]
        _count_on_the_host(torch.from_numpy(logits), torch.from_numpy(rows), again, margin, 0.7)
        assert all(torch.equal(one, other) for one, other in zip(tables, again, strict=True))


def test_soft_sums_add_up_and_leave_out_what_is_invalid():
    logits, rows = case()
    votes, sums, squares = (np.zeros((SLOTS, n), dtype=np.int64) for n in (CLASSES + 1, CLASSES, CLASSES))
    count_rows(logits, rows, votes, margin=0.25, sums=sums, squares=squares, temperature=0.5)
    wanted = np.zeros((2, SLOTS, CLASSES), dtype=np.int64)
    for line, slot in zip(logits, rows[:, 0], strict=True):
        if slot >= 0 and np.isfinite(line).all() and np.diff(np.sort(line.astype(np.float64)))[-1] > 0.25:
            q = counts.soft_scores(line[None], 0.5)[0]
            wanted[:, slot] += q, q * q
    assert np.array_equal(wanted, [sums, squares])
    assert (sums.sum(axis=1) <= (votes.sum(axis=1) - votes[:, -1]) * counts.UNIT).all()


def test_logits_of_other_types_are_rounded_to_float32():
    found = np.zeros((1, 3), dtype=np.int64)
    count_rows(np.array([[1.0, 1.0 + 1e-12], [0.0, 1e39]]), row_table(0, 0, [0, 1]), found)
    assert found.tolist() == [[1, 0, 1]]
    half = torch.zeros(1, 3, dtype=torch.int64)
    count_rows(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True), torch.tensor([[0, 0, 0]]), half)
    assert half.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.zeros((1, 2), np.int64)}, "counted in int64 tables"),
        ({"sums": np.zeros((1, 2), np.int64)}, "both sums"),
        ({"margin": -1.0}, "vote margin"),
        ({"margin": float("nan")}, "vote margin"),
        ({"temperature": 0.0}, "temperature"),
        ({"counts": np.zeros((1, 3), np.int32)}, "int64"),
        ({"rows": row_table(1, 0, 0)}, "slot from -1 to 0"),
        ({"rows": row_table(0, 0, [0, 1])}, "as many as logits"),
    ],
)
def test_refusals_are_one_sentence(change, message):
    arguments = {"logits": np.zeros((1, 2)), "rows": row_table(0, 0, 0), "counts": np.zeros((1, 3), np.int64), **change}
    with pytest.raises(CertifyError, match=message) as refused:
        count_rows(**arguments)
    assert "\n" not in str(refused.value)
