"""Videos back to facts by plain image analysis, and the scorer of prompts that rests on it."""

import statistics
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nabla_attn.moving_shapes.outline import Fit, fit_shape
from nabla_attn.moving_shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SIZES,
    Scene,
    Words,
    describe,
    held_out_scenes,
    lane_at,
    parse_caption,
    say,
)

JUDGE = "2"
"""Version of this judge, which records name. The first one, of records without a name, allowed for
the look of a shape where it overlapped 70 % with an ellipse, a rectangle or a triangle of any
height and width, in the middle one of all frames; it did not see holes, fragments and stains."""

MIN_CONTRAST = 60.0
"""RGB distance from the background below which nothing is seen."""

MIN_AREA = 0.005
"""Share of the frame below which a spot is a fragment, not a shape."""

MAX_BOX = 0.5
"""Share of the frame beyond which a spot's bounding box is no shape but a broken background."""

MAX_COLOUR_ERROR = 90.0
"""RGB distance beyond which a spot has none of the known colours, and a pixel is a stain."""

MIN_TRAVEL = 0.08
"""Share of the frame that the centre must move to have a direction."""

EDGE = 3
"""Pixels around an outline that belong to it, however blurred it is."""

MIN_OUTLINE = 0.92
"""Mean overlap with the best-fitting shape below which a person sees none of the known kinds."""

MIN_WORST_OUTLINE = 0.85
"""The same of a single frame: one broken frame of a video is seen."""

MIN_LEAD = 0.06
"""Mean overlap by which a kind must lead the next one; a rounded square is no circle."""

MAX_BLEMISH = 0.02
"""Share of a shape's area that holes, and fragments around it, and stains on it may have each."""


@dataclass(frozen=True)
class ShapeFacts:
    """The look of one shape; None where it cannot be told.

    Attributes:
        colour: Its name.
        kind: None also where a person would not call it by any name, for its outline or blemishes.
        direction: The way it goes.
        size: "small" or "large".
        lane: The lane nearest to its path, such as "first row".
        outline: Mean overlap (intersection over union) with the best-fitting shape of its kind.
        outline_min: The same of the worst frame; 0 where a frame does not show the shape.
        holes: Area of holes as a share of the shape's, mean over frames.
        fragments: The same of what is seen in the frame beside all shapes.
        stains: The same of pixels in it that do not have its colour.
    """

    colour: str | None
    kind: str | None
    direction: str | None
    size: str | None
    lane: str | None = None
    outline: float = 0.0
    outline_min: float = 0.0
    holes: float = 0.0
    fragments: float = 0.0
    stains: float = 0.0


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
    """One connected spot in one frame; lengths are shares of the frame."""

    colour: str | None
    fits: dict[str, Fit]
    area: int
    holes: float
    stains: float
    x: float
    y: float


@dataclass(frozen=True)
class _Frame:
    """The spots of a frame, and the pixels that are seen beside them."""

    spots: list[_Spot]
    loose: int


def _nearest(pixel: NDArray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {
        name: float(np.linalg.norm(pixel - np.array(rgb))) for name, rgb in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOUR_ERROR else None


def _border_colour(video: NDArray) -> NDArray:
    edges = (video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _look(frame: NDArray, background: NDArray) -> _Frame:
    """What stands out from the background of a frame [height, width, 3]."""
    contrast = np.linalg.norm(frame - background, axis=-1)
    strong = contrast > MIN_CONTRAST
    if not strong.any():
        return _Frame([], 0)
    # The edge of a shape lies where half of its contrast is reached, however blurred it is.
    mask = contrast > max(MIN_CONTRAST, float(np.median(contrast[strong])) / 2)
    labels, _ = ndimage.label(mask)
    spots, taken = [], np.zeros_like(mask)
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if not MIN_AREA <= labels[box].size / mask.size <= MAX_BOX:
            continue
        inside = ndimage.binary_fill_holes(labels[box] == index)
        if inside.sum() < MIN_AREA * mask.size:
            continue
        taken[box] |= inside
        spots.append(_look_at_spot(frame, labels == index, box, inside))
    around = ndimage.binary_dilation(taken, iterations=EDGE) if spots else taken
    # Single pixels are noise.
    loose = ndimage.binary_opening(strong & ~around, np.ones((2, 2)))
    return _Frame(spots, int(loose.sum()))


def _look_at_spot(frame: NDArray, spot: NDArray, box: tuple[slice, ...], inside: NDArray) -> _Spot:
    area, (height, width) = int(inside.sum()), spot.shape
    core = ndimage.binary_erosion(inside, iterations=EDGE) & spot[box]
    pixels = frame[box][core if core.any() else inside]
    colour = np.median(pixels, axis=0)
    is_stain = np.linalg.norm(pixels - colour, axis=-1) > MAX_COLOUR_ERROR
    filled = np.zeros_like(spot)
    filled[box] = inside
    centre_y, centre_x = ndimage.center_of_mass(filled)
    return _Spot(
        colour=_nearest(colour, COLOURS),
        fits={kind: fit_shape(filled, kind) for kind in KINDS},
        area=area,
        holes=1 - float(spot[box].sum()) / area,
        stains=float(is_stain.sum()) / area,
        x=centre_x / width,
        y=centre_y / height,
    )


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


def _shape_facts(
    colour: str | None, seen: list[tuple[int, _Spot]], loose: list[float], shorter: int
) -> ShapeFacts:
    """Sum up a shape.

    Args:
        colour: Its name.
        seen: The frames that show it, and its spot there.
        loose: Pixels of every frame that belong to no shape.
        shorter: The frame's shorter side in pixels.
    """
    frames, spots = len(loose), [spot for _, spot in seen]
    means = {kind: sum(spot.fits[kind].overlap for spot in spots) / frames for kind in KINDS}
    second, best = sorted(KINDS, key=means.__getitem__)[1:]
    worst = min(spot.fits[best].overlap for spot in spots) if len(spots) == frames else 0.0
    area = float(np.median([spot.area for spot in spots]))
    blemishes = (
        statistics.fmean(spot.holes for spot in spots),
        statistics.fmean(loose) / area,
        statistics.fmean(spot.stains for spot in spots),
    )
    is_known = (
        means[best] >= MIN_OUTLINE
        and worst >= MIN_WORST_OUTLINE
        and means[best] - means[second] >= MIN_LEAD
        and max(blemishes) <= MAX_BLEMISH
    )
    radius = float(np.median([spot.fits[best].radius for spot in spots])) / shorter
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    kind = best if is_known else None
    direction = _direction(seen, frames)
    lane = None
    if direction is not None:
        # A triangle's centre of mass lies a third of its radius below the middle of its height.
        lift = SIZES[size] / 3 if best == "triangle" else 0.0
        x, y = (statistics.fmean(getattr(spot, axis) for spot in spots) for axis in "xy")
        lane = lane_at(direction, x, y - lift)
    return ShapeFacts(colour, kind, direction, size, lane, means[best], worst, *blemishes)


def judge(video: NDArray[np.uint8]) -> Facts:
    """Read a video of this world back into facts.

    The kind of a shape is the one whose best-fitting ideal shape it overlaps most over the whole
    video, and none where the overlap is too small for an eye, in the mean or in one frame, where
    two kinds fit about as well, or where it has holes, fragments or stains. Its direction is read
    from the path of its centre, its size from the fit.

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
    looks = [_look(frame, border) for frame in pixels]
    seen: dict[tuple[str, int], list[tuple[int, _Spot]]] = {}
    for time, look in enumerate(looks):
        in_frame: dict[str, int] = {}
        for spot in sorted(look.spots, key=lambda spot: -spot.area):
            name = spot.colour or ""
            in_frame[name] = in_frame.get(name, -1) + 1
            seen.setdefault((name, in_frame[name]), []).append((time, spot))
    loose = [float(look.loose) for look in looks]
    shapes = {}
    for key, spots in sorted(seen.items()):
        if len(spots) > len(video) / 2:
            shapes[key] = spots
        else:
            for time, spot in spots:
                loose[time] += spot.area
    shorter = min(video.shape[1:3])
    facts = (
        _shape_facts(name or None, spots, loose, shorter) for (name, _), spots in shapes.items()
    )
    return Facts(tuple(facts), _nearest(border, BACKGROUNDS))


def score(video: NDArray[np.uint8], asked: Scene | Words) -> dict[str, float]:
    """Compare a video with the scene it should show.

    Shapes are matched by colour. Where a shape is missing or has the wrong colour, its colour is
    wrong, and its other attributes are compared with the shapes that are left over, in order.

    Args:
        video: uint8 [frames, height, width, 3].
        asked: The scene that the video should show, or what is said of it.

    Returns:
        Whether each is right, as bool: "number", "colour", "shape", "direction", and, where they
        are said of every shape, "size", "lane" and "background". What was measured, as float:
        "outline", the mean over the shapes, and of the worst shape "outline_min", "holes",
        "fragments" and "stains" (`ShapeFacts`).
    """
    words = say(asked) if isinstance(asked, Scene) else asked
    facts = judge(video)
    left = list(facts.shapes)
    pairs = []
    for truth in sorted(words.shapes, key=lambda shape: shape.colour):
        same = [found for found in left if found.colour == truth.colour]
        found = same[0] if same else left[0] if left else ShapeFacts(None, None, None, None)
        if found in left:
            left.remove(found)
        pairs.append((truth, found))
    looks = [found for _, found in pairs]
    right = {
        "number": facts.num_shapes == len(words.shapes),
        "colour": all(found.colour == truth.colour for truth, found in pairs),
        "shape": all(found.kind == truth.kind for truth, found in pairs),
        "direction": all(found.direction == truth.direction for truth, found in pairs),
    }
    if all(truth.size is not None for truth, _ in pairs):
        right["size"] = all(found.size == truth.size for truth, found in pairs)
    if all(truth.lane is not None for truth, _ in pairs):
        right["lane"] = all(found.lane == truth.lane for truth, found in pairs)
    if words.background is not None:
        right["background"] = facts.background == words.background
    return right | {
        "outline": round(statistics.fmean(look.outline for look in looks), 4),
        "outline_min": round(min(look.outline_min for look in looks), 4),
        "holes": round(max(look.holes for look in looks), 4),
        "fragments": round(max(look.fragments for look in looks), 4),
        "stains": round(max(look.stains for look in looks), 4),
    }


class MovingShapesScorer:
    """The scorer of this world; `nabla_attn.evaluation.prompts.Scorer` says what one is."""

    name = "world"
    version = JUDGE

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

    def score(self, frames: NDArray, prompt: str) -> dict[str, float] | None:
        """Whether a video gets each attribute right that its prompt names, and what was measured.

        Args:
            frames: uint8 [frames, height, width, 3].
            prompt: The text.

        Returns:
            The entries of `score` for what the prompt names, and "all", whether all are right; None
            where the prompt is not of this world.
        """
        try:
            words = parse_caption(prompt)
        except ValueError:
            return None
        right = score(frames, words)
        return right | {"all": all(value for value in right.values() if isinstance(value, bool))}
