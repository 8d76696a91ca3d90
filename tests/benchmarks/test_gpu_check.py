import json
import os
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import SECTIONS, calibration, cases, gpu_check, networks, small_calls
from benchmarks import __main__ as cli
from benchmarks.gpu_check import Check, Skip, Step
from benchmarks.shapes import DWConvShape
from vision_ops import models, reference


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        return lambda left: setattr(self, "now", self.now + seconds)


@pytest.fixture
def tiny(monkeypatch):
    """Two ops, one of them wrong, at a size that a CPU runs in no time."""

    def wrong(*args, **options):
        return reference.dwconv(*args, **options) * 1.01

    def op(name, fused):
        shapes = {"tiny": DWConvShape(8, 6, 3), "other": DWConvShape(8, 6, 5)}
        return cases.Op("dwconv", fused, reference.dwconv, shapes, cases.build_dwconv, quick=("tiny",))

    ops = {"right": op("right", reference.dwconv), "wrong": op("wrong", wrong)}
    monkeypatch.setattr(gpu_check, "OPS", ops)
    monkeypatch.setattr(gpu_check, "FIRST_CASES", (("right", "tiny"), ("wrong", "other")))
    return ops


def read(folder, name="gpu-check.json"):
    return json.loads((folder / name).read_text())


def statuses(folder):
    return {step["name"]: step["status"] for step in read(folder)["steps"]}


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "prepare_environment", lambda threads: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu-check", "--out", str(tmp_path / "out")]) == gpu_check.NO_GPU == 3
    assert capsys.readouterr().err == "gpu-check needs an NVIDIA GPU, and this torch sees none.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x", "--only", "compile"], "argument --only: invalid choice: 'compile'"),
        (["--out", "x", "--budget", "0"], "argument --budget: '0' is not a positive float"),
    ],
)
def test_bad_arguments_exit_with_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["gpu-check", *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_order_is_by_value_and_compile_is_last(tmp_path):
    steps = list(gpu_check.all_steps(tmp_path, "cpu"))
    names = [step.name for step in steps]
    first = ["import and build info", *(f"calls of {op}" for op in cases.OPS), "pytest -m gpu"]
    assert names[: len(first)] == first
    assert names[len(first)] == "multi_order_dwconv MogaNet-S.1 against eager"
    compiled = [i for i, name in enumerate(names) if "compile" in name]
    assert compiled == list(range(compiled[0], len(names)))
    assert names.index("racecheck") < names.index("memcheck") < compiled[0]
    # Later steps may start later: nothing is cut off before what comes before it.
    limits = [step.until for step in steps]
    assert limits == sorted(limits) and limits[-1] == 1.0


def test_one_section_has_the_whole_budget(tmp_path):
    for section in SECTIONS:
        steps = gpu_check.chosen(gpu_check.all_steps(tmp_path, "cpu"), section)
        assert steps and {(step.section, step.until) for step in steps} == {(section, 1.0)}


def test_first_cases_and_networks_exist():
    assert all(case in cases.OPS[op].cases for op, case in gpu_check.FIRST_CASES)
    for network in networks.NETWORKS.values():
        assert models.list_models(network.variant) == [network.variant]


def test_the_budget_is_kept(tmp_path):
    clock = FakeClock()
    check = Check(tmp_path, budget=100.0, clock=clock)
    steps = [
        Step("build", "first", clock.spend(30), until=0.2),
        Step("build", "late", clock.spend(30), until=0.2),
        Step("test", "second", clock.spend(60), until=0.5),
        Step("ops", "third", clock.spend(50)),
        Step("ops", "too late", clock.spend(1)),
    ]
    assert check.run(steps) == 0
    assert statuses(tmp_path) == {
        "first": "ok", "late": "skipped", "second": "ok", "third": "ok", "too late": "skipped"
    }  # fmt: skip


def test_a_step_hears_how_long_it_may_take(tmp_path):
    clock, heard = FakeClock(), []
    steps = [Step("build", "a", clock.spend(10)), Step("test", "b", heard.append, until=0.5)]
    Check(tmp_path, budget=100.0, clock=clock).run(steps)
    assert heard == [40.0]


def test_failures_and_skips_are_told_and_stop_nothing(tmp_path, capsys):
    def fail(left):
        raise RuntimeError("a wrong number")

    def skip(left):
        raise Skip("no such program")

    steps = [Step("build", "bad", fail), Step("sanitize", "absent", skip), Step("ops", "good", lambda left: {"us": 1})]
    assert Check(tmp_path, 100.0, facts={"commit": "abc"}).run(steps) == 1
    bad, absent, good = read(tmp_path)["steps"]
    assert (bad["status"], bad["detail"]) == ("FAILED", "RuntimeError: a wrong number")
    assert (absent["status"], absent["detail"]) == ("skipped", "no such program")
    assert good["result"] == {"us": 1} and read(tmp_path)["commit"] == "abc"
    assert "bad: FAILED: RuntimeError: a wrong number" in capsys.readouterr().out


def test_a_killed_run_leaves_what_it_had(tmp_path):
    def killed(left):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Check(tmp_path, 100.0).run([Step("build", "done", lambda left: 1), Step("ops", "killed", killed)])
    assert statuses(tmp_path) == {"done": "ok"}


def test_small_calls_of_a_right_op_and_a_wrong_one(tiny):
    for name, expected in (("right", False), ("wrong", True)):
        problems = small_calls.problems(tiny[name], "cpu", (torch.float32,))
        found = [small_calls.call(tiny[name], problem) for _, problem in problems]
        assert [text is not None for text in found] == [expected] * 2


def test_small_calls_leave_out_the_float64_that_an_op_leaves_to_pytorch():
    pytest.importorskip("triton")

    def dtypes(name):
        with FakeTensorMode():  # no GPU, but its device
            return {problem.args[0].dtype for _, problem in small_calls.problems(cases.OPS[name], "cuda", every)}

    every = small_calls.DTYPES
    assert dtypes("layer_norm_2d") == set(every)
    assert dtypes("xca") == dtypes("cross_covariance") == set(every) - {torch.float64}


def test_small_calls_in_their_own_process():
    calls = gpu_check.small_calls("layer_norm_2d", "cpu", 120.0)
    assert len(calls) == len(cases.OPS["layer_norm_2d"].quick) * 4 * 2
    assert all(call["wrong"] is None for call in calls)
    done = gpu_check.run_limited(
        [sys.executable, "-m", "benchmarks.small_calls", "--device", "cpu", "--bare", "--op", "layer_norm_2d"], 120.0
    )
    assert done.code == 0 and done.output.count('"call"') == len(calls) // 2


def test_a_process_that_crashes_or_hangs_costs_only_itself(tmp_path):
    crashed = gpu_check.run_limited([sys.executable, "-c", "import os; print('before', flush=True); os.abort()"], 60.0)
    assert crashed.code != 0 and crashed.output.startswith("before") and "exit status" in crashed.why
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('wrote its results')"
    start = time.perf_counter()
    hung = gpu_check.run_limited([sys.executable, "-c", code], 2.0, tmp_path / "log")
    assert hung.timed_out and hung.why == "out of time" and "wrote its results" in hung.output
    assert time.perf_counter() - start < 30


def test_gpu_tests_leave_a_summary(tmp_path):
    def tests(name, *lines):
        path = tmp_path / f"test_{name}.py"
        path.write_text("\n".join(lines) + "\n")
        return (str(path),)

    good = tests("good", "def test_one(): pass")
    assert "1 passed" in gpu_check.run_tests(tmp_path, 100.0, good)["summary"]
    assert (tmp_path / "tests.xml").exists() and "test_one PASSED" in (tmp_path / "tests.txt").read_text()
    bad = tests("bad", "def test_two(): assert False")
    with pytest.raises(RuntimeError, match=r"exit status 1: .*1 failed"):
        gpu_check.run_tests(tmp_path, 100.0, bad)


def test_a_missing_sanitizer_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *args, **options: None)
    with pytest.raises(Skip, match="compute-sanitizer is not installed"):
        gpu_check.sanitize(tmp_path, "racecheck", 10.0)


@pytest.mark.parametrize(("code", "outcome"), [(0, None), (86, RuntimeError)])
def test_what_the_sanitizer_says_is_kept(tmp_path, monkeypatch, code, outcome):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho \'{{"call": "x"}}\' "$2"\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if outcome:
        with pytest.raises(outcome, match="exit status 86"):
            gpu_check.sanitize(tmp_path, "racecheck", 30.0)
    else:
        assert gpu_check.sanitize(tmp_path, "racecheck", 30.0) == {"calls": 1}
    assert "racecheck" in (tmp_path / "sanitizer.txt").read_text()


def test_races_are_written_and_a_later_one_replaces_the_first(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.machine, "measure_rates", lambda *args: gpu_check.machine.Rates({1: 1e9}, 1e9))
    races = gpu_check.Races(tmp_path, "cpu", batch=1, seconds=0.001)
    assert races.first == [("right", "tiny"), ("wrong", "other")]
    assert races.rest == [("right", "other"), ("wrong", "tiny")]
    found = races.race("right", "tiny", ("eager",))
    assert set(found) == {f"{m} {layout}" for m in ("forward", "train") for layout in ("contiguous", "channels_last")}
    with pytest.raises(RuntimeError, match="WRONG"):
        races.race("wrong", "other", ("eager",))
    written = read(tmp_path, "ops.json")
    assert [result["status"] for result in written["results"]] == ["ok", "ok", "WRONG", "WRONG"]
    races.race("right", "tiny", ("eager",))
    assert len(read(tmp_path, "ops.json")["results"]) == 4


def test_every_constant_is_measured(tmp_path):
    bench = calibration.Bench("cpu", small=True)
    for measure in calibration.MEASUREMENTS.values():
        json.dumps(measure(bench))
    expected = {"BW", "TC_2", "TC_4", "CC", "EFF", "CPU_US", "NAIVE_FWD", "NAIVE_WG", "CUDNN_DW", "CUDNN_WG"}
    assert set(bench.constants) == expected  # GAP_US and GELU need a GPU
    assert all(value > 0 for value in bench.constants.values())
    assert bench.measured["attention"]["N64"]["finite"]


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


class MogaBlock(torch.nn.Conv2d):
    """In the place of the real one, whose networks take a CPU minutes."""


def test_networks_are_held_against_eager(monkeypatch):
    def build(network, scale, fused):
        flat = torch.nn.Flatten(), torch.nn.Linear(4 * 8 * 8, 10)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), MogaBlock(4, 4, 3, padding=1), *flat)

    monkeypatch.setattr(networks, "build", build)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    scale = networks.Scale("cpu", batch=2, image=8, seconds=0.01)
    for compiled, peer in ((False, "eager"), (True, "compile")):
        found = networks.compare("MogaNet", compiled, scale)
        for mode in ("forward", "train"):
            assert set(found[mode]["images_per_s"]) == {"fused", peer}
            assert found[mode]["times_faster"]["median"] > 0
    found = networks.block_kernels("MogaNet", scale)
    assert found["inputs"] == [(2, 4, 8, 8)] and any("conv" in name for name in found["kernels_us"])
    json.dumps(found)


def test_networks_are_built_on_either_path():
    network, scale = networks.Network("moganet_xtiny", 32, "MogaBlock"), networks.Scale("cpu", batch=1)
    fused, plain = (networks.build(network, scale, fused=fused) for fused in (True, False))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    blocks = [type(module).__name__ for module in plain.modules()]
    assert network.block in blocks and scale.images(network).shape == (1, 3, 32, 32)
