"""What `accelerate` did, to be read."""

import re
from dataclasses import dataclass, field
from typing import Any

_COLUMNS = "modules", "class", "runs", "left to PyTorch"


@dataclass(frozen=True)
class Entry:
    """A module that was recognised. ops: what runs in the place of its forward, none if it is left alone. reasons: why
    it is left alone, or what in it still calls its layers and why."""

    module: str
    kind: str
    ops: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass
class Report:
    """An entry for every module that was recognised; `str()` is a table of them, `rich` prints its own."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """What runs, by the names of modules."""
        return {entry.module: entry.ops for entry in self.entries if entry.ops}

    @property
    def left(self) -> dict[str, tuple[str, ...]]:
        """Why modules are left alone, by their names."""
        return {entry.module: entry.reasons for entry in self.entries if not entry.ops}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """One for all modules of a class that run the same and are left for the same reasons."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for entry in self.entries:
            ops, reasons = ", ".join(f"fused_{op}" for op in entry.ops), "; ".join(entry.reasons)
            groups.setdefault((entry.kind, ops or "its own forward", reasons), []).append(entry.module)
        return [(_names(names), *group) for group, names in groups.items()]

    def __str__(self) -> str:
        count = len(self.fused)
        title = f"{count} of {len(self.entries)} modules run fused" if self.entries else "no module is known"
        rows = [_COLUMNS, *self.rows()] if self.entries else []
        widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else []
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
        return "\n".join([title, *lines])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*_COLUMNS, title=str(self).splitlines()[0])
        for row in self.rows():
            table.add_row(*row)
        return table


def _names(names: list[str]) -> str:
    """The names of modules, shorter: those that differ in numbers only are written with a star."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    return ", ".join(
        names[0] or "the model" if len(names) == 1 else f"{pattern} ({len(names)})"
        for pattern, names in patterns.items()
    )
