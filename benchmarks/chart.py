"""The ratios as a picture, one file for every op and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks import LAYOUTS, MODES
from benchmarks.report import CaseResult, Report

COLOURS = {"forward": "#4c78a8", "train": "#f58518"}
BAR = 0.38


Row = tuple[str, str, str, int]  # op, case, shape, batch


def draw(report: Report, folder: Path) -> None:
    """Every op on its own, and where there are several, all of them together."""
    for dtype in dict.fromkeys(result.dtype for result in report.results):
        results = [result for result in report.results if result.dtype == dtype and result.fused()]
        ops = list(dict.fromkeys(result.op for result in results))
        for op in ops:
            own = [result for result in results if result.op == op]
            several = len({result.batch for result in own}) > 1
            rows = {_row(r): f"{r.case}  {r.shape}" + f"  batch {r.batch}" * several for r in own}
            _draw_rows(report, op, rows, own, folder / f"{op}-{dtype}.png")
        if len(ops) > 1:
            rows = {_row(r): f"{r.op}  {r.case}" for r in results}
            _draw_rows(report, "vision_ops", rows, results, folder / f"all-{dtype}.png")


def _row(result: CaseResult) -> Row:
    return result.op, result.case, result.shape, result.batch


def _draw_rows(report: Report, name: str, rows: Mapping[Row, str], results: Sequence[CaseResult], path: Path) -> None:
    layouts = [layout for layout in LAYOUTS if any(provider.layout == layout for provider in results[0].fused())]
    figure, panels = plt.subplots(
        1,
        len(layouts),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
        figsize=(4 + 4 * len(layouts), 1.8 + 0.42 * len(rows)),
    )
    for axes, layout in zip(panels[0], layouts, strict=True):
        _draw_panel(axes, layout, rows, results)
    panels[0][0].invert_yaxis()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    batches = ", ".join(str(batch) for batch in dict.fromkeys(result.batch for result in results))
    where = f"{report.machine_name}, {results[0].dtype}, batch {batches}"
    figure.suptitle(f"{name}: how many times faster than the best peer\n{where}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axes: Axes, layout: str, rows: Mapping[Row, str], results: Sequence[CaseResult]) -> None:
    places = {row: place for place, row in enumerate(rows)}
    for mode, offset in zip(MODES, (-BAR / 2, BAR / 2), strict=True):
        bars = {
            places[_row(result)] + offset: provider
            for result in results
            if result.mode == mode
            for provider in result.fused()
            if provider.layout == layout
        }
        same = [provider.same_layout.ratio.median for provider in bars.values()]
        best = [provider.all_layouts.ratio.median for provider in bars.values()]
        # Bars start at 1, so that an op that is slower than its peer points the other way.
        axes.barh(
            list(bars), [ratio - 1 for ratio in same], BAR, left=1, color=COLOURS[mode], label=f"{mode}, same layout"
        )
        axes.plot(
            best, list(bars), "d", color="black", markersize=3.5, label="any layout" if mode == MODES[0] else None
        )
        for place, ratio in zip(bars, same, strict=True):
            end = {"xy": (max(ratio, 1), place), "xytext": (4, 0), "textcoords": "offset points"}
            axes.annotate(f"{ratio:.2f}", va="center", fontsize=7, **end)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_title(layout, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12, y=0.01)
    axes.set_yticks(range(len(rows)), list(rows.values()), fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
