"""The ops in plain PyTorch: their definition, the fallback, and what "eager" means in the benchmarks."""

from .batch_norm_act import batch_norm_act
from .channel_aggregation_ffn import channel_aggregation_ffn
from .cross_covariance import cross_covariance
from .dwconv import dwconv
from .dwconv_layer_norm import dwconv_layer_norm
from .feature_decompose import feature_decompose
from .gated_recursion import gated_recursion
from .global_filter import global_filter
from .gnconv import gnconv
from .layer_norm_2d import layer_norm_2d
from .mbconv import mbconv
from .moga_aggregation import moga_aggregation
from .moga_gate import moga_gate
from .multi_order_dwconv import multi_order_dwconv
from .relative_attention import relative_attention
from .s2_attention import s2_attention
from .shift_split_attention import shift_split_attention
from .split_cascade import split_cascade
from .xca import xca

__all__ = [
    "batch_norm_act",
    "channel_aggregation_ffn",
    "cross_covariance",
    "dwconv",
    "dwconv_layer_norm",
    "feature_decompose",
    "gated_recursion",
    "global_filter",
    "gnconv",
    "layer_norm_2d",
    "mbconv",
    "moga_aggregation",
    "moga_gate",
    "multi_order_dwconv",
    "relative_attention",
    "s2_attention",
    "shift_split_attention",
    "split_cascade",
    "xca",
]
