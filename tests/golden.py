"""Numbers of the official code, in float64 (tests/goldens), and the comparison of modules and networks with them.

modules/*.npz: input x, output y, cotangent dy, gradient dx, parameters p:<key>, their gradients d:<key>.
models/*.npz: of a network whose parameters are `filled` from their official keys and whose input is `drawn` from its
shape: logits_<shape>, logits_train_<shape> (batch statistics), feat_<shape> (of the map of each stage: sum, sum of
squares, 64 samples), and for each of grad_keys the gradient's norm and its product with a probe (grad_summary).
keys/*.json: the official keys and shapes of a network.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDENS = Path(__file__).parent / "goldens"


def _uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(key.encode())).random_sample(shape) * 2 - 1


def _tensor(values: np.ndarray) -> Tensor:
    """Values that float32 can represent, so that networks of all dtypes have the same parameters."""
    return torch.from_numpy(np.asarray(values, np.float32).astype(np.float64))


def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    """An input, cotangent or probe of unit variance."""
    return _tensor(_uniform(key, tuple(shape)) * 3**0.5)


def filled(key: str, shape: tuple[int, ...]) -> Tensor:
    """The parameter or buffer with this official key, PyTorch's or TensorFlow's."""
    u, leaf, ndim = _uniform(key, tuple(shape)), key.split(".")[-1], len(shape)
    if leaf.endswith(("running_var", "moving_variance")):
        # The gate of MogaNet is quadratic: a larger variance keeps it bounded.
        return _tensor((1 + 0.5 * u) * (4 if ".norm1." in key or ".norm2." in key else 1))
    if leaf == "temperature":
        return _tensor(2 + 0.5 * u)
    if leaf in ("layer_scale_1", "layer_scale_2"):
        return _tensor(0.25 + 0.1 * u)
    if leaf in ("gamma", "gamma1", "gamma2", "gamma3", "gamma_xca", "scale"):
        return _tensor(0.5 + 0.1 * u)
    if (leaf == "weight" and ndim == 1) or leaf.endswith("/gamma"):
        return _tensor(1 + 0.1 * u)
    if ndim <= 1 or leaf.endswith("bias"):
        return _tensor(0.1 * u)
    if any(part in key for part in ("complex_weight", "relative_position", "cls_token")):
        return _tensor(u)
    if "/" in key and "depthwise" in leaf:
        fan = 9
    elif "/" in key:
        fan = shape[0] if ndim == 3 and "/o/" not in leaf else int(np.prod(shape[:-1]))
    else:
        fan = int(np.prod(shape[1:]))
    gain = 2.0 if "pws." in key or "proj_out" in key else 0.01 if "split_attention.mlp1" in key else 1.0
    return _tensor(u * (3 / fan) ** 0.5 * gain)


def official_state(name: str) -> dict[str, Tensor]:
    """The official keys of a network, filled. Counters and indices are no numbers of it."""
    keys = json.loads((GOLDENS / f"keys/{name}.json").read_text())
    integers = "num_batches_tracked", "relative_position_index"
    return {key: filled(key, tuple(shape)) for key, shape in keys if not key.endswith(integers)}


def error(found: Tensor, expected: np.ndarray) -> float:
    """The largest difference over the largest value; over 1 where the expected values vanish analytically."""
    largest = np.abs(expected).max()
    return float((found.detach().double() - torch.from_numpy(expected)).abs().max()) / (
        largest if largest > 1e-9 else 1
    )


def check_module(name: str, module: nn.Module, tolerance: float, args: tuple[int, ...] = ()) -> None:
    """Output and all gradients, in float64, in evaluation mode; through the official keys."""
    data = np.load(GOLDENS / f"modules/{name}.npz")
    state = {key[2:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("p:")}
    missing, unexpected = module.double().eval().load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    x = torch.from_numpy(data["x"]).requires_grad_()
    y = module(x, *args)
    y.backward(torch.from_numpy(data["dy"]))
    found = {"y": y, "dx": x.grad, **{f"d:{key}": p.grad for key, p in module.named_parameters()}}
    assert {key for key in data.files if key.startswith("d:")} == {key for key in found if key.startswith("d:")}
    errors = {key: error(value, data[key]) for key, value in found.items()}
    assert max(errors.values()) <= tolerance, errors


def check_model(
    name: str,
    model: nn.Module,
    tolerance: float,
    *,
    dtype: torch.dtype = torch.float64,
    load: Callable[[nn.Module, dict[str, Tensor]], object] | None = None,
    sizes: int | None = None,
) -> None:
    """Logits of the first `sizes` inputs (all by default) over their standard deviation; in float64 the gradients, too.

    In evaluation and, where there are such numbers, in training mode. `load` fills in the official state where the keys
    are not the official ones; gradients, which have those keys, are then not compared.
    """
    data = np.load(GOLDENS / f"models/{name}.npz")
    model.to(dtype)
    if load is None:
        model.load_state_dict(official_state(name), strict=False)
        assert set(official_state(name)) == {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
    else:
        load(model, official_state(name))
    model.eval()
    shapes = [key[7:] for key in data.files if key.startswith("logits_") and "train" not in key]
    errors = {}

    def logits_error(key: str, shape: str) -> float:
        with torch.no_grad():
            found = model(drawn(f"input{shape}", tuple(map(int, shape.split("x")))).to(dtype))
        return float(np.abs(found.double().numpy() - data[key]).max() / data[key].std())

    for shape in shapes[:sizes]:
        errors[shape] = logits_error(f"logits_{shape}", shape)
    if dtype == torch.float64 and load is None:
        errors["gradients"] = gradient_error(model, data, shapes[0])
    for key in (key for key in data.files if key.startswith("logits_train_")):
        model.train()  # last: it changes the running statistics
        errors[key] = logits_error(key, key.removeprefix("logits_train_"))
    assert max(errors.values()) <= tolerance, errors


def gradient_error(model: nn.Module, data: np.lib.npyio.NpzFile, shape: str) -> float:
    y = model(drawn(f"input{shape}", tuple(map(int, shape.split("x")))))
    y.backward(drawn("dlogits" + "x".join(map(str, y.shape)), y.shape))
    parameters, worst = dict(model.named_parameters()), 0.0
    assert set(parameters) == set(data["grad_keys"])
    for key, (norm, probed) in zip(data["grad_keys"], data["grad_summary"], strict=True):
        gradient = parameters[key].grad
        product = (gradient * drawn(f"probe:{key}", gradient.shape)).sum().item()
        differences = abs(gradient.norm().item() - norm), abs(product - probed) / gradient.numel() ** 0.5
        worst = max(worst, max(differences) / (norm + 1e-8))
    return worst


def check_features(name: str, model: nn.Module, tolerance: float) -> None:
    """The maps that a network with features_only=True returns."""
    data = np.load(GOLDENS / f"models/{name}.npz")
    state = {key: value for key, value in official_state(name).items() if not key.startswith(model.unbuilt)}
    model.double().eval().load_state_dict(state, strict=False)
    for key in (key for key in data.files if key.startswith("feat_")):
        with torch.no_grad():
            maps = model(drawn(f"input{key[5:]}", tuple(map(int, key[5:].split("x")))))
        for found, expected in zip(maps, data[key], strict=True):
            flat = found.contiguous().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            summary = torch.cat([torch.stack([flat.sum(), flat.square().sum()]) / flat.numel(), sample])
            expected = np.concatenate([expected[:2] / flat.numel(), expected[2 : 2 + len(sample)]])
            assert error(summary, expected) <= tolerance
