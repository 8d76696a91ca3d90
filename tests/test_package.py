"""The package as it is installed: imports, the report, the binaries."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import vision_ops
from vision_ops import _native, info

ROOT = Path(__file__).parents[1]
BLOCK_TORCH = "import sys; sys.modules['torch'] = None; "


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python outside of the repository, so that only what is installed can be imported."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd="/", env={**os.environ, **environment}, capture_output=True, text=True)


def test_kernels_import_from_anywhere_without_triton():
    done = run("import sys, vision_ops.kernels; assert 'triton' not in sys.modules; print(vision_ops.kernels.__name__)")
    assert done.stdout.strip() == "vision_ops.kernels", done.stderr
    assert run("import benchmarks").returncode != 0


FIND_BY_PATH = """
from importlib.machinery import PathFinder
package = PathFinder.find_spec("vision_ops")
kernels = PathFinder.find_spec("vision_ops.kernels", package.submodule_search_locations)
assert PathFinder.find_spec("vision_ops.kernels.layer_norm_2d", kernels.submodule_search_locations)
found = [name for name in ("kernels", "benchmarks", "tests", "csrc", "setup") if PathFinder.find_spec(name)]
assert not found, found
"""


def test_paths_alone_find_the_package_and_nothing_else():
    """As editors and type checkers look for it, which run no import hooks."""
    done = run(FIND_BY_PATH)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["2.11.0a0+ab12cd3.nv26.2", "2.11.0.dev20260115+cu130", "2.11.0", "2.13.0+cpu"])
def test_torch_of_containers_and_nightly_builds_is_new_enough(version):
    (torch_needed,) = [
        need for need in map(Requirement, importlib.metadata.requires("vision-ops")) if need.name == "torch"
    ]
    assert torch_needed.specifier.contains(version, prereleases=True)
    assert not torch_needed.specifier.contains("2.10.1", prereleases=True)


def setup_py(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 71:
        pytest.skip("this setuptools makes wheels only with the package wheel")
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    """What a package is made of, without what the build made."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    for name, link in (("kernels", ""), ("vision_ops", "kernels")):
        made = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", link)
        shutil.copytree(ROOT / name, tmp_path / name, ignore=made)
    return tmp_path


def modules(tree: Path) -> set[str]:
    kernels = {f"vision_ops/{path.relative_to(tree)}" for path in (tree / "kernels").glob("*.py")}
    return kernels | {str(path.relative_to(tree)) for path in (tree / "vision_ops").rglob("*.py")}


def names_and_paths(wheel: Path) -> tuple[set[str], list[str]]:
    """The modules in a wheel, and the lines of its .pth files."""
    with zipfile.ZipFile(wheel) as contents:
        names = contents.namelist()
        lines = [contents.read(name).decode() for name in names if name.endswith(".pth")]
    return {name for name in names if name.endswith(".py")}, "".join(lines).splitlines()


def test_distributions(tree):
    """Each holds every module once, also after an installation for editing, whose wheel is a path to links."""
    expected = modules(tree)
    done = setup_py(tree, "editable_wheel", "-d", "editable", VISION_OPS_BUILD="none")
    assert done.returncode == 0, done.stderr
    names, paths = names_and_paths(next((tree / "editable").glob("*.whl")))
    assert not names and paths == [str(tree / ".editable")]
    assert sorted(p.name for p in Path(paths[0]).iterdir()) == ["vision_ops"]
    assert Path(paths[0], "vision_ops").samefile(tree / "vision_ops")
    assert Path(paths[0], "vision_ops", "kernels").samefile(tree / "kernels")

    done = setup_py(tree, "bdist_wheel", "-d", "plain", VISION_OPS_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert names_and_paths(next((tree / "plain").glob("*.whl"))) == (expected, [])
    done = setup_py(tree, "sdist", "-d", "source", VISION_OPS_BUILD="none")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((tree / "source").glob("*.tar.gz"))) as contents:
        names = [name.partition("/")[2] for name in contents.getnames() if name.endswith(".py")]
    sources = [name.replace("vision_ops/kernels/", "kernels/") for name in expected]
    assert sorted(names) == sorted([*sources, "setup.py"])


def test_editable_without_links_says_what_it_is(tree):
    (tree / ".editable").touch()  # stands in for a system that makes no links
    done = setup_py(tree, "editable_wheel", "-d", "editable", VISION_OPS_BUILD="none")
    assert done.returncode == 0 and "installed with an import hook" in done.stdout, done.stderr
    names, paths = names_and_paths(next((tree / "editable").glob("*.whl")))
    assert names and paths[0].startswith("import ")


def test_compiler_that_nvcc_refuses(tree):
    """Nothing is compiled, and the message names the way out."""
    nvcc = tree / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  *--list-gpu-arch*) echo compute_80; exit;;\n"
        '  "-ccbin g++-99 "*) echo "host_config.h:137: error: unsupported GNU version!"; exit 1;;\n'
        '  *) echo "nvcc fatal: no host compiler"; exit 1;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    (tree / "csrc" / "cuda").mkdir(parents=True)
    (tree / "csrc" / "cuda" / "some.cu").touch()
    setting = {"CUDA_HOME": str(tree / "cuda"), "VISION_OPS_BUILD": "cuda"}
    done = setup_py(tree, "build_ext", CXX="ccache g++-99 -m64", **setting)
    assert done.returncode and "nvcc does not take g++-99 as its host compiler: host_config.h:137: " in done.stderr
    assert "unsupported GNU version!" in done.stderr and "in CXX, such as CXX=g++-" in done.stderr
    done = setup_py(tree, "build_ext", CXX="", **setting)
    assert "the compiler that it finds as its host compiler: nvcc fatal: no host compiler" in done.stderr
    assert not (tree / "build").exists()


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


def test_instruction_set_that_there_is_not():
    done = run("import vision_ops", VISION_OPS_CPU_ISA="sse9")
    assert done.returncode == 0 and "VISION_OPS_CPU_ISA='sse9' is not one of" in done.stderr
    assert not run("import vision_ops", VISION_OPS_CPU_ISA="baseline").stderr


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
    environment = {**os.environ, "VISION_OPS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    assert run("from vision_ops import _native; print(_native.cpu.isa)", VISION_OPS_CPU_ISA=isa).stdout.strip() == isa
    if isa == _native.cpu.isa:
        return
    select = "(matches_reference or layouts or dtypes or activations or linear) and not emulated"
    tests = str(Path(__file__).parent / "ops")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "not slow and not gpu", tests, "-k", select]
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
