"""What a launch moves, declared beside its kernel for the ledger (benchmarks/ledger); a call takes no notice of it."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Moves(NamedTuple):
    """Pointers by name. `written` are stored to, `updated` loaded as well; all others are loaded. `partly`: of those,
    what is stored to in too few places to count. multiply_adds: on tensor cores, from the arguments by name."""

    written: tuple[str, ...]
    updated: tuple[str, ...]
    partly: tuple[str, ...]
    multiply_adds: Callable[..., int] | None


def moves(
    *written: str,
    updated: tuple[str, ...] = (),
    partly: tuple[str, ...] = (),
    multiply_adds: Callable[..., int] | None = None,
) -> Callable[[Any], Any]:
    """Decorates the function of a kernel, beneath what compiles it."""

    def declare(fn: Any) -> Any:
        fn.moves = Moves(written, updated, partly, multiply_adds)
        return fn

    return declare
