"""Bilinear interpolation of planes (N, C, h, w), and its backward pass."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native


def resize(planes: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """F.interpolate, on GPUs as products with matrices: its own backward pass adds in no fixed order there."""
    if _native.device_kind(planes) != "cuda":
        return F.interpolate(planes, tuple(size), mode="bilinear", align_corners=align_corners)
    rows, columns = _matrices(planes, planes.shape[2:], size, align_corners)
    return (rows @ planes.double() @ columns.t()).to(planes.dtype)


def resize_backward(grad: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """The gradient of planes of this size."""
    if _native.device_kind(grad) != "cuda":
        resized, shape = grad.shape[2:], (*grad.shape[:2], *size)
        return torch.ops.aten.upsample_bilinear2d_backward(grad, resized, shape, align_corners)
    rows, columns = _matrices(grad, size, grad.shape[2:], align_corners)
    return (rows.t() @ grad.double() @ columns).to(grad.dtype)


def _matrices(like: Tensor, before: Sequence[int], after: Sequence[int], align_corners: bool) -> tuple[Tensor, ...]:
    """A and B of A planes B^T, in float64, which neither autocast nor TF32 rounds."""

    def matrix(n: int, m: int) -> Tensor:
        unit = torch.eye(n, dtype=torch.float64, device=like.device)[None]
        return F.interpolate(unit, m, mode="linear", align_corners=align_corners)[0].t()

    return tuple(matrix(n, m) for n, m in zip(before, after, strict=True))
