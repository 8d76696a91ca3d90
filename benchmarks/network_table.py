"""What the terminal shows of networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.network_race import OURS
from benchmarks.report import CaseResult, ProviderResult, Report
from benchmarks.table import SHORT, figure, megabytes, new_table, print_before, print_notes, ratio_text

LEGEND = (
    "Times faster: time of the best of the others, eager PyTorch unless named (timm, torch.compile of the reference), "
    "over ours; median and quartiles of interleaved rounds, ~ where the quartiles are more than 5 % off the median. "
    "Training steps are forward, loss, backward and AdamW. nchw: contiguous, nhwc: channels_last. In ops: share of our "
    "time in fused ops, and of eager's in what they replace. Saved MB: kept for the backward pass without parameters; "
    "peak MB: the most that a step held beyond what was there before; ours and eager's."
)


def show(report: Report, console: Console) -> None:
    groups: dict[tuple[str, int], list[CaseResult]] = {}
    for result in report.results:
        groups.setdefault((result.dtype, result.batch), []).append(result)
    for (dtype, batch), results in groups.items():
        console.print(_table(f"networks, {dtype}, batch {batch}, {report.machine_name}", results), "", sep="\n")
    if any(result.fused() for result in report.results):
        console.print(LEGEND)
        if report.device == "cpu":
            console.print("Times are of this machine only; the ratios are what to compare.")
    print_before(report, console)
    for result in report.results:
        print_notes(result, console)


def _table(title: str, results: Sequence[CaseResult]) -> Table:
    table = new_table(title, gap=0)
    for name in ("network", "mode,\nlayout", "times faster than\nthe best of its layout", "than the best of all"):
        table.add_column(name)
    for name in ("images/s", "in ops", "saved MB", "peak MB"):
        table.add_column(f"{name}\nours, eager", justify="right")
    last = None
    for result in results:
        for row in _rows(result):
            table.add_row(result.case if result.case != last else "", *row)
            last = result.case
    return table


def _rows(result: CaseResult) -> list[list[Text | str]]:
    if result.status != "ok":
        return [[SHORT[result.mode], Text(result.status, style="bold red")]]
    by_name = {provider.name: provider for provider in result.providers}
    return [_row(result, ours, by_name) for ours in result.providers if ours.kind in OURS and ours.time_s]


def _row(result: CaseResult, ours: ProviderResult, by_name: dict[str, ProviderResult]) -> list[Text | str]:
    rival, best = by_name[ours.same_layout.peer], by_name[ours.all_layouts.peer]
    eager = by_name[f"eager/{ours.layout}"]
    return [
        f"{SHORT[result.mode]} {SHORT[ours.layout]}{', compiled' * (ours.kind != 'fused')}",
        ratio_text(ours.same_layout, _name(rival)),
        ratio_text(ours.all_layouts, f"{_name(best)} {SHORT[best.layout]}".strip()) if best is not rival else "",
        _pair(figure, ours.images_per_s, eager.images_per_s),
        _pair("{:.0%}".format, ours.in_ops, eager.in_ops),
        _pair(megabytes, ours.saved_bytes, eager.saved_bytes),
        _pair(megabytes, ours.peak_bytes, eager.peak_bytes),
    ]


def _name(peer: ProviderResult) -> str:
    """Short, and nothing for the usual one."""
    return "" if peer.kind == "eager" else peer.kind.partition("(")[0]


def _pair(form: Callable[[Any], str], ours: float | None, eager: float | None) -> str:
    return "" if ours is None or eager is None else f"{form(ours)}, {form(eager)}"
