"""Networks of deel-torchlip and orthogonium: bounded by the weights that they run, whatever they claim. And rules by the name of a class."""

import importlib.metadata
import math
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import certify
import certify.rules  # fills the registry, before tests put copies of it in place
from certify import registry
from lipnet.testing import largest_slope


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(Doubled):
    def forward(self, x):
        return super().forward(x) + 1


class Same(Doubled):
    def extra_repr(self):
        return "the same"


class Drifting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("reads", torch.zeros(()))

    def forward(self, weight):
        self.reads += 1
        return weight / self.reads.clamp_max(self.limit)

    limit = 1000.0


@pytest.fixture
def named(monkeypatch):
    """`Doubled` has a rule by its name, for one test."""
    monkeypatch.setattr(registry, "_named", dict(registry._named))

    @registry.register_name(f"{Doubled.__module__}.{Doubled.__qualname__}")
    def _(layer, shape):
        return certify.Bound(2 * torch.linalg.matrix_norm(layer.weight.double(), 2).item(), "doubled")


def test_a_rule_is_found_by_the_name_of_the_class(named):
    for layer in (Doubled(4, 3), Same(4, 3)):
        exact = 2 * torch.linalg.matrix_norm(layer.weight.double(), 2).item()
        bound = certify.lipschitz(nn.Sequential(nn.Flatten(), layer).eval(), input_shape=(4,))
        assert bound.value == pytest.approx(exact, rel=1e-9)
        assert bound.pairs is None  # the rows of nn.Linear are not those of Doubled


def test_a_name_is_no_rule_for_subclasses_that_override_or_for_other_modules(named):
    other = type("Doubled", (nn.Module,), {"forward": lambda self, x: 9 * x.sigmoid(), "__module__": "elsewhere"})
    assert other.__qualname__ == Doubled.__qualname__
    assert registry.rule_for(other()) is None
    assert registry.rule_for(Doubled(2, 2)) is not None
    with pytest.raises(certify.Unsupported, match=r"overrides Doubled\.forward"):
        certify.lipschitz(nn.Sequential(Shifted(4, 3)).eval(), input_shape=(4,))
    own = Doubled(4, 3).eval()
    own.forward = lambda x: 9 * x
    with pytest.raises(certify.Unsupported, match="on the instance"):
        certify.lipschitz(nn.Sequential(own), input_shape=(4,))


def test_without_its_name_the_forward_of_a_subclass_of_torch_is_seen_through():
    layer = nn.Sequential(Doubled(4, 3)).eval()
    exact = torch.linalg.matrix_norm(layer(torch.eye(4)).double() - layer(torch.zeros(1, 4)).double(), 2).item()
    assert certify.lipschitz(layer, input_shape=(4,)).value == pytest.approx(exact, rel=1e-6)


def test_a_registered_subclass_does_not_inherit_the_rows_of_its_base(monkeypatch):
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    certify.register(Doubled)(lambda layer, shape: certify.Bound(100.0, "doubled"))
    assert certify.lipschitz(nn.Sequential(Doubled(4, 3)).eval(), input_shape=(4,)).pairs is None
    assert certify.lipschitz(nn.Sequential(nn.Linear(4, 3)).eval(), input_shape=(4,)).pairs is not None


@pytest.mark.parametrize("limit", [1000.0, 1.0])
def test_a_weight_that_changes_when_it_is_read_is_refused(limit):
    """Also where only its state changes, which no one can say will not matter."""
    drift = Drifting()
    drift.limit = limit
    net = nn.Sequential(parametrize.register_parametrization(nn.Linear(4, 3), "weight", drift)).eval()
    with pytest.raises(certify.Unsupported, match="computes weight from a state that changes") as refusal:
        certify.lipschitz(net, input_shape=(4,))
    assert len(refusal.value.problems) == 1
    fixed = plain(net)
    assert certify.lipschitz(fixed, input_shape=(4,)).value == pytest.approx(torch.linalg.matrix_norm(fixed[0].weight.double(), 2).item(), rel=1e-9)


def plain(net):
    """The network itself, its weights made numbers. (In a deep copy remove_parametrizations breaks the original: they share a class.)"""
    for path, module in list(net.named_modules()):
        for name in list(getattr(module, "parametrizations", {})) if "parametrizations" not in path else ():
            parametrize.remove_parametrizations(module, name)
    return net


def load(*names):
    found = types.SimpleNamespace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their docstrings hold invalid escapes
        for name in names:
            vars(found).update(vars(pytest.importorskip(name)))
    return found


@pytest.fixture
def tl():
    torch.manual_seed(0)
    return load("deel.torchlip", "deel.torchlip.modules")


@pytest.fixture
def og():
    torch.manual_seed(0)
    return load(
        "orthogonium.layers", "orthogonium.layers.custom_activations", "orthogonium.layers.residual", "orthogonium.layers.conv.AOL",
        "orthogonium.layers.conv.SLL", "orthogonium.layers.conv.AOC", "orthogonium.layers.conv.adaptiveSOC.ortho_conv", "orthogonium.reparametrizers",
    )  # fmt: skip


IMAGE = (4, 6, 6)
CLOSE = "close"  # known up to the torus of zero padding: within 15 % of the slopes seen
# what it makes; the shape of one input; its constant

TORCHLIP = {
    "SpectralLinear": (lambda p: p.SpectralLinear(8, 6), (8,), 1.0),
    "SpectralLinear k=3": (lambda p: p.SpectralLinear(8, 6, k_coef_lip=3.0), (8,), 3.0),
    "FrobeniusLinear": (lambda p: p.FrobeniusLinear(8, 1), (8,), 1.0),
    "FrobeniusLinear, neurons apart: claims 1": (lambda p: with_weight(p.FrobeniusLinear(8, 4), 1.0), (8,), 2.0),
    "SpectralConv2d": (lambda p: p.SpectralConv2d(4, 8, 3, padding=1), IMAGE, CLOSE),
    "SpectralConv2d circular": (lambda p: p.SpectralConv2d(4, 8, 3, padding=1, padding_mode="circular"), IMAGE, CLOSE),
    "SpectralConv2d stride": (lambda p: p.SpectralConv2d(4, 8, 2, stride=2, k_coef_lip=0.5), IMAGE, 0.5),
    "SpectralConv2d dilation: claims 1": (lambda p: p.SpectralConv2d(1, 9, 3, 2, 2, 2, padding_mode="circular"), (1, 8, 8), 1.5),
    "FrobeniusConv2d": (lambda p: p.FrobeniusConv2d(4, 1, 3, padding=1), IMAGE, CLOSE),
    "SpectralConv1d": (lambda p: p.SpectralConv1d(4, 6, 3, padding=1), (4, 9), CLOSE),
    "SpectralConvTranspose2d": (lambda p: p.SpectralConvTranspose2d(4, 2, 2, stride=2), IMAGE, None),
    "MaxMin": (lambda p: p.MaxMin(), IMAGE, 1.0),
    "MaxMin k=2": (lambda p: p.MaxMin(k_coef_lip=2.0), (6,), 2.0),
    "GroupSort": (lambda p: p.GroupSort(4, k_coef_lip=0.5), (8,), 0.5),
    "GroupSort2": (lambda p: p.GroupSort2(), IMAGE, 1.0),
    "FullSort": (lambda p: p.FullSort(), (7,), 1.0),
    "LPReLU": (lambda p: p.LPReLU(init=-3.0, k_coef_lip=2.0), (6,), 2.0),
    "LPReLU: claims 0.5": (lambda p: p.LPReLU(init=3.0, k_coef_lip=0.5), (6,), 1.0),
    "HouseHolder": (lambda p: p.HouseHolder(4, theta_initializer="normal"), IMAGE, 1.0),
    "HouseHolder: claims 0.5": (lambda p: p.HouseHolder(6, k_coef_lip=0.5), (6,), 1.0),
    "ScaledAvgPool2d": (lambda p: p.ScaledAvgPool2d((2, 3)), IMAGE, 1.0),
    "ScaledAvgPool2d ceil: claims 1": (lambda p: p.ScaledAvgPool2d(3, ceil_mode=True), (2, 4, 4), 3.0),
    "ScaledAvgPool2d divisor: claims 1": (lambda p: p.ScaledAvgPool2d(2, divisor_override=1), IMAGE, 4.0),
    "ScaledAdaptiveAvgPool2d": (lambda p: p.ScaledAdaptiveAvgPool2d((1, 1), k_coef_lip=3.0), (4, 5, 6), 3.0),
    "ScaledL2NormPool2d": (lambda p: p.ScaledL2NormPool2d(2), IMAGE, 1.0),
    "ScaledL2NormPool2d ceil: claims 1": (lambda p: p.ScaledL2NormPool2d(3, ceil_mode=True), (2, 4, 4), 3.0),
    "ScaledL2NormPool2d ceil, a side": (lambda p: p.ScaledL2NormPool2d((3, 2), ceil_mode=True), (2, 5, 4), math.sqrt(1.5)),
    "ScaledAdaptativeL2NormPool2d": (lambda p: p.ScaledAdaptativeL2NormPool2d((1, 1), k_coef_lip=2.0), IMAGE, 2.0),
    "InvertibleDownSampling: claims 0.5": (lambda p: p.InvertibleDownSampling(2, k_coef_lip=0.5), IMAGE, 1.0),
    "InvertibleUpSampling": (lambda p: p.InvertibleUpSampling(2), IMAGE, 1.0),
    "LayerCentering": (lambda p: p.LayerCentering(4), IMAGE, 1.0),
    "LayerCentering of features": (lambda p: p.LayerCentering(6, dim=-1), (6,), 1.0),
    "BatchCentering": (lambda p: fitted(p.BatchCentering(4), IMAGE), IMAGE, 1.0),
    "BatchLipNorm": (lambda p: fitted(p.BatchLipNorm(4), IMAGE), IMAGE, None),
    "BatchLipNorm, new": (lambda p: p.BatchLipNorm(4), (4,), 1.0),
    "Sequential: claims 1": (lambda p: p.Sequential(p.SpectralLinear(8, 8, k_coef_lip=3.0), p.SpectralLinear(8, 8, k_coef_lip=3.0)), (8,), 9.0),
    "Sequential: claims 0.5": (lambda p: p.Sequential(p.SpectralLinear(8, 8), p.SpectralLinear(8, 8), k_coef_lip=0.5), (8,), 1.0),
    "Sequential k=4": (lambda p: p.Sequential(p.GroupSort2(), p.MaxMin(), k_coef_lip=4.0), (8,), 4.0),
    "exported": (lambda p: p.Sequential(p.SpectralConv2d(4, 8, 3, padding=1), p.GroupSort2()).vanilla_export(), IMAGE, CLOSE),
}

ORTHOGONIUM = {
    "OrthoLinear": (lambda p: p.OrthoLinear(8, 6), (8,), 1.0),
    "UnitNormLinear: claims 1 for each output": (lambda p: with_weight(p.UnitNormLinear(8, 4), 1.0), (8,), 2.0),
    "AdaptiveOrthoConv2d": (lambda p: p.AdaptiveOrthoConv2d(4, 4, 3, padding=1, padding_mode="zeros"), IMAGE, 1.0),
    "AdaptiveOrthoConv2d circular": (lambda p: p.AdaptiveOrthoConv2d(4, 8, 3), IMAGE, 1.0),
    "AdaptiveOrthoConv2d stride": (lambda p: p.AdaptiveOrthoConv2d(4, 8, 4, stride=2, padding=1, padding_mode="zeros"), IMAGE, 1.0),
    "AdaptiveOrthoConv2d groups": (lambda p: p.AdaptiveOrthoConv2d(4, 8, 3, padding=1, groups=2, padding_mode="zeros"), IMAGE, 1.0),
    "AdaptiveOrthoConv2d patches": (lambda p: p.AdaptiveOrthoConv2d(4, 16, 2, stride=2, padding=0), IMAGE, 1.0),
    "AdaptiveOrthoConvTranspose2d": (lambda p: p.AdaptiveOrthoConvTranspose2d(4, 4, 3, padding=1), IMAGE, 1.0),
    "AdaptiveOrthoConvTranspose2d stride": (lambda p: p.AdaptiveOrthoConvTranspose2d(8, 4, 4, stride=2, padding=1), (8, 4, 4), 1.0),
    "AdaptiveOrthoConvTranspose2d patches": (lambda p: p.AdaptiveOrthoConvTranspose2d(8, 2, 2, stride=2), (8, 4, 4), 1.0),
    "RKOConv2d": (lambda p: p.RKOConv2d(4, 8, 3, padding=1, padding_mode="zeros"), IMAGE, CLOSE),
    "AOLConv2D": (lambda p: p.AOLConv2D(4, 8, 3, padding=1, niter=2), IMAGE, CLOSE),
    "AOLConvTranspose2D": (lambda p: p.AOLConvTranspose2D(4, 4, 3, padding=1), IMAGE, CLOSE),
    "AdaptiveSOCConv2d: claims 1": (lambda p: p.AdaptiveSOCConv2d(4, 4, 3), IMAGE, CLOSE),
    "SDPBasedLipschitzResBlock": (lambda p: p.SDPBasedLipschitzResBlock(4, 2), IMAGE, 1.0),
    "SDPBasedLipschitzResBlock groups": (lambda p: p.SDPBasedLipschitzResBlock(4, 1, kernel_size=2, groups=2), IMAGE, 1.0),
    "SDPBasedLipschitzDense": (lambda p: p.SDPBasedLipschitzDense(6, 6, 9), (6,), 1.0),
    "AOCLipschitzResBlock": (lambda p: p.AOCLipschitzResBlock(4, 2, 3), IMAGE, 1.0),
    "MaxMin": (lambda p: p.MaxMin(), IMAGE, 1.0),
    "Abs": (lambda p: p.Abs(), IMAGE, 1.0),
    "SoftHuber": (lambda p: p.SoftHuber(), IMAGE, 1.0),
    "HouseHolder": (lambda p: p.HouseHolder(4), IMAGE, 1 / math.sqrt(2)),
    "LayerCentering2D": (lambda p: p.LayerCentering2D(4), IMAGE, 1.0),
    "BatchCentering2D": (lambda p: fitted(p.BatchCentering2D(4), IMAGE), IMAGE, 1.0),
    "ChannelShuffle": (lambda p: p.ChannelShuffle(2, 2), IMAGE, 1.0),
}


def with_weight(layer, value):
    """All entries equal, before what the layer makes of them."""
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(value)
    return layer


def fitted(layer, shape):
    """Some batches in training mode."""
    scale = torch.arange(1.0, shape[0] + 1).reshape(-1, *(1 for _ in shape[1:]))
    for _ in range(3):
        layer(scale * torch.randn(8, *shape) + 5)
    return layer


def check(net, shape, constant):
    net = net.eval()
    bound = certify.lipschitz(net, input_shape=shape).value
    seen = largest_slope(plain(net), shape)
    assert seen <= bound * (1 + 1e-12)
    expected = seen if constant in (None, CLOSE) else constant
    assert bound <= expected * (1.15 if constant == CLOSE else 1 + 1e-4)
    assert bound >= expected * (1 - 1e-4)


@pytest.mark.parametrize("row", TORCHLIP)
def test_torchlip(tl, row):
    make, shape, constant = TORCHLIP[row]
    check(make(tl), shape, constant)


@pytest.mark.parametrize("row", ORTHOGONIUM)
def test_orthogonium(og, row):
    make, shape, constant = ORTHOGONIUM[row]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(plain(make(og).eval()), shape, constant)


REFUSED_TORCHLIP = {
    "symmetric": (lambda p: p.SpectralConv2d(4, 4, 5, padding=2, padding_mode="symmetric"), IMAGE, "symmetric padding"),
    "symmetric 1d": (lambda p: p.SpectralConv1d(4, 4, 3, padding=1, padding_mode="symmetric"), (4, 9), "symmetric padding"),
    "another pad": (lambda p: changed(p.SpectralConv2d(4, 4, 3), "pad", lambda x: 2 * x), IMAGE, "symmetric padding"),
    "another forward": (lambda p: type("Mine", (p.GroupSort2,), {"forward": lambda self, x: 2 * x})(), (4,), r"overrides GroupSort2?\.forward"),
    "statistics of the batch": (lambda p: p.LayerCentering(4, dim=(0, 2, 3)), IMAGE, "mixes the batch"),
    "all dimensions": (lambda p: p.LayerCentering(4, dim=()), IMAGE, "mixes the batch"),
    "a bias for more channels": (lambda p: p.LayerCentering(4), (1, 6, 6), "repeats the signal"),
    "angles for more channels": (lambda p: p.HouseHolder(8), (2, 6, 6), "repeats the signal"),
    "windows that overlap": (lambda p: changed(p.ScaledL2NormPool2d(2), "stride", 1), IMAGE, "do not overlap"),
    "coefficient": (lambda p: changed(p.GroupSort2(), "_coefficient_lip", torch.tensor(2.0)), (4,), "finite Python number"),
    "train": (lambda p: p.SpectralLinear(4, 4).train(), (4,), "training mode"),
}
REFUSED_ORTHOGONIUM = {
    "a power iteration in eval mode": (
        lambda p: p.AdaptiveOrthoConv2d(4, 8, 4, stride=2, padding=1, padding_mode="zeros"),
        IMAGE,
        "computes weight_1, weight_2",
    ),
    "inside a block": (lambda p: p.AOCLipschitzResBlock(4, 2, 3), IMAGE, "computes in_conv.weight from"),
    "HouseHolder_Order_2": (lambda p: p.HouseHolder_Order_2(4), IMAGE, "a jump"),
    "AdditiveResidual": (lambda p: p.AdditiveResidual(nn.Linear(4, 4)), (4,), "by a parameter"),
    "L2NormResidual": (lambda p: p.L2NormResidual(nn.Linear(4, 4)), (4,), "no rule is known for this operation"),
    "SLLxAOC": (lambda p: p.SLLxAOCLipschitzResBlock(4, 4, 1), IMAGE, "ParametrizedSLLxAOCLipschitzResBlock at the top"),
    "SLL with another activation": (lambda p: changed(p.SDPBasedLipschitzResBlock(4, 2), "activation", nn.SiLU()), IMAGE, "its slopes are in"),
    "a bias for more channels": (lambda p: p.LayerCentering2D(4), (1, 6, 6), "repeats the signal"),
    "halves of the height": (lambda p: p.HouseHolder(4, axis=2), (1, 6, 6), "repeats the signal"),
}


def changed(layer, name, value):
    setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_with_values_of_the_signal_is_bounded_as_a_map_of_its_own(tl, og, mode):
    """By the norm of the padding times that of the kernel."""
    for layer in (tl.SpectralConv2d(4, 4, 3, padding=1, padding_mode=mode).eval(), plain(og.AdaptiveOrthoConv2d(4, 4, 3, padding=1, padding_mode=mode).eval())):
        bound, seen = certify.lipschitz(layer, input_shape=IMAGE).value, largest_slope(plain(layer), IMAGE)
        assert seen <= bound <= 2.5 * seen


@pytest.mark.parametrize("row", REFUSED_TORCHLIP)
def test_torchlip_refused(tl, row):
    make, shape, match = REFUSED_TORCHLIP[row]
    layer = make(tl)
    with pytest.raises(certify.Unsupported, match=match):
        certify.lipschitz(layer if row == "train" else layer.eval(), input_shape=shape)


@pytest.mark.parametrize("row", REFUSED_ORTHOGONIUM)
def test_orthogonium_refused(og, row):
    make, shape, match = REFUSED_ORTHOGONIUM[row]
    with pytest.raises(certify.Unsupported, match=match):
        certify.lipschitz(make(og).eval(), input_shape=shape)


def test_two_inputs_are_refused(tl):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.add = tl.SpectralLinear(4, 4), tl.LipResidual()

        def forward(self, x):
            return self.add(x, self.inner(x))

    with pytest.raises(certify.Unsupported, match="more than one argument"):
        certify.lipschitz(Net().eval(), input_shape=(4,))


def test_another_release_is_refused(tl, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0.6")
    with pytest.raises(certify.Unsupported, match=r"for deel-torchlip 1\.0\.5, and 1\.0\.6 is installed"):
        certify.lipschitz(nn.Sequential(tl.GroupSort2()).eval(), input_shape=(4,))
    assert certify.lipschitz(nn.Sequential(tl.SpectralLinear(4, 4)).eval(), input_shape=(4,)).value <= 1 + 1e-4  # torch's own forward


def test_torchlip_is_bounded_by_the_weight_that_eval_mode_runs(tl):
    """In eval mode the weight is the one that was kept at the last forward in training, whatever the parameters are now."""
    net = tl.Sequential(tl.SpectralLinear(8, 8)).eval()
    with torch.no_grad():
        net[0].parametrizations.weight.original.mul_(50)
    assert certify.lipschitz(net, input_shape=(8,)).value == pytest.approx(1.0, abs=1e-4)
    with torch.no_grad():
        net[0].parametrizations.weight[1]._w_bjorck.mul_(3)
    assert certify.lipschitz(net, input_shape=(8,)).value == pytest.approx(3.0, abs=1e-4)
    assert largest_slope(net, (8,)) == pytest.approx(3.0, abs=1e-4)


def train(net, shape):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(20):
        net.train()(torch.randn(16, *shape)).square().mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


def test_a_trained_torchlip_network(tl):
    net = nn.Sequential(
        tl.SpectralConv2d(1, 8, 3, padding=1), tl.BatchCentering(8), tl.GroupSort2(), tl.ScaledL2NormPool2d(2), tl.LayerCentering(8),
        tl.SpectralConv2d(8, 8, 3, padding=1), tl.MaxMin(), tl.InvertibleDownSampling(2), tl.HouseHolder(64), tl.ScaledAvgPool2d(2),
        nn.Flatten(), tl.SpectralLinear(64, 16), tl.FullSort(), tl.SpectralLinear(16, 4),
    )  # fmt: skip
    train(net, (1, 8, 8))
    bound = certify.lipschitz(net, input_shape=(1, 8, 8))
    assert largest_slope(net, (1, 8, 8), points=8) <= bound.value <= 1 + 1e-3
    assert bound.pairs is not None
    radii = certify.robustness(net, torch.randn(5, 1, 8, 8), certify.Margin(bound)).radius
    assert (radii > 0).all()


def test_a_trained_orthogonium_network(og):
    net = nn.Sequential(
        og.AdaptiveOrthoConv2d(1, 8, 3, padding=1, padding_mode="zeros"), og.BatchCentering2D(8), og.MaxMin(), og.ChannelShuffle(2, 4),
        og.AdaptiveOrthoConv2d(8, 16, 4, stride=2, padding=1, padding_mode="zeros"), og.LayerCentering2D(16), og.Abs(),
        og.SDPBasedLipschitzResBlock(16, 1), og.AdaptiveOrthoConvTranspose2d(16, 8, 2, stride=2), og.HouseHolder(8), nn.Flatten(), og.OrthoLinear(512, 4),
    )  # fmt: skip
    net = plain(train(net, (1, 8, 8)))
    bound = certify.lipschitz(net, input_shape=(1, 8, 8))
    assert largest_slope(net, (1, 8, 8), points=8) <= bound.value <= 1 / math.sqrt(2) + 1e-3
    assert (certify.robustness(net, torch.randn(5, 1, 8, 8), certify.Margin(bound)).radius > 0).all()


def test_batch_lip_norm_is_bounded_where_its_variance_cancels(tl):
    """Digits cancel in `mean of squares - square of mean`: the scale in float32 and the exact one differ by far more than rounding."""
    layer = tl.BatchLipNorm(2)
    for name, value in {"running_sum_bmean": 300.0, "running_sum_bmeansq": 90000.02, "running_num_batches": 1, "running_mean_sample_per_batches": 9.0}.items():
        getattr(layer, name).fill_(value)
    net = nn.Sequential(layer).eval()
    bound = certify.lipschitz(net, input_shape=(2,)).value
    seen = largest_slope(net, (2,))
    computed = float(layer.get_scaling())
    assert max(seen, computed) <= bound * (1 + 1e-12)
    assert bound == pytest.approx(max(seen, computed), rel=1e-9)


def test_batch_lip_norm_is_bounded_by_the_statistics_that_it_runs_with(tl):
    """The number of samples is that of a much shorter epoch before, until the first forward in eval mode."""
    layer = tl.BatchLipNorm(2)
    for batches, size in ((2, 2), (50, 1000)):
        for _ in range(batches):
            layer.train()(torch.randn(size, 2) / 2)
        if size == 2:
            layer.eval()(torch.randn(1, 2))
    stale = float(layer.get_scaling(training=False))
    with pytest.raises(certify.Unsupported, match="run it once in eval mode"):
        registry.rule_for(layer)(layer.eval(), (2,))
    net = nn.Sequential(layer).eval()
    bound = certify.lipschitz(net, input_shape=(2,)).value
    assert largest_slope(net, (2,)) <= bound * (1 + 1e-12)
    assert stale < 0.9 * bound


def test_householder_of_order_2_jumps(og):
    """Why it is refused."""
    layer = og.HouseHolder_Order_2(2)
    seen = 0.0
    for _ in range(200):
        with torch.no_grad():
            layer.theta0.zero_()
            layer.theta1.copy_(math.pi * torch.rand(1))
            layer.theta2.copy_(math.pi * torch.rand(1))
            pair = layer(torch.tensor([[1.0, 0.0], [1.0, -1e-9]]).reshape(2, 2, 1, 1)).reshape(2, 2)
            seen = max(seen, (pair[0] - pair[1]).norm().item())
    assert seen > 0.5


class _OnlyFloat(nn.Module):
    """Of float32 weights, as vector_norm(dtype=torch.float32) is."""

    def forward(self, weight):
        return weight / torch.linalg.vector_norm(weight, dtype=torch.float32)


@pytest.mark.parametrize(
    "wrap", [lambda layer: layer, nn.Sequential, lambda layer: nn.Sequential(nn.ReLU(), nn.Sequential(layer))], ids=["alone", "in", "deep"]
)
def test_weights_that_cannot_be_computed_are_named(wrap):
    layer = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(layer, "weight", _OnlyFloat())
    net = wrap(layer).eval()
    assert certify.lipschitz(net, input_shape=(3,)).value <= 1 + 1e-6  # at most the Frobenius norm
    with pytest.raises(certify.Unsupported, match=r"Linear.* cannot compute its own weights \(RuntimeError: .*bring it back to the dtype"):
        certify.lipschitz(net.double(), input_shape=(3,))
