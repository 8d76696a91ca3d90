"""Between the halves of blocks nothing is copied, added or multiplied: a half-block is one node."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vision_ops import _native, use_backend
from vision_ops.models import create_model

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=str(_native.cpu_missing))
GLUE = ("add", "add_", "mul", "mul_", "copy_", "clone", "_to_copy", "cat", "stack")


class Counted(TorchDispatchMode):
    """The calls of PyTorch's own ops that make activations, of a batch of two, by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in GLUE and isinstance(result, torch.Tensor) and result.ndim >= 3 and len(result) == 2:
            self.calls[name] += 1
        return result


# EdgeNeXt's convolutions, and MogaNet's batch norms, read what the residual behind them reads, too: autograd adds their
# gradients.
@pytest.mark.parametrize(
    ("name", "size", "options", "expected"),
    [
        ("hornet_tiny_7x7", 64, {"depths": (1, 1, 2, 1)}, {}),
        ("s2mlpv2_small_7", 112, {"depth": (1, 2)}, {}),
        ("edgenext_small", 64, {"depths": (2, 2, 2, 2)}, {"add": 8 + 1}),  # and one map of positions
        ("moganet_tiny", 64, {"depths": (1, 1, 2, 1)}, {"add": 2 * 5}),
        ("tiny_moat_0", 64, {"depths": (1, 1, 2, 1)}, {}),
    ],
)
def test_a_step_has_no_glue(name, size, options, expected):
    model = create_model(name, drop_path_rate=0.1, **options).to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with use_backend("auto"), Counted() as counted:
        model(x).sum().backward()
    assert counted.calls == expected
