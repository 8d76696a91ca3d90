"""What is around the weights and what is not wanted of them: wrappers, classifiers, detectors, sizes, meta tensors."""

import pytest
import torch
from checkpoints import (
    SMALL,
    assert_holds,
    images,
    mmpretrain_hornet,
    openmixup_moganet,
    random_state,
    small,
    untouched,
)
from torch import nn
from torch.nn.functional import interpolate
from torch.optim.swa_utils import AveragedModel

from vision_ops.models import load_checkpoint

# --- wrappers, averages, prefixes


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("plain", ["state_dict", "model", "module"])
def test_wrappers(plain, average, ema):
    model = small("EdgeNeXt")
    raw, averaged = random_state(model), random_state(model)
    checkpoint = {"epoch": 3, "optimizer": {"state": {}}, plain: raw, average: averaged}
    loaded = load_checkpoint(model, checkpoint, ema=ema)
    assert_holds(model, averaged if ema else raw)
    assert loaded.ema == ema and loaded.wrapper == (average if ema else plain)


def test_only_averages():
    model = small("EdgeNeXt")
    checkpoint = {"model_ema": random_state(model)}
    with untouched(model), pytest.raises(ValueError, match="only averages of the weights, 'model_ema'; ema=True"):
        load_checkpoint(model, checkpoint, ema=False)
    assert load_checkpoint(model, checkpoint).ema


PREFIXES = [
    "module.",
    "backbone.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.backbone._fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("network", ["EdgeNeXt", "MOAT"])
def test_prefixes(network, prefix):
    model = small(network)
    state = random_state(model)
    loaded = load_checkpoint(model, {"state_dict": {prefix + key: value for key, value in state.items()}})
    assert_holds(model, state)
    assert loaded.layout == "official" and not loaded.left_out


def test_wrappers_within_the_network():
    """Blocks that were compiled one by one, in the checkpoint or in the model."""
    compiled, plain = small("EdgeNeXt"), small("EdgeNeXt")
    compiled.stages[1] = torch.compile(compiled.stages[1])
    state = random_state(plain)
    load_checkpoint(compiled, state)
    found = compiled.state_dict()
    assert "stages.1._orig_mod.0.dwconv.weight" in found
    load_checkpoint(plain, found)
    assert_holds(plain, state)


@pytest.mark.parametrize("outer", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "model_ema"])
def test_averaged_model(wrapper, outer):
    trained, model = small("HorNet"), small("HorNet")
    trained.load_state_dict(random_state(trained))
    averaged = {outer + key: value for key, value in AveragedModel(trained).state_dict().items()}
    checkpoint = averaged if wrapper is None else {"model": model.state_dict(), wrapper: averaged}
    loaded = load_checkpoint(model, checkpoint)
    assert_holds(model, trained.state_dict())
    assert loaded.ema and loaded.left_out == (f"{outer}n_averaged",)
    if wrapper is None:
        with untouched(model), pytest.raises(ValueError, match="only averages of the weights, by AveragedModel"):
            load_checkpoint(model, checkpoint, ema=False)


@pytest.mark.parametrize("ema", [True, False])
def test_averages_of_openmixup_in_a_wrapper(ema):
    model = small("MogaNet")
    state, raw = random_state(model), random_state(model)
    stored = {f"_orig_mod.{openmixup_moganet(key)}": value for key, value in state.items()}
    names = {key: f"_orig_mod.ema_{openmixup_moganet(key).replace('.', '_')}" for key, _ in model.named_parameters()}
    loaded = load_checkpoint(model, {"state_dict": stored | {name: raw[key] for key, name in names.items()}}, ema=ema)
    assert_holds(model, state if ema else {**state, **{key: raw[key] for key in names}})
    assert loaded.ema is ema and loaded.layout == "openmixup"


# --- networks that are the backbone of something


AROUND = {
    "neck.lateral_convs.0.conv.weight": torch.ones(8, 16, 1, 1),
    "bbox_head.cls_convs.0.depthwise_conv.conv.weight": torch.ones(8, 1, 3, 3),  # looks like mmpretrain's EdgeNeXt
    "head.final_layer.weight": torch.ones(17, 8, 1, 1),
    "norm.weight": torch.ones(3),
}


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("outer", ["", "module."])
def test_backbone_of_a_detector(network, outer):
    model = small(network, features_only=True, out_indices=(0, 1))
    state = random_state(small(network, features_only=True))
    stored = {f"{outer}backbone.{key}": value for key, value in state.items()}
    around = {outer + key: value for key, value in AROUND.items()}
    loaded = load_checkpoint(model, {"meta": {"epoch": 12}, "state_dict": {**around, **stored}})
    own = model.state_dict().keys()
    assert_holds(model, {key: state[key] for key in own})
    assert set(loaded.left_out) == around.keys() | {f"{outer}backbone.{key}" for key in state if key not in own}
    assert loaded.layout == "official"
    del stored[f"{outer}backbone.{min(own)}"]
    with untouched(model), pytest.raises(ValueError, match=f"1 missing of .*: {min(own)}"):
        load_checkpoint(model, {**around, **stored})


@pytest.mark.parametrize("rename", [lambda key: f"backbone.{key}", mmpretrain_hornet], ids=["official", "mmpretrain"])
def test_norms_that_detectors_add_to_the_maps(rename):
    model = small("HorNet", features_only=True)
    state = random_state(model)
    stored = {rename(key): value for key, value in state.items()}
    norms = {f"backbone.norm{i}.{leaf}": torch.ones(16 * 2**i) for i in range(4) for leaf in ("weight", "bias")}
    loaded = load_checkpoint(model, {"state_dict": stored | norms | AROUND})
    assert_holds(model, state)
    assert set(loaded.left_out) == norms.keys() | AROUND.keys()


def test_detector_for_a_classifier():
    model = small("MogaNet")
    state = random_state(small("MogaNet", num_classes=0))
    detector = {f"backbone.{key}": value for key, value in state.items()} | AROUND
    with (
        untouched(model),
        pytest.raises(ValueError, match=r'4 unexpected(.|\n)*classifier="keep" leaves the classifier'),
    ):
        load_checkpoint(model, detector)
    loaded = load_checkpoint(model, detector, classifier="keep")
    assert_holds(model, {**state, "head.weight": model.head.weight, "head.bias": model.head.bias})
    assert set(loaded.left_out) == AROUND.keys() and loaded.kept == ("head.weight", "head.bias")


def test_openmixup_is_known_without_a_classifier():
    """By the head that is left out: its gates are others."""
    model = small("MogaNet", num_classes=0)
    state = {openmixup_moganet(key): value for key, value in random_state(small("MogaNet")).items()}
    loaded = load_checkpoint(model, {"state_dict": {**state, "neck.weight": torch.ones(2)}})
    assert loaded.layout == "openmixup" and loaded.double_gate_act is True
    assert set(loaded.left_out) == {"head.fc.weight", "head.fc.bias", "neck.weight"}


# --- sizes, classifiers, parts


@pytest.mark.parametrize("rename", [lambda key: key, mmpretrain_hornet], ids=["official", "mmpretrain"])
def test_global_filters_are_resized(rename):
    model = small("HorNet")
    state = random_state(model)
    filters = {key: value for key, value in state.items() if key.endswith("complex_weight")}
    larger = {key: torch.rand(len(w), *((24, 13) if w.shape[1] == 14 else (12, 7)), 2) for key, w in filters.items()}
    loaded = load_checkpoint(model, {"model": {rename(key): value for key, value in (state | larger).items()}})
    assert len(filters) == 2 and set(loaded.resized) == filters.keys()
    for key, w in larger.items():
        c, h, w_half, _ = filters[key].shape
        for part in range(2):  # the real and the imaginary plane
            found = model.state_dict()[key][..., part]
            plane = interpolate(w[None, ..., part], (h, w_half), mode="bilinear", align_corners=True)[0]
            torch.testing.assert_close(found, plane, rtol=0, atol=1e-6)
            for i, j in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
                torch.testing.assert_close(found[:, i, j], w[:, i, j, part])


@pytest.mark.parametrize("network", SMALL)
def test_classifier(network):
    model = small(network)
    state = random_state(small(network, num_classes=21))
    head = [key for key in state if key.startswith(model.default_cfg["classifier"])]
    problem = rf"{head[0]} is \(21, .* must be \(10, .*\n.*\"resize\" takes the checkpoint's 21 classes"
    with untouched(model), pytest.raises(ValueError, match=problem):
        load_checkpoint(model, state)

    own = {key: model.state_dict()[key].clone() for key in head}
    loaded = load_checkpoint(model, state, classifier="keep")
    assert_holds(model, {**state, **own})
    assert list(loaded.left_out) == list(loaded.kept) == head

    loaded = load_checkpoint(model, state, classifier="resize")
    assert_holds(model, state)
    assert list(loaded.resized) == head and model.num_classes == 21
    with pytest.raises(ValueError, match="classifier must be one of strict, resize, keep, got 'drop'"):
        load_checkpoint(model, state, classifier="drop")


@pytest.mark.parametrize("network", SMALL)
def test_own_classifier(network):
    model, trained = small(network).eval(), small(network)
    parent, _, leaf = model.classifier.rpartition(".")
    own = nn.Sequential(nn.Dropout(0.2), nn.Linear(model.num_features, 3)).eval()
    setattr(model.get_submodule(parent), leaf, own)
    x = images(model)
    with torch.no_grad():
        expected = own(model.forward_head(model.forward_features(x), pre_logits=True))
        assert torch.equal(model(x), expected) and expected.shape == (2, 3)
    kept = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(f"{model.classifier}.")}
    state = random_state(trained)
    for classifier in ("strict", "resize"):
        with (
            untouched(model),
            pytest.raises(ValueError, match=r"2 missing(.|\n)*2 unexpected(.|\n)*\"keep\" leaves the"),
        ):
            load_checkpoint(model, state, classifier=classifier)
    loaded = load_checkpoint(model, state, classifier="keep")
    of_head = {key for key in state if key.startswith(f"{model.classifier}.")}
    assert_holds(model, {key: value for key, value in state.items() if key not in of_head} | kept)
    assert set(loaded.kept) == kept.keys() and set(loaded.left_out) == of_head

    saved = random_state(model)  # a checkpoint of this very model has its classifier, too
    load_checkpoint(model, saved)
    assert_holds(model, saved)


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("in_chans", [1, 2, 7])
def test_other_channels_than_three(network, in_chans):
    model = small(network, in_chans=in_chans)
    state = random_state(small(network))
    key = f"{model.first_conv}.weight"
    loaded = load_checkpoint(model, state)
    assert loaded.resized == (key,) and not loaded.kept
    w = state[key]
    found = model.state_dict()[key]
    if in_chans == 1:
        expected = w[:, :1] + w[:, 1:2] + w[:, 2:]
    else:
        expected = torch.cat([w, w, w], dim=1)[:, :in_chans] * 3 / in_chans
    torch.testing.assert_close(found, expected)
    assert_holds(model, {**state, key: found})


def test_other_channels_than_the_checkpoints():
    model = small("MOAT", in_chans=1)
    problem = r"conv_0.weight is \(8, 4, 3, 3\), must be \(8, 1, 3, 3\) \(a model with in_chans=4 takes it; only"
    with untouched(model), pytest.raises(ValueError, match=problem):
        load_checkpoint(model, random_state(small("MOAT", in_chans=4)))


def test_resized_classifier_has_the_dtype_of_the_model():
    model = small("EdgeNeXt").bfloat16()
    load_checkpoint(model, random_state(small("EdgeNeXt", num_classes=21)), classifier="resize")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("classifier", ["strict", "resize", "keep"])
@pytest.mark.parametrize("parts", [{"num_classes": 0}, {"features_only": True, "out_indices": (1,)}], ids=str)
@pytest.mark.parametrize("network", SMALL)
def test_parts_the_model_has_not(network, parts, classifier):
    model = small(network, **parts)
    state = random_state(small(network))
    loaded = load_checkpoint(model, state, classifier=classifier)
    assert_holds(model, {key: state[key] for key in model.state_dict()})
    assert set(loaded.left_out) == state.keys() - model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_values_take_the_dtype_of_the_model(dtype):
    model = small("EdgeNeXt").to(dtype)
    state = random_state(small("EdgeNeXt"))
    load_checkpoint(model, state)
    assert_holds(model, {key: value.to(dtype) for key, value in state.items()})


# --- models without memory


@pytest.mark.parametrize("network", SMALL)
def test_meta_model_gets_real_weights(network):
    with torch.device("meta"):
        model = small(network, in_chans=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("dwconv" not in name)
    state = small(network, num_classes=21, in_chans=1).state_dict()
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    loaded = load_checkpoint(model, {k: v for k, v in state.items() if k not in counters}, classifier="resize")
    assert_holds(model, {key: torch.tensor(0) if key in counters else value for key, value in state.items()})
    assert set(loaded.kept) == counters and model.num_classes == 21
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad == ("dwconv" not in name)
        assert parameter.data_ptr() != state[name].data_ptr()
    assert model.eval()(images(model, 1, 1)).shape == (1, 21)


def test_partly_meta_model_keeps_its_other_parameters():
    model = small("EdgeNeXt").bfloat16()
    model.stages[2].to("meta")
    before, state = dict(model.named_parameters()), random_state(model)
    load_checkpoint(model, state)
    assert_holds(model, {key: value.bfloat16() for key, value in state.items()})
    for name, parameter in model.named_parameters():
        assert (parameter is before[name]) == (not name.startswith("stages.2."))


def test_what_would_stay_on_meta_is_refused():
    with torch.device("meta"):
        model = small("EdgeNeXt")
    state = random_state(small("EdgeNeXt"))
    with pytest.raises(
        ValueError, match=r"2 on the meta device, and not loaded: head.weight, head.bias\n.*init_weights"
    ):
        load_checkpoint(model, state, classifier="keep")
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu").init_weights()
    load_checkpoint(model, state, classifier="keep")
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.3) and not model.head.bias.any()

    model = small("EdgeNeXt")
    model.stages[0].register_buffer("scratch", torch.empty(3, device="meta"), persistent=False)
    with untouched(model), pytest.raises(ValueError, match=r"1 on the meta device, and not loaded: stages.0.scratch"):
        load_checkpoint(model, state)
