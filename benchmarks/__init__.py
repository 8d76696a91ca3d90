"""python -m benchmarks: fused ops against eager PyTorch and torch.compile.

Run from the repository root, never installed.
"""

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("forward", "train")
LAYOUTS = ("contiguous", "channels_last")
SECTIONS = ("build", "test", "ops", "sanitize", "models")  # of gpu-check
