"""The private names of PyTorch that make calls cheap, in one place.

They are looked for once, at import. Where one is missing, what needs it goes the public way, which takes longer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _find(path: str) -> Any:
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


BelowAutograd = _find("_C._AutoDispatchBelowAutograd")
DisableAutocast = _find("_C._DisableAutocast")

# DLPack's exchange in C, by which compiled kernels ask about tensors. It is public, and may get another version.
exchanges_tensors = _find("Tensor.__dlpack_c_exchange_api__") is not None

# Calls past the dispatcher: who would see them, and which tensors are ordinary ones.
_of_calls = (
    _find("_C._len_torch_dispatch_stack"),
    _find("_C._len_torch_function_stack"),
    _find("autograd._profiler_enabled"),
    _find("_C._dispatch_isTensorSubclassLike"),
)
dispatch_modes, function_modes, profiler_enabled, is_wrapper = _of_calls
calls_directly = BelowAutograd is not None and None not in _of_calls


def _perhaps_one() -> int:
    return 1


dispatch_modes = dispatch_modes or _perhaps_one


def _lerp_all(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    for t, end in zip(tensors, ends, strict=True):
        t.lerp_(end, weight)


lerp_all: Callable[..., None] = _find("_foreach_lerp_") or _lerp_all  # one launch on a GPU


def short_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its look at functorch, which takes half of the time."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def is_transformed(values: Sequence[Any]) -> bool:
    """Whether a transform of functorch or forward-mode AD is active, which only PyTorch's own ops support."""
    return _transforms() or forward_ad._current_level >= 0


def holds_transformed(values: Sequence[Any]) -> bool:
    """Whether a tensor among the values, or in lists of them, is a transform's: a wrapper or a dual number."""
    return not torch.compiler.is_compiling() and any(
        holds_transformed(v) if isinstance(v, (list, tuple)) else isinstance(v, Tensor) and _is_wrapped(v)
        for v in values
    )


def _is_wrapped(t: Tensor) -> bool:
    try:
        t.untyped_storage()
    except NotImplementedError:  # vmap's and functorch's have none
        return True
    return forward_ad.unpack_dual(t).tangent is not None


_transforms = _find("_C._are_functorch_transforms_active")
if _transforms is None or _find("autograd.forward_ad._current_level") is None:
    is_transformed = holds_transformed


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


current_stream: Callable[[int], int] = _find("_C._cuda_getCurrentRawStream") or _current_stream


def known_true(condition: Any) -> bool:
    """In a graph: whether it is true without the sizes that the graph leaves open."""
    return condition is True


try:
    from torch.fx.experimental.symbolic_shapes import statically_known_true
except ImportError:
    statically_known_true = known_true


def _graph_tensors() -> tuple[type[Tensor], ...]:
    try:
        from torch._subclasses.fake_tensor import FakeTensor
        from torch._subclasses.functional_tensor import FunctionalTensor
    except ImportError:
        return ()
    return FakeTensor, FunctionalTensor


# What graphs are made of stands for tensors. Where it is not known, they hold what PyTorch's own layers compute.
graph_tensors = _graph_tensors()

# Hooks for all modules, in whichever of these there are.
_of_hooks = ("forward", "forward_pre", "backward", "backward_pre")
_hooks = (_find(f"nn.modules.module._global_{kind}_hooks") for kind in _of_hooks)
global_hooks: tuple[Any, ...] = tuple({} if hooks is None else hooks for hooks in _hooks)
