"""All files of a comparison: videos next to each other under small labels, and a page to open."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla_attn.files import write_text
from nabla_attn.generation.video import write_video
from nabla_attn.record import RunRecord
from nabla_attn.viz.contact_sheet import draw_contact_sheet
from nabla_attn.viz.document import render_page

PAGE = "compare.html"
STRIP, GAP, TEXT = 26, 8, 14  # pixels
INK, PAPER = (27, 31, 36), (255, 255, 255)


def write_comparison(
    videos: Sequence[tuple[np.ndarray, RunRecord]], folder: Path, fps: float
) -> None:
    """Write the videos, their records, all of them side by side, a contact sheet, and `PAGE`.

    Args:
        videos: Frames, uint8 [frames, height, width, 3], and record of each algorithm, dense first.
        folder: The folder of the files.
        fps: Frames per second.
    """
    labels = [str(record.config["sparse_algo"]) for _, record in videos]
    for label, (frames, record) in zip(labels, videos, strict=True):
        write_video(frames, folder / f"{label}.mp4", fps)
        record.save(folder / f"{label}.json")
    joined = join_side_by_side([frames for frames, _ in videos], labels)
    write_video(joined, folder / "side_by_side.mp4", fps)
    records = [record for _, record in videos]
    clips = [(folder / f"{label}.mp4").read_bytes() for label in labels]
    write_text(folder / PAGE, build_comparison(records, clips))
    draw_contact_sheet(videos, folder / "contact_sheet.png")


def build_comparison(records: Sequence[RunRecord], clips: Sequence[bytes]) -> str:
    """Return a page on which dense and one sparse video play in step under a wipe.

    It holds the videos and needs no other file, server or network.

    Args:
        records: The record of each algorithm, dense first, then at least one other.
        clips: The mp4 file of each.
    """
    config, tokens = records[0].config, records[0].numbers["tokens"]
    count = tokens["frames"] * tokens["height"] * tokens["width"]
    slowest = max(_seconds(record) for record in records)
    facts = [
        f"{config['frames']} frames, {config['width']}×{config['height']}",
        f"{count:,} video tokens",
        f"{config['steps']} steps, guidance {config['guidance']:g}, seed {config['seed']}",
        f"{records[0].device}, {config['dtype']}",
    ]
    rows = [_row(record, mp4, slowest) for record, mp4 in zip(records, clips, strict=True)]
    return render_page(
        "compare",
        title="Dense and sparse attention",
        prompt=config["prompt"],
        facts=facts,
        width=config["width"],
        height=config["height"],
        rows=rows,
    )


def _row(record: RunRecord, mp4: bytes, slowest: float) -> dict[str, Any]:
    """What the page shows of one video."""
    kept, to_dense = record.numbers["attention"]["density"], record.numbers["to_dense"]
    seconds, algo = _seconds(record), str(record.config["sparse_algo"])
    is_dense = algo == "dense"
    speed = to_dense["speed_up"]
    psnr = "" if to_dense["psnr"] is None else f", PSNR {to_dense['psnr']:.1f} dB"
    return {
        "label": algo,
        "mp4": mp4,
        "kept": round(kept, 4),
        "pairs": "every token pair" if is_dense else f"{kept:.1%} of token pairs",
        "time": round(seconds / slowest, 4) if slowest else 0,
        "seconds": f"{seconds:.1f} s in the transformer"
        + (f", {speed:.2f}x as fast" if speed and not is_dense else ""),
        "closeness": "" if is_dense else f"SSIM to dense {to_dense['ssim']:.3f}{psnr}",
    }


def _seconds(record: RunRecord) -> float:
    return float(record.numbers["seconds"]["transformer"])


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
