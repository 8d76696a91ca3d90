"""1x1 convolutions and their gradients as matrix products, in any layout and without copies of slices.

In float32 on CPUs they are ours: they take any layout to any other and end in what the ops do next. All others are
PyTorch's.
"""

import torch
from torch import Tensor

from .. import _native
from ._allocation import allocate_channels_last, memory_format
from ._devices import CREW_WORK


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, plus: Tensor | None = None) -> None:
    """out = weight x + bias at every pixel of (N, C, H, W), plus another tensor of its shape, which may be out.

    weight: (O, I), or (N, O, I) for each image of a channels_last out. Where x and out differ in layout, the product
    changes it.
    """
    if _multiplies(x, out, plus):
        _multiply(x, weight, bias, out, _NOTHING if plus is None else _PLUS, other=plus)
    elif plus is None:
        _torch_linear(x, weight, bias, out)
    elif plus is out and bias is None and weight.ndim == 2 and (pair := _matrices(x, out)):
        pair[1].addmm_(pair[0], operand(weight.to(x.dtype)).t())
    else:
        product = torch.empty_like(out) if plus is out else out
        _torch_linear(x, weight, bias, product)
        torch.add(product, plus, out=out)


def linear_tokens(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, plus: Tensor | None = None) -> None:
    """`linear` of (B, N, C), neighbouring channels, by a matrix (O, I), or (B, O, I) for each sample, then with biases
    (O,) or (B, O); plus, if given, is out."""
    if multiplies_tokens(x):
        given = _native.tokens_view(x), _native.matrix_view(weight), _native.vectors_view(bias)
        end = _NOTHING if plus is None else _PLUS, 0, _native.tokens_view(plus), None, None, None
        _native.cpu_kernels().pointwise(*given, end, _native.tokens_view(out))
    elif weight.ndim == 2 and plus is None:
        _torch_linear(x.transpose(1, 2)[..., None], weight, bias, out.transpose(1, 2)[..., None])
    elif plus is not None:
        out.baddbmm_(x, weight.transpose(1, 2))
    elif bias is None:
        torch.bmm(x, weight.transpose(1, 2), out=out)
    else:
        bias = operand(bias.to(out.dtype))
        torch.baddbmm(bias if bias.ndim == 1 else bias[:, None], x, weight.transpose(1, 2), out=out)


def linear_to(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, plus: Tensor | None = None) -> None:
    """`linear` of a channels_last x into any layout. PyTorch's GEMMs take longer to change it than a copy does."""
    if out.shape[1] == 1 or out.stride(1) == 1 or _multiplies(x, out, plus):
        return linear(x, weight, bias, out, plus=plus)
    y = allocate_channels_last(out.shape, out)
    linear(x, weight, bias, y)
    if plus is None:
        out.copy_(y)
    else:
        torch.add(y, plus, out=out)


def linear_times(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, out: Tensor) -> bool:
    """out = (weight x + bias) * factor, where that is one kernel; else False."""
    return _multiplies(x, out, factor) and _multiply(x, weight, bias, out, _TIMES, other=factor)


def linear_activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor, before: Tensor | None = None
) -> bool:
    """out = act(weight x + bias), and before = weight x + bias, where that is one kernel; else False."""
    if not _multiplies(x, out, before):
        return False
    return _multiply(x, weight, bias, out, _ACTIVATE, activation=ACTIVATIONS[activation], kept=before)


def linear_activation_backward(
    grad: Tensor, weight: Tensor, before: Tensor, activation: str, out: Tensor, activated: Tensor | None = None
) -> bool:
    """out = (weight grad) * act'(before), and activated = act(before), where that is one kernel; else False.

    out may be before; activated is memory of its own.
    """
    if not _multiplies(grad, out, before, activated):
        return False
    act = ACTIVATIONS[activation]
    return _multiply(grad, weight, None, out, _ACTIVATE_BACKWARD, other=before, activation=act, kept=activated)


def linear_scaled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    residual: Tensor,
    out: Tensor,
) -> bool:
    """out = residual + path_scale[n] * gamma[c] * (weight x + bias), where that is one kernel; else False.

    residual may be out.
    """
    if not _multiplies(x, out, residual) or any(t is not None and t.dtype != x.dtype for t in (gamma, path_scale)):
        return False
    return _multiply(x, weight, bias, out, _SCALE, other=residual, gamma=gamma, path_scale=path_scale)


def operand(t: Tensor) -> Tensor:
    """What a caller gave, as PyTorch's products of half types on CPUs may read it: a copy where there is memory between
    its numbers. With AMX they multiply by zero what lies between the rows, which may be NaN."""
    if t.dtype.itemsize != 2 or _native.device_kind(t) != "cpu" or _solid(t):
        return t
    return t.contiguous(memory_format=memory_format(t) if t.ndim == 4 else torch.contiguous_format)


def _solid(t: Tensor) -> bool:
    """Whether it has all the numbers from its first to its last one."""
    span = numbers = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if stride > 0:
            span, numbers = span + (size - 1) * stride, numbers * size
    return span <= numbers or t.numel() == 0


def tf32_allowed() -> bool:
    """Whether the user lets PyTorch round what float32 products on GPUs multiply to 10 bits."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def products(x: Tensor) -> str:
    """What multiplies tensors like x, for `explain`."""
    return _native.kernel_name("cpu") if multiplies(x) else _TORCH


def multiplies(x: Tensor) -> bool:
    """Whether products of x are ours."""
    return _has_kernel(x) and _gapless(x)


def multiplies_as_is(x: Tensor) -> bool:
    """Whether they and gradients of their weights are, without a copy of x in another layout."""
    return _has_kernel(x) and _lined(x)


def crew_pays(x: Tensor) -> bool:
    """Whether `with_crew` does for an op that multiplies x: PyTorch's products would be left with one thread, and the
    passes of small tensors wake no other."""
    return x.numel() >= _CREW_ELEMENTS and multiplies(x)


def products_of_tokens(x: Tensor) -> str:
    """What multiplies tokens like x, for `explain`."""
    return _native.kernel_name("cpu") if multiplies_tokens(x) else _TORCH


def multiplies_tokens(x: Tensor) -> bool:
    """Whether `linear_tokens` of (..., C) is ours. Few tokens do not pay for the packing of the weight."""
    return _has_kernel(x) and x.numel() >= _LEAST_TOKENS * x.shape[-1]


def crew_pays_for_tokens(x: Tensor) -> bool:
    return multiplies_tokens(x) and x.numel() * x.shape[-1] > CREW_WORK


_TORCH = "PyTorch's GEMMs"
_CREW_ELEMENTS, _LEAST_TOKENS = 2**12, 16
# Combine in csrc/include/pointwise.h, and Activation in activation.h.
_NOTHING, _PLUS, _TIMES, _ACTIVATE, _ACTIVATE_BACKWARD, _SCALE = range(6)
ACTIVATIONS = {"gelu": 1, "silu": 2, "hardswish": 3}


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    combine: int,
    *,
    other: Tensor | None = None,
    kept: Tensor | None = None,
    activation: int = 0,
    gamma: Tensor | None = None,
    path_scale: Tensor | None = None,
) -> bool:
    of_images = None if path_scale is None else _native.vectors_view(path_scale.view(-1, 1))
    end = combine, activation, _native.view(other), _native.view(kept), _vector(gamma), of_images
    given = _native.view(x), _native.matrix_view(weight), _vector(bias)
    _native.cpu_kernels().pointwise(*given, end, _native.view(out))
    return True


def _vector(t: Tensor | None) -> _native.View:
    return None if t is None else _native.channels_view(t.contiguous())


def _multiplies(x: Tensor, out: Tensor, *others: Tensor | None) -> bool:
    """Whether our kernel takes these."""
    if not _has_kernel(x):
        return False
    for t in others:
        if t is not None and (t.dtype != x.dtype or not _lined(t) or _by_channel(t) != _by_channel(out)):
            return False
    return _gapless(x) and _lined(out)


def _has_kernel(x: Tensor) -> bool:
    # The baseline has none of the instructions that PyTorch's GEMMs choose.
    return x.dtype == torch.float32 and _native.device_kind(x) == "cpu" and _native.cpu_kernels().isa != "baseline"


def _gapless(t: Tensor) -> bool:
    """Whether one stride leads through the pixels of an image."""
    if _dense(t):
        return True
    _, _, h, w = t.shape
    return h == 1 or w == 1 or t.stride(2) == w * t.stride(3)


def _dense(t: Tensor) -> bool:
    """Whether it is as most are, which takes less time to ask than its strides do."""
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)


def _by_channel(t: Tensor) -> bool:
    return t.stride(1) == 1 or t.shape[1] == 1


def _lined(t: Tensor) -> bool:
    """Whether its channels are neighbours in memory, or the pixels of its planes."""
    if _dense(t):
        return True
    _, _, h, w = t.shape
    return _gapless(t) and (_by_channel(t) or h * w == 1 or (t.stride(2) if w == 1 else t.stride(3)) == 1)


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    weight, bias = operand(weight.to(x.dtype)), None if bias is None else operand(bias.to(x.dtype))
    if weight.ndim == 2 and (pair := _matrices(x, out)):
        if bias is None:
            torch.mm(pair[0], weight.t(), out=pair[1])
        else:
            torch.addmm(bias, pair[0], weight.t(), out=pair[1])
        return
    rows, to = _pixels(x), _pixels(out)
    many = weight.expand(len(x), *weight.shape[-2:])
    if to.stride(2) == 1:
        left, right, column = rows, many.transpose(1, 2), bias
    else:
        left, right, to = many, rows.transpose(1, 2), to.transpose(1, 2)
        column = None if bias is None else bias[:, None]
    if column is None:
        torch.bmm(left, right, out=to)
    else:
        torch.baddbmm(column, left, right, out=to)


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor | None, bias_out: Tensor | None = None) -> None:
    """out = the gradient of the weight (O, I) or (O, I, 1, 1) of linear(x), given that of its result, and bias_out =
    that of its bias. The numbers of each do not depend on whether the other is asked for."""
    if out is not None and out.ndim > 2:
        out = out.flatten(1)
    if _has_kernel(x) and _lined(grad) and _lined(x) and _takes(out, x) and _takes(bias_out, x):
        if out is not None or bias_out is not None:
            gradients = None if out is None else _native.matrix_view(out), _native.channels_view(bias_out)
            _native.cpu_kernels().pointwise_backward_weight(_native.view(grad), _native.view(x), *gradients)
        return
    if bias_out is not None:
        channel_sums(grad, bias_out)
    if out is None:
        return
    if pair := _matrices(grad, x):
        return _sum_products(pair[0].t(), pair[1], out)
    # Image by image: half types would round every image's share if they were summed in place.
    total = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
    for image, grad_image in zip(_pixels(x), _pixels(grad), strict=True):
        total += _summed(grad_image.t(), image)
    out.copy_(total)


def _takes(out: Tensor | None, x: Tensor) -> bool:
    """Whether our kernel writes a gradient there."""
    return out is None or (out.dtype == x.dtype and (out.stride(-1) == 1 or out.shape[-1] == 1))


def channel_sums(t: Tensor, sums: Tensor | None) -> None:
    """sums = t.sum((0, 2, 3)): the gradient of a bias."""
    if sums is None:
        return
    double = [tensor.dtype == torch.float64 for tensor in (t, sums)]
    if _native.device_kind(t) == "cpu" and _native.cpu is not None and _lined(t) and double[0] == double[1]:
        _native.cpu_kernels().channel_sums(_native.view(t), _native.channels_view(sums))
    else:
        torch.sum(t, (0, 2, 3), dtype=sums.dtype, out=sums)


def weight_gradient_tokens(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """`weight_gradient` of `linear_tokens`."""
    if multiplies_tokens(x) and out.dtype == x.dtype:
        views = _native.tokens_view(grad), _native.tokens_view(x), _native.matrix_view(out)
        _native.cpu_kernels().pointwise_backward_weight(*views, None)
    elif out.ndim == 3:
        torch.bmm(grad.transpose(1, 2), x, out=out)
    else:
        _sum_products(grad.flatten(0, 1).t(), x.flatten(0, 1), out)


def _sum_products(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left right, in its own dtype, where the sums are long."""
    if out.dtype == left.dtype and not _sums_in_parts(left):
        torch.mm(left, right, out=out)
    elif out.dtype == torch.float32 and _sums_in_parts(left):
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(_summed(left, right))


def _summed(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32) if _sums_in_parts(left) else torch.mm(left, right)


def _sums_in_parts(t: Tensor) -> bool:
    """Whether PyTorch may cut a long sum into parts and add these in t's half type: it does on GPUs, unless it is asked
    for another dtype."""
    return _native.device_kind(t) != "cpu" and t.dtype in (torch.bfloat16, torch.float16)


def _pixels(t: Tensor) -> Tensor:
    """(N, H * W, C), a view wherever one stride leads through the pixels."""
    return t.flatten(2).transpose(1, 2)


def _matrices(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both as (N * H * W, C), if these are views."""
    a, b = _matrix(_pixels(x)), _matrix(_pixels(y))
    return None if a is None or b is None else (a, b)


def _matrix(pixels: Tensor) -> Tensor | None:
    """(N * H * W, C), if that is a view."""
    if len(pixels) == 1:
        return pixels[0]
    if pixels.shape[1] == 1:  # a dimension of one has any stride
        return pixels[:, 0]
    return pixels.flatten(0, 1) if pixels.stride(0) == pixels.shape[1] * pixels.stride(1) else None
