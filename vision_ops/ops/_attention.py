"""What the ops of attention share: checks of their arguments, and what the Triton kernels take of a head."""

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._checks import autocast_enabled, check_integer, check_parameter, check_tensor


def check_qkv(q: Any, k: Any, v: Any, dims: str) -> None:
    """Three tensors of one shape and, but under autocast, one dtype."""
    check_tensor("q", q, dims)
    for name, t in (("k", k), ("v", v)):
        check_tensor(name, t, dims)
        check_parameter(name, t, tuple(q.shape), "as q", q, "q")
        if t.dtype != q.dtype and not autocast_enabled(q):
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {t.dtype}")


def check_tokens(x: Any, dims: str, num_heads: Any) -> int:
    """Tokens whose channels are those of so many heads. Returns the channels."""
    check_tensor("x", x, dims)
    check_integer("num_heads", num_heads, 1)
    channels = x.shape[-1]
    if channels % num_heads:
        raise ValueError(f"x must have a multiple of num_heads={num_heads} channels, got {channels}")
    return channels


def check_projection(name: str, weight: Any, bias: Any, outputs: int, why: str, x: Tensor) -> None:
    """<name>_weight, (outputs, C), and <name>_bias, (outputs,) or None."""
    check_parameter(f"{name}_weight", weight, (outputs, x.shape[-1]), f"{why}, C", x)
    if bias is not None:
        check_parameter(f"{name}_bias", bias, (outputs,), why, x)


def triton_reasons(x: Tensor, channels: int, most: int) -> list[str]:
    """Why the Triton kernels cannot take x with so many channels in a head."""
    if _native.device_kind(x) != "cuda":
        return []
    reasons = ["the Triton kernels do not take float64"] if x.dtype == torch.float64 else []
    if channels > most:
        reasons.append(f"the Triton kernels take at most {most} channels in a head, x has {channels}")
    return reasons
