"""Compiles Triton kernels for GPUs that are not here, as their launchers would, and prints what each takes.

A process of its own, because Triton's interpreter, in which the other tests run, leaves nothing to compile. A driver
that only names an architecture stands in for the real one; the launchers are called with tensors without memory, and
every launch ends with the cubin. Arguments: the architectures; "all" adds the cases that are left to `make test-all`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import triton
from launches import LAUNCHES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def stand_in(arch: int) -> SimpleNamespace:
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # kernels are cached by device
        get_current_stream=lambda device: 0,
    )


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3])}


def main(archs: list[int], all_cases: bool) -> None:
    compiled: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((self, run(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    usage: dict[str, dict[str, int]] = {}
    for arch in archs:
        driver.set_active(stand_in(arch))
        for launch in LAUNCHES:
            if arch not in launch.archs and not all_cases:
                continue
            compiled.clear()
            launch.run()
            for function, kernel in compiled:
                name, metadata = function.__name__, kernel.metadata
                key = f"{arch} {metadata.hash}"
                usage[key] = usage.get(key) or resources(kernel.asm["cubin"])
                facts = {"shared": metadata.shared, "warps": metadata.num_warps, **usage[key]}
                print(
                    json.dumps({"op": launch.op, "case": launch.case, "arch": arch, "kernel": name, **facts}),
                    flush=True,
                )


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:] if word != "all"], "all" in sys.argv)
