"""Videos as uint8 arrays [frames, height, width, 3]: to H.264 mp4 files through PyAV, and scored.

`Scorer` is all that this package knows of a world whose prompts can be read back from videos.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from nabla_attn.files import whole_file

CONTAINER_OPTIONS = {"movflags": "+faststart", "fflags": "+bitexact"}
# x264's bytes depend on its number of threads; one keeps them the same on every machine.
ENCODER_OPTIONS = {"crf": "14", "preset": "medium", "threads": "1"}
M_PERTURB, ZEROS = -6, 255
"""glibc's option of `mallopt`, and the value whose complement fills the memory given out."""
_zeroing, _num_zeroing = Lock(), 0


def check_frames(frames: np.ndarray) -> np.ndarray:
    """Return `frames` if it is a video: uint8 [frames, height, width, 3], at least one frame.

    Raises:
        ValueError: Another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(
            "frames must be uint8 [frames, height, width, 3], "
            f"got {frames.dtype} {list(frames.shape)}."
        )
    return frames


def check_fps(fps: float) -> float:
    """Return `fps` if it is above 0 and at most 1000.

    Raises:
        ValueError: It is not.
    """
    if not 0 < fps <= 1000:
        raise ValueError(f"fps must be above 0 and at most 1000, got {fps}.")
    return fps


def write_video(frames: np.ndarray, path: str | Path, fps: float) -> None:
    """Write an H.264 mp4 (yuv420p, BT.709), whole or not at all.

    The same frames give the same bytes where memory comes from glibc, as on most Linux systems.

    Args:
        frames: uint8 [frames, height, width, 3], even height and width.
        path: The mp4 to write; replaced if it exists.
        fps: Frames per second, above 0.

    Raises:
        ValueError: Frames of another shape or dtype, an odd height or width, fps not above 0.
        OSError: The folder cannot be written.
    """
    import av

    count, height, width, _ = check_frames(frames).shape
    if height % 2 or width % 2:
        even = f"{height + height % 2}x{width + width % 2}"
        raise ValueError(
            f"H.264 in yuv420p takes even sizes only: got {height}x{width}. "
            f"Pad the frames to {even} with np.pad before writing."
        )
    check_fps(fps)
    with (
        whole_file(path) as temporary,
        zeroed_memory(),
        av.open(
            str(temporary.absolute()), "w", format="mp4", options=CONTAINER_OPTIONS
        ) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        _describe_stream(stream, height, width)
        for index in range(count):
            container.mux(stream.encode(_to_yuv(frames[index])))
        container.mux(stream.encode())


@contextmanager
def zeroed_memory() -> Iterator[None]:
    """Let glibc give out zeros for the time of a block; other allocators stay as they are.

    x264's choice of quantizers reads memory that nothing has written, so that its bytes depend on
    what the process freed before.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        yield
        return
    _count_zeroing(1, set_option)
    try:
        yield
    finally:
        _count_zeroing(-1, set_option)


def _count_zeroing(change: int, set_option: Any) -> None:
    """Count the blocks that want zeros, as threads may write videos at once."""
    global _num_zeroing
    with _zeroing:
        _num_zeroing += change
        set_option(M_PERTURB, ZEROS if _num_zeroing else 0)


def _describe_stream(stream: Any, height: int, width: int) -> None:
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.options = ENCODER_OPTIONS
    context = stream.codec_context
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def _to_yuv(frame: np.ndarray) -> Any:
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=exact,
        threads=1,
    )


class Scorer(Protocol):
    """Prompts whose facts can be read back from a video."""

    @property
    def name(self) -> str:
        """The key of its scores in records."""

    @property
    def version(self) -> str:
        """The name of its way of reading; scores of different ones do not compare."""

    def prompts(self, count: int) -> list[str]:
        """Different prompts that training does not show.

        Raises:
            ValueError: There are fewer.
        """

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, float] | None:
        """Fact -> whether the video shows it, as bool, "all" among them; measure -> float.

        None for prompts of others.

        Args:
            frames: uint8 [frames, height, width, 3].
            prompt: The text.
        """
