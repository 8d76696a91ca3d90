"""EdgeNeXt (arXiv 2206.10589), after models/edgenext.py and edgenext_bn_hs.py of mmaaz60/EdgeNeXt."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..nn._blocks import Blocks
from ..nn.edgenext import ConvEncoder, ConvEncoderBNHS, PositionalEncodingFourier, SDTAEncoder, SDTAEncoderBNHS
from ..nn.layer_norm import LayerNorm2d
from ._backbone import Backbone, Variant, check_stages, drop_path_rates


class EdgeNeXt(Backbone):
    """EdgeNeXt: four stages of `nn.ConvEncoder` at strides 4, 8, 16, 32, which end with `nn.SDTAEncoder`.

    Args:
        depths, dims: blocks and channels of each stage.
        global_block: how many of each stage's last blocks are SDTA.
        expan_ratio: expansion of every block.
        kernel_sizes: of the convolutional blocks of each stage.
        heads: of the attention of each stage.
        use_pos_embd_xca: whether the SDTA of each stage add the Fourier encoding of the position.
        use_pos_embd_global: whether it is added after the first stage.
        d2_scales: splits of the SDTA of each stage.
        bn_hs: batch norm and Hardswish throughout, convolutions without bias, the last norm before the pooling.
        in_chans, num_classes, features_only, out_indices: see `create_model`.
        drop_path_rate: stochastic depth of the last block; it grows linearly.
        layer_scale_init_value: of every gamma. (The official class does not pass it to its SDTA blocks.)
        head_init_scale: a factor on the classifier's first weights.
        classifier_dropout: before the classifier.
        fused: False runs plain PyTorch.

    Images of at least 32 x 32; rows and columns beyond a multiple of the strides are dropped.
    """

    classifier, first_conv, head_modules = "head", "downsample_layers.0.0", ("norm", "head")

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (48, 96, 160, 304),
        *,
        global_block: Sequence[int] = (0, 1, 1, 1),
        expan_ratio: int = 4,
        kernel_sizes: Sequence[int] = (3, 5, 7, 9),
        heads: Sequence[int] = (8, 8, 8, 8),
        use_pos_embd_xca: Sequence[bool] = (False, True, False, False),
        use_pos_embd_global: bool = False,
        d2_scales: Sequence[int] = (2, 2, 3, 4),
        bn_hs: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        classifier_dropout: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.bn_hs, self.head_init_scale = bn_hs, head_init_scale
        check_stages(len(depths), dims=dims, global_block=global_block, kernel_sizes=kernel_sizes, heads=heads)
        check_stages(len(depths), use_pos_embd_xca=use_pos_embd_xca, d2_scales=d2_scales)
        if any(not 0 <= last <= depth for last, depth in zip(global_block, depths, strict=True)):
            raise ValueError(f"global_block must be from 0 to the depths {tuple(depths)}, got {tuple(global_block)}")
        conv_encoder, sdta_encoder = (ConvEncoderBNHS, SDTAEncoderBNHS) if bn_hs else (ConvEncoder, SDTAEncoder)

        def norm(dim: int) -> nn.Module:
            return nn.BatchNorm2d(dim) if bn_hs else LayerNorm2d(dim, fused=fused)

        self.pos_embd = PositionalEncodingFourier(dim=dims[0]) if use_pos_embd_global else None
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            if i == 0:
                embed = nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4, bias=not bn_hs), norm(dim))
            else:
                conv = nn.Conv2d(dims[i - 1], dim, 2, stride=2, bias=not bn_hs)
                embed = nn.Sequential(norm(dims[i - 1]), conv)
            convolutional = len(rates) - global_block[i]
            blocks: list[nn.Module] = [
                conv_encoder(dim, rate, layer_scale_init_value, expan_ratio, kernel_sizes[i], fused=fused)
                for rate in rates[:convolutional]
            ]
            for rate in rates[convolutional:]:
                options: dict[str, Any] = {
                    "use_pos_emb": use_pos_embd_xca[i],
                    "num_heads": heads[i],
                    "scales": d2_scales[i],
                }
                blocks.append(sdta_encoder(dim, rate, layer_scale_init_value, expan_ratio, **options, fused=fused))
            self.downsample_layers.append(embed)
            self.stages.append(Blocks(*blocks))
        self.norm = nn.BatchNorm2d(dims[-1]) if bn_hs else nn.LayerNorm(dims[-1], eps=1e-6)
        self.head_dropout = nn.Dropout(classifier_dropout)
        stages = [(dim, 4 * 2**i) for i, dim in enumerate(dims)]
        self.finish(stages, num_classes, features_only, out_indices)

    def init_module(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stages = r"^(?:downsample_layers|stages)\.(\d+)"
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None)]
        return {"stem": r"^downsample_layers\.0|^pos_embd", "blocks": stages if coarse else blocks}

    def stage_modules(self, i: int) -> tuple[str, ...]:
        return f"downsample_layers.{i}", f"stages.{i}"

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        x = self.stages[i](self.downsample_layers[i](x))
        if i == 0 and self.pos_embd is not None:
            height, width = x.shape[2:]
            x = x + self.pos_embd(1, height, width, x.device)
        return x

    def norm_last_map(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.bn_hs else x

    def pool(self, x: Tensor) -> Tensor:
        pooled = self.norm_last_map(x).mean(dim=(2, 3))
        return self.head_dropout(pooled if self.bn_hs else self.norm(pooled))


_RELEASES = "https://github.com/mmaaz60/EdgeNeXt/releases/download"
_DEPTHS = {"xx_small": (2, 2, 6, 2), "x_small": (3, 3, 9, 3), "small": (3, 3, 9, 3), "base": (3, 3, 9, 3)}
_DIMS = {
    "xx_small": (24, 48, 88, 168),
    "x_small": (32, 64, 100, 192),
    "small": (48, 96, 160, 304),
    "base": (80, 160, 288, 584),
}


def _variant(size: str, release: str, drop_path: float, bn_hs: bool = False) -> Variant:
    heads = (4, 4, 4, 4) if size in ("xx_small", "x_small") else (8, 8, 8, 8)
    arguments = {"depths": _DEPTHS[size], "dims": _DIMS[size], "heads": heads, "bn_hs": bn_hs}
    url = f"{_RELEASES}/{release}/edgenext_{size}{'_bn_hs' if bn_hs else ''}.pth"
    return Variant(EdgeNeXt, arguments, url, drop_path, (3, 256, 256))


VARIANTS = {
    "edgenext_xx_small": _variant("xx_small", "v1.0", 0.0),
    "edgenext_x_small": _variant("x_small", "v1.0", 0.0),
    "edgenext_small": _variant("small", "v1.0", 0.1),
    "edgenext_base": _variant("base", "v1.2", 0.1),
    "edgenext_xx_small_bn_hs": _variant("xx_small", "v1.0", 0.0, bn_hs=True),
    "edgenext_x_small_bn_hs": _variant("x_small", "v1.0", 0.0, bn_hs=True),
    "edgenext_small_bn_hs": _variant("small", "v1.0", 0.0, bn_hs=True),
}
