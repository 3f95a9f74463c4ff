"""Scenes of the moving-shapes world: what is in a video, its pixels, and its caption."""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 210, 40),
    "purple": (180, 50, 200),
    "cyan": (50, 200, 210),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (16, 16, 16), "white": (240, 240, 240)}
KINDS = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
SIZES: dict[str, float] = {"small": 0.14, "large": 0.22}
"""Half the width of a shape's bounding box, as a share of the frame's shorter side."""

TRAVEL = 0.4
"""Share of the frame that a shape crosses from the first frame to the last."""

MARGIN = 0.02
"""Share of the frame kept free between a shape and the frame's edge, and between shapes."""

HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    islice(
        (
            (colour, kind, list(DIRECTIONS)[(i + j) % len(DIRECTIONS)])
            for (i, colour), (j, kind) in product(enumerate(COLOURS), enumerate(KINDS))
        ),
        16,
    )
)
"""16 of the 72 (colour, kind, direction) triples, never shown in training: one direction each of
16 of the 18 coloured shapes, so every word is learnt and only the combination is new."""

USUAL_SIZE = "large"
USUAL_BACKGROUND = "black"
"""What captions may leave out."""

EXAMPLES = (
    "a large red square moving right on a black background",
    "a large blue square moving left on a white background",
    "a small yellow triangle moving down on a black background",
)
"""Captions of combinations that training shows."""


@dataclass(frozen=True)
class Shape:
    """One moving shape; `x` and `y` are its centre in the first frame, as shares of the frame."""

    colour: str
    kind: str
    direction: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Half the width of the bounding box, as a share of the frame's shorter side."""
        return SIZES[self.size]

    @property
    def triple(self) -> tuple[str, str, str]:
        """(colour, kind, direction), which the held-out split is made of."""
        return (self.colour, self.kind, self.direction)

    def centre(self, time: float | NDArray) -> tuple[Any, Any]:
        """Centre (x, y) as shares of the frame, at a time or times from 0 (first frame) to 1."""
        step_x, step_y = DIRECTIONS[self.direction]
        return self.x + TRAVEL * step_x * time, self.y + TRAVEL * step_y * time


@dataclass(frozen=True)
class Scene:
    """Shapes of different colours on a plain background."""

    shapes: tuple[Shape, ...]
    background: str


def _start(rng: random.Random, radius: float, step: int) -> float:
    """Draw one coordinate of the first centre so that the shape stays inside the frame."""
    low, high = radius + MARGIN, 1 - radius - MARGIN
    return rng.uniform(low - min(step, 0) * TRAVEL, high - max(step, 0) * TRAVEL)


def place_shape(
    rng: random.Random, colour: str, kind: str, direction: str, size: str | None = None
) -> Shape:
    """Place a described shape at random, wholly inside the frame from first to last frame."""
    size = size or rng.choice(list(SIZES))
    step_x, step_y = DIRECTIONS[direction]
    radius = SIZES[size]
    x, y = _start(rng, radius, step_x), _start(rng, radius, step_y)
    return Shape(colour, kind, direction, size, x, y)


def _collide(first: Shape, second: Shape) -> bool:
    """Whether the bounding boxes of two shapes come closer than the margin at any time."""
    times = np.linspace(0, 1, 41)  # half a step takes two shapes less than the margin
    (x0, y0), (x1, y1) = first.centre(times), second.centre(times)
    distance = np.maximum(np.abs(x0 - x1), np.abs(y0 - y1))
    return bool(distance.min() < first.radius + second.radius + MARGIN)


def _sample_shape(rng: random.Random, colour: str) -> Shape:
    while True:
        kind, direction = rng.choice(KINDS), rng.choice(list(DIRECTIONS))
        if (colour, kind, direction) not in HELD_OUT:
            return place_shape(rng, colour, kind, direction)


def _sample_apart(rng: random.Random, colour: str, others: list[Shape]) -> Shape:
    """Draw a shape that collides with no other; where none fits, one of the others moves away."""
    while True:
        for _ in range(20):
            shape = _sample_shape(rng, colour)
            if not any(_collide(shape, other) for other in others):
                return shape
        index = rng.randrange(len(others))
        moved = others.pop(index)
        others.insert(index, _sample_apart(rng, moved.colour, others))


def sample_scene(seed: int, num_shapes: int = 1) -> Scene:
    """Draw a training scene: colours differ, nothing collides, no held-out triple occurs.

    Args:
        seed: Seed of the scene.
        num_shapes: Number of shapes, 1 to 3.

    Raises:
        ValueError: `num_shapes` is out of range.
    """
    if num_shapes not in (1, 2, 3):
        raise ValueError(f"num_shapes must be 1, 2 or 3: got {num_shapes}.")
    rng = random.Random(seed)
    background = rng.choice(list(BACKGROUNDS))
    shapes: list[Shape] = []
    for colour in rng.sample(list(COLOURS), num_shapes):
        shapes.append(_sample_apart(rng, colour, shapes))
    return Scene(tuple(shapes), background)


def centred(scene: Scene) -> Scene:
    """The scene as the built-in model knows it: a shape that is alone crosses the frame's middle.

    A caption then says everything that its video shows, but for what it leaves out. Scenes of
    several shapes stay as they are.
    """
    if len(scene.shapes) > 1:
        return scene
    (shape,) = scene.shapes
    step_x, step_y = DIRECTIONS[shape.direction]
    x, y = 0.5 - TRAVEL / 2 * step_x, 0.5 - TRAVEL / 2 * step_y
    return replace(scene, shapes=(replace(shape, x=x, y=y),))


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes of one shape for judging, cycling through the held-out triples.

    Args:
        count: Number of scenes; a shorter list is the beginning of a longer one.
        seed: Seed of sizes, places and backgrounds.
    """
    triples = sorted(HELD_OUT)
    scenes = []
    for index in range(count):
        rng = random.Random(f"held-out {seed} {index}")
        shape = place_shape(rng, *triples[index % len(triples)])
        scenes.append(Scene((shape,), rng.choice(list(BACKGROUNDS))))
    return scenes


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


@dataclass(frozen=True)
class ShapeWords:
    """What a caption says about one shape; `size` is None where it is left out."""

    colour: str
    kind: str
    direction: str
    size: str | None = None


@dataclass(frozen=True)
class Words:
    """What a caption says about a scene; `background` is None where it is left out."""

    shapes: tuple[ShapeWords, ...]
    background: str | None = None


def describe(scene: Scene, rng: random.Random | None = None, drop: float = 0.25) -> str:
    """Say what a scene shows, such as "a large red square moving right on a black background".

    Args:
        scene: The scene.
        rng: Random numbers that decide whether sizes and the background are left out, as short
            prompts do; None says everything. Only what is usual is left out: shapes that are all
            large, a background that is black. A short caption then still says one thing.
        drop: Probability of leaving out either.
    """
    is_large = all(shape.size == USUAL_SIZE for shape in scene.shapes)
    is_black = scene.background == USUAL_BACKGROUND
    with_size = rng is None or rng.random() >= drop or not is_large
    with_background = rng is None or rng.random() >= drop or not is_black
    parts = []
    for shape in scene.shapes:
        size = f"{shape.size} " if with_size else ""
        parts.append(f"a {size}{shape.colour} {shape.kind} moving {shape.direction}")
    sentence = " and ".join(parts)
    return f"{sentence} on a {scene.background} background" if with_background else sentence


def _any_of(words: Iterable[str]) -> str:
    return "|".join(words)


_SHAPE = re.compile(
    rf"(?:an? )?(?:(?P<size>{_any_of(SIZES)}) )?(?P<colour>{_any_of(COLOURS)}) "
    rf"(?P<kind>{_any_of(KINDS)}) moving (?P<direction>{_any_of(DIRECTIONS)})"
)
_BACKGROUND = re.compile(rf"(.*) on an? (?P<background>{_any_of(BACKGROUNDS)}) background")


def parse_caption(caption: str) -> Words:
    """Read a caption back into facts.

    Raises:
        ValueError: The sentence describes no scene of this world.
    """
    text = " ".join(caption.lower().strip(" .").split())
    background = None
    if match := _BACKGROUND.fullmatch(text):
        text, background = match[1], match["background"]
    shapes = []
    for part in text.split(" and "):
        match = _SHAPE.fullmatch(part)
        if match is None:
            raise ValueError(
                f"not a caption of the moving-shapes world: got {caption!r}. "
                f"Write for example {', or '.join(map(repr, EXAMPLES))}; "
                f"colours: {', '.join(COLOURS)}; shapes: {', '.join(KINDS)}; "
                f"directions: {', '.join(DIRECTIONS)}; sizes: {', '.join(SIZES)}; "
                f"backgrounds: {', '.join(BACKGROUNDS)}."
            )
        shapes.append(ShapeWords(**match.groupdict()))
    return Words(tuple(shapes), background)
