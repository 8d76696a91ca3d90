"""Modules with the official constructor arguments and parameter names, which run the fused ops.

An op takes the weights of layers and calls none of them. Where calling them would do something else (hooks, adapters,
other attributes, weights that are no plain tensors on the device of the input), a block calls its layers, or, with the
backend "fused", raises a ValueError; `vision_ops.explain(module, x)` names the layer. fused=False always calls them.
"""

from .edgenext import (
    LPI,
    XCA,
    ConvEncoder,
    ConvEncoderBNHS,
    PositionalEncodingFourier,
    SDTAEncoder,
    SDTAEncoderBNHS,
)
from .hornet import GlobalLocalFilter, GnConv, HorBlock
from .layer_norm import LayerNorm2d
from .moat import MBConv, MOATBlock, RelativeSelfAttention
from .moat_article import ArticleMBConv, ArticleMOATBlock, ArticleSelfAttention
from .moganet import ChannelAggregationFFN, MogaBlock, MultiOrderDWConv, MultiOrderGatedAggregation
from .s2mlpv2 import S2Attention, S2Block, SplitAttention

__all__ = [
    "LPI",
    "XCA",
    "ArticleMBConv",
    "ArticleMOATBlock",
    "ArticleSelfAttention",
    "ChannelAggregationFFN",
    "ConvEncoder",
    "ConvEncoderBNHS",
    "GlobalLocalFilter",
    "GnConv",
    "HorBlock",
    "LayerNorm2d",
    "MBConv",
    "MOATBlock",
    "MogaBlock",
    "MultiOrderDWConv",
    "MultiOrderGatedAggregation",
    "PositionalEncodingFourier",
    "RelativeSelfAttention",
    "S2Attention",
    "S2Block",
    "SDTAEncoder",
    "SDTAEncoderBNHS",
    "SplitAttention",
]
