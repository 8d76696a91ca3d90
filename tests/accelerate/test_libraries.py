"""`accelerate` on the networks of timm and torchvision."""

import copy

import pytest
import torch

import vision_ops
from vision_ops.dispatch import use_backend

SIDE = 64
# The classes of modules that run fused, and how many of each.
SMALL = {
    "edgenext_xx_small": {"ConvBlock": 9, "SplitTransposeBlock": 3, "CrossCovarianceAttn": 3, "LayerNorm2d": 5},
    "xcit_nano_12_p16_224": {"XCABlock": 12, "LPI": 12},
    "convnext_atto": {"ConvNeXtBlock": 12, "LayerNorm2d": 5},
    "convnextv2_atto": {"ConvNeXtBlock": 12, "LayerNorm2d": 5},
    "convnext_atto, linear": {"ConvNeXtBlock": 12, "LayerNorm2d": 5},
    "torchvision": {"CNBlock": 4, "LayerNorm2d": 3},
}
EDGENEXT = {"ConvBlock": 15, "SplitTransposeBlock": 3, "CrossCovarianceAttn": 3, "LayerNorm2d": 5}
LARGE = {
    "edgenext_small": EDGENEXT,
    "edgenext_base": EDGENEXT,
    "xcit_nano_12_p16_224": SMALL["xcit_nano_12_p16_224"],
    "xcit_small_12_p8_224": SMALL["xcit_nano_12_p16_224"],
    "convnext_tiny": {"ConvNeXtBlock": 18, "LayerNorm2d": 5},
    "convnext_nano": {"ConvNeXtBlock": 14, "LayerNorm2d": 5},
    "torchvision convnext_tiny": {"CNBlock": 18, "LayerNorm2d": 5},
}


def make(timm, name):
    """With branches that count: layer scale begins with 1e-6."""
    torch.manual_seed(0)
    if name == "torchvision":
        from torchvision.models import convnext

        settings = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 2)]
        model = convnext.ConvNeXt(settings, stochastic_depth_prob=0.2, num_classes=10)
    elif name.startswith("torchvision"):
        from torchvision.models import convnext

        model = convnext.convnext_tiny()
    else:
        name, linear = name.removesuffix(", linear"), {"conv_mlp": False} if name.endswith("linear") else {}
        model = timm.create_model(name, drop_path_rate=0.2, **linear)
    for key, p in model.named_parameters():
        if "gamma" in key or "layer_scale" in key or "grn" in key:
            torch.nn.init.uniform_(p, 0.2, 0.8)
    return model


def kinds(report):
    found = {}
    for entry in report.entries:
        if entry.ops:
            found[entry.kind] = found.get(entry.kind, 0) + 1
    return found


def step(model, x, dtype):
    model.zero_grad()
    torch.manual_seed(1)
    y = model(x.to(dtype))
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    return [y.detach().double(), *(p.grad.double() for p in model.parameters())]


def error(found, expected):
    """Of each relative to its largest; the gradients of what a norm takes away are zero in the formula."""
    least = 1e-3 * max(t.abs().max().item() for t in expected)
    return max(
        ((f - e).abs().max() / max(e.abs().max().item(), least)).item() for f, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", SMALL)
def test_equal(name, timm):
    model, x = make(timm, name).double(), torch.randn(2, 3, SIDE, SIDE)
    plain = copy.deepcopy(model)
    report = vision_ops.accelerate(model)
    assert kinds(report) == SMALL[name] and not report.left, str(report)
    with use_backend("fused"):
        found = step(model, x, torch.float64)
    assert error(found, step(plain, x, torch.float64)) < 1e-9
    with torch.no_grad():
        assert error([model.eval()(x.double())], [plain.eval()(x.double())]) < 1e-9
        vision_ops.restore(model)
        model.load_state_dict(plain.state_dict())  # the batch norms have seen other roundings
        assert torch.equal(model(x.double()), plain(x.double()))


def test_what_does_not_fit(timm):
    model = timm.create_model("edgenext_xx_small", act_layer=torch.nn.ReLU)
    report = vision_ops.accelerate(model)
    assert kinds(report) == {"CrossCovarianceAttn": 3, "LayerNorm2d": 5}
    assert {reason for reasons in report.left.values() for reason in reasons} == {"mlp.act is a ReLU, not a GELU"}
    report = vision_ops.accelerate(timm.create_model("convnext_atto", norm_layer="rmsnorm2d"))
    assert not report.fused and "norm is a RmsNorm2d, not a LayerNorm" in str(report)
    report = vision_ops.accelerate(timm.create_model("convnext_atto", output_stride=16))
    assert "conv_dw.padding is (6, 6), not (3, 3)" in str(report)
    report = vision_ops.accelerate(timm.create_model("xcit_nano_12_p16_224", proj_drop_rate=0.1))
    assert kinds(report) == {"LPI": 12} and "proj_drop is active" in str(report)
    report = vision_ops.accelerate(timm.create_model("convnextv2_atto"))
    assert "mlp is a GlobalResponseNormMlp" in str(report) and not report.left


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_every_network(name, timm):
    model, x = make(timm, name), torch.randn(2, 3, 96, 96)
    plain = copy.deepcopy(model)
    report = vision_ops.accelerate(model)
    assert kinds(report) == LARGE[name] and not report.left, str(report)
    # The drawn paths are the same for all.
    exact = step(copy.deepcopy(plain).double(), x, torch.float64)
    assert error(step(copy.deepcopy(model).double(), x, torch.float64), exact) < 1e-9
    single = step(plain, x, torch.float32)
    assert error(step(model, x, torch.float32)[:1], single[:1]) < 1e-5
    assert error(step(model, x, torch.float32), exact) < max(1e-5, 2 * error(single, exact))
    half = [step(m.bfloat16(), x, torch.bfloat16) for m in (model, plain)]
    assert error(half[0], exact) < 2 * error(half[1], exact)
    vision_ops.restore(model)
    model.load_state_dict(plain.state_dict())
    found, expected = (step(m, x, torch.bfloat16) for m in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
