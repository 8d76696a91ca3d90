from .dwconv import fused_dwconv
from .layer_norm_2d import fused_layer_norm_2d
from .multi_order_dwconv import fused_multi_order_dwconv

__all__ = ["fused_dwconv", "fused_layer_norm_2d", "fused_multi_order_dwconv"]
