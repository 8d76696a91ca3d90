from .dwconv import fused_dwconv
from .gated_recursion import fused_gated_recursion
from .global_filter import fused_global_filter
from .gnconv import fused_gnconv
from .layer_norm_2d import fused_layer_norm_2d
from .multi_order_dwconv import fused_multi_order_dwconv
from .s2_attention import fused_s2_attention
from .shift_split_attention import fused_shift_split_attention

__all__ = [
    "fused_dwconv",
    "fused_gated_recursion",
    "fused_global_filter",
    "fused_gnconv",
    "fused_layer_norm_2d",
    "fused_multi_order_dwconv",
    "fused_s2_attention",
    "fused_shift_split_attention",
]
