"""The compiled kernels, or the reason why they are not there."""

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# Before our binaries: they then share the OpenMP threads of torch, whatever the file name of its libgomp.
import torch
from torch import Tensor

from .info import read_build_info

_ROOT = Path(__file__).parent


def _load(part: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"vision_ops._{part}"), None
    except ImportError as error:
        if list(_ROOT.glob(f"_{part}.*")):
            return None, f"the compiled {part.upper()} kernels could not be loaded: {error}"
        built = build_info.get(part, {})
        return None, built.get(
            "reason"
        ) or f"the {part.upper()} kernels were not compiled (pip install -e . compiles them)"


build_info = read_build_info()
cpu, cpu_missing = _load("cpu")
cuda, cuda_missing = _load("cuda")
triton_missing = None if find_spec("triton") else "Triton is not installed (pip install triton)"


def kernels() -> ModuleType:
    """The CPU kernels, where a predicate has found that they are there."""
    assert cpu is not None
    return cpu


def kernel_name(device: str) -> str:
    return f"C++ kernel ({kernels().isa})" if device == "cpu" else "CUDA kernel"


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def view(t: Tensor | None) -> tuple[int, ...] | None:
    """A (N, C, H, W) tensor as the bindings take it. The caller keeps the tensor alive."""
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype], *t.shape, *t.stride())


def weight_view(w: Tensor | None) -> tuple[int, ...] | None:
    """Contiguous (C, 1, K, K) weights as a (1, C, 1, K*K) view, or (C,) biases as (1, C, 1, 1)."""
    if w is None:
        return None
    taps = w.shape[-1] ** 2 if w.ndim == 4 else 1
    return (w.data_ptr(), DTYPES[w.dtype], 1, w.shape[0], 1, taps, 0, taps, 0, 1)
