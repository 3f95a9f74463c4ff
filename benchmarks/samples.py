"""Pictures of docs/samples.md: every prompt that the demo's was chosen from, dense and sparse.

    python -m benchmarks.choose_demo runs/judged
    python -m benchmarks.judge_builtin dense topk-0.07_sta-17-1-1_tail-first --trained \\
        --videos runs/judged
    python -m benchmarks.samples runs/judged
    python -m benchmarks.pages

With a folder of `nabla compare`, such as that of `make demo`, README's moving picture:

    python -m benchmarks.samples --demo out/demo
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.choose_demo import ALGORITHM
from nabla_attn.files import whole_file
from nabla_attn.media import read_video

FRAMES = 5
"""Frames of a row, from the first to the last."""

GAP = 4
"""Pixels between pictures."""

COLOURS = 48
"""Colours of a picture: few, since the world has few."""

NO_DITHER = Image.Dither.NONE


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", type=Path, nargs="?", help="folder of `choose_demo`")
    parser.add_argument("--count", type=int, default=32, help="number of prompts")
    parser.add_argument("--output", type=Path, default=Path("docs/samples-images"))
    parser.add_argument("--demo", type=Path, help="folder of `nabla compare`")
    parser.add_argument("--gif", type=Path, default=Path("docs/images/demo.gif"))
    options = parser.parse_args()
    if options.videos:
        for seed in range(options.count):
            rows = [
                read_frames(options.videos / "trained" / algorithm / f"{seed:04d}.npz")
                for algorithm in ("dense", ALGORITHM)
            ]
            write_sheet(rows, options.output / f"{seed:02d}.png")
    if options.demo:
        write_gif(read_video(options.demo / "side_by_side.mp4"), options.gif)


def read_frames(path: Path) -> NDArray[np.uint8]:
    """Frames that `judging.make_video` kept."""
    with np.load(path) as kept:
        return kept["frames"]


def beside(pictures: list[NDArray[np.uint8]], axis: int) -> NDArray[np.uint8]:
    """Pictures in a row (axis 1) or a column (axis 0), with grey gaps."""
    shape = list(pictures[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 128, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis)


def write_sheet(videos: list[NDArray[np.uint8]], path: Path) -> None:
    """A row of frames for each video, as a PNG of few colours."""
    chosen = np.linspace(0, len(videos[0]) - 1, FRAMES).round().astype(int)
    rows = [beside([video[index] for index in chosen], 1) for video in videos]
    picture = Image.fromarray(beside(rows, 0)).quantize(
        COLOURS, Image.Quantize.MAXCOVERAGE, dither=NO_DITHER
    )
    with whole_file(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def write_gif(video: NDArray[np.uint8], path: Path) -> None:
    """Every second frame of a video, in a loop."""
    frames = [
        Image.fromarray(frame).quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=NO_DITHER)
        for frame in video[::2]
    ]
    with whole_file(path) as temporary:
        frames[0].save(
            temporary, "GIF", save_all=True, append_images=frames[1:], duration=133, loop=0
        )


if __name__ == "__main__":
    main()
