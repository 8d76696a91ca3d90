"""The CUDA kernels of the package on the CPU: compiled for the emulation of csrc/emu, behind the package's own ops."""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from vision_ops import _native
from vision_ops.ops import dwconv, global_filter, multi_order_dwconv
from vision_ops.ops._registration import FusedOp

ROOT = Path(__file__).parents[1]
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "emulated"
INCLUDES = [CSRC / part for part in ("include", "cuda", "emu")]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DVOPS_EMU"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover"]
SOURCES = {"dwconv": dwconv, "multi_order_dwconv": multi_order_dwconv, "global_filter": global_filter}
ORDERS = ("0", "1", "7")  # of the threads: in order, backwards, shuffled


@dataclass(frozen=True)
class Mutation:
    """A bug put in on purpose: in the translation unit `unit`, `file` has `new` in place of `old`."""

    unit: str
    file: str
    old: str
    new: str


def build(
    name: str, flags: Sequence[str] = (), *, units: Sequence[str] | None = None, mutation: Mutation | None = None
) -> Path:
    """A Python module like vision_ops._cuda. Objects are kept, and compiled again when anything in them has changed.

    flags: more of them for the translation units named in `units`, by default all.
    """
    compiler = os.environ.get("CXX", "g++").split()
    if not shutil.which(compiler[0]):
        pytest.skip(f"no C++ compiler: {compiler[0]} is not on PATH")
    version = _run(*compiler, "--version")
    (BUILD / name).mkdir(parents=True, exist_ok=True)
    library = BUILD / name / f"_cuda{SUFFIX}"

    def compiled(source: Path) -> str:
        includes = [*(f"-I{path}" for path in INCLUDES), "-isystem", sysconfig.get_path("include")]
        files = _with_includes(source)
        if mutation and source.name == mutation.unit:
            files[mutation.file] = _mutated(files[mutation.file], mutation)
            for file, text in files.items():  # all in one directory: the includes of a file are sought beside it first
                (BUILD / name / file).write_text(text)
            source = BUILD / name / source.name
        command = [*compiler, *FLAGS, *(flags if units is None or source.name in units else ())]
        digest = hashlib.sha256("\0".join([version, *command, *files, *files.values()]).encode()).hexdigest()[:16]
        target = BUILD / f"{source.stem}-{digest}.o"
        if not target.exists():
            _run_for(target, *command, *includes, "-x", "c++", "-c", str(source))
        return str(target)

    sources = [CSRC / "bindings_cuda.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    with _alone(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
        _run_for(library, *compiler, *flags, "-shared", *objects)
    return library


@contextmanager
def _alone() -> Iterator[None]:
    """Of several processes that test, one compiles; the others then find its objects."""
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _with_includes(source: Path) -> dict[str, str]:
    """The text of a file and of our headers that it includes, by name."""
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path.name in found:
            continue
        found[path.name] = text = path.read_text()
        for name in re.findall(r'#include "([^"]+)"', text):
            waiting += [d / name for d in (path.parent, *INCLUDES) if (d / name).exists()][:1]
    return found


def _mutated(text: str, mutation: Mutation) -> str:
    assert text.count(mutation.old) == 1, f"{mutation.old!r} is no longer once in {mutation.file}"
    return text.replace(mutation.old, mutation.new)


def _run_for(target: Path, *command: str) -> None:
    """Replaces the target, which others may have mapped, when it is whole."""
    part = target.with_suffix(".part")
    _run(*command, "-o", str(part))
    part.replace(target)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def load(library: Path) -> ModuleType:
    # A name of its own: of two modules with one name, the second would silently be the first.
    spec = importlib.util.spec_from_file_location(f"{library.parent.name}._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def kernels() -> ModuleType:
    return load(build("plain"))


@cache
def _emulated_op(name: str) -> FusedOp:
    """The op of another name, whose kernels for CPU tensors are those for CUDA."""
    source = SOURCES[name]
    return FusedOp(
        f"emulated_{name}",
        source._Arguments,
        output=source._output,
        kernels={"CPU": source._KERNELS["CUDA"]},
        reference=source._reference,
        predicate=lambda a: ([], []),
        autocast=source._op._autocasts,
        parts=source._parts,
        public=False,
    )


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType, order: str = "7") -> None:
    """For a test, the public functions run on CPU tensors what they run for CUDA tensors, down to the launches."""
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_native, "target", lambda t: (0, 0))
    for name, source in SOURCES.items():
        monkeypatch.setattr(source, "_op", _emulated_op(name))
    monkeypatch.setenv("VOPS_EMU_ORDER", order)
