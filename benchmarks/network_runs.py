"""python -m benchmarks networks: whole networks, case by case."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import torch

from benchmarks import machine, network_table, table
from benchmarks.measure import Rule, Stopwatch
from benchmarks.network_race import NetworkRace
from benchmarks.networks import NETWORKS, Network, Scale
from benchmarks.other_tree import OtherTree
from benchmarks.session import Job, draw, other_tree, prepare_torch, resolve_device, run_jobs, start_report
from benchmarks.timm_peer import VARIANTS
from vision_ops import models

BATCHES = {"cpu": (1, 4), "cuda": (1, 32, 128)}
SHORT_BATCHES = {"cpu": (1,), "cuda": (128,)}
SHORT = tuple(name for name in NETWORKS if name != "MogaNet-S")  # one of each kind
ROUNDS, SECONDS = 7, 30.0


def run(args: argparse.Namespace) -> int:
    """The exit status: 1 where a network is wrong or failed."""
    networks = _resolve(args)
    prepare_torch(args, fresh=False)
    torch._dynamo.config.recompile_limit = 64  # a network's kinds, layouts and modes share the code of its classes
    console = table.make_console()
    if args.loss:
        from benchmarks import loss

        return loss.run(args, networks, console)
    report = start_report("networks", args)
    with other_tree(args, "networks") as other:
        complete = run_jobs(list(_jobs(args, networks, other)), report, args.out, console)
    network_table.show(report, console)
    if args.out:
        draw(report, args.out, console)
    return 130 if not complete else 0 if report.all_ok else 1


def _resolve(args: argparse.Namespace) -> Mapping[str, Network]:
    """Puts what the arguments leave open into them, so that the report tells what was run."""
    resolve_device(args)
    short = not (args.full or args.network)
    networks: dict[str, Network] = {}
    for word in args.network or (SHORT if short else NETWORKS):
        found = _find(word)
        if not found:
            args.error(f"argument --network: {word!r} is none of {', '.join(NETWORKS)} and of `models.list_models()`")
        networks |= found
    args.network = list(networks)
    args.dtype = args.dtype or _dtypes(args.device, short)
    args.batch = args.batch or (SHORT_BATCHES if short else BATCHES)[args.device]
    args.seconds = args.seconds or (0.0 if short else SECONDS)
    return networks


def _find(word: str) -> dict[str, Network]:
    """Those of NETWORKS whose name or variant begins so, else the variant of that name."""
    found = {
        name: network for name, network in NETWORKS.items() if name.startswith(word) or network.variant.startswith(word)
    }
    if found or word not in models.list_models():
        return found
    with torch.device("meta"):
        image = models.create_model(word).pretrained_cfg["input_size"][-1]
    return {word: Network(word, image, {})}


def _dtypes(device: str, short: bool) -> tuple[str, ...]:
    if device == "cuda":
        return ("bfloat16",)
    return ("float32", "bfloat16") if machine.multiplies_bfloat16() and not short else ("float32",)


def _jobs(args: argparse.Namespace, networks: Mapping[str, Network], other: OtherTree | None) -> Iterator[Job]:
    stopwatch, rule = Stopwatch(args.device), Rule(args.seconds, ROUNDS)
    for dtype in args.dtype:
        for batch in args.batch:
            for name, network in networks.items():
                kinds = ["fused", "eager"]
                kinds += ["timm"] if network.variant in VARIANTS else []
                kinds += ["compile(reference)", "compile(fused)"] if args.compile else []
                scale = Scale(args.device, batch, dtype=getattr(torch, dtype))
                race = NetworkRace(name, network, kinds, args.layout, args.mode, scale, rule, stopwatch, other)
                yield Job("networks", name, dtype, batch, args.mode, kinds, race.run)
