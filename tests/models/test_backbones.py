import copy
import io

import pytest
import torch
from torch import nn

from vision_ops import dispatch, models, use_backend
from vision_ops.models import create_model, list_models
from vision_ops.nn._blocks import DropPath

MILLIONS = {  # of parameters: as published, to the digits given
    "moganet_xtiny": 2.956, "moganet_tiny": 5.197, "moganet_small": 25.336, "moganet_base": 43.720,
    "moganet_large": 82.481, "moganet_xlarge": 180.99,
    "hornet_tiny_7x7": 22.41, "hornet_tiny_gf": 22.99, "hornet_small_7x7": 49.53, "hornet_small_gf": 50.40,
    "hornet_base_7x7": 87.26, "hornet_base_gf": 88.42, "hornet_base_gf_img384": 92.10,
    "hornet_large_7x7": 194.5, "hornet_large_gf": 196.3, "hornet_large_gf_img384": 201.8,
    "edgenext_xx_small": 1.327, "edgenext_x_small": 2.337, "edgenext_small": 5.587, "edgenext_base": 18.511,
    "edgenext_xx_small_bn_hs": 1.326, "edgenext_x_small_bn_hs": 2.335, "edgenext_small_bn_hs": 5.584,
    "s2mlpv2_small_7": 25.11, "s2mlpv2_medium_7": 55.27,
    "tiny_moat_0": 3.355, "tiny_moat_1": 5.123, "tiny_moat_2": 9.773, "tiny_moat_3": 19.53,
    "moat_0": 27.85, "moat_1": 41.60, "moat_2": 73.42, "moat_3": 190.0, "moat_4": 483.2,
    # The article's MOAT: moat_0 and tiny_moat_0 as measured there, the others by counting what it describes.
    "tiny_moat_0_article": 3.089636, "tiny_moat_1_article": 4.726, "tiny_moat_2_article": 9.038,
    "tiny_moat_3_article": 18.06, "moat_0_article": 25.81, "moat_1_article": 40.12, "moat_2_article": 70.93,
    "moat_3_article": 189.5, "moat_4_article": 482.9,
}  # fmt: skip

# One of each kind, cut short.
SHORT = {
    "moganet_xtiny": {"depths": (1, 1, 1, 1)},
    "hornet_tiny_7x7": {"depths": (1, 1, 1, 1), "base_dim": 32},
    "hornet_tiny_gf": {"depths": (1, 1, 1, 1), "base_dim": 32},
    "edgenext_xx_small": {"depths": (1, 2, 2, 2)},
    "edgenext_xx_small_bn_hs": {"depths": (1, 2, 2, 2)},
    "s2mlpv2_small_7": {"depth": (1, 1), "d_model": (24, 48)},
    "tiny_moat_0": {"depths": (1, 1, 1, 1)},
    "tiny_moat_0_article": {"depths": (1, 1, 1, 1), "img_size": 64, "window_size": 2},
}
each = pytest.mark.parametrize("name", SHORT)
# For what takes long: hornet_tiny_gf has the blocks of hornet_tiny_7x7, _bn_hs differs in norms and activations, and
# test_moat_article.py has a shorter test.
MARKS = dict.fromkeys(("hornet_tiny_7x7", "edgenext_xx_small_bn_hs", "tiny_moat_0_article"), pytest.mark.slow)
one_of_each = pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in SHORT])


def short(name, **options):
    """A network with layer scales and tables that show: the official first values hide the blocks."""
    model = create_model(name, **{"num_classes": 10, **SHORT[name], **options})
    for key, parameter in model.named_parameters():
        if key.rpartition(".")[2] in (
            "gamma",
            "gamma1",
            "gamma2",
            "gamma_xca",
            "layer_scale_1",
            "layer_scale_2",
            "scale",
        ):
            nn.init.uniform_(parameter, 0.1, 0.5)
    return model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def images(name, batch=2, large=False):
    if name.startswith("s2"):
        return torch.randn(batch, 3, 42, 84 if large else 42)
    if name.endswith("article"):  # multiples of 64, with several windows at stride 32
        return torch.randn(batch, 3, 128, 192 if large else 128)
    return torch.randn(batch, 3, 64, 96 if large else 64)


def test_every_variant_is_counted():
    assert set(MILLIONS) == set(list_models()) and set(SHORT) < set(MILLIONS)


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters(name):
    with torch.device("meta"):
        model = create_model(name)
    found, published = sum(p.numel() for p in model.parameters()) / 1e6, str(MILLIONS[name])
    digits = len(published.partition(".")[2])
    assert round(found, digits) == MILLIONS[name]


def test_s2mlpv2_of_the_article():
    with torch.device("meta"):
        model = create_model("s2mlpv2_small_7", reduction=1)
    assert sum(p.numel() for p in model.parameters()) == 31_748_200


def test_list_models():
    assert list_models("hornet_tiny*") == ["hornet_tiny_7x7", "hornet_tiny_gf"] and list_models("resnet*") == []


@each
def test_heads(name):
    model, x = short(name).eval(), images(name)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[:2] == pooled.shape == (2, model.num_features)
    assert torch.equal(model(x), model.forward_head(features)) and model(x).shape == (2, 10)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and model.num_classes == 5
    assert model.get_classifier() is model.get_submodule(model.default_cfg["classifier"])
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    headless = short(name, num_classes=0).eval()
    headless.load_state_dict(
        {key: t for key, t in short(name).state_dict().items() if not key.startswith(model.unbuilt)}
    )
    assert headless(x).shape == pooled.shape


@each
def test_features(name):
    whole = short(name).eval()
    x, maps = images(name, large=True), []
    y = x
    for i in range(len(whole.feature_info)):
        y = whole.forward_stage(i, y)
        maps.append(y)
    model = short(name, features_only=True, out_indices=(1, -2)).eval()
    wanted = {key: t for key, t in whole.state_dict().items() if not key.startswith(model.unbuilt)}
    model.load_state_dict(wanted)
    assert len(wanted) < len(whole.state_dict())
    found = model(x)
    for y, i, info in zip(found, (1, len(maps) - 2), model.feature_info, strict=True):
        assert torch.equal(y, maps[i])
        assert y.shape[1] == info["num_chs"]
        assert [n // info["reduction"] for n in x.shape[2:]] == list(y.shape[2:])
    assert model.feature_info.channels() == [info["num_chs"] for info in model.feature_info]
    assert model.feature_info.module_name() == [model.feature_info[0]["module"], model.feature_info[1]["module"]]
    for name_of_map in model.feature_info.module_name():
        model.get_submodule(name_of_map)


def test_in_chans_and_default_cfg():
    model = short("moganet_xtiny", in_chans=5).eval()
    assert model(torch.randn(1, 5, 32, 32)).shape == (1, 10)
    cfg = create_model("moat_2", depths=(1, 1, 1, 1), stem=8, dims=(8, 8, 32, 32)).default_cfg
    assert cfg["input_size"] == (3, 384, 384) and cfg["mean"] == (0.5, 0.5, 0.5)
    assert cfg["drop_path_rate"] == pytest.approx(0.3)
    assert cfg["url"].endswith("moat2_imagenet_22k_and_1k_384_w_position_embedding.tar.gz")
    for name in SHORT:
        cfg = short(name).default_cfg
        assert short(name).get_submodule(cfg["first_conv"]).in_channels == 3


@each
def test_drop_path(name):
    def rates(model):
        return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]

    assert max(rates(short(name))) == 0  # None is 0, whatever the recipe had
    found = rates(short(name, drop_path_rate=0.5))
    assert found == sorted(found) and found[0] == 0 and (found[-1] == 0.5 or "moat" in name)
    model, x = short(name, drop_path_rate=0.5), images(name, batch=16)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_drop_path_keeps_the_mean():
    x = torch.ones(4000, 2)
    y = DropPath(0.25)(x)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert torch.equal(y[:, 0], y[:, 1]) and y.mean().item() == pytest.approx(1, abs=0.05)


@each
def test_checkpointing_gives_the_same_gradients(name):
    model, x = short(name).double(), images(name).double()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for network in (model, twin):
        network(x).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize(("forward", "backward"), [("reference", "auto"), ("auto", "reference")])
def test_checkpointing_keeps_the_backend_of_the_forward_pass(forward, backward):
    model, x, found = short("edgenext_xx_small"), images("edgenext_xx_small"), []
    for checkpointing, later in ((False, forward), (True, backward)):
        model.set_grad_checkpointing(checkpointing)
        with use_backend(forward):
            loss = model(x).square().sum()
        with use_backend(later):
            found.append(torch.autograd.grad(loss, list(model.parameters())))
            assert dispatch.resolve_backend(None) == later
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_no_weight_decay():
    assert short("moganet_xtiny").no_weight_decay() == set()
    assert all(name.endswith("xca.temperature") for name in short("edgenext_xx_small").no_weight_decay())
    assert len(short("edgenext_xx_small").no_weight_decay()) == 3
    assert len(short("tiny_moat_0").no_weight_decay()) == len(short("tiny_moat_0_article").no_weight_decay()) == 2


def test_weights_are_initialised_officially():
    mogablock = create_model("moganet_xtiny", depths=(1, 1, 1, 1)).blocks1[0]
    assert mogablock.layer_scale_1.unique().item() == mogablock.attn.sigma.scale.unique().item() == pytest.approx(1e-5)
    conv = mogablock.mlp.dwconv
    assert conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1) and not conv.bias.any()
    head = create_model("hornet_tiny_7x7", depths=(1, 1, 1, 1), head_init_scale=0.001).head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    moat = create_model("tiny_moat_0", depths=(1, 1, 1, 1))
    assert moat.blocks[2][0].attention.q.weight.std().item() == pytest.approx(0.02, rel=0.05)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(name, dtype):
    """Weights and images of a half type, and autocast, stay near float64."""
    model, x = short(name), images(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(x)  # with fresh statistics the gates of MogaNet, which are quadratic, leave the range of float16
    model.eval()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", dtype):
        autocast = model(x)
    half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    for y in (autocast, half):
        assert (y.double() - exact).abs().max() <= 30 * torch.finfo(dtype).eps * exact.std()


@each
def test_channels_last(name):
    model, x = short(name).double().eval(), images(name).double()
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)


@each
def test_training_in_autocast(name):
    model, x = short(name), images(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@one_of_each
def test_compiles_whole(name):
    """One graph, which also serves another size."""
    model = short(name).double().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for x in (images(name).double(), images(name, large=True).double()):
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
@each
def test_compiles_with_gradients(name):
    model = short(name).double()
    twin = copy.deepcopy(model)
    # With its decompositions: the strides of PyTorch's own batch norm backward are not what its fake one says.
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager_decomp_partition")
    for x in (images(name).double(), images(name, large=True).double()):
        expected, found = model(x), compiled(x)
        torch.testing.assert_close(found, expected)
        expected.square().sum().backward()
        found.square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.slow
@each
def test_compiles_with_inductor(name):
    model, x = short(name).eval(), images(name)
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@one_of_each
def test_exports_with_dynamic_shapes(name):
    model, x = short(name).eval(), images(name)
    side = torch.export.Dim.DYNAMIC
    multiples_of = {"s2mlpv2_small_7": 14, "tiny_moat_0_article": 64}
    if name in multiples_of:
        side = multiples_of[name] * torch.export.Dim("patches", min=1, max=64)
        shapes = {0: torch.export.Dim("batch"), 3: side}
    else:
        shapes = {0: torch.export.Dim.DYNAMIC, 2: side, 3: side}
    exported = torch.export.export(model, (x,), dynamic_shapes=(shapes,)).module()
    for y in (x, images(name, batch=3, large=True)):
        # Graphs do not fold norms into weights.
        torch.testing.assert_close(exported(y), model(y), rtol=1e-4, atol=1e-4)


@one_of_each
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_exports_to_onnx_with_dynamic_shapes(name):
    runtime = pytest.importorskip("onnxruntime")
    model, x, buffer = short(name).eval(), images(name), io.BytesIO()
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        model, (x,), buffer, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"], dynamic_axes=axes
    )
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    for y in (x, images(name, batch=3, large=True)):
        expected = model(y)
        found = torch.from_numpy(session.run(None, {"x": y.numpy()})[0])
        assert (found - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.slow
@each
@pytest.mark.filterwarnings("ignore")
def test_exports_to_onnx_through_dynamo(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = short(name).eval(), images(name)
    program = torch.onnx.export(model, (x,), dynamo=True, opset_version=20)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    expected = model(x)
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


@one_of_each
def test_unfused_runs_no_op_of_ours(name):
    graph = torch.export.export(short(name, fused=False).eval(), (images(name),)).graph
    assert not any("vision_ops" in str(node.target) for node in graph.nodes)
    graph = torch.export.export(short(name).eval(), (images(name),)).graph
    assert any("vision_ops" in str(node.target) for node in graph.nodes) or name.startswith("s2")


def test_unfused_norms_run_no_op_of_ours():
    model = short("moganet_xtiny", conv_norm_type="LN2d", stem_norm_type="LN2d", fused=False).eval()
    graph = torch.export.export(model, (images("moganet_xtiny"),)).graph
    assert not any("vision_ops" in str(node.target) for node in graph.nodes)


@each
def test_meta_device(name):
    with torch.device("meta"):
        assert short(name).eval()(images(name)).shape == (2, 10)


def test_sizes():
    moganet = short("moganet_xtiny").eval()
    assert moganet(torch.randn(1, 3, 1, 1)).shape == moganet(torch.randn(1, 3, 37, 50)).shape == (1, 10)
    assert short("tiny_moat_0").eval()(torch.randn(1, 3, 37, 51)).shape == (1, 10)
    for name in ("hornet_tiny_7x7", "edgenext_xx_small"):
        model, x = short(name).eval(), torch.randn(1, 3, 32, 32)
        remainder = torch.nn.functional.pad(x, (0, 3, 0, 1))
        assert torch.equal(model(remainder), model(x))  # strides of their own size drop what is left over
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 3, 31, 31))
    with pytest.raises(ValueError, match=r"height and width of x must be multiples of 14, got \(30, 28\)"):
        short("s2mlpv2_small_7")(torch.randn(1, 3, 30, 28))


def test_moat_windows():
    whole = short("tiny_moat_0").eval()
    windows = short("tiny_moat_0", window_size=(None, None, (4, 4), (2, 3))).eval()
    windows.load_state_dict(whole.state_dict())
    x = torch.randn(1, 3, 64, 64)  # 4 x 4 at stride 16: one window; 2 x 2 at stride 32: one padded window
    windows.blocks[3][0].window_size = (2, 2)
    torch.testing.assert_close(windows(x), whole(x))
    assert not torch.allclose(windows(torch.randn(1, 3, 128, 96)), whole(torch.randn(1, 3, 128, 96)))
    without = short("tiny_moat_0", position_embedding=False)
    assert not any("relative" in key for key in without.state_dict()) and without(x).shape == (1, 10)


def test_refusals():
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'resnet50'"):
        create_model("resnet50")
    with pytest.raises(TypeError, match="unknown_option"):
        create_model("moganet_xtiny", unknown_option=1)
    with pytest.raises(ValueError, match=r"out_indices must be ints from -4 to 3, got \(4,\)"):
        create_model("moganet_xtiny", features_only=True, out_indices=(4,))
    with pytest.raises(ValueError, match="out_indices needs features_only=True"):
        create_model("moganet_xtiny", out_indices=(1,))
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        create_model("moganet_xtiny", num_classes=-1)
    with pytest.raises(ValueError, match=r"drop_path_rate must be at least 0 and below 1, got 1\.0"):
        create_model("moganet_xtiny", drop_path_rate=1.0)
    with pytest.raises(ValueError, match="out_indices must be a sequence of ints, got 2"):
        create_model("moganet_xtiny", features_only=True, out_indices=2)
    with pytest.raises(ValueError, match="num_classes must be 0: a network with features_only=True has no classifier"):
        short("moganet_xtiny", features_only=True).reset_classifier(5)
    with pytest.raises(ValueError, match="in_chans must be at least 1, got 0"):
        create_model("moganet_xtiny", in_chans=0)
    with pytest.raises(ValueError, match="heads must have 4 values, one per stage, got 2"):
        create_model("edgenext_xx_small", heads=(4, 4))
    with pytest.raises(ValueError, match="global_block must be from 0 to the depths"):
        create_model("edgenext_xx_small", global_block=(0, 9, 1, 1))
    with pytest.raises(ValueError, match="orders must have 4 values"):
        create_model("hornet_tiny_7x7", orders=(2, 3))
    with pytest.raises(ValueError, match="depth must have 2 values"):
        create_model("s2mlpv2_small_7", depth=(1, 1, 1))
    with pytest.raises(ValueError, match="window_size must be"):
        create_model("tiny_moat_0", window_size=((7, 7), None, None, None))


def test_networks_are_backbones():
    kinds = models.EdgeNeXt, models.HorNet, models.MOAT, models.MOATArticle, models.MogaNet, models.S2MLPv2
    assert {type(short(name)) for name in SHORT} == set(kinds)
    assert all(issubclass(kind, models.Backbone) for kind in kinds)
