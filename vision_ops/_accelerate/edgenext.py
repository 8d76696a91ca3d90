"""EdgeNeXt's split depthwise transpose attention, of timm and of the official code; its ConvEncoder is `convnext`'s."""

from typing import Any

from torch import Tensor, nn

from ..nn._layers import Layers, depthwise
from ..ops.scaled_residual import fused_scaled_residual
from ..ops.split_cascade import fused_split_cascade
from .forward import Plan
from .layers import Unfit, as_own, drop_path, find, has, norm_last, path_scale, width
from .mlp import container_layers, mlp_layers, run_mlp

_SHARED = "convs.0", "norm_xca", "xca", "norm", "gamma_xca", "gamma", "drop_path"


def sdta(block: nn.Module) -> Plan | None:
    """timm's SplitTransposeBlock, SDTAEncoder and SDTAEncoderBNHS."""
    timm = has(block, *_SHARED, "mlp.fc1", "mlp.act", "mlp.fc2")
    if not timm and not has(block, *_SHARED, "pwconv1", "act", "pwconv2"):
        return None
    channels, convs = width(block, "norm", "gamma_xca"), len(find(block, "convs"))
    split = -(-channels // (convs + 1))
    if convs * split >= channels:
        raise Unfit(f"{convs + 1} splits of {split} channels are more than {channels}")
    batch_norm = type(find(block, "norm")).__name__ == "BatchNorm2d"
    own = [*as_own("gamma_xca", block, (channels,)), *as_own("gamma", block, (channels,))]
    if "gamma_xca" not in own:
        raise Unfit("gamma_xca is None")
    layers = {f"convs.{i}": depthwise(split, 3) for i in range(convs)}
    if not batch_norm:
        layers["norm"] = norm_last(find(block, "norm"))
    if timm:
        mlp, act = container_layers(block, "mlp", channels)
    else:
        mlp, act = mlp_layers(block, "pwconv1", "act", "pwconv2", channels)
    rest = {"drop_path": drop_path(find(block, "drop_path"))}
    options = {"channels": channels, "convs": convs, "timm": timm, "activation": act, "gamma": "gamma" in own}
    kernel = Layers("split_cascade", {**layers, **mlp, **rest}, own=tuple(own))
    run = _run_batch_norm if batch_norm else _run
    return Plan(run, kernel, options, ("split_cascade", "scaled_residual", "mlp"))


def _cascade(found: list[Any], options: dict[str, Any], x: Tensor) -> tuple[Tensor, list[Any], list[Any]]:
    """The maps of the cascade; gamma_xca and gamma; what is found of the layers behind it."""
    gammas = [found.pop(0), found.pop(0) if options["gamma"] else None]
    count = 2 * options["convs"]
    return fused_split_cascade(x, found[:count:2], found[1:count:2]), gammas, found[count:]


def _with_position(block: Any, options: dict[str, Any], x: Tensor) -> Tensor:
    """Adds the encoding of the position, which is that of one image, to (N, C, H, W)."""
    if block.pos_embd is None:
        return x
    size = 1, *x.shape[2:]
    return x + (block.pos_embd(size) if options["timm"] else block.pos_embd(*size))


def _attend(block: Any, gamma: Tensor, x: Tensor, normed: Tensor) -> Tensor:
    """x + gamma_xca * xca(normed) of (N, C, H, W), with the drop path; normed is (N, H, W, C)."""
    y = block.xca(normed.flatten(1, 2)).unflatten(1, normed.shape[1:3]).permute(0, 3, 1, 2)
    return fused_scaled_residual(x, y, gamma, path_scale(block.drop_path, y))


def _run(block: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    t, (gamma_xca, gamma), found = _cascade(found, options, x)
    t = _with_position(block, options, t)
    t = _attend(block, gamma_xca, t, block.norm_xca(t.permute(0, 2, 3, 1))).permute(0, 2, 3, 1)
    scale, norm = path_scale(block.drop_path, x), (found[0], found[1], block.norm.eps)
    y = run_mlp(t, found[2:6], options, norm=norm, gamma=gamma, residual=x.permute(0, 2, 3, 1), path_scale=scale)
    return y.permute(0, 3, 1, 2)


def _run_batch_norm(block: Any, found: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    t, (gamma_xca, gamma), found = _cascade(found, options, x)
    t = _with_position(block, options, block.norm_xca(t))
    t = block.norm(_attend(block, gamma_xca, t, t.permute(0, 2, 3, 1))).permute(0, 2, 3, 1)
    scale = path_scale(block.drop_path, x)
    y = run_mlp(t, found[:4], options, gamma=gamma, residual=x.permute(0, 2, 3, 1), path_scale=scale)
    return y.permute(0, 3, 1, 2)
