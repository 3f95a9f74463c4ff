"""Data sets by name or folder."""

from pathlib import Path

import torch
from torch import Tensor

from isynet.data.folder import FolderImages
from isynet.data.idx import (
    FASHION_CLASSES,
    FASHION_FOLDER,
    PlainImages,
    has_idx_files,
    read_idx_folder,
)
from isynet.data.scenes import CLASSIFY, DETECT, FashionScenes
from isynet.data.source import ImageSource, ObjectSource
from isynet.data.stills import ShapeStills

DATASETS = {
    "fashion": "Fashion-MNIST as it is, 28 pixels in a frame of black",
    "fashion-scenes": "its items coloured and turned on a ground; also with boxes",
    "digits": "scikit-learn's 1,797 digits of 8 pixels, enlarged by a whole factor",
    "shapes": "stills of the moving-shapes world; also with boxes",
}


def open_source(name: str, split: str, size: int, *, grey_channels: int = 1) -> ImageSource:
    """Open a split of a data set by its name or folder.

    Args:
        name: One of `DATASETS`, a folder of idx files (MNIST, KMNIST, EMNIST), or a folder with
            `train` and `val` that have a folder for each class.
        split: `train` or `test`.
        size: Pixels of the images' sides.
        grey_channels: Number of equal channels that grey images are given as.

    Raises:
        ImportError: The digits need scikit-learn, which is missing.
        ValueError: An unknown name, or files are missing or damaged; they are named.
    """
    if size < 1:
        raise ValueError(f"the size must be positive, got {size}.")
    if name == "shapes":
        return ShapeStills(split, size)
    if name == "fashion-scenes":
        return _fashion_scenes(split, size, has_objects=False)
    if name == "digits":
        images, labels, classes = _digits(split, size)
        return PlainImages(
            images, labels, classes, size, channels=grey_channels, has_mirroring=False
        )
    folder = FASHION_FOLDER if name == "fashion" else Path(name)
    if name == "fashion" or has_idx_files(folder):
        is_fashion = folder == FASHION_FOLDER
        return PlainImages(
            *_idx(folder, split), size, channels=grey_channels, has_mirroring=is_fashion
        )
    if not folder.is_dir():
        raise ValueError(
            f"no data set {name[:200]!r}. Known: {', '.join(DATASETS)}; or a folder of idx files, "
            "or one with train and val."
        )
    return FolderImages(folder, split, size)


def open_objects(name: str, split: str, size: int) -> ObjectSource:
    """Open a split of a data set with boxes: `fashion-scenes` or `shapes`.

    Raises:
        ValueError: Another name, or files are missing.
    """
    if name == "shapes":
        return ShapeStills(split, size, has_objects=True)
    if name == "fashion-scenes":
        return _fashion_scenes(split, size, has_objects=True)
    raise ValueError(f"no boxes in {name[:200]!r}. Known: fashion-scenes, shapes.")


def _fashion_scenes(split: str, size: int, *, has_objects: bool) -> FashionScenes:
    images, labels, classes = _idx(FASHION_FOLDER, split)
    return FashionScenes(images, labels, classes, size, DETECT if has_objects else CLASSIFY)


def _digits(split: str, size: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The digits as bytes, each pixel a square; every fifth image is of the test split."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError("digits need scikit-learn: pip install scikit-learn.") from error
    found = load_digits()
    is_test = torch.arange(len(found.target)) % 5 == 4
    chosen = is_test if split == "test" else ~is_test
    images = (torch.from_numpy(found.images) * (255 / 16)).round().byte()[chosen]
    factor = max(1, size // images.shape[1])
    images = images.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    labels = torch.from_numpy(found.target).long()[chosen]
    return images, labels, tuple(map(str, range(10)))


def _idx(folder: Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    images, labels = read_idx_folder(folder, split)
    names = FASHION_CLASSES if folder == FASHION_FOLDER else None
    # Both splits must agree on the classes, so they come from the training labels.
    reference = labels if split == "train" else read_idx_folder(folder, "train")[1]
    return images, labels, names or tuple(str(i) for i in range(int(reference.max()) + 1))
