"""Pictures for the examples: folders of them, what training sees of them, and a small set to try things with.

python examples/pictures.py pictures  # writes pictures/{train,val}/{red,green,...}/*.png
"""

import argparse
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vision_ops.models import Preprocess

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "magenta": (1, 0, 1)}


class Pictures(Dataset):
    """The images in root/CLASS as `prepare` makes them, and their labels, by (epoch, number).

    `classes` are numbered in the order of their names. With a `seed` it is a random part of each image, mirrored half
    of the time, which the seed, the epoch and the number determine. Numbers beyond the last have the label -1.
    """

    prepare: Preprocess
    seed: int | None = None

    def __init__(self, root: Path) -> None:
        self.classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        found = [(path, k) for k, name in enumerate(self.classes) for path in sorted((root / name).rglob("*"))]
        self.files = [(path, k) for path, k in found if path.suffix.lower() in Image.registered_extensions()]
        if not self.files:
            raise SystemExit(f"there are no images in the folders of {root}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, number = key
        path, label = self.files[number % len(self.files)]
        picture, prepare = Image.open(path).convert("RGB"), self.prepare
        if self.seed is not None:
            picture = random_part(picture, prepare.size, np.random.default_rng([self.seed, epoch, number]))
            prepare = replace(prepare, crop_pct=1.0)
        return prepare(picture)[0], label if number < len(self.files) else -1


def folders(root: Path) -> tuple[Pictures, Pictures]:
    """What to train on and what to evaluate on."""
    train, val = Pictures(root / "train"), Pictures(root / "val")
    if train.classes != val.classes:
        raise SystemExit(f"train and val of {root} must have folders of the same names")
    return train, val


def generated(root: Path) -> tuple[Pictures, Pictures]:
    write_pictures(root)
    return folders(root)


def random_part(picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A quarter of the picture or more, about as wide as high, resized to a square."""
    width, height = picture.size
    area, ratio = width * height * rng.uniform(0.25, 1), math.exp(rng.uniform(-0.3, 0.3))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    part = picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def load(pictures: Pictures, batches: Iterable[list[tuple[int, int]]], workers: int) -> DataLoader:
    """Batches of images and labels, as the lists of keys say."""
    return DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


def training_batches(
    count: int, size: int, seed: int, epoch: int, rank: int, world: int
) -> list[list[tuple[int, int]]]:
    """The keys of an epoch's batches, shuffled: of every `size` the share of one process; what is left over waits."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
    starts = range(0, count - size + 1, size)
    return [[(epoch, i) for i in order[start + rank : start + size : world]] for start in starts]


def evaluation_batches(count: int, size: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
    """As many keys for every process, the last ones beyond `count`."""
    numbers = range(rank, math.ceil(count / world) * world, world)
    return [[(0, i) for i in numbers[start : start + size]] for start in range(0, len(numbers), size)]


def write_pictures(root: Path, side: int = 64, train: int = 100, val: int = 20) -> None:
    """Discs in the colour of their class, on noise: as many of each class, the same ones every time."""
    for seed, (part, count) in enumerate((("train", train), ("val", val))):
        for number, colour in enumerate(COLOURS):
            rng, folder = np.random.default_rng([seed, number]), root / part / colour
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                part_of_file = folder / f"{i:04}.{os.getpid()}"
                disc(colour, side, rng).save(part_of_file, "png")
                part_of_file.replace(folder / f"{i:04}.png")  # whole at once, as several processes may write it


def disc(colour: str, side: int, rng: np.random.Generator) -> Image.Image:
    pixels = rng.uniform(0, 255, (side, side, 3))
    (row, column), radius = rng.uniform(0.3, 0.7, 2) * side, rng.uniform(0.2, 0.4) * side
    rows, columns = np.ogrid[:side, :side]
    inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
    pixels[inside] = (pixels[inside] + 255 * np.array(COLOURS[colour])) / 2
    return Image.fromarray(pixels.astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder, made where it is missing")
    parser.add_argument("--side", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--train", type=int, default=100, help="pictures per class to train on")
    parser.add_argument("--val", type=int, default=20, help="and to evaluate on")
    args = parser.parse_args()
    write_pictures(args.root, args.side, args.train, args.val)


if __name__ == "__main__":
    main()
