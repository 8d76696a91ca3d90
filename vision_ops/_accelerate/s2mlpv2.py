"""S2-MLPv2 (arXiv 2108.01072), in the layout of the code that goes by it."""

from typing import Any

from torch import Tensor, nn

from ..nn._layers import Layers, dropout, linear
from ..ops.s2_attention import fused_s2_attention
from .forward import Plan
from .layers import drop_path, find, foreign, gelu, has, norm_last, path_scale, plain, width
from .mlp import mlp_layers, run_mlp


def s2_attention(block: nn.Module) -> Plan | None:
    """S2Attention. Where its shifts read what they have overwritten, the trial leaves it alone."""
    names = "split_attention.mlp1", "split_attention.gelu", "split_attention.mlp2", "split_attention.softmax"
    if not has(block, "mlp1", "mlp2", "split_attention", *names):
        return None
    channels, hidden = width(block, "mlp2", "mlp1"), width(block, "split_attention.mlp1")
    layers = {"mlp1": linear(channels, 3 * channels), "mlp2": linear(channels, channels)}
    layers[names[0]] = linear(channels, hidden, bias=False)
    layers[names[2]] = linear(hidden, 3 * channels, bias=False)
    layers |= {"split_attention": foreign(find(block, "split_attention"), k=3), names[1]: gelu(find(block, names[1]))}
    layers[names[3]] = plain(nn.Softmax, dim=1)
    kernel = Layers("s2_attention", layers)
    return Plan(_attention, kernel, {"channels": channels, "last": True}, ("s2_attention",))


def _attention(block: nn.Module, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    weight1, bias1, weight2, bias2, split_weight1, _, split_weight2, _ = found
    return fused_s2_attention(x, weight1, bias1, weight2, bias2, split_weight1, split_weight2)


def pre_norm_residual(block: nn.Module) -> Plan | None:
    """PreNormResidual around a linear layer, an activation, dropout, a linear layer and dropout."""
    fn = find(block, "fn")
    if not has(block, "norm", "fn") or not isinstance(fn, nn.Sequential) or len(fn) != 5:
        return None
    channels = width(block, "norm", "fn.3")
    mlp, act = mlp_layers(block, "fn.0", "fn.1", "fn.3", channels)
    layers = {"norm": norm_last(find(block, "norm")), **mlp, "fn": plain(nn.Sequential)}
    layers |= {"fn.2": dropout(), "fn.4": dropout()}
    if has(block, "drop_path"):
        layers["drop_path"] = drop_path(find(block, "drop_path"))
    options = {"channels": channels, "activation": act, "last": True}
    return Plan(_residual, Layers("mlp", layers), options, ("mlp",))


def _residual(block: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    norm, path = (found[0], found[1], block.norm.eps), getattr(block, "drop_path", None)
    scale = None if path is None else path_scale(path, x)
    return run_mlp(x, found[2:6], options, norm=norm, gamma=None, residual=x, path_scale=scale)
