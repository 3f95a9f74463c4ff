"""One call of `nabla evaluate`: algorithms found, videos made and measured, work shared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_attn.evaluation.match import Match, fill_algorithms
from nabla_attn.evaluation.prompts import Item
from nabla_attn.evaluation.run import (
    Evaluation,
    Measures,
    VideoCallback,
    evaluate_items,
    list_algorithms,
    take_shard,
)
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.work_sharing import OnItem, Shared


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """What is evaluated, and how processes share it.

    Attributes:
        load: Loads the pipeline into a process.
        request: The run; prompt, seed and algorithm are replaced.
        algorithms: Algorithms, of which some may have a `*` that `target` fills.
        items: Prompts and seeds.
        folder: The run's folder.
        fps: Frames per second of the videos.
        measures: What is measured.
        target: The quantity and value that a `*` reaches; `("", 0)` without one.
        shard: (k, n): this process takes every n-th item from k on.
        engine: "locks" or "ray", see `share_work`.
        workers: Number of Ray's workers.
        has_gpus: Whether Ray's workers take a GPU each.
    """

    load: Callable[[], Any]
    request: GenerationRequest
    algorithms: Sequence[str]
    items: Sequence[Item]
    folder: Path
    fps: float
    measures: Measures
    target: tuple[str, float] = ("", 0.0)
    shard: tuple[int, int] = (0, 1)
    engine: str = "locks"
    workers: int | None = None
    has_gpus: bool = True

    def __post_init__(self) -> None:
        if self.workers is not None and self.engine == "locks":
            raise ValueError("--workers is for --engine ray; start more processes instead.")

    def start(self) -> Evaluation:
        """Load the pipeline; what a worker of Ray begins with."""
        return self._evaluation(self.load())

    def run(
        self,
        *,
        on_try: Callable[[str, float], None],
        on_found: Callable[[str, Match], None],
        on_video: VideoCallback,
        on_item: OnItem,
    ) -> Shared:
        """Make and measure everything that is missing in the folder.

        Args:
            on_try: Called with each algorithm that is tried for the target, and what it gives.
            on_found: Called with each filled algorithm and what was found.
            on_video: Called before every video that this process makes.
            on_item: Called with each item that a worker of Ray has made, or that has failed.
        """
        by, target = self.target
        pipeline = self.load() if by or self.engine == "locks" else None
        filled = fill_algorithms(
            pipeline,
            self.request,
            self.algorithms,
            self.items[:1],
            by,
            target,
            on_try=on_try,
            on_found=on_found,
        )
        names = list_algorithms(filled)
        if self.engine == "locks":
            evaluation = self._evaluation(pipeline)
            return evaluation.run(names, self.items, shard=self.shard, on_video=on_video)
        return evaluate_items(
            self.start,
            self.folder,
            names,
            take_shard(self.items, self.shard),
            self.measures,
            engine=self.engine,
            workers=self.workers,
            has_gpus=self.has_gpus,
            on_item=on_item,
        )

    def _evaluation(self, pipeline: Any) -> Evaluation:
        return Evaluation(pipeline, self.request, self.folder, fps=self.fps, measures=self.measures)
