"""What every op is tested for at the least, of its case in `every_op`. Its own file has what is special about it."""

import contextlib
import inspect

import pytest
import torch
import torch.utils._pytree as pytree
from every_op import HALF_BLOCKS, NAMES, every_op, gram_form, half_blocks, patched
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_autocast,
    check_bits_of_needs,
    check_bitwise_repeatable,
    check_compiles,
    check_gradients,
    check_half_types_among_nan,
    float64_is_left_out,
    laid_out,
    outputs,
    saved_bytes,
)

import vision_ops
from vision_ops import _native, explain
from vision_ops.ops import _registration

OPS = [*NAMES, "xca_gram"]
ops, all_ops = (pytest.mark.parametrize("name", names) for names in (OPS, [*OPS, *HALF_BLOCKS]))
each_device = pytest.mark.usefixtures("each_device")
DTYPES = [torch.float32, *HALF, torch.float64]
WHOLE = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"


def make(name, **options):
    if name == "xca_gram":
        return gram_form(**options)
    return (every_op if name in NAMES else half_blocks)(**options)[name]


def public_name(name):
    return f"fused_{name.removesuffix('_half_block').removesuffix('_gram')}"


def values(case):
    """The places of the tensors that are no parameters."""
    images = len(case.tensors[0])
    return [i for i, t in enumerate(case.tensors) if t is not None and t.ndim > 2 and len(t) == images]


def not_on_gpus(parameters):
    attention = parameters["name"].startswith(("cross_covariance", "relative", "xca"))
    return float64_is_left_out(parameters) if attention else None


@all_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_device
def test_matches_reference(name, dtype, layout):
    # In float64 chains of layers err by some units of rounding, which eager's happen to be below.
    case, slack = make(name, dtype=dtype, layout=layout, size=7, channels=24), 4.0 if dtype == torch.float64 else 1.0
    check_against_reference(case, layout, slack=slack)


@all_ops
@pytest.mark.parametrize("layout", LAYOUTS)
@each_device
def test_layouts(name, layout):
    """Of whole vectors of channels, and of others beside slices; each beside another layout of grad_output."""
    if layout == "expanded" and name == "mbconv":
        return  # of which its norms leave nothing in training: its own file has it in evaluation
    # Where x is the same everywhere, some gradients vanish: what is found is rounding errors.
    slack = 20.0 if layout == "expanded" else 1.0
    for channels, other in ((32, 1), (24, 3)):
        case = make(name, layout=layout, size=6, channels=channels)
        x, y = case.tensors[0], case.run(case.tensors, "fused")
        if x.shape == y.shape and x.shape[1] == channels:
            last = layout in ("channels_last", "channel_slice")
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for i in values(case)[1:] if channels == 24 else ():
            if (t := case.tensors[i]).ndim == 4:
                case.tensors[i] = laid_out(t, "channel_slice")
        grad_layout = LAYOUTS[(LAYOUTS.index(layout) + other) % len(LAYOUTS)]
        check_against_reference(case, grad_layout, slack=slack)


@all_ops
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 13)])
@each_device
def test_odd_sizes_without_biases(name, batch, size):
    if size == 1 and name in ("batch_norm_act", "mbconv"):
        batch = 2  # which have nothing to normalise in one value
    # Of one token, the directions of q and k have no gradient: how rounding errors cancel is luck.
    check_against_reference(make(name, batch=batch, size=size, bias=False), slack=20.0 if size == 1 else 1.0)


@all_ops
@pytest.mark.parametrize("dtype", HALF, ids=str)
@each_device
def test_float32_parameters_beside_half_values(name, dtype):
    case = make(name, size=5)
    for i in values(case):
        case.tensors[i] = case.tensors[i].to(dtype)
    check_against_reference(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "gnconv_half_block", "xca_half_block", "s2_attention_half_block"])
def test_x_as_the_residual(name, dtype):
    """Whose gradient is added where that of the norm is written."""
    if name == "mlp":
        mlp = make(name, dtype=dtype, size=6)
        *given, _, drops = mlp.tensors
        case = Case(lambda t, backend: mlp.run([*t[:8], t[0], t[8]], backend), [*given, drops], constants=(8,))
    else:
        case = half_blocks(dtype=dtype, size=6, adds_x=True)[name]
    check_against_reference(case)


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


@all_ops
@each_device
def test_empty_batch(name):
    for layout in ("contiguous", "channels_last"):
        found, _ = outputs(make(name, batch=0, layout=layout), "fused")
        assert found[0].numel() == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in found[1:])


@all_ops
def test_gradcheck(name):
    check_gradients(make(name, batch=2, size=2, channels=8), fast=True)


@all_ops
@each_device
def test_bitwise_repeatable(name):
    for layout, size in (("contiguous", 29), ("channels_last", 29), ("channels_last", 5)):
        check_bitwise_repeatable(make(name, layout=layout, batch=3, size=size))


@all_ops
@each_device
def test_bits_do_not_depend_on_what_is_asked_for(name):
    for layout, size in (("contiguous", 9), ("channels_last", 5)):
        check_bits_of_needs(make(name, layout=layout, size=size))


@all_ops
def test_half_types_among_nan(name):
    check_half_types_among_nan(make(name, size=5))


# Numbers of a pixel, at 32 channels, that are kept for backward beside the arguments.
KEPT = {
    "batch_norm_act": 1,  # statistics of channels
    "channel_aggregation_ffn": 81,  # hidden channels, a cache line between pixels, a score
    "dwconv_layer_norm": 2,  # statistics
    "gnconv": 64 + 56,  # the outputs of proj_in and of the convolution
    "mbconv": 64 + 64 + 4,  # the inputs of two norms, sums of images, tables of channels
    "mlp": 96,  # of hidden channels
    "moga_aggregation": 32 + 32 + 1,  # the outputs of proj_1 and of the convolutions, means
    "relative_attention": 4,  # lse of the heads
    "relative_self_attention": 96 + 32 + 4,  # q, k and v, the attention's output, lse
    "s2_attention": 96 + 1,  # the branches, sums of images
    "shift_split_attention": 1,  # sums of images
    "xca": 96 + 3,  # q, k and v, attention of images
}


@all_ops
def test_what_backward_keeps(name):
    case = make(name)
    kept, pixels = saved_bytes(case, "fused"), 2 * 14 * 14
    assert kept <= saved_bytes(case, "reference") + 16 * pixels, "`unread` names what backward does not read"
    if name not in HALF_BLOCKS:
        assert kept <= sum(t.nbytes for t in case.tensors if t is not None) + 4 * pixels * KEPT.get(name, 0)


@all_ops
def test_autocast(name):
    case = make(name, size=7)
    check_autocast(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.run(case.tensors, "fused")
    if y.dtype == torch.bfloat16:  # of parameters in float32, which a kernel reads as they are
        cast = [t.bfloat16() if i in values(case) else t for i, t in enumerate(case.tensors)]
        assert torch.equal(case.run(cast, "fused"), y)


@ops
def test_autocast_leaves_a_float32_backward_alone(name):
    case = make(name, size=5)
    y = case.run(leaves := case.leaves(), "fused")
    graded, grad = [t for t in leaves if t is not None and t.requires_grad], torch.randn_like(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, graded, grad, retain_graph=True)
    for a, b in zip(inside, torch.autograd.grad(y, graded, grad), strict=True):
        assert torch.equal(a, b)


@all_ops
def test_outputs_may_be_written_in_place(name):
    case = make(name, size=4)
    leaves = case.leaves()
    y = case.run(leaves, "fused")
    assert not y._is_view()
    y.mul_(2).sum().backward()
    assert all(t.grad is not None for t in leaves if t is not None and t.requires_grad)


@ops
def test_functorch_takes_the_reference(name):
    x, *rest = make(name, size=4, dtype=torch.float64).tensors
    run = make(name, size=4).run
    found = []
    for backend in ("auto", "reference"):

        def f(x, backend=backend):
            return run([x, *rest], backend)

        found.append((*torch.func.jvp(f, (x,), (x.flip(0),)), torch.func.grad(lambda x, f=f: f(x).square().sum())(x)))
        found[-1] += (torch.func.vmap(f)(torch.stack([x, -x])),)
    torch.testing.assert_close(*found)


@all_ops
def test_compiles(name):
    """For one size, and then for others. relative_attention is told the height and width."""
    other = {} if name in HALF_BLOCKS else {"batch": 3} if name == "relative_attention" else {"size": 5}
    check_compiles([make(name, size=8), *([make(name, **{"size": 8, **other})] if other else [])])


@ops
def test_exports(name):
    case = make(name, size=6)
    module = torch.nn.Module()
    module.forward = lambda x: case.run([x, *case.tensors[1:]], "fused")
    exported = torch.export.export(module, (case.tensors[0],))
    assert any(f"vision_ops.{public_name(name)[6:]}" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(case.tensors[0]), case.run(case.tensors, "fused"))


@all_ops
def test_opcheck(name, monkeypatch):
    """PyTorch's own check of the op of the dispatcher: whole, then of another layout, fewer tensors and gradients."""
    quick = "test_schema", "test_faketensor"
    for options, checks in (({}, WHOLE), ({"layout": "contiguous", "bias": False}, quick)):
        seen = []
        case = make(name, size=3, **options)
        with monkeypatch.context() as patch, contextlib.suppress(TypeError):  # there is no result
            patch.setattr(_registration.FusedOp, "_run", lambda op, given, seen=seen: seen.append((op, given)))
            case.run(case.leaves(), "fused")
        ((op, given),) = seen
        given = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, list(given))
        result = op._forward(*given)
        y, saved = (result[0], (list(result[1:]),)) if op._saved else (result, ())
        needs = [t is not None and (checks is WHOLE or i % 2 == 0) for i, t in enumerate(op.tensors(given))]
        torch.library.opcheck(op._forward, (given[0].clone().requires_grad_(), *given[1:]), test_utils=checks)
        torch.library.opcheck(op._backward, (torch.randn_like(y), *given, *saved, needs), test_utils=checks)


@all_ops
def test_refuses_every_bad_tensor(name):
    """And says which argument it is that does not fit the others."""
    case = make(name, size=3)
    arguments = "|".join(inspect.signature(getattr(vision_ops, public_name(name))).parameters)
    for place, t in enumerate(case.tensors):
        for bad in (t.int(), t.to("meta"), t[..., :0], t.to_sparse()):
            given = [*case.tensors[:place], bad, *case.tensors[place + 1 :]]
            with pytest.raises((TypeError, ValueError), match=rf"^({arguments})\b"):
                case.run(given, "fused")
    with pytest.raises(ValueError, match="backend must be one of"):
        case.run(case.tensors, "cudnn")


@all_ops
def test_without_kernels(name, monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "cpu_missing", "they were never compiled")
    case = make(name, size=3)
    torch.testing.assert_close(*(case.run(case.tensors, backend) for backend in ("auto", "reference")))
    with pytest.raises(ValueError, match=f"fused_{name.removesuffix('_gram')} cannot run: they were never compiled"):
        case.run(case.tensors, "fused")


@all_ops
def test_explains(name):
    op = public_name(name).removeprefix("fused_")
    with patched(vision_ops, f"fused_{op}", lambda *given, **options: explain(op, *given, **options)):
        case = make(name, size=3)
        found = {backend: case.run(case.tensors, backend) for backend in ("fused", "reference")}
    assert any("C++" in runs for runs in found["fused"].parts.values()) and not found["fused"].cannot
    assert set(found["reference"].parts.values()) == {"PyTorch"}


def test_a_case_has_constants():
    case = Case(lambda t, _: t[0] * t[1], [torch.ones(2), torch.ones(2)], constants=(1,))
    assert [t.requires_grad for t in case.leaves()] == [True, False] and len(outputs(case, "fused")[0]) == 2
