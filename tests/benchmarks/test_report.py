import csv
import json
import math
from dataclasses import asdict, replace

import pytest

from benchmarks.measure import Quartiles, Ratio
from benchmarks.report import CaseResult, ProviderResult, Report, summaries

PROVIDERS = ("eager/contiguous", "eager/channels_last", "fused/contiguous")


def ratio(median, peer="eager/contiguous"):
    return Ratio(peer, Quartiles(median, median * 0.99, median * 1.02))


def result(case, same, best, mode="forward", **more):
    peers = [
        ProviderResult("eager", layout, first_call_s=0.1, time_s=Quartiles(0.002, 0.001, 0.003), saved_bytes=20)
        for layout in ("contiguous", "channels_last")
    ]
    fused = ProviderResult(
        "fused", "contiguous", first_call_s=0.5, time_s=Quartiles(0.001, 0.0009, 0.0011), saved_bytes=10, peak_bytes=7,
        same_layout=ratio(same), all_layouts=ratio(best, "eager/channels_last"),
    )  # fmt: skip
    return CaseResult(
        "dwconv", case, "8x6x6 k3", "float32", 4, mode, explain="C++", flops=10, min_bytes=100, floor_s=0.0005,
        rounds=20, settled=True, providers=[*peers, fused], **more,
    )  # fmt: skip


def wrong(case):
    return CaseResult("dwconv", case, "8x6x6 k3", "float32", 4, "train", status="WRONG", detail="output: error 1")


@pytest.fixture
def report():
    return Report(
        name="ops",
        device="cpu",
        machine={"cpu": "A processor", "threads": 2},
        versions={"python": "3.11", "torch": "2.13.0", "vision_ops": "0.1"},
        commit={"id": "abc", "dirty": True},
        date="2026-01-01T00:00:00+00:00",
        arguments={"batch": 4, "layout": ("contiguous",), "seconds": 60.0},
        rates={"float32": {"copy": {1 << 20: 1e10}, "gemm": 1e11}},
        results=[result("one", 2.0, 1.5), result("two", 8.0, 0.9), wrong("three")],
    )


def test_json_holds_everything(report, tmp_path):
    report.write(tmp_path)
    # Through JSON, because its keys are strings.
    assert json.loads((tmp_path / "ops.json").read_text()) == json.loads(json.dumps(asdict(report)))
    read = json.loads((tmp_path / "ops.json").read_text())["results"][0]["providers"][2]
    assert Quartiles(**read["same_layout"]["ratio"]) == report.results[0].providers[2].same_layout.ratio


def test_results_come_back_from_json(report, tmp_path):
    report.write(tmp_path)
    later = replace(report, results=[], rates={}, arguments=dict(report.arguments))
    later.resume(tmp_path)
    assert later.results == report.results[:2]  # without the wrong one
    assert later.rates == report.rates


@pytest.mark.parametrize(
    "change",
    [
        {"commit": {"id": "abc", "dirty": True, "changes": "other"}},
        {"commit": None},
        {"machine": {"cpu": "A processor", "threads": 1}},
        {"versions": {"torch": "2.14.0"}},
        {"arguments": {"batch": 4, "layout": ("contiguous",), "seconds": 3.0}},
    ],
)
def test_results_of_another_tree_machine_or_rule_are_not_taken(report, tmp_path, change):
    report.write(tmp_path)
    later = replace(report, results=[], **change)
    later.resume(tmp_path)
    assert not later.results


def test_what_is_no_report_is_not_taken(report, tmp_path):
    (tmp_path / "ops.json").write_text("{}")
    later = replace(report, results=[])
    later.resume(tmp_path)
    assert not later.results


def test_csv_has_a_row_for_every_provider(report, tmp_path):
    report.write(tmp_path)
    with (tmp_path / "ops.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], f"{row['provider']}/{row['layout']}", row["status"]) for row in rows] == [
        *((case, provider, "ok") for case in ("one", "two") for provider in PROVIDERS),
        ("three", "/", "WRONG"),
    ]
    fused = rows[2]
    assert float(fused["time_s_median"]) == 0.001
    assert float(fused["same_layout_q1"]) == pytest.approx(1.98)
    assert fused["all_layouts_peer"] == "eager/channels_last"
    assert (fused["commit"], fused["machine"], fused["torch"]) == ("abc+dirty", "A processor, 2 threads", "2.13.0")
    assert rows[0]["same_layout_median"] == ""


def test_summaries_are_the_geometric_mean_and_the_worst_case(report):
    same, best = summaries([*report.results, result("one", 3.0, 3.0, mode="train")])[:2]
    assert (same.against, same.mode, same.cases, same.slower) == ("same_layout", "forward", 2, 0)
    assert math.isclose(same.geomean, 4.0)
    assert (same.worst, same.worst_case) == (2.0, "one")
    assert (best.against, best.slower, best.worst, best.worst_case) == ("all_layouts", 1, 0.9, "two")


def test_a_wrong_case_spoils_the_report(report):
    assert not report.all_ok
    report.results.pop()
    assert report.all_ok


def test_the_table_fits_and_shows_the_ratios(report):
    table = pytest.importorskip("benchmarks.table")
    console = table.make_console()
    with console.capture() as capture:
        table.show(report, console)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= table.WIDTH
    for expected in ("2.00 1.98-2.04 eager", "0.90 0.89-0.92 eager nhwc", "WRONG dwconv three, train float32", "4.00"):
        assert expected in text


def test_the_chart_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import chart

    report.results.append(result("one", 3.0, 3.0, mode="train"))
    chart.draw(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dwconv-float32.png"]
    report.results.append(replace(result("one", 1.2, 1.1), op="xca"))
    chart.draw(report, tmp_path)
    report.results.append(replace(result("one", 1.2, 1.1), op="networks", batch=1))
    report.results.append(replace(result("one", 1.2, 1.1), op="networks", batch=4))
    chart.draw(report, tmp_path)
    for name in ("dwconv", "xca", "networks", "all"):
        assert (tmp_path / f"{name}-float32.png").read_bytes().startswith(b"\x89PNG")
