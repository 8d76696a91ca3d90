"""What predicted times are made of, for one H200: assumptions, which the first measurement replaces. The names are
those of calibration.py where it measures them."""

SMS = 132
SHARED_BYTES = 227 << 10  # of an SM
RESERVED_BYTES = 1 << 10  # of it, for every block

BW = 4.3e12  # bytes a second, read and written
TC = {2: 790e12, 4: 67e12, 8: 60e12}  # flop a second of products by the bytes of a number; float32 without TF32
CC = 67e12  # flop a second of float32 outside of tensor cores

# Shares of these that kernels reach.
EFF = {"pointwise": 0.8, "product": 0.8, "convolution": 0.8, "ours": 0.8}
DEPTHWISE = {"ours": 0.7, "ours, weights": 0.6, "cuDNN": 0.45, "cuDNN, weights": 0.2}  # of the bound of either kind

GAP_US = 1.6  # the shortest time of a kernel
# What the host takes for a launch, in Python all that is on the way to it.
HOST_US = {"Triton": 10.0, "CUDA C++": 3.0, "PyTorch": 5.0}
CALL_US = 5.0  # for a call of the binding of CUDA C++, which may launch several kernels
