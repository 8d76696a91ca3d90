import json

import pytest

from vision_ops import _native

pytest.importorskip("rich")
if _native.cpu is None:
    pytest.skip(_native.cpu_missing, allow_module_level=True)

from benchmarks import __main__ as cli
from benchmarks import calls
from benchmarks.cases import OPS


def test_every_name_of_a_part_is_a_function():
    named = {name for owner in calls.owners() for name, value in vars(owner).items() if callable(value)}
    modules = {function.__module__.rpartition(".")[2] for function in calls.functions_of_parts()}
    for names in calls.PARTS.values():
        assert set(names) <= named | modules


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("name", OPS)
def test_the_parts_of_a_call(name, mode):
    account = calls.account(OPS[name], mode, calls=3, rounds=2)
    assert account.fused > 0 and account.eager > 0 and set(account.parts) == set(calls.COLUMNS)
    assert all(micros >= 0 for micros in account.parts.values())
    for part in ("checks", "output"):
        assert account.parts[part] > 0
    assert account.parts["bindings"] + account.parts["kernel"] > 0


def test_what_a_part_calls_is_its_own():
    clock = calls.Clock()
    inner = clock.timed("views", lambda: None)
    outer = clock.timed("output", lambda: inner())
    clock.start()
    outer()
    inner()
    assert (clock.calls["output"], clock.calls["views"]) == (1, 1)


def test_nothing_stays_timed():
    before = calls._native.cpu, calls._native.view
    with calls.instrumented(calls.Clock()):
        assert (calls._native.cpu, calls._native.view) != before
    assert (calls._native.cpu, calls._native.view) == before


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_environment", lambda threads: None)
    monkeypatch.setattr(calls.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(calls, "CALLS", 3)
    assert cli.main(["calls", "--op", "moga_gate", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "calls.json").read_text())["calls"]
    assert [(call["op"], call["mode"]) for call in found] == [("moga_gate", "forward"), ("moga_gate", "train")]
    assert "moga_gate" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["calls", "--op", "nothing"])
    assert "argument --op: 'nothing' is not one of" in capsys.readouterr().err
