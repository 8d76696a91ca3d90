"""Whole networks: forward and a training step, with our ops, without, and compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.calibration import kernel_names
from benchmarks.measure import Quartiles, Ratio, Rule, Stopwatch, Times, interleave, peak_bytes


@dataclass(frozen=True)
class Network:
    variant: str
    image: int
    block: str  # the class of the block whose compiled kernels are listed


NETWORKS = {
    "MogaNet": Network("moganet_tiny", 224, "MogaBlock"),
    "HorNet": Network("hornet_tiny_7x7", 224, "HorBlock"),
    "EdgeNeXt": Network("edgenext_small", 256, "SDTAEncoder"),
    "S2-MLPv2": Network("s2mlpv2_small_7", 224, "S2Block"),
    "MOAT": Network("tiny_moat_0", 224, "MOATBlock"),
}


@dataclass(frozen=True)
class Scale:
    device: str
    batch: int = 64
    image: int | None = None  # instead of the network's own size
    seconds: float = 2.0

    def images(self, network: Network) -> Tensor:
        size = self.image or network.image
        x = torch.randn(self.batch, 3, size, size, device=self.device)
        return x.contiguous(memory_format=torch.channels_last)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, dtype=torch.bfloat16)


def compare(name: str, compiled: bool, scale: Scale) -> dict[str, Any]:
    """Seconds of forward and training step, bfloat16 autocast, channels_last; `compiled` holds ours against that."""
    torch._dynamo.reset()
    network = NETWORKS[name]
    x, found = scale.images(network), {}
    peer = "compile" if compiled else "eager"
    nets = {"fused": build(network, scale, fused=True), peer: build(network, scale, fused=False)}
    nets[peer].load_state_dict(nets["fused"].state_dict())
    for mode, make in (("forward", forward_step), ("train", train_step)):
        steps = {kind: make(net, x, scale, kind == "compile") for kind, net in nets.items()}
        stopwatch = Stopwatch(scale.device)
        samplers = {kind: stopwatch.sampler(step) for kind, step in steps.items()}

        def ratios(times: Times) -> list[Ratio]:
            return [Ratio.of(times, "fused", [peer])]

        times = interleave(samplers, ratios, Rule(scale.seconds, rounds=8))
        found[mode] = {
            "images_per_s": {kind: scale.batch / Quartiles.of(values).median for kind, values in times.items()},
            "times_faster": vars(ratios(times)[0].ratio),
            "peak_bytes": {kind: peak_bytes(step, scale.device) for kind, step in steps.items()},
        }
    return found


def build(network: Network, scale: Scale, fused: bool) -> nn.Module:
    torch.manual_seed(0)
    net = _models().create_model(network.variant, fused=fused, drop_path_rate=0.0)
    return net.to(scale.device, memory_format=torch.channels_last)


def _models() -> ModuleType:
    try:
        return importlib.import_module("vision_ops.models")
    except ModuleNotFoundError as error:
        raise RuntimeError("this vision_ops has no models") from error


def forward_step(net: nn.Module, x: Tensor, scale: Scale, compiled: bool) -> Callable[[], object]:
    run = _compiled(net, scale) if compiled else net

    def step() -> Tensor:
        net.eval()
        with torch.no_grad(), scale.autocast():
            return run(x)

    return step


def train_step(net: nn.Module, x: Tensor, scale: Scale, compiled: bool) -> Callable[[], object]:
    run = _compiled(net, scale) if compiled else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=scale.device == "cuda")
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> Tensor:
        net.train()
        optimizer.zero_grad(set_to_none=True)
        with scale.autocast():
            loss = nn.functional.cross_entropy(run(x).float(), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _compiled(net: nn.Module, scale: Scale) -> Callable[[Tensor], Tensor]:
    return torch.compile(net, mode="max-autotune-no-cudagraphs" if scale.device == "cuda" else None)


def block_kernels(name: str, scale: Scale) -> dict[str, Any]:
    """What torch.compile makes of one block of the network, forward and backward: its kernels and their times."""
    torch._dynamo.reset()
    network = NETWORKS[name]
    net = build(network, scale, fused=False)
    block = next(module for module in net.modules() if type(module).__name__ == network.block)
    inputs: list[tuple[Any, ...]] = []
    handle = block.register_forward_pre_hook(lambda module, args: inputs.append(args))
    with torch.no_grad(), scale.autocast():
        net(scale.images(network))
    handle.remove()
    args = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in inputs[0])
    run = torch.compile(block)

    def step() -> None:
        with scale.autocast():
            y = run(*args)
        y.float().square().sum().backward()

    step()
    shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
    return {"block": network.block, "inputs": shapes, "kernels_us": kernel_names(step, scale.device)}
