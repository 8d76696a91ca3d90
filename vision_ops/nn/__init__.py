"""Modules with the official constructor arguments and parameter names, which run the fused ops."""

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
