"""The article's MOAT beside its golden numbers: other sizes, windows, checkpoints, refusals."""

import pytest
import torch
import torch.nn.functional as F

from vision_ops.models import create_model, load_checkpoint

DEPTHS = 1, 2, 2, 1


def article(**options):
    return create_model("tiny_moat_0_article", **{"num_classes": 10, "depths": DEPTHS, "img_size": 64, **options})


def described(state, x, window):
    """The network as the article describes it, in evaluation mode, layer by layer from a state dict."""

    gelu = F.gelu

    def conv(key, x, **options):
        return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), **options)

    def norm(key, x):
        mean, var, weight, bias = (state[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        y = (x.movedim(1, -1) - mean) / (var + 1e-5).sqrt() * weight + bias
        return y.movedim(-1, 1)

    def mbconv(key, x):
        downscale = f"{key}.skip_path.1.weight" in state
        y = norm(f"{key}.main_path.0", x)
        y = conv(f"{key}.main_path.1.conv_dw", y, padding=1, stride=2 if downscale else 1, groups=y.shape[1])
        y = norm(f"{key}.main_path.1.bn2", conv(f"{key}.main_path.1.conv_pw", gelu(norm(f"{key}.main_path.1.bn1", y))))
        if f"{key}.main_path.2.conv_reduce.weight" in state:
            hidden = conv(f"{key}.main_path.2.conv_reduce", F.adaptive_avg_pool2d(y, 1)).relu()
            y = y * conv(f"{key}.main_path.2.conv_expand", hidden).sigmoid()
        y = conv(f"{key}.main_path.3", y)
        return y + (conv(f"{key}.skip_path.1", F.max_pool2d(x, 2)) if downscale else x)

    def attention(key, tokens, height, width):
        table, heads = state[f"{key}.relative_position_bias_table"], tokens.shape[-1] // 32
        places = [(i, j) for i in range(height) for j in range(width)]
        index = [[(a - c + height - 1) * (2 * width - 1) + b - d + width - 1 for c, d in places] for a, b in places]
        bias = table[torch.tensor(index)].permute(2, 0, 1)
        qkv = F.linear(tokens, state[f"{key}.qkv_mapping.weight"], state[f"{key}.qkv_mapping.bias"])
        q, k, v = (t.unflatten(-1, (heads, 32)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        y = ((q @ k.mT / 32**0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.linear(y, state[f"{key}.proj.weight"], state[f"{key}.proj.bias"])

    def attend(key, x):
        height, width = window or x.shape[2:]
        y = x.clone()
        for i in range(0, x.shape[2], height):
            for j in range(0, x.shape[3], width):
                patch = x[:, :, i : i + height, j : j + width]
                tokens = patch.flatten(2).mT
                weight, bias = state[f"{key}.norm_1.weight"], state[f"{key}.norm_1.bias"]
                tokens = attention(f"{key}.attention", F.layer_norm(tokens, weight.shape, weight, bias), height, width)
                y[:, :, i : i + height, j : j + width] = patch + tokens.mT.unflatten(2, patch.shape[2:])
        return y

    x = gelu(conv("stem.2", gelu(conv("stem.0", x, stride=2, padding=1)), padding=1))
    for stage, depth in zip(("MBConv1", "MBConv2", "MOAT1", "MOAT2"), DEPTHS, strict=True):
        for j in range(depth):
            if stage.startswith("MBConv"):
                x = mbconv(f"{stage}.{j}", x)
            else:
                x = attend(f"{stage}.{j}.moat_attention", mbconv(f"{stage}.{j}.mb_conv", x))
    return F.linear(x.mean(dim=(2, 3)), state["head.weight"], state["head.bias"])


def shaken(model):
    """Weights, statistics and tables that show."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) - 0.3, alpha=0.2)
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("img_size", "window_size", "image"),
    [
        ((96, 64), None, (96, 64)),
        (64, 2, (64, 128)),
        ((64, 96), (2, 3), (64, 192)),
        (224, 7, (224, 224)),
    ],
)
def test_sizes_and_windows(img_size, window_size, image, fused):
    model = shaken(article(img_size=img_size, window_size=window_size, fused=fused).double()).eval()
    x = torch.randn(2, 3, *image, dtype=torch.float64)
    window = (window_size, window_size) if isinstance(window_size, int) else window_size
    with torch.no_grad():
        torch.testing.assert_close(model(x), described(model.state_dict(), x, window), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"img_size": 64}, (49, 9)),
        ({"img_size": (96, 64)}, (77, 15)),
        ({"img_size": 224}, (729, 169)),
        ({"img_size": 224, "window_size": 7}, (169, 169)),
    ],
)
def test_tables_are_tied_to_the_size(options, rows):
    state = article(**options).state_dict()
    for stage, n, heads in (("MOAT1", rows[0], 4), ("MOAT2", rows[1], 8)):
        assert state[f"{stage}.0.moat_attention.attention.relative_position_bias_table"].shape == (n, heads)


def test_tiny_3_has_the_stem_of_tiny_2():
    model = create_model("tiny_moat_3_article", depths=(1, 1, 1, 1), img_size=32)
    assert model.stem[2].out_channels == 56 and model.num_features == 640


def test_refusals():
    for options, message in (
        ({"img_size": (64, 60)}, r"img_size must be multiples of \(32, 32\), got \(64, 60\)"),
        (
            {"img_size": 256, "window_size": 7},
            r"img_size with window_size=\(7, 7\) must be multiples of \(224, 224\), got \(256, 256\)",
        ),
        ({"img_size": 64.0}, r"img_size must be an int or \(height, width\), got 64\.0"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"dims": (32, 64, 100, 200)}, "dims of the last two stages must be multiples of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            article(**options)
    with pytest.raises(ValueError, match=r"height and width of x must be \(64, 64\), got \(64, 96\)"):
        article()(torch.randn(1, 3, 64, 96))
    with pytest.raises(ValueError, match=r"height and width of x must be \(64, 64\), got \(64,\)"):
        article()(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match=r"height and width of x must be multiples of \(64, 64\), got \(64, 96\)"):
        article(window_size=2)(torch.randn(1, 3, 64, 96))


def test_checkpoints_of_the_article(tmp_path):
    """As its training leaves them: wrapped, with the index of every table."""
    model = shaken(article(img_size=(96, 64)))
    state, index = model.state_dict(), torch.zeros(24, 24, dtype=torch.int64)
    indices = {
        key.replace("bias_table", "index"): index for key in state if key.endswith("relative_position_bias_table")
    }
    assert len(indices) == 3
    torch.save({"model": {f"module.{key}": t for key, t in (state | indices).items()}, "epoch": 3}, tmp_path / "a.pth")
    other = article(img_size=(96, 64))
    loaded = load_checkpoint(other, tmp_path / "a.pth")
    assert loaded.layout == "official" and set(loaded.left_out) == {f"module.{key}" for key in indices}
    plain = article(img_size=(96, 64))
    plain.load_state_dict(state | indices)
    for twin in (other, plain):
        assert all(torch.equal(t, state[key]) for key, t in twin.state_dict().items())

    table = r"MOAT1\.0\.moat_attention\.attention\.relative_position_bias_table is \(77, 4\), must be \(49, 4\)"
    with pytest.raises(ValueError, match=table):
        load_checkpoint(article(), state)


def test_first_values():
    attention = article(img_size=224).MOAT1[0].moat_attention.attention
    table = attention.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        table.zero_()
    attention.reset_parameters()
    assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_whole_maps_compile_and_export():
    """Of one size, and any number of images."""
    model, x = shaken(article(depths=(1, 1, 1, 1))).eval(), torch.randn(2, 3, 64, 64)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for y in (x, torch.randn(3, 3, 64, 64)):
            torch.testing.assert_close(exported(y), model(y))
            torch.testing.assert_close(compiled(y), model(y))


@pytest.mark.parametrize("window_size", [None, 2])
def test_unfused_traces_with_fx(window_size):
    model = shaken(article(window_size=window_size, fused=False)).eval()
    traced, x = torch.fx.symbolic_trace(model), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(ValueError, match="height and width of x must be"):
        traced(torch.randn(1, 3, 64, 96))
