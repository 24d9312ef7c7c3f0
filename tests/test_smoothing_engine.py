"""The engine of smoothing: counts do not depend on how rows are packed, stopping is exact with rows in flight, and the whole method keeps its promises."""

import copy
import dataclasses
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import fx, nn

import certify
import lipnet
from certify.bound import Assumption
from certify.smoothing import (
    ClopperPearson,
    FixedN,
    Gaussian,
    GaussianLinf,
    GroupSequential,
    Hardmax,
    Procedure,
    SmoothedClassifier,
    Softmax,
    Sparsemax,
    Status,
    prepare,
)
from certify.smoothing import method as methods
from certify.smoothing.engine import Engine
from certify.smoothing.method import Smoothing
from certify.smoothing.noise import SELECTION, Grid, noisy_rows, row_table, to_grid
from certify.smoothing.noise.counts import UNIT, soft_scores

LOOKS = (60, 120, 240, 480, 1000)
SHORT = GroupSequential(looks=LOOKS, n0=50, alpha=0.01)


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def network(inputs=6, classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes)).eval()


def exact(x):
    """A network whose logits do not depend on the batch they are in, to the last bit (those of a matrix product do)."""
    x = x.flatten(1)
    return torch.stack([x[:, 0] - x[:, 1].abs(), 0.7 * x[:, 2], x[:, 3] * x[:, 4] + 0.2], dim=1)


def run(net, x, method, numbers=None, batch=None, slots=None, engine=Engine):
    """The outcome of every input, by its number."""
    method = dataclasses.replace(method, batch=batch or 256)
    shape = tuple(x.shape[1:])
    placed, apart = method.place(x.numpy())
    slots = slots or 8
    source = methods._Copies(method.copies, shape, slots, method.batch, torch.device("cpu"))
    numbers = numbers if numbers is not None else range(len(x))
    procedure = method.procedure(shape)
    found = engine(net, 3, procedure, source, method.batch, slots, method.vote_margin).run((i, placed[i], float(apart[i])) for i in numbers)
    return {done.index: (done.selection.to_json(), [tally.to_json() for tally in done.looks], done.outcome) for done in found}


@pytest.mark.parametrize("scores", [Hardmax(), Softmax(0.5), Sparsemax(0.5)], ids=repr)
@pytest.mark.parametrize("goal", [{}, {"target": 0.1}, {"tolerance": 0.05}], ids=str)
def test_counts_do_not_depend_on_the_packing(scores, goal):
    net, x = exact, torch.rand(9, 1, 2, 3)
    method = Smoothing(Gaussian(0.4), scores, SHORT, **goal)
    whole = run(net, x, method, batch=100)
    assert set(whole) == set(range(9))
    for batch, slots, numbers in ((37, 3, range(9)), (64, 1, range(9)), (1000, 20, [8, 3, 0]), (1, 2, [4]), (4000, 9, range(8, -1, -1))):
        part = run(net, x, method, numbers, batch, slots)
        assert set(part) == set(numbers)
        assert all(part[i] == whole[i] for i in numbers)


def test_counts_are_those_of_one_copy_after_the_other():
    """A loop that a reader can check: every copy alone, in order."""
    net, x = exact, torch.rand(2, 6)
    method = Smoothing(Gaussian(0.4), Softmax(0.5), SHORT, seed=7)
    whole = run(net, x, method, batch=33)
    pixels, _ = to_grid(x.numpy(), 255)
    for number in range(2):
        votes, sums, squares = np.zeros((len(LOOKS) + 1, 3), int), np.zeros((len(LOOKS) + 1, 3), int), np.zeros((len(LOOKS) + 1, 3), int)
        for segment, (first, last) in enumerate(itertools.pairwise((0, *LOOKS)), start=1):
            rows = row_table(0, number, np.arange(first, last))
            q = soft_scores(net(torch.from_numpy(noisy_rows(Grid(0.4, 7), pixels[[number]], rows))).numpy(), 0.5)
            sums[segment], squares[segment] = q.sum(0), (q * q).sum(0)
            votes[segment] = np.bincount(q.argmax(1), minlength=3)
        looks = whole[number][1]
        for j, look in enumerate(looks, start=1):
            assert look["sums"] == sums[: j + 1].sum(0).tolist()
            assert look["squares"] == (-(-squares[: j + 1].sum(0) // UNIT)).tolist()
        chosen = noisy_rows(Grid(0.4, 7), pixels[[number]], row_table(0, number, SELECTION + np.arange(50)))
        assert whole[number][0]["sums"] == soft_scores(net(torch.from_numpy(chosen)).numpy(), 0.5).sum(0).tolist()


class Late(Engine):
    """Its counts arrive some batches late, as from a GPU."""

    class Event:
        def __init__(self):
            self.asked = 0

        def query(self):
            self.asked += 1
            return self.asked > 2

        def synchronize(self):
            pass

    def _read(self):
        _, tables, jobs = super()._read()
        return Late.Event(), [table.clone() for table in tables], jobs


@pytest.mark.parametrize("goal", [{}, {"target": 0.1}, {"tolerance": 0.05}], ids=str)
@pytest.mark.parametrize(("batch", "slots"), [(20, 2), (100, 5), (900, 12)])
def test_rows_in_flight_do_not_change_the_counts(goal, batch, slots):
    net, x = exact, torch.rand(9, 6)
    method = Smoothing(Gaussian(0.4), schedule=SHORT, **goal)
    assert run(net, x, method, batch=batch, slots=slots, engine=Late) == run(net, x, method, batch=batch, slots=slots)


def test_every_batch_has_one_shape_and_padding_is_seen_by_no_count():
    sizes, x = [], torch.rand(3, 6)

    def forward(batch):
        sizes.append(len(batch))
        return torch.nan_to_num(batch[:, :3], nan=1e9)  # padding comes as NaN, and would win here

    run(forward, x, Smoothing(Gaussian(0.4), schedule=FixedN(10, 77, 0.01)), batch=50)
    assert set(sizes) == {50}


def test_a_network_that_mixes_the_rows_of_a_batch_certifies_nothing_where_there_is_padding():
    x = torch.rand(1, 6)
    found = run(lambda batch: batch[:, :3] - batch[:, :3].mean(0), x, Smoothing(Gaussian(0.4), schedule=FixedN(10, 20, 0.01)), batch=64)
    assert found[0][2].status is Status.ABSTAINED


def test_target_and_tolerance_save_copies():
    net, x = exact, torch.rand(20, 6)
    copies = {
        str(goal): sum(found[1][-1]["n"] for found in run(net, x, Smoothing(Gaussian(0.4), schedule=SHORT, **goal)).values())
        for goal in ({}, {"target": 0.5}, {"tolerance": 0.2})
    }
    assert copies["{'target': 0.5}"] < copies["{}"]
    assert copies["{'tolerance': 0.2}"] < copies["{}"]


class Linear(nn.Module):
    """Two classes apart by a plane: the smoothed classifier is itself, and the true radius the distance from the plane."""

    def __init__(self, normal, offset):
        super().__init__()
        self.normal, self.offset = nn.Parameter(normal / normal.norm()), offset

    def forward(self, x):
        side = x @ self.normal - self.offset
        return torch.stack([side, -side], dim=1)


@pytest.mark.parametrize("levels", [255, None])
def test_the_radius_of_a_half_space_is_not_above_the_truth_more_often_than_alpha(levels):
    """Off a grid of 255 levels the plane is met all the same: the copies are rounded, which moves the true radius by less than a step."""
    alpha, count, sigma = 0.1, 400, 0.3
    net = Linear(torch.randn(4), 0.8).eval()
    x = (torch.rand(count, 4) * 255).round() / 255
    truth = ((x @ net.normal) - net.offset).abs().detach().numpy()
    certificate = certify.robustness(net, x, Smoothing(Gaussian(sigma), schedule=FixedN(20, 300, alpha), levels=levels, seed=1))
    step = 0 if levels is None else math.sqrt(4) / 255
    false = int((certificate.radius > truth + step).sum())
    assert false <= stats.binom.isf(1e-6, count, alpha)
    assert (certificate.radius > 0.5 * truth).mean() > 0.5  # and not for nothing


def test_votes_for_no_class_count_against_all():
    class Half(nn.Module):
        """NaN in a fifth of the space."""

        def forward(self, x):
            logits = torch.stack([x[:, 0], -x[:, 0]], dim=1)
            return torch.where(x[:, 1:2] > 0.84, torch.nan, logits)

    x = torch.tensor([[3.0, 0.0]])
    with_nan = certify.robustness(Half().eval(), x, Smoothing(Gaussian(1.0), schedule=FixedN(50, 5000, 0.001), levels=None))
    assert with_nan.prediction[0] == 0
    assert with_nan.radius[0] < 0.84 + 0.1  # Phi^-1(0.8) = 0.84
    nothing = certify.robustness(nn.Sequential(nn.Linear(2, 2), nn.LogSoftmax(1)).eval().apply(_fill_nan), x, Smoothing(Gaussian(1.0), schedule=SHORT))
    assert nothing.abstained[0]
    assert nothing.radius[0] == 0


def _fill_nan(module):
    for parameter in module.parameters():
        nn.init.constant_(parameter, math.nan)


def test_a_vote_margin_counts_close_votes_against_every_class():
    net, x = network(), torch.rand(5, 6)
    without = certify.robustness(net, x, Smoothing(Gaussian(0.4), schedule=SHORT))
    within = certify.robustness(net, x, Smoothing(Gaussian(0.4), schedule=SHORT, vote_margin=0.05))
    assert (within.radius <= without.radius).all()
    assert (within.radius < without.radius).any()


def test_the_certificate_says_what_it_takes_for_granted():
    net, x = network(), torch.rand(2, 6)
    grid, floats = (certify.robustness(net, x, Smoothing(Gaussian(0.4), schedule=SHORT, levels=levels)) for levels in (255, None))
    assert grid.failure == floats.failure == 0.01
    assert Assumption.FLOAT_NOISE in floats.assumptions
    assert grid.assumptions == {Assumption.RANDOM_BITS, Assumption.EVAL_MODE, Assumption.ROW_BY_ROW}
    assert grid.seed == 0
    assert grid.norm == 2
    maximum = certify.robustness(net, x, Smoothing(GaussianLinf(0.4, 6), schedule=SHORT))
    assert maximum.norm == math.inf
    np.testing.assert_allclose(maximum.radius[grid.radius > 0.01], grid.radius[grid.radius > 0.01] / math.sqrt(6), rtol=0.05, atol=1e-3)


def test_what_is_off_the_grid_comes_off_the_radius():
    net = Linear(torch.tensor([1.0, 0.0]), -1.0).eval()
    on, off = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.5 / 10]])
    method = Smoothing(Gaussian(0.5), schedule=FixedN(20, 200, 0.01), levels=10)
    near, far = certify.robustness(net, on, method).radius[0], certify.robustness(net, off, method).radius[0]
    assert near - far == pytest.approx(0.05, abs=1e-6)


def test_a_target_is_asked_around_the_input_itself():
    """Half of the copies' radius is lost to the grid: the target is met by what is left, or not at all."""
    net = Linear(torch.tensor([1.0, 0.0]), -1.0).eval()
    x = torch.tensor([[0.0, 0.05 * i] for i in range(3)])
    radius = certify.robustness(net, x, Smoothing(Gaussian(0.5), schedule=SHORT, levels=10, target=0.8)).radius
    assert (radius > 0.8).all()


def test_batches_hold_about_as_many_numbers_whatever_the_inputs_are():
    rows = [Smoothing(Gaussian(0.5)).rows(shape) for shape in ((2,), (64,), (1, 28, 28), (3, 32, 32), (3, 224, 224), (3, 1024, 1024))]
    assert rows == [8192, 8192, 256, 64, 32, 32]
    assert Smoothing(Gaussian(0.5), batch=7).rows((64,)) == 7


def test_the_total_variation_of_the_grid_comes_off_p_a():
    exact = Procedure(SmoothedClassifier(Gaussian(0.5)), ClopperPearson(), FixedN(10, 1000, 0.01))
    apart = dataclasses.replace(exact, distance=1e-3)
    from certify.smoothing import Tally

    selection, look = Tally(10, np.array([10, 0])), Tally(1000, np.array([990, 10]))
    (low, high), (lower, higher) = exact.interval(0, selection, look), apart.interval(0, selection, look)
    assert lower <= low - 1e-3 < lower + 1e-12
    assert higher - 1e-12 < high + 1e-3 <= higher
    assert 0 < Smoothing(Gaussian(0.5), schedule=SHORT).procedure((3, 224, 224)).distance < 1e-11


def test_floating_point_can_certify_falsely_and_the_grid_does_not():
    """Voracek & Hein's kind of classifier: it sees from the last bits of a sum whether 1 was added to it."""

    class Bits(nn.Module):
        def forward(self, x):
            whole = (x[:, :1].double() * 2**24 == (x[:, :1].double() * 2**24).round()).float()
            return torch.cat([whole, 1 - whole], dim=1)

    x = torch.tensor([[1.0], [0.0]])
    schedule = FixedN(100, 10_000, 0.001)
    floats = certify.robustness(Bits().eval(), x, Smoothing(Gaussian(0.4), schedule=schedule, levels=None))
    assert floats.prediction.tolist() == [0, 1]
    assert floats.radius[0] > 1  # a false certificate: the other input is at distance 1
    grid = certify.robustness(Bits().eval(), x, Smoothing(Gaussian(0.4), schedule=schedule))
    assert not (grid.prediction[0] != grid.prediction[1] and grid.radius.max() > 1)


def test_networks_are_prepared_without_a_change_to_what_they_compute():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    net(torch.randn(32, 3, 4, 4))
    net.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    forward, classes, done = prepare.prepared(net, (3, 4, 4), 16)
    assert classes == 4
    assert any("folded" in step for step in done)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in forward.modules())
    x = torch.randn(7, 3, 4, 4)
    torch.testing.assert_close(forward(x), net(x), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    layer = nn.Sequential(nn.Flatten(), lipnet.SandwichLinear(12, 8), lipnet.UnitRowLinear(8, 3)).eval()
    forward, _, _ = prepare.prepared(layer, (3, 2, 2), 16)
    assert not any(type(module).__module__.startswith("lipnet") for module in forward.modules())
    torch.testing.assert_close(forward(x[:, :, :2, :2]), layer(x[:, :, :2, :2]), atol=1e-5, rtol=1e-5)


def test_a_forward_that_cannot_be_traced_is_certified_as_it_is():
    class Branching(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum(1), -x.sum(1)], dim=1) if len(x) > 0 and float(x.nan_to_num().abs().max()) >= 0 else x

    found = certify.robustness(Branching().eval(), torch.ones(2, 4), Smoothing(Gaussian(0.5), schedule=SHORT))
    assert (found.radius > 0.3).all()


@pytest.mark.parametrize(("levels", "scores"), [(255, Softmax(0.5)), (None, Softmax(0.5)), (255, Sparsemax(1.5))], ids=repr)
def test_a_proved_lipschitz_constant_gives_soft_scores_a_larger_radius_that_is_true(levels, scores):
    """Two classes apart by a plane, logits of slope 1: the true radius is the distance from the plane."""
    net, sigma, alpha = nn.Sequential(nn.Linear(3, 2, bias=False)).eval(), 0.15, 0.05
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.6, 0.0, 0.8], [-0.6, 0.0, -0.8]]) / math.sqrt(2))
    x = (torch.rand(200, 3) * 255).round() / 255
    truth = (x @ torch.tensor([0.6, 0.0, 0.8])).abs().numpy()
    bound = certify.lipschitz(net, input_shape=(3,))
    plain = Smoothing(Gaussian(sigma), scores, FixedN(50, 2000, alpha), levels=levels)
    aware = dataclasses.replace(plain, lipschitz=bound)
    without, within = (certify.robustness(net, x, method).radius for method in (plain, aware))
    assert np.median(within) > 1.2 * np.median(without)
    assert (within > truth + (math.sqrt(3) / 255 if levels else 0)).sum() <= stats.binom.isf(1e-6, 200, alpha)
    with pytest.raises(certify.StaleBound):
        certify.robustness(nn.Sequential(nn.Linear(3, 2)).eval(), x, aware)
    with pytest.raises(TypeError, match="Bound"):
        certify.robustness(net, x, dataclasses.replace(plain, lipschitz=certify.Estimate(0.1, "guess")))
    with pytest.raises(certify.CertifyError, match="jump"):
        certify.robustness(net, x, dataclasses.replace(aware, scores=Hardmax()))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_other_engines_run_the_same_function(engine):
    pytest.importorskip(engine)
    if engine == "onnxruntime":
        pytest.importorskip("onnx")
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)).eval()
    method = Smoothing(Gaussian(0.4), schedule=SHORT, engine=engine, batch=32)
    forward, _, done = method.prepared(net, (3, 4, 4))
    x = torch.randn(32, 3, 4, 4)
    torch.testing.assert_close(forward(x), net(x), atol=1e-5, rtol=1e-5)
    assert f"run by {engine}" in done
    x = torch.rand(4, 3, 4, 4)
    ours, other = (certify.robustness(net, x, dataclasses.replace(method, engine=name)).radius for name in ("torch", engine))
    np.testing.assert_allclose(ours, other, atol=0.02)


def test_an_engine_that_is_missing_or_unknown_is_named():
    refused("an engine is one of torch", lambda: certify.robustness(network(), torch.rand(1, 6), Smoothing(Gaussian(0.4), schedule=SHORT, engine="tensorrt")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        refused(r"lipnet\[engines\]", lambda: certify.robustness(network(), torch.rand(1, 6), Smoothing(Gaussian(0.4), schedule=SHORT, engine="openvino")))


def test_bfloat16_is_another_function_and_never_used_unless_it_is_asked_for():
    net, x = network(), torch.rand(4, 6)
    method = Smoothing(Gaussian(0.4), schedule=SHORT, batch=256)
    asked = dataclasses.replace(method, dtype="bfloat16")
    default, _, _ = method.prepared(net, (6,))
    assert {tensor.dtype for tensor in default.state_dict().values()} == {torch.float32}
    certificate = certify.robustness(net, x, asked)
    assert "dtype='bfloat16'" in certificate.method
    assert "in bfloat16" in certificate.method
    assert "bfloat16" not in certify.robustness(net, x, method).method
    forward, _, _ = asked.prepared(net, (6,))
    copies = torch.randn(256, 6)
    with torch.no_grad():
        assert torch.equal(forward(copies), copy.deepcopy(net).bfloat16()(copies.bfloat16()).float())
        assert not torch.equal(forward(copies), net(copies))
        assert torch.equal(default(copies), net(copies))
    small = nn.Sequential(nn.Linear(6, 3)).eval()
    with torch.no_grad():
        small[0].weight.fill_(1.0)
        small[0].bias.copy_(torch.tensor([1.0, 1 + 2**-12, 1 - 2**-12]))  # in bfloat16 the three are one, and the first wins
    zero = torch.zeros(1, 6)
    assert certify.robustness(small, zero, method).prediction[0] == 1
    assert certify.robustness(small, zero, asked).prediction[0] == 0
    refused("float64", lambda: dataclasses.replace(asked, scores=Softmax(1.0), lipschitz=certify.lipschitz(net, input_shape=(6,))))
    refused("openvino runs it in float32", lambda: dataclasses.replace(asked, engine="openvino"))
    refused("float32 or bfloat16", lambda: dataclasses.replace(method, dtype="float16"))


class Shared(nn.Module):
    """A convolution and a batch normalisation, both used twice: folding one into the other would do it twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            self.norm.bias.fill_(-0.4)
            self.norm.weight.fill_(1.7)

    def forward(self, x):
        x = self.second(self.norm(self.conv(x)))
        return self.norm(self.second(x)).mean((2, 3))


class Aliased(nn.Module):
    """Changes in place what it uses again."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        h = self.norm(self.conv(x))
        skip = h
        h -= 2
        return (h + skip).mean((2, 3))


class Added(nn.Module):
    """Adds in place to what it reads again behind a ReLU: that ReLU may not be in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        h = self.conv(x)
        skip = h
        h += 0.5
        return (torch.relu(h) - skip).mean((2, 3))


@pytest.mark.parametrize("make", [Shared, Aliased, Added])
def test_what_is_smoothed_is_the_network_that_was_given(make):
    net = make().eval()
    forward, _, _ = prepare.prepared(net, (1, 3, 3), 16)
    x = torch.randn(40, 1, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(forward(x), net(x), atol=1e-5, rtol=1e-5)


class Sums(nn.Module):
    """Sums and activations of every kind, some read twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu, self.last = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        h = self.relu(self.first(x))
        twice = self.second(h)
        kept = torch.relu(twice) + twice  # its ReLU may not be in place
        h = self.relu(self.first(kept) + h)
        y = self.relu(x)  # nor this one: the input is not ours
        return self.last(nn.functional.relu(self.second(h) + x + y))


@pytest.mark.parametrize("batch", [16, 4096])
def test_what_is_done_in_place_and_in_parts_has_the_same_bits(batch):
    net, x = Sums().eval(), torch.randn(batch, 6)
    forward, _, done = prepare.prepared(net, (6,), batch)
    assert "sums and ReLU in place" in done
    assert ("1024 rows at a time" in done) == (batch == 4096)
    assert sum(node.target is torch.relu_ for module in forward.modules() if isinstance(module, fx.GraphModule) for node in module.graph.nodes) == 3
    with torch.no_grad():
        kept = x.clone()
        assert torch.equal(forward(x), torch.cat([net(part) for part in x.split(1024)]))
        assert torch.equal(x, kept)


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x):
        side = x.flatten(1).mean(1)
        if self.kind == "batch mean":
            side = side.mean() + 0 * side
        if self.kind == "chance":
            side = side + torch.rand(())
        if self.kind == "count":
            self.calls += 1
            side = side + self.calls
        if self.kind == "place":
            side = side.cumsum(0)
        if self.kind == "batch norm":
            side = nn.functional.batch_norm(side[:, None], None, None, training=True)[:, 0]
        return torch.stack([side, -side], dim=1)


@pytest.mark.parametrize(
    ("kind", "match"), [("batch mean", "other inputs"), ("batch norm", "other inputs"), ("chance", "called again"), ("count", "called again")]
)
def test_what_is_no_function_of_one_input_is_refused(kind, match):
    refused(match, lambda: certify.robustness(Odd(kind).eval(), torch.rand(2, 6), Smoothing(Gaussian(0.5), schedule=SHORT)))


def test_hooks_and_batch_statistics_are_refused():
    for where in (0, slice(None)):
        net = network()
        (net if where else net[1]).register_forward_hook(lambda module, inputs, output: -output)
        refused("hooks", lambda net=net: certify.robustness(net, torch.rand(2, 6), Smoothing(Gaussian(0.5), schedule=SHORT)))
    net = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), network()).eval()
    refused("without running statistics", lambda: certify.robustness(net, torch.rand(2, 6), Smoothing(Gaussian(0.5), schedule=SHORT)))


def test_mean_scores_are_moved_by_the_grid_no_further_than_is_taken_from_them():
    """The score that rounding moves most is the distance to the grid: 0 at all copies, and of this mean under the noise itself."""
    for s in (0.01, 0.1, 0.2, 0.3, 0.5, 1.0, 40.0):
        y = np.arange(-12, 12, 1e-3) * s + 3e-4
        assert stats.norm.pdf(y / s) @ (y - np.round(y)) ** 2 * 1e-3 <= 1 / 12 + 1e-9
    rng, levels, temperature = np.random.default_rng(0), 16, 1.0
    for elements, least in ((1, 0.8), (4, 0.9), (400, 0.99)):
        net = nn.Sequential(nn.Linear(elements, 2)).eval()
        method = Smoothing(Gaussian(0.2), Softmax(temperature), SHORT, levels=levels, lipschitz=certify.lipschitz(net, input_shape=(elements,)))
        slope = method.scores.lipschitz(method.lipschitz).value
        y = 0.2 * levels * rng.standard_normal((4000, elements))
        lost = slope * np.linalg.norm(y - np.round(y), axis=1) / levels  # in [0, 1], and as Lipschitz as the scores are
        assert lost.max() < 1
        taken = method.procedure((elements,)).distance
        error = 6 * lost.std() / math.sqrt(4000)
        assert lost.mean() - error <= taken
        assert lost.mean() + error > least * taken


def test_logits_of_a_network_with_a_lipschitz_constant_are_those_of_exact_arithmetic():
    """In float32 the large bias eats the input, and the network looks constant: a radius beyond its boundary at 8.5."""
    net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[0].bias.fill_(2.0**27)
        net[1].weight.copy_(torch.eye(2))
        net[1].bias.fill_(-(2.0**27))
    bound = certify.lipschitz(net, input_shape=(1,))
    method = Smoothing(Gaussian(0.5), Softmax(16.0), FixedN(100, 10_000, 0.001), lipschitz=bound)
    certificate = certify.robustness(net, torch.tensor([[8.5]]), method)
    assert 4 < certificate.radius[0] <= 8.5
    assert Assumption.REAL_ARITHMETIC in certificate.assumptions
    assert "Lipschitz constant" in certificate.method


def test_float_noise_is_of_the_sigma_that_is_drawn_and_around_the_point_that_is_used():
    x = np.array([[2.0**30 + 60.0]])
    placed, apart = Smoothing(Gaussian(0.5), levels=None).place(x)
    assert apart[0] >= abs(float(placed[0, 0]) - x[0, 0]) > 0
    assert Smoothing(Gaussian(0.7), levels=None).procedure((1,)).classifier.noise.sigma == float(np.float32(0.7))


def refused(match, call):
    with pytest.raises((certify.CertifyError, TypeError), match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


class Own(Softmax):
    """Some map of one's own."""


def test_bad_questions_are_refused_in_one_sentence():
    net, x = network(), torch.rand(2, 6)
    for sigma in (0.0, -1.0, math.nan, math.inf):
        refused("sigma", lambda sigma=sigma: Smoothing(Gaussian(sigma)))
    for alpha in (0.0, 1.0, -0.1, math.nan):
        refused("alpha", lambda alpha=alpha: Smoothing(Gaussian(0.5), schedule=GroupSequential(alpha=alpha)))
    refused("training mode.*call net.eval", lambda: certify.robustness(network().train(), x, Smoothing(Gaussian(0.5), schedule=SHORT)))
    refused("dropout|training mode", lambda: certify.robustness(nn.Sequential(nn.Dropout().train(), network()), x, Smoothing(Gaussian(0.5), schedule=SHORT)))
    refused("does not take", lambda: certify.robustness(net, torch.rand(2, 7), Smoothing(Gaussian(0.5), schedule=SHORT)))
    refused("at least two classes", lambda: certify.robustness(nn.Linear(6, 1).eval(), x, Smoothing(Gaussian(0.5), schedule=SHORT)))
    refused("least that can at this alpha is 7", lambda: certify.robustness(net, x, Smoothing(Gaussian(0.5), schedule=FixedN(1, 4, 0.01))))
    refused("cannot certify a radius above 5", lambda: certify.robustness(net, x, Smoothing(Gaussian(0.5), schedule=SHORT, target=5.0)))
    refused("votes, softmax and sparsemax", lambda: certify.robustness(net, x, Smoothing(Gaussian(0.5), Own(), SHORT)))
    refused("for inputs of 5 entries", lambda: certify.robustness(net, x, Smoothing(GaussianLinf(0.5, 5), schedule=SHORT)))
    refused("levels", lambda: Smoothing(Gaussian(0.5), levels=-1))
    refused("seed", lambda: Smoothing(Gaussian(0.5), seed=-1))
    for batch in (0, -1, 2.5):
        refused("row", lambda batch=batch: Smoothing(Gaussian(0.5), batch=batch))
    refused("1048576 rows", lambda: certify.robustness(net, x, Smoothing(Gaussian(0.5), schedule=SHORT, batch=10**12)))
    refused("vote margin", lambda: Smoothing(Gaussian(0.5), vote_margin=math.nan))
    refused("temperature", lambda: Smoothing(Gaussian(0.5), Softmax(1e40)))
    refused("fewer than 2\\^23", lambda: Smoothing(Gaussian(0.5), Softmax(1.0), FixedN(100, 2**23, 0.001)))
    assert len(certify.robustness(net, x[:0], Smoothing(Gaussian(0.5), schedule=SHORT))) == 0


def test_the_method_prints_all_that_its_numbers_depend_on():
    assert repr(Smoothing(Gaussian(0.5), schedule=FixedN(10, 100, 0.01))) == (
        "Smoothing(noise=Gaussian(sigma=0.5), scores=Hardmax(), schedule=FixedN(n0=10, n=100, alpha=0.01), bound=None, target=None, tolerance=None, "
        "levels=255, vote_margin=0.0, batch=None, seed=0, engine='torch', shared=False, dtype='float32')"
    )
