"""What only the CUDA kernels of the global filter have: sizes, ways in and out of a block, several images in it."""

import emulation
import pytest
import torch
from harness import HALF, LAYOUTS, Case, check_against_reference, laid_out, outputs

from vision_ops import fused_global_filter

SIZES = (7, 12, 14, 24)
# More images than a GPU holds blocks: two or three to a block, fewer to the last one.
MANY = {7: 1059, 24: 267}


@pytest.fixture
def filters(monkeypatch):
    emulation.install(monkeypatch, emulation.kernels())
    return emulation.kernels()


def make(images, channels, size, *, dtype=torch.float32, layout="contiguous"):
    x = laid_out(torch.randn(images, channels, size, size, dtype=dtype), layout)
    weight = torch.randn(channels, size, size // 2 + 1, 2)
    return Case(lambda t, backend: fused_global_filter(*t, backend=backend), [x, weight])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "channel_slice"])
def test_sizes_and_layouts(filters, size, layout, grad_layout):
    check_against_reference(make(2, 36, size, layout=layout), grad_layout)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_types(filters, size, dtype, layout):
    check_against_reference(make(2, 33, size, dtype=dtype, layout=layout), "channels_last")


@pytest.mark.parametrize(("size", "images"), MANY.items())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_images_to_a_block(filters, size, images, layout, monkeypatch):
    case = make(images, 3, size, layout=layout)
    check_against_reference(case, "channels_last")
    expected, grad = outputs(case, "fused")
    for order in emulation.ORDERS:
        monkeypatch.setenv("VOPS_EMU_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(outputs(case, "fused", grad)[0], expected, strict=True)), order


def test_which_sizes(filters):
    assert all(filters.has_filter_kernel(dtype, n, n) for dtype in (0, 1, 2) for n in SIZES)
    others = [(3, 14, 14), (0, 14, 7), (0, 7, 14), (0, 16, 16), (0, 1, 1)]
    assert not any(filters.has_filter_kernel(*other) for other in others)


def test_a_removed_barrier_is_caught(monkeypatch):
    """The tests above would see it, in every order of the threads."""
    barrier = "    __syncthreads();  // nobody needs what the plane was"
    mutation = emulation.Mutation("global_filter.cu", "global_filter.cu", barrier, "")
    module = emulation.load(emulation.build("filter-without-barrier", mutation=mutation))
    for order in emulation.ORDERS:
        emulation.install(monkeypatch, module, order)
        with pytest.raises(AssertionError, match="error"):
            check_against_reference(make(MANY[24], 3, 24))
