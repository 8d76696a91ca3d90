"""The five backbones, their published variants and checkpoints."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from ..ops._checks import check_integer
from . import edgenext, hornet, moat, moat_article, moganet, s2mlpv2
from ._backbone import Backbone, FeatureInfo, Variant
from .checkpoint import LoadedCheckpoint, load_checkpoint
from .edgenext import EdgeNeXt
from .hornet import HorNet
from .moat import MOAT
from .moat_article import MOATArticle
from .moganet import MogaNet
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
    "S2MLPv2",
    "create_model",
    "list_models",
    "load_checkpoint",
]

_VARIANTS: dict[str, Variant] = {
    **moganet.VARIANTS,
    **hornet.VARIANTS,
    **edgenext.VARIANTS,
    **s2mlpv2.VARIANTS,
    **moat.VARIANTS,
    **moat_article.VARIANTS,
}


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows and a shell pattern matches, such as "hornet_*"."""
    return fnmatch.filter(_VARIANTS, pattern)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    fused: bool = True,
    **overrides: Any,
) -> Backbone:
    """A published backbone with fresh weights; `load_checkpoint` fills in trained ones.

    Args:
        name: one of `list_models()`.
        num_classes: of the classifier; 0 for none: the network then returns its pooled features (N, num_features).
        in_chans: channels of the images.
        features_only: return a list of maps (N, C, H, W), one per stage, instead of logits. What only a classifier
            needs is then not built. `feature_info` has their channels and strides.
        out_indices: the stages to return, all by default; negative ones count from the last.
        drop_path_rate: stochastic depth; None is 0. What the published recipe used is in
            `default_cfg["drop_path_rate"]`.
        fused: False runs plain PyTorch throughout.
        overrides: any other argument of the network's class, in place of the variant's.

    `default_cfg` of the result says how images are prepared (input_size, crop_pct, interpolation, mean, std, for pixels
    from 0 to 1) and where the official weights are (url).

    Raises:
        ValueError: an unknown name or a value that the network cannot have.
        TypeError: an override that the network does not know.
    """
    if name not in _VARIANTS:
        raise ValueError(f"name must be one of {list_models()}, got {name!r}")
    check_integer("in_chans", in_chans, 1)
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
    variant = _VARIANTS[name]
    arguments = {**variant.arguments, **overrides}
    model = variant.network(
        **arguments,
        num_classes=num_classes,
        in_chans=in_chans,
        features_only=features_only,
        out_indices=out_indices,
        drop_path_rate=drop_path_rate or 0.0,
        fused=fused,
    )
    model.default_cfg = variant.default_cfg()
    return model
