import pytest
import torch
from golden import GOLDENS, check_features, check_model

from vision_ops import models

MODELS = {
    "edgenext_small": {},
    "edgenext_xx_small": {},
    "edgenext_xx_small_bn_hs": {},
    "hornet_tiny_7x7": {},
    "hornet_tiny_gf": {},
    "moganet_xtiny": {},
    "moganet_xtiny_forcefp32": {"name": "moganet_xtiny", "attn_force_fp32": True},
    "rk_tiny_moat_0_64x64": {"name": "tiny_moat_0_article", "img_size": 64},
    "s2mlpv2_small_7": {"reduction": 1},
}
# The keys of MOAT are TensorFlow's names: see test_checkpoint.py.
OTHERS = {"moat_official_tiny_moat0"}


def build(name, **options):
    return models.create_model(**{"name": name, **MODELS[name], **options})


def test_every_golden_is_used():
    assert set(MODELS) | OTHERS == {path.stem for path in (GOLDENS / "models").glob("*.npz")}


@pytest.mark.parametrize("name", MODELS)
def test_golden_float64(name):
    """Logits at every size, in training mode too, and the gradients of all parameters."""
    check_model(name, build(name), 1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_golden_float64_unfused(name):
    check_model(name, build(name, fused=False), 1e-11, sizes=1)


@pytest.mark.parametrize("name", MODELS)
def test_golden_float32(name):
    check_model(name, build(name), 1e-5, dtype=torch.float32)


@pytest.mark.parametrize(
    "name", ["edgenext_xx_small_bn_hs", "hornet_tiny_7x7", "moganet_xtiny", "rk_tiny_moat_0_64x64", "s2mlpv2_small_7"]
)
def test_golden_features(name):
    check_features(name, build(name, features_only=True), 1e-12)
