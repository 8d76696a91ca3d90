from .dwconv import fused_dwconv
from .dwconv_layer_norm import fused_dwconv_layer_norm
from .gated_recursion import fused_gated_recursion
from .global_filter import fused_global_filter
from .gnconv import fused_gnconv
from .layer_norm_2d import fused_layer_norm_2d
from .multi_order_dwconv import fused_multi_order_dwconv
from .split_cascade import fused_split_cascade

__all__ = [
    "fused_dwconv",
    "fused_dwconv_layer_norm",
    "fused_gated_recursion",
    "fused_global_filter",
    "fused_gnconv",
    "fused_layer_norm_2d",
    "fused_multi_order_dwconv",
    "fused_split_cascade",
]
