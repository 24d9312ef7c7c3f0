"""Whole networks: composition, residual sums, and refusals that name every node."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import certify
import lipnet
from lipnet.testing import largest_slope


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.act = nn.Linear(4, 4), lipnet.MaxMin()

    def forward(self, x):
        return 0.5 * x.flatten(1) - 2 * self.act(self.inner(x)) + 1.0


def spectral(weight):
    return torch.linalg.matrix_norm(weight.detach().double(), 2).item()


def test_products_along_a_chain():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 6), nn.Tanh()), nn.Linear(6, 3)).eval()
    bound = certify.lipschitz(net, input_shape=(5,))
    exact = spectral(net[0].weight) * spectral(net[2][0].weight) * spectral(net[3].weight)
    assert exact <= bound.value <= exact * (1 + 1e-9)
    assert [part.name for part in bound.parts] == ["0", "1", "2.0", "2.1", "3"]
    assert {a.name for a in bound.assumptions} == {"REAL_ARITHMETIC", "FLOAT64_LINALG", "EVAL_MODE"}
    assert bound.method == "Layerwise()"


def test_sums_over_branches():
    torch.manual_seed(0)
    net = Residual().eval()
    exact = 0.5 + 2 * spectral(net.inner.weight)
    bound = certify.lipschitz(net, input_shape=(4,))
    assert exact <= bound.value <= exact * (1 + 1e-9)
    assert largest_slope(net, (4,)) <= bound.value
    assert "inner" in str(bound)


def test_pairs_are_distances_of_rows_times_what_comes_before():
    net = nn.Sequential(lipnet.Scale(2.0), nn.Linear(2, 3)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]]))
    pairs = certify.lipschitz(net, input_shape=(2,)).pairs
    exact = torch.tensor([[0.0, 10.0, 6.0], [10.0, 0.0, 8.0], [6.0, 8.0, 0.0]], dtype=torch.float64)
    assert torch.all(torch.from_numpy(pairs) >= exact)
    torch.testing.assert_close(torch.from_numpy(pairs), exact, rtol=1e-12, atol=1e-12)


def test_a_module_used_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(torch.relu(self.inner(x)))

    net = Twice().eval()
    assert certify.lipschitz(net, input_shape=(3,)).value == pytest.approx(spectral(net.inner.weight) ** 2, rel=1e-9)


def test_torchs_own_parametrizations_are_bounded_by_what_they_run():
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), parametrizations.weight_norm(nn.Linear(8, 3))).eval()
    exact = spectral(net[0].weight) * spectral(net[1].weight)
    assert exact <= certify.lipschitz(net, input_shape=(8,)).value <= exact * (1 + 1e-9)


def test_parametrised_numbers_of_a_forward_of_ones_own_are_numbers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.last = nn.Parameter(torch.randn(3, 4)), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(nn.functional.linear(x, self.weight))

    for parametrize in (parametrizations.orthogonal, parametrizations.weight_norm, parametrizations.spectral_norm):
        net = parametrize(Own()).eval()
        expected = torch.linalg.matrix_norm(net.weight.detach().double(), 2) * torch.linalg.matrix_norm(net.last.weight.detach().double(), 2)
        assert certify.lipschitz(net, input_shape=(4,)).value == pytest.approx(expected.item(), rel=1e-9)


class Computing(nn.Module):
    """Takes its weight from several tensors that are computed at once, and a number out of one; the call may leave out an argument."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.5))

    def forward(self, x, mask=None, factor=3.0):
        variance, mean = torch.var_mean(self.inner.weight, dim=1, keepdim=True)
        first, second = ((self.inner.weight - mean) * torch.rsqrt(variance)).split((1, 2))
        y = nn.functional.linear(x, torch.cat([second, first])) * self.scale.item() * factor
        return y if mask is None else y * mask


def test_numbers_may_be_computed_several_at_once_and_arguments_left_out():
    net = Computing().eval()
    weight = net.inner.weight.detach().double()
    expected = 7.5 * torch.linalg.matrix_norm((weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True), 2).item()
    assert certify.lipschitz(net, input_shape=(4,)).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda net: net.to("meta"), "on the meta device"),
        (lambda net: net.to(torch.float8_e4m3fn), r"convert it with net\.float"),
        (lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(4))), "two axes are needed"),
    ],
    ids=["meta", "float8", "vector"],
)
def test_numbers_that_are_no_weights_are_refused_in_a_sentence(change, match):
    net = nn.Sequential(nn.Linear(4, 1, bias=False)).eval()
    change(net)
    with pytest.raises(certify.CertifyError, match=match):
        certify.lipschitz(net, input_shape=(4,))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_networks_are_refused_in_a_sentence():
    net = nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(4, 3)).eval()
    with pytest.raises(certify.Unsupported, match="no rule is known for Linear"):
        certify.lipschitz(net, input_shape=(4,))


def test_every_offending_node_is_named_at_once():
    class Doubled(lipnet.Scale):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked, trained = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    bad = [Doubled(0.5), nn.Softplus(), nn.Hardshrink(), hooked, trained, lipnet.SandwichLinear(4, 4, nn.SiLU()), nn.Flatten(0)]
    net = nn.Sequential(*bad[:-1]).eval()
    trained.train()
    with pytest.raises(certify.Unsupported) as refusal:
        certify.lipschitz(net, input_shape=(4,))
    assert [problem.where for problem in refusal.value.problems] == ["0", "1", "2", "3", "4", "5.activation"]
    assert "Sequential" not in str(refusal.value)
    for words in ("overrides Scale.forward", "makes a jump", "has a jump", "hooks", "call net.eval()", "slopes are in"):
        assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, x: x * x, "product of two signals"),
        (lambda self, x: torch.cumsum(x, 1), "cumsum"),
        (lambda self, x: x[0:1], "mixes the inputs"),
        (lambda self, x: x.flatten(0), "mixes the inputs of a batch|flatten"),
        (lambda self, x: x.view(1, -1), "mixes the inputs of a batch"),
        (lambda self, x: torch.add(x, x, alpha=3), "alpha"),
        (lambda self, x: (x, x), "one tensor"),
        (lambda self, x: x if x.sum() > 0 else -x, "cannot be traced"),
        (lambda self, x: self.inner(input=x), "by keyword"),
        (lambda self, x: x.T, "getattr|T"),
        (lambda self, x: x.relu_(), "relu_"),
        (lambda self, x: nn.functional.dropout(x), "dropout"),
    ],
    ids=range(12),
)
def test_forwards_that_cannot_be_bounded(forward, match):
    net = type("Net", (nn.Module,), {"forward": forward})()
    net.inner = nn.Linear(4, 4)
    with pytest.raises((certify.Unsupported, ValueError), match=match):
        certify.lipschitz(net.eval(), input_shape=(4,))


class Shifted(nn.Module):
    """A network whose forward broadcasts or works in place."""

    def __init__(self, forward):
        super().__init__()
        self.column, self.constant, self.run, self.leaky = nn.Linear(4, 1), nn.Parameter(torch.zeros(7, 1)), forward, nn.LeakyReLU(3.0, inplace=True)

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, x: x.view(x.size(1), -1), "mixes the inputs"),
        (lambda self, x: torch.relu(x).relu_() + x, "relu_"),
        (lambda self, x: nn.functional.leaky_relu(x, 3.0, inplace=True) + x, "works in place"),
        (lambda self, x: self.leaky(x) + x, "works in place"),
    ],
    ids=range(4),
)
def test_forwards_that_mix_or_overwrite_a_signal_are_refused(forward, match):
    with pytest.raises((certify.Unsupported, ValueError), match=match):
        certify.lipschitz(Shifted(forward).eval(), input_shape=(4,))


@pytest.mark.parametrize(
    ("forward", "value"),
    [
        (lambda self, x: x + self.column(x), lambda self: 1 + 2 * spectral(self.column.weight)),
        (lambda self, x: x.reshape(x.size(0), 1, 4) + self.constant, lambda self: 7**0.5),
        (lambda self, x: nn.functional.relu(x, True) + x, lambda self: 2),
        (lambda self, x: nn.functional.relu(x, inplace=True) + x, lambda self: 2),
    ],
    ids=range(4),
)
def test_entries_that_are_repeated_count_each_time(forward, value):
    torch.manual_seed(0)
    net = Shifted(forward).eval()
    bound = certify.lipschitz(net, input_shape=(4,)).value
    assert value(net) <= bound <= value(net) * (1 + 1e-9)
    net.run = lambda self, x: forward(self, x.clone())  # what works in place would write into the input of the check
    assert largest_slope(net, (4,)) <= bound


def test_an_addition_in_place_is_refused():
    class InPlace(nn.Module):
        def forward(self, x):
            h = torch.relu(x)
            g = h
            h += x
            return g + h

    with pytest.raises(certify.Unsupported, match="other outputs than its forward"):
        certify.lipschitz(InPlace().eval(), input_shape=(4,))


def test_random_numbers_in_a_forward_are_refused():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn(4)

    with pytest.raises(certify.Unsupported, match="other outputs than its forward"):
        certify.lipschitz(Noisy().eval(), input_shape=(4,))


@pytest.mark.parametrize(
    "layer", [lipnet.Normalize([0.0] * 3, [1.0] * 3), lipnet.Householder(6), lipnet.NActivation(4)], ids=lambda layer: type(layer).__name__
)
def test_layers_that_would_repeat_their_input_are_refused(layer):
    channels = 2 if isinstance(layer, lipnet.Householder) else 1
    assert layer(torch.zeros(5, channels, 2)).numel() > 5 * channels * 2  # torch broadcasts without a word
    with pytest.raises(certify.Unsupported, match="the same number of channels"):
        certify.lipschitz(nn.Sequential(layer).eval(), input_shape=(channels, 2))


def test_centring_of_what_is_no_image_is_refused():
    layer = lipnet.LayerCentering2d(3).eval()
    assert layer(torch.zeros(5, 3, 1, 2, 2)).numel() == 3 * 5 * 12  # the bias meets another axis, and each entry is there three times
    with pytest.raises(certify.Unsupported, match=r"takes one input of shape \(channels, height, width\)"):
        certify.lipschitz(nn.Sequential(layer).eval(), input_shape=(3, 1, 2, 2))


def test_a_scale_that_was_changed_by_hand_is_taken_as_it_is():
    layer = lipnet.Scale(2.0).eval()
    layer.factor = -3.0
    assert certify.lipschitz(layer, input_shape=(4,)).value == 3.0
    layer.factor = math.inf
    with pytest.raises(certify.Unsupported, match="a finite number is needed"):
        certify.lipschitz(layer, input_shape=(4,))


class Making(nn.Module):
    """Makes numbers of stored ones on its way, and keeps what it has seen."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.make = nn.Linear(4, 3), make
        self.register_buffer("one", torch.ones(4))

    def forward(self, x):
        self.seen = x
        return self.inner(x * self.make(self.one))


@pytest.mark.parametrize("layer", [nn.Identity, lambda: lipnet.BROLinear(4, 4)], ids=["plain", "layer of ours"])
def test_numbers_that_a_forward_makes_are_no_part_of_the_network_of_the_caller(layer):
    """torch.fx keeps them as attributes of the network: it grew with each look at it, and was another one each time, so that no bound belonged to it."""
    net = nn.Sequential(layer(), Making(lambda one: 1 / (one + 0.5))).eval()
    before = [set(vars(part)) for part in net.modules()]
    lipnet.freeze(net)
    assert [set(vars(part)) for part in net.modules()] == before
    net(torch.zeros(1, 4))
    before, seen = [set(vars(part)) for part in net.modules()], net[1].seen
    bound = certify.lipschitz(net, input_shape=(4,))
    assert [set(vars(part)) for part in net.modules()] == before
    assert isinstance(net[1].seen, torch.Tensor)
    assert seen.shape == (1, 4)
    assert certify.robustness(net, torch.randn(2, 4), certify.Margin(bound)).radius.shape == (2,)


@pytest.mark.parametrize("make", [lambda one: one + 1e-9 - one, lambda one: (one + 1e-9 - one)[0].item()], ids=["tensor", "number"])
def test_logits_are_of_the_numbers_that_were_bounded(make):
    """In float32 the difference is 0, and so is the bound; in float64 it is not, and logits of a network that makes it there change with the input."""
    graph = certify.Graph.of(Making(make).eval(), (4,))
    bound, x = certify.Layerwise().bound(graph, certify.Everywhere()), 1e12 * torch.eye(4, dtype=torch.float64)[:2]
    assert bound.value == 0
    assert torch.equal(*graph.double(x))


def test_a_part_of_a_split_by_a_slice_before_a_module_is_refused():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(torch.stack(x.unbind(1)[:2], -1))

    with pytest.raises(certify.Unsupported, match="each must be taken by its index"):
        certify.lipschitz(Parts().eval(), input_shape=(3, 2))


def test_hooks_are_found_wherever_they_are():
    def refused(change):
        net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2))).eval()
        change(net)
        with pytest.raises(certify.Unsupported, match=r"hooks|of its own"):
            certify.lipschitz(net, input_shape=(3,))

    refused(lambda net: net.register_forward_hook(lambda *_: None))
    refused(lambda net: net[1].register_forward_pre_hook(lambda *_: None))
    refused(lambda net: net[1][1].register_forward_hook(lambda *_: None, with_kwargs=True))
    refused(lambda net: setattr(net, "forward", lambda x: 2 * x))
    net = nn.Sequential(spectral_norm(nn.Linear(3, 3))).eval()  # the old form, which works by a hook
    with pytest.raises(certify.Unsupported, match="hooks"):
        certify.lipschitz(net, input_shape=(3,))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        refused(lambda net: None)
    finally:
        handle.remove()


def test_a_wrong_input_shape_is_named():
    with pytest.raises(ValueError, match=r"does not take inputs of shape \(5,\)"):
        certify.lipschitz(nn.Linear(4, 4).eval(), input_shape=(5,))


def test_users_can_register_a_rule():
    class Negate(nn.Module):
        def forward(self, x):
            return torch.sin(-x)

    net = nn.Sequential(Negate()).eval()
    with pytest.raises(certify.Unsupported, match="sin"):
        certify.lipschitz(net, input_shape=(3,))

    @certify.register(Negate)
    def _(module, shape):
        assert shape == (3,)
        return certify.Bound(1.0, "negate")

    assert certify.lipschitz(net, input_shape=(3,)).value == 1.0


def test_the_digest_follows_every_number():
    torch.manual_seed(0)
    net = nn.Sequential(lipnet.SandwichLinear(4, 4), lipnet.Normalize([0.1] * 4, [0.5] * 4), lipnet.UnitRowLinear(4, 2)).eval()
    digest = certify.Graph.of(net, (4,)).digest
    assert certify.Graph.of(copy.deepcopy(net), (4,)).digest == digest
    seen = {digest}
    for tensor in net.state_dict().values():
        tensor.view(-1)[-1] += 1e-3
        seen.add(certify.Graph.of(net, (4,)).digest)
    assert len(seen) == 1 + len(net.state_dict())


WIDTH = 6
BLOCKS = [
    lambda: lipnet.SandwichLinear(WIDTH, WIDTH),
    lambda: lipnet.SandwichLinear(WIDTH, WIDTH, nn.Tanh(), lipnet.Cholesky()),
    lambda: lipnet.SandwichLinear(WIDTH, WIDTH, orthonormalizer=lipnet.AOL()),
    lambda: lipnet.BROLinear(WIDTH, WIDTH),
    lambda: lipnet.LDLTBlock(WIDTH, WIDTH, (5, 4), lipschitz=2.0),
    lambda: lipnet.LDLTBlock(WIDTH, WIDTH, (5,), lipschitz=0.5),
    lambda: lipnet.GershgorinBlock(WIDTH, WIDTH, (5,), nn.Tanh()),
    lambda: lipnet.GroupSort(3),
    lambda: lipnet.Householder(WIDTH),
    lambda: lipnet.Scale(1.5),
    lambda: nn.Linear(WIDTH, WIDTH),
    lipnet.MaxMin,
    lipnet.Abs,
    nn.ReLU,
]


@pytest.mark.parametrize("seed", range(25))
def test_random_networks_of_every_kind_are_sound(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(*(BLOCKS[i]() for i in torch.randint(len(BLOCKS), (5,)))).eval()
    value = certify.lipschitz(net, input_shape=(WIDTH,)).value
    assert largest_slope(net, (WIDTH,), points=12, seed=seed) <= value < math.inf


def test_a_network_that_returns_several_tensors_is_refused():
    net = nn.Sequential(nn.MaxPool2d(2, return_indices=True)).eval()
    with pytest.raises(certify.Unsupported, match=r"one tensor|return_indices"):
        certify.lipschitz(net, input_shape=(1, 4, 4))


class Two(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(4, 4), nn.Linear(4, 4), forward
        self.leaky, self.same = nn.LeakyReLU(10.0, inplace=True), nn.Flatten()

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.filterwarnings("ignore")  # torch warns of the old signatures itself
@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: torch.add(self.a(x), 30, self.b(x)),
        lambda self, x: self.a(x).add(30, self.b(x)),
        lambda self, x: torch.sub(self.a(x), 30, self.b(x)),
        lambda self, x: (h := self.a(x), self.leaky(h.view(-1, 4)))[0],
        lambda self, x: (h := self.a(x), self.leaky(self.same(h)))[0],
        lambda self, x: (h := self.a(x), torch.mul(torch.neg(h), 100, out=h))[0],
        lambda self, x: self.a(x).view(torch.int32),
        lambda self, x: torch.abs(self.a(x) + 0j),
        lambda self, x: 100 * x if torch.is_tensor(x) and x.abs().max() > 200 else 1 * x,
    ],
    ids=range(9),
)
def test_forwards_that_hide_a_factor_are_refused(forward):
    with pytest.raises((certify.Unsupported, ValueError)):
        certify.lipschitz(Two(forward).eval(), input_shape=(4,))


def test_activations_without_a_largest_slope_are_refused():
    for activation in (nn.CELU(-1.0), nn.ELU(math.inf), nn.LeakyReLU(math.nan)):
        with pytest.raises(certify.Unsupported, match=r"largest slope|NaN|other outputs"):
            certify.lipschitz(nn.Sequential(nn.Linear(4, 4), activation).eval(), input_shape=(4,))


def test_complex_weights_are_refused():
    net = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)).eval()
    with pytest.raises((certify.Unsupported, ValueError)):
        certify.lipschitz(net, input_shape=(4,))


class Counting(nn.Module):
    """A forward that does something with the length of the batch."""

    def __init__(self, does):
        super().__init__()
        self.inner, self.does = nn.Linear(4, 4), [does]

    def forward(self, x):
        return self.does[0](self.inner(x))


@pytest.mark.parametrize(
    "does",
    [
        lambda x: x + 100 * x * (x.shape[0] // 7),
        lambda x: x[:, : 2 + x.shape[0] // 7],
        lambda x: x[:, : 107 - x.shape[0]],
        lambda x: x.reshape(x.shape[0], 2 + x.shape[0] // 7, -1).sum(1),
        lambda x: x.clamp(0, 1 + x.shape[0] // 7),
        lambda x: x - x.roll(15, 0),
        lambda x: x - x.roll(60),
    ],
)
def test_a_number_that_both_trial_batches_have_by_chance_is_refused(does):
    """Each gives a batch of 1024 something else than it gives batches of 3 and 5, and its constant was that of the small ones."""
    with pytest.raises(certify.Unsupported, match=r"number of inputs in a batch|inputs of a batch|no rule"):
        certify.lipschitz(Counting(does).eval(), input_shape=(4,))


def test_sizes_of_one_input_may_be_counted_with():
    net = Counting(lambda x: x.reshape(x.shape[0], x.shape[1] // 2, -1).mean(dim=x.dim()) * x.shape[1]).eval()
    expected = spectral(torch.block_diag(torch.ones(1, 2), torch.ones(1, 2)) @ net.inner.weight * 2)
    for method in (certify.Layerwise(), certify.LipSDP()):
        assert certify.lipschitz(net, method, input_shape=(4,)).value >= expected * (1 - 1e-9)


class Holding(nn.Module):
    """Numbers that no state dict holds."""

    def __init__(self, factor, how):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        if how == "buffer":
            self.register_buffer("factor", torch.full((4,), factor), persistent=False)
        else:
            self.factor = torch.full((4,), factor)
        self.inner.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})

    def forward(self, x):
        return self.inner(x) * self.factor


@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_a_bound_belongs_to_the_numbers_that_no_state_dict_holds(how):
    """The two networks have one state dict; the bound of the first certified the second, with radii fifty times too large."""
    first, second = (Holding(factor, how).eval() for factor in (1.0, 50.0))
    bound = certify.lipschitz(first, input_shape=(4,))
    with pytest.raises(certify.StaleBound):
        certify.robustness(second, torch.randn(2, 4), certify.Margin(bound))
    assert certify.robustness(Holding(1.0, how).eval(), torch.randn(2, 4), certify.Margin(bound)).radius.shape == (2,)


def test_permuted_axes_are_picked_entries_for_lipsdp():
    net = Counting(lambda x: x.unflatten(1, (2, 2)).permute(0, 2, 1).flatten(1)).eval()
    exact = spectral(net.inner.weight)
    assert exact <= certify.lipschitz(net, certify.LipSDP(), input_shape=(4,)).value <= exact * (1 + 1e-6)


class Stored(nn.Module):
    """A forward with a stored tensor."""

    def __init__(self, does):
        super().__init__()
        self.weight, self.act, self.does = nn.Parameter(torch.tensor([-5.0, 2.0, 0.5, 1.0])), nn.ReLU(inplace=True), [does]

    def forward(self, x):
        return self.does[0](self, x)


def test_modules_of_stored_numbers_are_numbers():
    net = Stored(lambda self, x: x * self.act(self.weight * 1)).eval()
    for method in (certify.Layerwise(), certify.LipSDP()):
        assert certify.lipschitz(net, method, input_shape=(4,)).value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (lambda self, x: self.weight.expand(x.shape[0], 4), "does not depend on its input"),
        (lambda self, x: (x * self.weight).unsqueeze(1).squeeze(), "batch of 1"),
    ],
)
def test_outputs_that_are_no_function_of_each_input_are_refused(does, why):
    with pytest.raises(certify.Unsupported, match=why):
        certify.lipschitz(Stored(does).eval(), input_shape=(4,))
