"""A launch: what it moves and computes, and how long that should take."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from benchmarks.ledger import constants as c

KINDS = ("Triton", "CUDA C++", "PyTorch", "cast")
# What a launch is to a network: a kernel of ours, a product or convolution of PyTorch's, or all else.
PARTS = ("ours", "product", "glue", "cast")


@dataclass(frozen=True)
class Launch:
    """kind: one of KINDS, "cast" those of autocast. multiply_adds: on tensor cores by the bytes of a number, or on none
    (0). blocks, and how many of them an SM holds at once, where that is known."""

    name: str
    kind: str
    read: int
    written: int
    multiply_adds: int = 0
    number_bytes: int = 0
    convolves: str | None = None  # a key of DEPTHWISE
    blocks: int = 0
    resident: int = 0
    host_us: float = 0.0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def part(self) -> str:
        if self.kind in ("Triton", "CUDA C++"):
            return "ours"
        return "cast" if self.kind == "cast" else "product" if self.multiply_adds else "glue"

    @property
    def waves(self) -> float:
        return self.blocks / (c.SMS * self.resident) if self.resident else 0.0

    @property
    def idle(self) -> float:
        """The share of the SMs' time that its last wave of blocks leaves empty; of blocks that all are resident, that
        some SMs have one more than others."""
        filled = self.waves if self.waves > 1 else self.blocks / c.SMS
        return 1 - filled / math.ceil(filled) if self.resident else 0.0

    @property
    def us(self) -> float:
        flops = 2 * self.multiply_adds
        computed = flops / (c.TC[self.number_bytes] if self.number_bytes else c.CC)
        bound = max(self.bytes / c.BW, computed)
        kind = {"ours": "ours", "product": "product"}.get(self.part, "pointwise")
        share = c.DEPTHWISE[self.convolves] if self.convolves else c.EFF[kind]
        return max(bound / share / (1 - self.idle) * 1e6, c.GAP_US)


def resident_blocks(kernel: str, shared: int) -> int:
    """Of a kernel of CUDA C++, whose last template argument is how many blocks an SM holds (`__launch_bounds__`)."""
    declared = re.search(r"(?:march|filter)\w*_kernel<.*?(\d+)>", kernel)
    return min(int(declared[1]), c.SHARED_BYTES // (shared + c.RESERVED_BYTES)) if declared else 0
