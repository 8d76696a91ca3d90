"""What every op is tested for at the least, of its case in `every_op`.

The older ops have the same checks at shapes of their own in their files: here are those that ask something of all.
"""

import contextlib

import pytest
import torch
from every_op import HALF_BLOCKS, NAMES, every_op, half_blocks
from harness import (
    Case,
    check_against_reference,
    check_autocast,
    check_bits_of_needs,
    check_bitwise_repeatable,
    check_compiles,
    check_gradients,
    check_half_types_among_nan,
    outputs,
    saved_bytes,
)

from vision_ops.ops import _registration

ELSEWHERE = {
    "channel_aggregation_ffn",
    "cross_covariance",
    "dwconv",
    "dwconv_layer_norm",
    "feature_decompose",
    "gated_recursion",
    "global_filter",
    "gnconv",
    "layer_norm_2d",
    "moga_aggregation",
    "moga_gate",
    "multi_order_dwconv",
    "s2_attention",
    "shift_split_attention",
    "split_cascade",
    "xca",
}
OPS = [*(name for name in NAMES if name not in ELSEWHERE), *HALF_BLOCKS]
all_ops, ops = pytest.mark.parametrize("name", [*NAMES, *HALF_BLOCKS]), pytest.mark.parametrize("name", OPS)


def make(name, **options):
    return (every_op if name in NAMES else half_blocks)(**options)[name]


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("each_device")
def test_matches_reference(name, dtype, layout):
    check_against_reference(make(name, dtype=dtype, layout=layout, size=7), layout)


@ops
@pytest.mark.parametrize("layout", ["channel_slice", "cropped", "transposed"])
def test_layouts(name, layout):
    check_against_reference(make(name, layout=layout, size=6), "transposed")


@ops
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 13)])
def test_odd_sizes_without_biases(name, batch, size):
    if size == 1 and name in ("batch_norm_act", "mbconv"):
        batch = 2  # which have nothing to normalise in one value
    # Of one token, the directions of q and k have no gradient: how rounding errors cancel is luck.
    check_against_reference(make(name, batch=batch, size=size, bias=False), slack=5.0 if size == 1 else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gnconv_half_block", "xca_half_block", "s2_attention_half_block"])
def test_x_as_the_residual(name, dtype):
    """Whose gradient is added where that of the norm is written."""
    check_against_reference(half_blocks(dtype=dtype, size=6, adds_x=True)[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp", *HALF_BLOCKS])
def test_small_layer_scale(name, dtype):
    """Of 1e-6, as networks begin with, beside a residual of zeros, which hides nothing: in float16 a weight that it is
    folded into would be gone."""
    case, wide = make(name, dtype=dtype, size=4), torch.promote_types(dtype, torch.float32)
    gamma, residual = case.constants[0] - 1, len(case.tensors) - 1
    if name == "mlp":
        gamma, residual = 7, 8
    case.tensors[gamma] = (1e-6 * torch.rand(case.tensors[gamma].shape)).to(wide)
    case.tensors[residual] = torch.zeros_like(case.tensors[residual], dtype=wide)
    check_against_reference(case, slack=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "gnconv_half_block", "xca_half_block", "s2_attention_half_block"])
def test_norm_of_a_common_offset(name, dtype):
    """A thousand times as large as the spread."""
    case = make(name, dtype=dtype, size=4)
    case.tensors[0] = case.tensors[0] + 1000
    check_against_reference(case, slack=2.0)


@ops
def test_empty_batch(name):
    found, _ = outputs(make(name, batch=0), "fused")
    assert found[0].numel() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found[1:])


@ops
def test_gradients(name):
    check_gradients(make(name, batch=2, size=2), fast=True)


@ops
def test_bitwise_repeatable(name):
    for layout in ("contiguous", "channels_last"):
        check_bitwise_repeatable(make(name, layout=layout))


@all_ops
def test_bits_do_not_depend_on_what_is_asked_for(name):
    check_bits_of_needs(make(name, size=9))


@ops
def test_half_types_among_nan(name):
    check_half_types_among_nan(make(name, size=5))


@all_ops
def test_keeps_no_more_than_eager(name):
    case = make(name)
    statistics = 16 * case.tensors[0].numel() // 32
    assert saved_bytes(case, "fused") <= saved_bytes(case, "reference") + statistics


@all_ops
def test_autocast(name):
    check_autocast(make(name, size=7))


@all_ops
def test_outputs_may_be_written_in_place(name):
    case = make(name, size=4)
    leaves = case.leaves()
    y = case.run(leaves, "fused")
    assert not y._is_view()
    y.mul_(2).sum().backward()
    assert all(t.grad is not None for t in leaves if t is not None and t.requires_grad)


@ops
def test_compiles(name):
    check_compiles([make(name, size=8)])


@ops
def test_dispatcher(name, monkeypatch):
    """PyTorch's own check of the op of the dispatcher."""
    seen = []
    monkeypatch.setattr(_registration.FusedOp, "_run", lambda op, given: seen.append((op, given)))
    with contextlib.suppress(TypeError):  # there is no result
        make(name, size=3).run(make(name, size=3).leaves(), "fused")
    ((op, given),) = seen
    monkeypatch.undo()
    given = [
        [t.detach() for t in a] if isinstance(a, list) and a and isinstance(a[0], torch.Tensor) else a for a in given
    ]
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in given]
    torch.library.opcheck(op._forward, tuple(given))
    result = op._forward(*given)
    y, saved = (result[0], (list(result[1:]),)) if op._saved else (result, ())
    needs = [t is not None for t in op.tensors(given)]
    torch.library.opcheck(op._backward, (torch.randn_like(y), *given, *saved, needs))
    torch.library.opcheck(op._forward, (given[0].clone().requires_grad_(), *given[1:]))


@ops
def test_refuses_every_bad_tensor(name):
    case = make(name, size=3)
    for place, t in enumerate(case.tensors):
        for bad in (t.int(), t.to("meta"), t[..., :0], t.to_sparse()):
            given = [*case.tensors[:place], bad, *case.tensors[place + 1 :]]
            with pytest.raises((TypeError, ValueError)):
                case.run(given, "fused")


def test_a_case_has_constants():
    case = Case(lambda t, _: t[0] * t[1], [torch.ones(2), torch.ones(2)], constants=(1,))
    assert [t.requires_grad for t in case.leaves()] == [True, False] and len(outputs(case, "fused")[0]) == 2
