"""A run on one screen, the worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu_check.runner import STATUSES, Outcome
from benchmarks.networks import KINDS

WIDTH = 118
SHOWN, SHOWN_ROWS = 12, 22  # parts that did not end well, and rows of a table
Rows = dict[tuple[str, ...], dict[str, Any]]


def screen(title: str, outcomes: Sequence[Outcome]) -> str:
    lines = [title, *_parts(outcomes)]
    results = [result for outcome in outcomes for result in outcome.results]
    for section in (_costs, _races, _network_costs, _networks, _tests, _sanitizers, _ncu, _constants):
        lines += section(results)
    return "\n".join(line[:WIDTH].rstrip() for line in lines) + "\n"


def _parts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    counts = Counter(outcome.status for outcome in outcomes)
    yield "parts: " + ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    bad = sorted((o for o in outcomes if o.status != "ok"), key=lambda o: STATUSES.index(o.status))
    for outcome in bad[:SHOWN]:
        yield f"  {outcome.status:8}{outcome.name}: {' '.join((outcome.detail or '').split())}"
    if len(bad) > SHOWN:
        yield f"  and {len(bad) - SHOWN} more"


def _merged(results: Sequence[dict[str, Any]], *names: str) -> Rows:
    """What several results say of one thing, which has these names, together."""
    rows: Rows = {}
    for result in results:
        if all(name in result for name in names):
            rows.setdefault(tuple(result[name] for name in names), {}).update(result)
    return rows


def _costs(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = _merged(results, "op", "case", "mode", "kind")
    wrong = {(r["op"], r["case"]) for r in results if r.get("verdict") == "WRONG" and "case" in r}
    pairs = []
    for (op, case, mode, kind), fused in rows.items():
        eager = rows.get((op, case, mode, "eager"), {})
        if kind == "fused" and mode == "train" and "event_us" in fused and "event_us" in eager:
            pairs.append((eager["event_us"] / fused["event_us"], op, case, fused, eager))
    if not pairs:
        return
    yield ""
    yield f"{'training step, us: ours | eager':46}{'faster':>7}{'events':>16}{'kernels':>16}{'host':>14}{'graph':>14}"
    pairs.sort(key=lambda pair: pair[0])
    for ratio, op, case, fused, eager in pairs[:SHOWN_ROWS]:
        name = "WRONG " * ((op, case) in wrong) + f"{op} {case}"
        cells = (_pair(fused, eager, what) for what in ("event_us", "kernels_us", "host_us", "graph_us"))
        yield f"{name:46.46}{ratio:7.2f}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (16, 16, 14, 14), strict=True))
    yield from _more([pair[0] for pair in pairs])


def _pair(fused: dict[str, Any], eager: dict[str, Any], what: str) -> str:
    return " | ".join("-" if row.get(what) is None else f"{row[what]:.0f}" for row in (fused, eager))


def _races(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    found = [result for result in results if "times_faster" in result]
    if not found:
        return
    yield ""
    yield f"{'against the best peer':46}{'mode':>8}{'faster':>8}{'q1':>6}{'q3':>6}{'us':>9}{'floor':>7}  than"
    found.sort(key=lambda r: r["times_faster"]["median"])
    for r in found[:SHOWN_ROWS]:
        name = "WRONG " * (r["verdict"] == "WRONG") + f"{r['op']} {r['case']}"
        times = r["times_faster"]
        numbers = f"{times['median']:8.2f}{times['q1']:6.2f}{times['q3']:6.2f}{r['us']:9.0f}{r['share_of_floor']:7.0%}"
        yield f"{name:46.46}{r['mode']:>8}{numbers}  {r['than']}"
    yield from _more([r["times_faster"]["median"] for r in found])


def _more(ratios: Sequence[float]) -> Iterator[str]:
    """What is left out is the best, which is told in a line."""
    left = ratios[SHOWN_ROWS:]
    if left:
        yield f"and {len(left)} more, from {left[0]:.2f} to {left[-1]:.2f}"


def _network_costs(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = _merged(results, "network", "mode", "kind")
    found = [key for key, row in rows.items() if "kernels_us" in row and key[1:] == ("train", "fused")]
    if not found:
        return
    yield ""
    yield f"{'networks, ms: ours | eager':20}{'step':>18}{'kernels':>18}{'host':>18}{'launches':>18}{'batch 1':>18}"

    def steps(name: str) -> list[dict[str, Any]]:
        return [rows.get((name, "train", kind), {}) for kind in ("fused", "eager")]

    def faster(name: str) -> float:
        fused, eager = (row.get("event_us", 0.0) for row in steps(name))
        return eager / fused if fused else 0.0

    for name in sorted((key[0] for key in found), key=faster):
        fused, eager = steps(name)
        single = [rows.get((name, "batch 1", kind), {}) for kind in ("fused", "eager")]
        cells = [_milliseconds(fused, eager, what) for what in ("event_us", "kernels_us", "host_us")]
        cells += [_pair(fused, eager, "launches"), _milliseconds(*single, "latency_us")]
        yield f"{name:20}" + "".join(f"{cell:>18}" for cell in cells)


def _milliseconds(fused: dict[str, Any], eager: dict[str, Any], what: str) -> str:
    return " | ".join("-" if row.get(what) is None else f"{row[what] / 1e3:.1f}" for row in (fused, eager))


def _networks(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = _merged([result for result in results if "images_per_s" in result], "network", "mode", "kind")
    if not rows:
        return
    yield ""
    yield f"{'networks, images/s':22}{'faster':>8}" + "".join(f"{kind:>22}" for kind in KINDS)
    by_network = {key[:2]: {kind: rows.get((*key[:2], kind)) for kind in KINDS} for key in rows}
    for (network, mode), kinds in sorted(by_network.items(), key=lambda item: _faster(item[1]) or 0.0):
        ratio = _faster(kinds)
        cells = [
            f"{row['images_per_s']:.0f} ({row['peak_bytes'] / 2**30:.1f} GiB)" if row else "-" for row in kinds.values()
        ]
        start = f"{network + ', ' + mode:22}" + (f"{ratio:8.2f}" if ratio else f"{'-':>8}")
        yield start + "".join(f"{cell:>22}" for cell in cells)
    single = _merged([r for r in results if r.get("mode") == "batch 1" and "graph_us" in r], "network", "kind")
    for network in dict.fromkeys(key[0] for key in single):
        fused, eager = (single.get((network, kind), {}) for kind in ("fused", "eager"))
        graph, plain = _milliseconds(fused, eager, "graph_us"), _milliseconds(fused, eager, "latency_us")
        yield f"{network + ', batch 1':22}replayed {graph} ms, launched {plain} ms (ours | eager)"


def _faster(kinds: dict[str, dict[str, Any] | None]) -> float | None:
    """The best of ours over the best of the others."""
    ours, theirs = (
        max((row["images_per_s"] for kind, row in kinds.items() if row and ("fused" in kind) == fused), default=None)
        for fused in (True, False)
    )
    return ours / theirs if ours and theirs else None


def _tests(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        if "counts" in result:
            counts = ", ".join(f"{count} {word}" for word, count in result["counts"].items()) or "none"
            yield f"tests: {counts}; {result['summary']}"


def _sanitizers(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        if "tool" in result:
            yield f"{result['tool']}: {result['calls']} calls, {len(result['errors'])} errors"


def _ncu(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        if "dram_percent" in result:
            numbers = ", ".join(f"{name} {value}" for name, value in result.items() if name not in ("kernel", "grid"))
            yield f"ncu: {numbers}; {result['kernel']}"


def _constants(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        if "constants" in result:
            yield "constants: " + ", ".join(f"{name} {value:.3g}" for name, value in result["constants"].items())
