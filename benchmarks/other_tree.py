"""Another tree of this repository, such as the commit before, timed round by round beside this one.

Two trees do not fit into one process, so the other one has its own, which this file is the program of. It makes steps
and times them when it is asked to; the tree that is not asked sleeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


class OtherTree:
    """what: "ops", which the other tree's own benchmarks describe, or "networks", which this tree's do."""

    def __init__(self, root: Path, what: str, device: str, threads: int | None) -> None:
        words = [sys.executable, __file__, str(root.resolve()), what, device, str(threads or "")]
        self._process = subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask("ready")

    def sampler(self, **what: Any) -> Callable[[], float]:
        """As `Stopwatch.sampler`, of a step that it makes there; a RuntimeError says why there is none."""
        number = self._ask("make", **what)
        return lambda: self._ask("time", number=number)

    def forget(self) -> None:
        """All steps."""
        self._ask("forget")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, do: str, **about: Any) -> Any:
        print(json.dumps({"do": do, **about}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the other tree has ended; see above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the other tree: {answer['error']}")
        return answer["value"]


def make_op_step(device: str, *, op: str, case: str, dtype: str, layout: str, batch: int, mode: str) -> Any:
    import torch

    from benchmarks.cases import OPS, Setting
    from benchmarks.providers import make_step

    if op not in OPS or case not in OPS[op].cases:
        raise LookupError(f"it has no case {case} of {op}")
    problem = OPS[op].problem(case, Setting(device, getattr(torch, dtype), layout, batch))
    with torch.no_grad():
        output = OPS[op].reference(*problem.args, **problem.options)
    return make_step("fused", OPS[op], problem, torch.empty_like(output).copy_(torch.randn_like(output)), mode)


def make_network_step(
    device: str, *, variant: str, image: int, dtype: str, layout: str, batch: int, mode: str
) -> Callable[[], object]:
    import torch

    from benchmarks.networks import Network, Scale, build, forward_step, train_step

    scale = Scale(device, batch, dtype=getattr(torch, dtype), layout=layout)
    network = Network(variant, image, {})
    net = build(network, scale, fused=True).train(mode == "train")
    return (train_step if mode == "train" else forward_step)(net, scale.images(network), scale)


def serve(root: str, what: str, device: str, threads: str) -> None:
    # Whatever else is printed must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[0] = root
    import torch

    import vision_ops  # noqa: F401  the other tree's

    if what == "networks":
        sys.path[0] = str(HERE)
    from benchmarks.measure import Stopwatch

    if threads:
        torch.set_num_threads(int(threads))
    torch.backends.cudnn.benchmark = True
    make = {"ops": make_op_step, "networks": make_network_step}[what]
    samplers: list[Callable[[], float]] = []
    for line in sys.stdin:
        about = json.loads(line)
        do, value = about.pop("do"), None
        try:
            if do == "make":
                samplers.append(Stopwatch(device).sampler(make(device, **about)))
                value = len(samplers) - 1
            elif do == "time":
                value = samplers[about["number"]]()
            elif do == "forget":
                samplers.clear()
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}), file=answers, flush=True)
        else:
            print(json.dumps({"value": value}), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
