"""Counts of ops and of networks: forward and backward, ours and eager PyTorch's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import OPS
from benchmarks.gpu_check.parts import CASES
from benchmarks.ledger.launches import KINDS, PARTS, Launch
from benchmarks.ledger.pytorch import numbers_bytes, tensors_in
from benchmarks.ledger.recorder import recording
from benchmarks.networks import NETWORKS, Network
from benchmarks.problem import MEMORY_FORMATS, Op, Setting
from vision_ops import models

RESULTS = Path(__file__).parents[1] / "results" / "ledger.json"
BATCH = 128
PASSES = ("forward", "backward")
SEPARATOR = " / "


@dataclass
class Count:
    """Of one pass. launches: by kind. least: bytes if everything that goes in and comes out was moved once. idle: the
    largest share of a launch of more than one wave that its last wave leaves empty. us: of the parts on the device."""

    launches: dict[str, int]
    mb: float
    least_mb: float | None
    cast_mb: float
    gflop: float
    device_us: dict[str, float]
    host_us: float
    idle: float

    @classmethod
    def of(cls, launches: list[Launch], least: int | None) -> Count:
        return cls(
            {kind: sum(launch.kind == kind for launch in launches) for kind in KINDS},
            _mega(sum(launch.bytes for launch in launches if launch.kind != "cast")),
            None if least is None else _mega(least),
            _mega(sum(launch.bytes for launch in launches if launch.kind == "cast")),
            round(sum(2 * launch.multiply_adds for launch in launches if launch.number_bytes) / 1e9, 2),
            {part: round(sum(launch.us for launch in launches if launch.part == part), 1) for part in PARTS},
            round(sum(launch.host_us for launch in launches), 1),
            round(max((launch.idle for launch in launches if launch.waves > 1), default=0.0), 2),
        )


def _mega(count: int) -> float:
    return round(count / 1e6, 1)


def emulated() -> ModuleType:
    from tests import emulation  # which compiles it, and needs pytest

    return emulation.kernels()


def problem(op: Op, case: str, batch: int = BATCH) -> tuple[Any, ...]:
    """The arguments on meta: activations in bfloat16, parameters in float32, as under autocast."""

    def built(images: int) -> Any:
        return op.build(op.cases[case], Setting("meta", torch.float32, "channels_last", images))

    large, small = built(batch), built(batch // 2)

    def dtyped(t: Any, other: Any) -> Any:
        if isinstance(t, tuple):
            return tuple(dtyped(*pair) for pair in zip(t, other, strict=True))
        if t is None:
            return None
        return (t.to(torch.bfloat16) if t.shape != other.shape else t).detach().requires_grad_()

    return dtyped(large.args, small.args), large.options


def count_op(op: Op, case: str, cuda: ModuleType, fused: bool = True) -> dict[str, list[Launch]]:
    args, options = problem(op, case)
    backend = "auto" if fused else "reference"
    with recording(cuda) as recorder:
        return _both_passes(recorder, lambda: op.fused(*args, **options, backend=backend), list(tensors_in(args)))


def _both_passes(recorder: Any, forward: Callable[[], Tensor], inputs: list[Tensor]) -> dict[str, list[Launch]]:
    y = forward()
    first = recorder.taken()
    grad = torch.empty_like(y)
    recorder.taken()
    with torch.no_grad():
        torch.autograd.grad(y, inputs, grad)
    return {"forward": first, "backward": recorder.taken()}


def least_bytes(op: Op, case: str) -> dict[str, int]:
    args, _ = problem(op, case)
    inputs = sum(map(numbers_bytes, tensors_in(args)))
    output = args[0].nbytes if op.name != "shift_split_attention" else args[0].nbytes // 3
    if op.name == "gated_recursion":
        output = args[0].nbytes * op.cases[case].widths[-1] // op.cases[case].widths[0]
    if op.name == "dwconv" and op.cases[case].stride == 2:
        output //= 4
    return {"forward": inputs + output, "backward": output + 2 * inputs}


def network(name: str, fused: bool) -> tuple[nn.Module, Tensor]:
    described: Network = NETWORKS[name]
    with torch.device("meta"):
        net = models.create_model(described.variant, fused=fused, drop_path_rate=0.0)
    net = net.to(memory_format=torch.channels_last)
    x = torch.empty(BATCH, 3, described.image, described.image, device="meta")
    return net, x.contiguous(memory_format=MEMORY_FORMATS["channels_last"])


def count_network(name: str, cuda: ModuleType, fused: bool = True) -> dict[str, list[Launch]]:
    """A training step without the optimizer, which is the same for both."""
    net, x = network(name, fused)
    target = torch.empty(len(x), dtype=torch.long, device="meta")
    with recording(cuda) as recorder:
        loss = lambda: nn.functional.cross_entropy(net(x).float(), target)
        return _both_passes(recorder, loss, list(net.parameters()))


def counts(ops: Iterable[str], networks: Iterable[str], tell: Callable[[str], None] = lambda text: None) -> dict:
    """By op and case, or network; by provider; by pass."""
    cuda, found = emulated(), {"ops": {}, "networks": {}}
    for name in ops:
        for case in CASES[name]:
            tell(f"{name} {case}")
            least = least_bytes(OPS[name], case)
            found["ops"].setdefault(name, {})[case] = {
                provider: _counted(count_op(OPS[name], case, cuda, fused), least)
                for provider, fused in (("ours", True), ("eager", False))
            }
    for name in networks:
        tell(name)
        found["networks"][name] = {
            provider: _counted(count_network(name, cuda, fused), {})
            for provider, fused in (("ours", True), ("eager", False))
        }
    return found


def _counted(passes: dict[str, list[Launch]], least: dict[str, int]) -> dict[str, Any]:
    return {name: asdict(Count.of(launches, least.get(name))) for name, launches in passes.items()}


def write(found: dict[str, Any], file: Path) -> None:
    """A line for every pass."""
    lines = (f"{json.dumps(SEPARATOR.join(path))}: {json.dumps(counted)}" for path, counted in _flat(found))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, counted in json.loads(file.read_text()).items():
        *names, name = path.split(SEPARATOR)
        nested = found
        for each in names:
            nested = nested.setdefault(each, {})
        nested[name] = counted
    return found


def _flat(nested: dict[str, Any], names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    for name, value in nested.items():
        if name in PASSES:
            yield (*names, name), value
        else:
            yield from _flat(value, (*names, name))
