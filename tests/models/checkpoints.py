"""Small networks, their weights, and how other projects name what is official here."""

import io
from contextlib import contextmanager

import torch

from vision_ops.models import create_model

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


def images(model, batch=2, channels=3):
    return torch.randn(batch, channels, *getattr(model, "img_size", (56, 56)))


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
