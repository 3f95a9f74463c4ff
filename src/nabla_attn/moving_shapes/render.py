"""Scenes to pixels: antialiased by the signed distance to each shape's edge."""

import numpy as np
from numpy.typing import NDArray

from nabla_attn.moving_shapes.scene import BACKGROUNDS, COLOURS, Scene, Shape

AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}
"""Area of each kind at radius 1."""

Window = tuple[float, float, float, float]


def signed_distance(kind: str, dx: NDArray, dy: NDArray, radius: float) -> NDArray:
    """Distance to the shape's edge, negative inside; the bounding box is 2 radius wide and high."""
    if kind == "circle":
        return np.hypot(dx, dy) - radius
    if kind == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius
    # A triangle pointing up: below its slanted sides (slope 2) and above its base.
    slanted = (2 * np.abs(dx) - dy - radius) / np.float32(5**0.5)
    return np.maximum(slanted, dy - radius)


Axis = tuple[NDArray, float]
"""Pixel centres along one axis and the length of the whole frame, in units of its shorter side."""


def _coverage(shape: Shape, time: float, xs: Axis, ys: Axis, pixel: float) -> NDArray:
    """Share of every pixel that the shape covers."""
    x, y = shape.centre(time)
    side_x, side_y = xs[1], ys[1]
    distance = signed_distance(
        shape.kind, xs[0][None, :] - x * side_x, ys[0][:, None] - y * side_y, shape.radius
    )
    return np.clip(0.5 - distance / pixel, 0, 1).astype(np.float32)


def render(
    scene: Scene, frames: int, height: int, width: int, window: Window = (0.0, 0.0, 1.0, 1.0)
) -> NDArray[np.uint8]:
    """Draw a scene at any size.

    Args:
        scene: The scene. Shapes keep their proportions in frames that are not square.
        frames: Number of frames; the motion is spread over all of them.
        height: Height in pixels.
        width: Width in pixels.
        window: Part of the frame to show, (top, left, bottom, right) as shares of it.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        ValueError: A size is not positive.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"sizes must be positive: got {frames}x{height}x{width}.")
    top, left, bottom, right = window
    full_height, full_width = height / (bottom - top), width / (right - left)
    shorter = min(full_height, full_width)
    ys = (top * full_height + np.arange(height, dtype=np.float32) + 0.5) / shorter
    xs = (left * full_width + np.arange(width, dtype=np.float32) + 0.5) / shorter
    sides = full_width / shorter, full_height / shorter
    video = np.empty((frames, height, width, 3), np.float32)
    video[:] = BACKGROUNDS[scene.background]
    for index in range(frames):
        time = index / max(frames - 1, 1)
        for shape in scene.shapes:
            alpha = _coverage(shape, time, (xs, sides[0]), (ys, sides[1]), 1 / shorter)
            colour = np.array(COLOURS[shape.colour], np.float32)
            video[index] += alpha[..., None] * (colour - video[index])
    return np.rint(video).astype(np.uint8)
