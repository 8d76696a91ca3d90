"""Files and addresses, and what of a pickle is not read."""

import argparse
import os
import sys

import numpy as np
import pytest
import torch
from checkpoints import SMALL, as_saved, assert_holds, images, openmixup_moganet, random_state, small, untouched

from vision_ops.models import load_checkpoint


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


class HistoryBuffer:
    """As mmengine stores its log beside the weights: an object of a class of its own."""

    def __init__(self):
        self.history = np.arange(3.0)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_refused_objects_come_with_the_way_to_the_state_dict(tmp_path, zipped):
    model = small("EdgeNeXt")
    state = random_state(model)
    path = tmp_path / "epoch_12.pth"
    hub = {"log_scalars": {"train/loss": HistoryBuffer()}}
    path.write_bytes(as_saved({"message_hub": hub, "state_dict": state}, _use_new_zipfile_serialization=zipped))
    with untouched(model), pytest.raises(ValueError, match=r"asks for \S*\.HistoryBuffer; only tensors") as caught:
        load_checkpoint(model, path)
    line = str(caught.value).splitlines()[-1].strip()
    assert line == f'load_checkpoint(model, torch.load({str(path)!r}, map_location="cpu", weights_only=False))'
    exec(line, {"load_checkpoint": load_checkpoint, "torch": torch, "model": model})
    assert_holds(model, state)


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
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ImportError, match="needs the package safetensors: pip install safetensors"):
        load_checkpoint(small("EdgeNeXt"), tmp_path / "model.safetensors")


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
