import copy

import pytest
import torch

from vision_ops import nn, reference
from vision_ops.nn import edgenext


@pytest.mark.parametrize(("dim", "scales"), [(16, 5), (9, 4), (12, 7)])
def test_sdta_refuses_scales_that_leave_nothing(dim, scales):
    with pytest.raises(ValueError, match=f"{scales - 1} splits of .* use up all {dim}"):
        nn.SDTAEncoder(dim, scales=scales, num_heads=1)


def test_sdta_refuses_the_official_default():
    with pytest.raises(ValueError, match="scales must be at least 2, got 1"):
        nn.SDTAEncoder(16)


def test_sdta_passes_the_layer_scale_on():
    """The official network leaves it at 1e-6 in these blocks."""
    module = nn.SDTAEncoder(16, layer_scale_init_value=0.5, scales=2)
    assert module.gamma.unique().item() == module.gamma_xca.unique().item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [nn.SDTAEncoder, nn.SDTAEncoderBNHS])
def test_sdta_in_every_dtype(kind, dtype):
    """The official position encoding stays in float32, and meets weights of another type."""
    module = kind(16, scales=2, num_heads=4).to(dtype)
    assert module(torch.randn(2, 16, 5, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_of_zeros(dtype):
    """F.normalize in float16 divides 0 by 0, as its 1e-12 rounds to 0."""
    module = nn.XCA(16, num_heads=4).to(dtype)
    x = torch.zeros(1, 6, 16, dtype=dtype, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_attention_bounds_the_norm_not_its_square():
    q = torch.full((1, 1, 2, 3), 1e-9, dtype=torch.float64)
    weights = reference.cross_covariance(q, q, torch.eye(2, 3, dtype=torch.float64)[None, None], torch.ones(1) * 4)
    k = 4 * torch.ones(2, 2, dtype=torch.float64)  # normalised rows are equal: their product is 1
    torch.testing.assert_close(weights[0, 0, :, :2], k.softmax(-1))


def test_attention_dropout():
    module = nn.XCA(16, num_heads=2, attn_drop=0.5)
    x = torch.randn(1, 6, 16)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
    assert module.no_weight_decay() == {"temperature"}


def test_refusals():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads=3, got 16"):
        nn.XCA(16, num_heads=3)
    with pytest.raises(ValueError, match="out_features must be None or in_features=8, got 16"):
        nn.LPI(8, 16)


def test_position_encoding_is_one_map_for_the_batch():
    encoding = nn.PositionalEncodingFourier(dim=8)
    y = encoding(3, 5, 4)
    assert y.shape == (3, 8, 5, 4) and y.stride(0) == 0
    torch.testing.assert_close(y[2:], encoding(1, 5, 4))


def test_position_tables_are_kept():
    encoding = nn.PositionalEncodingFourier(dim=8)
    with torch.inference_mode():
        first = encoding(1, 5, 4)
    (table,) = encoding._tables.values()
    encoding(2, 5, 4).sum().backward()  # a table of inference mode could not be saved for this
    assert next(iter(encoding._tables.values())) is table and not table.is_inference()
    torch.testing.assert_close(encoding(1, 5, 4), first)
    assert encoding.double()(1, 5, 4).dtype == torch.float64 and len(encoding._tables) == 2
    for size in range(1, 40):
        encoding(1, size, 3)
    assert len(encoding._tables) <= 16
    assert not copy.deepcopy(encoding)._tables


def test_compiled_position_encoding_keeps_nothing():
    encoding = nn.PositionalEncodingFourier(dim=8)
    compiled = torch.compile(encoding, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(2, 5, 4), nn.PositionalEncodingFourier.forward(encoding, 2, 5, 4))
    encoding._tables.clear()
    compiled(2, 5, 4)
    assert not encoding._tables


def test_attention_runs_the_fused_op_unless_dropout_is_active(monkeypatch):
    calls = []
    fused = edgenext.fused_xca

    def counted(*args, **options):
        calls.append(args)
        return fused(*args, **options)

    monkeypatch.setattr(edgenext, "fused_xca", counted)
    x = torch.randn(1, 6, 16)
    nn.XCA(16, num_heads=2)(x)
    nn.XCA(16, num_heads=2, fused=False)(x)
    module = nn.XCA(16, num_heads=2, attn_drop=0.5)
    module(x)
    assert len(calls) == 1
    module.eval()(x)
    assert len(calls) == 2


@pytest.mark.parametrize("act", [torch.nn.GELU, torch.nn.SiLU, lambda: torch.nn.GELU(approximate="tanh")])
def test_local_patch_interaction_takes_any_activation(act):
    """The erf GELU is the convolution's epilogue."""
    module = nn.LPI(8, act_layer=act)
    x = torch.randn(2, 12, 8)
    y = module.act(module.conv1(x.unflatten(1, (3, 4)).permute(0, 3, 1, 2)))
    expected = module.conv2(module.bn.eval()(y)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(x, 3, 4), expected)
