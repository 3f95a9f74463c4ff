"""The ideal video nearest to one that a model drew: a clean shape of the right kind on its path."""

import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.signal import savgol_filter

from nabla_attn.moving_shapes.scene import (
    AREAS,
    BACKGROUNDS,
    COLOURS,
    SIZES,
    ShapeWords,
    Words,
    signed_distance,
)

MIN_COVERAGE = 0.35
"""Share of the way from the background's colour to the shape's from which a pixel is seen."""

MIN_SEEN = 0.9
"""Share of the frames that must show something."""

RADIUS_RANGE = (0.6, 1.5)
"""Radii, as multiples of the one asked for, between which a spot is taken for the shape."""

MAX_JUMP = 0.1
"""Share of the frame that a shape may move from one frame to the next."""

MAX_BACKGROUND_ERROR = 0.15
"""Difference from a known background, of the whole range, beyond which it is another."""


@dataclass(frozen=True)
class _Path:
    """Centres of mass of a spot by frame, in pixels, and its area in the median frame."""

    x: NDArray
    y: NDArray
    area: float


def nearest_ideal(video: NDArray[np.uint8], words: Words) -> NDArray[np.uint8] | None:
    """Draw the asked shape where a video shows something like it.

    The shape has the kind and the colour of the words and follows the largest spot of every frame,
    its path smoothed over a few frames. Its radius lies half-way (geometrically) between the spot's
    and the one asked for, or the nearer of both where none is asked for.

    Args:
        video: uint8 [frames, height, width, 3] of one shape.
        words: What its caption says.

    Returns:
        uint8 [frames, height, width, 3]; None where the video shows no such shape: it is missing in
        some frames, jumps, is far too small or large, or the background is another.
    """
    described = words.shapes[0]
    ground = _background(video, words.background)
    if ground is None:
        return None
    height, width = video.shape[1:3]
    shorter = min(height, width)
    path = _follow(video, ground, np.array(COLOURS[described.colour], np.float32))
    if path is None or max(_jump(path.x), _jump(path.y)) > MAX_JUMP * shorter:
        return None
    seen = float(np.sqrt(path.area / AREAS[described.kind])) / shorter
    asked = (
        SIZES[described.size]
        if described.size
        else min(SIZES.values(), key=lambda size: abs(size - seen))
    )
    if not RADIUS_RANGE[0] < seen / asked < RADIUS_RANGE[1]:
        return None
    return _draw(video.shape, described, ground, path, float(np.sqrt(seen * asked)) * shorter)


def _background(video: NDArray[np.uint8], name: str | None) -> NDArray | None:
    """Its colour, if the frame's edge has it."""
    edge = np.median(np.concatenate([video[:, :3], video[:, -3:]], 1).reshape(-1, 3), 0)
    known = [np.array(colour, np.float32) for colour in BACKGROUNDS.values()]
    colour = (
        np.array(BACKGROUNDS[name], np.float32)
        if name
        else min(known, key=lambda colour: float(np.abs(colour - edge).sum()))
    )
    return colour if np.abs(colour - edge).max() <= 255 * MAX_BACKGROUND_ERROR else None


def _follow(video: NDArray[np.uint8], ground: NDArray, colour: NDArray) -> _Path | None:
    """The path of the largest spot."""
    way = colour - ground
    coverage = np.clip((video - ground) @ way / (way @ way), 0, 1)
    spots = [_largest_spot(frame) for frame in coverage]
    seen = [index for index, spot in enumerate(spots) if spot]
    if len(seen) < MIN_SEEN * len(video):
        return None
    found = np.array([spots[index] for index in seen])
    x, y = (np.interp(np.arange(len(video)), seen, found[:, axis]) for axis in (0, 1))
    if len(video) >= 5:
        window = 9 if len(video) >= 33 else 5
        x, y = savgol_filter(x, window, 1), savgol_filter(y, window, 1)
    return _Path(x, y, float(np.median(found[:, 2])))


def _largest_spot(coverage: NDArray) -> tuple[float, float, float] | None:
    """Centre of mass (x, y) in pixels and area of a frame's largest connected spot."""
    labels, count = ndimage.label(coverage > MIN_COVERAGE)
    if not count:
        return None
    areas = ndimage.sum(coverage, labels, range(1, count + 1))
    weights = coverage * ndimage.binary_dilation(labels == int(np.argmax(areas)) + 1, iterations=2)
    y, x = ndimage.center_of_mass(weights)
    return x + 0.5, y + 0.5, float(weights.sum())


def _jump(centres: NDArray) -> float:
    return float(np.abs(np.diff(centres)).max(initial=0.0))


def _draw(
    shape: tuple[int, ...], words: ShapeWords, ground: NDArray, path: _Path, radius: float
) -> NDArray[np.uint8]:
    """One shape around the given centres of mass, wholly inside the frame."""
    height, width = shape[1:3]
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + 0.5
    way = np.array(COLOURS[words.colour], np.float32) - ground
    # A triangle's centre of mass lies a third of its radius below the middle of its height.
    rise = radius / 3 if words.kind == "triangle" else 0.0
    frames = []
    for x, y in zip(path.x, path.y, strict=True):
        x, y = np.clip(x, radius, width - radius), np.clip(y, radius, height - radius) - rise
        distance = signed_distance(words.kind, columns - x, rows - y, radius)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        frames.append(np.rint(ground + coverage * way).astype(np.uint8))
    return np.stack(frames)


@dataclass(frozen=True)
class Twin:
    """A change that makes another video, and its caption, of a video of one shape.

    Attributes:
        down: Pixels by which it moves down; what comes in is background.
        right: Pixels by which it moves to the right.
        is_mirrored: Whether left and right are exchanged after that.
        turns: Quarter turns to the left after that.
        colour: Name of the shape's new colour.
        background: Name of the new background.
    """

    down: int
    right: int
    is_mirrored: bool
    turns: int
    colour: str
    background: str

    def of_words(self, words: Words) -> Words:
        """What the caption of the changed video says."""
        shape = words.shapes[0]
        direction = shape.direction
        if self.is_mirrored:
            direction = {"left": "right", "right": "left"}.get(direction, direction)
        left_turn = {"right": "up", "up": "left", "left": "down", "down": "right"}
        for _ in range(self.turns):
            direction = left_turn[direction]
        changed = replace(shape, colour=self.colour, direction=direction)
        return Words((changed,), words.background and self.background)

    def of_video(self, video: NDArray[np.uint8], words: Words, ground: NDArray) -> NDArray:
        """The changed video.

        Args:
            video: uint8 [frames, height, width, 3], square where it is turned.
            words: What its caption says.
            ground: Its background's colour, RGB.
        """
        moved = np.empty_like(video)
        moved[:] = ground
        height, width = video.shape[1:3]
        moved[:, _part(self.down, height), _part(self.right, width)] = video[
            :, _part(-self.down, height), _part(-self.right, width)
        ]
        if self.is_mirrored:
            moved = moved[:, :, ::-1]
        turned = np.rot90(moved, self.turns, (1, 2))
        return self._recolour(turned, words, ground)

    def _recolour(self, video: NDArray, words: Words, ground: NDArray) -> NDArray[np.uint8]:
        """Exchange both colours; what lies on no line between them keeps its distance from it."""
        way = np.array(COLOURS[words.shapes[0].colour], np.float32) - ground
        new_ground = np.array(BACKGROUNDS[self.background], np.float32)
        new_way = np.array(COLOURS[self.colour], np.float32) - new_ground
        offset = video - ground.astype(np.float32)
        coverage = (offset @ way / (way @ way))[..., None]
        changed = new_ground + coverage * new_way + (offset - coverage * way)
        return np.rint(np.clip(changed, 0, 255)).astype(np.uint8)


def _part(shift: int, length: int) -> slice:
    return slice(max(shift, 0), length + min(shift, 0))


def draw_twin(ideal: NDArray[np.uint8], words: Words, rng: random.Random) -> Twin:
    """Draw a change under which an ideal video stays wholly inside the frame."""
    seen = np.abs(ideal.astype(np.float32) - ideal[0, 0, 0]).max(-1).max(0) > 12
    rows, columns = np.nonzero(seen)
    height, width = seen.shape
    can_turn = words.shapes[0].kind != "triangle" and height == width
    return Twin(
        down=rng.randint(-rows.min(), height - 1 - rows.max()),
        right=rng.randint(-columns.min(), width - 1 - columns.max()),
        is_mirrored=rng.random() < 0.5,
        turns=rng.randrange(4) if can_turn else 0,
        colour=rng.choice(list(COLOURS)),
        background=rng.choice(list(BACKGROUNDS)),
    )
