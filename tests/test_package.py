"""The package as it is installed: imports, the report, the binaries."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vision_ops
from vision_ops import _native, info

BLOCK_TORCH = "import sys; sys.modules['torch'] = None; "


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python outside of the repository, so that only what is installed can be imported."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd="/", env={**os.environ, **environment}, capture_output=True, text=True)


def test_kernels_import_from_anywhere_without_triton():
    done = run("import sys, vision_ops.kernels; assert 'triton' not in sys.modules; print(vision_ops.kernels.__name__)")
    assert done.stdout.strip() == "vision_ops.kernels", done.stderr
    assert run("import benchmarks").returncode != 0


def test_import_without_torch_is_one_clear_line():
    done = run(BLOCK_TORCH + "import vision_ops")
    expected = "ImportError: vision_ops needs PyTorch 2.11 or later: pip install 'torch>=2.11'"
    assert done.stderr.strip().splitlines()[-1] == expected


def test_report_without_torch_still_says_what_was_built():
    arguments = "sys.orig_argv = ['python', '-m', 'vision_ops']; "
    done = run(BLOCK_TORCH + arguments + "import runpy; runpy.run_module('vision_ops', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert "Built:" in done.stdout and "cpu:" in done.stdout and "PyTorch is not installed" in done.stdout


def test_report():
    done = subprocess.run([sys.executable, "-m", "vision_ops"], cwd="/", capture_output=True, text=True, check=True)
    for expected in (vision_ops.__version__, _native.cpu.isa, "dwconv", "multi_order_dwconv", "GPUs:", "cpu:", "cuda:"):
        assert expected in done.stdout


def test_report_into_a_pipe_that_nobody_reads():
    process = subprocess.Popen([sys.executable, "-m", "vision_ops"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_binary_that_does_not_load_keeps_the_reason(tmp_path, monkeypatch):
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native, "_ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "vision_ops._cpu", None)
    module, reason = _native._load("cpu")
    assert module is None and "could not be loaded" in reason


def test_missing_binary_repeats_what_the_build_said(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "vision_ops._cuda", None)
    monkeypatch.setitem(_native.build_info, "cuda", {"built": False, "reason": "nvcc was not found"})
    assert _native._load("cuda") == (None, "nvcc was not found")


def test_gpu_code_matching():
    archs = ["sm_80", "sm_90", "PTX 90"]
    assert info.gpu_code(archs, 86) == "compiled for it"
    assert info.gpu_code(archs, 90) == "compiled for it"
    assert info.gpu_code(archs, 120).startswith("PTX")
    assert info.gpu_code(archs, 75) is None


class Driver:
    """As much of vision_ops._cuda as tells which driver there is."""

    def __init__(self, supports: int) -> None:
        self.versions = lambda: (supports, 13000)


@pytest.mark.parametrize(
    ("supports", "capability", "reason"),
    [
        (13000, (9, 0), None),
        (12080, (9, 0), "the driver supports CUDA 12.8, and the kernels were compiled with 13.0"),
        (13000, (7, 5), "no code for sm_75, only sm_80, sm_90, PTX 90"),
    ],
)
def test_why_the_kernels_cannot_run_on_a_gpu(supports, capability, reason, monkeypatch):
    monkeypatch.setattr(_native, "cuda", Driver(supports))
    monkeypatch.setattr(_native, "cuda_missing", None)
    monkeypatch.setitem(_native.build_info, "cuda", {"archs": ["sm_80", "sm_90", "PTX 90"]})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _native._gpu_missing.cache_clear()
    found = _native.gpu_missing(0)
    _native._gpu_missing.cache_clear()
    assert found is None if reason is None else reason in found


class Triton:
    """Its driver, which compiles at its first use."""

    def __init__(self, error=None):
        self.error = error

    def get_current_target(self):
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"capability": (7, 5)}, "need an NVIDIA GPU of sm_80 or later, this one is sm_75"),
        ({"cuda": None}, "need an NVIDIA GPU"),
        ({"path": ""}, "a C compiler, and neither gcc nor clang is not on PATH"),
        ({"CC": "/no/such/cc"}, "a C compiler, and /no/such/cc is not on PATH"),
        ({"include": "/no/such"}, "there is no /no/such/Python.h"),
        ({"error": RuntimeError("libcuda.so cannot be found")}, "Triton does not start: libcuda.so cannot be found"),
    ],
    ids=str,
)
def test_why_triton_cannot_run_on_a_gpu(change, reason, monkeypatch, tmp_path):
    driver = pytest.importorskip("triton.runtime").driver
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch.version, "cuda", change.get("cuda", "13.0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: change.get("capability", (9, 0)))
    monkeypatch.setenv("PATH", change.get("path", str(tmp_path)))
    monkeypatch.delenv("CC", raising=False)
    if "CC" in change:
        monkeypatch.setenv("CC", change["CC"])
    monkeypatch.setattr("sysconfig.get_path", lambda *_: change.get("include", str(tmp_path)))
    monkeypatch.setattr(driver, "_active", Triton(change.get("error")))
    _native._triton_missing.cache_clear()
    found = _native.triton_missing(0)
    _native._triton_missing.cache_clear()
    assert found is None if reason is None else reason in found


def test_cuda_kernels_need_no_driver_until_they_are_called():
    if _native.cuda is None:
        pytest.skip(_native.cuda_missing)
    needed = subprocess.run(["ldd", _native.cuda.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed  # neither the driver nor torch's runtime: ours is linked in
    if torch.cuda.is_available():
        return
    t = (0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"CUDA: (CUDA driver version is insufficient|no CUDA-capable device)"):
        _native.cuda.dwconv(t, t, None, t, (3, 1, 1, 1, 1), 0, 0, 0)


ISAS = [isa for isa in ("baseline", "avx2", "avx512") if isa in _native.build_info.get("cpu", {}).get("isas", [])]


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_of_every_instruction_set(isa):
    """The numerical tests again, in a process that is held to an instruction set that the processor has."""
    if ISAS.index(isa) > ISAS.index(_native.cpu.isa):
        pytest.skip(f"this processor has no {isa}")
    environment = {**os.environ, "VISION_OPS_CPU_ISA": isa}
    assert run("from vision_ops import _native; print(_native.cpu.isa)", VISION_OPS_CPU_ISA=isa).stdout.strip() == isa
    if isa == _native.cpu.isa:
        return
    select = "cpu and (matches_reference or dtypes or activations)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).parent / "ops"), "-k", select]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_objects_of_an_instruction_set_share_nothing():
    """A weak symbol outside its namespace could put AVX-512 code into the baseline when the linker merges."""
    objects = [o for o in Path(__file__).parents[1].glob("build/**/*.o") if "_isa" in o.name]
    if not objects:
        pytest.skip("the object files are not here: installed from a wheel")
    for path in objects:
        names = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in names.splitlines() if re.search(r"^\S+ [WVu] ", line)]
        weak = [line for line in weak if not re.search(r"vops::(baseline|avx2|avx512)::|DW\.ref\.", line)]
        assert not weak, path.name
