"""python -m benchmarks ledger: counts on the terminal, or into benchmarks/results."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import table
from benchmarks.cases import OPS
from benchmarks.gpu_check.parts import CASES
from benchmarks.ledger import count
from benchmarks.ledger.launches import KINDS, PARTS, Launch
from benchmarks.networks import NETWORKS

FIRST = count.RESULTS.with_name("ledger-first.json")
OP_COLUMNS = ("op", "case", "pass", *KINDS, "MB", "least", "GFLOP", "device us", "host us", "idle", "eager: launches")
OP_COLUMNS = (*OP_COLUMNS, "MB", "device us", "host us")
NETWORK_COLUMNS = ("network", "whose", *KINDS, "GB", *(f"{part} ms" for part in PARTS))
NETWORK_COLUMNS = (*NETWORK_COLUMNS, "device ms", "host ms", "step ms")
Row = list[str]


def run(args: argparse.Namespace) -> int:
    _check("--op", args.op, OPS, args.error)
    _check("--network", args.network, NETWORKS, args.error)
    everything = not args.op and not args.network
    ops, networks = (tuple(CASES), tuple(NETWORKS)) if everything else (args.op or (), args.network or ())
    console = table.make_console()
    if args.launches:
        _list(ops, networks, console)
        return 0
    found = count.counts(ops, networks)
    for title, columns, rows in _tables(found):
        if rows:
            console.print(_rich(title, columns, rows), "", sep="\n")
    if args.write:
        if not everything:
            args.error("argument --write: only all ops and networks make a ledger")
        count.write(found, count.RESULTS)
        count.RESULTS.with_suffix(".md").write_text(_markdown(found))
    return 0


def _check(argument: str, names: Iterable[str] | None, known: Mapping[str, Any], error: Any) -> None:
    for name in names or ():
        if name not in known:
            error(f"argument {argument}: {name!r} is not one of {', '.join(known)}")


def _list(ops: Iterable[str], networks: Iterable[str], console: Any) -> None:
    """Every kernel of ours, the longest first."""
    cuda = count.emulated()
    found = [(f"{op} {case}", count.count_op(OPS[op], case, cuda)) for op in ops for case in CASES[op]]
    for title, passes in found + [(name, count.count_network(name, cuda)) for name in networks]:
        for name, launches in passes.items():
            console.print(
                _rich(f"{title}, {name}", ("kind", "kernel", "launches", "MB", "us", "waves"), _rows(launches))
            )


def _rows(launches: list[Launch]) -> list[Row]:
    totals: dict[tuple[str, str], Counter] = {}
    for launch in launches:
        total = totals.setdefault((launch.kind, launch.name), Counter())
        total.update(launches=1, bytes=launch.bytes, us=launch.us, waves=launch.waves)
    rows = sorted(totals.items(), key=lambda item: -item[1]["us"])
    return [
        [*names, str(t["launches"]), f"{t['bytes'] / 1e6:.1f}", f"{t['us']:.1f}", f"{t['waves'] / t['launches']:.2f}"]
        for names, t in rows
    ]


def _tables(found: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[Row]]]:
    return [
        ("Ops, batch 128, activations in bfloat16, parameters in float32", OP_COLUMNS, _op_rows(found)),
        (
            "Networks, batch 128, bfloat16 autocast, a training step without optimizer",
            NETWORK_COLUMNS,
            _networks(found),
        ),
    ]


def _op_rows(found: dict[str, Any]) -> list[Row]:
    rows = []
    for op, cases in found["ops"].items():
        for case, by in cases.items():
            for name in count.PASSES:
                ours, eager = by["ours"][name], by["eager"][name]
                rows.append(
                    [
                        *(op, case, name, *(str(ours["launches"][kind]) for kind in KINDS)),
                        *(f"{ours['mb']:.0f}", f"{ours['least_mb']:.0f}", f"{ours['gflop']:.1f}"),
                        *(f"{device(ours):.0f}", f"{ours['host_us']:.0f}", f"{ours['idle']:.0%}"),
                        *(str(sum(eager["launches"].values())), f"{eager['mb'] + eager['cast_mb']:.0f}"),
                        *(f"{device(eager):.0f}", f"{eager['host_us']:.0f}"),
                    ]
                )
    return rows


def device(of_pass: dict[str, Any]) -> float:
    return sum(of_pass["device_us"].values())


def _networks(found: dict[str, Any]) -> list[Row]:
    rows = []
    for network, by in found["networks"].items():
        for whose, passes in by.items():
            both = list(passes.values())
            parts = [sum(p["device_us"][part] for p in both) / 1e3 for part in PARTS]
            host = sum(p["host_us"] for p in both) / 1e3
            launches = [str(sum(p["launches"][kind] for p in both)) for kind in KINDS]
            gb = sum(p["mb"] + p["cast_mb"] for p in both) / 1e3
            # The host runs ahead of the device within a pass: the slower one is what a pass takes.
            step = sum(max(device(p), p["host_us"]) for p in both) / 1e3
            times = (*parts, sum(parts), host, step)
            rows.append([network, whose, *launches, f"{gb:.1f}", *(f"{ms:.1f}" for ms in times)])
    return rows


def _rich(title: str, columns: Iterable[str], rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        drawn.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Ledger",
        "",
        "What CUDA would run, counted on meta tensors by `python -m benchmarks ledger --write`; nothing was measured. "
        "Launches by kind, casts of autocast apart; the bytes of all launches but casts; the least possible, where all "
        "that goes in and comes out is moved once; products on tensor cores; times from the constants in "
        "`benchmarks/ledger/constants.py`. Idle: the largest share of a launch of more than one wave that its last "
        "wave leaves empty. Step: of each pass the slower of device and host. Eager is PyTorch in channels_last.",
        "",
    ]
    for title, columns, rows in [*_tables(found), ("Against the first ledger", *_against_first(found))]:
        lines += [f"## {title}", "", _line(columns), _line(["---"] * len(columns)), *map(_line, rows), ""]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _against_first(found: dict[str, Any]) -> tuple[tuple[str, ...], list[Row]]:
    columns = "op", "case", "forward: launches", "MB", "backward: launches", "MB"
    first, rows = count.read(FIRST), []
    for op, cases in found["ops"].items():
        for case, by in cases.items():
            before = first["ops"].get(op, {}).get(case)
            if before is None:
                continue
            row = [op, case]
            for name in count.PASSES:
                then, now = before["ours"][name], by["ours"][name]
                row += [f"{total(then)} → {total(now)}", f"{then['mb']:.0f} → {now['mb']:.0f}"]
            rows.append(row)
    return columns, rows


def total(of_pass: dict[str, Any]) -> int:
    return sum(of_pass["launches"].values())
