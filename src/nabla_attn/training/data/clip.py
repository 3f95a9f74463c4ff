"""One video with its caption, wherever it comes from, and why one is skipped."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
CAPTION_NAMES = ("text", "caption", "prompt")
MAX_CAPTION_BYTES = 16384
MAX_METADATA_BYTES = 2**20
"""Bytes of a line of metadata, or of the JSON beside a video."""

VideoData = Path | BinaryIO | np.ndarray
"""A video file, its bytes, or frames: uint8 [frames, height, width, 3]."""


class Skipped(ValueError):
    """A clip that cannot be used.

    Attributes:
        kind: The reason in two or three words, the same for all such clips.
        detail: What is special about this one.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Clip:
    """A video that is opened when it is its turn.

    Attributes:
        name: Its name in the source; what is not Unicode in it is written as an escape.
        caption: What the video shows.
        open: Returns the video; raises `Skipped` where there is none.
    """

    name: str
    caption: str
    open: Callable[[], VideoData]

    def __post_init__(self) -> None:
        name = self.name.encode("utf-8", "backslashreplace").decode()
        object.__setattr__(self, "name", name)


class ClipSource(Protocol):
    """Clips in a fixed order."""

    def __len__(self) -> int:
        """Number of clips, those that will be skipped included."""

    def identity(self) -> str:
        """A digest that changes with the clips."""

    def read(self, start: int, stop: int) -> Iterator[Clip]:
        """The clips from start to stop."""


def skipped_clip(name: str, reason: Skipped) -> Clip:
    """A clip that is counted and cannot be opened."""

    def open_nothing() -> VideoData:
        raise reason

    return Clip(name, "", open_nothing)


def is_video(name: str) -> bool:
    """Whether a file of this name is taken for a video."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def clean_caption(text: str) -> str:
    """A caption in one line, without the halves of characters that were cut in two.

    Raises:
        Skipped: It is longer than `MAX_CAPTION_BYTES`.
    """
    # Half of a surrogate pair stands for nothing; JSON may have one where an emoji was cut.
    content = text.encode("utf-8", "ignore")
    if len(content) > MAX_CAPTION_BYTES:
        raise Skipped(
            "caption too long", f"{len(content)} bytes, at most {MAX_CAPTION_BYTES} are taken"
        )
    return " ".join(content.decode("utf-8").split())


def pick_caption(values: dict[str, object]) -> str:
    """The first caption of a row or JSON object that is not empty, under any of the usual names.

    Raises:
        Skipped: There is none, or it is too long.
    """
    found = (values.get(name) for name in CAPTION_NAMES)
    captions = (clean_caption(text) for text in found if isinstance(text, str))
    caption = next(filter(None, captions), None)
    if caption is None:
        raise Skipped("no caption", f"it has none of {', '.join(CAPTION_NAMES)}")
    return caption
