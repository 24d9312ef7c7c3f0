"""What is done to an input before a network sees it, as the first layers of the network: radii stay in the units of the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import lipnet
from certify.models.weights import ModelError
from certify.registry import Shape

LAYOUTS = ("nchw", "nhwc")
_DIGITS = 9  # of a range of inputs after an affine map back: float32 data do not tell more apart


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a network wants its inputs, where the data are channels first, red, green, blue, and in [0, 1].

    In this order: the channels are turned round (`bgr`); x becomes `low + (high - low) x`, of `input_range = (low, high)`; `(x - mean) / std`, in the units and
    in the order of channels that x then has; and the channels come last (`layout="nhwc"`).
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_range: tuple[float, float] | None = None
    layout: str = "nchw"
    bgr: bool = False

    def layers(self, dtype: torch.dtype) -> list[nn.Module]:
        """The modules that do it, in eval mode. Raises ModelError where a number is out of the range of the dtype."""
        return [
            *([lipnet.ReverseChannels()] if self.bgr else []),
            *([self._normalize(dtype)] if self._affine() is not None else []),
            *([lipnet.ChannelsLast()] if self.layout == "nhwc" else []),
        ]

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it; `preprocessing(**facts)` is this value again."""
        said: dict[str, Any] = {} if self.mean is None or self.std is None else {"mean": list(self.mean), "std": list(self.std)}
        said |= {} if self.input_range is None else {"input_range": list(self.input_range)}
        return said | ({} if self.layout == "nchw" else {"layout": self.layout}) | ({"bgr": True} if self.bgr else {})

    @property
    def said(self) -> str:
        """The options of the command line that say the same."""
        options = {name: value for name, value in self.facts().items() if name != "bgr"}
        shown = [
            f"--{name.replace('_', '-')} {value if isinstance(value, str) else ','.join(f'{number:g}' for number in value)}" for name, value in options.items()
        ]
        return " ".join([*shown, *(["--bgr"] if self.bgr else [])])

    def of_network(self, shape: Shape | None) -> Shape | None:
        """The shape that the network sees of data of this shape."""
        return shape if shape is None or self.layout == "nchw" else (*self._image(shape)[1:], shape[0])

    def of_data(self, shape: Shape | None) -> Shape | None:
        """The shape of data of which the network sees this shape."""
        return shape if shape is None or self.layout == "nchw" else (self._image(shape)[-1], *shape[:-1])

    def range_of_data(self, extent: tuple[float, float] | None) -> tuple[float, float] | None:
        """The data of which the network sees numbers in this range only."""
        if extent is None or (affine := self._affine()) is None:
            return extent
        ends = [(mean + std * extent[0], mean + std * extent[1]) for mean, std in zip(*affine, strict=True)]
        low, high = round(max(low for low, _ in ends), _DIGITS), round(min(high for _, high in ends), _DIGITS)
        if not low < high:
            raise ModelError(f"the model takes numbers in {list(extent)}, which no data are in after {self.said}; it may normalise its inputs itself")
        return low, high

    def _affine(self) -> tuple[list[float], list[float]] | None:
        """`mean` and `std` in the units of the data, or None where numbers stay what they are."""
        if self.mean is None and self.std is None and self.input_range is None:
            return None
        low, high = self.input_range or (0.0, 1.0)
        return [(mean - low) / (high - low) for mean in self.mean or (0.0,)], [std / (high - low) for std in self.std or (1.0,)]

    def _normalize(self, dtype: torch.dtype) -> nn.Module:
        mean, std = self._affine() or ([], [])
        try:
            layer = lipnet.Normalize(mean, std).to(dtype)
        except (ValueError, OverflowError) as error:
            raise ModelError(f"{self.said}: {error}") from None
        if not (torch.isfinite(layer.shift).all() and torch.isfinite(layer.divisor).all() and (layer.divisor > 0).all()):
            raise ModelError(f"{self.said}: in {dtype} the numbers that are subtracted or divided by become zero or infinite; take others")
        return layer.eval()

    def _image(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise ModelError(f"a layout is one of images, that is of three sizes, and inputs here have the shape {shape}; leave out --layout {self.layout}")
        return shape


def preprocessing(
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_range: Sequence[float] | None = None,
    layout: str | None = None,
    bgr: bool | None = None,
) -> Preprocessing:
    """The value of what a user, or a manifest, says of it; one number stands for every channel. Raises ModelError for what makes no sense."""
    if not all(_is_numbers(given) for given in (mean, std, input_range)):
        raise ModelError(f"mean, std and input range are numbers, got {mean!r}, {std!r} and {input_range!r}")
    if layout not in (None, *LAYOUTS) or not isinstance(bgr, bool | None):
        raise ModelError(f"a layout is one of {', '.join(LAYOUTS)}, and bgr is true or false; got {layout!r} and {bgr!r}")
    if input_range is not None and not (len(input_range) == 2 and all(map(math.isfinite, input_range)) and input_range[0] < input_range[1]):
        raise ModelError(f"an input range is two numbers such as 0,255 or -1,1, the lower one first, got {list(input_range)}")
    extent = None if input_range is None else (float(input_range[0]), float(input_range[1]))
    if mean is None and std is None:
        return Preprocessing(None, None, extent, layout or "nchw", bool(bgr))
    channels = max(len(mean or ()), len(std or ()))
    means, stds = (tuple(float(number) for number in given) * (channels if len(given) == 1 else 1) for given in (mean or [0.0], std or [1.0]))
    if len(means) != len(stds):
        raise ModelError(f"mean and std have one number, or one for each channel, got {len(means)} and {len(stds)}")
    return Preprocessing(means, stds, extent, layout or "nchw", bool(bgr))


def _is_numbers(given: object) -> bool:
    return given is None or (isinstance(given, list | tuple) and len(given) > 0 and all(isinstance(number, int | float) for number in given))
