"""The public functions of the ops; the package has them by the same names."""

from typing import TYPE_CHECKING

from .batch_norm_act import fused_batch_norm_act as fused_batch_norm_act
from .channel_aggregation_ffn import fused_channel_aggregation_ffn as fused_channel_aggregation_ffn
from .cross_covariance import fused_cross_covariance as fused_cross_covariance
from .dwconv import fused_dwconv as fused_dwconv
from .dwconv_layer_norm import fused_dwconv_layer_norm as fused_dwconv_layer_norm
from .feature_decompose import fused_feature_decompose as fused_feature_decompose
from .gated_recursion import fused_gated_recursion as fused_gated_recursion
from .global_filter import fused_global_filter as fused_global_filter
from .gnconv import fused_gnconv as fused_gnconv
from .layer_norm_2d import fused_layer_norm_2d as fused_layer_norm_2d
from .mbconv import fused_mbconv as fused_mbconv
from .mlp import fused_mlp as fused_mlp
from .moga_aggregation import fused_moga_aggregation as fused_moga_aggregation
from .moga_gate import fused_moga_gate as fused_moga_gate
from .multi_order_dwconv import fused_multi_order_dwconv as fused_multi_order_dwconv
from .relative_attention import fused_relative_attention as fused_relative_attention
from .relative_self_attention import fused_relative_self_attention as fused_relative_self_attention
from .s2_attention import fused_s2_attention as fused_s2_attention
from .scaled_residual import fused_scaled_residual as fused_scaled_residual
from .shift_split_attention import fused_shift_split_attention as fused_shift_split_attention
from .split_cascade import fused_split_cascade as fused_split_cascade
from .xca import fused_xca as fused_xca

if not TYPE_CHECKING:  # which see the imports
    __all__ = [name for name in dir() if name.startswith("fused_")]
