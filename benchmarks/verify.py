"""Whether a result is right: its error may be twice that of eager PyTorch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What an op may be off by where eager happens to be exact, relative to the largest exact value.
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def complaints(fused: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> list[str]:
    """What is wrong with `fused`, an output and the gradients of the inputs in their order."""
    names = ["output", *(f"gradient of input {i}" for i in range(len(exact) - 1))]
    found = (_complaint(*tensors) for tensors in zip(fused, eager, exact, strict=True))
    return [f"{name}: {text}" for name, text in zip(names, found, strict=True) if text]


def _complaint(fused: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    if fused.shape != eager.shape or fused.dtype != eager.dtype:
        return f"is {tuple(fused.shape)} {fused.dtype}, must be {tuple(eager.shape)} {eager.dtype}"
    of_eager = _error(eager, exact)
    if math.isnan(of_eager):  # oneDNN's bfloat16 weight gradients are NaN at times
        of_eager = 0.0
    error, allowed = _error(fused, exact), 2 * of_eager + FLOORS[eager.dtype] * _largest(exact)
    if exact.numel() == 1:  # one sum, which may cancel: eager's own error says little of what is usual
        allowed *= 4
    # Written so that a NaN fails too.
    return None if error <= allowed else f"error {error:.2e}, allowed {allowed:.2e}"


def _error(values: Tensor, exact: Tensor) -> float:
    return _largest(values.double() - exact)


def _largest(values: Tensor) -> float:
    return values.abs().max().item()
