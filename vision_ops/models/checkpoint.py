"""`load_checkpoint`: published and own weights into the networks of this package."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._backbone import Backbone
from .checkpoint_files import read_checkpoint
from .key_layouts import LAYOUTS, KeyLayout, detect_layout, resize_global_filter, trained_with_double_gate

_EMA_WRAPPERS = ("state_dict_ema", "model_ema")
_WRAPPERS = ("state_dict", "model", "module")
_CLASSIFIER = ("strict", "resize", "keep")
_SHOWN = 6  # keys of each kind that an error lists


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load_checkpoint` loaded.

    Attributes:
        source: file name, or "state dict" for a mapping.
        layout: of the keys.
        wrapper: key under which the state dict was, None if it was bare.
        ema: whether these are averages of the weights (EMA).
        resized: official keys of global filters and classifiers that got another size.
        left_out: keys of the checkpoint that were not loaded: of parts the model has not, of a classifier that was to
            be kept, of an optimizer, or a second copy of the weights.
        kept: keys of the model that stayed as they were.
        double_gate_act: what MogaNet's modules were set to; None if they were left as they were.
    """

    source: str
    layout: str
    wrapper: str | None
    ema: bool
    resized: tuple[str, ...]
    left_out: tuple[str, ...]
    kept: tuple[str, ...]
    double_gate_act: bool | None


def load_checkpoint(
    model: Backbone,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    layout: str = "auto",
    ema: bool = True,
    classifier: str = "strict",
) -> LoadedCheckpoint:
    """Load weights into a model of this package: all of them, or none and an error that lists every key in the way.

    Args:
        model: from `create_model`. Parts that it was made without (`features_only=True`, `num_classes=0`) are left out.
        source: a path; an http(s) address, which is downloaded to torch.hub's folder; or a state dict of tensors or
            arrays. Files: .safetensors; .npz (for MOAT, with the names of TensorFlow's variables); anything else must
            be of `torch.save` and is read with `weights_only=True`, with `argparse.Namespace` and numpy scalars as the
            only other types. The state dict may be under `state_dict`, `model` or `module`, its average under
            `state_dict_ema` or `model_ema`; prefixes `module.` and `backbone.` are dropped.
        layout: "official"; "openmixup" (MogaNet); "mmpretrain" (HorNet, EdgeNeXt); "timm" (EdgeNeXt); "tensorflow"
            (MOAT); or "auto", which knows them by their keys.
        ema: take the average of the weights (EMA) where the checkpoint has one beside them. deeplab2 itself loads
            MOAT's plain weights, MogaNet's validation the averages.
        classifier: "strict": its number of classes must be that of the checkpoint; "resize": the model gets the
            checkpoint's; "keep": the model's classifier stays as it is, for fine-tuning.

    HorNet's global filters are resized to the model's as the official code does it. MogaNet's `double_gate_act` is set
    by source: True for openmixup, but for the two runs trained without it, which are known by their file names; False
    for official checkpoints. A bare state dict with official keys, as saving a model gives it, does not tell, and
    leaves it as the model was made. Values take the dtype and device of the model's.

    Raises:
        ValueError: the checkpoint is damaged, asks for code, or does not fit. The model is as it was.
    """
    network = _network_of(model)
    layouts = LAYOUTS[network]
    if layout != "auto" and layout not in layouts:
        raise ValueError(f"layout of {network} must be one of {', '.join(['auto', *layouts])}, got {layout!r}")
    if classifier not in _CLASSIFIER:
        raise ValueError(f"classifier must be one of {', '.join(_CLASSIFIER)}, got {classifier!r}")
    if isinstance(source, Mapping):
        contents, name = source, "state dict"
    elif isinstance(source, (str, os.PathLike)):
        contents, name = read_checkpoint(source)
    else:
        raise TypeError(f"source must be a path, an address or a state dict, got {type(source).__name__}")

    entries, wrapper = _unwrap(contents, ema, name)
    detected = detect_layout(layouts, entries)
    used = detected if layout == "auto" else layout
    match = _match(model, layouts[used], entries, ema, classifier)
    if match.problems:
        where = f" under {wrapper!r}" if wrapper else ""
        looks = "" if used == detected else f", though they look like {detected}"
        first = (
            f"checkpoint {name!r} does not fit this {network}, and nothing was loaded. Its keys{where} were taken as "
            f"{used}{looks}; known for {network}: {', '.join(layouts)}."
        )
        raise ValueError("\n  ".join([first, *match.problems]))

    double_gate_act = None
    if used == "openmixup":
        double_gate_act = trained_with_double_gate(name)
    elif network == "MogaNet" and wrapper is not None:
        double_gate_act = False
    _install(model, match, double_gate_act)
    return LoadedCheckpoint(
        source=name,
        layout=used,
        wrapper=wrapper,
        ema=match.ema or wrapper in _EMA_WRAPPERS,
        resized=tuple(match.resized),
        left_out=tuple(match.left_out),
        kept=tuple(match.kept),
        double_gate_act=double_gate_act,
    )


def _network_of(model: Backbone) -> str:
    for cls in type(model).__mro__:
        if cls.__name__ in LAYOUTS:
            return cls.__name__
    raise TypeError(f"model must be one of {', '.join(LAYOUTS)}, got {type(model).__name__}")


def _unwrap(contents: Mapping[str, Any], ema: bool, name: str) -> tuple[dict[str, Any], str | None]:
    """The state dict within a training script's checkpoint, and the key it is under."""
    for key in (*(_EMA_WRAPPERS if ema else ()), *_WRAPPERS):
        if isinstance(contents.get(key), Mapping):
            return {str(k): v for k, v in contents[key].items()}, key
    averages = [key for key in _EMA_WRAPPERS if isinstance(contents.get(key), Mapping)]
    if averages:
        raise ValueError(f"checkpoint {name!r} has only averages of the weights, {averages[0]!r}; ema=True loads them")
    return {str(k): v for k, v in contents.items()}, None


@dataclass
class _Match:
    """The tensors of a checkpoint by official key. They are all the model needs if there are no problems."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_classes: int | None = None  # what the classifier must be reset to
    ema: bool = False
    resized: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def _match(model: Backbone, layout: KeyLayout, entries: dict[str, Any], ema: bool, classifier: str) -> _Match:
    """Finds a fitting tensor for every key of the model, and a use for every key of the checkpoint."""
    own = model.state_dict()
    head = model.classifier
    kept = (f"{head}.weight", f"{head}.bias") if classifier == "keep" else ()
    picked = layout.pick(entries, ema)
    match = _Match(ema=picked.ema, left_out=list(picked.left_out))
    unexpected, missing, misshapen = [], [], []

    found: dict[str, Tensor | None] = {}
    for key, value in picked.entries.items():
        official = layout.official_key(key)
        tensor = _as_tensor(value)
        if official in kept or (official not in own and official.startswith(tuple(model.unbuilt))):
            match.left_out.append(key)
        elif official not in own:
            unexpected.append(f"{key} {_describe(value)}")
        elif official in found:
            unexpected.append(f"{key} (a second {official})")
        else:
            found[official] = None if tensor is None else layout.convert(official, tensor)
            if tensor is None:
                misshapen.append(f"{official} is {_describe(value)}, not a dense tensor of real numbers")

    shapes = {key: value.shape for key, value in own.items()}
    weight = found.get(f"{head}.weight")
    classes = weight.shape[0] if weight is not None and weight.ndim else 0
    if classifier == "resize" and classes and classes != shapes[f"{head}.weight"][0]:
        match.num_classes = classes
        for key in (f"{head}.weight", f"{head}.bias"):
            shapes[key] = torch.Size([classes, *shapes[key][1:]])
            match.resized.append(key)

    for key, shape in shapes.items():
        if key in kept or (key not in found and key.endswith(".num_batches_tracked")):
            match.kept.append(key)
            continue
        if key not in found:
            missing.append(f"{key} {tuple(shape)}")
            continue
        tensor = found[key]
        if tensor is None:
            continue
        if key.endswith(".complex_weight") and tensor.shape != shape:
            tensor = resize_global_filter(tensor, shape)
            match.resized.append(key)
        if tensor.shape != shape:
            misshapen.append(f"{key} is {tuple(tensor.shape)}, must be {tuple(shape)}")
        match.tensors[key] = tensor

    of_model, of_checkpoint = f"of the model's {len(own)} keys", f"of the checkpoint's {len(picked.entries)}"
    match.problems += _listed(f"missing {of_model}", missing)
    match.problems += _listed(f"unexpected {of_checkpoint}", unexpected)
    match.problems += _listed("of the wrong shape or kind", misshapen)
    if weight is None and f"{head}.weight" in own and classifier != "keep":
        match.problems.append('classifier="keep" leaves the classifier as it is')
    elif classifier == "strict" and classes and classes != own[f"{head}.weight"].shape[0]:
        match.problems.append(
            f'classifier="resize" takes the checkpoint\'s {classes} classes, "keep" leaves the classifier as it is'
        )
    return match


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


def _install(model: Backbone, match: _Match, double_gate_act: bool | None) -> None:
    own = model.state_dict()
    # Before anything is changed: conversion is what may still fail, for want of memory.
    tensors = {key: tensor.to(own[key].device, own[key].dtype) for key, tensor in match.tensors.items()}
    if match.num_classes is not None:
        model.reset_classifier(match.num_classes)
    model.load_state_dict(tensors, strict=False)
    if double_gate_act is not None:
        for module in model.modules():
            if hasattr(module, "double_gate_act"):
                module.double_gate_act = double_gate_act
