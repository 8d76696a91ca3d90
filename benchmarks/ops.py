"""python -m benchmarks ops: the fused ops, case by case."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch

from benchmarks import machine, table
from benchmarks.cases import OPS
from benchmarks.measure import Rule, Stopwatch
from benchmarks.other_tree import OtherTree
from benchmarks.problem import Op, Setting
from benchmarks.providers import COMPILERS, PEERS
from benchmarks.race import Plan, Race
from benchmarks.report import CaseResult, Report
from benchmarks.session import Job, Tell, draw, other_tree, prepare_torch, resolve_device, run_jobs, start_report

BATCH = {"cpu": 4, "cuda": 128}
DTYPE = {"cpu": ("float32",), "cuda": ("bfloat16",)}
SECONDS, SHORT_SECONDS = 60.0, 1.5


def run(args: argparse.Namespace) -> int:
    """The exit status: 1 where a case is wrong or failed."""
    _resolve(args)
    # A first call tells what compilation costs only where nothing is cached, which a short run cannot wait for.
    prepare_torch(args, fresh=not args.short)
    console = table.make_console()
    report = start_report("ops", args)
    with other_tree(args, "ops") as other:
        complete = run_jobs(list(_jobs(args, report, other)), report, args.out, console)
    table.show(report, console)
    if args.out:
        draw(report, args.out, console)
    return 130 if not complete else 0 if report.all_ok else 1


def _resolve(args: argparse.Namespace) -> None:
    """Puts what the arguments leave open into them, so that the report tells what was run."""
    unknown = [name for name in args.op or () if name not in OPS]
    if unknown:
        args.error(f"argument --op: {unknown[0]!r} is not one of {', '.join(OPS)}")
    resolve_device(args)
    args.short = not (args.full or args.op or args.case)
    args.op = list(dict.fromkeys(args.op or OPS))
    if not any(_cases(args, OPS[name]) for name in args.op):
        args.error(f"argument --case: no case of {', '.join(args.op)} begins with {' or '.join(args.case)}")
    args.dtype = args.dtype or DTYPE[args.device]
    args.batch = args.batch or BATCH[args.device]
    args.seconds = args.seconds or (SHORT_SECONDS if args.short else SECONDS)


def _jobs(args: argparse.Namespace, report: Report, other: OtherTree | None) -> Iterator[Job]:
    stopwatch = Stopwatch(args.device)
    plans: dict[str, Plan] = {}

    def run_case(dtype: str, op: Op, case: str, tell: Tell) -> list[CaseResult]:
        if dtype not in plans:
            tell("rates of the machine")
            plans[dtype] = _plan(args, dtype, stopwatch, other)
            report.rates[dtype] = asdict(plans[dtype].rates)
        if other is not None:
            other.forget()
        return Race(op, case, _peers(op, args), plans[dtype]).run(tell)

    for dtype in args.dtype:
        for op in (OPS[name] for name in args.op):
            for case in _cases(args, op):
                kinds = ("fused", *_peers(op, args))
                yield Job(op.name, case, dtype, args.batch, args.mode, kinds, partial(run_case, dtype, op, case))


def _plan(args: argparse.Namespace, dtype: str, stopwatch: Stopwatch, other: OtherTree | None) -> Plan:
    setting = Setting(args.device, getattr(torch, dtype), args.layout[0], args.batch)
    rates = machine.measure_rates(args.device, setting.dtype, stopwatch)
    return Plan(setting, args.layout, args.mode, Rule(args.seconds), stopwatch, rates, other=other)


def _cases(args: argparse.Namespace, op: Op) -> Sequence[str]:
    if args.short:
        return op.quick[:1]
    return [case for case in op.cases if case.startswith(tuple(args.case or ("",)))]


def _peers(op: Op, args: argparse.Namespace) -> Sequence[str]:
    peers = PEERS[args.device]
    if not args.short:
        return [*peers, *op.others]
    return [peer for peer in peers if peer not in COMPILERS or op.compile_in_short]
