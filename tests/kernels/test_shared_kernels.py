"""What ops share: tiles, the walk, the second stage of sums, and the conversion of parameters."""

import pytest
import torch

from vision_ops.kernels import _maps, _quarters, convert, sums

pytestmark = pytest.mark.usefixtures("interpreter")


def test_tiles_have_few_idle_lanes():
    """Of published widths in half types; in rows of 64 bytes, which leave a quarter of 48 channels out."""
    for channels in (32, 64, 96, 128, 160, 192, 256, 288, 304, 320, 384, 480, 512, 584, 768, 2048):
        width = _maps.channels_of_tile(channels, 2)
        assert width * 2 >= 64 and channels / (-(-channels // width) * width) >= 0.9, (channels, width)
    assert [_maps.channels_of_tile(c, 2) for c in (1, 3, 24, 48)] == [1, 4, 32, 64]
    for channels in (192, 384, 256, 512):
        assert channels / 4 % _quarters.tile(channels, 2).BLOCK_C == 0


@pytest.mark.parametrize("last", [True, False])
def test_walk(last):
    """Images that follow each other like pixels are one, unless they stay apart or those of another tensor do not."""
    form = torch.channels_last if last else torch.contiguous_format
    whole, cropped = (torch.empty(3, 8, h, 5).contiguous(memory_format=form)[:, :, :4] for h in (4, 6))
    part = (8, 1) if last else (1, 20)
    assert _maps.walk([whole[:, :4], None]) == ((1, 60, [(0, 1, 8), None]) if last else (3, 20, [(160, 20, 1), None]))
    for tensors, apart in (([whole], True), ([whole, cropped], False)):
        images, pixels, (found, *_) = _maps.walk(tensors, apart)
        assert (images, pixels, found) == (3, 20, (160, part[1], part[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("samples", "count"), [(3, 5), (1, 70), (2, 1)])
def test_sums_of_parts(samples, count, dtype):
    """Of few and of many, into tensors of any dtype, some of which nobody wants."""
    parts = torch.randn(samples, count, 300, dtype=dtype)
    lengths, half = [150, 20, 130], torch.bfloat16 if dtype == torch.float32 else dtype
    outs = [
        torch.full((samples, 150), float("nan"), dtype=dtype),
        None,
        torch.empty(samples, 130, dtype=half),
    ]
    sums.sum_parts(parts, outs, lengths)
    first, _, last = parts.double().sum(1).split(lengths, dim=1)
    torch.testing.assert_close(outs[0].double(), first, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(outs[2].double(), last, rtol=2**-8, atol=1e-4)


def test_means():
    parts = torch.full((2, 3, 8), 49.0)
    means = torch.empty(2, 8)
    sums.sum_parts(parts, [means], pixels=49)
    assert (means == 3).all()


def test_conversion_of_parameters():
    """Blocks that are full, and the last one of each."""
    sources = [torch.randn(shape) for shape in ((3, 5), (2100,), (1024,), (1,))] + [torch.randn(7, 2).bfloat16()]
    factors = [1.0, 1.0, 1 / 3, 1.0, 2.0]
    targets = [
        torch.full_like(t, float("nan"), dtype=torch.float32 if f != 1 else torch.float16)
        for t, f in zip(sources, factors, strict=True)
    ]
    convert.convert(sources, targets, factors)
    for source, target, factor in zip(sources, targets, factors, strict=True):
        torch.testing.assert_close(target, (source.float() * factor).to(target.dtype))
