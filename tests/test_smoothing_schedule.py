"""Schedules: what they spend, when they stop, and that claimed radii are true in all but alpha of the runs, for any rule of stopping."""

import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from certify.bound import Bound
from certify.errors import CertifyError
from certify.smoothing import (
    Anytime,
    ClopperPearson,
    EmpiricalBernstein,
    EProcess,
    FixedN,
    Gaussian,
    GroupSequential,
    Hardmax,
    Hoeffding,
    MaurerPontil,
    Procedure,
    Share,
    SmoothedClassifier,
    Softmax,
    Sparsemax,
    Status,
    Tally,
    noises,
    parse,
    read,
)
from certify.smoothing.bounds import votes
from certify.smoothing.schedule import doubling

HARD = SmoothedClassifier(Gaussian(1.0))
GROUPS = GroupSequential(looks=doubling(2000, first=50), n0=50, alpha=0.05)
SCHEDULES = [FixedN(n0=50, n=2000, alpha=0.05), GROUPS, Anytime(n0=50, n=2000, step=50, alpha=0.05)]


def allowed(runs, alpha):
    """How many failures a valid procedure exceeds once in a million test runs."""
    return stats.binom.isf(1e-6, runs, alpha)


def cumulative(rng, p, sizes, runs):
    """Tallies of votes at each size, of separate runs: (runs, classes)."""
    steps = [rng.multinomial(n, p, runs) for n in np.diff((0, *sizes))]
    return [Tally(n, sums) for n, sums in zip(sizes, np.cumsum(steps, axis=0), strict=True)]


def single(tally, run):
    pick = None if tally.squares is None else tally.squares[run]
    return Tally(tally.n, tally.sums[run], pick, unit=tally.unit)


# Coverage


def true_radius(p, label):
    return max((stats.norm.ppf(p[label]) - stats.norm.ppf(np.delete(p, label).max())) / 2, 0.0)


@pytest.mark.parametrize("p", [[0.5, 0.5], [0.55, 0.45], [0.9, 0.1], [0.999, 0.001], [0.36, 0.34, 0.30], [0.45, *[0.55 / 9] * 9]], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_best_radius_of_all_looks_is_true_in_all_but_alpha_of_the_runs(schedule, p):
    """The largest over all looks: no rule of stopping can do worse."""
    rng, runs, p = np.random.default_rng(1), 4000, np.array(p)
    procedure = Procedure(HARD, EProcess() if isinstance(schedule, Anytime) else ClopperPearson(), schedule)
    (selection,) = cumulative(rng, p, (schedule.n0,), runs)
    claimed = np.max([procedure.radius(j, selection, tally) for j, tally in enumerate(cumulative(rng, p, schedule.sizes, runs))], axis=0)
    true = np.array([true_radius(p, label) for label in range(len(p))])[selection.favourite]
    assert (claimed > true).sum() <= allowed(runs, schedule.alpha)
    if p[0] > 0.8:
        assert claimed.mean() > 0.9 * true.mean() - 0.1
        assert (1.2 * claimed > true).sum() > allowed(runs, schedule.alpha)  # the same test sees radii that are a fifth too large


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_peeking_is_rejected_by_the_same_test_and_by_the_library(p):
    """Clopper-Pearson at all of alpha at every look, and the best of them: what a loop does that stops when it likes what it sees."""
    rng, runs, alpha = np.random.default_rng(2), 4000, 0.05
    sizes = Anytime(n0=50, n=2000, step=50, alpha=alpha).sizes
    claimed = np.zeros(runs)
    for tally in cumulative(rng, [p, 1 - p], sizes, runs):
        claimed = np.maximum(claimed, HARD.radius(ClopperPearson().lower(votes(tally.sums[:, 0], tally.n), alpha)))
    assert (claimed > stats.norm.ppf(p)).sum() > allowed(runs, alpha)
    with pytest.raises(CertifyError, match="peeking"):
        Procedure(HARD, ClopperPearson(), Anytime())


def linear(scores, rng, x, runs, sizes):
    """Tallies of f(t) = scores(logits (t, -t)), two classes, at x with unit noise: by symmetry the true radius is x."""
    t = x + rng.standard_normal((runs, sizes[-1]))
    top = scores(np.stack([t, -t], axis=-1))[..., 0]
    if isinstance(scores, Hardmax):
        return [Tally(n, np.stack([(k := top[:, :n].sum(axis=1).astype(int)), n - k], axis=-1)) for n in sizes]
    unit = 2**20
    fixed = np.stack([np.floor(top * unit), np.floor((1 - top) * unit)], axis=-1).astype(np.int64)
    return [Tally(n, fixed[:, :n].sum(axis=1), (-(-(fixed[:, :n] ** 2) // unit)).sum(axis=1), unit=unit) for n in sizes]


@pytest.mark.parametrize("scores", [Hardmax(), Softmax(0.5), Sparsemax(2.0)], ids=repr)
@pytest.mark.parametrize("schedule", [FixedN(n0=30, n=300, alpha=0.1), GroupSequential(looks=(75, 150, 300), n0=30, alpha=0.1)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("x", [0.0, 0.7])
def test_linear_classifiers_with_every_bound_and_map(scores, schedule, x):
    rng, runs = np.random.default_rng(3), 2000
    (selection,), looks = linear(scores, rng, x, runs, (schedule.n0,)), linear(scores, rng, x, runs, schedule.sizes)
    logits = Bound(math.sqrt(2) * (1 + 1e-12), "", pairs=np.full((2, 2), 2 * (1 + 1e-12)))
    true = np.where(selection.favourite == 0, x, 0.0)
    lipschitz = [None] if isinstance(scores, Hardmax) else [None, logits]
    for bound in (ClopperPearson(), EProcess()) if isinstance(scores, Hardmax) else (EmpiricalBernstein(), MaurerPontil(), Hoeffding()):
        for proved in lipschitz:
            procedure = Procedure(SmoothedClassifier(Gaussian(1.0), scores, proved), bound, schedule)
            claimed = np.max([procedure.radius(j, selection, tally) for j, tally in enumerate(looks)], axis=0)
            assert (claimed > true).sum() <= allowed(runs, schedule.alpha)


def test_the_ramp_makes_the_lipschitz_aware_radius_tight():
    """Sparsemax of two linear logits is the worst case of the theorem: with many copies the claim comes near the true radius, Cohen's does not."""
    rng, x, scores = np.random.default_rng(4), 0.7, Sparsemax(4.0)
    logits = Bound(math.sqrt(2) * (1 + 1e-12), "", pairs=np.full((2, 2), 2 * (1 + 1e-12)))
    schedule = FixedN(n0=100, n=20_000, alpha=0.05)
    (selection,), looks = linear(scores, rng, x, 60, (100,)), linear(scores, rng, x, 60, schedule.sizes)
    aware, cohen = (Procedure(SmoothedClassifier(Gaussian(1.0), scores, proved), EmpiricalBernstein(), schedule) for proved in (logits, None))
    assert 0.95 * x < aware.radius(0, selection, looks[0]).mean() < x
    assert cohen.radius(0, selection, looks[0]).mean() < 0.6 * x
    assert (1.05 * aware.radius(0, selection, looks[0]) > x).mean() > 0.5


# What is spent


@pytest.mark.parametrize("alpha", [1e-12, 0.001, 0.05, 0.3, 0.5])
def test_alpha_is_never_overspent(alpha):
    for spending in ((), (1,) * 11, (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)):
        schedule = GroupSequential(spending=spending, alpha=alpha)
        assert sum(map(Fraction, schedule.alphas)) <= Fraction(alpha)
        assert sum(schedule.alphas) == pytest.approx(alpha, rel=1e-12)
        ledger = schedule.ledger(11)
        assert [line.n for line in ledger] == list(schedule.sizes)
        assert ledger[-1].total <= alpha
    assert GroupSequential(alpha=alpha).alphas[-1] == pytest.approx(alpha / 2)
    anytime = Anytime(n=3000, alpha=alpha)
    assert [line.total for line in anytime.ledger(3)] == [alpha] * 3


def test_the_default_is_the_dyadic_schedule():
    assert GroupSequential().sizes == (*(100 * 2**j for j in range(10)), 100_000)
    assert doubling(100) == (100,)
    assert doubling(400) == (100, 200, 400)
    assert GroupSequential(looks=(500,)).alphas == (0.001,)


def test_the_price_of_looking_is_small():
    fixed, groups = Procedure(HARD, schedule=FixedN()), Procedure(HARD)
    for k, loss in [(100_000, 0.0063), (99_900, 0.002), (95_000, 0.001)]:
        selection, tally = Tally(100, np.array([100, 0])), Tally(100_000, np.array([k, 100_000 - k]))
        one, many = fixed.radius(0, selection, tally), groups.radius(10, selection, tally)
        assert one * (1 - loss) < many < one


# When to stop


def run(procedure, p, seed):
    rng = np.random.default_rng(seed)
    (selection,) = cumulative(rng, p, (procedure.schedule.n0,), 1)
    looks = [single(tally, 0) for tally in cumulative(rng, p, procedure.schedule.sizes, 1)]
    outcome = None
    for used in range(1, len(looks) + 1):
        outcome = procedure.decide(single(selection, 0), looks[:used], outcome)
        if outcome.status is not Status.UNFINISHED:
            return outcome, looks[:used], single(selection, 0)
    raise AssertionError("the last look always ends it")


def test_a_target_is_reached_early_or_given_up_early():
    procedure = Procedure(HARD, target=0.5)
    for seed in range(20):
        outcome, looks, _ = run(procedure, [0.9, 0.06, 0.04], seed)
        assert outcome.status is Status.CERTIFIED
        assert outcome.radius > 0.5
        assert looks[-1].n <= 800
        assert outcome.ledger[-1].n == looks[-1].n
        assert outcome.ledger[-1].total < 0.001
        outcome, looks, _ = run(procedure, [0.6, 0.3, 0.1], seed)
        assert outcome.status in (Status.BELOW_TARGET, Status.ABSTAINED)
        assert looks[-1].n <= 6400


def test_a_tolerance_saves_copies_and_little_radius():
    rng, full, loose = np.random.default_rng(5), Procedure(HARD), Procedure(HARD, tolerance=0.02)
    copies, radii, whole = 0, 0.0, 0.0
    for seed, p in enumerate(rng.beta(8, 1.5, 60)):
        outcome, looks, selection = run(loose, [p, 0.7 * (1 - p), 0.3 * (1 - p)], seed)
        copies, radii = copies + looks[-1].n, radii + outcome.radius
        whole += run(full, [p, 0.7 * (1 - p), 0.3 * (1 - p)], seed)[0].radius
        assert selection.n == 100
    assert copies < 0.6 * 60 * 100_000
    assert radii > 0.96 * whole


def test_outcomes_of_all_looks_and_of_the_last_one_agree():
    procedure = Procedure(HARD, EProcess(), Anytime(n=100_000, step=1000))
    outcome, looks, selection = run(procedure, [0.8, 0.15, 0.05], 7)
    assert len(looks) == 100
    assert procedure.decide(selection, looks) == outcome
    assert outcome.radius > 0.9 * true_radius(np.array([0.8, 0.15, 0.05]), 0)


@pytest.mark.parametrize(("n", "least"), [(100, 66), (1000, 550), (10_000, 5156), (100_000, 50_490)])
def test_the_least_number_of_votes_that_certifies(n, least):
    procedure = Procedure(HARD, schedule=FixedN(n=n))
    found = [procedure.decide(Tally(100, np.array([60, 40])), [Tally(n, np.array([k, n - k]))]).prediction for k in (least - 1, least)]
    assert found == [-1, 0]


def test_an_input_without_a_clear_class_is_abstained_on():
    outcome, looks, _ = run(Procedure(HARD, schedule=GROUPS), [0.34, 0.33, 0.33], 1)
    assert (outcome.status, outcome.prediction, outcome.radius) == (Status.ABSTAINED, -1, 0.0)
    assert looks[-1].n == 2000


def test_undecided_copies_never_raise_a_radius():
    procedure = Procedure(HARD, schedule=FixedN(n0=10, n=1000))
    selection = Tally(10, np.array([9, 1, 0]))
    sure, unsure = (procedure.decide(selection, [Tally(1000, np.array([900, 60 + 40 - bad, 0]), undecided=np.array(bad))]).radius for bad in (0, 40))
    assert sure == unsure
    assert procedure.decide(Tally(10, np.array([0, 0, 0]), undecided=np.array(10)), [Tally(1000, np.zeros(3, int), undecided=np.array(1000))]).prediction == -1


# Before the start


@pytest.mark.parametrize("classes", [2, 3, 1000])
@pytest.mark.parametrize("bound", [ClopperPearson(), EmpiricalBernstein(), MaurerPontil(), Hoeffding(), EProcess()], ids=repr)
def test_too_few_copies_are_refused_with_the_least_number_that_would_do(bound, classes):
    def procedure(n):
        return Procedure(HARD, bound, FixedN(n0=10, n=n))

    with pytest.raises(CertifyError, match=r"5 copies cannot certify anything at alpha=0.001 .* the least that can at this alpha is \d+") as caught:
        procedure(5).start(classes)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    procedure(least).start(classes)
    with pytest.raises(CertifyError):
        procedure(least - 1).start(classes)
    if isinstance(bound, ClopperPearson):
        assert least == (10 if classes == 2 else 11)


def test_a_target_out_of_reach_is_refused_with_what_would_do():
    with pytest.raises(CertifyError, match=r"100000 copies cannot certify a radius above 4 .* \(radius 3.7.*\); the least that can at this alpha is"):
        Procedure(HARD, target=4.0).start(10)
    with pytest.raises(CertifyError, match="nor can any other number"):
        Procedure(SmoothedClassifier(noises.Uniform(0.5)), target=0.5).start(10)
    Procedure(HARD, target=3.5).start(10)
    Procedure(SmoothedClassifier(Gaussian(1.0), Softmax(1.0)), EmpiricalBernstein(), target=1.0).start(10)


def test_the_largest_radius_is_that_of_the_last_look():
    assert Procedure(HARD, schedule=FixedN()).best(2) == pytest.approx(3.811456563389952, abs=1e-9)


# Rows


@pytest.mark.parametrize("kind", ["votes", "soft"])
def test_rows_come_back_from_json_and_are_computed_again_from_the_counts(kind):
    if kind == "votes":
        procedure = Procedure(HARD, target=0.5)
        outcome, looks, selection = run(procedure, [0.85, 0.1, 0.05], 3)
    else:
        procedure = Procedure(SmoothedClassifier(Gaussian(1.0), Softmax(0.5)), EmpiricalBernstein(), GroupSequential((100, 1000), n0=50))
        made = linear(Softmax(0.5), np.random.default_rng(0), 0.9, 1, (50, 150, 1050))
        selection, looks = single(made[0], 0), [single(tally, 0) for tally in linear(Softmax(0.5), np.random.default_rng(1), 0.9, 1, (100, 1000))]
        outcome = procedure.decide(selection, looks)
    row = json.loads(json.dumps(procedure.row(selection, looks), allow_nan=False))
    assert procedure.check_row(row) == outcome
    assert outcome.radius > 0
    changes = {
        "radius": outcome.radius + 1e-6,
        "p_lower": outcome.p_lower + 1e-6,
        "prediction": 1 - outcome.prediction,
        "status": "abstained",
        "alpha": 1e-4,
        "ledger": [],
        "classifier": "0" * 64,
        "looks": [{**look, "n": look["n"] + 1} for look in row["looks"]],
    }
    for key, value in changes.items():
        with pytest.raises(CertifyError):
            procedure.check_row({**row, key: value})
    for key in ("looks", "radius", "selection"):
        with pytest.raises(CertifyError):
            procedure.check_row({name: value for name, value in row.items() if name != key})


@pytest.mark.parametrize(
    ("selection", "looks", "message"),
    [
        (Tally(9, np.array([9, 0])), [(50, [40, 10])], "the counts are of 9"),
        (Tally(10, np.array([9, 1])), [(51, [40, 11])], "looks at"),
        (Tally(10, np.array([9, 1])), [(100, [40, 60])], "looks at"),
        (Tally(10, np.array([9, 1])), [], "looks at"),
        (Tally(10, np.array([9, 1])), [(50, [40, 10]), (100, [39, 61])], "cumulative"),
        (Tally(10, np.array([9, 1])), [(50, [40, 10, 0])], "one shape"),
        (Tally(10, np.array([[9, 1]])), [(50, [[40, 10]])], "one shape"),
    ],
)
def test_counts_of_another_schedule_are_refused(selection, looks, message):
    procedure = Procedure(HARD, schedule=GroupSequential((50, 100), n0=10))
    with pytest.raises(CertifyError, match=message):
        procedure.decide(selection, [Tally(n, np.array(sums)) for n, sums in looks])


VALUES = [
    *SCHEDULES,
    ClopperPearson(),
    EmpiricalBernstein(cap=0.5),
    EProcess(),
    Share(0.1),
    Gaussian(0.25),
    noises.FourierBlur(noises.Rayleigh(2.0)),
    Softmax(0.3),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_from_what_they_print(value):
    assert parse(repr(value)) == value
    assert hash(parse(repr(value))) == hash(value)


def test_procedures_come_back_from_their_settings():
    bound = Bound(2.0, "proved")
    soft = Procedure(SmoothedClassifier(Gaussian(1.0), Softmax(0.5), bound), EmpiricalBernstein(), GROUPS, target=0.5)
    for procedure, proved in ((Procedure(HARD, EProcess(), Anytime(), Share(0.1), tolerance=0.1), None), (soft, Bound(2.0000001, "proved again"))):
        settings = json.loads(json.dumps(procedure.settings()))
        again = read(settings, proved)
        assert again.settings() == settings
        assert again.classifier.digest == procedure.classifier.digest
    with pytest.raises(CertifyError, match=r"constant 2\.0, what is proved is none"):
        read(soft.settings())
    with pytest.raises(CertifyError, match=r"constant 2\.0, what is proved is 2\.1"):
        read(soft.settings(), Bound(2.1, "of other weights"))
    with pytest.raises(CertifyError, match="lack 'noise'"):
        read({})


@pytest.mark.parametrize("text", ["Gaussian(", "print(1)", "Gaussian(sigma=open('x'))", "Gaussian(1).sigma", "__import__('os')", "Gaussian(sigma=-1.0)"])
def test_other_text_is_refused_and_not_run(text):
    with pytest.raises(CertifyError):
        parse(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedN(alpha=0.0), "alpha is a probability"),
        (lambda: FixedN(alpha=1.0), "alpha is a probability"),
        (lambda: FixedN(n0=0), "n0=0"),
        (lambda: FixedN(n=0), "looks are at growing"),
        (lambda: GroupSequential(looks=(100, 100)), "looks are at growing"),
        (lambda: GroupSequential(looks=()), "looks are at growing"),
        (lambda: GroupSequential(looks=(10.5, 20)), "growing whole numbers"),
        (lambda: FixedN(n=1e5), "growing whole numbers"),
        (lambda: GroupSequential(looks=(100, 200), spending=(1,)), "one whole share"),
        (lambda: GroupSequential(looks=(100, 200), spending=(1, 0)), "one whole share"),
        (lambda: GroupSequential(looks=(100, 200), spending=(0.5, 0.5)), "one whole share"),
        (lambda: Anytime(step=0), "one copy apart"),
        (lambda: Procedure(HARD, target=-1.0), "target is a radius"),
        (lambda: Procedure(HARD, tolerance=math.nan), "tolerance is a radius"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message):
    with pytest.raises(CertifyError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_importing_it_brings_no_torch():
    code = "import certify.smoothing, sys; sys.exit(str(s) if (s := {'torch', 'cvxpy', 'matplotlib'} & set(sys.modules)) else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
