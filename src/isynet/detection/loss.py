"""What the head should say at each place, and how far it is from that (arXiv:1904.01355)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from isynet.data.source import Objects
from isynet.detection.boxes import areas
from isynet.detection.network import Predictions

RANGE = 4.0
"""A level takes boxes whose farthest side is up to this many of its strides away, the last all."""

RADIUS = 1.5
"""A place stands for a box if it lies within this many strides of the box's centre."""

FOCAL_POWER, FOCAL_BALANCE = 2.0, 0.25
"""Of the focal loss (arXiv:1708.02002)."""


class Targets(NamedTuple):
    """What each place of one image should say.

    Attributes:
        labels: Class number, -1 for no object, [places].
        distances: To the box's left, top, right, bottom, [places, 4]; 0 without an object.
    """

    labels: Tensor
    distances: Tensor

    def centredness(self) -> Tensor:
        """1 in the middle of a box, 0 at its edge, [places]."""
        sides = self.distances.clamp(min=1e-6)
        x, y = sides[:, ::2], sides[:, 1::2]
        return (x.amin(1) / x.amax(1) * y.amin(1) / y.amax(1)).sqrt()


def assign(places: Tensor, strides: Tensor, objects: Objects) -> Targets:
    """Give each place the smallest object that it stands for.

    Args:
        places: Places in pixels, [places, 2].
        strides: Strides of their levels, [places], ascending.
        objects: The objects of one image.
    """
    count = len(places)
    if not len(objects.labels):
        empty = torch.full((count,), -1, device=places.device)
        return Targets(empty, places.new_zeros(count, 4))
    boxes = objects.boxes.to(places)
    near, far = places[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - places[:, None]
    distances = torch.cat((near, far), -1)
    farthest = distances.amax(-1)
    least = torch.where(strides > strides.min(), strides * RANGE / 2, 0)
    most = torch.where(strides < strides.max(), strides * RANGE, torch.inf)
    in_range = (farthest > least[:, None]) & (farthest <= most[:, None])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    is_near = (places[:, None] - centres[None]).abs().amax(-1) <= RADIUS * strides[:, None]
    is_own = (distances.amin(-1) > 0) & in_range & is_near
    size = torch.where(is_own, areas(boxes)[None].expand(count, -1), torch.inf)
    smallest, index = size.min(1)
    has_object = smallest < torch.inf
    labels = torch.where(has_object, objects.labels.to(places.device)[index], -1)
    own = distances[torch.arange(count, device=places.device), index]
    return Targets(labels, torch.where(has_object[:, None], own, 0))


def detection_loss(predictions: Predictions, objects: list[Objects]) -> Tensor:
    """Focal loss of classes, generalised overlap of boxes, and centredness, a mean over objects.

    Args:
        predictions: The predictions of a batch.
        objects: The objects of each image.
    """
    places, strides = predictions.places, predictions.strides
    targets = [assign(places, strides, each) for each in objects]
    labels = torch.stack([each.labels for each in targets])
    wanted = torch.zeros_like(predictions.logits)
    is_object = labels >= 0
    image, place = is_object.nonzero(as_tuple=True)
    wanted[image, place, labels[is_object]] = 1
    number = max(1, len(image))
    loss = _focal(predictions.logits, wanted).sum() / number
    if len(image):
        distances = torch.stack([each.distances for each in targets])[is_object]
        centred = torch.stack([each.centredness() for each in targets])[is_object]
        boxes = _generalised_overlap(predictions.distances[is_object], distances)
        loss = loss + ((1 - boxes) * centred).sum() / centred.sum().clamp(min=1e-6)
        loss = loss + functional.binary_cross_entropy_with_logits(
            predictions.centredness[is_object], centred
        )
    return loss


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    plain = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    right = torch.where(wanted > 0, logits, -logits).sigmoid()
    balance = torch.where(wanted > 0, FOCAL_BALANCE, 1 - FOCAL_BALANCE)
    return balance * (1 - right) ** FOCAL_POWER * plain


def _generalised_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Generalised intersection over union (arXiv:1902.09630) of boxes around the same places."""

    def area(sides: Tensor) -> Tensor:
        return (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3])

    common, hull = area(torch.minimum(first, second)), area(torch.maximum(first, second))
    union = area(first) + area(second) - common
    return common / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)
