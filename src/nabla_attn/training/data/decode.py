"""Clips to frames, at most as many as are needed and at the rate that was asked for."""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np

from nabla_attn.errors import first_line
from nabla_attn.media import UnreadableMedia, iterate_video, stack_frames
from nabla_attn.training.data.clip import Clip, Skipped

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
