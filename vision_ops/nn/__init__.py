"""Modules with the official constructor arguments and parameter names, which run the fused ops."""

from .moganet import MultiOrderDWConv

__all__ = ["MultiOrderDWConv"]
