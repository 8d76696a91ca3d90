"""What a network tells about its maps of features, as timm's tools read it."""

from collections.abc import Sequence
from typing import Any


class FeatureInfo(list[dict[str, Any]]):
    """A dict per returned map: num_chs, reduction (pixels of the image per pixel of the map), module and index.

    Attributes:
        info: the same of all stages.
        out_indices: the stages of the returned maps.

    Without idx, methods tell of the returned maps; with a stage, or several, of these.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = [{**stage, "index": i} for i, stage in enumerate(info)]
        self.out_indices = tuple(out_indices)
        super().__init__(self.info[i] for i in self.out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """The dicts themselves, or of each what is under some keys."""
        if isinstance(idx, int):
            return self.info[idx] if keys is None else {key: self.info[idx][key] for key in keys}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)
