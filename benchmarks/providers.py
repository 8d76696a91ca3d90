"""Who takes part: the fused op and its peers, in each layout, as calls without arguments."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Op, Problem

PEERS = ("eager", "compile")


@dataclass
class Provider:
    kind: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.layout}"


def line_up(kinds: Sequence[str], layouts: Sequence[str]) -> list[Provider]:
    return [Provider(kind, layout) for kind in kinds for layout in layouts]


def compiled(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    def call(*args, **options):
        return function(*args, **options)

    # Dynamo keeps its graphs with the code object: on a shared one, every call would go through the others' guards.
    own = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
    return torch.compile(own, fullgraph=True, dynamic=False, mode=mode)


def make_step(kind: str, op: Op, problem: Problem, grad_output: Tensor, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns the output and, in mode "train", the gradients of problem.inputs."""
    function = op.fused if kind == "fused" else op.others.get(kind, op.reference)
    if kind == "compile":
        function = compiled(function, grad_output.device.type)
    args, options, inputs = problem.args, problem.options, problem.inputs

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*args, **options),)

    def train() -> tuple[Tensor, ...]:
        output = function(*args, **options)
        return (output, *torch.autograd.grad(output, inputs, grad_output))

    return train if mode == "train" else forward
