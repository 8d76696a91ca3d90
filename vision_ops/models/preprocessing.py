"""From pictures to what a network takes, in the way that its weights were evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._backbone import Backbone

_PIL_FILTERS = {"bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class Preprocess:
    """Resizes a picture's shorter side to floor(size / crop_pct), crops its centre and normalises it.

    Called with a PIL image, which is resized by PIL, a uint8 tensor (3, H, W) or (N, 3, H, W), which is resized on its
    device with antialiasing, or a sequence of such pictures; gives float32 (N, 3, size, size). The values are those of
    timm's evaluation transform.
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pictures: Any) -> Tensor:
        if not isinstance(pictures, (list, tuple)):
            pictures = [pictures]
        if not pictures:
            raise ValueError("pictures must not be empty")
        batch = torch.cat([self._cropped(picture) for picture in pictures]).float() / 255
        mean, std = (batch.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (batch - mean) / std

    def _cropped(self, picture: Any) -> Tensor:
        """(N, 3, size, size), uint8."""
        if isinstance(picture, Tensor):
            if picture.dtype != torch.uint8 or picture.ndim not in (3, 4) or picture.shape[-3] != 3:
                raise ValueError(
                    "a tensor of pictures must be uint8, (3, H, W) or (N, 3, H, W), got "
                    f"{str(picture.dtype).removeprefix('torch.')} {tuple(picture.shape)}"
                )
            pixels = picture if picture.ndim == 4 else picture[None]
            if not pixels.numel():
                raise ValueError(f"a tensor of pictures must not be empty, got {tuple(picture.shape)}")
            return self._centre(_resized(pixels, self._scaled(*pixels.shape[2:]), self.interpolation))
        if not hasattr(picture, "convert"):
            raise TypeError(f"a picture must be a PIL image or a uint8 tensor, got {type(picture).__name__}")
        width, height = picture.size
        if not width or not height:
            raise ValueError(f"a picture must not be empty, got {width} x {height}")
        rows, columns = self._scaled(height, width)
        image = picture.convert("RGB").resize((columns, rows), _PIL_FILTERS[self.interpolation])
        return self._centre(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        short = floor(self.size / self.crop_pct)
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)

    def _centre(self, pixels: Tensor) -> Tensor:
        top, left = (round((side - self.size) / 2) for side in pixels.shape[2:])
        return pixels[:, :, top : top + self.size, left : left + self.size]


def _resized(pixels: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    if tuple(pixels.shape[2:]) == tuple(size):
        return pixels
    wide = F.interpolate(pixels.float(), size=tuple(size), mode=interpolation, antialias=True)
    return wide.round().clamp(0, 255).to(torch.uint8)  # bicubic goes beyond both ends


def preprocess(model: Backbone) -> Preprocess:
    """What makes batches of pictures for a model of `create_model`: `model(preprocess(model)(picture))`.

    Raises:
        ValueError: the model was not made by `create_model`, or its images are not square or not of three channels.
    """
    cfg = model.pretrained_cfg
    if "input_size" not in cfg:
        raise ValueError("model must be made by create_model, which knows how its pictures are prepared")
    if model.in_chans != 3:
        raise ValueError(f"model must take pictures of 3 channels, whose mean is known, got in_chans={model.in_chans}")
    _, height, width = cfg["input_size"]
    if height != width:
        raise ValueError(f"model must take square pictures, got one for {height} x {width}")
    return Preprocess(height, cfg["crop_pct"], cfg["interpolation"], cfg["mean"], cfg["std"])
