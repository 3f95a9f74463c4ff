"""Stills of the moving-shapes world: a data set that needs no files."""

import random

import numpy as np
import torch
from torch import Tensor

from isynet.data.source import Objects

COUNTS = {"train": 4096, "test": 512}
TEST_SEED = 10**9


class ShapeStills:
    """First frames of scenes; the scene at an index is always the same.

    Attributes:
        classes: Names of coloured shapes, or of shapes for detection.
        size: Pixels of the sides.
    """

    channels = 3

    def __init__(self, split: str, size: int, *, has_objects: bool = False) -> None:
        from nabla_attn.moving_shapes.scene import COLOURS, KINDS

        self.size, self.count = size, COUNTS[split]
        self.first_seed = 0 if split == "train" else TEST_SEED
        coloured = tuple(f"{colour} {kind}" for colour in COLOURS for kind in KINDS)
        self.classes: tuple[str, ...] = KINDS if has_objects else coloured

    def __len__(self) -> int:
        return self.count

    def draw(
        self, indices: Tensor, generator: torch.Generator, *, is_training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Scenes of one shape: images [batch, 3, size, size] from 0 to 1, labels [batch]."""
        images, labels = [], []
        for index in indices.tolist():
            image, (shape,) = self._scene(index, 1)
            images.append(image)
            labels.append(self.classes.index(f"{shape.colour} {shape.kind}"))
        return torch.stack(images), torch.tensor(labels)

    def draw_objects(
        self, indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, list[Objects]]:
        """Scenes of one to three shapes, with their boxes."""
        images, objects = [], []
        for index in indices.tolist():
            number = random.Random(index + self.first_seed).randint(1, 3)
            image, shapes = self._scene(index, number)
            images.append(image)
            boxes = [
                [
                    (x - shape.radius) * self.size,
                    (y - shape.radius) * self.size,
                    (x + shape.radius) * self.size,
                    (y + shape.radius) * self.size,
                ]
                for shape in shapes
                for x, y in [shape.centre(0)]
            ]
            labels = [self.classes.index(shape.kind) for shape in shapes]
            objects.append(Objects(torch.tensor(boxes), torch.tensor(labels)))
        return torch.stack(images), objects

    def _scene(self, index: int, number: int) -> tuple[Tensor, tuple]:
        from nabla_attn.moving_shapes.scene import render, sample_scene

        scene = sample_scene(self.first_seed + index, number)
        pixels = render(scene, 1, self.size, self.size)[0]
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return image.float() / 255, scene.shapes
