"""The guard that every test runs under."""

import pytest
import torch
import torch.nn.functional as F
import unwritten

GEOMETRY = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]

PRODUCTS = {
    "torch.mm": (lambda a: torch.mm(a, torch.ones(6, 2, dtype=a.dtype)), (4, 6)),
    "the right operand": (lambda a: torch.mm(torch.ones(2, 4, dtype=a.dtype), a), (4, 6)),
    "out=": (lambda a: torch.mm(a, torch.ones(6, 2, dtype=a.dtype), out=torch.empty(4, 2, dtype=a.dtype)), (4, 6)),
    "a keyword": (lambda a: torch.mm(torch.ones(2, 4, dtype=a.dtype), mat2=a), (4, 6)),
    "torch.addmm": (lambda a: torch.addmm(a, torch.ones(4, 3, dtype=a.dtype), torch.ones(3, 6, dtype=a.dtype)), (4, 6)),
    "addmm_": (lambda a: a.addmm_(torch.ones(4, 3, dtype=a.dtype), torch.ones(3, 6, dtype=a.dtype)), (4, 6)),
    "torch.bmm": (lambda a: torch.bmm(a, torch.ones(2, 6, 3, dtype=a.dtype)), (2, 4, 6)),
    "baddbmm_": (lambda a: a.baddbmm_(a.clone(), torch.ones(2, 6, 6, dtype=a.dtype)), (2, 4, 6)),
    "@": (lambda a: a @ torch.ones(6, dtype=a.dtype), (4, 6)),
    "F.linear": (lambda a: F.linear(a, torch.ones(3, 6, dtype=a.dtype)), (4, 6)),
    "F.conv2d": (lambda a: F.conv2d(a, torch.ones(2, 3, 1, 1, dtype=a.dtype)), (2, 3, 4, 6)),
    "convolution_backward": (
        lambda a: torch.ops.aten.convolution_backward(
            a, a.clone(), torch.ones(1, 1, 3, 3, dtype=a.dtype), [1], *GEOMETRY
        ),
        (2, 1, 4, 6),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_finds_nan_between_rows(product, dtype):
    run, shape = PRODUCTS[product]
    wide = torch.ones(*shape[:-1], shape[-1] + 2, dtype=dtype)
    run(wide[..., : shape[-1]].clone())
    run(wide[..., : shape[-1]])
    wide[..., -1] = torch.nan
    with pytest.raises(AssertionError, match="not finite"):
        run(wide[..., : shape[-1]])


def test_the_gap_behind_the_last_row_counts():
    wide = torch.ones(4, 8)
    wide[-1, -1] = torch.nan
    assert unwritten.holds_unwritten(wide[:, :6]) and not unwritten.holds_unwritten(wide[:3, :6])
    assert unwritten.holds_unwritten(wide[:, :6].t())


def test_what_lies_outside_does_not_count():
    assert not unwritten.holds_unwritten(torch.empty(0, 3)) and not unwritten.holds_unwritten(torch.ones(3).to("meta"))
    t = torch.ones(6)
    t[5] = torch.inf
    assert not unwritten.holds_unwritten(t[:5]) and unwritten.holds_unwritten(t[1:])
