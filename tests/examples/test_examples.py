"""What the README promises of examples/, as a user would run it: in processes of its own, on a generated set."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("rich")

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
NETWORK = {"base_dim": 8, "depths": [1, 1, 1, 1], "layer_scale_init_value": 0.1}
TRAIN = [
    *("examples/train.py", "--model", "hornet_tiny_7x7", "--model-args", json.dumps(NETWORK), "--data", "generated"),
    *("--size", "32", "--epochs", "2", "--batch-size", "50", "--lr", "3e-3", "--drop-path", "0.2", "--workers", "0"),
]  # ten steps an epoch
PARALLEL = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run, trained by the first of pytest's processes that asks; and what the run printed."""
    folder = tmp_path_factory.getbasetemp().parent / f"trained-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "printed").exists():
            (folder / "printed").write_text(run(*TRAIN, "--out", folder))
    return folder, (folder / "printed").read_text()


def test_learns(trained):
    shares = [float(share) for share in re.findall(r"accuracy ([\d.]+)%", trained[1])]
    assert len(shares) == 2 and shares[-1] > 60, trained[1]  # of five classes


def test_goes_on_bit_for_bit_when_killed(trained, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    command = [sys.executable, *TRAIN, "--out", str(tmp_path)]
    process = subprocess.Popen([*command, "--save-every", "3"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert torch.load(checkpoint, weights_only=True)["step"] % 10 in (3, 6, 9)  # within an epoch
    run(*TRAIN, "--out", tmp_path, "--resume")
    whole, resumed = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (trained[0], tmp_path))
    assert whole["step"] == resumed["step"] == 20
    for part in ("model", "ema"):
        for key, value in whole[part].items():
            assert torch.equal(resumed[part][key], value), (part, key)
    moments = whole["optimizer"]["state"]
    assert all(
        torch.equal(resumed["optimizer"]["state"][key][m], v) for key in moments for m, v in moments[key].items()
    )
    written = [load_file(folder / "last.safetensors") for folder in (trained[0], tmp_path)]
    assert all(torch.equal(written[1][key], value) for key, value in written[0].items())


def test_serves(trained):
    files = sorted((trained[0] / "pictures" / "val").glob("*/*.png"))
    lines = run("examples/serve.py", "--weights", trained[0] / "best.safetensors", *files).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(file) for file in files]
    right = [
        line.partition(": ")[2].startswith(f"{file.parent.name} ") for line, file in zip(lines, files, strict=True)
    ]
    best = float(re.findall(r"best ([\d.]+)%", trained[1])[-1])
    assert 100 * sum(right) / len(right) == pytest.approx(best, abs=0.1)  # as training found on the same pictures


WITHOUT_PACKAGE = """
import sys, torch
sys.modules["vision_ops"] = None  # importing it fails
print(tuple(torch.export.load(sys.argv[1]).module()(torch.zeros(3, 3, 32, 32)).shape))
"""


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_exports(trained, tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    file = tmp_path / f"exported.{kind}"
    printed = run("examples/serve.py", "--weights", trained[0] / "best.safetensors", "--export", kind, "--out", file)
    assert float(re.search(r"within (\S+) of the largest", printed)[1]) <= 1e-3
    assert json.loads(file.with_name(f"{file.name}.json").read_text())["classes"][0] == "blue"
    if kind == "pt2":
        assert run("-c", WITHOUT_PACKAGE, file).strip() == "(3, 5)"
    else:
        import onnx

        assert {node.domain for node in onnx.load(file).graph.node} == {""}  # ONNX's own operators


def test_two_processes_give_the_gradients_of_one():
    run(*PARALLEL, Path(__file__).with_name("two_processes.py"))
