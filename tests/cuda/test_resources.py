"""What ptxas reported of every kernel when the package was built: no spills, and as many threads as declared."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vision_ops import _native

ROOT = Path(__file__).parents[2]
REGISTERS, THREADS, WARP = 65536, 128, 32  # per SM; per block; registers are given to warps in units of 256
PLAIN_BLOCKS = 8
REPORT = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


@pytest.fixture(scope="module")
def reports():
    """(kernel, architecture, bytes of stack and spills, registers) for all."""
    facts = _native.build_info.get("cuda", {})
    if not facts.get("built"):
        pytest.skip(f"no CUDA kernels: {_native.cuda_missing}")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    logs = [next(ROOT.glob(f"build/kernels-*/cuda_{s.name}.o.log"), None) for s in sources]
    if None in logs:
        pytest.skip("the reports of ptxas are not here: installed from a wheel")
    if not shutil.which("c++filt"):
        pytest.skip("c++filt is not on PATH")
    found = [match for log in logs for match in REPORT.findall(log.read_text())]
    mangled = "\n".join(f[0] for f in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.split("\n")
    return [(name, f[1], [int(n) for n in f[2:5]], int(f[5])) for name, f in zip(names, found, strict=True)]


def test_all_are_there(reports):
    archs = [arch for arch in _native.build_info["cuda"]["archs"] if arch.startswith("sm_")]
    kernels = {arch: sorted(name for name, a, _, _ in reports if a == arch) for arch in archs}
    assert len(kernels[archs[0]]) > 50
    assert all(names == kernels[archs[0]] for names in kernels.values())


def test_nothing_spills(reports):
    assert [(name, arch, spills) for name, arch, spills, _ in reports if any(spills)] == []


def test_resident_threads(reports):
    """As many blocks per SM as the last template argument says; before it, filter kernels have their threads."""
    for name, arch, _, registers in reports:
        declared = re.search(r"(march|filter)\w*_kernel<(.*?)>\(", name)
        arguments = declared[2].split(", ") if declared else ()
        blocks = int(arguments[-1]) if declared else PLAIN_BLOCKS
        threads = int(arguments[-2]) if declared and declared[1] == "filter" else THREADS
        of_warp = -(-registers * WARP // 256) * 256
        assert REGISTERS // (of_warp * -(-threads // WARP)) >= blocks, (name, arch, registers)
