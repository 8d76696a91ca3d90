import itertools

import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_gradients,
    laid_out,
    outputs,
    relative_error,
)
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from vision_ops import explain, fused_batch_norm_act, reference, use_backend
from vision_ops.ops._batch_norm import MEAN, VARIANCE, cpu_batch_norm, prepare


def make(
    shape,
    *,
    training=True,
    activation="gelu",
    dtype=torch.float32,
    parameter_dtype=None,
    layout="contiguous",
    mean=0.0,
    eps=1e-3,
):
    c, wanted = shape[1], parameter_dtype or dtype
    x = laid_out((torch.randn(shape) * 2 + mean * torch.randn(c, 1, 1)).to(dtype), layout)
    weight, bias = torch.rand(c).to(wanted) + 0.5, torch.randn(c).to(wanted)
    running = mean * torch.randn(c), torch.rand(c) + 0.5

    def run(t, backend):
        given = (r.to(t[1].device, t[1].dtype) for r in running)
        return fused_batch_norm_act(*t, *given, training=training, eps=eps, activation=activation, backend=backend)

    return Case(run, [x, weight, bias])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("each_device")
def test_matches_reference(layout, dtype, training):
    slack = 10 if dtype == torch.float64 else 2
    for activation in (None, "gelu", "silu"):
        case = make((3, 37, 9, 11), training=training, activation=activation, dtype=dtype, layout=layout)
        check_against_reference(case, layout, slack=slack)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    "shape", [(2, 64, 14, 14), (5, 20, 5, 1), (2, 3, 1, 33), (2, 130, 1, 1), (3, 24, 75, 53)], ids=str
)
def test_sizes(shape):
    for layout, training in itertools.product(("contiguous", "channels_last"), (True, False)):
        check_against_reference(make(shape, layout=layout, training=training), layout, slack=4)


def test_empty_batches_change_nothing():
    x, running = torch.randn(0, 4, 3, 3, requires_grad=True), (torch.ones(4), torch.ones(4))
    weight = torch.ones(4, requires_grad=True)
    y = fused_batch_norm_act(x, weight, torch.zeros(4), *running, training=True, backend="fused")
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 4, 3, 3) and weight.grad.eq(0).all()
    assert all(torch.equal(t, torch.ones(4)) for t in running)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_of_ten_times_the_spread(dtype, layout):
    for training in (True, False):
        check_against_reference(
            make((4, 24, 14, 14), dtype=dtype, layout=layout, mean=20.0, training=training), slack=2
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moments_of_a_trend(layout):
    """The means of rows, shares and images differ, which is most of the variance."""
    x = laid_out(torch.randn(3, 8, 60, 53) + torch.linspace(-9, 9, 3 * 3180).view(3, 1, 60, 53), layout)
    table = torch.full((5, 8), torch.nan)
    prepare(cpu_batch_norm(), x, (torch.ones(8), torch.zeros(8)), table, 1e-3)
    assert (table[MEAN] - x.double().mean((0, 2, 3))).abs().max() < 1e-5
    assert relative_error(table[VARIANCE], x.double().var((0, 2, 3))) < 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_variance_about_a_large_mean(layout):
    """E[x^2] - E[x]^2 would have no digit left."""
    x = laid_out(torch.randn(4, 8, 40, 40) + 1e4, layout)
    running = torch.zeros(8), torch.zeros(8)
    fused_batch_norm_act(x, torch.ones(8), torch.zeros(8), *running, training=True, momentum=1.0, backend="fused")
    assert relative_error(running[1], x.double().var((0, 2, 3))) < 1e-4


@pytest.mark.parametrize("momentum", [0.01, 0.1, 1.0, 0.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_statistics_are_pytorchs(layout, momentum):
    norm = torch.nn.BatchNorm2d(24, momentum=momentum, eps=1e-3)
    running = norm.running_mean.clone(), norm.running_var.clone()
    for _ in range(10):
        x = laid_out(torch.randn(3, 24, 7, 5) * 3 + torch.randn(24, 1, 1), layout)
        norm(x)
        fused_batch_norm_act(
            x, norm.weight, norm.bias, *running, training=True, momentum=momentum, eps=1e-3, backend="fused"
        )
    for found, expected in zip(running, (norm.running_mean, norm.running_var), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_running_statistics(dtype):
    found, expected = ((torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype)) for _ in range(2))
    x, parameters = torch.randn(4, 8, 5, 5).to(dtype), (torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype))
    for running, backend in ((found, "fused"), (expected, "reference")):
        fused_batch_norm_act(x, *parameters, *running, training=True, backend=backend)
    torch.testing.assert_close(found, expected)


def test_a_second_derivative_moves_no_running_statistics():
    x, running = torch.randn(2, 4, 3, 3, requires_grad=True), (torch.zeros(4), torch.ones(4))
    y = fused_batch_norm_act(x, torch.ones(4), torch.zeros(4), *running, training=True, backend="fused")
    before = running[0].clone()
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    first.square().sum().backward()
    assert torch.equal(running[0], before) and x.grad is not None


def test_checkpoints_move_running_statistics_again():
    """As PyTorch's norm moves them, but that a recomputation ends where the last op has saved all."""
    x, moved = torch.randn(4, 6, 5, 5, requires_grad=True), {}
    for backend, early in (("reference", True), ("fused", False), ("fused", True)):
        first, last = ((torch.zeros(6), torch.ones(6)) for _ in range(2))

        def step(t, backend=backend, first=first, last=last):
            for running in (first, last):
                t = fused_batch_norm_act(t, torch.ones(6), torch.zeros(6), *running, training=True, backend=backend)
            return t

        with set_checkpoint_early_stop(early):
            checkpoint(step, x, use_reentrant=False).square().sum().backward()
        moved[backend, early] = first[0], last[0]
    for found, expected in zip(moved["fused", False], moved["reference", True], strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(moved["fused", True][0], moved["reference", True][0])


def test_reference_is_the_definition():
    x, weight, bias = make((3, 5, 4, 4)).tensors
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    z = (x - mean[:, None, None]) / (variance + 1e-3).sqrt()[:, None, None] * weight[:, None, None] + bias[
        :, None, None
    ]
    found = reference.batch_norm_act(x, weight, bias, None, None, training=True, eps=1e-3, activation="gelu")
    torch.testing.assert_close(found, F.gelu(z))


def test_gradcheck():
    check_gradients(make((2, 3, 3, 4)))
    check_gradients(make((2, 4, 2, 3), training=False, activation="silu", layout="channels_last"), second=False)
    check_gradients(make((2, 5, 2, 3), activation=None, layout="channels_last"), second=False)


def test_compiled_running_statistics():
    norm, x = torch.nn.BatchNorm2d(8), torch.randn(3, 8, 5, 5)
    running = norm.running_mean.clone(), norm.running_var.clone()

    @torch.compile(fullgraph=True)
    def step(x, *running):
        return fused_batch_norm_act(x, norm.weight, norm.bias, *running, training=True, backend="fused")

    torch.testing.assert_close(step(x, *running), norm(x))
    torch.testing.assert_close(running, (norm.running_mean, norm.running_var))


X, C = torch.randn(2, 8, 7, 7), [torch.ones(8) for _ in range(4)]


@pytest.mark.parametrize("training", [False, True])
def test_weights_with_gaps(training):
    """PyTorch's backward pass reads what lies between the numbers of a channels_last map's weight."""
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    weight, bias, running = torch.randn(16)[::2], torch.randn(16)[1::2], (torch.zeros(8), torch.ones(8))

    def run(t, backend):
        copies = (r.to(t[0].dtype).clone() for r in running)
        return fused_batch_norm_act(*t, *copies, training=training, backend=backend)

    case = Case(run, [x, weight, bias])
    (*found,), grad = outputs(case, "reference")
    exact, _ = outputs(Case(run, [x, weight.contiguous(), bias.contiguous()]).to(torch.float64), "reference", grad)
    assert all(relative_error(a, e) < 1e-5 for a, e in zip(found, exact, strict=True))
    check_against_reference(case, "channels_last")


REFUSED = {
    "rank": (ValueError, r"x must have the dimensions \(N, C, H, W\)", (X[0], *C), {}),
    "weight": (ValueError, r"weight must have shape \(8,\) \(C\), got \(7,\)", (X, C[0][1:], *C[1:]), {}),
    "running": (TypeError, "running_var must have the dtype of weight", (X, *C[:3], C[3].bfloat16()), {}),
    "no running": (TypeError, "running_mean must be a torch.Tensor", (X, *C[:2], None, None), {"training": False}),
    "training": (TypeError, "training must be a bool, got str", (X, *C), {"training": "no"}),
    "one running": (TypeError, "running_var must be a torch.Tensor", (X, *C[:3], None), {"training": True}),
    "momentum": (ValueError, "momentum must be from 0 to 1, got 2", (X, *C), {"momentum": 2}),
    "momentum type": (TypeError, "momentum must be a float, got NoneType", (X, *C), {"momentum": None}),
    "eps": (ValueError, "eps must be finite and at least 0", (X, *C), {"eps": -1.0}),
    "activation": (ValueError, "activation must be one of", (X, *C), {"activation": "relu"}),
    "one value": (ValueError, "more than one value per channel in training", (X[:1, :, :1, :1], *C), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_batch_norm_act(*arguments, **{"training": True, **options})


def test_explains():
    for training in (True, False):
        assert "C++" in explain("batch_norm_act", X, *C, training=training, backend="fused").parts["batch_norm_act"]
    with use_backend("reference"):
        assert explain("batch_norm_act", X, *C, training=True).parts == {"batch_norm_act": "PyTorch"}


def test_hands_over_where_torch_is_faster():
    large = torch.randn(4, 8, 256, 128)
    last = large.contiguous(memory_format=torch.channels_last)
    ours = {
        (x is last, training, activation): "C++" in explain("batch_norm_act", x, *C, **options).parts["batch_norm_act"]
        for x in (large, last)
        for training in (True, False)
        for activation in (None, "gelu")
        for options in [{"training": training, "activation": activation}]
    }
    alone = {key for key in ours if key[2] is None}
    assert {key for key, runs in ours.items() if not runs} == alone - {(False, True, None)}
    assert explain("batch_norm_act", X, *C, training=True, activation="gelu").parts == {"batch_norm_act": "PyTorch"}
