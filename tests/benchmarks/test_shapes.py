import pytest
import torch

from benchmarks import shapes
from benchmarks.cases import OPS, Setting, dwconv_flops
from benchmarks.providers import make_step
from benchmarks.verify import complaints
from vision_ops import reference

SETTING = Setting("cpu", torch.float32, "channels_last", batch=2)


def test_multi_order_runs_at_every_distinct_stage_of_moganet():
    cases = {label: (shape.channels, shape.size) for label, shape in shapes.multi_order_cases().items()}
    assert cases == {
        "MogaNet-XT.1": (32, 56), "MogaNet-XT.2": (64, 28), "MogaNet-XT.3": (96, 14), "MogaNet-XT.4": (192, 7),
        "MogaNet-T.3": (128, 14), "MogaNet-T.4": (256, 7),
        "MogaNet-S.1": (64, 56), "MogaNet-S.2": (128, 28), "MogaNet-S.3": (320, 14), "MogaNet-S.4": (512, 7),
        "MogaNet-B.2": (160, 28), "MogaNet-L.4": (640, 7),
        "MogaNet-XL.1": (96, 56), "MogaNet-XL.2": (192, 28), "MogaNet-XL.3": (480, 14), "MogaNet-XL.4": (960, 7),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("label", "channels", "size", "kernel"),
    [
        ("MogaNet-S.3 dw5d2", 120, 14, 5),
        ("MogaNet-S.3 dw7d3", 160, 14, 7),
        ("MogaNet-S.3 ffn", 1280, 14, 3),
        ("MogaNet-L.4 ffn", 2560, 7, 3),
        ("HorNet-T.2", 224, 28, 7),
        ("HorNet-S.4", 1488, 7, 7),
        ("EdgeNeXt-B.4", 584, 8, 9),
        ("EdgeNeXt-XXS.3 split", 30, 16, 3),
        ("EdgeNeXt-B.4 split", 146, 8, 3),
        ("ConvNeXt-T.3", 384, 14, 7),
        ("MOAT-0.2", 768, 28, 3),
        ("MOAT-0.2 entry", 768, 56, 3),
    ],
)
def test_dwconv_shapes_of_the_networks(label, channels, size, kernel):
    shape = shapes.dwconv_cases()[label]
    assert (shape.channels, shape.size, shape.kernel) == (channels, size, kernel)


def test_a_shape_that_two_networks_share_is_one_case():
    cases = shapes.dwconv_cases()
    assert "HorNet-T.1" in cases
    assert "ConvNeXt-T.1" not in cases
    assert len(set(cases.values())) == len(cases)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_quick_names_cases(op):
    assert set(op.quick) <= set(op.cases)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_problems_have_their_layout_and_the_same_values_in_both(op):
    case = op.quick[-1]
    nhwc = op.problem(case, SETTING)
    nchw = op.problem(case, Setting("cpu", torch.float32, "contiguous", batch=2))
    if op.name in ("xca", "cross_covariance", "relative_attention"):  # of tokens, which have one layout
        assert nhwc.inputs[0].stride() == nchw.inputs[0].stride()
    else:
        maps = [x.permute(0, 3, 1, 2) if op.pixels else x for x in (nhwc.inputs[0], nchw.inputs[0])]
        assert maps[0].is_contiguous(memory_format=torch.channels_last)
        assert maps[1].is_contiguous()
        assert op.laid_out(nchw.inputs[0], "channels_last").stride() == nhwc.inputs[0].stride()
    assert all(map(torch.equal, nhwc.inputs, nchw.inputs))
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in nhwc.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kind"), [(op.name, kind) for op in OPS.values() for kind in op.others])
def test_other_ways_to_write_an_op_agree_with_the_reference(name, kind, dtype):
    op = OPS[name]
    problem = op.problem(list(op.cases)[-1], Setting("cpu", dtype, "contiguous", batch=2))
    grad = torch.randn_like(op.reference(*problem.args, **problem.options))
    other, eager = (make_step(k, op, problem, grad, "train")() for k in (kind, "eager"))
    exact = make_step("eager", op, problem.to(torch.float64), grad.double(), "train")()
    assert not torch.equal(other[0], eager[0])  # it is another way
    assert complaints(other, eager, exact) == []


def test_the_entry_of_a_moat_stage_halves_the_size():
    problem = OPS["dwconv"].problem("MOAT-tiny0.4 entry", SETTING)
    assert problem.inputs[0].shape == (2, 1024, 14, 14)
    assert reference.dwconv(*problem.args, **problem.options).shape == (2, 1024, 7, 7)


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        (7, 7, {"dilation": 3}),
        (14, 5, {"dilation": 2}),
        (5, 3, {}),
        (8, 3, {"stride": 2, "padding": (0, 1, 0, 1)}),
    ],
)
def test_flops_leave_out_the_taps_in_the_padding(size, kernel, options):
    ones = torch.ones(2, 3, size, size), torch.ones(3, 1, kernel, kernel)
    taps = reference.dwconv(*ones, **options).sum().item()
    assert dwconv_flops(2, 3, size, kernel, **options) == 2 * taps


def test_layer_norm_runs_where_hornet_and_edgenext_have_it():
    cases = {label: (shape.channels, shape.size) for label, shape in shapes.layer_norm_cases().items()}
    assert cases["HorNet-T.4"] == (512, 7) and cases["HorNet-S.1"] == (96, 56)
    assert cases["EdgeNeXt-S.1"] == (48, 64) and cases["EdgeNeXt-B.3"] == (288, 16)
    assert not any(label.startswith("EdgeNeXt") and label.endswith(".4") for label in cases)


def test_gnconv_has_the_orders_and_widths_of_hornet():
    cases = shapes.gnconv_cases()
    assert cases["HorNet-T.4"] == shapes.GnConvShape(512, 5, 7) and cases["HorNet-T.4"].widths == [
        32,
        64,
        128,
        256,
        512,
    ]
    assert sum(cases["HorNet-S.1"].widths) == 144 and len(cases) == 8


def test_global_filters_are_in_the_last_two_stages():
    cases = {label: (shape.channels, shape.size) for label, shape in shapes.global_filter_cases().items()}
    assert cases == {"HorNet-T.3": (240, 14), "HorNet-T.4": (496, 7), "HorNet-S.3": (360, 14), "HorNet-S.4": (744, 7)}


def test_conv_and_norm_run_where_edgenext_and_convnext_have_them():
    cases = shapes.dwconv_layer_norm_cases()
    assert [cases[f"EdgeNeXt-S.{i}"].kernel for i in (1, 2, 3, 4)] == [3, 5, 7, 9]
    assert [str(cases[f"ConvNeXt-T.{i}"]) for i in (1, 4)] == ["96x56x56 k7", "768x7x7 k7"]
    problem = OPS["dwconv_layer_norm"].problem("EdgeNeXt-S.4", SETTING)
    assert reference.dwconv_layer_norm(*problem.args).shape == (2, 8, 8, 304)


def test_cascades_have_the_splits_of_edgenext():
    cases = shapes.split_cascade_cases()
    assert (cases["EdgeNeXt-S.3"].channels, cases["EdgeNeXt-S.3"].scales) == (160, 3)
    assert not any(label.endswith(".1") for label in cases)
    x, weights, _ = OPS["split_cascade"].problem("EdgeNeXt-S.3", SETTING).args
    assert x.shape == (2, 160, 16, 16) and [w.shape[0] for w in weights] == [54, 54]


def test_shift_split_attention_runs_at_the_stages_of_s2mlpv2():
    cases = {label: (shape.channels, shape.size) for label, shape in shapes.s2_cases().items()}
    assert cases == {
        "S2-MLPv2-S.1": (192, 32), "S2-MLPv2-S.2": (384, 16), "S2-MLPv2-M.1": (256, 32), "S2-MLPv2-M.2": (512, 16),
    }  # fmt: skip
    problem = OPS["s2_attention"].problem("S2-MLPv2-S.2", SETTING)
    assert [tuple(t.shape) for t in problem.inputs] == [
        (2, 16, 16, 384), (1152, 384), (1152,), (384, 384), (384,), (96, 384), (1152, 96),
    ]  # fmt: skip


def test_relative_attention_runs_at_the_last_stages_of_moat():
    cases = shapes.relative_attention_cases()
    assert [str(cases[f"MOAT-{name}"]) for name in ("0.3", "0.4", "tiny0.4")] == [
        "14x14x384 h12", "7x7x768 h24", "7x7x256 h8",
    ]  # fmt: skip
    assert not any(label.endswith((".1", ".2")) for label in cases)
