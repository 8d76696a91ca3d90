"""HorNet (arXiv 2207.14284), after hornet.py of raoyongming/HorNet."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..nn._blocks import Blocks
from ..nn.hornet import GlobalLocalFilter, GnConv, HorBlock
from ..nn.layer_norm import LayerNorm2d
from ._backbone import Backbone, Variant, check_stages, drop_path_rates


class HorNet(Backbone):
    """HorNet: four stages of `nn.HorBlock` at strides 4, 8, 16, 32.

    Args:
        depths: blocks of each stage.
        base_dim: channels of the first stage; they double with each.
        orders: of the gated convolutions of each stage.
        filters: (h, w) of the global filters of each stage, None for 7x7 convolutions. Of images of another size than
            32 times h they are interpolated.
        scale: s of the gated convolutions. The official default is 1, all published networks have 1 / 3.
        in_chans, num_classes, features_only, out_indices: see `create_model`.
        drop_path_rate: stochastic depth of the last block; it grows linearly.
        layer_scale_init_value: of gamma1 and gamma2.
        head_init_scale: a factor on the classifier's first weights.
        fused: False runs plain PyTorch.

    Images of at least 32 x 32; rows and columns beyond a multiple of the strides are dropped. Features are the maps of
    the stages; the official detection code adds a norm to each, which classification weights do not have.
    """

    classifier, first_conv, head_modules = "head", "downsample_layers.0.0", ("norm", "head")

    def __init__(
        self,
        depths: Sequence[int] = (2, 3, 18, 2),
        base_dim: int = 64,
        *,
        orders: Sequence[int] = (2, 3, 4, 5),
        filters: Sequence[tuple[int, int] | None] = (None, None, None, None),
        scale: float = 1 / 3,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.head_init_scale = head_init_scale
        check_stages(len(depths), orders=orders, filters=filters)
        dims = [base_dim * 2**i for i in range(len(depths))]
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            if i == 0:
                embed = nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), LayerNorm2d(dim, fused=fused))
            else:
                before = dims[i - 1]
                embed = nn.Sequential(LayerNorm2d(before, fused=fused), nn.Conv2d(before, dim, 2, stride=2))
            gnconv = partial(GnConv, order=orders[i], s=scale, fused=fused)
            size = filters[i]
            if size is not None:
                gnconv = partial(gnconv, gflayer=partial(GlobalLocalFilter, fused=fused), h=size[0], w=size[1])
            self.downsample_layers.append(embed)
            self.stages.append(
                Blocks(*(HorBlock(dim, rate, layer_scale_init_value, gnconv, fused=fused) for rate in rates))
            )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
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
        return {"stem": r"^downsample_layers\.0", "blocks": stages if coarse else blocks}

    def stage_modules(self, i: int) -> tuple[str, ...]:
        return f"downsample_layers.{i}", f"stages.{i}"

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        return self.stages[i](self.downsample_layers[i](x))

    def pool(self, x: Tensor) -> Tensor:
        return self.norm(x.mean(dim=(2, 3)))


_IDS = {
    "tiny_7x7": "bac9690c72944d19aca1",
    "tiny_gf": "460e759c82324ea6bfa3",
    "small_7x7": "8ef64277da0e469ea857",
    "small_gf": "959603ca287d4c09ad49",
    "base_7x7": "13a748487711492e9704",
    "base_gf": "c212d1d8a3914b47a5c1",
    "large_7x7": "c2fc23caae084a3aa73d",
    "large_gf": "8600206ebdfa485f98d0",
    "large_gf_img384": "eec48d5eca5a48d98fd2",
}
_FILTERS = {
    "7x7": (None, None, None, None),
    "gf": (None, None, (14, 8), (7, 4)),
    "gf_img384": (None, None, (24, 13), (12, 7)),
}


def _variant(size: str, base_dim: int, kind: str, drop_path: float) -> Variant:
    file = _IDS.get(f"{size}_{kind}")
    url = None if file is None else f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1"
    side = 384 if kind == "gf_img384" else 224
    arguments = {"base_dim": base_dim, "filters": _FILTERS[kind]}
    classes = None if size == "large" else 1000
    crop_pct = 1.0 if side == 384 else 0.875
    return Variant(HorNet, arguments, url, drop_path, (3, side, side), crop_pct, num_classes=classes)


# The weights of hornet_large_* are those of ImageNet-22k: load_checkpoint(..., classifier="resize") takes its classes.
VARIANTS = {
    **{f"hornet_tiny_{kind}": _variant("tiny", 64, kind, 0.2) for kind in ("7x7", "gf")},
    **{f"hornet_small_{kind}": _variant("small", 96, kind, 0.4) for kind in ("7x7", "gf")},
    **{f"hornet_base_{kind}": _variant("base", 128, kind, 0.5) for kind in ("7x7", "gf", "gf_img384")},
    **{f"hornet_large_{kind}": _variant("large", 192, kind, 0.2) for kind in ("7x7", "gf")},
    "hornet_large_gf_img384": _variant("large", 192, "gf_img384", 0.4),
}
