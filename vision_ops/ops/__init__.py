from .dwconv import fused_dwconv
from .multi_order_dwconv import fused_multi_order_dwconv

__all__ = ["fused_dwconv", "fused_multi_order_dwconv"]
