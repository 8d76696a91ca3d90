"""What an op, or a module, would run."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import ops
from ._accelerate.forward import fused_forward
from .dispatch import Explanation, Question, resolve_backend
from .nn._layers import OF_ALL, Layers
from .ops._checks import check_tensor
from .ops._registration import fused_ops


def explain(op: str | nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """What `fused_<op>(*args, **kwargs)` would run, part by part, and every reason against the fused kernels.

    Takes what the op takes, `backend=` included; tensors behind the first may be missing. Nothing is computed.

    Or what a module of `nn` or `models`, or an accelerated one, runs: `explain(module, x)` says of all blocks in it
    which layers ops stand for, and which layer is the reason where they are called instead: one of another type or with
    other attributes than the kernel's, with hooks, or with weights that are no plain tensors on the device of x. What
    an op then runs, which depends on its input, the op's own explanation says.

    >>> print(explain("multi_order_dwconv", torch.randn(1, 64, 56, 56)))
    >>> print(explain(model, images))
    """
    if isinstance(op, nn.Module):
        return _explain_module(op, *args, **kwargs)
    name = op.removeprefix("fused_") if isinstance(op, str) else op
    if name not in fused_ops:
        raise ValueError(f"op must be one of {sorted(fused_ops)}, got {name!r}")
    function = getattr(ops, f"fused_{name}")
    parameters = inspect.signature(function).parameters
    given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    fused, first = fused_ops[name], next(iter(parameters))
    needed = [first, *(p.name for p in parameters.values() if p.default is p.empty and p.name in fused.options)]
    if not given.keys() >= {*needed}:
        raise TypeError(f"explain({op!r}) takes what fused_{name} takes, at least {' and '.join(needed)}")
    given["backend"] = Question(resolve_backend(given.get("backend")))
    if all(p.default is not p.empty or p.name in given for p in parameters.values()):
        return function(**given)
    check_tensor(first, given[first], fused.dims)
    defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    return fused.explain(*fused.partial({**defaults, **given}), backend=given["backend"])


def _explain_module(module: nn.Module, x: Any) -> Explanation:
    """What every block of a module runs for x, and which layer is the reason where a block calls its layers."""
    backend = resolve_backend(None)
    parts: dict[str, str] = {}
    cannot: list[str] = []
    computed: set[str] = set()  # the modules that an op stands for: parts of them are not asked
    for prefix, block in module.named_modules():
        called: dict[str, str] = {}
        for kernel, runs in _kernels(block):
            names = list(kernel.layers)
            paths = [f"{prefix}.{name}".strip(".") for name in names or [""]]
            if computed.issuperset(paths):
                continue
            reasons = kernel.reasons(block, x)
            if not reasons:
                computed.update(paths)
                fused = ", ".join(f"fused_{op}" for op in runs)
                parts[_part(prefix, block, names)] = "PyTorch" if backend == "reference" else fused
                continue
            called.update(zip(paths, names or [""], strict=True))
            cannot += [reason if reason in OF_ALL else f"{prefix}.{reason}".strip(".") for reason in reasons]
        left = [name for path, name in called.items() if path not in computed]
        if left:
            parts[_part(prefix, block, left)] = "nothing: a ValueError" if backend == "fused" else "their own forward"
    return Explanation(type(module).__name__, backend, parts, list(dict.fromkeys(cannot)), [])


def _kernels(block: nn.Module) -> Iterator[tuple[Layers, tuple[str, ...]]]:
    """The layers that ops stand for, and these ops."""
    accelerated = fused_forward(block)
    if accelerated is not None:
        yield accelerated.plan.layers, accelerated.plan.ops
    for kernel in vars(block).values():
        if isinstance(kernel, Layers) and (kernel.layers or kernel.own):
            yield kernel, (kernel.op,)


def _part(prefix: str, block: nn.Module, names: list[str]) -> str:
    names = [name for name in names if name]
    return f"{prefix or type(block).__name__}{' (' + ', '.join(names) + ')' if names else ''}"
