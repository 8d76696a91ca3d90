"""HorNet (arXiv 2207.14284), in the layout of the official code."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..nn._layers import Layers, depthwise, pointwise
from ..ops.dwconv import fused_dwconv
from ..ops.gated_recursion import fused_gated_recursion
from ..ops.global_filter import fused_global_filter
from ..ops.gnconv import fused_gnconv
from ..ops.scaled_residual import fused_scaled_residual
from .forward import Plan
from .layers import (
    Unfit,
    as_own,
    drop_path,
    find,
    has,
    norm_first,
    norm_last,
    path_scale,
    same_conv,
    width,
    within,
)
from .mlp import mlp_layers, run_mlp


def gnconv(block: nn.Module) -> Plan | None:
    """With a depthwise convolution it is one op; with a global filter, which is called, its recursion is."""
    if not has(block, "proj_in", "dwconv", "proj_out", "pws"):
        return None
    channels, order = width(block, "proj_out", "proj_in"), len(find(block, "pws")) + 1
    dims, scale = [channels >> k for k in reversed(range(order))], getattr(block, "scale", None)
    if channels % 2 ** (order - 1) or list(getattr(block, "dims", [])) != dims:
        raise Unfit(f"dims is {getattr(block, 'dims', None)}, not {dims}")
    if not isinstance(scale, (int, float)):
        raise Unfit(f"scale is {scale!r}, not a number")
    layers = {f"pws.{i}": pointwise(a, b) for i, (a, b) in enumerate(itertools.pairwise(dims))}
    options = {"channels": channels, "scale": float(scale), "dims": dims}
    if type(find(block, "dwconv")).__name__ == "GlobalLocalFilter":
        kernel = Layers("gated_recursion", layers)
        return Plan(_recursion, kernel, options, ("gated_recursion",))
    into = {"proj_in": pointwise(channels, 2 * channels)}
    into["dwconv"] = same_conv(find(block, "dwconv"), sum(dims), "dwconv")
    ends = {"proj_out": pointwise(channels, channels), **layers}
    return Plan(_gnconv, Layers("gnconv", {**into, **ends}), options, ("gnconv",))


def _gnconv(block: nn.Module, found: list[Any], options: dict[str, Any], x: Tensor, **half: Any) -> Tensor:
    into, out, pws = found[:4], found[4:6], found[6:]
    given = *into, pws[::2], pws[1::2], *out
    return fused_gnconv(x, *given, scale=options["scale"], **half)


def _recursion(block: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    dims = options["dims"]
    p, gates = block.proj_in(x).split([dims[0], sum(dims)], dim=1)
    gates = block.dwconv(gates) * options["scale"]
    return block.proj_out(fused_gated_recursion(p, gates, found[::2], found[1::2]))


def global_local_filter(block: nn.Module) -> Plan | None:
    if not has(block, "dw", "complex_weight", "pre_norm", "post_norm"):
        return None
    channels, weight = 2 * width(block, "dw", "complex_weight"), find(block, "complex_weight")
    own = as_own("complex_weight", block, (channels // 2, *weight.shape[1:3], 2))
    kernel = Layers("global_filter", {"dw": depthwise(channels // 2, 3)}, own=own)
    return Plan(_filter, kernel, {"channels": channels}, ("dwconv", "global_filter"))


def _filter(block: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    weight, *conv = found
    local, globally = block.pre_norm(x).chunk(2, dim=1)
    both = fused_dwconv(local, *conv), fused_global_filter(globally, weight)
    return block.post_norm(torch.stack(both, dim=2).flatten(1, 2))


def hor_block(block: nn.Module) -> Plan | None:
    """A gated convolution that is one op takes norm1 and the residual with it, any other is called; norm2 and the MLP
    are one op."""
    if not has(block, "norm1", "gnconv", "norm2", "pwconv1", "act", "pwconv2", "gamma1", "gamma2", "drop_path"):
        return None
    channels = width(block, "norm2", "gamma2")
    own = [name for gamma in ("gamma1", "gamma2") for name in as_own(gamma, block, (channels,))]
    if len(own) == 1:
        raise Unfit(f"{own[0]} is the only gamma")
    mlp, act = mlp_layers(block, "pwconv1", "act", "pwconv2", channels)
    layers = {"norm2": norm_last(find(block, "norm2")), **mlp, "drop_path": drop_path(find(block, "drop_path"))}
    options: dict[str, Any] = {"channels": channels, "activation": act, "scaled": bool(own), "gnconv": None}
    try:
        gated = gnconv(find(block, "gnconv"))
    except Unfit:
        gated = None
    if gated is None or gated.run is not _gnconv:
        return Plan(_hor_block, Layers("mlp", layers, own=tuple(own)), options, ("scaled_residual", "mlp"))
    layers |= {"norm1": norm_first(find(block, "norm1")), **within("gnconv", block, gated.layers.layers)}
    options |= {"gnconv": gated.options}
    return Plan(_hor_block, Layers("gnconv", layers, own=tuple(own)), options, ("gnconv", "mlp"))


def _hor_block(block: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    gamma1, gamma2 = (found.pop(0), found.pop(0)) if options["scaled"] else (None, None)
    (norm_weight, norm_bias, *mlp), gated = found[:6], found[6:]
    if options["gnconv"] is None:
        y = block.gnconv(block.norm1(x))
        x = fused_scaled_residual(x, y, gamma1, path_scale(block.drop_path, y))
    else:
        tail = {"gamma": gamma1, "residual": x, "path_scale": path_scale(block.drop_path, x)}
        norm = {"norm_weight": gated[0], "norm_bias": gated[1], "eps": block.norm1.eps}
        x = _gnconv(block.gnconv, gated[2:], options["gnconv"], x, **norm, **tail)
    pixels, scale = x.permute(0, 2, 3, 1), path_scale(block.drop_path, x)
    of_pixels = norm_weight, norm_bias, block.norm2.eps
    y = run_mlp(pixels, mlp, options, norm=of_pixels, gamma=gamma2, residual=pixels, path_scale=scale)
    return y.permute(0, 3, 1, 2)
