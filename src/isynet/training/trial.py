"""Short trainings that compare architectures on images held out of the training set."""

import torch
from torch import Tensor

from isynet.architecture import Architecture
from isynet.data.source import ImageSource
from isynet.network import ISyNet
from isynet.training.loop import DivergedError, measure_accuracy, train
from isynet.training.recipe import Recipe

DIVERGED_LOSS = 1e6
"""Loss in the record of a training that diverged, which JSON has no other number for."""


def split(source: ImageSource, held_out: int, seed: int) -> "tuple[ImageSource, ImageSource]":
    """A set of images without some of them, and these, chosen by the seed.

    Raises:
        ValueError: There are not as many images.
    """
    if not 0 < held_out < len(source):
        raise ValueError(
            f"{held_out} images cannot be held out of {len(source)}. Set a smaller validation."
        )
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    return Subset(source, order[:-held_out]), Subset(source, order[-held_out:])


class Subset:
    """Some images of a set."""

    def __init__(self, source: ImageSource, indices: Tensor) -> None:
        """Take the images at these indices, int64 [images]."""
        self.source, self.indices = source, indices
        self.classes, self.channels, self.size = source.classes, source.channels, source.size

    def __len__(self) -> int:
        return len(self.indices)

    def draw(
        self, indices: Tensor, generator: torch.Generator, *, is_training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Images [batch, channels, size, size] from 0 to 1 and labels [batch]."""
        return self.source.draw(self.indices[indices], generator, is_training=is_training)


def train_briefly(
    architecture: Architecture,
    recipe: Recipe,
    fit: ImageSource,
    held_out: ImageSource,
    seed: int,
) -> dict[str, float]:
    """Train an architecture and judge it.

    Returns:
        `accuracy` on the images held out, 0 if the training diverged; `loss`, the mean training
        loss of the last tenth; `steps`.
    """
    torch.manual_seed(seed)
    net = ISyNet(architecture, len(fit.classes), fit.channels)
    try:
        loss = train(net, fit, recipe, seed=seed).losses[-1]
    except DivergedError:
        return {"accuracy": 0.0, "loss": DIVERGED_LOSS, "steps": recipe.steps}
    return {"accuracy": measure_accuracy(net, held_out), "loss": loss, "steps": recipe.steps}
