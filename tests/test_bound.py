"""Bound algebra, domains, and what an Estimate cannot do."""

import math

import numpy as np
import pytest

from certify import Assumption, Ball, Bound, Box, Estimate, Everywhere
from certify.text import down_text, up_text


def test_composition_rounds_up_chains_norms_and_unites_assumptions():
    inner = Bound(0.1, "inner", norm=(math.inf, 2), assumptions=frozenset({Assumption.EVAL_MODE}))
    outer = Bound(3.0, "outer", assumptions=frozenset({Assumption.FLOAT64_LINALG}))
    both = outer @ inner
    assert both.value > 0.3
    assert both.value == pytest.approx(0.3, rel=1e-15)
    assert both.norm == (math.inf, 2)
    assert both.assumptions == {Assumption.EVAL_MODE, Assumption.FLOAT64_LINALG}
    assert [part.method for part in both.parts] == ["inner", "outer"]


def test_chains_print_as_one_table():
    a, b, c = (Bound(2.0, name, name=name) for name in "abc")
    assert [part.name for part in (c @ (b @ a)).parts] == ["a", "b", "c"]
    assert [part.name for part in ((c @ b) @ a).parts] == ["a", "b", "c"]
    assert "8 from l2 to l2, everywhere" in str(c @ b @ a)


def test_norms_and_domains_must_fit():
    with pytest.raises(ValueError, match="inner bound ends in l2, the outer begins in linf"):
        Bound(1.0, "", norm=(math.inf, 2)) @ Bound(1.0, "")
    ball = Ball(np.zeros(2), 1.0)
    local = Bound(1.0, "local", domain=ball)
    with pytest.raises(ValueError, match="not known to contain"):
        local @ Bound(1.0, "")
    assert (local @ Bound(1.0, "", image=Ball(np.zeros(2), 0.5))).value == 1.0
    with pytest.raises(ValueError, match="different domains"):
        local + Bound(1.0, "", domain=Box(np.zeros(2), np.ones(2)))
    assert (local + Bound(1.0, "")).domain is ball


def test_sums_round_up():
    assert (Bound(0.1, "") + Bound(0.2, "")).value >= 0.30000000000000004
    with pytest.raises(ValueError, match="different norms"):
        Bound(1.0, "", norm=(1, 2)) + Bound(1.0, "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_bound_is_a_finite_number(value):
    with pytest.raises(ValueError, match="finite number"):
        Bound(value, "")


def test_an_estimate_composes_with_nothing():
    with pytest.raises(TypeError):
        Estimate(1.0, "power iteration") @ Bound(1.0, "")
    with pytest.raises((TypeError, AttributeError)):
        Bound(1.0, "") @ Estimate(1.0, "power iteration")


def test_domains_cover_what_they_should():
    ball, smaller = Ball(np.zeros(2), 1.0), Ball(np.zeros(2), 0.5)
    assert Everywhere().covers(ball)
    assert not ball.covers(Everywhere())
    assert ball.covers(smaller)
    assert not smaller.covers(ball)
    assert not ball.covers(Ball(np.zeros(2), 0.5, p=math.inf))
    box = Box(np.zeros(2), np.ones(2))
    assert box.covers(Box(np.full(2, 0.25), np.full(2, 0.5)))
    assert not box.covers(Box(np.full(2, 0.25), np.full(2, 1.5)))
    with pytest.raises(ValueError, match="low <= high"):
        Box(np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match="radius"):
        Ball(np.zeros(2), -1.0)


@pytest.mark.parametrize("value", [1.0, 1.00000001, 1 / 3, 123456.789, 1e-7, 9.99999999, 1e30, 0.1, 99999999.5, 0.99999999999])
def test_bounds_print_rounded_up(value):
    assert value <= float(up_text(value)) <= value * (1 + 1e-6)
    assert value * (1 - 2e-3) <= float(down_text(value)) <= value


def test_pair_constants_are_numbers():
    with pytest.raises(ValueError, match="pair constants"):
        Bound(1.0, "", pairs=np.array([[0.0, math.nan], [1.0, 0.0]]))
