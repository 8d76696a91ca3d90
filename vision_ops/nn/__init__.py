"""Modules with the official constructor arguments and parameter names, which run the fused ops."""

from .layer_norm import LayerNorm2d
from .moganet import MultiOrderDWConv

__all__ = ["LayerNorm2d", "MultiOrderDWConv"]
