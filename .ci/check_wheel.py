"""What a wheel has to do where it was installed: run compiled kernels, with PyTorch's results."""

import torch

import vision_ops

x, weight = torch.randn(2, 64, 14, 14), torch.randn(64, 1, 7, 7)
with vision_ops.use_backend("fused"):
    y = vision_ops.fused_dwconv(x, weight)
torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, padding=3, groups=64), rtol=1e-4, atol=1e-4)
model = vision_ops.models.create_model("edgenext_xx_small").eval()
assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
