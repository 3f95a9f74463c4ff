"""One video with its caption, wherever it comes from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
CAPTION_NAMES = ("text", "caption", "prompt")

Footage = Path | BinaryIO | np.ndarray
"""A video file, its bytes, or frames: uint8 [frames, height, width, 3]."""


class Skipped(ValueError):
    """A clip that cannot be used.

    Attributes:
        kind: the reason in two words, the same for all such clips.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class Clip:
    """A video that is opened when it is its turn.

    Attributes:
        name: in its source.
        caption: what it shows.
        open: gives the footage; raises `Skipped` where there is none.
    """

    name: str
    caption: str
    open: Callable[[], Footage]


class Source(Protocol):
    """Clips in a fixed order."""

    def __len__(self) -> int:
        """Number of clips, those that will be skipped included."""

    def identity(self) -> str:
        """A digest that changes with the clips."""

    def read(self, start: int, stop: int) -> Iterator[Clip]:
        """The clips from start to stop."""


def refuse(kind: str, detail: str = "") -> Callable[[], Footage]:
    """How a clip without footage is opened."""

    def open_nothing() -> Footage:
        raise Skipped(kind, detail)

    return open_nothing


def pick_caption(values: dict[str, object]) -> str | None:
    """The first caption in a row or JSON object that is not empty, under any of the usual names."""
    found = (values.get(name) for name in CAPTION_NAMES)
    captions = (" ".join(text.split()) for text in found if isinstance(text, str))
    return next(filter(None, captions), None)
