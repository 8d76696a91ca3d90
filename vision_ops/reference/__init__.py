"""The ops in plain PyTorch: their definition, the fallback, and what "eager" means in the benchmarks."""

from .dwconv import dwconv
from .multi_order_dwconv import multi_order_dwconv

__all__ = ["dwconv", "multi_order_dwconv"]
