"""MogaNet (arXiv 2211.03295), in the layout of the official code."""

from typing import Any

from torch import Tensor, nn

from ..nn._layers import Layer, Layers, depthwise, dropout, pointwise
from ..ops.channel_aggregation_ffn import fused_channel_aggregation_ffn
from ..ops.moga_aggregation import fused_moga_aggregation
from ..ops.multi_order_dwconv import check_multi_order, fused_multi_order_dwconv
from .forward import Plan
from .layers import Unfit, find, foreign, gelu, has, plain, same_conv, width


def _scale(layer: Any, channels: int) -> Layer:
    """ElementScale."""
    if type(layer).__name__ != "ElementScale":
        raise Unfit(f"sigma is a {type(layer).__name__}, not an ElementScale")
    return foreign(layer)._replace(tensors=("scale",), shape=(1, channels, 1, 1))


def multi_order(block: nn.Module) -> Plan | None:
    """MultiOrderDWConv."""
    convs = [f"DW_conv{i}" for i in range(3)]
    if not has(block, *convs, "PW_conv"):
        return None
    channels = width(block, "DW_conv0", "PW_conv")
    widths = [channels, width(block, "DW_conv1"), width(block, "DW_conv2")]
    dilations = tuple(getattr(find(block, name), "dilation", (0, 0))[0] for name in convs)
    split = (channels - widths[1] - widths[2], *widths[1:])
    try:
        check_multi_order(channels, dilations, split)
    except (TypeError, ValueError) as error:
        raise Unfit(str(error)) from None
    each = zip(convs, widths, (5, 5, 7), dilations, strict=True)
    layers = {name: depthwise(c, k, dilation=d) for name, c, k, d in each}
    options = {"channels": channels, "dilations": dilations, "split": split}
    return Plan(_multi_order, Layers("multi_order_dwconv", layers), options, ("multi_order_dwconv",))


def _multi_order(block: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    dilations, split = options["dilations"], options["split"]
    return block.PW_conv(fused_multi_order_dwconv(x, found[::2], found[1::2], dilations=dilations, split=split))


def gated_aggregation(block: nn.Module) -> Plan | None:
    """MultiOrderGatedAggregation."""
    if not has(block, "proj_1", "gate", "value", "proj_2", "act_value", "act_gate", "sigma"):
        return None
    value, channels = find(block, "value"), width(block, "proj_1", "gate")
    inner = multi_order(value) if type(value).__name__ == "MultiOrderDWConv" else None
    if inner is None:
        raise Unfit(f"value is a {type(value).__name__}, not a MultiOrderDWConv")
    pw, silu = pointwise(channels, channels), plain(nn.SiLU)
    layers = {
        "proj_1": pw,
        "gate": pw,
        "value.PW_conv": pw,
        "proj_2": pw,
        "sigma": _scale(find(block, "sigma"), channels),
    }
    layers |= {f"value.{name}": conv for name, conv in inner.layers.layers.items()}
    layers |= {"value": foreign(value), "act_value": silu, "act_gate": silu}
    options = {**inner.options, "double": bool(getattr(block, "attn_force_fp32", False))}
    return Plan(_gated, Layers("moga_aggregation", layers), options, ("moga_aggregation",))


def _gated(block: nn.Module, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    into, out, convs = found[:4], found[4:9], found[9:]
    given = *into, convs[::2], convs[1::2], *out
    choice = {"dilations": options["dilations"], "split": options["split"]}
    return fused_moga_aggregation(x, *given, **choice, double_gate_act=options["double"])


def aggregation_ffn(block: nn.Module) -> Plan | None:
    """ChannelAggregationFFN."""
    if not has(block, "fc1", "dwconv", "act", "fc2", "drop", "decompose", "sigma", "decompose_act"):
        return None
    hidden, channels = width(block, "fc1", "dwconv"), width(block, "fc2")
    layers = {"fc1": pointwise(channels, hidden), "dwconv": same_conv(find(block, "dwconv"), hidden, "dwconv")}
    layers |= {"fc2": pointwise(hidden, channels), "decompose": pointwise(hidden, 1)}
    layers |= {"sigma": _scale(find(block, "sigma"), hidden), "drop": dropout()}
    layers |= {name: gelu(find(block, name)) for name in ("act", "decompose_act")}
    kernel = Layers("channel_aggregation_ffn", layers)
    return Plan(_ffn, kernel, {"channels": channels}, ("channel_aggregation_ffn",))


def _ffn(block: nn.Module, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    return fused_channel_aggregation_ffn(x, *found)
