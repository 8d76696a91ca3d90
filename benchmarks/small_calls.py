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
from benchmarks.cases import OPS, Op, Problem, Setting
from benchmarks.providers import make_step
from benchmarks.verify import complaints
from vision_ops import use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BATCH = 2


def problems(op: Op, device: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Problem]]:
    for case in op.quick:
        for dtype in dtypes:
            for layout in LAYOUTS:
                name = f"{op.name} {case} {str(dtype).removeprefix('torch.')} {layout}"
                yield name, op.problem(case, Setting(device, dtype, layout, BATCH))


def call(op: Op, problem: Problem, device: str, bare: bool) -> str | None:
    """What is wrong with the fused op, told to be fused. bare: it is only run, with nothing of PyTorch beside it."""
    with torch.no_grad():
        output = op.reference(*problem.args, **problem.options) if not bare else None
    with use_backend("fused"):
        if bare:
            output = op.fused(*problem.args, **problem.options)
            torch.autograd.grad(output, problem.inputs, torch.empty_like(output).fill_(0.5))
            return None
        grad = torch.randn_like(output)
        fused = make_step("fused", op, problem, grad, "train")()
    eager = make_step("eager", op, problem, grad, "train")()
    exact = make_step("eager", op, problem.to(torch.float64), grad.double(), "train")()
    return "; ".join(complaints(fused, eager, exact)) or None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_calls")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", nargs="+", choices=tuple(OPS), default=tuple(OPS))
    parser.add_argument("--bare", action="store_true", help="without a comparison, in float32 and bfloat16")
    args = parser.parse_args()
    status = 0
    for name in args.op:
        for what, problem in problems(OPS[name], args.device, DTYPES[:2] if args.bare else DTYPES):
            wrong = call(OPS[name], problem, args.device, args.bare)
            if args.device == "cuda":
                torch.cuda.synchronize()
            print(json.dumps({"call": what, "wrong": wrong}), flush=True)
            status |= wrong is not None
    return status


if __name__ == "__main__":
    sys.exit(main())
