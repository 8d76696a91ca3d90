"""Whether a plan computes what the forward of a module does: a trial with small random numbers.

It runs on copies with weights of their own, on the CPU. So the module, its buffers and gradients, and the state of
random numbers stay as they are, and the weights may be anywhere: on the meta device, or sharded.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Plan, fused_forward

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_TOLERANCE = 1e-4  # float32; what differs in the formula differs by more with weights of this size


def _shadow(module: nn.Module, weight: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy with other weights that shares what is no tensor, hooks included; forwards of ours are left out."""
    copies: dict[int, nn.Module] = {}

    def copy(m: nn.Module) -> nn.Module:
        if id(m) in copies:
            return copies[id(m)]
        new = copies[id(m)] = object.__new__(type(m))
        new.__dict__.update(m.__dict__)
        if fused_forward(m) is not None:
            del new.__dict__["forward"]
        new.__dict__["_parameters"] = {n: _weight(p, weight) for n, p in m._parameters.items()}
        new.__dict__["_buffers"] = {n: _buffer(b) for n, b in m._buffers.items()}
        new.__dict__["_modules"] = {n: None if child is None else copy(child) for n, child in m._modules.items()}
        return new

    return copy(module)


def _weight(p: Any, weight: Callable[[Tensor], Tensor]) -> Any:
    """Parameters of other types, such as quantized ones, as they are."""
    if p is None or not p.is_floating_point() or (type(p) not in (Tensor, nn.Parameter) and not _sharded(p)):
        return p
    return weight(p)


def _random_weights() -> Callable[[Tensor], Tensor]:
    """Makes a weight for every parameter, once."""
    generator, weights = torch.Generator().manual_seed(0), dict[int, Tensor]()

    def weight(p: Tensor) -> Tensor:
        if id(p) not in weights:
            values = torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32)
            values = values.div_(math.prod(p.shape[1:]) ** 0.5) if p.ndim > 1 else values.mul_(0.3).add_(1)
            weights[id(p)] = nn.Parameter(values)
        return weights[id(p)]

    return weight


def _sharded(p: Any) -> bool:
    return hasattr(p, "placements") and hasattr(p, "device_mesh")  # a DTensor, without importing torch.distributed


def _buffer(b: Any) -> Any:
    if b is None or (not b.is_floating_point() and not b.is_meta and not _sharded(b)):
        return None if b is None else b.detach().cpu().clone()
    if b.is_meta or _sharded(b):
        return torch.ones(b.shape, device="cpu", dtype=torch.float32 if b.is_floating_point() else b.dtype)
    return b.detach().to("cpu", torch.float32, copy=True)


def unfit(module: nn.Module, plan: Plan) -> list[str]:
    """Why the layers of a module are not what the plan computes."""
    copy = _shadow(module, lambda p: torch.empty(p.shape, device="cpu"))
    return plan.layers.reasons(copy, torch.empty(0, device="cpu"))


def disagreement(module: nn.Module, plan: Plan) -> str | None:
    """Where the plan differs from the forward of the module's class; None if it does not."""
    forward, weight = type(module).forward, _random_weights()

    def planned(m: nn.Module, x: Tensor, *size: int) -> Tensor:
        found = plan.layers.tensors(m, x)
        if found is None:
            raise ValueError("; ".join(plan.layers.reasons(m, x)))
        return plan.run(m, found, plan.options, x, *size)

    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", enabled=False),
        ):
            for training in (False, True):
                expected, found = (_trial(_shadow(module, weight), plan, training, run) for run in (forward, planned))
                what = _difference(expected, found)
                if what is not None:
                    mode = "training" if training else "evaluation"
                    return f"in a trial in {mode} mode, {what} differed from what its forward computes"
    except Exception as error:  # of whatever code has the same names
        return f"a trial raised {type(error).__name__}: {error}".splitlines()[0]
    return None


def _trial(copy: nn.Module, plan: Plan, training: bool, forward: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The output, all gradients and the buffers, by name."""
    for m in copy.modules():
        m.__dict__["training"] = training
        m.__dict__.update({hooks: {} for hooks in _HOOKS})
        if isinstance(m, nn.Dropout):
            m.__dict__["p"] = 0.0
    generator = torch.Generator().manual_seed(1)
    shape, size = _input(plan)
    x = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).requires_grad_()
    torch.default_generator.manual_seed(2)
    y = forward(copy, x, *size)
    if not isinstance(y, Tensor):
        raise TypeError(f"forward returns a {type(y).__name__}")
    dy = torch.randn(y.shape, generator=generator, device="cpu", dtype=torch.float32)
    inputs = {"the gradient of x": x}
    inputs |= {f"the gradient of {n}": p for n, p in copy.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype), allow_unused=True)
    found = {name: grad for name, grad in zip(inputs, grads, strict=True) if grad is not None}
    return {"the output": y.detach(), **found, **dict(copy.named_buffers())}


def _input(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a small input, and what forward takes besides."""
    height, width, channels = 5, 6, plan.options["channels"]
    if plan.ndim == 3:
        return (2, height * width, channels), (height, width) if plan.size else ()
    return ((2, height, width, channels) if plan.options.get("last") else (2, channels, height, width)), ()


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """The name of the first that is not the same."""
    sizes = {name: t.abs().max().item() if t.numel() else 0.0 for name, t in expected.items()}
    least = 0.01 * max(sizes.values())  # gradients that are zero in the formula are all rounding errors
    for name, t in expected.items():
        other = found.get(name)
        if other is None or other.shape != t.shape:
            return name
        error = (other - t).abs().max().item() if t.numel() else 0.0
        if not error <= _TOLERANCE * max(sizes[name], least):
            return name
    return None
