"""Fused depthwise, gating and attention kernels for vision backbones, with gradients, on CPUs and NVIDIA GPUs."""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ._version import __version__ as __version__


def _is_main() -> bool:
    """Whether this is `python -m vision_ops`, which reports what was built even where torch is missing."""
    arguments = sys.orig_argv
    return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == ["vision_ops"]


if find_spec("torch") is not None:
    from . import models as models
    from . import nn as nn
    from . import ops as ops
    from . import reference as reference
    from ._accelerate import accelerate as accelerate
    from ._accelerate import restore as restore
    from ._explain import explain as explain
    from .dispatch import use_backend as use_backend
    from .ops import *  # noqa: F403

    if not TYPE_CHECKING:  # which see the imports
        names = ["accelerate", "explain", "models", "nn", "reference", "restore", "use_backend"]
        __all__ = ["__version__", *names, *ops.__all__]
elif not _is_main():
    raise ImportError("vision_ops needs PyTorch 2.11 or later: pip install 'torch>=2.11'")
