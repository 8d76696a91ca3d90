"""How gpu-check runs its parts: scripts without torch stand in for them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu_check import runner
from benchmarks.gpu_check.runner import Part, Runner

TELL = """
import json, os, signal, sys, time
def tell(**result): print("@@ " + json.dumps(result), flush=True)
def turn(): tell(ready=True); sys.stdin.readline()
"""


def part(name, code, limit=30.0, **options):
    return Part(name, [sys.executable, "-S", "-c", TELL + code], limit, **options)


def run(parts, budget=60.0, cores=8, **options):
    outcomes = []
    Runner(parts, budget, outcomes.append, cores=cores, **options).run()
    return {outcome.name: outcome for outcome in outcomes}


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.5)
    monkeypatch.setattr(runner, "TICK", 0.01)


@pytest.fixture
def patience():
    """How many times longer a limit has to be than on an idle machine: processes take their time to start."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-S", "-c", TELL], check=True)
    return max(1.0, 20 * (time.perf_counter() - start))


def test_a_part_that_crashes_hangs_or_lies_costs_only_itself(patience):
    start, limit = time.perf_counter(), 0.5 * patience
    found = run(
        [
            part("crashes", "tell(a=1); os.abort()"),
            part("hangs", "tell(a=1); time.sleep(60)", limit=limit),
            part("does not heed", "signal.signal(2, signal.SIG_IGN); tell(a=1); time.sleep(60)", limit=limit),
            part("hangs as it prepares", "time.sleep(60)", alone=True, preparation=limit),
            part("hangs alone", "turn(); tell(a=1); time.sleep(60)", limit=limit, alone=True),
            part("lies", 'tell(verdict="WRONG", detail="x: error 1"); tell(us=3)'),
            part("lies and hangs", 'tell(verdict="WRONG", detail="x: error 2"); time.sleep(60)', limit=limit),
            part("fails", 'tell(verdict="FAILED", detail="x: no kernel")'),
            part("raises", "tell(a=1); raise ValueError('bad')"),
            part("cannot", 'tell(verdict="skipped", detail="no tool")'),
            part("garbles", 'print("@@ {"); tell(a=1)'),
            part("is fine", 'tell(verdict="ok")'),
            part("is fine alone", "turn(); tell(us=2)", alone=True),
        ]
    )
    assert time.perf_counter() - start < 20 * patience
    statuses = {name: outcome.status for name, outcome in found.items()}
    assert statuses == {
        "crashes": "CRASHED", "hangs": "HUNG", "does not heed": "HUNG", "hangs as it prepares": "HUNG",
        "hangs alone": "HUNG", "lies": "WRONG", "lies and hangs": "WRONG", "fails": "FAILED", "raises": "FAILED",
        "cannot": "skipped", "garbles": "ok", "is fine": "ok", "is fine alone": "ok",
    }  # fmt: skip
    for name in ("crashes", "hangs", "does not heed", "hangs alone", "raises", "garbles"):
        assert found[name].results == [{"a": 1}]
    # A wrong result does not keep what was timed from being kept.
    assert {"us": 3} in found["lies"].results and found["lies"].detail == "x: error 1"
    assert found["crashes"].detail == "SIGABRT after 1 results"
    assert found["hangs"].detail == f"not done in {limit:g} s, after 1 results"
    assert found["raises"].detail == "ValueError: bad" and "Traceback" in found["raises"].output
    assert found["cannot"].detail == "no tool" and found["is fine"].output is None


def test_what_is_timed_is_alone_and_in_order():
    beside = "tell(start=time.monotonic()); time.sleep(0.3); tell(end=time.monotonic())"
    alone = "time.sleep({}); turn(); " + beside
    parts = [
        part("first alone", alone.format(0.4), alone=True),
        part("second alone", alone.format(0.0), alone=True),
        part("beside 1", beside),
        part("beside 2", beside),
    ]
    found = run(parts)
    spans = {name: (o.results[0]["start"], o.results[1]["end"]) for name, o in found.items()}
    assert max(spans["beside 1"][0], spans["beside 2"][0]) < min(spans["beside 1"][1], spans["beside 2"][1])
    assert max(spans["beside 1"][1], spans["beside 2"][1]) <= spans["first alone"][0]
    assert spans["first alone"][1] <= spans["second alone"][0]
    assert found["first alone"].prepared >= 0.4 and 0.3 <= found["first alone"].seconds < 2


@pytest.mark.parametrize("scarce", [{"cores": 2}, {"gib": 2.0}])
def test_no_more_runs_at_once_than_fits(scarce):
    code = "tell(start=time.monotonic()); time.sleep(0.2); tell(end=time.monotonic())"
    found = run([*(part(f"small {i}", code) for i in range(5)), part("large", code, cores=4, gib=4.0)], **scarce)
    marks = [(o.results[0]["start"], 1, o.name) for o in found.values()]
    marks += [(o.results[1]["end"], -1, o.name) for o in found.values()]
    under_way, most = set(), 0
    for _, step, name in sorted(marks):
        under_way.add(name) if step > 0 else under_way.discard(name)
        most = max(most, len(under_way))
        # What is larger than the machine runs when nothing else does.
        assert "large" not in under_way or len(under_way) == 1
    assert most == 2


def test_the_budget_is_kept(patience):
    parts = [
        part("runs beside", "tell(a=1); time.sleep(60)"),
        part("never starts", "tell(a=1)"),
        part("is not prepared", "time.sleep(60)", alone=True, cores=0),
        part("takes too long", "turn(); tell(a=1); time.sleep(60)", alone=True, cores=0),
        part("has no turn", "turn()", alone=True, cores=0),
    ]
    start = time.perf_counter()
    found = run(parts, budget=3.0 * patience, cores=1)
    assert time.perf_counter() - start < 5 * patience
    assert {name: (o.status, o.results) for name, o in found.items()} == {
        "runs beside": ("cut", [{"a": 1}]), "never starts": ("skipped", []), "is not prepared": ("cut", []),
        "takes too long": ("cut", [{"a": 1}]), "has no turn": ("cut", []),
    }  # fmt: skip


def test_a_part_that_is_interrupted_can_still_tell_what_it_has(monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 20.0)
    code = "try: turn(); time.sleep(60)\nexcept KeyboardInterrupt: tell(calls=7)"
    assert run([part("sanitizer", code, limit=0.5, alone=True)])["sanitizer"].results == [{"calls": 7}]


def test_what_a_part_leaves_behind_is_ended(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess\nsubprocess.Popen([sys.executable, '-S', '-c', {child!r}])\nos.abort()"
    assert run([part("crashes", code)])["crashes"].status == "CRASHED"
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    outcomes = []

    def keep(outcome):
        outcomes.append(outcome)
        if outcome.name == "done":
            raise KeyboardInterrupt

    parts = [part("hangs", "tell(pid=os.getpid()); time.sleep(60)"), part("done", "time.sleep(0.5)")]
    with pytest.raises(KeyboardInterrupt):
        Runner(parts, 60.0, keep, cores=2).run()
    assert [(o.name, o.status) for o in outcomes] == [("done", "ok"), ("hangs", "cut")]
    with pytest.raises(ProcessLookupError):
        os.kill(outcomes[1].results[0]["pid"], signal.SIGCONT)


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(ValueError, match="one name"):
        Runner([part("a", ""), part("a", "")], 1.0, lambda outcome: None, cores=1)
