"""python -m benchmarks ops: the fused ops, case by case."""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch._inductor import config as inductor

from benchmarks import machine, table
from benchmarks.cases import OPS, Op, Setting
from benchmarks.measure import Rule, Stopwatch
from benchmarks.providers import COMPILERS, PEERS
from benchmarks.race import Plan, Race
from benchmarks.report import Report

BATCH = {"cpu": 4, "cuda": 128}
DTYPE = {"cpu": ("float32",), "cuda": ("bfloat16",)}
SECONDS, QUICK_SECONDS = 60.0, 3.0


def run(args: argparse.Namespace) -> int:
    """The exit status: 1 where a case is wrong or failed."""
    _resolve(args)
    _prepare_torch(args)
    console = table.make_console()
    report = Report(
        device=args.device,
        machine=machine.describe(args.device),
        versions=machine.versions(),
        commit=machine.commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        arguments={name: value for name, value in vars(args).items() if name not in ("module", "error", "out")},
    )
    interrupted = False
    try:
        _measure(args, report, console)
    except KeyboardInterrupt:
        interrupted = True
    table.show(report, console)
    if args.out:
        _draw(report, args.out, console)
    return 130 if interrupted else 0 if report.all_ok else 1


def _resolve(args: argparse.Namespace) -> None:
    """Puts what the arguments leave open into them, so that the report tells what was run."""
    unknown = [name for name in args.op or () if name not in OPS]
    if unknown:
        args.error(f"argument --op: {unknown[0]!r} is not one of {', '.join(OPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        args.error("argument --device: this torch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.op = list(dict.fromkeys(args.op or OPS))
    if not any(_cases(args, name) for name in args.op):
        args.error(f"argument --case: no case of {', '.join(args.op)} begins with {' or '.join(args.case)}")
    args.dtype = args.dtype or DTYPE[args.device]
    args.batch = args.batch or BATCH[args.device]
    args.seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)


def _prepare_torch(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    if args.device == "cpu":
        # Worker processes that compile ahead would take the cores that are being timed.
        inductor.compile_threads = 1
    # A first call tells what compilation costs only where nothing is cached, which a quick run cannot wait for.
    inductor.force_disable_caches = not args.quick
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")


def _measure(args: argparse.Namespace, report: Report, console: Console) -> None:
    runs = [(dtype, OPS[name], case) for dtype in args.dtype for name in args.op for case in _cases(args, name)]
    stopwatch = Stopwatch(args.device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn only between measurements: a thread that redraws it would run into the times.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(runs))
        plans = {}
        for dtype, op, case in runs:

            def tell(stage: str, label: str = f"{op.name} {case} {dtype}") -> None:
                progress.update(bar, description=f"{label}: {stage}", refresh=True)

            if dtype not in plans:
                tell("rates of the machine")
                plans[dtype] = _plan(args, dtype, stopwatch)
                report.rates[dtype] = asdict(plans[dtype].rates)
            report.results += Race(op, case, _peers(op, args), plans[dtype]).run(tell)
            progress.advance(bar)
            if args.out:
                report.write(args.out)


def _plan(args: argparse.Namespace, dtype: str, stopwatch: Stopwatch) -> Plan:
    setting = Setting(args.device, getattr(torch, dtype), args.layout[0], args.batch)
    rates = machine.measure_rates(args.device, setting.dtype, stopwatch)
    return Plan(setting, args.layout, args.mode, Rule(args.seconds), stopwatch, rates)


def _cases(args: argparse.Namespace, name: str) -> Sequence[str]:
    op = OPS[name]
    wanted = tuple(args.case or ("",))
    return [case for case in (op.quick if args.quick else op.cases) if case.startswith(wanted)]


def _peers(op: Op, args: argparse.Namespace) -> Sequence[str]:
    peers = PEERS[args.device]
    if not args.quick:
        return [*peers, *op.others]
    return [peer for peer in peers if peer not in COMPILERS or op.compile_in_quick]


def _draw(report: Report, folder: Path, console: Console) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No PNG without matplotlib: pip install 'vision-ops[bench]'")
        return
    from benchmarks import chart

    chart.draw(report, folder)
