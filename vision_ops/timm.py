"""Importing this registers with timm the networks that it lacks, under their own names.

`timm.create_model("moganet_tiny", ...)` then makes what `vision_ops.models.create_model` does, and timm's scripts take
the name. EdgeNeXt is timm's own there.
"""

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import generate_default_cfgs, is_model, register_model

from .models import _VARIANTS, Backbone, create_model, list_models, load_pretrained

__all__: list[str] = []  # register_model adds the names


def _entrypoint(name: str) -> Callable[..., Backbone]:
    def create(
        pretrained: bool = False,
        *,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        global_pool: str | None = None,
        out_indices: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Backbone:
        if drop_rate:
            options["drop_rate"] = drop_rate  # scripts give 0 to all; the networks without it refuse others
        if isinstance(out_indices, int):
            out_indices = range(-out_indices, 0)
        given = pretrained_cfg.to_dict() if hasattr(pretrained_cfg, "to_dict") else pretrained_cfg
        changes = {**(given if isinstance(given, dict) else {}), **(pretrained_cfg_overlay or {})}
        file = changes.get("file")  # how timm's users name weights that they have
        model = create_model(name, pretrained=pretrained and not file, out_indices=out_indices, **options)
        model.pretrained_cfg |= changes
        if pretrained and file:
            load_pretrained(model, file, options.get("num_classes"))
        if global_pool is not None:
            model.reset_classifier(model.num_classes, global_pool)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`vision_ops.models.create_model({name!r})`, for `timm.create_model`."
    return create


def _default_cfg(name: str) -> dict[str, Any]:
    cfg = _VARIANTS[name].pretrained_cfg(name)
    del cfg["drop_path_rate"]
    downloads = name in list_models(pretrained=True)
    return {**cfg, "url": cfg["url"] if downloads else None, "num_classes": cfg["num_classes"] or 1000}


_LACKING = [name for name in list_models() if not name.startswith("edgenext") and not is_model(name)]
default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in _LACKING})
globals().update({name: register_model(_entrypoint(name)) for name in _LACKING})
