"""Architectures that `--arch` knows by name: those of published verification networks, whose sizes are those of the file, and of two pretrained ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from certify.models.preprocessing import Preprocessing
from certify.models.weights import ModelError
from lipnet.checkpoint import first_line

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network that tensors are put into."""

    make: Callable[[Tensors], nn.Module]  # from the tensors, whose sizes it may look at
    input_shape: tuple[int, ...] | None = None  # as published; else the first layers say it
    preprocessing: Preprocessing | None = None  # that it was trained with, from data in [0, 1]
    tensors: Callable[[Tensors], Tensors] = dict  # those of the network, from those of the file

    def build(self, tensors: Tensors) -> nn.Module:
        """The network for these tensors. Raises ModelError where there is none."""
        try:
            return self.make(tensors)
        except (RuntimeError, OverflowError) as error:  # sizes that torch does not make a layer of
            raise ModelError(f"this architecture cannot be built for the tensors of the file ({first_line(error)})") from error


def mlp(tensors: Tensors) -> nn.Module:
    """Flatten, then dense layers with ReLU between: ERAN's and others' MNIST networks."""
    sizes = [tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("weight")]
    if any(len(size) != 2 for size in sizes) or any(a[0] != b[1] for a, b in itertools.pairwise(sizes)) or not sizes:
        raise ModelError("--arch mlp is for dense layers that follow each other, the file has weights of the sizes " + ", ".join(map(str, sizes[:4])))
    layers = [layer for out, into in sizes for layer in (nn.Linear(into, out), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def _strided(padding: int, activation: type[nn.Module]) -> Callable[[Tensors], nn.Module]:
    def make(tensors: Tensors) -> nn.Module:
        kernels = [tensor.shape for name, tensor in tensors.items() if name.endswith("weight") and tensor.dim() == 4]
        dense = [tensor.shape for name, tensor in tensors.items() if name.endswith("weight") and tensor.dim() == 2]
        if not kernels or not dense or any(high != wide for *_, high, wide in kernels):
            raise ModelError("this architecture has convolutions with square kernels and dense layers, the file has not; name another with --arch")
        layers: list[nn.Module] = []
        for out, into, taps, _ in kernels:
            layers += [nn.Conv2d(into, out, taps, stride=2, padding=padding), activation()]
        layers.append(nn.Flatten())
        for out, into in dense:
            layers += [nn.Linear(into, out), activation()]
        return nn.Sequential(*layers[:-1])

    return make


class _Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(into, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride)) if stride != 1 or into != out else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class _ResNet2b(nn.Module):
    """The residual network `resnet2b` of the alpha-beta-CROWN benchmarks: no batch normalisation, 32 x 32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(_Block(8, 16, 2), _Block(16, 16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(torch.relu(self.linear1(torch.flatten(self.layer1(torch.relu(self.conv1(x))), 1))))


def _rnet() -> nn.Module:
    """The second network of MTCNN (Zhang, Zhang, Li & Qiao 2016), face or not, without its second head, which regresses a box."""
    modules = {
        "conv1": nn.Conv2d(3, 28, 3), "prelu1": nn.PReLU(28), "pool1": nn.MaxPool2d(3, 2, ceil_mode=True),
        "conv2": nn.Conv2d(28, 48, 3), "prelu2": nn.PReLU(48), "pool2": nn.MaxPool2d(3, 2, ceil_mode=True),
        "conv3": nn.Conv2d(48, 64, 2), "prelu3": nn.PReLU(64), "flatten": nn.Flatten(),
        "dense4": nn.Linear(576, 128), "prelu4": nn.PReLU(128), "dense5_1": nn.Linear(128, 2),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(modules))


def _rnet_tensors(tensors: Tensors) -> Tensors:
    """Without the regression of boxes; and the first dense layer, which is published for features in the order width, height, channel, in torch's order."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("dense5_2.")}
    dense = kept.get("dense4.weight")
    if dense is not None and tuple(dense.shape) == (128, 576):
        kept["dense4.weight"] = dense.reshape(128, 3, 3, 64).permute(0, 3, 2, 1).reshape(128, 576)
    return kept


def _same_padding(taps: int, stride: int) -> nn.Module:
    """What makes an image of even sizes smaller by the stride alone, with the larger part of an odd border at the right and at the bottom."""
    border = taps - stride
    return nn.ZeroPad2d((border // 2, border - border // 2) * 2)


class _InvertedResidual(nn.Module):
    """A wider convolution of single pixels, one of each channel, and a narrower one of single pixels; a shortcut where the sizes are the same."""

    def __init__(self, into: int, out: int, taps: int, stride: int, wider: int) -> None:
        super().__init__()
        wide = wider * into
        self._expand_conv = nn.Conv2d(into, wide, 1, bias=False) if wider > 1 else None
        self._bn0 = nn.BatchNorm2d(wide, eps=1e-3) if wider > 1 else None
        self._pad = _same_padding(taps, stride)
        self._depthwise_conv, self._bn1 = nn.Conv2d(wide, wide, taps, stride, groups=wide, bias=False), nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv, self._bn2 = nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out, eps=1e-3)
        self._relu6 = nn.ReLU6()
        self._shortcut = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self._expand_conv is None or self._bn0 is None else self._relu6(self._bn0(self._expand_conv(x)))
        y = self._relu6(self._bn1(self._depthwise_conv(self._pad(y))))
        y = self._bn2(self._project_conv(y))
        return y + x if self._shortcut else y


class _EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Liu & Tan 2020): inverted residuals with ReLU6, for ImageNet at 224 x 224. Names as in the published files for torch."""

    _STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))

    def __init__(self) -> None:
        super().__init__()
        blocks, into = [], 32
        for repeats, taps, stride, wider, out in self._STAGES:
            for repeat in range(repeats):
                blocks.append(_InvertedResidual(into, out, taps, stride if repeat == 0 else 1, wider))
                into = out
        self._pad = _same_padding(3, 2)
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)
        self._relu6, self._pool, self._fc = nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self._blocks(self._relu6(self._bn0(self._conv_stem(self._pad(x)))))
        return self._fc(torch.flatten(self._pool(self._relu6(self._bn1(self._conv_head(y)))), 1))


def _bytes_minus(middle: float) -> Preprocessing:
    """`(255 x - middle) / 128`."""
    return Preprocessing((middle,) * 3, (128.0,) * 3, (0.0, 255.0))


ARCHITECTURES: dict[str, Architecture] = {
    "mlp": Architecture(mlp),
    "cnn_a": Architecture(_strided(1, nn.ReLU)),  # also oval's base and wide networks
    "conv_small": Architecture(_strided(0, nn.ReLU)),  # also Marabou's
    "conv_small_sigmoid": Architecture(_strided(0, nn.Sigmoid)),
    "resnet2b": Architecture(lambda _: _ResNet2b()),
    "rnet": Architecture(lambda _: _rnet(), (3, 24, 24), _bytes_minus(127.5), _rnet_tensors),
    "efficientnet-lite0": Architecture(lambda _: _EfficientNetLite0(), (3, 224, 224), _bytes_minus(127.0)),
}


def input_shape(net: nn.Module) -> tuple[int, ...] | None:
    """The shape of one input, where the layers decide it: square images of 28 or of 32 pixels, or the entries of a vector; None if they take several."""
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Linear):
        side = math.isqrt(first.in_features)
        return (1, side, side) if side * side == first.in_features and side in (28, 32) else (first.in_features,)
    if first is None:
        return None
    taken = []
    for size in (28, 32):
        try:
            with torch.no_grad():
                net(torch.zeros(1, first.in_channels, size, size, dtype=first.weight.dtype))
            taken.append((first.in_channels, size, size))
        except Exception:  # torch raises many kinds, a forward of somebody else's others
            continue
    return taken[0] if len(taken) == 1 else None
