"""python -m benchmarks networks --loss: training steps of ours over those of the reference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from benchmarks import machine
from benchmarks.networks import Network, Scale, build
from benchmarks.report import replace_file
from benchmarks.session import has_matplotlib

STEPS, SEEDS = 50, (0, 1)
BATCHES = 4  # of the data, which the network comes to know by heart
Losses = dict[str, dict[str, list[float]]]  # by seed and by "fused" or "eager"


def run(args: argparse.Namespace, networks: Mapping[str, Network], console: Console) -> int:
    """The exit status: 1 where a loss is not finite. Float32 and channels_last unless told otherwise."""
    scale = Scale(args.device, max(args.batch), dtype=getattr(torch, args.dtype[0]), layout=args.layout[-1])
    found: dict[str, Losses] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=float("inf")) as progress:
        bar = progress.add_task("", total=len(networks) * len(SEEDS) * 2 * STEPS)
        for name, network in networks.items():
            progress.update(bar, description=name)
            found[name] = losses(network, scale, STEPS, lambda: progress.advance(bar))
            console.print(f"{name}: {summary(found[name])}")
            if args.out:
                _write(found, scale, args.out)
    if args.out and has_matplotlib(console):
        from benchmarks import loss_chart

        loss_chart.draw(found, f"{args.dtype[0]}, batch {scale.batch}", args.out / "loss.png")
    return int(not all(torch.tensor(curve).isfinite().all() for curve in _curves(found)))


def losses(network: Network, scale: Scale, steps: int, advance: Callable[[], None]) -> Losses:
    """The same data and first weights for both; dropped paths would differ by luck, so none are."""
    return {
        str(seed): {kind: _train(network, scale, seed, kind == "fused", steps, advance) for kind in ("fused", "eager")}
        for seed in SEEDS
    }


def _train(
    network: Network, scale: Scale, seed: int, fused: bool, steps: int, advance: Callable[[], None]
) -> list[float]:
    net = build(network, scale, fused, seed).train()
    torch.manual_seed(seed)
    images = scale.images(network, BATCHES * scale.batch).split(scale.batch)
    labels = torch.randint(10, (BATCHES * scale.batch,), device=scale.device).split(scale.batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    curve = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with scale.autocast():
            loss = nn.functional.cross_entropy(net(images[step % BATCHES]).float(), labels[step % BATCHES])
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
        advance()
    return curve


def summary(curves: Losses) -> str:
    """How far the two are apart, beside what another seed does."""
    texts = []
    for seed, both in curves.items():
        fused, eager = torch.tensor(both["fused"]), torch.tensor(both["eager"])
        apart = (fused - eager).abs() / eager.abs().clamp_min(1e-3)
        texts.append(
            f"seed {seed}: loss {fused[0]:.3f} to {fused[-1]:.3f}, reference to {eager[-1]:.3f}, apart by "
            f"{apart[0]:.1e} at first, {apart.max():.1e} at most"
        )
    return "; ".join(texts)


def _curves(found: Mapping[str, Losses]) -> list[list[float]]:
    return [curve for curves in found.values() for both in curves.values() for curve in both.values()]


def _write(found: Mapping[str, Losses], scale: Scale, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine.describe(scale.device), "versions": machine.versions(), "commit": machine.commit()}
    about |= {"batch": scale.batch, "dtype": str(scale.dtype), "layout": scale.layout, "losses": found}
    replace_file(folder / "loss.json", lambda file: json.dump(about, file, indent=1))
