"""Which size a video is brought to: cut and scaled down only where a size was asked for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla_attn.generation.request import ModelDefaults
from nabla_attn.training.data.clip import Skipped
from nabla_attn.training.families import check_size, size_steps


@dataclass(frozen=True)
class Size:
    """A size to encode at.

    Attributes:
        frames: Number of frames taken, from the first; None takes all.
        height: Height in pixels; None keeps the video's own.
        width: Width in pixels; None together with `height`.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together: pass both or neither.")
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Read HEIGHTxWIDTHxFRAMES such as "480x832x81".

        Raises:
            ValueError: The text is not of that form.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"a size is HEIGHTxWIDTHxFRAMES such as 480x832x81: got {text!r}.")
        height, width, frames = (int(part) for part in parts)
        return cls(frames, height, width)

    @classmethod
    def of_model(cls, directory: Path) -> "Size":
        """The size that a model makes videos of unless it is asked for another.

        Args:
            directory: The pipeline directory.
        """
        defaults = ModelDefaults.load(directory)
        return cls(defaults.frames, defaults.height, defaults.width)

    def check(self, pipeline: Any) -> None:
        """Check that a model takes the size.

        Raises:
            ValueError: It does not.
        """
        fewest, _, multiple = size_steps(pipeline)
        check_size(pipeline, self.frames or fewest, self.height or multiple, self.width or multiple)


def choose_size(sizes: tuple[Size, ...], frames: int, height: int, width: int) -> Size:
    """The size of the closest aspect ratio among those that a video can fill; then the largest.

    Args:
        sizes: The sizes that were asked for.
        frames: Number of frames of the video.
        height: Height of the video in pixels.
        width: Width of the video in pixels.

    Raises:
        Skipped: The video is too short or too small for all of them.
    """
    long_enough = [size for size in sizes if (size.frames or 1) <= frames]
    if not long_enough:
        needed = min(size.frames or 1 for size in sizes)
        raise Skipped("too short", f"{frames} frames, {needed} are needed")
    fitting = [
        size for size in long_enough if (size.height or 1) <= height and (size.width or 1) <= width
    ]
    if not fitting:
        raise Skipped("too small", f"{height}x{width}, and videos are not enlarged")

    def rank(size: Size) -> tuple[float, int]:
        rows, columns = size.height or height, size.width or width
        distance = abs(math.log(rows / columns) - math.log(height / width))
        return round(distance, 9), -rows * columns * (size.frames or frames)

    return min(fitting, key=rank)


def fit(video: np.ndarray, size: Size) -> np.ndarray:
    """Take the first frames, scale down until one side fits, and cut the other around its middle.

    Args:
        video: The video, uint8 [frames, height, width, 3], at least as large as the size.
        size: The size to bring it to.
    """
    video = video[: size.frames]
    if size.height is None or size.width is None or video.shape[1:3] == (size.height, size.width):
        return video
    rows, columns = video.shape[1:3]
    scale = max(size.height / rows, size.width / columns)
    rows = max(size.height, round(rows * scale))
    columns = max(size.width, round(columns * scale))
    video = _scale(video, rows, columns)
    top, left = (rows - size.height) // 2, (columns - size.width) // 2
    return video[:, top : top + size.height, left : left + size.width]


def _scale(video: np.ndarray, height: int, width: int) -> np.ndarray:
    if video.shape[1:3] == (height, width):
        return video
    scaled = np.empty((len(video), height, width, 3), np.uint8)
    for index, frame in enumerate(video):
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
        pixels = torch.nn.functional.interpolate(
            pixels, (height, width), mode="bicubic", antialias=True
        )
        scaled[index] = pixels.round().clamp(0, 255)[0].permute(1, 2, 0).byte().numpy()
    return scaled
