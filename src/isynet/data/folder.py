"""A user's images: a folder for each class, in `train` and `val` or `test`."""

import math
from pathlib import Path

import torch
from torch import Tensor

SPLITS = {"train": ("train",), "test": ("val", "test", "validation")}
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"})
CROP_SHARE = (0.08, 1.0)
ASPECTS = (3 / 4, 4 / 3)
RESIZE_RATIO = 256 / 224
"""Shorter side of a test image before its centre is cropped, in crops."""


class FolderImages:
    """Images that are read when they are drawn.

    Training takes a random part of an image of random shape, resized to the wanted size (bicubic),
    and mirrors half of them; testing resizes the shorter side and crops the centre.

    Attributes:
        classes: Names of the folders, sorted.
        size: Pixels of the sides.
    """

    channels = 3

    def __init__(self, folder: str | Path, split: str, size: int) -> None:
        """Find the images of a split.

        Raises:
            ValueError: There is no such split, or it has fewer than two classes with images.
        """
        root = _split_folder(Path(folder), split)
        train = _split_folder(Path(folder), "train")
        self.classes = tuple(sorted(path.name for path in train.iterdir() if path.is_dir()))
        self.files: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes):
            images = sorted((root / name).rglob("*"))
            self.files += [(p, label) for p in images if p.suffix.lower() in EXTENSIONS]
        if len({label for _, label in self.files}) < 2:
            raise ValueError(
                f"{root} needs two folders of images or more, one a class; found "
                f"{', '.join(self.classes) or 'none'}."
            )
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def draw(
        self, indices: Tensor, generator: torch.Generator, *, is_training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Read images [batch, 3, size, size] from 0 to 1 and labels [batch].

        Raises:
            ValueError: A file is no readable image; it is named.
        """
        images, labels = [], []
        for index in indices.tolist():
            path, label = self.files[index]
            images.append(self._read(path, generator, is_training))
            labels.append(label)
        return torch.stack(images), torch.tensor(labels)

    def _read(self, path: Path, generator: torch.Generator, is_training: bool) -> Tensor:
        import numpy as np
        from PIL import Image

        from nabla_attn.media import read_image

        picture = read_image(path)
        size = (self.size, self.size)
        if is_training:
            box = _random_box(picture.width, picture.height, generator)
            picture = picture.resize(size, Image.Resampling.BICUBIC, box)
        else:
            side = min(picture.width, picture.height) / RESIZE_RATIO
            left, top = (picture.width - side) / 2, (picture.height - side) / 2
            box = (left, top, left + side, top + side)
            picture = picture.resize(size, Image.Resampling.BICUBIC, box)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        is_mirrored = is_training and torch.rand((), generator=generator) < 0.5
        return pixels.flip(2) if is_mirrored else pixels


def _random_box(
    width: int, height: int, generator: torch.Generator
) -> tuple[float, float, float, float]:
    """A part of 8 to 100 % of the image, between 3:4 and 4:3; the centre where none fits."""
    for _ in range(10):
        draw = torch.rand(4, generator=generator).tolist()
        area = width * height * (CROP_SHARE[0] + draw[0] * (CROP_SHARE[1] - CROP_SHARE[0]))
        low, high = (math.log(value) for value in ASPECTS)
        aspect = math.exp(low + draw[1] * (high - low))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = draw[2] * (width - w), draw[3] * (height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _split_folder(folder: Path, split: str) -> Path:
    for name in SPLITS[split]:
        if (folder / name).is_dir():
            return folder / name
    names = " or ".join(SPLITS[split])
    raise ValueError(f"{folder} has no folder {names} with a folder for each class.")
