"""The networks of the peers: packages that are installed, and the papers' own code from a checkout, run as their authors wrote it; and proofs for their layers.

Each network is an `nn.Sequential` that ends in a linear layer with rows of norm 1. `claim` is the constant that the code itself gives to what is before that:
1 by construction, or its power iteration. `prove` is ours, from the weights that run:

- torch's layers, deel-torchlip and orthogonium: the rules of `certify` (orthogonium's weights move at every forward, so the network is frozen first).
- LBDN's sandwich layers: `|[A B]|^2`, the largest over the frequencies for its convolutions, which are circular; Psi and its inverse are two roundings of
  their own, whose product goes into B.
- BRONet's convolutions: the image is continued by zeros, convolved on a torus and cut out again, so the largest norm over the frequencies.
- LiResNet's convolutions and the stems of both: the norm of the zero-padded convolution, where the code has a power iteration.
- Their patches and dense layers: the largest singular value of the matrices that run.
- SLL: `max(1, 2 |T^1/2 W'|^2 - 1)` with the T that the layer computes (see `certify.rules.sll`).

Nothing here needed "no proof". The batch means that the papers' layers take off are running means when a network is proved and run, so shifts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.utils import parametrize

import certify
import lipnet
from certify.bound import Array
from certify.convolution import convolution_norm, spectrum_norm
from certify.rounding import add_up, multiply_up, up
from certify.rules.same_conv import tapwise
from certify.spectral import as_float64, largest_singular_value, pair_distances

Shape = tuple[int, ...]
Make = Callable[[Shape, int], nn.Sequential]  # the shape of an image, and a width that decides the number of parameters
POWER_ITERATIONS = 500  # of the papers' own evaluation
_TINY = 2.0**-40  # covers a few roundings in float64


class Papers:
    """The modules of a paper's checkout, imported under a name of their own."""

    def __init__(self, name: str, folder: pathlib.Path) -> None:
        self.name, self.folder = name, folder

    def load(self, path: str) -> ModuleType:
        """The module at a path in the checkout: a file, or the folder of a package."""
        where = self.folder / path
        name = "_".join(("paper", self.name, *pathlib.PurePath(path).with_suffix("").parts))
        if name in sys.modules:
            return sys.modules[name]
        file = where / "__init__.py" if where.is_dir() else where
        if not file.is_file():
            raise SystemExit(f"{self.name}: there is no {file}; give a checkout of the paper's code")
        spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(where)] if where.is_dir() else None)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def part(self, package: str, name: str) -> ModuleType:
        """A module of a package."""
        return importlib.import_module(f"{self.load(package).__name__}.{name}")


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """BRONet's dense layers ask how many processes there are: one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def dense(papers: Mapping[str, Papers]) -> dict[str, Make]:
    """Three dense layers and a head, by each peer that is there."""
    found: dict[str, Make] = {}
    if torchlip := _installed("deel.torchlip"):
        found["deel-torchlip"] = lambda shape, width: nn.Sequential(
            nn.Flatten(), *_dense_layers(shape, width, torchlip.SpectralLinear, torchlip.GroupSort2), torchlip.FrobeniusLinear(width, 10)
        )
    if orthogonium := _installed("orthogonium.layers"):
        found["orthogonium"] = lambda shape, width: nn.Sequential(
            nn.Flatten(), *_dense_layers(shape, width, orthogonium.OrthoLinear, orthogonium.MaxMin), orthogonium.UnitNormLinear(width, 10)
        )
    if "LBDN" in papers:
        lbdn = papers["LBDN"].load("layer.py")
        found["LBDN"] = lambda shape, width: nn.Sequential(nn.Flatten(), *_dense_layers(shape, width, lbdn.SandwichFc), lbdn.LinearNormalized(width, 10))
    if "SLL" in papers:
        sll = papers["SLL"].load("core/models/layers.py")

        def make_sll(shape: Shape, width: int) -> nn.Sequential:
            features = int(np.prod(shape))
            blocks = (sll.SDPBasedLipschitzLinearLayer(features, width) for _ in range(3))
            return nn.Sequential(nn.Flatten(), *blocks, sll.LinearNormalized(features, 10))

        found["SLL"] = make_sll
    if "BRONet" in papers:
        bronet, necks, layers, heads = (papers["BRONet"].part("bronet/models", name) for name in ("dense", "neck", "layers", "head"))

        def make_dense(shape: Shape, width: int, linear_type: str) -> nn.Sequential:
            """Their neck with patches of one pixel, on one channel: a factor of about 1 and then the first dense layer."""
            if shape[0] != 1 or shape[1] != shape[2]:
                raise ValueError(f"the papers' dense layers are set up for square images of one channel, got {shape}")
            act = layers.MinMax()
            neck = necks.Map2Vec(1, shape[1], width, act, conv_type="cholesky", linear_type=linear_type, input_size=shape[1], conv_patch_size=1)
            with _process_group():
                rest = bronet.LiBroMLP(width, 2, act, 0.5) if linear_type == "bro" else bronet.LiResMLP(width, 2, act)
            return nn.Sequential(neck, rest, heads.head(width, 10, True))

        found["BRONet"] = lambda shape, width: make_dense(shape, width, "bro")
        found["LiResNet (Cholesky)"] = lambda shape, width: make_dense(shape, width, "cholesky")
    return found


def convolutional(papers: Mapping[str, Papers]) -> dict[str, Make]:
    """A layer that halves the image, two blocks of convolutions there, a reduction, one dense layer of 4 C, a head; C channels."""
    found: dict[str, Make] = {}
    if torchlip := _installed("deel.torchlip"):

        def make_torchlip(shape: Shape, width: int) -> nn.Sequential:
            conv, act = torchlip.SpectralConv2d, torchlip.GroupSort2
            layers = [conv(shape[0], width, 3, stride=2, padding=1), act(), conv(width, width, 3, padding=1), act(), conv(width, width, 3, padding=1), act()]
            pixels = (shape[1] // 4) * (shape[2] // 4)
            layers += [torchlip.ScaledAvgPool2d(2), nn.Flatten(), torchlip.SpectralLinear(width * pixels, 4 * width), act()]
            return nn.Sequential(*layers, torchlip.FrobeniusLinear(4 * width, 10))

        found["deel-torchlip"] = make_torchlip
    if orthogonium := _installed("orthogonium.layers"):

        def make_orthogonium(shape: Shape, width: int) -> nn.Sequential:
            act = orthogonium.MaxMin

            def conv(into: int, size: int, stride: int = 1) -> nn.Module:
                return orthogonium.AdaptiveOrthoConv2d(into, width, size, stride=stride, padding=size // 2 if stride == 1 else 0, padding_mode="zeros")

            pixels = (shape[1] // 4) * (shape[2] // 4)
            layers = [conv(shape[0], 2, 2), act(), conv(width, 3), act(), conv(width, 3), act(), conv(width, 2, 2), nn.Flatten()]
            return nn.Sequential(*layers, orthogonium.OrthoLinear(width * pixels, 4 * width), act(), orthogonium.UnitNormLinear(4 * width, 10))

        found["orthogonium"] = make_orthogonium
    if "LBDN" in papers:
        lbdn = papers["LBDN"].load("layer.py")

        def make_lbdn(shape: Shape, width: int) -> nn.Sequential:
            layers = [lbdn.SandwichConv(shape[0], width, 3, stride=2), lbdn.SandwichConv(width, width, 3), lbdn.SandwichConv(width, width, 3, stride=2)]
            return nn.Sequential(*_as_32(shape), *layers, nn.Flatten(), lbdn.SandwichFc(width * 64, 4 * width), lbdn.LinearNormalized(4 * width, 10))

        found["LBDN"] = make_lbdn
    if "SLL" in papers:
        sll = papers["SLL"].load("core/models/layers.py")

        def make_sll(shape: Shape, width: int) -> nn.Sequential:
            start = (nn.PixelUnshuffle(2), sll.PaddingChannels(width, 4 * shape[0]))
            features = width * (shape[1] // 4) * (shape[2] // 4)
            blocks = (sll.SDPBasedLipschitzConvLayer(width, 2 * width) for _ in range(2))
            end = (nn.AvgPool2d(2, divisor_override=2), nn.Flatten(), sll.SDPBasedLipschitzLinearLayer(features, 4 * width))
            return nn.Sequential(*start, *blocks, *end, sll.LinearNormalized(features, 10))

        found["SLL"] = make_sll
    if "BRONet" in papers:
        backbones, necks, layers, heads = (papers["BRONet"].part("bronet/models", name) for name in ("backbone", "neck", "layers", "head"))

        def make_bronet(shape: Shape, width: int) -> nn.Sequential:
            act = layers.MinMax()
            stem = layers.Conv2d(shape[0], width, kernel_size=5, stride=2, input_size=32)
            blocks = backbones.LiResConvOrtho(width, 2, 16, act, mode="bro", weight_rank_ratio=0.5)
            neck = necks.Map2Vec(width, 16, 4 * width, act, conv_type="cholesky", linear_type="cholesky", input_size=16)  # as in their cifar10.yaml
            return nn.Sequential(*_as_32(shape), stem, act, blocks, neck, heads.head(4 * width, 10, True))

        found["BRONet"] = make_bronet
    if "LiResNet" in papers:
        models, blocks, conv = (papers["LiResNet"].part("models", name) for name in ("model", "blocks", "layers"))

        def make_liresnet(shape: Shape, width: int) -> nn.Sequential:
            act = conv.MinMax()
            stem = conv.Conv2d(shape[0], width, kernel_size=5, stride=2, input_size=32)
            return nn.Sequential(
                *_as_32(shape), stem, act, blocks.LiResConv(width, 2, 16, act), models.Map2Vec(width, 16, 4 * width, act), models.head(4 * width, 10, True)
            )

        found["LiResNet"] = make_liresnet
    return found


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: left out")
        return None


def _dense_layers(shape: Shape, width: int, layer: Callable[[int, int], nn.Module], activation: Callable[[], nn.Module] | None = None) -> list[nn.Module]:
    sizes = (int(np.prod(shape)), width, width)
    return [part for into in sizes for part in (layer(into, width), *([activation()] if activation else []))]


def _as_32(shape: Shape) -> list[nn.Module]:
    """A border of zeros that brings images to the 32 x 32 that the papers' geometry is made for: keeps the norm. And their shift of the pixels."""
    border = (32 - shape[1]) // 2
    if shape[1] != shape[2] or shape[1] % 2 or border < 0:
        raise ValueError(f"the papers' networks are set up for square images of up to 32 x 32, got {shape}")
    return [lipnet.Normalize([0.5], [1.0]), *([nn.ZeroPad2d(border)] if border else [])]


def claim(net: nn.Sequential) -> float | Tensor:
    """The constant of what is before the head, as its own code gives it: `lipschitz()` of a paper's layer, `constant()` of ours, 1 where there is neither."""
    value: float | Tensor = 1.0
    for layer in list(net)[:-1]:
        own = getattr(layer, "lipschitz", None) or getattr(layer, "constant", None)
        value = value * own() if callable(own) else value
    return value


def settle(net: nn.Sequential) -> nn.Sequential:
    """The network as it is to be proved and run: in eval mode, with weights that stand still, and the papers' number of power iterations."""
    module: Any
    for module in net.modules():
        for cached in ("Q", "Qfft"):  # LBDN keeps the weights of its last forward in training mode, one step behind: it makes them anew where there are none
            if hasattr(module, cached):
                setattr(module, cached, None)
        if hasattr(module, "num_lc_iter"):
            module.num_lc_iter = POWER_ITERATIONS
    net.eval()
    if not any(parametrize.is_parametrized(module) for module in net.modules()):
        return net
    frozen = lipnet.freeze(net)  # orthogonium's weights move at every forward: these are the numbers of one
    assert isinstance(frozen, nn.Sequential)
    return frozen


def head_rows(head: Any) -> Tensor:
    """The rows of the last layer as they run."""
    kind = type(head).__name__
    if kind == "LinearNormalized":  # SLL and LBDN
        return nn.functional.normalize(head.weight, p=2, dim=1)
    if kind == "head":  # BRONet and LiResNet
        return head.get_weight()
    return head.weight() if kind == "UnitRowLinear" else head.weight


@torch.no_grad()
def prove(net: nn.Sequential, shape: Shape) -> certify.Bound:
    """A proved constant of the network for images of this shape, and one for each pair of outputs."""
    value, x = 1.0, torch.zeros(1, *shape)
    *layers, head = net
    for layer in layers:
        input_shape, x = tuple(x.shape[1:]), layer(x)
        rule = _RULES.get(type(layer).__name__) if type(layer).__module__.startswith("paper_") else None
        found = rule(layer, input_shape) if rule else certify.lipschitz(nn.Sequential(layer).eval(), input_shape=input_shape).value
        value = multiply_up(value, found)
    rows = as_float64(head_rows(head))
    pairs = np.nextafter(value * pair_distances(rows), np.inf)
    return certify.Bound(multiply_up(value, largest_singular_value(rows)), "product of layers", pairs=pairs, evidence={"features": value})


def _complex(spectrum: Tensor) -> Any:
    parts = as_float64(torch.view_as_real(spectrum.resolve_conj().contiguous()))
    return parts[..., 0] + 1j * parts[..., 1]


def _matrix(weight: Tensor) -> float:
    return largest_singular_value(as_float64(weight.flatten(1)))


def _product(values: Sequence[float]) -> float:
    value = 1.0
    for one in values:
        value = multiply_up(value, one)
    return value


def _sandwich_dense(layer: Any, shape: Shape) -> float:
    """`sqrt2 A' p s(sqrt2 q B x + b)` with p and q the two computed vectors: `|[A, p q B]|^2`, as in `certify.rules.sandwich` with d = p."""
    q = as_float64(layer.Q)
    outputs = q.shape[0]
    q[:, outputs:] *= _psi_product(layer)[:, None]
    return multiply_up(up(largest_singular_value(q, relative_error=2.0**-50) ** 2), 1 + _TINY)


def _sandwich_conv(layer: Any, shape: Shape) -> float:
    """The same at every frequency: A and B are operators on the torus of the image, and the transforms back and forth keep norms."""
    q = _complex(layer.Qfft)
    q[:, :, q.shape[1] :] *= _psi_product(layer)[:, None]
    return multiply_up(up(spectrum_norm(q) ** 2), 1 + _TINY)


def _psi_product(layer: Any) -> Array:
    return as_float64(torch.exp(layer.psi)) * as_float64(torch.exp(-layer.psi))


def _potential(norm: float) -> float:
    return max(1.0, up(2 * up(norm * norm) - 1))


def _sll_dense(layer: Any, shape: Shape) -> float:
    scaled = np.sqrt(as_float64(layer.compute_t()))[:, None] * as_float64(layer.weight)
    return _potential(largest_singular_value(scaled, relative_error=2.0**-51))


def _sll_conv(layer: Any, shape: Shape) -> float:
    scaled = np.sqrt(as_float64(layer.compute_t()))[:, None, None, None] * as_float64(layer.kernel)
    return _potential(add_up(convolution_norm(scaled, (shape[1], shape[2]), padding=1), multiply_up(2.0**-50, tapwise(scaled))))


def _lires_conv(layer: Any, shape: Shape) -> float:
    return _product([convolution_norm(as_float64(kernel), (shape[1], shape[2]), padding=1) for kernel in layer.get_weight()])


def _stem(layer: Any, shape: Shape) -> float:
    return convolution_norm(as_float64(layer.get_weight()), (shape[1], shape[2]), stride=layer.stride, padding=layer.padding)


def _neck(layer: Any, shape: Shape) -> float:
    return _product([_matrix(weight) for weight in layer.get_weight() if weight is not None])


_RULES: dict[str, Callable[[Any, Shape], float]] = {
    "SandwichFc": _sandwich_dense,
    "SandwichConv": _sandwich_conv,
    "SDPBasedLipschitzLinearLayer": _sll_dense,
    "SDPBasedLipschitzConvLayer": _sll_conv,
    "PaddingChannels": lambda layer, shape: 1.0,  # channels of zeros
    "MinMax": lambda layer, shape: 1.0,  # sorts pairs
    "LiResConv": _lires_conv,
    "LiResConvOrtho": lambda layer, shape: _product([spectrum_norm(_complex(weight)) for weight in layer.eval_weights]),
    "Conv2d": _stem,
    "Map2Vec": _neck,
    "LiBroMLP": lambda layer, shape: _product([_matrix(weight) for weight in layer.eval_weights]),
    "LiResMLP": lambda layer, shape: _product([_matrix(weight) for weight in layer.eval_weight]),
}
