"""create_model with weights: what is downloaded, checked and kept, and what is said when it cannot be."""

import hashlib
from dataclasses import replace

import pytest
import torch
from checkpoints import SMALL, as_saved, assert_holds, random_state, small

from vision_ops import models
from vision_ops.models import create_model, list_models, load_checkpoint


@pytest.fixture
def publish(tmp_path, server, monkeypatch):
    """Puts a state dict on the server, as the official weights of a small network."""

    def put(network, state, name="weights.pth"):
        (tmp_path / "served" / name).write_bytes(as_saved({"model": state}))
        variant = SMALL[network][0]
        published = replace(models._VARIANTS[variant], url=f"{server}/{name}")
        monkeypatch.setitem(models._VARIANTS, variant, published)
        return tmp_path / "served" / name

    return put


@pytest.mark.parametrize("num_classes", [None, 10, 0, 4])
def test_pretrained(publish, num_classes):
    state = random_state(small("EdgeNeXt"))
    publish("EdgeNeXt", state)
    model = small("EdgeNeXt", pretrained=True, num_classes=num_classes)
    own = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
    if num_classes in (None, 10):
        assert_holds(model, state)
    else:
        assert_holds(model, {key: value for key, value in state.items() if not key.startswith("head.")} | own)
    assert model.num_classes == (10 if num_classes is None else num_classes)
    if num_classes == 4:
        assert model.head.weight.shape == (4, 48) and model.head.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_pretrained_parts_and_channels(publish, tmp_path):
    state = random_state(small("HorNet"))
    file = publish("HorNet", state)
    model = small("HorNet", pretrained=True, features_only=True, in_chans=1, cache_dir=tmp_path / "cache")
    key = "downsample_layers.0.0.weight"
    assert torch.equal(model.state_dict()[key], state[key].sum(1, keepdim=True))
    file.unlink()  # it is in the cache, and nowhere else
    assert [path.name.partition("-")[2] for path in (tmp_path / "cache").iterdir()] == ["weights.pth"]
    assert not (tmp_path / "home").exists()
    small("HorNet", pretrained=True, cache_dir=tmp_path / "cache")


def test_checkpoint_path(tmp_path):
    state = random_state(small("MOAT"))
    torch.save(state, tmp_path / "own.pth")
    assert_holds(small("MOAT", checkpoint_path=tmp_path / "own.pth"), state)
    with pytest.raises(ValueError, match="does not fit this MOAT"):
        small("MOAT", checkpoint_path=str(tmp_path / "own.pth"), num_classes=3)
    assert small("MOAT", checkpoint_path="").num_classes == 10


def test_device_and_dtype():
    model = small("HorNet", device="meta", dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("meta", torch.bfloat16)}
    assert create_model("s2mlpv2_small_7", depth=(1, 1), device="cpu").num_classes == 1000


def test_what_has_weights():
    assert list_models(pretrained=True) == [
        name for name in list_models() if "moat" not in name and not name.startswith(("s2", "hornet_base_gf_img384"))
    ]
    assert list_models("*small_7*", pretrained=True) == ["hornet_small_7x7"]
    with pytest.raises(ValueError, match="pretrained must be False: no weights of s2mlpv2_small_7 are published"):
        small("S2MLPv2", pretrained=True)
    with pytest.raises(ValueError, match=r"is a TensorFlow checkpoint; make an \.npz"):
        small("MOAT", pretrained=True)


def test_hash_in_a_name(publish, server, tmp_path):
    state = random_state(small("EdgeNeXt"))
    digest = hashlib.sha256(as_saved({"model": state})).hexdigest()
    right = "ab" + digest[:8] if digest[:8].isdigit() else digest[:8]
    if right == digest[:8]:
        publish("EdgeNeXt", state, f"net-{right}.pth")
        assert_holds(small("EdgeNeXt", pretrained=True), state)
    for name in ("net-20220915.pth", "net-0123abc.pth"):  # a date, and too few digits
        publish("EdgeNeXt", state, name)
        assert_holds(small("EdgeNeXt", pretrained=True), state)
    publish("EdgeNeXt", state, "net-0123abcd.pth")
    problem = f"is not the file that was published: its SHA-256 begins with {digest[:8]}, and by its name with 0123abcd"
    with pytest.raises(ValueError, match=problem):
        small("EdgeNeXt", pretrained=True, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_broken_connection(publish, tmp_path):
    state = random_state(small("EdgeNeXt"))
    publish("EdgeNeXt", state, "broken.pth")
    problem = (
        r"cannot download http\S*broken.pth: the connection ended after \d+ of \d+ bytes. Without a network, fetch"
    )
    with pytest.raises(OSError, match=problem):
        small("EdgeNeXt", pretrained=True, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())  # so that the next try downloads again


def test_no_network(tmp_path):
    model = small("EdgeNeXt")
    with pytest.raises(OSError, match=r"cannot download http://127.0.0.1:9/x.pth: .*or put it at '.*-x.pth'"):
        load_checkpoint(model, "http://127.0.0.1:9/x.pth", cache_dir=tmp_path)
