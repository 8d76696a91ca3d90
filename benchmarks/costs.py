"""What a call costs, taken apart: as events see it, in kernels, on the host, and replayed as a CUDA graph.

A call that launches many small kernels takes as long as the host needs to launch them, and its kernels finish sooner:
one number alone would not tell which of the two to make faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Step, Stopwatch

Result = TypeVar("Result")
CALLS = 5  # under the profiler and on the host: few enough for the queue of launches


def when_memory_allows(function: Callable[[], Result], tries: int = 30) -> Result:
    """Calls it again while other processes hold too much of the GPU's memory: those of gpu-check do for seconds."""
    for _ in range(tries - 1):
        try:
            return function()
        except torch.OutOfMemoryError:
            pass  # what the exception holds is free only after it
        torch.cuda.empty_cache()
        time.sleep(2)
    return function()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def event_us(step: Step, stopwatch: Stopwatch, samples: int = 9) -> float:
    """Microseconds from the start to the end of the call on the device, every call finding a cold L2."""
    sample = stopwatch.sampler(step)
    return statistics.median(sample() for _ in range(samples)) * 1e6


def host_us(step: Step, device: str, repeats: int = 3) -> float:
    """Microseconds until the host has launched everything."""
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            step()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    synchronize(device)
    return min(found)


def latency_us(step: Step, device: str, repeats: int = 20) -> float:
    """Microseconds of one call until its result is there, nothing else being under way."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        synchronize(device)
        found.append((time.perf_counter() - start) * 1e6)
    return statistics.median(found)


def kernels(step: Step, device: str, most: int, calls: int = CALLS) -> dict[str, Any]:
    """The sum of the times of a call's kernels, their number, and those that take the longest with their times.

    On a CPU operators stand in for kernels.
    """
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    synchronize(device)
    with profile(activities=[activity]) as profiler:
        for _ in range(calls):
            step()
        synchronize(device)
    rows = []
    for event in profiler.key_averages():
        if device == "cpu":
            rows.append((event.key, event.self_cpu_time_total, event.count))
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            # What is left are kernels, copies and fills; calls of the runtime are events of the host.
            rows.append((event.key, event.self_device_time_total, event.count))
    rows.sort(key=lambda row: -row[1])
    return {
        "kernels_us": sum(micros for _, micros, _ in rows) / calls,
        "launches": sum(count for _, _, count in rows) / calls,
        "kernels": [[name[:100], round(micros / calls, 1), count / calls] for name, micros, count in rows[:most]],
    }


def share_of(prefix: str, step: Step, device: str) -> float:
    """Of the time of a call, on the device, in operators whose names begin so, with all that they call."""
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as profiler:
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - start
    events = profiler.events()

    def counts(event: Any) -> bool:
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith(prefix):
            parent = parent.cpu_parent
        return parent is None and event.name.startswith(prefix)

    if device == "cpu":
        return sum(event.cpu_time_total for event in events if counts(event)) / (seconds * 1e6)
    on_device = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
    return sum(event.device_time_total for event in events if counts(event)) / on_device


def replay(step: Step, device: str) -> Callable[[], None]:
    """The call, captured as a CUDA graph; raises where it does not capture."""
    if device != "cuda":
        raise RuntimeError("CUDA graphs need a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def graph_us(step: Step, device: str, measure: Callable[[Step], float]) -> dict[str, Any]:
    """What measure() makes of the replayed call, or why there is none."""
    try:
        return {"graph_us": measure(replay(step, device))}
    except Exception as error:
        return {"graph_us": None, "graph_missing": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
