"""Architectures that `--arch` knows by name: those of published verification networks. Sizes are taken from the tensors of the file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from certify.models.weights import Architecture, ModelError


def mlp(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Flatten, then dense layers with ReLU between: ERAN's and others' MNIST networks."""
    sizes = [tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("weight")]
    if any(len(size) != 2 for size in sizes) or any(a[0] != b[1] for a, b in itertools.pairwise(sizes)) or not sizes:
        raise ModelError("--arch mlp is for dense layers that follow each other, the file has weights of the sizes " + ", ".join(map(str, sizes)))
    layers = [layer for out, into in sizes for layer in (nn.Linear(into, out), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def _strided(padding: int, activation: type[nn.Module]) -> Architecture:
    def make(tensors: Mapping[str, Tensor]) -> nn.Module:
        kernels = [tensor.shape for name, tensor in tensors.items() if name.endswith("weight") and tensor.dim() == 4]
        dense = [tensor.shape for name, tensor in tensors.items() if name.endswith("weight") and tensor.dim() == 2]
        if not kernels or not dense:
            raise ModelError("this architecture has convolutions and dense layers, the file has not")
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


ARCHITECTURES: dict[str, Architecture] = {
    "mlp": mlp,
    "cnn_a": _strided(1, nn.ReLU),  # also oval's base and wide networks
    "conv_small": _strided(0, nn.ReLU),  # also Marabou's
    "conv_small_sigmoid": _strided(0, nn.Sigmoid),
    "resnet2b": lambda _: _ResNet2b(),
}


def input_shape(net: nn.Module) -> tuple[int, ...] | None:
    """The shape of one input, where the first layers decide it: square images of 28 or 32 pixels, or the entries of a vector; None if they do not."""
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Linear):
        side = math.isqrt(first.in_features)
        return (1, side, side) if side * side == first.in_features and side in (28, 32) else (first.in_features,)
    if first is None:
        return None
    for size in (28, 32):
        try:
            with torch.no_grad():
                net(torch.zeros(1, first.in_channels, size, size, dtype=first.weight.dtype))
            return (first.in_channels, size, size)
        except RuntimeError:
            continue
    return None
