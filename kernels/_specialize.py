"""What Triton does not compile anew for.

It compiles a kernel for every combination of integers that are 1, multiples of 16 or neither. Strides and channels
decide how wide loads are. Counts change with the size of the batch and of the images, and decide nothing, but for the
length of lines in memory: where pixels are neighbours, a load is as wide as what its mask is a multiple of.
"""

from collections.abc import Callable
from typing import Any

import triton

_COUNTS = (
    "blocks",
    "programs",
    "shares",
    "chunks",
    "count",
    "images",
    "height",
    "width",
    "window_height",
    "window_width",
)
_LENGTHS = ("pixels", "tokens")


def counted(fn: Callable[..., Any]) -> Any:
    """`triton.jit` for kernels whose channels are neighbours in memory."""
    return triton.jit(fn, do_not_specialize=(*_COUNTS, *_LENGTHS))


class ByLayout:
    """`triton.jit` for kernels that take pixels or tokens as neighbours, too."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self._channels_last, self._lines = fn, counted(fn), triton.jit(fn, do_not_specialize=_COUNTS)

    def of(self, channels_last: bool) -> Any:
        """The kernel to launch. channels_last: channels are neighbours."""
        return self._channels_last if channels_last else self._lines
