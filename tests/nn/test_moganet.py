import io

import pytest
import torch
import torch.nn.functional as F

from vision_ops import nn


def test_multi_order_dwconv_keys():
    keys = list(nn.MultiOrderDWConv(16).state_dict())
    assert keys == [f"{c}.{p}" for c in ("DW_conv0", "DW_conv1", "DW_conv2", "PW_conv") for p in ("weight", "bias")]


def test_multi_order_dwconv_unfused():
    """fused=False runs no op of ours; it is what exports to ONNX, and while exporting it is chosen by itself."""
    module, x = nn.MultiOrderDWConv(16, fused=False), torch.randn(1, 16, 9, 7)
    graph = torch.export.export(module, (x,)).graph
    assert not any("vision_ops" in str(node.target) for node in graph.nodes)
    module.fused = True
    assert any("vision_ops" in str(node.target) for node in torch.export.export(module, (x,)).graph.nodes)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_multi_order_dwconv_exports_to_onnx():
    pytest.importorskip("onnx")
    buffer = io.BytesIO()
    torch.onnx.export(nn.MultiOrderDWConv(16), (torch.randn(1, 16, 9, 7),), buffer, dynamo=False)
    assert b"vision_ops" not in buffer.getvalue() and b"Conv" in buffer.getvalue()


def test_multi_order_dwconv_refuses():
    with pytest.raises(ValueError, match=r"split \(1, 3, 4\) adds up to 8, which must divide the 12 channels"):
        nn.MultiOrderDWConv(12)
    with pytest.raises(ValueError, match=r"dilations\[1\] must be from 1 to 3"):
        nn.MultiOrderDWConv(16, dw_dilation=[1, 5, 3])


def test_split_of_channels_is_exact():
    """The official code rounds floats down: 18 of 90 channels become 17 for a split of 1:2:7."""
    module = nn.MultiOrderDWConv(90, channel_split=[1, 2, 7])
    assert [conv.weight.shape[0] for conv in (module.DW_conv0, module.DW_conv1, module.DW_conv2)] == [90, 18, 63]
    assert module(torch.randn(1, 90, 5, 5)).shape == (1, 90, 5, 5)


@pytest.mark.parametrize("option", ["attn_force_fp32", "double_gate_act"])
def test_double_gate_act_is_no_matter_of_precision(option):
    """The official attn_force_fp32 multiplies float32 with the layer's own type, and fails in bfloat16 and float64."""
    module = nn.MogaBlock(16, **{option: True})
    assert module.attn.double_gate_act
    for dtype in (torch.bfloat16, torch.float64):
        assert module.to(dtype)(torch.randn(2, 16, 5, 5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("norm_type", ["BN", "SyncBN", "GN", "LN2d"])
def test_norm_types(norm_type):
    block = nn.MogaBlock(16, norm_type=norm_type).eval()
    assert block(torch.randn(2, 16, 5, 5)).isfinite().all()


@pytest.mark.parametrize("act", ["GELU", "SiLU", "ReLU"])
def test_activations(act):
    """The activation that the kernel applies is the one of the formula."""
    x, ffn = torch.randn(2, 8, 5, 5), nn.ChannelAggregationFFN(8, 16, act_type=act)
    f = {"GELU": F.gelu, "SiLU": F.silu, "ReLU": F.relu}[act]
    h = f(ffn.dwconv(ffn.fc1(x)))
    expected = ffn.fc2(h + ffn.sigma.scale * (h - f(ffn.decompose(h))))
    torch.testing.assert_close(ffn(x), expected)
    assert nn.MultiOrderGatedAggregation(16, attn_act_type=act)(torch.randn(1, 16, 5, 5)).isfinite().all()


def test_moganet_refuses():
    with pytest.raises(ValueError, match=r"norm_type must be one of .*, got 'LN'"):
        nn.MogaBlock(16, norm_type="LN")
    with pytest.raises(ValueError, match=r"attn_act_type must be one of .*, got 'Mish'"):
        nn.MultiOrderGatedAggregation(16, attn_act_type="Mish")


def test_dropout_of_the_ffn():
    ffn = nn.ChannelAggregationFFN(8, 16, ffn_drop=0.5)
    x = torch.randn(1, 8, 5, 5)
    assert not torch.equal(ffn(x), ffn(x))
    assert torch.equal(ffn.eval()(x), ffn(x))
