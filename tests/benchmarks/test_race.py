import dataclasses
import time

import pytest
import torch

from benchmarks import cases, race
from benchmarks.machine import Rates
from benchmarks.measure import Rule, Stopwatch
from benchmarks.shapes import DWConvShape
from benchmarks.verify import complaints
from vision_ops import reference

PLAN = race.Plan(
    cases.Setting("cpu", torch.float32, "contiguous", batch=2),
    layouts=("contiguous", "channels_last"),
    modes=("forward", "train"),
    rule=Rule(seconds=0.01, rounds=3),
    stopwatch=Stopwatch("cpu"),
    rates=Rates({1: 1e9}, 1e9),
)


def run(fused, plan=PLAN, peers=("eager",)):
    shapes = {"tiny": DWConvShape(8, 6, 3)}
    op = cases.Op("dwconv", fused, reference.dwconv, shapes, cases.build_dwconv, quick=())
    return race.Race(op, "tiny", peers, plan).run(lambda stage: None)


def off_by_a_thousandth(*args, **options):
    return reference.dwconv(*args, **options) * 1.001


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def wrong_gradient_of_the_bias(x, weight, bias, **options):
    return reference.dwconv(x, weight, HalfGradient.apply(bias), **options)


def wrong_in_channels_last(x, weight, bias, **options):
    output = reference.dwconv(x, weight, bias, **options)
    return output if x.is_contiguous() else output + 0.01


def nan(*args, **options):
    return reference.dwconv(*args, **options) * float("nan")


@pytest.mark.parametrize(
    ("fused", "detail"),
    [
        (off_by_a_thousandth, "contiguous, output"),
        (wrong_gradient_of_the_bias, "contiguous, gradient of input 2"),
        (wrong_in_channels_last, "channels_last, output"),
        (nan, "error nan"),
    ],
)
def test_a_wrong_op_is_refused_and_not_timed(fused, detail, monkeypatch):
    monkeypatch.setattr(race, "interleave", lambda *args: pytest.fail("timed"))
    results = run(fused)
    assert [result.mode for result in results] == ["forward", "train"]
    for result in results:
        assert result.status == "WRONG"
        assert detail in result.detail
        assert result.fused() == []


@pytest.mark.parametrize("fused", [off_by_a_thousandth, wrong_gradient_of_the_bias, nan])
def test_a_wrong_op_is_timed_where_that_is_asked_for(fused):
    for result in run(fused, dataclasses.replace(PLAN, time_wrong=True)):
        assert result.status == "WRONG" and "error" in result.detail
        assert len(result.fused()) == 2 and all(provider.time_s.median > 0 for provider in result.providers)


def test_a_wrong_op_that_then_fails_stays_wrong(monkeypatch):
    def broken(*args):
        raise RuntimeError("no clock")

    monkeypatch.setattr(race, "interleave", broken)
    for fused, status in ((reference.dwconv, "FAILED"), (nan, "WRONG")):
        results = run(fused, dataclasses.replace(PLAN, time_wrong=True))
        assert [result.status for result in results] == [status] * 2


def test_gradients_count_where_only_the_forward_pass_is_timed():
    (result,) = run(wrong_gradient_of_the_bias, dataclasses.replace(PLAN, modes=("forward",)))
    assert result.status == "WRONG"


def test_an_op_that_cannot_run_fails_and_says_why():
    def refuse(*args, **options):
        raise ValueError("no kernel for this")

    assert {(result.status, result.detail) for result in run(refuse)} == {("FAILED", "ValueError: no kernel for this")}


def test_a_right_op_is_timed_against_both_layouts():
    forward, train = run(reference.dwconv)
    assert (forward.status, train.status) == ("ok", "ok")
    assert [provider.name for provider in forward.providers] == [
        "fused/contiguous", "fused/channels_last", "eager/contiguous", "eager/channels_last",
    ]  # fmt: skip
    for result in (forward, train):
        assert result.rounds >= 3
        for provider in result.providers:
            assert provider.time_s.median > 0
            assert provider.peak_bytes > 0
        for fused in result.fused():
            assert fused.same_layout.peer == f"eager/{fused.layout}"
            assert fused.all_layouts.peer in ("eager/contiguous", "eager/channels_last")
    x, parameters = 2 * 8 * 6 * 6 * 4, 8 * (9 + 1) * 4
    assert forward.min_bytes == 2 * x + parameters
    assert train.min_bytes == 5 * x + 3 * parameters
    assert train.flops == 3 * forward.flops
    # A convolution keeps its input and its weight; the forward pass alone keeps nothing.
    assert {provider.saved_bytes for provider in train.providers} == {x + 8 * 9 * 4}
    assert {provider.saved_bytes for provider in forward.providers} == {None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_right_op_is_timed_on_a_gpu():
    setting = cases.Setting("cuda", torch.bfloat16, "contiguous", batch=2)
    plan = dataclasses.replace(PLAN, setting=setting, stopwatch=Stopwatch("cuda"))
    for result in run(reference.dwconv, plan):
        assert result.status == "ok"
        assert all(provider.time_s.median > 0 and provider.peak_bytes > 0 for provider in result.providers)


def test_a_peer_that_does_not_compile_is_left_out(monkeypatch):
    def no_compiler(*args, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("benchmarks.providers.compiled", lambda function, device: no_compiler)
    for result in run(reference.dwconv, peers=("eager", "compile")):
        assert result.status == "ok"
        assert [provider.error for provider in result.providers if provider.kind == "compile"] == [
            "RuntimeError: no compiler here"
        ] * 2
        assert all(fused.all_layouts.peer.startswith("eager/") for fused in result.fused())


def test_another_way_to_write_the_op_is_a_peer_of_its_name():
    def slow(*args, **options):
        time.sleep(0.01)
        return reference.dwconv(*args, **options)

    def run_of(eager, other):
        shapes, ways = {"tiny": DWConvShape(8, 6, 3)}, {"other": other}
        op = cases.Op("dwconv", reference.dwconv, eager, shapes, cases.build_dwconv, quick=(), others=ways)
        return race.Race(op, "tiny", ("eager", "other"), PLAN).run(lambda stage: None)

    for ways, best in (((slow, reference.dwconv), "other"), ((reference.dwconv, slow), "eager")):
        for result in run_of(*ways):
            assert result.status == "ok"
            assert {provider.kind for provider in result.providers} == {"fused", "eager", "other"}
            assert all(fused.same_layout.peer == f"{best}/{fused.layout}" for fused in result.fused())


def test_the_allowed_error_is_twice_that_of_eager_and_a_floor():
    exact = torch.tensor([100.0, 1.0], dtype=torch.float64)

    def judge(fused_error, eager_error, dtype=torch.float32):
        fused, eager = ((exact + error).to(dtype) for error in (fused_error, eager_error))
        return complaints([fused], [eager], [exact])

    assert not judge(0.019, 0.01)
    assert judge(0.021, 0.01)
    assert not judge(0.9e-4, 0)
    assert judge(1.2e-4, 0)
    assert not judge(0.25, 0, torch.bfloat16)


def test_one_number_may_err_four_times_as_much():
    exact = torch.tensor([1.0], dtype=torch.float64)
    assert not complaints([(exact + 0.07).float()], [(exact + 0.01).float()], [exact])
    assert complaints([(exact + 0.09).float()], [(exact + 0.01).float()], [exact])


def test_another_dtype_or_shape_is_refused():
    exact = torch.ones(4, dtype=torch.float64)
    assert complaints([exact], [exact.float()], [exact])
    assert complaints([torch.ones(1)], [exact.float()], [exact])
