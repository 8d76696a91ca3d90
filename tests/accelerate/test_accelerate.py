"""`accelerate` and `restore` on models of other packages."""

import copy
import io
import pickle
import re

import pytest
import standins
import torch
from standins import Tokens
from torch import nn

import vision_ops
from vision_ops._accelerate.forward import fused_forward
from vision_ops.dispatch import use_backend

DIM = 16
# What makes a module in the official layout, called with (N, DIM, 9, 7), and what of it runs which ops.
OFFICIAL = {
    "ConvEncoder": (lambda: standins.ConvEncoder(DIM, 0.3, 5), {"": "dwconv_layer_norm mlp"}),
    "ConvEncoderBNHS": (lambda: standins.ConvEncoderBNHS(DIM, 0.3, 3), {"": "dwconv mlp"}),
    "SDTAEncoder": (
        lambda: standins.SDTAEncoder(DIM, 0.3),
        {"": "split_cascade scaled_residual mlp", "xca": "xca"},
    ),
    "SDTAEncoderBNHS": (
        lambda: standins.SDTAEncoderBNHS(DIM, 0.3),
        {"": "split_cascade scaled_residual mlp", "xca": "xca"},
    ),
    "XCABlock": (
        lambda: Tokens(standins.XCABlock(DIM, 0.3)),
        {"block": "xca scaled_residual mlp", "block.local_mp": "dwconv"},
    ),
    "HorNet": (
        lambda: standins.Block(DIM, 0.3),
        {"": "gnconv mlp"},
    ),
    "HorNet with a global filter": (
        lambda: standins.Block(DIM, 0.3, standins.GlobalLocalFilter),
        {
            "": "scaled_residual mlp",
            "norm1": "layer_norm_2d",
            "gnconv": "gated_recursion",
            "gnconv.dwconv": "dwconv global_filter",
            "gnconv.dwconv.pre_norm": "layer_norm_2d",
            "gnconv.dwconv.post_norm": "layer_norm_2d",
        },
    ),
    "MogaNet": (
        lambda: standins.MogaBlock(DIM, 0.3),
        {"attn": "moga_aggregation", "mlp": "channel_aggregation_ffn"},
    ),
    "MogaNet with double activations": (
        lambda: standins.MogaBlock(DIM, attn_force_fp32=True),
        {"attn": "moga_aggregation", "mlp": "channel_aggregation_ffn"},
    ),
    "MultiOrderDWConv": (lambda: standins.MultiOrderDWConv(DIM, (1, 2, 1)), {"": "multi_order_dwconv"}),
    "S2MLPv2": (lambda: standins.S2Block(DIM), {"model.0.0.fn": "s2_attention", "model.0.1": "mlp"}),
}
official = pytest.mark.parametrize("name", OFFICIAL)


def images(dtype=torch.float64):
    return torch.randn(2, DIM, 9, 7, dtype=dtype)


def step(model, x, seed=0):
    """The output, all gradients and the buffers after a forward and a backward pass."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads, **{n: b.clone() for n, b in model.named_buffers()}}


def assert_same(found, expected, tolerance):
    least = 1e-3 * max(t.abs().max().item() for t in expected.values())
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        error = (found[name].double() - t.double()).abs().max().item()
        assert error <= tolerance * max(t.abs().max().item(), least), (name, error)


def ops(report):
    return {name: " ".join(ops) for name, ops in report.fused.items()}


@official
@pytest.mark.parametrize("training", [False, True])
def test_official_layouts(name, training):
    make, expected = OFFICIAL[name]
    model = make().double().train(training)
    plain, x = copy.deepcopy(model), images()
    report = vision_ops.accelerate(model)
    assert ops(report) == expected and not report.left, str(report)
    assert_same(step(model, x), step(plain, x), 1e-6 if "filter" in name else 1e-9)
    if report.fused:
        with use_backend("fused"):
            model(x)


@official
def test_restored_bit_for_bit(name):
    model = OFFICIAL[name][0]().double()
    before, plain, x = {m: dict(m.__dict__) for m in model.modules()}, copy.deepcopy(model), images()
    keys = list(model.state_dict())
    vision_ops.accelerate(model)
    assert list(model.state_dict()) == keys
    vision_ops.restore(model)
    assert all(m.__dict__ == before[m] for m in model.modules())
    found, expected = step(model, x), step(plain, x)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_leaves_no_trace():
    model = standins.SDTAEncoderBNHS(DIM, 0.3).eval()
    model.norm.train()
    model.gamma.requires_grad_(False)
    model.convs[0].weight.grad = torch.ones_like(model.convs[0].weight)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.no_grad():
        assert vision_ops.accelerate(model).fused and not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), rng) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [p.grad is not None for p in model.parameters()].count(True) == 1
    assert not model.gamma.requires_grad


def test_idempotent():
    model = standins.MogaBlock(DIM)
    first = vision_ops.accelerate(model)
    second = vision_ops.accelerate(model)
    assert str(first) == str(second) and first == second
    # A part that was taken for itself, before what it is a part of.
    model = standins.MogaBlock(DIM)
    vision_ops.accelerate(model.attn.value)
    assert fused_forward(model.attn.value)
    assert vision_ops.accelerate(model) == first and fused_forward(model.attn.value) is None


def lora(linear):
    class Lora(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)

    found = Lora(linear.in_features, linear.out_features)
    found.load_state_dict(linear.state_dict())
    return found


def with_layer(name, layer):
    def change(block):
        parent = block.get_submodule(name.rpartition(".")[0])
        setattr(
            parent, name.rpartition(".")[2], layer if isinstance(layer, nn.Module) else layer(block.get_submodule(name))
        )

    return change


class Other(standins.ConvEncoder):
    def forward(self, x):
        return super().forward(x) * 2


def quantized(linear):
    return torch.ao.nn.quantized.dynamic.Linear(linear.in_features, linear.out_features)


LOOK_ALIKES = {
    "even kernel": (
        lambda: standins.ConvEncoder(DIM, kernel_size=4),
        lambda b: None,
        r"dwconv\.kernel_size is \(4, 4\), and even ones have no kernel",
    ),
    "other norm": (
        lambda: standins.ConvEncoder(DIM, norm=lambda dim: nn.RMSNorm(dim)),
        lambda b: None,
        "norm is a RMSNorm, not a LayerNorm",
    ),
    "norm without bias": (
        lambda: standins.ConvEncoder(DIM, norm=lambda dim: nn.LayerNorm(dim, bias=False)),
        lambda b: None,
        r"norm\.bias is missing",
    ),
    "norm over planes": (
        lambda: standins.ConvEncoder(DIM),
        lambda b: setattr(b.norm, "data_format", "channels_first"),
        "norm.data_format is 'channels_first', not 'channels_last'",
    ),
    "dilation": (
        lambda: standins.ConvEncoder(DIM),
        with_layer("dwconv", nn.Conv2d(DIM, DIM, 7, padding=6, dilation=2, groups=DIM)),
        r"dwconv\.(padding|dilation) is",
    ),
    "tanh": (
        lambda: standins.ConvEncoder(DIM),
        with_layer("act", nn.GELU(approximate="tanh")),
        "act.approximate is 'tanh', not 'none'",
    ),
    "LoRA": (lambda: standins.ConvEncoder(DIM), with_layer("pwconv1", lora), "pwconv1 is a Lora, not a Linear"),
    "hooks": (
        lambda: standins.ConvEncoder(DIM),
        lambda b: b.pwconv2.register_forward_hook(lambda *a: None),
        "pwconv2 has hooks",
    ),
    "quantized": (lambda: standins.ConvEncoder(DIM), with_layer("pwconv1", quantized), "pwconv1 is a .*Linear, not a"),
    "dropout": (
        lambda: Tokens(standins.XCABlock(DIM, drop=0.1)).train(),
        lambda b: None,
        "mlp.drop is active",
    ),
    "a forward of its own": (
        lambda: standins.ConvEncoder(DIM),
        lambda b: setattr(b, "forward", lambda x: x),
        "it has a forward of its own",
    ),
    "another formula": (
        lambda: type("ConvEncoder", (standins.ConvEncoder,), {"forward": another, "__module__": __name__})(DIM),
        lambda b: None,
        "in a trial in evaluation mode, the output differed|its class has another forward",
    ),
    "shifts in place": (
        lambda: standins.S2Attention(DIM, clean=False),
        lambda b: None,
        "in a trial in evaluation mode, the output differed",
    ),
    "ReLU gates": (
        lambda: standins.MultiOrderGatedAggregation(DIM, act=nn.ReLU),
        lambda b: None,
        "act_value is a ReLU, not a SiLU",
    ),
}


def another(self, x):
    return x - standins.ConvEncoder.forward(self, x)


another.__qualname__ = "ConvEncoder.forward"


@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning")
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_alone(name):
    make, change, reason = LOOK_ALIKES[name]
    block = make()
    change(block)
    report = vision_ops.accelerate(block)
    (left, reasons), *_ = report.left.items()
    assert len(report.left) == 1 and fused_forward(block.get_submodule(left)) is None
    assert re.search(reason, "; ".join(reasons)) and reasons[0] in str(report)


def test_strangers_are_not_reported():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.attn, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.Sequential(Block(), nn.LayerNorm(4), vision_ops.nn.MogaBlock(DIM), Other(DIM))
    report = vision_ops.accelerate(model)
    assert report.entries == [] and str(report) == "no module is known"
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_layers_are_looked_at_in_every_call():
    model, x = standins.ConvEncoder(DIM).double(), images()
    vision_ops.accelerate(model)
    calls = []
    handle = model.pwconv1.register_forward_hook(lambda *a: calls.append(1))
    hooked = model(x)
    handle.remove()
    model(x)
    assert calls == [1]
    model.pwconv1 = lora(model.pwconv1).double()
    changed = copy.deepcopy(model)
    vision_ops.restore(changed)
    assert torch.equal(model(x), changed(x)) and not torch.equal(model(x), hooked)
    with use_backend("fused"), pytest.raises(ValueError, match="pwconv1 is a Lora, not a Linear"):
        model(x)
    with use_backend("reference"):
        assert torch.equal(model(x), changed(x))


def test_dropout_is_fused_in_evaluation_only():
    model, x = Tokens(standins.XCABlock(DIM, drop=0.4)).double().eval(), images()
    plain = copy.deepcopy(model)
    assert "block" in vision_ops.accelerate(model).fused
    for training in (True, False):
        assert_same(step(model.train(training), x), step(plain.train(training), x), 1e-9)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_their_own(how):
    model, x = standins.SDTAEncoder(DIM).double(), images()
    vision_ops.accelerate(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert all(fused_forward(m).module is m for m in other.modules() if fused_forward(m))
    assert [fused_forward(m) is not None for m in other.modules()].count(True) == 2
    expected = model(x)
    with torch.no_grad(), use_backend("fused"):
        assert torch.equal(other(x), expected)
        other.pwconv2.weight.zero_()
        assert not torch.equal(other(x), expected) and torch.equal(model(x), expected)


def test_dtypes_and_weights_may_change_later():
    model, x = standins.Block(DIM), images()
    plain, other = copy.deepcopy(model).double(), standins.Block(DIM).double()
    vision_ops.accelerate(model)
    with use_backend("fused"):
        assert_same(step(model.double(), x), step(plain, x), 1e-9)
        model.load_state_dict(other.state_dict())
        assert_same(step(model, x), step(other, x), 1e-9)
        model.bfloat16()
        assert model(x.bfloat16()).dtype == torch.bfloat16


def test_weights_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(standins.ConvEncoder(DIM), standins.SDTAEncoderBNHS(DIM))
    report = vision_ops.accelerate(model)
    assert not report.left and len(report.fused) == 3
    model.to_empty(device="cpu")
    plain, x = nn.Sequential(standins.ConvEncoder(DIM), standins.SDTAEncoderBNHS(DIM)), images()
    model.load_state_dict(plain.state_dict())
    with use_backend("fused"):
        assert_same(step(model.double(), x), step(plain.double(), x), 1e-9)


def test_autocast_within_twice_the_error_of_eager():
    model, x = standins.ConvEncoder(DIM), images(torch.float32)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    vision_ops.accelerate(model)

    def error(m):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        assert y.dtype == torch.float32
        return (y - exact(x.double())).abs().max()

    assert error(model) <= 2 * error(plain)


def test_explains_accelerated_modules():
    model, x = Tokens(standins.XCABlock(DIM)), images()
    assert not vision_ops.explain(model, x).parts
    vision_ops.accelerate(model)
    parts = vision_ops.explain(model, x).parts
    assert {name.split()[0]: runs for name, runs in parts.items()} == {
        "block": "fused_xca, fused_scaled_residual, fused_mlp",
        "block.local_mp": "fused_dwconv",
    }
    model.block.norm2.register_forward_hook(lambda *args: None)
    found = vision_ops.explain(model, x)
    assert found.cannot == ["block.norm2 has hooks"] and "their own forward" in found.parts.values()
    with use_backend("reference"):
        assert "PyTorch" in vision_ops.explain(model, x).parts.values()


def test_report_is_a_table():
    model = nn.Sequential(*(standins.ConvEncoder(DIM) for _ in range(3)), standins.ConvEncoder(DIM, kernel_size=4))
    report = vision_ops.accelerate(model)
    title, head, *rows = str(report).splitlines()
    assert title == "3 of 4 modules run fused" and head.split()[:4] == ["modules", "class", "runs", "left"]
    assert rows[0].split() == ["*", "(3)", "ConvEncoder", "fused_dwconv_layer_norm,", "fused_mlp"]
    assert rows[1].startswith("3 ") and rows[1].endswith("even ones have no kernel")
    assert str(vision_ops.accelerate(standins.ConvEncoder(DIM))).splitlines()[2].startswith("the model  ConvEncoder")


def test_rich_prints_a_table():
    rich = pytest.importorskip("rich.console")
    file = io.StringIO()
    rich.Console(file=file, width=200).print(vision_ops.accelerate(standins.ConvEncoder(DIM)))
    assert "fused_dwconv_layer_norm" in file.getvalue() and "1 of 1 modules run fused" in file.getvalue()


@pytest.mark.parametrize("function", [vision_ops.accelerate, vision_ops.restore])
def test_refuses_what_is_no_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        function(lambda x: x)


def test_compiles():
    model = nn.Sequential(standins.ConvEncoder(DIM), standins.SDTAEncoder(DIM), standins.Block(DIM)).double()
    plain, x = copy.deepcopy(model), images()
    vision_ops.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, x), {k if k in "xy" else f"_orig_mod.{k}": t for k, t in step(plain, x).items()}, 1e-9)
