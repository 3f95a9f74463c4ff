"""Video fidelity in pixels and in motion."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nabla_attn.generation.video import check_frames

PEAK = 255.0


@dataclass(frozen=True)
class Fidelity:
    """Closeness of a video to a reference.

    Attributes:
        psnr: Decibels of the squared error over all frames, so that one identical frame does not
            make it infinite; infinite if all frames are identical.
        ssim: Mean structural similarity over frames, 1 if identical.
        psnr_frames: Decibels per frame, infinite where identical.
        ssim_frames: Structural similarity per frame.
    """

    psnr: float
    ssim: float
    psnr_frames: tuple[float, ...]
    ssim_frames: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite PSNR becomes None."""
        return {
            "psnr": _finite(self.psnr),
            "ssim": self.ssim,
            "psnr_frames": [_finite(value) for value in self.psnr_frames],
            "ssim_frames": list(self.ssim_frames),
        }


def measure_fidelity(frames: np.ndarray, reference: np.ndarray) -> Fidelity:
    """Measure PSNR and SSIM (Gaussian window 11, sigma 1.5, per RGB channel) at a peak of 255.

    Args:
        frames: Video, uint8 [frames, height, width, 3].
        reference: Video of the same shape.

    Raises:
        ValueError: The shapes differ, or the frames are smaller than the 11 pixels of the window.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if check_frames(frames).shape != check_frames(reference).shape:
        raise ValueError(
            "videos to compare must have one shape, "
            f"got {list(frames.shape)} and {list(reference.shape)}."
        )
    if min(frames.shape[1:3]) < 11:
        raise ValueError(f"SSIM needs at least 11x11 pixels, got {list(frames.shape[1:3])}.")
    ours, theirs = (
        torch.from_numpy(video).permute(0, 3, 1, 2).double() for video in (frames, reference)
    )
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=PEAK)
    psnr_frames = peak_signal_noise_ratio(
        ours, theirs, data_range=PEAK, reduction="none", dim=(1, 2, 3)
    )
    ssim_frames = measure_ssim(frames, reference)
    return Fidelity(
        psnr=float(psnr),
        ssim=sum(ssim_frames) / len(ssim_frames),
        psnr_frames=tuple(psnr_frames.tolist()),
        ssim_frames=tuple(ssim_frames),
    )


def measure_ssim(frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """Return the SSIM of every frame of two videos [frames, height, width, 3] at a peak of 255.

    The values are those of torchmetrics in float64, whose two-dimensional convolution takes many
    times as long.
    """
    # Frame by frame keeps the memory of the float64 means to one frame.
    return [
        _ssim(a.astype(np.float64), b.astype(np.float64))
        for a, b in zip(frames, reference, strict=True)
    ]


def measure_motion(frames: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Measure PSNR and SSIM of frame differences, which show flicker and wrong movement only.

    Differences lie in [-255, 255]; the peak of both measures is 255 as for frames, so that the
    decibels compare.

    Args:
        frames: Video, uint8 [frames, height, width, 3].
        reference: Video of the same shape.

    Returns:
        `motion_psnr` (None where identical) and `motion_ssim`; both None for a single frame.

    Raises:
        ValueError: The shapes differ.
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


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.ndimage import gaussian_filter

    def mean(values: np.ndarray) -> np.ndarray:
        # 5 pixels to each side; the borders are mirrored.
        return gaussian_filter(values, sigma=1.5, truncate=3.5, mode="mirror", axes=(0, 1))

    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x * y) - mean_x * mean_y
    variances = [np.maximum(mean(v * v) - m * m, 0) for v, m in ((x, mean_x), (y, mean_y))]
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * (2 * covariance + c2) / (sum(variances) + c2)).mean())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
