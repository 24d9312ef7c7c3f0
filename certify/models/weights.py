"""State dicts: files of tensors, opened without running any code in them, and put into an architecture that is named. What is no such file is said by name."""

from __future__ import annotations

import functools
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import CertifyError
from certify.models.pickles import has_bomb
from lipnet.checkpoint import first_line

_LARGEST = 64 * 2**30  # bytes that an archive may unpack to
_RATIO = 200  # times its own size; weights hardly compress
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema", "state_dict_ema", "weights")
_PREFIX = re.compile(r"^(module|model|_orig_mod|net)\.")
_DEEPEST = 16  # wrappers inside each other; a list that holds itself has no end
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_HOW = "save the weights alone, with torch.save(net.state_dict(), ...), and name the architecture with --arch"
_TRUST = f"{_HOW}, or add --trust-file if you made this file"


class ModelError(CertifyError):
    """One sentence: what was asked, what was found, what to do next."""


class NeedsTrust(ModelError):
    """A file whose loading can run code: `kind` is "pickle", "script" or "exported"."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def read_state_dict(path: pathlib.Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file that torch.save wrote, on the CPU, and where in it they were (": ..." or nothing).

    Only tensors and plain containers are read (`weights_only`). A whole module, TorchScript and an exported program run code: `NeedsTrust`. Raises ModelError
    with what the file is, where it is not what its name says.
    """
    _check_kind(path)
    if has_bomb(path):
        raise ModelError(f"{path}: it holds tuples in tuples that are vast when they are written out; no weights do, so it is not opened")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; those of the unpickler are long and advise to switch the protection off
        if "weights_only" in str(error).lower() or "WeightsUnpickler" in str(error):
            raise NeedsTrust("pickle", f"{path}: it holds a whole pickled module, or other objects, and loading those can run code; {_TRUST}") from None
        raise ModelError(f"{path}: torch cannot read it ({first_line(error)}); it may be cut short: fetch it again, or {_HOW}") from None
    return unwrapped(path, found)


def check_start(path: pathlib.Path) -> bytes:
    """The first bytes of a model. Raises ModelError for what is no model at all: an empty file, a page, a pointer."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ModelError(f"{path}: it is empty; fetch it again")
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(f"{path}: it is an HTML page and not a model; a download link often leads to a page first: fetch the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: it is a pointer of Git LFS and not the file itself; run git lfs pull, or fetch the file")
    return start


def _check_kind(path: pathlib.Path) -> None:
    """Refuse what is no file of weights by its first bytes and, for a zip archive, by its names and sizes."""
    start = check_start(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        raise ModelError(f"{path}: it is a safetensors file by another name; rename it to {path.stem}.safetensors, if lipnet.save wrote it")
    if not start.startswith(b"PK"):
        return  # torch's older format, or nothing that torch knows: it says so
    try:
        with zipfile.ZipFile(path) as archive:
            names, unpacked = archive.namelist(), sum(entry.file_size for entry in archive.infolist())
    except Exception:  # of many kinds: BadZipFile, names that are no text, versions that are not known
        raise ModelError(f"{path}: the archive is cut short or damaged; fetch it again") from None
    if unpacked > min(_LARGEST, _RATIO * path.stat().st_size + 2**20):
        raise ModelError(
            f"{path}: the archive would unpack to {unpacked / 2**30:.1f} GiB from {path.stat().st_size / 2**20:.1f} MiB; no weights do, so it is not opened"
        )
    if any(name.endswith(("/constants.pkl", "model.json")) or "/code/" in name for name in names):
        kind = "an exported program" if any(name.endswith("model.json") for name in names) else "TorchScript"
        raise NeedsTrust("script" if kind == "TorchScript" else "exported", f"{path}: it is {kind}, whose loading can run code; {_TRUST}")


def unwrapped(path: pathlib.Path, found: Any) -> tuple[dict[str, Tensor], str]:
    """The innermost mapping of names to tensors, without the prefixes that wrappers put before all of them. Raises ModelError where there is none."""
    where: list[str] = []
    while not _is_state_dict(found):
        if isinstance(found, Mapping):
            key: str | int | None = next((key for key in _WRAPPERS if key in found), None)
        else:
            key = 0 if isinstance(found, list | tuple) and len(found) == 1 else None
        if key is None or len(where) == _DEEPEST:
            keys = ", ".join(repr(key)[:40] for key in list(found)[:5] if isinstance(key, str)) if isinstance(found, Mapping) else ""
            what = f"a {type(found).__name__}{f' with {keys}' if keys else ''}"
            raise ModelError(f"{path}: it holds {what}, in which no state dict is found; {_HOW}")
        where.append(f"[{key!r}]")
        found = found[key]
    tensors = dict(found)
    _check_tensors(path, tensors)
    while tensors and all(_PREFIX.match(name) for name in tensors) and len({name.partition(".")[0] for name in tensors}) == 1:
        where.append(f"without the prefix {next(iter(tensors)).partition('.')[0]}.")
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return tensors, " ".join(where)


def _check_tensors(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no stored numbers: without storage, sparse, quantized, complex, or spread over more entries than the file has bytes for."""
    for name, tensor in tensors.items():
        strange = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu"
        if not name.isprintable():
            raise ModelError(f"{path}: it has a tensor by the name {name!r:.80}, which is no text; {_HOW}")
        if strange or tensor.dtype not in _DTYPES:
            kind = f"{tensor.dtype} on {tensor.device}, {tensor.layout}{', quantized' if tensor.is_quantized else ''}"
            raise ModelError(f"{path}: the tensor {name!r:.80} is {kind}; plain tensors of float16 to float64 or of whole numbers can be read; {_HOW}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelError(f"{path}: the tensor {name!r:.80} of sizes {tuple(tensor.shape)} is spread over fewer stored numbers; {_HOW}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > min(_LARGEST, _RATIO * path.stat().st_size + 2**20):
        raise ModelError(f"{path}: its {len(tensors)} tensors share storage, and apart they are {size / 2**30:.1f} GiB; no weights are; {_HOW}")


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, Mapping) and bool(found) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())


def fill(net: nn.Module, tensors: Mapping[str, Tensor], what: str) -> nn.Module:
    """The network with these numbers, in eval mode. Raises ModelError that names the tensors that do not fit, are missing or are left over."""
    own = net.state_dict()
    missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    unlike = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or left or unlike:
        parts = [f"{len(unlike)} of {len(own)} tensors do not fit: {_sizes(unlike, tensors, own)}"] if unlike else []
        parts += [f"the file lacks {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"] if missing else []
        parts += [f"the architecture has no {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}"] if left else []
        raise ModelError(f"{what}: {'; '.join(parts)}; name the architecture that these weights were trained in")
    other = next((name for name in own if own[name].is_floating_point() != tensors[name].is_floating_point()), None)
    if other is not None:
        raise ModelError(
            f"{what}: {other} is {tensors[other].dtype} in the file, {own[other].dtype} in the architecture; numbers of another kind are not taken"
        )
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    net = net.to(functools.reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else torch.float32))  # no number loses a digit
    net.load_state_dict(dict(tensors))
    return net.eval()


def _sizes(names: list[str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    shown = [
        f"{name} is {'x'.join(map(str, tensors[name].shape))} in the file, {'x'.join(map(str, own[name].shape))} in the architecture" for name in names[:2]
    ]
    return ", ".join(shown)
