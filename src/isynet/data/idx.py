"""The idx files of MNIST and its relatives: four files in a folder, packed or not."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's `dataset-fashion-mnist` puts its files."""

FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
PREFIXES = {"train": "train", "test": "t10k"}
MAX_BYTES = 2**31


def has_idx_files(folder: Path) -> bool:
    """Whether a folder has the labels of a training set under the name of these files."""
    return any(folder.glob("train-labels-idx1-ubyte*"))


def read_idx_folder(folder: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images and labels of a split.

    Args:
        folder: The folder with `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte` and so on, each
            with or without `.gz`.
        split: `train` or `test`.

    Returns:
        Images uint8 [number, height, width] and labels int64 [number].

    Raises:
        ValueError: A file is missing, damaged or no idx file, or the numbers differ; it is named.
    """
    prefix = PREFIXES[split]
    images_file = _find(Path(folder), f"{prefix}-images-idx3-ubyte")
    labels_file = _find(Path(folder), f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"{images_file} holds images {list(images.shape)} and {labels_file} labels "
            f"{list(labels.shape)}: not as many of both."
        )
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def read_idx(path: str | Path) -> np.ndarray:
    """Read one idx file of bytes, packed or not.

    Raises:
        ValueError: The file is missing, damaged or no idx file of bytes; it is named.
    """
    path = Path(path)
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                data = file.read(MAX_BYTES)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}.") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes.")
    count = data[3]
    start = 4 + 4 * count
    if not 1 <= count <= 4 or len(data) < start:
        raise ValueError(f"{path} is no idx file of bytes: it ends within its header.")
    shape = struct.unpack(f">{count}I", data[4:start])
    wanted = 1
    for size in shape:
        wanted *= size
    if len(data) - start != wanted:
        raise ValueError(
            f"{path} is damaged: {list(shape)} needs {wanted} bytes, it has {len(data) - start}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    hint = " Install Debian's dataset-fashion-mnist." if folder == FASHION_FOLDER else ""
    raise ValueError(f"no {name} or {name}.gz in {folder}.{hint}")


class PlainImages:
    """Grey images in the middle of a black frame.

    Args:
        images: The images, uint8 [number, height, width].
        labels: Class numbers, int64 [number].
        classes: Names of the classes.
        size: Pixels of the frame's sides.
        channels: Number of equal channels: 1, or that of weights made for colour.
        has_mirroring: Whether training mirrors half of the images, which suits clothes, not digits.

    Raises:
        ValueError: The frame is smaller than the images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        size: int,
        *,
        channels: int = 1,
        has_mirroring: bool = True,
    ) -> None:
        if size < max(images.shape[1:]):
            raise ValueError(
                f"the images have {list(images.shape[1:])} pixels and are not shrunk: a size of at "
                f"least {max(images.shape[1:])} is needed, got {size}."
            )
        self.images, self.labels, self.classes, self.size = images, labels, classes, size
        self.channels, self.has_mirroring = channels, has_mirroring

    def __len__(self) -> int:
        return len(self.images)

    def draw(
        self, indices: Tensor, generator: torch.Generator, *, is_training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Images [batch, channels, size, size] from 0 to 1 and labels [batch]."""
        chosen = self.images[indices]
        height, width = chosen.shape[1:]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        images = torch.zeros(len(indices), 1, self.size, self.size)
        images[:, 0, top : top + height, left : left + width] = chosen.float() / 255
        if is_training and self.has_mirroring:
            is_mirrored = torch.rand(len(indices), generator=generator) < 0.5
            images = torch.where(is_mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images.expand(-1, self.channels, -1, -1), self.labels[indices]
