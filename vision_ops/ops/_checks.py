"""Refusals of bad arguments. Every message names the argument, what it was and what it must be."""

from typing import Any

import torch
from torch import Tensor

from .. import _native

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast_enabled(x: Tensor) -> bool:
    kind = _native.device_kind(x)
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast_dtype(x: Tensor) -> str | None:
    """The name of the dtype in which autocast multiplies x, as an op's argument; None if it is that of x."""
    dtype = torch.get_autocast_dtype(_native.device_kind(x)) if autocast_enabled(x) else x.dtype
    return None if x.dtype in (dtype, torch.float64) else str(dtype).removeprefix("torch.")


def check_tensor(name: str, t: Any, dims: str) -> None:
    """A dense floating-point tensor with the dimensions that `dims` names, e.g. "N, C, H, W", or "..., C" for two and
    more."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout != torch.strided or t.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if t.is_nested else t.layout}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
    if t.ndim < 2 if dims.startswith("...") else t.ndim != dims.count(",") + 1:
        raise ValueError(f"{name} must have the dimensions ({dims}), got shape {tuple(t.shape)}")
    if t.numel() == 0 and 0 in t.shape[1:]:
        raise ValueError(f"{name} may be empty in N only, got shape {tuple(t.shape)}")


def check_parameter(name: str, t: Any, shape: tuple[int, ...], why: str, x: Tensor, of: str = "x") -> None:
    """A parameter of exactly this shape, on the device of x, in its dtype or, beside a half x, in float32. `of`: the
    name of x."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout != torch.strided or t.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if t.is_nested else t.layout}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} ({why}), got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}, got {t.device}")
    if t.dtype == x.dtype:
        return
    mixed = t.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    # Autocast casts all but float64.
    cast = t.dtype in FLOATS and (t.dtype == torch.float64) == (x.dtype == torch.float64) and autocast_enabled(x)
    if not mixed and not cast:
        raise TypeError(f"{name} must have the dtype of {of}, {x.dtype}, or float32 beside a half {of}, got {t.dtype}")


def check_pointwise(name: str, weight: Any, sizes: tuple[int | None, int], why: str, x: Tensor, of: str = "x") -> None:
    """The weight of a 1x1 convolution, (O, I) or (O, I, 1, 1); O may be any where sizes has None."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(weight).__name__}")
    ones = (1, 1) if weight.ndim == 4 else ()
    outputs = sizes[0] or (weight.shape[0] if weight.ndim in (2, 4) and weight.shape[0] else 1)
    check_parameter(name, weight, (outputs, sizes[1], *ones), why + ", 1, 1" * bool(ones), x, of)


def check_sigma(sigma: Any, channels: int, why: str, x: Tensor) -> None:
    """MogaNet's factor per channel, (C,) or (1, C, 1, 1)."""
    flat = not isinstance(sigma, Tensor) or sigma.ndim == 1
    check_parameter("sigma", sigma, (channels,) if flat else (1, channels, 1, 1), why if flat else f"1, {why}, 1, 1", x)


def check_kernel(name: str, weight: Any) -> int:
    """The kernel size K of depthwise weights (C, 1, K, K), which is odd; the rest is for check_parameter to see."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(weight).__name__}")
    if weight.layout != torch.strided or weight.is_nested or weight.ndim == 0:
        return 1
    if weight.shape[-1] % 2 == 0:
        raise ValueError(f"{name} must have an odd kernel size, got shape {tuple(weight.shape)}")
    return weight.shape[-1]


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} must be {f'from {low} to {high}' if high is not None else f'at least {low}'}, got {value}"
        )


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_eps(eps: Any) -> None:
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")


def check_momentum(momentum: Any) -> None:
    if not isinstance(momentum, (int, float)) or isinstance(momentum, bool):
        raise TypeError(f"momentum must be a float, got {type(momentum).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be from 0 to 1, got {momentum}")


def check_sequence(name: str, value: Any, length: int | None = None) -> None:
    if isinstance(value, (Tensor, str)) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        size = "" if length is None else f" of {length}"
        raise ValueError(f"{name} must be a sequence{size}, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must be a sequence of {length}, got {len(value)}")


def check_vector(name: str, t: Any, length: int, why: str, x: Tensor) -> None:
    """(length,), in any floating-point dtype, on the device of x; may be None."""
    if t is None:
        return
    check_tensor(name, t, why)
    if t.shape[0] != length:
        raise ValueError(f"{name} must have shape {(length,)} ({why}), got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def check_path_scale(t: Any, x: Tensor) -> None:
    """A factor for every sample, which has no gradient."""
    check_vector("path_scale", t, x.shape[0], "N", x)
    if t is not None and t.requires_grad:
        raise ValueError("path_scale has no gradient here: pass path_scale.detach()")


def check_beside(name: str, t: Any, x: Tensor, dims: str) -> None:
    """A tensor of the shape of x, in a dtype of its own."""
    check_tensor(name, t, dims)
    if t.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
