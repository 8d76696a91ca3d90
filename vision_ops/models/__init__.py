"""The five backbones, their published variants and checkpoints."""

import fnmatch
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..ops._checks import check_integer
from . import edgenext, hornet, moat, moat_article, moganet, s2mlpv2
from ._backbone import Backbone, Variant
from .checkpoint import LoadedCheckpoint, load_checkpoint
from .checkpoint_files import is_tensorflow
from .edgenext import EdgeNeXt
from .feature_info import FeatureInfo
from .hornet import HorNet
from .moat import MOAT
from .moat_article import MOATArticle
from .moganet import MogaNet
from .preprocessing import Preprocess, preprocess
from .s2mlpv2 import S2MLPv2

__all__ = [
    "MOAT",
    "Backbone",
    "EdgeNeXt",
    "FeatureInfo",
    "HorNet",
    "LoadedCheckpoint",
    "MOATArticle",
    "MogaNet",
    "Preprocess",
    "S2MLPv2",
    "create_model",
    "list_models",
    "load_checkpoint",
    "preprocess",
]

_VARIANTS: dict[str, Variant] = {
    **moganet.VARIANTS,
    **hornet.VARIANTS,
    **edgenext.VARIANTS,
    **s2mlpv2.VARIANTS,
    **moat.VARIANTS,
    **moat_article.VARIANTS,
}


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """The names that `create_model` knows and a shell pattern matches, such as "hornet_*".

    pretrained: only those whose official weights it can download.
    """
    return [name for name in fnmatch.filter(_VARIANTS, pattern) if not pretrained or _downloads(_VARIANTS[name])]


def _downloads(variant: Variant) -> bool:
    return variant.url is not None and not is_tensorflow(variant.url)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    fused: bool = True,
    pretrained: bool = False,
    checkpoint_path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Backbone:
    """A published backbone with fresh weights, or with trained ones, which `load_checkpoint` can fill in later, too.

    Args:
        name: one of `list_models()`.
        num_classes: of the classifier; 0 for none: the network then returns its pooled features (N, num_features). None
            for as many as the pretrained weights have, and 1000 without.
        in_chans: channels of the images.
        features_only: return a list of maps (N, C, H, W), one per stage, instead of logits. What only a classifier
            needs is then not built. `feature_info` has their channels and strides.
        out_indices: the stages to return, all by default; negative ones count from the last.
        drop_path_rate: stochastic depth; None is 0. What the published recipe used is in
            `pretrained_cfg["drop_path_rate"]`.
        fused: False runs plain PyTorch throughout.
        pretrained: download the official weights, of `list_models(pretrained=True)`, and load them. For other classes
            than theirs the classifier is a fresh one, and for other in_chans the first convolution is adapted.
        checkpoint_path: load this file or address, all of which must fit but the number of channels.
        cache_dir: where downloads are kept; None for the folder of torch.hub.
        device, dtype: of the weights.
        overrides: any other argument of the network's class, in place of the variant's.

    `pretrained_cfg` of the result says how images are prepared (input_size, crop_pct, interpolation, mean, std, for
    pixels from 0 to 1; `preprocess` does it) and where the official weights are (url).

    Raises:
        ValueError: an unknown name, a value that the network cannot have, or weights that there are not or do not fit.
        OSError: the download failed.
        TypeError: an override that the network does not know.
    """
    if name not in _VARIANTS:
        raise ValueError(f"name must be one of {list_models()}, got {name!r}")
    check_integer("in_chans", in_chans, 1)
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
    variant = _VARIANTS[name]
    if pretrained and variant.url is None:
        raise ValueError(f"pretrained must be False: no weights of {name} are published")
    arguments = {**variant.arguments, **overrides}
    with nullcontext() if device is None else torch.device(device):
        model = variant.network(
            **arguments,
            num_classes=1000 if num_classes is None else num_classes,
            in_chans=in_chans,
            features_only=features_only,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate or 0.0,
            fused=fused,
        )
    model.to(dtype=dtype)
    sides = getattr(model, "img_size", variant.input_size[1:])  # what tables of biases may be tied to
    model.pretrained_cfg = replace(variant, input_size=(3, *sides)).pretrained_cfg(name)
    if pretrained:
        load_pretrained(model, str(variant.url), num_classes, cache_dir)
    if checkpoint_path:  # scripts of timm give "" for none
        load_checkpoint(model, checkpoint_path, cache_dir=cache_dir)
    return model


def load_pretrained(
    model: Backbone,
    source: str | os.PathLike[str],
    num_classes: int | None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Weights to start from: for other classes than theirs the classifier is a fresh one."""
    load_checkpoint(model, source, classifier="resize", cache_dir=cache_dir)
    if num_classes not in (None, model.num_classes) and not model.features_only:
        model.reset_classifier(num_classes)
