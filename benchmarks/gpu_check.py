"""python -m benchmarks gpu-check: all that only a GPU can tell, most valuable first, within a budget of seconds.

The machine may be taken away at any moment: results are written after every step, and a step that may crash or hang
runs in a process of its own. Files: gpu-check.json (all steps), constants.json (for the roofline), ops.json and ops.csv
(ours against PyTorch), tests.xml and tests.txt, sanitizer.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import vision_ops
from benchmarks import calibration, machine, networks
from benchmarks.cases import OPS, Setting, ops_for
from benchmarks.measure import Rule, Stopwatch
from benchmarks.race import Plan, Race
from benchmarks.report import Report, replace_file

NO_GPU = 3
SANITIZERS = ("racecheck", "memcheck")
# The stages of the networks that most depend on our kernels; the other cases follow while there is time.
FIRST_CASES = (
    *(("multi_order_dwconv", f"MogaNet-{stage}") for stage in ("S.1", "S.2", "S.3", "S.4", "T.3", "T.4")),
    *(("dwconv", f"HorNet-T.{stage}") for stage in (1, 2)),
    *(("dwconv", case) for case in ("EdgeNeXt-S.4", "MOAT-0.2 entry", "MogaNet-S.1 ffn gelu")),
    *(("layer_norm_2d", f"HorNet-T.{stage}") for stage in (1, 4)),
    *(("gnconv", f"HorNet-T.{stage}") for stage in (1, 2, 3, 4)),
    *(("global_filter", f"HorNet-T.{stage}") for stage in (3, 4)),
    *(("channel_aggregation_ffn", f"MogaNet-S.{stage}") for stage in (1, 2, 3, 4)),
    *(("moga_aggregation", f"MogaNet-S.{stage}") for stage in (1, 2, 3, 4)),
)


@dataclass
class StepResult:
    """`status` is "ok", "FAILED" or "skipped"; `detail` says why."""

    section: str
    name: str
    status: str = "ok"
    seconds: float = 0.0
    detail: str | None = None
    result: Any = None


class Skip(Exception):
    """Raised by a step that cannot run here, with the reason."""


@dataclass(frozen=True)
class Step:
    """run(seconds left) returns what is kept; it raises where something is wrong.

    until: the share of the budget after which it does not start and at which it is to end.
    """

    section: str
    name: str
    run: Callable[[float], Any]
    until: float = 1.0


@dataclass
class Check:
    folder: Path
    budget: float
    facts: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter
    results: list[StepResult] = field(default_factory=list)

    def run(self, steps: Sequence[Step]) -> int:
        """The exit status: 1 where a step failed."""
        start = self.clock()
        for step in steps:
            began = self.clock()
            left = self.budget * step.until - (began - start)
            result = StepResult(step.section, step.name)
            if left <= 0:
                result.status, result.detail = "skipped", "the time for it was over"
            else:
                self._run_step(step, result, left)
            result.seconds = round(self.clock() - began, 3)
            self.results.append(result)
            self.write()
            detail = f": {result.detail}" if result.detail else ""
            print(f"[{began - start:5.0f} s] {step.section}, {step.name}: {result.status}{detail}", flush=True)
        return int(any(result.status == "FAILED" for result in self.results))

    def _run_step(self, step: Step, result: StepResult, left: float) -> None:
        try:
            result.result = step.run(left)
        except Skip as reason:
            result.status, result.detail = "skipped", str(reason)
        except Exception as error:
            # One step that fails is no reason to lose the others.
            result.status, result.detail = "FAILED", f"{type(error).__name__}: {error}"[:2000]

    def write(self) -> None:
        write_json(self.folder / "gpu-check.json", {**self.facts, "steps": [asdict(r) for r in self.results]})


def write_json(path: Path, data: Any) -> None:
    replace_file(path, lambda file: json.dump(data, file, indent=1))


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and this torch sees none.", file=sys.stderr)
        return NO_GPU
    torch.backends.cudnn.benchmark = True
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe("cuda"),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "budget": args.budget,
        "only": args.only,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    return Check(args.out, args.budget, facts=facts).run(chosen(all_steps(args.out, "cuda"), args.only))


def chosen(steps: Iterable[Step], only: str | None) -> list[Step]:
    """The steps of one section have the whole budget."""
    return [replace(step, until=1.0) if only else step for step in steps if only in (None, step.section)]


def all_steps(folder: Path, device: str) -> Iterator[Step]:
    """By value: what is wrong with the kernels, how fast they are, and last torch.compile, which takes the longest."""
    races = Races(folder, device)
    yield from build_steps(device, until=0.2)
    yield Step("test", "pytest -m gpu", lambda left: run_tests(folder, left), until=0.45)
    yield from races.steps(races.first, ("eager",), until=0.65)
    yield from calibration_steps(folder, device, until=0.72)
    for tool in SANITIZERS:
        yield Step("sanitize", tool, lambda left, tool=tool: sanitize(folder, tool, left), until=0.82)
    yield from network_steps(device, compiled=False, until=0.9)
    yield from races.steps(races.rest, ("eager",), until=0.92)
    yield from races.steps(races.first, ("eager", "compile"))
    yield from network_steps(device, compiled=True)


# --- build: what is there, and one call of every kernel


def build_steps(device: str, until: float) -> Iterator[Step]:
    yield Step("build", "import and build info", lambda left: build_info(device), until)
    for name in ops_for(device, OPS):
        yield Step("build", f"calls of {name}", lambda left, name=name: small_calls(name, device, left), until)


def build_info(device: str) -> dict[str, Any]:
    explained = {}
    for op in ops_for(device, OPS).values():
        problem = op.problem(op.quick[0], Setting(device, torch.float32, "channels_last", 2))
        found = vision_ops.explain(op.name, *problem.args, **problem.options)
        explained[op.name] = str(found)
        if found.cannot:
            raise RuntimeError(f"{op.name} has no kernel: {'; '.join(found.cannot)}")
    return explained


def small_calls(op: str, device: str, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward in every dtype and layout against float64, in a process that may crash."""
    command = [sys.executable, "-m", "benchmarks.small_calls", "--device", device, "--op", op]
    done = run_limited(command, seconds)
    calls = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    wrong = [f"{call['call']}: {call['wrong']}" for call in calls if call["wrong"]]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    if done.code != 0:
        raise RuntimeError(f"{done.why}, after {len(calls)} good calls: {done.output[-1500:]}")
    return calls


# --- processes of their own


@dataclass(frozen=True)
class Finished:
    code: int
    output: str
    timed_out: bool

    @property
    def why(self) -> str:
        return "out of time" if self.timed_out else f"exit status {self.code}"


def run_limited(command: Sequence[str], seconds: float, log: Path | None = None) -> Finished:
    """Interrupted when the time is over, as by Ctrl-C, so that it can still write its results; then killed."""
    path = log or Path(os.devnull)
    with path.open("w") as copy:
        process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            stdout=copy if log else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        timed_out, output = False, ""
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            output = _stop(process)
        except KeyboardInterrupt:
            _stop(process)
            raise
    return Finished(process.returncode, path.read_text() if log else output or "", timed_out)


def _stop(process: subprocess.Popen) -> str:
    for sign, grace in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
            return process.communicate(timeout=grace)[0] or ""
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    return process.communicate()[0] or ""


def run_tests(folder: Path, seconds: float, select: Sequence[str] = ("-m", "gpu")) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    junit = folder / "tests.xml"
    # A test file that lacks a package is an error of its own and does not keep the others from running.
    options = ["-v", "--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command = [sys.executable, "-m", "pytest", *options, *select]
    done = run_limited(command, max(1.0, seconds - 12), folder / "tests.txt")
    last = done.output.strip().splitlines()[-1:] or [""]
    if done.code != 0 or done.timed_out:
        raise RuntimeError(f"{done.why}: {last[0]}; see tests.txt")
    return {"summary": last[0]}


def sanitize(folder: Path, tool: str, seconds: float) -> dict[str, Any]:
    """compute-sanitizer over our kernels alone: it slows every kernel down a hundredfold."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        raise Skip("compute-sanitizer is not installed")
    calls = [sys.executable, "-m", "benchmarks.small_calls", "--device", "cuda", "--bare"]
    # Of the seconds left, racecheck leaves memcheck its half.
    limit = seconds / (len(SANITIZERS) - SANITIZERS.index(tool))
    done = run_limited([program, "--tool", tool, "--error-exitcode", "86", *calls], limit)
    with (folder / "sanitizer.txt").open("w" if tool == SANITIZERS[0] else "a") as file:
        file.write(f"{tool}: {done.why}\n{done.output[-20_000:]}\n")
    if done.timed_out:
        raise Skip(f"out of time after {done.output.count('{')} calls; see sanitizer.txt")
    if done.code != 0:
        raise RuntimeError(f"{done.why}; see sanitizer.txt")
    return {"calls": done.output.count('"call"')}


# --- ours against PyTorch


class Races:
    """Every op at the networks' stage shapes in bfloat16; a case that is run again replaces its first results."""

    def __init__(self, folder: Path, device: str, batch: int = 128, seconds: float = 1.0) -> None:
        self._folder, self._device, self._seconds = folder, device, seconds
        self._setting = Setting(device, torch.bfloat16, "contiguous", batch)
        self._plan: Plan | None = None
        self._report = Report(
            device=device,
            machine={},
            versions=machine.versions(),
            commit=machine.commit(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            arguments={"batch": batch, "dtype": ("bfloat16",)},
        )

        self.first = [(op, case) for op, case in FIRST_CASES if op in OPS and case in OPS[op].cases]
        known = [(name, case) for name, op in ops_for(device, OPS).items() for case in op.cases]
        self.rest = [pair for pair in known if pair not in self.first]

    def steps(self, cases: Sequence[tuple[str, str]], peers: Sequence[str], until: float = 1.0) -> Iterator[Step]:
        for op, case in cases:
            name = f"{op} {case} against {' and '.join(peers)}"
            yield Step("ops", name, lambda left, a=(op, case, peers): self.race(*a), until)

    def race(self, op: str, case: str, peers: Sequence[str]) -> dict[str, Any]:
        report = self._report
        if self._plan is None:
            report.machine = machine.describe(self._device)
            stopwatch = Stopwatch(self._device)
            rates = machine.measure_rates(self._device, torch.bfloat16, stopwatch)
            report.rates["bfloat16"] = asdict(rates)
            layouts, modes = ("contiguous", "channels_last"), ("forward", "train")
            self._plan = Plan(self._setting, layouts, modes, Rule(self._seconds), stopwatch, rates)
        results = Race(OPS[op], case, (*peers, *OPS[op].others), self._plan).run(lambda stage: None)
        report.results = [r for r in report.results if (r.op, r.case) != (OPS[op].name, case)] + results
        report.write(self._folder)
        bad = [f"{result.mode}: {result.status}, {result.detail}" for result in results if result.status != "ok"]
        if bad:
            raise RuntimeError("; ".join(bad))
        return {
            f"{result.mode} {fused.layout}": {
                "us": round(fused.time_s.median * 1e6, 1),
                "share of the floor": round(result.floor_s / fused.time_s.median, 3),
                "times faster than the best": round(fused.all_layouts.ratio.median, 3),
                "which is": fused.all_layouts.peer,
            }
            for result in results
            for fused in result.fused()
        }


def calibration_steps(folder: Path, device: str, until: float) -> Iterator[Step]:
    """The constants of the roofline model, which were assumed before there was a GPU to measure them on."""
    bench = calibration.Bench(device)
    for name, measure in calibration.MEASUREMENTS.items():

        def step(left: float, measure: Callable[[calibration.Bench], dict[str, Any]] = measure) -> dict[str, Any]:
            found = measure(bench)
            write_json(folder / "constants.json", {"constants": bench.constants, "measured": bench.measured})
            return found

        yield Step("ops", name, step, until)


def network_steps(device: str, compiled: bool, until: float = 1.0) -> Iterator[Step]:
    scale = networks.Scale(device)
    for network in networks.NETWORKS:
        name = f"{network} against {'torch.compile' if compiled else 'eager'}"
        yield Step("models", name, lambda left, network=network: networks.compare(network, compiled, scale), until)
    if compiled:
        for network in networks.NETWORKS:
            name = f"kernels of a compiled block of {network}"
            yield Step("models", name, lambda left, network=network: networks.block_kernels(network, scale), until)
