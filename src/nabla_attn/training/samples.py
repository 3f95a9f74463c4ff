"""Samples of a model that is being trained: held-out prompts, their scores, one sheet."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nabla_attn.files import whole_file
from nabla_attn.generation.generate import generate
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.generation.video import Scorer
from nabla_attn.models import remove

Rows = list[tuple[str, np.ndarray]]


class SampleMaker:
    """Generates the same held-out prompts from the same noise each time it is called.

    Args:
        pipeline: The pipeline that is trained; gets a copy of each transformer, and is on its
            device while it generates.
        request: The video to make; its prompt and seed are replaced.
        scorer: The source of the prompts; it scores their videos.
        count: Number of prompts.
        folder: The folder where `step-<number>.png` is written.
        part: The transformer's name in the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        request: GenerationRequest,
        scorer: Scorer,
        count: int,
        folder: Path,
        part: str = "transformer",
    ) -> None:
        self._pipeline, self._request, self._part = pipeline, request, part
        self._scorer, self._prompts = scorer, scorer.prompts(count)
        self._folder = folder

    def __call__(self, step: int, transformer: Any) -> dict[str, float]:
        """Generate, score, and write the sheet.

        Returns:
            The share of videos that show each fact, such as {"right_colour": 0.75}, and the mean of
            what else the scorer measures, such as {"outline": 0.9}.
        """
        rows: Rows = []
        right: list[dict[str, float]] = []
        with self._placed(transformer) as pipeline:
            for seed, prompt in enumerate(self._prompts):
                video, _ = generate(pipeline, replace(self._request, prompt=prompt, seed=seed))
                right.append(self._scorer.score(video, prompt) or {})
                rows.append((prompt, video))
        draw_samples(rows, self._folder / f"step-{step:08d}.png")
        return {
            f"right_{name}" if isinstance(value, bool) else name: statistics.fmean(
                facts[name] for facts in right
            )
            for name, value in right[0].items()
            if all(name in facts for facts in right)
        }

    @contextmanager
    def _placed(self, transformer: Any) -> Iterator[Any]:
        """The pipeline with a copy of the transformer, on its device for the time of the block."""
        # A copy: generation puts its own algorithm in place and takes it out again.
        copy = deepcopy(transformer).eval().requires_grad_(False)
        remove(copy)
        before = self._pipeline.device
        setattr(self._pipeline, self._part, copy)
        try:
            yield self._pipeline.to(next(copy.parameters()).device)
        finally:
            # The same pipeline may encode the clips, and all of them in one place.
            self._pipeline.to(before)


def draw_samples(rows: Rows, path: Path, *, num_frames: int = 6) -> None:
    """Write a contact sheet as PNG: a prompt and its frames in each row.

    Args:
        rows: Prompts with videos, uint8 [frames, height, width, 3], of one size.
        path: The PNG to write.
        num_frames: Frames shown, evenly spread from first to last.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total, height, width, _ = rows[0][1].shape
    picked = np.unique(np.linspace(0, total - 1, num_frames).round().astype(int))
    row_height = 1.4 * height / width + 0.3
    figure = Figure((1.4 * len(picked), row_height * len(rows)), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), len(picked), squeeze=False)
    for (prompt, video), row in zip(rows, grid, strict=True):
        for axes, frame in zip(row, picked, strict=True):
            axes.imshow(video[frame])
            axes.axis("off")
        row[0].set_title(prompt, fontsize=8, loc="left", parse_math=False)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})
