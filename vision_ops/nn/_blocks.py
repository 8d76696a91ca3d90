"""What the blocks of several networks share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import resolve_backend
from ..ops._batch_norm import wide
from ..ops._checks import autocast_enabled
from ..ops.batch_norm_act import fused_batch_norm_act
from ..ops.dwconv import fused_dwconv
from ..ops.mlp import fused_mlp
from ..ops.scaled_residual import fused_scaled_residual
from ..reference.dwconv import ACTIVATIONS
from ._checkpointing import checkpointed
from ._layers import Layer, Layers, computed, layer_norm, linear, module


class Blocks(nn.Sequential):
    """Blocks in a row; with grad_checkpointing, each is computed again in backward instead of keeping what it saved."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        again = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self:
            x = checkpointed(block, x) if again else block(x)
        return x


@computed
class DropPath(nn.Module):
    """Stochastic depth: drops whole samples of a residual branch in training and scales up what stays."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        kept = self.draw(x)
        return x if kept is None else x * kept.view(-1, *(1,) * (x.ndim - 1))

    def draw(self, x: Tensor) -> Tensor | None:
        """A factor for every sample of x, (N,); None where none is dropped."""
        if self.drop_prob == 0 or not self.training:
            return None
        return x.new_empty(x.shape[:1]).bernoulli_(1 - self.drop_prob).div_(1 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


def layer_scale(dim: int, init_value: float) -> nn.Parameter | None:
    """gamma, (C,); None where the official constructors have none."""
    return nn.Parameter(torch.full((dim,), float(init_value))) if init_value > 0 else None


def fill_(parameter: nn.Parameter | None, value: float) -> None:
    """What `reset_parameters` does to a factor, which some blocks are built without."""
    if parameter is not None:
        nn.init.constant_(parameter, value)


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def inverted_bottleneck(
    x: Tensor, pwconv1: nn.Module, act: Callable[[Tensor], Tensor], pwconv2: nn.Module, gamma: Tensor | None
) -> Tensor:
    """gamma * pwconv2(act(pwconv1(x))) of (N, H, W, C), as (N, C, H, W)."""
    return scaled(pwconv2(act(pwconv1(x))), gamma).permute(0, 3, 1, 2)


def convolve(block: nn.Module, kernel: Layers, x: Tensor, stride: int = 1) -> Tensor:
    """The depthwise convolution, padded by half of its kernel, that is the only layer of `kernel`."""
    parameters = kernel.tensors(block, x)
    if parameters is None:
        (name,) = kernel.layers
        return getattr(block, name)(x)
    return fused_dwconv(x, *parameters, stride=stride)


def of_call(norm: nn.Module) -> dict[str, Any]:
    """The options of `fused_batch_norm_act` for a call of nn.BatchNorm2d, which is counted."""
    momentum = norm.momentum
    if norm.training:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return {"training": norm.training, "momentum": momentum or 0.0, "eps": norm.eps}


def normalize(
    block: nn.Module, kernel: Layers | None, x: Tensor, activation: str | None = None, *, name: str
) -> Tensor:
    """act(norm(x)) by the norm of this name, the only layer of `kernel`; None for one that no kernel computes."""
    norm = getattr(block, name)
    parameters = None if kernel is None else kernel.tensors(block, x)
    if parameters is None:
        return ACTIVATIONS[activation](norm(x))
    return fused_batch_norm_act(x, *parameters, **of_call(norm), activation=activation)


def evaluated(block: nn.Module, kernel: Layers | None, x: Tensor, *, name: str) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of the batch norm of this name, the only layer of `kernel`, where weights beside it can take them
    up: in evaluation, by kernels; autocast would round them."""
    norm = getattr(block, name)
    parameters = None if kernel is None or norm.training else kernel.tensors(block, x)
    if parameters is None or resolve_backend(None) == "reference" or autocast_enabled(x):
        return None
    weight, bias, mean, variance = (t.to(wide(x)) for t in parameters)
    scale = weight * (variance + norm.eps).rsqrt()
    return scale, torch.addcmul(bias, scale, mean, value=-1)


def convolve_normalize(
    block: nn.Module,
    kernel: Layers,
    norm_kernel: Layers,
    x: Tensor,
    activation: str | None = None,
    *,
    stride: int = 1,
    name: str,
) -> Tensor:
    """act(norm(dwconv(x))): in evaluation the norm is part of the convolution, in float32 beside a half x."""
    affine = evaluated(block, norm_kernel, x, name=name)
    parameters = None if affine is None else kernel.tensors(block, x)
    if affine is None or parameters is None or parameters[1] is not None:
        return normalize(block, norm_kernel, convolve(block, kernel, x, stride), activation, name=name)
    scale, shift = affine
    return fused_dwconv(x, parameters[0] * scale[:, None, None, None], shift, stride=stride, activation=activation)


def tail_layers(gamma: str | None = None) -> Layers:
    """What `residual` takes of a block: layer scale, and its drop_path."""
    return Layers("scaled_residual", {"drop_path": module(DropPath)}, own=(gamma,) if gamma else ())


def residual(block: nn.Module, tail: Layers, x: Tensor, branch: Tensor) -> Tensor:
    """x + drop_path(gamma * branch) of (N, C, H, W)."""
    parameters = tail.tensors(block, branch)
    if parameters is not None and x.shape == branch.shape:
        gamma = parameters[0].flatten() if tail.own else None
        return fused_scaled_residual(x, branch, gamma, block.drop_path.draw(branch))
    if tail.own:
        branch = getattr(block, tail.own[0]).flatten()[:, None, None] * branch
    return x + block.drop_path(branch)


class HalfBlock(Layers):
    """The layers of a half-block, residual + drop_path(gamma * f(norm(x))), which one op computes.

    Args:
        op, layers, own: as `Layers`, for f alone.
        gamma, norm: their names in the block; None where there is none. norms: how the norm is computed.
    """

    def __init__(
        self,
        op: str,
        layers: dict[str, Layer],
        own: tuple[str, ...] = (),
        *,
        gamma: str | None = None,
        norm: str | None = None,
        norms: Layer | None = None,
    ) -> None:
        self.gamma, self.norm = gamma, norm
        in_front = {} if norm is None or norms is None else {norm: norms}
        every = {**layers, **in_front, "drop_path": module(DropPath)}
        super().__init__(op, every, own=(*((gamma,) if gamma else ()), *own))

    def given(self, block: nn.Module, x: Tensor, residual: Tensor) -> tuple[list[Any], dict[str, Any]] | None:
        """The tensors of f, and what else the op takes; None where the block is to call its layers."""
        tensors = self.tensors(block, x)
        if tensors is None or residual.shape != x.shape:
            return None
        more = {"residual": residual, "path_scale": block.drop_path.draw(residual)}
        if self.gamma is not None:
            more["gamma"] = tensors.pop(0).flatten()
        if self.norm is not None:
            more["norm_bias"], more["norm_weight"] = tensors.pop(), tensors.pop()
            more["eps"] = getattr(block, self.norm).eps
        return tensors, more


def half_of(
    kernel: Layers | None,
    part: str,
    kind: type[nn.Module],
    *,
    gamma: str | None,
    norm: str | None = None,
    norms: Layer | None = None,
) -> HalfBlock | None:
    """The half-block whose f is the module of this name and type, which `kernel` computes alone."""
    if kernel is None:
        return None
    layers = {f"{part}.{name}": layer for name, layer in kernel.layers.items()}
    own = tuple(f"{part}.{name}" for name in kernel.own)
    return HalfBlock(kernel.op, {part: module(kind, fused=True), **layers}, own, gamma=gamma, norm=norm, norms=norms)


def mlp_layers(
    channels: int,
    hidden: int,
    names: tuple[str, str] = ("pwconv1", "pwconv2"),
    *,
    norm: str | None = None,
    gamma: str | None = None,
    others: dict[str, Layer] | None = None,
) -> HalfBlock:
    """What `mlp` takes of a block. others: layers that it computes, or leaves out, besides."""
    layers = {names[0]: linear(channels, hidden), names[1]: linear(hidden, channels), **(others or {})}
    return HalfBlock("mlp", layers, gamma=gamma, norm=norm, norms=layer_norm(channels))


def mlp(block: nn.Module, kernel: HalfBlock, x: Tensor, residual: Tensor, activation: str = "gelu") -> Tensor | None:
    """residual + drop_path(gamma * fc2(act(fc1(norm(x))))) of (N, H, W, C); None where the block is to call its layers.

    residual may be x itself, which saves a pass.
    """
    given = kernel.given(block, x, residual)
    return None if given is None else fused_mlp(x, *given[0], activation=activation, **given[1])
