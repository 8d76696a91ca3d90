"""Parameters as kernels and products take them.

Autocast leaves those of composite ops in float32 (`uncast`): their gradients then come in float32 at once, and what has
to be of half type is converted here, all of it in one launch on a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._allocation import allocate

Convert = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float]], None]


def convert(sources: Sequence[Tensor], targets: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Each target = source * factor."""
    for source, target, factor in zip(sources, targets, factors, strict=True):
        if factor == 1:
            target.copy_(source)
        else:
            torch.mul(source.to(target.dtype), factor, out=target)


def convert_cuda(sources: Sequence[Tensor], targets: Sequence[Tensor], factors: Sequence[float]) -> None:
    from ..kernels import convert as triton

    if any(t.dtype == torch.float64 for t in targets):
        convert(sources, targets, factors)
    else:
        triton.convert([t.contiguous() for t in sources], targets, factors)


def converted(
    run: Convert,
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    scaled: Sequence[Tensor | None] = (),
    scale: float = 1.0,
) -> list[Any]:
    """`tensors` in this dtype, then `scaled` times scale in float32 at least, as half types would be rounded twice.

    Those that are as wanted are the given ones.
    """
    results: list[Any] = [*tensors, *scaled]
    sources, targets, factors = [], [], []
    for k, t in enumerate(results):
        if t is None:
            continue
        to, factor = (dtype, 1.0) if k < len(tensors) else (torch.promote_types(t.dtype, torch.float32), scale)
        if t.dtype != to or factor != 1:
            results[k] = allocate(t.shape, t, dtype=to)
            sources.append(t)
            targets.append(results[k])
            factors.append(factor)
    if sources:
        run(sources, targets, factors)
    return results
