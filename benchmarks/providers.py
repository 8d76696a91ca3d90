"""Who takes part: the fused op and its peers, in each layout, as calls without arguments."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Op, Problem

PEERS = {"cpu": ("eager", "compile"), "cuda": ("eager", "compile", "max-autotune")}
# Peers made by torch.compile, with its options. "aot_eager" traces as "compile" does, and then compiles nothing.
COMPILERS: dict[str, dict[str, Any]] = {
    "compile": {},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "aot_eager": {"backend": "aot_eager"},
}
BEFORE = "before"  # the fused op of another tree
CUDNN = "eager-cudnn"  # with cuDNN's kernels for contiguous depthwise convolutions, which PyTorch does not take itself


@dataclass
class Provider:
    kind: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.layout}"


def line_up(kinds: Sequence[str], layouts: Sequence[str]) -> list[Provider]:
    return [Provider(kind, layout) for kind in kinds for layout in layouts]


def has_cudnn_depthwise() -> bool:
    """PyTorch 2.13 and later let the caller choose."""
    return "depthwise_kernel" in inspect.signature(torch.backends.cudnn.flags).parameters


def compiled(function: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
    def call(*args, **options):
        return function(*args, **options)

    # Dynamo keeps its graphs with the code object: on a shared one, every call would go through the others' guards.
    own = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, **COMPILERS[kind])


def make_step(kind: str, op: Op, problem: Problem, grad_output: Tensor, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns the output and, in mode "train", the gradients of problem.inputs."""
    function = op.fused if kind == "fused" else op.others.get(kind, op.reference)
    if kind in COMPILERS:
        function = compiled(function, kind)
    args, options, inputs = problem.args, problem.options, problem.inputs

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*args, **options),)

    def train() -> tuple[Tensor, ...]:
        output = function(*args, **options)
        return (output, *torch.autograd.grad(output, inputs, grad_output))

    step = train if mode == "train" else forward
    return _on_cudnn(step) if kind == CUDNN else step


def _on_cudnn(step: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    @functools.wraps(step)
    def run() -> tuple[Tensor, ...]:
        cudnn = torch.backends.cudnn
        kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
        with cudnn.flags(enabled=True, depthwise_kernel="cudnn", **kept):
            return step()

    return run
