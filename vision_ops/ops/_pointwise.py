"""1x1 convolutions and their gradients as PyTorch's GEMMs, in any layout and without copies of slices."""

import torch
from torch import Tensor

from ._registration import allocate_channels_last


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = weight x + bias at every pixel of (N, C, H, W). Where x and out differ in layout, the GEMM changes it."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    rows, to = _pixels(x), _pixels(out)
    matrix, to_matrix = _matrix(rows), _matrix(to)
    if matrix is not None and to_matrix is not None:
        if bias is None:
            torch.mm(matrix, weight.t(), out=to_matrix)
        else:
            torch.addmm(bias, matrix, weight.t(), out=to_matrix)
        return
    many = weight.expand(len(x), *weight.shape)
    if to.stride(2) == 1:
        left, right, column = rows, many.transpose(1, 2), bias
    else:
        left, right, to = many, rows.transpose(1, 2), to.transpose(1, 2)
        column = None if bias is None else bias[:, None]
    if column is None:
        torch.bmm(left, right, out=to)
    else:
        torch.baddbmm(column, left, right, out=to)


def linear_to(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`linear` of a channels_last x into any layout. A GEMM that changes the layout takes longer than a copy does."""
    if out.shape[1] == 1 or out.stride(1) == 1:
        return linear(x, weight, bias, out)
    y = allocate_channels_last(out.shape, out)
    linear(x, weight, bias, y)
    out.copy_(y)


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor | None) -> None:
    """out = the gradient of the weight (O, I) or (O, I, 1, 1) of linear(x), given that of its result."""
    if out is None:
        return
    out, rows, columns = out.flatten(1), _pixels(x), _pixels(grad)
    matrix, grad_matrix = _matrix(rows), _matrix(columns)
    if matrix is not None and grad_matrix is not None:
        if out.dtype == x.dtype:
            torch.mm(grad_matrix.t(), matrix, out=out)
        else:
            out.copy_(torch.mm(grad_matrix.t(), matrix))
        return
    # Image by image: half types would round every image's share if they were summed in place.
    total = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
    for image, grad_image in zip(rows, columns, strict=True):
        total += torch.mm(grad_image.t(), image)
    out.copy_(total)


def _pixels(t: Tensor) -> Tensor:
    """(N, H * W, C), a view wherever one stride leads through the pixels."""
    return t.flatten(2).transpose(1, 2)


def _matrix(pixels: Tensor) -> Tensor | None:
    """(N * H * W, C), if that is a view."""
    if len(pixels) == 1:
        return pixels[0]
    return pixels.flatten(0, 1) if pixels.stride(0) == pixels.shape[1] * pixels.stride(1) else None
