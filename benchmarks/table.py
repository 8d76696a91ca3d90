"""What the terminal shows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.measure import Ratio
from benchmarks.report import NEVER_SLOWER, CaseResult, ProviderResult, Report, Summary, summaries

WIDTH = 120
SHORT = {"contiguous": "nchw", "channels_last": "nhwc", "forward": "fwd", "train": "train"}
AGAINST = {"same_layout": "its layout", "all_layouts": "any layout"}
LEGEND = (
    "Times faster: time of the best peer, eager PyTorch, torch.compile or sdpa (scaled_dot_product_attention, where it "
    "can write the op), over that of the fused op; median and quartiles of interleaved rounds, ~ where the quartiles "
    "are more than 5 % off the median. nchw: contiguous, nhwc: channels_last. Floor: max(min bytes / copy rate, "
    "flops / GEMM rate). Saved MB: kept for the backward pass by the fused op, eager MB: by eager."
)


def make_console() -> Console:
    console = Console(highlight=False, markup=False)
    # Without a terminal there is no width to keep to, and rich would take 80 columns.
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


def show(report: Report, console: Console) -> None:
    groups: dict[tuple[str, str], list[CaseResult]] = {}
    for result in report.results:
        groups.setdefault((result.op, result.dtype), []).append(result)
    for (op, dtype), results in groups.items():
        title = f"{op}, {dtype}, batch {results[0].batch}, {report.machine_name}"
        console.print(_case_table(title, results), "", sep="\n")
    if any(result.fused() for result in report.results):
        _print_legend(report, console)
        rows = summaries(report.results)
        if any(row.cases > 1 for row in rows):  # else it would say the same once more
            console.print(_summary_table(rows), "", sep="\n")
    print_before(report, console)
    for result in report.results:
        print_notes(result, console)


def new_table(title: str, gap: int) -> Table:
    style = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "pad_edge": False}
    return Table(title=title, padding=(0, gap, 0, 0), **style)


def _case_table(title: str, results: Sequence[CaseResult]) -> Table:
    table = new_table(title, gap=0)
    table.add_column("case")
    table.add_column("mode,\nlayout")
    table.add_column("times faster than\nthe best of its layout")
    table.add_column("than the best of all,\nif of another layout")
    for name in ("fused\nms", "best\nms", "% of\nfloor", "saved\nMB", "eager\nMB"):
        table.add_column(name, justify="right", min_width=5)
    by_case: dict[str, list[CaseResult]] = {}
    for result in results:
        by_case.setdefault(result.case, []).append(result)
    for case, in_modes in by_case.items():
        rows = [row for result in in_modes for row in _rows(result)]
        names = [case, in_modes[0].shape]
        for i in range(max(len(rows), len(names))):
            table.add_row(names[i] if i < len(names) else "", *(rows[i] if i < len(rows) else ()))
    return table


def _rows(result: CaseResult) -> list[list[Text | str]]:
    if result.status != "ok":
        return [[SHORT[result.mode], Text(result.status, style="bold red")]]
    by_name = {provider.name: provider for provider in result.providers}
    return [_row(result, fused, by_name) for fused in result.fused()]


def _row(result: CaseResult, fused: ProviderResult, by_name: dict[str, ProviderResult]) -> list[Text | str]:
    rival, best, eager = (
        by_name[name] for name in (fused.same_layout.peer, fused.all_layouts.peer, f"eager/{fused.layout}")
    )
    time = fused.time_s.median
    return [
        f"{SHORT[result.mode]} {SHORT[fused.layout]}",
        ratio_text(fused.same_layout, rival.kind),
        ratio_text(fused.all_layouts, f"{best.kind} {SHORT[best.layout]}") if best is not rival else "",
        figure(time * 1e3),
        figure(best.time_s.median * 1e3),
        f"{result.floor_s / time:.0%}",
        megabytes(fused.saved_bytes),
        megabytes(eager.saved_bytes),
    ]


def ratio_text(ratio: Ratio, peer: str) -> Text:
    times = ratio.ratio
    style = "bold red" if times.median < NEVER_SLOWER else "bold green"
    doubt = "" if times.spread <= 0.05 else "~"
    return Text.assemble((f"{doubt}{figure(times.median)}", style), f" {figure(times.q1)}-{figure(times.q3)} {peer}")


def figure(value: float) -> str:
    """Three digits that mean something, two of a small number."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}"


def megabytes(count: int | None) -> str:
    return "" if count is None else figure(count / 1e6)


def print_before(report: Report, console: Console) -> None:
    """What became of the times of the other tree, if it took part."""
    found: dict[str, dict[str, Ratio]] = {}
    for result in report.results:
        for fused in result.fused():
            if fused.before:
                name = f"{result.op} {result.case}, {SHORT[result.mode]} {SHORT[fused.layout]}"
                group = f"{result.dtype} batch {result.batch}, {result.mode}"
                found.setdefault(group, {})[name] = fused.before
    if not found:
        return
    console.print(f"Times faster than {report.arguments['against']}, in turns with it:")
    for group, ratios in found.items():
        console.print(f"{group}:", style="bold")
        for name, ratio in ratios.items():
            console.print("  ", name, ratio_text(ratio, ""))
        medians = [ratio.ratio.median for ratio in ratios.values()]
        console.print(f"   all {len(medians)}: geometric mean {statistics.geometric_mean(medians):.3f}")
    console.print()


def _print_legend(report: Report, console: Console) -> None:
    console.print(LEGEND)
    for dtype, rates in report.rates.items():
        copies = ", ".join(f"{rate / 1e9:.0f} GB/s at {size >> 20} MiB" for size, rate in rates["copy"].items())
        console.print(f"Measured in this run, {dtype}: copy {copies}; GEMM {rates['gemm'] / 1e12:.2f} TFLOP/s.")
    providers = [provider for result in report.results for provider in result.providers]
    calls: dict[str, list[float]] = {}
    for provider in providers:
        if provider.first_call_s is not None:
            calls.setdefault(provider.kind, []).append(provider.first_call_s)
    firsts = ", ".join(f"{kind} {figure(statistics.median(seconds))} s" for kind, seconds in calls.items())
    console.print(f"First calls, the median over all cases: {firsts}.")
    if report.device == "cpu":
        console.print("Times are of this machine only; the ratios are what to compare.")
    console.print()


def print_notes(result: CaseResult, console: Console) -> None:
    name = f"{result.op} {result.case}, {result.mode} {result.dtype}"
    if result.status != "ok":
        console.print(f"{result.status} {name}: {result.detail}", style="red")
    if result.slower:
        console.print(f'{name}: backend "auto" would take PyTorch: {"; ".join(result.slower)}')
    for provider in result.providers:
        if provider.error:
            console.print(f"{name}: no {provider.name}: {provider.error}")


def _summary_table(rows: Sequence[Summary]) -> Table:
    table = new_table("all cases", gap=2)
    for name in ("op", "dtype", "mode, layout", "times faster than the best of"):
        table.add_column(name)
    table.add_column("geomean", justify="right")
    table.add_column("worst")
    table.add_column(f"below {NEVER_SLOWER}", justify="right")
    for row in rows:
        table.add_row(
            row.op,
            row.dtype,
            f"{SHORT[row.mode]} {SHORT[row.layout]}",
            AGAINST[row.against],
            figure(row.geomean),
            f"{figure(row.worst)} {row.worst_case}",
            Text(f"{row.slower} of {row.cases}", style="red" if row.slower else "green"),
        )
    return table
