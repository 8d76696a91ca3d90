"""python -m benchmarks.small_calls: one small call of every op, forward and backward, in every dtype and layout.

A line of JSON for each, written at once: gpu-check runs it in a process of its own, and under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import torch

from benchmarks import LAYOUTS
from benchmarks.cases import OPS, Op, Problem, Setting, ops_for
from benchmarks.providers import make_step
from benchmarks.verify import complaints
from vision_ops import explain, use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BATCH = 2


def problems(op: Op, device: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Problem]]:
    """Float64 is left out where the op leaves it to PyTorch; the other types must have a kernel."""
    for case in op.quick:
        for dtype in dtypes:
            for layout in LAYOUTS:
                problem = op.problem(case, Setting(device, dtype, layout, BATCH))
                if dtype != torch.float64 or not explain(op.name, *problem.args, **problem.options).cannot:
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_calls")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", nargs="+", choices=tuple(OPS), help="default: those with kernels for the device")
    parser.add_argument("--bare", action="store_true", help="without a comparison, in float32 and bfloat16")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # its errors would be allowed to ours
    status = 0
    for name in args.op or ops_for(args.device, OPS):
        for what, problem in problems(OPS[name], args.device, DTYPES[:2] if args.bare else DTYPES):
            wrong = (bare_call if args.bare else call)(OPS[name], problem)
            if args.device == "cuda":
                torch.cuda.synchronize()
            print(json.dumps({"call": what, "wrong": wrong}), flush=True)
            status |= wrong is not None
    return status


if __name__ == "__main__":
    sys.exit(main())
