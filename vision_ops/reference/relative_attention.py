import torch
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
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v; arguments as in `fused_relative_attention`. mask is added to the logits."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if bias_table is not None:
        logits = logits + relative_bias(bias_table, height, width).to(logits.dtype)
    if mask is not None:
        logits = logits + mask
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(dim=-1, dtype=dtype).to(v.dtype) @ v
