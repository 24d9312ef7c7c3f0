"""auto_LiRPA as a second opinion: it agrees with our bounds, and what its Jacobians get wrong is seen before it is returned."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify.bound import Assumption
from certify.local import _lirpa
from certify.local.program import Program


@pytest.fixture(autouse=True)
def _depth():
    """pytest.importorskip imports auto_LiRPA too, which lets Python recurse a million times, and so out of its stack."""
    depth = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(depth)


def box(shape, radius, seed=0):
    center = np.random.default_rng(seed).standard_normal(shape)
    return certify.Box(center - radius, center + radius)


def both(net, shape, domain, norm=None):
    made = (certify.Local(norm, how="crown", alpha_steps=0, backend=backend) for backend in ("own", "auto_lirpa"))
    return tuple(certify.lipschitz(net.double().eval(), method, input_shape=shape, domain=domain) for method in made)


class Skip(nn.Module):
    """A skip connection from the input itself, which auto_LiRPA's Jacobians leave out where they see one."""

    def __init__(self):
        super().__init__()
        self.inside, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(x + torch.relu(self.inside(x)))


def dense():
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


NETS = {
    "dense": (dense, (5,)),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), (1, 5, 5)),
    "MaxMin": (lambda: nn.Sequential(nn.Linear(5, 8), lipnet.MaxMin(), nn.Linear(8, 2)), (5,)),
    "skip": (Skip, (5,)),
    "normalised": (lambda: nn.Sequential(lipnet.Normalize([0.4], [0.2]), nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 2)), (1, 3, 3)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("radius", [0.02, 0.3])
def test_it_agrees_with_ours(name, radius):
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    torch.manual_seed(0)
    make, shape = NETS[name]
    ours, theirs = both(make(), shape, box(shape, radius))
    assert theirs.value == pytest.approx(ours.value, rel=1e-5)
    assert theirs.pairs == pytest.approx(ours.pairs, rel=1e-5)
    assert Assumption.FOREIGN_ROUNDING in theirs.assumptions - ours.assumptions
    assert theirs.norm == ours.norm == (math.inf, math.inf)


def test_a_network_without_gates_has_the_norm_of_its_matrix():
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    net = nn.Linear(4, 2).double()
    ours, theirs = both(nn.Sequential(net), (4,), box((4,), 0.1))
    assert theirs.value == pytest.approx(float(net.weight.detach().abs().sum(1).max()), rel=1e-7)
    assert ours.value <= theirs.value


def test_other_norms_are_above_every_gradient_seen():
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.3), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    domain = box((4,), 0.2)
    x = torch.from_numpy(domain.low + (domain.high - domain.low) * np.random.default_rng(1).random((200, 4)))
    seen = torch.stack([torch.autograd.functional.jacobian(net, row) for row in x])
    for norm, found in ((2, torch.linalg.matrix_norm(seen, 2)), (1, torch.linalg.vector_norm(seen, dim=1).amax(1))):
        _, theirs = both(net, (4,), domain, norm)
        assert float(found.max()) <= theirs.value <= 3 * float(found.max())


def test_every_class_has_bounds_of_its_own():
    """With the class as a second input auto_LiRPA returns the bounds of the first class for all of them."""
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for k in range(3):
            net[2].weight[k] *= 10.0**k
    domain = box((3,), 0.2)
    program = Program.of(net, (3,))
    found = _lirpa.bound_jacobian(program, net, domain, torch.eye(3, dtype=torch.float64))
    seen = torch.autograd.functional.jacobian(net, torch.from_numpy(domain.low + domain.high) / 2)
    assert (found.low <= seen).all()
    assert (seen <= found.high).all()
    assert found.sums[1] > 2 * found.sums[0]
    assert found.sums[2] > 2 * found.sums[1]


def test_a_dropped_skip_connection_is_seen():
    """auto_LiRPA itself, on the network as it stands: its Jacobian is that of the branch alone."""
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    torch.manual_seed(0)
    net = Skip().double()
    row = nn.Sequential(net, nn.Linear(2, 1, bias=False, dtype=torch.float64))
    row[1].weight.data = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    center = torch.zeros(1, 5, dtype=torch.float64)
    reach = 0.1 * torch.ones(5, dtype=torch.float64)
    region = _lirpa.Region.of(certify.Box(-reach.numpy(), reach.numpy()), 5)
    seen = torch.autograd.functional.jacobian(row, center).reshape(1, 5)
    with pytest.raises(certify.CertifyError, match="a gradient by autograd is not what it computes"):
        _lirpa._checked(row, region, center, seen)


@pytest.mark.parametrize(("spoil", "match"), [(lambda j, low, high, s: (j, low + 0.6 * (high - low), high, s), "outside"),
                                              (lambda j, low, high, s: (j, low, high, 0.7 * s), "outside"),
                                              (lambda j, low, high, s: (1.01 * j, low, high, s), "not what it computes")])  # fmt: skip
def test_a_tampered_result_is_seen(monkeypatch, spoil, match):
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    torch.manual_seed(0)
    true = _lirpa.propagate
    monkeypatch.setattr(_lirpa, "propagate", lambda *given: spoil(*true(*given)))
    with pytest.raises(certify.CertifyError, match=match):
        both(dense(), (5,), box((5,), 0.02))


def test_it_leaves_the_process_as_it_was():
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    program, before, state = Program.of(net, (2,)), torch.get_default_dtype(), torch.get_rng_state()
    _lirpa.bound_jacobian(program, net, box((2,), 0.1), torch.eye(2, dtype=torch.float64))
    assert torch.get_default_dtype() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals(monkeypatch):
    net = dense().double().eval()
    ball = certify.Ball(np.zeros(5), 0.1)
    with pytest.raises(certify.CertifyError, match='is for a Box, or a Ball in l-infinity; take backend="own"'):
        certify.lipschitz(net, certify.Local(backend="auto_lirpa"), input_shape=(5,), domain=ball)
    with pytest.raises(certify.CertifyError, match='"own" and "auto_lirpa", got backend=\'mine\''):
        certify.Local(backend="mine")
    with pytest.raises(certify.CertifyError, match="take backend=\"own\" for how='complete'"):
        certify.Local(how="complete", backend="auto_lirpa")
    with pytest.raises(certify.CertifyError, match="is for ReLU and what is made of it, not for gelu"):
        _lirpa.dense(Program.of(nn.Sequential(nn.Linear(5, 5), nn.GELU()).double(), (5,)), 2**20)
    with pytest.raises(certify.CertifyError, match='more than 100 numbers for the maps between the gates; take backend="own"'):
        _lirpa.dense(Program.of(net, (5,)), 100)
    for name in [name for name in sys.modules if name.split(".")[0] == "auto_LiRPA"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    with pytest.raises(certify.CertifyError, match=r"auto_LiRPA is not installed.*git clone"):
        certify.lipschitz(net, certify.Local(backend="auto_lirpa"), input_shape=(5,), domain=box((5,), 0.1))


def test_dense_maps_are_the_network():
    """Without auto_LiRPA: the module that is handed to it computes the row."""
    for make, shape in NETS.values():
        torch.manual_seed(0)
        net = make().double().eval()
        sums = _lirpa.dense(Program.of(lipnet.freeze(net), shape), 2**24)
        x = torch.randn(4, *shape, dtype=torch.float64)
        for k, row in enumerate(torch.eye(net(x).shape[1], dtype=torch.float64)):
            made = _lirpa.row_of(sums, row)
            assert torch.allclose(made(x.flatten(1))[:, 0], net(x)[:, k], rtol=1e-12, atol=1e-12)


def test_what_it_sets_for_the_whole_process_is_put_back():
    pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    code = """
        import logging, sys, warnings
        from certify.local import _lirpa
        def settings():
            return sys.getrecursionlimit(), list(logging.getLogger().handlers), logging.getLogger().level, list(warnings.filters)
        before = settings()
        _lirpa._lirpa()
        assert "auto_LiRPA" in sys.modules and settings() == before, (before, settings())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
