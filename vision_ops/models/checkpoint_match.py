"""Finding a fitting tensor of a checkpoint for every key of a model, and a use for every key of the checkpoint."""

import re
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._backbone import Backbone
from .key_layouts import KeyLayout, adapt_first_conv, resize_global_filter, unwrapped

_SHOWN = 6  # keys of each kind that an error lists


@dataclass
class Match:
    """The tensors of a checkpoint by the model's keys. They are all the model needs if there are no problems.

    Elsewhere keys are those inside of wrappers, and `left_out` has the checkpoint's.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_classes: int | None = None  # what the classifier must be reset to
    ema: bool = False
    resized: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def match_keys(model: Backbone, layout: KeyLayout, entries: dict[str, Any], ema: bool, classifier: str) -> Match:
    state = model.state_dict()
    names = {unwrapped(name): name for name in state}
    own = {key: state[name] for key, name in names.items()}
    head = f"{model.classifier}."
    of_head = {key for key in own if key.startswith(head)}
    kept = of_head if classifier == "keep" else set()
    not_taken = (*model.unbuilt, head) if classifier == "keep" else tuple(model.unbuilt)
    picked = layout.pick(entries, ema)
    match = Match(ema=picked.ema, left_out=list(picked.left_out))
    unexpected, missing, misshapen = [], [], []
    head_in_the_way = False

    found: dict[str, Tensor | None] = {}
    for name, value in picked.entries.items():
        key = layout.official_key(name)
        tensor = _as_tensor(value)
        if key in kept or (key not in own and (key.startswith(not_taken) or _norm_of_a_map(model, key))):
            match.left_out.append(name)
        elif key not in own:
            unexpected.append(f"{name} {_describe(value)}")
            head_in_the_way |= key.startswith(head)
        elif key in found:
            unexpected.append(f"{name} (a second {key})")
        else:
            found[key] = None if tensor is None else layout.convert(key, tensor)
            if tensor is None:
                misshapen.append(f"{key} is {_describe(value)}, not a dense tensor of real numbers")

    shapes = {key: value.shape for key, value in own.items()}
    weight = found.get(f"{head}weight")
    classes = weight.shape[0] if weight is not None and weight.ndim else 0
    other_classes = classes and of_head == {f"{head}weight", f"{head}bias"} and classes != shapes[f"{head}weight"][0]
    if classifier == "resize" and other_classes:
        match.num_classes = classes
        for key in (f"{head}weight", f"{head}bias"):
            shapes[key] = torch.Size([classes, *shapes[key][1:]])
            match.resized.append(key)

    for key, shape in shapes.items():
        if key in kept or (key not in found and key.endswith(".num_batches_tracked")):
            match.kept.append(key)
            if key not in kept and own[key].is_meta:
                match.tensors[names[key]] = torch.zeros(shape, dtype=torch.int64)  # as of a new norm
            continue
        if key not in found:
            missing.append(f"{key} {tuple(shape)}")
            head_in_the_way |= key in of_head
            continue
        tensor = found[key]
        if tensor is None:
            continue
        if tensor.shape != shape and key.endswith(".complex_weight"):
            tensor = resize_global_filter(tensor, shape)
            match.resized.append(key)
        elif tensor.shape != shape and key == f"{model.first_conv}.weight" and tensor.shape[1:2] == (3,):
            tensor = adapt_first_conv(tensor, shape[1])
            match.resized.append(key)
        if tensor.shape != shape:
            misshapen.append(f"{key} is {tuple(tensor.shape)}, must be {tuple(shape)}{_in_chans(model, key, tensor)}")
        match.tensors[names[key]] = tensor

    of_model, of_checkpoint = f"of the model's {len(own)} keys", f"of the checkpoint's {len(picked.entries)}"
    match.problems += _listed(f"missing {of_model}", missing)
    match.problems += _listed(f"unexpected {of_checkpoint}", unexpected)
    match.problems += _listed("of the wrong shape or kind", misshapen)
    if other_classes and classifier == "strict":
        match.problems.append(
            f'classifier="resize" takes the checkpoint\'s {classes} classes, "keep" leaves the classifier as it is'
        )
    elif head_in_the_way:
        match.problems.append('classifier="keep" leaves the classifier as it is')
    if not match.problems:
        match.problems += _left_empty(model, match)
    return match


def _norm_of_a_map(model: Backbone, key: str) -> bool:
    """Detectors put a norm of their own behind each map of HorNet and EdgeNeXt."""
    return model.features_only and re.match(r"norm\d\.", key) is not None


def _in_chans(model: Backbone, key: str, tensor: Tensor) -> str:
    if key != f"{model.first_conv}.weight" or tensor.ndim != 4:
        return ""
    return f" (a model with in_chans={tensor.shape[1]} takes it; only weights of 3 channels are adapted to others)"


def _left_empty(model: Backbone, match: Match) -> list[str]:
    """What would stay on the meta device: weights that are to be kept, and buffers that no state dict has."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta and name not in match.tensors]
    advice = 'model.to_empty(device="cpu"), then model.init_weights(), gives all weights values before they are loaded'
    return [*_listed("on the meta device, and not loaded", empty), advice] if empty else []


def _as_tensor(value: Any) -> Tensor | None:
    """A dense tensor of real numbers, or None."""
    if isinstance(value, np.ndarray):
        try:
            value = torch.tensor(value)
        except (TypeError, ValueError):
            return None
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.is_meta:
        return None
    return None if value.is_complex() or value.is_quantized else value.detach()


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)}" if hasattr(value, "shape") else f"({type(value).__name__})"


def _listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    rest = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [f"{len(items)} {what}: {', '.join(items[:_SHOWN])}{rest}"]
