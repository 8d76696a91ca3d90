"""Whole networks: forward pass and training step, with our ops, without, compiled, and timm's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.costs import when_memory_allows
from benchmarks.measure import Quartiles, Rule, Step, Stopwatch, Times, interleave, peak_bytes
from benchmarks.problem import MEMORY_FORMATS
from benchmarks.providers import COMPILERS
from benchmarks.timm_peer import timm_peer
from vision_ops import models

MODES = ("train", "forward")
# How a network is built, and whether torch.compile gets it.
KINDS = {
    "fused": (True, False),
    "eager": (False, False),
    "compile(fused)": (True, True),
    "compile(reference)": (False, True),
}


LEAST_SCALE, SCALE = 1e-3, 0.01
FLOORS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Network:
    variant: str
    image: int
    small: Mapping[str, Any]  # constructor arguments of a rehearsal: narrow, with a block of each kind
    small_image: int = 64


ONE_EACH, NARROW = (1, 1, 1, 1), (16, 32, 48, 64)
NETWORKS = {
    "HorNet-T": Network("hornet_tiny_7x7", 224, {"depths": ONE_EACH, "base_dim": 16}),
    "EdgeNeXt-S": Network("edgenext_small", 256, {"depths": (1, 2, 2, 2), "dims": NARROW}),
    "MogaNet-T": Network("moganet_tiny", 224, {"depths": ONE_EACH, "embed_dims": NARROW}),
    "MogaNet-S": Network("moganet_small", 224, {"depths": ONE_EACH, "embed_dims": NARROW}),
    "S2-MLPv2-S": Network("s2mlpv2_small_7", 224, {"depth": (1, 1), "d_model": (16, 32)}, small_image=56),
    "MOAT-0": Network("moat_0", 224, {"depths": ONE_EACH, "stem": 16, "dims": (16, 32, 64, 64)}),
}


@dataclass(frozen=True)
class Scale:
    """How a network runs. `compiler` is a key of COMPILERS; `small` networks and images are for a rehearsal on a CPU.

    dtype: that of autocast; float32 is without.
    """

    device: str
    batch: int = 128
    rounds: int = 10
    small: bool = False
    compiler: str = "compile"
    dtype: torch.dtype = torch.bfloat16
    layout: str = "channels_last"

    def images(self, network: Network, batch: int | None = None) -> Tensor:
        size = network.small_image if self.small else network.image
        x = torch.randn(batch or self.batch, 3, size, size, device=self.device)
        return x.contiguous(memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        return MEMORY_FORMATS[self.layout]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32)


def build(network: Network, scale: Scale, fused: bool, seed: int = 0) -> nn.Module:
    """With the same weights whether fused or not. Scales of branches that begin as good as 0 would hide all errors."""
    torch.manual_seed(seed)
    arguments = network.small if scale.small else {}
    net = models.create_model(network.variant, fused=fused, drop_path_rate=0.0, **arguments)
    for parameter in net.parameters():
        if 0 < parameter.detach().abs().max() <= LEAST_SCALE:
            nn.init.constant_(parameter, SCALE)
    return net.to(scale.device, memory_format=scale.memory_format)


def assemble(kind: str, network: Network, scale: Scale) -> nn.Module:
    """A network of one of KINDS, or timm's. Raises where there is none."""
    if kind == "timm":
        return timm_peer(network).to(scale.device, memory_format=scale.memory_format)
    fused, compiled = KINDS[kind]
    net = build(network, scale, fused)
    return torch.compile(net, dynamic=False, **COMPILERS[scale.compiler]) if compiled else net


def results(net: nn.Module, x: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Logits and first gradient in evaluation mode."""
    net.eval()
    with scale.autocast():
        logits = net(x)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.detach(), torch.autograd.grad(logits.square().mean(), next(net.parameters()))[0]


def exact_results(eager: nn.Module, x: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Of autocast those of float32, of float32 those of float64."""
    without = replace(scale, dtype=torch.float32)
    if scale.dtype != torch.float32:
        return results(eager, x, without)
    return results(copy.deepcopy(eager).double(), x.double(), without)


def disagreement(
    fused: nn.Module, eager: nn.Module, x: Tensor, scale: Scale, exact: tuple[Tensor, Tensor] | None = None
) -> str | None:
    """What the fused network gets wrong of its `results`. exact: if they are known.

    Errors are ‖a − b‖ / ‖b‖; twice that of eager is allowed, and a floor.
    """
    complaints = []
    found = results(fused, x, scale), results(eager, x, scale), exact or exact_results(eager, x, scale)
    for what, ours, theirs, right in zip(("logits", "first gradient"), *found, strict=True):
        error, of_eager = (((t - right).norm() / right.norm()).item() for t in (ours, theirs))
        if not error <= 2 * of_eager + FLOORS[scale.dtype]:  # a NaN fails too
            complaints.append(f"{what} off by {error:.1e}, eager by {of_eager:.1e}")
    return "; ".join(complaints) or None


def forward_step(net: nn.Module, x: Tensor, scale: Scale) -> Step:
    """The caller puts the network into evaluation mode: that takes the host longer than many a launch."""

    def step() -> Tensor:
        with torch.no_grad(), scale.autocast():
            return net(x)

    return step


def train_step(net: nn.Module, x: Tensor, scale: Scale) -> Step:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with scale.autocast():
            loss = nn.functional.cross_entropy(net(x).float(), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


@dataclass
class Contest:
    """Several kinds of a network. Its first calls, which compile, are apart from what is timed."""

    name: str
    kinds: Sequence[str]
    scale: Scale
    nets: dict[str, nn.Module] = field(default_factory=dict)
    steps: dict[str, dict[str, Step]] = field(default_factory=dict)

    def prepare(self) -> None:
        network = NETWORKS[self.name]
        x = self.scale.images(network)
        for kind in self.kinds:
            self.nets[kind] = net = assemble(kind, network, self.scale)
            self.steps[kind] = {"train": train_step(net, x, self.scale), "forward": forward_step(net, x, self.scale)}
            for mode in MODES:
                self.enter(mode)
                when_memory_allows(self.steps[kind][mode])

    def enter(self, mode: str) -> None:
        for net in self.nets.values():
            net.train(mode == "train")

    def time(self, mode: str) -> dict[str, dict[str, float]]:
        """Milliseconds, images per second and peak memory of every kind."""
        self.enter(mode)
        stopwatch = Stopwatch(self.scale.device)
        steps = {kind: self.steps[kind][mode] for kind in self.kinds}
        samplers = {kind: stopwatch.sampler(step) for kind, step in steps.items()}
        times: Times = interleave(samplers, lambda times: [], Rule(0.0, self.scale.rounds))
        return {kind: self._facts(Quartiles.of(times[kind]).median, step) for kind, step in steps.items()}

    def _facts(self, seconds: float, step: Callable[[], object]) -> dict[str, float]:
        return {
            "ms": seconds * 1e3,
            "images_per_s": self.scale.batch / seconds,
            "peak_bytes": peak_bytes(step, self.scale.device),
        }
