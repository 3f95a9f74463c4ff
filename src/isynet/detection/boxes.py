"""Boxes: how much they overlap, and which of many to keep."""

import torch
from torch import Tensor

from isynet.data.source import Objects


def areas(boxes: Tensor) -> Tensor:
    """Areas of boxes [..., 4]; 0 where right or bottom come first."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of each box of [n, 4] with each of [m, 4], [n, m]."""
    near = torch.maximum(first[:, None, :2], second[None, :, :2])
    far = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    common = (far - near).clamp(min=0).prod(-1)
    union = areas(first)[:, None] + areas(second)[None] - common
    return common / union.clamp(min=1e-9)


def select_boxes(
    boxes: Tensor, scores: Tensor, *, threshold: float, limit: int, overlap: float
) -> tuple[Objects, Tensor]:
    """Keep the boxes that no better one of their class covers (non-maximum suppression).

    Args:
        boxes: Boxes [places, 4].
        scores: Scores [places, classes].
        threshold: Least score.
        limit: Most boxes in all.
        overlap: Intersection over union above which the lower of two boxes goes.

    Returns:
        The objects and their scores, highest first.
    """
    place, label = (scores >= threshold).nonzero(as_tuple=True)
    score = scores[place, label]
    order = score.argsort(descending=True, stable=True)[: 20 * limit]
    place, label, score = place[order], label[order], score[order]
    box = boxes[place]
    # Classes are moved apart, so that boxes of different ones never overlap.
    reach = float(boxes.abs().max()) * 2 + 1 if len(boxes) else 1.0
    table = overlaps(box + label[:, None] * reach, box + label[:, None] * reach)
    is_kept = torch.ones(len(box), dtype=torch.bool, device=box.device)
    for index in range(len(box)):
        if is_kept[index]:
            is_kept[index + 1 :] &= table[index, index + 1 :] <= overlap
    kept = is_kept.nonzero().flatten()[:limit]
    return Objects(box[kept], label[kept]), score[kept]
