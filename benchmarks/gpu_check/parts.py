"""The parts of the two runs, the most valuable first: in this order they are started, and timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import OPS
from benchmarks.gpu_check.protocol import command
from benchmarks.gpu_check.runner import Part
from benchmarks.networks import NETWORKS
from benchmarks.providers import CUDNN

# The most valuable ops; the others follow as they stand among the benchmarks.
FIRST = (
    *("multi_order_dwconv", "channel_aggregation_ffn", "gnconv", "dwconv_layer_norm", "xca", "s2_attention"),
    *("mlp", "dwconv", "moga_aggregation", "layer_norm_2d", "global_filter"),
)
# Other cases than an op's quick ones.
OTHERS = {
    "multi_order_dwconv": ("MogaNet-S.1", "MogaNet-T.3", "MogaNet-S.3"),
    "s2_attention": ("S2-MLPv2-S.1", "S2-MLPv2-S.2"),
    "mlp": ("HorNet-T.1", "EdgeNeXt-S.3"),
    "dwconv": ("HorNet-T.2", "EdgeNeXt-S.4", "HorNet-T.1", "MOAT-0.2 entry", "MogaNet-S.1 ffn gelu"),
    "layer_norm_2d": ("HorNet-T.1", "HorNet-T.4"),
    "relative_attention": ("MOAT-0.3", "MOAT-0.4"),
    "mbconv": ("MOAT-0.2", "MOAT-0.3"),
}
# Of every op first the case that stands for it, then what may tell something else.
CASES = {op: OTHERS.get(op, OPS[op].quick) for op in (*FIRST, *OPS)}
# Those with depthwise convolutions, which cuDNN may have a kernel for.
DEPTHWISE = (*tuple(CASES)[:4], "dwconv", "moga_aggregation", "split_cascade")
WITH_GOALS = tuple(CASES)[:6]
GIB = {"channel_aggregation_ffn": 16.0, "dwconv": 12.0}  # that the proof in float64 takes; the others:
GIB_OF_AN_OP, GIB_OF_A_NETWORK = 4.0, 6.0
FIRST_NETWORKS = ("HorNet-T", "EdgeNeXt-S")
COMPILED = ("compile(fused)", "compile(reference)")


def compilers(processes: int) -> dict[str, str]:
    return {"TORCHINDUCTOR_COMPILE_THREADS": str(processes)}


@dataclass(frozen=True)
class Run:
    """What the parts of a run have in common. patience: how many times longer than on a GPU a part may take."""

    folder: Path
    rehearse: bool
    cores: int

    def part(self, name: str, work: str, limit: float, arguments: dict[str, Any], **options: Any) -> Part:
        patience = 5 if self.rehearse else 1
        if "preparation" in options:
            options["preparation"] *= patience
        return Part(name, command(work, self.rehearse, **arguments), limit * patience, **options)

    def log(self, name: str) -> str:
        return str(self.folder.resolve() / name)

    def small_calls(self, op: str) -> Part:
        return self.part(f"small calls of {op}", "checks:small_calls", 75, {"op": op})

    def op_costs(self, op: str) -> Part:
        arguments = {"op": op, "cases": CASES[op][: 1 if self.rehearse else 3]}
        options = {"alone": True, "preparation": 100, "gib": GIB.get(op, GIB_OF_AN_OP)}
        return self.part(f"costs of {op}", "timings:op_costs", 20, arguments, **options)

    def op_race(self, op: str, case: str, peer: str = "compile") -> Part:
        peers = ["eager", "aot_eager" if self.rehearse else peer, *([CUDNN] if op in DEPTHWISE else [])]
        arguments = {"op": op, "case": case, "peers": peers}
        name = f"{op} {case}" + f", {peer}" * (peer != "compile")
        options = {"alone": True, "gib": GIB.get(op, GIB_OF_AN_OP), "environment": compilers(1)}
        return self.part(name, "timings:op_race", 20, arguments, **options)

    def network_costs(self, network: str) -> Part:
        options = {"alone": True, "gib": 2 * GIB_OF_A_NETWORK}
        return self.part(f"costs of {network}", "timings:network_costs", 25, {"network": network}, **options)

    def network_race(self, network: str, *kinds: str) -> Part:
        name, arguments = f"{network}, {' and '.join(kinds)}", {"network": network, "kinds": kinds}
        cores = 2 if kinds[0] in COMPILED else 1
        # It needs three times as much at the end of the compilation, and waits for it.
        options = {"alone": True, "gib": GIB_OF_A_NETWORK, "cores": cores, "environment": compilers(cores)}
        return self.part(name, "timings:network_race", 30, arguments, **options)

    def correct(self) -> Iterator[Part]:
        """What is wrong, and where the time goes."""
        yield self.gpu_tests()
        yield self.part("build facts", "checks:facts", 60, {})
        for op in OPS:
            yield self.small_calls(op)
        for tool in ("memcheck", "racecheck"):
            arguments = {"tool": tool, "log": self.log(f"{tool}.txt")}
            # It is cut off wherever it is when the time is over.
            yield self.part(tool, "checks:sanitize", float("inf"), arguments)
        for op in CASES:
            yield self.op_costs(op)
        for network in NETWORKS:
            yield self.network_costs(network)
        yield self.part("calibration", "timings:calibrate", 25, {}, alone=True, preparation=60)
        yield self.part("ncu", "timings:ncu", 40, {"log": self.log("ncu.txt")}, alone=True, preparation=60)

    def gpu_tests(self) -> Part:
        processes = min(12, self.cores)
        select = ["-m", "gpu", *(["tests/benchmarks/test_race.py"] if self.rehearse else [])]
        arguments = {"log": self.log("tests.txt"), "processes": processes, "select": select}
        # They wait for the GPU, and for each other's compilations, so that they do not fill as many cores.
        options = {"cores": min(8, self.cores), "gib": 12, "environment": {"OMP_NUM_THREADS": "2"}}
        return self.part("pytest -m gpu", "checks:gpu_tests", 110, arguments, **options)

    def fast(self) -> Iterator[Part]:
        """Against the best of eager PyTorch in both layouts and torch.compile; whole networks."""
        for network in FIRST_NETWORKS:
            yield self.network_race(network, "fused", "eager")
            for kind in COMPILED:
                yield self.network_race(network, kind)
        for op, cases in CASES.items():
            yield self.op_race(op, cases[0])
        others = [network for network in NETWORKS if network not in FIRST_NETWORKS]
        for network in others:
            yield self.network_race(network, "fused", "eager")
        for network in others:
            for kind in COMPILED:
                yield self.network_race(network, kind)
        if self.rehearse:
            return
        for op, cases in CASES.items():
            for case in cases[1:]:
                yield self.op_race(op, case)
        for op in WITH_GOALS:
            yield self.op_race(op, CASES[op][0], "max-autotune")
