"""MOAT (arXiv 2210.01820), in the semantics of model/pixel_encoder/moat.py of google-research/deeplab2 (TensorFlow)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..nn._blocks import Blocks, normalize
from ..nn._layers import Layers
from ..nn._layers import batch_norm as batch_norm_layer
from ..nn.moat import MBConv, MOATBlock, batch_norm, pad_same
from ._backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Variant, check_stages


class MOAT(Backbone):
    """MOAT: two stages of `nn.MBConv` and two of `nn.MOATBlock`, at strides 4, 8, 16, 32.

    Args:
        stem: channels of the stem.
        dims, depths: channels and blocks of each stage.
        position_embedding: False for the weights "wo_position_embedding".
        window_size: per stage None for global attention, or (height, width) of its windows; of the last two only.
        pool_size: of the shortcuts' average pools: 2, or 3, which the official code prefers for dense tasks.
        in_chans, num_classes, features_only, out_indices: see `create_model`.
        drop_path_rate: stochastic depth; that of block i of n is drop_path_rate * i / n.
        fused: False runs plain PyTorch.

    Images of any size, with TensorFlow's "SAME" padding throughout. The tables of biases do not depend on it: they are
    27 x 27 at stride 16 and 13 x 13 at stride 32, and resized in every forward pass. (The official code computes them
    once, so that they neither follow a loaded checkpoint nor get a gradient.)
    """

    classifier, first_conv, head_modules = "logits_head", "conv_0", ("final_layer_norm", "logits_head")

    def __init__(
        self,
        stem: int = 64,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 7, 2),
        *,
        position_embedding: bool = True,
        window_size: Sequence[Sequence[int] | None] = (None, None, None, None),
        pool_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if len(window_size) != 4 or window_size[0] is not None or window_size[1] is not None:
            raise ValueError(
                f"window_size must be (None, None, w3, w4), as stages 1 and 2 do not attend, got {window_size}"
            )
        check_stages(4, dims=dims, depths=depths)
        self.conv_0, self.norm_0 = nn.Conv2d(in_chans, stem, 3, stride=2), batch_norm(stem)
        self.conv_1 = nn.Conv2d(stem, stem, 3, padding=1)
        self.fused, self._norm_0 = fused, Layers("batch_norm_act", {"norm_0": batch_norm_layer(stem)})
        self.blocks = nn.ModuleList()
        before, index = stem, 0
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            stage = Blocks()
            for j in range(depth):
                rate = drop_path_rate * index / sum(depths)
                options: dict[str, Any] = {
                    "stride": 1 if j else 2,
                    "pool_size": pool_size,
                    "drop_path": rate,
                    "fused": fused,
                }
                if i < 2:
                    stage.append(MBConv(before, dim, **options))
                else:
                    side = 27 if i == 2 else 13
                    table_size = (side, side) if position_embedding else None
                    stage.append(MOATBlock(before, dim, window_size=window_size[i], table_size=table_size, **options))
                before, index = dim, index + 1
            self.blocks.append(stage)
        self.final_layer_norm = nn.LayerNorm(dims[-1], eps=1e-5)
        stages = [(dim, 4 * 2**i) for i, dim in enumerate(dims)]
        self.finish(stages, num_classes, features_only, out_indices)

    def init_module(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def new_classifier(self, num_classes: int) -> nn.Module:
        return nn.Conv2d(self.num_features, num_classes, 1)

    def stage_modules(self, i: int) -> tuple[str, ...]:
        return (f"blocks.{i}",)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        if i == 0:
            x = self.conv_1(normalize(self, self._norm_0, self.conv_0(pad_same(x)), "gelu", name="norm_0"))
        return self.blocks[i](x)

    def pool(self, x: Tensor) -> Tensor:
        return self.final_layer_norm(x.mean(dim=(2, 3)))

    def classify(self, x: Tensor) -> Tensor:
        weight = getattr(self.logits_head, "weight", None)
        if isinstance(self.logits_head, nn.Conv2d) or (isinstance(weight, Tensor) and weight.ndim == 4):
            return self.logits_head(x[:, :, None, None]).flatten(1)  # the official one, or what wraps it
        return self.logits_head(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^(?:conv|norm)_[01]", "blocks": r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"}


_HALF = (0.5, 0.5, 0.5)


def _variant(name: str, stem: int, dim: int, depths: tuple[int, ...], survival: float, data: str) -> Variant:
    pixels = int(data.rpartition("_")[2])
    url = (
        "https://storage.googleapis.com/gresearch/tf-deeplab/checkpoint/"
        f"{name.replace('moat_', 'moat')}_imagenet_{data}_w_position_embedding.tar.gz"
    )
    dims = tuple(dim * 2**i for i in range(4))
    mean, std = (_HALF, _HALF) if "22k" in data else (IMAGENET_MEAN, IMAGENET_STD)
    arguments = {"stem": stem, "dims": dims, "depths": depths}
    return Variant(MOAT, arguments, url, 1 - survival, (3, pixels, pixels), mean=mean, std=std)


VARIANTS = {
    "tiny_moat_0": _variant("tiny_moat_0", 32, 32, (2, 3, 7, 2), 1.0, "1k_256"),
    "tiny_moat_1": _variant("tiny_moat_1", 40, 40, (2, 3, 7, 2), 1.0, "1k_256"),
    "tiny_moat_2": _variant("tiny_moat_2", 56, 56, (2, 3, 7, 2), 1.0, "1k_256"),
    "tiny_moat_3": _variant("tiny_moat_3", 80, 80, (2, 3, 7, 2), 0.9, "1k_256"),
    "moat_0": _variant("moat_0", 64, 96, (2, 3, 7, 2), 0.8, "1k_224"),
    "moat_1": _variant("moat_1", 64, 96, (2, 6, 14, 2), 0.7, "1k_224"),
    "moat_2": _variant("moat_2", 128, 128, (2, 6, 14, 2), 0.7, "22k_and_1k_384"),
    "moat_3": _variant("moat_3", 160, 160, (2, 12, 28, 2), 0.4, "22k_and_1k_512"),
    "moat_4": _variant("moat_4", 256, 256, (2, 12, 28, 2), 0.3, "22k_and_1k_512"),
}
