"""S2-MLPv2's spatial shifts and split attention: three branches, two of them moved by a pixel, weighed by channel."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, reference
from ..dispatch import Explanation, explainers
from ._checks import check_parameter, check_tensor
from ._registration import FusedOp, Kernels, allocate, device_reasons, without_autocast


class _Arguments(NamedTuple):
    x: Tensor
    split_mlp1_weight: Tensor
    split_mlp2_weight: Tensor


def _reference(a: _Arguments) -> Tensor:
    return reference.shift_split_attention(*a)


def _output(a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """y, the pooled vectors (B, C) and the weights of the branches (B, 3, C)."""
    b, h, w, triple = a.x.shape
    return allocate((b, h, w, triple // 3), a.x), small(a.x, triple // 3), small(a.x, 3, triple // 3)


def small(x: Tensor, *sizes: int) -> Tensor:
    """For what is summed over the pixels of every image: float32 for half types."""
    return x.new_empty((len(x), *sizes), dtype=sum_dtype(x))


def sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- The passes over the pixels, for this op and for those that contain it. Maps are (B, H, W, channels) with adjacent
# channels, what is small is contiguous. On CUDA the functions of kernels/shift_split_attention.py have the same names.


class CPUPasses:
    @staticmethod
    def edge_sums(t: Tensor, sums: Tensor) -> None:
        """(B, 3, channels): sums of all pixels, of the first row less the last, of the first column less the last."""
        _native.kernels().edge_sums(_map_view(t), _small_view(sums))

    @staticmethod
    def weigh(x: Tensor, weights: Tensor, offset: Tensor, y: Tensor) -> None:
        """y = offset + the sum of the moved branches of x times their weights."""
        _native.kernels().weigh(_map_view(x), _small_view(weights), _small_view(offset), _map_view(y))

    @staticmethod
    def weigh_backward_weights(
        dy: Tensor, x: Tensor, weights: Tensor, offset: Tensor, sums: Tensor, y: Tensor | None
    ) -> None:
        """(B, 4, C): sums of dy times each moved branch of x, and of dy; also y, once more, if there is one."""
        inputs = _map_view(dy), _map_view(x), _small_view(weights), _small_view(offset)
        _native.kernels().weigh_backward_weights(*inputs, _small_view(sums), None if y is None else _map_view(y))

    @staticmethod
    def weigh_backward_input(dy: Tensor, weights: Tensor, dpooled: Tensor, dx: Tensor) -> None:
        """Of the gradients dy of y and dpooled of the sum of all moved branches over the pixels."""
        inputs = _map_view(dy), _small_view(weights), _small_view(dpooled)
        _native.kernels().weigh_backward_input(*inputs, _map_view(dx))


def triton_passes() -> ModuleType:
    from ..kernels import shift_split_attention

    return shift_split_attention


def _map_view(t: Tensor) -> tuple[int, ...]:
    (b, h, w, c), (image, row, column, channel) = t.shape, t.stride()
    return t.data_ptr(), _native.DTYPES[t.dtype], b, c, h, w, image, channel, row, column


def _small_view(t: Tensor) -> tuple[int, ...]:
    b, k, c = t.shape if t.ndim == 3 else (len(t), 1, t.shape[1])
    return t.data_ptr(), _native.DTYPES[t.dtype], b, k, 1, c, k * c, c, c, 1


def adjacent(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 else t.contiguous()


# --- Between the passes: a few numbers per image


def pool(sums: Tensor) -> Tensor:
    """(B, C), the sum of all moved branches over the pixels, from the edge sums (B, 3, 3C) of the branches.

    Moving forward drops what is last and doubles what is first; moving back does the opposite.
    """
    total, vertical, horizontal = sums.unflatten(2, (3, -1)).unbind(1)
    c = total.shape[2]
    first, second = slice(c // 2), slice(c // 2, c)
    edges = torch.cat(
        [vertical[:, 0, first] + horizontal[:, 1, first], horizontal[:, 0, second] + vertical[:, 1, second]], 1
    )
    for back in (slice(c // 4, c // 2), slice(c * 3 // 4, c)):
        edges[:, back].neg_()
    return total.sum(1).add_(edges)


def branch_weights(pooled: Tensor, mlp1_weight: Tensor, mlp2_weight: Tensor) -> Tensor:
    """(B, 3, C)."""
    hidden = F.gelu(pooled @ mlp1_weight.to(pooled.dtype).t())
    return (hidden @ mlp2_weight.to(pooled.dtype).t()).unflatten(1, (3, -1)).softmax(1)


def branch_weights_backward(
    dweights: Tensor,
    pooled: Tensor,
    weights: Tensor,
    mlp1_weight: Tensor,
    mlp2_weight: Tensor,
    dmlp1: Tensor | None,
    dmlp2: Tensor | None,
) -> Tensor:
    """The gradient of pooled; writes those of the parameters."""
    mlp1_weight, mlp2_weight = mlp1_weight.to(pooled.dtype), mlp2_weight.to(pooled.dtype)
    products = weights * dweights
    dlogits = (products - weights * products.sum(1, keepdim=True)).flatten(1)
    hidden = pooled @ mlp1_weight.t()
    if dmlp2 is not None:
        multiply(dlogits.t(), F.gelu(hidden), dmlp2)
    dhidden = torch.ops.aten.gelu_backward(dlogits @ mlp2_weight, hidden)
    if dmlp1 is not None:
        multiply(dhidden.t(), pooled, dmlp1)
    return dhidden @ mlp1_weight


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, in whatever dtype out has."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


# --- The op


def _forward(a: _Arguments, passes: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, (y, pooled, weights) = adjacent(a.x), _output(a)
    sums = small(x, 3, x.shape[3])
    passes.edge_sums(x, sums)
    pooled = pool(sums)
    weights = branch_weights(pooled, a.split_mlp1_weight, a.split_mlp2_weight)
    passes.weigh(x, weights, torch.zeros_like(pooled), y)
    return y, pooled, weights


def _backward(grads: list[Any], grad: Tensor, a: _Arguments, pooled: Tensor, weights: Tensor, passes: Any) -> None:
    (dx, dmlp1, dmlp2), x, dy = grads, adjacent(a.x), adjacent(grad)
    sums = small(x, 4, dy.shape[3])
    passes.weigh_backward_weights(dy, x, weights, pooled, sums, None)
    mlps = a.split_mlp1_weight, a.split_mlp2_weight
    dpooled = branch_weights_backward(sums[:, :3], pooled, weights, *mlps, dmlp1, dmlp2)
    if dx is None:
        return
    found = dx if dx.stride(3) == 1 else allocate(dx.shape, dx)
    passes.weigh_backward_input(dy, weights, dpooled, found)
    if found is not dx:
        dx.copy_(found)


@without_autocast
def _forward_cpu(a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(a, CPUPasses)


@without_autocast
def _backward_cpu(grads: list[Any], grad: Tensor, a: _Arguments, pooled: Tensor, weights: Tensor) -> None:
    _backward(grads, grad, a, pooled, weights, CPUPasses)


@without_autocast
def _forward_cuda(a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(a, triton_passes())


@without_autocast
def _backward_cuda(grads: list[Any], grad: Tensor, a: _Arguments, pooled: Tensor, weights: Tensor) -> None:
    _backward(grads, grad, a, pooled, weights, triton_passes())


_KERNELS: dict[str, Kernels] = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


def parts(x: Tensor, *gemms: str) -> dict[str, str]:
    device = x.device.type
    kernel = "Triton kernel" if device == "cuda" else _native.kernel_name(device)
    return {"shifts and weights": kernel, **dict.fromkeys(gemms, "PyTorch's GEMMs")}


_op = FusedOp(
    "shift_split_attention",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    saved=2,
    parts=lambda a: parts(a.x, "split_mlp1 and split_mlp2"),
)


def _explain(
    x: Tensor,
    split_mlp1_weight: Tensor | None = None,
    split_mlp2_weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Explanation:
    check_tensor("x", x, "B, H, W, 3C")
    return _op.explain(x, split_mlp1_weight, split_mlp2_weight, backend=backend)


explainers["shift_split_attention"] = _explain


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
    check_not_empty(x)
    check_split_mlps(x.shape[3] // 3, split_mlp1_weight, split_mlp2_weight, x)
    return _op(x, split_mlp1_weight, split_mlp2_weight, backend=backend)


def check_not_empty(x: Tensor) -> None:
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one row, column and channel, got shape {tuple(x.shape)}")


def check_split_mlps(channels: int, split_mlp1_weight: Tensor, split_mlp2_weight: Tensor, x: Tensor) -> None:
    hidden = split_mlp1_weight.shape[0] if isinstance(split_mlp1_weight, Tensor) and split_mlp1_weight.ndim == 2 else 1
    check_parameter("split_mlp1_weight", split_mlp1_weight, (hidden, channels), "hidden, C", x)
    check_parameter("split_mlp2_weight", split_mlp2_weight, (3 * channels, hidden), "3C, hidden", x)
