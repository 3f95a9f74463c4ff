"""What training sees of a data set."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MEAN, STD = 0.5, 0.25
"""Of pixels from 0 to 1, in every channel: what networks trained here expect."""


class Objects(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: Left, top, right, bottom in pixels, float [objects, 4].
        labels: Class numbers, int64 [objects].
    """

    boxes: Tensor
    labels: Tensor


class ImageSource(Protocol):
    """A set of labelled images; what is random comes from the generator alone."""

    classes: tuple[str, ...]
    channels: int
    size: int

    def __len__(self) -> int:
        """Number of images."""
        ...

    def draw(
        self, indices: Tensor, generator: torch.Generator, *, is_training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Images [batch, channels, size, size] from 0 to 1 and labels [batch]."""
        ...


class ObjectSource(Protocol):
    """A set of images with boxes."""

    classes: tuple[str, ...]
    channels: int
    size: int

    def __len__(self) -> int:
        """Number of images."""
        ...

    def draw_objects(
        self, indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, list[Objects]]:
        """Images [batch, channels, size, size] from 0 to 1 and their objects."""
        ...


def normalize(images: Tensor) -> Tensor:
    """Pixels from 0 to 1 as networks trained here expect them."""
    return (images - MEAN) / STD
