"""Fused depthwise, gating and attention kernels for vision backbones, with gradients, on CPUs and NVIDIA GPUs."""

import sys
from importlib.util import find_spec

from ._version import __version__


def _is_main() -> bool:
    """Whether this is `python -m vision_ops`, which reports what was built even where torch is missing."""
    arguments = sys.orig_argv
    return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == ["vision_ops"]


if find_spec("torch") is not None:
    from . import models, nn, reference
    from .dispatch import explain, use_backend
    from .ops import (
        fused_batch_norm_act,
        fused_channel_aggregation_ffn,
        fused_cross_covariance,
        fused_dwconv,
        fused_dwconv_layer_norm,
        fused_feature_decompose,
        fused_gated_recursion,
        fused_global_filter,
        fused_gnconv,
        fused_layer_norm_2d,
        fused_mbconv,
        fused_moga_aggregation,
        fused_moga_gate,
        fused_multi_order_dwconv,
        fused_s2_attention,
        fused_shift_split_attention,
        fused_split_cascade,
        fused_xca,
    )

    __all__ = [
        "__version__",
        "explain",
        "fused_batch_norm_act",
        "fused_channel_aggregation_ffn",
        "fused_cross_covariance",
        "fused_dwconv",
        "fused_dwconv_layer_norm",
        "fused_feature_decompose",
        "fused_gated_recursion",
        "fused_global_filter",
        "fused_gnconv",
        "fused_layer_norm_2d",
        "fused_mbconv",
        "fused_moga_aggregation",
        "fused_moga_gate",
        "fused_multi_order_dwconv",
        "fused_s2_attention",
        "fused_shift_split_attention",
        "fused_split_cascade",
        "fused_xca",
        "models",
        "nn",
        "reference",
        "use_backend",
    ]
elif not _is_main():
    raise ImportError("vision_ops needs PyTorch 2.11 or later: pip install 'torch>=2.11'")
