"""Parts that tell right from wrong; they run beside each other."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu_check.protocol import Skip, command
from benchmarks.networks import Scale

STICKY = 3  # failures in a row after which a process is given up: a CUDA error fails all that follows
TOOLS = ("compute-sanitizer", "ncu", "nvcc")


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def facts(scale: Scale) -> Iterator[dict[str, Any]]:
    """The machine, the tools, and what every op would run; an op without a kernel is a failure."""
    import torch

    from benchmarks.cases import OPS, Setting, ops_for

    yield {"machine": machine.describe(scale.device), "versions": machine.versions()}
    yield {"tools": {name: find_tool(name) for name in TOOLS}, "gpu": nvidia_smi()}
    for name, op in ops_for(scale.device, OPS).items():
        problem = op.problem(op.quick[0], Setting(scale.device, torch.bfloat16, "channels_last", 2))
        found = op.explain(problem)
        yield {"op": name, "runs": str(found)}
        if found.cannot:
            yield {"op": name, "verdict": "FAILED", "detail": f"no kernel: {'; '.join(found.cannot)}"}


def nvidia_smi() -> str | None:
    """Driver, memory and clocks, the latter as they are at rest and at most."""
    columns = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        done = subprocess.run(
            ("nvidia-smi", f"--query-gpu={columns}", "--format=csv"), capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def small_calls(scale: Scale, op: str) -> Iterator[dict[str, Any]]:
    """Forward and backward against float64, bfloat16 first."""
    import torch

    from benchmarks import small_calls
    from benchmarks.cases import OPS
    from benchmarks.costs import synchronize

    torch.backends.cudnn.allow_tf32 = False  # its errors would be allowed to ours
    failures = 0
    for what, problem in small_calls.problems(OPS[op], scale.device, small_calls.DTYPES[: 1 if scale.small else None]):
        try:
            wrong = small_calls.call(OPS[op], problem)
            synchronize(scale.device)
        except Exception as error:
            failures += 1
            yield {"call": what, "verdict": "FAILED", "detail": f"{what}: {type(error).__name__}: {error}"[:500]}
            if failures == STICKY:
                return
        else:
            failures = 0
            yield {"call": what, "verdict": "WRONG", "detail": f"{what}: {wrong}"} if wrong else {"call": what}


def bare_calls(scale: Scale) -> Iterator[dict[str, Any]]:
    """What the sanitizers watch: the small calls without a comparison."""
    from benchmarks import small_calls
    from benchmarks.cases import OPS, ops_for
    from benchmarks.costs import synchronize

    for op in ops_for(scale.device, OPS).values():
        for what, problem in small_calls.problems(op, scale.device, small_calls.DTYPES[:2]):
            small_calls.bare_call(op, problem)
            synchronize(scale.device)
            yield {"call": what}


def gpu_tests(scale: Scale, log: str, processes: int, select: Sequence[str]) -> Iterator[dict[str, Any]]:
    """pytest in several processes. It is counted while it runs, so that a run cut short tells how far it came."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    # A test file that lacks a package is an error of its own and does not keep the others from running.
    options = ["-v", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(processes), "--dist", "worksteal"]
    code = _run([sys.executable, "-m", "pytest", *options, *select], Path(log))
    text = Path(log).read_text(errors="replace")
    # "[gw0] [ 50%] PASSED tests/test_a.py::test_b", or without xdist "tests/test_a.py::test_b PASSED [ 50%]".
    progress = [line for line in text.splitlines() if "%]" in line and "::" in line]
    words = (re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", line) for line in progress)
    counts = Counter(word[0].lower() for word in words if word)
    last = (text.strip().splitlines() or [""])[-1]
    result = {"counts": dict(counts), "summary": last.strip("= ")}
    if code is None:
        yield result
        raise KeyboardInterrupt
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    if code not in (0, 5):  # 5: nothing was selected
        first = f", {failed[0]} among them" if failed else ""
        result |= {"verdict": "FAILED", "detail": f"{result['summary']}{first}; see {Path(log).name}"}
    yield {**result, "failed": failed[:50]}


def sanitize(scale: Scale, tool: str, log: str) -> Iterator[dict[str, Any]]:
    """compute-sanitizer on our kernels alone: it makes every kernel that it watches a hundred times slower."""
    program = find_tool("compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is not installed")
    names = [word for name in kernel_names() for word in ("--kernel-name", f"kernel_substring={name}")]
    calls = command("checks:bare_calls", scale.small)
    # In one block of memory that PyTorch cuts into tensors, no access would be out of bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    path = Path(log)
    options = ["--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no", *names]
    code = _run([program, *options, *calls], path, environment)
    text = path.read_text(errors="replace")
    done = text.count('"call"')
    said = [line.removeprefix("========= ") for line in text.splitlines() if line.startswith("=========")]
    errors = [line for line in said if re.search("Invalid|Misaligned|[Hh]azard|Error: Race|Out-of-range", line)]
    result = {"tool": tool, "calls": done, "errors": errors[:20]}
    if code == 0:
        yield result
    elif errors:
        yield {**result, "verdict": "FAILED", "detail": f"{errors[0]}, after {done} calls; see {path.name}"}
    elif code is None:
        yield result
        raise KeyboardInterrupt
    elif done == 0:
        raise Skip(f"{tool} did not attach: {(said or text.splitlines() or ['it said nothing'])[-1][:200]}")
    else:
        yield {**result, "verdict": "FAILED", "detail": f"exit status {code} after {done} calls; see {path.name}"}


def kernel_names() -> list[str]:
    """What the names of our kernels have in them: the namespace of the compiled ones, and every Triton kernel's."""
    names = ["4vops"]
    if importlib.util.find_spec("triton") is not None:
        import vision_ops.kernels as kernels

        for module in pkgutil.iter_modules(kernels.__path__):
            found = importlib.import_module(f"vision_ops.kernels.{module.name}")
            names += [kernel.fn.__name__ for kernel in getattr(found, "KERNELS", ())]
    return list(dict.fromkeys(names))


def _run(program: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> int | None:
    """The exit status; None where it was interrupted."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                program,
                cwd=machine.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        except KeyboardInterrupt:
            return None
    return done.returncode
