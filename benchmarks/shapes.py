"""Where the published networks use each op: pure data, nothing is imported to read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

Shape = TypeVar("Shape")

STAGES_224 = (56, 28, 14, 7)
STAGES_256 = (64, 32, 16, 8)

MOGANET_WIDTHS = {
    "XT": (32, 64, 96, 192),
    "T": (32, 64, 128, 256),
    "S": (64, 128, 320, 512),
    "B": (64, 160, 320, 512),
    "L": (64, 160, 320, 640),
    "XL": (96, 192, 480, 960),
}
MOGANET_FFN_RATIOS = (8, 8, 4, 4)

HORNET_WIDTHS = {"T": (64, 128, 256, 512), "S": (96, 192, 384, 768)}
HORNET_ORDERS = (2, 3, 4, 5)

EDGENEXT_WIDTHS = {
    "XXS": (24, 48, 88, 168),
    "XS": (32, 64, 100, 192),
    "S": (48, 96, 160, 304),
    "B": (80, 160, 288, 584),
}
EDGENEXT_KERNELS = (3, 5, 7, 9)
EDGENEXT_SCALES = (None, 2, 3, 4)  # into how many groups SDTA splits the channels; stage 1 has no SDTA

CONVNEXT_WIDTHS = {"T": (96, 192, 384, 768)}

MOAT_WIDTHS = {"tiny0": (32, 64, 128, 256), "0": (96, 192, 384, 768)}
MOAT_EXPANSION = 4
MOAT_STEMS = {"tiny0": 32, "0": 64}

S2MLPV2_WIDTHS = {"S": (192, 384), "M": (256, 512)}
S2MLPV2_STAGES_224 = (32, 16)
S2MLPV2_REDUCTION = 4  # of the hidden width in split attention


def stages(
    widths: Mapping[str, tuple[int, ...]], model: str, sizes: tuple[int, ...]
) -> Iterator[tuple[str, int, int, int]]:
    """(label, index of the stage, its width, its height and width) of every stage of every variant."""
    for variant, channels in widths.items():
        for stage, (width, size) in enumerate(zip(channels, sizes, strict=True)):
            yield f"{model}-{variant}.{stage + 1}", stage, width, size


def distinct(cases: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    """The first label of every shape: two stages with one shape are one measurement."""
    labels: dict[Shape, str] = {}
    for label, shape in cases:
        labels.setdefault(shape, label)
    return {label: shape for shape, label in labels.items()}


@dataclass(frozen=True)
class MultiOrderShape:
    channels: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size}"


def multi_order_cases() -> dict[str, MultiOrderShape]:
    return distinct(
        (label, MultiOrderShape(width, size)) for label, _, width, size in stages(MOGANET_WIDTHS, "MogaNet", STAGES_224)
    )


@dataclass(frozen=True)
class DWConvShape:
    channels: int
    size: int
    kernel: int
    dilation: int = 1
    stride: int = 1
    padding: tuple[int, int, int, int] | None = None
    bias: bool = True
    activation: str | None = None

    def __str__(self) -> str:
        text = f"{self.channels}x{self.size}x{self.size} k{self.kernel}"
        if self.dilation > 1:
            text += f" d{self.dilation}"
        if self.stride > 1:
            text += f" s{self.stride}"
        return f"{text} {self.activation}" if self.activation else text


def hornet_width(width: int, order: int) -> int:
    """Channels of the gate's convolution: one group per order, each half as wide as the next."""
    return sum(width >> k for k in range(order))


def split_width(width: int, scales: int) -> int:
    return -(-width // scales)


def moganet_dwconvs() -> Iterator[tuple[str, DWConvShape]]:
    attention = {variant: MOGANET_WIDTHS[variant] for variant in ("T", "S")}
    for label, _, width, size in stages(attention, "MogaNet", STAGES_224):
        yield f"{label} dw5", DWConvShape(width, size, 5)
        yield f"{label} dw5d2", DWConvShape(width * 3 // 8, size, 5, dilation=2)
        yield f"{label} dw7d3", DWConvShape(width // 2, size, 7, dilation=3)
    for label, stage, width, size in stages(MOGANET_WIDTHS, "MogaNet", STAGES_224):
        yield f"{label} ffn", DWConvShape(width * MOGANET_FFN_RATIOS[stage], size, 3)
    for label, stage, width, size in stages(attention, "MogaNet", STAGES_224):
        yield f"{label} ffn gelu", DWConvShape(width * MOGANET_FFN_RATIOS[stage], size, 3, activation="gelu")


def hornet_dwconvs() -> Iterator[tuple[str, DWConvShape]]:
    for label, stage, width, size in stages(HORNET_WIDTHS, "HorNet", STAGES_224):
        yield label, DWConvShape(hornet_width(width, HORNET_ORDERS[stage]), size, 7)


def edgenext_dwconvs() -> Iterator[tuple[str, DWConvShape]]:
    for label, stage, width, size in stages(EDGENEXT_WIDTHS, "EdgeNeXt", STAGES_256):
        yield label, DWConvShape(width, size, EDGENEXT_KERNELS[stage])
        scales = EDGENEXT_SCALES[stage]
        if scales is not None:
            yield f"{label} split", DWConvShape(split_width(width, scales), size, 3)


def convnext_dwconvs() -> Iterator[tuple[str, DWConvShape]]:
    for label, _, width, size in stages(CONVNEXT_WIDTHS, "ConvNeXt", STAGES_224):
        yield label, DWConvShape(width, size, 7)


def moat_dwconvs() -> Iterator[tuple[str, DWConvShape]]:
    for label, _, width, size in stages(MOAT_WIDTHS, "MOAT", STAGES_224):
        hidden = width * MOAT_EXPANSION
        # TensorFlow's SAME pads an even size at stride 2 only after its end.
        yield f"{label} entry", DWConvShape(hidden, 2 * size, 3, stride=2, padding=(0, 1, 0, 1), bias=False)
        yield label, DWConvShape(hidden, size, 3, bias=False)


def dwconv_cases() -> dict[str, DWConvShape]:
    networks = (moganet_dwconvs, hornet_dwconvs, edgenext_dwconvs, convnext_dwconvs, moat_dwconvs)
    return distinct(case for network in networks for case in network())


@dataclass(frozen=True)
class LayerNormShape:
    channels: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size}"


def layer_norm_cases() -> dict[str, LayerNormShape]:
    """HorNet's stem, blocks and downsampling; EdgeNeXt's stem and downsampling, which the last stage has none after."""
    hornet = stages(HORNET_WIDTHS, "HorNet", STAGES_224)
    edgenext = (case for case in stages(EDGENEXT_WIDTHS, "EdgeNeXt", STAGES_256) if case[1] < 3)
    return distinct(
        (label, LayerNormShape(width, size)) for cases in (hornet, edgenext) for label, _, width, size in cases
    )


@dataclass(frozen=True)
class ChannelAggregationShape:
    channels: int
    hidden: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}->{self.hidden} {self.size}x{self.size}"


def channel_aggregation_cases() -> dict[str, ChannelAggregationShape]:
    return distinct(
        (label, ChannelAggregationShape(width, width * MOGANET_FFN_RATIOS[stage], size))
        for label, stage, width, size in stages(MOGANET_WIDTHS, "MogaNet", STAGES_224)
    )


@dataclass(frozen=True)
class GnConvShape:
    channels: int
    order: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} order {self.order}"

    @property
    def widths(self) -> list[int]:
        return [self.channels >> k for k in reversed(range(self.order))]


def gnconv_cases() -> dict[str, GnConvShape]:
    """Of fused_gnconv and of fused_gated_recursion, which is its inside."""
    return {
        label: GnConvShape(width, HORNET_ORDERS[stage], size)
        for label, stage, width, size in stages(HORNET_WIDTHS, "HorNet", STAGES_224)
    }


@dataclass(frozen=True)
class GlobalFilterShape:
    channels: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size}"


def global_filter_cases() -> dict[str, GlobalFilterShape]:
    """Half of the channels of the gates, in the last two stages of HorNet's *_gf variants."""
    return {
        label: GlobalFilterShape(hornet_width(width, HORNET_ORDERS[stage]) // 2, size)
        for label, stage, width, size in stages(HORNET_WIDTHS, "HorNet", STAGES_224)
        if stage >= 2
    }


@dataclass(frozen=True)
class DWConvLayerNormShape:
    channels: int
    size: int
    kernel: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} k{self.kernel}"


def dwconv_layer_norm_cases() -> dict[str, DWConvLayerNormShape]:
    edgenext = (
        (label, DWConvLayerNormShape(width, size, EDGENEXT_KERNELS[stage]))
        for label, stage, width, size in stages(EDGENEXT_WIDTHS, "EdgeNeXt", STAGES_256)
    )
    convnext = (
        (label, DWConvLayerNormShape(width, size, 7))
        for label, _, width, size in stages(CONVNEXT_WIDTHS, "ConvNeXt", STAGES_224)
    )
    return distinct(case for cases in (edgenext, convnext) for case in cases)


@dataclass(frozen=True)
class SplitCascadeShape:
    channels: int
    size: int
    scales: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} s{self.scales}"


def split_cascade_cases() -> dict[str, SplitCascadeShape]:
    return distinct(
        (label, SplitCascadeShape(width, size, scales))
        for label, stage, width, size in stages(EDGENEXT_WIDTHS, "EdgeNeXt", STAGES_256)
        if (scales := EDGENEXT_SCALES[stage]) is not None
    )


@dataclass(frozen=True)
class XcaShape:
    tokens: int
    channels: int
    heads: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.channels} h{self.heads}"


def xca_cases() -> dict[str, XcaShape]:
    """EdgeNeXt-S: its stages 2 to 4 end in attention between channels."""
    small = {"S": EDGENEXT_WIDTHS["S"]}
    return {
        label: XcaShape(size * size, width, 8)
        for label, stage, width, size in stages(small, "EdgeNeXt", STAGES_256)
        if EDGENEXT_SCALES[stage] is not None
    }


@dataclass(frozen=True)
class S2Shape:
    channels: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size}"


def s2_cases() -> dict[str, S2Shape]:
    named = stages(S2MLPV2_WIDTHS, "S2-MLPv2", S2MLPV2_STAGES_224)
    return distinct((label, S2Shape(width, size)) for label, _, width, size in named)


@dataclass(frozen=True)
class RelativeAttentionShape:
    channels: int
    heads: int
    size: int
    table: int  # its height and width

    def __str__(self) -> str:
        return f"{self.size}x{self.size}x{self.channels} h{self.heads}"


def relative_attention_cases() -> dict[str, RelativeAttentionShape]:
    """Of fused_relative_attention and of the half-block around it: MOAT attends in its stages 3 and 4."""
    return {
        label: RelativeAttentionShape(width, width // 32, size, 27 if stage == 2 else 13)
        for label, stage, width, size in stages(MOAT_WIDTHS, "MOAT", STAGES_224)
        if stage >= 2
    }


@dataclass(frozen=True)
class MlpShape:
    channels: int
    hidden: int
    size: int
    norm: bool  # in front; else the op before has it
    gamma: bool

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} hidden {self.hidden}"


@dataclass(frozen=True)
class BatchNormShape:
    channels: int
    size: int
    activation: str | None

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} {self.activation or 'norm alone'}"


def batch_norm_cases() -> dict[str, BatchNormShape]:
    """MogaNet's before both halves of a block; MOAT's with GELU in hidden channels, which `mbconv` contains."""
    moganet = (
        (label, BatchNormShape(width, size, None))
        for label, _, width, size in stages({"T": MOGANET_WIDTHS["T"]}, "MogaNet", STAGES_224)
    )
    moat = (
        (label, BatchNormShape(MOAT_EXPANSION * width, size, "gelu"))
        for label, _, width, size in stages(MOAT_WIDTHS, "MOAT", STAGES_224)
    )
    return distinct((*moganet, *moat))


@dataclass(frozen=True)
class MBConvShape:
    before: int  # channels of x
    channels: int
    size: int  # of x
    stride: int
    se: bool

    def __str__(self) -> str:
        strided = " stride 2" if self.stride == 2 else ""
        return f"{self.before}->{self.channels} {self.size}x{self.size}{strided}{' se' if self.se else ''}"


def mbconv_cases() -> dict[str, MBConvShape]:
    """The blocks of MOAT's stages, and those that enter them; the stem is as wide as tiny MOAT's first stage."""
    found = []
    for variant, widths in MOAT_WIDTHS.items():
        before = (MOAT_STEMS[variant], *widths)
        for label, stage, width, size in stages({variant: widths}, "MOAT", STAGES_224):
            found.append((label, MBConvShape(width, width, size, 1, stage < 2)))
            found.append((f"{label} entry", MBConvShape(before[stage], width, 2 * size, 2, stage < 2)))
    return distinct(found)


def mlp_cases() -> dict[str, MlpShape]:
    """Of HorNet's and S2-MLPv2's blocks with their norm; of EdgeNeXt's and ConvNeXt's behind convolution and norm."""
    networks = (
        (HORNET_WIDTHS, "HorNet", STAGES_224, 4, True, True),
        (EDGENEXT_WIDTHS, "EdgeNeXt", STAGES_256, 4, False, True),
        (CONVNEXT_WIDTHS, "ConvNeXt", STAGES_224, 4, False, True),
        (S2MLPV2_WIDTHS, "S2-MLPv2", S2MLPV2_STAGES_224, 3, True, False),
    )
    return distinct(
        (label, MlpShape(width, ratio * width, size, norm, gamma))
        for widths, model, sizes, ratio, norm, gamma in networks
        for label, _, width, size in stages(widths, model, sizes)
    )
