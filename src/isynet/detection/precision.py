"""Average precision by pycocotools, the measure that detection is compared by."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from isynet.data.source import Objects


def average_precision(
    found: Sequence[tuple[Objects, Tensor]], wanted: Sequence[Objects], num_classes: int
) -> dict[str, float]:
    """COCO's average precision.

    Args:
        found: Objects found in each image, and their scores.
        wanted: The objects of each image.
        num_classes: Number of classes.

    Returns:
        `ap` over overlaps of 0.5 to 0.95, `ap50` and `ap75`, from 0 to 1.

    Raises:
        ValueError: Numbers of images differ, or there is no object at all.
        ImportError: Pycocotools is missing; what to install is named.
    """
    if len(found) != len(wanted):
        raise ValueError(f"{len(found)} results cannot be compared with {len(wanted)} images.")
    if not any(len(each.labels) for each in wanted):
        raise ValueError("there is no object in any image, so precision has no meaning.")
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError(
            "average precision needs pycocotools: pip install nabla-attn[isynet]."
        ) from error
    results = [
        {**row, "score": float(score)}
        for image, (objects, scores) in enumerate(found)
        for row, score in zip(_rows(image, objects), scores, strict=True)
    ]
    if not results:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    # It prints what it does; only its numbers are wanted.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _dataset(wanted, num_classes)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = (max(0.0, float(value)) for value in evaluation.stats[:3])
    return {"ap": ap, "ap50": ap50, "ap75": ap75}


def _dataset(wanted: Sequence[Objects], num_classes: int) -> dict[str, Any]:
    annotations = [
        {**row, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
        for image, objects in enumerate(wanted)
        for row in _rows(image, objects)
    ]
    for number, row in enumerate(annotations):
        # A number of 0 stands for no annotation there.
        row["id"] = number + 1
    return {
        "images": [{"id": image} for image in range(len(wanted))],
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
    }


def _rows(image: int, objects: Objects) -> list[dict[str, Any]]:
    rows = []
    for box, label in zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True):
        left, top, right, bottom = box
        bbox = [left, top, right - left, bottom - top]
        rows.append({"image_id": image, "category_id": label, "bbox": bbox})
    return rows
