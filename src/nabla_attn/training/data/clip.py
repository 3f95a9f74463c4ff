"""One video with its caption, wherever it comes from: its frames, or why it is skipped."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from nabla_attn.errors import first_line
from nabla_attn.media import UnreadableMedia, iterate_video, stack_frames

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


MAX_FRAMES = 1025
"""Frames of a video that is taken whole."""


def read_clip(clip: Clip, frames: int | None, fps: float | None) -> np.ndarray:
    """Decode the beginning of a clip.

    Args:
        clip: The clip.
        frames: The number of frames after which reading stops; None takes all.
        fps: The rate to bring the clip to, by leaving frames out or repeating them; None keeps its
            own.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        Skipped: There is no video, it cannot be read whole, or it is too long to be taken whole.
    """
    video = clip.open()
    if isinstance(video, np.ndarray):
        return video[:frames]
    limit = MAX_FRAMES + 1 if frames is None else frames
    try:
        decoded = stack_frames(islice(_at_rate(iterate_video(video), fps), limit))
    except UnreadableMedia as error:
        raise Skipped("unreadable", str(error)) from error
    except Exception as error:
        # Libraries meet hostile bytes with every kind of error, and other clips are waiting.
        raise Skipped("unreadable", first_line(error)) from error
    if frames is None and len(decoded) > MAX_FRAMES:
        raise Skipped("too long", f"more than {MAX_FRAMES} frames; pass a number of frames")
    return decoded


def _at_rate(
    frames: Iterator[tuple[float | None, np.ndarray]], fps: float | None
) -> Iterator[np.ndarray]:
    """The picture that is on the screen at every n / fps."""
    if fps is None:
        yield from (picture for _, picture in frames)
        return
    shown: np.ndarray | None = None
    count, start, begin, end = 0, None, 0.0, 0.0
    for time, picture in frames:
        if time is None:
            raise UnreadableMedia("its frames have no times, which a rate needs")
        start = time if start is None else start
        # A frame shows until the next one begins, the last as long as the one before it.
        begin, end = end, time - start
        while shown is not None and count < _pictures_until(end, fps):
            yield shown
            count += 1
        shown = picture
    while shown is not None and count < max(_pictures_until(2 * end - begin, fps), 1):
        yield shown
        count += 1


def _pictures_until(time: float, fps: float) -> int:
    """How many of the times n / fps are before a time."""
    return math.ceil(time * fps - 1e-4)
