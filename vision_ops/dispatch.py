"""Which implementation of an op runs, and why."""

import os
import warnings
from dataclasses import dataclass
from types import TracebackType

BACKENDS = ("auto", "fused", "reference")


def _backend_of_environment() -> str:
    name = os.environ.get("VISION_OPS_BACKEND", "auto")
    if name in BACKENDS:
        return name
    warnings.warn(f"VISION_OPS_BACKEND={name!r} is not one of {BACKENDS}; 'auto' is used", stacklevel=2)
    return "auto"


_current = _backend_of_environment()


class Question(str):
    """A backend for which an op says what would run, in place of its result."""

    __slots__ = ()


def resolve_backend(backend: str | None) -> str:
    """The backend of a call: its own argument, else the one set by `use_backend`."""
    if backend is None:
        return _current
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    return backend


class use_backend:
    """Sets the backend of all ops in this process; as a context manager, until the block ends.

    "auto": the fused kernels where they exist for the arguments and are not slower, else PyTorch. "fused": the fused
    kernels, or a ValueError that says why they cannot run, or why a block of `nn` is to call its layers. "reference":
    plain PyTorch. The `backend=` argument of an op takes the same names and wins. The environment variable
    VISION_OPS_BACKEND, read at import, sets the initial one.

    Under functorch's transforms, forward-mode AD and export to ONNX, which only PyTorch's own ops support, all run
    plain PyTorch. What a network's set_grad_checkpointing computes again in backward runs what the forward pass ran;
    with a torch.utils.checkpoint of your own, call backward within the block.
    """

    def __init__(self, backend: str) -> None:
        global _current
        self._backend = resolve_backend(backend)
        self._previous, _current = _current, self._backend

    def __enter__(self) -> "use_backend":
        global _current
        _current = self._backend  # once more: the object may be used for several blocks
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._previous


class held_backend:
    """A context manager for computing again, later, under the backend of the moment it is made."""

    def __init__(self) -> None:
        self._backend = _current

    def __enter__(self) -> None:
        global _current
        self._later, _current = _current, self._backend

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._later


@dataclass(frozen=True)
class Explanation:
    """What runs for some arguments. `parts` maps the parts of the op to what runs them; `str()` is meant to be read."""

    op: str
    backend: str
    parts: dict[str, str]
    cannot: list[str]
    slower: list[str]

    def __str__(self) -> str:
        lines = [f"{self.op} (backend {self.backend!r})"]
        lines += [f"  {part}: {runs}" for part, runs in self.parts.items()]
        lines += [f"  the fused kernel cannot run: {reason}" for reason in self.cannot]
        lines += [f"  the fused kernel would be slower: {reason}" for reason in self.slower]
        return "\n".join(lines)
