"""Networks that torch.fx cannot trace: the graph that comes through torch.export computes the same, and has the same bounds as the one of torch.fx."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import certify
from certify.exported import raised
from certify.graph import Graph
from certify.tracing import traced
from lipnet.testing import largest_slope


class Everything(nn.Module):
    """One of each: what torch.fx can trace where `branch` is False, and what it cannot where it is True."""

    def __init__(self, branch):
        super().__init__()
        torch.manual_seed(0)
        self.branch = branch
        self.first, self.norm, self.strided = nn.Conv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.slopes, self.swish, self.up, self.pool = nn.PReLU(4), nn.Hardswish(), nn.ConvTranspose2d(4, 4, 2, 2), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.drop, self.last, self.layer = nn.Dropout(), nn.Linear(64, 5), nn.LayerNorm(5, eps=0.1)
        self.register_buffer("factors", torch.randn(4, 1, 1))
        for _ in range(2):
            self.norm(torch.randn(8, 4, 3, 3))

    def forward(self, x):
        if self.branch and x.shape[2] > 5 and int(x.shape[1]) == 2:  # torch.fx cannot
            x = x + 0.0
        y = functional.relu6(self.norm(self.first(x))) * self.factors
        z = self.slopes(self.strided(y))
        z = torch.cat([z, self.swish(z)], 1)[:, ::2]
        a, b = z.chunk(2, 1)
        z = torch.stack([b, a], 1).flatten(1, 2) + 0.5 * z
        z = functional.pad(self.pool(self.up(z)), (1, 0, 0, 1), mode="reflect")
        z = functional.adaptive_avg_pool2d(torch.clamp(z, min=0), 4)
        pooled = z.mean((2, 3)).sum(1, keepdim=True) / 3
        return self.layer(self.last(self.drop(z.view(z.size(0), -1)))) - pooled


def test_both_ways_give_one_bound_and_the_outputs_of_the_network():
    net, branching = Everything(False).eval(), Everything(True).eval()
    bounds = [certify.lipschitz(one, input_shape=(2, 8, 8)) for one in (net, branching)]
    with pytest.raises(Exception, match=r"trace|symbolic|control flow|Proxy"):
        torch.fx.symbolic_trace(branching)
    assert bounds[1].value == pytest.approx(bounds[0].value, rel=1e-12)
    assert largest_slope(net, (2, 8, 8), points=6) <= bounds[0].value
    graph = Graph.of(branching, (2, 8, 8))
    assert isinstance(graph.net, torch.fx.GraphModule)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 2, 8, 8)
        assert torch.equal(graph.frozen(x), branching(x))
        assert torch.allclose(graph.double(x.double()), branching.double()(x.double()), rtol=1e-12)
        branching.float()
    assert "strided" in dict(graph.net.named_modules())


class Branching(nn.Module):
    """A forward that torch.fx cannot trace."""

    def __init__(self, forward):
        super().__init__()
        self.run, self.inner = forward, nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.run(self, x) if len(x.shape) == 2 else x


def refused(forward, change=lambda net: None):
    torch.manual_seed(0)
    net = Branching(forward).eval()
    change(net)
    with pytest.raises((certify.Unsupported, ValueError)) as refusal:
        certify.lipschitz(net, input_shape=(4,))
    return refusal.value


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, x: x if x.sum() > 0 else -x, "branches on values"),
        (lambda self, x: x * float(x.abs().max()), "branches on values"),
        (lambda self, x: 100 * x if x.shape[0] == 1 else x, "other outputs than its forward"),
        (lambda self, x: x + torch.randn(4), "number of inputs in a batch, or with random numbers|other outputs"),
        (lambda self, x: x * len(x), "number of inputs in a batch"),
        (lambda self, x: x + x.mean(0, keepdim=True), "mixes the inputs"),
        (lambda self, x: torch.cat([x, x]), "puts inputs of a batch|mixes"),
        (lambda self, x: (x, x), "one tensor"),
        (lambda self, x: self.inner.weight.sum() * torch.ones(len(x), 4), "depends on its input"),
        (lambda self, x: x + self.seen.add_(1.0), "changes its buffers"),
        (lambda self, x: x * torch.sigmoid(x), "gate"),
        (lambda self, x: self.inner(x.to(torch.float64).to(torch.float32)), "_to_copy|to"),
        (lambda self, x: torch.sort(x, dim=1)[0], "sort"),
        (lambda self, x: functional.dropout(x), "at random"),
    ],
    ids=range(14),
)
def test_what_cannot_be_seen_through_is_refused(forward, match):
    assert re.search(match, str(refused(forward)))


def test_the_larger_of_two_signals_is_known_here_too():
    net = Branching(lambda self, x: torch.minimum(torch.maximum(x, -2 * x), self.inner.bias)).eval()
    assert certify.lipschitz(net, input_shape=(4,)).value == pytest.approx(5**0.5, rel=1e-9)


def test_operators_of_others_are_not_taken_for_those_of_torch_with_their_name():
    """This one is torch's relu on the inputs that are tried, and has the slope 1000 elsewhere."""

    @torch.library.custom_op("lipnet_tests::relu", mutates_args=())
    def relu(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x < 1e8, x.relu(), 1000 * x)

    @relu.register_fake
    def _(x):
        return torch.empty_like(x)

    class Own(nn.Module):
        def forward(self, x):
            return torch.ops.lipnet_tests.relu(x) if x.shape[1] == 4 else x

    with pytest.raises(certify.Unsupported, match=r"lipnet_tests\.relu"):
        certify.lipschitz(Own().eval(), input_shape=(4,))


def test_averaged_copies_have_the_bound_of_what_they_hold():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    averaged = torch.optim.swa_utils.AveragedModel(net).eval()
    assert certify.lipschitz(averaged, input_shape=(4,)).value == certify.lipschitz(net, input_shape=(4,)).value


def test_a_forward_that_fails_fails_in_one_sentence(caplog):
    class Wrong(nn.Module):
        def forward(self, x):
            return x + torch.zeros(5, 3) if x.shape[1] == 4 else x

    with pytest.raises(certify.Unsupported, match=r"nor exported by torch\.export"):
        certify.lipschitz(Wrong().eval(), input_shape=(4,))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_operator_without_a_rule_is_named_at_once():
    problems = refused(lambda self, x: torch.cumsum(self.inner(x), 1).sin() + functional.softplus(x)).problems
    assert [problem.what for problem in problems] == ["aten.cumsum.default", "aten.sin.default", "aten.softplus.default"]
    assert "cumsum" in problems[0].where
    assert "jump" in problems[2].why


def test_hooks_training_mode_and_forwards_of_an_instance_are_refused_before_anything_is_exported():
    changes = {
        "hooks": lambda net: net.inner.register_forward_hook(lambda *_: None),
        "training mode": lambda net: net.inner.train(),
        "of its own": lambda net: setattr(net.inner, "forward", lambda x: 2 * x),
    }
    for match, change in changes.items():
        assert match in str(refused(lambda self, x: self.inner(x), change))


def test_weights_that_are_computed_are_taken_as_the_forward_computes_them():
    net = Branching(lambda self, x: functional.linear(x, self.inner.weight / self.inner.weight.norm(), self.inner.bias)).eval()
    exact = torch.linalg.matrix_norm((net.inner.weight / net.inner.weight.norm()).double(), 2).item()
    assert certify.lipschitz(net, input_shape=(4,)).value == pytest.approx(exact, rel=1e-6)
    with torch.no_grad():
        net.inner.weight.copy_(torch.diag(torch.tensor([3.0, 0.0, 0.0, 0.0])))
    assert certify.lipschitz(net, input_shape=(4,)).value == pytest.approx(1.0, rel=1e-6)


def test_the_digest_covers_the_numbers_of_an_exported_network():
    net = Branching(lambda self, x: self.inner(x * self.seen) / 3).eval()
    digests = {Graph.of(net, (4,)).digest}
    for tensor in net.state_dict().values():
        tensor.view(-1)[-1] += 1e-2
        digests.add(Graph.of(net, (4,)).digest)
    net.run = lambda self, x: self.inner(x * self.seen) / 4
    digests.add(Graph.of(net, (4,)).digest)
    assert len(digests) == 5


def test_a_rule_of_the_user_wins_where_the_forward_can_be_traced():
    class Mine(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    certify.register(Mine)(lambda module, shape: certify.Bound(7.0, "mine"))
    assert certify.lipschitz(nn.Sequential(nn.Flatten(), Mine()).eval(), input_shape=(4,)).value == 7.0


def test_networks_without_branches_are_not_exported(monkeypatch):
    monkeypatch.setattr("certify.tracing.raised", lambda *_: pytest.fail("was exported"))
    certify.lipschitz(Everything(False).eval(), input_shape=(2, 8, 8))


def test_in_place_operations_are_made_functions_by_the_export():
    class InPlace(nn.Module):
        def forward(self, x):
            h = torch.relu(x)
            g = h
            h += x
            return g + h

    net = InPlace().eval()
    parent, _, problems = raised(net, (4,), "")
    assert not problems
    x = torch.randn(3, 4)
    assert torch.equal(parent(x), net(x))
    assert traced(net, (4,))[0] is net


@pytest.mark.parametrize("limit", [7, 1000])
def test_a_branch_on_the_length_of_the_batch_is_refused(limit):
    """Batches of 3 and 5 take one side of it, and the constant was that of the side which large batches do not take."""

    class Branching(nn.Module):
        def forward(self, x):
            return 100 * x if len(x) == limit else x

    class Counting(nn.Module):
        def forward(self, x):
            return (x if x.shape[1] == 4 else -x) * (1 + x.shape[0] // limit)

    for net in (Branching(), Counting()):
        with pytest.raises(certify.Unsupported, match="number of inputs in a batch"):
            certify.lipschitz(net.eval(), input_shape=(4,))
