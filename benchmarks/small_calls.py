"""One small call of an op, forward and backward, in every dtype and layout: gpu-check's first question."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from benchmarks import LAYOUTS
from benchmarks.problem import Op, Problem, Setting
from benchmarks.providers import make_step
from benchmarks.verify import complaints
from vision_ops import use_backend

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
BATCH = 2


def problems(op: Op, device: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Problem]]:
    """Float64 is left out where the op leaves it to PyTorch; the other types must have a kernel."""
    for dtype, case, layout in product(dtypes, op.quick, LAYOUTS):
        problem = op.problem(case, Setting(device, dtype, layout, BATCH))
        if dtype != torch.float64 or not op.explain(problem).cannot:
            yield f"{op.name} {case} {str(dtype).removeprefix('torch.')} {layout}", problem


def call(op: Op, problem: Problem) -> str | None:
    """What is wrong with the fused op, told to be fused."""
    with torch.no_grad():
        grad = torch.randn_like(op.reference(*problem.args, **problem.options))
    with use_backend("fused"):
        fused = make_step("fused", op, problem, grad, "train")()
    eager = make_step("eager", op, problem, grad, "train")()
    exact = make_step("eager", op, problem.to(torch.float64), grad.double(), "train")()
    return "; ".join(complaints(fused, eager, exact)) or None


def bare_call(op: Op, problem: Problem) -> None:
    """The same with as little of PyTorch as possible, whose kernels a sanitizer would slow down, too."""
    with use_backend("fused"):
        output = op.fused(*problem.args, **problem.options)
        torch.autograd.grad(output, problem.inputs, torch.full_like(output, 0.5))
