"""Run by torchrun, twice: that each of the two has the gradients that one process finds in the whole batch."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from train import parallel

from vision_ops.models import create_model


def gradients(model, images, labels):
    F.cross_entropy(model(images), labels).backward()
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank = dist.get_rank()
    options = {"num_classes": 5, "base_dim": 8, "depths": (1, 1, 1, 1), "layer_scale_init_value": 0.1}
    alone, ddp, fsdp = (create_model("hornet_tiny_7x7", **options).double() for _ in range(3))
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    expected = gradients(alone, images, labels)
    for network, sharded in ((ddp, False), (fsdp, True)):
        network.load_state_dict(alone.state_dict())
        found = gradients(parallel(network, fsdp=sharded), images[rank::2], labels[rank::2])
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
