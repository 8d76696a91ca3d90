import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_gradients,
    float64_is_left_out,
)

from vision_ops import fused_relative_self_attention

not_on_gpus = float64_is_left_out


def make(
    size=(5, 6), channels=64, heads=2, *, batch=2, table=(9, 5), window=None, bias=True, norm=True, residual=True,
    path_scale=False, layout="contiguous", dtype=torch.float32,
):  # fmt: skip
    """tensors: x, the eight of the products, the table, the norm's, path_scale and, if it is not x, the residual. The
    key bias is none of them, as its gradient vanishes."""
    height, width = size
    options = {"num_heads": heads, "window_size": window}

    def draw(*shape):
        return torch.randn(shape, dtype=dtype) / (shape[1] ** 0.5 if len(shape) == 2 else 1)

    key_bias = torch.linspace(-1, 1, channels) if bias else None

    def run(t, backend):
        around = {"norm_weight": t[10], "norm_bias": t[11], "path_scale": t[12]}
        added = t[0] if residual is True else t[13]
        of_keys = None if key_bias is None else key_bias.to(t[3])
        given = *t[:4], of_keys, *t[5:10]
        return fused_relative_self_attention(*given, **options, **around, eps=1e-5, residual=added, backend=backend)

    x = torch.randn(batch, height, width, channels, dtype=dtype)
    if layout == "channels_first":
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif layout == "slice":
        x = torch.randn(batch, height + 1, width, channels + 3, dtype=dtype)[:, 1:, :, :channels]
    products = [t for _ in range(4) for t in (draw(channels, channels), draw(channels) if bias else None)]
    products[3] = None
    norms = [1 + draw(channels) / 4, draw(channels)] if norm else [None, None]
    scale = torch.tensor([0.0, 1.25, 1.25])[torch.arange(batch) % 3].to(dtype) if path_scale else None
    other = torch.randn_like(x) if residual == "another" else None
    tables = None if table is None else torch.randn(heads, *table, dtype=dtype)
    return Case(run, [x, *products, tables, *norms, scale, other], constants=(12,))


CASES = [
    {},
    {"size": (14, 14), "channels": 96, "heads": 3, "batch": 4},  # worth a crew
    {"size": (7, 7), "channels": 160, "heads": 5, "table": (13, 13)},
    {"bias": False, "table": None},
    {"norm": False},
    {"residual": None},
    {"residual": None, "norm": False},
    {"norm": False, "path_scale": True},
    {"residual": "another", "path_scale": True},
    {"path_scale": True, "batch": 3},
    {"window": (4, 4)},
    {"size": (1, 1)},
    {"channels": 20, "heads": 1},
    {"batch": 0, "path_scale": True},
    {"layout": "channels_first"},
    {"layout": "slice"},
]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_matches_reference(options):
    """With slack: gradients of logits cancel over the keys, and what is common to the keys multiplies what is left."""
    check_against_reference(make(**options), slack=2)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("options", [{}, {"path_scale": True, "batch": 3}, {"norm": False, "residual": None}], ids=str)
def test_dtypes(dtype, options):
    check_against_reference(make(dtype=dtype, **options))


@pytest.mark.parametrize("options", [{}, {"path_scale": True, "window": (2, 2)}], ids=str)
def test_gradcheck(options):
    case = make((2, 3), 4, 2, **options)
    check_gradients(case, second=not options)


@pytest.mark.usefixtures("each_device")
def test_the_key_bias_has_no_gradient():
    """A constant over the keys does not pass the softmax."""
    given = make((7, 7)).tensors
    biases = [torch.randn(64, device=given[0].device).requires_grad_() for _ in range(2)]
    y = fused_relative_self_attention(*given[:2], biases[0], given[3], biases[1], *given[5:10], num_heads=2)
    dq_bias, dk_bias = torch.autograd.grad(y, biases, torch.randn_like(y))
    assert dk_bias.abs().max() < 1e-5 * dq_bias.abs().max()


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({0: torch.randn(2, 30, 64)}, {}, ValueError, r"x must have the dimensions \(B, H, W, C\)"),
        ({1: torch.randn(64, 32)}, {}, ValueError, r"q_weight must have shape \(64, 64\)"),
        ({6: torch.randn(32)}, {}, ValueError, r"v_bias must have shape \(64,\)"),
        ({9: torch.randn(3, 5, 5)}, {}, ValueError, r"bias_table must have shape \(2, 5, 5\)"),
        ({}, {"num_heads": 3}, ValueError, "x must have a multiple of num_heads=3 channels, got 64"),
        ({}, {"norm_bias": None}, ValueError, "norm_weight and norm_bias must both be given, or none"),
        ({}, {"norm_weight": torch.ones(32)}, ValueError, r"norm_weight must have shape \(64,\)"),
        ({}, {"path_scale": torch.ones(2)}, ValueError, "gamma and path_scale scale what is added to a residual"),
        (
            {},
            {"residual": torch.ones(2, 5, 6, 64), "path_scale": torch.ones(3)},
            ValueError,
            r"path_scale must have shape \(2,\) \(N\)",
        ),
        ({}, {"residual": torch.ones(2, 5, 6, 32)}, ValueError, r"residual must have the shape of x, \(2, 5, 6, 64\)"),
        ({}, {"eps": -1.0}, ValueError, "eps must be finite"),
        ({}, {"window_size": (7,)}, ValueError, "window_size must be a sequence of 2"),
    ],
    ids=lambda value: "",
)
def test_refusals(change, options, error, message):
    given = make().tensors
    for i, t in change.items():
        given[i] = t
    norms = {"norm_weight": given[10], "norm_bias": given[11]}
    with pytest.raises(error, match=message):
        fused_relative_self_attention(*given[:10], **{"num_heads": 2, **norms, **options})


def test_matches_the_layers():
    case = make((4, 5), window=(2, 3), dtype=torch.float64, path_scale=True)
    x, *products, table, norm_weight, norm_bias, scale, _ = case.tensors
    products[3] = torch.zeros(64, dtype=torch.float64)  # makes no difference
    u = F.layer_norm(x, (64,), norm_weight, norm_bias, 1e-5)
    expected = torch.empty_like(x)
    size = F.interpolate(table[None], (3, 5), mode="bilinear")[0]
    for top in (0, 2):
        for left in (0, 3):
            window = u[:, top : top + 2, left : left + 3]
            h, w = window.shape[1:3]
            q, k, v = (F.linear(window, *products[2 * i : 2 * i + 2]).reshape(2, h * w, 2, 32) for i in range(3))
            logits = torch.einsum("bihd,bjhd->bhij", q, k) * 32**-0.5
            for i in range(h * w):
                for j in range(h * w):
                    logits[:, :, i, j] += size[:, j // w - i // w + 1, j % w - i % w + 2]
            mixed = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).reshape(2, h, w, 64)
            expected[:, top : top + 2, left : left + 3] = F.linear(mixed, *products[6:])
    expected = x + scale.view(-1, 1, 1, 1) * expected
    for backend in ("fused", "reference"):
        torch.testing.assert_close(case.run(case.tensors, backend), expected)
