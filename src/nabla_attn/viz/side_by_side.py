"""Videos next to each other under small labels, and all files of a comparison."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nabla_attn.generation.video import write_video
from nabla_attn.record import RunRecord
from nabla_attn.viz.contact_sheet import draw_contact_sheet

STRIP, GAP, TEXT = 26, 8, 14  # pixels
INK, PAPER = (27, 31, 36), (255, 255, 255)


def write_comparison(
    videos: Sequence[tuple[np.ndarray, RunRecord]], folder: Path, fps: float
) -> None:
    """Write the videos, their records, all of them side by side, and a contact sheet.

    Args:
        videos: Frames, uint8 [frames, height, width, 3], and record of each algorithm.
        folder: The folder of the files.
        fps: Frames per second.
    """
    labels = [str(record.config["sparse_algo"]) for _, record in videos]
    for label, (frames, record) in zip(labels, videos, strict=True):
        write_video(frames, folder / f"{label}.mp4", fps)
        record.save(folder / f"{label}.json")
    joined = join_side_by_side([frames for frames, _ in videos], labels)
    write_video(joined, folder / "side_by_side.mp4", fps)
    draw_contact_sheet(videos, folder / "contact_sheet.png")


def join_side_by_side(videos: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Put videos in one row, each at its own pixels, label above; the result has even sizes.

    Args:
        videos: Frames of each video, uint8 [frames, height, width, 3], all of one shape.
        labels: One line of text for each video.

    Returns:
        Frames, uint8 [frames, height + label strip, sum of widths + gaps, 3].

    Raises:
        ValueError: There are no videos, their shapes differ, or labels and videos differ in number.
    """
    shapes = {video.shape for video in videos}
    if len(shapes) != 1 or len(labels) != len(videos):
        raise ValueError(
            f"need videos of one shape and a label each, got {len(videos)} videos of "
            f"{sorted(shapes)} and {len(labels)} labels."
        )
    frames, height, _, _ = videos[0].shape
    panels = []
    for video, label in zip(videos, labels, strict=True):
        strip = _draw_label(label, video.shape[2])
        panel = np.full((frames, height + STRIP, strip.shape[1], 3), PAPER, np.uint8)
        panel[:, :STRIP] = strip
        left = (strip.shape[1] - video.shape[2]) // 2
        panel[:, STRIP:, left : left + video.shape[2]] = video
        panels += [panel, np.full((frames, height + STRIP, GAP, 3), PAPER, np.uint8)]
    joined = np.concatenate(panels[:-1], axis=2)
    odd = [(0, size % 2) for size in joined.shape[1:3]]
    return np.pad(joined, ((0, 0), *odd, (0, 0)), constant_values=255)


def _draw_label(text: str, width: int) -> np.ndarray:
    """Return centred text, at least as wide as the video: uint8 [STRIP, width, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=TEXT)
    width = max(width, int(font.getlength(text)) + 8)
    strip = Image.new("RGB", (width, STRIP), PAPER)
    ImageDraw.Draw(strip).text((width / 2, STRIP / 2), text, fill=INK, font=font, anchor="mm")
    return np.asarray(strip)
