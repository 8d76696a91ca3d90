"""Triton kernels, imported as vision_ops.kernels; importing this package does not import triton."""
