"""The forward of a module that runs fused: what is set on the instance."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..dispatch import resolve_backend
from ..nn._layers import Layers, register, registered


class Plan(NamedTuple):
    """What a module runs in the place of its forward.

    run: takes the module, the tensors of its layers, `options` and the arguments of forward. layers: what has to be
    plain for it. ops: what it runs, for the report. ndim: of the first argument. size: whether height and width are
    arguments, too. remarks: what it leaves to the layers, and why.
    """

    run: Callable[..., Tensor]
    layers: Layers
    options: dict[str, Any]
    ops: tuple[str, ...]
    ndim: int = 4
    size: bool = False
    remarks: tuple[str, ...] = ()


class FusedForward:
    """The forward of one module: its plan where its layers are plain, else the forward of its class.

    It is an attribute of the module and holds it, so that a copy of the module, or one that was pickled, has its own.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.module, self.plan = module, plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, plan = self.module, self.plan
        if not kwargs and len(args) == (3 if plan.size else 1) and resolve_backend(None) != "reference":
            found = plan.layers.tensors(module, args[0])
            if found is not None and args[0].ndim == plan.ndim:
                return plan.run(module, found, plan.options, *args)
        return type(module).forward(module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        kinds = {layer.kind: registered(layer.kind) for layer in self.plan.layers.layers.values()}
        return {**self.__dict__, "kinds": kinds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, kind in state.pop("kinds").items():
            register(kind, key)
        self.__dict__.update(state)


def fused_forward(module: nn.Module) -> FusedForward | None:
    """The one that is set on a module."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, FusedForward) else None
