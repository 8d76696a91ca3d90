"""The C++ kernels of attention with relative position, with the signatures of the Triton ones in
kernels/relative_attention.py.

q, k, v, y and their gradients are (B, heads, N, d) with any strides. Tables have the size of their windows and are
contiguous; they and lse, (B, heads, N), are float32, float64 for float64.
"""

from typing import NamedTuple

from torch import Tensor

from .. import _native


class Geometry(NamedTuple):
    """A map, the windows that tile it from its upper left end on, and the scale of the logits."""

    height: int
    width: int
    window_height: int
    window_width: int
    scale: float

    @property
    def table_size(self) -> tuple[int, int]:
        return 2 * self.window_height - 1, 2 * self.window_width - 1


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, geometry: Geometry, y: Tensor, lse: Tensor) -> None:
    """y = softmax(scale * q k^T + bias) v; lse = the logarithm of what the softmax divides by."""
    given = *map(_native.view, (q, k, v)), _table_view(table), geometry
    _native.cpu_kernels().relative_attention(*given, _native.view(y), _table_view(lse))


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    geometry: Geometry,
    y: Tensor | None,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dtable: Tensor | None,
) -> None:
    """y, which the Triton kernels make use of, may be missing."""
    given = *map(_native.view, (dy, q, k, v)), _table_view(table), geometry, _table_view(lse)
    grads = *map(_native.view, (dq, dk, dv)), _table_view(dtable)
    _native.cpu_kernels().relative_attention_backward(*given, *grads)


def _table_view(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else _native.view(t[None])
