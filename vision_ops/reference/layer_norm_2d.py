import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the channels of every pixel; arguments as in
    `fused_layer_norm_2d`."""
    y = layer_norm_pixels(x.permute(0, 2, 3, 1), weight, bias, eps).permute(0, 3, 1, 2)
    channels_last = x.stride(1) == 1 and not x.is_contiguous()
    return y if channels_last else y.contiguous()


def layer_norm_pixels(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same of (N, H, W, C).

    Half inputs are computed in float32 and rounded once; so PyTorch's own layer norm computes them, which takes the
    channels last.
    """
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if _native.device_kind(x) == "cuda" and weight.dtype == bias.dtype == dtype:
        wide = dtype  # its statistics are float32, while the CPU's are half unless the parameters are float32
    elif _native.device_kind(x) != "cpu":
        x = x.to(wide)  # only the CPU's takes float32 parameters beside half values
    return F.layer_norm(x, weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)
