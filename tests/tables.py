"""One row for each layer; the tests of test_layers.py run over all of them."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

import lipnet


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    at_most: float  # the constant that the construction promises
    exact: bool = True  # the proved bound of a fresh layer meets it to 1e-5
    broken: str | None = None  # the method of the class that gives its weights; scaling what it returns must raise the bound
    attained: bool = True  # some slope comes within 1 % of the bound
    factor: float = 1.5  # by which the weights are broken
    batch_statistics: bool = False

    def __str__(self) -> str:
        return self.name


def _unit_rows_norm() -> float:
    torch.manual_seed(0)
    return torch.linalg.matrix_norm(nn.functional.normalize(lipnet.UnitRowLinear(9, 5).free.detach().double(), dim=1), 2).item()


def _plain_linear() -> nn.Module:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))  # W'W = [[25, 20], [20, 25]]: eigenvalues 45 and 5
    return layer


BCOP = lipnet.BCOP()


def circular(layer: type, *args: int, **options: object) -> nn.Module:
    return layer(*args, padding_mode="circular", **options)


def _normalized() -> nn.Module:
    return lipnet.Normalize([0.5, 0.25, 0.0], [0.5, 0.25, 1.0])


LAYERS = [
    Row("sandwich", lambda: lipnet.SandwichLinear(7, 9), (7,), 1.0, broken="weights", attained=False),
    Row("sandwich-narrowing", lambda: lipnet.SandwichLinear(12, 5), (12,), 1.0, broken="weights", attained=False),
    Row("sandwich-one", lambda: lipnet.SandwichLinear(1, 1), (1,), 1.0, broken="weights", attained=False),
    Row("sandwich-tanh", lambda: lipnet.SandwichLinear(7, 9, nn.Tanh()), (7,), 1.0, broken="weights", attained=False),
    Row("sandwich-cholesky", lambda: lipnet.SandwichLinear(7, 9, orthonormalizer=lipnet.Cholesky()), (7,), 1.0, exact=False, broken="weights", attained=False),
    Row(
        "sandwich-aol", lambda: lipnet.SandwichLinear(7, 9, orthonormalizer=lipnet.AOL(), bias=False), (7,), 1.0, exact=False, broken="weights", attained=False
    ),
    Row("bro", lambda: lipnet.BROLinear(8, 8), (8,), 1.0, broken="weight"),
    Row("bro-wider", lambda: lipnet.BROLinear(6, 11), (6,), 1.0, broken="weight"),
    Row("bro-narrower", lambda: lipnet.BROLinear(11, 6, rank=3, bias=False), (11,), 1.0, broken="weight"),
    Row("ldlt", lambda: lipnet.LDLTBlock(4, 4, (8,)), (4,), 1.0, exact=False, broken="weights", attained=False),
    Row("ldlt-0.5", lambda: lipnet.LDLTBlock(6, 3, (8, 5, 7), lipschitz=0.5), (6,), 0.5, exact=False, broken="weights", attained=False),
    Row("ldlt-3", lambda: lipnet.LDLTBlock(3, 6, (4, 4, 4, 4), lipschitz=3.0), (3,), 3.0, exact=False, broken="weights", attained=False),
    Row("ldlt-cayley", lambda: lipnet.LDLTBlock(6, 5, (8, 7), orthonormalizer=lipnet.Cayley(), lipschitz=3.0), (6,), 3.0, broken="weights", attained=False),
    Row("ldlt-conv", lambda: lipnet.LDLTConv2d(3, 4, (5,)), (3, 4, 3), 1.0, exact=False, broken="weights", attained=False),
    Row("ldlt-conv-3", lambda: lipnet.LDLTConv2d(2, 3, (5, 4), stride=2, activation=nn.Tanh(), lipschitz=3.0), (2, 4, 6), 3.0, False, "weights", False),
    Row("gershgorin", lambda: lipnet.GershgorinBlock(4, 4, (8,)), (4,), 1.0, exact=False, broken="weights", attained=False),
    Row("gershgorin-0.5", lambda: lipnet.GershgorinBlock(6, 3, (8, 5, 7), lipschitz=0.5), (6,), 0.5, exact=False, broken="weights", attained=False),
    Row("gershgorin-3", lambda: lipnet.GershgorinBlock(16, 10, (32, 32), nn.Tanh(), lipschitz=3.0), (16,), 3.0, exact=False, broken="weights", attained=False),
    Row("sandwich-conv-aol", lambda: lipnet.SandwichConv2d(3, 4), (3, 5, 6), 1.0, exact=False, broken="weights", attained=False),
    Row("sandwich-conv-bcop", lambda: lipnet.SandwichConv2d(3, 4, orthonormalizer=BCOP), (3, 5, 5), 1.0, exact=False, broken="weights", attained=False),
    Row("sandwich-conv-circular", lambda: circular(lipnet.SandwichConv2d, 3, 4, orthonormalizer=BCOP), (3, 5, 5), 1.0, broken="weights", attained=False),
    Row("sandwich-conv-stride", lambda: lipnet.SandwichConv2d(2, 4, stride=2, activation=nn.Tanh()), (2, 6, 8), 1.0, False, "weights", False),
    Row("bro-conv", lambda: lipnet.BROConv2d(4, 4), (4, 5, 5), 1.0, exact=False, broken="weight"),
    Row("bro-conv-circular", lambda: circular(lipnet.BROConv2d, 4, 6), (4, 5, 5), 1.0, broken="weight"),
    Row("bro-conv-stride", lambda: lipnet.BROConv2d(3, 4, stride=2, rank=3, bias=False), (3, 6, 6), 1.0, exact=False, broken="weight", attained=False),
    Row("fourier-bro", lambda: lipnet.FourierBROConv2d(4, 4, 5), (4, 5, 5), 1.0, exact=True, broken="spectra"),
    Row("fourier-bro-circular", lambda: circular(lipnet.FourierBROConv2d, 4, 6, (4, 7)), (4, 4, 7), 1.0, broken="spectra"),
    Row("fourier-bro-stride", lambda: lipnet.FourierBROConv2d(3, 4, (6, 8), stride=2, rank=3, bias=False), (3, 6, 8), 1.0, broken="spectra", attained=False),
    Row("fourier-sandwich", lambda: lipnet.FourierSandwichConv2d(3, 4, (5, 6)), (3, 5, 6), 1.0, broken="spectra", attained=False),
    Row("fourier-sandwich-circular", lambda: circular(lipnet.FourierSandwichConv2d, 3, 4, 5, activation=nn.Tanh()), (3, 5, 5), 1.0, True, "spectra", False),
    Row("fourier-sandwich-aol", lambda: lipnet.FourierSandwichConv2d(2, 4, 6, stride=2, orthonormalizer=lipnet.AOL()), (2, 6, 6), 1.0, False, "spectra", False),
    Row("contraction-linear", lambda: lipnet.ContractionLinear(5, 7), (5,), 1.0, broken="weight"),
    Row("contraction-linear-aol", lambda: lipnet.ContractionLinear(5, 7, lipnet.AOL()), (5,), 1.0, exact=False, broken="weight"),
    Row("contraction-linear-bcop", lambda: lipnet.ContractionLinear(7, 5, BCOP), (7,), 1.0, broken="weight"),
    Row("bcop-conv", lambda: lipnet.ContractionConv2d(4, 6), (4, 5, 5), 1.0, exact=False, broken="weight"),
    Row("bcop-conv-5-circular", lambda: circular(lipnet.ContractionConv2d, 5, 4, 5), (5, 6, 7), 1.0, broken="weight"),
    Row("bcop-patches", lambda: lipnet.ContractionConv2d(3, 8, kernel_size=1, stride=2), (3, 6, 4), 1.0, broken="weight"),
    Row("aol-1-linear", lambda: lipnet.ContractionLinear(5, 7, lipnet.AOL(squarings=1)), (5,), 1.0, exact=False, broken="weight"),
    Row("aol-2-conv", lambda: lipnet.ContractionConv2d(3, 4, contraction=lipnet.AOL(squarings=2)), (3, 5, 5), 1.0, False, "weight", False),
    Row("aol-conv", lambda: lipnet.ContractionConv2d(4, 3, contraction=lipnet.AOL()), (4, 5, 5), 1.0, exact=False, broken="weight", attained=False),
    Row("sll", lambda: lipnet.SLLLinear(5, 7), (5,), 1.0, broken="weights"),
    Row("sll-conv", lambda: lipnet.SLLConv2d(3, 5), (3, 5, 5), 1.0, broken="weights", factor=3.0),
    Row("sll-conv-circular", lambda: circular(lipnet.SLLConv2d, 3, 5, activation=nn.Tanh()), (3, 5, 5), 1.0, broken="weights", factor=3.0),
    Row("cpl", lambda: lipnet.CPLLinear(5, 7), (5,), 1.0, broken="weights"),
    Row("cpl-conv", lambda: lipnet.CPLConv2d(3, 5), (3, 5, 5), 1.0, broken="weights"),
    Row("liresnet", lambda: lipnet.LiResConv2d(3, depth=4), (3, 5, 5), 2.0, exact=False, broken="weight", attained=False),
    Row("liresnet-circular", lambda: circular(lipnet.LiResConv2d, 3), (3, 6, 6), 3.0, exact=False, broken="weight"),
    Row("scaled-average", lambda: lipnet.ScaledAvgPool2d(2), (3, 6, 4), 1.0),
    Row("l2-pool", lambda: lipnet.L2Pool2d(3), (2, 6, 6), 1.0),
    Row("n-activation", lambda: lipnet.NActivation(4), (4, 3, 3), 1.0),
    Row("maxmin", lipnet.MaxMin, (8,), 1.0),
    Row("maxmin-conv", lipnet.MaxMin, (4, 3, 2), 1.0),
    Row("maxmin-halves", lambda: lipnet.MaxMin("halves"), (6, 2), 1.0),
    Row("groupsort-3", lambda: lipnet.GroupSort(3), (9,), 1.0),
    Row("groupsort-8", lambda: lipnet.GroupSort(8), (8, 2), 1.0),
    Row("householder", lambda: lipnet.Householder(6), (6,), 1.0, broken="direction"),
    Row("abs", lipnet.Abs, (5,), 1.0),
    Row("scale-0.5", lambda: lipnet.Scale(0.5), (3,), 0.5),
    Row("scale-3", lambda: lipnet.Scale(3.0), (3, 2), 3.0),
    Row("normalize", _normalized, (3, 2, 2), 4.0),
    Row("batch-centering", lambda: lipnet.BatchCentering(3), (3, 4, 5), 1.0, batch_statistics=True),
    Row("layer-centering", lambda: lipnet.LayerCentering2d(3), (3, 4, 5), 1.0),
    Row("pad-channels", lambda: lipnet.PadChannels(3, 5), (3, 2, 2), 1.0),
    Row("pad-channels-fewer", lambda: lipnet.PadChannels(5, 3), (5,), 1.0),
    Row("reverse-channels", lipnet.ReverseChannels, (3, 2, 4), 1.0),
    Row("channels-last", lipnet.ChannelsLast, (3, 2, 4), 1.0),
    Row("unit-rows", lambda: lipnet.UnitRowLinear(9, 5), (9,), _unit_rows_norm(), broken="weight"),
    Row("linear", _plain_linear, (2,), 3 * 5**0.5),
]

ACTIVATIONS = [
    nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2.0, 3.0), nn.LeakyReLU(0.1), nn.LeakyReLU(1.5), nn.ELU(), nn.ELU(2.0), nn.CELU(0.5), nn.SELU(),
    nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softsign(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), lipnet.Abs(),
    nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Softshrink(0.3), nn.Tanhshrink(), nn.RReLU(0.1, 0.5).eval(),
    nn.PReLU(), nn.PReLU(init=-2.0), nn.PReLU(init=1.5),
]  # fmt: skip
