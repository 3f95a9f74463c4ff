"""A detector: a pyramid of maps (arXiv:1612.03144), an anchor-free head (arXiv:1904.01355)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from isynet.data.source import Objects
from isynet.detection.boxes import select_boxes
from isynet.network import FeatureMaps, ISyNet, Staged

LEVELS = 3
PRIOR = 0.01
"""Probability of an object at a place before training."""


class Predictions(NamedTuple):
    """What the head says of every place of all levels.

    Attributes:
        logits: Class logits [batch, places, classes].
        distances: Distances from a place to the box's left, top, right and bottom in pixels,
            positive, [batch, places, 4].
        centredness: Logits of how near the box's centre a place is, [batch, places].
        places: Places in pixels (x, y), [places, 2].
        strides: Pixels between neighbours of each place's level, [places].
    """

    logits: Tensor
    distances: Tensor
    centredness: Tensor
    places: Tensor
    strides: Tensor

    def boxes(self) -> Tensor:
        """Left, top, right, bottom in pixels, [batch, places, 4]."""
        near = self.places - self.distances[..., :2]
        return torch.cat((near, self.places + self.distances[..., 2:]), -1)


class Detector(nn.Module):
    """Boxes and classes from the last three maps of a network.

    Attributes:
        backbone: The stages; weights are shared with the network they came from.
        classes: Names of the classes.
    """

    def __init__(
        self, net: ISyNet | Staged, classes: tuple[str, ...], *, channels: int = 64
    ) -> None:
        """Put a pyramid and a head on a network.

        Args:
            net: The network, trained or not: an `ISyNet`, or another one that is `Staged`.
            classes: Names of the classes.
            channels: Channels of the pyramid and the head.

        Raises:
            ValueError: The network has fewer than three stages, or there are no classes.
        """
        super().__init__()
        if len(net.stages) < LEVELS or not classes:
            raise ValueError(
                f"a detector needs a network of {LEVELS} stages or more and a class or more: got "
                f"{len(net.stages)} stages and {len(classes)} classes."
            )
        self.net, self.classes, self.width = net, classes, channels
        self.backbone = FeatureMaps(net, tuple(range(-LEVELS, 0)), as_list=True)
        self.strides = self.backbone.reductions
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in self.backbone.channels)
        self.smooth = nn.ModuleList(_conv(channels) for _ in self.strides)
        self.class_tower, self.box_tower = _conv(channels), _conv(channels)
        self.class_head = nn.Conv2d(channels, len(classes), 3, padding=1)
        self.box_head = nn.Conv2d(channels, 5, 3, padding=1)
        # So that the many empty places do not drown the first steps.
        assert self.class_head.bias is not None
        nn.init.constant_(self.class_head.bias, -math.log((1 - PRIOR) / PRIOR))
        self.scales = nn.Parameter(torch.ones(LEVELS))

    def forward(self, images: Tensor) -> Predictions:
        """Predict for normalized images [batch, channels, height, width]."""
        logits, distances, centredness, places, strides = [], [], [], [], []
        for level, (x, stride) in enumerate(zip(self._pyramid(images), self.strides, strict=True)):
            logits.append(self.class_head(self.class_tower(x)).flatten(2).transpose(1, 2))
            boxes = self.box_head(self.box_tower(x)).flatten(2).transpose(1, 2)
            distances.append(functional.softplus(boxes[..., :4] * self.scales[level]) * stride)
            centredness.append(boxes[..., 4])
            points = _places(x.shape[2], x.shape[3], stride, x.device)
            places.append(points)
            strides.append(points.new_full((len(points),), stride))
        return Predictions(
            torch.cat(logits, 1),
            torch.cat(distances, 1),
            torch.cat(centredness, 1),
            torch.cat(places),
            torch.cat(strides),
        )

    @torch.inference_mode()
    def detect(
        self, images: Tensor, *, threshold: float = 0.05, limit: int = 100, overlap: float = 0.6
    ) -> list[tuple[Objects, Tensor]]:
        """Find the objects of images.

        Args:
            images: Normalized images [batch, channels, height, width].
            threshold: Least score of an object.
            limit: Most objects of an image.
            overlap: Intersection over union above which the lower of two boxes of a class goes.

        Returns:
            For each image its objects, boxes within the image, and their scores, highest first.
        """
        found = self(images)
        scores = (found.logits.sigmoid() * found.centredness.sigmoid().unsqueeze(-1)).sqrt()
        height, width = images.shape[2:]
        corners = images.new_tensor([width, height, width, height])
        boxes = found.boxes().clamp(min=0).minimum(corners)
        return [
            select_boxes(b, s, threshold=threshold, limit=limit, overlap=overlap)
            for b, s in zip(boxes, scores, strict=True)
        ]

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)
        maps = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in range(LEVELS - 1, 0, -1):
            # Odd sizes do not double, so the coarser map takes the size of the finer.
            up = functional.interpolate(maps[level], size=maps[level - 1].shape[2:])
            maps[level - 1] = maps[level - 1] + up
        return [smooth(x) for smooth, x in zip(self.smooth, maps, strict=True)]


def _conv(channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _places(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    y = (torch.arange(height, device=device) + 0.5) * stride
    x = (torch.arange(width, device=device) + 0.5) * stride
    return torch.stack((x.repeat(height), y.repeat_interleave(width)), 1)
