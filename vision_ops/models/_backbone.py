"""What all backbones share: stages, classifier, maps of features, and what describes a published variant."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops._checks import check_integer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Variant:
    """A published network: its class, constructor arguments, and how it was trained and is fed.

    input_size is (channels, height, width); crop_pct the share of the resized image that evaluation crops; url the
    official weights, None where there are none; drop_path_rate the recipe's, which nothing applies by itself.
    """

    network: type["Backbone"]
    arguments: dict[str, Any]
    url: str | None = None
    drop_path_rate: float = 0.0
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    num_classes: int | None = 1000  # of the official weights; None where it is not published

    def default_cfg(self) -> dict[str, Any]:
        """What timm's users know as `default_cfg`, and `drop_path_rate`."""
        names = "url", "input_size", "crop_pct", "interpolation", "mean", "std", "drop_path_rate", "num_classes"
        network = {"classifier": self.network.classifier, "first_conv": self.network.first_conv}
        return {**{name: getattr(self, name) for name in names}, **network}


class FeatureInfo(list[dict[str, Any]]):
    """A dict per feature map: num_chs, reduction (pixels of the image per pixel of the map) and module."""

    def channels(self) -> list[int]:
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        return [info["module"] for info in self]


class Backbone(nn.Module, ABC):
    """A network of stages with a classifier.

    `forward` gives logits (N, num_classes), with num_classes=0 the pooled features that the classifier would get, and
    with features_only=True a list of the maps (N, C, H, W) of the stages in out_indices.

    A network without a classifier or with features only does not have the modules that it does not need: `unbuilt`
    lists the prefixes of their keys. In place of its classifier, which `classifier` names, any module from
    (N, num_features) to (N, classes) may be set.
    """

    classifier: ClassVar[str]
    first_conv: ClassVar[str]
    head_modules: ClassVar[tuple[str, ...]]  # what stands between the last stage and the logits

    num_features: int
    num_classes: int
    head_init_scale: float = 1.0

    @abstractmethod
    def stage_modules(self, i: int) -> tuple[str, ...]:
        """The names of the modules of stage i, its downsampling included."""

    @abstractmethod
    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Stage i of (N, C, H, W), its downsampling included."""

    @abstractmethod
    def init_module(self, module: nn.Module) -> None:
        """The official initialisation of the weights that one module holds itself."""

    def pool(self, x: Tensor) -> Tensor:
        """What the classifier gets of the last map."""
        return x.mean(dim=(2, 3))

    def new_classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes)

    def finish(
        self,
        stages: Iterable[tuple[int, int]],
        num_classes: int,
        features_only: bool,
        out_indices: Sequence[int] | None,
    ) -> None:
        """Ends a constructor, when all modules but the classifier are there. stages: (channels, reduction) of each."""
        infos: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": reduction, "module": self.stage_modules(i)[-1]}
            for i, (channels, reduction) in enumerate(stages)
        ]
        count = len(infos)
        if out_indices is not None and not features_only:
            raise ValueError("out_indices needs features_only=True")
        if isinstance(out_indices, int):
            raise ValueError(f"out_indices must be a sequence of ints, got {out_indices}")
        wanted = tuple(range(count)) if out_indices is None else tuple(out_indices)
        if not wanted or any(not isinstance(i, int) or not -count <= i < count for i in wanted):
            raise ValueError(f"out_indices must be ints from {-count} to {count - 1}, got {wanted}")
        self.out_indices = tuple(i % count for i in wanted)
        self.features_only, self.grad_checkpointing = features_only, False
        self.num_stages = max(self.out_indices) + 1 if features_only else count
        self.num_features = infos[-1]["num_chs"]
        self.feature_info = FeatureInfo(infos[i] for i in self.out_indices) if features_only else FeatureInfo(infos)
        self.default_cfg: dict[str, Any] = {}  # create_model knows it
        for module in self.modules():
            self.init_module(module)
        unbuilt: list[str] = []
        for i in range(self.num_stages, count):
            unbuilt += self.stage_modules(i)
        if features_only:
            unbuilt += self.head_modules
        for name in unbuilt:
            self._remove(name)
        self.reset_classifier(0 if features_only else num_classes)
        self._unbuilt = tuple(f"{name}." for name in unbuilt)

    def _remove(self, name: str) -> None:
        parent, _, leaf = name.rpartition(".")
        if name != self.classifier:
            delattr(self.get_submodule(parent), leaf)

    @property
    def unbuilt(self) -> tuple[str, ...]:
        """Prefixes of the keys of a whole network of this kind that this one has no modules for."""
        if self.num_classes == 0 and f"{self.classifier}." not in self._unbuilt:
            return (*self._unbuilt, f"{self.classifier}.")
        return self._unbuilt

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier, on the device and in the dtype of the network; 0 classes for none."""
        check_integer("num_classes", num_classes, 0)
        if num_classes and self.features_only:
            raise ValueError("num_classes must be 0: a network with features_only=True has no classifier")
        self.num_classes = num_classes
        like = next(self.parameters())
        new: nn.Module = nn.Identity()
        if num_classes:
            new = self.new_classifier(num_classes).to(like.device, like.dtype)
            self.init_module(new)
        parent, _, leaf = self.classifier.rpartition(".")
        setattr(self.get_submodule(parent), leaf, new)
        self._scale_classifier()

    @torch.no_grad()
    def _scale_classifier(self) -> None:
        """The last step of its initialisation."""
        for parameter in self.get_classifier().parameters():
            parameter.mul_(self.head_init_scale)

    def init_weights(self) -> None:
        """The official first values of all weights and statistics again, as after `to_empty`, which leaves none.

        Raises:
            TypeError: a module has weights of its own and no `reset_parameters`; nothing was changed.
        """
        holders = {
            name: module
            for name, module in self.named_modules()
            if any(True for of in (module.parameters, module.buffers) for _ in of(recurse=False))
        }
        for name, module in holders.items():
            if not hasattr(module, "reset_parameters"):
                raise TypeError(f"{name} ({type(module).__name__}) must have reset_parameters to be initialised again")
        for module in holders.values():
            module.reset_parameters()
            self.init_module(module)
        self._scale_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, C, H, W)."""
        for i in range(self.num_stages):
            x = self.forward_stage(i, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last map; pre_logits stops before the classifier."""
        x = self.pool(x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not self.features_only:
            return self.forward_head(self.forward_features(x))
        maps = []
        for i in range(self.num_stages):
            x = self.forward_stage(i, x)
            maps.append(x)
        return [maps[i] for i in self.out_indices]

    def run_blocks(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes every block again in backward instead of keeping what it saved.

        Batch norms then update their running statistics twice a step.
        """
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone, beside biases and norms."""
        leaves = "temperature", "relative_position_embedding"
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in leaves}


def check_stages(count: int, **sequences: Sequence[Any]) -> None:
    """Refuses arguments that do not have one value per stage."""
    for name, values in sequences.items():
        if len(values) != count:
            raise ValueError(f"{name} must have {count} values, one per stage, got {len(values)}")


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates that grow linearly from 0 in the first block to `rate` in the last, stage by stage."""
    total = sum(depths)
    rates = iter([rate * i / max(total - 1, 1) for i in range(total)])
    return [[next(rates) for _ in range(depth)] for depth in depths]
