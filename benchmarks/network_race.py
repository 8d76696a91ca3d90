"""A network: prove ours right, then time it against the others, forward and in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.costs import share_of
from benchmarks.measure import Rule, Step, Stopwatch, first_call, interleave, peak_bytes, saved_bytes
from benchmarks.networks import Network, Scale, assemble, disagreement, exact_results, forward_step, train_step
from benchmarks.other_tree import OtherTree
from benchmarks.providers import Provider, line_up
from benchmarks.race import one_line, ratios_of, samplers_elsewhere, spoil
from benchmarks.report import CaseResult, ProviderResult

OURS = ("fused", "compile(fused)")
OURS_BY_NAME = "vision_ops::"


@dataclass(frozen=True)
class NetworkRace:
    """`kinds` are those of networks.KINDS, and "timm"; each takes part in every layout."""

    name: str
    network: Network
    kinds: Sequence[str]
    layouts: Sequence[str]
    modes: Sequence[str]
    scale: Scale
    rule: Rule
    stopwatch: Stopwatch
    other: OtherTree | None = None

    def run(self, tell: Callable[[str], None]) -> list[CaseResult]:
        """A result for every mode."""
        torch._dynamo.reset()
        if self.other is not None:
            self.other.forget()
        results = [self._blank_result(mode) for mode in self.modes]
        errors: dict[str, str] = {}
        try:
            tell("checking")
            nets = self._assemble(errors)
            wrong = self._wrong(nets)
            if wrong:
                spoil(results, "WRONG", wrong)
                return results
            for result in results:
                self._race(result, nets, errors, tell)
        except Exception as error:
            spoil([result for result in results if result.rounds is None], "FAILED", one_line(error))
        return results

    def _blank_result(self, mode: str) -> CaseResult:
        size = f"{self.network.image}x{self.network.image}"
        dtype = str(self.scale.dtype).removeprefix("torch.")
        return CaseResult("networks", self.name, f"{self.network.variant} {size}", dtype, self.scale.batch, mode)

    def _scale(self, layout: str) -> Scale:
        return replace(self.scale, layout=layout)

    def _assemble(self, errors: dict[str, str]) -> dict[str, nn.Module]:
        """By the providers' names. What is not ours may be missing here."""
        nets = {}
        for provider in line_up(self.kinds, self.layouts):
            try:
                nets[provider.name] = assemble(provider.kind, self.network, self._scale(provider.layout))
            except Exception as error:
                if provider.kind != "timm":
                    raise
                errors[provider.name] = one_line(error)
        return nets

    def _wrong(self, nets: dict[str, nn.Module]) -> str | None:
        x = self.scale.images(self.network, batch=1)
        exact = exact_results(nets[f"eager/{self.layouts[0]}"], x, self.scale)
        found = []
        for layout in self.layouts:
            scale, ours, eager = self._scale(layout), nets[f"fused/{layout}"], nets[f"eager/{layout}"]
            wrong = disagreement(ours, eager, x.contiguous(memory_format=scale.memory_format), scale, exact)
            found += [f"{layout}, {wrong}"] if wrong else []
        return "; ".join(found) or None

    def _race(
        self, result: CaseResult, nets: dict[str, nn.Module], errors: dict[str, str], tell: Callable[[str], None]
    ) -> None:
        steps: dict[str, Step] = {}
        for provider in line_up(self.kinds, self.layouts):
            tell(f"{result.mode}, first call of {provider.kind}")
            entry = ProviderResult(provider.kind, provider.layout, error=errors.get(provider.name))
            result.providers.append(entry)
            if entry.error is None:
                self._first_call(entry, nets[provider.name], result.mode, steps)
        tell(f"{result.mode}, timing")
        samplers = {name: self.stopwatch.sampler(step) for name, step in steps.items()}
        ours = [provider for provider in result.providers if provider.kind in OURS]
        others = [provider for provider in result.providers if provider.kind not in OURS]
        about = {"variant": self.network.variant, "image": self.network.image, "mode": result.mode}
        about |= {"dtype": result.dtype, "batch": result.batch}
        samplers |= samplers_elsewhere(self.other, result, self.layouts, **about)
        times = interleave(samplers, lambda times: list(ratios_of(times, ours, others).values()), self.rule)
        ratios = ratios_of(times, ours, others)
        result.settled = self.rule.settled(list(ratios.values()))
        tell(f"{result.mode}, memory")
        for entry in result.providers:
            if entry.name in times:
                entry.take(times[entry.name], ratios)
                entry.images_per_s = self.scale.batch / entry.time_s.median
            if entry.name in steps:
                self._memory(entry, nets[entry.name], steps[entry.name], result.mode)
        self._shares(result.providers, steps)
        result.rounds = len(next(iter(times.values())))

    def _first_call(self, entry: Provider, net: nn.Module, mode: str, steps: dict[str, Step]) -> None:
        """Its step, if it can be called here."""
        net.train(mode == "train")
        scale = self._scale(entry.layout)
        make = train_step if mode == "train" else forward_step
        step = make(net, scale.images(self.network), scale)
        try:
            entry.first_call_s = first_call(step, scale.device)
        except Exception as error:
            if "compile" not in entry.kind:
                raise
            entry.error = one_line(error)
        else:
            steps[entry.name] = step

    def _memory(self, entry: ProviderResult, net: nn.Module, step: Step, mode: str) -> None:
        net.zero_grad(set_to_none=True)
        entry.peak_bytes = peak_bytes(step, self.scale.device)
        if mode == "train":
            entry.saved_bytes = saved_bytes(step, apart=net.parameters())

    def _shares(self, entries: Sequence[ProviderResult], steps: dict[str, Step]) -> None:
        """Of the time of our network in our ops; of eager's in what they replace, the rest being the same in both."""
        by_name = {entry.name: entry for entry in entries}
        for layout in self.layouts:
            ours, eager = by_name[f"fused/{layout}"], by_name[f"eager/{layout}"]
            ours.in_ops = share_of(OURS_BY_NAME, steps[ours.name], self.scale.device)
            rest = (1 - ours.in_ops) * ours.time_s.median
            eager.in_ops = max(0.0, 1 - rest / eager.time_s.median)
