"""What Triton compiles while a network trains: its keys, without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

import recording

from vision_ops.models import create_model

# Cut short: what a stage repeats it does not compile again.
SHORT = {
    "hornet_tiny_7x7": (1, 1, 1, 1),
    "moganet_tiny": (1, 1, 1, 1),
    "edgenext_small": (1, 2, 2, 2),
    "moat_0": (1, 1, 1, 1),
    "tiny_moat_0": (1, 1, 1, 1),
}


@pytest.mark.parametrize("name", SHORT)
def test_other_sizes_compile_nothing_new(name, monkeypatch):
    """Neither a last, partial batch nor images of another size."""
    compiled = recording.install(monkeypatch).compiled
    with torch.device("meta"):
        model = create_model(name, depths=SHORT[name]).bfloat16().to(memory_format=torch.channels_last)
    # MOAT has other kernels for more tokens, MogaNet another tile for the sums of larger images.
    for size in (224, 256) if "moat" in name or "moganet" in name else (224, 256, 288):
        for batch in (128, 37):
            before = len(compiled)
            x = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device="meta")
            y = model(x.contiguous(memory_format=torch.channels_last))
            torch.autograd.grad(y.sum(), list(model.parameters()))
            assert len(compiled) == (before or len(compiled)) > 0, (size, batch)
