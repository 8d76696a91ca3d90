"""timm's networks, where it has them."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from benchmarks.networks import Network

_libraries: list[torch.library.Library] = []  # one that is gone takes its operators with it
VARIANTS = ("edgenext_xx_small", "edgenext_x_small", "edgenext_small", "edgenext_base")


def import_timm() -> ModuleType:
    """timm, or an ImportError. It imports torchvision, which beside a torch for CPUs lacks its operators, of which it
    registers more."""
    for name in ("timm", "torchvision"):
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _declare_operators()
    import timm

    return timm


def _declare_operators() -> None:
    """By their names, so that torchvision can be imported; whoever calls one gets an error."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    source = Path(find_spec("torchvision").origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for name in set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', source)):
        library.define(f"{name}() -> ()")


def timm_peer(network: Network) -> nn.Module:
    torch.manual_seed(0)
    return import_timm().create_model(network.variant, drop_path_rate=0.0)
