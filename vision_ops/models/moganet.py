"""MogaNet (arXiv 2211.03295), after models/moganet.py of Westlake-AI/MogaNet."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..nn._blocks import Blocks
from ..nn.moganet import MogaBlock, build_norm
from ._backbone import Backbone, Variant, check_stages, drop_path_rates


class _StemEmbed(nn.Module):
    """Two 3x3 convolutions of stride 2. Keys: projection.{0, 1, 3, 4}."""

    def __init__(self, in_channels: int, embed_dims: int, norm_type: str, fused: bool) -> None:
        super().__init__()
        half = embed_dims // 2
        self.projection = nn.Sequential(
            nn.Conv2d(in_channels, half, 3, stride=2, padding=1),
            build_norm("conv_norm_type", norm_type, half, fused),
            nn.GELU(),
            nn.Conv2d(half, embed_dims, 3, stride=2, padding=1),
            build_norm("conv_norm_type", norm_type, embed_dims, fused),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


class _PatchEmbed(nn.Module):
    """One 3x3 convolution of stride 2. Keys: projection, norm."""

    def __init__(self, in_channels: int, embed_dims: int, norm_type: str, fused: bool) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, embed_dims, 3, stride=2, padding=1)
        self.norm = build_norm("conv_norm_type", norm_type, embed_dims, fused)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.projection(x))


class MogaNet(Backbone):
    """MogaNet: four stages of `nn.MogaBlock` at strides 4, 8, 16, 32; each ends with a norm, maps of features too.

    Args:
        embed_dims, depths, ffn_ratios: channels, blocks and expansion of each stage.
        in_chans, num_classes, features_only, out_indices: see `create_model`.
        drop_rate: dropout in the feed-forward networks.
        drop_path_rate: stochastic depth of the last block; it grows linearly.
        init_value: of the layer scales.
        head_init_scale: a factor on the classifier's first weights.
        stem_norm_type: of the norms that end the stages (the official class calls them so): "BN", "SyncBN", "GN" or
            "LN2d".
        conv_norm_type: of all others.
        attn_dw_dilation, attn_channel_split, attn_act_type, attn_force_fp32, double_gate_act: as
            `nn.MultiOrderGatedAggregation`.
        attn_final_dilation: False for dilations 1, 2, 1 in the last stage.
        fused: False runs plain PyTorch.

    Images of any size.
    """

    classifier, first_conv, head_modules = "head", "patch_embed1.projection.0", ("head",)

    def __init__(
        self,
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (3, 3, 12, 2),
        ffn_ratios: Sequence[float] = (8, 8, 4, 4),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_value: float = 1e-5,
        head_init_scale: float = 1.0,
        stem_norm_type: str = "BN",
        conv_norm_type: str = "BN",
        attn_dw_dilation: Sequence[int] = (1, 2, 3),
        attn_channel_split: Sequence[int] = (1, 3, 4),
        attn_act_type: str = "SiLU",
        attn_final_dilation: bool = True,
        attn_force_fp32: bool = False,
        double_gate_act: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.head_init_scale = head_init_scale
        check_stages(len(embed_dims), depths=depths, ffn_ratios=ffn_ratios)
        rates, last = drop_path_rates(drop_path_rate, depths), len(depths) - 1
        for i, (channels, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            dilation = (1, 2, 1) if i == last and not attn_final_dilation else attn_dw_dilation
            before = embed_dims[i - 1] if i else in_chans
            embed = (_PatchEmbed if i else _StemEmbed)(before, channels, conv_norm_type, fused)
            blocks = [
                MogaBlock(
                    channels,
                    ffn_ratios[i],
                    drop_rate,
                    rates[i][j],
                    norm_type=conv_norm_type,
                    init_value=init_value,
                    attn_dw_dilation=dilation,
                    attn_channel_split=attn_channel_split,
                    attn_act_type=attn_act_type,
                    attn_force_fp32=attn_force_fp32,
                    double_gate_act=double_gate_act,
                    fused=fused,
                )
                for j in range(depth)
            ]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"blocks{i + 1}", Blocks(*blocks))
            self.add_module(f"norm{i + 1}", build_norm("stem_norm_type", stem_norm_type, channels, fused))
        stages = [(channels, 4 * 2**i) for i, channels in enumerate(embed_dims)]
        self.finish(stages, num_classes, features_only, out_indices)

    def init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^patch_embed(\d+)", (0,)),
            (r"^blocks(\d+)\.(\d+)", None),
            (r"^norm(\d+)", (99999,)),  # which timm takes for: with what is before it
        ]
        return {"stem": r"^patch_embed1", "blocks": r"^(?:patch_embed|blocks|norm)(\d+)" if coarse else blocks}

    def stage_modules(self, i: int) -> tuple[str, ...]:
        return f"patch_embed{i + 1}", f"blocks{i + 1}", f"norm{i + 1}"

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        embed, blocks, norm = (self.get_submodule(name) for name in self.stage_modules(i))
        return norm(blocks(embed(x)))


def _variant(name: str, dims: tuple[int, ...], depths: tuple[int, ...], drop_path: float, batch: int) -> Variant:
    url = (
        "https://github.com/Westlake-AI/MogaNet/releases/download/moganet-in1k-weights/"
        f"moganet_{name}_sz224_8xbs{batch}_ep300.pth.tar"
    )
    arguments = {"embed_dims": dims, "depths": depths, "ffn_ratios": (8, 8, 4, 4)}
    return Variant(MogaNet, arguments, url, drop_path, crop_pct=0.9)


VARIANTS = {
    "moganet_xtiny": _variant("xtiny", (32, 64, 96, 192), (3, 3, 10, 2), 0.05, 128),
    "moganet_tiny": _variant("tiny", (32, 64, 128, 256), (3, 3, 12, 2), 0.1, 128),
    "moganet_small": _variant("small", (64, 128, 320, 512), (2, 3, 12, 2), 0.1, 128),
    "moganet_base": _variant("base", (64, 160, 320, 512), (4, 6, 22, 3), 0.2, 128),
    "moganet_large": _variant("large", (64, 160, 320, 640), (4, 6, 44, 4), 0.3, 64),
    "moganet_xlarge": _variant("xlarge", (96, 192, 480, 960), (6, 6, 44, 4), 0.4, 64),
}
