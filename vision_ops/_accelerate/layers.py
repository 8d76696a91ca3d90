"""Layers of other packages as kernels compute them, by class name and attributes.

What is not as expected is described as the layer of PyTorch that it should be, and `Layers` then says what differs.
"""

from typing import Any

from torch import Tensor, nn

from ..nn._blocks import DropPath
from ..nn._layers import Layer, depthwise, layer_norm, linear, module, pointwise, register

_ACTIVATIONS = {"GELU": "gelu", "SiLU": "silu", "Hardswish": "hardswish"}
_DROP_PATHS = "Identity", "DropPath", "StochasticDepth"


class Unfit(Exception):
    """A module has the names of one that is known, and is another; its text says why."""


def find(block: nn.Module, name: str) -> Any:
    """A layer, a parameter or an attribute of a block, by a name that may have dots; None if there is none."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def has(block: nn.Module, *names: str) -> bool:
    """Whether all of these are layers or parameters of a block; those of None count."""
    return all(_has(block, *name.rpartition(".")[::2]) for name in names if name)


def _has(block: nn.Module, path: str, name: str) -> bool:
    owner = find(block, path) if path else block
    return isinstance(owner, nn.Module) and any(
        name in names for names in (owner._modules, owner._parameters, vars(owner))
    )


def as_own(name: str, block: nn.Module, *shapes: tuple[int, ...]) -> tuple[str, ...]:
    """The name of a parameter that a block has, for `Layers`; nothing if it is None."""
    parameter = find(block, name)
    if parameter is None:
        return ()
    if not isinstance(parameter, Tensor) or tuple(parameter.shape) not in shapes:
        shape = tuple(parameter.shape) if isinstance(parameter, Tensor) else type(parameter).__name__
        raise Unfit(f"{name} is {shape}, not {shapes[0]}")
    return (name,)


def width(block: nn.Module, *names: str, dim: int = 0) -> int:
    """The channels, from the first of these that is a layer with a weight, or a parameter."""
    for name in names:
        found = find(block, name)
        weight = getattr(found, "weight", None) if isinstance(found, nn.Module) else found
        if isinstance(weight, Tensor) and weight.ndim > dim:
            return weight.shape[dim]
    raise Unfit(f"{names[0]} has no weight")


def foreign(layer: nn.Module, **attributes: Any) -> Layer:
    """A layer of whatever class it has, with the attributes that it has of these."""
    found = {name: value for name, value in attributes.items() if name in vars(layer)}
    return Layer(register(type(layer)), tuple(found.items()))


def within(name: str, block: nn.Module, layers: dict[str, Layer]) -> dict[str, Layer]:
    """A part of a block and the layers in it, by their names in the block."""
    return {name: foreign(find(block, name)), **{f"{name}.{layer}": kind for layer, kind in layers.items()}}


def same_conv(conv: Any, channels: int, name: str, kernel_size: int | None = None) -> Layer:
    """A depthwise convolution that keeps the size, of any odd kernel if none is given."""
    if kernel_size is None:
        size = getattr(conv, "kernel_size", (7, 7))
        if size[0] % 2 == 0:
            raise Unfit(f"{name}.kernel_size is {size}, and even ones have no kernel")
        kernel_size = size[0]
    return depthwise(channels, kernel_size)


def norm_last(norm: Any) -> Layer:
    """LayerNorm over the last dimension, or over the second with `channels_first`: to a kernel it is the same."""
    return _norm(norm, "channels_last")


def norm_first(norm: Any) -> Layer:
    """LayerNorm over the second dimension."""
    return _norm(norm, "channels_first")


def _norm(norm: Any, data_format: str) -> Layer:
    channels = norm.weight.shape[0] if isinstance(getattr(norm, "weight", None), Tensor) else 0
    expected, name = layer_norm(channels), type(norm).__name__
    second = name == "LayerNorm2d" and "data_format" not in vars(norm)
    if name not in ("LayerNorm", "LayerNorm2d") or (second and data_format == "channels_last"):
        return expected
    if name == "LayerNorm" and data_format == "channels_first" and "data_format" not in vars(norm):
        return expected
    found = foreign(norm, normalized_shape=(channels,), data_format=data_format, _fast_norm=False)
    return found._replace(tensors=expected.tensors, shape=expected.shape, bias=True)


def activation(layer: Any) -> tuple[Layer, str]:
    """With its name in the ops."""
    kind = type(layer).__name__
    if kind in _ACTIVATIONS:
        return foreign(layer, approximate="none"), _ACTIVATIONS[kind]
    return module(nn.GELU, approximate="none"), "gelu"


def gelu(layer: Any) -> Layer:
    return activation(layer)[0] if type(layer).__name__ == "GELU" else module(nn.GELU, approximate="none")


def plain(kind: type[nn.Module], **attributes: Any) -> Layer:
    """A layer of PyTorch's own class."""
    register(kind)
    return module(kind, **attributes)


def drop_path(layer: Any) -> Layer:
    """Stochastic depth, which is called to draw a factor for every sample."""
    return foreign(layer) if type(layer).__name__ in _DROP_PATHS else module(DropPath)


def path_scale(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The factors that `layer`, as above, gives the samples of x, drawn as it draws them; None if all are 1."""
    if not layer.training or type(layer) is nn.Identity:
        return None
    return layer(x.new_ones((x.shape[0], 1, 1, 1))).flatten()


def dense(layer: Any, inputs: int, outputs: int) -> Layer:
    """A linear layer, or a 1x1 convolution."""
    return pointwise(inputs, outputs) if isinstance(layer, nn.Conv2d) else linear(inputs, outputs)
