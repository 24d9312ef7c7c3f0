"""How large the tuples of a pickle are when they are written out, found without unpickling it."""

from __future__ import annotations

import contextlib
import pathlib
import pickletools
import zipfile
from typing import IO

_LARGEST = 10**6  # entries of one tuple, those of its entries included
_LEGACY = 5  # pickles at the start of a file in torch's older format; bytes of tensors follow


def has_bomb(path: pathlib.Path) -> bool:
    """Whether a file of weights holds a tuple that is small in the file and vast written out: a pair of a pair of a pair ...

    As the key of a dictionary it would be hashed entry by entry, for years, and no signal stops that. A file that cannot be read has none: torch says why.
    """
    with contextlib.suppress(Exception), path.open("rb") as file:  # of many kinds, for all that a file may hold in place of a pickle
        if file.read(4) != b"PK\3\4":  # by which torch tells archives from its older format
            file.seek(0)
            return any(_vast(file) for _ in range(_LEGACY))
        with zipfile.ZipFile(file) as archive:
            return any(_vast(archive.open(name)) for name in archive.namelist() if name.endswith("data.pkl"))
    return False


def _vast(file: IO[bytes]) -> bool:
    """Whether one pickle does: the stack of a pickle machine, with sizes in place of values."""
    stack: list[int | None] = []  # None is a mark
    memo: dict[object, int | None] = {}
    for code, argument, _ in pickletools.genops(file):
        if code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if code.name == "MEMOIZE" else argument] = stack[-1]
        elif code.name == "MARK":
            stack.append(None)
        else:
            size = 1 + sum(_taken(stack, code)) * code.name.startswith("TUPLE")
            if size > _LARGEST:
                return True
            stack += [size] * len(code.stack_after)
    return False


def _taken(stack: list[int | None], code: pickletools.OpcodeInfo) -> list[int]:
    """The sizes of what an operation takes from the stack: so many values, or all down to a mark and so many below it."""
    below, taken = len(code.stack_before), list[int]()
    if pickletools.markobject in code.stack_before:
        below = code.stack_before.index(pickletools.markobject)
        while (size := stack.pop()) is not None:
            taken.append(size)
    return [*taken, *(stack.pop() or 1 for _ in range(below))]
