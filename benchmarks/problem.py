"""A call of an op as tensors: the setting it runs in, its arguments, and what an op brings to be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import vision_ops

if TYPE_CHECKING:
    from vision_ops.dispatch import Explanation

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# An argument of an op that takes a gradient, or several that go together, or none.
Argument = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Setting:
    """Where a case runs and in what form; the same for all its providers but for the layout."""

    device: str
    dtype: torch.dtype
    layout: str
    batch: int

    def normal(self, *size: int) -> Tensor:
        """Four-dimensional weights take the layout too, as a model's do under .to(memory_format=...)."""
        values = torch.randn(size, device=self.device, dtype=self.dtype)
        return values.to(memory_format=MEMORY_FORMATS[self.layout]) if values.dim() == 4 else values

    def pixels(self, batch: int, height: int, width: int, channels: int) -> Tensor:
        """(N, H, W, C), the same memory as (N, C, H, W) in this layout."""
        return self.normal(batch, channels, height, width).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Problem:
    """One call of an op. `flops` are those of its forward pass."""

    args: tuple[Argument, ...]
    flops: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """x and all parameters: the tensors that take a gradient."""
        return tuple(_tensors(self.args))

    def require_grad(self) -> Problem:
        for tensor in self.inputs:
            tensor.requires_grad_()
        return self

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(_converted(self.args, dtype), self.flops, self.options).require_grad()


def _tensors(args: tuple[Argument, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _tensors(arg)
        elif arg is not None:
            yield arg


def _converted(args: tuple[Argument, ...], dtype: torch.dtype) -> tuple[Argument, ...]:
    return tuple(
        None if arg is None else _converted(arg, dtype) if isinstance(arg, tuple) else arg.detach().to(dtype)
        for arg in args
    )


@dataclass(frozen=True)
class Op:
    """`fused` and `reference` take the same arguments; `devices` have kernels.

    quick: the cases that stand for all; the short run takes the first, and compile_in_short has it raced against
    torch.compile, too, as the op that stands for its network. pixels: x and y are (N, H, W, C). wrapped: `fused` calls
    the public function with other arguments, and hands its options on. others: more ways to
    write it in PyTorch, peers of their names.
    """

    name: str
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    cases: Mapping[str, Any]
    build: Callable[[Any, Setting], Problem]
    quick: tuple[str, ...]
    compile_in_short: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    pixels: bool = False
    wrapped: bool = False
    others: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)

    def laid_out(self, values: Tensor, layout: str) -> Tensor:
        """An x or y in this layout."""
        form = MEMORY_FORMATS[layout]
        if self.pixels:
            return values.permute(0, 3, 1, 2).contiguous(memory_format=form).permute(0, 2, 3, 1)
        return values.contiguous(memory_format=form) if values.dim() == 4 else values

    def explain(self, problem: Problem) -> Explanation:
        """What the op runs for it."""
        if not self.wrapped:
            return vision_ops.explain(self.name, *problem.args, **problem.options)
        from vision_ops.dispatch import Question, resolve_backend  # which an older tree to compare with lacks

        question = Question(resolve_backend(None))
        return cast("Explanation", self.fused(*problem.args, **problem.options, backend=question))

    def problem(self, case: str, setting: Setting) -> Problem:
        """The same values for every layout, so that one exact result judges them all."""
        torch.manual_seed(0)
        return self.build(self.cases[case], setting).require_grad()
