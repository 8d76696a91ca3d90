import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import calibration, cases, costs, networks, providers
from benchmarks.gpu_check import timings
from benchmarks.gpu_check.protocol import READY, Skip
from benchmarks.gpu_check.scale import REHEARSAL
from benchmarks.measure import Stopwatch
from benchmarks.shapes import DWConvShape
from vision_ops import reference


def wrong(*args, **options):
    return reference.dwconv(*args, **options) * 1.01


def raises(*args, **options):
    raise RuntimeError("no kernel image")


@pytest.fixture(params=[reference.dwconv, wrong, raises])
def op(request, monkeypatch):
    """In the place of dwconv, and what it does."""
    shapes = {"tiny": DWConvShape(8, 6, 3)}
    fake = cases.Op("dwconv", request.param, reference.dwconv, shapes, cases.build_dwconv, quick=("tiny",))
    monkeypatch.setitem(cases.OPS, "dwconv", fake)
    return request.param


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """Parts change them for their whole process."""
    for name in ("benchmark", "deterministic", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))


def apart(results):
    """What was told before the part had the machine to itself, and after."""
    results = list(results)
    json.dumps(results)
    return results[: results.index(READY)], results[results.index(READY) + 1 :]


def test_what_an_op_costs(op):
    before, after = apart(timings.op_costs(REHEARSAL, "dwconv", ("tiny",)))
    assert [result["verdict"] for result in before] == [{wrong: "WRONG", raises: "FAILED"}.get(op, "ok")]
    if op is raises:
        assert "no kernel image" in before[0]["detail"] and not after
        return
    merged = {}
    for result in after:  # times first, then the profiler's, then graphs
        merged.setdefault((result["case"], result["mode"], result["kind"]), {}).update(result)
    assert set(merged) == {("tiny", mode, kind) for mode in timings.MODES for kind in ("fused", "eager")}
    for row in merged.values():
        assert min(row["event_us"], row["host_us"], row["kernels_us"], row["launches"]) > 0
        assert row["graph_us"] is None and "need a GPU" in row["graph_missing"]
        assert sum(micros for _, micros, _ in row["kernels"]) <= row["kernels_us"] * 1.01


def test_a_step_that_fails_costs_only_itself(monkeypatch):
    def measure(step, stopwatch):
        measured.append(step)
        if len(measured) == 2:
            raise torch.OutOfMemoryError("full")
        return 1.0

    measured = []
    monkeypatch.setattr(timings, "event_us", measure)
    monkeypatch.setitem(cases.OPS["dwconv"].cases, "tiny", DWConvShape(8, 6, 3))
    _, after = apart(timings.op_costs(REHEARSAL, "dwconv", ("tiny",)))
    (failed,) = (result for result in after if "verdict" in result)
    assert (failed["verdict"], failed["detail"]) == ("FAILED", "dwconv tiny, train eager: OutOfMemoryError: full")
    assert sum("event_us" in result for result in after) == sum("kernels_us" in result for result in after) == 3


def test_an_op_is_raced_right_or_wrong(op):
    peers = ("eager", "aot_eager", providers.CUDNN)
    before, after = apart(timings.op_race(REHEARSAL, "dwconv", "tiny", peers))
    assert not before and [result["mode"] for result in after] == list(timings.MODES)
    for result in after:
        assert result["verdict"] == {wrong: "WRONG", raises: "FAILED"}.get(op, "ok")
        if op is raises:
            assert "no kernel image" in result["detail"] and "times_faster" not in result
            continue
        assert (result["detail"] is None) == (op is not wrong)
        assert result["times_faster"]["median"] > 0 and not result["than"].startswith("fused")
        kinds = {provider["name"].split("/")[0] for provider in result["providers"] if provider["us"]}
        expected = {"fused", "eager", "aot_eager"} | ({providers.CUDNN} if providers.has_cudnn_depthwise() else set())
        assert kinds == expected


def test_the_depthwise_kernels_of_cudnn_are_asked_for(monkeypatch):
    if not providers.has_cudnn_depthwise():
        pytest.skip("this torch does not let the caller choose")
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def look(*args, **options):
        seen.append((torch.backends.cudnn.depthwise_kernel, torch.backends.cudnn.benchmark))
        return reference.dwconv(*args, **options)

    op = cases.Op("dwconv", look, look, {"tiny": DWConvShape(8, 6, 3)}, cases.build_dwconv, quick=())
    problem = op.problem("tiny", cases.Setting("cpu", torch.float32, "contiguous", 1))
    for kind in (providers.CUDNN, "eager"):
        providers.make_step(kind, op, problem, torch.ones(1, 8, 6, 6), "train")()
    assert seen == [("cudnn", True), ("auto", True)]


@pytest.fixture
def small_net(monkeypatch):
    """In the place of the real ones, which take a CPU seconds."""

    def build(network, scale, fused):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, stride=8), torch.nn.Flatten(), torch.nn.Linear(256, 10))

    monkeypatch.setattr(networks, "build", build)
    monkeypatch.setattr(timings, "build", build)
    return build


def test_what_a_network_costs(small_net):
    before, after = apart(timings.network_costs(REHEARSAL, "MogaNet-T"))
    assert before == [{"network": "MogaNet-T", "verdict": "ok"}]
    assert len(after) == 6
    for kind in ("fused", "eager"):
        rows = {name: value for result in after if result["kind"] == kind for name, value in result.items()}
        assert min(rows[name] for name in ("event_us", "host_us", "kernels_us", "launches", "latency_us")) > 0


@pytest.mark.not_finite
def test_networks_that_disagree_are_told_apart(small_net):
    x = torch.randn(2, 3, 64, 64)
    nets = [small_net(None, None, fused) for fused in (True, False)]
    assert networks.disagreement(*nets, x, REHEARSAL) is None
    with torch.no_grad():
        nets[0][2].weight.mul_(1.1)
    assert "logits off by" in networks.disagreement(*nets, x, REHEARSAL)
    with torch.no_grad():
        nets[0][2].weight.fill_(float("nan"))
    assert "logits off by nan" in networks.disagreement(*nets, x, REHEARSAL)


def test_networks_are_raced_compiled_and_not(small_net):
    kinds = tuple(networks.KINDS)
    before, after = apart(timings.network_race(REHEARSAL, "MogaNet-T", kinds))
    assert not before
    rows = {(result["kind"], result["mode"]): result for result in after}
    assert set(rows) == {(kind, mode) for kind in kinds for mode in networks.MODES} | {
        (kind, "batch 1") for kind in ("fused", "eager")
    }
    for (_, mode), row in rows.items():
        assert row["latency_us"] > 0 if mode == "batch 1" else row["images_per_s"] > 0 and row["peak_bytes"] > 0


def test_a_network_waits_for_memory(monkeypatch):
    naps = []
    monkeypatch.setattr(costs.time, "sleep", naps.append)
    left = [torch.OutOfMemoryError("full")] * 2

    def step():
        if left:
            raise left.pop()

    costs.when_memory_allows(step)
    assert naps == [2, 2]
    left += [torch.OutOfMemoryError("full")] * 5
    with pytest.raises(torch.OutOfMemoryError):
        costs.when_memory_allows(step, tries=3)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_are_built_on_either_path(name):
    network = networks.NETWORKS[name]
    fused, plain = (networks.build(network, REHEARSAL, fused=fused) for fused in (True, False))
    for (key, ours), (other, theirs) in zip(fused.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == other and torch.equal(ours, theirs)
    assert fused.eval()(REHEARSAL.images(network)).shape == (1, 1000)


def test_every_constant_is_measured():
    before, after = apart(timings.calibrate(REHEARSAL))
    assert not before and [result["measured"] for result in after[:-1]] == list(calibration.MEASUREMENTS)
    constants = after[-1]["constants"]
    expected = {"BW", "TC_2", "TC_4", "CC", "EFF", "CPU_US", "NAIVE_FWD", "NAIVE_WG", "CUDNN_DW", "CUDNN_WG"}
    assert set(constants) == expected  # GAP_US and GELU need a GPU
    assert all(value > 0 for value in constants.values())
    assert after[-2]["N64"]["finite"]


def test_the_gelu_kernel():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("gpu-check runs it on the GPU")
    from benchmarks.gelu_kernel import repeated_gelu

    x = torch.randn(2048)
    for times, expected in ((0, x), (2, F.gelu(F.gelu(x)))):
        y = torch.empty_like(x)
        repeated_gelu(x, y, times)
        torch.testing.assert_close(y, expected)


TABLE = "\n".join(
    [
        "==PROF== Connected to process 1",
        '@@ {"call": "HorNet-T.2"}',
        '"ID","Kernel Name","Grid Size",' + ",".join(f'"{name}"' for name in timings.NCU_COLUMNS.values()),
        '"","","","us","%","%","%","%"',
        '"0","march_kernel","(396, 1, 1)","42.5","70.1","80.2","60.3","24.9"',
    ]
)


@pytest.mark.parametrize(("says", "attaches"), [(TABLE, True), ("==ERROR== LibraryNotLoaded", False)])
def test_what_ncu_says_is_kept(says, attaches, tmp_path, monkeypatch):
    tool, log = tmp_path / "ncu", tmp_path / "ncu.txt"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setattr(timings, "find_tool", lambda name: str(tool))
    if not attaches:
        with pytest.raises(Skip, match="did not attach: ==ERROR== LibraryNotLoaded"):
            list(timings.ncu(REHEARSAL, str(log)))
        return
    _, (row,) = apart(timings.ncu(REHEARSAL, str(log)))
    assert row == {"kernel": "march_kernel", "grid": "(396, 1, 1)", "us": "42.5", "dram_percent": "70.1",
                   "sm_percent": "80.2", "fma_percent": "60.3", "warps_percent": "24.9"}  # fmt: skip


def test_what_ncu_watches_runs():
    assert [result["call"] for result in timings.march_calls(REHEARSAL)] == list(timings.MARCHES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_costs_on_a_gpu():
    x = torch.randn(1 << 20, device="cuda")

    def step():
        return x.mul(2).add(1)

    stopwatch = Stopwatch("cuda")
    assert 1 < costs.event_us(step, stopwatch) < 1000 and 1 < costs.host_us(step, "cuda") < 1000
    found = costs.kernels(step, "cuda", most=5)
    assert found["launches"] == 2 and len(found["kernels"]) == 2 and 1 < found["kernels_us"] < 1000
    assert costs.graph_us(step, "cuda", lambda replayed: costs.event_us(replayed, stopwatch))["graph_us"] > 1
    failed = costs.graph_us(lambda: x.sum().item(), "cuda", lambda replayed: 0.0)
    assert failed["graph_us"] is None and failed["graph_missing"]
    torch.cuda.synchronize()
