from .cross_covariance import fused_cross_covariance
from .dwconv import fused_dwconv
from .gated_recursion import fused_gated_recursion
from .global_filter import fused_global_filter
from .gnconv import fused_gnconv
from .layer_norm_2d import fused_layer_norm_2d
from .multi_order_dwconv import fused_multi_order_dwconv
from .xca import fused_xca

__all__ = [
    "fused_cross_covariance",
    "fused_dwconv",
    "fused_gated_recursion",
    "fused_global_filter",
    "fused_gnconv",
    "fused_layer_norm_2d",
    "fused_multi_order_dwconv",
    "fused_xca",
]
