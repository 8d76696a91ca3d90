"""What all backbones share: stages, classifier, maps of features, and what describes a published variant."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn._blocks import Blocks
from ..ops._checks import check_integer
from .feature_info import FeatureInfo

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
    reduction: int = 32  # of the last map

    def pretrained_cfg(self, name: str) -> dict[str, Any]:
        """What timm's users know as `pretrained_cfg`, and `drop_path_rate`."""
        names = "url", "input_size", "crop_pct", "interpolation", "mean", "std", "drop_path_rate", "num_classes"
        return {
            **{field: getattr(self, field) for field in names},
            "architecture": name,
            "pool_size": tuple(side // self.reduction for side in self.input_size[1:]),
            "crop_mode": "center",
            "classifier": self.network.classifier,
            "first_conv": self.network.first_conv,
        }


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
    global_pool: str = "avg"
    head_init_scale: float = 1.0

    @abstractmethod
    def stage_modules(self, i: int) -> tuple[str, ...]:
        """The names of the modules of stage i, its downsampling included."""

    @abstractmethod
    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Stage i of (N, C, H, W), its downsampling included."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's tools group parameters by depth: patterns of the stem's keys and of the blocks'.

        coarse: by stage instead of by block. What no pattern matches is the head.
        """

    @abstractmethod
    def init_module(self, module: nn.Module) -> None:
        """The official initialisation of the weights that one module holds itself."""

    def pool(self, x: Tensor) -> Tensor:
        """What the classifier gets of the last map."""
        return x.mean(dim=(2, 3))

    def norm_last_map(self, x: Tensor) -> Tensor:
        """The network's last norm where it is one of maps, not of what was pooled."""
        return x

    def classify(self, x: Tensor) -> Tensor:
        return self.get_classifier()(x)

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
        self.features_only = features_only
        self.num_stages = max(self.out_indices) + 1 if features_only else count
        self.num_features = self.head_hidden_size = infos[-1]["num_chs"]
        self.in_chans = self.get_submodule(self.first_conv).in_channels
        self.feature_info = FeatureInfo(infos, self.out_indices)
        # create_model knows more.
        self.pretrained_cfg: dict[str, Any] = {"classifier": self.classifier, "first_conv": self.first_conv}
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

    @property
    def default_cfg(self) -> dict[str, Any]:
        """An older name of `pretrained_cfg`."""
        return self.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, on the device and in the dtype of the network; 0 classes for none.

        global_pool: "avg", or "" for none, which needs 0 classes: the network then returns its last map; None for what
        it was.
        """
        check_integer("num_classes", num_classes, 0)
        if num_classes and self.features_only:
            raise ValueError("num_classes must be 0: a network with features_only=True has no classifier")
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool != "avg" and (global_pool or num_classes):
            raise ValueError(f'global_pool must be "avg", or "" with num_classes=0, got {global_pool!r}')
        self.global_pool = global_pool
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
        if not self.global_pool:
            return self.norm_last_map(x)
        x = self.pool(x)
        return x if pre_logits else self.classify(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not self.features_only:
            return self.forward_head(self.forward_features(x))
        maps = []
        for i in range(self.num_stages):
            x = self.forward_stage(i, x)
            maps.append(x)
        return [maps[i] for i in self.out_indices]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map, as `forward_features` gives it, and the maps of some stages.

        Args:
            x: images.
            indices: the stages, of which negative ones count from the last; n for the last n; None for all.
            norm: apply the network's last norm to the last stage's map, where it is one of maps.
            stop_early: compute no stage behind the last one wanted, whose map is then the first result.
            output_fmt: only "NCHW".
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, maps = self._stages_of(indices), []
        for i in range(max(taken) + 1 if stop_early else self.num_stages):
            x = self.forward_stage(i, x)
            if i in taken:
                last = i == len(self.feature_info.info) - 1 and not self.features_only
                maps.append(self.norm_last_map(x) if norm and last else x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what `forward_intermediates` does not need for these stages, and returns their numbers.

        indices: as there. prune_norm: the last norm, too; prune_head: the classifier and the pooling. Both go in any
        case if the last stage does.
        """
        if self.features_only:
            raise ValueError("a network with features_only=True has only the stages that its out_indices need")
        taken = self._stages_of(indices)
        ends = max(taken) + 1
        shorter = ends < self.num_stages
        unbuilt = [name for i in range(ends, self.num_stages) for name in self.stage_modules(i)]
        for name in unbuilt:
            self._remove(name)
        self.num_stages, self.num_features = ends, self.feature_info.info[ends - 1]["num_chs"]
        self.head_hidden_size = self.num_features
        if prune_norm or shorter:
            for name in set(self.head_modules) - {self.classifier}:
                setattr(self, name, nn.Identity())
                unbuilt.append(name)
        self._unbuilt += tuple(f"{name}." for name in unbuilt)
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    def _stages_of(self, indices: int | Sequence[int] | None) -> list[int]:
        count = self.num_stages
        if indices is None:
            indices = count
        wanted = range(-indices, 0) if isinstance(indices, int) else indices
        if not wanted or any(not isinstance(i, int) or not -count <= i < count for i in wanted):
            raise ValueError(f"indices must be 1 to {count}, or ints from {-count} to {count - 1}, got {indices}")
        return [i % count for i in wanted]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes every block again in backward instead of keeping what it saved.

        Batch norms then update their running statistics twice a step.
        """
        for module in self.modules():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone, beside biases and norms."""
        leaves = "temperature", "relative_position_embedding", "relative_position_bias_table"
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
