"""Activation checkpointing that computes again what was computed."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..dispatch import held_backend


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, computed again in backward under the backend of this moment, whatever `use_backend` says by then."""
    if torch.compiler.is_compiling():  # a graph does not choose again
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), held_backend()))
