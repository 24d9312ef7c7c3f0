"""Devices of torch: one that can be used here, and float32 on it that is float32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from certify.errors import CertifyError
from lipnet.checkpoint import first_line


def usable(name: str) -> torch.device:
    """The device of this name; of several GPUs, the one of this process where torchrun or Slurm started some. Raises CertifyError for one that is not there."""
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and torch.cuda.device_count():
            local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
            device = torch.device("cuda", int(local) % torch.cuda.device_count())
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch without CUDA asserts
        raise CertifyError(f"torch cannot use the device {name!r} here: {first_line(error)}; take the device cpu") from None
    return device


@contextlib.contextmanager
def ieee() -> Iterator[None]:
    """On a GPU the factors of float32 products are not rounded to TF32, as torch does in convolutions, and every call takes the same algorithm."""
    cudnn: Any = torch.backends.cudnn
    parts: Any = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before, deterministic, benchmark = [part.fp32_precision for part in parts], cudnn.deterministic, cudnn.benchmark
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
