import pytest
import torch

from vision_ops import nn, reference
from vision_ops.reference.shift_split_attention import spatial_shift


def moved_in_place(x, dims):
    """The shift as the article writes it, for dims (1, 2)."""
    c = x.shape[-1]
    assert dims == (1, 2)
    x[:, 1:, :, : c // 4] = x[:, :-1, :, : c // 4]
    x[:, :-1, :, c // 4 : c // 2] = x[:, 1:, :, c // 4 : c // 2]
    x[:, :, 1:, c // 2 : c * 3 // 4] = x[:, :, :-1, c // 2 : c * 3 // 4]
    x[:, :, :-1, c * 3 // 4 :] = x[:, :, 1:, c * 3 // 4 :]
    return x


def shifted_by_index(x, dims):
    c = x.shape[-1]
    y = torch.empty_like(x)
    for quarter, (dim, step) in enumerate([(dims[0], -1), (dims[0], 1), (dims[1], -1), (dims[1], 1)]):
        n = x.shape[dim]
        channels = slice(c * quarter // 4, c * (quarter + 1) // 4)
        source = (torch.arange(n) + step).clamp(0, n - 1)
        y[..., channels] = x[..., channels].index_select(dim, source)
    return y


@pytest.mark.parametrize("shape", [(2, 5, 4, 8), (1, 1, 4, 8), (1, 4, 1, 10), (1, 1, 1, 3), (1, 3, 3, 10)])
@pytest.mark.parametrize("dims", [(1, 2), (2, 1)])
def test_spatial_shift(shape, dims):
    x = torch.randn(shape)
    before = x.clone()
    assert torch.equal(spatial_shift(x, dims), shifted_by_index(x, dims))
    assert torch.equal(x, before)


def test_the_articles_shift_is_another_function():
    """Its slices read what they have just written: on the CPU two of the four quarters become copies of one row."""
    x = torch.randn(1, 8, 8, 8)
    clean, aliased = spatial_shift(x, (1, 2)), moved_in_place(x.clone(), (1, 2))
    assert torch.equal(aliased[..., 2:4], clean[..., 2:4]) and torch.equal(aliased[..., 6:], clean[..., 6:])
    assert (aliased[..., :2] != clean[..., :2]).float().mean() > 0.5
    compiled = torch.compile(spatial_shift, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, (1, 2)), clean)


def test_split_attention_pools_with_a_sum():
    x = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    module = nn.SplitAttention(8, reduction=4).double()
    assert module.mlp1.weight.shape == (2, 8) and module.mlp2.weight.shape == (24, 2)
    hidden = torch.nn.functional.gelu(x.sum(dim=(1, 2, 3)) @ module.mlp1.weight.T)
    weights = (hidden @ module.mlp2.weight.T).reshape(2, 3, 1, 1, 8).softmax(dim=1)
    torch.testing.assert_close(module(x), (weights * x).sum(dim=1))


def test_shift_split_attention_is_shift_and_split_attention():
    x, module = torch.randn(2, 4, 5, 24), nn.SplitAttention(8)
    parts = x.chunk(3, dim=-1)
    branches = torch.stack([spatial_shift(parts[0], (1, 2)), spatial_shift(parts[1], (2, 1)), parts[2]], dim=1)
    found = reference.shift_split_attention(x, module.mlp1.weight, module.mlp2.weight)
    torch.testing.assert_close(found, module(branches))


def test_reduction_is_checked():
    with pytest.raises(ValueError, match="reduction must be at least 1"):
        nn.S2Attention(8, reduction=0)


def test_drop_path_is_one_rate_or_one_per_layer():
    with pytest.raises(ValueError, match="drop_path must be one number or 3 of them, got 1"):
        nn.S2Block(8, 3, drop_path=[0.1])
    rates = [layer[0].drop_path.drop_prob for layer in nn.S2Block(8, 2, drop_path=(0.1, 0.2)).model]
    assert rates == [0.1, 0.2]
