"""--against: two trees in one run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import cases
from benchmarks.machine import Rates
from benchmarks.measure import Rule, Stopwatch
from benchmarks.other_tree import OtherTree
from benchmarks.race import Plan, Race
from benchmarks.shapes import DWConvShape
from vision_ops import reference

ROOT = Path(__file__).parents[2]
OP = {"op": "layer_norm_2d", "case": "HorNet-T.4", "dtype": "float32", "layout": "channels_last", "batch": 1}
NETWORK = {"variant": "edgenext_xx_small", "image": 64, "dtype": "float32", "layout": "channels_last", "batch": 1}


@pytest.mark.parametrize(("what", "about"), [("ops", OP), ("networks", NETWORK)])
def test_another_process_times_it(what, about):
    tree = OtherTree(ROOT, what, "cpu", 1)
    try:
        samplers = [tree.sampler(**about, mode=mode) for mode in ("forward", "train")]
        assert all(0 < sampler() < 10 for sampler in samplers)
        wrong = {"ops": {"case": "HorNet-T.9"}, "networks": {"variant": "nothing"}}[what]
        with pytest.raises(RuntimeError, match="the other tree: "):
            tree.sampler(**about | wrong, mode="train")
        assert samplers[1]() > 0
        tree.forget()
        with pytest.raises(RuntimeError, match="IndexError"):
            samplers[1]()
    finally:
        tree.close()


def test_a_tree_that_cannot_be_imported(tmp_path):
    package = tmp_path / "vision_ops"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not built')")
    with pytest.raises(RuntimeError, match="has ended"):
        OtherTree(tmp_path, "ops", "cpu", None)


class Slower:
    """A tree that takes a second and has no channels_last."""

    def sampler(self, layout, **about):
        if layout == "channels_last":
            raise RuntimeError("the other tree: no")
        assert about == {"op": "dwconv", "case": "tiny", "dtype": "float32", "batch": 2, "mode": "forward"}
        return lambda: 1.0


def test_a_race_with_another_tree():
    setting = cases.Setting("cpu", torch.float32, "contiguous", batch=2)
    rule, rates = Rule(0.0, rounds=2), Rates({1: 1e9}, 1e9)
    plan = Plan(setting, ("contiguous", "channels_last"), ("forward",), rule, Stopwatch("cpu"), rates)
    shapes = {"tiny": DWConvShape(8, 6, 3)}
    op = cases.Op("dwconv", reference.dwconv, reference.dwconv, shapes, cases.build_dwconv, quick=())
    (result,) = Race(op, "tiny", ("eager",), replace(plan, other=Slower())).run(lambda stage: None)
    assert result.status == "ok"
    first, second = result.fused()
    assert (first.before.peer, second.before) == ("before/contiguous", None)
    # The other tree's second to this one's: two rounds of a call of microseconds differ by a lot.
    assert 0.05 < first.before.ratio.median * first.time_s.median < 20
    assert {fused.all_layouts.peer.partition("/")[0] for fused in (first, second)} == {"eager"}
    assert [p.error for p in result.providers if p.kind == "before"] == [None, "RuntimeError: the other tree: no"]


def test_what_is_no_checkout(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    from benchmarks import ops

    monkeypatch.setattr(ops, "prepare_torch", lambda args, fresh: None)
    monkeypatch.setattr(cli, "prepare_environment", lambda threads: None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ops", "--device", "cpu", "--against", str(tmp_path)])
    assert "is no checkout of this repository" in capsys.readouterr().err
