"""Scenes to sentences and back."""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from nabla_attn.moving_shapes.scene import BACKGROUNDS, COLOURS, DIRECTIONS, KINDS, SIZES, Scene


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
    """Say what a scene shows, such as "a small red circle moving right on a black background".

    Args:
        scene: The scene.
        rng: Random numbers that decide whether sizes and the background are left out, as short
            prompts do; None says everything.
        drop: Probability of leaving out either.
    """
    with_size = rng is None or rng.random() >= drop
    with_background = rng is None or rng.random() >= drop
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
                'Write for example "a small red circle moving right on a black background"; '
                f"colours: {', '.join(COLOURS)}; shapes: {', '.join(KINDS)}; "
                f"directions: {', '.join(DIRECTIONS)}; sizes: {', '.join(SIZES)}; "
                f"backgrounds: {', '.join(BACKGROUNDS)}."
            )
        shapes.append(ShapeWords(**match.groupdict()))
    return Words(tuple(shapes), background)
