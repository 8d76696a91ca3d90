"""Whether the layers of a block are what its kernel computes.

A kernel takes the weights of several layers and calls none of them. So it may stand for them only while calling them
would do nothing else: layers of these very types and attributes, without hooks, with weights that are plain tensors.
Where it may not, the block calls its layers, and `vision_ops.explain` names the one that is the reason.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._internals import global_hooks, graph_tensors
from ..dispatch import resolve_backend

# What graphs are made of stands for tensors, unlike DTensors and the packed weights of quantized layers.
_PLAIN_TENSORS = (Tensor, nn.Parameter, *graph_tensors)

# The types of layers that kernels compute, each with its forward and what a convolution's forward calls: some code puts
# its own in the place of a class's, perhaps before this is imported.
_KINDS: dict[str, tuple[type[nn.Module], Any, Any]] = {}


def computed(kind: type[nn.Module]) -> type[nn.Module]:
    """Decorates a class of modules that a kernel computes."""
    register(kind)
    return kind


def register(kind: type[nn.Module], key: str | None = None) -> str:
    """Makes a class one that a kernel computes, under a key of its own, or under the one that another process gave."""
    if key is None:
        key = _key(kind)
        while key in _KINDS and _KINDS[key][0] is not kind:  # classes of functions, and of modules that were reloaded
            key += "'"
    _KINDS.setdefault(key, (kind, _own(kind, "forward"), _own(kind, "_conv_forward")))
    return key


def registered(key: str) -> type[nn.Module]:
    return _KINDS[key][0]


def _key(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _own(kind: type[nn.Module], name: str) -> Any:
    """A method as its class has it; what is like no method where something else is in its place."""
    method = getattr(kind, name, None)
    if method is None:
        return None
    named = getattr(method, "__module__", None), getattr(method, "__qualname__", None)
    owned = any(named == (owner.__module__, f"{owner.__qualname__}.{name}") for owner in kind.__mro__)
    return method if owned and not hasattr(method, "__wrapped__") else object()


for _kind in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.Dropout, nn.GELU):
    computed(_kind)


class Layer(NamedTuple):
    """A layer as a kernel computes it: its type, a key of _KINDS, its attributes and its tensors.

    shape: of the first of `tensors`. bias: whether there is one, None if the kernel takes both. inactive: whether the
    kernel leaves the layer out.
    """

    kind: str
    attributes: tuple[tuple[str, Any], ...] = ()
    tensors: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    bias: bool | None = None
    inactive: bool = False


_WEIGHT_AND_BIAS = "weight", "bias"


def depthwise(
    channels: int, kernel_size: int, *, stride: int = 1, padding: int | None = None, dilation: int = 1
) -> Layer:
    """nn.Conv2d of one channel per group. padding: None keeps the size."""
    padding = dilation * (kernel_size // 2) if padding is None else padding
    shape = channels, 1, kernel_size, kernel_size
    return _conv2d(shape, stride, padding, dilation, channels)


def pointwise(inputs: int, outputs: int) -> Layer:
    """nn.Conv2d of 1x1."""
    return _conv2d((outputs, inputs, 1, 1), 1, 0, 1, 1)


def unbiased(convolution: Layer) -> Layer:
    return convolution._replace(bias=False)


def _conv2d(shape: tuple[int, ...], stride: int, padding: int, dilation: int, groups: int) -> Layer:
    pairs = {"stride": stride, "padding": padding, "dilation": dilation}
    attributes = *((name, (n, n)) for name, n in pairs.items()), ("groups", groups), ("padding_mode", "zeros")
    return Layer(_key(nn.Conv2d), attributes, _WEIGHT_AND_BIAS, shape)


def linear(inputs: int, outputs: int, *, bias: bool | None = None) -> Layer:
    return Layer(_key(nn.Linear), (), _WEIGHT_AND_BIAS, (outputs, inputs), bias)


def layer_norm(channels: int) -> Layer:
    """Of any eps, which the block hands to the kernel."""
    attributes = (("normalized_shape", (channels,)),)
    return Layer(_key(nn.LayerNorm), attributes, _WEIGHT_AND_BIAS, (channels,), True)


def layer_norm_2d(channels: int) -> Layer:
    """`LayerNorm2d`, of any eps."""
    attributes = (("normalized_shape", (channels,)),)
    return Layer("vision_ops.nn.layer_norm.LayerNorm2d", attributes, _WEIGHT_AND_BIAS, (channels,), True)


def batch_norm(channels: int) -> Layer:
    """nn.BatchNorm2d in training or evaluation, of any eps and momentum, which the block hands to the kernel."""
    attributes = ("num_features", channels), ("affine", True), ("track_running_stats", True)
    return Layer(
        _key(nn.BatchNorm2d), attributes, (*_WEIGHT_AND_BIAS, "running_mean", "running_var"), (channels,), True
    )


def dropout() -> Layer:
    """nn.Dropout, which the kernel leaves out."""
    return Layer(_key(nn.Dropout), inactive=True)


def module(kind: type[nn.Module], **attributes: Any) -> Layer:
    """Any other module that is `computed`."""
    return Layer(_key(kind), tuple(attributes.items()))


class Layers:
    """The layers that one op computes in the place of a block, and what it takes of the block itself.

    Args:
        op: the name of the op, "dwconv" for `fused_dwconv`.
        layers: by their names in the block, which may have dots.
        own: names of the block's own parameters, or with dots of a part's.
    """

    def __init__(self, op: str, layers: dict[str, Layer] | None = None, own: tuple[str, ...] = ()) -> None:
        self.op, self.own = op, own
        self.layers = layers or {}
        self._owners = tuple(tuple(name.split(".")) for name in own)
        # Constants only, which compiled graphs guard as one.
        self._flat = tuple((tuple(name.split(".")), *layer) for name, layer in self.layers.items())

    def tensors(self, block: nn.Module, x: Any) -> list[Any] | None:
        """The tensors that the op takes besides x, those of the block first, then a layer's after another's; None if
        the block is to call its layers.

        Raises:
            ValueError: it is to call them though the backend is "fused".
        """
        if not getattr(block, "fused", True):  # which modules that are not ours lack
            return None
        found: list[Any] = []
        odd = self._odd(block, x, found)
        if odd is None:
            return found
        if resolve_backend(None) == "fused" and odd[1] != _ACTIVE:
            raise ValueError(
                f"backend='fused', but fused_{self.op} is not what the layers of {type(block).__name__} compute: "
                + "; ".join(self.reasons(block, x))
            )
        return None

    def _odd(self, block: nn.Module, x: Any, found: list[Any], start: int = 0) -> tuple[int, str] | None:
        """The first layer, from start, that is not as the kernel computes it: its index, and a word for `_words`."""
        if not isinstance(x, Tensor):
            return -1, "input"
        forward_hooks, forward_pre_hooks, backward_hooks, backward_pre_hooks = global_hooks
        if forward_hooks or forward_pre_hooks or backward_hooks or backward_pre_hooks:
            return -1, _GLOBAL_HOOKS
        device = x.device
        for name, (*parts, leaf) in zip(self.own, self._owners, strict=True):
            owner: Any = block
            for part in parts:
                owner = owner._modules.get(part)
            t: Any = None if owner is None else _tensor(owner, leaf)
            if type(t) not in _PLAIN_TENSORS or t.device != device or t.layout is not torch.strided:
                return -1, name
            found.append(t)
        for i, (path, key, attributes, tensors, shape, bias, inactive) in enumerate(self._flat):
            if i < start:
                continue
            layer: Any = block
            for part in path:
                layer = layer._modules.get(part)  # takes a tenth of the time of getattr
                if layer is None:
                    return i, "missing"
            kind, forward, conv_forward = _KINDS[key]
            if type(layer) is not kind:
                return i, "type"
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                return i, "hooks"
            state = layer.__dict__
            if "forward" in state or kind.forward is not forward:
                return i, "forward"
            if conv_forward is not None and ("_conv_forward" in state or kind._conv_forward is not conv_forward):
                return i, "forward"
            if inactive and layer.training and layer.p > 0:
                return i, _ACTIVE
            for attribute, value in attributes:
                if state[attribute] != value:
                    return i, attribute
            parameters = layer._parameters
            for name in tensors:
                t = parameters[name] if name in parameters else getattr(layer, name, None)
                if t is None and name == "bias" and bias is not True:
                    found.append(None)
                    continue
                if type(t) not in _PLAIN_TENSORS or t.device != device or t.layout is not torch.strided:
                    return i, name
                if name == "bias":
                    if bias is False:
                        return i, name
                elif t.shape != shape:
                    return i, name
                found.append(t)
        return None

    def reasons(self, block: nn.Module, x: Any) -> list[str]:
        """In words, why the block calls its layers."""
        if not getattr(block, "fused", True):
            return [_UNFUSED]
        found, odd = [], self._odd(block, x, [])
        while odd is not None:
            found.append(self._words(block, x, *odd))
            odd = None if odd[0] < 0 else self._odd(block, x, [], odd[0] + 1)
        return found

    def _words(self, block: nn.Module, x: Any, i: int, what: str) -> str:
        if what == "input":
            return f"x is a {type(x).__name__}, not a tensor"
        if what in OF_ALL:
            return what
        if i < 0:
            *path, leaf = what.split(".")
            return f"{what} {_difference(_tensor(block.get_submodule('.'.join(path)), leaf), x.device)}"
        name, expected = list(self.layers.items())[i]
        if what == "missing":
            return f"{name} is missing"
        layer = block.get_submodule(name)
        if what == "type":
            kind, wanted = type(layer), _KINDS[expected.kind][0].__name__
            return f"{name} is a {_key(kind) if kind.__name__ == wanted else kind.__name__}, not a {wanted}"
        if what in expected.tensors:
            shape = expected.shape if what == expected.tensors[0] else None
            return f"{name}.{what} {_difference(_tensor(layer, what), x.device, shape)}"
        if what in _STATES:
            return f"{name} {_STATES[what]}"
        return f"{name}.{what} is {getattr(layer, what)!r}, not {dict(expected.attributes)[what]!r}"


_ACTIVE = "active"
_GLOBAL_HOOKS, _UNFUSED = "there are hooks for all modules", "fused=False"
OF_ALL = _GLOBAL_HOOKS, _UNFUSED  # reasons that are no layer's
_STATES = {"hooks": "has hooks", "forward": "has a forward of its own", _ACTIVE: "is active"}


def _tensor(module: nn.Module, name: str) -> Any:
    """A parameter, or what wrappers and functional calls put in its place."""
    own = module._parameters  # takes a tenth of the time of getattr
    return own[name] if name in own else getattr(module, name, None)


def _difference(t: Any, device: torch.device, shape: tuple[int, ...] | None = None) -> str:
    """How a tensor differs from what kernels take."""
    if t is None:
        return "is missing"
    if type(t) not in _PLAIN_TENSORS:
        return f"is a {type(t).__name__}"
    if t.device != device:
        return f"is on {t.device}, x on {device}"
    if t.layout is not torch.strided:
        return f"is a tensor of layout {t.layout}"
    if shape is not None and t.shape != shape:
        return f"has shape {tuple(t.shape)}, not {shape}"
    return "is one too many"
