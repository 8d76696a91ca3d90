"""Where outputs, gradients and workspaces come from, and in which layouts."""

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_format(t: Tensor) -> torch.memory_format:
    """The format of what is computed from t: channels_last where its channels are neighbours, slices included."""
    return torch.contiguous_format if t.is_contiguous() or t.stride(1) != 1 else torch.channels_last


def allocate(
    shape: Sequence[int],
    like: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Where every output of every kernel comes from; the tests fill it with NaN. strides: in place of a format."""
    if strides is None:
        if memory_format is torch.contiguous_format:
            return like.new_empty(shape, dtype=dtype)
        _, c, h, w = shape
        strides = h * w * c, 1, w * c, c
    # Half the time of torch.empty with a format.
    return like.new_empty_strided(shape, strides, dtype=dtype)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An output in the memory format of `like`, for the kernels and for the fakes alike."""
    return allocate(shape, like, memory_format(like))


def allocate_contiguous(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return allocate(shape, like, dtype=dtype)


def channels_dense(t: Tensor) -> bool:
    """Whether neighbouring channels are neighbours in memory, as the march kernels of CUDA want."""
    return t.stride(1) == 1 or t.shape[1] == 1


def to_channels_dense(t: Tensor) -> Tensor:
    return t if channels_dense(t) else t.contiguous(memory_format=torch.channels_last)


def allocate_channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    return allocate(shape, like, torch.channels_last)


def workspace(size: int, like: Tensor) -> Tensor:
    return allocate((size // like.element_size(),), like)


def gradient_like(t: Tensor, grad: Tensor) -> Tensor:
    """An empty gradient of t, in the layout of `grad`, that of y, where t has none of its own."""
    if t.is_contiguous() or (t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return torch.empty_like(t)  # takes half the time
    if not any(t.stride()) and t.shape == grad.shape:
        return allocate(t.shape, t, memory_format(grad) if t.ndim == 4 else torch.contiguous_format)
    return empty(t.shape, t) if t.ndim == 4 and t.shape[1] > 1 else allocate(t.shape, t)
