from collections.abc import Sequence

import torch
from torch import Tensor

from .dwconv import dwconv


def split_channels(channels: int, split: Sequence[int]) -> tuple[int, int, int]:
    """The widths of the three branches; integers, where the official code rounds floats down and can lose a channel."""
    second, third = (int(channels) * int(part) // sum(map(int, split)) for part in split[1:])
    return int(channels) - second - third, second, third


def multi_order_dwconv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dilations: Sequence[int] = (1, 2, 3),
    split: Sequence[int] = (1, 3, 4),
) -> Tensor:
    """MogaNet's multi-order depthwise convolution; arguments as in `fused_multi_order_dwconv`."""
    b0, b1, b2 = biases or (None, None, None)
    d0, d1, d2 = dilations
    x0 = dwconv(x, weights[0], b0, dilation=d0)
    low, middle, high = torch.split(x0, split_channels(x.shape[1], split), dim=1)
    return torch.cat(
        [low, dwconv(middle, weights[1], b1, dilation=d1), dwconv(high, weights[2], b2, dilation=d2)], dim=1
    )
