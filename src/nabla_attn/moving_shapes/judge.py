"""Videos back to facts by plain image analysis, and the scorer of prompts that rests on it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nabla_attn.moving_shapes.scene import (
    AREAS,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SIZES,
    Scene,
    Shape,
    describe,
    held_out_scenes,
    parse_caption,
    signed_distance,
)

MIN_CONTRAST = 60.0
"""RGB distance from the background below which nothing counts as a shape."""

MIN_AREA = 0.005
"""Share of the frame below which a spot is taken for noise."""

MAX_BOX = 0.5
"""Share of the frame beyond which a spot's bounding box is no shape but a broken background."""

MAX_COLOUR_ERROR = 90.0
"""RGB distance beyond which a spot has none of the known colours."""

MIN_TRAVEL = 0.08
"""Share of the frame that the centre must move to have a direction."""

_SPREADS = {
    "circle": (1 / 2, 1 / 2),
    "square": (3**-0.5, 3**-0.5),
    "triangle": (6**-0.5, 2**0.5 / 3),
}
"""Standard deviation of each kind along x and y at radius 1."""

MIN_FIT = 0.7
"""Overlap with the best fitting kind below which a spot is of no known kind."""


@dataclass(frozen=True)
class ShapeFacts:
    """The look of one shape; None where it cannot be told."""

    colour: str | None
    kind: str | None
    direction: str | None
    size: str | None


@dataclass(frozen=True)
class Facts:
    """The content of a video; shapes are sorted by colour."""

    shapes: tuple[ShapeFacts, ...]
    background: str | None

    @property
    def num_shapes(self) -> int:
        """Number of shapes that are seen."""
        return len(self.shapes)


@dataclass(frozen=True)
class _Spot:
    """One connected spot in one frame, in shares of the frame."""

    colour: str | None
    fits: dict[str, float]
    width: float
    x: float
    y: float


def _nearest(pixel: NDArray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {
        name: float(np.linalg.norm(pixel - np.array(rgb))) for name, rgb in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOUR_ERROR else None


def _border_colour(video: NDArray) -> NDArray:
    edges = (video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _fits(spot: NDArray) -> dict[str, float]:
    """Overlap (intersection over union) of a spot with each kind of the same centre and spread.

    Moments hardly change when an edge is ragged; a bounding box does.
    """
    rows, columns = np.nonzero(spot)
    dy = np.arange(spot.shape[0])[:, None] - rows.mean()
    dx = np.arange(spot.shape[1])[None, :] - columns.mean()
    fits = {}
    for kind, (spread_x, spread_y) in _SPREADS.items():
        # A pixel's own spread of 1/12 counts, so that a lone row has a height.
        radius_x = float(np.sqrt(columns.var() + 1 / 12)) / spread_x
        radius_y = float(np.sqrt(rows.var() + 1 / 12)) / spread_y
        # A triangle's centre of mass lies a third of its height above its base.
        middle = 1 / 3 if kind == "triangle" else 0.0
        template = signed_distance(kind, dx / radius_x, dy / radius_y + middle, 1.0) < 0
        shared = float((spot & template).sum())
        fits[kind] = shared / (len(rows) + AREAS[kind] * radius_x * radius_y - shared)
    return fits


def _spots(frame: NDArray, background: NDArray) -> list[_Spot]:
    """Connected spots of a frame [height, width, 3] that stand out from the background."""
    contrast = np.linalg.norm(frame - background, axis=-1)
    strong = contrast > MIN_CONTRAST
    if not strong.any():
        return []
    # The edge of a shape lies where half of its contrast is reached, however blurred it is.
    mask = contrast > max(MIN_CONTRAST, float(np.median(contrast[strong])) / 2)
    labels, _ = ndimage.label(mask)
    height, width = mask.shape
    spots = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = ndimage.binary_fill_holes(labels[box] == index)
        if inside.sum() < MIN_AREA * mask.size or inside.size > MAX_BOX * mask.size:
            continue
        box_height, box_width = inside.shape
        centre_y, centre_x = ndimage.center_of_mass(inside)
        spots.append(
            _Spot(
                colour=_nearest(np.median(frame[box][inside], axis=0), COLOURS),
                fits=_fits(inside),
                width=float(np.sqrt(box_height * box_width)) / min(height, width),
                x=(box[1].start + centre_x) / width,
                y=(box[0].start + centre_y) / height,
            )
        )
    return spots


def _direction(spots: list[tuple[int, _Spot]], frames: int) -> str | None:
    """Where a spot goes: the slope of its centre over the frame number, taken over all frames."""
    if frames < 2 or len(spots) < 2:
        return None
    times = np.array([time for time, _ in spots]) / (frames - 1)
    if np.ptp(times) < 0.5:
        return None
    dx = float(np.polyfit(times, [spot.x for _, spot in spots], 1)[0])
    dy = float(np.polyfit(times, [spot.y for _, spot in spots], 1)[0])
    if max(abs(dx), abs(dy)) < MIN_TRAVEL:
        return None
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _shape_facts(colour: str | None, spots: list[tuple[int, _Spot]], frames: int) -> ShapeFacts:
    fits = {kind: float(np.median([spot.fits[kind] for _, spot in spots])) for kind in KINDS}
    best = max(fits, key=fits.__getitem__)
    kind = best if fits[best] >= MIN_FIT else None
    radius = float(np.median([spot.width for _, spot in spots])) / 2
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    return ShapeFacts(colour, kind, _direction(spots, frames), size)


def judge(video: NDArray[np.uint8]) -> Facts:
    """Read a video of this world back into facts.

    The kind of a shape is the one it overlaps most at its own centre and spread, its direction is
    read from the path of its centre, its size from its bounding box.

    Args:
        video: uint8 [frames, height, width, 3], 48 pixels or more a side.

    Returns:
        Shapes that are seen in more than half of the frames, and the background.

    Raises:
        ValueError: The array is not a video.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(
            f"a video is uint8 [frames, height, width, 3]: got {video.dtype} {list(video.shape)}"
        )
    pixels = video.astype(np.float32)
    border = _border_colour(pixels)
    frames = len(video)
    seen: dict[tuple[str, int], list[tuple[int, _Spot]]] = {}
    for time, frame in enumerate(pixels):
        in_frame: dict[str, int] = {}
        for spot in sorted(_spots(frame, border), key=lambda spot: (spot.x, spot.y)):
            name = spot.colour or ""
            in_frame[name] = in_frame.get(name, -1) + 1
            seen.setdefault((name, in_frame[name]), []).append((time, spot))
    shapes = tuple(
        _shape_facts(name or None, spots, frames)
        for (name, _), spots in sorted(seen.items())
        if len(spots) > frames / 2
    )
    return Facts(shapes, _nearest(border, BACKGROUNDS))


def score(video: NDArray[np.uint8], scene: Scene) -> dict[str, bool]:
    """Compare a video with the scene it should show.

    Shapes are matched by colour. Where a shape is missing or has the wrong colour, its colour is
    wrong, and its other attributes are compared with the shapes that are left over, in order.

    Args:
        video: uint8 [frames, height, width, 3].
        scene: The scene that the video should show.

    Returns:
        Whether each is right: "number", "colour", "shape", "direction", "size" and "background".
    """
    facts = judge(video)
    left = list(facts.shapes)
    pairs = []
    for truth in sorted(scene.shapes, key=lambda shape: shape.colour):
        same = [found for found in left if found.colour == truth.colour]
        found = same[0] if same else left[0] if left else None
        if found is not None:
            left.remove(found)
        pairs.append((truth, found))
    return {
        "number": facts.num_shapes == len(scene.shapes),
        "colour": all(found is not None and found.colour == truth.colour for truth, found in pairs),
        "shape": all(found is not None and found.kind == truth.kind for truth, found in pairs),
        "direction": all(
            found is not None and found.direction == truth.direction for truth, found in pairs
        ),
        "size": all(found is not None and found.size == truth.size for truth, found in pairs),
        "background": facts.background == scene.background,
    }


class MovingShapesScorer:
    """The scorer of this world; `nabla_attn.evaluation.prompts.Scorer` says what one is."""

    name = "world"

    def prompts(self, count: int) -> list[str]:
        """Different held-out prompts: combinations that training never shows.

        Raises:
            ValueError: The world has fewer.
        """
        found: list[str] = []
        for scene in held_out_scenes(64 * count):
            prompt = describe(scene)
            if prompt not in found:
                found.append(prompt)
            if len(found) == count:
                return found
        raise ValueError(
            f"the built-in world has {len(found)} held-out prompts: got {count}. Ask for more "
            "videos of each with --seeds, or pass other prompts with --prompts FILE."
        )

    def score(self, frames: NDArray, prompt: str) -> dict[str, bool] | None:
        """Whether a video gets each attribute right that its prompt names, and all of them.

        Args:
            frames: uint8 [frames, height, width, 3].
            prompt: The text.

        Returns:
            Some of "number", "colour", "shape", "direction", "size" and "background", and "all";
            None where the prompt is not of this world.
        """
        try:
            words = parse_caption(prompt)
        except ValueError:
            return None
        shapes = tuple(
            Shape(shape.colour, shape.kind, shape.direction, shape.size or "", 0.5, 0.5)
            for shape in words.shapes
        )
        right = score(frames, Scene(shapes, words.background or ""))
        if any(shape.size is None for shape in words.shapes):
            del right["size"]
        if words.background is None:
            del right["background"]
        return right | {"all": all(right.values())}
