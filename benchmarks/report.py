"""What was measured, and the files it is kept in."""

from __future__ import annotations

import csv
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Quartiles, Ratio
from benchmarks.providers import Provider

NEVER_SLOWER = 0.95


@dataclass
class ProviderResult(Provider):
    first_call_s: float | None = None
    time_s: Quartiles | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    error: str | None = None
    # Of networks only. in_ops: the share of the time that our ops take, or of PyTorch's what they replace.
    images_per_s: float | None = None
    in_ops: float | None = None
    # Of the fused op only: against the best peer of its layout, and of any layout, and the other tree.
    same_layout: Ratio | None = None
    all_layouts: Ratio | None = None
    before: Ratio | None = None

    def take(self, times: Sequence[float], ratios: Mapping[tuple[str, str], Ratio]) -> None:
        self.time_s = Quartiles.of(times)
        self.same_layout, self.all_layouts, self.before = (
            ratios.get((self.name, against)) for against in ("same_layout", "all_layouts", "before")
        )


@dataclass
class CaseResult:
    """One case in one mode. `status` is "ok", "WRONG" (timed in gpu-check) or "FAILED" (raised); `detail` says why.

    `slower` holds the reasons for which backend "auto" would leave this case to the reference.
    """

    op: str
    case: str
    shape: str
    dtype: str
    batch: int
    mode: str
    status: str = "ok"
    detail: str | None = None
    explain: str | None = None
    slower: list[str] = field(default_factory=list)
    flops: int | None = None
    min_bytes: int | None = None
    floor_s: float | None = None
    rounds: int | None = None
    settled: bool | None = None
    providers: list[ProviderResult] = field(default_factory=list)

    def fused(self) -> list[ProviderResult]:
        return [provider for provider in self.providers if provider.kind == "fused" and provider.same_layout]

    @classmethod
    def read(cls, stored: dict[str, Any]) -> CaseResult:
        return cls(**stored | {"providers": [_provider(provider) for provider in stored["providers"]]})


def _rates(stored: dict[str, Any]) -> dict[str, Any]:
    return stored | {"copy": {int(size): rate for size, rate in stored["copy"].items()}}


def _provider(stored: dict[str, Any]) -> ProviderResult:
    ratios = {
        name: Ratio(found["peer"], Quartiles(**found["ratio"]))
        for name in ("same_layout", "all_layouts", "before")
        if (found := stored[name])
    }
    time = stored["time_s"] and Quartiles(**stored["time_s"])
    return ProviderResult(**stored | {"time_s": time} | ratios)


@dataclass
class Report:
    """`name` is that of the files, "ops" or "networks"."""

    name: str
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any] | None
    date: str
    arguments: dict[str, Any]
    rates: dict[str, Any] = field(default_factory=dict)
    results: list[CaseResult] = field(default_factory=list)

    @property
    def machine_name(self) -> str:
        threads = self.machine["threads"]
        return self.machine.get("gpu") or f"{self.machine['cpu']}, {threads} thread{'s' * (threads > 1)}"

    @property
    def all_ok(self) -> bool:
        return all(result.status == "ok" for result in self.results)

    def write(self, folder: Path) -> None:
        """Called after every case: files are replaced whole, so that an interrupted run leaves good ones."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{self.name}.json", lambda file: json.dump(asdict(self), file, indent=1))
        replace_file(folder / f"{self.name}.csv", self._write_csv)

    def resume(self, folder: Path) -> None:
        """Takes over what an earlier run left in the folder and found right: of the same commit and changes, on the
        same machine with the same versions, by the same rule."""
        try:
            stored = json.loads((folder / f"{self.name}.json").read_text())
            results = [CaseResult.read(result) for result in stored["results"]]
            same = all(_plain(getattr(self, name)) == stored[name] for name in ("commit", "machine", "versions"))
            same &= all(_plain(self.arguments[name]) == stored["arguments"][name] for name in ("layout", "seconds"))
        except (OSError, ValueError, KeyError, TypeError):  # none, or of another form
            return
        if same and self.commit:
            self.rates |= {dtype: _rates(rates) for dtype, rates in stored["rates"].items()}
            self.results += [result for result in results if result.status == "ok"]

    def _write_csv(self, file) -> None:
        rows = list(self._rows())
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """One row for every provider of every result; a result without providers has one row too."""
        for result in self.results:
            for provider in result.providers or [ProviderResult("", "")]:
                yield {
                    **{
                        name: value
                        for name, value in vars(result).items()
                        if name not in ("providers", "explain", "slower")
                    },
                    "provider": provider.kind,
                    "layout": provider.layout,
                    "first_call_s": provider.first_call_s,
                    **_flat("time_s", provider.time_s),
                    "saved_bytes": provider.saved_bytes,
                    "peak_bytes": provider.peak_bytes,
                    "images_per_s": provider.images_per_s,
                    "in_ops": provider.in_ops,
                    "error": provider.error,
                    **_flat_ratio("same_layout", provider.same_layout),
                    **_flat_ratio("all_layouts", provider.all_layouts),
                    **_flat_ratio("before", provider.before),
                    "machine": self.machine_name,
                    "torch": self.versions.get("torch"),
                    "vision_ops": self.versions.get("vision_ops"),
                    "commit": self.commit["id"] + "+dirty" * self.commit["dirty"] if self.commit else None,
                    "date": self.date,
                }


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def replace_file(path: Path, write) -> None:
    """Whole or not at all: whoever reads it, or is left with it, has a good one."""
    partial = path.with_suffix(path.suffix + ".part")
    with partial.open("w", newline="") as file:
        write(file)
    os.replace(partial, path)


def _flat(name: str, values: Quartiles | None) -> dict[str, float | None]:
    return {f"{name}_{part}": getattr(values, part, None) for part in ("median", "q1", "q3")}


def _flat_ratio(name: str, ratio: Ratio | None) -> dict[str, Any]:
    return {f"{name}_peer": ratio and ratio.peer, **_flat(name, ratio and ratio.ratio)}


@dataclass(frozen=True)
class Summary:
    """All cases of an op in one dtype, mode and layout, against the best peers of `against`."""

    op: str
    dtype: str
    mode: str
    layout: str
    against: str
    geomean: float
    worst: float
    worst_case: str
    slower: int
    cases: int


def summaries(results: Sequence[CaseResult]) -> list[Summary]:
    groups: dict[tuple[str, str, str, str, str], dict[str, float]] = {}
    for result in results:
        for provider in result.fused():
            for against in ("same_layout", "all_layouts"):
                key = (result.op, result.dtype, result.mode, provider.layout, against)
                groups.setdefault(key, {})[result.case] = getattr(provider, against).ratio.median
    return [_summary(key, ratios) for key, ratios in groups.items()]


def _summary(key: tuple[str, str, str, str, str], ratios: dict[str, float]) -> Summary:
    worst = min(ratios, key=lambda case: ratios[case])
    slower = sum(ratio < NEVER_SLOWER for ratio in ratios.values())
    return Summary(*key, statistics.geometric_mean(ratios.values()), ratios[worst], worst, slower, len(ratios))
