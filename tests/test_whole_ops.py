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
IMPORT = "import it in vision_ops/ops/__init__.py, as the others are"
each_op = pytest.mark.parametrize("name", sorted(fused_ops))


def test_every_file_is_an_op():
    files = {path.stem for path in (ROOT / "vision_ops" / "ops").glob("[!_]*.py")}
    assert files == set(fused_ops), f"{IMPORT}; what is no op has a name with an underscore"


@each_op
def test_is_exported_with_its_reference(name):
    function = f"fused_{name}"
    assert function in ops.__all__ and function in vision_ops.__all__, (
        "import it in vision_ops/ops/__init__.py, as the others are"
    )
    assert callable(getattr(reference, name, None)), "write it in vision_ops/reference, import it in its __init__.py"


@each_op
def test_docstring_names_every_argument(name):
    function = getattr(ops, f"fused_{name}")
    parts = function.__doc__.split("Args:")[1].split("Raises:")
    assert len(parts) == 2, "the docstring says in Args what it takes, and in Raises what it refuses"
    for parameter in inspect.signature(function).parameters:
        assert parameter in parts[0], f"the docstring's Args lack {parameter}"


@each_op
def test_is_tested_as_all_are(name):
    """In `every_op` it is called on meta tensors, on GPUs, by other threads and by the battery."""
    assert name in NAMES, "add a Case to tests/every_op.py"


@each_op
def test_is_reported(name):
    assert fused_ops[name].dims in info._SHAPES, "vision_ops/info.py has a shape for every kind of first argument"


@each_op
def test_counts_flops(name):
    both = definitions[name].forward, definitions[name].backward
    assert all(op.overloadpacket in flop_registry for op in both)


@each_op
def test_has_benchmarks(name):
    assert name in CASES, "add an Op to benchmarks/cases.py"


@each_op
def test_is_in_the_readme(name):
    assert f"`fused_{name}`" in (ROOT / "README.md").read_text(), "add a row to the table of ops in README.md"


@each_op
def test_triton_kernels_are_compiled(name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT / "tests" / "kernels")
    from launches import LAUNCHES

    if (ROOT / "kernels" / f"{name}.py").exists():
        assert name in {launch.op for launch in LAUNCHES}, "call its launchers in tests/kernels/launches.py"
