"""Random changes of images that keep their labels, on tensors, reproducible from a generator."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor, nn

from lipnet.layers.base import check_sizes


class Augmentation(abc.ABC):
    """A random change of images (N, C, H, W) that keeps their labels. What is drawn and what is done with it are apart, so that a batch can be split."""

    @abc.abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The random numbers of each image, on the CPU: (count, ...)."""

    @abc.abstractmethod
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The images, each changed as was drawn for it."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw and apply."""
        return self.apply(images, self.draw(len(images), generator))


@dataclasses.dataclass(frozen=True)
class Crop(Augmentation):
    """Each image moves by up to `padding` pixels in both directions, uniformly; zeros come in from outside."""

    padding: int = 4

    def __post_init__(self) -> None:
        check_sizes(padding=self.padding)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:  # (count, 2)
        return torch.randint(2 * self.padding + 1, (count, 2), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        corner = drawn.to(images.device)
        rows = corner[:, 0, None] + torch.arange(height, device=images.device)  # (N, H)
        columns = corner[:, 1, None] + torch.arange(width, device=images.device)  # (N, W)
        padded = nn.functional.pad(images, [self.padding] * 4)
        image = torch.arange(count, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[:, None, None]
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclasses.dataclass(frozen=True)
class Flip(Augmentation):
    """Each image is mirrored, left to right, with probability 1/2."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:  # (count,)
        return torch.randint(2, (count,), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        return torch.where(drawn.to(images.device)[:, None, None, None] == 1, images.flip(-1), images)
