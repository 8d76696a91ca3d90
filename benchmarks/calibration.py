"""The constants of the roofline model: what a GPU and PyTorch's own kernels on it really do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.costs import kernels, synchronize
from benchmarks.measure import Step, Stopwatch

DTYPES = (torch.bfloat16, torch.float32)
GELUS = 64  # in a row, so that the memory does not count


@dataclass
class Bench:
    """`small` shrinks everything, to run the machinery where there is no GPU."""

    device: str
    small: bool = False
    constants: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def seconds(self, step: Step) -> float:
        sample = Stopwatch(self.device).sampler(step)
        return statistics.median(sample() for _ in range(3 if self.small else 9))

    def keep(self, name: str, **found: Any) -> dict[str, Any]:
        self.measured[name] = found
        return found

    def normal(self, *shape: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        t = torch.randn(shape, device=self.device).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if channels_last else t


def ceilings(bench: Bench) -> dict[str, Any]:
    """BW, TC and CC: bytes copied and flop of matrix products per second, in TF32 too; plain float32 bounds FFMA."""
    rates, allowed = {}, torch.backends.cuda.matmul.allow_tf32
    stopwatch = Stopwatch(bench.device)
    if bench.small:
        size = 128
        a = bench.normal(size, size, dtype=torch.float32)
        bench.constants.update(BW=1e9, TC_2=1e9, TC_4=1e9, CC=2 * size**3 / bench.seconds(lambda: a @ a))
        return bench.keep("ceilings", **bench.constants)
    products = {"TC_2": (torch.bfloat16, False), "TC_4": (torch.float32, True), "CC": (torch.float32, False)}
    for name, (dtype, tf32) in products.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            rates[name] = machine.measure_rates(bench.device, dtype, stopwatch)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
        bench.constants[name] = rates[name].gemm
    bench.constants["BW"] = max(rates["TC_2"].copy.values())
    return bench.keep("ceilings", **bench.constants)


def pointwise(bench: Bench) -> dict[str, Any]:
    """EFF: the share of the bandwidth that an ordinary pointwise kernel reaches."""
    a, b = (bench.normal(1 << (12 if bench.small else 27), dtype=torch.bfloat16) for _ in range(2))
    seconds = bench.seconds(lambda: a + b)
    bench.constants["EFF"] = 3 * a.nbytes / bench.constants["BW"] / seconds
    return bench.keep("pointwise", seconds=seconds)


def dispatch(bench: Bench) -> dict[str, Any]:
    """CPU_US and GAP_US: microseconds of a small kernel, launched by the host and inside a CUDA graph."""
    x, count = torch.zeros(64, device=bench.device), 20 if bench.small else 1000

    def launches() -> None:
        for _ in range(count):
            x.add_(1.0)

    def wall(step: Callable[[], object]) -> float:
        step()
        synchronize(bench.device)
        start = time.perf_counter()
        step()
        synchronize(bench.device)
        return (time.perf_counter() - start) / count * 1e6

    bench.constants["CPU_US"] = wall(launches)
    if bench.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        bench.constants["GAP_US"] = wall(graph.replay)
    return bench.keep("dispatch", launches=count)


def depthwise(bench: Bench) -> dict[str, Any]:
    """NAIVE_* and CUDNN_*: PyTorch's depthwise convolutions, contiguous (ATen's) and channels_last (cuDNN's)."""
    batch, channels, size = (1, 4, 8) if bench.small else (128, 64, 28)
    found, taps_per_second, of_roofline = {}, {}, {}
    for dtype in DTYPES:
        for kernel, dilation in ((5, 1), (7, 1), (7, 3)):
            for layout, last in (("contiguous", False), ("channels_last", True)):
                x = bench.normal(batch, channels, size, size, dtype=dtype, channels_last=last)
                weight = bench.normal(channels, 1, kernel, kernel, dtype=dtype)
                for which, step in _conv_passes(x, weight, dilation).items():
                    seconds = bench.seconds(step)
                    taps = x.numel() * kernel**2
                    roofline = max(2 * x.nbytes / bench.constants["BW"], 2 * taps / bench.constants["CC"])
                    key = f"k{kernel} d{dilation} {which} {layout} {str(dtype)[6:]}"
                    found[key] = {"taps_per_s": taps / seconds, "of_roofline": roofline / seconds}
                    group = layout, "wgrad" if which == "wgrad" else "fwd"
                    taps_per_second.setdefault(group, []).append(taps / seconds)
                    of_roofline.setdefault(group, []).append(roofline / seconds)
    bench.constants["NAIVE_FWD"] = statistics.median(taps_per_second["contiguous", "fwd"])
    bench.constants["NAIVE_WG"] = statistics.median(taps_per_second["contiguous", "wgrad"])
    bench.constants["CUDNN_DW"] = statistics.median(of_roofline["channels_last", "fwd"])
    bench.constants["CUDNN_WG"] = statistics.median(of_roofline["channels_last", "wgrad"])
    return bench.keep("depthwise", **found)


def _conv_passes(x: Tensor, weight: Tensor, dilation: int) -> dict[str, Step]:
    padding = dilation * (weight.shape[-1] - 1) // 2
    grad = torch.randn_like(x)

    def backward(*mask: bool) -> Step:
        window = [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], x.shape[1]
        return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *window, mask)

    return {
        "fwd": lambda: F.conv2d(x, weight, padding=padding, dilation=dilation, groups=x.shape[1]),
        "dgrad": backward(True, False, False),
        "wgrad": backward(False, True, False),
    }


def gelu(bench: Bench) -> dict[str, Any]:
    """GELU: the erf form in float32 operations, from a kernel that does nothing else."""
    if bench.device != "cuda":
        return bench.keep("gelu", skipped="a Triton kernel on a GPU")
    from benchmarks.gelu_kernel import repeated_gelu

    x = bench.normal(1 << 24, dtype=torch.float32)
    y = torch.empty_like(x)
    none, many = (bench.seconds(lambda n=n: repeated_gelu(x, y, n)) for n in (0, GELUS))
    bench.constants["GELU"] = (many - none) / GELUS / x.numel() * bench.constants["CC"]
    return bench.keep("gelu", seconds_without=none, seconds_with=many, times=GELUS)


def attention(bench: Bench) -> dict[str, Any]:
    """Which kernels scaled_dot_product_attention with a bias runs at MOAT's stages, and whether N = 64 is finite."""
    found, batch = {}, 1 if bench.small else 128
    for tokens, heads in ((196, 12), (49, 24), (64, 8)):
        q, k, v = (bench.normal(batch, heads, tokens, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        bias = bench.normal(1, heads, tokens, tokens, dtype=torch.bfloat16).requires_grad_()
        step = _attention_step(q, k, v, bias)
        found[f"N{tokens}"] = {
            "finite": all(bool(t.isfinite().all()) for t in step()),
            "seconds": bench.seconds(step),
            "kernels": kernels(step, bench.device, most=8)["kernels"],
        }
    return bench.keep("attention", **found)


def _attention_step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return (y, *torch.autograd.grad(y.float().square().sum(), (q, k, v, bias)))

    return step


MEASUREMENTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "ceilings of copies and matrix products": ceilings,
    "pointwise kernels": pointwise,
    "launch overhead": dispatch,
    "PyTorch's depthwise convolutions": depthwise,
    "erf GELU": gelu,
    "scaled_dot_product_attention": attention,
}
