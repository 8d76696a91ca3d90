"""Interleaved timing: how a ratio is measured, and when it is known well enough."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

# One call of one provider; what it returns is alive until the call is over.
Step = Callable[[], object]
Times = dict[str, list[float]]

SAMPLE_SECONDS = 1e-3
LONG_SECONDS = 0.1  # of a step that needs no more than one call to warm up
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Quartiles:
    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    @property
    def spread(self) -> float:
        return max(self.q3 - self.median, self.median - self.q1) / self.median


@dataclass(frozen=True)
class Ratio:
    """How many times longer the best peer took than the fused op, paired round by round."""

    peer: str
    ratio: Quartiles

    @classmethod
    def of(cls, times: Times, fused: str, peers: Sequence[str]) -> Ratio:
        best = min(peers, key=lambda peer: statistics.median(times[peer]))
        return cls(best, Quartiles.of([peer / own for peer, own in zip(times[best], times[fused], strict=True)]))


@dataclass(frozen=True)
class Rule:
    """When to stop: after `rounds`, once the quartiles of every ratio lie within `spread` or `seconds` are over."""

    seconds: float
    rounds: int = 20
    spread: float = 0.05

    def settled(self, ratios: Sequence[Ratio]) -> bool:
        return all(ratio.ratio.spread <= self.spread for ratio in ratios)


def interleave(
    samplers: Mapping[str, Callable[[], float]],
    compare: Callable[[Times], Sequence[Ratio]],
    rule: Rule,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Rounds in which every sampler runs once, each round starting with another one."""
    times: Times = {name: [] for name in samplers}
    order = list(samplers)
    end = clock() + rule.seconds
    done, check = 0, rule.rounds
    while True:
        for name in order:
            times[name].append(samplers[name]())
        order.append(order.pop(0))
        done += 1
        if done < rule.rounds:
            continue
        if clock() >= end:
            return times
        if done >= check:
            if rule.settled(compare(times)):
                return times
            # Sorting all rounds after every round would in time cost more than the rounds.
            check = math.ceil(done * 1.2)


class Stopwatch:
    """Seconds of one call, as the mean over `repeats` calls in a row."""

    def __init__(self, device: str) -> None:
        self._seconds = self._on_cuda if device == "cuda" else self._on_cpu
        self._flush: torch.Tensor | None = None

    def seconds(self, step: Step, repeats: int = 1) -> float:
        return self._seconds(step, repeats)

    def sampler(self, step: Step) -> Callable[[], float]:
        """Warms the step up, and repeats it so often that a sample outlasts the clock's noise."""
        fastest = self.seconds(step)
        if fastest < LONG_SECONDS:
            fastest = min(fastest, *(self.seconds(step) for _ in range(2)))
        repeats = max(1, math.ceil(SAMPLE_SECONDS / fastest))
        return lambda: self.seconds(step, repeats)

    def _on_cpu(self, step: Step, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats

    def _on_cuda(self, step: Step, repeats: int) -> float:
        """Every call finds a cold L2, and the flush before it hides the time the host takes to enqueue it."""
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in marks:
            self._flush.zero_()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in marks) / 1e3 / repeats


def first_call(step: Step, device: str) -> float:
    """Wall time of a call with all that happens only once: compilation, autotuning, allocation."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def saved_bytes(train: Step, apart: Iterable[torch.Tensor] = ()) -> int:
    """What autograd keeps for the backward pass, inputs and parameters included, every storage once.

    apart: tensors that are there anyway and do not count.
    """
    # The storages are held until all are seen, or one could be freed and its address taken by the next.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train()
    there = {tensor.untyped_storage().data_ptr() for tensor in apart}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in there)


def peak_bytes(step: Step, device: str) -> int:
    """The most memory that torch's allocator held during a call, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
