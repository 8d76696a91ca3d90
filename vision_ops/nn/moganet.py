"""MogaNet (arXiv 2211.03295), after models/moganet.py of Westlake-AI/MogaNet."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops.multi_order_dwconv import check_multi_order, fused_multi_order_dwconv


class MultiOrderDWConv(nn.Module):
    """Multi-order features: `fused_multi_order_dwconv` with kernels 5, 5, 7, then a pointwise convolution.

    Args:
        embed_dims: channels C; a multiple of sum(channel_split).
        dw_dilation: dilations of the three convolutions, 1 to 3.
        channel_split: ratio of the three branches.
        fused: False runs plain PyTorch.

    Input and output are (N, C, H, W). Keys: DW_conv0, DW_conv1, DW_conv2, PW_conv.
    """

    def __init__(
        self,
        embed_dims: int,
        dw_dilation: Sequence[int] = (1, 2, 3),
        channel_split: Sequence[int] = (1, 3, 4),
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.dw_dilation, self.channel_split, self.fused = tuple(dw_dilation), tuple(channel_split), fused
        _, *widths = check_multi_order(embed_dims, self.dw_dilation, self.channel_split)
        for i, (width, kernel_size) in enumerate(zip((embed_dims, *widths), (5, 5, 7), strict=True)):
            d = self.dw_dilation[i]
            conv = nn.Conv2d(width, width, kernel_size, padding=d * (kernel_size // 2), groups=width, dilation=d)
            self.add_module(f"DW_conv{i}", conv)
        self.PW_conv = nn.Conv2d(embed_dims, embed_dims, 1)

    def forward(self, x: Tensor) -> Tensor:
        convs = self.DW_conv0, self.DW_conv1, self.DW_conv2
        y = fused_multi_order_dwconv(
            x,
            [conv.weight for conv in convs],
            [conv.bias for conv in convs],
            dilations=self.dw_dilation,
            split=self.channel_split,
            backend=None if self.fused else "reference",
        )
        return self.PW_conv(y)
