"""Every layer of the table: promises of the layer, soundness and tightness of its rule, mutation, refusals, round trips."""

import copy
import math

import pytest
import tables
import torch
from torch import nn

import certify
import lipnet
from certify import slopes
from lipnet.layers.base import Layer
from lipnet.testing import check_layer, largest_slope

each = pytest.mark.parametrize("row", tables.LAYERS, ids=str)


def perturbed(row, seed, size=0.3):
    torch.manual_seed(seed)
    layer = row.make().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return layer


@each
def test_keeps_the_promises_of_a_layer(row):
    constant = None if row.name == "linear" else row.at_most if row.name != "unit-rows" else math.sqrt(5)
    check_layer(row.make, row.shape, constant, batch_statistics=row.batch_statistics)


@each
def test_known_constant_is_met(row):
    torch.manual_seed(0)
    value = certify.lipschitz(row.make().eval(), input_shape=row.shape).value
    assert value <= row.at_most * (1 + 1e-5)
    if row.exact:
        assert value >= row.at_most * (1 - 1e-5)


@each
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_slope_exceeds_the_bound(row, seed, dtype):
    layer = perturbed(row, seed).to(dtype)
    value = certify.lipschitz(layer, input_shape=row.shape).value
    slope = largest_slope(layer, row.shape, seed=seed)
    assert slope <= value * (1 + 1e-12)
    if row.attained:
        assert slope >= 0.99 * value


@each
def test_breaking_the_weights_raises_the_bound_or_the_refusal(row, monkeypatch):
    if row.broken is None:
        pytest.skip("has no method that makes weights")
    layer = perturbed(row, 0)
    before = certify.lipschitz(layer, input_shape=row.shape).value
    made = getattr(type(layer), row.broken)
    monkeypatch.setattr(type(layer), row.broken, lambda self: _scaled(made(self), row.factor))
    try:
        after = certify.lipschitz(layer, input_shape=row.shape).value
    except certify.Unsupported:
        return
    assert after > 1.05 * before
    assert largest_slope(layer, row.shape) <= after


def _scaled(weights, factor):
    """The skip of a block, or every matrix, times a factor."""
    if isinstance(weights, torch.Tensor):
        return factor * weights
    return weights._replace(skip=factor * weights.skip) if hasattr(weights, "_fields") else tuple(factor * matrix for matrix in weights)


@each
def test_refuses_what_may_change_the_output(row):
    def refused(change, match):
        layer = row.make().eval()
        change(layer)
        with pytest.raises(certify.Unsupported, match=match):
            certify.lipschitz(nn.Sequential(layer), input_shape=row.shape)

    refused(lambda layer: layer.train(), "training mode")
    refused(lambda layer: layer.register_forward_hook(lambda *_: None), "hooks")
    refused(lambda layer: layer.register_forward_pre_hook(lambda *_: None), "hooks")
    refused(lambda layer: setattr(layer, "forward", lambda x: 2 * x), "of its own")
    double = type("Double", (type(row.make()),), {"forward": lambda self, x: 2 * x})
    if isinstance(row.make(), Layer):
        refused(lambda layer: setattr(layer, "__class__", double), r"Double at 0: overrides \w+.forward")
    if row.broken:
        sneaky = type("Sneaky", (type(row.make()),), {row.broken: lambda self: None})
        refused(lambda layer: setattr(layer, "__class__", sneaky), f"overrides .*{row.broken}")
        refused(lambda layer: setattr(layer, row.broken, lambda: None), f"overrides .*{row.broken}")


@each
def test_round_trip_through_a_file(row, tmp_path):
    layer = perturbed(row, 1)
    lipnet.save(layer, tmp_path / "layer.safetensors", input_shape=row.shape)
    again = lipnet.load(tmp_path / "layer.safetensors")
    x = torch.randn(5, *row.shape)
    assert torch.equal(layer(x), again(x))
    assert certify.lipschitz(layer, input_shape=row.shape).value == certify.lipschitz(again, input_shape=row.shape).value


@each
def test_frozen_layers_can_be_exported(row):
    layer = perturbed(row, 2)
    x = torch.randn(2, *row.shape)
    exported = torch.export.export(lipnet.freeze(layer), (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), atol=1e-5, rtol=1e-5)


def test_nan_weights_are_refused():
    for row in tables.LAYERS:
        layer = row.make().eval()
        if not list(layer.parameters()):
            continue
        with torch.no_grad():
            next(layer.parameters()).view(-1)[0] = math.nan
        with pytest.raises(certify.Unsupported, match="NaN or infinite"):
            certify.lipschitz(layer, input_shape=row.shape)


@pytest.mark.parametrize("activation", tables.ACTIVATIONS, ids=repr)
def test_slope_ranges_hold_and_are_tight(activation):
    low, high = slopes.slopes(activation)
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    quotients = copy.deepcopy(activation).double()(x).detach().diff() / x.diff()
    assert low - 1e-9 <= quotients.min()
    assert quotients.max() <= high + 1e-9
    assert quotients.max() - high >= -2e-3
    assert quotients.min() - low <= 2e-3


@pytest.mark.parametrize(
    "activation",
    [nn.SiLU(), nn.GELU(), nn.LeakyReLU(1.5), nn.LeakyReLU(-0.5), lipnet.Abs(), nn.ELU(2.0), nn.Softplus(), nn.PReLU(init=1.5), lipnet.MaxMin()],
    ids=repr,
)
@pytest.mark.parametrize(
    "make", [lambda a: lipnet.SandwichLinear(4, 4, a), lambda a: lipnet.LDLTBlock(4, 4, (4,), a), lambda a: lipnet.GershgorinBlock(4, 4, (4,), a)]
)
def test_layers_refuse_activations_outside_their_theorem(activation, make):
    with pytest.raises(certify.Unsupported, match=r"activation.*slopes"):
        certify.lipschitz(nn.Sequential(make(activation)).eval(), input_shape=(4,))


@pytest.mark.parametrize("asked", [0.5, 3.0])
@pytest.mark.parametrize("family", ["sandwich", "bro", "ldlt", "gershgorin"])
def test_a_network_has_the_constant_that_was_asked_for(asked, family):
    torch.manual_seed(0)
    nets = {
        "sandwich": lambda: nn.Sequential(lipnet.Scale(asked), lipnet.SandwichLinear(6, 8), lipnet.SandwichLinear(8, 8), lipnet.BROLinear(8, 3)),
        "bro": lambda: nn.Sequential(lipnet.BROLinear(6, 8), lipnet.MaxMin(), lipnet.BROLinear(8, 8), lipnet.Scale(asked), lipnet.BROLinear(8, 3)),
        "ldlt": lambda: nn.Sequential(lipnet.LDLTBlock(6, 8, (7, 7), lipschitz=asked), lipnet.LDLTBlock(8, 3, (7,))),
        "gershgorin": lambda: nn.Sequential(lipnet.GershgorinBlock(6, 8, (7, 7), lipschitz=asked), lipnet.GershgorinBlock(8, 3, (7,))),
    }
    net = nets[family]().eval()
    value = certify.lipschitz(net, input_shape=(6,)).value
    assert largest_slope(net, (6,)) <= value <= asked * (1 + 1e-5)
    if family in ("sandwich", "bro"):
        assert value >= asked * (1 - 1e-5)


@pytest.mark.parametrize("shape", [(4, 4, (8,)), (4, 4, (8, 8)), (6, 3, (8, 5, 7)), (3, 6, (4, 4, 4, 4)), (1, 1, (8, 8)), (16, 10, (32, 32, 32))], ids=str)
@pytest.mark.parametrize("asked", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("block", [lipnet.LDLTBlock, lipnet.GershgorinBlock])
def test_residual_blocks_are_proved_with_their_own_multipliers(block, shape, asked):
    for seed in range(3):
        layer = perturbed(tables.Row("", lambda: block(*shape, lipschitz=asked), (shape[0],), asked), seed, size=(0.1, 0.5, 2.0)[seed]).double()
        bound = certify.lipschitz(layer, input_shape=(shape[0],))
        assert largest_slope(layer, (shape[0],), seed=seed) <= bound.value <= asked * (1 + 1e-6)


def test_bro_stays_orthogonal_when_its_vectors_are_ill_conditioned():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(64, 32), full_matrices=False)
    layer = lipnet.BROLinear(64, 64, rank=32).eval()
    with torch.no_grad():
        layer.vectors.copy_((u * torch.logspace(0, -4, 32)) @ v)
    plain = torch.eye(64) - 2 * layer.vectors @ torch.linalg.solve(layer.vectors.mT @ layer.vectors, layer.vectors.mT)
    assert torch.linalg.matrix_norm(plain.double(), 2) > 1.01  # what the published form does here
    assert certify.lipschitz(layer, input_shape=(64,)).value <= 1 + 1e-5
    assert torch.linalg.svdvals(layer.weight().double()).min() >= 1 - 1e-4


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e2, 1e4, 1e6])
def test_sandwich_is_sound_at_every_scale_of_its_free_matrix(scale):
    torch.manual_seed(0)
    layer = lipnet.SandwichLinear(32, 32).eval()
    with torch.no_grad():
        layer.free.mul_(scale)
    value = certify.lipschitz(layer, input_shape=(32,)).value
    assert largest_slope(layer, (32,), points=8) <= value
    exact = certify.lipschitz(copy.deepcopy(layer).double(), input_shape=(32,)).value
    assert exact <= 1 + 1e-6
    a, b = layer.factors()
    spoilt = torch.linalg.matrix_norm(torch.cat([a, b], 1).double(), 2).item() ** 2  # what float32 has left of the factors
    assert spoilt - 1e-6 <= value <= spoilt + 1e-5


def test_activations_inside_a_layer_are_looked_at_too():
    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    for activation, match in ((Doubled(), "overrides ReLU.forward"), (hooked, "hooks")):
        for layer in (lipnet.SandwichLinear(4, 4, activation), lipnet.LDLTBlock(4, 4, (4,), activation)):
            with pytest.raises(certify.Unsupported, match=match):
                certify.lipschitz(nn.Sequential(layer).eval(), input_shape=(4,))


def test_repr_of_a_layer_names_its_arguments():
    assert "orthonormalizer=Cholesky(ridge=0.001)" in repr(lipnet.SandwichLinear(3, 4, orthonormalizer=lipnet.Cholesky()))
    assert "rank=4" in repr(lipnet.BROLinear(8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lipnet.SandwichLinear(0, 4), "in_features must be a positive whole number, got 0"),
        (lambda: lipnet.BROLinear(4, 4, rank=5), "rank must be at most"),
        (lambda: lipnet.LDLTBlock(4, 4, ()), "at least one width"),
        (lambda: lipnet.LDLTBlock(4, 4, (4,), lipschitz=0.0), "lipschitz must be positive"),
        (lambda: lipnet.GershgorinBlock(4, 4, (4, -1)), r"hidden\[1\] must be a positive"),
        (lambda: lipnet.GroupSort(0), "size must be"),
        (lambda: lipnet.Householder(3), "channels must be even"),
        (lambda: lipnet.Scale(-1.0), "factor must be positive"),
        (lambda: lipnet.Normalize([0.5], [0.0]), "std positive"),
        (lambda: lipnet.Normalize([0.5, 0.5], [1.0]), "same number of entries"),
        (lambda: lipnet.Cholesky(ridge=0.0), "ridge > 0"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
