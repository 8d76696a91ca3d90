import json
import os
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import __main__ as cli
from benchmarks import cases, networks, small_calls
from benchmarks.gpu_check import checks, main, parts, runner, summary
from benchmarks.gpu_check.protocol import Skip
from benchmarks.gpu_check.runner import Outcome, Part
from benchmarks.gpu_check.scale import REHEARSAL
from vision_ops import _native, models, reference

HANG = """
import sys, time, types
sys.path.insert(0, ".")
sys.modules["benchmarks.gpu_check.scale"] = types.SimpleNamespace(GPU=None, REHEARSAL=None)  # which imports torch
from benchmarks.gpu_check import worker
def stuck(scale):
    yield worker.READY
    time.sleep(600)
sys.modules["benchmarks.gpu_check.stuck"] = types.SimpleNamespace(part=stuck)
worker.main("stuck:part", "{}")
"""
LIAR = """
import sys
from benchmarks import cases
from benchmarks.gpu_check import worker
from benchmarks.shapes import DWConvShape
from vision_ops import reference
def lie(*args, **options): return reference.dwconv(*args, **options) * 1.01
shapes = {"tiny": DWConvShape(8, 6, 3)}
cases.OPS["dwconv"] = cases.Op("dwconv", lie, reference.dwconv, shapes, cases.build_dwconv, quick=("tiny",))
sys.exit(worker.main("timings:op_costs", '{"op": "dwconv", "cases": ["tiny"]}', "--rehearse"))
"""


@pytest.fixture
def command_line(monkeypatch):
    """Without what it would change in this process."""
    monkeypatch.setattr(cli, "prepare_environment", lambda threads: None)


def test_without_a_gpu_one_line_says_so(command_line, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu-check", "--run", "correct", "--out", str(tmp_path / "out")]) == main.NO_GPU == 3
    assert capsys.readouterr().err == (
        "gpu-check needs an NVIDIA GPU, and this torch sees none; --rehearse runs it on a CPU.\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "fast"], "the following arguments are required: --out"),
        (["--out", "x"], "the following arguments are required: --run"),
        (["--out", "x", "--run", "slow"], "argument --run: invalid choice: 'slow'"),
        (["--out", "x", "--run", "fast", "--budget", "0"], "argument --budget: '0' is not a positive float"),
    ],
)
def test_bad_arguments_exit_with_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["gpu-check", *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_run_with_a_part_that_hangs_one_that_crashes_and_one_that_lies(command_line, monkeypatch, tmp_path, capsys):
    def correct(self):
        # Its time counts from its turn, when it has long been started, however busy the machine is.
        yield Part("hangs", [sys.executable, "-S", "-c", HANG], limit=2.0, alone=True)
        yield Part("crashes", [sys.executable, "-S", "-c", "import os; os.abort()"], limit=600.0)
        yield Part("lies", [sys.executable, "-c", LIAR], limit=600.0, alone=True)
        yield self.part("small calls", "checks:small_calls", 600, {"op": "moga_gate"})

    monkeypatch.setattr(parts.Run, "correct", correct)
    monkeypatch.setattr(runner, "GRACE", 60.0)
    words = ["--run", "correct", "--rehearse", "--budget", "2400", "--out", str(tmp_path)]
    assert cli.main(["gpu-check", *words]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"correct.json", "correct.txt"}
    written = json.loads((tmp_path / "correct.json").read_text())
    assert {p["name"]: p["status"] for p in written["parts"]} == {
        "hangs": "HUNG", "crashes": "CRASHED", "lies": "WRONG", "small calls": "ok"
    }  # fmt: skip
    (hangs,) = (p for p in written["parts"] if p["name"] == "hangs")
    assert "line 8 in stuck" in hangs["output"]  # where it hangs
    (lies,) = (p for p in written["parts"] if p["name"] == "lies")
    timed = [(r["mode"], r["kind"]) for r in lies["results"] if "event_us" in r]
    assert timed == [(mode, kind) for mode in ("train", "forward") for kind in ("fused", "eager")]
    text = (tmp_path / "correct.txt").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[1] == "parts: 1 WRONG, 1 CRASHED, 1 HUNG, 1 ok"
    assert [line.split()[0] for line in lines[2:5]] == ["WRONG", "CRASHED", "HUNG"]
    assert any(line.startswith("WRONG dwconv tiny") for line in lines[5:])


@pytest.mark.parametrize("rehearse", [False, True])
def test_both_runs_have_every_op_and_network(rehearse, tmp_path):
    run = parts.Run(tmp_path, rehearse, cores=16)
    for every in (list(run.correct()), list(run.fast())):
        assert len({part.name for part in every}) == len(every)
        words = [" ".join(part.command) for part in every]
        assert all(any(name in text for text in words) for name in (*cases.OPS, *networks.NETWORKS))
        assert all(("--rehearse" in part.command) == rehearse for part in every)
        # What is timed is alone, and what is not timed is not.
        assert all(part.alone == part.command[3].startswith("timings:") for part in every)
    logs = {json.loads(part.command[4]).get("log") for part in run.correct()} - {None}
    assert len(logs) + 2 * 2 <= 8  # with the JSON and the summary of both runs


def test_the_most_valuable_is_first(tmp_path):
    names = [part.name for part in parts.Run(tmp_path, False, 16).fast()]
    assert names[:2] == ["HorNet-T, fused and eager", "HorNet-T, compile(fused)"]
    first = {op: names.index(f"{op} {cases[0]}") for op, cases in parts.CASES.items()}
    assert max(first.values()) < names.index("MogaNet-T, fused and eager") < names.index("dwconv EdgeNeXt-S.4")
    tuned = [name.endswith("max-autotune") for name in names]
    assert tuned == sorted(tuned)
    assert small_calls.DTYPES[0] == torch.bfloat16


def test_cases_and_networks_exist():
    assert set(parts.CASES) == set(cases.OPS)
    assert all(case in cases.OPS[op].cases for op, chosen in parts.CASES.items() for case in chosen)
    assert set(parts.DEPTHWISE) <= set(cases.OPS) and set(parts.FIRST_NETWORKS) <= set(networks.NETWORKS)
    for network in networks.NETWORKS.values():
        assert models.list_models(network.variant) == [network.variant]


def test_facts_name_what_every_op_runs():
    found = list(checks.facts(REHEARSAL))
    assert set(found[1]["tools"]) == set(checks.TOOLS)
    assert [result["op"] for result in found[2:]] == list(cases.OPS)
    assert not any("verdict" in result for result in found)
    json.dumps(found)


def broken(name):
    def call(*args, **options):
        if name == "raises":
            raise RuntimeError("a CUDA error that sticks")
        return reference.dwconv(*args, **options) * (1.01 if name == "lies" else 1.0)

    return call


@pytest.mark.parametrize(
    ("name", "verdicts"), [("right", [None] * 2), ("lies", ["WRONG"] * 2), ("raises", ["FAILED"] * 2)]
)
def test_small_calls_tell_right_from_wrong(name, verdicts, monkeypatch):
    shapes = {"tiny": cases.shapes.DWConvShape(8, 6, 3)}
    op = cases.Op("dwconv", broken(name), reference.dwconv, shapes, cases.build_dwconv, quick=("tiny",))
    monkeypatch.setitem(cases.OPS, "dwconv", op)
    monkeypatch.setattr(small_calls, "DTYPES", (torch.float32,))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert [result.get("verdict") for result in checks.small_calls(REHEARSAL, "dwconv")] == verdicts


def test_small_calls_leave_out_the_float64_that_an_op_leaves_to_pytorch(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_native, "triton_missing", lambda index: None)

    def dtypes(name):
        with FakeTensorMode():  # no GPU, but its device
            return {problem.args[0].dtype for _, problem in small_calls.problems(cases.OPS[name], "cuda", every)}

    every = small_calls.DTYPES
    assert dtypes("layer_norm_2d") == set(every)
    assert dtypes("xca") == dtypes("cross_covariance") == set(every) - {torch.float64}


@pytest.mark.parametrize("missing", [None, "xdist"])
def test_gpu_tests_are_counted(missing, tmp_path, monkeypatch):
    find = checks.importlib.util.find_spec
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    path, log = tmp_path / "test_some.py", tmp_path / "tests.txt"
    path.write_text("def test_one(): pass\ndef test_two(): assert False\n")
    (found,) = checks.gpu_tests(REHEARSAL, str(log), processes=1, select=(str(path),))
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert found["verdict"] == "FAILED" and "1 failed, 1 passed" in found["detail"] and "test_two" in found["detail"]
    if missing is None:
        return
    path.write_text("def test_one(): pass\n")
    (found,) = checks.gpu_tests(REHEARSAL, str(log), processes=1, select=(str(path),))
    assert found["counts"] == {"passed": 1} and "verdict" not in found


def interrupted(says):
    def run(program, *, stdout, **options):
        stdout.write(says)
        stdout.flush()
        raise KeyboardInterrupt

    return run


def test_tests_and_sanitizers_that_are_cut_off_tell_how_far_they_came(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "find_tool", lambda name: name)
    progress = "[gw0] [ 20%] PASSED tests/test_a.py::test_b \n[gw1] [ 40%] PASSED tests/test_a.py::test_c \n"
    cut_off = [
        (lambda log: checks.gpu_tests(REHEARSAL, log, 2, []), progress, {"counts": {"passed": 2}}),
        (lambda log: checks.sanitize(REHEARSAL, "memcheck", log), '@@ {"call": "x"}\n', {"calls": 1, "errors": []}),
    ]
    for part, says, expected in cut_off:
        monkeypatch.setattr(checks.subprocess, "run", interrupted(says))
        results = []
        with pytest.raises(KeyboardInterrupt):
            for result in part(str(tmp_path / "log")):
                results.append(result)
        assert len(results) == 1 and expected.items() <= results[0].items()


def test_a_missing_tool_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda *args, **options: None)
    with pytest.raises(Skip, match="compute-sanitizer is not installed"):
        list(checks.sanitize(REHEARSAL, "racecheck", str(tmp_path / "log")))


@pytest.mark.parametrize(
    ("says", "code", "expected"),
    [
        ('@@ {"call": "x"}', 0, {"calls": 1, "errors": []}),
        ("========= Invalid __global__ write of size 4 bytes", 86, {"verdict": "FAILED", "calls": 0}),
        ('@@ {"call": "x"}', 9, {"verdict": "FAILED", "calls": 1}),
        ("========= Device not supported", 1, None),
    ],
)
def test_what_the_sanitizer_says_is_kept(says, code, expected, tmp_path, monkeypatch):
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "memcheck.txt"
    tool.write_text(f"#!/bin/sh\necho caching $PYTORCH_NO_CUDA_MEMORY_CACHING \"$@\"\necho '{says}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if expected is None:
        with pytest.raises(Skip, match="did not attach: Device not supported"):
            list(checks.sanitize(REHEARSAL, "memcheck", str(log)))
    else:
        (found,) = checks.sanitize(REHEARSAL, "memcheck", str(log))
        assert expected.items() <= found.items()
    words = log.read_text().split()
    assert words[:4] == ["caching", "1", "--tool", "memcheck"] and "kernel_substring=4vops" in words
    assert "checks:bare_calls" in words


def test_only_our_kernels_are_watched():
    pytest.importorskip("triton")
    names = checks.kernel_names()
    assert {"4vops", "layer_norm_2d_fwd_kernel", "gram_kernel", "weigh_kernel"} <= set(names)
    assert not any(name in "vectorized_elementwise_kernel" for name in names)


def test_a_summary_fits_a_screen(tmp_path):
    rows = [
        {"op": op, "case": "HorNet-T.1", "mode": "train", "kind": kind, "event_us": 1234.5 * (i + 1), "host_us": 99.0}
        for op in cases.OPS
        for i, kind in enumerate(("fused", "eager"))
    ]
    outcomes = [Outcome(f"part {i}", "FAILED", "x" * 400) for i in range(60)]
    text = summary.screen("title", [*outcomes, Outcome("costs", "ok", results=rows)])
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) <= summary.WIDTH
    assert "and 48 more" in text and "2469" in text


def test_the_worst_comes_first():
    def raced(op, median):
        times = {"median": median, "q1": median, "q3": median}
        return {"op": op, "case": "c", "mode": "train", "verdict": "ok", "times_faster": times, "us": 1.0,
                "share_of_floor": 0.5, "than": "eager/contiguous"}  # fmt: skip

    results = [raced("fair", 1.5), raced("bad", 0.5), raced("good", 3.0)]
    lines = summary.screen("title", [Outcome("races", results=results)]).splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["bad", "fair", "good"]


def test_networks_are_held_against_the_best_of_the_others():
    speeds = {"good": (300, 200, 400, 100), "bad": (300, 400, 350, 500), "alone": (7, None, None, None)}
    results = [
        {"network": network, "kind": kind, "mode": "train", "images_per_s": speed, "peak_bytes": 1 << 30}
        for network, values in speeds.items()
        for kind, speed in zip(networks.KINDS, values, strict=True)
        if speed
    ]
    lines = summary.screen("title", [Outcome("races", results=results)]).splitlines()
    assert [line.split()[:3] for line in lines[-3:]] == [
        ["alone,", "train", "-"], ["bad,", "train", "0.70"], ["good,", "train", "2.00"]
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("run", ["correct", "fast"])
def test_a_whole_rehearsal(run, command_line, tmp_path):
    words = ["--run", run, "--rehearse", "--budget", "900", "--out", str(tmp_path)]
    assert cli.main(["gpu-check", *words]) == 0
    written = json.loads((tmp_path / f"{run}.json").read_text())
    assert {part["status"] for part in written["parts"]} <= {"ok", "skipped"}
