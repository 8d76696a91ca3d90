"""Names: the layouts of keys, what they imply, and checkpoints that do not fit."""

import numpy as np
import pytest
import torch
from checkpoints import (
    SMALL,
    assert_holds,
    gates,
    mmpretrain_edgenext,
    mmpretrain_hornet,
    openmixup_moganet,
    random_state,
    small,
    tensorflow_state,
    timm_edgenext,
    untouched,
)
from golden import check_model

from vision_ops.models import create_model, load_checkpoint


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
