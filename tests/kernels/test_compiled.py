"""Every Triton kernel, compiled for GPUs that are not here: it fits the shared memory and spills no register."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a block can have


def compiled(*words: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "compile_kernels.py"), *map(str, SHARED_BYTES), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def usual():
    return compiled()


def check_resources(found: list[dict]) -> None:
    for kernel in found:
        # Float64's square roots and divisions are calls, for which the stack has 8 bytes.
        frame = 8 if "float64" in kernel["case"] else 0
        assert kernel["spilled"] <= frame, kernel
        assert kernel["shared"] <= SHARED_BYTES[kernel["arch"]], kernel
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536, kernel


def test_resources(usual):
    check_resources(usual)


def test_every_kernel_is_compiled_for_every_architecture(usual):
    found = defaultdict(set)
    for kernel in usual:
        found[kernel["arch"]].add(kernel["kernel"])
    from launches import kernel_modules

    expected = {kernel.fn.__name__ for module in kernel_modules() for kernel in module.KERNELS}
    assert expected
    assert dict(found) == dict.fromkeys(SHARED_BYTES, expected)


@pytest.mark.slow
def test_resources_of_all_cases():
    check_resources(compiled("all"))
