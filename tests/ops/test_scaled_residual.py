"""What `test_battery` does not ask of the tail: dtypes of all kinds beside each other."""

import itertools

import pytest
import torch
from harness import FLOOR, relative_error

from vision_ops import fused_scaled_residual

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtypes", itertools.product(DTYPES, repeat=3), ids=str)
def test_dtypes_beside_each_other(dtypes, layout):
    """Those of x and branch, and of gamma and path_scale. Many channels: a sum that took another type for its own would
    write past its end."""
    x, branch = (torch.randn(2, 300, 3, 4, dtype=t).to(memory_format=layout) for t in dtypes[:2])
    gamma, path_scale = torch.randn(300, dtype=dtypes[2]), torch.tensor([0.0, 2.0], dtype=dtypes[2])
    found = []
    for backend, wide in (("fused", False), ("reference", False), ("reference", True)):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, branch, gamma)]
        y = fused_scaled_residual(*leaves, path_scale.double() if wide else path_scale, backend=backend)
        found.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for a, b, exact in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a.detach(), exact) <= 2 * relative_error(b.detach(), exact) + FLOOR[a.dtype]
