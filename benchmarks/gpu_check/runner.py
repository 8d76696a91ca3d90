"""Parts of a run: each a process of its own with its own limit, beside others where its times do not count.

A crash, a hang or a CUDA error that sticks costs one part. A part that times is prepared beside the others, then waits
until nothing else is under way and has the machine to itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.protocol import MARK
from benchmarks.machine import ROOT

GRACE = 4.0  # seconds between the interrupt, at which a part can still tell what it has, and the kill
TICK = 0.05
HELD_GIB = 0.75  # of the GPU's memory by a part that is prepared, and waits
BAD = ("WRONG", "CRASHED", "HUNG", "FAILED")
STATUSES = (*BAD, "cut", "skipped", "ok")  # the worst first


@dataclass(frozen=True)
class Part:
    """command: prints lines of MARK and JSON; a part that is `alone` also {"ready": true}, and then waits for a line.

    limit: seconds that it may take, the preparation of a part that is alone not counted; preparation: those for it.
    cores, gib: what it takes of the machine's cores and of the GPU's memory while others run beside it.
    """

    name: str
    command: Sequence[str]
    limit: float
    alone: bool = False
    preparation: float = float("inf")
    cores: int = 1
    gib: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """status is "ok", one of BAD, "cut" (the run's time was over) or "skipped"; `detail` says why.

    seconds: without preparation, which `prepared` has; output: its end, where something is wrong.
    """

    name: str
    status: str = "ok"
    detail: str | None = None
    seconds: float = 0.0
    prepared: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    output: str | None = None


class Running:
    """A part's process, and what it has said so far."""

    def __init__(self, part: Part, folder: Path, now: float) -> None:
        self.part, self.outcome = part, Outcome(part.name)
        self.started = self.turn = now
        self.ready = self.has_turn = False
        self.stopped: tuple[str, str] | None = None
        self._killed_at = float("inf")
        self._rest = ""
        self._log = (folder / f"{len(os.listdir(folder))}.log").open("w+", errors="replace")
        self._process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(part.cores), **part.environment},
            start_new_session=True,
        )
        self._reader = Path(self._log.name).open(errors="replace")  # noqa: SIM115

    def over(self, now: float) -> bool:
        """A process that waits for a driver may not even die: nobody waits for it."""
        return self._process.poll() is not None or now > self._killed_at + GRACE

    def listen(self) -> None:
        lines = (self._rest + self._reader.read()).split("\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(MARK):
                with contextlib.suppress(ValueError):  # half a line, of a process that crashed
                    self._hear(json.loads(line.removeprefix(MARK)))

    def _hear(self, said: dict[str, Any]) -> None:
        if said.get("ready"):
            self.ready = True
        else:
            self.outcome.results.append(said)

    def go(self, now: float) -> None:
        self.has_turn, self.turn = True, now
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def stop(self, status: str, why: str, now: float) -> None:
        """Interrupts, as by Ctrl-C; kills what is still there after a while."""
        if self.stopped is None:
            self.stopped, self._killed_at = (status, why), now + GRACE
            self._signal(signal.SIGINT)
        elif now >= self._killed_at:
            self._signal(signal.SIGKILL)

    def finish(self, now: float) -> Outcome:
        self._signal(signal.SIGKILL)  # processes that it left behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self.listen()
        outcome, alone = self.outcome, self.part.alone
        outcome.prepared = round((self.turn if self.has_turn else now) - self.started, 2) if alone else 0.0
        outcome.seconds = round(now - self.turn, 2) if self.has_turn or not alone else 0.0
        outcome.status, outcome.detail = self._verdict(self._process.returncode)
        if outcome.status not in ("ok", "skipped"):
            self._log.seek(0)
            said = [line for line in self._log.read().splitlines() if line and not line.startswith(MARK)]
            outcome.output = "\n".join(said)[-3000:]
            if outcome.detail is None and said:
                outcome.detail = said[-1][:200]
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.close()
        self._log.close()
        return outcome

    def _verdict(self, code: int | None) -> tuple[str, str | None]:
        """The worst of what its results say and how it ended."""
        results = self.outcome.results
        found = [(result["verdict"], result.get("detail")) for result in results if "verdict" in result]
        if self.stopped is not None:
            found.append(self.stopped)
        elif code is not None and code < 0:
            found.append(("CRASHED", f"{signal.Signals(-code).name} after {len(results)} results"))
        elif code != 0 and not any(status in BAD for status, _ in found):
            found.append(("FAILED", None))
        return min(found, key=lambda each: STATUSES.index(each[0]), default=("ok", None))

    def _signal(self, sign: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, sign)


class Runner:
    """keep() hears of every outcome at once. `together`: the share of the budget after which only one part runs."""

    def __init__(
        self,
        parts: Sequence[Part],
        budget: float,
        keep: Callable[[Outcome], None],
        *,
        cores: int,
        gib: float = float("inf"),
        together: float = 0.5,
    ) -> None:
        self._waiting, self._running = list(parts), list[Running]()
        self._order = {part.name: i for i, part in enumerate(parts)}
        if len(self._order) < len(parts):
            raise ValueError("two parts have one name")
        self._keep, self._cores, self._gib = keep, cores, gib
        self._start = time.monotonic()
        self._end = self._start + max(budget - GRACE, 0.5 * budget)
        self._end_of_together = self._start + together * budget

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._folder = Path(folder)
            try:
                while self._waiting or self._running:
                    self._advance(time.monotonic())
                    time.sleep(TICK)
            finally:
                for running in self._running:
                    running.stop("cut", "interrupted", time.monotonic())
                    self._keep(running.finish(time.monotonic()))

    def _advance(self, now: float) -> None:
        self._skip_what_is_too_late(now)
        self._start_what_fits(now)
        for running in list(self._running):
            running.listen()
            if running.over(now):
                self._running.remove(running)
                self._keep(running.finish(now))
            else:
                self._hold_to_limits(running, now)
        if all(running.ready for running in self._running) and not self._waiting:
            self._give_the_next_its_turn(now)

    def _skip_what_is_too_late(self, now: float) -> None:
        if now >= self._end_of_together:
            for part in self._waiting:
                self._keep(Outcome(part.name, "skipped", "the time for it was over"))
            self._waiting = []

    def _start_what_fits(self, now: float) -> None:
        busy = [running.part for running in self._running if not running.ready]
        held = HELD_GIB * (len(self._running) - len(busy))
        cores, gib = self._cores - sum(part.cores for part in busy), self._gib - held - sum(part.gib for part in busy)
        for part in list(self._waiting):
            # Where a part is larger than the machine, it runs when nothing else does.
            if (part.cores <= cores and part.gib <= gib) or not busy:
                self._waiting.remove(part)
                self._running.append(Running(part, self._folder, now))
                busy.append(part)
                cores, gib = cores - part.cores, gib - part.gib

    def _hold_to_limits(self, running: Running, now: float) -> None:
        part, waits = running.part, running.ready and not running.has_turn
        limit = part.limit if running.has_turn or not part.alone else part.preparation
        if running.stopped:
            running.stop(*running.stopped, now)
        elif not waits and now - running.turn > limit:
            running.stop("HUNG", f"not done in {limit:g} s, after {len(running.outcome.results)} results", now)
        elif now >= self._end:
            running.stop("cut", "the time of the run was over", now)
        elif now >= self._end_of_together and not running.ready:
            running.stop("cut", "the time for what runs beside others was over", now)

    def _give_the_next_its_turn(self, now: float) -> None:
        if self._running and not any(running.has_turn for running in self._running):
            min(self._running, key=lambda running: self._order[running.part.name]).go(now)
