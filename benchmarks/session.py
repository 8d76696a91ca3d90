"""A run of many cases: progress with the time left, files after every case, and what an earlier run has left to do."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch._inductor import config as inductor

from benchmarks import machine
from benchmarks.other_tree import OtherTree
from benchmarks.report import CaseResult, Report

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A case in some modes. `run` tells what it is at, and returns a result for each mode."""

    op: str
    case: str
    dtype: str
    batch: int
    modes: Sequence[str]
    kinds: Sequence[str]  # of providers
    run: Callable[[Tell], list[CaseResult]]

    def done_in(self, results: Sequence[CaseResult]) -> bool:
        return {result.mode for result in results if self.is_result(result)} >= set(self.modes)

    def is_result(self, result: CaseResult) -> bool:
        same = (result.op, result.case, result.dtype, result.batch) == (self.op, self.case, self.dtype, self.batch)
        return same and {provider.kind for provider in result.providers} >= set(self.kinds)


def start_report(name: str, args: argparse.Namespace) -> Report:
    """With what is known from an earlier run, if the run is a full one."""
    report = Report(
        name=name,
        device=args.device,
        machine=machine.describe(args.device),
        versions=machine.versions(),
        commit=machine.commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        arguments={name: value for name, value in vars(args).items() if name not in ("module", "error", "out")}
        | {"against": args.against and str(args.against)},
    )
    if args.full and args.out and not args.against:
        report.resume(args.out)
    return report


def run_jobs(jobs: Sequence[Job], report: Report, out: Path | None, console: Console) -> bool:
    """Whether it came to the end, which Ctrl-C can prevent."""
    left = [job for job in jobs if not job.done_in(report.results)]
    if len(left) < len(jobs):
        console.print(f"{len(jobs) - len(left)} of {len(jobs)} cases are in {out}, from this commit and machine.")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    # Drawn only between measurements: a thread that redraws it would run into the times.
    bar = Progress(
        TextColumn("{task.description}"),
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        speed_estimate_period=float("inf"),
    )
    with bar as progress:
        task = progress.add_task("", total=len(left))
        try:
            for job in left:

                def tell(stage: str, label: str = f"{job.op} {job.case} {job.dtype} batch {job.batch}") -> None:
                    progress.update(task, description=f"{label}: {stage}", refresh=True)

                found = job.run(tell)
                report.results = [result for result in report.results if not job.is_result(result)] + found
                progress.advance(task)
                if out:
                    report.write(out)
        except KeyboardInterrupt:
            return False
    return True


@contextlib.contextmanager
def other_tree(args: argparse.Namespace, what: str) -> Iterator[OtherTree | None]:
    """That of --against."""
    if args.against is None:
        yield None
        return
    if not (args.against / "vision_ops").is_dir():
        args.error(f"argument --against: {args.against} is no checkout of this repository")
    tree = OtherTree(args.against, what, args.device, args.threads)
    try:
        yield tree
    finally:
        tree.close()


def draw(report: Report, folder: Path, console: Console) -> None:
    if not has_matplotlib(console):
        return
    from benchmarks import chart

    chart.draw(report, folder)


def has_matplotlib(console: Console) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No PNG without matplotlib: pip install 'vision-ops[bench]'")
        return False
    return True


def resolve_device(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        args.error("argument --device: this torch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"


def prepare_torch(args: argparse.Namespace, fresh: bool) -> None:
    """fresh: nothing that was compiled before is taken from a cache."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    if args.device == "cpu":
        # Worker processes that compile ahead would take the cores that are being timed.
        inductor.compile_threads = 1
    inductor.force_disable_caches = fresh
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
