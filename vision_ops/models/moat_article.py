"""The MOAT of the article (pytorch-MOAT), under names of its own: see `nn.moat_article`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from ..nn._blocks import Blocks
from ..nn.moat_article import ArticleMBConv, ArticleMOATBlock, check_fits
from ..ops._checks import check_integer
from ._backbone import Backbone, Variant, check_stages, drop_path_rates

fx.wrap("check_fits")

_HEAD_DIM = 32
_STAGES = "MBConv1", "MBConv2", "MOAT1", "MOAT2"


def _two(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, Sequence) or isinstance(sides, str) or len(sides) != 2:
        raise ValueError(f"{name} must be an int or (height, width), got {value!r}")
    for side in sides:
        check_integer(name, side, 1)
    return sides[0], sides[1]


class MOATArticle(Backbone):
    """The article's MOAT: two stages of `nn.ArticleMBConv` with SE, two of `nn.ArticleMOATBlock`, at strides 4 to 32.

    Args:
        stem: channels of the stem, which has no norms.
        dims, depths: channels and blocks of each stage; channels of the last two are multiples of 32, a head's.
        img_size: of the images, an int or (height, width), multiples of 32. The tables of biases are tied to it.
        window_size: None for attention over the whole map, images are then of img_size only; or a side, or (height,
            width), of windows: images are multiples of 32 windows, as img_size must be.
        in_chans, num_classes, features_only, out_indices: see `create_model`.
        drop_path_rate: stochastic depth of the last block; it grows linearly.
        fused: False runs plain PyTorch.

    Raises:
        ValueError: an image, or img_size, that does not fit the tables or the windows.

    Keys: stem.0, stem.2, MBConv1, MBConv2, MOAT1, MOAT2, head.
    """

    classifier, first_conv, head_modules = "head", "stem.0", ("head",)

    def __init__(
        self,
        stem: int = 64,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 7, 2),
        *,
        img_size: int | Sequence[int] = 224,
        window_size: int | Sequence[int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_stages(4, dims=dims, depths=depths)
        if any(dim % _HEAD_DIM for dim in dims[2:]):
            raise ValueError(f"dims of the last two stages must be multiples of {_HEAD_DIM}, got {tuple(dims)}")
        self.img_size = _two("img_size", img_size)
        self.window_size = None if window_size is None else _two("window_size", window_size)
        height, width = self.window_size or (1, 1)
        self._unit = 32 * height, 32 * width
        what = "img_size" if window_size is None else f"img_size with window_size={self.window_size}"
        check_fits(what, self.img_size, self._unit, multiples=True)

        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(stem, stem, 3, padding=1), nn.GELU()
        )
        rates = drop_path_rates(drop_path_rate, depths)
        for i, dim in enumerate(dims):
            before = dims[i - 1] if i else stem
            whole_map = tuple(side // (4 * 2**i) for side in self.img_size)
            stage = Blocks()
            for j, rate in enumerate(rates[i]):
                options: dict[str, Any] = {"downscale": j == 0, "drop_path": rate, "fused": fused}
                channels = dim if j else before, dim
                if i < 2:
                    stage.append(ArticleMBConv(*channels, use_se=True, **options))
                else:
                    options |= {"num_heads": dim // _HEAD_DIM, "window_size": self.window_size or whole_map}
                    stage.append(ArticleMOATBlock(*channels, **options))
            self.add_module(_STAGES[i], stage)
        stages = [(dim, 4 * 2**i) for i, dim in enumerate(dims)]
        self.finish(stages, num_classes, features_only, out_indices)

    def init_module(self, module: nn.Module) -> None:
        """PyTorch's own initialisation and the modules' own stand."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        block = "" if coarse else r"\.(\d+)"
        return {"stem": r"^stem", "convolutions": rf"^MBConv(\d+){block}", "blocks": rf"^MOAT(\d+){block}"}

    def stage_modules(self, i: int) -> tuple[str, ...]:
        return (_STAGES[i],)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        if i == 0:
            windows = self.window_size is not None
            wanted = self._unit if windows else self.img_size
            check_fits("height and width of x", x.shape[2:], wanted, multiples=windows)
            x = self.stem(x)
        return self.get_submodule(_STAGES[i])(x)


def _variant(stem: int, dim: int, depths: tuple[int, ...]) -> Variant:
    return Variant(MOATArticle, {"stem": stem, "dims": tuple(dim * 2**i for i in range(4)), "depths": depths})


VARIANTS = {
    "tiny_moat_0_article": _variant(32, 32, (2, 3, 7, 2)),
    "tiny_moat_1_article": _variant(40, 40, (2, 3, 7, 2)),
    "tiny_moat_2_article": _variant(56, 56, (2, 3, 7, 2)),
    "tiny_moat_3_article": _variant(56, 80, (2, 3, 7, 2)),
    "moat_0_article": _variant(64, 96, (2, 3, 7, 2)),
    "moat_1_article": _variant(64, 96, (2, 6, 14, 2)),
    "moat_2_article": _variant(128, 128, (2, 6, 14, 2)),
    "moat_3_article": _variant(160, 160, (2, 12, 28, 2)),
    "moat_4_article": _variant(256, 256, (2, 12, 28, 2)),
}
