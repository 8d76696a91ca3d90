"""Losses of ours over those of the reference, a panel for every network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#4c78a8", "#f58518")


def draw(found: Mapping[str, Mapping[str, Mapping[str, list[float]]]], where: str, path: Path) -> None:
    figure, panels = plt.subplots(
        1, len(found), squeeze=False, layout="constrained", figsize=(1 + 3.4 * len(found), 3.4)
    )
    for axes, (name, curves) in zip(panels[0], found.items(), strict=True):
        for (seed, both), colour in zip(curves.items(), COLOURS, strict=True):
            axes.plot(both["eager"], color=colour, linewidth=4, alpha=0.35, label=f"reference, seed {seed}")
            axes.plot(both["fused"], color=colour, linewidth=1, label=f"fused, seed {seed}")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"Training loss, {where}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
