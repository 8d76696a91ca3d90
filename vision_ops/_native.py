"""The compiled kernels, or the reason why they are not there."""

import functools
import importlib
import os
import shutil
import sysconfig
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

# Before our binaries: they then share the OpenMP threads of torch, whatever the file name of its libgomp.
import torch
from torch import Tensor

from . import _internals
from ._build_info import gpu_code, read_build_info

_ROOT = Path(__file__).parent
_INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def _load(part: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"{__package__}._{part}"), None
    except ImportError as error:
        if list(_ROOT.glob(f"_{part}.*")):
            return None, f"the compiled {part.upper()} kernels could not be loaded: {error}"
        built = build_info.get(part, {})
        return None, built.get(
            "reason"
        ) or f"the {part.upper()} kernels were not compiled (pip install -e . compiles them)"


build_info = read_build_info()
cpu, cpu_missing = _load("cpu")
if cpu is not None:
    cpu.follow_thread_count(torch.get_num_threads)
    _asked = os.environ.get("VISION_OPS_CPU_ISA", cpu.isa)
    if _asked not in _INSTRUCTION_SETS:
        warnings.warn(
            f"VISION_OPS_CPU_ISA={_asked!r} is not one of {_INSTRUCTION_SETS}; {cpu.isa!r} is used", stacklevel=2
        )
cuda, cuda_missing = _load("cuda")
_triton_absent = None if find_spec("triton") else "Triton is not installed (pip install triton)"


def device_kind(t: Tensor) -> str:
    """The type of the device of t, which decides what runs. The ledger (benchmarks/ledger) puts its own function in the
    place of this one, so that meta tensors take CUDA's way: nothing else asks for the type to choose by it."""
    return "cpu" if t.is_cpu else t.device.type  # whose name takes longer than all else


def cpu_kernels() -> ModuleType:
    """The CPU kernels, where a predicate has found that they are there."""
    assert cpu is not None
    return cpu


def cuda_kernels() -> ModuleType:
    """The CUDA kernels, likewise."""
    assert cuda is not None
    return cuda


def kernel_name(device: str) -> str:
    return f"C++ kernel ({cpu_kernels().isa})" if device == "cpu" else "CUDA kernel"


def gpu_missing(index: int) -> str | None:
    """Why the CUDA kernels cannot run on a GPU; None if they can."""
    if cuda_missing or torch.compiler.is_compiling():  # compiled, a GPU that cannot run them raises at the first call
        return cuda_missing
    return _gpu_missing(index)


@functools.cache
def _gpu_missing(index: int) -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch was not built for CUDA"
    driver, needed = cuda_kernels().versions()
    if driver // 1000 < needed // 1000:
        have, need = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, needed))
        return f"the driver supports CUDA {have}, and the kernels were compiled with {need}: it has to be updated"
    major, minor = torch.cuda.get_device_capability(index)
    archs = build_info.get("cuda", {}).get("archs", [])
    if gpu_code(archs, 10 * major + minor) is None:
        return f"the CUDA kernels have no code for sm_{major}{minor}, only {', '.join(archs)}"
    return None


def triton_missing(index: int) -> str | None:
    """Why the Triton kernels cannot run on a GPU; None if they can."""
    if _triton_absent or torch.compiler.is_compiling():  # as above
        return _triton_absent
    return _triton_missing(index)


@functools.cache
def _triton_missing(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.cuda is None or major < 8:
        return f"the Triton kernels need an NVIDIA GPU of sm_80 or later, this one is sm_{major}{minor}"
    # With these Triton compiles what launches a kernel, at the first launch.
    compiler = os.environ.get("CC")
    if not any(map(shutil.which, ("gcc", "clang") if compiler is None else (compiler,))):
        return f"Triton needs a C compiler, and {compiler or 'neither gcc nor clang'} is not on PATH"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not header.exists():
        return f"Triton needs Python's headers, and there is no {header} (Debian: python3-dev)"
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # whatever keeps it from compiling or from finding the driver
        return f"Triton does not start: {error}"
    return None


def run(kernel: str, *given: Any) -> None:
    """Calls a kernel of the CPU: maps (N, C, H, W) and vectors (C,) go as their views, all else as it is."""
    if not _read_by_kernels:
        given = tuple(view(a) if isinstance(a, Tensor) else a for a in given)
    getattr(cpu_kernels(), kernel)(*given)


def target(t: Tensor) -> tuple[int, int]:
    """Where the CUDA kernels run: the device of t and torch's current stream there."""
    return t.device.index, _internals.current_stream(t.device.index)


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# How the bindings take a tensor: (address, dtype, N, C, H, W, and their strides). They read a CPU's tensors themselves,
# in a tenth of the time, a map or vector from the tensor, others from (tensor, Reading of csrc/tensors.h), unless this
# PyTorch has another version of what they read by. The caller keeps the tensor alive.
View: TypeAlias = tuple[Any, ...] | Tensor | None
_read_by_kernels = cpu is not None and _internals.exchanges_tensors and cpu.reads_tensors(torch.empty(1, device="cpu"))
_CHANNELS, _TOKENS, _MATRIX = 1, 2, 3


def view(t: Tensor | None) -> View:
    """A map (N, C, H, W), or `vectors_view`."""
    if t is None or (_read_by_kernels and t.is_cpu):
        return t
    return (t.data_ptr(), DTYPES[t.dtype], *t.shape, *t.stride()) if t.ndim == 4 else vectors_view(t)


def channels_view(t: Tensor | None) -> View:
    """Numbers of channels, contiguous: weights (C, 1, K, K) as a (1, C, 1, K*K) view, (C,) as a (1, C, 1, 1) one."""
    if t is None:
        return None
    if _read_by_kernels and t.is_cpu:
        return t, _CHANNELS
    taps = t.shape[-1] ** 2 if t.ndim == 4 else 1
    return t.data_ptr(), DTYPES[t.dtype], 1, t.shape[0], 1, taps, 0, taps, 0, 1


def tokens_view(t: Tensor | None) -> View:
    """(B, N, C) as a (B, C, N, 1) view."""
    if t is None:
        return None
    if _read_by_kernels and t.is_cpu:
        return t, _TOKENS
    (b, n, c), (sample, token, channel) = t.shape, t.stride()
    return t.data_ptr(), DTYPES[t.dtype], b, c, n, 1, sample, channel, token, 1


def vectors_view(t: Tensor | None) -> View:
    """(B, C) as a (B, C, 1, 1) view, (C,) as one of one sample."""
    if t is None or (_read_by_kernels and t.is_cpu):
        return t
    b, sample = (1, 0) if t.ndim == 1 else (len(t), t.stride(0))
    return t.data_ptr(), DTYPES[t.dtype], b, t.shape[-1], 1, 1, sample, t.stride(-1), 1, 1


def matrix_view(w: Tensor) -> View:
    """A matrix as a (1, 1, O, I) view, (B, O, I) as a (B, 1, O, I) one."""
    if _read_by_kernels and w.is_cpu:
        return w, _MATRIX
    b, sample = (1, 0) if w.ndim == 2 else (len(w), w.stride(0))
    return (w.data_ptr(), DTYPES[w.dtype], b, 1, *w.shape[-2:], sample, 0, *w.stride()[-2:])
