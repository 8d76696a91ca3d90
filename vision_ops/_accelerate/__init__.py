"""`accelerate` and `restore`: the kernels in models of other packages."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..nn._layers import _own
from .check import disagreement, unfit
from .convnext import conv_block
from .edgenext import sdta
from .forward import FusedForward, Plan, fused_forward
from .hornet import global_local_filter, gnconv, hor_block
from .layer_norm import layer_norm_2d
from .layers import Unfit
from .moganet import aggregation_ffn, gated_aggregation, multi_order
from .report import Entry, Report
from .s2mlpv2 import pre_norm_residual, s2_attention
from .xcit import lpi, xca, xca_block

# By the names of classes; of several, the first that finds the layers that it knows.
_KNOWN: dict[str, tuple[Callable[[nn.Module], Plan | None], ...]] = {
    "ConvNeXtBlock": (conv_block,),
    "CNBlock": (conv_block,),
    "ConvBlock": (conv_block,),
    "ConvEncoder": (conv_block,),
    "ConvEncoderBNHS": (conv_block,),
    "Block": (conv_block, hor_block),
    "HorBlock": (hor_block,),
    "SplitTransposeBlock": (sdta,),
    "SDTAEncoder": (sdta,),
    "SDTAEncoderBNHS": (sdta,),
    "XCA": (xca,),
    "CrossCovarianceAttn": (xca,),
    "LPI": (lpi,),
    "XCABlock": (xca_block,),
    "gnconv": (gnconv,),
    "GlobalLocalFilter": (global_local_filter,),
    "MultiOrderGatedAggregation": (gated_aggregation,),
    "MultiOrderDWConv": (multi_order,),
    "ChannelAggregationFFN": (aggregation_ffn,),
    "S2Attention": (s2_attention,),
    "PreNormResidual": (pre_norm_residual,),
    "LayerNorm": (layer_norm_2d,),
    "LayerNorm2d": (layer_norm_2d,),
}


def accelerate(model: nn.Module) -> Report:
    """Lets the blocks of a model that vision_ops has ops for run them, and says which do and why others do not.

    Known are the blocks of timm's EdgeNeXt, XCiT and ConvNeXt, torchvision's ConvNeXt, and modules in the layout of the
    official code of MogaNet, HorNet, EdgeNeXt, XCiT, ConvNeXt and S2-MLPv2: by the names of their classes and layers,
    and by the types, shapes and options of these. No package is imported. A block is taken where it then computes what
    it did: in a trial on a small random input, with random weights, in evaluation and in training mode, the output, the
    gradients and the buffers have to agree.

    All that changes is that the instances have an attribute `forward`, which `restore` removes. It looks at the layers
    in every call: where one has been replaced, has hooks, active dropout or weights that are no plain tensors, and with
    the backend "reference", the forward of the class runs. Copies and pickles of the model keep it, as do DDP, FSDP2
    and torch.compile; not nn.DataParallel, whose replicas share it, nor torch.jit.script, which wants the class's own.

    It may be called again, after layers were replaced or the mode was changed, and with weights of any device and
    dtype. Blocks of `vision_ops` are as they are.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: the backend is "fused", and, later, a layer of an accelerated block is not what its op computes.
    """
    _check(model)
    report, covered, trials = Report(), set[nn.Module](), dict[Any, str | None]()
    for name, module in model.named_modules():
        if module in covered:
            module.__dict__.pop("forward", None) if fused_forward(module) else None
            continue
        entry = _accelerate(name, module, trials)
        if entry is None:
            continue
        report.entries.append(entry)
        forward = fused_forward(module)
        if forward is not None:
            covered.update(module.get_submodule(path) for path in forward.plan.layers.layers)
    return report


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every module of the model has the forward of its class again, as it was.

    Raises:
        TypeError: model is not an nn.Module.
    """
    _check(model)
    for module in model.modules():
        if fused_forward(module) is not None:
            del module.__dict__["forward"]


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _accelerate(name: str, module: nn.Module, trials: dict[Any, str | None]) -> Entry | None:
    """What becomes of a module; None where it is not known."""
    kind = _known_as(module)
    if kind is None:
        return None
    plan: Plan | None = None
    try:
        plan = next((found for known in _KNOWN[kind] if (found := known(module)) is not None), None)
        if plan is None:
            return None
        reasons = _reasons(module, plan, trials)
    except Unfit as reason:
        reasons = [str(reason)]
    if fused_forward(module) is not None:
        del module.__dict__["forward"]
    if plan is None or reasons:
        return Entry(name, kind, (), tuple(reasons))
    module.__dict__["forward"] = FusedForward(module, plan)
    return Entry(name, kind, plan.ops, plan.remarks)


def _known_as(module: nn.Module) -> str | None:
    """The name of the class, or of the one that it is derived from and has its forward of, as FSDP2's classes are."""
    for cls in type(module).__mro__:
        if cls.__name__ in _KNOWN and not cls.__module__.startswith("vision_ops."):
            return cls.__name__ if getattr(cls, "forward", None) is type(module).forward else None
    return None


def _reasons(module: nn.Module, plan: Plan, trials: dict[Any, str | None]) -> list[str]:
    if "forward" in module.__dict__ and fused_forward(module) is None:
        return ["it has a forward of its own"]
    if _own(type(module), "forward") is not type(module).forward:
        return ["its class has another forward than its own"]
    reasons = unfit(module, plan)
    if reasons:
        return reasons
    key = _trial_key(module, plan)
    if key not in trials:
        trials[key] = disagreement(module, plan)
    reason = trials[key]
    return [] if reason is None else [reason]


def _trial_key(module: nn.Module, plan: Plan) -> Any:
    """The same for blocks of which one trial is enough."""
    layers = tuple(plan.layers.layers.items())
    shapes = tuple((name, p.shape) for name, p in module.named_parameters())
    kinds = tuple((name, type(m)) for name, m in module.named_modules())
    return plan.run, str(layers), repr(sorted(plan.options.items(), key=str)), shapes, kinds, type(module)
