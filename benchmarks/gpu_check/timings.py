"""Parts that time: what is compiled and proved right first runs beside the others, what is timed alone."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import calibration, machine, small_calls
from benchmarks.cases import OPS, Setting
from benchmarks.costs import event_us, graph_us, host_us, kernels, latency_us, when_memory_allows
from benchmarks.gpu_check.checks import find_tool
from benchmarks.gpu_check.protocol import READY, Skip, command
from benchmarks.measure import Rule, Step, Stopwatch
from benchmarks.networks import NETWORKS, Contest, Scale, build, disagreement, forward_step, train_step
from benchmarks.providers import CUDNN, has_cudnn_depthwise, make_step
from benchmarks.race import Plan, Race
from benchmarks.report import CaseResult

MODES = ("train", "forward")
MARCHES = ("HorNet-T.2", "EdgeNeXt-S.4", "MogaNet-T.3 dw5")  # of dwconv: a forward and a weight gradient kernel each
NCU_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "InstructionStats", "SchedulerStats")
NCU_COLUMNS = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "fma_percent": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}


def prepare_cudnn() -> None:
    """What cuDNN finds fastest while others use the GPU is kept apart, by a flag, from what it will find alone."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def turn() -> Iterator[dict[str, Any]]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    yield READY
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False


def calibrate(scale: Scale) -> Iterator[dict[str, Any]]:
    """The constants of the roofline model."""
    yield from turn()
    bench = calibration.Bench(scale.device, scale.small)
    for name, measure in calibration.MEASUREMENTS.items():
        yield {"measured": name, **measure(bench)}
    yield {"constants": bench.constants}


def op_costs(scale: Scale, op: str, cases: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Training step and forward pass of an op and of eager PyTorch; the verdict before."""
    prepare_cudnn()
    steps: dict[tuple[str, str, str], Step] = {}
    for case in cases:
        try:
            problem = OPS[op].problem(case, Setting(scale.device, torch.bfloat16, "channels_last", scale.batch))
            wrong = when_memory_allows(lambda problem=problem: small_calls.call(OPS[op], problem))
            yield {"op": op, "case": case} | verdict(f"{op} {case}", wrong)
            with torch.no_grad():
                grad = torch.randn_like(OPS[op].reference(*problem.args, **problem.options))
            made = {
                (case, mode, kind): make_step(kind, OPS[op], problem, grad, mode)
                for mode in MODES
                for kind in ("fused", "eager")
            }
            for mode in MODES:
                made[case, mode, "fused"]()
            steps |= made
        except Exception as error:
            yield {"op": op, "case": case} | failure(f"{op} {case}", error)
    yield from turn()
    stopwatch = Stopwatch(scale.device)
    # The profiler and a capture that fails may leave something behind: what is least affected is measured first.
    for measure in (
        lambda step: {"event_us": event_us(step, stopwatch), "host_us": host_us(step, scale.device)},
        lambda step: kernels(step, scale.device, most=12),
        lambda step: graph_us(step, scale.device, lambda replayed: event_us(replayed, stopwatch)),
    ):
        for (case, mode, kind), step in list(steps.items()):
            name = {"op": op, "case": case, "mode": mode, "kind": kind}
            try:
                yield name | measure(step)
            except Exception as error:
                del steps[case, mode, kind]
                yield name | failure(f"{op} {case}, {mode} {kind}", error)


def verdict(name: str, wrong: str | None) -> dict[str, Any]:
    return {"verdict": "WRONG", "detail": f"{name}: {wrong}"} if wrong else {"verdict": "ok"}


def failure(name: str, error: Exception) -> dict[str, Any]:
    return {"verdict": "FAILED", "detail": f"{name}: {type(error).__name__}: {error}"[:500]}


def op_race(scale: Scale, op: str, case: str, peers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """An op against its peers in both layouts, with the verdict, right or wrong."""
    prepare_cudnn()
    setting = Setting(scale.device, torch.bfloat16, "contiguous", scale.batch)
    # How fast the machine is has to be known for the share of the floor, and can only be measured alone.
    rates = machine.Rates({1: float("inf")}, float("inf"))
    stopwatch = Stopwatch(scale.device)
    rule = Rule(seconds=0.0 if scale.small else 1.0, rounds=scale.rounds)
    plan = Plan(setting, ("channels_last", "contiguous"), MODES, rule, stopwatch, rates, time_wrong=True)
    known = [peer for peer in peers if peer != CUDNN or has_cudnn_depthwise()]
    race = when_memory_allows(lambda: prepared(Race(OPS[op], case, (*known, *OPS[op].others), plan)))
    yield from turn()
    if not scale.small:
        rates = machine.measure_rates(scale.device, torch.bfloat16, stopwatch)
    for result in race.time(lambda stage: None):
        yield raced(result, rates)


def prepared(race: Race) -> Race:
    for result in race.prepare(lambda stage: None):
        if (result.detail or "").startswith("OutOfMemoryError"):
            raise torch.OutOfMemoryError(result.detail)
    return race


def raced(result: CaseResult, rates: machine.Rates) -> dict[str, Any]:
    best = max(result.fused(), key=lambda fused: fused.all_layouts.ratio.median, default=None)
    found: dict[str, Any] = {
        "op": result.op,
        "case": result.case,
        "mode": result.mode,
        "verdict": result.status,
        "detail": result.detail and f"{result.op} {result.case}: {result.detail}",
        "slower": result.slower,
    }
    if best is not None:
        found |= {
            "layout": best.layout,
            "us": best.time_s.median * 1e6,
            "times_faster": asdict(best.all_layouts.ratio),
            "than": best.all_layouts.peer,
            "share_of_floor": rates.floor(result.min_bytes, result.flops) / best.time_s.median,
        }
    return {**found, "providers": [provider_facts(provider) for provider in result.providers]}


def provider_facts(provider: Any) -> dict[str, Any]:
    return {
        "name": provider.name,
        "us": provider.time_s and provider.time_s.median * 1e6,
        "peak_bytes": provider.peak_bytes,
        "saved_bytes": provider.saved_bytes,
        "first_call_s": provider.first_call_s,
        "error": provider.error,
    }


def network_costs(scale: Scale, network: str) -> Iterator[dict[str, Any]]:
    """A training step of a network, eager and fused, taken apart; its latency at batch 1; do the two agree?"""
    prepare_cudnn()
    # So few that the device never holds up the host, as it does once a thousand launches are waiting.
    few = scale.images(NETWORKS[network], batch=2)
    fused, eager = (build(NETWORKS[network], scale, kind) for kind in (True, False))
    yield {"network": network} | verdict(network, disagreement(fused, eager, few, scale))
    contest = Contest(network, ("fused", "eager"), scale)
    contest.prepare()
    contest.enter("train")
    on_few = {kind: train_step(net, few, scale) for kind, net in contest.nets.items()}
    for step in on_few.values():
        step()
    yield from turn()
    stopwatch = Stopwatch(scale.device)
    contest.enter("train")
    for kind in contest.kinds:
        step = contest.steps[kind]["train"]
        times = {"event_us": event_us(step, stopwatch, 5), "host_us": host_us(on_few[kind], scale.device)}
        yield {"network": network, "kind": kind, "mode": "train"} | times
    contest.enter("forward")
    for kind, net in contest.nets.items():
        step = forward_step(net, scale.images(NETWORKS[network], batch=1), scale)
        step()
        yield {"network": network, "kind": kind, "mode": "batch 1", "latency_us": latency_us(step, scale.device)}
    contest.enter("train")
    for kind in contest.kinds:
        found = kernels(contest.steps[kind]["train"], scale.device, most=40, calls=1)
        yield {"network": network, "kind": kind, "mode": "train"} | found


def network_race(scale: Scale, network: str, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Images per second of some kinds of a network, and of those that are not compiled the replay of a single image."""
    prepare_cudnn()
    contest = Contest(network, kinds, scale)
    contest.prepare()
    yield from turn()
    for mode in MODES:
        for kind, found in contest.time(mode).items():
            yield {"network": network, "kind": kind, "mode": mode} | found
    contest.enter("forward")
    for kind, net in contest.nets.items():
        if "compile" in kind:  # it would compile once more for this size
            continue
        step = forward_step(net, scale.images(NETWORKS[network], batch=1), scale)
        step()
        found = {"latency_us": latency_us(step, scale.device)}
        found |= graph_us(step, scale.device, lambda replayed: latency_us(replayed, scale.device))
        yield {"network": network, "kind": kind, "mode": "batch 1"} | found


def march_calls(scale: Scale) -> Iterator[dict[str, Any]]:
    """What ncu watches: a forward pass and a weight gradient of three depthwise convolutions."""
    for case in MARCHES:
        problem = OPS["dwconv"].problem(case, Setting(scale.device, torch.bfloat16, "channels_last", scale.batch))
        x, weight, bias = problem.args
        y = OPS["dwconv"].fused(x.detach(), weight, bias, **problem.options)
        torch.autograd.grad(y, weight, torch.randn_like(y))
        yield {"call": case}


def ncu(scale: Scale, log: str) -> Iterator[dict[str, Any]]:
    """Nsight Compute on the march kernels; the clocks are left as they are."""
    program = find_tool("ncu")
    if program is None:
        raise Skip("ncu is not installed")
    yield from turn()
    options = ["--clock-control", "none", "--kernel-name", "regex:march", "--launch-count", str(2 * len(MARCHES))]
    options += [word for section in NCU_SECTIONS for word in ("--section", section)]
    options += ["--metrics", ",".join(NCU_COLUMNS.values()), "--page", "raw", "--csv"]
    with Path(log).open("w") as file:
        words = [program, *options, *command("timings:march_calls", scale.small)]
        done = subprocess.run(
            words, cwd=machine.ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=os.environ
        )
    lines = Path(log).read_text(errors="replace").splitlines()
    table = [line for line in lines if line.startswith('"')]
    if not table:
        complaints = [line for line in lines if "==ERROR==" in line or "Error" in line] or lines[-1:]
        raise Skip(f"ncu did not attach: {(complaints or [f'exit status {done.returncode}'])[0][:200]}")
    for row in list(csv.DictReader(table))[1:]:  # the first row has the units
        name = row["Kernel Name"][:100]
        yield {"kernel": name, "grid": row.get("Grid Size")} | {k: row.get(column) for k, column in NCU_COLUMNS.items()}
