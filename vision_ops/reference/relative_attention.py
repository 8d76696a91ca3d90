from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._resize import resize


def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """The bias (heads, height * width, height * width) of every query and key, from a table of any size."""
    size = 2 * height - 1, 2 * width - 1
    if table.shape[1:] != size:
        table = resize(table[None], size, align_corners=False)[0]
    y, x = torch.arange(height, device=table.device), torch.arange(width, device=table.device)
    rows = y[None, :] - y[:, None] + height - 1  # key - query
    columns = x[None, :] - x[:, None] + width - 1
    bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]
    return bias.reshape(-1, height * width, height * width)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None = None,
    *,
    height: int,
    width: int,
    window_size: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v; arguments as in `fused_relative_attention`."""
    h, w = (height, width) if window_size is None else window_size
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (h, w) == (height, width):
        return _attention(q, k, v, bias_table, h, w, scale, None)
    b, heads, _, d = q.shape
    bottom, right = -height % h, -width % w
    rows, columns = (height + bottom) // h, (width + right) // w

    def windows(t: Tensor) -> Tensor:
        """(B, heads, height * width, d) as (B * rows * columns, heads, h * w, d), padded with zeros."""
        t = F.pad(t.unflatten(2, (height, width)), (0, 0, 0, right, 0, bottom))
        t = t.reshape(-1, t.shape[1], rows, h, columns, w, t.shape[-1]).permute(0, 2, 4, 1, 3, 5, 6)
        return t.reshape(-1, t.shape[3], h * w, t.shape[-1])

    outside = windows(q.new_ones(1, 1, height * width, 1)).flatten(2)[:, :, None] == 0
    mask = q.new_zeros(outside.shape).masked_fill(outside, float("-inf")).repeat(b, 1, 1, 1)
    y = _attention(windows(q), windows(k), windows(v), bias_table, h, w, scale, mask)
    y = y.reshape(b, rows, columns, heads, h, w, d).permute(0, 3, 1, 4, 2, 5, 6)
    return y.reshape(b, heads, rows * h, columns * w, d)[:, :, :height, :width].flatten(2, 3)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    height: int,
    width: int,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """mask is added to the logits."""
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias_table is not None:
        logits = logits + relative_bias(bias_table, height, width).to(logits.dtype)
    if mask is not None:
        logits = logits + mask
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(dim=-1, dtype=dtype).to(v.dtype) @ v
