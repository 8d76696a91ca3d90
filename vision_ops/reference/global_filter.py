import math

import torch
from torch import Tensor

from ._resize import resize


def resize_filter(weight: Tensor, height: int, width: int) -> Tensor:
    """A filter (C, h, w, 2) for rfft2 of another size, interpolated as the official code does it in forward."""
    if weight.shape[1:3] == (height, width):
        return weight
    return resize(weight.permute(3, 0, 1, 2), (height, width), align_corners=True).permute(1, 2, 3, 0)


def _angles(frequencies: int, n: int, like: Tensor) -> Tensor:
    k = torch.arange(frequencies, device=like.device)[:, None] * torch.arange(n, device=like.device)
    return (k % n).to(like.dtype) * (2 * math.pi / n)


def _filter_without_fft(x: Tensor, weight: Tensor) -> Tensor:
    """The same with the transforms as matrix products, which export where complex numbers do not."""
    height, width = x.shape[2:]
    rows, columns = _angles(height, height, x), _angles(width // 2 + 1, width, x)
    # What the columns that rfft leaves out add to the real result; those that are their own mirror image count once.
    mirrored = torch.arange(width // 2 + 1, device=x.device)
    counts = torch.where((mirrored == 0) | (2 * mirrored == width), 1, 2).to(x.dtype)
    real, imaginary = x @ columns.cos().T, -(x @ columns.sin().T)
    cos, sin = rows.cos(), rows.sin()
    real, imaginary = cos @ real + sin @ imaginary, cos @ imaginary - sin @ real
    w_real, w_imaginary = weight.unbind(-1)
    real, imaginary = real * w_real - imaginary * w_imaginary, real * w_imaginary + imaginary * w_real
    real, imaginary = cos @ real - sin @ imaginary, cos @ imaginary + sin @ real
    return ((real * counts) @ columns.cos() - (imaginary * counts) @ columns.sin()) / (height * width)


def global_filter(x: Tensor, complex_weight: Tensor) -> Tensor:
    """irfft2(rfft2(x) * W); arguments as in `fused_global_filter`.

    Half types are computed in float32 and rounded once. While exporting to ONNX, without FFT.
    """
    dtype = x.dtype
    compute = torch.promote_types(torch.promote_types(dtype, complex_weight.dtype), torch.float32)
    height, width = x.shape[2:]
    x, weight = x.to(compute), resize_filter(complex_weight.to(compute), height, width // 2 + 1)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        if torch.onnx.is_in_onnx_export() or x.shape[0] == 0:  # an FFT refuses empty batches
            return _filter_without_fft(x, weight).to(dtype)
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.complex(*weight.unbind(-1))
        return torch.fft.irfft2(spectrum, s=(height, width), norm="ortho").to(dtype)
