"""What the checks of all ops let pass."""

import pytest
import torch
from harness import Case, check_against_reference


def scaled_by_a_sum(fused):
    """y = x * sum(w), whose terms cancel to a ten-thousandth; added up from the front, the sum loses half of that."""

    def run(tensors, backend):
        x, (a, b, c) = tensors[0], tensors[1].unbind()
        return x * (fused(a, b, c) if backend == "fused" else a + (b + c))

    return Case(run, [torch.randn(4, 5), torch.tensor([1.0003, 1e4, -1e4])])


def test_whose_rounding_errors_cancel_is_luck():
    check_against_reference(scaled_by_a_sum(lambda a, b, c: (a + b) + c))


def test_a_wrong_factor_is_none():
    with pytest.raises(AssertionError, match="output: error"):
        check_against_reference(scaled_by_a_sum(lambda a, b, c: 1.02 * ((a + b) + c)))


def test_nothing_that_cancels_is_let_pass():
    def run(tensors, backend):
        return tensors[0] * (1 + 1e-5) if backend == "fused" else tensors[0] * 1

    with pytest.raises(AssertionError, match="output: error"):
        check_against_reference(Case(run, [torch.randn(4, 5)]))
