from functools import partial

import pytest
from golden import GOLDENS, check_module

from vision_ops import nn, use_backend

GnConv = partial(nn.GnConv, s=1 / 3)

MODULES = {
    "ChannelAggregationFFN_2x8x9x7_h32": lambda: nn.ChannelAggregationFFN(8, 32),
    "ConvEncoder_k3_2x8x9x7": lambda: nn.ConvEncoder(8, kernel_size=3),
    "ConvEncoder_k7_2x8x9x7": lambda: nn.ConvEncoder(8, kernel_size=7),
    "GlobalLocalFilter_14x8_2x12x14x14": lambda: nn.GlobalLocalFilter(12, h=14, w=8),
    "GlobalLocalFilter_7x4_1x12x20x12": lambda: nn.GlobalLocalFilter(12, h=7, w=4),
    "HorBlock_order3_2x16x9x7": lambda: nn.HorBlock(16, gnconv=partial(GnConv, order=3)),
    "LPI_c16_2x63x16": lambda: nn.LPI(16),
    "MOAT_attention_14_1x4x6x64": lambda: nn.RelativeSelfAttention(64),
    "MOAT_mbconv_s1_2x8x9x7": lambda: nn.MBConv(8, 8),
    "MOAT_mbconv_s2_2x8x8x6": lambda: nn.MBConv(8, 12, stride=2),
    "MogaBlock_2x16x9x7": lambda: nn.MogaBlock(16, ffn_ratio=4),
    "MultiOrderDWConv_2x16x9x7": lambda: nn.MultiOrderDWConv(16),
    "MultiOrderDWConv_split134_dil121_2x16x9x7": lambda: nn.MultiOrderDWConv(16, dw_dilation=[1, 2, 1]),
    "MultiOrderGatedAggregation_2x16x9x7": lambda: nn.MultiOrderGatedAggregation(16),
    "MultiOrderGatedAggregation_forcefp32_2x16x9x7": lambda: nn.MultiOrderGatedAggregation(16, double_gate_act=True),
    "RK_MBConvBlock_down_2x8x8x6": lambda: nn.ArticleMBConv(8, 12, downscale=True, use_se=True),
    "RK_RelativeSelfAttention_2x12x64": lambda: nn.ArticleSelfAttention(64, 2, (4, 3)),
    "S2Attention_1x4x4x10": lambda: nn.S2Attention(10),
    "S2Attention_2x9x7x16": lambda: nn.S2Attention(16),
    "S2Block_d2_2x16x9x7": lambda: nn.S2Block(16, depth=2, expansion_factor=3),
    "SDTAEncoderBNHS_c20_s3_h4_pe1_2x20x5x6": lambda: nn.SDTAEncoderBNHS(20, scales=3, num_heads=4),
    "SDTAEncoder_c16_s2_h4_pe1_2x16x9x7": lambda: nn.SDTAEncoder(16, scales=2, num_heads=4),
    "SDTAEncoder_c24_s4_h4_pe0_2x24x4x4": lambda: nn.SDTAEncoder(24, scales=4, num_heads=4, use_pos_emb=False),
    "SplitAttention_2x3x5x4x8": lambda: nn.SplitAttention(8),
    "XCA_c16_h4_b1_2x63x16": lambda: nn.XCA(16, num_heads=4, qkv_bias=True),
    "XCA_c22_h2_b1_2x35x22": lambda: nn.XCA(22, num_heads=2, qkv_bias=True),
    "gnconv_order2_2x32x9x7": lambda: GnConv(32, order=2),
    "gnconv_order3_2x32x9x7": lambda: GnConv(32, order=3),
    "gnconv_order3_gf14x8_1x32x14x14": lambda: GnConv(32, order=3, h=14, w=8, gflayer=nn.GlobalLocalFilter),
    "gnconv_order5_2x32x9x7": lambda: GnConv(32, order=5),
}


def test_every_golden_is_used():
    assert set(MODULES) == {path.stem for path in (GOLDENS / "modules").glob("*.npz")}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MODULES)
def test_golden(name, backend):
    """1e-12 is far below what a wrong epsilon would do (1e-5) and ten times what rounding does."""
    with use_backend(backend):
        check_module(name, MODULES[name](), 1e-12, (9, 7) if name.startswith("LPI") else ())
