import io
from pathlib import Path

import numpy as np
import pytest
import torch

from vision_ops import nn, use_backend

GOLDENS = Path(__file__).parents[1] / "goldens"


def check_golden(name: str, module: torch.nn.Module, tolerance: float) -> None:
    """Output and all gradients against the numbers of the official code, in float64."""
    data = np.load(GOLDENS / f"{name}.npz")
    tensor = {key: torch.from_numpy(data[key]) for key in data.files}
    module.double().load_state_dict({key[2:]: t for key, t in tensor.items() if key.startswith("p:")})
    x = tensor["x"].requires_grad_()
    y = module(x)
    y.backward(tensor["dy"])
    found = {"y": y, "dx": x.grad, **{f"d:{key}": p.grad for key, p in module.named_parameters()}}
    assert {key for key in tensor if key.startswith("d:")} == {key for key in found if key.startswith("d:")}
    for key, value in found.items():
        error = ((value - tensor[key]).abs().max() / tensor[key].abs().max()).item()
        assert error <= tolerance, f"{key}: {error:.1e}"


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dilation", [(1, 2, 3), (1, 2, 1)], ids=str)
def test_multi_order_dwconv_golden(backend, dilation):
    name = "MultiOrderDWConv_2x16x9x7" if dilation == (1, 2, 3) else "MultiOrderDWConv_split134_dil121_2x16x9x7"
    with use_backend(backend):
        check_golden(name, nn.MultiOrderDWConv(16, dw_dilation=list(dilation)), 1e-12)


def test_multi_order_dwconv_keys():
    keys = list(nn.MultiOrderDWConv(16).state_dict())
    assert keys == [f"{c}.{p}" for c in ("DW_conv0", "DW_conv1", "DW_conv2", "PW_conv") for p in ("weight", "bias")]


def test_multi_order_dwconv_unfused():
    """fused=False runs no op of ours; it is what exports to ONNX, and while exporting it is chosen by itself."""
    module, x = nn.MultiOrderDWConv(16, fused=False), torch.randn(1, 16, 9, 7)
    graph = torch.export.export(module, (x,)).graph
    assert not any("vision_ops" in str(node.target) for node in graph.nodes)
    module.fused = True
    assert any("vision_ops" in str(node.target) for node in torch.export.export(module, (x,)).graph.nodes)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_multi_order_dwconv_exports_to_onnx():
    pytest.importorskip("onnx")
    buffer = io.BytesIO()
    torch.onnx.export(nn.MultiOrderDWConv(16), (torch.randn(1, 16, 9, 7),), buffer, dynamo=False)
    assert b"vision_ops" not in buffer.getvalue() and b"Conv" in buffer.getvalue()


def test_multi_order_dwconv_refuses():
    with pytest.raises(ValueError, match=r"split \(1, 3, 4\) adds up to 8, which must divide the 12 channels"):
        nn.MultiOrderDWConv(12)
    with pytest.raises(ValueError, match=r"dilations\[1\] must be from 1 to 3"):
        nn.MultiOrderDWConv(16, dw_dilation=[1, 5, 3])
