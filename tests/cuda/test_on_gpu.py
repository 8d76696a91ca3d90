"""What the emulation and the interpreter have no word on: streams, graphs, devices, and that nothing fell back."""

import re
from collections import Counter

import pytest
import torch
from every_op import every_op
from harness import relative_error
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vision_ops import _native
from vision_ops.models import create_model
from vision_ops.ops import xca
from vision_ops.ops._pointwise import weight_gradient
from vision_ops.ops._registration import fused_ops

pytestmark = pytest.mark.gpu
OPS = tuple(fused_ops)
each_op = pytest.mark.parametrize("name", OPS)


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    if _native.cuda is None:
        pytest.skip(_native.cuda_missing)


def call(name, device="cuda"):
    return every_op(device, torch.bfloat16)[name]


def step(case, backend="fused"):
    leaves = case.leaves()
    y = case.run(leaves, backend)
    return [y, *torch.autograd.grad(y.float().square().sum(), [t for t in leaves if t is not None and t.requires_grad])]


def captured(run):
    """A CUDA graph of run(), and its results, which a replay computes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def check_close(found, expected, tolerance=2e-2):
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a.detach(), b.detach().double()) <= tolerance


@each_op
def test_cuda_graph(name):
    case = call(name)
    graph, results = captured(lambda: step(case))
    with torch.no_grad():
        case.tensors[0].copy_(torch.randn_like(case.tensors[0]))
    graph.replay()
    check_close(results, step(case))


@each_op
def test_current_stream(name):
    """Work that is queued before ours on the stream is waited for."""
    case = call(name)
    step(case)
    expected = step(case)
    x = case.tensors[0]
    given = x.clone(memory_format=torch.preserve_format)
    x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        x.copy_(given)
        found = step(case)
    check_close(found, expected)


@each_op
def test_other_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    case = call(name, "cuda:1")
    found = step(case)
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in found)
    check_close(found, step(case, "reference"), tolerance=5e-2)


# Of functions of the binding, the kernels: with 32 channels in three branches and every gradient.
BINDING = {
    "dwconv": {"march_kernel": 1},
    "dwconv_backward_activation": {"march_kernel": 1},
    "dwconv_backward_input": {"march_kernel": 1},
    "dwconv_backward_weight": {"march_wgrad_kernel": 1, "add_splits_kernel": 1},
    "multi_order_dwconv": {"march_kernel": 4},
    "multi_order_dwconv_backward": {"march_kernel": 5, "march_wgrad_kernel": 4, "add_splits_kernel": 4},
    "global_filter": {"filter_kernel": 1},
    "global_filter_backward": {"filter_backward_kernel": 1, "add_splits_of_filter_kernel": 1},
}


def kernels_of(launches):
    """How often each kernel runs, of what `recording` saw launched."""
    total = Counter()
    for name in launches:
        total.update(BINDING.get(name, {name: 1}))
    return total


@each_op
def test_our_kernels_run_on_the_callers_stream(name, monkeypatch):
    """Each as often as on tensors without values, by the profiler's account: nothing fell back."""
    import recording

    with monkeypatch.context() as patch:
        recorder = recording.install(patch)
        step(call(name, "meta"))
    expected = kernels_of(recorder.launches)
    case = call(name)
    step(case)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        with torch.cuda.stream(torch.cuda.Stream()):
            step(case)
        torch.cuda.synchronize()
        step(case)
        torch.cuda.synchronize()
    found = Counter()
    for event in profiled.events():
        for kernel in expected:
            if event.device_type == DeviceType.CUDA and re.search(rf"\b{kernel}\b", event.name):
                found[event.device_resource_id, kernel] += 1
    streams = {stream for stream, _ in found}
    assert len(streams) == 2, "one is the caller's, one is the default stream"
    assert found == Counter({(stream, kernel): n for stream in streams for kernel, n in expected.items()})


NETWORKS = {
    "hornet_tiny_7x7": {"depths": (1, 1, 1, 1)},
    "moganet_tiny": {"depths": (1, 1, 1, 1)},
    "edgenext_small": {"depths": (1, 2, 2, 2)},
    "s2mlpv2_small_7": {"depth": (1, 1)},
    "tiny_moat_0": {"depths": (1, 1, 1, 1)},
}


def network(name):
    model = create_model(name, **NETWORKS[name]).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    return model, images


@pytest.mark.parametrize("name", NETWORKS)
def test_graph_of_inference(name):
    """As in the README."""
    model, images = network(name)
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        other = torch.randn_like(images)
        expected = model(other).clone()
        model = torch.cuda.make_graphed_callables(model, (images,))
        check_close([model(other)], [expected])


@pytest.mark.parametrize("name", NETWORKS)
def test_graph_of_a_training_step(name):
    model, images = network(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.arange(len(images), device="cuda")

    def run():
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return [loss]

    run()
    graph, _ = captured(run)
    start = {key: t.clone() for key, t in model.state_dict().items()}
    ends = []
    for again in (graph.replay, run):
        model.load_state_dict(start)
        for _ in range(2):
            again()
        ends.append([t.clone() for t in model.state_dict().values() if t.is_floating_point()])
    assert any(not torch.equal(a, b) for a, b in zip(start.values(), model.state_dict().values(), strict=True))
    check_close(*ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradients_are_summed_in_float32(dtype):
    """Of 400,000 pixels, as at batch 128; parts rounded to half types would be 1e-3 off."""
    x, grad = (torch.randn(128, c, 56, 56, device="cuda", dtype=dtype) for c in (64, 32))
    x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    found = torch.empty(32, 64, device="cuda")
    weight_gradient(grad, x, found)
    exact = torch.einsum("nohw,nihw->oi", grad.double(), x.double())
    assert relative_error(found, exact) < 1e-5


def test_tf32_does_not_reach_what_cancels(monkeypatch):
    """MogaNet's means, of images that are the same everywhere, and the form of XCA."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert not xca._takes_gram(torch.randn(1, 1024, 96, device="cuda"))
        case = every_op("cuda", torch.float32)["moga_aggregation"]
        found, expected = step(case), step(case.to(torch.float64), "reference")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    check_close(found, expected, tolerance=1e-2)
