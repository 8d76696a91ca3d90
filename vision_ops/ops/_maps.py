"""What ops on maps (N, C, H, W) share: the layouts that kernels take."""

import torch
from torch import Tensor

from ._pointwise import multiplies_as_is, operand


def pixel_dense(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """t if its lines are gapless in memory, channels of pixels or pixels of planes; channel slices are. Else a copy."""
    n, c, h, w = t.shape
    pixel = t.stride(2) if w == 1 else t.stride(3)
    gapless = h == 1 or w == 1 or t.stride(2) == w * pixel
    lined = (c == 1 or t.stride(1) == 1) if memory_format == torch.channels_last else (pixel == 1 or h * w == 1)
    return t if gapless and lined else t.contiguous(memory_format=memory_format)


def channels_last_dense(t: Tensor) -> Tensor:
    return pixel_dense(t, torch.channels_last)


def product_dense(t: Tensor) -> Tensor:
    """The same for the products and sums of CPUs, without a copy of what ours take as it is."""
    return t if multiplies_as_is(t) else operand(channels_last_dense(t))
