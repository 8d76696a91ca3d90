"""The ops in plain PyTorch: their definition, the fallback, and what "eager" means in the benchmarks."""

from .dwconv import dwconv
from .layer_norm_2d import layer_norm_2d
from .multi_order_dwconv import multi_order_dwconv

__all__ = ["dwconv", "layer_norm_2d", "multi_order_dwconv"]
