"""MOAT's attention between the positions of a map, or of its windows, without its projections."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from .. import reference
from ..reference._resize import resize, resize_backward
from . import _relative
from ._allocation import allocate, allocate_contiguous
from ._attention import check_qkv, triton_reasons
from ._checks import check_integer, check_parameter, check_sequence
from ._devices import device_reasons, on_devices
from ._heads import wide
from ._registration import FusedOp
from ._relative import Geometry


class _Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias_table: Tensor | None
    height: int
    width: int
    window_height: int
    window_width: int
    scale: float


def _reference(a: _Arguments) -> Tensor:
    window = a.window_height, a.window_width
    return reference.relative_attention(*a[:4], height=a.height, width=a.width, window_size=window, scale=a.scale)


def _output(a: _Arguments) -> tuple[Tensor, Tensor]:
    """y in the order of v, so that merging the heads is a view where their channels are neighbours, and lse."""
    b, heads, n, d = a.v.shape
    if a.v.stride(1) < a.v.stride(2):
        y = allocate(a.v.shape, a.v, strides=(n * heads * d, d, heads * d, 1))
    else:
        y = allocate_contiguous(a.v.shape, a.v)
    return y, empty_lse(a.q)


# --- The attention of q, k and v, for this op and for the one that contains it. `kernels` are `_relative` or Triton's.


def empty_lse(q: Tensor) -> Tensor:
    return allocate_contiguous(q.shape[:3], q, wide(q.dtype))


def resized(table: Tensor | None, geometry: Geometry, like: Tensor) -> Tensor | None:
    """The table at the size of the windows, in the dtype of the kernels."""
    if table is None:
        return None
    table = table.to(wide(like.dtype))
    if table.shape[1:] != geometry.table_size:
        table = resize(table[None], geometry.table_size, align_corners=False)[0]
    return table.contiguous()


def attend_backward(
    kernels: ModuleType,
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    geometry: Geometry,
    y: Tensor | None,
    lse: Tensor,
    grads: Sequence[Tensor | None],
) -> None:
    """grads: of q, k, v and the table, which has any size."""
    *of_tokens, dtable = grads
    dresized = None
    if dtable is not None:
        dresized = allocate_contiguous((q.shape[1], *geometry.table_size), q, wide(q.dtype))
    kernels.backward(dy, q, k, v, resized(table, geometry, q), geometry, y, lse, *of_tokens, dresized)
    if dtable is None or dresized is None:
        return
    if dtable.shape != dresized.shape:
        dresized = resize_backward(dresized[None], dtable.shape[1:], align_corners=False)[0]
    dtable.copy_(dresized)


# --- The op


def _geometry(a: _Arguments) -> Geometry:
    return Geometry(*a[4:])


def cpu_attention() -> ModuleType:
    return _relative


def cuda_attention() -> ModuleType:
    from ..kernels import relative_attention

    return relative_attention


def _forward(attention: Callable[[], ModuleType], a: _Arguments) -> tuple[Tensor, Tensor]:
    y, lse = _output(a)
    if y.numel():
        attention().forward(a.q, a.k, a.v, resized(a.bias_table, _geometry(a), a.q), _geometry(a), y, lse)
    return y, lse


def _backward(
    attention: Callable[[], ModuleType], grads: list[Tensor | None], grad: Tensor, a: _Arguments, lse: Tensor
) -> None:
    if grad.numel():
        attend_backward(attention(), grad, *a[:4], _geometry(a), None, lse, grads)
    elif grads[3] is not None:
        grads[3].zero_()


_KERNELS = on_devices(_forward, _backward, cpu=cpu_attention, cuda=cuda_attention)
MOST_CHANNELS = 64  # of a head, of which a Triton program holds some queries and keys


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.q, _KERNELS, triton=True) + triton_reasons(a.q, a.q.shape[3], MOST_CHANNELS), []


_op = FusedOp(
    "relative_attention",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("bias_table",),
    saved=(Tensor.contiguous,),
    dims="B, heads, N, d",
)


def check_window(window_size: Any) -> None:
    if window_size is None:
        return
    check_sequence("window_size", window_size, 2)
    for side in window_size:
        check_integer("window_size", side, 1)


def check_scale(scale: Any) -> None:
    if scale is not None and (not isinstance(scale, (int, float)) or isinstance(scale, bool)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")


def check_table(table: Any, heads: int, x: Tensor, of: str) -> None:
    """(heads, height, width) of any size."""
    shape = tuple(table.shape) if isinstance(table, Tensor) else ()
    free = shape[1:] if len(shape) == 3 and 0 not in shape else (1, 1)
    check_parameter("bias_table", table, (heads, *free), "heads, height, width", x, of)


def fused_relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None = None,
    *,
    height: int,
    width: int,
    window_size: Sequence[int] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, between all positions of a map or of each of its windows.

    Args:
        q: (B, heads, height * width, d), any strides, views of a (B, N, 3C) tensor included; float32, bfloat16, float16
            or float64.
        k, v: as q, in its dtype. The output has the shape, dtype and order of v.
        bias_table: (heads, Th, Tw), in the dtype of q, or float32 beside a half q; None for no bias. The bias of a
            query and a key is what the table has at key - query + size - 1, once resized (bilinear, half-pixel) to
            (2 * window height - 1, 2 * window width - 1). Autocast leaves it alone.
        height, width: of the map.
        window_size: (height, width) of windows that tile the map from its upper left end on; those that reach over its
            end are cut there, as if padding were masked. None is one window, the map.
        scale: of the products, d ** -0.5 by default.
        backend: as in `vision_ops.use_backend`.

    Logits and softmax are float32 (float64 for float64), and exist for some queries at a time. Backward keeps the
    arguments and a number for each query and head, and computes the logits again. Gradients come in each argument's
    own dtype, that of the table through its resizing, and are bitwise repeatable. Without a kernel for the device, and
    on GPUs for float64 and for heads of more than 64 channels, `reference.relative_attention` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MOAT (arXiv 2210.01820), Attention in model/layers/moat_attention.py of google-research/deeplab2, which indexes its
    table likewise, but computes the bias once and for all.
    """
    check_qkv(q, k, v, "B, heads, N, d")
    for name, side in (("height", height), ("width", width)):
        check_integer(name, side, 1)
    if height * width != q.shape[2]:
        raise ValueError(f"height * width must be {q.shape[2]}, the tokens of q, got {height} * {width}")
    check_window(window_size)
    if bias_table is not None:
        check_table(bias_table, q.shape[1], q, "q")
    check_scale(scale)
    window = (height, width) if window_size is None else window_size
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return _op(q, k, v, bias_table, height, width, *window, scale, backend=backend)
