from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._pointwise import pointwise
from .batch_norm_act import batch_norm_act
from .dwconv import dwconv


def same_padding(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of TensorFlow's "SAME" for a kernel of 3 at stride 2."""
    return height % 2, 1, width % 2, 1


def pad_same(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    top, bottom, left, right = same_padding(height, width)
    return F.pad(x, (left, right, top, bottom))


def pool_same(x: Tensor, pool_size: int) -> Tensor:
    """The average pool of MBConv's shortcut at stride 2. Windows that reach over the border average what is inside, as
    "SAME" pooling does."""
    if pool_size == 2:
        return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    inside = pad_same(torch.ones_like(x[:1, :1]))
    return F.avg_pool2d(pad_same(x), 3, 2) / F.avg_pool2d(inside, 3, 2)


def product_type(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of the products of a half x and float32 weights, and of what autocast gives: half weights beside any x."""
    return min(weight.dtype, x.dtype, key=lambda dtype: dtype.itemsize)


def mbconv(
    x: Tensor,
    pre_norm: Sequence[Tensor | None],
    expand_weight: Tensor,
    expand_norm: Sequence[Tensor | None],
    dw_weight: Tensor,
    depthwise_norm: Sequence[Tensor | None],
    shrink_weight: Tensor,
    shrink_bias: Tensor | None,
    *,
    se: Sequence[Tensor | None] | None = None,
    shortcut: Sequence[Tensor | None] | None = None,
    path_scale: Tensor | None = None,
    stride: int = 1,
    pool_size: int = 2,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-3,
) -> Tensor:
    """MOAT's MBConv; arguments as in `fused_mbconv`."""

    def norm(t: Tensor, parameters: Sequence[Tensor | None], activation: str | None = None) -> Tensor:
        weight, bias, *running = parameters
        options = {"training": training, "momentum": momentum, "eps": eps}
        return batch_norm_act(t, weight, bias, *running, **options, activation=activation)  # type: ignore[arg-type]

    dtype = product_type(x, expand_weight)
    y = norm(pointwise(norm(x, pre_norm).to(dtype), expand_weight), expand_norm, "gelu")
    y = dwconv(y, dw_weight) if stride == 1 else dwconv(pad_same(y), dw_weight, stride=2, padding=0)
    y = norm(y, depthwise_norm, "gelu")
    if se:
        reduce_weight, reduce_bias, expand, expand_bias = se
        pooled = F.silu(pointwise(y.mean(dim=(2, 3), keepdim=True), reduce_weight, reduce_bias))
        y = y * pointwise(pooled, expand, expand_bias).sigmoid()
    y = pointwise(y, shrink_weight, shrink_bias)
    if path_scale is not None:
        y = y * path_scale.to(y.dtype)[:, None, None, None]
    own = x if stride == 1 else pool_same(x, pool_size)
    if shortcut:
        own = pointwise(own.to(dtype), *shortcut)
    return own + y
