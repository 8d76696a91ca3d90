import copy

import pytest
import torch
import torch.nn.functional as F

from vision_ops import nn
from vision_ops.nn.moat import pad_same
from vision_ops.reference.relative_attention import relative_bias


@pytest.mark.parametrize("height", range(1, 8))
@pytest.mark.parametrize("width", [1, 4, 7])
def test_same_padding(height, width):
    """TensorFlow's rule: ceil(n / 2) outputs, what is missing is added after first."""
    padded = pad_same(torch.zeros(1, 1, height, width)).shape[2:]
    for n, found in zip((height, width), padded, strict=True):
        needed = max((-(-n // 2) - 1) * 2 + 3 - n, 0)
        assert found == n + needed
    x = torch.randn(1, 2, height, width)
    marked = pad_same(x)
    top, left = max((-(-height // 2) - 1) * 2 + 3 - height, 0) // 2, max((-(-width // 2) - 1) * 2 + 3 - width, 0) // 2
    assert torch.equal(marked[:, :, top : top + height, left : left + width], x)


@pytest.mark.parametrize("pool_size", [2, 3])
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 3)])
def test_pooled_shortcut_averages_what_is_inside(pool_size, size):
    x = torch.randn(2, 4, *size)
    found = nn.MBConv(4, 4, stride=2, pool_size=pool_size)._shortcut(x)
    for i in range(-(-size[0] // 2)):
        for j in range(-(-size[1] // 2)):
            first = [0 if pool_size == 2 else -(n % 2) for n in size]
            rows = slice(max(2 * i + first[0], 0), 2 * i + first[0] + pool_size)
            columns = slice(max(2 * j + first[1], 0), 2 * j + first[1] + pool_size)
            torch.testing.assert_close(found[:, :, i, j], x[:, :, rows, columns].mean(dim=(2, 3)))


def test_norms_have_the_official_epsilons():
    block = nn.MOATBlock(32, 32)
    norms = [module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 3 and all(norm.eps == 1e-3 and norm.momentum == 0.01 for norm in norms)
    assert block.attention_norm.eps == 1e-5


def test_bias_is_indexed_by_key_minus_query():
    table = torch.arange(15.0).reshape(1, 3, 5)
    bias = relative_bias(table, 2, 3)
    assert bias.shape == (1, 6, 6)
    query, key = (0, 2), (1, 0)
    assert bias[0, query[0] * 3 + query[1], key[0] * 3 + key[1]] == table[0, 1 - 0 + 1, 0 - 2 + 2]


def test_bias_is_resized_with_half_pixels():
    table = torch.randn(2, 27, 27)
    expected = F.interpolate(table[None], (7, 11), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(relative_bias(table, 4, 6), relative_bias(expected, 4, 6))


def test_the_table_gets_a_gradient():
    """In the official code the resized table is a constant: no gradient, and no effect of loaded weights."""
    attention = nn.RelativeSelfAttention(64, table_size=(5, 5))
    x = torch.randn(1, 4, 6, 64)
    before = attention(x)
    before.sum().backward()
    assert attention.relative_position_embedding.grad.abs().max() > 0
    with torch.no_grad():
        attention.relative_position_embedding.normal_()
    assert not torch.allclose(attention(x), before)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [(8, 6), (7, 7), (3, 5)])
def test_windows(size, fused):
    """Each window attends within itself, whether or not windows tile the map: what reaches over is masked."""
    block = nn.MOATBlock(32, 32, window_size=(4, 3), table_size=(7, 5), fused=fused).eval()
    x = torch.randn(2, 32, *size)
    found = block(x)
    y = nn.MBConv.forward(block, x).permute(0, 2, 3, 1)
    normed, attention = block.attention_norm(y), copy.deepcopy(block.attention)
    for i in range(0, size[0], 4):
        for j in range(0, size[1], 3):
            window = normed[:, i : i + 4, j : j + 3]
            height, width = window.shape[1:3]
            table = block.attention.relative_position_embedding[:, 4 - height : 3 + height, 3 - width : 2 + width]
            attention.relative_position_embedding = torch.nn.Parameter(table)
            expected = y[:, i : i + 4, j : j + 3] + attention(window)
            torch.testing.assert_close(found[:, :, i : i + 4, j : j + 3], expected.permute(0, 3, 1, 2))


def test_windows_as_large_as_the_map_are_global_attention():
    block = nn.MOATBlock(32, 32).eval()
    x = torch.randn(2, 32, 4, 6)
    expected = block(x)
    block.window_size = (4, 6)
    torch.testing.assert_close(block(x), expected)


def test_refusals():
    with pytest.raises(ValueError, match="channels must be a multiple of head_dim=32, got 48"):
        nn.RelativeSelfAttention(48)
    with pytest.raises(ValueError, match="stride must be from 1 to 2, got 3"):
        nn.MBConv(8, 8, stride=3)
    with pytest.raises(ValueError, match="window_size must be a sequence of 2"):
        nn.MOATBlock(32, 32, window_size=(7,))
