from .batch_norm_act import fused_batch_norm_act
from .channel_aggregation_ffn import fused_channel_aggregation_ffn
from .cross_covariance import fused_cross_covariance
from .dwconv import fused_dwconv
from .dwconv_layer_norm import fused_dwconv_layer_norm
from .feature_decompose import fused_feature_decompose
from .gated_recursion import fused_gated_recursion
from .global_filter import fused_global_filter
from .gnconv import fused_gnconv
from .layer_norm_2d import fused_layer_norm_2d
from .mbconv import fused_mbconv
from .moga_aggregation import fused_moga_aggregation
from .moga_gate import fused_moga_gate
from .multi_order_dwconv import fused_multi_order_dwconv
from .s2_attention import fused_s2_attention
from .shift_split_attention import fused_shift_split_attention
from .split_cascade import fused_split_cascade
from .xca import fused_xca

__all__ = [
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
]
