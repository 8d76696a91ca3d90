"""One case: build it, prove the fused op right, then time it against its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import Rates
from benchmarks.measure import (
    Ratio,
    Rule,
    Step,
    Stopwatch,
    Times,
    first_call,
    interleave,
    peak_bytes,
    saved_bytes,
)
from benchmarks.other_tree import OtherTree
from benchmarks.problem import Op, Setting
from benchmarks.providers import BEFORE, COMPILERS, Provider, line_up, make_step
from benchmarks.report import CaseResult, ProviderResult
from benchmarks.verify import complaints


@dataclass(frozen=True)
class Plan:
    """What holds for all cases of a run. time_wrong: a wrong op is timed all the same, and stays "WRONG". other: the
    fused op of another tree is timed, too."""

    setting: Setting
    layouts: Sequence[str]
    modes: Sequence[str]
    rule: Rule
    stopwatch: Stopwatch
    rates: Rates
    time_wrong: bool = False
    other: OtherTree | None = None


class Race:
    def __init__(self, op: Op, case: str, peers: Sequence[str], plan: Plan) -> None:
        # Pixels whose channels are apart are a layout that no network has.
        plan = replace(plan, layouts=("channels_last",)) if op.pixels else plan
        self.op, self.case, self.plan = op, case, plan
        self.fused, self.peers = line_up(("fused",), plan.layouts), line_up(peers, plan.layouts)
        self.problems = {layout: op.problem(case, replace(plan.setting, layout=layout)) for layout in plan.layouts}
        self.grad_outputs = self._make_grad_outputs()

        self._results = [self._blank_result(mode) for mode in plan.modes]
        self._unfinished: list[CaseResult] = []
        self._steps: dict[str, dict[str, Step]] = {}
        self._elsewhere: dict[str, dict[str, Callable[[], float]]] = {}

    def run(self, tell: Callable[[str], None]) -> list[CaseResult]:
        """A result for every mode. `tell` hears what the race is at."""
        self.prepare(tell)
        return self.time(tell)

    def prepare(self, tell: Callable[[str], None]) -> list[CaseResult]:
        """The verdict and all first calls, which compile: another process may use the device meanwhile."""
        torch._dynamo.reset()
        results = self._results
        try:
            tell("checking")
            for result in results:
                self._explain(result)
            self._steps = {result.mode: self._first_calls(result, self.fused) for result in results}
            wrong = self._wrong()
            if wrong:
                spoil(results, "WRONG", "; ".join(wrong))
                if not self.plan.time_wrong:
                    return results
            for result in results:
                tell(f"{result.mode}, first calls")
                self._steps[result.mode].update(self._first_calls(result, self.peers))
            self._elsewhere = {result.mode: self._in_other_tree(result) for result in results}
        except Exception as error:
            spoil(results, "FAILED", one_line(error))
        else:
            self._unfinished = list(results)
        return results

    def time(self, tell: Callable[[str], None]) -> list[CaseResult]:
        """The results; only after `prepare`."""
        while self._unfinished:
            result = self._unfinished[0]
            tell(f"{result.mode}, timing")
            try:
                self._time(result, self._steps.pop(result.mode))
            except Exception as error:
                # One case that cannot run is no reason to lose the others; the exit status tells.
                spoil(self._unfinished, "FAILED", one_line(error))
                break
            self._unfinished.pop(0)
        return self._results

    def _make_grad_outputs(self) -> dict[str, Tensor]:
        """The same values for every layout, as the output lies in memory there."""
        outputs = {}
        for layout, problem in self.problems.items():
            with torch.no_grad():
                outputs[layout] = self.op.reference(*problem.args, **problem.options)
        values = torch.randn_like(outputs[self.plan.layouts[0]])
        return {layout: torch.empty_like(output).copy_(values) for layout, output in outputs.items()}

    def _blank_result(self, mode: str) -> CaseResult:
        layout = self.plan.layouts[0]
        problem = self.problems[layout]
        inputs, output = sum(tensor.nbytes for tensor in problem.inputs), self.grad_outputs[layout].nbytes
        moved, flops = inputs + output, problem.flops
        if mode == "train":
            # The backward pass reads the inputs and the output's gradient and writes the inputs' gradients, and every
            # product of the forward pass comes back in two.
            moved, flops = moved + 2 * inputs + output, 3 * flops
        return CaseResult(
            op=self.op.name,
            case=self.case,
            shape=str(self.op.cases[self.case]),
            dtype=str(self.plan.setting.dtype).removeprefix("torch."),
            batch=self.plan.setting.batch,
            mode=mode,
            flops=flops,
            min_bytes=moved,
            floor_s=self.plan.rates.floor(moved, flops),
        )

    def _explain(self, result: CaseResult) -> None:
        """What runs. That PyTorch runs because it is faster is told; that it runs for want of a kernel is a failure."""
        texts = []
        for layout, problem in self.problems.items():
            with torch.set_grad_enabled(result.mode == "train"):
                explanation = self.op.explain(problem)
            if explanation.cannot:
                raise RuntimeError(f"no kernel: {'; '.join(explanation.cannot)}")
            texts.append(f"{layout}: {explanation}")
            result.slower += [f"{layout}: {reason}" for reason in explanation.slower]
        result.explain = "\n".join(texts)

    def _first_calls(self, result: CaseResult, providers: Sequence[Provider]) -> dict[str, Step]:
        """Every provider's step, called once; without the compiled ones that do not compile here."""
        steps = {}
        for provider in providers:
            layout = provider.layout
            entry = ProviderResult(provider.kind, layout)
            result.providers.append(entry)
            step = make_step(provider.kind, self.op, self.problems[layout], self.grad_outputs[layout], result.mode)
            try:
                entry.first_call_s = first_call(step, self.plan.setting.device)
            except Exception as error:
                if provider.kind not in COMPILERS:
                    raise
                entry.error = one_line(error)
            else:
                steps[provider.name] = step
        return steps

    def _in_other_tree(self, result: CaseResult) -> dict[str, Callable[[], float]]:
        about = {name: getattr(result, name) for name in ("op", "case", "dtype", "batch", "mode")}
        return samplers_elsewhere(self.plan.other, result, self.plan.layouts, **about)

    def _wrong(self) -> list[str]:
        """What the fused op gets wrong, in any layout; its gradients too where only the forward pass is timed."""
        layout = self.plan.layouts[0]
        doubles = self.problems[layout].to(torch.float64)
        exact = make_step("eager", self.op, doubles, self.grad_outputs[layout].double(), "train")()
        found = []
        for layout, problem in self.problems.items():
            fused, eager = (
                make_step(kind, self.op, problem, self.grad_outputs[layout], "train")() for kind in ("fused", "eager")
            )
            found += [f"{layout}, {complaint}" for complaint in complaints(fused, eager, exact)]
        return found

    def _time(self, result: CaseResult, steps: dict[str, Step]) -> None:
        samplers = {name: self.plan.stopwatch.sampler(step) for name, step in steps.items()}
        samplers |= self._elsewhere.get(result.mode, {})
        times = interleave(
            samplers, lambda times: list(ratios_of(times, self.fused, self.peers).values()), self.plan.rule
        )
        ratios = ratios_of(times, self.fused, self.peers)
        result.settled = self.plan.rule.settled(list(ratios.values()))
        for entry in result.providers:
            if entry.name not in times:
                continue
            result.rounds = len(times[entry.name])
            entry.take(times[entry.name], ratios)
            step = steps.get(entry.name)
            if step is not None:
                entry.peak_bytes = peak_bytes(step, self.plan.setting.device)
                entry.saved_bytes = saved_bytes(step) if result.mode == "train" else None


def samplers_elsewhere(
    other: OtherTree | None, result: CaseResult, layouts: Sequence[str], **about: Any
) -> dict[str, Callable[[], float]]:
    """Of the same in the other tree, if there is one; they become providers of the result."""
    if other is None:
        return {}
    samplers = {}
    for layout in layouts:
        entry = ProviderResult(BEFORE, layout)
        result.providers.append(entry)
        try:
            samplers[entry.name] = other.sampler(layout=layout, **about)
        except RuntimeError as error:
            entry.error = one_line(error)
    return samplers


def ratios_of(times: Times, ours: Sequence[Provider], others: Sequence[Provider]) -> dict[tuple[str, str], Ratio]:
    """By one of ours in a layout and the peers it is held against; those of the other tree are no peers."""
    peers = [peer for peer in others if peer.name in times]
    ratios = {}
    for provider in ours:
        rivals = {"same_layout": [peer for peer in peers if peer.layout == provider.layout], "all_layouts": peers}
        if provider.kind == "fused":
            rivals["before"] = [Provider(BEFORE, provider.layout)]
        for against, those in rivals.items():
            names = [peer.name for peer in those if peer.name in times]
            if provider.name in times and names:
                ratios[provider.name, against] = Ratio.of(times, provider.name, names)
    return ratios


def spoil(results: list[CaseResult], status: str, detail: str) -> None:
    for result in results:
        if result.status == "ok":
            result.status, result.detail = status, detail


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
