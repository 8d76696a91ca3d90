"""What an op, or a module, would run."""

import inspect
from typing import Any

from torch import nn

from . import ops
from .dispatch import Explanation, Question, resolve_backend
from .nn._layers import explain_module
from .ops._checks import check_tensor
from .ops._registration import fused_ops


def explain(op: str | nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """What `fused_<op>(*args, **kwargs)` would run, part by part, and every reason against the fused kernels.

    Takes what the op takes, `backend=` included; tensors behind the first may be missing. Nothing is computed.

    Or what a module of `nn` or `models` runs: `explain(module, x)` says of all blocks in it which layers an op stands
    for, and which layer is the reason where they are called instead: one of another type or with other attributes than
    the kernel's, with hooks, or with weights that are no plain tensors on the device of x. What the op then runs, which
    depends on its input, the op's own explanation says.

    >>> print(explain("multi_order_dwconv", torch.randn(1, 64, 56, 56)))
    >>> print(explain(model, images))
    """
    if isinstance(op, nn.Module):
        return explain_module(op, *args, **kwargs)
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
