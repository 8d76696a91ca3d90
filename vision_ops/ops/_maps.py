"""What ops on maps (N, C, H, W) share: the layouts that kernels take."""

import torch
from torch import Tensor

from ._allocation import allocate, memory_format
from ._pointwise import multiplies_as_is, operand


def pixel_dense(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """t if its lines are gapless in memory, channels of pixels or pixels of planes; channel slices are. Else a copy."""
    if t.is_contiguous(memory_format=memory_format):
        return t
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


def as_map(t: Tensor) -> Tensor:
    """(N, ..., C) as (N, C, H, W), a view wherever there is one."""
    if t.ndim == 4:
        return t.permute(0, 3, 1, 2)
    tokens = t[:, None] if t.ndim == 2 else t.flatten(1, -2)
    return tokens.transpose(1, 2)[..., None]


def as_tokens(t: Tensor, like: Tensor) -> Tensor:
    """A map in the shape of what it was made from."""
    return t.permute(0, 2, 3, 1) if like.ndim == 4 else t[..., 0].transpose(1, 2).reshape(like.shape)


def empty_tokens(t: Tensor, dtype: torch.dtype) -> Tensor:
    """An output in the shape and the layout of t, (N, ..., C): a tensor of its own, as views that an autograd.Function
    returns cannot be written in place."""
    if memory_format(as_map(t)) == torch.channels_last or t.ndim == 2:
        return allocate(t.shape, t, dtype=dtype)
    n, *spatial, channels = t.shape
    strides = [1]
    for size in reversed(spatial[1:]):
        strides.insert(0, strides[0] * size)
    plane = strides[0] * spatial[0]
    return allocate(t.shape, t, dtype=dtype, strides=(channels * plane, *strides, plane))
