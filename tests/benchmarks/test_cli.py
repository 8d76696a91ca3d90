import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ops(monkeypatch):
    """The command with two small ops and without what it would change in this process or take long to find out."""
    pytest.importorskip("rich")
    from benchmarks import cases, ops
    from benchmarks.machine import Rates
    from benchmarks.shapes import DWConvShape
    from vision_ops import reference

    def op(fused, case):
        shapes = {case: DWConvShape(8, 6, 3)}
        return cases.Op("dwconv", fused, reference.dwconv, shapes, cases.build_dwconv, quick=(case,))

    def wrong(*args, **options):
        return reference.dwconv(*args, **options) + 1

    fakes = {"dwconv": op(reference.dwconv, "tiny"), "multi_order_dwconv": op(wrong, "wrong")}
    monkeypatch.setattr(ops, "OPS", fakes)
    monkeypatch.setattr(ops, "prepare_torch", lambda args, fresh: None)
    monkeypatch.setattr(ops, "PEERS", {"cpu": ("eager",)})
    monkeypatch.setattr(cli, "prepare_environment", lambda threads: None)
    monkeypatch.setattr(ops.machine, "measure_rates", lambda *args: Rates({1: 1e9}, 1e9))
    return fakes


def run(*words):
    return cli.main(["ops", "--device", "cpu", "--seconds", "0.001", *words])


def read(folder):
    return json.loads((folder / "ops.json").read_text())


def test_a_right_op_exits_with_0_and_leaves_its_files(ops, tmp_path):
    assert run("--op", "dwconv", "--out", str(tmp_path), "--mode", "train", "--layout", "channels_last") == 0
    written = read(tmp_path)
    assert written["arguments"]["batch"] == 4
    assert {"python", "torch", "vision_ops"} <= set(written["versions"])
    (result,) = written["results"]
    assert (result["mode"], result["dtype"], result["rounds"] >= 20) == ("train", "float32", True)
    assert {provider["layout"] for provider in result["providers"]} == {"channels_last"}
    assert (tmp_path / "ops.csv").exists()


def test_only_the_cases_that_begin_so(ops, tmp_path, capsys):
    ops["dwconv"].cases.update({"tiny.2": ops["dwconv"].cases["tiny"], "other": ops["dwconv"].cases["tiny"]})
    words = ("--op", "dwconv", "--mode", "forward", "--layout", "contiguous")
    assert run(*words, "--case", "tiny.", "oth", "--out", str(tmp_path)) == 0
    assert [result["case"] for result in read(tmp_path)["results"]] == ["tiny.2", "other"]
    with pytest.raises(SystemExit, match="2"):
        run(*words, "--case", "huge")
    assert "no case of dwconv begins with huge" in capsys.readouterr().err


def test_a_wrong_op_exits_with_1(ops, tmp_path):
    assert run("--out", str(tmp_path), "--mode", "forward") == 1
    assert [result["status"] for result in read(tmp_path)["results"]] == ["ok", "WRONG"]


def test_the_short_run_takes_one_case_of_every_op_and_compiles_what_stands_for_a_network(ops, tmp_path, monkeypatch):
    from dataclasses import replace

    from benchmarks import ops as command

    shape = ops["dwconv"].cases["tiny"]
    ops["multi_order_dwconv"] = replace(ops["dwconv"], cases={"second": shape, "first": shape}, quick=("first",))
    ops["dwconv"].cases["last"] = shape
    ops["dwconv"] = replace(ops["dwconv"], quick=("tiny", "last"), compile_in_short=True)
    monkeypatch.setattr(command, "PEERS", {"cpu": ("eager", "aot_eager")})
    assert run("--out", str(tmp_path), "--mode", "forward", "--layout", "contiguous") == 0
    found = [(result["case"], {p["kind"] for p in result["providers"]}) for result in read(tmp_path)["results"]]
    assert found == [("tiny", {"fused", "eager", "aot_eager"}), ("first", {"fused", "eager"})]


def test_a_full_run_goes_on_where_it_was_stopped(ops, tmp_path, monkeypatch, capsys):
    from benchmarks.race import Race

    measure, measured = Race.run, []

    def stop(self, tell):
        if len(measured) == 2:  # at a time
            raise KeyboardInterrupt
        measured.append(self.case)
        return measure(self, tell)

    monkeypatch.setattr(Race, "run", stop)
    monkeypatch.setattr("benchmarks.ops.draw", lambda *args: None)
    monkeypatch.setattr("benchmarks.machine.commit", lambda: {"id": "abc", "dirty": True, "changes": "0"})
    ops["dwconv"].cases.update(dict.fromkeys(("a", "b", "c"), ops["dwconv"].cases["tiny"]))
    words = ("--full", "--op", "dwconv", "--mode", "forward", "--layout", "contiguous", "--out", str(tmp_path))
    assert run(*words) == 130
    measured.clear()
    assert run(*words) == 0
    assert measured == ["b", "c"]
    assert "2 of 4 cases are in" in capsys.readouterr().out
    assert [result["case"] for result in read(tmp_path)["results"]] == ["tiny", "a", "b", "c"]
    measured.clear()
    assert run(*words, "--mode", "forward,train") == 130  # none has been trained
    assert measured == ["tiny", "a"]
    measured.clear()
    monkeypatch.setattr("benchmarks.ops.PEERS", {"cpu": ("eager", "aot_eager")})
    assert run(*words) == 130  # none has met that peer
    assert measured == ["tiny", "a"]


def test_an_interrupted_run_keeps_what_it_measured(ops, tmp_path, monkeypatch):
    from benchmarks.race import Race

    measure = Race.run

    def interrupt(self, tell):
        if self.op is ops["multi_order_dwconv"]:
            raise KeyboardInterrupt
        return measure(self, tell)

    monkeypatch.setattr(Race, "run", interrupt)
    assert run("--out", str(tmp_path), "--mode", "forward") == 130
    assert [result["status"] for result in read(tmp_path)["results"]] == ["ok"]


def test_without_matplotlib_one_line_says_so(ops, tmp_path, monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert run("--op", "dwconv", "--mode", "forward", "--out", str(tmp_path)) == 0
    assert "pip install 'vision-ops[bench]'" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["ops", "--op", "nothing"],
            "argument --op: 'nothing' is not one of multi_order_dwconv, dwconv, ",
        ),
        (["ops", "--dtype", "float32,int8"], "argument --dtype: 'int8' is not one of float32, bfloat16, float16"),
        (["ops", "--mode", "backward"], "argument --mode: 'backward' is not one of forward, train"),
        (["ops", "--layout", "nhwc"], "argument --layout: 'nhwc' is not one of contiguous, channels_last"),
        (["ops", "--batch", "0"], "argument --batch: '0' is not a positive int"),
        (["ops", "--seconds", "nan"], "argument --seconds: 'nan' is not a positive float"),
        (["ops", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_why(words, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_environment", lambda threads: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_rich_one_line_says_what_to_install(monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    with pytest.raises(SystemExit) as stop:
        cli.main(["ops"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "rich is not installed: pip install 'vision-ops[bench]'\n"


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import sys, benchmarks.__main__, benchmarks.shapes; print({'torch', 'rich', 'vision_ops'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
