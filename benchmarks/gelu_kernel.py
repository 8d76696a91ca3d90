"""A kernel bound by arithmetic: the erf GELU over and over on values that stay in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gelu_kernel(x_ptr, y_ptr, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    for _ in tl.static_range(TIMES):
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(y_ptr + at, x)


def repeated_gelu(x: Tensor, y: Tensor, times: int) -> None:
    """x.numel() is a multiple of 1024."""
    with torch.cuda.device_of(x):
        gelu_kernel[(x.numel() // 1024,)](x, y, TIMES=times, BLOCK=1024)
