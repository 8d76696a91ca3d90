"""python -m benchmarks gpu-check: all that only a GPU can tell, in two runs of a few minutes.

`--run correct`: what is wrong, and where the time goes. `--run fast`: against the best of eager PyTorch and
torch.compile, and whole networks. Made for a machine that is lent for minutes: see runner.py for how a run is cut into
parts, parts.py for what they are. RUN.json has everything and is written after every part, as is RUN.txt, the summary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.gpu_check import parts, summary
from benchmarks.gpu_check.runner import BAD, Outcome, Runner
from benchmarks.report import replace_file

NO_GPU = 3
SECONDS, REHEARSAL_SECONDS = 240.0, 900.0


def run(args: argparse.Namespace) -> int:
    """The exit status: 1 where something is wrong, 3 without a GPU."""
    if args.rehearse:
        device, gib = "a rehearsal on a CPU", float("inf")
    elif torch.cuda.is_available():
        device, gib = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    else:
        print("gpu-check needs an NVIDIA GPU, and this torch sees none; --rehearse runs it on a CPU.", file=sys.stderr)
        return NO_GPU
    budget = args.budget or (REHEARSAL_SECONDS if args.rehearse else SECONDS)
    args.out.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    slots = cores * 3 // 2  # since parts also wait, for the disk and the GPU
    all_parts = list(getattr(parts.Run(args.out, args.rehearse, cores), args.run)())
    keeper = Keeper(args.out, args.run, budget, device)
    try:
        Runner(all_parts, budget, keeper.keep, cores=slots, gib=gib).run()
    except KeyboardInterrupt:
        return 130
    finally:
        print(keeper.screen())
    return keeper.status


class Keeper:
    """Keeps what the parts tell, and writes it after every one of them."""

    def __init__(self, folder: Path, run: str, budget: float, device: str) -> None:
        self._folder, self._run, self._budget, self._device = folder, run, budget, device
        self._start, self._date = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._commit = machine.commit()
        self._outcomes: list[Outcome] = []
        self._seconds = 0.0  # until the last of them

    @property
    def status(self) -> int:
        return int(any(outcome.status in BAD for outcome in self._outcomes))

    def keep(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._seconds = time.monotonic() - self._start
        detail = f": {outcome.detail}" if outcome.detail else ""
        print(f"[{self._seconds:5.0f} s] {outcome.name}: {outcome.status}{detail}", flush=True)
        facts = {
            "run": self._run,
            "date": self._date,
            "device": self._device,
            "commit": self._commit,
            "budget": self._budget,
            "seconds": round(self._seconds, 1),
            "parts": [asdict(outcome) for outcome in self._outcomes],
        }
        replace_file(self._folder / f"{self._run}.json", lambda file: json.dump(facts, file, indent=1))
        replace_file(self._folder / f"{self._run}.txt", lambda file: file.write(self.screen()))

    def screen(self) -> str:
        commit = self._commit["id"][:12] + "+dirty" * self._commit["dirty"] if self._commit else "no commit"
        passed = f"{self._seconds:.0f} of {self._budget:.0f} s"
        title = f"gpu-check {self._run}, {self._device}, {commit}, {self._date}, {passed}"
        return summary.screen(title, self._outcomes)
