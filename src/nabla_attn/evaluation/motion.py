"""Fidelity of motion: of the differences between neighbouring frames."""

import math
from typing import Any

import numpy as np

from nabla_attn.evaluation.metrics import measure_ssim
from nabla_attn.generation.video import check_frames


def measure_motion(frames: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """PSNR and SSIM of frame differences: flicker and wrong movement show, still errors do not.

    Differences lie in [-255, 255]; the peak of both measures is 255 as for frames, so that the
    decibels compare.

    Args:
        frames: uint8 [frames, height, width, 3].
        reference: the same shape.

    Returns:
        ``motion_psnr`` (None where identical) and ``motion_ssim``; both None for a single frame.

    Raises:
        ValueError: not two videos of one shape.
    """
    if check_frames(frames).shape != check_frames(reference).shape:
        raise ValueError(
            f"videos to compare must have one shape, got {list(frames.shape)} and "
            f"{list(reference.shape)}."
        )
    if len(frames) < 2:
        return {"motion_psnr": None, "motion_ssim": None}
    # Signed: in uint8 a difference of -1 would be 255.
    ours, theirs = (np.diff(video.astype(np.float64), axis=0) for video in (frames, reference))
    error = float(((ours - theirs) ** 2).mean())
    similar = measure_ssim(ours, theirs)
    return {
        "motion_psnr": round(10 * math.log10(255**2 / error), 6) if error else None,
        "motion_ssim": round(sum(similar) / len(similar), 6),
    }
