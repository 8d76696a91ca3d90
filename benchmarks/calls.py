"""python -m benchmarks calls: what a call costs on tensors so small that nothing else counts, part by part."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import FunctionType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import MODES, machine
from benchmarks.cases import OPS
from benchmarks.measure import Rule, Step, Stopwatch, interleave
from benchmarks.problem import Op, Problem, Setting
from benchmarks.providers import make_step
from benchmarks.report import replace_file
from benchmarks.table import make_console, new_table
from vision_ops import _native, use_backend

# The functions of vision_ops whose time is a part, by name or by module; all C++ functions are "C++".
PARTS = {
    "checks": ("_checks",),
    "lists": ("_flat", "nested", "lengths", "tensors"),
    "layout": ("memory_format", "pixel_dense", "channels_dense", "to_channels_dense"),
    "output": (
        "allocate",
        "allocate_channels_last",
        "allocate_contiguous",
        "empty",
        "gradient_like",
        "workspace",
        "_output",
    ),
    "views": ("view", "channels_view", "tokens_view", "vectors_view", "matrix_view"),
    "products": ("_pointwise",),
}
COLUMNS = ("dispatch", *PARTS, "bindings", "kernel")
LEGEND = (
    "Microseconds of one call, backend fused, one image of few pixels, float32, channels_last, one thread; medians. "
    "Checks: of the arguments. Lists: tensors in and out of lists. Layout: finding and making it. Output: empty "
    "results, gradients and workspaces. Views: what C++ is told of tensors that it does not read itself. Products: "
    "PyTorch's GEMMs. Bindings: C++ calls on no images. Kernel: the rest of C++. Dispatch: all else, in training "
    "autograd, too."
)
CALLS, ROUNDS = 200, 40
SIDE = {"size": 4, "tokens": 16}


@dataclass(frozen=True)
class Account:
    """Microseconds of a call."""

    op: str
    shape: str
    mode: str
    fused: float
    eager: float
    parts: dict[str, float]


def run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.op or () if name not in OPS]
    if unknown:
        args.error(f"argument --op: {unknown[0]!r} is not one of {', '.join(OPS)}")
    torch.set_num_threads(args.threads)
    console = make_console()
    accounts = [account(OPS[name], mode) for mode in MODES for name in args.op or OPS]
    show(accounts, console)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        about = {"machine": machine.describe("cpu"), "versions": machine.versions(), "commit": machine.commit()}
        found = about | {"calls": [asdict(account) for account in accounts]}
        replace_file(args.out / "calls.json", lambda file: json.dump(found, file, indent=1))
    return 0


def tiny(op: Op, batch: int) -> tuple[str, Problem]:
    """The first case with few pixels."""
    shape = next(iter(op.cases.values()))
    assert is_dataclass(shape)
    shape = replace(shape, **{field.name: SIDE[field.name] for field in fields(shape) if field.name in SIDE})
    torch.manual_seed(0)
    return str(shape), op.build(shape, Setting("cpu", torch.float32, "channels_last", batch)).require_grad()


def account(op: Op, mode: str, calls: int = CALLS, rounds: int = ROUNDS) -> Account:
    shape, problem = tiny(op, 1)
    with use_backend("fused"):
        steps = {kind: _step(kind, op, problem, mode) for kind in ("fused", "eager")}
        stopwatch = Stopwatch("cpu")
        samplers = {kind: stopwatch.sampler(step) for kind, step in steps.items()}
        times = interleave(samplers, lambda times: [], Rule(0.0, rounds))
        fused, eager = (statistics.median(times[kind]) * 1e6 for kind in ("fused", "eager"))
        parts = part_times(steps["fused"], calls)
        bindings = _without_images(op, mode, calls)
    # Other clocks and other moments: a part may seem to take more than the whole.
    parts["dispatch"] = max(0.0, fused - sum(parts.values()))
    in_cpp = parts.pop("C++")
    parts["bindings"] = min(in_cpp, bindings)
    parts["kernel"] = in_cpp - parts["bindings"]
    return Account(op.name, shape, mode, fused, eager, {name: parts[name] for name in COLUMNS})


def _without_images(op: Op, mode: str, calls: int) -> float:
    """Microseconds in C++ of a call with nothing to compute; 0 where there must be something, as in batch norms."""
    try:
        return part_times(_step("fused", op, tiny(op, 0)[1], mode), calls)["C++"]
    except (RuntimeError, ValueError):
        return 0.0


def _step(kind: str, op: Op, problem: Problem, mode: str) -> Step:
    with torch.no_grad():
        grad = torch.ones_like(op.reference(*problem.args, **problem.options))
    return make_step(kind, op, problem, grad, mode)


class Clock:
    """Times functions within a call; what one of them calls is its own."""

    def __init__(self) -> None:
        self.start()
        self._inside = False

    def start(self) -> None:
        self.seconds = dict.fromkeys((*PARTS, "C++"), 0.0)
        self.calls = dict.fromkeys(self.seconds, 0)

    def own_seconds(self) -> float:
        """What it adds to every function."""
        nothing, found = self.timed("C++", lambda: None), []
        for _ in range(500):
            self.start()
            nothing()
            found.append(self.seconds["C++"])
        return statistics.median(found)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            if self._inside:
                return function(*args, **options)
            self._inside = True
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - start
                self.calls[part] += 1
                self._inside = False

        return run


class TimedModule:
    """The functions of the compiled module; one that calls Python again is not timed, what it calls is."""

    def __init__(self, module: Any, clock: Clock) -> None:
        self._module, self._clock = module, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if callable(found) and name != "with_crew":
            found = self._clock.timed("C++", found)
        setattr(self, name, found)
        return found


def part_times(step: Step, calls: int) -> dict[str, float]:
    """Microseconds of each part in one call, without what the clock itself takes."""
    clock = Clock()
    own = clock.own_seconds()
    found: dict[str, list[float]] = {}
    with instrumented(clock):
        step()
        for _ in range(calls):
            clock.start()
            step()
            for part, seconds in clock.seconds.items():
                found.setdefault(part, []).append(max(0.0, seconds - clock.calls[part] * own))
    return {part: statistics.median(seconds) * 1e6 for part, seconds in found.items()}


@contextmanager
def instrumented(clock: Clock) -> Iterator[None]:
    """With timed functions in the place of those of PARTS, wherever modules and classes of vision_ops name them."""
    replaced = []

    def put(owner: Any, name: str, value: Any) -> None:
        replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    timed = {function: clock.timed(part, function) for function, part in functions_of_parts().items()}
    for owner in owners():
        for name, value in list(vars(owner).items()):
            if isinstance(value, FunctionType) and value in timed:
                put(owner, name, timed[value])
    put(_native, "cpu", TimedModule(_native.cpu, clock))
    try:
        yield
    finally:
        for owner, name, value in replaced:
            setattr(owner, name, value)


def functions_of_parts() -> dict[FunctionType, str]:
    parts = {name: part for part, names in PARTS.items() for name in names}
    found = {}
    for owner in owners():
        for name, value in vars(owner).items():
            if isinstance(value, FunctionType):
                part = parts.get(name) or parts.get(value.__module__.rpartition(".")[2])
                if part:
                    found[value] = part
    return found


def owners() -> list[Any]:
    """Modules that ops are made of, and their classes."""
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("vision_ops.ops") or name == "vision_ops._native"
    ]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return modules + [kind for kind in classes if kind.__module__.startswith("vision_ops.ops")]


def show(accounts: Sequence[Account], console: Console) -> None:
    for mode in dict.fromkeys(account.mode for account in accounts):
        console.print(_table(mode, [account for account in accounts if account.mode == mode]), "", sep="\n")
    console.print(LEGEND)


def _table(mode: str, accounts: Sequence[Account]) -> Table:
    table = new_table({"forward": "forward", "train": "forward and backward"}[mode] + ", us", gap=1)
    table.add_column("op", no_wrap=True)
    for name in ("fused", "eager", *COLUMNS):
        table.add_column(name, justify="right")
    for account in accounts:
        values = [account.fused, account.eager, *(account.parts[name] for name in COLUMNS)]
        table.add_row(account.op, *(f"{value:.1f}" if value >= 0.05 else "" for value in values))
    return table
