"""Fashion scenes: real photographs of clothing, coloured and turned, on textured ground.

One generator serves classification (one item, no clutter) and detection (several items among
fragments of others), since it knows every label and box.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from isynet.data.source import Objects

VISIBLE = 0.05
"""Brightness from which a pixel of an item counts as the item, for its box."""


@dataclass(frozen=True)
class SceneRules:
    """What a scene looks like.

    Attributes:
        items: Least and most number of items.
        fragments: Number of quarters of other items that are no objects.
        scales: Least and most height of an item, as a share of the scene.
        turn: Most radians an item is turned by.
        spread: Most distance of an item's centre from the scene's, as a share of half the scene.
        texture: Strength of the ground's texture.
    """

    items: tuple[int, int] = (1, 1)
    fragments: int = 0
    scales: tuple[float, float] = (0.7, 0.96)
    turn: float = 0.3
    spread: float = 0.12
    texture: float = 0.12


CLASSIFY = SceneRules()
DETECT = SceneRules((1, 3), 2, (0.3, 0.5), 0.3, 0.6, 0.25)


class FashionScenes:
    """Scenes made of items of an idx set; the same generator state gives the same scenes.

    Attributes:
        classes: Names of the items' classes.
        size: Pixels of a scene's sides.
    """

    channels = 3

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        size: int,
        rules: SceneRules = CLASSIFY,
    ) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.size, self.rules = size, rules

    def __len__(self) -> int:
        return len(self.images)

    def draw(
        self, indices: Tensor, generator: torch.Generator, *, is_training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Scenes of one item each: images [batch, 3, size, size] from 0 to 1, labels [batch]."""
        canvas = self._ground(len(indices), generator)
        self._paste_fragments(canvas, generator)
        self._paste(canvas, self.images[indices], generator)
        return canvas.clamp_(0, 1), self.labels[indices]

    def draw_objects(
        self, indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, list[Objects]]:
        """Scenes of several items, the first of each the one at its index.

        Returns:
            Images [batch, 3, size, size] from 0 to 1, and the visible items of each.
        """
        count = len(indices)
        canvas = self._ground(count, generator)
        self._paste_fragments(canvas, generator)
        least, most = self.rules.items
        numbers = torch.randint(least, most + 1, (count,), generator=generator)
        masks: list[Tensor] = []
        labels: list[Tensor] = []
        for place in range(most):
            others = torch.randint(len(self), (count,), generator=generator)
            chosen = indices if place == 0 else others
            mask = self._paste(canvas, self.images[chosen], generator, numbers > place)
            # What a later item covers is no longer seen.
            masks = [earlier & ~mask for earlier in masks]
            masks.append(mask)
            labels.append(self.labels[chosen])
        objects = [
            _objects([mask[i] for mask in masks], [label[i] for label in labels])
            for i in range(count)
        ]
        return canvas.clamp_(0, 1), objects

    def _ground(self, count: int, generator: torch.Generator) -> Tensor:
        colour = torch.rand(count, 3, 1, 1, generator=generator) * 0.5
        texture = torch.rand(count, 3, 6, 6, generator=generator) - 0.4
        smooth = functional.interpolate(
            texture, size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        return colour + self.rules.texture * smooth

    def _paste_fragments(self, canvas: Tensor, generator: torch.Generator) -> None:
        height, width = self.images.shape[1:]
        quarters = torch.zeros(4, height, width, dtype=torch.uint8)
        for index in range(4):
            rows = slice(0, height // 2) if index < 2 else slice(height // 2, height)
            columns = slice(0, width // 2) if index % 2 else slice(width // 2, width)
            quarters[index, rows, columns] = 1
        for _ in range(self.rules.fragments):
            chosen = torch.randint(len(self), (len(canvas),), generator=generator)
            which = torch.randint(4, (len(canvas),), generator=generator)
            self._paste(canvas, self.images[chosen] * quarters[which], generator)

    def _paste(
        self,
        canvas: Tensor,
        items: Tensor,
        generator: torch.Generator,
        is_shown: Tensor | None = None,
    ) -> Tensor:
        """Paste an item into each scene, in place; returns where it is seen, bool [batch, h, w]."""
        count, rules = len(items), self.rules

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, generator=generator) * (high - low) + low

        scale, angle = uniform(*rules.scales), uniform(-rules.turn, rules.turn)
        x, y = uniform(-rules.spread, rules.spread), uniform(-rules.spread, rules.spread)
        flip = (uniform(0, 1) < 0.5).float() * 2 - 1
        colour = torch.rand(count, 3, 1, 1, generator=generator) * 0.8 + 0.2
        # The matrix maps places of the scene to places of the item, hence the inverse of the turn.
        cosine, sine = angle.cos() / scale, angle.sin() / scale
        matrix = torch.stack(
            (
                torch.stack((cosine * flip, sine * flip, -flip * (cosine * x + sine * y)), 1),
                torch.stack((-sine, cosine, sine * x - cosine * y), 1),
            ),
            1,
        )
        grid = functional.affine_grid(matrix, [count, 1, self.size, self.size], align_corners=False)
        pixels = functional.grid_sample(items[:, None].float() / 255, grid, align_corners=False)
        if is_shown is not None:
            pixels = pixels * is_shown.view(-1, 1, 1, 1)
        alpha = (pixels * 4).clamp(0, 1)
        canvas.mul_(1 - alpha).add_(alpha * colour * (0.25 + 0.75 * pixels))
        return pixels[:, 0] > VISIBLE


def _objects(masks: list[Tensor], labels: list[Tensor]) -> Objects:
    boxes, kept = [], []
    for mask, label in zip(masks, labels, strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        # Of an item that others cover almost wholly nothing is to be found.
        if mask.sum() < 0.01 * math.prod(mask.shape):
            continue
        left, top = float(columns[0]), float(rows[0])
        boxes.append([left, top, float(columns[-1]) + 1, float(rows[-1]) + 1])
        kept.append(int(label))
    return Objects(torch.tensor(boxes).reshape(-1, 4), torch.tensor(kept, dtype=torch.int64))
