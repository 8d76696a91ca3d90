import pytest
import torch

from benchmarks.measure import Quartiles, Ratio, Rule, Stopwatch, interleave, peak_bytes, saved_bytes


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sampler(self, seconds):
        """Takes the next of `seconds` every time, or always the same."""
        values = iter(seconds) if isinstance(seconds, list) else None

        def sample():
            taken = seconds if values is None else next(values)
            self.now += taken
            return taken

        return sample


def fused_against_eager(times):
    return [Ratio.of(times, "fused", ["eager"])]


def test_quartiles():
    assert Quartiles.of([5, 1, 4, 2, 3]) == Quartiles(median=3, q1=2, q3=4)
    assert Quartiles.of([1, 1, 1, 1, 9]).spread == 0
    assert Quartiles(median=10, q1=9.8, q3=10.6).spread == pytest.approx(0.06)
    assert Quartiles(median=10, q1=9.2, q3=10.1).spread == pytest.approx(0.08)


def test_ratio_pairs_the_rounds_and_takes_the_fastest_peer():
    times = {"fused": [1.0, 2.0, 4.0, 1.0], "slow": [9.0, 9.0, 9.0, 9.0], "fast": [3.0, 6.0, 12.0, 3.0]}
    ratio = Ratio.of(times, "fused", ["slow", "fast"])
    assert ratio.peer == "fast"
    assert ratio.ratio == Quartiles(3, 3, 3)


def test_the_fastest_peer_is_that_of_the_lowest_median_not_of_the_luckiest_sample():
    times = {"fused": [1.0] * 5, "lucky": [0.1, 4.0, 4.0, 4.0, 4.0], "steady": [3.0] * 5}
    assert Ratio.of(times, "fused", ["lucky", "steady"]).peer == "steady"


def test_every_provider_runs_once_a_round_and_the_rounds_rotate():
    calls = []
    samplers = {name: (lambda name=name: calls.append(name) or 1.0) for name in "abc"}
    interleave(samplers, lambda times: [], Rule(seconds=60, rounds=4), FakeClock())
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"


def test_stops_after_the_least_rounds_when_the_ratio_is_steady():
    clock = FakeClock()
    samplers = {"fused": clock.sampler(0.001), "eager": clock.sampler(0.002)}
    times = interleave(samplers, fused_against_eager, Rule(seconds=60), clock)
    assert len(times["fused"]) == len(times["eager"]) == 20


def test_keeps_the_least_rounds_when_the_time_is_over_at_once():
    clock = FakeClock()
    samplers = {"fused": clock.sampler(10.0), "eager": clock.sampler(20.0)}
    assert len(interleave(samplers, fused_against_eager, Rule(seconds=60), clock)["fused"]) == 20


def test_a_restless_ratio_uses_up_the_time():
    clock = FakeClock()
    samplers = {"fused": clock.sampler(1.0), "eager": clock.sampler([1.0, 3.0] * 1000)}
    times = interleave(samplers, fused_against_eager, Rule(seconds=300), clock)
    assert len(times["fused"]) == 100


def test_stops_once_a_restless_ratio_has_settled():
    clock = FakeClock()
    samplers = {"fused": clock.sampler(1.0), "eager": clock.sampler([1.0, 3.0] * 10 + [2.0] * 1000)}
    rounds = len(interleave(samplers, fused_against_eager, Rule(seconds=1e6), clock)["fused"])
    # 20 restless rounds lie outside the quartiles once there are as many steady ones.
    assert 40 <= rounds <= 60


def test_a_sample_is_the_mean_of_calls_that_last_a_millisecond(monkeypatch):
    clock, calls = FakeClock(), []
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", clock)

    def step():
        calls.append(None)
        clock.now += 0.0003

    sample = Stopwatch("cpu").sampler(step)
    calls.clear()
    assert sample() == pytest.approx(0.0003)
    assert len(calls) == 4


def test_on_a_gpu_every_call_finds_a_flushed_cache_and_the_flush_is_not_timed(monkeypatch):
    clock = FakeClock()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = 1e3 * clock.now

        def elapsed_time(self, end):
            return end.milliseconds - self.milliseconds

    class Buffer:
        flushes = 0

        def zero_(self):
            self.flushes += 1
            clock.now += 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Buffer())
    stopwatch = Stopwatch("cuda")

    def step():
        clock.now += 0.0003

    assert stopwatch.seconds(step, 5) == pytest.approx(0.0003)
    assert stopwatch._flush.flushes == 5


def test_saved_bytes_counts_a_storage_once():
    x, w = (torch.randn(64, 16, requires_grad=True) for _ in range(2))

    def train():
        halves = x[:32] * w[:32], x[32:] * w[32:]
        return torch.autograd.grad(halves[0].sum() + halves[1].sum(), (x, w))

    assert saved_bytes(train) == x.nbytes + w.nbytes


def test_saved_bytes_counts_intermediates_that_die_with_the_graph():
    x = torch.randn(64, 16, requires_grad=True)

    def train():
        return torch.autograd.grad(x.exp().exp().sum(), x)

    assert saved_bytes(train) == 2 * x.nbytes


def test_peak_bytes_is_the_most_held_at_once():
    size = 1 << 16

    def step():
        first = torch.empty(size, dtype=torch.uint8)
        del first
        both = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        del both[0]
        return torch.empty(size // 2, dtype=torch.uint8)

    assert peak_bytes(step, "cpu") == 2 * size
