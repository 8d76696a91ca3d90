"""ConvNeXt's block (arXiv 2201.03545), of timm, torchvision and the official code, which EdgeNeXt's ConvEncoder is."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..nn._layers import Layers
from ..ops.dwconv import fused_dwconv
from ..ops.dwconv_layer_norm import fused_dwconv_layer_norm
from ..ops.scaled_residual import fused_scaled_residual
from .forward import Plan
from .layers import (
    Unfit,
    as_own,
    drop_path,
    find,
    foreign,
    has,
    norm_first,
    norm_last,
    path_scale,
    plain,
    same_conv,
    width,
)
from .mlp import container_layers, mlp_layers, run_mlp


class _Names(NamedTuple):
    conv: str
    norm: str
    fc1: str
    act: str
    fc2: str
    gamma: str
    drop_path: str
    container: str = ""


_TIMM = _Names("conv_dw", "norm", "mlp.fc1", "mlp.act", "mlp.fc2", "gamma", "drop_path", "mlp")
_OFFICIAL = _Names("dwconv", "norm", "pwconv1", "act", "pwconv2", "gamma", "drop_path")
_TORCHVISION = _Names("block.0", "block.2", "block.3", "block.4", "block.5", "layer_scale", "stochastic_depth")


def conv_block(block: nn.Module) -> Plan | None:
    """timm's ConvNeXtBlock and ConvBlock, ConvEncoder, ConvEncoderBNHS, ConvNeXt's Block and CNBlock."""
    for names in (_TIMM, _OFFICIAL, _TORCHVISION):
        if has(block, *names):
            return _plan(block, names)
    return None


def _plan(block: nn.Module, names: _Names) -> Plan:
    channels = width(block, names.norm, names.conv, names.gamma)
    if getattr(block, "shortcut_after_dw", False):
        raise Unfit(f"the shortcut begins behind {names.conv}")
    own = as_own(names.gamma, block, (channels,), (channels, 1, 1))
    norm, container = find(block, names.norm), find(block, names.container) if names.container else None
    layers = {names.conv: same_conv(find(block, names.conv), channels, names.conv)}
    batch_norm, last = type(norm).__name__ == "BatchNorm2d", not getattr(block, "use_conv_mlp", False)
    if not batch_norm:
        layers[names.norm] = norm_last(norm) if last else norm_first(norm)
    options: dict[str, Any] = {"channels": channels, "names": names, "gamma": bool(own), "last": False}
    tail = {names.drop_path: drop_path(find(block, names.drop_path))}
    if has(block, "shortcut"):
        tail["shortcut"] = plain(nn.Identity)
    first = "dwconv" if batch_norm else "dwconv_layer_norm"
    if type(container).__name__ == "GlobalResponseNormMlp":
        remark = f"{names.container} is a GlobalResponseNormMlp, whose norm between the layers no op has"
        kernel = Layers(first, {**layers, **tail}, own=own)
        return Plan(_run_with_mlp, kernel, {**options, "last_mlp": last}, (first, "scaled_residual"), remarks=(remark,))
    if names.container:
        mlp, act = container_layers(block, names.container, channels)
    else:
        mlp, act = mlp_layers(block, names.fc1, names.act, names.fc2, channels)
    if names is _TORCHVISION:
        sequence = find(block, "block")
        if len(sequence) != 7:
            raise Unfit(f"block has {len(sequence)} layers, not 7")
        permutes = {f"block.{i}": foreign(sequence[i], dims=dims) for i, dims in ((1, [0, 2, 3, 1]), (6, [0, 3, 1, 2]))}
        tail |= {"block": plain(nn.Sequential), **permutes}
    run = _run_batch_norm if batch_norm else _run
    kernel = Layers(first, {**layers, **mlp, **tail}, own=own)
    return Plan(run, kernel, {**options, "activation": act}, (first, "mlp"))


def _tail(block: nn.Module, names: _Names, x: Tensor) -> dict[str, Any]:
    return {"residual": x.permute(0, 2, 3, 1), "path_scale": path_scale(find(block, names.drop_path), x)}


def _run(block: nn.Module, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    names, gamma = options["names"], found.pop(0) if options["gamma"] else None
    y = fused_dwconv_layer_norm(x, *found[:4], eps=find(block, names.norm).eps)
    return run_mlp(y, found[4:8], options, gamma=gamma, **_tail(block, names, x)).permute(0, 3, 1, 2)


def _run_batch_norm(block: nn.Module, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    names, gamma = options["names"], found.pop(0) if options["gamma"] else None
    y = find(block, names.norm)(fused_dwconv(x, *found[:2])).permute(0, 2, 3, 1)
    return run_mlp(y, found[2:6], options, gamma=gamma, **_tail(block, names, x)).permute(0, 3, 1, 2)


def _run_with_mlp(block: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    names, gamma = options["names"], found.pop(0) if options["gamma"] else None
    y = fused_dwconv_layer_norm(x, *found[:4], eps=find(block, names.norm).eps)
    y = block.mlp(y).permute(0, 3, 1, 2) if options["last_mlp"] else block.mlp(y.permute(0, 3, 1, 2))
    return fused_scaled_residual(x, y, gamma, path_scale(block.drop_path, x))
