"""Run by test_sanitizers.py under the address sanitizer: python sanitized.py LIBRARY. Without torch, for speed."""

import importlib.util
import itertools
import sys

import numpy as np

spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)

BFLOAT16, FLOAT32, FLOAT64 = 1, 0, 3
ITEM = {BFLOAT16: np.uint16, FLOAT32: np.float32, FLOAT64: np.float64}


class Images:
    """Channels [first, first + channels) of an NHWC array of exactly its size."""

    def __init__(self, shape, dtype, first=0, after=0):
        n, c, h, w = shape
        wide = first + c + after
        self.array = np.zeros(n * h * w * wide, ITEM[dtype])
        address = self.array.ctypes.data + first * self.array.itemsize
        self.view = (address, dtype, n, c, h, w, h * w * wide, 1, w * wide, wide)


class Planes:
    """The same of an NCHW array."""

    def __init__(self, shape, dtype, first=0):
        n, c, h, w = shape
        self.array = np.zeros(n * (first + c) * h * w, ITEM[dtype])
        address = self.array.ctypes.data + first * h * w * self.array.itemsize
        self.view = (address, dtype, n, c, h, w, (first + c) * h * w, h * w, w, 1)


class Weights:
    def __init__(self, channels, taps, dtype):
        self.array = np.zeros(channels * taps, ITEM[dtype])
        self.view = (self.array.ctypes.data, dtype, 1, channels, 1, taps, 0, taps, 0, 1)


def run(kernel_size, stride, dilation, channels, size, dtype, first):
    h, w = size
    pad = dilation * (kernel_size - 1) // 2
    conv = (kernel_size, stride, dilation, pad, pad)
    out = ((h - 1) // stride + 1, (w - 1) // stride + 1)
    x, dx = (Images((2, channels, h, w), dtype, first) for _ in range(2))
    y, dy = (Images((2, channels, *out), dtype, first) for _ in range(2))
    weight, dweight = (Weights(channels, kernel_size**2, dtype) for _ in range(2))
    bias, dbias = (Weights(channels, 1, dtype) for _ in range(2))
    engine.dwconv(x.view, weight.view, bias.view, y.view, conv, 1, 0, 0)
    engine.dwconv(x.view, weight.view, None, y.view, conv, 0, 0, 0)
    engine.dwconv_backward_activation(dy.view, x.view, weight.view, bias.view, y.view, conv, 2, 0, 0)
    engine.dwconv_backward_input(dy.view, weight.view, dx.view, conv, 0, 0)
    room = np.zeros(engine.dwconv_backward_weight_workspace(dy.view, conv), np.uint8)
    sums = dweight.view, dbias.view, conv, 1.0, room.ctypes.data, 0, 0
    engine.dwconv_backward_weight(dy.view, x.view, *sums)


def run_filter(size, channels, dtype, first):
    spectrum = 2 * size * (size // 2 + 1)
    for layout in (Images, Planes):
        x, y, dy, dx = (layout((2, channels, size, size), dtype, first) for _ in range(4))
        weight, dweight = (Weights(channels, spectrum, FLOAT32) for _ in range(2))
        views = [(*w.view[:4], size, spectrum // size, 0, spectrum, spectrum // size, 1) for w in (weight, dweight)]
        engine.global_filter(x.view, views[0], y.view, 0, 0)
        room = np.zeros(engine.global_filter_backward_workspace(dy.view), np.uint8)
        for wanted in (dx.view, views[1]), (None, views[1]), (dx.view, None):
            engine.global_filter_backward(dy.view, x.view, views[0], *wanted, room.ctypes.data, 0, 0)


def run_aggregation(channels, size, dtype, first):
    h, w = size
    f, dh, df = (Images((2, channels, h, w), dtype, first) for _ in range(3))
    both = Images((2, channels + 8, h, w), dtype, first)
    address, _, n, wide, *rest = both.view
    hidden = (address, dtype, n, channels, *rest)
    d = (address + channels * both.array.itemsize, dtype, n, wide - channels, *rest)
    weight, bias, decompose = (Weights(channels, taps, dtype) for taps in (9, 1, 1))
    scores = Images((2, 1, h, w), FLOAT32)
    given = f.view, weight.view, bias.view, decompose.view
    room = np.zeros(engine.channel_aggregation_workspace(f.view), np.uint8)
    engine.channel_aggregation(*given, None, hidden, d, scores.view, room.ctypes.data, 0, 0)
    room = np.zeros(engine.channel_aggregation_backward_workspace(f.view), np.uint8)
    engine.channel_aggregation_backward(*given, scores.view, hidden, dh.view, room.ctypes.data, 0, 0)
    engine.channel_aggregation_backward_input(dh.view, f.view, weight.view, df.view, room.ctypes.data, 0, 0)


cases = itertools.product([(7, 1, 1), (7, 1, 3), (3, 2, 1)], [(8, 0), (12, 4), (9, 1)], [(7, 9), (1, 5)])
for (kernel_size, stride, dilation), (channels, first), size in cases:
    for dtype in (BFLOAT16, FLOAT32):
        run(kernel_size, stride, dilation, channels, size, dtype, first)
run(3, 3, 2, 5, (6, 7), FLOAT64, 2)
for size, channels, first in ((7, 33, 2), (14, 5, 0), (24, 17, 0)):
    run_filter(size, channels, BFLOAT16, first)
for channels, size, first in ((33, (5, 7), 1), (9, (1, 40), 0)):
    for dtype in (BFLOAT16, FLOAT32):
        run_aggregation(channels, size, dtype, first)
print("clean")
