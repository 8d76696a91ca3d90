"""XCiT (arXiv 2106.09681), of timm and of the official code: its attention, which EdgeNeXt has, too, LPI and block."""

from typing import Any

from torch import Tensor, nn

from ..nn._layers import Layers, dropout, linear
from ..ops.dwconv import fused_dwconv
from ..ops.scaled_residual import fused_scaled_residual
from ..ops.xca import fused_xca
from .forward import Plan
from .layers import Unfit, as_own, drop_path, find, gelu, has, norm_last, path_scale, same_conv, width, within
from .mlp import container_layers, run_mlp


def xca(block: nn.Module) -> Plan | None:
    """XCA and CrossCovarianceAttn."""
    if not has(block, "temperature", "qkv", "attn_drop", "proj", "proj_drop"):
        return None
    channels, heads = width(block, "proj", "qkv"), getattr(block, "num_heads", 0)
    if not isinstance(heads, int) or heads < 1 or channels % heads:
        raise Unfit(f"num_heads is {heads!r}, for {channels} channels")
    own = as_own("temperature", block, (heads, 1, 1))
    layers = {"qkv": linear(channels, 3 * channels), "proj": linear(channels, channels)}
    layers |= {"attn_drop": dropout(), "proj_drop": dropout()}
    return Plan(_xca, Layers("xca", layers, own=own), {"channels": channels, "heads": heads}, ("xca",), ndim=3)


def _xca(block: nn.Module, found: list[Any], options: dict[str, Any], x: Tensor, **half: Any) -> Tensor:
    temperature, weight, bias, *proj = found
    return fused_xca(x, weight, bias, temperature, *proj, num_heads=options["heads"], **half)


def lpi(block: nn.Module) -> Plan | None:
    """Local patch interaction, on tokens."""
    if not has(block, "conv1", "act", "bn", "conv2"):
        return None
    channels = width(block, "bn", "conv1")
    layers = {name: same_conv(find(block, name), channels, name) for name in ("conv1", "conv2")}
    layers["act"] = gelu(find(block, "act"))
    return Plan(_lpi, Layers("dwconv", layers), {"channels": channels}, ("dwconv",), ndim=3, size=True)


def _lpi(block: Any, found: list[Any], options: dict[str, Any], x: Tensor, height: int, width: int) -> Tensor:
    y = fused_dwconv(x.unflatten(1, (height, width)).permute(0, 3, 1, 2), *found[:2], activation="gelu")
    return fused_dwconv(block.bn(y), *found[2:4]).flatten(2).transpose(1, 2)


def xca_block(block: nn.Module) -> Plan | None:
    """The attention is one op with norm1 and its residual, norm2 and the MLP another; LPI is called. Dropout in the
    attention is no part of the op: then it is called, too."""
    gammas = "gamma1", "gamma3", "gamma2"
    if not has(block, *gammas, "norm1", "attn", "norm3", "local_mp", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2"):
        return None
    paths = ["drop_path"] * 3 if has(block, "drop_path") else ["drop_path1", "drop_path3", "drop_path2"]
    if not has(block, *paths):
        return None
    channels = width(block, "norm2", "norm1")
    own = [name for gamma in gammas for name in as_own(gamma, block, (channels,))]
    if len(own) != 3:
        raise Unfit("a gamma is None")
    mlp, act = container_layers(block, "mlp", channels)
    layers = {"norm2": norm_last(find(block, "norm2")), **mlp}
    layers |= {name: drop_path(find(block, name)) for name in paths}
    options: dict[str, Any] = {"channels": channels, "activation": act, "paths": paths, "attn": None}
    attention = _attention(find(block, "attn"))
    if attention is None:
        kernel = Layers("mlp", layers, own=tuple(own))
        return Plan(_block, kernel, options, ("scaled_residual", "mlp"), ndim=3, size=True)
    layers |= {"norm1": norm_last(find(block, "norm1")), **within("attn", block, attention.layers.layers)}
    options |= {"attn": attention.options}
    kernel = Layers("xca", layers, own=(*own, *(f"attn.{name}" for name in attention.layers.own)))
    return Plan(_block, kernel, options, ("xca", "scaled_residual", "mlp"), ndim=3, size=True)


def _attention(attn: Any) -> Plan | None:
    """That of a block's attention, if it has no dropout."""
    try:
        plan = xca(attn) if isinstance(attn, nn.Module) else None
    except Unfit:
        return None
    drops = [find(attn, name) for name in ("attn_drop", "proj_drop")]
    return None if plan is None or any(getattr(drop, "p", 0) for drop in drops) else plan


def _block(block: Any, found: list[Any], options: dict[str, Any], x: Tensor, height: int, width: int) -> Tensor:
    (gamma1, gamma3, gamma2), rest = found[:3], found[3:]
    path1, path3, path2 = (find(block, name) for name in options["paths"])
    temperature = [] if options["attn"] is None else [rest.pop(0)]
    (norm_weight, norm_bias, *mlp), of_attention = rest[:6], rest[6:]
    if options["attn"] is None:
        x = _residual(x, block.attn(block.norm1(x)), gamma1, path1)
    else:
        tail = {"gamma": gamma1, "residual": x, "path_scale": path_scale(path1, x)}
        norm = {"norm_weight": of_attention[0], "norm_bias": of_attention[1], "eps": block.norm1.eps}
        x = _xca(block.attn, temperature + of_attention[2:], options["attn"], x, **norm, **tail)
    x = _residual(x, block.local_mp(block.norm3(x), height, width), gamma3, path3)
    pixels, of_pixels, scale = x[:, None], (norm_weight, norm_bias, block.norm2.eps), path_scale(path2, x)
    y = run_mlp(pixels, mlp, options, norm=of_pixels, gamma=gamma2, residual=pixels, path_scale=scale)
    return y[:, 0]


def _residual(x: Tensor, branch: Tensor, gamma: Tensor, path: nn.Module) -> Tensor:
    """x + drop_path(gamma * branch) of tokens."""
    x, branch = x.transpose(1, 2)[..., None], branch.transpose(1, 2)[..., None]
    return fused_scaled_residual(x, branch, gamma, path_scale(path, branch))[..., 0].transpose(1, 2)
