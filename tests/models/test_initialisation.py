"""First values of weights, again: of networks that were made without memory, and module by module, as FSDP does it."""

import pytest
import torch
from checkpoints import SMALL, small
from torch import nn

OPTIONS = {
    **{network: (network, {}) for network in SMALL},
    "EdgeNeXt with batch norm": ("EdgeNeXt", {"bn_hs": True}),
    "MogaNet with LayerNorm2d": ("MogaNet", {"conv_norm_type": "LN2d", "stem_norm_type": "GN"}),
    "HorNet with other factors": ("HorNet", {"layer_scale_init_value": 0.5, "head_init_scale": 0.01}),
    "EdgeNeXt without factors": ("EdgeNeXt", {"layer_scale_init_value": 0}),
}


@pytest.fixture(params=OPTIONS)
def network(request):
    name, options = OPTIONS[request.param]
    return lambda: small(name, **options)


def emptied(make):
    """The network as `to_empty` may leave it: every number may be anything."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    return model


def assert_first_values(model, fresh, spread=True):
    for key, expected in fresh.state_dict().items():
        found = model.state_dict()[key]
        if expected.numel() == 1 or (expected == expected.flatten()[0]).all():
            assert torch.equal(found, expected), key
        else:
            assert found.isfinite().all() and not torch.equal(found, expected), key
            if spread and expected.numel() > 200:
                assert found.std().item() == pytest.approx(expected.std().item(), rel=0.3), key


def test_init_weights_after_to_empty(network):
    fresh, model = network(), emptied(network)
    model.init_weights()
    assert_first_values(model, fresh)


def test_every_module_resets_what_it_holds_itself(network):
    """PyTorch's layers then have PyTorch's first values."""
    fresh, model = network(), emptied(network)
    tensors = model.state_dict(keep_vars=True)
    for name, module in model.named_modules():
        held = {id(t) for of in (module.parameters, module.buffers) for t in of(recurse=False)}
        if held:
            before = {key: t._version for key, t in tensors.items()}
            module.reset_parameters()
            changed = {id(t) for key, t in tensors.items() if t._version != before[key]}
            assert changed == held, name
    for key, t in model.state_dict().items():
        assert t.isfinite().all(), key
        leaf = key.rpartition(".")[2]
        if leaf.startswith(("gamma", "layer_scale", "temperature", "scale")):
            assert torch.equal(t, fresh.state_dict()[key]), key


def test_init_weights_names_what_cannot_be_initialised():
    model = small("MOAT")
    model.logits_head = nn.Sequential(nn.Linear(128, 3, bias=False), nn.ParameterList([torch.ones(2)]))
    before = model.conv_0.weight.clone()
    with pytest.raises(TypeError, match=r"logits_head\.1 \(ParameterList\) must have reset_parameters"):
        model.init_weights()
    assert torch.equal(model.conv_0.weight, before)


@pytest.mark.parametrize("network", SMALL)
def test_init_weights_of_an_own_classifier(network):
    model = small(network)
    parent, _, leaf = model.classifier.rpartition(".")
    linear = nn.Linear(model.num_features, 3, bias=False)
    setattr(model.get_submodule(parent), leaf, nn.Sequential(nn.Dropout(0.2), linear))
    nn.init.constant_(linear.weight, 9)
    model.init_weights()
    assert 0 < linear.weight.std() < 1
