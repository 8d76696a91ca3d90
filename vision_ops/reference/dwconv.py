from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "silu": F.silu}


def four_paddings(padding: int | Sequence[int] | None, kernel_size: int, dilation: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of what the `padding` argument may be."""
    if padding is None:
        padding = dilation * (int(kernel_size) - 1) // 2
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    top, bottom, left, right = padding
    return top, bottom, left, right


def dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] | None = None,
    dilation: int = 1,
    activation: str | None = None,
) -> Tensor:
    """act(conv2d(x, weight, bias, groups=C)); arguments as in `fused_dwconv`.

    Mixed dtypes are computed in the widest of them; the result has that of x.
    """
    dtype = x.dtype
    widest = torch.promote_types(dtype, weight.dtype)
    if bias is not None:
        widest = torch.promote_types(widest, bias.dtype)
        bias = bias.to(widest)
    x, weight = x.to(widest), weight.to(widest)
    top, bottom, left, right = four_paddings(padding, weight.shape[-1], dilation)
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    y = F.conv2d(x, weight, bias, stride=stride, padding=(top, left), dilation=dilation, groups=weight.shape[0])
    return ACTIVATIONS[activation](y).to(dtype)
