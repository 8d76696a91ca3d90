"""`python -m vision_ops`: what was built, what this machine has, and what each op would run and why."""

import importlib.metadata
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._build_info import gpu_code, read_build_info
from ._version import __version__


def describe() -> dict[str, Any]:
    """The same facts as data, for bug reports and benchmark files."""
    facts: dict[str, Any] = {
        "vision_ops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "build": read_build_info(),
    }
    if find_spec("torch") is None:
        return facts
    import torch

    from . import _native

    facts["cpu"] = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native.cpu.isa if _native.cpu else None,
        "missing": _native.cpu_missing,
    }
    facts["cuda"] = {"torch": torch.version.cuda, "missing": _native.cuda_missing, "gpus": _gpus()}
    return facts


def main() -> None:
    facts = describe()
    versions = [f"{name} {facts[name] or 'not installed'}" for name in ("python", "torch", "triton", "numpy")]
    print(f"vision_ops {facts['vision_ops']}")
    print(f"  {', '.join(versions)}")
    print(f"  {facts['platform']}")
    _print_build(facts["build"])
    if "cpu" not in facts:
        print("\nPyTorch is not installed, so nothing can run: pip install 'torch>=2.11'")
        return
    cpu, cuda = facts["cpu"], facts["cuda"]
    print(f"\nCPU: {cpu['processor']}, {cpu['threads']} threads")
    print(f"  {cpu['missing'] or cpu['instruction_set'] + ' kernels in use'}")
    print(f"\nGPUs: {', '.join(gpu['name'] for gpu in cuda['gpus']) or 'none that torch can use'}")
    for gpu in cuda["gpus"]:
        print(f"  {gpu['name']} (sm_{gpu['capability']}): {gpu['kernels']}")
    if cuda["missing"]:
        print(f"  {cuda['missing']}")
    _print_ops([gpu["index"] for gpu in cuda["gpus"]])


def _print_build(build: dict[str, Any]) -> None:
    print("\nBuilt:")
    if not build:
        print("  nothing is on record: this is a source tree that was never installed (pip install -e .)")
        return
    for part in ("cpu", "cuda"):
        facts = build.get(part, {})
        if not facts.get("built"):
            print(f"  {part}: no; {facts.get('reason') or 'no reason on record'}")
            continue
        targets = ", ".join(facts.get("isas") or facts.get("archs") or [])
        print(f"  {part}: {targets}; {facts.get('compiler') or facts.get('nvcc')}")
    for flag in ("debug", "sanitize"):
        if build.get(flag):
            print(f"  {flag}: {build[flag]}")


# Of the first argument, by its dimensions; and the options that have no default.
_SHAPES = {
    "N, C, H, W": (1, 64, 56, 56),
    "B, H, W, C": (1, 56, 56, 64),
    "B, H, W, 3C": (1, 56, 56, 3 * 64),
    "..., C": (1, 56, 56, 64),
    "B, N, C": (1, 56 * 56, 64),
    "B, heads, d, N": (1, 4, 16, 56 * 56),
    "B, heads, N, d": (1, 4, 56 * 56, 16),
}
_OPTIONS = {
    "relative_attention": {"height": 56, "width": 56},
    "relative_self_attention": {"num_heads": 4},
    "xca": {"num_heads": 4},
}


def _print_ops(gpus: list[int]) -> None:
    import torch

    from ._explain import explain
    from .ops._registration import fused_ops

    print("\nOps, for a float32 image:")
    for device in ["cpu", *(f"cuda:{i}" for i in gpus)]:
        for name, op in sorted(fused_ops.items()):
            choice = explain(name, torch.empty(_SHAPES[op.dims], device=device), **_OPTIONS.get(name, {}))
            runs = ", ".join(f"{part} by {what}" for part, what in choice.parts.items())
            print(f"  {device:7} {name:24} {runs}")
            for reason in (*choice.cannot, *choice.slower):
                print(f"  {'':32} {reason}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        kernels = _gpu_kernels(index, major * 10 + minor)
        name = torch.cuda.get_device_name(index)
        found.append({"index": index, "name": name, "capability": major * 10 + minor, "kernels": kernels})
    return found


def _gpu_kernels(index: int, capability: int) -> str:
    from . import _native

    if _native.cuda is None:
        return "no compiled kernels"
    return _native.gpu_missing(index) or gpu_code(_native.build_info["cuda"]["archs"], capability) or ""
