"""LayerNorm over the channels of (N, C, H, W): timm's and torchvision's LayerNorm2d, the official LayerNorm."""

from typing import Any

from torch import Tensor, nn

from ..nn._layers import Layers
from ..ops.layer_norm_2d import fused_layer_norm_2d
from .forward import Plan
from .layers import as_own, has, width


def layer_norm_2d(norm: nn.Module) -> Plan | None:
    formatted = "data_format" in vars(norm)
    if not has(norm, "weight", "bias") or not isinstance(getattr(norm, "eps", None), float):
        return None
    if norm.data_format != "channels_first" if formatted else type(norm).__name__ == "LayerNorm":
        return None
    channels = width(norm, "weight")
    own = [name for parameter in ("weight", "bias") for name in as_own(parameter, norm, (channels,))]
    kernel = Layers("layer_norm_2d", own=tuple(own))
    return Plan(_run, kernel, {"channels": channels}, ("layer_norm_2d",))


def _run(norm: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    return fused_layer_norm_2d(x, *found, eps=norm.eps)
