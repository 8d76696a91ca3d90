"""python -m benchmarks networks, with networks that take no time."""

import csv
import json
import math

import pytest
import torch
from torch import nn

from benchmarks import __main__ as cli
from benchmarks import costs, loss, network_race, networks
from benchmarks.network_race import NetworkRace
from benchmarks.networks import NETWORKS, Network, Scale

pytest.importorskip("rich")
from benchmarks import network_runs

SCALE = Scale("cpu", batch=2, dtype=torch.float32, compiler="aot_eager")


class Small(nn.Module):
    """Ours multiplies by `error`, and sleeps in an op of ours."""

    def __init__(self, error=1.0):
        super().__init__()
        self.conv, self.head, self.error = nn.Conv2d(3, 64, 8, stride=8), nn.Linear(64, 10), error

    def forward(self, x):
        x = self.conv(x)
        if self.error != 1:
            with torch.profiler.record_function("vision_ops::op"):
                x = x * self.error
        return self.head(x.mean((2, 3)))


@pytest.fixture
def nets(monkeypatch):
    """Takes what the fused one multiplies by; and the command line shall change nothing in this process."""

    def fake(error=1.0 + 1e-9):
        def build(network, scale, fused, seed=0):
            torch.manual_seed(seed)
            return Small(error if fused else 1.0).to(memory_format=scale.memory_format)

        monkeypatch.setattr(networks, "build", build)
        monkeypatch.setattr(loss, "build", build)

    monkeypatch.setattr(network_runs, "prepare_torch", lambda args, fresh: None)
    monkeypatch.setattr(cli, "prepare_environment", lambda threads: None)
    monkeypatch.setattr(network_runs, "ROUNDS", 2)
    fake()
    return fake


def race(network="hornet_tiny_7x7", kinds=("fused", "eager"), modes=("forward", "train")):
    layouts = ("contiguous", "channels_last")
    rule, stopwatch = network_runs.Rule(0.0, 2), network_runs.Stopwatch("cpu")
    net = NetworkRace("Net", Network(network, 32, {}), kinds, layouts, modes, SCALE, rule, stopwatch)
    return net.run(lambda stage: None)


def test_a_network_is_timed_in_both_layouts_and_modes(nets):
    forward, train = race()
    for result in (forward, train):
        assert (result.status, result.rounds, result.batch, result.shape) == ("ok", 2, 2, "hornet_tiny_7x7 32x32")
        names = {f"{kind}/{layout}" for kind in ("fused", "eager") for layout in ("contiguous", "channels_last")}
        assert {provider.name for provider in result.providers} == names
        for provider in result.providers:
            assert provider.images_per_s == pytest.approx(2 / provider.time_s.median)
            assert provider.peak_bytes > 0
            assert (provider.same_layout is not None) == (provider.kind == "fused")
        for fused in result.fused():
            assert fused.same_layout.peer == f"eager/{fused.layout}" and 0 < fused.in_ops < 1
    image = 2 * 3 * 32 * 32 * 4
    for provider in train.providers:
        assert image <= provider.saved_bytes < image + 40_000  # and small maps, but not the 49 KB of parameters
    assert all(provider.saved_bytes is None for provider in forward.providers)


def test_a_wrong_network_is_not_timed(nets):
    nets(error=1.01)
    for result in race():
        assert result.status == "WRONG" and "logits off by" in result.detail and not result.providers


def test_compiled_ones_take_part_and_ours_is_no_peer(nets, monkeypatch):
    def interleave(samplers, compare, rule):
        return {name: [0.1 if name.startswith("compile(fused)") else 1.0] * 2 for name in samplers}

    monkeypatch.setattr(network_race, "interleave", interleave)
    (result,) = race(kinds=tuple(networks.KINDS), modes=("train",))
    assert result.status == "ok"
    by_name = {provider.name: provider for provider in result.providers}
    for layout in ("contiguous", "channels_last"):
        for ours in ("fused", "compile(fused)"):
            peers = {by_name[f"{ours}/{layout}"].same_layout.peer, by_name[f"{ours}/{layout}"].all_layouts.peer}
            assert not any("fused" in peer for peer in peers)
        assert by_name[f"compile(fused)/{layout}"].all_layouts.ratio.median == pytest.approx(10)


def test_what_does_not_compile_is_left_out(nets, monkeypatch):
    def refuse(net, **options):
        def call(*args):
            raise RuntimeError("no compiler")

        net.forward = call
        return net

    monkeypatch.setattr(torch, "compile", refuse)
    (result,) = race(kinds=("fused", "eager", "compile(reference)"), modes=("forward",))
    assert result.status == "ok"
    errors = {provider.kind: provider.error for provider in result.providers}
    assert errors == {"fused": None, "eager": None, "compile(reference)": "RuntimeError: no compiler"}


def test_without_timm_the_reason_is_told(nets, monkeypatch):
    def missing(network):
        raise ImportError("timm is not installed")

    monkeypatch.setattr(networks, "timm_peer", missing)
    (result,) = race("edgenext_small", kinds=("fused", "eager", "timm"), modes=("forward",))
    assert result.status == "ok"
    assert [p.error for p in result.providers if p.kind == "timm"] == ["ImportError: timm is not installed"] * 2


def test_the_peer_of_timm(timm):
    scale = Scale("cpu", batch=1, dtype=torch.float32)
    ours, theirs = (networks.assemble(kind, NETWORKS["EdgeNeXt-S"], scale) for kind in ("eager", "timm"))
    count = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert count[0] == count[1] and theirs(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_scales_of_branches_are_not_so_small_that_errors_vanish():
    net = networks.build(NETWORKS["HorNet-T"], Scale("cpu", small=True), fused=True)
    assert all(p.detach().eq(networks.SCALE).all() for name, p in net.named_parameters() if "gamma" in name)


def test_the_share_of_ours():
    a = torch.randn(300, 300)

    def step():
        for name in ("vision_ops::a", "other"):
            with torch.profiler.record_function(name):
                for _ in range(10):
                    a @ a

    def nested():
        with torch.profiler.record_function("vision_ops::a"):
            step()

    assert 0.2 < costs.share_of("vision_ops::", step, "cpu") < 0.8
    assert 0.5 < costs.share_of("vision_ops::", nested, "cpu") <= 1


def run(*words):
    return cli.main(["networks", "--device", "cpu", "--batch", "1,2", "--seconds", "0.001", *words])


def test_the_command_writes_its_files(nets, tmp_path, capsys):
    words = ("--network", "hornet", "MOAT-0", "--dtype", "float32", "--layout", "channels_last", "--out", str(tmp_path))
    assert run(*words) == 0
    found = json.loads((tmp_path / "networks.json").read_text())
    assert [(r["case"], r["batch"], r["mode"]) for r in found["results"]] == [
        (name, batch, mode) for batch in (1, 2) for name in ("HorNet-T", "MOAT-0") for mode in ("forward", "train")
    ]
    with (tmp_path / "networks.csv").open(newline="") as file:
        assert all(float(row["images_per_s"]) > 0 for row in csv.DictReader(file))
    assert (tmp_path / "networks-float32.png").read_bytes().startswith(b"\x89PNG")
    assert "networks, float32, batch 2" in capsys.readouterr().out


def test_the_short_run_takes_one_network_of_each_kind(nets, tmp_path, monkeypatch):
    monkeypatch.setattr(network_runs, "draw", lambda *args: None)
    assert cli.main(["networks", "--device", "cpu", "--mode", "forward", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "networks.json").read_text())
    assert [result["case"] for result in found["results"]] == list(network_runs.SHORT)
    assert {result["batch"] for result in found["results"]} == {1}
    assert {NETWORKS[name].variant.partition("_")[0] for name in network_runs.SHORT} == {
        network.variant.partition("_")[0] for network in NETWORKS.values()
    }


def test_names_of_networks(nets, capsys):
    assert set(network_runs._find("MogaNet")) == {"MogaNet-T", "MogaNet-S"}
    assert set(network_runs._find("hornet_tiny")) == {"HorNet-T"}
    found = network_runs._find("edgenext_x_small")
    assert found["edgenext_x_small"].image == 256
    with pytest.raises(SystemExit, match="2"):
        run("--network", "resnet")
    assert "argument --network: 'resnet' is none of HorNet-T, " in capsys.readouterr().err


def test_losses_lie_over_each_other(nets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss, "STEPS", 6)
    words = ("--loss", "--network", "HorNet-T", "--dtype", "float32", "--out", str(tmp_path))
    assert run(*words) == 0
    found = json.loads((tmp_path / "loss.json").read_text())["losses"]["HorNet-T"]
    assert set(found) == {"0", "1"}
    for both in found.values():
        assert both["fused"] == pytest.approx(both["eager"], rel=1e-5) and len(both["fused"]) == loss.STEPS
    assert found["0"]["eager"] != found["1"]["eager"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "apart by" in capsys.readouterr().out


@pytest.mark.not_finite
def test_a_loss_that_is_not_finite_is_a_failure(nets):
    nets(error=math.inf)
    assert run("--loss", "--network", "HorNet-T", "--dtype", "float32") == 1


def test_ours_are_ops_of_vision_ops():
    from vision_ops import fused_layer_norm_2d, use_backend

    x, weight = torch.randn(1, 8, 16, 16, requires_grad=True), torch.ones(8)

    def step():
        with use_backend("fused"):
            fused_layer_norm_2d(x, weight, weight).sum().backward()

    step()
    assert 0 < costs.share_of(network_race.OURS_BY_NAME, step, "cpu") < 1
