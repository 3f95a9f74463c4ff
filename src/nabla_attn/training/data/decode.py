"""Video files to frames, at most as many as are needed and at the rate that was asked for."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from nabla_attn.training.data.clip import Clip, Skipped

MAX_FRAMES = 1025
"""Frames of a video that is taken whole; a longer one would fill the memory."""


def read_clip(clip: Clip, frames: int | None, fps: float | None) -> np.ndarray:
    """Decode the beginning of a clip.

    Args:
        clip: to open.
        frames: at most so many; None takes all.
        fps: rate to bring it to, by leaving frames out or repeating them; None keeps its own.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        Skipped: there is no footage, it cannot be read, or it is too long to be taken whole.
    """
    footage = clip.open()
    if isinstance(footage, np.ndarray):
        return footage[:frames]
    import av

    limit = MAX_FRAMES + 1 if frames is None else frames
    pictures: list[np.ndarray] = []
    try:
        # Absolute: a relative name with a colon would be the address of something elsewhere.
        source = footage if hasattr(footage, "read") else str(footage.absolute())
        # Titles and the like may be in any encoding, and nobody reads them.
        with av.open(source, metadata_errors="replace") as container:
            if not container.streams.video:
                raise Skipped("unreadable", "it has no video stream")
            for picture in _at_rate(_decode(container), fps):
                pictures.append(picture)
                if len(pictures) == limit:
                    break
    except (av.FFmpegError, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Skipped("unreadable", reason) from error
    if not pictures:
        raise Skipped("unreadable", "it has no frames")
    if frames is None and len(pictures) > MAX_FRAMES:
        raise Skipped("too long", f"more than {MAX_FRAMES} frames; pass a number of frames")
    if len({picture.shape for picture in pictures}) > 1:
        raise Skipped("unreadable", "its size changes")
    return np.stack(pictures)


def _decode(container: Any) -> Iterator[tuple[float | None, np.ndarray]]:
    """Times in seconds and upright pictures."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    for frame in container.decode(stream):
        picture = frame.to_ndarray(format="rgb24")
        turns = frame.rotation // 90 % 4
        yield frame.time, np.rot90(picture, turns) if turns else picture


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
            raise Skipped("unreadable", "its frames have no times, which a rate needs")
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
