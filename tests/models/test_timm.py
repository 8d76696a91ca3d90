"""The networks in timm's tools, and what these read."""

import importlib

import numpy as np
import pytest
import torch
from checkpoints import SMALL, random_state, small

from vision_ops.models import FeatureInfo, create_model, list_models, load_checkpoint, preprocess

each = pytest.mark.parametrize("network", SMALL)


def images(network, in_chans=3):
    side = 84 if network == "S2MLPv2" else 64
    return torch.randn(2, in_chans, side, side)


def maps_of(model, x):
    maps = []
    for i in range(model.num_stages):
        x = model.forward_stage(i, x)
        maps.append(x)
    return maps


@each
def test_forward_and_backward(network):
    model = small(network, in_chans=2)
    y = model(images(network, 2))
    y.mean().backward()
    assert y.shape == (2, 10) and y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.in_chans == 2 and model.head_hidden_size == model.num_features


@each
def test_reset_classifier(network):
    model, x = small(network).eval(), images(network)
    last = model.forward_features(x)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features) and model.num_classes == 0
    model.reset_classifier(0, "")
    assert torch.equal(model(x), last)
    with pytest.raises(ValueError, match='global_pool must be "avg", or "" with num_classes=0'):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match=r"global_pool must be .*, got 'max'"):
        model.reset_classifier(3, "max")
    assert model.num_classes == 3


@each
def test_pretrained_cfg(network, timm):
    model = small(network)
    cfg = model.pretrained_cfg
    assert model.default_cfg is cfg and cfg["architecture"] == SMALL[network][0]
    config = timm.data.resolve_data_config(model=model)
    for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "crop_mode"):
        assert config[key] == cfg[key]
    shape = model.eval().forward_features(torch.zeros(1, *cfg["input_size"])).shape
    assert cfg["pool_size"] == tuple(shape[2:])
    state = model.state_dict()
    assert f"{cfg['classifier']}.weight" in state and state[f"{cfg['first_conv']}.weight"].shape[1] == 3


def test_data_config_of_other_images(timm):
    config = timm.data.resolve_data_config(model=create_model("moat_2", device="meta"))
    assert config["input_size"] == (3, 384, 384) and config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    config = timm.data.resolve_data_config(model=create_model("moganet_tiny", device="meta"))
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.9


# --- maps


@each
def test_feature_info(network, timm):
    model = small(network, features_only=True, out_indices=(1, 0))
    info = model.feature_info
    assert isinstance(info, FeatureInfo) and info.out_indices == (1, 0)
    theirs = timm.models.FeatureInfo([dict(stage) for stage in info.info], (1, 0))
    for idx in (None, 0, -1, [0, 1], (1,)):
        for method in ("channels", "reduction", "module_name", "get_dicts"):
            arguments = {"idx": idx}
            assert getattr(info, method)(**arguments) == getattr(theirs, method)(**arguments)
        assert info.get("index", idx) == theirs.get("index", idx)
        assert info.get_dicts(["module"], idx) == theirs.get_dicts(["module"], idx)
    x = images(network)
    for y, channels, reduction in zip(model(x), info.channels(), info.reduction(), strict=True):
        assert y.shape[1] == channels and y.shape[2] == x.shape[2] // reduction


@each
def test_forward_intermediates(network):
    model, x = small(network).eval(), images(network)
    maps, count = maps_of(model, x), model.num_stages

    def assert_same(found, expected):
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))

    last, found = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert_same(found, maps)
    assert torch.equal(model.forward_head(last), model(x))
    assert_same(model.forward_intermediates(x, 2, intermediates_only=True), maps[-2:])
    assert_same(model.forward_intermediates(x, [-1, 0], intermediates_only=True), [maps[0], maps[-1]])
    last, found = model.forward_intermediates(x, (0,), stop_early=True)
    assert torch.equal(last, maps[0])
    assert_same(found, maps[:1])
    for indices in (0, count + 1, (count,), (), [0.5]):
        with pytest.raises(ValueError, match=rf"indices must be 1 to {count}, or ints from -{count} to {count - 1}"):
            model.forward_intermediates(x, indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_norm_of_the_last_map():
    model, x = small("EdgeNeXt", bn_hs=True).eval(), images("EdgeNeXt")
    with torch.no_grad():
        model.norm.weight.fill_(2)
    last, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(maps[-1], model.norm(last)) and torch.equal(maps[0], maps_of(model, x)[0])
    torch.testing.assert_close(model.head(maps[-1].mean((2, 3))), model(x))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), maps[-1])


@each
def test_prune_intermediate_layers(network):
    whole, model, x = small(network).eval(), small(network).eval(), images(network)
    state = random_state(whole)
    model.load_state_dict(whole.state_dict())
    maps = maps_of(whole, x)
    assert model.prune_intermediate_layers([0]) == [0]
    assert len(model.state_dict()) < len(whole.state_dict())
    assert torch.equal(model(x), maps[0]) and torch.equal(model.forward_intermediates(x)[1][0], maps[0])
    assert model.num_features == model.head_hidden_size == maps[0].shape[1] and model.num_classes == 0
    loaded = load_checkpoint(model, state)
    assert set(loaded.left_out) == state.keys() - model.state_dict().keys()
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)

    count = whole.num_stages
    assert whole.prune_intermediate_layers(1, prune_head=False) == [count - 1]
    assert whole(x).shape == (2, 10)
    assert whole.prune_intermediate_layers(1) == [count - 1] and torch.equal(whole(x), maps[-1])
    with pytest.raises(ValueError, match="features_only=True has only the stages"):
        small(network, features_only=True).prune_intermediate_layers()


@each
def test_timms_feature_extractor(network, timm):
    model, x = small(network).eval(), images(network)
    maps = maps_of(model, x)
    extractor = timm.models._features.FeatureGetterNet(model, out_indices=(0, 1))
    assert all(map(torch.equal, extractor(x), maps[:2])) and model.num_stages == 2
    assert extractor.feature_info.channels() == [y.shape[1] for y in maps[:2]]


# --- groups of parameters


@each
def test_layer_decay(network, timm):
    model = small(network)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert of[f"{model.classifier}.weight"] == 1
    assert of[f"{model.first_conv}.weight"] == min(of.values())
    blocks = sum(len(blocks) for blocks in blocks_of(model))
    assert sorted(set(of.values())) == [0.5**i for i in reversed(range(blocks + 2))]  # the stem, each block, the head
    depth = 1
    for stage in blocks_of(model):
        for block in stage:
            assert {scales[id(p)] for p in block.parameters()} == {0.5 ** (blocks + 1 - depth)}
            depth += 1
    exempt = model.no_weight_decay()
    assert all(decays[id(p)] == 0 for name, p in model.named_parameters() if name in exempt)


def blocks_of(model):
    """The blocks of each stage."""
    for i in range(model.num_stages):
        names = model.stage_modules(i)
        stage = model.get_submodule(next((name for name in names if "blocks" in name or "stages" in name), names[0]))
        yield stage[1].model if type(model).__name__ == "S2MLPv2" else stage


@each
def test_groups_by_stage(network, timm):
    model = small(network)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(groups) == model.num_stages + 2  # the stem and the head
    for i in range(model.num_stages):
        keys = [key for name in model.stage_modules(i) for key, _ in model.named_parameters() if key.startswith(name)]
        assert set(groups[i + 1]) <= set(keys)
    assert {key for key in groups[model.num_stages + 1] if key.startswith(model.classifier)}


# --- timm's own registry


@pytest.fixture
def registered(timm):
    importlib.import_module("vision_ops.timm")
    return timm


def test_registered_names(registered):
    """All but EdgeNeXt, which is timm's own."""
    module = importlib.import_module("vision_ops.timm")
    names = [name for name in list_models() if not name.startswith("edgenext")]
    assert sorted(module.__all__) == sorted(names) and set(names) <= set(registered.list_models())
    assert registered.models.model_entrypoint("edgenext_small").__module__ == "timm.models.edgenext"
    loadable = {name for name in list_models(pretrained=True) if not name.startswith("edgenext")}
    assert set(registered.list_models(pretrained=True)) & set(names) == loadable
    cfg = registered.models.get_pretrained_cfg("moat_2")
    assert cfg.input_size == (3, 384, 384) and cfg.mean == (0.5, 0.5, 0.5) and cfg.pool_size == (12, 12)


@pytest.mark.parametrize("network", sorted(SMALL.keys() - {"EdgeNeXt"}))
def test_create_model_of_timm(network, registered):
    name, overrides = SMALL[network]
    x = images(network)
    scripts = {"drop_rate": 0.0, "drop_path_rate": 0.1, "drop_block_rate": None, "bn_eps": None, "scriptable": False}
    model = registered.create_model(name, pretrained=False, num_classes=7, in_chans=3, **scripts, **overrides)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model = registered.create_model(name, features_only=True, num_classes=10, out_indices=2, **overrides).eval()
    assert [y.shape[1] for y in model(x)] == model.feature_info.channels()
    assert model.feature_info.out_indices == tuple(range(len(model.feature_info.info)))[-2:]
    model = registered.create_model(name, num_classes=0, global_pool="", **overrides)
    assert model(x).shape[2:] == model.forward_features(x).shape[2:]


def test_what_scripts_hand_over(registered, tmp_path):
    """timm's scripts resolve the configuration first, and its users name the files of weights in it."""
    name, overrides = SMALL["HorNet"]
    arguments = registered.models.resolve_model_input_args(name, {"img_size": 160}, num_classes=10, **overrides)
    model = registered.create_model(**arguments)
    assert registered.data.resolve_data_config({"img_size": 160}, model=model)["input_size"] == (3, 160, 160)
    state = random_state(small("HorNet"))
    torch.save(state, tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth"), "crop_pct": 0.95}
    for classes in (10, 4):
        model = registered.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **overrides
        )
        assert torch.equal(model.norm.weight, state["norm.weight"]) and model.head.out_features == classes
        assert torch.equal(model.head.weight, state["head.weight"]) == (classes == 10)
        assert registered.data.resolve_data_config(model=model)["crop_pct"] == 0.95
    model = registered.create_model(name, checkpoint_path=str(tmp_path / "own.pth"), num_classes=10, **overrides)
    assert torch.equal(model.head.weight, state["head.weight"])
    with pytest.raises(TypeError, match="drop_rate"):
        registered.create_model(name, drop_rate=0.2, **overrides)
    assert registered.create_model("moganet_xtiny", drop_rate=0.2, **SMALL["MogaNet"][1]).blocks1[0].mlp.drop.p == 0.2


# --- pictures


@pytest.mark.parametrize("size", [(300, 400), (401, 280), (256, 256)], ids=str)
@pytest.mark.parametrize("name", ["moganet_tiny", "moat_2", "edgenext_small"])
def test_preprocess(name, size, timm):
    image_of = pytest.importorskip("PIL.Image")
    model = create_model(name, device="meta")
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    ours = preprocess(model)
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)
    pixels[: size[0] // 2] //= 4  # an edge, at which bicubic goes beyond both ends
    picture = image_of.fromarray(pixels)
    side = model.pretrained_cfg["input_size"][1]
    expected = theirs(picture)[None]
    assert ours(picture).shape == (1, 3, side, side) and torch.equal(ours(picture), expected)
    grey = picture.convert("L")
    assert torch.equal(ours([picture, grey]), torch.cat([expected, theirs(grey.convert("RGB"))[None]]))

    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    resize, crop = theirs.transforms[:2]
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    expected = (crop(resize(tensor)) / 255 - mean) / std
    torch.testing.assert_close(ours(tensor)[0], expected)
    torch.testing.assert_close(ours(torch.stack([tensor, tensor])), torch.stack([expected, expected]))


def test_an_image_without_pixels():
    empty = pytest.importorskip("PIL.Image").new("RGB", (0, 5))
    with pytest.raises(ValueError, match="a picture must not be empty, got 0 x 5"):
        preprocess(create_model("hornet_tiny_7x7", device="meta"))(empty)


def test_pictures_that_are_none():
    ours = preprocess(create_model("hornet_tiny_7x7", device="meta"))
    for picture in (torch.rand(3, 9, 9), torch.zeros(9, 9, 3, dtype=torch.uint8), torch.zeros(3, 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"a tensor of pictures must be uint8, \(3, H, W\) or \(N, 3, H, W\), got"):
            ours(picture)
    for empty in ([], torch.zeros(0, 3, 9, 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="must not be empty"):
            ours(empty)
    with pytest.raises(TypeError, match="a picture must be a PIL image or a uint8 tensor, got str"):
        ours("cat.jpg")
    with pytest.raises(ValueError, match="model must take pictures of 3 channels"):
        preprocess(small("HorNet", in_chans=1))
    with pytest.raises(ValueError, match="model must take square pictures, got one for 64 x 32"):
        preprocess(small("MOATArticle", img_size=(64, 32)))
    with pytest.raises(ValueError, match="model must be made by create_model"):
        preprocess(type(small("HorNet"))((1, 1, 1, 1), 16))
