import argparse
import http.server
import io
import os
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from golden import check_model
from torch.nn.functional import interpolate

from vision_ops.models import create_model, load_checkpoint

# As shallow and narrow as each network can be without losing a kind of key.
SMALL = {
    "MogaNet": ("moganet_xtiny", {"embed_dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1)}),
    "HorNet": ("hornet_tiny_gf", {"depths": (1, 2, 1, 1), "base_dim": 16}),
    "EdgeNeXt": ("edgenext_xx_small", {"dims": (16, 24, 32, 48), "depths": (1, 2, 2, 2)}),
    "S2MLPv2": ("s2mlpv2_small_7", {"d_model": (16, 32), "depth": (1, 2)}),
    "MOAT": ("tiny_moat_0", {"stem": 8, "dims": (16, 32, 64, 128), "depths": (1, 2, 2, 1)}),
    "MOATArticle": (
        "tiny_moat_0_article",
        {"stem": 8, "dims": (16, 32, 64, 128), "depths": (1, 2, 2, 1), "img_size": 64},
    ),
}


def small(network, **kwargs):
    name, overrides = SMALL[network]
    return create_model(name, **{"num_classes": 10, **overrides, **kwargs})


def random_state(model):
    """Other values than the model's, under the same keys: what a checkpoint of it may hold."""
    return {
        key: torch.full_like(value, 7) if value.dtype == torch.int64 else torch.rand(value.shape) + 0.5
        for key, value in model.state_dict().items()
    }


def assert_holds(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)


def gates(model):
    return [module.double_gate_act for module in model.modules() if hasattr(module, "double_gate_act")]


@contextmanager
def untouched(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = model.num_classes, model.get_classifier(), gates(model)
    yield
    assert_holds(model, state)
    assert (model.num_classes, model.get_classifier(), gates(model)) == before


def as_saved(contents, **kwargs):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **kwargs)
    return buffer.getvalue()


# --- layouts: how other projects name what is official here


def timm_edgenext(key):
    first, *rest = key.split(".")
    if first == "downsample_layers":
        stage, *rest = rest
        return ".".join(["stem", *rest] if stage == "0" else ["stages", stage, "downsample", *rest])
    if first == "stages":
        stage, block, name, *rest = rest
        name = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}.get(name, name)
        return ".".join(["stages", stage, "blocks", block, name, *rest])
    return ".".join([{"norm": "head.norm", "head": "head.fc"}[first], *rest])


def mmpretrain_edgenext(key):
    first, *rest = key.split(".")
    if first == "head":
        return ".".join(["head.fc", *rest])
    if first == "norm":
        return ".".join(["backbone.norm3", *rest])
    names = {
        "dwconv": "depthwise_conv",
        "pwconv1": "pointwise_conv1",
        "pwconv2": "pointwise_conv2",
        "convs": "conv_modules",
        "pos_embd": "pos_embed",
        "token_projection": "proj",
        "norm_xca": "norm_csa",
        "gamma_xca": "gamma_csa",
        "xca": "csa",
        "temperature": "scale",
    }
    return ".".join(["backbone", first, *(names.get(name, name) for name in rest)])


def mmpretrain_hornet(key):
    first, *rest = key.split(".")
    if first == "head":
        return ".".join(["head.fc", *rest])
    if first == "norm":
        return ".".join(["backbone.norm3", *rest])
    names = {"pws": "projs", "gamma1": "gamma1.weight", "gamma2": "gamma2.weight"}
    return ".".join(["backbone", first, *(names.get(name, name) for name in rest)])


def openmixup_moganet(key):
    return key.replace("head.", "head.fc.") if key.startswith("head.") else f"backbone.{key}"


def tensorflow_moat(key):
    *path, leaf = key.split(".")
    names = {"running_mean": "moving_mean", "running_var": "moving_variance"}
    if path[-1].endswith("norm") or path[-1] == "norm_0":
        names |= {"weight": "gamma", "bias": "beta"}
    elif path[-1] == "depthwise_conv":
        names["weight"] = "depthwise_kernel"
    elif path[-1] not in "qkvo":
        names["weight"] = "kernel"
    if path[0] == "blocks":
        path[:3] = ["moat", f"block_{int(path[1]):02}_{int(path[2]):02}"]
    else:
        path.insert(0, "moat/stem" if path[0] in ("conv_0", "norm_0", "conv_1") else "moat")
    return "/".join([*path, names.get(leaf, leaf)])


def tensorflow_value(name, value):
    value = value.numpy()
    if name.endswith("/depthwise_kernel"):
        return value.transpose(2, 3, 0, 1)
    if name.endswith("/kernel"):
        return value.transpose(2, 3, 1, 0)
    scope, leaf = name.split("/")[-2:]
    if scope in ("q", "k", "v"):
        return value.reshape(-1, 32) if leaf == "bias" else value.T.reshape(value.shape[1], -1, 32)
    if scope == "o" and leaf == "weight":
        return value.T.reshape(-1, 32, value.shape[0])
    return value


def tensorflow_state(state):
    names = {key: tensorflow_moat(key) for key in state if not key.endswith("num_batches_tracked")}
    return {name: tensorflow_value(name, state[key]) for key, name in names.items()}


@pytest.mark.parametrize("named", [False, True], ids=["auto", "named"])
@pytest.mark.parametrize(
    ("network", "layout", "rename"),
    [
        *((network, "official", lambda key: key) for network in SMALL),
        ("EdgeNeXt", "timm", timm_edgenext),
        ("EdgeNeXt", "mmpretrain", mmpretrain_edgenext),
        ("HorNet", "mmpretrain", mmpretrain_hornet),
        ("MogaNet", "openmixup", openmixup_moganet),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layouts(network, layout, rename, named):
    model = small(network)
    state = random_state(model)
    loaded = load_checkpoint(model, {rename(k): v for k, v in state.items()}, layout=layout if named else "auto")
    assert_holds(model, state)
    assert loaded.layout == layout and loaded.wrapper is None
    assert not loaded.ema and not loaded.resized and not loaded.left_out and not loaded.kept


def test_tensorflow_names(tmp_path):
    model = small("MOAT")
    state = random_state(model)
    arrays = tensorflow_state(state)
    assert arrays["moat/stem/conv_0/kernel"].shape == (3, 3, 3, 8)
    assert arrays["moat/block_02_01/attention/q/weight"].shape == (64, 2, 32)
    assert arrays["moat/block_02_01/attention/o/weight"].shape == (2, 32, 64)
    assert arrays["moat/block_00_00/depthwise_conv/depthwise_kernel"].shape == (3, 3, 64, 1)
    training = {
        **arrays,
        "global_step": np.int64(5),
        "beta1_power": np.float32(0.9),
        **{f"{name}/Adam{i}": array + 1 for name, array in arrays.items() for i in ("", "_1")},
        **{f"{name}/ExponentialMovingAverage": array + 2 for name, array in arrays.items() if "moving" not in name},
    }
    path = tmp_path / "moat.npz"
    np.savez(path, **training)
    loaded = load_checkpoint(model, path, ema=False)
    untracked = {key for key in state if key.endswith("num_batches_tracked")}
    assert set(loaded.kept) == untracked
    assert loaded.layout == "tensorflow" and not loaded.ema
    assert set(loaded.left_out) == training.keys() - arrays.keys()
    found = model.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state if key not in untracked)

    loaded = load_checkpoint(model, path)
    assert loaded.ema and {"global_step", "moat/stem/conv_0/kernel"} <= set(loaded.left_out)
    found = model.state_dict()
    for key in state.keys() - untracked:
        assert torch.equal(found[key], state[key] + (0 if "running" in key else 2)), key

    with untouched(model), pytest.raises(ValueError, match=r"1 unexpected of .*: table \(2,\)"):
        load_checkpoint(model, {**arrays, "table": np.zeros(2)})

    # What a TF2 model calls its variables: no scope for the stem, and a number for the output.
    load_checkpoint(model, {f"{name.removeprefix('moat/stem/')}:0": array for name, array in arrays.items()})
    found = model.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state if key not in untracked)


@pytest.mark.parametrize(
    ("dtype", "fused", "tolerance"), [("float64", True, 1e-11), ("float64", False, 1e-11), ("float32", True, 1e-5)]
)
def test_golden_logits_through_tensorflow_names(tmp_path, dtype, fused, tolerance):
    """At all sizes, odd ones too, and in training mode."""

    def load(model, variables):
        path = tmp_path / "moat.npz"
        np.savez(path, **{name: value.float().numpy() for name, value in variables.items()})
        assert load_checkpoint(model, path).layout == "tensorflow"

    model = create_model("tiny_moat_0", fused=fused)
    check_model("moat_official_tiny_moat0", model, tolerance, dtype=getattr(torch, dtype), load=load)


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout of HorNet must be one of auto, official, mmpretrain, got 'timm'"):
        load_checkpoint(small("HorNet"), {}, layout="timm")
    with pytest.raises(TypeError, match=r"model must be one of MogaNet, HorNet, .* got Linear"):
        load_checkpoint(torch.nn.Linear(1, 1), {})
    with pytest.raises(TypeError, match=r"source must be .* got int"):
        load_checkpoint(small("EdgeNeXt"), 3)


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


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("network", ["EdgeNeXt", "MOAT"])
def test_prefixes(network, prefix):
    model = small(network)
    state = random_state(model)
    loaded = load_checkpoint(model, {"state_dict": {prefix + key: value for key, value in state.items()}})
    assert_holds(model, state)
    assert loaded.layout == "official"


# --- MogaNet's gate


@pytest.mark.parametrize(
    ("name", "double"),
    [
        ("moga_small_ema_sz224_8xb128_ep300.pth", True),
        ("moga_large_sz224_8xb64_accu2_ep300.pth", False),
        ("moga_small_no_forcefp32_sz224_8xb128_ep300.pth", False),
    ],
)
def test_double_gate_of_openmixup(tmp_path, name, double):
    model = small("MogaNet", double_gate_act=not double)
    state = {openmixup_moganet(key): value for key, value in random_state(model).items()}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / name)
    assert load_checkpoint(model, tmp_path / name).double_gate_act is double
    assert len(gates(model)) == 5 and set(gates(model)) == {double}


def test_double_gate_of_official():
    model = small("MogaNet", double_gate_act=True)
    state = random_state(model)
    assert load_checkpoint(model, state).double_gate_act is None  # a model's own state dict does not tell
    assert set(gates(model)) == {True}
    assert load_checkpoint(model, {"arch": "moganet_xtiny", "state_dict": state}).double_gate_act is False
    assert set(gates(model)) == {False}


@pytest.mark.parametrize("ema", [True, False])
def test_averages_of_openmixup(ema):
    """Its EMA hook leaves the averages in the parameters' place, and the parameters in buffers of the whole model."""
    model = small("MogaNet")
    parameters = dict(model.named_parameters())
    state, raw = random_state(model), random_state(model)
    stored = {openmixup_moganet(key): value for key, value in state.items()}
    stored |= {f"ema_{openmixup_moganet(key).replace('.', '_')}": raw[key] for key in parameters}
    loaded = load_checkpoint(model, {"state_dict": stored}, ema=ema)
    assert loaded.ema == ema and len(loaded.left_out) == len(parameters)
    assert_holds(model, state if ema else {**state, **{key: raw[key] for key in parameters}})


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


# --- checkpoints that do not fit


def test_every_key_in_the_way_is_reported():
    model = small("MogaNet", double_gate_act=True)
    state = random_state(model)
    total = len(state)
    for key in [key for key in state if key.startswith("blocks4.0.mlp")]:
        del state[key]
    state["blocks1.0.attn.gate.weight"] = torch.zeros(3, 3)
    state["blocks1.0.attn.gate.bias"] = "seven"
    state["head.extra"] = torch.zeros(2)
    with untouched(model), pytest.raises(ValueError) as caught:
        load_checkpoint(model, {"state_dict": state}, classifier="resize")
    message = str(caught.value)
    for part in (
        "checkpoint 'state dict' does not fit this MogaNet, and nothing was loaded",
        "under 'state_dict' were taken as official; known for MogaNet: official, openmixup",
        f"9 missing of the model's {total} keys: blocks4.0.mlp.fc1.weight (128, 32, 1, 1), ",
        ", and 3 more",
        f"1 unexpected of the checkpoint's {total - 8}: head.extra (2,)",
        "2 of the wrong shape or kind: blocks1.0.attn.gate.bias is (str), not a dense tensor of real numbers, "
        "blocks1.0.attn.gate.weight is (3, 3), must be (8, 8, 1, 1)",
    ):
        assert part in message


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3, 3, 4, 16),
        torch.zeros(16, 3, 4, 4, dtype=torch.complex64),
        torch.zeros(16, 3, 4, 4, device="meta"),
        torch.zeros(16, 3, 4, 4).to_sparse(),
        np.full((16, 3, 4, 4), "x"),
        np.zeros((16, 3, 4, 4), dtype=">f4"),
        None,
    ],
    ids=["as many elements", "complex", "meta", "sparse", "strings", "other byte order", "none"],
)
def test_values_that_are_no_weight(value):
    model = small("EdgeNeXt")
    state = {**random_state(model), "downsample_layers.0.0.weight": value}
    problem = r"1 of the wrong shape or kind: downsample_layers.0.0.weight is \("
    with untouched(model), pytest.raises(ValueError, match=problem):
        load_checkpoint(model, state)


@pytest.mark.parametrize("shape", [(24, 14, 8), (25, 7, 4, 2), (24, 7, 0, 2), (24, 7, 4, 3)], ids=str)
def test_global_filters_of_other_channels(shape):
    model = small("HorNet")
    state = random_state(model)
    key = next(key for key in state if key.endswith("complex_weight"))
    with untouched(model), pytest.raises(ValueError, match=rf"{key} is \({str(shape)[1:-1]}\), must be \("):
        load_checkpoint(model, {**state, key: torch.zeros(shape)})


def test_wrong_layout_or_network():
    model = small("EdgeNeXt")
    state = {timm_edgenext(key): value for key, value in random_state(model).items()}
    with untouched(model), pytest.raises(ValueError, match="taken as mmpretrain, though they look like timm"):
        load_checkpoint(model, state, layout="mmpretrain")
    with untouched(model), pytest.raises(ValueError, match="missing of the model's"):
        load_checkpoint(model, small("HorNet").state_dict())
    with untouched(model), pytest.raises(ValueError, match="missing of the model's"):
        load_checkpoint(model, {})


def test_one_weight_under_two_names():
    model = small("EdgeNeXt")
    state = random_state(model)
    with untouched(model), pytest.raises(ValueError, match=r"backbone.norm.bias \(a second norm.bias\)"):
        load_checkpoint(model, {**state, "backbone.norm.bias": state["norm.bias"]})


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.9999])
def test_truncated_files(tmp_path, suffix, share):
    model, path = small("MogaNet"), tmp_path / f"broken{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    elif suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in model.state_dict().items()})
    else:
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with untouched(model), pytest.raises(ValueError, match=r"cannot read checkpoint '.*broken\..*damaged, or no"):
        load_checkpoint(model, path)


@pytest.mark.parametrize("name", ["page.pth", "page.npz", "page.safetensors"])
def test_other_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>404 Not Found</html>")
    model = small("EdgeNeXt")
    with untouched(model), pytest.raises(ValueError, match=f"cannot read checkpoint '.*{name}'"):
        load_checkpoint(model, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint file 'nowhere\.pth'"):
        load_checkpoint(model, "nowhere.pth")
    (tmp_path / "list.pth").write_bytes(as_saved([torch.ones(2)]))
    with pytest.raises(ValueError, match=r"list.pth' holds a list, not a state dict"):
        load_checkpoint(model, tmp_path / "list.pth")


@pytest.mark.parametrize("name", ["moat0.tar.gz", "model.ckpt-7.index", "https://host/moat0.tar.gz"])
def test_tensorflow_files_say_how_to_convert(name):
    with pytest.raises(ValueError, match=r"is a TensorFlow checkpoint; make an \.npz(.|\n)*np\.savez"):
        load_checkpoint(small("MOAT"), name)


# --- pickles


class RunsCommand:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("value", "name"), [(as_saved, "as_saved"), (print, "print"), (RunsCommand(), "system")])
def test_code_in_a_pickle_is_refused_by_name(tmp_path, value, name, zipped):
    model = small("EdgeNeXt")
    contents = {"model": model.state_dict(), "extra": value}
    (tmp_path / "evil.pth").write_bytes(as_saved(contents, _use_new_zipfile_serialization=zipped))
    with untouched(model), pytest.raises(ValueError, match=rf"its pickle asks for \S*{name}; only tensors"):
        load_checkpoint(model, tmp_path / "evil.pth")


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", weight=np.array([RunsCommand()], dtype=object))
    with pytest.raises(ValueError, match="what is pickled is not read"):
        load_checkpoint(small("MOAT"), tmp_path / "evil.npz")


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arguments_and_numpy_scalars_are_read(tmp_path, module, monkeypatch):
    """Both names that numpy 1 and 2 give the function which makes a scalar of its bytes."""
    scalar = np.float64(0).__reduce__()[0]
    monkeypatch.setattr(sys.modules[scalar.__module__].scalar, "__module__", module, raising=False)
    model = small("EdgeNeXt")
    state = random_state(model)
    scalars = {"acc": np.float64(76.5), "loss": np.float32(2), "epoch": np.int64(3), "best": np.bool_(True)}
    args = argparse.Namespace(lr=np.float64(1e-3), model="edgenext", sizes=[1, 2])
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(as_saved({"state_dict": state, "args": args, **scalars}))
    assert module.encode() in path.read_bytes()
    load_checkpoint(model, path)
    assert_holds(model, state)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# --- safetensors, addresses


@pytest.mark.parametrize("network", SMALL)
def test_saved_as_safetensors_gives_the_same_logits(tmp_path, network):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = small(network).eval(), small(network).eval()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_checkpoint(other, str(tmp_path / "model.safetensors"))
    x = torch.randn(2, 3, *getattr(model, "img_size", (56, 56)))
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ImportError, match="needs the package safetensors: pip install safetensors"):
        load_checkpoint(small("EdgeNeXt"), tmp_path / "model.safetensors")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An address that serves tmp_path/served, and a folder of torch.hub's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "served").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_addresses(tmp_path, server):
    model = small("MogaNet")
    state, other = random_state(model), random_state(model)
    contents = as_saved({"state_dict": {openmixup_moganet(key): value for key, value in state.items()}})
    served = tmp_path / "served" / "moga_no_forcefp32.pth"
    served.write_bytes(contents)
    for _ in range(2):  # the second time from torch.hub's folder
        loaded = load_checkpoint(model, f"{server}/moga_no_forcefp32.pth?dl=1")
        assert_holds(model, state)
        assert loaded.source == "moga_no_forcefp32.pth" and loaded.double_gate_act is False
        served.unlink(missing_ok=True)

    (tmp_path / "served" / "folder").mkdir()
    (tmp_path / "served" / "folder" / "moga_no_forcefp32.pth").write_bytes(as_saved(other))
    (tmp_path / "served" / "folder" / "index.html").write_bytes(as_saved(state))
    load_checkpoint(model, f"{server}/folder/moga_no_forcefp32.pth")
    assert_holds(model, other)
    load_checkpoint(model, f"{server}/folder/?dl=1")  # cloud.tsinghua.edu.cn, where HorNet's weights are, names no file
    assert_holds(model, state)

    (tmp_path / "served" / "half.pth").write_bytes(contents[: len(contents) // 2])
    with untouched(model), pytest.raises(ValueError, match=r"half.pth' \(from http.*; delete the file to download it"):
        load_checkpoint(model, f"{server}/half.pth")
    with untouched(model), pytest.raises(OSError, match=r"cannot download http.*gone.pth: .*404"):
        load_checkpoint(model, f"{server}/gone.pth")
