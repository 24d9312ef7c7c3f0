"""What the two searches by branch and bound have in common: nodes in batches, each of which decides some gates."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_N = TypeVar("_N", bound="Nodes")


@dataclasses.dataclass(frozen=True, eq=False)
class Nodes(abc.ABC):
    """Some nodes; every field has a row for each."""

    decided: Tensor  # (nodes, gates): 1 open, -1 shut, 0 not decided

    def __len__(self) -> int:
        return len(self.decided)

    def part(self: _N, which: Tensor | slice) -> _N:
        """Some of them."""
        return type(self)(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))

    @classmethod
    def joined(cls: type[_N], parts: Sequence[_N]) -> _N:
        """One batch of several."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(cls)))

    def split(self: _N, of: Tensor, gates: Tensor) -> _N:
        """Node `of[i]` with gate `gates[i]` open, and after all these, shut."""
        children = self.part(torch.cat([of, of]))
        both = torch.cat([torch.ones(len(of), dtype=torch.int8), -torch.ones(len(of), dtype=torch.int8)])
        children.decided[torch.arange(len(children)), torch.cat([gates, gates])] = both
        return children
