"""S2-MLPv2 (arXiv 2108.01072); its authors published no code: after s2_mlp_v2.py of liuruiyang98/Jittor-MLP."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.s2mlpv2 import S2Block
from ._backbone import Backbone, Variant, check_stages, drop_path_rates


def check_multiples(size: Sequence[int], factor: int) -> None:
    if any(n % factor for n in size):
        raise ValueError(f"height and width of x must be multiples of {factor}, got {tuple(size)}")


torch.fx.wrap("check_multiples")


class _MeanPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class S2MLPv2(Backbone):
    """S2-MLPv2: stages of `nn.S2Block`, each behind a convolution as wide as its stride.

    Args:
        patch_size, d_model, depth, expansion_factor: stride, channels, layers and expansion of each stage.
        reduction: of the hidden width in split attention. 4 gives the paper's 25M and 55M parameters, 1 (the article's
            code) 31.7M and 70.0M; both compute as much.
        in_chans, num_classes, features_only, out_indices: see `create_model`.
        drop_path_rate: stochastic depth of the last layer; it grows linearly. The article's code has none.
        fused: False runs plain PyTorch.

    Height and width must be multiples of the product of patch_size.
    """

    classifier, first_conv, head_modules = "mlp_head.1", "stages.0.0", ("mlp_head.1",)

    def __init__(
        self,
        patch_size: Sequence[int] = (7, 2),
        d_model: Sequence[int] = (192, 384),
        depth: Sequence[int] = (4, 14),
        expansion_factor: Sequence[int] = (3, 3),
        *,
        reduction: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_stages(len(patch_size), d_model=d_model, depth=depth, expansion_factor=expansion_factor)
        rates = drop_path_rates(drop_path_rate, depth)
        self.stages, stages, self.reduction = nn.ModuleList(), [], 1
        for i, (patch, width) in enumerate(zip(patch_size, d_model, strict=True)):
            block = S2Block(width, depth[i], expansion_factor[i], reduction=reduction, drop_path=rates[i], fused=fused)
            before = d_model[i - 1] if i else in_chans
            self.stages.append(nn.Sequential(nn.Conv2d(before, width, patch, stride=patch), block))
            self.reduction *= patch
            stages.append((width, self.reduction))
        self.mlp_head = nn.Sequential(_MeanPool(), nn.Identity())
        self.finish(stages, num_classes, features_only, out_indices)

    def init_module(self, module: nn.Module) -> None:
        """PyTorch's own initialisation stands."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.0", (0,)), (r"^stages\.(\d+)\.1\.model\.(\d+)", None)]
        return {"stem": r"^stages\.0\.0", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def stage_modules(self, i: int) -> tuple[str, ...]:
        return (f"stages.{i}",)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        if i == 0:
            check_multiples(x.shape[2:], self.reduction)
        return self.stages[i](x)

    def pool(self, x: Tensor) -> Tensor:
        return self.mlp_head[0](x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x, pre_logits) if pre_logits or not self.global_pool else self.mlp_head(x)


def _variant(d_model: tuple[int, int], depth: tuple[int, int]) -> Variant:
    return Variant(S2MLPv2, {"d_model": d_model, "depth": depth}, reduction=14)


VARIANTS = {
    "s2mlpv2_small_7": _variant((192, 384), (4, 14)),
    "s2mlpv2_medium_7": _variant((256, 512), (7, 17)),
}
