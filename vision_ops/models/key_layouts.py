"""The key layouts in which checkpoints of the five networks are found, and how each maps to the official one.

A layout is data: what its keys are recognised by, and the renamings (regular expression, replacement) that, applied in
order, turn a key into the official one.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Picked(NamedTuple):
    """The entries of a checkpoint that are wanted, what was left out, and whether an average of weights was taken."""

    entries: dict[str, Any]
    left_out: tuple[str, ...] = ()
    ema: bool = False


def _pick_all(entries: dict[str, Any], ema: bool) -> Picked:
    return Picked(entries)


def _pick(entries: dict[str, Any], sources: dict[str, str], ema: bool) -> Picked:
    """The entries under other keys; sources: their key in the checkpoint for each new one."""
    left_out = sorted(entries.keys() - set(sources.values()))
    return Picked({key: entries[source] for key, source in sources.items()}, tuple(left_out), ema)


_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def unwrapped(key: str) -> str:
    """The key inside of PyTorch's wrappers, which are found in any order, around a network or parts of it.

    DistributedDataParallel and AveragedModel call what they wrap `module`; torch.compile, FSDP and activation
    checkpointing have names of their own.
    """
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _without_prefix(key: str) -> str:
    """The frameworks' classifiers and detectors call the network `backbone`."""
    return unwrapped(key).removeprefix("backbone.")


def _as_stored(key: str, value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class KeyLayout:
    """One way to name the weights of one network.

    Attributes:
        sign: regular expression found in at least one key of this layout, and in none of the network's other layouts.
        renames: from a key of this layout to the official one.
        pick: (entries, ema) -> Picked; drops what is no weight, and chooses where a weight is stored twice.
        convert: (official key, value) -> value as PyTorch stores it.
    """

    sign: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    pick: Callable[[dict[str, Any], bool], Picked] = _pick_all
    convert: Callable[[str, Tensor], Tensor] = _as_stored

    def official_key(self, key: str) -> str:
        key = _without_prefix(key)
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


# --- openmixup


def _pick_openmixup(entries: dict[str, Any], ema: bool) -> Picked:
    """openmixup keeps a second copy of each parameter `a.b` as the buffer `ema_a_b` of the whole model.

    It exchanges the two before it saves: the averages are under the parameters' names, the buffers hold what was
    averaged.
    """
    buffers = {bare: key for key in entries if (bare := unwrapped(key)).startswith("ema_")}
    taken = set(buffers.values())
    sources = {key: key for key in entries if key not in taken}
    if not ema:
        copies = {key: f"ema_{unwrapped(key).replace('.', '_')}" for key in sources}
        sources |= {key: buffers[copy] for key, copy in copies.items() if copy in buffers}
    return _pick(entries, sources, ema and bool(buffers))


# --- TensorFlow

_EMA_SUFFIX = "/ExponentialMovingAverage"


def _pick_tensorflow(entries: dict[str, Any], ema: bool) -> Picked:
    """Below the name of a variable are its moving average and what the optimizer keeps for it: `.../kernel/Adam`.

    Scalars without a scope are counters: global_step, beta1_power.
    """
    weights, averages = {}, {}
    for source, value in entries.items():
        name = source.removesuffix(":0")
        if name.endswith(_EMA_SUFFIX):
            averages[name.removesuffix(_EMA_SUFFIX)] = source
        elif "/" in name or getattr(value, "ndim", None) != 0:
            weights[name] = source
    named = weights.keys() | averages.keys()
    slots = {name for name in weights if any(name[: match.start()] in named for match in re.finditer("/", name))}
    sources = {name: source for name, source in weights.items() if name not in slots}
    return _pick(entries, sources | averages if ema else sources, ema and bool(averages))


def _convert_tensorflow(key: str, value: Tensor) -> Tensor:
    """TensorFlow has the output channels last, and q, k, v and o with an axis for the heads.

    A value with other dimensions than these stays as it is, and is then refused for its shape.
    """
    attention = re.search(r"\.attention\.([qkvo])\.(weight|bias)$", key)
    if attention:
        if attention[2] == "bias":
            return value.flatten()
        if value.ndim == 3:
            return (value.flatten(0, 1) if attention[1] == "o" else value.flatten(1)).t()
    elif value.ndim == 4:
        return value.permute(2, 3, 0, 1) if key.endswith(".depthwise_conv.weight") else value.permute(3, 2, 0, 1)
    return value


# --- the article's MOAT


def _pick_moat_article(entries: dict[str, Any], ema: bool) -> Picked:
    """Its index into the tables of biases is computed here."""
    return _pick(entries, {key: key for key in entries if not key.endswith(".relative_position_index")}, False)


# --- the table

_HEAD_FC = (r"^head\.fc\.", "head.")

LAYOUTS: dict[str, dict[str, KeyLayout]] = {
    "MogaNet": {
        "official": KeyLayout(),
        "openmixup": KeyLayout(sign=r"^head\.fc\.|^ema_backbone_", renames=(_HEAD_FC,), pick=_pick_openmixup),
    },
    "HorNet": {
        "official": KeyLayout(),
        "mmpretrain": KeyLayout(
            sign=r"^head\.fc\.|\.gnconv\.projs\.|\.gamma[12]\.weight$",
            renames=(
                (r"\.gnconv\.projs\.", ".gnconv.pws."),
                (r"\.gamma([12])\.weight$", r".gamma\1"),
                (r"^norm3\.", "norm."),
                _HEAD_FC,
            ),
        ),
    },
    "EdgeNeXt": {
        "official": KeyLayout(),
        "timm": KeyLayout(
            sign=r"^stem\.|\.conv_dw\.|\.mlp\.fc",
            renames=(
                (r"^stem\.", "downsample_layers.0."),
                (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
                (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
                (r"\.conv_dw\.", ".dwconv."),
                (r"\.mlp\.fc([12])\.", r".pwconv\1."),
                (r"^head\.norm\.", "norm."),
                _HEAD_FC,
            ),
        ),
        "mmpretrain": KeyLayout(
            sign=r"\.depthwise_conv\.|\.pointwise_conv[12]\.|[._]csa\b",
            renames=(
                (r"\.depthwise_conv\.", ".dwconv."),
                (r"\.pointwise_conv([12])\.", r".pwconv\1."),
                (r"\.conv_modules\.", ".convs."),
                (r"\bpos_embed\.proj\.", "pos_embd.token_projection."),
                (r"([._])csa\b", r"\1xca"),
                (r"\.xca\.scale$", ".xca.temperature"),
                (r"^norm3\.", "norm."),
                _HEAD_FC,
            ),
        ),
    },
    "S2MLPv2": {"official": KeyLayout()},
    # The official code is TensorFlow's, so that "official" can only mean the names which this package gave.
    "MOAT": {
        "official": KeyLayout(),
        "tensorflow": KeyLayout(
            sign="/",
            renames=(
                (r"^moat/", ""),
                (r"^stem/", ""),
                (r"^block_0*(\d+)_0*(\d+)/", r"blocks/\1/\2/"),
                (r"/(?:depthwise_)?kernel$", "/weight"),
                (r"/gamma$", "/weight"),
                (r"/beta$", "/bias"),
                (r"/moving_mean$", "/running_mean"),
                (r"/moving_variance$", "/running_var"),
                (r"/", "."),
            ),
            pick=_pick_tensorflow,
            convert=_convert_tensorflow,
        ),
    },
    "MOATArticle": {"official": KeyLayout(pick=_pick_moat_article)},
}


def detect_layout(layouts: dict[str, KeyLayout], keys: Iterable[str]) -> str:
    """The layout whose sign is in the keys, else "official", which has none."""
    stripped = [_without_prefix(key) for key in keys]
    for name, layout in layouts.items():
        if layout.sign is not None and any(re.search(layout.sign, key) for key in stripped):
            return name
    return "official"


# --- what official codes do to values when they load


def trained_with_double_gate(file_name: str) -> bool:
    """Whether openmixup trained this checkpoint with attn_force_fp32, which applies the gate's activation twice.

    Its base configurations set it at every size; these two runs, known by their file names, did not.
    """
    return "moga_large_sz224_8xb64_accu2" not in file_name and "no_forcefp32" not in file_name


def adapt_first_conv(weight: Tensor, in_chans: int) -> Tensor:
    """The weight of the first convolution, of 3 channels, for images of another number of them, as timm adapts it.

    Of one channel it is the sum, so that a grey image gives what it gave as RGB; else the channels repeat, scaled so
    that the sum over all stays.
    """
    weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_chans, device=weight.device) % 3] * (3 / in_chans)


def resize_global_filter(weight: Tensor, shape: torch.Size) -> Tensor:
    """HorNet's complex_weight (C, h, w, 2) for another input size, as main.py of raoyongming/HorNet resizes it.

    What is no such weight of these channels stays as it is, and is then refused for its shape.
    """
    if weight.ndim != 4 or weight.shape[::3] != shape[::3] or not weight.numel() or not weight.is_floating_point():
        return weight
    planes = weight.permute(3, 0, 1, 2)
    planes = planes.float() if planes.dtype in (torch.float16, torch.bfloat16) else planes
    return F.interpolate(planes, size=tuple(shape[1:3]), mode="bilinear", align_corners=True).permute(1, 2, 3, 0)
