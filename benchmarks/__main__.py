"""The command line. Nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import DTYPES, LAYOUTS, MODES, RUNS

FULL = "all cases; those that an earlier run of this commit on this machine left in --out are not run again"
REQUIRED = {"torch": "torch", "vision_ops": "-e .", "rich": "'vision-ops[bench]'"}


def words(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(text.split(",")))
        for word in chosen:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(allowed)}")
        return chosen

    return parse


def positive(number: type[int] | type[float]) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = number(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive {number.__name__}")
        return value

    return parse


def whole(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(int)(word) for word in text.split(",")))


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--layout", type=words(LAYOUTS), metavar="L,L", default=LAYOUTS)
    parser.add_argument("--mode", type=words(MODES), metavar="M,M", default=MODES)
    parser.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout, built: is this one faster?")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the JSON, CSV and PNG go; default: nowhere")
    parser.set_defaults(error=parser.error)


def add_ops(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ops",
        help="every fused op at the networks' stage shapes",
        description="Without --op, --case and --full one case of every op, against eager; some against torch.compile.",
    )
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops, all their cases")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only the cases that begin so, such as HorNet-T")
    parser.add_argument("--full", action="store_true", help=FULL)
    parser.add_argument("--dtype", type=words(DTYPES), metavar="D,D", help="default: float32, on a GPU bfloat16")
    parser.add_argument("--batch", type=positive(int), metavar="N", help="default: 4, on a GPU 128")
    seconds = "longest time on one case and mode, past the rounds a ratio needs; default: 60, of the short run 1.5"
    parser.add_argument("--seconds", type=positive(float), metavar="S", help=seconds)
    add_common(parser)
    parser.set_defaults(module="benchmarks.ops")


def add_networks(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "networks",
        help="whole networks, forward and in training",
        description="Without --network and --full one network of each kind at one batch size, float32.",
    )
    names = "only those whose name or variant begins so, such as HorNet-T or hornet_tiny, or any variant"
    parser.add_argument("--network", nargs="+", metavar="NAME", help=names)
    parser.add_argument("--full", action="store_true", help=FULL)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference and of ours, too")
    parser.add_argument("--loss", action="store_true", help="50 training steps, ours over the reference, two seeds")
    dtype = "bfloat16 is autocast; default: float32, and bfloat16 where the processor multiplies it; on a GPU bfloat16"
    parser.add_argument("--dtype", type=words(DTYPES), metavar="D,D", help=dtype)
    parser.add_argument("--batch", type=whole, metavar="N,N", help="default: 1,4, on a GPU 1,32,128")
    seconds = "longest time on one network and mode, past 7 rounds; default: 30, of the short run 0"
    parser.add_argument("--seconds", type=positive(float), metavar="S", help=seconds)
    add_common(parser)
    parser.set_defaults(module="benchmarks.network_runs")


def add_calls(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("calls", help="what a call costs on tiny tensors, part by part")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where calls.json goes; default: nowhere")
    parser.set_defaults(module="benchmarks.calls", error=parser.error, threads=1)


def add_gpu_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("gpu-check", help="all that only a GPU can tell, in two runs of minutes")
    parser.add_argument("--run", choices=RUNS, required=True, help="what is wrong and where time goes; how fast it is")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the results go, after every part")
    parser.add_argument("--budget", type=positive(float), metavar="SECONDS", help="default: 240, of a rehearsal 900")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small networks and batches")
    parser.set_defaults(module="benchmarks.gpu_check.main", error=parser.error, threads=None)


def add_ledger(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("ledger", help="what a GPU would launch, move and multiply, counted without one")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops, of both kinds by default all")
    parser.add_argument("--network", nargs="+", metavar="NAME", help="only these networks, such as HorNet-T")
    parser.add_argument("--launches", action="store_true", help="instead of the totals every kernel of ours")
    parser.add_argument("--write", action="store_true", help="benchmarks/results/ledger.json and .md anew")
    parser.set_defaults(module="benchmarks.ledger.main", error=parser.error, threads=None)


def prepare_environment(threads: int | None) -> None:
    """What OpenMP and the profiler read once, when torch is loaded."""
    # Threads that spin after their work is done take the processor from the next provider's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # They know our ops by names and schemas, not by what they save: another commit may have left its graphs there.
    for cache in ("AUTOGRAD", "FX_GRAPH"):
        os.environ.setdefault(f"TORCHINDUCTOR_{cache}_CACHE", "0")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Tells glibc to hold on to memory that tensors free.

    By default it returns the top of the heap to the system, and whichever provider allocates next pays for fresh pages:
    up to several times its own time, and always the same one while the pattern of calls repeats.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_* of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 25)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add_ops(commands)
    add_networks(commands)
    add_calls(commands)
    add_gpu_check(commands)
    add_ledger(commands)
    args = parser.parse_args(argv)
    for name, package in REQUIRED.items():
        if importlib.util.find_spec(name) is None:
            parser.exit(2, f"{name} is not installed: pip install {package}\n")
    prepare_environment(args.threads)
    return importlib.import_module(args.module).run(args)


if __name__ == "__main__":
    sys.exit(main())
