"""One PNG of a comparison: a row of frames per algorithm, its figures, and where it kept what."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla_attn.files import whole_file
from nabla_attn.record import RunRecord

DPI = 150
LABEL, FRAME, MAP, GAP, MARGIN = 2.35, 1.5, 1.75, 0.1, 0.35  # inches
HEADER, FOOTER = 1.05, 0.55
INK, MUTED, RULE, ACCENT, PAPER = "#1b1f24", "#667080", "#d8dee6", "#0f766e", "#ffffff"

ALIGN = ("left", "center", "right")

Video = tuple[np.ndarray, RunRecord]


def draw_contact_sheet(videos: Sequence[Video], path: str | Path, *, num_frames: int = 6) -> None:
    """Write a contact sheet as a PNG, which appears whole or not at all.

    Args:
        videos: Frames, uint8 [frames, height, width, 3] of one size, and the record of each video,
            in order from the top.
        path: PNG file to write.
        num_frames: Number of frames shown of each video, spread evenly from the first to the last.

    Raises:
        ValueError: There are no videos, or they differ in size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = {frames.shape for frames, _ in videos}
    if len(sizes) != 1:
        raise ValueError(f"a contact sheet needs videos of one size, got {sorted(sizes)}.")
    total, height, width, _ = next(iter(sizes))
    picked = np.unique(np.linspace(0, total - 1, num_frames).round().astype(int))
    cell = FRAME * min(max(width / height, 0.6), 1.8)
    row = max(cell * height / width, 1.35)
    sheet_width = 2 * MARGIN + LABEL + len(picked) * (cell + GAP) + 0.3 + MAP
    sheet_height = HEADER + len(videos) * (row + 2 * GAP) + FOOTER
    figure = Figure(figsize=(sheet_width, sheet_height), dpi=DPI, facecolor=PAPER)
    canvas = _Canvas(figure, sheet_width, sheet_height)
    _draw_header(canvas, videos[0][1])
    slowest = max(record.numbers["seconds"]["transformer"] for _, record in videos)
    image = None
    for index, (frames, record) in enumerate(videos):
        top = HEADER + index * (row + 2 * GAP)
        if index:
            canvas.line(MARGIN, top - GAP, sheet_width - MARGIN)
        _draw_label(canvas, record, top, row, slowest)
        for column, frame in enumerate(picked):
            left = MARGIN + LABEL + column * (cell + GAP)
            axes = canvas.axes(left, top + (row - cell * height / width) / 2, cell, None, frames)
            axes.imshow(frames[frame], interpolation="antialiased")
            if not index:
                axes.set_title(f"frame {frame + 1}", fontsize=7, color=MUTED, pad=3)
        image = _draw_map(canvas, record, sheet_width - MARGIN - MAP, top, row)
    _draw_footer(canvas, image)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


class _Canvas:
    """A figure addressed in inches from its top left corner."""

    def __init__(self, figure: Any, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def axes(
        self, left: float, top: float, width: float, height: float | None, frames: Any = None
    ) -> Any:
        if height is None:
            height = width * frames.shape[1] / frames.shape[2]
        axes = self.figure.add_axes(
            (
                left / self.width,
                1 - (top + height) / self.height,
                width / self.width,
                height / self.height,
            )
        )
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=RULE, linewidth=0.6)
        return axes

    def text(
        self,
        left: float,
        top: float,
        text: str,
        size: float,
        *,
        room: float | None = None,
        **style: Any,
    ) -> None:
        """Write a text, smaller where it would be wider than `room` inches."""
        # Prompts are data: a dollar sign in one must not start mathematics.
        style = {"color": INK, "va": "top", "parse_math": False} | style
        artist = self.figure.text(
            left / self.width, 1 - top / self.height, text, fontsize=size, **style
        )
        if room is not None:
            width = artist.get_window_extent().width / self.figure.dpi
            artist.set_fontsize(size * min(1.0, room / width))

    def line(self, left: float, top: float, right: float) -> None:
        from matplotlib.lines import Line2D

        height = 1 - top / self.height
        xs = [left / self.width, right / self.width]
        self.figure.add_artist(Line2D(xs, [height, height], color=RULE, linewidth=0.6))


def _draw_header(canvas: _Canvas, record: RunRecord) -> None:
    config, tokens = record.config, record.numbers["tokens"]
    count = tokens["frames"] * tokens["height"] * tokens["width"]
    prompt = " ".join(str(config["prompt"]).split())
    room = int((canvas.width - 2 * MARGIN) / 0.115)
    # Cut by characters: not every language has spaces.
    title = prompt if len(prompt) <= room else f"{prompt[: room - 2].rstrip()} …"
    canvas.text(MARGIN, 0.26, f"“{title}”", 15, weight="bold")
    facts = [
        f"{config['frames']} frames, {config['width']}×{config['height']}",
        f"{count:,} video tokens",
        f"{config['steps']} steps, guidance {config['guidance']:g}, seed {config['seed']}",
        f"{record.device}, {config['dtype']}",
    ]
    canvas.text(MARGIN, 0.6, "   ·   ".join(facts), 8.5, color=MUTED)


def _draw_label(canvas: _Canvas, record: RunRecord, top: float, row: float, slowest: float) -> None:
    from matplotlib.patches import Rectangle

    numbers, algo = record.numbers, str(record.config["sparse_algo"])
    seconds, kept = numbers["seconds"]["transformer"], numbers["attention"]["density"]
    to_dense = numbers.get("to_dense", {})
    is_dense = algo == "dense"
    top += (row - 1.2) / 2
    canvas.text(MARGIN, top, algo, 12, room=LABEL - GAP, weight="bold")
    pairs = "every token pair" if is_dense else f"{1 - kept:.0%} sparse, {kept:.0%} of pairs kept"
    canvas.text(MARGIN, top + 0.27, pairs, 8.5, color=MUTED)
    length = LABEL - 0.35
    for share, colour in ((1.0, "#edf1f5"), (seconds / slowest if slowest else 0, ACCENT)):
        axes = canvas.axes(MARGIN, top + 0.52, length, 0.07)
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.add_patch(Rectangle((0, 0), share, 1, color=colour, linewidth=0))
    canvas.text(MARGIN, top + 0.68, f"{seconds:.1f} s transformer", 8.5)
    if not is_dense and to_dense.get("speed_up"):
        speed = f"{to_dense['speed_up']:.2f}×"
        canvas.text(MARGIN + length, top + 0.66, speed, 10, weight="bold", color=ACCENT, ha="right")
    closeness = "the reference" if is_dense else ""
    if to_dense and not is_dense:
        psnr = to_dense["psnr"]
        closeness = f"SSIM {to_dense['ssim']:.3f}" + (f", PSNR {psnr:.1f} dB" if psnr else "")
    canvas.text(MARGIN, top + 0.93, closeness, 8.5, color=MUTED)


def _draw_map(canvas: _Canvas, record: RunRecord, left: float, top: float, row: float) -> Any:
    """Draw density by step and layer, and return the image for the colour bar."""
    attention = record.numbers["attention"]
    cells = attention.get("density_per_step_and_layer") or [[attention["density"]]]
    values = np.array(cells, dtype=float).T  # layers down, steps across
    height = min(row - 0.35, 1.15)
    axes = canvas.axes(left, top + (row - height) / 2 - 0.05, MAP, height)
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_xlabel("step →", fontsize=7, color=MUTED, labelpad=2)
    axes.set_ylabel("← layer", fontsize=7, color=MUTED, labelpad=2)
    return image


def _draw_footer(canvas: _Canvas, image: Any) -> None:
    top = canvas.height - FOOTER + 0.12
    left = canvas.width - MARGIN - MAP
    canvas.text(left - 0.12, top - 0.03, "share of token pairs kept", 7, color=MUTED, ha="right")
    axes = canvas.axes(left, top, MAP, 0.08)
    bar = canvas.figure.colorbar(image, cax=axes, orientation="horizontal", ticks=[0, 0.5, 1])
    for label, align in zip(bar.ax.set_xticklabels(["0", "50 %", "100 %"]), ALIGN, strict=True):
        label.set_horizontalalignment(align)
    bar.ax.tick_params(labelsize=7, labelcolor=MUTED, length=0, pad=2)
    bar.outline.set(edgecolor=RULE, linewidth=0.6)  # type: ignore[operator]
