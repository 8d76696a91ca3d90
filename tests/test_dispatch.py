import os
import re
import subprocess
import sys

import pytest
import torch

import vision_ops
from vision_ops import _native, dispatch, explain, fused_dwconv, use_backend
from vision_ops.ops._registration import fused_ops

X, W = torch.randn(1, 8, 7, 7), torch.randn(8, 1, 3, 3)


def test_use_backend_nests_and_restores():
    assert dispatch.resolve_backend(None) == "auto"
    with use_backend("reference"):
        assert explain("dwconv", X).backend == "reference"
        with use_backend("fused"):
            assert explain("dwconv", X).backend == "fused"
        assert explain("dwconv", X, backend="auto").backend == "auto"
        assert explain("dwconv", X).backend == "reference"
    assert dispatch.resolve_backend(None) == "auto"
    with pytest.raises(ValueError, match="backend must be one of"):
        use_backend("cuda")
    assert dispatch.resolve_backend(None) == "auto"


def test_use_backend_object_serves_several_blocks():
    reference = use_backend("reference")
    for _ in range(2):
        with reference:
            assert dispatch.resolve_backend(None) == "reference"
        assert dispatch.resolve_backend(None) == "auto"


def test_use_backend_as_a_setter():
    before = use_backend("reference")
    try:
        assert explain("dwconv", X).parts == {"dwconv": "PyTorch"}
    finally:
        before.__exit__(None, None, None)


def test_use_backend_reaches_a_compiled_function():
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(any("vision_ops" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(fused_dwconv, backend=backend, fullgraph=True)
    compiled(X, W)
    with use_backend("reference"):
        compiled(X, W)
    compiled(X, W)
    assert seen == [True, False]


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("nonsense", "auto")])
def test_environment_variable(value, expected):
    code = "import vision_ops, vision_ops.dispatch as d; print(d.resolve_backend(None))"
    environment = {**os.environ, "VISION_OPS_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
    assert ("VISION_OPS_BACKEND='nonsense' is not one of" in done.stderr) == (value == "nonsense")


def test_explain_says_what_runs_and_why_not(monkeypatch):
    assert explain("dwconv", X).parts == {"dwconv": f"C++ kernel ({_native.cpu.isa})"}
    assert explain("dwconv", X, W, None, stride=2).cannot == []
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "cpu_missing", "no compiler was found")
    found = explain("multi_order_dwconv", X)
    assert found.parts == {"multi_order_dwconv": "PyTorch"} and found.cannot == ["no compiler was found"]
    assert "the fused kernel cannot run: no compiler was found" in str(found)
    assert "nothing" in explain("dwconv", X, backend="fused").parts["dwconv"]
    assert explain("gnconv", X, proj_in_weight=W, scale=2.0).parts == explain("gnconv", X).parts
    with pytest.raises(TypeError, match="foo"):
        explain("moga_aggregation", X, foo=1)
    with pytest.raises(TypeError, match="too many positional arguments"):
        explain("channel_aggregation_ffn", X, *[None] * 20)
    with pytest.raises(TypeError, match="bogus"):
        explain("multi_order_dwconv", X, bogus=1)
    with pytest.raises(ValueError, match="x must have the dimensions"):
        explain("dwconv", X[0])
    known = re.escape(str(sorted(fused_ops)))
    with pytest.raises(ValueError, match=f"op must be one of {known}, got 'conv'"):
        explain("conv", X)


def test_explain_names_the_device():
    assert explain("dwconv", X.to("meta")).cannot == ["there is no kernel for device 'meta'"]


def test_ops_run_on_meta_tensors():
    assert fused_dwconv(X.to("meta"), W.to("meta"), stride=2).shape == (1, 8, 4, 4)


def test_public_names():
    assert set(vision_ops.__all__) <= set(dir(vision_ops))
    assert all(getattr(vision_ops, name).__doc__ for name in vision_ops.__all__ if not name.startswith("_"))


def test_explain_names_the_argument_and_takes_the_public_name():
    with pytest.raises(TypeError, match=r"explain\('dwconv'\) takes what fused_dwconv takes, at least x"):
        explain("dwconv")
    x = torch.randn(1, 8, 5, 5)
    assert explain("fused_dwconv", x) == explain("dwconv", x)
