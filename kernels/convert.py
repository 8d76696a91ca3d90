"""Parameters as an op's kernels and products take them, all of them in one launch: in another dtype, times a factor."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._moves import moves

BLOCK = 1024  # with four warps a thread has a vector; not measured


@triton.jit
@moves("targets")
def convert_kernel(
    sources, targets, factors, ends, counts, TENSORS: tl.constexpr, SUM_TYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Blocks up to ends[k] have the numbers of the first k tensors."""
    block, begin = tl.program_id(0), 0
    for k in tl.static_range(TENSORS):
        if (block >= begin) & (block < ends[k]):
            i = (block - begin) * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(sources[k] + i, mask=i < counts[k], other=0.0).to(SUM_TYPE) * factors[k]
            tl.store(targets[k] + i, values.to(targets[k].dtype.element_ty), mask=i < counts[k])
        begin = ends[k]


KERNELS = (convert_kernel,)


def convert(sources: Sequence[Tensor], targets: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Each target = source * factor, all contiguous; nothing is float64."""
    blocks = [triton.cdiv(t.numel(), BLOCK) for t in sources]
    ends = tuple(sum(blocks[: k + 1]) for k in range(len(blocks)))
    with torch.cuda.device_of(sources[0]):
        convert_kernel[(ends[-1],)](
            tuple(sources),
            tuple(targets),
            tuple(factors),
            ends,
            tuple(t.numel() for t in sources),
            TENSORS=len(sources),
            SUM_TYPE=tl.float32,
            BLOCK=BLOCK,
            num_warps=4,
        )
