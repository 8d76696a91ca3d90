"""The inverted bottleneck of many blocks: its layers, under the names of several packages, and its op."""

from typing import Any

from torch import Tensor, nn

from ..nn._layers import Layer, dropout
from ..ops.mlp import fused_mlp
from .layers import Unfit, activation, dense, find, foreign, plain, width


def mlp_layers(block: nn.Module, fc1: str, act: str, fc2: str, channels: int) -> tuple[dict[str, Layer], str]:
    """Those with weights, the first two, and the activation; and the activation's name in the op."""
    hidden = _hidden(block, fc1, fc2)
    layer, name = activation(find(block, act))
    first, second = dense(find(block, fc1), channels, hidden), dense(find(block, fc2), hidden, channels)
    return {fc1: first, fc2: second, act: layer}, name


def _hidden(block: nn.Module, fc1: str, fc2: str) -> int:
    try:
        return width(block, fc1)
    except Unfit:
        return width(block, fc2, dim=1)


def container_layers(block: nn.Module, name: str, channels: int) -> tuple[dict[str, Layer], str]:
    """Of timm's Mlp: what it is made of, in the order of `mlp_layers`."""
    container = find(block, name)
    if type(container).__name__ != "Mlp":
        raise Unfit(f"{name} is a {type(container).__name__}, not an Mlp")
    layers, act = mlp_layers(block, f"{name}.fc1", f"{name}.act", f"{name}.fc2", channels)
    layers[name] = foreign(container)
    for child in container._modules:
        if child.startswith("drop"):
            layers[f"{name}.{child}"] = dropout()
        elif child == "norm":
            layers[f"{name}.{child}"] = plain(nn.Identity)
    return layers, act


def run_mlp(
    x: Tensor,
    weights: list[Any],
    options: dict[str, Any],
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gamma: Tensor | None,
    residual: Tensor,
    path_scale: Tensor | None,
) -> Tensor:
    """residual + path_scale * gamma * fc2(act(fc1(norm(x)))) of (N, ..., C); weights: those of fc1 and fc2."""
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    return fused_mlp(
        x,
        *weights,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        activation=options["activation"],
        gamma=None if gamma is None else gamma.flatten(),
        residual=residual,
        path_scale=path_scale,
    )
