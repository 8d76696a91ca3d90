"""What every op is tested for. A test describes its op as a Case; the checks are the same for all."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest error relative to the largest value that no eager baseline has to justify.
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
HALF = (torch.bfloat16, torch.float16)
FEW = 8  # sums of very many values, such as the gradient of a temperature, which may cancel
DEVICE: str | None = None  # of all cases, for the fixture `each_device`; None leaves them where they are


def moved(t: Tensor, device: str) -> Tensor:
    """t on another device, with its strides and what lies between them."""
    if t.device.type == device:
        return t
    size = t.untyped_storage().nbytes() // t.itemsize
    whole = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage(), 0, (size,), (1,))
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@dataclass
class Case:
    """tensors: x first, None for absent ones. run(tensors, backend) calls the op. constants: the places of tensors that
    take no gradient."""

    run: Callable[[Sequence[Tensor | None], str], Tensor]
    tensors: list[Tensor | None]
    constants: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if DEVICE is not None:
            self.tensors = [t if t is None else moved(t, DEVICE) for t in self.tensors]

    def to(self, dtype: torch.dtype) -> "Case":
        return self.of([t if t is None else t.detach().to(dtype) for t in self.tensors])

    def on(self, device: str) -> "Case":
        return self.of([t if t is None else moved(t, device) for t in self.tensors])

    def of(self, tensors: Sequence[Tensor | None]) -> "Case":
        return Case(self.run, list(tensors), self.constants)

    def leaves(self) -> list[Tensor | None]:
        """The tensors, those that take a gradient ready for it."""
        return [
            t if t is None else t.detach().requires_grad_(i not in self.constants) for i, t in enumerate(self.tensors)
        ]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t (N, C, H, W) in another layout."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    n, c, h, w = t.shape
    if layout == "channel_slice":
        wide = torch.full((n, c + 5, h, w), 7.0, dtype=t.dtype, device=t.device).to(memory_format=torch.channels_last)
        wide[:, 3 : 3 + c] = t
        return wide[:, 3 : 3 + c]
    if layout == "cropped":
        wide = torch.full((n, c, h + 3, w + 2), 7.0, dtype=t.dtype, device=t.device)
        wide[:, :, 1 : 1 + h, 2:] = t
        return wide[:, :, 1 : 1 + h, 2:]
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return t[:1, :, :1, :1].expand(n, c, h, w)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "channels_last", "channel_slice", "cropped", "transposed", "expanded")


def heads_laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """(B, heads, N, d): contiguous, a view of a (B, N, 3C) tensor, with gaps everywhere, turned, or of one sample."""
    b, heads, n, d = shape
    if layout == "token_major":
        return torch.randn(b, n, 3, heads, d, dtype=dtype)[:, :, 1].transpose(1, 2)
    if layout == "strided":
        return torch.randn(b, heads + 1, n + 3, 2 * d, dtype=dtype)[:, 1:, 2 : n + 2, ::2]
    if layout == "channel_major":
        return torch.randn(b, heads, d, n, dtype=dtype).transpose(2, 3)
    t = torch.randn(1 if layout == "expanded" else b, heads, n, d, dtype=dtype)
    return t.expand(shape)


HEADS_LAYOUTS = ("contiguous", "token_major", "strided", "channel_major", "expanded")


def float64_is_left_out(parameters: Mapping[str, object]) -> str | None:
    """`not_on_gpus` of a module whose ops leave float64 to PyTorch."""
    return "the Triton kernels do not take float64" if parameters.get("dtype") == torch.float64 else None


def outputs(case: Case, backend: str, grad: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """[y, the gradients of all tensors], and the grad_output that was used."""
    leaves = case.leaves()
    y = case.run(leaves, backend)
    grad = torch.randn_like(y) if grad is None else grad
    present = [t for t in leaves if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, present, grad.to(y.dtype))], grad


def relative_error(a: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    return ((a.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def check_against_reference(case: Case, grad_layout: str = "contiguous", slack: float = 1.0) -> None:
    """Output and gradients: error at most twice that of eager PyTorch in the same dtype, both against float64.

    slack: for drawn cases. Where a gradient's few terms happen to cancel, whose rounding errors do so too is luck.
    """
    y = case.run(case.tensors, "reference")
    grad = torch.randn_like(y)
    grad = laid_out(grad, grad_layout) if grad.ndim == 4 else grad
    fused, _ = outputs(case, "fused", grad)
    eager, _ = outputs(case, "reference", grad)
    exact, _ = outputs(case.to(torch.float64), "reference", grad)
    for i, (a, b, e) in enumerate(zip(fused, eager, exact, strict=True)):
        what = "output" if i == 0 else f"gradient {i - 1}"
        assert a.shape == b.shape and a.dtype == b.dtype, what
        eager_error = relative_error(
            b, e
        )  # NaN where eager itself goes wrong: it does for some bfloat16 weight gradients
        allowed = slack * (2 * (0.0 if math.isnan(eager_error) else eager_error) + FLOOR[case.tensors[0].dtype])
        if e.numel() == 1:  # one sum, which may cancel: eager's own error says little of what is usual
            allowed *= 4
        error = relative_error(a, e)
        if error > allowed and case.tensors[0].dtype not in HALF:
            allowed = max(allowed, slack * sensitivity(case, grad, i, e))
        assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def check_autocast(case: Case) -> None:
    """In the dtypes of eager, which casts for products only, with no more than twice its error."""
    exact, grad = outputs(case.to(torch.float64), "reference")
    found = []
    for backend in ("fused", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = case.run(leaves := case.leaves(), backend)
        graded = [t for t in leaves if t is not None and t.requires_grad]
        found.append([y, *torch.autograd.grad(y, graded, grad.to(y.dtype))])
    for i, (a, b, e) in enumerate(zip(*found, exact, strict=True)):
        error, eager = relative_error(a, e), relative_error(b, e)
        allowed = (2 if e.numel() > FEW else 4) * eager + 4e-3
        assert a.dtype == b.dtype and error <= allowed, f"{i}: {a.dtype}, {b.dtype}, {error:.2e}, {allowed:.2e}"


def sensitivity(case: Case, grad: Tensor, which: int, exact: Tensor, draws: int = 8) -> float:
    """The largest error of eager's after its inputs were rounded once more, of an output or gradient.

    All of a gradient may be a multiple of one sum that nearly cancels (of a grad_output that is the same everywhere,
    say). How much of the error cancels too is then luck, and differs from one processor to the next.
    """
    eps = torch.finfo(case.tensors[0].dtype).eps

    def rounded(t: Tensor | None) -> Tensor | None:
        return t if t is None else t.detach() * (1 + eps * (2 * torch.rand_like(t) - 1))

    nudged = (case.of([rounded(t) for t in case.tensors]) for _ in range(draws))
    return max(relative_error(outputs(one, "reference", grad)[0][which], exact) for one in nudged)


def check_gradients(case: Case, second: bool = True, fast: bool = False) -> None:
    """Numerical gradients in float64, first and second order. fast: of a random projection."""
    leaves = case.to(torch.float64).leaves()
    present = [t for t in leaves if t is not None and t.requires_grad]

    def run(*given: Tensor) -> Tensor:
        rest = iter(given)
        return case.run([t if t is None or not t.requires_grad else next(rest) for t in leaves], "fused")

    assert torch.autograd.gradcheck(run, present, fast_mode=fast)
    if second:
        assert torch.autograd.gradgradcheck(run, present, fast_mode=fast)


def check_bits_of_needs(case: Case) -> None:
    """What a gradient is does not depend on which others are asked for: of each tensor alone, and of all but it."""
    together, grad = outputs(case, "fused")
    graded = [i for i, t in enumerate(case.leaves()) if t is not None and t.requires_grad]
    expected = dict(zip(graded, together[1:], strict=True))
    for one in graded:
        for wanted in ([one], [i for i in graded if i != one]):
            leaves = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(case.tensors)]
            y = case.run(leaves, "fused")
            found = torch.autograd.grad(y, [leaves[i] for i in wanted], grad) if wanted else ()
            assert torch.equal(y, together[0]), wanted
            assert all(torch.equal(g, expected[i]) for g, i in zip(found, wanted, strict=True)), wanted


def check_bitwise_repeatable(case: Case, other_threads: Sequence[int] = (1, 3)) -> None:
    """other_threads: none where GEMMs of PyTorch take part, which depend on their number."""
    first, grad = outputs(case, "fused")
    before = torch.get_num_threads()
    for threads in (before, *other_threads):
        torch.set_num_threads(threads)
        try:
            again, _ = outputs(case, "fused", grad)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{threads} threads"


def check_compiles(cases: Sequence[Case], dynamic: bool | None = None) -> None:
    """torch.compile(fullgraph=True), forward and backward, for the cases one after the other."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run = torch.compile(cases[0].run, fullgraph=True, dynamic=dynamic)
        for case in cases:
            eager, grad = outputs(case, "fused")
            compiled, _ = outputs(Case(run, case.tensors, case.constants), "fused", grad)
            for a, b in zip(eager, compiled, strict=True):
                assert a.stride() == b.stride()
                torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(run(case.tensors, "fused"), case.run(case.tensors, "fused"))


def check_opcheck(name: str, arguments: Sequence[object], tensors: int) -> None:
    """torch.library.opcheck of forward and backward, for x in both memory formats. tensors: how many of the arguments
    are tensors or lists of them."""
    forward = getattr(torch.ops.vision_ops, name).default
    backward = getattr(torch.ops.vision_ops, f"{name}_backward").default
    x, *rest = arguments
    for layout in ("contiguous", "channels_last"):
        given = laid_out(x, layout), *rest
        result = forward(*given)
        y, saved = (result, ()) if isinstance(result, Tensor) else (result[0], (list(result[1:]),))
        lists = [t if isinstance(t, list) else [t] for t in given[:tensors]]
        needs = [t is not None for one in lists for t in one]
        torch.library.opcheck(forward, given)
        torch.library.opcheck(backward, (torch.randn_like(y), *given, *saved, needs))
        torch.library.opcheck(forward, (given[0].clone().requires_grad_(), *rest))


def among_nan(t: Tensor) -> Tensor:
    """The values of t with NaN between its rows; those of four dimensions lie along the second one."""
    last = t.movedim(1, -1) if t.ndim == 4 else t[:, None] if t.ndim == 1 else t
    wide = torch.full((*last.shape[:-1], last.shape[-1] + 3), math.nan, dtype=t.dtype)
    view = wide[..., :-3].copy_(last)
    return view.movedim(-1, 1) if t.ndim == 4 else view.view_as(t) if t.ndim == 1 else view


def check_half_types_among_nan(case: Case) -> None:
    """A caller's slices, with NaN in what lies between: PyTorch's products of half types may read it (`unwritten`).

    Errors of half types are luck, also with other products of PyTorch's, and NaN is none."""
    for dtype in HALF:
        plain = case.to(dtype)
        spaced = case.of([t if t is None else among_nan(t.detach()) for t in plain.tensors])
        _, grad = outputs(plain, "reference")
        found, _ = outputs(spaced, "fused", among_nan(grad))
        exact, _ = outputs(case.to(torch.float64), "reference", grad)
        eager, _ = outputs(plain, "reference", grad)
        for a, b, e in zip(found, eager, exact, strict=True):
            assert relative_error(a, e) <= (8 if e.numel() == 1 else 4) * relative_error(b, e) + FLOOR[dtype]


def saved_bytes(case: Case, backend: str) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = case.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        case.run(leaves, backend)
    return sum(kept.values())
