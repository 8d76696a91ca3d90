from collections.abc import Sequence

import torch
from torch import Tensor

from .dwconv import dwconv


def cascade_widths(channels: int, scales: int) -> list[int]:
    """Channels of the `scales` splits: all as wide as the first, the last what is left."""
    width = -(-channels // scales)
    return [width] * (scales - 1) + [channels - (scales - 1) * width]


def split_cascade(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None) -> Tensor:
    """y_0 = dw_0(s_0), y_i = dw_i(y_{i-1} + s_i), cat(y..., last split); arguments as in `fused_split_cascade`."""
    width = weights[0].shape[0]
    outputs: list[Tensor] = []
    for i, (weight, bias) in enumerate(zip(weights, biases or [None] * len(weights), strict=True)):
        split = x[:, i * width : (i + 1) * width]
        outputs.append(dwconv(outputs[-1] + split if outputs else split, weight, bias))
    return torch.cat([*outputs, x[:, len(weights) * width :]], dim=1)
