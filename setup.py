"""Builds vision_ops: C++ and CUDA C++ kernels, and what names them in Python.

No torch at build time: the kernels take raw pointers, so one binary serves every torch. Environment variables:

VISION_OPS_BUILD       auto (default): CPU kernels, and CUDA kernels where nvcc is found; cpu: CPU kernels only;
                       cuda: as auto, but a missing nvcc is an error; none: Python only, nothing is compiled
VISION_OPS_CUDA_ARCHS  GPU architectures, such as "80;90;100", or "native" for the GPUs of this machine (the default
                       where it has any, else 80, 90 and 100, less those that nvcc does not know); PTX of the newest is
                       added, so that later GPUs work too
VISION_OPS_DEBUG       1: -O1 -g
VISION_OPS_SANITIZE    address, undefined or thread, or several with commas: adds -fsanitize=... -g
MAX_JOBS               compiler processes at a time (default: one per core, and no more than there is memory for)
CXX                    the C++ compiler, nvcc's host compiler too (default: g++)
CUDA_HOME              the CUDA toolkit (default: the nvcc on PATH, then /usr/local/cuda)

What was built, and why the rest was not, is written to vision_ops/_build_info.json.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT, PACKAGE = Path(__file__).resolve().parent, "vision_ops"
OUT = ROOT / "build" / f"kernels-{sysconfig.get_config_var('SOABI')}"  # objects; kept, so that rebuilds are incremental
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def setting(name: str, default: str, pattern: str, takes: str) -> str:
    value = os.environ.get(name, "").strip() or default
    if not re.fullmatch(pattern, value):
        raise SystemExit(f"{name}={value!r} is not understood: it takes {takes}.")
    return value


ARCH, SANITIZER = r"\d+\.?\d[af]?", "(address|undefined|thread)"
BUILD = setting("VISION_OPS_BUILD", "auto", "auto|cpu|cuda|none", "auto, cpu, cuda or none")
ARCHS = setting("VISION_OPS_CUDA_ARCHS", "", rf"(native|{ARCH}([;, ]+{ARCH})*)?", "native, or a list such as 80;90")
DEBUG = setting("VISION_OPS_DEBUG", "0", "0|1", "0 or 1") == "1"
SANITIZE = setting("VISION_OPS_SANITIZE", "", f"({SANITIZER}(,{SANITIZER})*)?", "address, undefined and thread")
JOBS = setting("MAX_JOBS", "", "([1-9][0-9]*)?", "a number of processes")
CXX = shlex.split(os.environ.get("CXX", "")) or ["g++"]
CUDA_HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc", path=f"{CUDA_HOME}/bin" if CUDA_HOME else os.environ["PATH"] + ":/usr/local/cuda/bin")

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Every csrc/cpu/*_isa.cpp is compiled once per entry; the processor decides at run time which one is used.
ISAS: dict[str, list[str]] = {"baseline": ["-march=x86-64"] if X86 else []}
if X86:
    ISAS["avx2"] = ["-march=haswell", "-mtune=generic"]
    ISAS["avx512"] = ["-march=skylake-avx512", "-mtune=generic", "-mprefer-vector-width=512"]

SANFLAGS = [f"-fsanitize={name}" for name in SANITIZE.split(",") if name]
MODEFLAGS = ["-std=c++17", "-O1" if DEBUG else "-O3", *(["-g"] if DEBUG or SANITIZE else [])]
HOSTFLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *SANFLAGS]
CXXFLAGS = [*MODEFLAGS, *HOSTFLAGS, "-Wextra", "-fopenmp", *(["-DVOPS_X86"] if X86 else [])]
CXXFLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
NVCCFLAGS = [*MODEFLAGS, "-lineinfo", "--threads=2", "-Xptxas=-v", *(f"-Xcompiler={flag}" for flag in HOSTFLAGS)]


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def why_not() -> dict[str, str | None]:
    """For each part why it is not built, in a sentence; None for a part that is."""
    if BUILD == "none":
        return dict.fromkeys(("cpu", "cuda"), "VISION_OPS_BUILD=none asked for Python only.")
    if platform.system() != "Linux":
        return dict.fromkeys(("cpu", "cuda"), f"Kernels are compiled on Linux only; this is {platform.system()}.")
    no_nvcc = f"No nvcc in CUDA_HOME={CUDA_HOME}." if CUDA_HOME else "No nvcc on PATH, and CUDA_HOME is not set."
    cuda = None
    if BUILD == "cpu":
        cuda = "VISION_OPS_BUILD=cpu asked for the CPU kernels only."
    elif BUILD == "cuda" and not NVCC:
        raise SystemExit(f"VISION_OPS_BUILD=cuda needs nvcc, the CUDA compiler. {no_nvcc}")
    elif not sources("csrc/cuda/*.cu"):
        cuda = "There are no CUDA kernels in this source tree."
    elif not NVCC:
        cuda = no_nvcc
    return {"cpu": None, "cuda": cuda}


def output(*command: str) -> str:
    """What a command prints; nothing if it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cuda_archs(nvcc: str) -> list[str]:
    """What to compile for, oldest first, such as ["sm_80", "sm_90", "compute_90"]; compute_* is PTX."""
    known = re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))
    here = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").replace(".", "")
    here = here if re.fullmatch(rf"{ARCH}(\s+{ARCH})*", here) else ""
    if ARCHS == "native" and not here:
        raise SystemExit("VISION_OPS_CUDA_ARCHS=native takes the GPU that nvidia-smi reports; it reports none.")
    if ARCHS in ("", "native"):
        wanted = here if ARCHS or set(here.split()) & set(known) else "80;90;100"
    else:
        wanted = ARCHS.replace(".", "")
    archs = sorted(set(re.findall(ARCH, wanted)), key=lambda arch: int(arch.rstrip("af")))
    unknown = [arch for arch in archs if arch.rstrip("af") not in known]
    if unknown == archs or (unknown and ARCHS):  # only the default may shrink in silence
        raise SystemExit(
            f"{nvcc} does not know the GPU architecture {';'.join(unknown)}, only {';'.join(known)}: "
            "name some of these in VISION_OPS_CUDA_ARCHS, or set VISION_OPS_BUILD=cpu."
        )
    archs = [arch for arch in archs if arch not in unknown]
    return [f"sm_{arch}" for arch in archs] + ["compute_" + archs[-1].rstrip("af")]


def host_compiler() -> list[str]:
    """The option that gives nvcc the compiler named in CXX, be it CXX="ccache g++ -m64"."""
    return ["-ccbin", next(word for word in reversed(CXX) if word[0] != "-")] if os.environ.get("CXX") else []


def check_host_compiler(nvcc: str) -> None:
    """Stops before the kernels are compiled if nvcc has no host compiler that it takes: it knows none newer than it."""
    option = host_compiler()
    command = [nvcc, *option, "-x", "cu", "-E", os.devnull, "-o", os.devnull]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        compiler, lines = option[1] if option else "the compiler that it finds", done.stdout.strip().splitlines()
        said = next((line for line in lines if "error" in line), "\n".join(lines[:1]))
        raise SystemExit(
            f"{nvcc} does not take {compiler} as its host compiler: {said}\n"
            "Name one that it takes in CXX, such as CXX=g++-13; VISION_OPS_BUILD=cpu leaves out the CUDA kernels."
        )


def translation_units(part: str) -> Iterator[tuple[str, str, list[str]]]:
    """(source, object, flags) for every object of a part."""
    common = [*(CXXFLAGS if part == "cpu" else NVCCFLAGS), f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/{part}"]
    baseline = ISAS["baseline"] if part == "cpu" else []
    python = ["-isystem", sysconfig.get_path("include")]
    yield f"csrc/bindings_{part}.cpp", f"bindings_{part}.o", common + baseline + python  # no other file sees Python
    for source in sources("csrc/cpu/*.cpp" if part == "cpu" else "csrc/cuda/*.cu"):
        name = source.removeprefix("csrc/").replace("/", "_")
        if source.endswith("_isa.cpp"):
            for isa, march in ISAS.items():
                yield source, f"{name}.{isa}.o", [*common, *march, f"-DVOPS_ISA={isa}"]
        else:
            yield source, f"{name}.o", common + baseline


def ninja_file(parts: list[str], archs: list[str]) -> str:
    def shell(*args: str) -> str:
        return shlex.join(args).replace("$", "$$")

    def file(name: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    nvcc = [str(NVCC), *(f"-gencode=arch=compute_{arch.split('_')[1]},code={arch}" for arch in archs), *host_compiler()]
    # Cudart is static and hidden: torch brings its own in the global scope, and ours must not bind to that. The
    # architectures are named to the linking nvcc too, or it adds code for its own default.
    nvlink = [*nvcc, "-cudart=static", "-Xlinker=--exclude-libs,ALL", *(f"-Xcompiler={flag}" for flag in SANFLAGS)]
    compilers, linkers = {"cpu": CXX, "cuda": nvcc}, {"cpu": [*CXX, "-fopenmp", *SANFLAGS], "cuda": nvlink}
    text = []
    for part in parts:
        step = f"{shell(*compilers[part])} $flags -MMD -MF $out.d -c $in -o $out"
        if part == "cuda":  # what ptxas reports of every kernel is kept for the tests; only the rest is shown
            step += " > $out.log 2>&1; status=$$?; grep -Ev '^(ptxas info|    [0-9]+ bytes stack|$$)' $out.log; "
            step += "exit $$status"
        step += "\n  deps = gcc\n  depfile = $out.d"
        text.append(f"rule {part}\n  command = {step}\n  description = $out\n")
        text.append(f"rule {part}link\n  command = {shell(*linkers[part])} -shared $in -o $out\n  description = $out\n")
        units = list(translation_units(part))
        for source, obj, flags in units:  # {part}-compiler holds the compiler's version: a new compiler rebuilds all
            text.append(f"build {obj}: {part} {file(ROOT / source)} | {part}-compiler\n  flags = {shell(*flags)}\n")
        text.append(f"build _{part}{SUFFIX}: {part}link {' '.join(obj for _, obj, _ in units)}\n")
    return "".join(text)


def compile_parts(parts: list[str], archs: list[str]) -> float:
    """Leaves _cpu*.so and _cuda*.so in OUT; what is up to date is not compiled again. Returns the seconds it took."""
    import ninja  # here: metadata and sdist need no compiler and no build requirements

    hint = "VISION_OPS_BUILD=none installs without compiled kernels."
    if not shutil.which(CXX[0]):
        raise SystemExit(f"No C++ compiler: {CXX[0]} is not on PATH. Install g++ or name a compiler in CXX. {hint}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit(f"No Python.h: install Python's headers (package python3-dev or python3-devel). {hint}")
    for part in parts:
        compiler, version = OUT / f"{part}-compiler", output(*(CXX if part == "cpu" else [str(NVCC)]), "--version")
        if not compiler.exists() or compiler.read_text() != version:
            compiler.write_text(version)
    (OUT / "build.ninja").write_text(ninja_file(parts, archs))
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30  # a compiler process takes up to one
    jobs = JOBS or str(max(1, min(len(os.sched_getaffinity(0)), gib)))
    start = time.monotonic()
    # PyPI's ninja, never the system's: two versions that take turns distrust each other's logs and rebuild everything.
    if subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(OUT), "-j", jobs]).returncode:
        hint = "VISION_OPS_BUILD=cpu leaves out the CUDA kernels; " + hint if "cuda" in parts else hint
        raise SystemExit(f"Compiling the kernels failed: the compiler's message is above. {hint}")
    return time.monotonic() - start


def build_info(reasons: dict[str, str | None], archs: list[str]) -> dict[str, object]:
    cpu, cuda = (reason is None for reason in reasons.values())
    compiler = output(*CXX, "--version").partition("\n")[0] if cpu else None
    nvcc = re.search(r"release ([\d.]+)", output(str(NVCC), "--version")) if cuda else None
    isas, flags = (list(ISAS), CXXFLAGS) if cpu else ([], [])
    named = [arch.replace("compute_", "PTX ") for arch in archs]
    return {
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
        "cpu": {"built": cpu, "reason": reasons["cpu"], "isas": isas, "compiler": compiler, "flags": flags},
        "cuda": {"built": cuda, "reason": reasons["cuda"], "nvcc": nvcc and nvcc[1], "archs": named},
        "debug": DEBUG,
        "sanitize": SANITIZE or None,
        "commit": (output("git", "rev-parse", "--short", "HEAD") if (ROOT / ".git").exists() else "") or None,
    }


class BuildKernels(build_ext):
    def run(self) -> None:
        reasons = why_not()
        parts = [part for part, reason in reasons.items() if reason is None]
        archs = cuda_archs(str(NVCC)) if "cuda" in parts else []
        if archs:
            check_host_compiler(str(NVCC))
        seconds = 0.0
        if parts:
            OUT.mkdir(parents=True, exist_ok=True)
            seconds = compile_parts(parts, archs)
        target = ROOT / PACKAGE if self.inplace else Path(self.build_lib, PACKAGE)
        target.mkdir(parents=True, exist_ok=True)
        for part, reason in reasons.items():
            print(f"vision_ops: {part.upper()} kernels " + (f"not built. {reason}" if reason else "built."), flush=True)
            library = target / f"_{part}{SUFFIX}"
            if reason:
                library.unlink(missing_ok=True)  # of an earlier build: it must not be loaded
            else:  # replaced, not overwritten: a running process keeps the file it has mapped
                shutil.copy2(OUT / library.name, f"{library}.part")
                os.replace(f"{library}.part", library)
        info = {"version": self.distribution.get_version(), **build_info(reasons, archs), "seconds": round(seconds, 1)}
        (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class Build(build):
    """Runs build_ext even where nothing is compiled, so that _build_info.json always says why."""

    sub_commands: ClassVar = [("build_py", None), ("build_ext", None)]

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)  # modules deleted since the last wheel
        super().run()


def package_dir() -> dict[str, str]:
    """Where the packages are: the Triton kernels, vision_ops.kernels, lie in kernels/.

    For an editable installation setuptools makes an import hook of such a mapping, which editors and type checkers do
    not run, but a plain path of a folder that holds all packages under their own names. Two links make one: .editable,
    which has vision_ops and nothing else (on a path to this folder there would be kernels, tests, ..., too), and
    vision_ops/kernels. Where there are no links (on Windows, without the right to make them) it stays a hook.
    """
    mapped = {f"{PACKAGE}.kernels": "kernels"}
    if "editable_wheel" not in sys.argv:
        return mapped
    folder = ROOT / ".editable"
    try:
        folder.mkdir(exist_ok=True)
        for link in (folder / PACKAGE, ROOT / PACKAGE / "kernels"):
            if not link.is_symlink():
                link.symlink_to(f"../{link.name}", target_is_directory=True)
    except OSError as error:
        print(f"vision_ops: installed with an import hook, which editors do not see: {error}", flush=True)
        return mapped
    return {"": folder.name}


setup(
    license="Apache-2.0",  # here, because no form of it in pyproject.toml suits both old and new setuptools
    ext_modules=[Extension(f"{PACKAGE}._{part}", []) for part, reason in why_not().items() if reason is None],
    cmdclass={"build": Build, "build_ext": BuildKernels},
    # Named one by one: nobody wants a top-level package called kernels.
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"], exclude=[f"{PACKAGE}.kernels"]), f"{PACKAGE}.kernels"],
    package_dir=package_dir(),
)
