import os
import subprocess
import sys
from pathlib import Path

import emulation
import pytest

# The largest family of kernels, and the plain ones: compiling all of them takes too long.
UNITS = ("dwconv_k7.cu", "dwconv_plain.cu", "dwconv.cu", "multi_order_dwconv.cu", "global_filter.cu")
UNITS += ("channel_aggregation_ffn.cu", "channel_aggregation_ffn_backward.cu")


def library_of(name: str) -> str:
    compiler = os.environ.get("CXX", "g++").split()[-1]
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return path


def run(library: Path) -> subprocess.CompletedProcess:
    preload = ":".join(map(library_of, ("libasan.so", "libubsan.so")))
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    command = [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(library)]
    environment = {**os.environ, "LD_PRELOAD": preload, **options, "VOPS_EMU_ORDER": "7"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_address_and_undefined_behaviour_sanitizers():
    done = run(emulation.build("sanitized", emulation.SANITIZE, units=UNITS))
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stderr[-5000:]


def test_reads_outside_of_a_tensor_are_reported():
    """A row too many: wrong only in memory that the result may not depend on."""
    mutation = emulation.Mutation(
        "dwconv_plain.cu", "dwconv_plain.cu", "return at >= 0 && at < size ? at : -1;", "return at >= 0 ? at : -1;"
    )
    done = run(emulation.build("sanitized-mutated", emulation.SANITIZE, units=UNITS, mutation=mutation))
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
