"""S2-MLPv2's spatial shifts and split attention: three branches, two of them moved by a pixel, weighed by channel."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ._allocation import allocate
from ._checks import check_parameter, check_tensor
from ._devices import Kernels, device_reasons, with_crew, without_autocast
from ._registration import FusedOp


class _Arguments(NamedTuple):
    x: Tensor
    split_mlp1_weight: Tensor
    split_mlp2_weight: Tensor


def _reference(a: _Arguments) -> Tensor:
    return reference.shift_split_attention(*a)


def _output(a: _Arguments) -> tuple[Tensor, ...]:
    """y, and per image what backward reads again: the pooled vector, the hidden values, the weights of the branches."""
    (b, h, w, triple), hidden = a.x.shape, a.split_mlp1_weight.shape[0]
    c = triple // 3
    return allocate((b, h, w, c), a.x), small(a.x, c), small(a.x, hidden), small(a.x, 3, c)


def small(x: Tensor, *sizes: int) -> Tensor:
    """For what is summed over the pixels of every image: float32 for half types."""
    return allocate((x.shape[0], *sizes), x, dtype=sum_dtype(x))


def sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- The passes, for this op and for those that contain it. Maps are (B, H, W, channels) with adjacent channels, what
# is small is contiguous. On CUDA the functions of kernels/shift_split_attention.py have the same names.


class CPUPasses:
    @staticmethod
    def edge_sums(t: Tensor, sums: Tensor) -> None:
        """(B, 3, channels): sums of all pixels, of the first row less the last, of the first column less the last."""
        _native.cpu_kernels().edge_sums(_map_view(t), _small_view(sums))

    @staticmethod
    def pool(sums: Tensor, pooled: Tensor) -> None:
        """(B, C), the sum of all moved branches over the pixels, from the edge sums (B, 3, 3C) of the branches."""
        _native.cpu_kernels().pool(_small_view(sums), _small_view(pooled))

    @staticmethod
    def sum_pixels(t: Tensor, sums: Tensor) -> None:
        """(channels,), over all images."""
        each = small(t, 3, t.shape[3])
        CPUPasses.edge_sums(t, each)
        sums.copy_(each[:, 0].sum(0))

    @staticmethod
    def pool_linear(sums: Tensor, weight: Tensor, bias: Tensor | None, pixels: int, pooled: Tensor) -> None:
        """`pool` for the branches weight x + bias (3C,), from the edge sums (B, 3, C) of x with so many pixels."""
        bias = sums.new_zeros(len(weight)) if bias is None else bias.to(sums.dtype)
        weight = weight.contiguous()
        given = _small_view(sums), _native.matrix_view(weight), _native.channels_view(bias)
        _native.cpu_kernels().pool_linear(*given, pixels, _small_view(pooled))

    @staticmethod
    def branch_weights(
        pooled: Tensor, mlp1_weight: Tensor, mlp2_weight: Tensor, hidden: Tensor, weights: Tensor
    ) -> None:
        """weights (B, 3, C) = the softmax over the branches of mlp2 gelu(hidden), hidden = mlp1 pooled."""
        mlps = mlp1_weight.contiguous(), mlp2_weight.contiguous()
        matrices = map(_native.matrix_view, mlps)
        _native.cpu_kernels().branch_weights(_small_view(pooled), *matrices, _small_view(hidden), _small_view(weights))

    @staticmethod
    def offset(weights: Tensor, bias: Tensor | None) -> Tensor:
        """What `weigh` adds for the bias (3C,) of the branches, in its form."""
        if bias is None:
            return weights.new_zeros((len(weights), weights.shape[2]))
        return (weights * bias.to(weights.dtype).view(weights.shape[1:])).sum(1)

    @staticmethod
    def branch_weights_backward(
        sums: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        hidden: Tensor,
        pooled: Tensor,
        mlps: Sequence[Tensor],
        dmlps: Sequence[Tensor | None],
        dpooled: Tensor,
    ) -> None:
        """From what weigh_backward_weights gives, for branches that had no bias (3C,) there."""
        dweights = sums if bias is None else sums[:, :3] + bias.to(sums.dtype).view(weights.shape[1:]) * sums[:, 3:]
        given = [_small_view(t) for t in (dweights, weights, hidden, pooled)]
        contiguous = [w.contiguous() for w in mlps]
        matrices = [None if w is None else _native.matrix_view(w) for w in (*contiguous, *dmlps)]
        _native.cpu_kernels().branch_weights_backward(*given, *matrices, _small_view(dpooled))

    @staticmethod
    def bias_backward(sums: Tensor, weights: Tensor, dpooled: Tensor, pixels: int, dbias: Tensor) -> None:
        """Of the bias (3C,) of the branches: no pixel of dy goes to two pixels of a branch, none is lost."""
        dbias.copy_((weights * sums[:, 3:]).add_(dpooled[:, None], alpha=pixels).sum(0).flatten())

    @staticmethod
    def weigh(x: Tensor, weights: Tensor, offset: Tensor | None, y: Tensor) -> None:
        """y = offset + the sum of the moved branches of x times their weights."""
        _native.cpu_kernels().weigh(_map_view(x), _small_view(weights), _small_view(offset), _map_view(y))

    @staticmethod
    def linear_weigh_linear(
        x: Tensor,
        mlp1_weight: Tensor,
        mlp2_weight: Tensor,
        mlp2_bias: Tensor | None,
        weights: Tensor,
        offset: Tensor,
        branches: Tensor,
        weighed: Tensor,
        y: Tensor,
    ) -> None:
        """y = mlp2 of what `weigh` makes of mlp1 x, for as many images at a time as `weighed` has; branches has as
        many, or all to be kept. float32 only, for which the CPU has its own products."""
        mlp1, mlp2 = _native.matrix_view(mlp1_weight), _native.matrix_view(mlp2_weight)
        mlp2_bias = None if mlp2_bias is None else mlp2_bias.contiguous()
        bias = _native.channels_view(mlp2_bias)
        given = _map_view(x), mlp1, _small_view(weights), _small_view(offset), mlp2, bias
        _native.cpu_kernels().linear_weigh_linear(*given, _map_view(branches), _map_view(weighed), _map_view(y))

    @staticmethod
    def weigh_backward_weights(
        dy: Tensor, x: Tensor, weights: Tensor, offset: Tensor | None, sums: Tensor, y: Tensor | None
    ) -> None:
        """(B, 4, C): sums of dy times each moved branch of x, and of dy; also y, if it and offset are given."""
        inputs = _map_view(dy), _map_view(x), _small_view(weights), _small_view(offset)
        _native.cpu_kernels().weigh_backward_weights(*inputs, _small_view(sums), _map_view(y))

    @staticmethod
    def weigh_backward_input(dy: Tensor, weights: Tensor, dpooled: Tensor, dx: Tensor) -> None:
        """Of the gradients dy of y and dpooled of the sum of all moved branches over the pixels."""
        inputs = _map_view(dy), _small_view(weights), _small_view(dpooled)
        _native.cpu_kernels().weigh_backward_input(*inputs, _map_view(dx))


def triton_passes() -> ModuleType:
    from ..kernels import shift_split_attention

    return shift_split_attention


def _map_view(t: Tensor | None) -> tuple[int, ...] | None:
    if t is None:
        return None
    (b, h, w, c), (image, row, column, channel) = t.shape, t.stride()
    return t.data_ptr(), _native.DTYPES[t.dtype], b, c, h, w, image, channel, row, column


def _small_view(t: Tensor | None) -> tuple[int, ...] | None:
    if t is None:
        return None
    b, k, c = t.shape if t.ndim == 3 else (len(t), 1, t.shape[1])
    return t.data_ptr(), _native.DTYPES[t.dtype], b, k, 1, c, k * c, c, c, 1


def adjacent(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 else t.contiguous()


# --- The op


def _forward(a: _Arguments, passes: Any) -> tuple[Tensor, ...]:
    x, c = adjacent(a.x), a.x.shape[3] // 3
    sums, pooled = small(x, 3, 3 * c), small(x, c)
    passes.edge_sums(x, sums)
    passes.pool(sums, pooled)
    weights, hidden = small(x, 3, c), small(x, len(a.split_mlp1_weight))
    passes.branch_weights(pooled, a.split_mlp1_weight, a.split_mlp2_weight, hidden, weights)
    y = allocate((*x.shape[:3], c), x)
    passes.weigh(x, weights, None, y)
    return y, pooled, hidden, weights


def _backward(grads: list[Any], grad: Tensor, a: _Arguments, passes: Any, *saved: Tensor) -> None:
    (dx, *dmlps), (pooled, hidden, weights) = grads, saved
    x, dy = adjacent(a.x), adjacent(grad)
    sums = small(x, 4, dy.shape[3])
    passes.weigh_backward_weights(dy, x, weights, None, sums, None)
    mlps, dpooled = (a.split_mlp1_weight, a.split_mlp2_weight), small(x, dy.shape[3])
    passes.branch_weights_backward(sums, None, weights, hidden, pooled, mlps, dmlps, dpooled)
    if dx is None:
        return
    found = dx if dx.stride(3) == 1 else allocate(dx.shape, dx)
    passes.weigh_backward_input(dy, weights, dpooled, found)
    if found is not dx:
        dx.copy_(found)


def _crew_pays(x: Tensor) -> bool:
    return x.numel() >= 2**16  # measured on two threads


_forward_in_crew, _backward_in_crew = (with_crew(run, _crew_pays) for run in (_forward, _backward))


@without_autocast
def _forward_cpu(a: _Arguments) -> tuple[Tensor, ...]:
    return _forward_in_crew(a, CPUPasses)


@without_autocast
def _backward_cpu(grads: list[Any], grad: Tensor, a: _Arguments, *saved: Tensor) -> None:
    _backward_in_crew(grads, grad, a, CPUPasses, *saved)


@without_autocast
def _forward_cuda(a: _Arguments) -> tuple[Tensor, ...]:
    return _forward(a, triton_passes())


@without_autocast
def _backward_cuda(grads: list[Any], grad: Tensor, a: _Arguments, *saved: Tensor) -> None:
    _backward(grads, grad, a, triton_passes(), *saved)


_KERNELS: dict[str, Kernels] = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


def parts(x: Tensor) -> dict[str, str]:
    device = _native.device_kind(x)
    kernel = "Triton kernel" if device == "cuda" else _native.kernel_name(device)
    return {
        "shifts and weights": kernel,
        "split_mlp1 and split_mlp2": "PyTorch's GEMMs" if device == "cuda" else kernel,
    }


_op = FusedOp(
    "shift_split_attention",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    wide=("split_mlp1_weight", "split_mlp2_weight"),
    saved=(Tensor.contiguous,) * 3,
    parts=lambda a: parts(a.x),
    dims="B, H, W, 3C",
)


def fused_shift_split_attention(
    x: Tensor, split_mlp1_weight: Tensor, split_mlp2_weight: Tensor, *, backend: str | None = None
) -> Tensor:
    """y = sum_k w_k * x_k; w = softmax_k(split_mlp2 gelu(split_mlp1 a)), a = the sum of all x_k over the pixels.

    x_3 is the third branch of x; x_1 and x_2 are the others, moved by one pixel: the quarters of x_1's channels down,
    up, right and left, those of x_2 right, left, down and up. The moves are clean: out of place, rows and columns at
    the border keep their own value. The in-place slices of the article's code are another function: on CPUs they read
    what they have just overwritten, so that two of the four quarters become copies of one row or column, on GPUs what
    they give is undefined, and the gradient PyTorch gives them is that of the clean move.

    Args:
        x: (B, H, W, 3C), any strides, none of H, W and C empty; float32, bfloat16, float16 or float64. Quarters of C
            round down: C / 4, C / 2 and 3 C / 4 are where they end.
        split_mlp1_weight: (hidden, C), in the dtype of x, or float32 beside a half x. The hidden width is C in the
            article, C / 4 with the paper's parameter counts.
        split_mlp2_weight: (3C, hidden), as split_mlp1_weight.
        backend: as in `vision_ops.use_backend`.

    Returns (B, H, W, C), contiguous, in the dtype of x. Nothing moved is ever stored: a follows from sums of all pixels
    and of the borders, and one pass reads every value where it comes from. Backward keeps the arguments and a few
    numbers per image. Channels that are not adjacent in memory are copied first. Gradients come in each argument's own
    dtype and are bitwise repeatable with the same number of threads. Without a kernel for the device,
    `reference.shift_split_attention` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    S2-MLPv2 (arXiv 2108.01072); after s2_mlp_v2.py of liuruiyang98/Jittor-MLP, its authors published no code.
    """
    check_tensor("x", x, "B, H, W, 3C")
    if x.shape[3] % 3:
        raise ValueError(f"x must have a multiple of 3 channels, got shape {tuple(x.shape)}")
    check_split_mlps(x.shape[3] // 3, split_mlp1_weight, split_mlp2_weight, x)
    return _op(x, split_mlp1_weight, split_mlp2_weight, backend=backend)


def check_split_mlps(channels: int, split_mlp1_weight: Tensor, split_mlp2_weight: Tensor, x: Tensor) -> None:
    hidden = split_mlp1_weight.shape[0] if isinstance(split_mlp1_weight, Tensor) and split_mlp1_weight.ndim == 2 else 1
    check_parameter("split_mlp1_weight", split_mlp1_weight, (hidden, channels), "hidden, C", x)
    check_parameter("split_mlp2_weight", split_mlp2_weight, (3 * channels, hidden), "3C, hidden", x)
