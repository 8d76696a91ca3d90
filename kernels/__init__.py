"""Triton kernels and their launchers, imported as vision_ops.kernels; importing this package does not import triton.

One file an op; what is two things is two files, of which the one that the op imports has the launchers of both. A
launcher takes tensors (outputs too; the ops allocate them), picks the tile from shapes and dtype alone and launches on
the tensors' device and its current stream. A tile is a NamedTuple: constants and num_warps; nothing else decides how a
kernel is compiled. Tiles, thresholds and numbers of programs stand at the top of a file, with what they were chosen by;
those of maps are in `_maps`, which is what files share. Strides of a tensor are one argument, a tuple. KERNELS names
those of the file.
tests/kernels runs each in Triton's interpreter and compiles it, through its launcher, for every architecture.
"""

import torch
from torch import Tensor


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where every temporary of a launcher comes from; the tests fill it with NaN."""
    return torch.empty(shape, dtype=dtype, device=device)


def power_of_two(n: int) -> int:
    """The least one that is at least n, as the sides of Triton's tiles must be."""
    return 1 << max(0, n - 1).bit_length()
