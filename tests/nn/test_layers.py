"""Blocks obey their layers: whatever is done to one, a block gives what its layers give when they are called."""

import copy
import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize, prune

import vision_ops.nn as vnn
from vision_ops import explain, models, use_backend

IMAGE = 2, 16, 12, 12
BLOCKS = {
    "ConvEncoder": lambda: vnn.ConvEncoder(16, layer_scale_init_value=1.0, kernel_size=5),
    "ConvEncoderBNHS": lambda: vnn.ConvEncoderBNHS(16, layer_scale_init_value=1.0, kernel_size=5),
    "SDTAEncoderBNHS": lambda: vnn.SDTAEncoderBNHS(16, layer_scale_init_value=1.0, scales=3, num_heads=4),
    "SDTAEncoder": lambda: vnn.SDTAEncoder(16, layer_scale_init_value=1.0, scales=3, num_heads=4),
    "HorBlock": lambda: vnn.HorBlock(16, layer_scale_init_value=1.0),
    "GnConv": lambda: vnn.GnConv(16, order=3),
    "GlobalLocalFilter": lambda: vnn.GlobalLocalFilter(16, h=12, w=7),
    "MultiOrderGatedAggregation": lambda: vnn.MultiOrderGatedAggregation(16),
    "ChannelAggregationFFN": lambda: vnn.ChannelAggregationFFN(16, 32),
    "S2Block": lambda: vnn.S2Block(16, 1),
    "MBConv": lambda: vnn.MBConv(16, 16, stride=2),
    "MOATBlock": lambda: vnn.MOATBlock(16, 32, head_dim=16),
}
NETWORKS = {
    "EdgeNeXt": lambda **o: models.EdgeNeXt((1, 2, 2, 2), (16, 32, 48, 64), heads=(4, 4, 4, 4), **o),
    "EdgeNeXt_bn_hs": lambda **o: models.EdgeNeXt((1, 2), (16, 32), global_block=(0, 1), kernel_sizes=(3, 5),
                                                  heads=(4, 4), use_pos_embd_xca=(False, True), d2_scales=(2, 2),
                                                  bn_hs=True, **o),
    "HorNet": lambda **o: models.HorNet((1, 1, 1, 1), 16, **o),
    "HorNet_gf": lambda **o: models.HorNet((1, 1), 32, orders=(2, 3), filters=(None, (8, 5)), **o),
    "MogaNet": lambda **o: models.MogaNet((16, 32, 48, 64), (1, 1, 1, 1), **o),
    "S2MLPv2": lambda **o: models.S2MLPv2((4, 2), (24, 48), (1, 1), **o),
    "MOAT": lambda **o: models.MOAT(16, (32, 32, 64, 64), (1, 1, 1, 1), **o),
}  # fmt: skip
each_block = pytest.mark.parametrize("name", BLOCKS)
each_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def same_numbers():
    torch._dynamo.reset()
    torch.manual_seed(0)


def randomized(module, dtype=torch.float32):
    """With factors, scales and biases that show."""
    with torch.no_grad():
        for key, p in module.named_parameters():
            if p.ndim == 1 or key.rpartition(".")[2] == "scale" or "layer_scale" in key:
                p.uniform_(0.5, 1.0)
    return module.to(dtype).eval()


def unfuse(module):
    for part in module.modules():
        if hasattr(part, "fused"):
            part.fused = False
    return module


def leaves(module, *kinds):
    return [name for name, m in module.named_modules() if not list(m.children()) and (not kinds or type(m) in kinds)]


def replace(module, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


class LowRank(nn.Module):
    """An adapter; what it wraps stays readable, as in PEFT."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        outputs, inputs = base.weight.shape[:2]
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        if isinstance(self.base, nn.Conv2d):
            added = F.conv2d(x, (self.up @ self.down)[:, :, None, None])
        else:
            added = F.linear(x, self.up @ self.down)
        return self.base(x) + 0.1 * added


PRODUCTS = F.linear, F.conv2d  # as they are, not as they are patched


class Squared(torch.Tensor):
    """A weight that layers see squared."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in PRODUCTS:
            return super().__torch_function__(function, types, args, kwargs or {})
        return function(args[0], args[1].as_subclass(torch.Tensor).square(), *args[2:], **(kwargs or {}))


def with_own_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x).square()


def with_own_convolution(layer):
    convolve = layer._conv_forward
    layer._conv_forward = lambda *given: convolve(*given).square()


def squared_weight(layer):
    layer._parameters["weight"] = layer.weight.detach().clone().as_subclass(Squared)


def dilated(layer):
    layer.dilation, layer.padding = (tuple(2 * n for n in pair) for pair in (layer.dilation, layer.padding))


def with_bias(layer):
    layer.bias = nn.Parameter(torch.randn(layer.weight.shape[0], dtype=layer.weight.dtype))


POINTWISE = lambda layer: type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.kernel_size == (1, 1))
DEPTHWISE = lambda layer: type(layer) is nn.Conv2d and layer.groups > 1
WEIGHTED = lambda layer: type(layer) in (nn.Conv2d, nn.Linear)
CHANGES = {
    "forward hook": (lambda layer: True, lambda m: m.register_forward_hook(lambda m, x, y: y.square())),
    "forward pre-hook": (lambda layer: True, lambda m: m.register_forward_pre_hook(lambda m, x: (x[0].square(),))),
    "forward": (lambda layer: True, with_own_forward),
    "what forward calls": (lambda layer: isinstance(layer, nn.Conv2d), with_own_convolution),
    "subclass": (WEIGHTED, lambda m: setattr(m, "__class__", type("Square", (type(m),), {
        "forward": lambda self, x: super(type(self), self).forward(x).square()}))),
    "tensor subclass": (WEIGHTED, squared_weight),
    "dilation": (lambda m: DEPTHWISE(m) and m.padding != (0, 0), dilated),
    "padding_mode": (lambda m: DEPTHWISE(m) and m.padding != (0, 0), lambda m: setattr(m, "padding_mode", "circular")),
    "no bias": (lambda m: WEIGHTED(m) and m.bias is not None, lambda m: setattr(m, "bias", None)),
    "a bias": (lambda m: WEIGHTED(m) and m.bias is None, with_bias),
    "spectral norm": (WEIGHTED, parametrizations.spectral_norm),
    "old spectral norm": (WEIGHTED, nn.utils.spectral_norm),
    "pruned": (WEIGHTED, lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "eps": (lambda m: type(m) is nn.LayerNorm, lambda m: setattr(m, "eps", 1.0)),
    "no affine": (lambda m: type(m) is nn.LayerNorm, lambda m: setattr(m, "bias", None)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@each_block
def test_a_change_of_any_layer_counts(name, change):
    applies, apply = CHANGES[change]
    original, x = randomized(BLOCKS[name](), torch.float64), torch.randn(IMAGE, dtype=torch.float64)
    before, effects = original(x), []
    for leaf in leaves(original):
        if not applies(original.get_submodule(leaf)):
            continue
        block = copy.deepcopy(original)
        apply(block.get_submodule(leaf))
        block.eval()
        with torch.no_grad():
            found, expected = block(x), unfuse(block)(x)
        assert torch.allclose(found, expected, atol=1e-10), leaf
        effects.append(not torch.allclose(found, before, atol=1e-7))
    # Not all show: what is a constant over keys does not pass a softmax.
    assert sum(effects) >= 0.75 * len(effects)


@each_block
def test_adapters_have_an_effect_and_a_gradient(name):
    block, x = randomized(BLOCKS[name]()), torch.randn(IMAGE)
    adapted, merged = copy.deepcopy(block), copy.deepcopy(block)
    for leaf in leaves(block):
        if POINTWISE(block.get_submodule(leaf)):
            adapter = LowRank(adapted.get_submodule(leaf))
            replace(adapted, leaf, adapter)
            weight = merged.get_submodule(leaf).weight
            weight.data += 0.1 * (adapter.up @ adapter.down).detach().reshape(weight.shape)
    torch.testing.assert_close(adapted(x), merged(x), atol=1e-3, rtol=1e-3)
    adapted(x).square().sum().backward()
    adapters = [m for m in adapted.modules() if isinstance(m, LowRank)]
    assert adapters or name == "GlobalLocalFilter"
    assert all(m.up.grad.abs().max() > 0 for m in adapters)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@each_block
def test_backward_hooks_run(name, kind):
    block, x = randomized(BLOCKS[name]()), torch.randn(IMAGE, requires_grad=True)
    expected = copy.deepcopy(block)
    expected(x).sum().backward()
    wanted, x.grad = x.grad, None
    called = []
    for leaf in leaves(block):
        getattr(block.get_submodule(leaf), kind)(lambda *_, leaf=leaf: called.append(leaf))
    block(x).sum().backward()
    assert set(called) == set(leaves(block))
    torch.testing.assert_close(x.grad, wanted, atol=1e-4, rtol=1e-4)


@each_block
def test_hooks_of_all_modules_run(name):
    block, called = randomized(BLOCKS[name]()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: called.append(m))
    try:
        block(torch.randn(IMAGE))
        with use_backend("fused"), pytest.raises(ValueError, match="there are hooks for all modules"):
            block(torch.randn(IMAGE))
    finally:
        handle.remove()
    assert {id(block.get_submodule(leaf)) for leaf in leaves(block)} <= {id(m) for m in called}


@each_network
def test_unfused_networks_call_every_module(name):
    """Containers too: features are often taken by hooks on stages. Dropouts and drop paths serve twice."""
    network = NETWORKS[name](num_classes=5, fused=False).eval()
    calls = {}
    for key, module in network.named_modules():
        if not isinstance(module, nn.ModuleList):
            calls[key] = 0
            module.register_forward_hook(lambda *_, key=key: calls.update({key: calls[key] + 1}))
    network(torch.randn(1, 3, 64, 64))
    assert not [key for key, n in calls.items() if n != 1 + (n == 2 and "drop" in key)]


@each_network
def test_symbolic_trace(name):
    """Whether fused or not: a trace holds the layers. Sizes stay open."""
    network = randomized(NETWORKS[name](num_classes=5))
    plain = torch.fx.symbolic_trace(unfuse(copy.deepcopy(network)))
    layers = {node.target for node in plain.graph.nodes if node.op == "call_module"}
    assert {key for key, m in network.named_modules() if type(m) in (nn.Conv2d, nn.Linear)} <= layers
    traced = torch.fx.symbolic_trace(network)
    for size in ((64, 64), (32, 64)):
        x = torch.randn(1, 3, *size)
        expected = network(x)
        torch.testing.assert_close(plain(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(traced(x), expected, atol=1e-4, rtol=1e-4)


@each_network
def test_weights_that_hooks_fetch(name):
    """Offloading: parameters are on meta unless their module runs."""
    network, x = randomized(NETWORKS[name](num_classes=5)), torch.randn(1, 3, 64, 64)
    expected = network(x)
    for module in network.modules():
        kept = dict(module._parameters)
        if not any(p is not None for p in kept.values()):
            continue

        def put(module, *_, kept=kept, away=True):
            for key, p in kept.items():
                if p is not None:
                    module._parameters[key] = nn.Parameter(p.detach().to("meta")) if away else p

        put(module)
        module.register_forward_pre_hook(partial(put, away=False))
        module.register_forward_hook(lambda module, x, y, put=put: put(module))
    torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@each_network
def test_dynamically_quantized_networks(name):
    network, x = randomized(NETWORKS[name](num_classes=5)), torch.randn(1, 3, 64, 64)
    quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
    with torch.no_grad():
        found, expected = quantized(x), network(x)
    assert not torch.equal(found, expected) and (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_train(norm):
    block = vnn.XCA(16, 4)
    norm(block.qkv)
    x = torch.randn(2, 12, 16)
    block(x).square().sum().backward()
    originals = [p for key, p in block.qkv.named_parameters() if "parametrizations" in key]
    assert originals and all(p.grad.abs().max() > 0 for p in originals)
    parametrize.remove_parametrizations(block.qkv, "weight")
    assert explain(block, x).cannot == []


def test_a_layer_that_does_not_fit_is_refused_as_pytorch_does():
    block = vnn.ConvEncoder(16)
    block.dwconv.stride = (2, 2)
    with pytest.raises(RuntimeError, match="must match the size"):
        block(torch.randn(IMAGE))


def test_a_class_whose_forward_is_replaced(monkeypatch):
    block, x = randomized(vnn.ConvEncoder(16)), torch.randn(IMAGE)
    before, forward = block(x), nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * forward(self, x) + 1)
    assert not torch.allclose(block(x), before)
    assert explain(block, x).cannot == ["dwconv has a forward of its own"]


def test_dropout_is_active_where_it_says_so():
    """Monte Carlo dropout sets the dropout alone to training."""
    block, x = vnn.XCA(16, 4, attn_drop=0.5).eval(), torch.randn(2, 12, 16)
    assert torch.equal(block(x), block(x))
    block.attn_drop.train()
    assert not torch.equal(block(x), block(x))
    with use_backend("fused"):
        block(x)
    assert explain(block, x).cannot == ["attn_drop is active"]


def test_one_part_unfused():
    block, x = vnn.MultiOrderGatedAggregation(16), torch.randn(IMAGE)
    block.value.fused = False
    called = []
    block.value.DW_conv1.register_forward_hook(lambda *_: called.append(1))
    block(x)
    assert called == [1] and explain(block, x).cannot[0] == "value.fused is False, not True"


def test_explain_names_the_layer():
    block, x = vnn.XCA(16, 4), torch.randn(2, 12, 16)
    assert explain(block, x).parts == {"XCA (qkv, attn_drop, proj)": "fused_xca"} and explain(block, x).cannot == []
    block.qkv.register_forward_hook(lambda *_: None)
    block.proj = LowRank(block.proj)
    found = explain(block, x)
    assert found.cannot == ["qkv has hooks", "proj is a LowRank, not a Linear"]
    assert found.parts == {"XCA (attn_drop)": "fused_cross_covariance", "XCA (qkv, proj)": "their own forward"}
    assert str(found).splitlines()[-1] == "  the fused kernel cannot run: proj is a LowRank, not a Linear"
    with use_backend("fused"):
        assert explain(block, x).parts["XCA (qkv, proj)"] == "nothing: a ValueError"
        with pytest.raises(ValueError, match=r"fused_xca is not what the layers of XCA compute: qkv has hooks; proj"):
            block(x)
    with use_backend("reference"):
        assert explain(block, x).parts["XCA (attn_drop)"] == "PyTorch"
    assert explain(vnn.XCA(16, 4, fused=False), x).cannot == ["fused=False"]


def test_explain_goes_through_networks():
    network, x = NETWORKS["EdgeNeXt"](), torch.randn(1, 3, 64, 64)
    assert explain(network, x).cannot == []
    block = network.stages[0][0]
    block.dwconv.dilation = (2, 2)
    block.norm.to("meta")
    found = explain(network, x)
    assert found.op == "EdgeNeXt" and found.parts["stages.0.0 (dwconv, norm)"] == "their own forward"
    assert found.cannot == [
        "stages.0.0.dwconv.dilation is (2, 2), not (1, 1)",
        "stages.0.0.norm.weight is on meta, x on cpu",
    ]
    assert "fused_gnconv" in explain(NETWORKS["HorNet"](), x).parts.values()
    with torch.device("meta"):
        network, x = NETWORKS["EdgeNeXt"](), torch.randn(1, 3, 64, 64)
    assert explain(network, x).cannot == [] and network(x).is_meta


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "mlp1", nn.Linear(16, 32)), "mlp1.weight has shape (32, 16), not (48, 16)"),
        (lambda m: setattr(m.mlp1, "weight", None), "mlp1.weight is missing"),
        (lambda m: setattr(m, "mlp1", None), "mlp1 is missing"),
        (lambda m: with_bias(m.split_attention.mlp2), "split_attention.mlp2.bias is one too many"),
        (lambda m: squared_weight(m.mlp2), "mlp2.weight is a Squared"),
        (lambda m: setattr(m, "mlp1", torch.ao.nn.qat.Linear(16, 48, qconfig=torch.ao.quantization.default_qconfig)),
         "mlp1 is a torch.ao.nn.qat.modules.linear.Linear, not a Linear"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reasons(change, reason):
    module = vnn.S2Attention(16)
    change(module)
    assert explain(module, torch.randn(1, 4, 4, 16)).cannot == [reason]


def test_weights_as_plain_attributes():
    """As replicas of DataParallel have them, and functional_call puts tensors in the place of parameters."""
    block, x = vnn.XCA(16, 4), torch.randn(2, 12, 16)
    weights = {key: 2 * p.detach() for key, p in block.named_parameters()}
    expected = copy.deepcopy(block)
    expected.load_state_dict(weights)
    with use_backend("fused"):
        torch.testing.assert_close(torch.func.functional_call(block, weights, x), expected(x))
        del block.qkv.weight
        block.qkv.weight = weights["qkv.weight"]
        assert not torch.allclose(block(x), expected(x))
        block.load_state_dict({key: t for key, t in weights.items() if key != "qkv.weight"})
        torch.testing.assert_close(block(x), expected(x))


def test_distributed_tensors():
    distributed = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        block, x = vnn.XCA(16, 4), torch.randn(2, 12, 16)
        expected = block(x)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        distributed.distribute_module(block, mesh)
        x = distributed.distribute_tensor(x, mesh)
        torch.testing.assert_close(block(x).full_tensor(), expected)
        assert explain(block, x).cannot == ["temperature is a DTensor"]
    finally:
        torch.distributed.destroy_process_group()


def test_modules_loaded_where_none_was_made(tmp_path):
    block, x = vnn.MogaBlock(16).eval(), torch.randn(IMAGE)
    torch.save((block, x, block(x)), tmp_path / "block.pt")
    code = "import sys, torch; m, x, y = torch.load(sys.argv[1], weights_only=False); assert torch.allclose(m(x), y)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "block.pt"], check=True)


PATCHED_BEFORE = """
import torch
from torch import nn
forward = {kind}.{method}
{kind}.{method} = lambda self, *given: forward(self, *given).square()  # which no norm undoes
import vision_ops
block, x = vision_ops.nn.ConvEncoder(16, layer_scale_init_value=1.0), torch.randn(1, 16, 7, 7)
y = block(x)
block.fused = False
assert torch.allclose(y, block(x), atol=1e-5)
"""


@pytest.mark.parametrize(("kind", "method"), [("nn.LayerNorm", "forward"), ("nn.Conv2d", "_conv_forward")])
def test_classes_patched_before_the_import(kind, method):
    subprocess.run([sys.executable, "-c", PATCHED_BEFORE.format(kind=kind, method=method)], check=True)


COMPILED = "ConvEncoder", "GnConv", "MultiOrderGatedAggregation", "S2Block", "MBConv"


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_once(name, hooked):
    """Without a graph break, and once for all blocks of a kind; hooks that were there are in the graph."""
    original, x = randomized(BLOCKS[name]()), torch.randn(IMAGE)
    counter, ops = CompileCounter(), []

    def backend(graph, inputs):
        ops.extend(node for node in graph.graph.nodes if "vision_ops" in str(node.target))
        return counter(graph, inputs)

    blocks = [copy.deepcopy(original) for _ in range(2)]
    for block in blocks:
        if hooked:
            for leaf in leaves(block, nn.Conv2d, nn.Linear):
                block.get_submodule(leaf).register_forward_hook(lambda m, x, y: 2 * y)
    expected = [block(x) for block in blocks]
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    for block, y in itertools.chain(*[zip(blocks, expected, strict=True)] * 2):
        torch.testing.assert_close(block(x), y, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1
    parts = {"MultiOrderGatedAggregation"}  # no hook on its ElementScale
    assert bool(ops) == (not hooked or name in parts)


@pytest.mark.parametrize(("name", "count"), [("ConvEncoder", 2), ("MultiOrderGatedAggregation", 1)])
def test_exported_graphs_hold_the_ops(name, count):
    """Their tensors are fake ones, which stand for plain tensors."""
    block, x = randomized(BLOCKS[name]()), torch.randn(IMAGE)
    for strict in (False, True):
        exported = torch.export.export(block, (x,), strict=strict)
        assert sum("vision_ops" in str(node.target) for node in exported.graph.nodes) == count
    for layer in leaves(block, nn.Conv2d):
        block.get_submodule(layer).register_forward_hook(lambda m, x, y: 2 * y)
    exported = torch.export.export(block, (x,))
    torch.testing.assert_close(exported.module()(x), block(x), atol=1e-4, rtol=1e-4)
