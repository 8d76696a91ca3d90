"""The machine a result was measured on: what it is, what is installed on it, and how fast it can copy and multiply."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Step, Stopwatch

ROOT = Path(__file__).resolve().parent.parent
# A CPU copies what its caches hold faster than its memory; a GPU's L2 is flushed before every call.
COPY_BYTES = {"cpu": (1 << 20, 8 << 20, 64 << 20, 256 << 20), "cuda": (1 << 30,)}
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Rates:
    """Bytes read and written per second, by the bytes moved, and flop/s of a matrix product."""

    copy: Mapping[int, float]
    gemm: float

    def floor(self, moved: int, flops: int) -> float:
        """Seconds below which a pass over `moved` bytes with `flops` operations cannot come."""
        smaller = max((size for size in self.copy if size <= moved), default=0)
        # The best rate from there on: what holds up the start of a small copy is no part of a floor.
        rate = max(rate for size, rate in self.copy.items() if size >= smaller)
        return max(moved / rate, flops / self.gemm)


def measure_rates(device: str, dtype: torch.dtype, stopwatch: Stopwatch) -> Rates:
    size = GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    gemms: list[Step] = [lambda: torch.mm(a, b)]
    if device == "cpu":
        # The product as a convolution is oneDNN's, which on some processors is three times as fast as the BLAS.
        pixels, weight = a.reshape(1, size, size, 1).to(memory_format=torch.channels_last), b[:, :, None, None]
        gemms.append(lambda: torch.conv2d(pixels, weight))
    fastest = min(_best_seconds(stopwatch, gemm) for gemm in gemms)
    return Rates({moved: _copy_rate(device, moved, stopwatch) for moved in COPY_BYTES[device]}, 2 * size**3 / fastest)


def _copy_rate(device: str, moved: int, stopwatch: Stopwatch) -> float:
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return moved / _best_seconds(stopwatch, lambda: target.copy_(source))


def _best_seconds(stopwatch: Stopwatch, step: Step) -> float:
    """A ceiling is what the machine can do, so other programs' share of the time is left out."""
    sample = stopwatch.sampler(step)
    return min(sample() for _ in range(15))


def describe(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["tf32"] = {"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}
    return {**facts, "vision_ops": _package_facts()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "vision_ops"):
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except (ImportError, AttributeError):
            continue
    return found


def commit() -> dict[str, Any] | None:
    """Of this tree; `changes` tells two dirty trees apart."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    if head is None:
        return None
    text = f"{changes}\n{_git('diff', 'HEAD')}" if changes else ""
    return {"id": head, "dirty": bool(changes), "changes": text and hashlib.sha256(text.encode()).hexdigest()[:12]}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16: of AVX-512, AMX or Arm."""
    return "bf16" in _cpuinfo("flags") + _cpuinfo("Features")


def _cpuinfo(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _package_facts() -> Any:
    try:
        return importlib.import_module("vision_ops.info").describe()
    except (ImportError, AttributeError):
        return None
