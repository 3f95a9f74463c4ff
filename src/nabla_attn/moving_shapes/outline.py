"""How well a spot fills an ideal shape: its overlap with the best-fitting one of a kind."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nabla_attn.moving_shapes.scene import AREAS

BINS_PER_PIXEL = 4
"""Radii are compared in quarters of a pixel."""

STEPS = (2.0, 1.0, 0.5, 0.25)
"""Pixels by which the centre of a fit moves, from coarse to fine."""

REACH: dict[str, Callable[[NDArray, NDArray], NDArray]] = {
    "circle": np.hypot,
    "square": lambda dx, dy: np.maximum(np.abs(dx), np.abs(dy)),
    "triangle": lambda dx, dy: np.maximum(2 * np.abs(dx) - dy, dy),
}
"""Radius at which a shape around (0, 0) reaches a point; every kind is one outline, scaled."""


@dataclass(frozen=True)
class Fit:
    """The best-fitting shape of one kind.

    Attributes:
        overlap: Intersection over union with the spot, from 0 to 1.
        radius: Half the width of its bounding box, in pixels.
    """

    overlap: float
    radius: float


def fit_shape(spot: NDArray[np.bool_], kind: str) -> Fit:
    """Fit position and size of an ideal shape to a spot.

    Shapes of this world are neither stretched nor turned, so neither is the fit. Parts of it
    beyond the edge of the array count nowhere, as those of a shape that leaves the frame.

    Args:
        spot: The frame, bool [height, width], with at least one pixel.
        kind: "circle", "square" or "triangle".
    """
    ys, xs = np.nonzero(spot)
    radius = float(np.sqrt(len(ys) / AREAS[kind]))
    margin = int(np.ceil(radius)) + 2
    top, left = max(ys.min() - margin, 0), max(xs.min() - margin, 0)
    window = spot[top : ys.max() + margin + 1, left : xs.max() + margin + 1]
    weights = window.ravel().astype(np.float64)
    # A triangle's centre of mass lies a third of its radius below the middle of its height.
    y = ys.mean() - top - (radius / 3 if kind == "triangle" else 0.0)
    x = xs.mean() - left
    best = _best_radius(window.shape, weights, kind, y, x)
    for step in STEPS:
        is_moving = True
        while is_moving:
            is_moving = False
            for dy, dx in ((-step, 0), (step, 0), (0, -step), (0, step)):
                found = _best_radius(window.shape, weights, kind, y + dy, x + dx)
                if found.overlap > best.overlap:
                    best, y, x, is_moving = found, y + dy, x + dx, True
    return best


def _best_radius(
    shape: tuple[int, ...], weights: NDArray[np.float64], kind: str, y: float, x: float
) -> Fit:
    """The radius of most overlap around a centre: all radii from one histogram."""
    dy = np.arange(shape[0], dtype=np.float32)[:, None] - np.float32(y)
    dx = np.arange(shape[1], dtype=np.float32)[None, :] - np.float32(x)
    bins = (REACH[kind](dx, dy) * BINS_PER_PIXEL).astype(np.intp).ravel()
    within = np.cumsum(np.bincount(bins))
    shared = np.cumsum(np.bincount(bins, weights))
    overlaps = shared / (weights.sum() + within - shared)
    index = int(overlaps.argmax())
    return Fit(float(overlaps[index]), (index + 1) / BINS_PER_PIXEL)
