"""`load_checkpoint`: published and own weights into the networks of this package."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ._backbone import Backbone
from .checkpoint_files import read_checkpoint
from .checkpoint_match import Match, match_keys
from .key_layouts import LAYOUTS, detect_layout, trained_with_double_gate, unwrapped

_EMA_WRAPPERS = ("state_dict_ema", "model_ema")
_WRAPPERS = ("state_dict", "model", "module")
_CLASSIFIER = ("strict", "resize", "keep")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load_checkpoint` loaded.

    Attributes:
        source: file name, or "state dict" for a mapping.
        layout: of the keys.
        wrapper: key under which the state dict was, None if it was bare.
        ema: whether these are averages of the weights (EMA).
        resized: official keys of what got another size: global filters, classifiers, and the first convolution of a
            model with other channels than 3.
        left_out: keys of the checkpoint that were not loaded: of parts the model has not, of a classifier that was to
            be kept, of a detector around its backbone, of an optimizer, or a second copy of the weights.
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
    cache_dir: str | os.PathLike[str] | None = None,
) -> LoadedCheckpoint:
    """Load weights into a model of this package: all of them, or none and an error that lists every key in the way.

    Args:
        model: from `create_model`. Parts that it was made without (`features_only=True`, `num_classes=0`) are left out.
        source: a path; an http(s) address, whose file is downloaded, and checked where its name ends with a part of its
            SHA-256 as torch.hub's do (`-1a2b3c4d.pth`); or a state dict of tensors or arrays. Files: .safetensors; .npz
            (for MOAT, with the names of TensorFlow's variables); anything else must be of `torch.save` and is read with
            `weights_only=True`, with `argparse.Namespace` and numpy scalars as the only other types. The state dict may
            be under `state_dict`, `model` or `module`, its average under `state_dict_ema` or `model_ema`. What
            DistributedDataParallel, torch.compile, AveragedModel, FSDP and activation checkpointing put into keys is
            dropped, as is the prefix `backbone.`; of a detector or segmentor a network without a classifier, and one
            that keeps its own, takes what is under `backbone.`.
        layout: "official"; "openmixup" (MogaNet); "mmpretrain" (HorNet, EdgeNeXt); "timm" (EdgeNeXt); "tensorflow"
            (MOAT); or "auto", which knows them by their keys.
        ema: take the average of the weights (EMA) where the checkpoint has one beside them. deeplab2 itself loads
            MOAT's plain weights, MogaNet's validation the averages.
        classifier: "strict": its number of classes must be that of the checkpoint; "resize": the model gets the
            checkpoint's; "keep": the model's classifier, of whatever module, stays as it is, for fine-tuning.
        cache_dir: where downloads are kept; None for the folder of torch.hub.

    HorNet's global filters are resized to the model's as the official code does it. The first convolution of a model
    with other in_chans than 3 gets weights of three channels as timm adapts them: for one channel their sum, else the
    channels repeated, times 3 / in_chans. MogaNet's `double_gate_act` is set
    by source: True for openmixup, but for the two runs trained without it, which are known by their file names; False
    for official checkpoints. A bare state dict with official keys, as saving a model gives it, does not tell, and
    leaves it as the model was made. Values take the dtype and device of the model's; what the model has on the meta
    device becomes real, where the checkpoint has it.

    Raises:
        ValueError: the checkpoint is damaged, asks for code, or does not fit. The model is as it was.
        OSError: the download failed.
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
        contents, name = read_checkpoint(source, cache_dir)
    else:
        raise TypeError(f"source must be a path, an address or a state dict, got {type(source).__name__}")

    entries, wrapper = _unwrap(contents, ema, name)
    entries, left_out, averaged = _select(model, entries, ema, classifier, name)
    detected = detect_layout(layouts, entries)
    used = detected if layout == "auto" else layout
    match = match_keys(model, layouts[used], entries, ema, classifier)
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
        ema=match.ema or averaged or wrapper in _EMA_WRAPPERS,
        resized=tuple(match.resized),
        left_out=(*left_out, *match.left_out),
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


def _select(
    model: Backbone, entries: dict[str, Any], ema: bool, classifier: str, name: str
) -> tuple[dict[str, Any], list[str], bool]:
    """The entries of the network itself, the keys of all others, and whether the entries are averages.

    AveragedModel counts its updates in `n_averaged`. Detectors, segmentors and the like have other parts beside their
    `backbone`, which a network without a classifier, or one that keeps its own, does not want. (openmixup's and
    mmpretrain's classifiers are `head.fc`, by which their layouts are known; `ema_backbone_*` are openmixup's copies.)
    """
    bare = {key: unwrapped(key) for key in entries}
    left_out = [key for key in entries if bare[key] == "n_averaged"]
    averaged = bool(left_out)
    if averaged and not ema:
        raise ValueError(f"checkpoint {name!r} has only averages of the weights, by AveragedModel; ema=True loads them")
    within = any(key.startswith("backbone.") for key in bare.values())
    if within and (model.num_classes == 0 or classifier == "keep"):
        of_network = "backbone.", "head.fc.", "ema_backbone_", "n_averaged"
        left_out += [key for key in entries if not bare[key].startswith(of_network)]
    left = set(left_out)
    return {key: value for key, value in entries.items() if key not in left}, left_out, averaged


def _install(model: Backbone, match: Match, double_gate_act: bool | None) -> None:
    own = model.state_dict()
    # Before anything is changed: conversion is what may still fail, for want of memory.
    tensors, on_meta = {}, {}
    for key, tensor in match.tensors.items():
        if own[key].is_meta:  # into which nothing can be copied; a copy, as the source must not share memory with it
            on_meta[key] = torch.empty(tensor.shape, dtype=own[key].dtype, device=tensor.device).copy_(tensor)
        else:
            tensors[key] = tensor.to(own[key].device, own[key].dtype)
    if match.num_classes is not None:
        model.reset_classifier(match.num_classes)
    model.load_state_dict(on_meta, strict=False, assign=True)
    model.load_state_dict(tensors, strict=False)
    if double_gate_act is not None:
        for module in model.modules():
            if hasattr(module, "double_gate_act"):
                module.double_gate_act = double_gate_act
