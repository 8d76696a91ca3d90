"""Threads that stay awake for all passes of an op: the same numbers, and Python's errors come through."""

import threading

import pytest
import torch

from vision_ops import _native
from vision_ops.ops.shift_split_attention import CPUPasses, small

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=str(_native.cpu_missing))


def in_crew(function, *args):
    return _native.cpu_kernels().with_crew(function, *args)


def passes(x, weights, count=3):
    """Passes that are worth all threads and small ones, some of which no late thread sees."""
    sums, y = small(x, 3, x.shape[3]), torch.empty(*x.shape[:3], x.shape[3] // 3)
    for _ in range(count):
        CPUPasses.edge_sums(x, sums)
        CPUPasses.weigh(x, weights, None, y)
        CPUPasses.edge_sums(x[:1, :2, :2], sums[:1])
    return sums, y


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_same_numbers(threads):
    x, weights = torch.randn(3, 40, 40, 96), torch.rand(3, 3, 32)
    expected = passes(x, weights)
    for _ in range(50):
        for a, b in zip(in_crew(passes, x, weights), expected, strict=True):
            assert torch.equal(a, b)


def test_errors_come_through(threads):
    def fail(x):
        CPUPasses.edge_sums(x, small(x, 3, x.shape[3]))
        raise KeyError("of the op")

    with pytest.raises(KeyError, match="of the op"):
        in_crew(fail, torch.randn(3, 40, 40, 96))
    test_same_numbers(threads)


def test_crew_in_a_crew(threads):
    x, weights = torch.randn(3, 40, 40, 96), torch.rand(3, 3, 32)
    for a, b in zip(in_crew(in_crew, passes, x, weights), passes(x, weights), strict=True):
        assert torch.equal(a, b)


def test_torch_works_inside_and_after(threads):
    a = torch.randn(300, 300)
    inside = in_crew(torch.mm, a, a)
    torch.testing.assert_close(inside, a @ a)
    assert torch.get_num_threads() == threads


def test_from_many_threads():
    x, weights, found = torch.randn(3, 40, 40, 96), torch.rand(3, 3, 32), []
    expected = passes(x, weights)
    callers = [threading.Thread(target=lambda: found.append(in_crew(passes, x, weights))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 8
    for result in found:
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b)
