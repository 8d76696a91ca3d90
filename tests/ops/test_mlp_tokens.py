"""`fused_mlp` on tokens: as many as take its passes into a crew."""

import pytest
import torch

from vision_ops import fused_mlp


@pytest.mark.parametrize("shape", [(4, 196), (784,), (4, 14, 14)])
def test_any_number_of_dimensions(shape):
    x, fc1, fc2 = torch.randn(*shape, 128), torch.randn(512, 128) / 11, torch.randn(128, 512) / 22
    expected = fused_mlp(x, fc1, None, fc2, None, backend="reference")
    assert (fused_mlp(x, fc1, None, fc2, None) - expected).abs().max() < 1e-5 * expected.abs().max()
