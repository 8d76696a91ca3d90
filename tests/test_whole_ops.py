"""What an op consists of besides its own file: what a new one forgot is named here."""

import inspect
from pathlib import Path

import pytest
from every_op import NAMES
from torch.utils.flop_counter import flop_registry

import vision_ops
from benchmarks.cases import OPS as CASES
from vision_ops import info, ops, reference
from vision_ops.ops._definitions import definitions
from vision_ops.ops._registration import fused_ops

ROOT = Path(__file__).parents[1]
each_op = pytest.mark.parametrize("name", sorted(fused_ops))


@each_op
def test_is_exported_with_its_reference(name):
    function = f"fused_{name}"
    assert function in ops.__all__ and function in vision_ops.__all__
    assert callable(getattr(reference, name))


@each_op
def test_docstring_names_every_argument(name):
    function = getattr(ops, f"fused_{name}")
    parts = function.__doc__.split("Args:")[1].split("Raises:")
    assert len(parts) == 2
    for parameter in inspect.signature(function).parameters:
        assert parameter in parts[0], parameter


@each_op
def test_is_tested_as_all_are(name):
    """In `every_op` it is called on meta tensors, on GPUs, by other threads and by the battery."""
    assert name in NAMES


@each_op
def test_is_reported(name):
    assert fused_ops[name].dims in info._SHAPES


@each_op
def test_counts_flops(name):
    both = definitions[name].forward, definitions[name].backward
    assert all(op.overloadpacket in flop_registry for op in both)


@each_op
def test_has_benchmarks(name):
    assert name in CASES


@each_op
def test_is_in_the_readme(name):
    assert f"`fused_{name}`" in (ROOT / "README.md").read_text()


@each_op
def test_triton_kernels_are_compiled(name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT / "tests" / "kernels")
    from launches import LAUNCHES

    if (ROOT / "kernels" / f"{name}.py").exists():
        assert name in {launch.op for launch in LAUNCHES}
