"""python -m benchmarks: fused ops against eager PyTorch and torch.compile.

Run from the repository root, never installed.
"""

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("forward", "train")
LAYOUTS = ("contiguous", "channels_last")
RUNS = ("correct", "fast")  # of gpu-check
